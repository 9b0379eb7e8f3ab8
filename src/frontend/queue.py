# SPDX-License-Identifier: MIT
"""One queue of a block device: a ring, the slots and transfers on it, and who waits for them.

Calls may come from any thread. One of the waiting callers at a time watches the ring for all of them; in an event loop
the doorbell is one more descriptor.
"""

import asyncio
import time
from collections.abc import Callable

from paravirt.errors import PeerError
from paravirt.frontend.queue_state import QueueState
from paravirt.frontend.requests import io_error
from paravirt.protocol.blkif import Operation
from paravirt.ring.blkfront import Slots
from paravirt.ring.blkqueue import ANSWERED, FAILED, IN_FLIGHT, Transfer, address_in, read_now, write_now
from paravirt.ring.shared import FrontRing
from paravirt.ring.waiting import LEARNT


class DiskQueue(QueueState):
    """The calls of threads and of an event loop."""

    _sending_soon = False

    # -- calls of threads

    def pread(self, n_bytes: int, offset: int, timeout_s: float | None) -> bytes | None:
        """The short way, when nothing else is under way; None: nothing was done, it has to go the long way.

        Raises `IoError`, and what `run` raises.
        """
        with self.lock:
            if not self._open or self._watching:
                return None
            try:
                result = read_now(self._core, self._ring_core, offset, n_bytes, self._locked_spin_ns, self._at)
            except OverflowError:
                return None
            if result == ANSWERED:
                at = self._at[0]
                return self._memory[at : at + n_bytes].tobytes()
            if not self._is_in_flight(result, Operation.READ, n_bytes, offset):
                return None
            out = bytearray(n_bytes)
            self._wait_for_short(result, Operation.READ, n_bytes, offset, out, timeout_s)
            return bytes(out)

    def pwrite(self, data: bytes, offset: int, timeout_s: float | None) -> bool:
        """The same for a write; whether it was done."""
        n_bytes = len(data)
        with self.lock:
            if not self._open or self._watching:
                return False
            try:
                result = write_now(self._core, self._ring_core, offset, data, n_bytes, self._locked_spin_ns, self._at)
            except OverflowError:
                return False
            if result != ANSWERED:
                if not self._is_in_flight(result, Operation.WRITE, n_bytes, offset):
                    return False
                self._wait_for_short(result, Operation.WRITE, n_bytes, offset, None, timeout_s)
            return True

    def _is_in_flight(self, result: int, operation: Operation, n_bytes: int, offset: int) -> bool:
        """What came of the short way that is not an answer; False: nothing was done."""
        if result == FAILED:
            raise io_error(self._at[0], operation, offset, n_bytes)
        if result >= 0:
            return result & 0xFFFFFFFF == IN_FLIGHT
        self._check_peer(lambda ring: self.transfers.settle(ring, result))
        return False

    def _wait_for_short(
        self,
        result: int,
        operation: Operation,
        n_bytes: int,
        offset: int,
        out: bytearray | None,
        timeout_s: float | None,
    ) -> None:
        """It was sent, and was not answered while we spun."""
        transfer, address = Transfer(1), 0
        if out is not None:
            pointer, address, _ = address_in(out)
            transfer.kept.append(pointer)
        transfer.put(0, operation, offset, n_bytes, address)
        slot = self._at[0]

        def begin() -> None:
            self.transfers.adopt(slot, transfer)
            if result >> 32:
                self._check_peer(lambda ring: self.transfers.settle(ring, result))

        self._run(transfer, begin, timeout_s)
        if failure := transfer.failure:
            raise io_error(*failure)

    def run(self, transfer: Transfer, timeout_s: float | None = None) -> None:
        """Send a transfer and wait until all of it is answered; `Transfer.failure` tells how.

        Raises `Closed`, `PeerGone`, `PeerError`, `TimedOut` (it may still be under way, without our memory).
        """
        with self.lock:
            self._check()
            self._run(transfer, lambda: self.transfers.submit(transfer), timeout_s)

    def _run(self, transfer: Transfer, begin: Callable[[], None], timeout_s: float | None) -> None:
        """Hand it to the core by `begin`, and wait. Whatever happens, the core forgets memory the caller has back."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            self._alive[transfer] = None  # before the core knows its address
            begin()
            self._wait_for(transfer, deadline)
        except BaseException:
            self.transfers.forget(transfer)
            raise
        finally:
            if transfer.done:
                self._alive.pop(transfer, None)

    def _wait_for(self, transfer: Transfer, deadline: float | None) -> None:
        spin_ns = self._spin_ns
        while not transfer.done:
            self._check()
            if self._open and not self._watching and not self.transfers.taken:
                self._check_peer(lambda ring: self.transfers.run(ring, transfer, self._locked_spin_ns))
                self._tell()
                if spin_ns == LEARNT:
                    spin_ns = 0  # it has spun as long as pays
                if transfer.core.done:
                    return
            self._send()
            self._wait(deadline, spin_ns)

    def hold(self, timeout_s: float | None) -> None:
        """For a barrier of another queue: send nothing, until `go_on`, and return when nothing is in flight."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.lock:
            self._holders += 1
            self._set_open()
            while self.transfers.slots.in_flight and self._error is None:
                self._wait(deadline, self._spin_ns)

    def go_on(self) -> None:
        """Undo a `hold`, also one that raised."""
        with self.lock:
            self._holders -= 1
            self._set_open()
            self._send()
            self._changed.notify_all()
        self.end.waiter.kick()  # who watches the ring has something to send, perhaps

    def alone(self, run: Callable[[Slots, FrontRing, int], bool]) -> None:
        """Have slots and ring for oneself: `run(slots, ring, spin_ns)` is called until it says that it is done and has
        nothing in flight, without the lock, and on the new ring after a reconnect. It returns at least every 50 ms.

        Calls from other threads wait meanwhile. Raises what `run` raises, `Closed`, `PeerGone`, `PeerError`.
        """
        with self.lock:
            while self._alone or self.transfers.slots.in_flight:
                self._check()
                self._wait(None, self._spin_ns)
            self._alone = True
            self._set_open()
            try:
                while not self._run_alone(run):
                    pass
            finally:
                self._alone = False
                self._set_open()
                self._send()
                self._changed.notify_all()

    def _run_alone(self, run: Callable[[Slots, FrontRing, int], bool]) -> bool:
        self._check()
        ring = self._ring
        if ring is None:
            self._wait_for_change()
            return False
        done: list[bool] = []
        try:
            self._without_lock(lambda: done.append(run(self.transfers.slots, ring, self._spin_ns)))
        except PeerError as error:
            self._fail_soon(error)
            raise
        return done[0]

    # -- calls of an event loop

    async def run_async(self, transfer: Transfer) -> None:
        """`run` without blocking the loop. When it is cancelled nothing is written to its memory any more.

        What is asked in one turn of the loop is sent together. Raises as `run`, and `InvalidRequest` while another loop
        waits for this queue.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self.lock:
            self._check()
            self._loop.enter(loop)
            self._stuck = None
            self._last_number = number = self._last_number + 1
            self._futures[number] = future
            self._alive[transfer] = None
            self.transfers.submit(transfer, number)
            if not self._sending_soon:
                self._sending_soon = True
                loop.call_soon(self._send_now)
        try:
            await future
        finally:
            with self.lock:
                self._futures.pop(number, None)
                if not transfer.done:
                    self.transfers.forget(transfer)
                    error = self._error or self._stuck
                else:
                    error = None
                self._alive.pop(transfer, None)
                self._loop.leave()
        if error is not None:
            raise error

    def _send_now(self) -> None:
        """In the loop, once a turn."""
        with self.lock:
            self._sending_soon = False
            self._collect()
