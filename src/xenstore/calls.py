# SPDX-License-Identifier: MIT
"""The calls that a client and a transaction of it have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final

from paravirt.errors import InvalidRequest, PeerError, XenstoreError
from paravirt.xenstore.wire import Op

_MEANING: Final = {
    "EINVAL": "is not a valid request",
    "EACCES": "permission refused",
    "EEXIST": "is there already",
    "ENOENT": "does not exist",
    "ENOMEM": "the transaction has failed",
    "ENOSPC": "a quota is reached",
    "ENOSYS": "the daemon does not know this operation",
    "EBUSY": "is busy",
    "EAGAIN": "something the transaction has seen was changed meanwhile",
    "E2BIG": "is too long",
    "EPERM": "only Dom0 may give a node away",
}


class TransactionConflict(XenstoreError):
    """Something the transaction has seen was changed meanwhile (EAGAIN): nothing was done, try again."""


def error_of(name: str, what: str) -> XenstoreError:
    """The exception for an error reply to a request about `what`."""
    message = f"{what}: {_MEANING.get(name, 'refused')} ({name})"
    return TransactionConflict(message, name) if name == "EAGAIN" else XenstoreError(message, name)


def encode_string(text: str) -> bytes:
    """A string argument with its NUL."""
    if "\0" in text:
        raise InvalidRequest(f"{text!r} has a NUL inside")
    return text.encode() + b"\0"


class StoreCalls(ABC):
    """Reading and changing the tree. Paths are absolute, or relative to the home of the client's domain.

    Every call raises `XenstoreError`, whose `name` is the errno ("ENOENT", "EACCES" ...), `StoreGone` when the daemon
    is dead and `Closed` after `close`.
    """

    @abstractmethod
    def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        """One request and its reply's payload; `what` names it in errors."""

    def read(self, path: str) -> bytes:
        """The value of a node."""
        return self.request(Op.READ, encode_string(path), path)

    def read_text(self, path: str) -> str:
        """The value of a node as text; `PeerError` if it is not UTF-8."""
        try:
            return self.read(path).decode()
        except UnicodeDecodeError as error:
            raise PeerError(f"{path} is not text") from error

    def write(self, path: str, value: str | bytes) -> None:
        """Set the value of a node; it and its parents are made if they are missing."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.request(Op.WRITE, encode_string(path) + data, path)

    def mkdir(self, path: str) -> None:
        """Make an empty node unless it is there."""
        self.request(Op.MKDIR, encode_string(path), path)

    def rm(self, path: str) -> None:
        """Remove a node and all below it. No error if it is missing while its parent exists."""
        self.request(Op.RM, encode_string(path), path)

    def ls(self, path: str) -> list[str]:
        """Names of the children, in the order they were made."""
        try:
            listing = self.request(Op.DIRECTORY, encode_string(path), path)
        except XenstoreError as error:
            if error.name != "E2BIG":
                raise
            listing = self._list_in_parts(path)
        return [name.decode() for name in listing.split(b"\0")[:-1]]

    def _list_in_parts(self, path: str) -> bytes:
        """A listing longer than one reply; anew if it changes meanwhile."""
        first_generation, parts = b"", [b""]
        while True:
            offset = sum(map(len, parts))
            reply = self.request(Op.DIRECTORY_PART, encode_string(path) + b"%d\0" % offset, path)
            generation, _, part = reply.partition(b"\0")
            if offset and generation != first_generation:
                parts = [b""]
                continue
            first_generation = generation
            if part == b"\0" or part.endswith(b"\0\0"):
                return b"".join([*parts, part[:-1]])
            parts.append(part)

    def exists(self, path: str) -> bool:
        """Whether there is such a node (one that may not be read is an error, not a no)."""
        try:
            self.read(path)
        except XenstoreError as error:
            if error.name == "ENOENT":
                return False
            raise
        return True

    def get_perms(self, path: str) -> list[str]:
        """Permissions as a letter (n, r, w, b) and a domid each; the first one names the owner and everybody else."""
        return [word.decode() for word in self.request(Op.GET_PERMS, encode_string(path), path).split(b"\0")[:-1]]

    def set_perms(self, path: str, permissions: Iterable[str]) -> None:
        """Change the permissions; form as `get_perms`."""
        words = b"".join(encode_string(word) for word in permissions)
        self.request(Op.SET_PERMS, encode_string(path) + words, path)
