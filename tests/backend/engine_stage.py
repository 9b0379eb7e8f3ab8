# SPDX-License-Identifier: MIT
"""An engine on one end of a ring, and a hand-made frontend on the other, in one process without a host."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from paravirt.backend.c_engine import EngineName, engine_factory
from paravirt.backend.connection import Connection
from paravirt.backend.disks import Disk
from paravirt.backend.engine import Terms, VbdEngine
from paravirt.errors import ParavirtError
from paravirt.protocol.blkif import REQUEST as NATIVE_REQUEST
from paravirt.protocol.blkif import RESPONSE, X86_32_REQUEST, Operation
from paravirt.protocol.vbd import VbdOffer
from paravirt.ring.event import EventPort, EventWaiter, from_half, make_pair
from paravirt.ring.grant import Granter, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import Mapping
from paravirt.ring.shared import BackRing, FrontRing
from paravirt.ring.waiting import Wait, spin_limit, wait_after

from .blkif_pair import shared

BASE, PAGES = 8, 256
DEADLINE_S = 20.0


@dataclass
class Stage:
    """What the engine has and what the frontend has."""

    connection: Connection
    front: FrontRing
    port: EventPort
    granter: Granter
    data: Mapping
    ring_memory: Mapping
    failures: list[ParavirtError] = field(default_factory=list)
    unsupported: list[Operation] = field(default_factory=list)
    told: threading.Event = field(default_factory=threading.Event)

    def engine(self, name: EngineName, disk: Disk, *, wait: Wait = "adaptive", **changes: Any) -> VbdEngine:
        """One for `disk` that has not started; `changes` to what is offered."""
        offer = {
            "sectors": disk.size_bytes // 512,
            "sector_size": disk.sector_size,
            "barrier": True,
            "discard": disk.can_discard,
            "read_only": disk.read_only,
        }
        terms = Terms(
            offer=VbdOffer(**{**offer, **changes}),
            on_failure=self._fail,
            on_unsupported=self._miss,
            x86_32=self.connection.ring.request == X86_32_REQUEST,
            spin_ns=spin_limit(wait, 30_000),
        )
        return engine_factory(name)(self.connection, disk, terms)

    def _fail(self, error: ParavirtError) -> None:
        self.failures.append(error)
        self.told.set()

    def _miss(self, operation: Operation) -> None:
        self.unsupported.append(operation)
        self.told.set()

    def ask(self, requests: np.ndarray) -> np.ndarray:
        """Send requests as far as the ring takes them at a time, and collect as many answers, in order of their ids."""
        answers: list[np.ndarray] = []
        sent, n = 0, 0
        while n < len(requests):
            sent += self.front.push(requests[sent : sent + self.front.free])
            assert self.front.wait(timeout_s=DEADLINE_S), "no answer"
            answers.append(self.front.take_batch())
            n += len(answers[-1])
        found = np.frombuffer(b"".join(batch.tobytes() for batch in answers), RESPONSE)
        return found[np.argsort(found["id"], kind="stable")]


@contextmanager
def make_stage(*, x86_32: bool = False, ring_pages: int = 1, wait: Wait = "adaptive") -> Iterator[Stage]:
    """With every page but the last 16 granted; `wait` of the back end."""
    entries, data = shared(entries_bytes(PAGES)), shared(PAGES * 4096)
    maptrack, ring_memory = shared(maptrack_bytes(PAGES)), shared(ring_pages * 4096)
    init_maptrack(maptrack, BASE, PAGES)
    granter = Granter(entries, base=BASE, n_pages=PAGES, peer=0)
    mapper = Mapper(entries, data, maptrack, base=BASE, n_pages=PAGES, domid=0)
    granter.access_many(range(PAGES - 16))
    front_half, back_half = make_pair()
    front_waiter, front_port = from_half(front_half)
    back_waiter, back_port = from_half(back_half)
    back_port.late_eoi()
    layout = X86_32_REQUEST if x86_32 else NATIVE_REQUEST
    front = FrontRing.create(ring_memory, layout, RESPONSE, port=front_port, start=2**32 - 40)
    limit = spin_limit(wait, 30_000)
    back = BackRing.attach(ring_memory, layout, RESPONSE, port=back_port, wait=wait_after(limit), max_spin_ns=limit)
    arena: Any = SimpleNamespace(mapper=mapper, data=data)
    try:
        yield Stage(_connection(back, arena, back_waiter, back_port), front, front_port, granter, data, ring_memory)
        assert mapper.statistics().pinned_pages == 0
    finally:
        front.close()
        back.close()
        for waiter in (front_waiter, back_waiter):
            waiter.close()
        mapper.close()
        granter.close()
        for mapping in (entries, data, maptrack, ring_memory):
            mapping.close()


def _connection(ring: BackRing, arena: Any, waiter: EventWaiter, port: EventPort, pages: Any = None) -> Connection:
    return Connection(ring=ring, arena=arena, waiter=waiter, port=port, pages=pages)
