# SPDX-License-Identifier: MIT
"""An arena as the process sees it that uses another domain's pages: the mapper's half of the grants."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from paravirt.errors import Closed, InvalidRequest
from paravirt.hypervisor.arena import map_and_close, provider_of
from paravirt.hypervisor.link import Link, Reply
from paravirt.hypervisor.messages import Op
from paravirt.ring._core import lib
from paravirt.ring.grant import Mapper, entries_bytes, maptrack_bytes
from paravirt.ring.memory import PAGE_BYTES, Mapping

CData = Any


class ForeignArena:
    """Another domain's arena, mapped here. Thread-safe; a context manager: each use has a `close` of its own."""

    def __init__(self, link: Link, reply: Reply, domid: int, on_close: Callable[["ForeignArena"], None]) -> None:
        """From the broker's reply; made by `Hypervisor`. `domid`: our own."""
        arena = reply.message.arena
        self.granter_domid: int = arena.domid
        self.base: int = arena.gref
        self.n_pages: int = arena.n_pages
        self.read_only = bool(arena.flags & lib.PV_ARENA_READ_ONLY)
        self.provider = provider_of(reply)
        self.number: int = arena.map
        """The broker's number of this mapping."""
        self.link = link
        self._on_close = on_close
        self._lock = threading.Lock()
        self._uses = 1
        self._mappings: list[Mapping] = []
        self._data_fd = -1
        try:
            entries = self._keep(map_and_close(reply.take_fd(), entries_bytes(self.n_pages)))
            self._data_fd = reply.take_fd()
            self.data = self._keep(Mapping(self._data_fd, self.n_pages * PAGE_BYTES, read_only=self.read_only))
            maptrack = self._keep(map_and_close(reply.take_fd(), maptrack_bytes(self.n_pages)))
            self.mapper = Mapper(entries, self.data, maptrack, base=self.base, n_pages=self.n_pages, domid=domid)
        except BaseException:
            self._unmap()
            link.do_quietly(Op.ARENA_UNMAP, self._fill)
            raise

    def _keep(self, mapping: Mapping) -> Mapping:
        self._mappings.append(mapping)
        return mapping

    def holds(self, granter: int, gref: int) -> bool:
        """Whether a reference of that domain is in this arena."""
        return granter == self.granter_domid and self.base <= gref < self.base + self.n_pages

    def use(self) -> bool:
        """One more user, who will `close`; False when it is closed already."""
        with self._lock:
            self._uses += bool(self._uses)
            return bool(self._uses)

    def map_pages(self, grefs: Sequence[int], *, read_only: bool = False) -> "MappedPages":
        """Pin references and map their pages side by side, in this order.

        Raises `GrantFailed` (nothing stays pinned then), `InvalidRequest` for none at all.
        """
        return MappedPages(self, grefs, read_only=read_only)

    def map_run(self, offsets_bytes: Sequence[int], *, read_only: bool) -> tuple[Mapping, int, bool]:
        """(mapping, byte offset in it, whether it was made for this) of pages that appear side by side."""
        first = offsets_bytes[0]
        if all(offset == first + i * PAGE_BYTES for i, offset in enumerate(offsets_bytes)):
            return self.data, first, False
        made = Mapping.from_pages(self._data_fd, offsets_bytes, read_only=read_only or self.read_only)
        return made, 0, True

    def close(self) -> None:
        """End one use; the last one unmaps, and whatever was still pinned is let go by the broker."""
        with self._lock:
            if not self._uses:
                return
            self._uses -= 1
            if self._uses:
                return
        self._end()

    def abandon(self) -> None:
        """Unmap whoever uses it: the connection is closed."""
        with self._lock:
            if not self._uses:
                return
            self._uses = 0
        self._end()

    def _end(self) -> None:
        self.mapper.close()
        self._unmap()
        self.link.do_quietly(Op.ARENA_UNMAP, self._fill)
        self._on_close(self)

    def _unmap(self) -> None:
        for mapping in self._mappings:
            mapping.close()
        if self._data_fd >= 0:
            os.close(self._data_fd)
            self._data_fd = -1

    def _fill(self, request: CData) -> None:
        request.arena.map = self.number

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._uses else " closed"
        last = self.base + self.n_pages - 1
        return f"<ForeignArena of domain {self.granter_domid}, grefs {self.base}..{last}{state}>"


class MappedPages:
    """Pinned pages of a foreign arena, side by side. Keeps the arena in use; a context manager."""

    def __init__(self, arena: ForeignArena, grefs: Sequence[int], *, read_only: bool = False) -> None:
        if not grefs:
            raise InvalidRequest("no grant references to map")
        if not arena.use():
            raise Closed("this arena is closed")
        self._arena = arena
        self._read_only = read_only
        self._pinned: list[int] = []
        self._offsets: list[int] = []
        self._notifies: list[int] = []
        self._closed = False
        try:
            for gref in grefs:
                self._offsets.append(arena.mapper.map(gref, read_only=read_only))
                self._pinned.append(gref)
            self.mapping, self.offset_bytes, self._own_mapping = arena.map_run(self._offsets, read_only=read_only)
        except BaseException:
            self._unpin()
            arena.close()
            raise
        self.n_pages = len(grefs)
        self.n_bytes = self.n_pages * PAGE_BYTES

    @property
    def address(self) -> int:
        return self.mapping.address + self.offset_bytes

    @property
    def view(self) -> memoryview:
        """Read-only when the pages are."""
        self._check_open()
        view = self.mapping.view[self.offset_bytes : self.offset_bytes + self.n_bytes]
        return view.toreadonly() if self._read_only else view

    def pointer(self, c_type: str = "uint8_t *", offset_bytes: int = 0) -> CData:
        """A C pointer, which keeps nothing alive."""
        self._check_open()
        return self.mapping.pointer(c_type, self.offset_bytes + offset_bytes)

    def set_unmap_notify(self, *, port: int | None = None, clear_byte: int | None = None) -> None:
        """Tell the granter when these pages are unmapped, also if this process dies (gntdev's unmap notify).

        `port`: one of our event channels, which is sent on; `clear_byte`: offset in these pages of a byte that becomes
        0. Raises `InvalidRequest`, `PermissionRefused` for a byte of read-only memory, `ResourceLimit`.
        """
        self._check_open()
        if port is None and clear_byte is None:
            raise InvalidRequest("an unmap notification names a port, a byte, or both")
        if clear_byte is not None and not 0 <= clear_byte < self.n_bytes:
            raise InvalidRequest(f"byte {clear_byte} is outside these {self.n_bytes} bytes")

        def fill(request: CData) -> None:
            notify = request.notify
            notify.map = self._arena.number
            if port is not None:
                notify.actions, notify.port = lib.PV_NOTIFY_SEND_EVENT, port
            if clear_byte is not None:
                page, notify.offset = divmod(clear_byte, PAGE_BYTES)
                notify.actions |= lib.PV_NOTIFY_CLEAR_BYTE
                notify.gref = self._arena.base + self._offsets[page] // PAGE_BYTES

        with self._arena.link.call(Op.NOTIFY_SET, fill) as reply:
            self._notifies.append(reply.message.notify.id)

    def close(self) -> None:
        """Unpin, run the notifications, unmap. Slices of `view` keep the memory, not the grant."""
        if self._closed:
            return
        self._closed = True
        self._unpin()
        for number in self._notifies:
            self._run_notify(number)
        if self._own_mapping:
            self.mapping.close()
        self._arena.close()

    def _run_notify(self, number: int) -> None:
        def fill(request: CData) -> None:
            request.notify.map, request.notify.id = self._arena.number, number

        self._arena.link.do_quietly(Op.NOTIFY_RUN, fill)

    def _unpin(self) -> None:
        with contextlib.suppress(Closed):  # in a forked child: the pins are its parent's
            for gref in self._pinned:
                self._arena.mapper.unmap(gref, read_only=self._read_only)
        self._pinned.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("these pages are unmapped")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.n_pages} pages"
        return f"<MappedPages {state} of domain {self._arena.granter_domid}>"
