# SPDX-License-Identifier: MIT
"""The engine when the kernel or the machine refuses it something: sockets, the journal's file, memory."""

import errno
import faulthandler
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.xenstore.wire import ACK, Op, PacketParser, encode
from tests.faults import each_call_fails, failing
from tests.forked import in_child
from tests.ring.support import compile_c, run_c
from tests.xenstore.engine import Client, engine
from tests.xenstore.fuzz.build import SOURCES

WRITE_A = encode(Op.WRITE, 1, 0, b"/a\0x")
BIG = encode(Op.WRITE, 1, 0, b"/big\0" + b"x" * 4000)


class Loop:
    """A store with a loop that the test turns, and Dom0's sockets."""

    def __init__(self, stack: ExitStack) -> None:
        self.core = stack.enter_context(engine())
        self._stack = stack
        assert lib.pv_xs_loop_open(self.core) == 0
        self._events = ffi.new("struct pv_xs_event[16]")

    def serve(self, domid: int = 0) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._stack.enter_context(ours)
        return ours, lib.pv_xs_serve_socket(lib.pv_xs_connect(self.core, domid), theirs.detach())

    def client(self) -> socket.socket:
        ours, status = self.serve()
        assert status == 0
        return ours

    def poll(self, times: int = 3) -> list[tuple[int, int]]:
        """(kind, mask) of what is told."""
        told = []
        for _ in range(times):
            n = lib.pv_xs_poll(self.core, 1, self._events, 16)
            told += [(event.kind, event.mask) for event in self._events[0:n]]
        return told

    def n_connections(self) -> int:
        statistics = ffi.new("struct pv_xs_statistics *")
        lib.pv_xs_get_statistics(self.core, statistics)
        return int(statistics.connections)


@pytest.fixture
def loop() -> Iterator[Loop]:
    with ExitStack() as stack:
        yield Loop(stack)


def replies(client: socket.socket) -> list[bytes]:
    """The payloads that have come."""
    try:
        return [packet[3] for packet in PacketParser().feed(client.recv(1 << 20))]
    except BlockingIOError:
        return []


# -- sockets


def test_a_loop_that_cannot_be_opened() -> None:
    with engine() as core, failing("epoll_create1", errno.EMFILE):
        assert lib.pv_xs_loop_open(core) == -errno.EMFILE


def test_a_descriptor_that_cannot_be_added(loop: Loop) -> None:
    with failing("epoll_ctl", errno.ENOSPC):
        client, status = loop.serve()
        assert status == -errno.ENOSPC
        assert client.recv(1) == b""
        assert loop.n_connections() == 0
        assert lib.pv_xs_loop_add(loop.core, client.fileno(), 1) == -errno.ENOSPC
    assert lib.pv_xs_loop_remove(loop.core, client.fileno()) == -errno.ENOENT


def test_a_signal_ends_a_poll(loop: Loop) -> None:
    with failing("epoll_wait", errno.EINTR, times=1) as fault:
        assert lib.pv_xs_poll(loop.core, -1, ffi.new("struct pv_xs_event[1]"), 1) == 0
        assert fault.calls == 1


@pytest.mark.parametrize("function", ["recv", "send"])
@pytest.mark.parametrize(
    ("error", "ends"), [(errno.EINTR, False), (errno.EAGAIN, False), (errno.ECONNRESET, True), (errno.EPIPE, True)]
)
def test_a_socket_that_fails(loop: Loop, function: str, error: int, ends: bool) -> None:
    client, other = loop.client(), loop.client()
    client.send(WRITE_A)
    with failing(function, error, times=1) as fault:
        told = loop.poll()
        assert fault.happened
    assert told == [(lib.PV_XS_EVENT_CLOSED, 0)] * ends
    assert loop.n_connections() == 2 - ends
    if ends:
        with suppress(ConnectionResetError):  # it had sent what nobody has read
            assert client.recv(1 << 16) == b""
    else:
        assert replies(client) == [ACK]
    other.send(encode(Op.READ, 1, 0, b"/a\0"))
    loop.poll()
    assert replies(other) == [b"ENOENT\0" if ends and function == "recv" else b"x"]


def test_a_client_that_reads_little_gets_all(loop: Loop) -> None:
    client = loop.client()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.send(BIG)
    sent, parser, n = 0, PacketParser(), 0
    while n < 301:
        if sent < 300:
            client.send(encode(Op.READ, 2, 0, b"/big\0"))
            sent += 1
        loop.poll(1)
        try:
            n += len(parser.feed(client.recv(1500)))
        except BlockingIOError:
            continue
    assert loop.poll() == []


def test_who_leaves_while_its_requests_wait_for_their_turn(loop: Loop) -> None:
    """More requests than one turn has, of several clients; the first, the last and one between them go."""
    clients = [loop.client() for _ in range(5)]
    for client in clients:
        client.send(encode(Op.READ, 1, 0, b"/tool\0") * 1000)
    for index in (2, 0, 4):
        clients[index].close()
        loop.poll(1)
    for _ in range(100):
        loop.poll(1)
        for index in (1, 3):
            replies(clients[index])
    assert loop.n_connections() == 2


# -- the journal


class Journal:
    """A journal of a loop's store, as its caller keeps it."""

    def __init__(self, loop: Loop, folder: Path, *, sync: bool) -> None:
        self._loop = loop
        self._folder = folder
        self._n = 0
        self._sync = sync
        self.replace()
        while not lib.pv_xs_snapshot_step(loop.core, 100):
            pass
        self.adopt()

    def replace(self) -> None:
        self._n += 1
        self.fd = os.open(self._folder / str(self._n), os.O_RDWR | os.O_CREAT)
        lib.pv_xs_snapshot_start(self._loop.core, self.fd)

    def adopt(self) -> None:
        lib.pv_xs_snapshot_adopt(self._loop.core)
        lib.pv_xs_journal_sync(self._loop.core, self._sync)

    def value(self, path: bytes) -> bytes:
        """What a store has that is made from the file."""
        data = (self._folder / str(self._n)).read_bytes()
        with engine() as other:
            assert lib.pv_xs_journal_load(other, data, len(data), ffi.new("uint64_t *")) == 0
            return Client(other).ask(Op.READ, path + b"\0")


def test_a_write_that_a_signal_ends_is_done_again(loop: Loop, tmp_path: Path) -> None:
    journal, client = Journal(loop, tmp_path, sync=False), loop.client()
    client.send(WRITE_A)
    with failing("write", errno.EINTR, times=3) as fault:
        assert loop.poll() == []
        assert fault.calls == 4
    assert (replies(client), journal.value(b"/a")) == ([ACK], b"x")


@pytest.mark.parametrize(("error", "result", "told"), [(errno.ENOSPC, -1, errno.ENOSPC), (0, 0, errno.EIO)])
def test_nothing_is_acknowledged_before_it_is_written(
    loop: Loop, tmp_path: Path, error: int, result: int, told: int
) -> None:
    journal, client = Journal(loop, tmp_path, sync=False), loop.client()
    client.send(WRITE_A)
    with failing("write", error, result=result):
        assert loop.poll() == [(lib.PV_XS_EVENT_JOURNAL, told)]  # told once
        assert replies(client) == []
        assert journal.value(b"/a") == b"! ENOENT\0"
    assert (lib.PV_XS_EVENT_JOURNAL, 0) in loop.poll()
    assert (replies(client), journal.value(b"/a")) == ([ACK], b"x")


def test_a_client_that_leaves_while_the_journal_cannot_be_written(loop: Loop, tmp_path: Path) -> None:
    journal, client = Journal(loop, tmp_path, sync=False), loop.client()
    client.send(WRITE_A)
    with failing("write", errno.ENOSPC):
        loop.poll()
        client.close()
        assert loop.poll() == [(lib.PV_XS_EVENT_CLOSED, 0)]
    loop.poll()
    assert journal.value(b"/a") == b"x"


def test_a_write_that_is_cut_short_goes_on_where_it_was(loop: Loop) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_NONBLOCK)
    lib.pv_xs_journal_to(loop.core, writer, 0, 0)
    dom0 = Client(loop.core)
    for i in range(50):
        dom0.do(Op.WRITE, b"/%d\0" % i + b"%02d" % i * 2000)
    assert lib.pv_xs_journal_flush(loop.core) == -errno.EAGAIN
    data = os.read(reader, 1 << 20)
    while (status := lib.pv_xs_journal_flush(loop.core)) == -errno.EAGAIN:
        data += os.read(reader, 1 << 20)
    assert status == 0
    data += os.read(reader, 1 << 20)
    places = [data.index(b"%02d" % i * 2000) for i in range(50)]
    assert places == sorted(places)
    assert len(data) < 50 * 4100 + 100
    lib.pv_xs_journal_to(loop.core, -1, 0, 0)
    os.close(reader)
    os.close(writer)


def test_a_file_that_could_not_be_synced_is_replaced(loop: Loop, tmp_path: Path) -> None:
    journal, client = Journal(loop, tmp_path, sync=True), loop.client()
    client.send(WRITE_A)
    with failing("fdatasync", errno.EIO, times=1):
        told = loop.poll()
    assert told == [(lib.PV_XS_EVENT_JOURNAL, errno.EIO), (lib.PV_XS_EVENT_LONG, 0)]
    assert lib.pv_xs_journal_flush(loop.core) == -errno.EIO  # whatever a later sync would say
    assert replies(client) == []
    journal.replace()
    with failing("fdatasync", errno.EIO):  # nor can this one be
        assert (lib.PV_XS_EVENT_SNAPSHOT, errno.EIO) in loop.poll()
    lib.pv_xs_snapshot_abort(loop.core)
    assert (lib.PV_XS_EVENT_LONG, 0) not in loop.poll()  # not at once again
    journal.replace()
    assert (lib.PV_XS_EVENT_SNAPSHOT, 0) in loop.poll()
    assert replies(client) == []
    journal.adopt()
    assert (lib.PV_XS_EVENT_JOURNAL, 0) in loop.poll()
    assert (replies(client), journal.value(b"/a")) == ([ACK], b"x")


def test_a_snapshot_that_cannot_be_written_harms_nobody(loop: Loop, tmp_path: Path) -> None:
    journal, client = Journal(loop, tmp_path, sync=False), loop.client()
    full = os.open("/dev/full", os.O_WRONLY)
    lib.pv_xs_snapshot_start(loop.core, full)
    client.send(WRITE_A)
    assert (lib.PV_XS_EVENT_SNAPSHOT, errno.ENOSPC) in loop.poll()
    lib.pv_xs_snapshot_abort(loop.core)
    os.close(full)
    loop.poll()
    assert (replies(client), journal.value(b"/a")) == ([ACK], b"x")


# -- memory


def test_a_single_failure_is_not_noticed(loop: Loop) -> None:
    """What was set aside is used, and is set aside again."""
    dom0 = Client(loop.core)

    def scenario() -> None:
        dom0.do(Op.WRITE, b"/a/b/c\0value")
        dom0.do(Op.RM, b"/a\0")
        assert dom0.ask(Op.READ, b"/a\0") == b"! ENOENT\0"

    assert each_call_fails("calloc", scenario) > 3


def test_without_memory_only_what_gives_some_back_is_done(loop: Loop) -> None:
    dom0 = Client(loop.core)
    dom0.do(Op.WRITE, b"/a/b\0x")
    dom0.do(Op.WATCH, b"/c\0t\0")
    number = dom0.begin()
    dom0.do(Op.WRITE, b"/d\0", number)
    with failing("malloc"):  # nothing can be set aside
        with failing("calloc", times=1) as fault:
            dom0.do(Op.WRITE, b"/b\0x")  # what was is used up
            assert fault.happened
        for op, payload in ((Op.READ, b"/a\0"), (Op.WRITE, b"/e\0"), (Op.TRANSACTION_START, b"\0")):
            assert dom0.ask(op, payload) == b"! ENOMEM\0"
        assert dom0.commit(number) == b"! ENOMEM\0"
        dom0.do(Op.UNWATCH, b"/c\0t\0")
        dom0.do(Op.RM, b"/a\0")
    assert dom0.ask(Op.DIRECTORY, b"/\0") == b"tool\0b\0"


def test_who_needs_more_than_was_set_aside_ends() -> None:
    def work() -> None:
        faulthandler.disable()
        with engine() as core, failing("calloc"), failing("malloc"), failing("realloc"):
            Client(core).ask(Op.WRITE, b"/a\0")

    assert os.WTERMSIG(in_child(work)) == signal.SIGABRT


def test_the_books_are_checked(tmp_path: Path) -> None:
    program = compile_c(tmp_path / "books", [Path(__file__).with_name("books.c"), *SOURCES])
    assert run_c([program], timeout=30) == "ok\n"
