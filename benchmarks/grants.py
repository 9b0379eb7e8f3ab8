# SPDX-License-Identifier: MIT
"""Granting, taking back and copying pages: in C and by Python's batch calls; copies beside memcpy of as many pages."""

import os
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Self

import numpy as np

from paravirt.ring.grant import COPY_OP, Granter, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import PAGE_BYTES, Mapping, create_object

from .harness import Answer, Bench, Mark, alone

QUESTION = "What do grants cost, without a system call, and copies of granted pages beside memcpy?"
UNIT = "Millions of pages a second."
BASE, DOMID = 8, 1
BUFFER_PAGES = 32  # copied to and from in turn, in C too, whatever the batch
PYTHON_BATCHES = (32, 256)
GRANTED_PAGES = 512
EACH = Mark(value=50e6)  # 20 ns
COPIED_PAGES = {"1 MiB": 256, "16 MiB": 4096}
WITHIN = Mark(ratio=0.91)  # 10 % more time


def ask(bench: Bench) -> Iterable[Answer]:
    program = bench.compile("grants", ["grants.c"], ["grant", "grant_copy"])

    def in_c(mode: str, n_pages: int) -> float:
        command = [str(program), mode, str(bench.cpus[1]), str(bench.seconds), str(n_pages)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)

    with Pages(GRANTED_PAGES) as pages:
        for mode in ("grant", "revoke"):
            sides: dict[str, Callable[[], float]] = {
                "C": lambda mode=mode: in_c(mode, GRANTED_PAGES),
                "Python": lambda mode=mode: pages.grants(mode, bench.seconds),
            }
            for name, side in sides.items():
                rounds, load = bench.take_turns([side])
                samples = [rates[0] for _, rates in rounds]
                yield alone(f"{mode}, {name}", samples, EACH, tag=rounds[0][0], load=load, unit=1e6)
    for size, n_pages in COPIED_PAGES.items():
        with Pages(n_pages) as pages:
            for way, into in {"out of": False, "into": True}.items():
                suffix = "-into" * into
                sides = {"C": lambda n_pages=n_pages, suffix=suffix: in_c("copy" + suffix, n_pages)}
                for batch in PYTHON_BATCHES:
                    sides[f"Python, {batch} a call"] = lambda pages=pages, batch=batch, into=into: pages.copies(
                        bench.seconds, batch, into=into
                    )
                for name, side in sides.items():
                    pairs, load = bench.interleave(
                        side, lambda n_pages=n_pages, suffix=suffix: in_c("memcpy" + suffix, n_pages)
                    )
                    yield bench.compare(f"4 KiB {way} {size}, {name}", "memcpy", pairs, load, WITHIN)


class Pages:
    """A chunk of pages with both halves of its grants, in this process."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._stack = ExitStack()
        entries, data = self._map(entries_bytes(n_pages)), self._map(n_pages * PAGE_BYTES)
        maptrack = self._map(maptrack_bytes(n_pages))
        init_maptrack(maptrack, BASE, n_pages)
        self._granter = Granter(entries, base=BASE, n_pages=n_pages, peer=DOMID)
        self._mapper = Mapper(entries, data, maptrack, base=BASE, n_pages=n_pages, domid=DOMID)
        self._local = np.zeros(BUFFER_PAGES * PAGE_BYTES, np.uint8)
        data.view[:] = bytes(n_pages * PAGE_BYTES)

    def _map(self, n_bytes: int) -> Mapping:
        fd = create_object("memfd", n_bytes)
        try:
            return self._stack.enter_context(Mapping(fd, n_bytes))
        finally:
            os.close(fd)

    def grants(self, mode: str, seconds: float) -> float:
        """Grant all pages and take them back, again and again: pages a second of the one or of the other."""
        every, clock = np.arange(self.n_pages, dtype=np.uint32), time.perf_counter
        took, rounds, end = {"grant": 0.0, "revoke": 0.0}, 0, clock() + seconds
        while (start := clock()) < end:
            grefs = self._granter.access_many(every)
            between = clock()
            left = self._granter.revoke_many(grefs)
            took["grant"] += between - start
            took["revoke"] += clock() - between
            assert not len(left)
            rounds += 1
        return rounds * self.n_pages / took[mode]

    def copies(self, seconds: float, batch: int, *, into: bool) -> float:
        """Copy all pages in turn, so many a call, the same array of operations filled anew: copies a second."""
        grefs = self._granter.access_many(np.arange(self.n_pages, dtype=np.uint32)).reshape(-1, batch)
        ops = np.zeros(batch, COPY_OP)
        ops["length"], ops["local_offset"] = PAGE_BYTES, np.arange(batch) % BUFFER_PAGES * PAGE_BYTES
        column, copy, local = ops["gref"], self._mapper.copy_array, self._local
        turns, done, start = list(grefs), 0, time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            column[:] = turns[done % len(turns)]
            statuses = copy(ops, local, to_grant=into)
            done += 1
        assert not statuses.any()
        self._granter.revoke_many(grefs.reshape(-1))
        return done * batch / (now - start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._granter.close()
        self._mapper.close()
        self._stack.close()
