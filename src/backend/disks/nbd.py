# SPDX-License-Identifier: MIT
"""A disk that an NBD server has: nbdkit, qemu-nbd (so qcow2, VHD, VMDK), nbd-server ..."""

import errno
import os
import re
import threading
import time
from collections.abc import Sequence
from itertools import chain, islice
from typing import Self

from paravirt.backend.disks.base import SECTOR_SIZES, Disk, Pause, Transfer, take, total
from paravirt.backend.disks.nbd_client import Address, NbdConnection, Request
from paravirt.backend.disks.spec import Opening
from paravirt.errors import InvalidRequest, ParavirtError, PeerError, PeerGone
from paravirt.protocol import nbd
from paravirt.protocol.nbd import Command, Export, TransmissionFlag

DEFAULT_TIMEOUT_S = 10.0
DEFAULT_PATIENCE_S = 30.0
RETRY_S = (0.02, 1.0)  # the first pause and the longest
MAX_PHYSICAL_BYTES = 1 << 16
MAX_RANGE_BYTES = 1 << 30  # of one command without data


class NbdDisk(Disk):
    """`nbd:HOST:PORT/EXPORT` or `nbd,export=NAME:unix:/PATH`.

    What comes together, and a transfer larger than the server takes at once, is in flight together. When the
    connection is lost, or the server is silent for `timeout`, the disk connects again and repeats what was not
    answered, for `patience`; then the call fails. A server that forgets what it has answered when it is started anew
    (without a flush it may) breaks that.
    """

    many_in_flight = True

    def __init__(
        self,
        address: Address,
        export: str,
        read_only: bool,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> None:
        self._address, self._name = address, export
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._closed = False
        self._pause = Pause()
        self._lock = threading.Lock()  # guards _connection against `interrupt` of another thread
        self.read_only = read_only
        try:
            self._connection: NbdConnection | None = NbdConnection(address, export, timeout_s=timeout_s)
        except (PeerGone, PeerError) as error:
            raise InvalidRequest(f"{self}: {error}") from error
        try:
            self._take_shape(self._connection.export)
            self._take_terms(self._connection.export)
        except BaseException:
            self._connection.close()
            raise

    def __str__(self) -> str:
        place = f"unix:{self._address}" if isinstance(self._address, str) else "{}:{}".format(*self._address)
        return f"NBD export {self._name!r} of {place}"

    @classmethod
    def open(cls, opening: Opening) -> Self:
        options = opening.options
        export = options.text("export")
        timeout_s, patience_s = options.duration_s("timeout"), options.duration_s("patience")
        options.end()
        if timeout_s == 0:
            raise options.wrong("timeout", "0s", "longer than nothing")
        address, name = parse_address(opening.argument)
        if name and export is not None:
            raise InvalidRequest(f"nbd: has two names of an export, {name!r} and {export!r}")
        name = export or name
        if len(name.encode(errors="replace")) > nbd.MAX_STRING_BYTES:
            raise InvalidRequest(f"nbd: the name of an export has at most {nbd.MAX_STRING_BYTES} bytes")
        return cls(
            address,
            name,
            opening.read_only,
            timeout_s=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
            patience_s=DEFAULT_PATIENCE_S if patience_s is None else patience_s,
        )

    def _take_shape(self, export: Export) -> None:
        """What stays as it is, whoever serves the disk later."""
        sector_size = next((size for size in SECTOR_SIZES if size >= export.least_block_bytes), None)
        if sector_size is None:
            raise InvalidRequest(f"{self} has blocks of {export.least_block_bytes} bytes; 4096 are the most")
        self.sector_size = sector_size
        self.physical_sector_size = min(max(sector_size, export.preferred_block_bytes), MAX_PHYSICAL_BYTES)
        self.can_discard = not self.read_only and bool(export.flags & TransmissionFlag.SEND_TRIM)
        self.discard_granularity_bytes = self.physical_sector_size

    def _take_terms(self, export: Export) -> None:
        """What each connection says anew."""
        if export.flags & TransmissionFlag.READ_ONLY and not self.read_only:
            raise InvalidRequest(f"{self} is read-only")
        if export.size_bytes == 0 or export.size_bytes % self.sector_size:
            raise InvalidRequest(f"{self} has {export.size_bytes} bytes, not a positive multiple of {self.sector_size}")
        self.size_bytes = export.size_bytes
        self._zeroes = bool(export.flags & TransmissionFlag.SEND_WRITE_ZEROES)
        self._flush = bool(export.flags & TransmissionFlag.SEND_FLUSH)
        self._most_bytes = max(self.sector_size, export.most_bytes // self.sector_size * self.sector_size)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._do(self._transfer(Command.READ, buffers, offset))

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._do(self._transfer(Command.WRITE, buffers, offset))

    def preadv_many(self, transfers: Sequence[Transfer]) -> list[int]:
        return self._many(Command.READ, transfers)

    def pwritev_many(self, transfers: Sequence[Transfer]) -> list[int]:
        return self._many(Command.WRITE, transfers)

    def _many(self, command: Command, transfers: Sequence[Transfer]) -> list[int]:
        requests = [self._transfer(command, *transfer) for transfer in transfers]
        try:
            errors = iter(self._run(list(chain.from_iterable(requests))))
        except OSError as error:
            return [error.errno or errno.EIO] * len(transfers)
        found = [list(islice(errors, len(pieces))) for pieces in requests]
        return [next(filter(None, pieces), 0) for pieces in found]

    def _transfer(self, command: Command, buffers: Sequence[memoryview], offset: int) -> list[Request]:
        length = total(buffers)
        if length <= self._most_bytes:
            return [Request(command, offset, length, buffers)]
        pieces = [(start, min(self._most_bytes, length - start)) for start in range(0, length, self._most_bytes)]
        return [Request(command, offset + start, size, take(buffers, start, size)) for start, size in pieces]

    def flush(self) -> None:
        if self._flush:
            self._do([Request(Command.FLUSH, 0, 0)])

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        if secure or not self.can_discard:
            raise OSError(errno.EOPNOTSUPP, f"{self} has no {'secure ' if secure else ''}discard")
        self._do(_ranges(Command.TRIM, offset, length))

    def write_zeroes(self, offset: int, length: int) -> None:
        if self._zeroes:
            self._do(_ranges(Command.WRITE_ZEROES, offset, length))
        else:
            super().write_zeroes(offset, length)

    def _do(self, requests: Sequence[Request]) -> None:
        for error in filter(None, self._run(requests)):
            raise OSError(error, f"{self}: {os.strerror(error)}")

    def _run(self, requests: Sequence[Request]) -> list[int]:
        """Have all of them done, over as many connections as it takes; the server's errno for each."""
        deadline: float | None = None
        pause, longest = RETRY_S
        while True:
            try:
                return self._connected().call(requests)
            except ParavirtError as error:
                self._disconnect()
                now = time.monotonic()
                deadline = now + self._patience_s if deadline is None else deadline
                if now >= deadline:
                    raise OSError(errno.EIO, f"{self}: {error}") from error
                self._pause.wait(min(pause, deadline - now))
                pause = min(2 * pause, longest)

    def _connected(self) -> NbdConnection:
        if self._closed:
            raise OSError(errno.EBADF, f"{self} is closed")
        if self._connection is None:
            connection = NbdConnection(self._address, self._name, timeout_s=self._timeout_s)
            try:
                self._take_again(connection.export)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _take_again(self, export: Export) -> None:
        """The same disk, perhaps grown: a guest relies on the rest."""
        if export.size_bytes < self.size_bytes:
            raise PeerError(f"it came back with {export.size_bytes} bytes instead of {self.size_bytes}")
        if export.least_block_bytes > self.sector_size:
            raise PeerError(f"it came back with blocks of {export.least_block_bytes} bytes")
        self._take_terms(export)

    def _disconnect(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def interrupt(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.abort()
        self._pause.interrupt()

    def close(self) -> None:
        self._closed = True
        self._disconnect()


def parse_address(text: str) -> tuple[Address, str]:
    """Where a server is, and the export if it stands there."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path:
            raise InvalidRequest(f"nbd: {text!r} is not unix: and an absolute path")
        return path, ""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/\[\]\s]+):([0-9]{1,5})(?:/(.*))?", text, re.ASCII | re.DOTALL)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise InvalidRequest(f"nbd: {text!r} is neither HOST:PORT, HOST:PORT/EXPORT nor unix:/PATH")
    return (match[1].strip("[]"), int(match[2])), match[3] or ""


def _ranges(command: Command, offset: int, length: int) -> list[Request]:
    end = offset + length
    return [Request(command, start, min(MAX_RANGE_BYTES, end - start)) for start in range(offset, end, MAX_RANGE_BYTES)]
