# SPDX-License-Identifier: MIT
"""Both halves of the grants of one chunk in one process, with a batch of blkif requests on the backend's side."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from paravirt.protocol.blkif import INDIRECT_REQUEST, MAX_SEGMENTS, REQUEST, RESPONSE, SEGMENT, Operation
from paravirt.ring import blkif
from paravirt.ring.blkif import Limits
from paravirt.ring.blkif_grants import PERSISTENT_GRANTS, UNUSED_S, PersistentGrants
from paravirt.ring.grant import Granter, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import Mapping, address_of, map_new
from paravirt.ring.shared import BackRing, FrontRing

BASE, PAGES, SECTORS = 8, 32, 2048


@dataclass
class Pair:
    """Granter and mapper of one chunk in one process, with a batch on the mapper's side."""

    granter: Granter
    mapper: Mapper
    data: Mapping
    batch: blkif.RequestBatch
    kept: PersistentGrants | None = None

    def persist(self, max_grants: int = PERSISTENT_GRANTS, unused_s: float = UNUSED_S) -> None:
        """What is mapped stays mapped, until `let_go`."""
        self.kept = PersistentGrants(self.mapper, max_grants, unused_s)
        self.batch.persist(self.kept)

    def let_go(self) -> None:
        self.batch.persist(None)
        if self.kept is not None:
            self.kept.close()
            self.kept = None

    def run(self, requests: np.ndarray, disk: bytearray | None = None) -> np.ndarray:
        """Take requests through prepare, copy and finish; the responses."""
        n = len(requests)
        self.batch.requests[: n * 112] = np.frombuffer(requests.tobytes(), np.uint8)
        self.batch.prepare(n)
        if disk is not None:
            self.batch.set_disk(memory=address_of(disk)[0], n_bytes=len(disk))
            self.batch.do(n)
        self.batch.finish(n)
        return np.frombuffer(bytes(self.batch.responses[: n * 16]), RESPONSE)


@contextmanager
def make_pair(*, x86_32: bool = False) -> Iterator[Pair]:
    """For requests of that ABI."""
    objects = [shared(n) for n in (entries_bytes(PAGES), PAGES * 4096, maptrack_bytes(PAGES))]
    entries, data, maptrack = objects
    init_maptrack(maptrack, BASE, PAGES)
    granter = Granter(entries, base=BASE, n_pages=PAGES, peer=0)
    mapper = Mapper(entries, data, maptrack, base=BASE, n_pages=PAGES, domid=0)
    batch = blkif.RequestBatch(mapper, data.view, 32, x86_32=x86_32)
    batch.set_limits(Limits(SECTORS))
    made = Pair(granter, mapper, data, batch)
    yield made
    made.let_go()
    del batch, made
    mapper.close()
    granter.close()
    for mapping in objects:
        mapping.close()


def request(operation: int = Operation.READ, sector: int = 0, segments=((BASE, 0, 7),), id: int = 1) -> np.ndarray:
    made = np.zeros(1, REQUEST)
    made["operation"], made["sector"], made["id"], made["nr_segments"] = operation, sector, id, len(segments)
    for i, segment in enumerate(segments[:MAX_SEGMENTS]):
        made["seg"][0, i] = segment
    return made


def shared(n_bytes: int) -> Mapping:
    """Memory of its own."""
    fd, mapping = map_new("memfd", n_bytes)
    os.close(fd)
    return mapping


def together(requests: list[np.ndarray]) -> np.ndarray:
    """One array of several: np.concatenate would pack the fields."""
    return np.frombuffer(b"".join(one.tobytes() for one in requests), REQUEST)


def in_use(pair: Pair) -> int:
    """Pages that are mapped, but those that wait for the next request to use them."""
    kept = pair.kept.statistics() if pair.kept else None
    return pair.mapper.statistics().pinned_pages - (kept.cached - kept.in_use if kept else 0)


def indirect(
    pair: Pair,
    segments: list[tuple[int, int, int]],
    operation: int = Operation.READ,
    sector: int = 0,
    *,
    page: int = PAGES - 1,
    n: int | None = None,
) -> np.ndarray:
    """A request whose segments stand in one granted page; `n`: how many it says they are."""
    made = np.zeros(1, INDIRECT_REQUEST)
    made["operation"], made["indirect_op"], made["id"], made["sector"] = Operation.INDIRECT, operation, 1, sector
    made["nr_segments"] = len(segments) if n is None else n
    made["indirect_grefs"][0, 0] = BASE + page
    write_segments(pair, page, segments)
    return np.frombuffer(made.tobytes(), REQUEST)


def write_segments(pair: Pair, page: int, segments: list[tuple[int, int, int]]) -> None:
    array = np.zeros(len(segments), SEGMENT)
    for i, segment in enumerate(segments):
        array[i] = segment
    raw = array.tobytes()
    pair.data.view[page * 4096 : page * 4096 + len(raw)] = raw


@contextmanager
def ring_of_answers() -> Iterator[BackRing]:
    """A back end that has taken as many requests as it may."""
    memory = shared(4096)
    with (
        memory,
        FrontRing.create(memory, REQUEST, RESPONSE) as front,
        BackRing.attach(memory, REQUEST, RESPONSE) as ring,
    ):
        front.push(np.zeros(32, REQUEST))
        ring.take_batch()
        yield ring
