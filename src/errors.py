# SPDX-License-Identifier: MIT
"""Every error the library raises on purpose. Anything else is a bug.

The classes tell *whose* fault it is: the caller's (`InvalidRequest` and its kin), the other side's (`PeerError`),
nobody's (`PeerGone`, `HypervisorGone`, `StoreGone`: a process went away), or the use of something already closed
(`Closed`). The message is one line that names what was wrong; the command line prints it and exits with 2.
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


class StoreGone(PeerGone):
    """xenstored died or closed the connection; the call may or may not have run."""


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
