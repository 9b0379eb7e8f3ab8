# SPDX-License-Identifier: MIT
"""A frontend's slots, and the backend's ends of everything for a test to play it message by message."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from paravirt.protocol.blkif import MAX_SEGMENTS, REQUEST, RESPONSE, Operation
from paravirt.ring.blkfront import Slots
from paravirt.ring.grant import Granter, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import Mapping, map_new
from paravirt.ring.shared import BackRing, FrontRing

BASE, N_SLOTS, BACKEND = 8, 32, 0
PAGES = N_SLOTS * MAX_SEGMENTS


@dataclass
class Stage:
    """A frontend's slots and the backend's ends of everything."""

    slots: Slots
    granter: Granter
    mapper: Mapper
    data: Mapping
    rings: list[Mapping] = field(default_factory=list)
    front: FrontRing = field(init=False)
    back: BackRing = field(init=False)

    def new_ring(self, start: int = 0) -> None:
        self.rings.append(shared(4096))
        self.front = FrontRing.create(self.rings[-1], REQUEST, RESPONSE, start=start)
        self.back = BackRing.attach(self.rings[-1], REQUEST, RESPONSE)

    def issue(self, *asked: tuple[Operation, int, int]) -> list[int]:
        for i, (operation, offset, length) in enumerate(asked):
            self.slots.ask(i, operation, offset, length)
        return list(self.slots.issue(self.front, len(asked))[0 : len(asked)])

    def answer(self, requests: np.ndarray, **forged: int) -> tuple[list[tuple[int, int]], object]:
        """Answer requests, as they are or with fields forged; what the frontend makes of it."""
        answers = np.zeros(len(requests), RESPONSE)
        answers["id"], answers["operation"] = requests["id"], requests["operation"]
        for name, value in forged.items():
            answers[name][-1] = value
        self.back.push(answers)
        self.slots.watch(self.front, 0, 0)
        return self.slots.complete()


def shared(n_bytes: int) -> Mapping:
    fd, mapping = map_new("memfd", n_bytes)
    os.close(fd)
    return mapping


@contextmanager
def make_stage(*, buffer_pages: int = 0) -> Iterator[Stage]:
    """`buffer_pages`: behind the pages of the slots, granted."""
    pages = PAGES + buffer_pages
    entries, data = shared(entries_bytes(pages)), shared(pages * 4096)
    maptrack = shared(maptrack_bytes(pages))
    init_maptrack(maptrack, BASE, pages)
    granter = Granter(entries, base=BASE, n_pages=pages, peer=BACKEND)
    mapper = Mapper(entries, data, maptrack, base=BASE, n_pages=pages, domid=BACKEND)
    for page in range(PAGES, pages):
        granter.access(page)
    made = Stage(Slots(granter, data.pointer(), BASE, N_SLOTS, BACKEND), granter, mapper, data)
    made.new_ring()
    yield made
    made.front.close()
    made.back.close()
    mapper.close()
    granter.close()
    for mapping in (entries, data, maptrack, *made.rings):
        mapping.close()
