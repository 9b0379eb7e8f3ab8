# SPDX-License-Identifier: MIT
"""Filters: they change no data, and each does what it is for."""

import errno
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.backend.disks import FILTERS, Disk, MemoryDisk, open_disk
from paravirt.backend.disks.filters.around import OPERATIONS
from paravirt.backend.disks.filters.base import Filter
from paravirt.backend.disks.filters.delay import DelayFilter
from paravirt.backend.disks.filters.error import ErrorFilter, Failures
from paravirt.backend.disks.filters.rate import RateFilter
from paravirt.backend.disks.filters.readahead import ReadaheadFilter
from paravirt.backend.disks.filters.stats import StatsFilter
from paravirt.backend.token_bucket import TokenBucket
from paravirt.errors import InvalidRequest
from tests.backend import disk_model
from tests.backend.disk_model import Step, data_of, raises, read, write

SIZE = 256 << 10
N_SECTORS = SIZE // 512

TRANSPARENT = [
    "delay:memory",
    "error,call=1000000:memory",
    "stats:memory",
    "rate,iops=1000000000:memory",
    "readahead,window=4k:memory",
    "readahead,window=32k:delay,flush=0s:stats:memory",
]


@pytest.mark.parametrize("spec", TRANSPARENT)
@settings(max_examples=15, deadline=None)
@given(todo=disk_model.steps(N_SECTORS, "write", "read", "read", "discard", "zeroes", "flush"))
def test_a_filter_changes_no_data(spec: str, todo: list[Step]) -> None:
    driver, _, rest = spec.partition(":")
    disk = open_disk(driver, f"{rest}:256k", read_only=False)
    assert disk.memory is disk.fd is None
    disk_model.follow(disk, todo, bytearray(SIZE)).close()


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_a_filter_is_like_the_disk_below(name: str, tmp_path: Path) -> None:
    options = {"rate": ",iops=100", "cow": f",overlay={tmp_path}/overlay"}.get(name, "")
    disk = open_disk(f"{name}{options}", "memory,sector-size=4096:1M", read_only=False)
    assert (disk.size_bytes, disk.sector_size, disk.can_discard, disk.read_only) == (1 << 20, 4096, True, False)
    disk.close()
    disk.close()


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("delay,read=1:null:1M", "option read of delay: is '1', not a time such as"),
        ("delay,sleep=1s:null:1M", "delay: has no option 'sleep'; there are read, write, flush, discard, zeroes, all"),
        ("error,on=read+fly:null:1M", "option on of error: is 'read.fly', not of read, write"),
        ("error,errno=EWHAT:null:1M", "option errno of error: is 'EWHAT', not the name of an error"),
        ("error,range=5:null:1M", "option range of error: is '5', not FIRST-END"),
        ("error,range=-5-6:null:1M", "option range of error: is '-5-6', not FIRST-END"),
        ("error,probability=2:null:1M", "option probability of error: is '2', not a number from 0 to 1"),
        ("rate:null:1M", "rate: has neither iops nor bytes"),
        ("rate,iops=5,bytes-burst=5:null:1M", "rate: has a burst without the rate"),
        ("readahead,window=1G:null:1M", "option window of readahead: is '1073741824', not at most"),
        ("readahead,window=1:null:1M", "option window of readahead: '1' is not a positive multiple of 4096"),
        ("cow:null:1M", "cow: needs an option overlay"),
        ("delay:tape:1M", "unknown disk driver 'tape'"),
        ("delay:1M", "'1M' is not a disk"),
        ("delay:" * 16 + "null:1M", "more than 16 layers"),
        ("delay:" * 4000 + "null:1M", "more than 16 layers"),
    ],
)
def test_what_is_wrong_is_named(spec: str, wrong: str) -> None:
    driver, _, rest = spec.partition(":")
    with pytest.raises(InvalidRequest, match=wrong):
        open_disk(driver, rest, read_only=False)


def test_fifteen_filters_are_not_too_many() -> None:
    disk = open_disk("delay", "delay:" * 14 + "memory:1M", read_only=False)
    write(disk, b"x" * 512, at=0)
    assert read(disk, 512, at=0) == b"x" * 512
    disk.close()


class Recorder(MemoryDisk):
    """Says what reached it."""

    def __init__(self) -> None:
        super().__init__("1M", False)
        self.reads: list[tuple[int, int]] = []
        self.bad: range | None = None

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        length = sum(map(len, buffers))
        self.reads.append((offset, length))
        if self.bad is not None and offset < self.bad.stop and offset + length > self.bad.start:
            raise OSError(errno.EIO, "bad")
        super().preadv(buffers, offset)

    def current_size(self) -> int:
        self.size_bytes *= 2
        return self.size_bytes


def test_growth_is_seen_through_a_filter() -> None:
    disk = Filter(Recorder())
    assert disk.current_size() == disk.size_bytes == 2 << 20


def test_delay_waits_before_the_named_operation() -> None:
    waited: list[float] = []
    disk = DelayFilter(MemoryDisk("1M", False), {"read": 0.001, "flush": 2}, wait=waited.append)
    read(disk, 512, at=0)
    assert waited == [0.001]
    write(disk, b"x" * 512, at=0)
    disk.flush()
    assert waited == [0.001, 2]


def test_all_is_for_operations_that_are_not_named() -> None:
    disk = open_disk("delay,read=1ms,all=2s", "memory:1M", read_only=False)
    assert isinstance(disk, DelayFilter)
    assert [disk.wait_s(operation, 0) for operation in OPERATIONS] == [0.001, 2, 2, 2, 2]


def test_a_wait_can_be_interrupted() -> None:
    disk = open_disk("stats:delay,flush=1000s", "memory:1M", read_only=False)
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(raises(disk.flush)))
    thread.start()
    while thread.is_alive():
        disk.interrupt()
        thread.join(0.01)
    assert found == [errno.ECANCELED]
    write(disk, b"x" * 512, at=0)
    disk.close()


def failing(options: str, calls: int = 12) -> list[int]:
    """The numbers of the reads that fail."""
    disk = open_disk(f"error{options}", "memory:1M", read_only=False)
    failed = [i for i in range(1, calls + 1) if raises(read_sector, disk) == errno.EIO]
    assert isinstance(disk, ErrorFilter)
    assert (disk.calls, disk.failed) == (calls, len(failed))
    return failed


def read_sector(disk: Disk) -> None:
    read(disk, 512, at=0)


@pytest.mark.parametrize("call", range(1, 5))
def test_the_call_with_a_number_fails(call: int) -> None:
    assert failing(f",call={call}") == [call]


def test_which_calls_fail() -> None:
    assert failing("") == list(range(1, 13))
    assert failing(",every=4") == [4, 8, 12]
    assert failing(",every=4,times=2") == [4, 8]
    assert failing(",times=3") == [1, 2, 3]
    assert failing(",every=5,call=2") == [2, 5, 10]
    assert failing(",probability=0") == []
    assert failing(",probability=1") == list(range(1, 13))
    some = failing(",probability=0.5,seed=7", 100)
    assert 20 < len(some) < 80
    assert some == failing(",probability=0.5,seed=7", 100) != failing(",probability=0.5,seed=8", 100)


def test_only_chosen_operations_fail_with_the_chosen_error() -> None:
    disk = open_disk("error,on=write+flush,errno=ENOSPC", "memory:1M", read_only=False)
    assert raises(disk.pwritev, [memoryview(b"x" * 512)], 0) == errno.ENOSPC
    assert raises(disk.flush) == errno.ENOSPC
    for call in (disk.discard, disk.write_zeroes):
        assert raises(call, 0, 512) is None
    assert read(disk, 512, at=0) == bytes(512)  # what failed was not done


def test_only_calls_that_touch_the_range_fail() -> None:
    disk = open_disk("error,range=4096-8192", "memory:1M", read_only=False)
    for offset, length, fails in ((0, 4096, False), (0, 4608, True), (7680, 512, True), (8192, 512, False)):
        assert (raises(disk.discard, offset, length) == errno.EIO) == fails
    assert raises(disk.flush) is None


def test_failures_can_be_had_without_a_spec() -> None:
    disk = ErrorFilter(MemoryDisk("1M", False), Failures(operations=("flush",), code=errno.ENOSPC))
    assert raises(disk.flush) == errno.ENOSPC
    disk.close()


def test_stats_count() -> None:
    disk = StatsFilter(ErrorFilter(MemoryDisk("1M", False), Failures(operations=("discard",))))
    for _ in range(3):
        read(disk, 512, 1024, at=0)
    disk.flush()
    assert raises(disk.discard, 0, 4096) == errno.EIO
    counters = disk.counters
    assert (counters["read"].calls, counters["read"].n_bytes, counters["read"].errors) == (3, 3 * 1536, 0)
    assert (counters["discard"].calls, counters["discard"].n_bytes, counters["discard"].errors) == (1, 0, 1)
    assert counters["write"].calls == 0
    for each in counters.values():
        assert sum(each.latency) == each.calls
        assert each.longest_ns <= each.busy_ns
        highest = max((i for i, n in enumerate(each.latency) if n), default=0)
        assert each.longest_ns < 1 << highest if each.calls else each.longest_ns == 0
    disk.close()


def test_stats_are_in_a_file_while_the_disk_is_in_use_and_after(tmp_path: Path) -> None:
    path = tmp_path / "stats,1.json"
    disk = open_disk(f"stats,file={str(path).replace(',', '%2C')}", "memory:1M", read_only=False)
    read(disk, 512, at=0)
    assert json.loads(path.read_text())["read"]["calls"] == 1
    read(disk, 512, at=0)
    disk.close()
    assert json.loads(path.read_text())["read"]["calls"] == 2
    disk.close()
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_goes_on_without_a_place_for_its_stats(tmp_path: Path) -> None:
    disk = open_disk(f"stats,file={tmp_path}/none/x", "memory:1M", read_only=False)
    assert read(disk, 512, at=0) == bytes(512)
    disk.close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_full_bucket_gives_a_burst_and_then_its_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 5, clock=clock)
    assert [bucket.take(1) for _ in range(5)] == [0] * 5
    assert bucket.take(1) == pytest.approx(0.1)
    assert bucket.take(2) == pytest.approx(0.3)
    clock.sleep(0.3)
    assert bucket.take(1) == pytest.approx(0.1)
    clock.sleep(1000)
    assert [bucket.take(1) for _ in range(5)] == [0] * 5
    assert bucket.take(100) == pytest.approx(10)  # more than the burst passes, too


def test_a_burst_that_is_not_given() -> None:
    assert TokenBucket(1000).burst == 100
    assert TokenBucket(2).burst == 1


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 40)), max_size=40))
def test_a_bucket_never_lets_more_through(asked: list[tuple[float, float]]) -> None:
    clock = Clock()
    bucket, start, done, largest = TokenBucket(10, 20, clock=clock), clock.now, 0.0, 0.0
    for pause_s, n in asked:
        clock.sleep(pause_s)
        clock.sleep(bucket.take(n))
        done, largest = done + n, max(largest, n)
        assert done <= (clock.now - start) * 10 + 20 + 1e-6


def test_rate_of_operations_and_bytes() -> None:
    clock = Clock()
    disk = RateFilter(
        MemoryDisk("1M", False),
        operations=TokenBucket(10, 1, clock=clock),
        n_bytes=TokenBucket(512, 512, clock=clock),
        wait=clock.sleep,
    )
    start = clock.now
    for _ in range(11):
        disk.flush()  # only operations are counted
    assert clock.now - start == pytest.approx(1)
    for _ in range(4):
        read(disk, 1024, at=0)
    # The slower of both counts: eight seconds' worth of bytes, less the one that was there.
    assert clock.now - start == pytest.approx(1 + 7)
    disk.close()


def test_rate_from_a_spec() -> None:
    disk = open_disk("rate,iops=1000000,iops-burst=5,bytes=1G,bytes-burst=1M", "memory:1M", read_only=False)
    read(disk, 4096, at=0)
    disk.close()


def test_sequential_reads_are_read_ahead() -> None:
    below = Recorder()
    data = data_of(3, 1 << 20)
    write(below, data, at=0)
    disk = ReadaheadFilter(below, 64 << 10)
    for offset in range(0, 1 << 20, 4096):
        assert read(disk, 512, 3584, at=offset) == data[offset : offset + 4096]
    assert below.reads[:3] == [(0, 4096), (4096, 64 << 10), (4096 + (64 << 10), 64 << 10)]
    assert len(below.reads) == 17
    assert sum(below.reads[-1]) == 1 << 20  # not beyond the end


def test_other_reads_are_not() -> None:
    below = Recorder()
    disk = ReadaheadFilter(below, 64 << 10)
    places = [(offset, 4096) for offset in (8192, 0, 65536, 8192)] + [(12288, 65536)]
    for offset, length in places:
        read(disk, length, at=offset)
    assert below.reads == places


def test_a_bad_place_ahead_harms_nobody() -> None:
    below = Recorder()
    below.bad = range(16384, 16896)
    disk = ReadaheadFilter(below, 64 << 10)
    for offset in range(0, 16384, 4096):
        assert read(disk, 4096, at=offset) == bytes(4096)
    assert raises(disk.preadv, [memoryview(bytearray(4096))], 16384) == errno.EIO


def test_nothing_is_read_from_memory_once_the_size_has_changed() -> None:
    below = Recorder()
    disk = ReadaheadFilter(below, 64 << 10)
    for offset in (0, 4096, 8192):
        read(disk, 4096, at=offset)
    assert len(below.reads) == 2
    disk.current_size()
    for offset in (12288, 16384):
        read(disk, 4096, at=offset)
    assert len(below.reads) == 3  # again, and ahead from there
