# SPDX-License-Identifier: MIT
"""Xen's shared ring: `FrontRing` makes one and sends requests, `BackRing` attaches and answers.

Messages move in batches: a batch is a numpy array whose dtype *is* the message layout (or any packed buffer), and it
costs one call into the C core, which copies, checks the peer's index, publishes and notifies without the GIL. Arrays
that are used again and again are the fast way: their addresses are remembered.

One thread pushes, one takes and waits; they may be two. Source: Xen public/io/ring.h.
"""

import errno
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring._core import ffi, lib
from paravirt.ring.batch import Batches
from paravirt.ring.batch import Memory as Memory
from paravirt.ring.batch import Messages as Messages
from paravirt.ring.batch import view_of as view_of
from paravirt.ring.event import EventPort, WaitResult, check_status, resume_on_signal
from paravirt.ring.looking import Record
from paravirt.ring.memory import pinned
from paravirt.ring.ring_statistics import RingStatistics as RingStatistics
from paravirt.ring.ring_statistics import statistics_of
from paravirt.ring.waiting import Fence, SpinBudget, Wait, fence_name, fence_number, spin_of

CData = Any

EventPolicy = Literal["next", "half", "rate"]
"""When a front end that sleeps wants to be woken: at the next response, after half of those that are outstanding, or
after as many as come within a delay that grows with their rate."""

_EVENT_POLICIES: dict[EventPolicy, int] = {"next": 0, "half": 1, "rate": 2}
_COUNT = 0xFFFFFFFF
_EVENT = WaitResult.EVENT
_WAIT_EVENT = int(_EVENT)
# Looked up once: an attribute of `lib` costs a tenth of a call.
_push, _take, _take_spin, _exchange = lib.pv_ring_push, lib.pv_ring_take, lib.pv_ring_take_spin, lib.pv_ring_exchange


def entry_bytes_of(request: "np.dtype[Any]", response: "np.dtype[Any]") -> int:
    """Bytes of a ring entry, the C union of both messages."""
    alignment = max(request.alignment, response.alignment)
    return -(-max(request.itemsize, response.itemsize) // alignment) * alignment


def ring_entries(n_bytes: int, entry_bytes: int) -> int:
    """Entries of a ring in `n_bytes` of memory (RING_SIZE); 0 when the memory is too small or more than 16 pages."""
    return int(lib.pv_ring_entries(n_bytes, entry_bytes)) if 0 < n_bytes < 1 << 32 else 0


@dataclass(frozen=True, slots=True)
class _Options:
    """What an end chooses for itself or has agreed with its peer on."""

    fence: Fence
    wait: Wait
    max_spin_ns: int | None
    budget: SpinBudget | None
    record: Record | None


class Ring:
    """What both ends have in common. Made by `FrontRing.create`, `FrontRing.attach` and `BackRing.attach`."""

    _is_front: bool

    def __init__(
        self,
        memory: Memory,
        request: "np.dtype[Any]",
        response: "np.dtype[Any]",
        *,
        port: EventPort | None,
        entry_bytes: int | None,
        chosen: _Options,
        start: int | None = None,
        index: int | None = None,
    ) -> None:
        self.request, self.response = np.dtype(request), np.dtype(response)
        self.port = port
        size = entry_bytes or entry_bytes_of(self.request, self.response)
        view = view_of(memory)
        self._memory: CData = pinned(view, writable=True)
        self._record = chosen.record
        self._core: CData = ffi.new("struct pv_ring *") if chosen.record is None else chosen.record.ring
        layout = (self._memory, view.nbytes, size, self.request.itemsize, self.response.itemsize)
        self._port_core: CData = ffi.NULL if port is None else port.core  # outlives the port's close
        if index is not None:
            status = lib.pv_ring_attach_at(self._core, *layout, self._port_core, self._is_front, index & _COUNT)
        elif start is None:
            status = lib.pv_ring_attach(self._core, *layout, self._port_core, self._is_front)
        else:
            status = lib.pv_ring_create(self._core, *layout, self._port_core, start)
        if status:
            self._abandon()
        if status == -errno.EINVAL:
            raise InvalidRequest(
                f"no ring of {size}-byte entries fits {view.nbytes} bytes (1 to 16 pages, aligned to 8)"
            )
        if status == -errno.EBUSY:
            where = "" if index is None else f" at index {index}"
            raise PeerError(f"the ring is not idle{where}: the front end must make a new one")
        self._choose(chosen)
        self.size: int = self._core.size
        self.entry_bytes = size
        out_type, in_type = (self.request, self.response) if self._is_front else (self.response, self.request)
        self._out = Batches(out_type, writable=False)
        self._in = Batches(in_type, writable=True)
        self._slots: NDArray[Any] | None = None
        self._reserved: CData = ffi.new("struct pv_ring_slots *")
        self._view: memoryview | None = view
        self._closed = False
        if self._record is not None:
            self._record.begin(self.request, self.response)

    def _abandon(self) -> None:
        ffi.release(self._memory)
        if self._record is not None:
            self._record.end()

    def _choose(self, chosen: _Options) -> None:
        status = lib.pv_ring_set_fence(self._core, fence_number(chosen.fence))
        if status:
            self._abandon()
            raise InvalidRequest(f"no {chosen.fence!r} fence here: {os.strerror(-status)}")
        self._wait_ns, most_ns = spin_of(chosen.wait, chosen.max_spin_ns)
        self._budget = budget = chosen.budget  # the core points into it
        lib.pv_spin_init(ffi.addressof(self._core, "spin"), most_ns, ffi.NULL if budget is None else budget.core)

    @property
    def wait_ns(self) -> int:
        """What `wait` spins for when it is not told: as its `spin_ns`."""
        return self._wait_ns

    @property
    def fence(self) -> Fence:
        """The fence in use: "full" also where "process" was asked for and the kernel has none."""
        return fence_name(self._core.fence)

    def push(self, messages: Messages, count: int | None = None, start: int = 0) -> int:
        """Send `count` messages of a batch from `start` (None: all from there), and notify the peer if it asked.

        Front: how many requests fitted, 0 to `count`; the rest is the caller's to push again when `wait` and `take`
        have made room. Back: responses always fit; more than there are requests taken is `InvalidRequest`.
        Raises `PeerError` when the ring is dead, `Closed`.
        """
        out = self._out
        if messages is not out.last:
            out.use(messages)
        if count is None and start == 0:
            status = _push(self._core, out.pointer, out.count)
        else:
            status = self._push_part(count, start)
        if 0 <= status <= _COUNT:
            return status
        return self.settle_push(status)

    def push_quietly(self, messages: Messages) -> int:
        """Like `push`, without looking whether the peer sleeps: more will follow. The next `push`, or `notify`, looks
        for all of them.
        """
        self._out.use(messages)
        return self.settle_push(lib.pv_ring_push_quiet(self._core, self._out.pointer, self._out.count))

    def notify(self) -> None:
        """Notify the peer if it asked for any of the messages that were pushed quietly."""
        self.settle_push(lib.pv_ring_notify(self._core))

    def reserve(self, max_count: int) -> NDArray[Any]:
        """Free slots in the ring itself, to be filled in place and sent with `commit`: 1 to `max_count` messages, as
        many as fit and lie side by side; empty when there is no room.

        Shared memory: write to it, never read back what you wrote to decide anything. The array keeps the ring's memory
        mapped; let go of it before `close`.
        """
        slots = self._reserved
        self._check(lib.pv_ring_reserve(self._core, max_count, slots))
        every = self._slots
        if every is None:
            message, steps = self._out.message, (self.entry_bytes,)
            every = np.ndarray((self.size,), message, self._view, lib.PV_RING_HEADER_BYTES, steps)
            self._slots = every
        index: int = slots.index
        return every[index : index + slots.n]

    def commit(self, count: int) -> int:
        """Send the first `count` messages of what `reserve` gave. Raises `InvalidRequest` for more than have room."""
        status = lib.pv_ring_commit(self._core, count)
        if status == -errno.EINVAL:
            raise InvalidRequest(f"{count} messages were not reserved")
        return self.settle_push(status)

    def _push_part(self, count: int | None, start: int) -> int:
        n = self._out.count
        if count is None:
            count = n - start
        if start < 0 or count < 0 or start + count > n:
            raise InvalidRequest(f"messages {start} to {start + count} are not within a batch of {n}")
        pointer = self._out.pointer + start * self._out.message.itemsize if start else self._out.pointer
        return _push(self._core, pointer, count)

    @property
    def core(self) -> CData:
        """`struct pv_ring *`, for C functions that push on their own; after `close` every call on it fails."""
        return self._core

    def settle_push(self, status: int) -> int:
        """What `push` makes of the result of `pv_ring_push`: the count; the slow way to notify; or an error."""
        if 0 <= status <= _COUNT:
            return status
        if status == -errno.EINVAL:
            raise InvalidRequest("more responses than requests that were taken")
        self._check(status)
        self._tell()
        return status & _COUNT

    def _tell(self) -> None:
        """Notify the peer in the slow way. A signal handler may raise here, and before: whoever waits does it then."""
        assert self.port is not None
        self.port.notify_stale()
        self._core.untold = 0

    def take(self, out: Messages, max_count: int | None = None, *, spin_ns: int = 0) -> int:
        """Copy up to `max_count` messages (None: as many as fit) to the start of `out`; how many, 0 for none now.

        With `spin_ns` it spins that long, at most 50 ms, for the first; with `waiting.LEARNT` as long as pays.
        Raises `PeerError` when the peer's index is wrong, and from then on; `Closed`.
        """
        batches = self._in
        if out is not batches.last:
            batches.use(out)
        if max_count is None:
            n = batches.count
        elif 0 <= max_count <= batches.count:
            n = max_count
        else:
            raise InvalidRequest(f"{max_count} messages do not fit a batch of {batches.count}")
        if spin_ns:
            status = _take_spin(self._core, batches.pointer, n, spin_ns)
        else:
            status = _take(self._core, batches.pointer, n)
        return status if status >= 0 else self._check(status)

    def take_batch(self, max_count: int | None = None, *, spin_ns: int = 0) -> NDArray[Any]:
        """Like `take`, into a new array of the messages' dtype, of 0 to `max_count` (None: the ring's size)."""
        out = np.empty(self.size if max_count is None else min(max_count, self.size), self._in.message)
        pointer = ffi.from_buffer("uint8_t[]", out)
        n = self._check(_take_spin(self._core, pointer, len(out), spin_ns))
        return out[:n]

    def wait(self, *, spin_ns: int | None = None, timeout_s: float | None = None) -> WaitResult:
        """Wait until there is something to take: spin up to `spin_ns` (None: by the ring's `wait`), ask the peer for an
        event, sleep.

        EVENT when there is; TIMEOUT; KICKED and STALE so that the owner can look at the device's state. Without a port
        it spins until the timeout.
        """
        if spin_ns is None:
            spin_ns = self._wait_ns
        if self._core.untold:
            self._tell()
        if timeout_s is None:
            status = lib.pv_ring_wait(self._core, spin_ns, -1)
            if status == _WAIT_EVENT:
                return _EVENT
            if status != lib.PV_WAIT_INTERRUPTED:
                return WaitResult(self._check(status))
        core = self._core
        status = resume_on_signal(lambda spin, left: lib.pv_ring_wait(core, spin, left), spin_ns, timeout_s)
        return WaitResult(self._check(status))

    @property
    def wait_spin_ns(self) -> int:
        """What `wait` spins, as `pv_ring_wait` takes it."""
        return self._wait_ns

    def poll(self) -> bool:
        """Whether there is something to take now."""
        return bool(self._check(lib.pv_ring_poll(self._core)))

    def end_event(self) -> None:
        """For who takes the events of `port` himself instead of in `wait`: after he took what was there, if anything.

        Counts the event, and ends it where the port is in late-EOI mode.
        """
        core = self._usable()
        spurious = bool(core.cons == core.cons_at_event)
        core.events += 1
        core.spurious += spurious
        core.cons_at_event = core.cons
        if self.port is not None and self.port.core.late_eoi:
            self.port.eoi(spurious=spurious)

    def final_check(self) -> bool:
        """Like `poll`; when there is nothing, the peer notifies with its next message: for a foreign poll loop."""
        if self._core.untold:
            self._tell()
        return bool(self._check(lib.pv_ring_final_check(self._core)))

    @property
    def unconsumed(self) -> int:
        """Messages that can be taken now."""
        return self._check(lib.pv_ring_unconsumed(self._core))

    @property
    def outstanding(self) -> int:
        """Requests pushed (front) or taken (back) that have no response yet."""
        return int(lib.pv_ring_outstanding(self._usable()))

    def statistics(self) -> RingStatistics:
        """The counters, live."""
        return statistics_of(self._usable(), is_front=self._is_front)

    def _usable(self) -> CData:
        if not lib.pv_home_is_here(self._core.home):
            self._check(-errno.ECHILD)
        return self._core

    def _check(self, status: int) -> int:
        if status >= 0:
            return status
        if self._closed:
            raise Closed("this ring is closed")
        if status == -errno.EPROTO:
            raise PeerError(f"the peer's producer index is out of range; {self!r} is dead")
        return check_status(status, "ring")

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def close(self) -> None:
        """Let go of the memory. Nobody may be inside a call. The port stays open: it is its owner's."""
        if self._closed:
            return
        self._closed = True
        self._slots = self._view = None
        self._core = ffi.new("struct pv_ring *", {"dead": 1})  # every call on it fails
        record, self._record = self._record, None
        if record is not None:
            record.end()
        ffi.release(self._memory)
        self._out.forget()
        self._in.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = type(self).__name__
        if self._closed:
            return f"<{name} closed>"
        core = self._core
        dead = " dead" if core.dead else ""
        prod, cons = ("req_prod", "rsp_cons") if self._is_front else ("rsp_prod", "req_cons")
        return f"<{name} {self.size} x {self.entry_bytes} bytes, {prod} {core.prod} {cons} {core.cons}{dead}>"


class FrontRing(Ring):
    """The end that makes the ring and sends requests."""

    _is_front = True

    @classmethod
    def create(
        cls,
        memory: Memory,
        request: "np.dtype[Any]",
        response: "np.dtype[Any]",
        *,
        port: EventPort | None = None,
        entry_bytes: int | None = None,
        start: int = 0,
        fence: Fence = "full",
        wait: Wait = "sleep",
        max_spin_ns: int | None = None,
        budget: SpinBudget | None = None,
        record: Record | None = None,
    ) -> "FrontRing":
        """A new, empty ring in `memory` (4096 to 65536 bytes); no back end may be attached yet.

        `request`, `response`: dtypes of the messages; an entry is their union unless `entry_bytes` says more.
        `start`: first index, 0 in Xen; a back end takes it from the ring, so tests can begin near 2**32.
        `fence`: who pays for "publish, then look whether the peer sleeps"; both ends must have agreed on it.
        `wait`: what `wait` does before it sleeps, with `max_spin_ns` as the limit of an adaptive spin and `budget` for
        all rings of one peer. `record`: where this end lives, to be looked at from outside; it is the ring's from now
        on. Raises `InvalidRequest` when not one entry fits, or without such a fence here.
        """
        chosen = _Options(fence, wait, max_spin_ns, budget, record)
        return cls(memory, request, response, port=port, entry_bytes=entry_bytes, start=start & _COUNT, chosen=chosen)

    @classmethod
    def attach(
        cls,
        memory: Memory,
        request: "np.dtype[Any]",
        response: "np.dtype[Any]",
        *,
        port: EventPort | None = None,
        entry_bytes: int | None = None,
        index: int | None = None,
        fence: Fence = "full",
        wait: Wait = "sleep",
        max_spin_ns: int | None = None,
        budget: SpinBudget | None = None,
        record: Record | None = None,
    ) -> "FrontRing":
        """Take over a ring whose former front end is gone and which is idle, at the index it stands at, or at `index`
        if it is idle there. Raises `PeerError` when it is not. The rest is as for `create`.
        """
        chosen = _Options(fence, wait, max_spin_ns, budget, record)
        return cls(memory, request, response, port=port, entry_bytes=entry_bytes, index=index, chosen=chosen)

    def set_event_policy(self, policy: EventPolicy, *, threshold_per_s: int = 60_000, delay_us: float = 0) -> None:
        """When to be woken from now on.

        "rate": up to `threshold_per_s` responses a second each one wakes; above, this end waits for what comes in
        `delay_us` x rate / threshold. Neither "half" nor "rate" waits for more than is outstanding; both make single
        responses late, so they are for those who keep many in flight. Raises `InvalidRequest`.
        """
        number = _EVENT_POLICIES[policy]
        status = lib.pv_ring_set_event_policy(self._usable(), number, threshold_per_s, int(delay_us * 1000))
        if status:
            raise InvalidRequest(f"no policy {policy!r} with {threshold_per_s} a second and {delay_us} us")

    @property
    def full(self) -> bool:
        """No request can be pushed now."""
        return self.free == 0

    @property
    def free(self) -> int:
        """Requests that can be pushed now."""
        return int(lib.pv_ring_room(self._usable()))

    def exchange(
        self,
        request: Messages | np.void,
        out: NDArray[Any] | None = None,
        *,
        spin_ns: int = 0,
        timeout_s: float | None = None,
    ) -> NDArray[Any] | None:
        """Send the first request of a batch and wait for its response; None when the timeout is over or a kick came.

        Returns `out` with the response as its first message (None: a new array of one). A request and an `out` that are
        used again and again are the fast way: one call into C. For an idle ring with one caller: raises
        `InvalidRequest` when requests are outstanding.
        """
        requests, responses = self._out, self._in
        if request is not requests.last:
            requests.use(np.atleast_1d(request) if isinstance(request, np.void | np.ndarray) else request)
        if out is None:
            out = np.empty(1, responses.message)
            pointer = ffi.from_buffer("uint8_t[]", out)
        else:
            if out is not responses.last:
                responses.use(out)
            pointer = responses.pointer
        if not requests.count or not len(out):
            raise InvalidRequest("an exchange needs a request, and room for a response")
        status = _exchange(self._core, requests.pointer, pointer, spin_ns)
        if status == 1:
            return out
        return self._finish_exchange(status, out, timeout_s)

    def _finish_exchange(self, status: int, out: NDArray[Any], timeout_s: float | None) -> NDArray[Any] | None:
        if status == -errno.EBUSY:
            raise InvalidRequest(f"{self.outstanding} requests are outstanding: their responses would come first")
        self.settle_push(status)
        if self.wait(spin_ns=0, timeout_s=timeout_s) is not WaitResult.EVENT:
            return None
        return out if self.take(out, 1) else None


class BackRing(Ring):
    """The end that takes requests and sends responses."""

    _is_front = False

    @classmethod
    def attach(
        cls,
        memory: Memory,
        request: "np.dtype[Any]",
        response: "np.dtype[Any]",
        *,
        port: EventPort | None = None,
        entry_bytes: int | None = None,
        index: int | None = None,
        fence: Fence = "full",
        wait: Wait = "sleep",
        max_spin_ns: int | None = None,
        budget: SpinBudget | None = None,
        record: Record | None = None,
    ) -> "BackRing":
        """Join the ring that a front end made in `memory`, at the index it stands at, or at `index` if it is there.

        Raises `PeerError` unless the ring is idle: after a crash with requests outstanding, which of them were answered
        out of order cannot be known. `InvalidRequest` when not one entry fits. The rest is as for `FrontRing.create`.
        """
        chosen = _Options(fence, wait, max_spin_ns, budget, record)
        return cls(memory, request, response, port=port, entry_bytes=entry_bytes, index=index, chosen=chosen)
