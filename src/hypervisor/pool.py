# SPDX-License-Identifier: MIT
"""A private pool of an arena's pages: set aside at once, so that nobody else can use them up meanwhile."""

import threading
from types import TracebackType
from typing import Self

from paravirt.errors import Closed, InvalidRequest, ResourceLimit
from paravirt.hypervisor.arena import Arena, PageRun
from paravirt.ring.memory import PAGE_BYTES


class GrantPool:
    """Single pages of an arena for one user (gnttab_alloc_grant_references, claim, release). A context manager.

    Thread-safe. A page that the peer still uses when it is released is not claimed again before the peer lets go.
    """

    def __init__(self, arena: Arena, n_pages: int, *, owner: str = "pool") -> None:
        """Raises `ResourceLimit`, and takes nothing then. The arena must outlive this."""
        if n_pages < 1:
            raise InvalidRequest(f"a pool of {n_pages} pages")
        self._arena = arena
        self._lock = threading.Lock()
        self._free: list[PageRun] = []
        self._held: list[PageRun] = []
        self._claimed: dict[int, PageRun] = {}
        self._closed = False
        try:
            for _ in range(n_pages):
                self._free.append(arena.allocate(1, owner=owner))
        except BaseException:
            self.close()
            raise
        self.n_pages = n_pages

    def claim(self, *, read_only: bool = False, zero: bool = True) -> PageRun:
        """A page, granted to the peer. Raises `ResourceLimit` when all are claimed or still used by the peer.

        `zero` False: with what was in it, which was this pool's and the peer's own.
        """
        with self._lock:
            self._check_open()
            if not self._free:
                self._retry()
            if not self._free:
                raise ResourceLimit(
                    f"all {self.n_pages} pages of this pool are in use, {len(self._held)} by domain {self._arena.peer}"
                )
            run = self._free.pop()
            self._claimed[run.gref] = run
        if zero:
            with run.view as view:
                view[:] = bytes(PAGE_BYTES)
        self._arena.grant(run.gref, read_only=read_only)
        return run

    def release(self, run: PageRun) -> bool:
        """Give a page back; False while the peer still uses it. Raises `InvalidRequest` for one that is not claimed."""
        with self._lock:
            self._check_open()
            if self._claimed.get(run.gref) is not run:
                raise InvalidRequest(f"{run} is not claimed from this pool")
            del self._claimed[run.gref]
            back = self._arena.revoke(run.gref)
            (self._free if back else self._held).append(run)
            return back

    @property
    def free_pages(self) -> int:
        """That can be claimed now."""
        with self._lock:
            self._retry()
            return len(self._free)

    @property
    def held_pages(self) -> int:
        """Released, but still used by the peer."""
        with self._lock:
            self._retry()
            return len(self._held)

    def _retry(self) -> None:
        held, self._held = self._held, []
        for run in held:
            (self._free if self._arena.revoke(run.gref) else self._held).append(run)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this pool is closed")

    def close(self) -> None:
        """Give all pages back to the arena, those that are claimed, too. Harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            runs = [*self._free, *self._held, *self._claimed.values()]
            self._free, self._held, self._claimed = [], [], {}
        for run in runs:
            self._arena.free(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GrantPool {'closed' if self._closed else f'{len(self._claimed)} of {self.n_pages} pages claimed'}>"
