# SPDX-License-Identifier: MIT
"""Flex rings: two byte streams with whole packets of any length, in pages beside a page of indexes (9pfs, pvcalls).

Source: Xen public/io/ring.h (DEFINE_XEN_FLEX_RING_AND_INTF), public/io/pvcalls.h for the error words.
"""

import errno
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring._core import ffi, lib
from paravirt.ring.batch import Memory, view_of
from paravirt.ring.event import EventPort, check_status
from paravirt.ring.memory import PAGE_BYTES, pinned
from paravirt.ring.stream import StreamStatistics

CData = Any
Bytes = bytes | bytearray | memoryview

MAX_ORDER: int = lib.PV_FLEX_MAX_ORDER
_COUNT = 0xFFFFFFFF


def flex_bytes(order: int) -> int:
    """Bytes of one direction of a ring of that order (XEN_FLEX_RING_SIZE). Raises `InvalidRequest`."""
    if not 0 <= order <= MAX_ORDER:
        raise InvalidRequest(f"the order of a flex ring is 0 to {MAX_ORDER}, not {order}")
    return int(lib.pv_flex_bytes(order))


def look(indexes: Memory, max_order: int = MAX_ORDER) -> list[int]:
    """Grant references of the 2**order data pages, as the front end wrote them into the page of indexes.

    For a back end that has mapped only that page. Raises `PeerError` for an order above `max_order`.
    """
    with ffi.from_buffer("uint8_t[]", _index_page(indexes)) as page:
        refs = ffi.new("uint32_t[]", 1 << MAX_ORDER)
        order = lib.pv_flex_look(page, max_order, refs)
    if order < 0:
        raise PeerError(f"the order of the flex ring is more than {max_order}")
    return list(ffi.unpack(refs, 1 << order))


def _index_page(indexes: Memory) -> memoryview:
    view = view_of(indexes)
    if view.nbytes < PAGE_BYTES:
        raise InvalidRequest(f"the indexes of a flex ring are in a page of {PAGE_BYTES} bytes, not {view.nbytes}")
    return view


class FlexRing:
    """One end. Every call that moves bytes notifies the peer; none ever blocks. To wait, sleep on the port's waiter.

    One thread reads, one writes; they may be two.
    """

    def __init__(
        self, indexes: Memory, data: Memory, port: EventPort | None, *, refs: Sequence[int] | None, start: int | None
    ) -> None:
        """For `create` and `attach`."""
        view, bytes_ = _index_page(indexes), view_of(data)
        order = (bytes_.nbytes // PAGE_BYTES).bit_length() - 1
        if bytes_.nbytes != PAGE_BYTES << max(order, 0) or order > MAX_ORDER:
            raise InvalidRequest(
                f"a flex ring has 1 to {1 << MAX_ORDER} pages, a power of two: not {bytes_.nbytes} bytes"
            )
        if refs is not None and len(refs) != 1 << order:
            raise InvalidRequest(f"a flex ring of {1 << order} pages has not {len(refs)} references")
        self.order = order
        self.port = port
        self._port_core: CData = ffi.NULL if port is None else port.core  # outlives the port's close
        self._indexes: CData = pinned(view, writable=True)
        self._data: CData = pinned(bytes_, writable=True)
        self._core: CData = ffi.new("struct pv_flex *")
        self._closed = False
        if start is None:
            status = lib.pv_flex_attach(self._core, self._indexes, self._data, order, self._port_core)
        else:
            c_refs = ffi.NULL if refs is None else ffi.new("uint32_t[]", list(refs))
            status = lib.pv_flex_create(
                self._core, self._indexes, self._data, order, c_refs, self._port_core, start & _COUNT
            )
        if status:
            self._release()
        if status == -errno.EINVAL:
            raise InvalidRequest("the page of indexes must be aligned to 4")
        self._check(status)

    @classmethod
    def create(
        cls,
        indexes: Memory,
        data: Memory,
        *,
        refs: Sequence[int] | None = None,
        port: EventPort | None = None,
        start: int = 0,
    ) -> "FlexRing":
        """Front: a new, empty ring. `indexes`: a page; `data`: 2**order pages, 0 to 9; `refs`: their grant references,
        published for the back end. `start`: first index, for tests of the wrap. Raises `InvalidRequest`.
        """
        return cls(indexes, data, port, refs=refs, start=start)

    @classmethod
    def attach(cls, indexes: Memory, data: Memory, *, port: EventPort | None = None) -> "FlexRing":
        """Back: join at the indexes that stand there. `data`: as many pages as `look` gave references.

        Raises `PeerError` for indexes that cannot be, `InvalidRequest`.
        """
        return cls(indexes, data, port, refs=None, start=None)

    @property
    def size_bytes(self) -> int:
        """Of one direction, and the length of the longest packet."""
        return flex_bytes(self.order)

    @property
    def queued_bytes(self) -> int:
        """Bytes that can be read now."""
        return self._check(lib.pv_flex_queued(self._core))

    @property
    def available_bytes(self) -> int:
        """Bytes that can be written now."""
        return self._check(lib.pv_flex_avail(self._core))

    def read_packet(self, n_bytes: int) -> bytes | None:
        """Exactly so many bytes, or None while there are fewer. Raises `PeerError`, `InvalidRequest`, `Closed`."""
        return self._read(lib.pv_flex_read, n_bytes)

    def peek(self, n_bytes: int) -> bytes | None:
        """What `read_packet` would read, left where it is: a header that says how long the packet is."""
        return self._read(lib.pv_flex_peek, n_bytes)

    def _read(self, read: Any, n_bytes: int) -> bytes | None:
        if not 0 <= n_bytes <= self.size_bytes:
            raise InvalidRequest(f"a packet has 0 to {self.size_bytes} bytes, not {n_bytes}")
        buffer = bytearray(n_bytes)
        with ffi.from_buffer("uint8_t[]", buffer) as pointer:
            moved = self._moved(read(self._core, pointer, n_bytes))
        return bytes(buffer) if moved == n_bytes else None

    def write_packet(self, packet: Bytes) -> bool:
        """Write all of it, or False while there is no room for all. Raises `PeerError`, `InvalidRequest`, `Closed`."""
        with ffi.from_buffer("uint8_t[]", packet) as pointer:
            n_bytes = len(pointer)
            if n_bytes > self.size_bytes:
                raise InvalidRequest(f"a packet has 0 to {self.size_bytes} bytes, not {n_bytes}")
            return self._moved(lib.pv_flex_write(self._core, pointer, n_bytes)) == n_bytes

    @property
    def in_error(self) -> int:
        """What the back end says of `in` (pvcalls): 0, or a negative errno after which no more bytes will come."""
        return self._error(1)

    @property
    def out_error(self) -> int:
        """What the back end says of `out`: 0, or a negative errno after which it reads no more."""
        return self._error(0)

    def _error(self, which: int) -> int:
        self._check(lib.pv_flex_queued(self._core))
        return int(lib.pv_flex_error(self._core, which))

    def set_errors(self, *, in_error: int | None = None, out_error: int | None = None) -> None:
        """Back: say that a direction has ended, 0 or a negative errno each. Raises `InvalidRequest` for a front end."""
        for which, error in ((1, in_error), (0, out_error)):
            if error is None:
                continue
            status = lib.pv_flex_set_error(self._core, which, error)
            if status == -errno.EINVAL:
                raise InvalidRequest("the back end sets the errors of a flex ring")
            if self._check(status) and self.port is not None:
                self.port.notify_stale()

    def _moved(self, status: int) -> int:
        if status > _COUNT and self.port is not None:
            self.port.notify_stale()
        return self._check(status) & _COUNT

    def statistics(self) -> StreamStatistics:
        """The counters, live."""
        self._check(0 if lib.pv_home_is_here(self._core.stream.home) else -errno.ECHILD)
        core = self._core.stream
        return StreamStatistics(
            bytes_written=core.bytes_written, bytes_read=core.bytes_read, writes=core.writes, reads=core.reads
        )

    def _check(self, status: int) -> int:
        if status >= 0:
            return status
        if self._closed:
            raise Closed("this flex ring is closed")
        if status == -errno.EPROTO:
            raise PeerError(f"the peer's index is out of range; {self!r} is dead")
        return check_status(status, "flex ring")

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def _release(self) -> None:
        ffi.release(self._indexes)
        ffi.release(self._data)

    def close(self) -> None:
        """Let go of the memory. Nobody may be inside a call. The port stays open: it is its owner's."""
        if self._closed:
            return
        self._closed = True
        self._core = ffi.new("struct pv_flex *")  # belongs to no process: every call on it fails
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return "<FlexRing closed>"
        core, role = self._core, "front" if self._core.is_front else "back"
        stream = core.stream
        dead = " dead" if stream.dead else ""
        return f"<FlexRing {role} order {self.order}, written {stream.written} read {stream.read}{dead}>"
