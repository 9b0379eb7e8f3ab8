# SPDX-License-Identifier: MIT
"""The launcher of Debian's daemons: they serve, their guests are guests, and nothing stays."""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from paravirt.errors import AlreadyExists, Closed, InvalidRequest, NotFound, TimedOut
from paravirt.testing.reference_xenstored import Kind, ReferenceDaemon, ReferenceGuest
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.wire import ACK, Op, Packet, PacketParser, encode

from .reference import start_reference

DEADLINE_S = 30.0


@pytest.fixture(params=get_args(Kind))
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ReferenceDaemon]:
    with start_reference(request.param, tmp_path) as daemon:
        yield daemon


def ask(guest: ReferenceGuest, op: Op, payload: bytes) -> Packet:
    guest.send(encode(op, 7, 0, payload))
    parser, packets = PacketParser(), list[Packet]()
    while not packets:
        packets = parser.feed(guest.receive())
    assert len(packets) == 1
    return packets[0]


def test_dom0_is_served(daemon: ReferenceDaemon) -> None:
    with XenstoreClient.connect(daemon.socket_path) as client:
        client.write("/a/b", "1")
        assert client.read("/a/b") == b"1"


def test_a_guest_has_a_guests_rights(daemon: ReferenceDaemon) -> None:
    with XenstoreClient.connect(daemon.socket_path) as client:
        guest = daemon.add_domain(5)
        client.write("/local/domain/5/mine", "x" * 1000)
        client.write("/local/domain/5/theirs", "secret")
        client.set_perms("/local/domain/5/mine", ["n0", "b5"])
        assert ask(guest, Op.READ, b"mine\0") == (Op.READ, 7, 0, b"x" * 1000)
        assert ask(guest, Op.WRITE, b"mine\0" + b"y" * 1800) == (Op.WRITE, 7, 0, ACK)
        assert client.read("/local/domain/5/mine") == b"y" * 1800
        assert ask(guest, Op.READ, b"theirs\0") == (Op.ERROR, 7, 0, b"EACCES\0")
        with pytest.raises(TimedOut):
            guest.receive(timeout_s=0.01)


def test_a_dead_guests_home_is_removed(daemon: ReferenceDaemon) -> None:
    with XenstoreClient.connect(daemon.socket_path) as client, client.watch_queue() as deaths:
        guest = daemon.add_domain(5)
        client.write("/local/domain/5/x", "1")
        client.set_perms("/local/domain/5", ["n5"])
        deaths.add("@releaseDomain")
        deaths.get(timeout_s=DEADLINE_S)  # the one that every new watch gets
        daemon.end_domain(5)
        deaths.get(timeout_s=DEADLINE_S)
        assert not client.exists("/local/domain/5")
    daemon.close()
    with pytest.raises(Closed):
        guest.send(b"x")


def test_domains_that_cannot_be(daemon: ReferenceDaemon) -> None:
    with pytest.raises(InvalidRequest):
        daemon.add_domain(0)
    daemon.add_domain(5)
    with pytest.raises(AlreadyExists):
        daemon.add_domain(5)


def test_it_dies_with_its_launcher(daemon: ReferenceDaemon, tmp_path: Path) -> None:
    script = f"""if True:
        import os, signal
        from paravirt.testing.reference_xenstored import ReferenceDaemon
        daemon = ReferenceDaemon({daemon.kind!r}, {str(tmp_path / "2")!r})
        print(daemon.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -9
    try:
        fd = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], DEADLINE_S)[0]
    finally:
        os.close(fd)


def test_close_ends_it(daemon: ReferenceDaemon) -> None:
    daemon.close()
    daemon.close()
    with pytest.raises(ConnectionRefusedError):
        daemon.connect()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    if Path("/usr/lib/xen-4.17/bin/xenstored").exists():
        pytest.skip("the package is installed: nothing is missing")
    with pytest.raises(NotFound, match=r"xenstored is not in .*python -m paravirt\.testing\.reference_xenstored"):
        ReferenceDaemon("c", tmp_path, cache=tmp_path)


def test_a_path_too_long_for_sockets(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        ReferenceDaemon("c", tmp_path / ("x" * 100))
