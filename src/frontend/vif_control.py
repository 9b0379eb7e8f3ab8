# SPDX-License-Identifier: MIT
"""The control ring of a network device: how its backend hashes packets, which queue gets which of
them, and which pages it keeps mapped.

Source: Xen public/io/netif.h, control messages. What was set is set again after a backend was away.
"""

import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from paravirt.errors import Closed, InvalidRequest, PeerError, TimedOut
from paravirt.frontend.ring_end import RingEnd
from paravirt.hypervisor.arena import PageRun
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol.keys import RingRequest
from paravirt.protocol.netif import (
    CTRL_NAME,
    CTRL_REQUEST,
    CTRL_RESPONSE,
    GREF_ENTRY,
    GREF_MAPPING_ENTRIES,
    GREF_READONLY,
    HASH_KEY_BYTES,
    HASH_MAPPING_ENTRIES,
    CtrlStatus,
    CtrlType,
    HashAlgorithm,
    HashFlag,
)
from paravirt.protocol.xenbus import DevicePath

TIMEOUT_S = 5.0
DATA_PAGES = 3
"""Of an arena: a ring, one of a later connection, a table."""


class VifControl:
    """Calls from any thread, one at a time. Each raises `InvalidRequest` when the backend refuses it, `TimedOut`,
    `PeerError`, `Closed`.
    """

    def __init__(self, hypervisor: Hypervisor, path: DevicePath, beside: RingEnd, max_spin_ns: int) -> None:
        """`beside`: an end with an arena, made before this one's ring."""
        self._end = RingEnd(hypervisor, path, CTRL_NAME, queue=0, beside=beside)
        self._max_spin_ns = max_spin_ns
        self._lock = threading.Lock()
        self._table: PageRun | None = None
        self._connected = False
        self._next_id = 0
        self._said: dict[CtrlType, tuple[int, bytes | None]] = {}  # what is to be said again
        self._mapped: dict[int, dict[int, bool]] = {}  # references of each queue, read-only or not

    # -- the device's thread

    def make(self) -> RingRequest:
        """A new ring of one page, and its port."""
        refs, port = self._end.make(
            CTRL_REQUEST,
            CTRL_RESPONSE,
            wanted_order=0,
            max_order=0,
            data_pages=0,
            max_spin_ns=self._max_spin_ns,
        )
        arena = self._end.arena
        assert arena is not None
        if self._table is None:
            self._table = arena.allocate(1)
            arena.grant(self._table.gref)  # answers are written to it, too
        return RingRequest(refs, port)

    def connect(self) -> None:
        """Go, and say again what was said to the backend before."""
        with self._lock:
            self._connected = True
            for kind, (value, table) in list(self._said.items()):
                self._send(kind, value, table)
            for queue, grefs in self._mapped.items():
                for some in _lists(list(grefs)):
                    self._change_grefs(CtrlType.ADD_GREF_MAPPING, queue, [(gref, grefs[gref]) for gref in some])

    def pause(self) -> None:
        """Let go of ring and port."""
        self._connected = False
        self._end.waiter.kick()
        with self._lock:
            self._end.drop()

    def close(self) -> None:
        """After `pause`."""
        table, self._table = self._table, None
        if table is not None and self._end.arena is not None:
            self._end.arena.free(table)
        self._end.close()

    # -- callers

    def hash_flags(self) -> HashFlag:
        """What the backend can hash; refused before an algorithm is chosen."""
        return HashFlag(self._ask(CtrlType.GET_HASH_FLAGS) & 0xF)

    def set_hash(self, algorithm: HashAlgorithm, flags: int = 0, key: bytes | None = None) -> None:
        """How packets to the guest are hashed; `flags`: of `HashFlag`. `key`: up to 40 bytes; None: as it was."""
        if key is not None and len(key) > HASH_KEY_BYTES:
            raise InvalidRequest(f"a key of {len(key)} bytes; it has up to {HASH_KEY_BYTES}")
        self._ask(CtrlType.SET_HASH_ALGORITHM, algorithm)
        if key is not None:
            self._ask(CtrlType.SET_HASH_KEY, len(key), key)
        if algorithm is not HashAlgorithm.NONE:
            self._ask(CtrlType.SET_HASH_FLAGS, flags)

    def mapping_size(self) -> int:
        """Entries that a mapping may have."""
        return self._ask(CtrlType.GET_MAPPING_SIZE)

    def set_mapping(self, queues: Sequence[int]) -> None:
        """The queue of each packet, by its hash modulo their number; (): its hash modulo the number of queues."""
        if len(queues) > HASH_MAPPING_ENTRIES or not all(0 <= queue < 1 << 32 for queue in queues):
            raise InvalidRequest(f"a mapping of {len(queues)} entries; it has up to {HASH_MAPPING_ENTRIES} queues")
        self._ask(CtrlType.SET_MAPPING_SIZE, len(queues))
        if queues:
            self._ask(CtrlType.SET_MAPPING, len(queues), struct.pack(f"<{len(queues)}I", *queues))

    def gref_mapping_size(self, queue: int = 0) -> int:
        """References of a queue that the backend keeps mapped when it is asked to; 0: none."""
        return self._ask(CtrlType.GET_GREF_MAPPING_SIZE, queue)

    def map_grefs(self, grefs: Iterable[int], *, queue: int = 0, read_only: bool = False) -> None:
        """Have the backend keep granted pages mapped until `unmap_grefs`, all of these or none; a new backend too. Such
        a page cannot be taken back meanwhile. Refused: more than `gref_mapping_size`, what is mapped already, what is
        not granted.
        """
        wanted = list(grefs)
        if len(wanted) > GREF_MAPPING_ENTRIES or len(set(wanted)) != len(wanted):
            raise InvalidRequest(
                f"a list of {len(wanted)} references; it has up to {GREF_MAPPING_ENTRIES} different ones"
            )
        with self._lock:
            self._change_grefs(CtrlType.ADD_GREF_MAPPING, queue, [(gref, read_only) for gref in wanted])
            self._mapped.setdefault(queue, {}).update(dict.fromkeys(wanted, read_only))

    def unmap_grefs(self, grefs: Iterable[int], *, queue: int = 0) -> list[int]:
        """The opposite; those that the backend keeps: they are not mapped, or requests that it has taken name them."""
        wanted, kept = list(grefs), list[int]()
        with self._lock:
            for some in _lists(wanted):
                statuses = self._change_grefs(CtrlType.DEL_GREF_MAPPING, queue, [(gref, False) for gref in some])
                for gref, status in zip(some, statuses, strict=True):
                    if status == CtrlStatus.SUCCESS:
                        self._mapped.get(queue, {}).pop(gref, None)
                    else:
                        kept.append(gref)
        return kept

    def ask(self, kind: int, data: Sequence[int] = (0, 0, 0), table: bytes = b"") -> tuple[CtrlStatus, int]:
        """One request as it is; (status, data). `table`: of a page, whose reference goes into `data` for a -1."""
        with self._lock:
            return self._exchange(kind, data, table)

    def _ask(self, kind: CtrlType, value: int = 0, table: bytes | None = None) -> int:
        with self._lock:
            found = self._send(kind, value, table)
            if kind in _KEPT:
                self._said[kind] = (value, table)
            return found

    def _send(self, kind: CtrlType, value: int, table: bytes | None) -> int:
        status, data = self._exchange(kind, (value, 0, 0) if table is None else (-1, value, 0), table or b"")
        if status is CtrlStatus.SUCCESS:
            return data
        raise InvalidRequest(f"the backend answers {kind.name} with {status.name}")

    def _change_grefs(self, kind: CtrlType, queue: int, entries: Sequence[tuple[int, bool]]) -> list[int]:
        """What stands as status of each entry afterwards. `InvalidRequest` when the whole list is refused."""
        table = np.zeros(len(entries), GREF_ENTRY)
        for row, (gref, read_only) in zip(table, entries, strict=True):
            row["gref"], row["flags"] = gref, GREF_READONLY if read_only else 0
        status, _ = self._exchange(kind, (queue, -1, len(entries)), table.tobytes())
        if status is not CtrlStatus.SUCCESS:
            raise InvalidRequest(f"the backend answers {kind.name} of {len(entries)} references with {status.name}")
        pages = self._table
        assert pages is not None
        answered = np.frombuffer(bytes(pages.view[: table.nbytes]), GREF_ENTRY)
        return [int(one) for one in answered["status"]]

    def _exchange(self, kind: int, data: Sequence[int], table: bytes) -> tuple[CtrlStatus, int]:
        ring, pages = self._end.ring, self._table
        if not self._connected or ring is None or pages is None:
            raise Closed("the control ring is not connected")
        pages.view[: len(table)] = table
        self._next_id = self._next_id + 1 & 0xFFFF
        request, response = np.zeros(1, CTRL_REQUEST), np.zeros(1, CTRL_RESPONSE)
        words = [pages.gref if word == -1 else word & 0xFFFFFFFF for word in data]
        request[0] = (self._next_id, kind & 0xFFFF, words)
        deadline = time.monotonic() + TIMEOUT_S
        if not ring.push(request):
            raise PeerError("the backend does not answer on the control ring")
        while True:
            # One that comes late answers a request that nobody waits for any more.
            if ring.take(response) and int(response["id"][0]) == self._next_id:
                return self._answer(int(response["status"][0])), int(response["data"][0])
            left = deadline - time.monotonic()
            if left <= 0 or not self._connected:
                raise TimedOut("no answer on the control ring")
            ring.wait(timeout_s=left)

    @staticmethod
    def _answer(status: int) -> CtrlStatus:
        try:
            return CtrlStatus(status)
        except ValueError:
            raise PeerError(f"the backend answers on the control ring with status {status}") from None


def _lists(grefs: Sequence[int]) -> Iterator[Sequence[int]]:
    """As many as one page of entries holds."""
    for start in range(0, len(grefs), GREF_MAPPING_ENTRIES):
        yield grefs[start : start + GREF_MAPPING_ENTRIES]


_KEPT = (
    CtrlType.SET_HASH_ALGORITHM,
    CtrlType.SET_HASH_KEY,
    CtrlType.SET_HASH_FLAGS,
    CtrlType.SET_MAPPING_SIZE,
    CtrlType.SET_MAPPING,
)
