# SPDX-License-Identifier: MIT
"""Pages of an arena that go with a request: written and read in place by both halves."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.hypervisor.client import Arena, PageRun
from paravirt.ring.memory import PAGE_BYTES


class Buffer:
    """Memory of the arena shared with the backend's domain; made by `DeviceFrontend.buffer`.

    Its pages are granted while a request that carries it is in flight, one request at a time, and are ours alone before
    and after. A context manager; `close` of one in flight takes effect when its answer has come.
    """

    def __init__(self, arena: Arena, n_bytes: int, *, read_only: bool) -> None:
        """`read_only`: for the backend. Raises `ResourceLimit`, `InvalidRequest`."""
        if n_bytes < 1:
            raise InvalidRequest(f"a buffer cannot have {n_bytes} bytes")
        self.n_bytes = n_bytes
        self.read_only = read_only
        self._arena = arena
        self._run: PageRun | None = arena.allocate(-(-n_bytes // PAGE_BYTES))
        self.n_pages = self._run.n_pages
        self.in_flight = False
        """A request that carries it is not answered yet."""
        self._granted: list[int] = []
        self._closing = False

    @property
    def view(self) -> memoryview:
        """Its bytes, writable."""
        return self._pages().view[: self.n_bytes]

    def array(self, dtype: Any = np.uint8) -> NDArray[Any]:
        """Its bytes as an array, as many items as fit."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.view, kind, self.n_bytes // kind.itemsize)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Copy `data` to byte `offset`. Raises `InvalidRequest` when it does not fit."""
        n = len(data)
        if not 0 <= offset <= offset + n <= self.n_bytes:
            raise InvalidRequest(f"{n} bytes at {offset} do not fit a buffer of {self.n_bytes}")
        self.view[offset : offset + n] = data

    def read(self, n_bytes: int | None = None, offset: int = 0) -> bytes:
        """A copy of `n_bytes` (None: all) from byte `offset`."""
        return bytes(self.view[offset : self.n_bytes if n_bytes is None else offset + n_bytes])

    def _pages(self) -> PageRun:
        if self._run is None or self._closing:
            raise Closed("this buffer is closed")
        return self._run

    # -- what the device does with it, under its lock

    def check_usable(self) -> None:
        """Raises `InvalidRequest` while another request carries it, `PeerError` while the backend keeps a page of one
        that it has answered, `Closed`.
        """
        self._pages()
        if self.in_flight:
            raise InvalidRequest("this buffer is carried by a request that is not answered yet")
        self.take_back()
        if self._granted:
            raise PeerError("the backend keeps a page of a request that it has answered")

    def grant(self) -> list[int]:
        """Let the backend use the pages; their references."""
        run = self._run
        if run is None:
            raise Closed("this buffer is closed")
        self._granted = [self._arena.grant(run.gref + i, read_only=self.read_only) for i in range(run.n_pages)]
        return self._granted

    def answered(self) -> int:
        """The request is answered: take the pages back; how many the backend keeps."""
        self.take_back()
        kept = len(self._granted)
        self.in_flight = False  # last but for this: `close` in another thread frees what is not in flight
        if self._closing:
            self._free()
        return kept

    def take_back(self) -> None:
        """Revoke what is granted, as far as the backend lets go of it."""
        self._granted = [gref for gref in self._granted if not self._arena.revoke(gref)]

    def _free(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._arena.free(run)

    def close(self) -> None:
        """Give the pages back; one the backend keeps comes back when it lets go. Harmless when repeated."""
        self._closing = True
        if not self.in_flight:
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._run is None else "in flight" if self.in_flight else "idle"
        return f"<Buffer of {self.n_bytes} bytes, {state}>"


def check_carried(buffers: Sequence[Buffer | None], n: int) -> None:
    """Raises `InvalidRequest` unless there are none, or `n` of which none is there twice."""
    if buffers and len(buffers) != n:
        raise InvalidRequest(f"{len(buffers)} buffers do not fit {n} requests")
    carried = [id(buffer) for buffer in buffers if buffer is not None]
    if len(set(carried)) != len(carried):
        raise InvalidRequest("a buffer is carried by one request at a time")


def carried_by(buffers: Sequence[Buffer | None]) -> list[Buffer]:
    """Those that are none of None. Raises what `check_usable` does."""
    carried = [buffer for buffer in buffers if buffer is not None]
    for buffer in carried:
        buffer.check_usable()
    return carried
