# SPDX-License-Identifier: MIT
"""The data path of a declared device: one thread that takes batches, has them handled, and answers."""

import errno
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.backend.connection import Connection
from paravirt.backend.driver import Batch, DeviceBackend, Request, status_of
from paravirt.backend.driver_loop import LoopThread
from paravirt.errors import Closed, InvalidRequest, ParavirtError, PeerError
from paravirt.hypervisor.client import MappedPages
from paravirt.ring.grant import GrantFailed
from paravirt.ring.shared import RingStatistics
from paravirt.ring.waiting import take_spin

log = logging.getLogger(__name__)

# How long the thread rests after malformed requests, so that a guest cannot make Dom0 spend its time on refusals.
ERROR_PAUSE_S = 0.001


@dataclass(frozen=True, slots=True)
class DriverStatistics:
    """Counts since the frontend was connected."""

    requests: int
    """Taken from the ring."""
    responses: int
    """Sent."""
    errors: int
    """Of the responses: with a status other than 0."""
    refused: int
    """Of the errors: malformed, never seen by the driver."""
    deferred: int
    """Kept by the driver now, to be answered later."""
    batches: int
    """Times the ring was found with requests."""
    pinned_pages: int
    """Of the frontend's, now, those of the ring included."""
    ring: RingStatistics


class DriverEngine:
    """Serves one ring with a `DeviceBackend` until it is stopped."""

    def __init__(
        self,
        connection: Connection,
        driver: DeviceBackend,
        *,
        spin_ns: int,
        on_failure: Callable[[ParavirtError], None],
    ) -> None:
        self.protocol, self.in_place = driver.protocol, driver.in_place
        self._ring, self._waiter, self._arena = connection.ring, connection.waiter, connection.arena
        self._driver = driver
        self._spin_ns = take_spin(spin_ns)
        self._on_failure = on_failure
        self._requests = np.zeros(self._ring.size, self.protocol.request)
        self._responses = np.zeros(self._ring.size, self.protocol.response)
        self._lock = threading.Lock()  # guards pushing, mapping, and what is kept
        self._kept: set[Request] = set()
        self._stopped = False  # nothing of the connection may be used any more
        self._stopping = threading.Event()
        self._loop = LoopThread(f"{self.protocol.name}-loop")
        self._thread = threading.Thread(target=self._run, name=f"{self.protocol.name}-engine", daemon=True)
        self._errors = self._refused = self._batches = 0
        self._complained: set[int] = set()  # errno of what has been complained of

    def start(self) -> None:
        """Begin serving."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the batch that was taken, then stop; what is deferred is never answered here."""
        self._stopping.set()
        self._waiter.kick()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._loop.close()
        with self._lock:
            self._stopped = True
            for request in self._kept:
                request.unmap()
            self._kept.clear()

    def statistics(self) -> DriverStatistics:
        """The counters, live."""
        ring = self._ring.statistics()
        return DriverStatistics(
            requests=ring.requests,
            responses=ring.responses,
            errors=self._errors,
            refused=self._refused,
            deferred=len(self._kept),
            batches=self._batches,
            pinned_pages=self._arena.mapper.statistics().pinned_pages,
            ring=ring,
        )

    # -- what requests need

    def map_pages(self, request: Request, grefs: Sequence[int], *, read_only: bool) -> MappedPages:
        """Those of a request, which are set there as `mapped`. Raises `GrantFailed`, `Closed`."""
        with self._lock:
            if self._stopped:
                raise Closed("the frontend is gone")
            if request.mapped is None:
                request.mapped = self._arena.map_pages(grefs, read_only=read_only)
            return request.mapped

    def keep(self, request: Request) -> None:
        """It is answered later."""
        with self._lock:
            self._kept.add(request)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """In the event loop of the connection."""
        self._loop.run(work)

    def send_later(self, request: Request, response: NDArray[Any]) -> bool:
        """Send the answer of one that was kept; False when its frontend is gone."""
        with self._lock:
            if request not in self._kept:
                if self._stopped:
                    return False
                raise InvalidRequest("this request was answered already")
            self._kept.remove(request)
            request.unmap()
            self._push(response)
            return True

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._serve_once()
        except PeerError as error:
            self._on_failure(error)
        except Exception as error:
            if not self._stopping.is_set():
                log.exception("%s: a defect of the driver", self._driver.path.backend)
                self._on_failure(ParavirtError(f"a defect of the driver: {type(error).__name__}: {error}"))

    def _serve_once(self) -> None:
        n = self._ring.take(self._requests, spin_ns=self._spin_ns)
        if n == 0:
            self._ring.wait()
            return
        self._batches += 1
        requests = self._requests[:n]
        bad = self._malformed(requests)
        if bad is None:
            slots = self._ring.reserve(n) if self.in_place else None
            in_place = slots is not None and len(slots) == n  # they lie side by side
            self._handle(requests, self._blank(requests, slots if in_place else None), in_place=in_place)
            return
        responses = self._blank(requests)
        responses["status"][bad] = -errno.EINVAL
        self._refused += int(np.count_nonzero(bad))
        with self._lock:
            self._push(responses[bad])
        if not bad.all():
            self._handle(requests[~bad], responses[~bad])
        self._stopping.wait(ERROR_PAUSE_S)

    def _blank(self, requests: NDArray[Any], slots: NDArray[Any] | None = None) -> NDArray[Any]:
        """A response for each, zero but for the id: in these slots of the ring, or in memory of ours."""
        responses = self._responses[: len(requests)] if slots is None else slots
        responses[:] = np.zeros((), self.protocol.response)
        responses["id"] = requests["id"]
        return responses

    def _malformed(self, requests: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Which ones have a gap between their grant references, or one twice; None: all are well."""
        if self.protocol.pages < 2:
            return None
        grefs = requests["gref"]
        there = grefs != 0
        if not there[:, 1:].any():
            return None
        bad = (there[:, 1:] & ~there[:, :-1]).any(axis=1)
        in_order = np.sort(grefs, axis=1)
        bad |= ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != 0)).any(axis=1)
        return bad if bad.any() else None

    def _handle(self, requests: NDArray[Any], responses: NDArray[Any], *, in_place: bool = False) -> None:
        batch = Batch(self, requests, responses)
        try:
            answers = self._driver.handle(batch)
            if answers is not None:
                self._take_answers(responses, answers)
        except (ParavirtError, OSError) as error:
            if isinstance(error, PeerError) and not isinstance(error, GrantFailed):
                raise
            self._complain(error)
            responses["status"] = -status_of(error)
        finally:
            ready = batch.settle()
        if in_place:  # nothing is deferred; who reads the statuses back here counts them, no more
            self._errors += int(np.count_nonzero(responses["status"]))
            self._ring.commit(len(responses))
        elif len(ready):
            with self._lock:
                self._push(ready)

    def _take_answers(self, responses: NDArray[Any], answers: NDArray[Any]) -> None:
        """An array that `handle` returned: its fields, but for the ids, which are ours."""
        if not isinstance(answers, np.ndarray) or answers.dtype.names is None or len(answers) != len(responses):
            raise TypeError(f"handle returned {answers!r:.60}, not a structured array of {len(responses)}")
        for name in answers.dtype.names:
            if name != "id":
                responses[name] = answers[name]

    def _push(self, responses: NDArray[Any]) -> None:
        """With the lock held."""
        self._errors += int(np.count_nonzero(responses["status"]))
        self._ring.push(responses)

    def _complain(self, error: Exception) -> None:
        """Of the driver, loudly once for each kind of error: a guest must not fill the log."""
        number = status_of(error)
        level = logging.DEBUG if number in self._complained else logging.WARNING
        log.log(level, "%s: requests failed: %s", self._driver.path.backend, error)
        self._complained.add(number)
