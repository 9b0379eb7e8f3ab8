# SPDX-License-Identifier: MIT
"""The C engine where something fails: descriptors, the journal, guests that are over several limits at once."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from paravirt.errors import ResourceLimit
from paravirt.ring._core import lib
from paravirt.ring.stream import XENSTORE_FRONT, ByteStream
from paravirt.xenstore.core import CoreConnection, CoreHub
from paravirt.xenstore.journal import Journal
from paravirt.xenstore.limits import Limits
from paravirt.xenstore.ring_page import RingError
from paravirt.xenstore.wire import ACK, Op, encode

from .story import FakeDomains
from .test_guests import Machine
from .test_ring_link import Served

DEADLINE_S = 30.0


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(stack)


@pytest.fixture
def hub() -> Iterator[CoreHub]:
    with CoreHub(control=FakeDomains(set(range(10)))) as hub:
        yield hub


def ask(connection: CoreConnection, op: Op, payload: bytes, transaction: int = 0) -> bytes:
    """The payload of the reply to one request."""
    connection.feed(encode(op, 1, transaction, payload))
    reply = connection.output()
    connection.sent(len(reply))
    return reply[16:]


def journals(directory: Path) -> dict[str, bytes]:
    """What a new hub gets from a journal: values by path."""
    with CoreHub() as hub, Journal(directory, hub):
        dom0 = hub.connect()
        paths, found = [""], {}
        for path in paths:
            names = ask(dom0, Op.DIRECTORY, (path or "/").encode() + b"\0").split(b"\0")[:-1]
            paths += [f"{path}/{name.decode()}" for name in names]
            if path:
                found[path] = ask(dom0, Op.READ, path.encode() + b"\0")
        assert hub.check() == []
        return found


def test_a_socket_that_cannot_be_served_is_closed(hub: CoreHub) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        fd = theirs.detach()
        with pytest.raises(ResourceLimit):
            hub.serve_socket(0, fd)  # its loop is not open
        with pytest.raises(OSError):
            os.fstat(fd)
        assert ours.recv(1) == b""
    assert hub.statistics().connections == 0


def test_the_journal_knows_every_domain_that_may_own_something(tmp_path: Path) -> None:
    with CoreHub(control=FakeDomains({7, 8})) as hub, Journal(tmp_path, hub):
        assert ask(hub.connect(), Op.WRITE, b"/a\0") == ACK
        assert ask(hub.connect(), Op.SET_PERMS, b"/a\0n7\0r8\0") == ACK
        hub.connect(9)
    with CoreHub() as hub, Journal(tmp_path, hub):
        assert list(hub.domains) == [0, 7, 8, 9]


def test_levels_that_a_write_makes_are_in_the_journal(tmp_path: Path) -> None:
    deep = "/".join("abcd" * 200)
    with CoreHub() as hub, Journal(tmp_path, hub):
        dom0 = hub.connect()
        assert ask(dom0, Op.WRITE, f"/{deep}\0end".encode()) == ACK
        assert ask(dom0, Op.WRITE, b"/a/b/more\0x") == ACK
    size = (tmp_path / "journal").stat().st_size
    assert size < 4 * len(deep)  # not a record for each level
    found = journals(tmp_path)
    assert found[f"/{deep}"] == b"end"
    assert found["/a/b/more"] == b"x"
    assert found["/a/b"] == b""


def test_what_a_transaction_removes_and_makes_again_is_in_the_journal(tmp_path: Path) -> None:
    with CoreHub() as hub, Journal(tmp_path, hub):
        dom0 = hub.connect()
        for path in (b"/a/b/c\0old", b"/a/d\0old", b"/e/f\0old"):
            assert ask(dom0, Op.WRITE, path) == ACK
        number = int(ask(dom0, Op.TRANSACTION_START, b"\0")[:-1])
        for op, payload in (
            (Op.RM, b"/a\0"),
            (Op.WRITE, b"/a/b/x\0new"),
            (Op.RM, b"/e/f\0"),
            (Op.WRITE, b"/e/f/g\0new"),
            (Op.RM, b"/e\0"),
            (Op.WRITE, b"/e/f\0newest"),
            (Op.WRITE, b"/a/k/l/m/n\0deep"),
            (Op.WRITE, b"/a/k/l/o\0less deep"),
            (Op.WRITE, b"/a/q/r/s\0other"),
            (Op.SET_PERMS, b"/a/q/r\0r0\0"),
        ):
            assert ask(dom0, op, payload, number) == ACK
        assert ask(dom0, Op.TRANSACTION_END, b"T\0", number) == ACK
        assert hub.check() == []
        names = ask(dom0, Op.DIRECTORY, b"/a\0"), ask(dom0, Op.DIRECTORY, b"/a/k/l\0")
    with CoreHub() as hub, Journal(tmp_path, hub):
        dom0 = hub.connect()
        assert (ask(dom0, Op.DIRECTORY, b"/a\0"), ask(dom0, Op.DIRECTORY, b"/a/k/l\0")) == names
        perms = [ask(dom0, Op.GET_PERMS, path) for path in (b"/a/q\0", b"/a/q/r\0", b"/a/q/r/s\0")]
        assert perms == [b"n0\0", b"r0\0", b"n0\0"]
    found = journals(tmp_path)
    assert {path: value for path, value in found.items() if path[:2] in ("/a", "/e")} == {
        "/a": b"",
        "/a/b": b"",
        "/a/b/x": b"new",
        "/a/k": b"",
        "/a/k/l": b"",
        "/a/k/l/m": b"",
        "/a/k/l/m/n": b"deep",
        "/a/k/l/o": b"less deep",
        "/a/q": b"",
        "/a/q/r": b"",
        "/a/q/r/s": b"other",
        "/e": b"",
        "/e/f": b"newest",
    }


def test_a_snapshot_that_failed_is_tried_again_later(tmp_path: Path) -> None:
    with CoreHub() as hub:
        hub.open_loop()
        with Journal(tmp_path, hub, sync=False) as journal:
            dom0, n_long = hub.connect(), 0
            for _ in range(12000):
                assert ask(dom0, Op.WRITE, b"/a\0" + bytes(4000)) == ACK
                if any(event.kind == lib.PV_XS_EVENT_LONG for event in hub.poll(0)):
                    n_long += 1
                    journal._abort(OSError(28, "no space left"))
            assert n_long == 2  # and not each time


def test_a_guest_over_two_limits_does_not_keep_the_loop_awake(hub: CoreHub) -> None:
    """Its requests wait for it to read, it is not read for its memory: nothing is to be done for it."""
    hub.set_limits(Limits(watch_event_timeout_ms=0))
    guest, dom0 = hub.connect(5), hub.connect()
    assert ask(dom0, Op.WRITE, b"/local/domain/5\0") == ACK
    assert ask(dom0, Op.SET_PERMS, b"/local/domain/5\0n5\0") == ACK
    assert ask(guest, Op.WATCH, b"x\0" + bytes(b"t" * 3000) + b"\0")[:3] == ACK
    guest.sent(guest.n_output_bytes)
    for i in range(100):  # more than a connection may have unsent
        assert ask(dom0, Op.WRITE, b"/local/domain/5/x/%d\0" % i) == ACK
    guest.feed(encode(Op.READ, 1, 0, b"x\0"))
    assert guest.n_output_bytes > 256 << 10
    hub.set_quota(5, "memory", 1000)
    hub.set_quota(5, "outstanding", 1)
    guest.feed(b"")
    hub.set_quota(5, "outstanding", 20)
    while hub.next_dirty() is not None:
        pass
    guest.sent(0)
    assert hub.next_dirty() is None


def test_a_bad_request_that_had_to_wait_ends_a_ring(served: Served) -> None:
    with served.client() as client:
        client.write("x", "v" * 900)
    stream = ByteStream(served.page.view, XENSTORE_FRONT, port=served.port)
    too_long = encode(Op.READ, 1, 0, b"")[:12] + b"\xff\xff\xff\xff"
    stream.write_nowait(encode(Op.READ, 1, 0, b"x\0") * 24 + too_long)  # 20 may be unanswered at once
    deadline = time.monotonic() + DEADLINE_S
    while served.page.error != RingError.PROTOCOL:
        assert time.monotonic() < deadline
        if not stream.read_nowait():
            served.waiter.wait(served.port, timeout_s=0.1)


def test_the_hypervisor_hears_of_a_death_when_the_journal_has_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the domid may mean a new domain, and a crash bring back what the old one had."""
    hub, guests = machine.server.hub, machine.server._guests
    assert guests is not None
    domid = machine.domain("short")
    machine.socket_client(domid).write("data", "x")
    looked = threading.Event()
    monkeypatch.setattr(hub, "flush_journal", looked.set)  # None: it could not be written
    machine.dom0.destroy_domain(domid)
    assert looked.wait(DEADLINE_S)
    assert domid in [domain.domid for domain in machine.dom0.list_domains(dying=True)]
    monkeypatch.undo()
    machine.server._loop.call(guests.look_again)
    deadline = time.monotonic() + DEADLINE_S
    while domid in [domain.domid for domain in machine.dom0.list_domains(dying=True)]:
        assert time.monotonic() < deadline


def test_a_client_that_was_closed_is_forgotten_though_its_socket_lives(hub: CoreHub) -> None:
    """A process that is being forked has the descriptor, too: bytes that come to it then are nobody's."""
    hub.open_loop()
    ours, theirs = socket.socketpair()
    with ours:
        theirs.setblocking(False)
        copy = os.dup(theirs.fileno())
        hub.serve_socket(0, theirs.detach())
        ours.send(b"\xff" * 16)
        hub.poll(0)
        hub.poll(50)
        assert hub.statistics().connections == 0
        before = hub.counters().wake_ups
        ours.send(b"more")
        hub.poll(50)
        assert hub.counters().wake_ups - before <= 2, "it only slept"
        os.close(copy)
