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
from paravirt.ring.grant import Granter, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import Mapping, address_of, map_new

BASE, PAGES, SECTORS = 8, 32, 2048


@dataclass
class Pair:
    """Granter and mapper of one chunk in one process, with a batch on the mapper's side."""

    granter: Granter
    mapper: Mapper
    data: Mapping
    batch: blkif.RequestBatch

    def run(self, requests: np.ndarray, disk: bytearray | None = None) -> np.ndarray:
        """Take requests through prepare, copy and finish; the responses."""
        n = len(requests)
        self.batch.requests[: n * 112] = np.frombuffer(requests.tobytes(), np.uint8)
        self.batch.prepare(n)
        if disk is not None:
            self.batch.set_disk(memory=address_of(disk)[0], n_bytes=len(disk))
            self.batch.copy(n)
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
    yield Pair(granter, mapper, data, batch)
    del batch
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
    return pair.mapper.statistics().pinned_pages


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
