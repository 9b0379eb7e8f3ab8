# SPDX-License-Identifier: MIT
"""Who may do what to a node.

A node has a list of permissions. The first names its owner, who may do everything, and what everybody else may do; the
others name one domain each. On the wire each is a letter (n none, r read, w write, b both) and a domain id.
"""

from typing import Final, Self

READ: Final = 1
WRITE: Final = 2
OWNER: Final = 4
ALL: Final = READ | WRITE | OWNER
IGNORED: Final = 8
"""Marks an entry for a domain that did not exist when it was made: it grants nothing, also if the id is used later."""

DOMID_ANY: Final = 0x7FF5
"""As the domain of an entry: every domain."""

_ACCESS_OF_LETTER: Final = {b"n": 0, b"r": READ, b"w": WRITE, b"b": READ | WRITE}
_LETTERS: Final = (b"n", b"r", b"w", b"b")
DOMID_MAX: Final = 0xFFFF


class Permissions:
    """An immutable list of (domid, access) entries, at least one."""

    __slots__ = ("domids", "entries", "owner")

    def __init__(self, entries: tuple[tuple[int, int], ...]) -> None:
        self.entries = entries
        self.owner = entries[0][0]
        self.domids = frozenset(domid for domid, _ in entries)

    @classmethod
    def parse(cls, words: list[bytes]) -> Self | None:
        """From wire form, one string an entry ("r7"); None if one is malformed or there is none."""
        entries = []
        for word in words:
            access = _ACCESS_OF_LETTER.get(word[:1])
            digits = word[1:]
            if access is None or not digits.isdigit() or len(digits) > 5 or int(digits) > DOMID_MAX:
                return None
            entries.append((int(digits), access))
        return cls(tuple(entries)) if entries else None

    def format(self) -> bytes:
        """Wire form: every entry with a NUL after it."""
        return b"".join(b"%s%d\0" % (_LETTERS[access & (READ | WRITE)], domid) for domid, access in self.entries)

    def access(self, domid: int, target: int | None) -> int:
        """What an unprivileged domain may do; `target` is the domain whose rights it also has, if any."""
        if self.owner in (domid, target):
            return ALL
        for entry_domid, access in self.entries[1:]:
            if not access & IGNORED and entry_domid in (domid, target, DOMID_ANY):
                return access
        return self.entries[0][1]

    def owned_by(self, domid: int) -> "Permissions":
        """The same with another owner."""
        if domid == self.owner:
            return self
        return Permissions(((domid, self.entries[0][1]), *self.entries[1:]))

    def ignoring(self, domids: set[int]) -> "Permissions":
        """The same, with entries (the owner's aside) of these domains marked as never granting anything."""
        rest = ((domid, access | IGNORED if domid in domids else access) for domid, access in self.entries[1:])
        return Permissions((self.entries[0], *rest))

    def without(self, domids: set[int]) -> "Permissions":
        """The same without the entries (the owner's aside) of these domains."""
        return Permissions((self.entries[0], *(entry for entry in self.entries[1:] if entry[0] not in domids)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permissions) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)

    def __repr__(self) -> str:
        return f"<Permissions {self.format().rstrip(bytes(1)).replace(bytes(1), b' ').decode()}>"


DOM0_ONLY: Final = Permissions(((0, 0),))
EVERYBODY_READS: Final = Permissions(((0, 0), (DOMID_ANY, READ)))
