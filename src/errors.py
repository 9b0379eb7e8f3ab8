# SPDX-License-Identifier: MIT
"""Every error the library raises on purpose. Anything else is a bug.

The classes tell *whose* fault it is: the caller's (`InvalidRequest` and its kin), the other side's (`PeerError`),
nobody's (`PeerGone`, `HypervisorGone`, `StoreGone`, `OutcomeUnknown`: a process went away), or the use of something
already closed (`Closed`). The message is one line that names what was wrong; the command line prints it and exits
with 2.
"""

import errno


class ParavirtError(Exception):
    """Base of all; `str(error)` is one line for a person."""


class Closed(ParavirtError):
    """The object was closed, or belongs to the parent of this forked process."""


class InvalidRequest(ParavirtError, ValueError):
    """The caller asked for something that cannot be: out of range, unaligned, malformed, unknown name."""


class ReadOnly(InvalidRequest):
    """A write to something that is read-only."""


class NotFound(InvalidRequest):
    """No such domain, device, host, image ..."""


class AlreadyExists(InvalidRequest):
    """The name, image, socket or host is in use."""


class PermissionRefused(ParavirtError, PermissionError):
    """The caller may not do this (file rights, domain rights, Dom0-only calls)."""


class ResourceLimit(ParavirtError):
    """A quota, the memory budget or a table is exhausted; free something and try again."""


class TimedOut(ParavirtError, TimeoutError):
    """The given time was over; nothing else is wrong."""


class PeerError(ParavirtError):
    """The other side broke the protocol. Its device or connection is dead until it reconnects; others go on."""


class PeerGone(ParavirtError, ConnectionError):
    """The other side closed or died."""


class HypervisorGone(PeerGone):
    """The broker died: running I/O goes on, this call cannot."""


class DamagedJournal(ParavirtError):
    """A file that keeps a store cannot be read: it is damaged, or of another version."""


class StoreGone(PeerGone):
    """xenstored died or closed the connection; the call may or may not have run."""


class OutcomeUnknown(ParavirtError):
    """The connection to xenstored broke before the reply came: the request has run, or it has not. The client goes on
    over a new connection; look at what the request was to change before it is sent again.
    """


class IoError(ParavirtError, OSError):
    """The device answered with an error status; `status` is the wire value."""

    def __init__(self, message: str, status: int) -> None:
        ParavirtError.__init__(self, message)
        self.status = status
        self.errno = errno.EIO

    def __str__(self) -> str:
        return str(self.args[0])


class HypervisorError(ParavirtError):
    """The broker refused a call; `code` is a positive errno value (Xen's meaning, public/errno.h)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    @property
    def name(self) -> str:
        return errno.errorcode.get(self.code, str(self.code))


class XenstoreError(ParavirtError):
    """xenstored answered with an error; `name` is its errno name on the wire ("ENOENT")."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class NoSuchNode(XenstoreError):
    """There is no such node, domain, watch or transaction (ENOENT)."""


class AccessRefused(XenstoreError):
    """The permissions of the node or the rights of the domain do not allow it (EACCES, EPERM, EROFS)."""


class MalformedRequest(XenstoreError):
    """The path, the number or the form of the request is not valid (EINVAL, EISDIR, ENOTEMPTY)."""


class AlreadyThere(XenstoreError):
    """The watch or the connection exists already (EEXIST, EISCONN)."""


class QuotaReached(XenstoreError):
    """The domain has as many nodes, watches or transactions, or as large ones, as it may have (ENOSPC)."""


class TooLarge(XenstoreError):
    """The request or its reply does not fit the 4096 bytes of a packet (E2BIG)."""


class StoreBusy(XenstoreError):
    """Not now: a transaction inside a transaction, a domain that is served already (EBUSY)."""


class NotSupported(XenstoreError):
    """This daemon does not know the operation (ENOSYS)."""


class TransactionConflict(XenstoreError):
    """Something the transaction has seen was changed meanwhile (EAGAIN): nothing was done, try again."""


class TransactionFailed(XenstoreError):
    """A call in the transaction has failed in such a way that it cannot be committed (ENOMEM)."""


class StoreFailure(XenstoreError):
    """The daemon failed, or the transaction found nodes at odds that it saw at different times (EIO)."""


XENSTORE_ERRORS: dict[str, type[XenstoreError]] = {
    "ENOENT": NoSuchNode,
    "EACCES": AccessRefused,
    "EPERM": AccessRefused,
    "EROFS": AccessRefused,
    "EINVAL": MalformedRequest,
    "EISDIR": MalformedRequest,
    "ENOTEMPTY": MalformedRequest,
    "EEXIST": AlreadyThere,
    "EISCONN": AlreadyThere,
    "ENOSPC": QuotaReached,
    "E2BIG": TooLarge,
    "EBUSY": StoreBusy,
    "ENOSYS": NotSupported,
    "EAGAIN": TransactionConflict,
    "ENOMEM": TransactionFailed,
    "EIO": StoreFailure,
}
"""The class of each errno name that exists on the wire; another name is a plain `XenstoreError`."""
