# SPDX-License-Identifier: MIT
"""The files of a store that outlives its process. Their form is described in c_ext/pv_xs_journal.c.

    lock          held by the daemon that uses the directory
    journal       a snapshot and the changes since
    journal.new   the next snapshot while it is written; it takes the journal's place when it is complete
    hypervisor    whose domains the journal speaks of

The engine appends every change before it acknowledges it. When the journal has become long the engine writes a new
snapshot, a few nodes at a time, and goes on with that file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from paravirt.errors import AlreadyExists, DamagedJournal, PermissionRefused
from paravirt.ring._core import ffi, lib

if TYPE_CHECKING:
    from paravirt.xenstore.core import CoreHub, Event

log = logging.getLogger(__name__)

STEP_NODES: Final = 4096


class Journal:
    """The journal of one hub, in a directory (made if it is missing). A context manager."""

    def __init__(self, directory: str | os.PathLike[str], hub: CoreHub, *, sync: bool = False) -> None:
        """Give the hub, which is new, what the journal has, and write down its changes from now on.

        `sync`: each change is on the disk before it is acknowledged; else it is in the kernel's hands, which is enough
        as long as the machine lives. Raises `AlreadyExists`, `DamagedJournal`, `PermissionRefused`.
        """
        self._directory = Path(directory)
        self._hub = hub
        self._sync = sync
        self._fd = self._new_fd = self._lock_fd = -1
        try:
            with contextlib.suppress(FileExistsError):
                self._directory.mkdir(mode=0o700, parents=True)
            self._lock()
            with contextlib.suppress(FileNotFoundError):
                self._new_path.unlink()
            if self._path.exists():
                self._load()
            else:
                self._start()
        except OSError as error:
            self.close()
            raise PermissionRefused(f"the journal in {directory} cannot be used: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @property
    def _path(self) -> Path:
        return self._directory / "journal"

    @property
    def _new_path(self) -> Path:
        return self._directory / "journal.new"

    def _lock(self) -> None:
        self._lock_fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyExists(f"another xenstored uses the journal in {self._directory}") from error

    # -- at the start

    def _load(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        n_bytes = os.fstat(self._fd).st_size
        n_good = self._read(n_bytes)
        if n_good < n_bytes:
            log.warning(
                "%s: the last write was cut off; its %d bytes, which nobody was told of, are removed",
                self._path,
                n_bytes - n_good,
            )
            os.ftruncate(self._fd, n_good)
        os.lseek(self._fd, n_good, os.SEEK_SET)
        lib.pv_xs_journal_to(self._hub.core, self._fd, n_good, self._sync)

    def _read(self, n_bytes: int) -> int:
        """Give the hub what the file has: how many bytes of it are whole."""
        n_good = ffi.new("uint64_t *")
        if n_bytes:
            with mmap.mmap(self._fd, n_bytes, access=mmap.ACCESS_READ) as data:
                with ffi.from_buffer("uint8_t[]", data) as pointer:
                    status = lib.pv_xs_journal_load(self._hub.core, pointer, n_bytes, n_good)
        else:
            status = -errno.EPROTO
        if status == -errno.ENOTSUP:
            raise DamagedJournal(f"{self._path} is of another version of paravirt; this one cannot read it")
        if status:
            raise DamagedJournal(
                f"{self._path} is damaged at byte {n_good[0]} of {n_bytes}: move it away to start with an empty store, "
                "or put back a copy of it"
            )
        return int(n_good[0])

    def _start(self) -> None:
        """A snapshot of the new hub is the start of its journal."""
        self._begin_snapshot()
        while not self._step():
            pass
        self._adopt()

    def _step(self) -> bool:
        status = lib.pv_xs_snapshot_step(self._hub.core, STEP_NODES)
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        return status == 1

    # -- snapshots

    def _begin_snapshot(self) -> None:
        self._new_fd = os.open(self._new_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        lib.pv_xs_snapshot_start(self._hub.core, self._new_fd)

    def _adopt(self) -> None:
        """The new file is complete: it is the journal now."""
        self._step()  # what has changed since
        if self._sync:
            os.fdatasync(self._new_fd)
        os.replace(self._new_path, self._path)
        lib.pv_xs_snapshot_adopt(self._hub.core)
        lib.pv_xs_journal_sync(self._hub.core, self._sync)
        former, self._fd, self._new_fd = self._fd, self._new_fd, -1
        if former >= 0:
            os.close(former)
        if self._sync:
            self._sync_directory()

    def _sync_directory(self) -> None:
        """The new file has its name also after the machine's end."""
        try:
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            log.error("%s: %s; the machine's end now may bring back an old journal", self._directory, error.strerror)

    def _abort(self, error: OSError) -> None:
        log.error("%s cannot be written anew for now: %s", self._path, error.strerror)
        lib.pv_xs_snapshot_abort(self._hub.core)
        if self._new_fd >= 0:
            os.close(self._new_fd)
            self._new_fd = -1
        with contextlib.suppress(OSError):
            self._new_path.unlink()

    def on_long(self, _event: Event) -> None:
        """The journal has become long, or the disk has failed it: start to write a snapshot."""
        try:
            self._begin_snapshot()
        except OSError as error:
            self._abort(error)

    def on_snapshot(self, event: Event) -> None:
        """The snapshot is complete, or cannot be written."""
        try:
            if event.mask:
                raise OSError(event.mask, os.strerror(event.mask))
            self._adopt()
        except OSError as error:
            self._abort(error)

    def on_error(self, event: Event) -> None:
        """The journal cannot be written, or can again. The engine acknowledges nothing until it can; it tries."""
        if event.mask:
            why = os.strerror(event.mask)
            log.error("%s cannot be written: %s; nothing is acknowledged until it can", self._path, why)
        else:
            log.warning("%s can be written again", self._path)

    # -- whose domains

    def is_of(self, hypervisor: str) -> bool:
        """Whether the journal's domains are those of this hypervisor."""
        try:
            return self._owner_path.read_text() == hypervisor
        except FileNotFoundError:
            return False

    def assign(self, hypervisor: str) -> None:
        """The journal's domains are those of this hypervisor from now on: what is left of others is gone from it."""
        try:
            self.finish()
            new = self._owner_path.with_suffix(".new")
            new.write_text(hypervisor)
            os.replace(new, self._owner_path)
        except OSError as error:
            raise PermissionRefused(f"the journal in {self._directory} cannot be used: {error.strerror}") from error

    @property
    def _owner_path(self) -> Path:
        return self._directory / "hypervisor"

    # -- end

    def finish(self) -> None:
        """Write what has not been written. Raises `OSError` if that cannot be."""
        status = lib.pv_xs_journal_flush(self._hub.core)
        if status < 0:
            raise OSError(-status, os.strerror(-status))

    def close(self) -> None:
        """Write what has not been written and let the directory go. Twice is harmless."""
        try:
            if self._fd >= 0:
                self.finish()
        except OSError as error:
            log.error("%s: %s; what nobody was told of is lost", self._path, error.strerror)
        lib.pv_xs_snapshot_abort(self._hub.core)
        lib.pv_xs_journal_to(self._hub.core, -1, 0, 0)
        for fd in (self._new_fd, self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._new_fd = self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
