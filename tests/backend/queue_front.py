# SPDX-License-Identifier: MIT
"""A frontend of a block device with several queues, made by hand: it writes into xenstore and on its rings what a test
says."""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import paravirt
from paravirt.hypervisor.client import Arena, EventChannel, PageRun, Waiter
from paravirt.protocol import blkif
from paravirt.protocol.blkif import Operation, Status
from paravirt.protocol.keys import RingRequest
from paravirt.protocol.vbd import NATIVE_ABI, X86_32_ABI, VbdRequest
from paravirt.protocol.xenbus import DevicePath, XenbusState
from paravirt.ring.event import WaitResult
from paravirt.ring.shared import FrontRing
from paravirt.ring.waiting import Fence
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import Transaction

S = XenbusState
DEADLINE_S = 20.0
PAGE = 4096


@dataclass
class Queue:
    """One queue of the frontend, with a page of data."""

    ring: FrontRing
    channel: EventChannel
    waiter: Waiter
    pages: PageRun
    data: PageRun
    place: RingRequest

    def push(self, operation: Operation, sector: int = 0, *, segments: int = 1, id: int = 1) -> None:
        asked: NDArray[Any] = np.zeros(1, self.ring.request)
        asked["operation"], asked["sector"], asked["id"] = operation, sector, id
        asked["nr_segments"] = segments
        if segments:
            asked["seg"][0, 0] = (self.data.gref, 0, 7)
        self.ring.push(asked)

    def answer(self, timeout_s: float = DEADLINE_S) -> tuple[int, Status]:
        """Id and status of the next response."""
        deadline = time.monotonic() + timeout_s
        while not len(answers := self.ring.take_batch(1)):
            if self.ring.wait(timeout_s=max(0.0, deadline - time.monotonic())) is WaitResult.TIMEOUT:
                raise TimeoutError("no answer")
        return int(answers["id"][0]), Status(int(answers["status"][0]))

    def do(self, operation: Operation, sector: int = 0, *, segments: int = 1) -> Status:
        self.push(operation, sector, segments=segments)
        return self.answer()[1]

    def write(self, data: bytes, sector: int) -> Status:
        """A page."""
        self.data.view[:PAGE] = data.ljust(PAGE, b"\0")
        return self.do(Operation.WRITE, sector)

    def read(self, sector: int) -> bytes:
        """A page, without the zeroes at its end."""
        assert self.do(Operation.READ, sector) is Status.OKAY
        return bytes(self.data.view[:PAGE]).rstrip(b"\0")

    def close(self) -> None:
        self.ring.close()
        self.channel.close()
        self.waiter.close()


class QueueFront:
    """The frontend half of one disk of a host."""

    def __init__(
        self, host: paravirt.Host, spec: str = "1M", *, driver: str = "memory", arenas: int = 1, name: str = "guest"
    ) -> None:
        """`arenas`: how many its rings are spread over."""
        self.host = host
        self.domain = host.create_domain(name)
        self.path: DevicePath = host.attach_disk(self.domain, spec, driver=driver)
        self.store = self.domain.store
        self.arenas: list[Arena] = [self.domain.hypervisor.create_arena(0, 64) for _ in range(arenas)]
        self.queues: list[Queue] = []
        self.expect(S.INIT_WAIT)

    def make(self, n: int, *, order: int = 0, abi: str = NATIVE_ABI, fence: Fence = "full") -> VbdRequest:
        """Fresh rings and ports; what to publish of them."""
        self.drop()
        layout = blkif.X86_32_REQUEST if abi == X86_32_ABI else blkif.REQUEST
        for number in range(n):
            arena = self.arenas[number % len(self.arenas)]
            waiter = self.domain.hypervisor.waiter()
            channel = self.domain.hypervisor.alloc_unbound(waiter, 0)
            pages, data = arena.allocate(1 << order), arena.allocate(1)
            ring = FrontRing.create(pages.view, layout, blkif.RESPONSE, port=channel, fence=fence)
            refs = tuple(arena.grant(pages.gref + i) for i in range(1 << order))
            arena.grant(data.gref)
            place = RingRequest(refs, channel.port)
            self.queues.append(Queue(ring, channel, waiter, pages, data, place))
        return VbdRequest(tuple(queue.place for queue in self.queues), abi)

    def write(self, state: XenbusState, keys: dict[str, str] | None = None, *, without: tuple[str, ...] = ()) -> None:
        def change(transaction: Transaction) -> None:
            for name in without:
                transaction.rm(f"{self.path.frontend}/{name}")
            for name, value in (keys or {}).items():
                transaction.write(f"{self.path.frontend}/{name}", value)
            transaction.write(f"{self.path.frontend}/state", str(int(state)))

        self.store.transact(change)

    def connect(self, n: int, *, order: int = 0, abi: str = NATIVE_ABI) -> list[Queue]:
        self.write(S.INITIALISED, self.make(n, order=order, abi=abi).to_keys())
        self.expect(S.CONNECTED)
        self.write(S.CONNECTED)
        return self.queues

    def start_over(self) -> None:
        """Close in good order, and begin anew without the keys of the last time."""
        self.write(S.CLOSED)
        self.expect(S.CLOSED)
        names = set(self.store.ls(self.path.frontend))
        self.write(S.INITIALISING, without=tuple(names & {"multi-queue-num-queues", "ring-page-order", "protocol"}))
        self.expect(S.INIT_WAIT)

    def backend(self) -> XenbusState:
        return xenbus.read_state(self.host.store, self.path.backend)

    def error(self) -> str:
        node = f"/local/domain/0/error/{self.path.backend.split('/', 4)[4]}/error"
        return xenbus.read_key(self.host.store, node) or ""

    def expect(self, state: XenbusState) -> None:
        queue = self.host.store.watch_queue()
        queue.add(f"{self.path.backend}/state")
        deadline = time.monotonic() + DEADLINE_S
        while (now := self.backend()) is not state:
            assert time.monotonic() < deadline, f"backend stays {now.name}, not {state.name}; {self.error()}"
            queue.get(timeout_s=0.2)
        queue.close()

    def drop(self) -> None:
        """Let go of rings and ports; the backend must have, for their pages to be given back."""
        for queue in self.queues:
            queue.close()
            for run in queue.pages, queue.data:
                self.arenas[self.queues.index(queue) % len(self.arenas)].free(run)
        self.queues = []

    def all_given_back(self) -> bool:
        """Whether the backend holds none of the pages."""
        arenas = self.arenas
        return all(
            arenas[number % len(arenas)].revoke(gref)
            for number, queue in enumerate(self.queues)
            for gref in (*queue.place.ring_refs, queue.data.gref)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for queue in self.queues:
            queue.close()
        for arena in self.arenas:
            arena.close()
