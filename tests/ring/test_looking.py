# SPDX-License-Identifier: MIT
"""Ends of rings that live in a statistics object, and whoever looks at it, believing nothing of it."""

import fcntl
import os
import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paravirt.errors import AlreadyExists, Closed, InvalidRequest, PeerError
from paravirt.ring._core import ffi, lib
from paravirt.ring.looking import Batch, LookedObject, Record, Records, RingLabel, Wish, parse_layout
from paravirt.ring.memory import Mapping, create_object
from paravirt.ring.ring_statistics import statistics_of
from paravirt.ring.shared import BackRing, FrontRing

from .support import NEAR_WRAP, REQUEST, RESPONSE, answers, requests

LABEL = RingLabel("vtest", 7, "test", domid=1, peer_domid=0, granter_domid=1, refs=(8, 9), port=3, queue=1)
MESSAGES = (REQUEST, RESPONSE)
FOREVER = 2**63


class Place:
    """An object, both views of it, and a ring with both ends in it."""

    def __init__(self, *, start: int = 0) -> None:
        self.fd = create_object("memfd", lib.PV_LOOK_BYTES)
        self.records = Records(self.fd)
        self.looked = LookedObject(os.dup(self.fd))
        memory_fd = create_object("memfd", 8192)
        self.memory = Mapping(memory_fd, 8192)
        os.close(memory_fd)
        self.front = FrontRing.create(self.memory.view, *MESSAGES, record=self.claim(), start=start)
        self.back = BackRing.attach(self.memory.view, *MESSAGES, record=self.claim())

    def claim(self) -> Record:
        record = self.records.claim(LABEL)
        assert record is not None
        return record

    def copy(self, number: int) -> Any:
        copy = self.looked.copy(number)
        assert copy is not None
        return copy

    def exchange(self, n: int = 1, first_id: int = 0) -> None:
        """Requests, and the answers to them."""
        sent = requests(first_id, n)
        assert self.front.push(sent) == n
        taken = self.back.take_batch()
        assert (taken == sent).all()
        self.back.push(answers(taken))
        assert (self.front.take_batch() == answers(sent)).all()

    def batches(self) -> list[Batch]:
        return list(iter(self.looked.read_log, None))

    def close(self) -> None:
        self.front.close()
        self.back.close()
        self.looked.close()
        self.memory.close()
        os.close(self.fd)


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place(start=NEAR_WRAP)
    yield made
    made.close()


# What is shown


def test_both_ends_are_seen_as_they_count(place: Place) -> None:
    assert place.looked.live() == [0, 1]
    for n in (1, 5, 32):
        place.exchange(n)
    front, back = place.copy(0), place.copy(1)
    assert statistics_of(front.ring, is_front=True) == place.front.statistics()
    assert statistics_of(back.ring, is_front=False) == place.back.statistics()
    assert (front.ring.prod, front.ring.cons) == (NEAR_WRAP + 38, NEAR_WRAP + 38)
    assert (ffi.string(front.kind), ffi.string(front.protocol)) == (b"vtest", b"test")
    assert (front.device_id, front.queue, front.port, front.domid, front.granter_domid) == (7, 1, 3, 1, 1)
    assert list(front.refs)[: front.n_refs] == [8, 9]
    layouts = parse_layout(ffi.string(front.request), 112), parse_layout(ffi.string(front.response), 16)
    assert layouts == MESSAGES


def test_an_end_that_is_closed_is_gone_and_its_record_is_used_again(place: Place) -> None:
    before = place.copy(1).generation
    place.back.close()
    assert place.looked.live() == [0]
    assert place.looked.copy(1) is None
    place.back = BackRing.attach(place.memory.view, *MESSAGES, record=place.claim())
    assert place.copy(1).generation == before + 1
    assert statistics_of(place.copy(1).ring, is_front=False).requests == 0


def test_a_ring_that_cannot_be_made_gives_its_record_back(place: Place) -> None:
    record = place.claim()
    with pytest.raises(InvalidRequest):
        FrontRing.create(bytearray(32), *MESSAGES, record=record)
    place.front.push(requests(0, 1))
    with pytest.raises(PeerError):
        BackRing.attach(place.memory.view, *MESSAGES, record=place.claim())
    assert place.claim().number == record.number
    assert place.looked.live() == [0, 1]


def test_all_records_are_taken(place: Place) -> None:
    claimed = [place.records.claim(LABEL) for _ in range(lib.PV_LOOK_RECORDS)]
    assert sum(record is not None for record in claimed) == lib.PV_LOOK_RECORDS - 2
    assert claimed[-1] is None


def test_the_memory_stays_as_long_as_a_ring_lives_in_it(place: Place) -> None:
    del place.records
    place.exchange(3)
    assert place.front.statistics().requests == 3


def test_a_forked_child_neither_uses_nor_frees_what_its_parent_shows(place: Place) -> None:
    child = os.fork()
    if child == 0:
        try:
            place.front.push(requests(0, 1))
        except Closed:
            place.front.close()
            os._exit(0 if place.records.claim(LABEL) is None else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert place.looked.live() == [0, 1]
    place.exchange(2)


# Latency and age


def test_one_message_in_64_has_its_latency_measured(place: Place) -> None:
    for _ in range(10 * lib.PV_LOOK_SAMPLE):
        place.exchange()
    for number in (0, 1):
        assert 10 <= sum(place.copy(number).latency) <= 11


def test_every_message_has_while_it_is_wanted(place: Place) -> None:
    for number in (0, 1):
        place.looked.want(number, Wish.LATENCY, FOREVER)
    for n in (1, 2, 3, 32, 7):
        place.exchange(n)
    place.front.push(requests(0, 20))
    taken = place.back.take_batch()
    place.back.push(answers(taken[:5]))
    assert place.front.take(np.zeros(64, RESPONSE)) == 5
    for number in (0, 1):
        assert sum(place.copy(number).latency) == 45 + 5


def test_a_wish_runs_out(place: Place) -> None:
    place.looked.want(0, Wish.LATENCY | Wish.LOG, 1)
    place.looked.want(1, Wish.LATENCY, FOREVER)
    place.looked.want(1, Wish.LATENCY, 5)  # of somebody who wants less
    place.exchange(40)
    wanted = place.looked.head.wanted
    assert (wanted[0].latency_until_ns, wanted[0].tap_until_ns) == (0, 0)
    assert wanted[1].latency_until_ns == FOREVER
    assert sum(place.copy(0).latency) == 1
    assert sum(place.copy(1).latency) == 40


def test_buckets_follow_each_other_and_hold_what_they_say() -> None:
    starts = [lib.pv_look_bucket_ns(bucket) for bucket in range(lib.PV_LOOK_BUCKETS + 1)]
    assert starts == sorted(set(starts))
    assert starts[:6] == [0, 80, 96, 112, 128, 160]
    assert starts[-1] == 2**36


def age(stamps: list[tuple[int, int]], index: int, now_ns: int) -> tuple[int, int, int]:
    """(known, at least, at most) by stamps of (index, ns)."""
    record = ffi.new("struct pv_look_record *")
    for i, (stamped, ns) in enumerate(stamps):
        record.stamps[i].index, record.stamps[i].ns = stamped % 2**32, ns
    least, most = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    known = lib.pv_look_age(record, index % 2**32, now_ns, least, most)
    return known, least[0], most[0]


def test_ages_are_bounded_by_the_stamps_around() -> None:
    unknown = 2**64 - 1
    for start in (0, -3, 2**31 - 3):
        stamps = [(start, 100), (start + 8, 200), (start + 16, 400)]
        assert age(stamps, start + 8, 1000) == (1, 800, 800)
        assert age(stamps, start + 9, 1000) == (1, 600, 800)
        assert age(stamps, start + 17, 1000) == (1, 0, 600)
        assert age(stamps, start - 1, 1000) == (1, 900, unknown)
    assert age([], 5, 1000) == (0, 0, unknown)
    assert age([(0, 300), (8, 200)], 4, 1000) == (1, 700, 700)  # of a process that lies
    assert age([(0, 5000)], 0, 1000) == (1, 0, 0)


def test_what_finds_the_ring_empty_is_stamped(place: Place) -> None:
    place.exchange(3)
    place.front.push(requests(0, 2))
    copy = place.copy(0)
    stamped = {copy.stamps[i].index for i in range(lib.PV_LOOK_STAMPS) if copy.stamps[i].ns}
    assert NEAR_WRAP + 3 in stamped


# The log


def streams(batches: list[Batch]) -> dict[tuple[int, bool], bytes]:
    """All bytes of each end and direction; the indexes must follow each other."""
    found: dict[tuple[int, bool], bytes] = {}
    following: dict[tuple[int, bool], int] = {}
    for batch in batches:
        key = batch.record, batch.taken
        assert following.get(key, batch.index) == batch.index
        assert len(batch.data) == batch.count * batch.message_bytes
        following[key] = (batch.index + batch.count) % 2**32
        found[key] = found.get(key, b"") + batch.data
    return found


def test_the_log_has_every_message_of_both_ends_in_order(place: Place) -> None:
    place.looked.open_log()
    for number in (0, 1):
        place.looked.want(number, Wish.LOG, FOREVER)
    sent, batches = [], []
    for i in range(1100):  # several times around the log
        place.exchange(i % 32 + 1, first_id=i * 32)
        sent.append(requests(i * 32, i % 32 + 1))
        if i % 100 == 0:
            batches += place.batches()
    batches += place.batches()
    asked, answered = np.concatenate(sent), answers(np.concatenate(sent))
    assert sum(len(batch.data) for batch in batches) > 2 * lib.PV_LOOK_TAP_BYTES
    assert streams(batches) == {
        (0, False): asked.tobytes(),
        (0, True): answered.tobytes(),
        (1, True): asked.tobytes(),
        (1, False): answered.tobytes(),
    }
    assert all(a.time_ns <= b.time_ns for a, b in pairwise(batches))
    assert place.looked.log_lost == 0


def test_slots_that_are_filled_in_place_are_logged_too(place: Place) -> None:
    place.looked.open_log()
    place.looked.want(0, Wish.LOG, FOREVER)
    slots = place.front.reserve(3)
    slots[:] = requests(5, 3)
    place.front.commit(3)
    del slots
    (batch,) = place.batches()
    assert batch.data == requests(5, 3).tobytes()
    assert (batch.index, batch.count, batch.message_bytes, batch.taken) == (NEAR_WRAP, 3, 112, False)


def test_a_log_that_nobody_reads_loses_messages_and_stops_nobody(place: Place) -> None:
    place.looked.open_log()
    place.looked.want(0, Wish.LOG, FOREVER)
    for i in range(1000):
        place.exchange(32, first_id=i)
    logged = sum(batch.count for batch in place.batches())
    assert 0 < logged < 64_000
    assert logged + place.looked.log_lost == 64_000
    place.exchange(1, first_id=77)
    assert place.batches()[0].data == requests(77, 1).tobytes()


def test_one_recorder_at_a_time(place: Place) -> None:
    with LookedObject(os.dup(place.fd)) as other:
        place.looked.open_log()
        with pytest.raises(AlreadyExists):
            other.open_log()
        place.looked.close_log()
        other.open_log()


def test_the_memory_of_the_log_is_given_back(place: Place) -> None:
    before = os.fstat(place.fd).st_blocks
    place.looked.open_log()
    place.looked.want(0, Wish.LOG, FOREVER)
    for _ in range(100):
        place.exchange(32)
    assert os.fstat(place.fd).st_blocks > before + 100
    place.looked.close_log()
    assert os.fstat(place.fd).st_blocks <= before


def test_rings_of_several_threads_log_side_by_side() -> None:
    """Three rings write while a fourth thread reads: nothing is mixed up, whatever is lost is counted."""
    fd = create_object("memfd", lib.PV_LOOK_BYTES)
    records, rounds = Records(fd), 1500
    pairs: list[Any] = []
    for _ in range(3):
        memory = np.zeros(512, np.uint64)
        pairs.append(FrontRing.create(memory, REQUEST, RESPONSE, record=records.claim(LABEL)))
        pairs.append(BackRing.attach(memory, REQUEST, RESPONSE))

    def run(front: Any, back: Any) -> None:
        out = np.zeros(8, RESPONSE)
        for i in range(rounds):
            front.push(requests(i * 8, i % 8 + 1))
            back.push(answers(back.take_batch()))
            front.take(out)

    with LookedObject(fd) as looked:
        looked.open_log()
        for number in range(3):
            looked.want(number, Wish.LOG, FOREVER)
        threads = [threading.Thread(target=run, args=(pairs[2 * i], pairs[2 * i + 1])) for i in range(3)]
        for thread in threads:
            thread.start()
        n = 0
        while any(thread.is_alive() for thread in threads):
            for batch in iter(looked.read_log, None):
                ids = np.frombuffer(batch.data, RESPONSE if batch.taken else REQUEST)
                assert (
                    ids == (answers if batch.taken else lambda sent: sent)(requests(int(ids["id"][0]), len(ids)))
                ).all()
                n += len(ids)
        for thread in threads:
            thread.join()
        n += sum(batch.count for batch in iter(looked.read_log, None))
        assert n + looked.log_lost == 3 * 2 * sum(i % 8 + 1 for i in range(rounds))


# A process that lies


def test_nothing_that_stands_in_an_object_breaks_whoever_looks(place: Place) -> None:
    chance = random.Random(5)
    place.looked.open_log()
    for _ in range(150):
        offset = chance.choice([0, 128, 4096, 4096 + 8, lib.PV_LOOK_TAP_AT, chance.randrange(lib.PV_LOOK_BYTES)])
        junk = chance.choice([chance.randbytes(3000), b"\xff" * 3000, bytes(3000), b"\1\0\0\0" * 750])
        os.pwrite(place.fd, junk[: lib.PV_LOOK_BYTES - offset], offset)
        for number in place.looked.live():
            copy = place.looked.copy(number)
            if copy is not None:
                assert copy.n_refs <= lib.PV_LOOK_REFS
                assert copy.number == number
                parse_layout(ffi.string(copy.request), 112)
        for _ in range(50):
            try:
                batch = place.looked.read_log()
            except PeerError:
                continue
            if batch is None:
                break
            assert 0 < len(batch.data) == batch.count * batch.message_bytes <= lib.PV_RING_MAX_BYTES
            assert batch.record < lib.PV_LOOK_RECORDS
    head = place.looked.head
    head.tap_tail = head.tap_head = 0


LIES = {
    "endless": {"n": 2**32 - 1, "message_bytes": 2**32 - 1},
    "wraps to little": {"n": 2**31, "message_bytes": 2},
    "empty": {"n": 0, "message_bytes": 112},
    "beyond what was logged": {"n": 600, "message_bytes": 100},
    "no such record": {"n": 1, "message_bytes": 8, "record": lib.PV_LOOK_RECORDS},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lying_entry_is_skipped(place: Place, lie: dict[str, int]) -> None:
    head = place.looked.head
    entry = ffi.new("struct pv_look_entry *", {"position": 1, **lie})
    place.looked.open_log()
    os.pwrite(place.fd, bytes(ffi.buffer(entry)), lib.PV_LOOK_TAP_AT)
    os.pwrite(place.fd, (4096).to_bytes(8, "little"), ffi.offsetof("struct pv_look_head", "tap_tail"))
    with pytest.raises(PeerError):
        place.looked.read_log()
    assert head.tap_head == 4096
    assert place.looked.read_log() is None


@pytest.mark.parametrize("tail", [64 + lib.PV_LOOK_TAP_BYTES, 2**64 - 64, 63, 2**64 - 1])
def test_a_lying_end_of_the_log_is_skipped(place: Place, tail: int) -> None:
    place.looked.open_log()
    os.pwrite(place.fd, tail.to_bytes(8, "little"), ffi.offsetof("struct pv_look_head", "tap_tail"))
    with pytest.raises(PeerError):
        place.looked.read_log()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 500,
        b'[["<u8",' * 60 + b"[2]" + b"]" * 120,
        b"7",
        b'"O"',
        b'"<u8"',
        b'["id"]',
        b'{"id":["O",0]}',
        b'{"id":["<u8",-8],"":8}',
        b'{"id":["<u8",4],"":8}',
        b'{"id":[["<u8",[1000000000000]],0],"":8}',
        b'{"id":[["u1",[-1]],0],"":8}',
        b'{"id":["V2147483647",0],"":8}',
        b'{"id":["<u4",0],"":4}',
        b'{"":8}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_layout(text: bytes) -> None:
    assert parse_layout(text, 8) is None


def test_a_layout_is_told_as_it_is(place: Place) -> None:
    """Gaps, arrays and structures in it, too; one that is too long to say is left out."""
    segment = np.dtype({"names": ["ref", "last"], "formats": ["<u4", "u1"], "offsets": [0, 5], "itemsize": 8})
    told = np.dtype({"names": ["id", "all"], "formats": ["<u8", (segment, (3, 2))], "offsets": [8, 16], "itemsize": 72})
    long = np.dtype([(f"a_long_name_of_a_field_{i}", "<u4") for i in range(40)])
    place.front.close()
    place.front = FrontRing.create(place.memory.view, told, long, record=place.claim())
    copy = place.copy(0)
    assert parse_layout(ffi.string(copy.request), 72) == told
    assert parse_layout(ffi.string(copy.request), 80) is None
    assert ffi.string(copy.response) == b""


def test_dom0_maps_only_its_wishes_writable(place: Place) -> None:
    """A tool that errs cannot change a ring; and the process cannot take the object away under it."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:paravirt" in line]
    start = int(ffi.cast("uintptr_t", place.looked.head))
    rights = {line.split("-")[0]: line.split()[1] for line in lines}
    assert rights[f"{start:x}"] == "rw-s"
    assert rights[f"{start + 4096:x}"] == "r--s"
    assert fcntl.fcntl(place.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    with pytest.raises(PermissionError):
        os.ftruncate(place.fd, 4096)
