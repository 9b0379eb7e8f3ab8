# SPDX-License-Identifier: MIT
"""The block backend's engine in C: a thread without the GIL for each ring, and a board on which all of them tell what
their owner has to know.
"""

import errno
import os
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Literal

from paravirt.errors import Closed, ResourceLimit
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkif import REFUSED, Limits
from paravirt.ring.blkif_counters import Counting
from paravirt.ring.blkif_grants import PersistentGrants
from paravirt.ring.grant import Mapper
from paravirt.ring.memory import address_of
from paravirt.ring.shared import BackRing
from paravirt.ring.vbd_throttle import Throttle

CData = Any

DiskKind = Literal["file", "device", "memory", "null", "zero"]
"""What the core can serve on its own: a descriptor of a file or block device, memory, or nothing (which reads as what
the guest's page had, or as zeroes)."""

_KINDS: dict[DiskKind, int] = {
    "file": lib.PV_BLKIF_DISK_FILE,
    "device": lib.PV_BLKIF_DISK_DEVICE,
    "memory": lib.PV_BLKIF_DISK_MEMORY,
    "null": lib.PV_BLKIF_DISK_NULL,
    "zero": lib.PV_BLKIF_DISK_ZERO,
}


class What(IntFlag):
    """What a notice is about."""

    PEER = lib.PV_VBD_PEER
    FAILED = lib.PV_VBD_FAILED
    STALE = lib.PV_VBD_STALE
    UNSUPPORTED = lib.PV_VBD_UNSUPPORTED
    DISK = lib.PV_VBD_DISK
    REFUSED = lib.PV_VBD_REFUSED


@dataclass(frozen=True, slots=True)
class Notice:
    """What an engine had to say since the last notice."""

    token: int
    """Of the engine."""
    what: What
    failure: int
    """FAILED: an errno."""
    error: int
    """DISK: an errno that its disk had not failed with before."""
    unsupported: int
    """UNSUPPORTED: operations that the disk does not have, 1 << operation."""
    reason: str
    """REFUSED: why a request was refused, the first time for this reason."""


class Board:
    """Where engines say what they have to say. Any thread makes engines; one reads."""

    def __init__(self) -> None:
        """Raises `ResourceLimit`."""
        core = lib.pv_vbd_board_new()
        if core == ffi.NULL:
            raise ResourceLimit("no memory for the board of an engine")
        self.core: CData = ffi.gc(core, lib.pv_vbd_board_free)

    def wait(self) -> Notice | None:
        """Sleep until there is a notice; None after `close`."""
        notice = ffi.new("struct pv_vbd_notice *")
        if not lib.pv_vbd_board_wait(self.core, notice):
            return None
        return Notice(
            token=notice.token,
            what=What(notice.what),
            failure=notice.failure,
            error=notice.error,
            unsupported=notice.unsupported,
            reason=REFUSED.get(notice.reason, ""),
        )

    def close(self) -> None:
        """End the wait that runs now, and all later ones. From any thread."""
        lib.pv_vbd_board_close(self.core)


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """The disk of an engine: `memory` or `fd`, as its kind wants it."""

    kind: DiskKind
    memory: memoryview | None = None
    fd: int = -1
    uring: bool = False
    """Ask it through io_uring, if the kernel allows that."""
    direct: bool = False
    """It passes the page cache by."""


class Engine:
    """Serves one ring, from `start` to `stop`."""

    def __init__(
        self,
        ring: BackRing,
        mapper: Mapper,
        board: Board,
        token: int,
        *,
        limits: Limits,
        disk: DiskPlace,
        x86_32: bool = False,
        persistent: PersistentGrants | None = None,
        throttle: Throttle | None = None,
        take_spin_ns: int = 0,
        wait_spin_ns: int = 0,
        max_batch: int = lib.PV_VBD_BATCH,
    ) -> None:
        """Ring, mapper and disk stay the caller's and must not be closed before the engine has stopped. `token` names
        the engine on the board. `take_spin_ns` and `wait_spin_ns`: as of `BackRing.take` and of the `wait` after it.

        `persistent`: where what is mapped stays, the caller's too. `throttle`: of the disk, shared by its engines.

        Raises `ResourceLimit`.
        """
        self._kept = (ring, mapper, board, disk, persistent, throttle)
        self._memory = None if disk.memory is None else address_of(disk.memory)[0]
        self._limits = _limits_of(limits)
        setup = ffi.new("struct pv_vbd_setup *")
        setup.ring, setup.mapper, setup.board, setup.token = ring.core, mapper.core, board.core, token
        setup.limits = self._limits[0]
        setup.kind, setup.fd = _KINDS[disk.kind], disk.fd
        setup.memory = ffi.NULL if self._memory is None else ffi.cast("uint8_t *", self._memory)
        setup.memory_bytes = 0 if disk.memory is None else disk.memory.nbytes
        setup.uring, setup.direct = disk.uring, disk.direct
        setup.x86_32, setup.batch = x86_32, max_batch
        setup.grants = ffi.NULL if persistent is None else persistent.core
        setup.throttle = ffi.NULL if throttle is None else throttle.core
        setup.take_spin_ns, setup.wait_spin_ns = take_spin_ns, wait_spin_ns
        self._setup = setup
        self._counting = Counting(setup)
        self._counting.show_in(ring)
        made = ffi.new("struct pv_vbd_engine **")
        if lib.pv_vbd_engine_new(setup, made):
            raise ResourceLimit("no memory for an engine")
        self._core: CData = ffi.gc(made[0], lib.pv_vbd_engine_free)

    def start(self) -> None:
        """Raises `ResourceLimit` when there can be no more threads."""
        status = lib.pv_vbd_engine_start(self._core)
        if status == -errno.ECHILD:
            raise Closed("this engine belongs to the parent of this process")
        if status:
            raise ResourceLimit(f"no thread for an engine: {os.strerror(-status)}")

    def stop(self, timeout_s: float) -> bool:
        """Finish what was taken and end; False while the disk is still at it after `timeout_s`."""
        stopped: bool = lib.pv_vbd_engine_stop(self._core, int(timeout_s * 1e9)) != -errno.ETIMEDOUT
        if stopped:
            self._memory = None  # whoever owns it may release it now
            self._counting.show_in(None)  # the ring is closed next
        return stopped

    @property
    def uring(self) -> bool:
        """The disk is asked through io_uring."""
        return bool(lib.pv_vbd_engine_uring(self._core) > 0)

    @property
    def uring_error(self) -> str:
        """Why it is not, though that was wanted; "": nobody wanted it, or it is."""
        status: int = lib.pv_vbd_engine_uring(self._core)
        return os.strerror(-status) if status < 0 else ""

    def set_limits(self, limits: Limits) -> None:
        """For the requests from now on. From any thread."""
        lib.pv_vbd_engine_set_limits(self._core, _limits_of(limits))

    @property
    def counters(self) -> CData:
        """`struct pv_blkif_counters *`, live. From any thread, also after the end."""
        return self._counting.core

    @property
    def batches(self) -> int:
        """Times that it found something in the ring."""
        found: int = lib.pv_vbd_engine_batches(self._core)
        return found


def liburing_version() -> str:
    """Of the liburing in the C core; "": there is none."""
    version: bytes = ffi.string(lib.pv_vbd_liburing())
    return version.decode()


def _limits_of(limits: Limits) -> CData:
    core = ffi.new("struct pv_blkif_limits *")
    for name in Limits.__slots__:
        setattr(core, name, getattr(limits, name))
    return core
