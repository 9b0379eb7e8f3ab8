# SPDX-License-Identifier: MIT
"""What an end of a block device's queue counts in its record, and what Dom0 sees of it."""

import threading
from collections.abc import Iterator

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.ring.blkif_counters import NAMES, BlkifCounters, Counting, counters_of
from paravirt.ring.shared import BackRing, FrontRing

from .test_looking import MESSAGES, Place


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.close()


def test_what_a_block_device_counts_is_seen(place: Place) -> None:
    back = place.back.core
    assert counters_of(place.copy(1)) is None
    counters = ffi.cast("struct pv_blkif_counters *", lib.pv_look_counters(back, lib.PV_LOOK_COUNTS_BLKIF))
    assert counters_of(place.copy(1)) == BlkifCounters()
    more = ffi.new("struct pv_blkif_counters *", {"reads": 3, "read_bytes": 2**40, "no_memory": 1})
    lib.pv_blkif_count(counters, more)
    lib.pv_blkif_count(counters, more)
    assert counters_of(place.copy(1)) == BlkifCounters(reads=6, read_bytes=2**41, no_memory=2)
    assert counters_of(place.copy(0)) is None


def test_counters_do_not_outlive_their_end(place: Place) -> None:
    counters = ffi.cast("struct pv_blkif_counters *", lib.pv_look_counters(place.back.core, lib.PV_LOOK_COUNTS_BLKIF))
    counters.reads = 5
    place.back.close()
    place.back = BackRing.attach(place.memory.view, *MESSAGES, record=place.claim())
    assert counters_of(place.copy(1)) is None
    lib.pv_look_counters(place.back.core, lib.PV_LOOK_COUNTS_BLKIF)
    assert counters_of(place.copy(1)) == BlkifCounters()


def test_a_ring_in_no_record_has_no_counters_there(place: Place) -> None:
    front = FrontRing.create(bytearray(4096 + 8), *MESSAGES)
    assert lib.pv_look_counters(front.core, lib.PV_LOOK_COUNTS_BLKIF) == ffi.NULL
    front.close()


def test_counting_moves_with_the_ring_and_stays_when_it_is_closed(place: Place) -> None:
    batch = ffi.new("struct pv_blkif_batch *")
    counting = Counting(batch)
    more = ffi.new("struct pv_blkif_counters *", {"writes": 2, "written_bytes": 1024})
    lib.pv_blkif_count(counting.core, more)
    counting.show_in(place.back)
    lib.pv_blkif_count(batch.counters, more)
    assert counters_of(place.copy(1)) == BlkifCounters.of(counting.core) == BlkifCounters(writes=4, written_bytes=2048)
    counting.show_in(place.back)  # harmless when repeated
    counting.show_in(None)
    place.back.close()
    lib.pv_blkif_count(counting.core, more)
    assert BlkifCounters.of(batch.counters) == BlkifCounters(writes=6, written_bytes=3072)


def test_all_names_and_their_sum() -> None:
    core = ffi.new("struct pv_blkif_counters *")
    for number, name in enumerate(NAMES):
        setattr(core, name, number)
    assert ffi.sizeof("struct pv_blkif_counters") == 8 * len(NAMES) <= 8 * lib.PV_LOOK_COUNTERS
    counted = BlkifCounters.of(core)
    assert list(ffi.unpack(ffi.cast("uint64_t *", core), len(NAMES))) == list(range(len(NAMES)))
    assert counted + counted == BlkifCounters(*(2 * number for number in range(len(NAMES))))


def test_no_counter_is_seen_torn(place: Place) -> None:
    """All of a batch's counters go up by 2**32 - 1, which would show in the halves of a value that is not whole."""
    counters = ffi.cast("struct pv_blkif_counters *", lib.pv_look_counters(place.back.core, lib.PV_LOOK_COUNTS_BLKIF))
    step = 2**32 - 1
    more = ffi.new("struct pv_blkif_counters *", dict.fromkeys(NAMES, step))
    stopping = threading.Event()

    def count() -> None:
        while not stopping.is_set():
            for _ in range(100):
                lib.pv_blkif_count(counters, more)

    thread = threading.Thread(target=count)
    thread.start()
    last = BlkifCounters()
    for _ in range(3000):
        seen = counters_of(place.copy(1))
        assert seen is not None
        for name in NAMES:
            value = getattr(seen, name)
            assert value % step == 0
            assert value >= getattr(last, name)
        last = seen
    stopping.set()
    thread.join()
