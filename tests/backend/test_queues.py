# SPDX-License-Identifier: MIT
"""Block devices with several queues, as the backend serves them: frontends that are honest, and some that are not."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import paravirt
from paravirt.backend.c_engine import engine_factory
from paravirt.backend.disks import Disk, own
from paravirt.backend.disks.spec import Opening
from paravirt.backend.engine import EngineFactory
from paravirt.backend.service import BackendService
from paravirt.errors import InvalidRequest
from paravirt.hypervisor.looking import Looker
from paravirt.protocol.blkif import Operation, Status
from paravirt.protocol.vbd import X86_32_ABI
from paravirt.xenstore import xenbus
from tests.eventually import steady

from .queue_front import DEADLINE_S, PAGE, QueueFront, S

QUEUES = 3


@pytest.fixture(params=["c", "python"])
def engine(request: pytest.FixtureRequest) -> EngineFactory:
    """What serves the disks that either can serve."""
    return engine_factory("auto" if request.param == "c" else "python")


@pytest.fixture
def host(engine: EngineFactory) -> Iterator[paravirt.Host]:
    with paravirt.Host(max_queues=QUEUES, engine=engine) as running:
        yield running


@pytest.fixture
def front(host: paravirt.Host) -> Iterator[QueueFront]:
    with QueueFront(host) as made:
        yield made


class Recorder(Disk):
    """A disk in Python that says who called it, and when a test lets it go on."""

    read_only = False
    opened: list["Recorder"] = []

    def __init__(self) -> None:
        self.size_bytes = 1 << 20
        self.content = bytearray(self.size_bytes)
        self.calls: list[str] = []
        self.inside = self.most_inside = 0
        self.before: Callable[[str], None] = lambda name: None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, opening: Opening) -> "Recorder":
        cls.opened.append(cls())
        return cls.opened[-1]

    def _call(self, name: str) -> None:
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        try:
            self.before(name)
        finally:
            with self._lock:
                self.inside -= 1
                self.calls.append(name)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._call("read")
        for buffer in buffers:
            buffer[:] = self.content[offset : offset + len(buffer)]
            offset += len(buffer)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._call("write")
        for buffer in buffers:
            self.content[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        self._call("flush")


class Parallel(Recorder):
    many_threads = True


@pytest.fixture
def recorders() -> Iterator[None]:
    own.register("recorder", Recorder)
    own.register("parallel", Parallel)
    Recorder.opened = []
    yield
    own.unregister("recorder")
    own.unregister("parallel")


@pytest.fixture
def recorded(host: paravirt.Host, recorders: None) -> Iterator[tuple[QueueFront, Recorder]]:
    with QueueFront(host, "x", driver="recorder") as made:
        yield made, Recorder.opened[-1]


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("arenas", [1, 3], ids=["one arena", "an arena each"])
def test_each_queue_is_served_beside_the_others(host: paravirt.Host, arenas: int, order: int) -> None:
    with QueueFront(host, arenas=arenas) as front:
        queues = front.connect(3, order=order)
        for number, queue in enumerate(queues):
            assert queue.ring.size == 32 << order
            assert queue.write(b"queue %d" % number, 8 * number) is Status.OKAY
        for queue in queues:
            assert [queue.read(8 * number) for number in range(3)] == [b"queue 0", b"queue 1", b"queue 2"]


def test_statistics_of_queues_and_their_sum(host: paravirt.Host, front: QueueFront) -> None:
    queues = front.connect(2)
    queues[0].write(b"a", 0)
    for _ in range(3):
        queues[1].read(0)
    queues[1].do(Operation.FLUSH_DISKCACHE, segments=0)
    queues[1].do(Operation.READ, 1 << 40)
    counted = host.backend_statistics()[front.path]
    assert [(each.writes, each.reads, each.flushes, each.refused) for each in counted.queues] == [
        (1, 0, 0, 0),
        (0, 3, 1, 1),
    ]
    assert (counted.writes, counted.reads, counted.flushes, counted.refused) == (1, 3, 1, 1)
    assert (counted.written_bytes, counted.read_bytes) == (PAGE, 3 * PAGE)
    assert [each.ring.requests for each in counted.queues] == [1, 5]
    assert (counted.ring.requests, counted.ring.max_outstanding) == (6, 1)
    assert all(each.queues == () for each in counted.queues)


def test_one_queue_has_the_flat_keys(host: paravirt.Host, front: QueueFront) -> None:
    (queue,) = front.connect(1)
    assert queue.write(b"x", 0) is Status.OKAY
    assert len(host.backend_statistics()[front.path].queues) == 1


def test_another_number_of_queues_the_next_time(front: QueueFront) -> None:
    for n in (3, 1, 2, 3):
        front.connect(n)[-1].write(b"of %d" % n, 0)
        assert front.queues[0].read(0) == b"of %d" % n
        front.start_over()
        assert front.all_given_back()


@pytest.mark.parametrize("max_queues", [1, 2, None])
def test_what_is_offered(max_queues: int | None) -> None:
    with paravirt.Host(max_queues=max_queues) as host, QueueFront(host) as front:
        offered = xenbus.read_key(front.store, f"{front.path.backend}/multi-queue-max-queues")
        assert offered == str(max_queues or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("max_queues", [0, 257])
def test_what_cannot_be_offered(host: paravirt.Host, max_queues: int) -> None:
    with pytest.raises(InvalidRequest, match=f"max_queues is {max_queues}, not from 1 to 256"):
        BackendService(host.hypervisor, host.store, max_queues=max_queues)


def held() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def settled(condition: Callable[[], bool]) -> None:
    """What the broker frees after it has answered takes a moment."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


LIES: dict[str, tuple[dict[str, str | None], str]] = {
    "no queues": ({"multi-queue-num-queues": "0"}, "multi-queue-num-queues is 0"),
    "more than offered": ({"multi-queue-num-queues": "4"}, "not from 1 to the 3 that are offered"),
    "a number that is none": ({"multi-queue-num-queues": "-2"}, "multi-queue-num-queues is '-2'"),
    "fewer directories than queues": (
        {"queue-2/ring-ref": None, "queue-2/event-channel": None},
        "queue 2: ring-ref is missing",
    ),
    "a ring that is missing": ({"queue-1/ring-ref": None}, "queue 1: ring-ref is missing"),
    "a port that is missing": ({"queue-2/event-channel": None}, "queue 2: event-channel is missing"),
    "a ring for two queues": ({"queue-2/ring-ref": "=0"}, "two queues name the same ring page"),
    "a port for two queues": ({"queue-2/event-channel": "=0"}, "two queues name the same event channel"),
    "a ring of nobody": ({"queue-2/ring-ref": "4000000"}, ""),
    "a ring that is not granted": ({"queue-2/ring-ref": "+40"}, ""),
    "a page of data for a ring": ({"queue-2/ring-ref": "data"}, "not idle|ring"),
    "a port of nobody": ({"queue-2/event-channel": "4000"}, ""),
}


@pytest.mark.parametrize(("change", "complaint"), LIES.values(), ids=LIES)
def test_a_frontend_that_lies_about_its_queues(
    host: paravirt.Host, front: QueueFront, change: dict[str, str | None], complaint: str
) -> None:
    """It hears why; what was taken of the queues before is given back; it may try again, and others go on."""
    with QueueFront(host, name="honest") as other:
        other.connect(2)
        keys = front.make(3).to_keys()
        front.queues[2].data.view[0:4] = (5).to_bytes(4, "little")  # as a ring it has requests outstanding
        for name, value in change.items():
            if value == "=0":
                value = keys[name.replace("queue-2", "queue-0")]
            elif value == "+40":
                value = str(int(keys[name]) + 40)
            elif value == "data":
                value = str(front.queues[2].data.gref)
            keys.pop(name, None)
            if value is not None:
                keys[name] = value
        before = steady(held)
        front.write(S.INITIALISED, keys)
        front.expect(S.CLOSING)
        assert front.error().startswith("22 ")
        assert any(part in front.error() for part in complaint.split("|"))
        settled(lambda: held() == before)
        assert front.all_given_back()
        front.start_over()
        assert front.connect(3)[2].write(b"again", 0) is Status.OKAY
        assert other.queues[1].write(b"on", 0) is Status.OKAY


def test_a_ring_that_its_frontend_breaks_ends_the_device(host: paravirt.Host, front: QueueFront) -> None:
    with QueueFront(host, name="honest") as other:
        other.connect(2)
        queues = front.connect(3)
        assert queues[0].write(b"x", 0) is Status.OKAY
        queues[1].pages.view[0:4] = (1000).to_bytes(4, "little")  # req_prod
        queues[1].channel.notify()
        front.expect(S.CLOSING)
        assert front.error().startswith("22 queue 1: the peer's producer index is out of range")
        assert front.all_given_back()
        front.start_over()
        assert front.connect(3)[1].read(0) == b"x"
        assert other.queues[0].write(b"on", 0) is Status.OKAY


def test_two_rings_broken_at_once_end_the_device_once(front: QueueFront) -> None:
    """What the second one has to say is not held against the next connection."""
    for _ in range(5):
        queues = front.connect(3)
        for queue in queues:
            queue.pages.view[0:4] = (1000).to_bytes(4, "little")
        for queue in queues:
            queue.channel.notify()
        front.expect(S.CLOSING)
        front.start_over()
        assert front.connect(3)[2].write(b"x", 0) is Status.OKAY
        front.start_over()


def test_an_error_of_the_disk_ends_nothing(recorded: tuple[QueueFront, Recorder]) -> None:
    front, disk = recorded
    queues = front.connect(2)

    def fail(name: str) -> None:
        if name == "write":
            raise OSError(errno.EIO, "broken")

    disk.before = fail
    assert queues[0].write(b"x", 0) is Status.ERROR
    assert queues[1].read(0) == b""
    disk.before = lambda name: None
    assert queues[0].write(b"x", 0) is Status.OKAY
    assert front.backend() is S.CONNECTED


def test_a_disk_that_is_called_by_one_thread_at_a_time(recorded: tuple[QueueFront, Recorder]) -> None:
    """One queue waits inside the disk; the other one has to wait for it."""
    front, disk = recorded
    queues = front.connect(2)
    entered, go = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "write":
            entered.set()
            assert go.wait(DEADLINE_S)

    disk.before = hold
    queues[0].push(Operation.WRITE)
    assert entered.wait(DEADLINE_S)
    queues[1].push(Operation.READ)
    with pytest.raises(TimeoutError):
        queues[1].answer(timeout_s=0.2)
    go.set()
    assert queues[0].answer()[1] is Status.OKAY
    assert queues[1].answer()[1] is Status.OKAY
    assert (disk.most_inside, disk.calls) == (1, ["write", "read"])


def test_a_disk_for_many_threads(host: paravirt.Host, recorders: None) -> None:
    """All queues are inside of it at the same time."""
    with QueueFront(host, "x", driver="parallel") as front:
        disk, together = Recorder.opened[-1], threading.Barrier(QUEUES)
        disk.before = lambda name: (together.wait(DEADLINE_S), None)[1]
        for queue in front.connect(QUEUES):
            queue.push(Operation.READ)
        assert [queue.answer()[1] for queue in front.queues] == [Status.OKAY] * QUEUES
        assert disk.most_inside == QUEUES


def test_a_flush_covers_what_was_answered_on_other_queues(recorded: tuple[QueueFront, Recorder]) -> None:
    front, disk = recorded
    queues = front.connect(3)
    for queue in queues[:2]:
        assert queue.write(b"x", 0) is Status.OKAY
    assert queues[2].do(Operation.FLUSH_DISKCACHE, segments=0) is Status.OKAY
    assert disk.calls == ["write", "write", "flush"]
    assert queues[0].write(b"y", 8) is Status.OKAY
    assert queues[1].do(Operation.WRITE_BARRIER, 16) is Status.OKAY
    assert disk.calls[3:] == ["write", "flush", "write", "flush"]


def test_what_one_queue_finds_missing_is_gone_for_all(recorded: tuple[QueueFront, Recorder]) -> None:
    front, disk = recorded
    queues = front.connect(3)

    def refuse(name: str) -> None:
        if name == "flush":
            raise OSError(errno.EOPNOTSUPP, "there is no such thing")

    disk.before = refuse
    assert queues[1].do(Operation.FLUSH_DISKCACHE, segments=0) is Status.EOPNOTSUPP
    watch = front.store.watch_queue()
    watch.add(f"{front.path.backend}/feature-flush-cache")
    while xenbus.read_key(front.store, f"{front.path.backend}/feature-flush-cache") != "0":
        assert watch.get(timeout_s=DEADLINE_S)
    asked = len(disk.calls)
    for queue in queues:
        assert queue.write(b"x", 0) is Status.OKAY  # a batch of its own: from then on it holds
        assert queue.do(Operation.FLUSH_DISKCACHE, segments=0) is Status.EOPNOTSUPP
    assert disk.calls[asked:] == ["write"] * 3


def test_another_size_is_that_of_all_queues(host: paravirt.Host, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with QueueFront(host, str(image), driver="file") as front:
        queues = front.connect(3)
        assert {queue.do(Operation.READ, 2048) for queue in queues} == {Status.ERROR}
        os.truncate(image, 2 << 20)
        host.resize_disk(front.domain)
        watch = front.store.watch_queue()
        watch.add(f"{front.path.backend}/sectors")
        while xenbus.read_key(front.store, f"{front.path.backend}/sectors") != "4096":
            assert watch.get(timeout_s=DEADLINE_S)
        assert {queue.do(Operation.READ, 2048) for queue in queues} == {Status.OKAY}


def test_queues_of_another_abi(front: QueueFront) -> None:
    queues = front.connect(2, abi=X86_32_ABI)
    assert queues[0].write(b"of 32 bits", 8) is Status.OKAY
    assert queues[1].read(8) == b"of 32 bits"


def test_queues_are_told_apart_from_outside(host: paravirt.Host, front: QueueFront) -> None:
    queues = front.connect(3)
    with Looker(host.hypervisor) as looker:
        rings = [ring for ring in looker.look() if ring.back is not None]
        device = f"vbd/{front.domain.domid}/{front.path.device_id}"
        assert [ring.name for ring in rings] == [device, f"{device}/q1", f"{device}/q2"]
        assert [ring.refs for ring in rings] == [queue.place.ring_refs for queue in queues]


def test_a_backend_that_is_started_anew_asks_for_other_rings(host: paravirt.Host, front: QueueFront) -> None:
    """It believes nothing of the rings it finds, until all of them are others."""
    front.connect(3)[1].push(Operation.READ)
    host._backend.stop()
    with BackendService(host.hypervisor, host.store, max_queues=2):
        front.expect(S.INIT_WAIT)
        front.write(S.CONNECTED)
        assert front.backend() is S.INIT_WAIT
        front.write(S.INITIALISING)
        front.connect(2)[1].write(b"x", 0)
        assert front.queues[0].read(0) == b"x"
        front.domain.close()


def test_a_stop_while_queues_wait_for_a_disk(host: paravirt.Host, recorders: None) -> None:
    """Calls that do not come back are told to, until all engines have ended."""
    with QueueFront(host, "x", driver="recorder") as front:
        disk, told = Recorder.opened[-1], threading.Event()

        def hold(name: str) -> None:
            told.clear()
            if told.wait(DEADLINE_S):
                raise OSError(errno.ECANCELED, "told to stop")

        disk.before, disk.interrupt = hold, told.set  # type: ignore[method-assign]
        for queue in front.connect(3):
            queue.push(Operation.READ)
        front.write(S.CLOSED)
        front.expect(S.CLOSED)
        assert front.all_given_back()
