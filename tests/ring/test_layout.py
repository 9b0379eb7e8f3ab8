# SPDX-License-Identifier: MIT
"""The shared bytes: golden values from Xen's public/io/ring.h."""

import numpy as np
import pytest

from paravirt.errors import InvalidRequest
from paravirt.ring.shared import BackRing, FrontRing, entry_bytes_of, ring_entries

from .support import REQUEST, RESPONSE

# Entries by page order 0 to 4, measured with Xen's header.
SIZES = {
    112: [32, 64, 128, 256, 512],  # blkif
    12: [256, 512, 1024, 2048, 4096],  # netif tx
    8: [256, 512, 1024, 2048, 4096],  # netif rx
    16: [128, 256, 512, 1024, 2048],  # netif ctrl
    64: [32, 64, 128, 256, 512],  # pvcalls, sndif, displif
    252: [16, 32, 64, 128, 256],  # vscsiif
    148: [16, 32, 64, 128, 256],  # usbif
    4: [512, 1024, 2048, 4096, 8192],  # usbif connections
}


@pytest.mark.parametrize("entry_bytes", SIZES)
def test_number_of_entries(entry_bytes: int) -> None:
    assert [ring_entries(4096 << order, entry_bytes) for order in range(5)] == SIZES[entry_bytes]


@pytest.mark.parametrize(
    ("n_bytes", "entry_bytes"), [(0, 8), (64, 8), (4096, 0), (4096, 4033), (65537, 8), (-1, 8), (2**32 + 4096, 8)]
)
def test_no_ring_at_all(n_bytes: int, entry_bytes: int) -> None:
    assert ring_entries(n_bytes, entry_bytes) == 0


def test_an_entry_is_the_c_union_of_both_messages() -> None:
    packed = np.dtype([("a", "<u8"), ("b", "<u4")])
    padded = np.dtype([("a", "<u8"), ("b", "<u4")], align=True)
    three_words = np.dtype([("a", "<u4"), ("b", "<u4"), ("c", "<u4")], align=True)
    assert entry_bytes_of(packed, packed) == 12
    assert entry_bytes_of(padded, padded) == 16
    assert entry_bytes_of(three_words, np.dtype("<u8")) == 16
    assert entry_bytes_of(REQUEST, RESPONSE) == 112


def test_golden_bytes_of_a_short_exchange() -> None:
    """Two requests of 8 bytes, one answer of 4: each word and each entry where Xen's header puts it."""
    memory = bytearray(b"\xee" * 4096)
    front = FrontRing.create(memory, np.dtype("<u8"), np.dtype("<u4"))
    assert memory[:64] == bytes.fromhex("00000000 01000000 00000000 01000000") + bytes(48)
    assert memory[64:] == b"\xee" * 4032, "entries are not touched"

    back = BackRing.attach(memory, np.dtype("<u8"), np.dtype("<u4"))
    assert memory[:64] == bytes.fromhex("00000000 01000000 00000000 01000000") + bytes(48)

    front.push(np.array([0x1122334455667788, 0x99], "<u8"))
    assert memory[:16] == bytes.fromhex("02000000 01000000 00000000 01000000")
    assert memory[64:88] == bytes.fromhex("8877665544332211 9900000000000000") + b"\xee" * 8

    assert back.take_batch().tolist() == [0x1122334455667788, 0x99]
    assert memory[:16] == bytes.fromhex("02000000 01000000 00000000 01000000"), "the consumer index is private"
    back.push(np.array([0xAABBCCDD], "<u4"))
    assert memory[:16] == bytes.fromhex("02000000 01000000 01000000 01000000")
    assert memory[64:88] == bytes.fromhex("ddccbbaa44332211 9900000000000000") + b"\xee" * 8

    assert front.take_batch().tolist() == [0xAABBCCDD]
    assert not front.final_check()
    assert not back.final_check()
    assert memory[:16] == bytes.fromhex("02000000 03000000 01000000 02000000")


@pytest.mark.parametrize("pages", range(1, 17))
def test_any_number_of_pages(pages: int) -> None:
    with FrontRing.create(bytearray(pages * 4096), REQUEST, RESPONSE) as front:
        assert front.size == ring_entries(pages * 4096, 112)
        assert front.free == front.size


@pytest.mark.parametrize("n_bytes", [0, 100, 17 * 4096])
def test_memory_that_holds_no_ring(n_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match="no ring"):
        FrontRing.create(bytearray(n_bytes), REQUEST, RESPONSE)
    with pytest.raises(InvalidRequest, match="no ring"):
        BackRing.attach(bytearray(n_bytes), REQUEST, RESPONSE)


def test_entries_smaller_than_a_message() -> None:
    with pytest.raises(InvalidRequest, match="no ring"):
        FrontRing.create(bytearray(4096), REQUEST, RESPONSE, entry_bytes=111)


def test_memory_that_is_not_aligned_or_not_writable() -> None:
    with pytest.raises(InvalidRequest, match="aligned"):
        FrontRing.create(memoryview(bytearray(4100))[4:], REQUEST, RESPONSE)
    with pytest.raises(InvalidRequest, match="writable"):
        FrontRing.create(memoryview(bytes(4096)), REQUEST, RESPONSE)
