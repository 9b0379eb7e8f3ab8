# SPDX-License-Identifier: MIT
"""Requests that were handed to a device and what came of them; ids, and the shadow of what is in flight.

Guarded by the device's lock, but for what a caller does with a `Pending`.
"""

import errno
from asyncio import Future
from collections import deque
from collections.abc import Generator, Sequence
from itertools import repeat
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import InvalidRequest, IoError, ParavirtError, PeerError
from paravirt.frontend.buffer import Buffer
from paravirt.protocol.device import DeviceProtocol, put_message
from paravirt.ring.shared import FrontRing

MAX_ID_BITS = 32


class Waiting(Protocol):
    """What a `Pending` needs of its device."""

    def wait_for(self, pending: "Pending", timeout_s: float | None) -> None:
        """Until it is finished. Raises `TimedOut`."""

    async def wait_for_async(self, pending: "Pending") -> None:
        """Until it is finished, without blocking the event loop."""

    def look(self) -> None:
        """Take the answers that are there."""


class Pending:
    """A batch on its way: `result()` waits for all of its responses, `await` does so in an event loop.

    A wait that times out or is cancelled changes nothing: the requests stay under way, and one may wait again.
    """

    def __init__(
        self, device: Waiting, requests: NDArray[Any], response: "np.dtype[Any]", n: int | None = None
    ) -> None:
        """`n`: so many were written in place, and `requests` is empty."""
        self.requests = requests
        """As they are sent: not to be changed before they are answered. Empty if they were written in place."""
        self.in_place = n is not None
        """They stand in the ring only: nobody can send them again on another one."""
        self.n = len(requests) if n is None else n
        self.responses = np.zeros(self.n, response)
        self.buffers: Sequence[Buffer | None] = ()
        self.issued = 0
        self.left = self.n
        self.error: ParavirtError | None = None
        self.futures: list[Future[None]] = []
        self._device = device

    def carry(self, buffers: Sequence[Buffer | None], carried: list[Buffer]) -> None:
        """The buffers of its requests, and which they are, are on their way."""
        for buffer in carried:
            buffer.in_flight = True
        self.buffers = buffers if carried else ()

    @property
    def finished(self) -> bool:
        """All are answered, or none will be any more."""
        return self.left == 0 or self.error is not None

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        if not self.finished:
            self._device.look()
        return self.finished

    def result(self, timeout_s: float | None = None) -> Any:
        """The responses, in the order of the requests: an array of the protocol's response, `status` and all.

        Raises `TimedOut`, `Closed`, `PeerGone`, `PeerError`.
        """
        if not self.finished:
            self._device.wait_for(self, timeout_s)
        return self._value()

    def __await__(self) -> Generator[Any, None, Any]:
        if not self.finished:
            yield from self._device.wait_for_async(self).__await__()
        return self._value()

    def _value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.responses


class PendingCall(Pending):
    """One request: its result is one response, and a status other than 0 is an `IoError`."""

    response_class: Any = None

    def _value(self) -> Any:
        response = super()._value()[0]
        status = int(response["status"])
        if status:
            name = errno.errorcode.get(-status, "of no name")
            raise IoError(f"the backend answered with the error {status} ({name})", status)
        if self.response_class is None:
            return response
        names = self.response_class.__dataclass_fields__
        return self.response_class(**{name: response[name].item() for name in names if name in response.dtype.names})


class InFlight:
    """The ids of one device, and every request that has one: oldest first, which is the order of a re-issue."""

    def __init__(self, protocol: DeviceProtocol, ring_size: int) -> None:
        bits = min(8 * protocol.request["id"].itemsize, MAX_ID_BITS)
        # Half of all ids at most, so that none is used again at once and a doubled response is told.
        self.capacity = min(ring_size, 1 << (bits - 1))
        self._protocol = protocol
        self._mask = (1 << bits) - 1
        self._step = 1 << (self.capacity - 1).bit_length()
        self._free = deque(range(self.capacity))
        self._flying: dict[int, tuple[Pending, int]] = {}

    def __len__(self) -> int:
        return len(self._flying)

    @property
    def free(self) -> int:
        """Requests that can be sent now."""
        return len(self._free)

    def send(self, pending: Pending, ring: FrontRing) -> int:
        """Send as many of its requests as there are ids; how many. Raises what the ring raises."""
        start = pending.issued
        n = min(len(pending.requests) - start, len(self._free))
        part = pending.requests[start : start + n]
        if pending.buffers:
            self._grant(part, pending.buffers[start : start + n])
        ids = [self._free.popleft() for _ in range(n)]
        part["id"] = ids
        self._flying.update(zip(ids, zip(repeat(pending), range(start, start + n), strict=False), strict=True))
        pending.issued += n
        ring.push(pending.requests, n, start)
        return n

    def send_in_place(self, pending: Pending, slots: NDArray[Any], ring: FrontRing) -> None:
        """Send requests that were written into the ring's own `slots`, at most `free`."""
        n = len(slots)
        if pending.buffers:
            self._grant(slots, pending.buffers)
        ids = [self._free.popleft() for _ in range(n)]
        slots["id"] = ids
        self._flying.update(zip(ids, zip(repeat(pending), range(n), strict=False), strict=True))
        pending.issued = n
        ring.commit(n)

    def lose_in_place(self, error: ParavirtError) -> list[Pending]:
        """Their ring is gone, and they were nowhere else: end them."""
        lost = {number: pending for number, (pending, _) in self._flying.items() if pending.in_place}
        for number in lost:
            del self._flying[number]
            self._free.append((number + self._step) & self._mask)
        ended = list(set(lost.values()))
        for pending in ended:
            pending.error = error
            for buffer in pending.buffers:
                if buffer is not None and buffer.in_flight:
                    buffer.answered()
        return ended

    def _grant(self, requests: NDArray[Any], buffers: Sequence[Buffer | None]) -> None:
        grefs = requests["gref"]
        grefs[:] = 0
        for i, buffer in enumerate(buffers):
            if buffer is not None:
                grefs[i, : buffer.n_pages] = buffer.grant()

    def send_again(self, ring: FrontRing) -> int:
        """Everything in flight once more, oldest first, on a new ring; how many that are."""
        again = np.zeros(len(self._flying), self._protocol.request)
        for k, (pending, i) in enumerate(self._flying.values()):
            again[k] = pending.requests[i]
        return ring.push(again) if len(again) else 0

    def settle(self, responses: NDArray[Any]) -> tuple[list[Pending], int, PeerError | None]:
        """Give responses to their requests: what is finished by that, pages the backend keeps, and its violation.

        Responses after one that matches no request are not looked at.
        """
        finished: list[Pending] = []
        error, kept, good = None, 0, len(responses)
        found: list[tuple[Pending, int]] = []
        take, give, step, mask = self._flying.pop, self._free.append, self._step, self._mask
        for k, (number, status) in enumerate(zip(responses["id"].tolist(), responses["status"].tolist(), strict=True)):
            place = take(number, None)
            if place is None or status > 0:
                what = f"request {number}, which is not in flight" if place is None else f"with the status {status}"
                error, good = PeerError(f"the backend answered {what}"), k
                if place is not None:
                    self._flying[number] = place  # not answered: it ends with the device
                break
            give((number + step) & mask)
            found.append(place)
        start = 0
        while start < good:
            start, pending, kept_now = self._settle_run(responses, found, start)
            kept += kept_now
            if pending.finished:
                finished.append(pending)
        return finished, kept, error

    def _settle_run(
        self, responses: NDArray[Any], found: list[tuple[Pending, int]], start: int
    ) -> tuple[int, Pending, int]:
        """Neighbours of one batch, at once: where they end, whose they are, and how many pages the backend keeps."""
        pending, first = found[start]
        end = start + 1
        while end < len(found) and found[end][0] is pending and found[end][1] == first + end - start:
            end += 1
        n = end - start
        pending.responses[first : first + n] = responses[start:end]
        pending.left -= n
        kept = 0
        if pending.buffers:
            kept = sum(buffer.answered() for buffer in pending.buffers[first : first + n] if buffer is not None)
        return end, pending, kept

    def pending(self) -> set[Pending]:
        """All that have a request in flight."""
        return {pending for pending, _ in self._flying.values()}


def as_batch(protocol: DeviceProtocol, requests: Any) -> NDArray[Any]:
    """An array of wire requests: the very array where it is one, else a copy of its fields.

    Raises `InvalidRequest`.
    """
    if isinstance(requests, np.ndarray) and requests.dtype == protocol.request and requests.ndim == 1:
        return requests if requests.flags.c_contiguous and requests.flags.writeable else requests.copy()
    if isinstance(requests, np.ndarray) and requests.dtype.names is not None and requests.ndim == 1:
        batch = np.zeros(len(requests), protocol.request)
        unknown = set(requests.dtype.names) - set(protocol.request.names or ())
        if unknown:
            raise InvalidRequest(f"a request of {protocol.name} has no {', '.join(sorted(unknown))}")
        for name in requests.dtype.names:
            batch[name] = requests[name]
        return batch
    return _from_values(protocol, list(requests))


def _from_values(protocol: DeviceProtocol, requests: list[Any]) -> NDArray[Any]:
    """From dataclasses or mappings."""
    batch = np.zeros(len(requests), protocol.request)
    for i, request in enumerate(requests):
        put_message(protocol, batch, i, request)
    return batch
