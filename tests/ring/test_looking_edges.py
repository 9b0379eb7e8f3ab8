# SPDX-License-Identifier: MIT
"""Looking at live rings: what the kernel refuses, what happens meanwhile, what nobody writes who keeps the rules."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paravirt.errors import Closed, PeerError
from paravirt.ring._core import ffi, lib
from paravirt.ring.looking import LookedObject, Records, RingLabel, Wish
from paravirt.ring.memory import create_object
from paravirt.ring.shared import BackRing, FrontRing

from ..faults import failing
from .support import C_CORE, DEADLINE_S, HERE, REQUEST, RESPONSE, RING_SOURCES, answers, compile_c, requests, run_c

LABEL = RingLabel("vtest", 7, "test", domid=1, peer_domid=0, granter_domid=1, refs=(8,), port=3, queue=0)
FOREVER = 2**63


@pytest.fixture
def fd() -> Iterator[int]:
    made = create_object("memfd", lib.PV_LOOK_BYTES)
    yield made
    os.close(made)


@pytest.fixture
def looked(fd: int) -> Iterator[LookedObject]:
    with LookedObject(os.dup(fd)) as made:
        yield made


def front_ring(fd: int) -> tuple[FrontRing, BackRing]:
    """A front end of 128 slots in record 0, and its peer."""
    memory, record = np.zeros(16384 // 8, np.uint64), Records(fd).claim(LABEL)
    assert record is not None
    return FrontRing.create(memory, REQUEST, RESPONSE, record=record), BackRing.attach(memory, REQUEST, RESPONSE)


def test_every_place(tmp_path: Path) -> None:
    """Whoever looks is interrupted by who is looked at, and the other way round, at every access."""
    sources = [HERE / "look_again.c", *(C_CORE / f"{n}.c" for n in (*RING_SOURCES, "pv_look", "pv_look_read"))]
    program = compile_c(tmp_path / "look_again", sources, f"-I{HERE}", '-DPV_ATOMIC_SHIM="interrupt_shim.h"')
    said = run_c([program], timeout=DEADLINE_S)
    assert int(said.removesuffix(" places\n")) > 30


@pytest.mark.parametrize("call", [1, 2], ids=["all of it", "its first page"])
def test_an_object_that_cannot_be_mapped_leaves_nothing_behind(fd: int, call: int) -> None:
    before = Path("/proc/self/maps").read_text().count("memfd:paravirt")
    given = os.dup(fd)
    with failing("mmap", errno.ENOMEM, at=call) as fault, pytest.raises(OSError, match="Cannot allocate"):
        LookedObject(given)
    assert fault.calls == call
    assert Path("/proc/self/maps").read_text().count("memfd:paravirt") == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(given)


def test_closing_twice_does_no_harm(fd: int) -> None:
    looked = LookedObject(os.dup(fd))
    looked.close()
    looked.close()
    with pytest.raises(Closed):
        looked.copy(0)


def test_there_is_no_record_behind_the_last(looked: LookedObject) -> None:
    assert looked.copy(lib.PV_LOOK_RECORDS) is None
    assert looked.copy(2**32 - 1) is None


def test_memory_that_cannot_be_given_back_is_said(fd: int) -> None:
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert lib.pv_look_tap_free(reading) == -errno.EBADF
    os.close(reading)
    assert lib.pv_look_tap_free(fd) == 0


def test_a_longer_wish_stands(looked: LookedObject) -> None:
    looked.want(3, Wish.LOG, FOREVER)
    looked.want(3, Wish.LOG, 5)
    assert looked.head.wanted[3].tap_until_ns == FOREVER


def test_more_on_the_way_than_can_be_stamped(fd: int, looked: LookedObject) -> None:
    """Those without a stamp are not measured, and the ring goes on; stamps come free when the answers do."""
    front, back = front_ring(fd)
    looked.want(0, Wish.LATENCY, FOREVER)
    out = np.zeros(128, RESPONSE)
    for measured in (lib.PV_LOOK_STAMPS, 2 * lib.PV_LOOK_STAMPS):
        for i in range(100):
            assert front.push(requests(i, 1)) == 1
        back.push(answers(back.take_batch()))
        assert front.take(out) == 100
        copy = looked.copy(0)
        assert copy is not None
        assert sum(copy.latency) == measured
    front.close()


def test_a_reader_that_is_ahead_of_the_log_costs_messages_only(fd: int, looked: LookedObject) -> None:
    front, back = front_ring(fd)
    looked.open_log()
    looked.want(0, Wish.LOG, FOREVER)
    looked.head.tap_head = 64
    assert front.push(requests(0, 3)) == 3
    assert looked.log_lost == 3
    looked.head.tap_head = 0
    assert front.push(requests(3, 1)) == 1
    batch = looked.read_log()
    assert batch is not None
    assert batch.data == requests(3, 1).tobytes()
    assert len(back.take_batch()) == 4
    front.close()


def test_a_batch_that_is_being_written_is_not_there_yet(looked: LookedObject) -> None:
    looked.open_log()
    looked.head.tap_tail = 128
    assert looked.read_log() is None
    assert looked.head.tap_head == 0
    looked.head.tap_tail = 0


def test_a_place_where_no_entry_can_stand_is_skipped(looked: LookedObject) -> None:
    looked.head.tap_head, looked.head.tap_tail = 32, 96
    with pytest.raises(PeerError):
        looked.read_log()
    assert looked.head.tap_head == 64
    looked.head.tap_tail = 64


def test_ages_need_no_order_of_the_stamps() -> None:
    record = ffi.new("struct pv_look_record *")
    for i, (index, ns) in enumerate([(8, 200), (0, 100), (24, 800), (16, 400)]):
        record.stamps[i].index, record.stamps[i].ns = index, ns
    least, most = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    for index, bounds in {9: (600, 800), 3: (800, 900), 20: (200, 600)}.items():
        assert lib.pv_look_age(record, index, 1000, least, most) == 1
        assert (least[0], most[0]) == bounds
