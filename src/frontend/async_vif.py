# SPDX-License-Identifier: MIT
"""The calls of a `Vif` for an event loop: nothing blocks it, no thread is started, and an idle device wakes nobody."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from paravirt.errors import Closed, PeerError
from paravirt.frontend.loop import LoopListener
from paravirt.frontend.vif_queue import ROOM_POLL_S, Way
from paravirt.ring.netif import Burst

if TYPE_CHECKING:
    from paravirt.frontend.vif import Vif
    from paravirt.frontend.vif_queue import VifQueueEnd

BURST_BYTES = 262_144


class AsyncVif:
    """`Vif.aio`. Cancel a call or `asyncio.timeout` it at will: what `send` has handed over by then is sent, and
    `receive` loses nothing. Arguments and errors are those of `Vif`; `InvalidRequest` while another loop waits.

    One event loop at a time for each queue, and any number of its tasks. Threads may use it meanwhile.
    """

    def __init__(self, vif: "Vif") -> None:
        self._vif = vif
        self._ears: dict[VifQueueEnd, _Ears] = {}

    async def send(self, packets: Iterable[bytes] | Burst, *, queue: int = 0) -> int:
        """Frames to the backend, in order and not mixed with those of another task; how many: all."""
        burst = packets if isinstance(packets, Burst) else Burst.of(packets)
        end, done = self._vif.queue_end(queue), 0
        if not len(burst):
            return 0
        ears = self._ears_of(end)
        async with ears.turn("tx"):
            while done < len(burst):
                done += await self._try(ears, "tx", partial(end.try_send, burst, done))
        return done

    async def receive_burst(self, burst: Burst, max_packets: int = 64, *, queue: int = 0) -> int:
        """Packets to the end of `burst`, at least one; how many."""
        end = self._vif.queue_end(queue)
        ears = self._ears_of(end)
        async with ears.turn("rx"):
            while not (n := await self._try(ears, "rx", partial(end.try_receive, burst, max_packets))):
                pass
        return n

    async def receive(self, max_packets: int = 64, *, queue: int = 0) -> list[bytes]:
        """Packets, at least one."""
        burst = Burst(max_packets, max(BURST_BYTES, max_packets * 2048))
        await self.receive_burst(burst, max_packets, queue=queue)
        return list(burst)

    async def bursts(self, max_packets: int = 64, *, queue: int = 0) -> AsyncIterator[Burst]:
        """What comes, until the device is closed: one burst that is filled again and again."""
        burst = Burst(max_packets, max(BURST_BYTES, max_packets * 2048))
        while True:
            burst.clear()
            try:
                await self.receive_burst(burst, max_packets, queue=queue)
            except Closed:
                return
            yield burst

    def _ears_of(self, end: "VifQueueEnd") -> "_Ears":
        ears = self._ears.get(end)
        if ears is None:
            ears = self._ears[end] = _Ears(end)
        return ears

    async def _try(self, ears: "_Ears", way: Way, attempt: Callable[[], int | None]) -> int:
        """What an attempt moves; if that is nothing, 0 once another one is worth it."""
        try:
            moved = attempt()
        except PeerError as error:
            self._vif.fail(error)
            raise
        if moved is None:  # a thread is there
            await asyncio.sleep(ROOM_POLL_S)
        elif not moved:
            await ears.hear(way)
        return moved or 0

    def close(self) -> None:
        """Listen no more. Calls that wait end with the device's error."""
        for ears in list(self._ears.values()):
            ears.close()

    def __repr__(self) -> str:
        return f"<AsyncVif of {self._vif!r}>"


class _Ears:
    """What the tasks of a loop wait for at one queue."""

    def __init__(self, end: "VifQueueEnd") -> None:
        self._end = end
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turns: dict[Way, asyncio.Lock] = {}
        self._futures: dict[Way, asyncio.Future[None]] = {}
        # By the doorbell that rings for it: both rings of a connection may have one.
        self._listeners: dict[Way, LoopListener] = {
            "tx": LoopListener(end.tx_end.waiter.fileno, lambda: self._on_readable("tx"), stays=True),
            "rx": LoopListener(end.rx_end.waiter.fileno, lambda: self._on_readable("rx"), stays=True),
        }
        end.listeners.add(self._on_change)

    def turn(self, way: Way) -> asyncio.Lock:
        """Tasks of one loop take turns."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._turns = loop, {"tx": asyncio.Lock(), "rx": asyncio.Lock()}
        return self._turns[way]

    async def hear(self, way: Way) -> None:
        """Until there may be something to do."""
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            listener = self._listeners[self._end.doorbell(way)]
            listener.enter(future.get_loop())
            self._futures[way] = future
        try:
            if self._end.is_ready(way):
                await asyncio.sleep(0)  # whatever the peer does, the loop goes on
            elif way == "tx" and self._end.doorbell("rx") == "tx":
                # A thread that receives may be the one that hears of room.
                await asyncio.wait([future], timeout=ROOM_POLL_S)
            else:
                await future
        finally:
            with self._lock:
                if self._futures.get(way) is future:
                    del self._futures[way]
                listener.leave()

    def _on_readable(self, doorbell: Way) -> None:
        """In the loop."""
        event = self._end.take_event(doorbell)
        with self._lock:
            if event is None:  # a thread hears it
                self._listeners[doorbell].close()
            self._wake()
        if event:
            asyncio.get_running_loop().call_soon(self._end.end_event, event)  # behind the tasks that are woken

    def _on_change(self) -> None:
        """There is a connection, or will be none, or a thread has left. From any thread."""
        with self._lock:
            self._wake()

    def _wake(self) -> None:
        for way, future in self._futures.items():
            self._listeners[way].wake(future)

    def close(self) -> None:
        """After the device has given up."""
        self._end.listeners.discard(self._on_change)
        with self._lock:
            self._wake()
            for listener in self._listeners.values():
                listener.close()
