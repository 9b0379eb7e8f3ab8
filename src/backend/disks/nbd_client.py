# SPDX-License-Identifier: MIT
"""One connection to an NBD server."""

import itertools
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from paravirt.backend.disks.base import ZEROES, skip, take, total
from paravirt.errors import InvalidRequest, NotFound, PeerError, PeerGone
from paravirt.protocol import nbd
from paravirt.protocol.nbd import Chunk, Command, Export, Option, Reply

Address = str | tuple[str, int]  # of a Unix socket, or host and port

_MAX_PIECES = 512  # of one sendmsg; the system takes 1024
_MAX_GAPS = 1024  # parts of one read that do not follow each other


@dataclass(frozen=True, slots=True)
class Request:
    """What a server is asked to do."""

    command: Command
    offset: int
    length: int
    buffers: Sequence[memoryview] = ()  # the data of a write, the place for those of a read


@dataclass(slots=True)
class _Call:
    """A request in flight."""

    buffers: Sequence[memoryview]  # of a read
    offset: int
    missing: int  # bytes of a read that structured replies have not brought yet
    error: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)  # what they have brought: from, to


class NbdConnection:
    """For one thread; another may `abort`. `PeerGone` when the connection breaks or the server is silent for longer
    than `timeout_s`, `PeerError` when it breaks the protocol. Either way it is of no more use: close it.
    """

    def __init__(self, address: Address, export: str, *, timeout_s: float) -> None:
        """Connect and shake hands. `NotFound`, `InvalidRequest`: there is a server, without the export for us."""
        self._cookies = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._structured = False
        self._socket = _connect(address, timeout_s)
        try:
            self.export = self._shake_hands(export)
        except BaseException:
            self._socket.close()
            raise

    def call(self, requests: Sequence[Request]) -> list[int]:
        """Send all, then wait for all; the server's errno for each, 0 when it is done."""
        calls: list[_Call] = []
        pieces: list[memoryview] = []
        for request in requests:
            is_read = request.command == Command.READ
            cookie = next(self._cookies)
            call = _Call(request.buffers if is_read else (), request.offset, request.length if is_read else 0)
            self._calls[cookie] = call
            calls.append(call)
            pieces.append(memoryview(nbd.request(request.command, cookie, request.offset, request.length)))
            pieces.extend(() if is_read else request.buffers)
        self._send(pieces)
        while self._calls:
            self._receive()
        return [call.error for call in calls]

    def abort(self) -> None:
        """From any thread: a call in progress ends in `PeerGone`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say goodbye, if that takes no time, and close. Harmless when repeated."""
        if self._socket.fileno() >= 0:
            self._socket.settimeout(0)
            with suppress(OSError):
                self._socket.sendall(nbd.request(Command.DISCONNECT, 0, 0, 0))
            self._socket.close()

    # -- transmission

    def _send(self, pieces: Sequence[memoryview]) -> None:
        try:
            while pieces:
                pieces = skip(pieces, self._socket.sendmsg(pieces[:_MAX_PIECES]))
        except OSError as error:
            raise _gone(error) from error

    def _receive(self) -> None:
        """One reply, or one chunk of one."""
        head = self._read(nbd.SIMPLE_REPLY.size)
        if head[:4] == _SIMPLE:
            _, error, cookie = nbd.SIMPLE_REPLY.unpack(head)
            self._simple_reply(error, cookie)
        elif head[:4] == _STRUCTURED and self._structured:
            head += self._read(nbd.STRUCTURED_REPLY.size - len(head))
            _, flags, kind, cookie, length = nbd.STRUCTURED_REPLY.unpack(head)
            self._structured_reply(flags, kind, cookie, length)
        else:
            raise PeerError(f"the NBD server sent {head[:4].hex()} where a reply begins")

    def _simple_reply(self, error: int, cookie: int) -> None:
        call = self._call_of(cookie)
        if error:
            call.error = nbd.errno_of(error)
        elif call.buffers:
            if self._structured:
                raise PeerError("the NBD server answered a read with a simple reply after structured ones were agreed")
            self._read_into(call.buffers)
        del self._calls[cookie]

    def _structured_reply(self, flags: int, kind: int, cookie: int, length: int) -> None:
        call = self._call_of(cookie)
        if kind == Chunk.OFFSET_DATA and length > nbd.OFFSET.size:
            (offset,) = nbd.OFFSET.unpack(self._read(nbd.OFFSET.size))
            self._read_into(_place(call, offset, length - nbd.OFFSET.size))
        elif kind == Chunk.OFFSET_HOLE and length == nbd.HOLE.size:
            for buffer in _place(call, *nbd.HOLE.unpack(self._read(length))):
                for start in range(0, len(buffer), len(ZEROES)):
                    piece = buffer[start : start + len(ZEROES)]
                    piece[:] = ZEROES[: len(piece)]
        elif kind & 1 << 15 and nbd.ERROR.size <= length <= nbd.MAX_STRING_BYTES + 16:
            code, _ = nbd.ERROR.unpack_from(self._read(length))
            call.error = call.error or nbd.errno_of(code)
        elif not (kind == Chunk.NONE and length == 0 and flags & nbd.CHUNK_DONE):
            raise PeerError(f"the NBD server sent a chunk of type {kind} with {length} bytes")
        if flags & nbd.CHUNK_DONE:
            if call.missing and not call.error:
                raise PeerError(f"the NBD server ended a read with {call.missing} bytes missing")
            del self._calls[cookie]

    def _call_of(self, cookie: int) -> _Call:
        try:
            return self._calls[cookie]
        except KeyError:
            raise PeerError(f"the NBD server answered a request that is not in flight ({cookie})") from None

    # -- bytes

    def _read(self, n_bytes: int) -> bytes:
        data = bytearray(n_bytes)
        self._read_into([memoryview(data)])
        return bytes(data)

    def _read_into(self, buffers: Sequence[memoryview]) -> None:
        rest = skip(buffers, 0)
        while rest:
            try:
                got = self._socket.recvmsg_into(rest[:_MAX_PIECES])[0]
            except OSError as error:
                raise _gone(error) from error
            if got == 0:
                raise PeerGone("the NBD server closed the connection")
            rest = skip(rest, got)

    # -- handshake

    def _shake_hands(self, export: str) -> Export:
        magic, kind, flags = nbd.GREETING.unpack(self._read(nbd.GREETING.size))
        if magic != b"NBDMAGIC":
            raise PeerError(f"not an NBD server: it greets with {magic!r}")
        if kind != nbd.NEW_MAGIC or not flags & nbd.HandshakeFlag.FIXED_NEWSTYLE:
            raise PeerError("the NBD server does not speak fixed newstyle, as all have since 2014")
        no_zeroes = flags & nbd.HandshakeFlag.NO_ZEROES
        self._tell(struct.pack(">I", nbd.HandshakeFlag.FIXED_NEWSTYLE | no_zeroes))
        self._tell(nbd.option(Option.STRUCTURED_REPLY))
        reply, _ = self._option_reply(Option.STRUCTURED_REPLY)
        self._structured = reply == Reply.ACK
        if reply == Reply.TLS_REQUIRED:
            raise _refused(reply, b"", export)
        found = self._go(export)
        if found is None:
            self._tell(nbd.option(Option.EXPORT_NAME, export.encode()))
            found = Export.from_wire(self._read(nbd.EXPORT.size), None)
            if not no_zeroes:
                self._read(124)
        return found

    def _go(self, name: str) -> Export | None:
        """None when the server does not know that option."""
        self._tell(nbd.option(Option.GO, nbd.go(name.encode())))
        infos: dict[int, bytes] = {}
        for _ in range(64):
            reply, data = self._option_reply(Option.GO)
            if reply == Reply.INFO and len(data) >= 2:
                infos[int.from_bytes(data[:2])] = data[2:]
            elif reply == Reply.ACK:
                if nbd.Info.EXPORT not in infos:
                    raise PeerError("the NBD server says nothing of its export")
                return Export.from_wire(infos[nbd.Info.EXPORT], infos.get(nbd.Info.BLOCK_SIZE))
            elif reply == Reply.UNSUPPORTED:
                return None
            else:
                raise _refused(reply, data, name)
        raise PeerError("the NBD server does not come to the end of its export")

    def _option_reply(self, option: Option) -> tuple[int, bytes]:
        magic, of, reply, length = nbd.OPTION_REPLY.unpack(self._read(nbd.OPTION_REPLY.size))
        if magic != nbd.OPTION_REPLY_MAGIC or of != option or length > nbd.MAX_OPTION_REPLY_BYTES:
            raise PeerError(f"the NBD server answered option {option.name} with something else")
        return reply, self._read(length)

    def _tell(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise _gone(error) from error


_SIMPLE = nbd.SIMPLE_REPLY_MAGIC.to_bytes(4)
_STRUCTURED = nbd.STRUCTURED_REPLY_MAGIC.to_bytes(4)


def _place(call: _Call, offset: int, length: int) -> list[memoryview]:
    """Where a part of a read belongs, which nothing may have come for yet."""
    start, end = offset - call.offset, offset - call.offset + length
    twice = any(start < other_end and other_start < end for other_start, other_end in call.pieces)
    if start < 0 or end > total(call.buffers) or length == 0 or twice:
        raise PeerError(f"the NBD server sent {length} bytes at {offset} that nobody asked for, or twice")
    if call.pieces and call.pieces[-1][1] == start:
        call.pieces[-1] = (call.pieces[-1][0], end)
    elif len(call.pieces) < _MAX_GAPS:
        call.pieces.append((start, end))
    else:
        raise PeerError("the NBD server sent a read in too many parts")
    call.missing -= length
    return take(call.buffers, start, length)


def _refused(reply: int, data: bytes, export: str) -> Exception:
    """The server's reason, and its own words as far as they are printable."""
    words = "".join(filter(str.isprintable, data[:200].decode(errors="replace")))
    reason = nbd.REFUSALS.get(reply, f"error {reply & 0xFFFF}")
    text = f"the NBD server does not give us export {export!r}: {reason}{f' ({words})' if words else ''}"
    if reply == Reply.UNKNOWN:
        return NotFound(text)
    return PeerGone(text) if reply == Reply.SHUTDOWN else InvalidRequest(text)


def _connect(address: Address, timeout_s: float) -> socket.socket:
    try:
        if isinstance(address, tuple):
            connected = socket.create_connection(address, timeout_s)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connected
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.settimeout(timeout_s)
            connected.connect(address)
        except BaseException:
            connected.close()
            raise
        return connected
    except (OSError, UnicodeError, ValueError, OverflowError) as error:
        raise PeerGone(f"no NBD server answers: {getattr(error, 'strerror', None) or error}") from error


def _gone(error: OSError) -> PeerGone:
    return PeerGone(f"the connection to the NBD server broke: {error.strerror or error}")
