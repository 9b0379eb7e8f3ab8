# SPDX-License-Identifier: MIT
"""The blocking disk in C (c_ext/pv_blkdisk.h), with an honest backend and with those that lie, die or keep pages."""

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import paravirt
from paravirt.errors import AlreadyExists, PeerError, PeerGone
from paravirt.frontend import export
from paravirt.frontend.export import DiskExport
from paravirt.protocol.blkif import Operation
from paravirt.ring import blkdisk
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkdisk import Kind
from tests.eventually import eventually
from tests.faults import each_call_fails

from .blkdisk_stage import DEADLINE_S, SHAPE, CDisk, hand_made

PAGE = 4096


class Exported:
    """Opens disks of an embedded host, with the data path in this process."""

    def __init__(self, host: paravirt.Host) -> None:
        self.host, self.domain = host, host.create_domain("guest")

    @contextmanager
    def __call__(
        self, spec: str = "1M", driver: str = "memory", mode: Any = "w", **options: Any
    ) -> Iterator[tuple[DiskExport, CDisk]]:
        self.host.attach_disk(self.domain, spec, driver=driver, mode=mode)
        broker = self.host._broker.connect(self.domain.domid)
        with ExitStack() as stack:
            stack.callback(os.close, broker)
            listener = stack.enter_context(socket.socket())
            served = stack.enter_context(DiskExport(self.domain, "xvda", listener, broker, **options))
            disk: Any = served._nbdkit
            yield served, disk


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exported]:
    monkeypatch.setattr(export, "Nbdkit", CDisk)
    with paravirt.Host() as host:
        yield Exported(host)


# -- with the backend of this project


def test_bytes_of_every_size_and_place(exported: Exported) -> None:
    """One sector to several requests of the largest size, at odd places, against a copy."""
    size = 4 << 20
    with exported(str(size), ring_page_order=1) as (served, disk):
        model = bytearray(size)
        largest = served._max_bytes
        lengths = (512, 1024, 4096, 44 * 1024, 44 * 1024 + 512, largest, largest + 512, 2 * largest + 1536)
        for n, length in enumerate(lengths):
            data, place = os.urandom(length), 512 * (3 * n + 1)
            assert disk.write(data, place) == 0
            model[place : place + length] = data
            assert disk.read(length, place) == data
        assert disk.read(size, 0) == bytes(model)
        assert disk.zero(largest + 512, 512) == 0
        model[512 : 1024 + largest] = bytes(largest + 512)
        assert disk.read(size, 0) == bytes(model)
        assert disk.flush() == 0
        assert disk.discard(PAGE, size - PAGE) == 0
        counted = served.statistics()
        assert (counted.flushes, counted.discards, counted.errors, counted.in_flight) == (1, 1, 0, 0)


@pytest.mark.parametrize("spin", ["sleep", "adaptive", "spin"])
def test_many_threads_at_once(exported: Exported, spin: str) -> None:
    """More callers than the ring has slots, each with a place of its own: everybody gets what he wrote."""
    with exported(ring_page_order=0, wait=spin) as (served, disk):

        def work(number: int) -> None:
            for n in range(40):
                data = bytes([number, n]) * 256 * (1 + (number + n) % 16)
                assert disk.write(data, number * 16384) == 0
                assert disk.read(len(data), number * 16384) == data

        for done in [disk.beside(work, number) for number in range(48)]:
            done.result(DEADLINE_S)
        assert served.statistics().in_flight == 0


def test_what_is_wrong_with_a_call(exported: Exported) -> None:
    with exported() as (_, disk):
        for length, offset in ((512, 1), (100, 0), (0, 0), (512, 1 << 20), (1024, (1 << 20) - 512), (512, 1 << 63)):
            assert disk.read(length, offset) == -errno.EINVAL, (length, offset)
            assert disk.write(bytes(length), offset) == -errno.EINVAL
            assert disk.zero(length, offset) == -errno.EINVAL
            assert disk.discard(length, offset) == -errno.EINVAL
        assert disk.read(512, 0) == bytes(512)


def test_a_read_only_disk(exported: Exported) -> None:
    with exported(mode="r") as (_, disk):
        assert disk.write(bytes(512), 0) == disk.zero(512, 0) == disk.discard(512, 0) == -errno.EROFS
        assert disk.read(512, 0) == bytes(512)


def test_errors_of_the_disk(exported: Exported) -> None:
    with exported(driver="error,on=read:memory") as (served, disk):
        assert disk.read(512, 0) == -errno.EIO
        assert disk.write(bytes(512), 0) == 0
        assert served.statistics().errors == 1


def test_a_disk_that_becomes_larger(exported: Exported, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with exported(str(image), driver="file") as (served, disk):
        assert disk.read(512, 1 << 20) == -errno.EINVAL
        os.truncate(image, 2 << 20)
        exported.host.resize_disk(exported.domain)
        eventually(lambda: served.size_bytes == 2 << 20, "the new size")
        eventually(lambda: disk.read(512, 1 << 20) == bytes(512), "bytes beyond the old end")


def test_it_is_open_once(exported: Exported) -> None:
    with exported():
        with pytest.raises(AlreadyExists, match="open already"):
            exported.domain.open_disk("xvda")


def test_a_disk_that_is_taken_away(exported: Exported) -> None:
    with exported() as (served, disk):
        exported.host.detach_disk(exported.domain)
        with pytest.raises(PeerGone, match="has closed"):
            served.wait(DEADLINE_S)
        assert disk.read(512, 0) == -errno.ESHUTDOWN


def test_a_backend_that_lies_ends_it(exported: Exported) -> None:
    with exported() as (served, disk):
        served._device.fail(PeerError("it lied"))
        with pytest.raises(PeerError, match="it lied"):
            served.wait(DEADLINE_S)
        assert disk.read(512, 0) == -errno.ESHUTDOWN


# -- with a backend played by hand


def test_a_reconnect_sends_again_what_was_in_flight() -> None:
    with hand_made() as back:
        assert back.connect().status == 0
        first = [back.disk.beside(back.disk.write, bytes([n]) * 512, n * 512) for n in range(5)]
        asked = back.take(5)
        assert set(asked["operation"]) == {Operation.WRITE}
        back.answer(asked[:1])
        eventually(lambda: sum(call.done() for call in first) == 1, "the answer that came before the end")
        back.die()
        later = back.disk.beside(back.disk.read, 512, 4096)
        time.sleep(0.05)
        assert sum(call.done() for call in first) == 1
        assert back.connect().status == 0
        again = back.take(5)
        assert list(again["id"][:4]) == list(asked["id"][1:])
        assert again["operation"][4] == Operation.READ
        back.answer(again)
        assert [call.result(DEADLINE_S) for call in first] == [0] * 5
        assert later.result(DEADLINE_S) == bytes(512)
        assert back.disk.ask(blkdisk.plain(Kind.COUNT)).counters.reissued == 4


def test_storms_of_backends_that_die() -> None:
    """Back to back, each with the same requests in flight and none answered; then one that answers."""
    with hand_made() as back:
        back.connect()
        calls = [back.disk.beside(back.disk.flush) for _ in range(8)]
        for _ in range(20):
            back.take(8)
            back.die()
            assert back.connect().status == 0
        back.answer(back.take(8))
        assert [call.result(DEADLINE_S) for call in calls] == [0] * 8


@pytest.mark.parametrize(
    ("forged", "text"),
    [
        ({"id": 31}, "not in flight"),
        ({"id": 1 << 40}, "not in flight"),
        ({"operation": Operation.WRITE}, "not what was asked"),
        ({"status": 1}, "status is unknown"),
        ({"status": -3}, "status is unknown"),
    ],
)
def test_a_backend_that_answers_nonsense(forged: dict[str, int], text: str) -> None:
    """It is told of, nobody gets an answer that is none, and the next backend gets the requests again."""
    with hand_made() as back:
        back.connect()
        call = back.disk.beside(back.disk.read, 512, 0)
        back.answer(back.take(), **forged)
        eventually(lambda: back.disk.complaints, "a complaint")
        assert text in back.disk.complaints[0]
        assert not call.done()
        back.die()
        back.connect()
        back.answer(back.take())
        assert call.result(DEADLINE_S) == bytes(512)


def test_a_backend_that_answers_twice() -> None:
    with hand_made() as back:
        back.connect()
        call = back.disk.beside(back.disk.read, 512, 0)
        other = back.disk.beside(back.disk.flush)
        asked = back.take(2)
        read = asked[asked["operation"] == Operation.READ]
        back.answer(read)
        assert call.result(DEADLINE_S) == bytes(512)
        back.answer(read)
        eventually(lambda: back.disk.complaints, "a complaint")
        assert not other.done()
        back.disk.ask(blkdisk.fail(errno.ESHUTDOWN))
        assert other.result(DEADLINE_S) == -errno.ESHUTDOWN


def test_a_backend_whose_index_is_impossible() -> None:
    with hand_made() as back:
        back.connect()
        call = back.disk.beside(back.disk.flush)
        back.take()
        assert back.ring is not None
        back.ring.core.own_prod[0] = 1000
        back._port.notify()
        eventually(lambda: back.disk.complaints, "a complaint")
        assert "index" in back.disk.complaints[0]
        back.disk.ask(blkdisk.fail(errno.ESHUTDOWN))
        assert call.result(DEADLINE_S) == -errno.ESHUTDOWN
        assert back.disk.flush() == -errno.ESHUTDOWN


def test_a_backend_that_keeps_pages() -> None:
    """It answers and does not let go: those slots are out of use, and when no other is left it is told of."""
    with hand_made() as back:
        back.connect()
        kept = []
        for _ in range(32):
            call = back.disk.beside(back.disk.read, 512, 0)
            asked = back.take()
            kept.append(back._arena.map_pages([int(asked["seg"]["gref"][0, 0])]))
            back.answer(asked)
            assert call.result(DEADLINE_S) == bytes(512)
        stuck = back.disk.beside(back.disk.read, 512, 0)
        eventually(lambda: back.disk.complaints, "a complaint")
        assert "keeps the pages" in back.disk.complaints[0]
        for pages in kept:
            pages.close()
        back.die()
        back.connect()
        back.answer(back.take())
        assert stuck.result(DEADLINE_S) == bytes(512)


def test_large_requests_are_not_overtaken_for_ever() -> None:
    """One that needs a quarter of all slots comes to its turn while small ones come without end."""
    with hand_made(shape=replace(SHAPE, max_request_bytes=88 * PAGE, size_bytes=8 << 20)) as back:
        back.connect()
        stop = threading.Event()

        def small() -> int:
            status = 0
            while not stop.is_set() and not status:
                status = back.disk.flush()
            return status

        def serve() -> None:
            while not stop.is_set():
                assert back.ring is not None
                back.ring.wait(timeout_s=0.01)
                back.answer(back.ring.take_batch(32))

        server = threading.Thread(target=serve)
        server.start()
        crowd = [back.disk.beside(small) for _ in range(40)]
        try:
            for _ in range(5):
                large = back.disk.beside(back.disk.write, bytes(88 * PAGE), 0)
                assert large.result(DEADLINE_S) == 0
        finally:
            stop.set()
            server.join()
            back.disk.ask(blkdisk.fail(errno.ESHUTDOWN))
        assert {call.result(DEADLINE_S) for call in crowd} <= {0, -errno.ESHUTDOWN}


def test_what_it_does_not_have() -> None:
    with hand_made(shape=replace(SHAPE, flush=False, barrier=True, discard=False)) as back:
        back.connect()
        assert back.disk.discard(512, 0) == -errno.EOPNOTSUPP
        call = back.disk.beside(back.disk.flush)
        asked = back.take()
        assert (asked["operation"][0], asked["nr_segments"][0]) == (Operation.WRITE_BARRIER, 0)
        back.answer(asked)
        assert call.result(DEADLINE_S) == 0


def test_a_disk_without_flushes_has_nothing_to_flush() -> None:
    with hand_made(shape=replace(SHAPE, flush=False)) as back:
        back.connect()
        assert back.disk.flush() == 0
        assert back.ring is not None
        assert len(back.ring.take_batch(1)) == 0


def test_discards_that_turn_out_not_to_be_there() -> None:
    with hand_made() as back:
        back.connect()
        call = back.disk.beside(back.disk.discard, 512, 0)
        back.answer(back.take(), status=-2)
        assert call.result(DEADLINE_S) == -errno.EOPNOTSUPP
        assert back.disk.discard(512, 0) == -errno.EOPNOTSUPP  # without asking again


@pytest.mark.parametrize(
    "wrong",
    [
        {"sector_size": 4096},
        {"sector_size": 0},
        {"sector_size": 768},
        {"max_request_bytes": 512},
        {"max_request_bytes": 0},
        {"size_bytes": 1000},
    ],
)
def test_a_next_backend_that_does_not_fit(wrong: dict[str, int]) -> None:
    with hand_made() as back:
        assert back.connect().status == 0
        back.die()
        assert back.connect(replace(SHAPE, **wrong)).status == -errno.EINVAL  # type: ignore[arg-type]


def test_calls_in_the_wrong_order() -> None:
    with hand_made() as back:
        ask = back.disk.ask
        assert back.disk.read(512, 0) == back.disk.flush() == back.disk.discard(512, 0) == -errno.ENOTCONN
        assert back.disk.zero(512, 0) == -errno.ENOTCONN
        assert ask(blkdisk.shape(Kind.GO, SHAPE)).status == -errno.ENOTCONN
        ask(blkdisk.plain(Kind.PAUSE))  # harmless
        assert ask(blkdisk.make(0, 5, 0)).status == -errno.EINVAL
        assert ask(blkdisk.make(4711, 0, 0)).status == -errno.ESRCH  # there is no such domain
        assert back.connect().status == 0
        assert ask(blkdisk.make(0, 0, 0)).status == -errno.EBUSY
        back.die()
        assert ask(blkdisk.make(0, 1, 0)).status == -errno.EINVAL  # another size


def test_the_end_wakes_everybody() -> None:
    """Those that wait for an answer, for slots and for a backend."""
    with hand_made() as back:
        back.connect()
        calls = [back.disk.beside(back.disk.flush) for _ in range(50)]
        back.take(32)
        back.disk.ask(blkdisk.fail(errno.ESHUTDOWN))
        assert {call.result(DEADLINE_S) for call in calls} == {-errno.ESHUTDOWN}
        assert lib.pv_blkdisk_await(back.disk.core) == -errno.ESHUTDOWN


def test_who_waits_for_the_first_backend() -> None:
    with hand_made() as back:
        waiting = back.disk.beside(lib.pv_blkdisk_await, back.disk.core)
        back.connect()
        assert waiting.result(DEADLINE_S) == 0
        seen = ffi.new("struct pv_blkdisk_shape *")
        lib.pv_blkdisk_shape_now(back.disk.core, seen)
        assert (seen.size, seen.sector, seen.discard) == (SHAPE.size_bytes, 512, 1)


def test_a_socket_that_is_no_brokers() -> None:
    error = ffi.new("int *")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.close()
        assert lib.pv_blkdisk_open(os.dup(ours.fileno()), ffi.NULL, ffi.NULL, error) == ffi.NULL
        assert error[0] == -errno.EPIPE


@pytest.mark.parametrize("function", ["calloc", "mmap", "epoll_create1", "eventfd"])
def test_every_failure_of_opening_is_told_and_leaks_nothing(function: str) -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")

        def open_and_close() -> None:
            broker = host._broker.connect(domain.domid)
            disk = CDisk(None, broker, on_complaint=lambda text: None)
            os.close(broker)
            if disk.core == ffi.NULL:
                assert disk.opening_error < 0
                return
            disk.ask(blkdisk.make(0, 0, 0))
            disk.close(failing=blkdisk.fail(errno.EIO))

        open_and_close()
        before = open_descriptors()
        assert each_call_fails(function, open_and_close) > 0
        # The broker may not have closed its end of the first one when they were counted.
        eventually(lambda: open_descriptors() <= before, "all descriptors closed")


def test_opening_again_and_again_leaks_nothing() -> None:
    with hand_made() as back:
        back.connect()
        back.die()
        before = open_descriptors()
        for _ in range(50):
            assert back.connect().status == 0
            back.die()
        assert open_descriptors() == before
