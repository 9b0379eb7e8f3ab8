# SPDX-License-Identifier: MIT
"""Transfers over slots: cut, merged, copied, forgotten; against a backend that the test plays message by message."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from paravirt.errors import PeerError
from paravirt.protocol.blkif import INDIRECT_REQUEST, MAX_REQUEST_BYTES, Operation, Status
from paravirt.ring.blkqueue import ANSWERED, IN_FLIGHT, LATER, Transfer, TransferQueue, address_in, place_cell, read_now

from .blkfront_stage import BASE, N_SLOTS, PAGES, Stage, make_stage
from .test_blkfront_large import segments_of

DISK = 1 << 20
MAX_BYTES = 20 * 4096
BUFFER_PAGES = 32


@dataclass
class Played:
    """A queue, and a backend with a disk in memory that answers when told to."""

    stage: Stage
    queue: TransferQueue
    disk: bytearray

    def take(self) -> list[np.ndarray]:
        """Requests that came, each an array of one."""
        batch = self.stage.back.take_batch()
        return [batch[i : i + 1] for i in range(len(batch))]

    def shape(self, request: np.ndarray) -> tuple[Operation, int, int]:
        """Operation, offset and length in bytes of a request."""
        operation, segments = self._look(request)
        n = sum((last - first + 1) * 512 for _, first, last in segments)
        return (
            operation,
            int(request["sector"][0] if operation_of(request) != 6 else large(request)["sector"][0]) * 512,
            n,
        )

    def _look(self, request: np.ndarray) -> tuple[Operation, list[tuple[int, int, int]]]:
        if operation_of(request) == Operation.INDIRECT:
            return Operation(int(large(request)["indirect_op"][0])), segments_of(self.stage, request).tolist()
        n = int(request["nr_segments"][0])
        return Operation(operation_of(request)), request["seg"][0, :n].tolist()

    def serve(self, requests: list[np.ndarray], status: Status = Status.OKAY) -> None:
        """Do and answer them, in that order."""
        for request in requests:
            operation, segments = self._look(request)
            _, at, _ = self.shape(request)
            for gref, first, last in segments:
                n, read_only = (last - first + 1) * 512, operation is not Operation.READ
                page = self.stage.mapper.map(gref, read_only=read_only) + first * 512
                if operation is Operation.READ and status is Status.OKAY:
                    self.stage.data.view[page : page + n] = self.disk[at : at + n]
                elif status is Status.OKAY:
                    self.disk[at : at + n] = self.stage.data.view[page : page + n]
                self.stage.mapper.unmap(gref, read_only=read_only)
                at += n
            answer = np.zeros(1, self.stage.back.response)
            answer["id"], answer["operation"], answer["status"] = request["id"], operation, status
            self.stage.back.push(answer)
        while self.queue.take(self.stage.front):
            self.queue.complete()

    def run(self) -> None:
        """Issue and serve until nothing is left."""
        self.queue.issue(self.stage.front)
        while requests := self.take():
            self.serve(requests)
            self.queue.issue(self.stage.front)


def operation_of(request: np.ndarray) -> int:
    return int(request["operation"][0])


def large(request: np.ndarray) -> np.ndarray:
    return np.frombuffer(request.tobytes(), INDIRECT_REQUEST)


@pytest.fixture
def played() -> Iterator[Played]:
    with make_stage(buffer_pages=BUFFER_PAGES) as stage:
        queue = TransferQueue(stage.slots, N_SLOTS)
        queue.set_disk(DISK, 512, MAX_BYTES)
        queue.set_arena(stage.data.address, PAGES + BUFFER_PAGES, BASE)
        queue.set_buffer(PAGES, BUFFER_PAGES, PAGES + 1)
        yield Played(stage, queue, bytearray(random.Random(1).randbytes(DISK)))


def transfer(operation: Operation, *pieces: tuple[int, object]) -> Transfer:
    """Pieces are (offset, buffer)."""
    made = Transfer(len(pieces))
    for i, (offset, buffer) in enumerate(pieces):
        pointer, address, n_bytes = address_in(buffer)
        made.put(i, operation, offset, n_bytes, address)
        made.kept.append(pointer)
    return made


def reads(*pieces: tuple[int, int]) -> tuple[Transfer, list[bytearray]]:
    """Pieces are (offset, bytes)."""
    buffers = [bytearray(n_bytes) for _, n_bytes in pieces]
    return transfer(Operation.READ, *zip((offset for offset, _ in pieces), buffers, strict=True)), buffers


def test_neighbours_are_one_request_and_each_gets_its_bytes(played: Played) -> None:
    made, buffers = reads((0, 512), (512, 4096), (4608, 1024), (8192, 512), (8704, 512), (8192, 512))
    played.queue.submit(made)
    played.queue.issue(played.stage.front)
    requests = played.take()
    assert [played.shape(request)[1:] for request in requests] == [(0, 5632), (8192, 1024), (8192, 512)]
    assert played.queue.core.merged == 3
    played.serve(requests)
    assert made.done
    assert made.failure is None
    places = [(0, 512), (512, 4096), (4608, 1024), (8192, 512), (8704, 512), (8192, 512)]
    assert buffers == [played.disk[offset : offset + n] for offset, n in places]


def test_without_merging_each_piece_is_a_request(played: Played) -> None:
    played.queue.core.merge = 0
    made, buffers = reads((0, 512), (512, 512), (1024, 3 * MAX_BYTES // 2))
    played.queue.submit(made)
    played.queue.issue(played.stage.front)
    requests = played.take()
    assert [played.shape(request)[2] for request in requests] == [512, 512, MAX_BYTES, MAX_BYTES // 2]
    played.serve(requests)
    assert made.done
    assert buffers[2] == played.disk[1024 : 1024 + 3 * MAX_BYTES // 2]


def test_transfers_that_wait_are_merged_with_each_other(played: Played) -> None:
    """Nothing is merged across a flush, a write and a read, or backwards."""
    data = [os.urandom(4096) for _ in range(4)]
    asked = [
        transfer(Operation.WRITE, (0, data[0])),
        transfer(Operation.WRITE, (4096, data[1])),
        transfer(Operation.FLUSH_DISKCACHE, (0, b"")),
        transfer(Operation.WRITE, (8192, data[2])),
        reads((12288, 4096))[0],
        transfer(Operation.WRITE, (12288, data[3])),
        transfer(Operation.WRITE, (8192, data[0])),
    ]
    for number, each in enumerate(asked, 1):
        played.queue.submit(each, number)
    played.queue.issue(played.stage.front)
    requests = played.take()
    assert [played.shape(request) for request in requests] == [
        (Operation.WRITE, 0, 8192),
        (Operation.FLUSH_DISKCACHE, 0, 0),
        (Operation.WRITE, 8192, 4096),
        (Operation.READ, 12288, 4096),
        (Operation.WRITE, 12288, 4096),
        (Operation.WRITE, 8192, 4096),
    ]
    played.serve(requests)
    done = []
    while number := played.queue.next_done():
        done.append(number)
    assert done == [1, 2, 3, 4, 5, 6, 7]
    assert played.disk[:16384] == data[0] + data[1] + data[0] + data[3]


def test_an_error_of_a_merged_request_is_that_of_all_its_transfers(played: Played) -> None:
    (first, a), (second, b), (third, c) = reads((0, 512)), reads((512, 1024)), reads((8192, 512))
    for each in (first, second, third):
        played.queue.submit(each)
    played.queue.issue(played.stage.front)
    merged, other = played.take()
    played.serve([merged], Status.ERROR)
    played.serve([other])
    assert first.failure == (Status.ERROR, Operation.READ, 0, 512)
    assert second.failure == (Status.ERROR, Operation.READ, 512, 1024)
    assert third.failure is None
    assert (a[0], b[0]) == (bytes(512), bytes(1024))
    assert c[0] == played.disk[8192:8704]


def test_more_than_the_slots_hold_goes_out_as_answers_come(played: Played) -> None:
    chance = random.Random(3)
    places = [(chance.randrange(DISK // 512 - 64) * 512, chance.choice([512, 4096, 32768])) for _ in range(500)]
    made, buffers = reads(*places)
    behind = transfer(Operation.WRITE, (0, b"w" * 512))
    played.queue.submit(made)
    played.queue.submit(behind)
    before = bytes(played.disk)
    played.queue.issue(played.stage.front)
    assert played.queue.core.waiting == 2
    assert not made.done
    played.run()
    played.serve([])
    assert made.done
    assert behind.done, "after all that was before it"
    assert buffers == [before[offset : offset + n] for offset, n in places]
    assert played.stage.slots.free == N_SLOTS
    assert played.queue.core.n_free_shares == played.queue.core.n_shares
    assert (played.queue.core.waiting, played.stage.slots.in_flight) == (0, 0)


def test_many_small_pieces_do_not_take_the_shares_of_other_slots(played: Played) -> None:
    """A request has 256 pieces at most, and each slot that is left can still have one."""
    made, buffers = reads(*[(i * 512, 512) for i in range(1500)])
    played.queue.submit(made)
    played.queue.issue(played.stage.front)
    core = played.queue.core
    assert core.n_free_shares >= core.front.n_free
    requests = played.take()
    played.serve(requests)
    played.run()
    assert made.done
    assert b"".join(buffers) == played.disk[: 1500 * 512]
    assert core.n_free_shares == core.n_shares


def test_what_is_forgotten_is_not_written_and_not_sent(played: Played) -> None:
    many = [(i * 8192, 512) for i in range(N_SLOTS + 8)]
    sent, (first, *_) = reads(*many)
    waits, _ = reads((0, 512))
    last, after = reads((512, 512))
    for number, each in enumerate((sent, waits, last), 1):
        played.queue.submit(each, number)
    played.queue.issue(played.stage.front)
    requests = played.take()
    assert len(requests) == N_SLOTS
    played.queue.forget(waits)
    played.queue.forget(sent)
    played.queue.forget(sent)
    assert (sent.done, waits.done) == (True, True)
    played.serve(requests)
    played.run()
    assert first == bytes(512)
    assert last.done
    assert after[0] == played.disk[512:1024]
    assert played.queue.next_done() == 3
    assert played.queue.next_done() == 0
    assert played.queue.core.n_free_shares == played.queue.core.n_shares


def test_a_transfer_that_is_done_can_be_forgotten_before_it_is_told(played: Played) -> None:
    (one, _), (two, _), (three, _) = reads((0, 512)), reads((8192, 512)), reads((0, 512))
    for number, each in enumerate((one, two, three), 1):
        played.queue.submit(each, number)
    played.run()
    played.queue.forget(two)
    played.queue.forget(three)
    assert played.queue.next_done() == 1
    assert played.queue.next_done() == 0
    again, _ = reads((0, 512))
    played.queue.submit(again, 4)
    played.run()
    assert played.queue.next_done() == 4


def test_offsets_are_checked_by_the_core(played: Played) -> None:
    made = Transfer(3)
    for wrong in (-512, DISK, DISK - 512, 100, (1 << 63) - 512, -(1 << 63)):
        offsets = np.array([0, wrong, 512], np.int64)
        assert played.queue.fill(made, Operation.READ, offsets, 1024, 4096) == wrong
    assert played.queue.fill(made, Operation.READ, np.array([0, 512, DISK - 1024]), 1024, 4096) is None
    assert [(piece.offset, piece.data, piece.length) for piece in made.pieces] == [
        (0, 4096, 1024),
        (512, 5120, 1024),
        (DISK - 1024, 6144, 1024),
    ]
    played.queue.set_disk(DISK, 4096, MAX_BYTES)
    assert played.queue.fill(made, Operation.READ, np.array([0, 512, 4096]), 4096, 4096) == 512


def buffer_of(played: Played, start: int, n_bytes: int) -> memoryview:
    return played.stage.data.view[PAGES * 4096 + start : PAGES * 4096 + start + n_bytes]


def test_buffers_are_not_copied(played: Played) -> None:
    """Whole or from the middle of a page; memory that is a buffer only in part, or between sectors, is copied."""
    into = buffer_of(played, 1536, 30 * 4096)
    made = transfer(Operation.READ, (4096, into))
    played.queue.submit(made)
    played.queue.issue(played.stage.front)
    assert played.queue.buffer_in_flight(PAGES + 1) == 2
    requests = played.take()
    assert [played.shape(request)[1:] for request in requests] == [
        (4096, MAX_BYTES - 1536),
        (4096 + MAX_BYTES - 1536, 30 * 4096 - MAX_BYTES + 1536),
    ]
    played.serve(requests)
    assert made.done
    assert into == played.disk[4096 : 31 * 4096]
    assert played.queue.buffer_in_flight(PAGES + 1) == 0
    assert played.stage.slots.counters.copied_bytes == 0
    into[:512] = b"x" * 512
    write = transfer(Operation.WRITE, (0, into[:512]))
    played.queue.submit(write)
    played.run()
    assert played.disk[:512] == b"x" * 512
    assert played.stage.slots.counters.copied_bytes == 0
    odd = buffer_of(played, 100, 512)
    outside = played.stage.data.view[(PAGES - 1) * 4096 : (PAGES + 1) * 4096]
    for number, memory in enumerate((odd, outside), 1):
        write = transfer(Operation.WRITE, (512, memory))
        played.queue.submit(write)
        played.run()
        assert played.disk[512 : 512 + len(memory)] == memory
        assert played.stage.slots.counters.copied_bytes == (512, 512 + 8192)[number - 1]
    played.queue.set_buffer(PAGES, BUFFER_PAGES, 0)
    write = transfer(Operation.WRITE, (0, into[:512]))
    played.queue.submit(write)
    played.run()
    assert played.stage.slots.counters.copied_bytes == 1024 + 8192


def test_pieces_of_a_buffer_side_by_side_are_one_request(played: Played) -> None:
    whole = buffer_of(played, 0, 4 * 4096)
    made = transfer(Operation.READ, *[(i * 4096, whole[i * 4096 : (i + 1) * 4096]) for i in range(4)])
    swapped = transfer(Operation.READ, (0, whole[4096:8192]), (4096, whole[:4096]))
    mixed = transfer(Operation.READ, (0, whole[:4096]), (4096, bytearray(4096)))
    for each, n_requests in ((made, 1), (swapped, 2), (mixed, 2)):
        played.queue.submit(each)
        played.queue.issue(played.stage.front)
        requests = played.take()
        assert len(requests) == n_requests
        played.serve(requests)
        assert each.done


def test_a_forgotten_buffer_is_in_flight_until_it_is_answered(played: Played) -> None:
    made = transfer(Operation.READ, (0, buffer_of(played, 0, 4096)))
    played.queue.submit(made)
    played.queue.issue(played.stage.front)
    played.queue.forget(made)
    assert played.queue.buffer_in_flight(PAGES + 1) == 1
    played.serve(played.take())
    assert played.queue.buffer_in_flight(PAGES + 1) == 0


def test_the_short_way_left_in_flight(played: Played) -> None:
    at = place_cell()
    front, core = played.stage.front, played.queue.core
    assert read_now(core, front.core, DISK, 512, 0, at) == LATER
    assert read_now(core, front.core, 0, MAX_REQUEST_BYTES + 512, 0, at) == LATER
    assert read_now(core, front.core, 512, 1024, 1000, at) == IN_FLIGHT
    made, (out,) = reads((512, 1024))
    played.queue.adopt(at[0], made)
    assert read_now(core, front.core, 0, 512, 0, at) == LATER, "something is under way"
    played.serve(played.take())
    assert made.done
    assert out == played.disk[512:1536]
    assert read_now(core, front.core, 0, 512, 1000, at) == IN_FLIGHT
    played.serve(played.take())
    assert (played.stage.slots.in_flight, core.n_free_shares) == (0, core.n_shares), "nobody waited for it"
    assert ANSWERED not in (LATER, IN_FLIGHT)


def test_an_answer_to_nothing_fails_and_what_came_before_counts(played: Played) -> None:
    made, (out,) = reads((0, 512))
    played.queue.submit(made)
    played.queue.issue(played.stage.front)
    request = played.take()[0]
    answers = np.zeros(1, played.stage.back.response)
    answers["id"] = request["id"]
    played.stage.back.push(answers)
    later, _ = reads((8192, 512))
    played.queue.submit(later)
    played.queue.issue(played.stage.front)
    played.take()
    answers["id"] = 77
    played.stage.back.push(answers)
    played.queue.take(played.stage.front)
    with pytest.raises(PeerError, match="request 77, which is not in flight"):
        played.queue.complete()
    assert made.done
    assert out is not None


def test_a_ring_that_died_fails_what_was_to_be_sent(played: Played) -> None:
    made, _ = reads(*[(i * 8192, 512) for i in range(4)])
    played.stage.rings[-1].view[8:12] = (1000).to_bytes(4, "little")
    played.queue.submit(made)
    with pytest.raises(PeerError):
        played.queue.take(played.stage.front)
    with pytest.raises(PeerError):
        played.queue.issue(played.stage.front)
    assert made.done
    assert made.failure is not None
    assert (played.stage.slots.free, played.queue.core.n_free_shares) == (N_SLOTS, played.queue.core.n_shares)


def test_pages_the_backend_keeps(played: Played) -> None:
    """When all slots are held nothing can be sent; when one page is let go it goes on."""
    kept = []
    for _ in range(N_SLOTS):
        made, _ = reads((0, 512))
        played.queue.submit(made)
        played.queue.issue(played.stage.front)
        (request,) = played.take()
        kept.append(int(request["seg"]["gref"][0, 0]))
        played.stage.mapper.map(kept[-1])
        played.serve([request])
        assert made.done
    made, _ = reads((0, 512))
    played.queue.submit(made)
    with pytest.raises(PeerError, match=f"keeps the pages of {N_SLOTS} answered requests"):
        played.queue.issue(played.stage.front)
    played.stage.mapper.unmap(kept[0])
    played.run()
    assert made.done
    for gref in kept[1:]:
        played.stage.mapper.unmap(gref)


def test_any_requests_give_the_right_bytes(played: Played) -> None:
    """Random reads and writes, in and out of buffers, merged or not, against a model, answered in batches."""
    chance, model = random.Random(7), bytearray(played.disk)
    for _ in range(60):
        played.queue.core.merge = chance.randrange(2)
        under_way, checks = [], []
        for _ in range(chance.randrange(1, 12)):
            pieces: list[tuple[int, object]] = []
            operation = chance.choice([Operation.READ, Operation.WRITE])
            at = chance.randrange(DISK // 2 // 512) * 512
            for _ in range(chance.randrange(1, 8)):
                n = chance.choice([512, 1536, 4096, 50 * 512, MAX_BYTES + 512])
                data = chance.randbytes(n)
                memory: object = bytearray(data)
                pieces.append((at, memory))
                if operation is Operation.WRITE:
                    model[at : at + n] = data
                else:
                    checks.append((memory, bytes(model[at : at + n])))
                at += n if chance.randrange(3) else chance.randrange(16) * 512
                at = min(at, DISK // 2)
            made = transfer(operation, *pieces)
            played.queue.submit(made)
            under_way.append(made)
        played.run()
        played.serve([])
        assert all(made.done and made.failure is None for made in under_way)
        assert all(memory == expected for memory, expected in checks)
    assert played.disk == model
