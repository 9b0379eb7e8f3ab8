# SPDX-License-Identifier: MIT
"""The reader of journals against every kind of record that is not as it must be, and ends that are cut off."""

import errno
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.xenstore.wire import Op
from tests.xenstore.engine import Client, engine, wrong

NODE, REMOVED, SPECIAL, DOMAIN, QUOTA, GENERATION, COMPLETE, MADE = range(1, 9)
COMPLETED = bytes([COMPLETE])
DOM0 = ((0, 0),)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame(*records: bytes) -> bytes:
    data = b"".join(records)
    n = struct.pack("<I", len(data))
    return n + struct.pack("<2I", crc32c(n), crc32c(data)) + data


def journal(*frames: bytes, version: int = 1, magic: bytes = b"PVXSJRNL") -> bytes:
    header = magic + struct.pack("<I", version)
    return header + struct.pack("<I", crc32c(header)) + b"".join(frames)


def perms_of(perms: tuple[tuple[int, int], ...]) -> bytes:
    return b"".join(struct.pack("<2H", *entry) for entry in perms)


def node(path: bytes, value: bytes = b"", perms: tuple[tuple[int, int], ...] = DOM0) -> bytes:
    return struct.pack("<B2HI", NODE, len(path), len(perms), len(value)) + path + perms_of(perms) + value


def made(n_above: int, path: bytes, value: bytes = b"") -> bytes:
    return bytes([MADE]) + struct.pack("<H", n_above) + node(path, value)[1:]


def removed(path: bytes) -> bytes:
    return struct.pack("<BH", REMOVED, len(path)) + path


def special(which: int, perms: tuple[tuple[int, int], ...] = DOM0) -> bytes:
    return struct.pack("<2BH", SPECIAL, which, len(perms)) + perms_of(perms)


def domain(domid: int, target: int = 0) -> bytes:
    return struct.pack("<BI4B4I", DOMAIN, domid, 1, 1, 0, 1, 15, target, 77, 4) + struct.pack("<10I", *range(10))


def quota(number: int, value: int = 5) -> bytes:
    return struct.pack("<B2I", QUOTA, number, value)


def generation(number: int) -> bytes:
    return struct.pack("<BQ", GENERATION, number)


@pytest.fixture
def core() -> Iterator[Any]:
    with engine() as core:
        yield core


def load(core: Any, data: bytes) -> tuple[int, int]:
    """(result, where its whole frames end)"""
    n_good = ffi.new("uint64_t *")
    result = int(lib.pv_xs_journal_load(core, data, len(data), n_good))
    assert wrong(core) is None
    return result, n_good[0]


ALL = (
    node(b"/a", b"1"), made(2, b"/a/b/c/d", b"2"), node(b"/a", b"three", ((5, 0), (6, 3))), removed(b"/a/b/c"),
    removed(b"/not/there"), special(1, ((5, 1),)), domain(5, target=6), quota(1), generation(99), COMPLETED,
)  # fmt: skip


def test_a_journal_of_everything(core: Any) -> None:
    Client(core).do(Op.WRITE, b"/old/of/this\0")
    data = journal(frame(*ALL[:4]), frame(*ALL[4:]))
    assert load(core, data) == (0, len(data))
    dom0 = Client(core)
    assert dom0.ask(Op.DIRECTORY, b"/\0") == b"a\0"
    assert dom0.ask(Op.READ, b"/a\0") == b"three"
    assert dom0.ask(Op.GET_PERMS, b"/a\0") == b"n5\0b6\0"
    assert dom0.ask(Op.DIRECTORY, b"/a/b\0") == b""
    assert dom0.ask(Op.GET_PERMS, b"@releaseDomain\0") == b"r5\0"
    known = ffi.new("struct pv_xs_domain *")
    assert lib.pv_xs_get_domain(core, 5, known)
    assert (known.introduced, known.has_target, known.target, known.gfn, known.port) == (1, 1, 6, 77, 4)
    assert (list(known.quotas), known.n_nodes) == ([*range(10)], 1)
    assert lib.pv_xs_quota(core, lib.PV_XS_GLOBAL, 1) == 5
    statistics = ffi.new("struct pv_xs_statistics *")
    lib.pv_xs_get_statistics(core, statistics)
    assert statistics.generation == 99


@pytest.mark.parametrize(
    "bad",
    [
        node(b""),
        node(b"a"),
        node(b"/a/"),
        node(b"/a?"),
        node(b"/" + b"a" * 3072),
        node(b"/a", perms=()),
        node(b"/a/b"),  # its parent is not there
        made(2, b"/a/b"),
        made(1, b"/a/b/c"),
        made(0, b"/a/b"),
        removed(b""),
        removed(b"/"),
        removed(b"/a//b"),
        special(2),
        special(0, ()),
        domain(0x10000),
        domain(5, target=0x10000),
        quota(10),
        bytes([0]),
        bytes([MADE + 1]),
        *(record[:-1] for record in ALL[:-1]),
        *(record[:2] for record in ALL[:-1]),
    ],
)
def test_a_record_that_cannot_be(core: Any, bad: bytes) -> None:
    start = journal(frame(node(b"/b"), COMPLETED))
    assert load(core, start + frame(bad)) == (-errno.EPROTO, len(start))


def test_a_node_that_is_there_already_is_not_made(core: Any) -> None:
    good = journal(frame(node(b"/a"), made(1, b"/a/b/c"), COMPLETED))
    assert load(core, good)[0] == 0
    assert load(core, good + frame(made(1, b"/a/b/c")))[0] == -errno.EPROTO


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"", -errno.EPROTO),
        (journal(magic=b"PVXSJRNK"), -errno.EPROTO),
        (journal()[:-1] + b"?", -errno.EPROTO),
        (journal(version=2), -errno.ENOTSUP),
        (journal(), -errno.EPROTO),
        (journal(frame(node(b"/a"))), -errno.EPROTO),  # its snapshot is not complete
    ],
)
def test_a_file_that_is_no_journal(core: Any, data: bytes, result: int) -> None:
    assert load(core, data)[0] == result


LAST = frame(node(b"/b", b"what nobody was told of"))


@pytest.mark.parametrize(
    ("end", "result"),
    [
        (LAST[:5], 0),
        (LAST[:-1], 0),
        (LAST[:-1] + b"?", 0),
        (bytes(100), 0),
        (bytes(100) + b"?", -errno.EPROTO),
        (b"?" * 12, -errno.EPROTO),
        (LAST[:-1] + b"?" + LAST, -errno.EPROTO),
        (struct.pack("<2I", 1 << 31, crc32c(struct.pack("<I", 1 << 31))) + bytes(20), -errno.EPROTO),
    ],
)
def test_the_end_of_a_journal(core: Any, end: bytes, result: int) -> None:
    """What was cut off is left out; damage before something else is not."""
    good = journal(frame(node(b"/a"), COMPLETED))
    assert load(core, good + end) == (result, len(good))
    assert Client(core).ask(Op.DIRECTORY, b"/\0") == b"a\0"
