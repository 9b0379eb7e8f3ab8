# SPDX-License-Identifier: MIT
"""Lines that say what each request was and what came of it, and the log of the last of them. Pure.

    1732572712.123 5.2 - READ /local/domain/5/name OK 12

is: when (seconds since 1970), domain and connection, transaction, operation, path or arguments, result, microseconds.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from paravirt.xenstore.wire import Errno, Op, Packet, Reply, strings

if TYPE_CHECKING:
    from paravirt.xenstore.session import Connection

KEPT_LINES: Final = 4096
WANTED_MS: Final = 10_000
"""So long after somebody asked for lines more are kept."""
_ARGUMENTS_MAX_CHARACTERS: Final = 512
_ONLY_PATH: Final = frozenset((Op.WRITE,))
"""What comes after the path is data."""
_NAMES: Final = {int(op): op.name for op in Op}
_PLAIN: Final = frozenset(range(0x21, 0x7F)) - frozenset(b"\\,")


def line(connection: Connection, packet: Packet, reply: Reply, started_us: int, ended_us: int) -> str:
    """The line of one handled request, without a line feed. The times are microseconds since 1970."""
    op, _, transaction_id, payload = packet
    when = f"{started_us // 1_000_000}.{started_us // 1000 % 1000:03d}"
    who = f"{connection.domain.domid}.{connection.number}"
    result = reply.name if isinstance(reply, Errno) else "OK"
    name = _NAMES.get(op, str(op))
    return f"{when} {who} {transaction_id or '-'} {name} {arguments(op, payload)} {result} {ended_us - started_us}"


def arguments(op: int, payload: bytes) -> str:
    """The strings of a payload with commas between; "-" if there are none. Other bytes than visible ASCII, commas and
    backslashes are written in hexadecimal."""
    words = strings(payload)
    if op in _ONLY_PATH:
        words = words[:1]
    text = ",".join(escaped(word) for word in words) or "-"
    return text if len(text) <= _ARGUMENTS_MAX_CHARACTERS else text[:_ARGUMENTS_MAX_CHARACTERS] + "..."


def escaped(word: bytes) -> str:
    return "".join(chr(byte) if byte in _PLAIN else f"\\x{byte:02x}" for byte in word)


class TraceLog:
    """The last lines, kept only while somebody asks for them. Lines are numbered from 0."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._next = 0
        self._wanted_until_ms = 0
        self.on = False
        """Whether somebody asked, and it is not known yet that it was too long ago."""

    def wants(self, now_ms: int) -> bool:
        """Whether lines are kept now."""
        self.on = self.on and now_ms < self._wanted_until_ms
        return self.on

    def add(self, text: str) -> None:
        self._lines.append(text)
        self._next += 1

    def since(self, number: int, now_ms: int) -> tuple[int, list[str]]:
        """(number of the first line returned, lines) from a number on, as far as they are kept; starts keeping."""
        self._wanted_until_ms, self.on = now_ms + WANTED_MS, True
        oldest = self._next - len(self._lines)
        first = min(max(number, oldest), self._next)
        return first, list(self._lines)[first - oldest :]
