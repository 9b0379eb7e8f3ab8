# SPDX-License-Identifier: MIT
"""Memory for a disk's data that the backend reads and writes itself: pages of the arena, granted while they are used.

The memory is shared: the backend can read and change it at any time, also after it has answered. Whoever believes
nothing of his backend copies what he has read before he looks at it, or reads into memory of his own.
"""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import Closed, ResourceLimit
from paravirt.hypervisor.client import Arena, PageRun
from paravirt.ring.memory import PAGE_BYTES

OWNER = "disk buffers"


class Registry(Protocol):
    """What a queue does with buffers: `DiskQueue`."""

    def set_arena(self, arena: Arena) -> None:
        """Buffers are pages of this one."""

    def set_buffer(self, first_page: int, n_pages: int, number: int) -> None:
        """These pages are a buffer under a number; 0: not any more."""

    def buffer_in_flight(self, number: int) -> int:
        """Requests that use it."""


class DiskBuffers:
    """Buffers side by side: `array` has one a row, `buffers[i]` is one as a memoryview. A context manager that frees.

    Freed while requests are under way (or while the backend keeps a page), the memory is used for nothing else until
    they are answered. Views of it stay valid memory, and become other buffers': drop them.
    """

    def __init__(self, pages: "BufferPages", run: PageRun, n_bytes: int, count: int) -> None:
        self._pages = pages
        self._run: PageRun | None = run
        self._view = run.view[: n_bytes * count]
        self.n_bytes = n_bytes
        self.array: NDArray[np.uint8] = np.frombuffer(self._view, np.uint8).reshape(count, n_bytes)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> memoryview:
        if self._run is None:
            raise Closed("these buffers are freed")
        start = range(len(self.array))[i] * self.n_bytes
        return self._view[start : start + self.n_bytes]

    @property
    def in_flight(self) -> int:
        """Requests that read or write them now, those of cancelled calls included."""
        return 0 if self._run is None else self._pages.in_flight(self._run)

    def free(self) -> None:
        """Give the memory back. Harmless when repeated."""
        run, self._run = self._run, None
        if run is not None:
            self._pages.free(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def __repr__(self) -> str:
        state = " freed" if self._run is None else ""
        return f"<DiskBuffers {len(self.array)} x {self.n_bytes} bytes{state}>"


class BufferPages:
    """All buffers of one disk. Thread-safe."""

    def __init__(self, n_pages: int) -> None:
        """`n_pages`: of all buffers together."""
        self.n_pages = n_pages
        self._lock = threading.Lock()
        self._arena: Arena | None = None
        self._queues: Sequence[Registry] = ()
        self._used = 0  # pages
        self._dying: list[PageRun] = []  # freed, with requests in flight

    def use(self, arena: Arena, queues: Sequence[Registry]) -> None:
        """Once the arena is there; harmless when repeated."""
        with self._lock:
            if self._arena is not None or not self.n_pages:
                return
            self._arena, self._queues = arena, queues
            for queue in queues:
                queue.set_arena(arena)

    def make(self, n_bytes: int, count: int) -> DiskBuffers:
        """Raises `ResourceLimit`."""
        n_pages = -(-n_bytes * count // PAGE_BYTES)
        with self._lock:
            self._collect()
            if self._arena is None or self._used + n_pages > self.n_pages:
                free = (self.n_pages - self._used) * PAGE_BYTES
                raise ResourceLimit(
                    f"{count} buffers of {n_bytes} bytes are more than the {free} bytes that are left: "
                    "open the disk with more `buffer_bytes`"
                )
            run = self._arena.allocate(n_pages, owner=OWNER)
            for i in range(n_pages):
                self._arena.grant(run.gref + i)
            self._used += n_pages
            self._register(run, run.page + 1)
            return DiskBuffers(self, run, n_bytes, count)

    def _register(self, run: PageRun, number: int) -> None:
        for queue in self._queues:
            queue.set_buffer(run.page, run.n_pages, number)

    def in_flight(self, run: PageRun) -> int:
        return sum(queue.buffer_in_flight(run.page + 1) for queue in self._queues)

    def free(self, run: PageRun) -> None:
        """Now, or when nothing of it is in flight: then whoever makes, frees or asks for statistics gives it back."""
        with self._lock:
            if self._arena is None:
                return
            self._register(run, 0)
            self._dying.append(run)
            self._collect()

    def collect(self) -> None:
        """Look again at what was freed."""
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        if self._arena is None:
            return
        for run in [run for run in self._dying if not self.in_flight(run)]:
            self._dying.remove(run)
            self._used -= run.n_pages
            self._arena.free(run)

    def close(self) -> None:
        """The arena goes."""
        with self._lock:
            self._arena = None
