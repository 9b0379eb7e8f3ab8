# SPDX-License-Identifier: MIT
"""Where messages are before and after they are in a ring: arrays of the caller, and the memory of the ring itself."""

import threading
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import InvalidRequest
from paravirt.ring._core import ffi
from paravirt.ring.memory import Mapping, pinned

CData = Any
Messages = NDArray[Any] | bytes | bytearray | memoryview
Memory = Mapping | tuple[Mapping, int, int] | memoryview | bytearray
"""Where a ring is: a whole mapping, (mapping, offset in bytes, size in bytes), or a writable buffer."""

_REMEMBERED = 8
Found = TypeVar("Found")


class Batches:
    """The arrays that were used last in one direction, with their addresses; kept alive as long as they are remembered.

    Getting an address costs as much as the whole call into C.
    """

    __slots__ = ("count", "known", "last", "message", "pointer", "writable")

    def __init__(self, message: "np.dtype[Any]", *, writable: bool) -> None:
        self.message = message
        self.writable = writable
        self.last: Messages | None = None
        self.pointer: CData = ffi.NULL
        self.count = 0
        self.known: dict[int, tuple[NDArray[Any], CData, int]] = {}

    def use(self, messages: Messages) -> None:
        """Make it the last one: `pointer` and `count` (messages) are of it. Raises `InvalidRequest`."""
        known = self.known.get(id(messages))
        if known is None:
            self.pointer, self.count = self._find(messages)
        else:
            _, self.pointer, self.count = known
        if isinstance(messages, np.ndarray):
            if known is None and len(self.known) >= _REMEMBERED:
                del self.known[next(iter(self.known))]
            self.known[id(messages)] = (messages, self.pointer, self.count)
            self.last = messages
        else:
            self.last = None

    def _find(self, messages: Messages) -> tuple[CData, int]:
        n_bytes = messages.nbytes if isinstance(messages, np.ndarray | memoryview) else len(messages)
        n, rest = divmod(n_bytes, self.message.itemsize)
        if rest or (isinstance(messages, np.ndarray) and messages.itemsize not in (1, self.message.itemsize)):
            raise InvalidRequest(
                f"a batch of messages of {self.message.itemsize} bytes cannot be {_describe(messages)}"
            )
        try:
            return pinned(messages, writable=self.writable), n
        except (BufferError, ValueError) as error:
            raise InvalidRequest(f"not a batch of messages: {error}") from error

    def forget(self) -> None:
        self.known.clear()
        self.last, self.pointer = None, ffi.NULL


class Remembered(Generic[Found]):
    """What was found out about the arrays that were used last, which are kept alive: it costs more than a call into C.

    Any thread may call.
    """

    __slots__ = ("_known", "_lock")

    def __init__(self) -> None:
        self._known: dict[int, tuple[Found, NDArray[Any]]] = {}
        self._lock = threading.Lock()

    def get(self, array: NDArray[Any]) -> Found | None:
        known = self._known.get(id(array))
        return known[0] if known else None

    def remember(self, array: NDArray[Any], found: Found) -> Found:
        with self._lock:
            if len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[id(array)] = (found, array)
        return found

    def forget(self) -> None:
        with self._lock:
            self._known.clear()


def _describe(messages: Messages) -> str:
    if isinstance(messages, np.ndarray):
        return f"an array of {messages.size} x {messages.itemsize} bytes"
    return f"{len(messages)} bytes"


def view_of(memory: Memory) -> memoryview:
    """The bytes a ring is made in. Raises `InvalidRequest` when they are not within the mapping or not writable."""
    if isinstance(memory, Mapping):
        view = memory.view
    elif isinstance(memory, tuple):
        mapping, offset_bytes, n_bytes = memory
        if not 0 <= offset_bytes <= offset_bytes + n_bytes <= mapping.n_bytes:
            raise InvalidRequest(f"{n_bytes} bytes from {offset_bytes} are not within {mapping}")
        view = mapping.view[offset_bytes : offset_bytes + n_bytes]
    else:
        view = memoryview(memory).cast("B")
    if view.readonly:
        raise InvalidRequest("the memory of a ring must be writable")
    return view
