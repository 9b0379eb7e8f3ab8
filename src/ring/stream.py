# SPDX-License-Identifier: MIT
"""A pair of byte streams in one shared page: the ring of xenstore and the one of the console.

Sources: Xen public/io/xs_wire.h (`xenstore_domain_interface`), public/io/console.h (`xencons_interface`).
"""

import errno
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring._core import ffi, lib
from paravirt.ring.event import EventPort, check_status
from paravirt.ring.memory import pinned
from paravirt.ring.shared import Memory, view_of

CData = Any

_COUNT = 0xFFFFFFFF


class StreamLayout(NamedTuple):
    """Where one end finds its two streams and their indexes: offsets and sizes in bytes."""

    out: int
    out_bytes: int
    out_cons: int
    out_prod: int
    in_: int
    in_bytes: int
    in_cons: int
    in_prod: int

    def peer(self) -> "StreamLayout":
        """The same page as the other end sees it."""
        return StreamLayout(*self[4:], *self[:4])


XENSTORE_FRONT = StreamLayout(0, 1024, 2048, 2052, 1024, 1024, 2056, 2060)
"""The domain's end of a xenstore page: it writes requests and reads responses and watch events."""
XENSTORE_BACK = XENSTORE_FRONT.peer()
CONSOLE_FRONT = StreamLayout(1024, 2048, 3080, 3084, 0, 1024, 3072, 3076)
"""The domain's end of a console page: it writes `out` and reads `in`."""
CONSOLE_BACK = CONSOLE_FRONT.peer()


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """Counted by one end since it was made."""

    bytes_written: int
    bytes_read: int
    writes: int
    """Calls that moved bytes."""
    reads: int
    """Calls that moved bytes."""


class ByteStream:
    """One end. Every read and write that moves bytes notifies the peer; neither ever blocks.

    One thread reads, one writes; they may be two. To wait, sleep on the port's waiter: after its event, read or write
    until 0 bytes move.
    """

    def __init__(self, memory: Memory, layout: StreamLayout, *, port: EventPort | None = None) -> None:
        """Join at the indexes that stand in the page; zeroed memory is a pair of empty streams.

        Raises `PeerError` for indexes that cannot be, `InvalidRequest` for a layout that does not fit the memory.
        """
        view = view_of(memory)
        self.port = port
        self._memory: CData = pinned(view, writable=True)
        self._core: CData = ffi.new("struct pv_stream *")
        self._port_core: CData = ffi.NULL if port is None else port.core  # outlives the port's close
        self._closed = False
        status = lib.pv_stream_attach(
            self._core,
            self._memory,
            view.nbytes,
            ffi.new("struct pv_stream_layout *", layout),
            self._port_core,
        )
        if status:
            ffi.release(self._memory)
        if status == -errno.EINVAL:
            raise InvalidRequest(f"{layout} does not fit a page of {view.nbytes} bytes")
        self._check(status)

    def read_nowait(self, max_bytes: int = _COUNT) -> bytes:
        """What has arrived, up to `max_bytes`; empty when there is nothing. Raises `PeerError`, `Closed`."""
        n = min(self.readable_bytes, max_bytes)
        if n <= 0:
            return b""
        buffer = bytearray(n)
        with ffi.from_buffer("uint8_t[]", buffer) as pointer:
            moved = self._moved(lib.pv_stream_read(self._core, pointer, n))
        return bytes(buffer[:moved])

    def write_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes, from the start of `data`, went out; 0 when there is no room. Raises `PeerError`, `Closed`."""
        with ffi.from_buffer("uint8_t[]", data) as pointer:
            return self._moved(lib.pv_stream_write(self._core, pointer, len(pointer)))

    def _moved(self, status: int) -> int:
        if status > _COUNT and self.port is not None:
            self.port.notify_stale()
        return self._check(status) & _COUNT

    @property
    def readable_bytes(self) -> int:
        """Bytes that can be read now."""
        return self._check(lib.pv_stream_readable(self._core))

    @property
    def writable_bytes(self) -> int:
        """Bytes that can be written now."""
        return self._check(lib.pv_stream_writable(self._core))

    def statistics(self) -> StreamStatistics:
        """The counters, live."""
        core = self._core
        if not lib.pv_home_is_here(core.home):
            self._check(-errno.ECHILD)
        return StreamStatistics(
            bytes_written=core.bytes_written, bytes_read=core.bytes_read, writes=core.writes, reads=core.reads
        )

    def _check(self, status: int) -> int:
        if status >= 0:
            return status
        if self._closed:
            raise Closed("this byte stream is closed")
        if status == -errno.EPROTO:
            raise PeerError(f"the peer's index is out of range; {self!r} is dead")
        return check_status(status, "byte stream")

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def close(self) -> None:
        """Let go of the memory. Nobody may be inside a call. The port stays open: it is its owner's."""
        if self._closed:
            return
        self._closed = True
        self._core = ffi.new("struct pv_stream *")  # belongs to no process: every call on it fails
        ffi.release(self._memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return "<ByteStream closed>"
        core = self._core
        return f"<ByteStream out_prod {core.written} in_cons {core.read}{' dead' if core.dead else ''}>"
