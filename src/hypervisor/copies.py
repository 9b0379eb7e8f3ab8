# SPDX-License-Identifier: MIT
"""Grant copies (GNTTABOP_copy): between granted pages of any domains and buffers of this process, in batches.

Every operation has a status of its own, whatever happened to the others; none raises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Self

from paravirt.errors import HypervisorError, NotFound, ParavirtError, PermissionRefused, ResourceLimit
from paravirt.hypervisor.foreign import ForeignArena
from paravirt.ring.grant import CopyOp, CopyPair, GrantStatus
from paravirt.ring.memory import PAGE_BYTES

Buffer = bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Granted:
    """A place in a page that a domain has granted to us."""

    domid: int
    gref: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Local:
    """A place in a buffer of ours."""

    buffer: bytes | Buffer
    offset: int = 0


@dataclass(frozen=True, slots=True)
class GrantCopy:
    """`length` bytes (at most a page) from `source` to `dest`."""

    source: Granted | Local
    dest: Granted | Local
    length: int


def status_of(error: ParavirtError) -> GrantStatus:
    """What a refused `Hypervisor.foreign_arena` means for an operation on one of its references."""
    if isinstance(error, NotFound):
        return GrantStatus.BAD_DOMAIN
    if isinstance(error, PermissionRefused):
        return GrantStatus.PERMISSION_DENIED
    if isinstance(error, ResourceLimit):
        return GrantStatus.NO_SPACE
    if isinstance(error, HypervisorError):
        return GrantStatus.BAD_GNTREF
    return GrantStatus.GENERAL_ERROR


class GrantCopier:
    """Keeps the arenas that it has used mapped until `close`. One thread at a time. A context manager.

    A granter that ends an arena and makes another is found again after `close`: open one for a batch, or for a device.
    """

    def __init__(self, foreign_arena: Callable[[int, int], ForeignArena]) -> None:
        """`foreign_arena(domid, gref)`: `Hypervisor.foreign_arena`."""
        self._foreign_arena = foreign_arena
        self._arenas: list[ForeignArena] = []

    def copy(self, ops: Sequence[GrantCopy]) -> list[GrantStatus]:
        """Carry out all, in this order; the status of each. Neighbours of one kind and arena are one call of the core.

        Length 0 is OKAY and nothing else of it is looked at.
        """
        statuses: list[GrantStatus] = []
        for _, group in groupby((self._prepare(op) for op in ops), key=lambda prepared: prepared.key):
            statuses += self._run(list(group))
        return statuses

    def _prepare(self, op: GrantCopy) -> "_Prepared":
        if op.length == 0:
            return _Prepared(op, GrantStatus.OKAY)
        source = self._look_up(op.source) if isinstance(op.source, Granted) else None
        dest = self._look_up(op.dest) if isinstance(op.dest, Granted) else None
        for found in (source, dest):
            if isinstance(found, GrantStatus):
                return _Prepared(op, found)
        if not _can_be(op):
            return _Prepared(op, GrantStatus.BAD_COPY_ARG)
        assert not isinstance(source, GrantStatus)
        assert not isinstance(dest, GrantStatus)
        return _Prepared(op, None, source, dest)

    def _look_up(self, place: Granted) -> ForeignArena | GrantStatus:
        if not 0 <= place.gref < 2**32:
            return GrantStatus.BAD_GNTREF
        for arena in self._arenas:
            if arena.holds(place.domid, place.gref):
                return arena
        if not 0 <= place.domid < 2**16:
            return GrantStatus.BAD_DOMAIN
        try:
            arena = self._foreign_arena(place.domid, place.gref)
        except ParavirtError as error:
            return status_of(error)
        self._arenas.append(arena)
        return arena

    def _run(self, group: "list[_Prepared]") -> list[GrantStatus]:
        """Of one key: all by the same arenas and buffers, or none by any."""
        first = group[0]
        if first.status is not None:
            return [first.status] * len(group)
        if first.source is not None and first.dest is not None:
            return first.source.mapper.copy_between([_pair(each.op) for each in group], first.dest.mapper)
        if first.source is not None:
            ops = [_op(each.op.source, each.op.dest, each.op.length) for each in group]
            return first.source.mapper.copy_from(ops, memoryview(_buffer(first.op.dest)))
        if first.dest is not None:
            ops = [_op(each.op.dest, each.op.source, each.op.length) for each in group]
            return first.dest.mapper.copy_to(ops, memoryview(_buffer(first.op.source)))
        return [_copy_local(each.op) for each in group]

    def close(self) -> None:
        """Let go of the arenas. Harmless when repeated."""
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GrantCopier of {len(self._arenas)} arenas>"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An operation that was refused (`status`), or the arenas it needs."""

    op: GrantCopy
    status: GrantStatus | None
    source: ForeignArena | None = None
    dest: ForeignArena | None = None

    @property
    def key(self) -> tuple[object, ...]:
        buffers = [id(place.buffer) for place in (self.op.source, self.op.dest) if isinstance(place, Local)]
        return self.status, id(self.source), id(self.dest), *(buffers if self.status is None else ())


def _can_be(op: GrantCopy) -> bool:
    """Whether the core can be asked, which checks the ranges after the references, as Xen does."""
    if not 0 < op.length < 2**16:
        return False
    for place in (op.source, op.dest):
        if not 0 <= place.offset < (2**16 if isinstance(place, Granted) else 2**63):
            return False
    return True


def _pair(op: GrantCopy) -> CopyPair:
    assert isinstance(op.source, Granted)
    assert isinstance(op.dest, Granted)
    return CopyPair(op.source.gref, op.source.offset, op.dest.gref, op.dest.offset, op.length)


def _op(granted: Granted | Local, local: Granted | Local, length: int) -> CopyOp:
    assert isinstance(granted, Granted)
    return CopyOp(granted.gref, granted.offset, length, local.offset)


def _buffer(place: Granted | Local) -> bytes | Buffer:
    assert isinstance(place, Local)
    return place.buffer


def _copy_local(op: GrantCopy) -> GrantStatus:
    assert isinstance(op.source, Local)
    assert isinstance(op.dest, Local)
    start, end = op.source.offset, op.source.offset + op.length
    target, target_end = op.dest.offset, op.dest.offset + op.length
    if op.length > PAGE_BYTES or end > len(op.source.buffer) or target_end > len(op.dest.buffer):
        return GrantStatus.BAD_COPY_ARG
    memoryview(op.dest.buffer)[target:target_end] = bytes(op.source.buffer[start:end])
    return GrantStatus.OKAY
