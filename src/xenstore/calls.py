# SPDX-License-Identifier: MIT
"""The blocking calls that a client and a transaction of it have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

from paravirt.errors import TransactionConflict
from paravirt.xenstore import operations
from paravirt.xenstore.operations import Call, Steps, encode_string, error_of
from paravirt.xenstore.wire import Op

__all__ = ["StoreCalls", "TransactionConflict", "encode_string", "error_of"]

T = TypeVar("T")


class StoreCalls(ABC):
    """Reading and changing the tree. Paths are absolute, or relative to the home of the client's domain.

    Every call raises an `XenstoreError` of the class that its errno has in `errors.XENSTORE_ERRORS` and with that
    `name` ("ENOENT", "EACCES" ...), `StoreGone` when the daemon is dead and `Closed` after `close`. Over a client that
    reconnects, a call that changes something raises `OutcomeUnknown` when the connection broke before its reply.
    """

    @abstractmethod
    def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        """One request and its reply's payload; `what` names it in errors."""

    def call(self, call: Call[T]) -> T:
        """Make a call of `operations`."""
        return call.decode(self.request(call.op, call.payload, call.what))

    def take_steps(self, steps: Steps[T]) -> T:
        """Make calls of `operations` that depend on each other."""
        try:
            call = next(steps)
            while True:
                try:
                    reply = self.request(call.op, call.payload, call.what)
                except Exception as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(reply)
        except StopIteration as end:
            value: T = end.value
            return value

    def read(self, path: str) -> bytes:
        """The value of a node."""
        return self.call(operations.read(path))

    def read_text(self, path: str) -> str:
        """The value of a node as text; `PeerError` if it is not UTF-8."""
        return self.call(operations.read_text(path))

    def write(self, path: str, value: str | bytes) -> None:
        """Set the value of a node; it and its parents are made if they are missing."""
        self.call(operations.write(path, value))

    def mkdir(self, path: str) -> None:
        """Make an empty node unless it is there."""
        self.call(operations.mkdir(path))

    def rm(self, path: str) -> None:
        """Remove a node and all below it. No error if it is missing while its parent exists."""
        self.call(operations.rm(path))

    def ls(self, path: str) -> list[str]:
        """Names of the children, however many there are."""
        return self.take_steps(operations.ls(path))

    def exists(self, path: str) -> bool:
        """Whether there is such a node (one that may not be read is an error, not a no)."""
        return self.take_steps(operations.exists(path))

    def get_perms(self, path: str) -> list[str]:
        """Permissions as a letter (n, r, w, b) and a domid each; the first one names the owner and everybody else."""
        return self.call(operations.get_perms(path))

    def set_perms(self, path: str, permissions: Iterable[str]) -> None:
        """Change the permissions; form as `get_perms`."""
        self.call(operations.set_perms(path, permissions))


class DomainCalls(StoreCalls):
    """Calls about domains and the daemon itself; most are for Dom0 only and raise `AccessRefused` for a guest."""

    def get_domain_path(self, domid: int) -> str:
        """The home of a domain, whether it exists or not. For everybody."""
        return self.call(operations.get_domain_path(domid))

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Serve a domain over its ring page, with the event channel `port` of that domain. Dom0 only."""
        self.call(operations.introduce(domid, gfn, port))

    def release(self, domid: int) -> None:
        """The domain is over for the store: what it has there goes. Dom0 only."""
        self.call(operations.release(domid))

    def resume(self, domid: int) -> None:
        """The domain runs again after it was shut down. Dom0 only."""
        self.call(operations.resume(domid))

    def set_target(self, domid: int, target: int) -> None:
        """Give a domain the rights of another one. Dom0 only."""
        self.call(operations.set_target(domid, target))

    def is_domain_introduced(self, domid: int) -> bool:
        """Whether a domain is served. Dom0 only."""
        return self.call(operations.is_domain_introduced(domid))

    def get_feature(self, domid: int | None = None) -> int:
        """The feature bits (`ring_page.Feature`) of the daemon, or those offered to one domain. Dom0 only."""
        return self.call(operations.get_feature(domid))

    def set_feature(self, domid: int, features: int) -> None:
        """What to offer to a domain that is not introduced yet (`StoreBusy` if it is). Dom0 only."""
        self.call(operations.set_feature(domid, features))

    def get_quota(self, name: str, domid: int | None = None) -> int:
        """A quota by its name ("nodes", "watches" ...): what new domains get, or what one domain has. Dom0 only."""
        return self.call(operations.get_quota(name, domid))

    def set_quota(self, name: str, value: int, domid: int | None = None) -> None:
        """Change a quota; 0 is none. Dom0 only."""
        self.call(operations.set_quota(name, value, domid))

    def quota_names(self) -> list[str]:
        """The names that `get_quota` knows. Dom0 only."""
        return self.call(operations.quota_names())

    def control(self, *words: str) -> str:
        """Tell the daemon something about itself, such as `control("check")`; the text it answers. Dom0 only."""
        return self.call(operations.control(words))
