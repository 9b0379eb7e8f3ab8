# SPDX-License-Identifier: MIT
"""A frontend whose pages stay granted, and what it leaves in pages that it grants (XSA-403)."""

import os

import numpy as np
import pytest

from paravirt.protocol.blkif import INDIRECT_REQUEST, Operation, Status
from paravirt.ring._core import lib
from paravirt.ring.memory import address_of

from .blkfront_stage import BASE, N_SLOTS, Stage


def grefs(request: np.ndarray) -> list[int]:
    """Of a direct one."""
    return [int(gref) for gref in request["seg"]["gref"][0, : int(request["nr_segments"][0])]]


def granted(stage: Stage) -> int:
    return stage.granter.statistics().granted


def underneath(taken: np.ndarray) -> np.ndarray:
    """Requests with the operation that an answer names: of an indirect one what is underneath."""
    named = taken.copy()
    large = taken["operation"] == Operation.INDIRECT
    named["operation"][large] = taken["nr_segments"][large]
    return named


def serve(stage: Stage, *asked: tuple[Operation, int, int]) -> np.ndarray:
    """Issue requests and answer them; as they were on the ring."""
    stage.issue(*asked)
    taken = stage.back.take_batch()
    done, error = stage.answer(underneath(taken))
    assert error is None
    assert [status for _, status in done] == [Status.OKAY] * len(asked)
    return taken


def reconnect(stage: Stage, persistent: bool) -> int:
    """Another backend: how many requests it is sent."""
    stage.front.close()
    stage.back.close()
    stage.new_ring()
    stage.slots.persist(persistent)
    return stage.slots.reissue(stage.front)


def test_pages_stay_granted_and_are_used_again(stage: Stage) -> None:
    stage.slots.persist(True)
    first = serve(stage, (Operation.READ, 0, 3 * 4096))
    assert granted(stage) == 3
    assert grefs(serve(stage, (Operation.WRITE, 0, 4 * 4096)))[:3] == grefs(first)
    assert stage.slots.core.granted_before == 3
    assert granted(stage) == 4
    assert (stage.slots.free, stage.slots.held, stage.slots.in_flight) == (N_SLOTS, 0, 0)


def test_they_are_granted_for_writing_whatever_is_asked_first(stage: Stage) -> None:
    stage.slots.persist(True)
    (gref,) = grefs(serve(stage, (Operation.WRITE, 0, 4096)))
    stage.mapper.map(gref)


def test_a_page_that_the_backend_keeps_mapped_is_used_again(stage: Stage) -> None:
    stage.slots.persist(True)
    stage.issue((Operation.READ, 0, 4096))
    taken = stage.back.take_batch()
    stage.mapper.map(grefs(taken)[0])
    stage.answer(taken)
    assert (stage.slots.free, stage.slots.held) == (N_SLOTS, 0)
    assert grefs(serve(stage, (Operation.READ, 0, 4096))) == grefs(taken)


def test_the_last_ones_used_are_the_next(stage: Stage) -> None:
    """So a backend with less room than there are pages mostly has them."""
    stage.slots.persist(True)
    serve(stage, *[(Operation.READ, 0, 4096)] * 8)
    used = {gref for _ in range(20) for gref in grefs(serve(stage, (Operation.READ, 0, 4096)))}
    assert len(used) == 1


def test_large_requests_too(stage: Stage) -> None:
    stage.slots.persist(True)
    for _ in range(4):
        serve(stage, (Operation.READ, 0, 30 * 4096))
    assert granted(stage) == 33  # whole slots, as each of them comes last in turn
    assert stage.slots.core.granted_before == 4 * 31 - 33


def test_purge_takes_back_what_nobody_uses(stage: Stage) -> None:
    stage.slots.persist(True)
    kept, *_ = grefs(serve(stage, (Operation.READ, 0, 4 * 4096)))
    stage.mapper.map(kept)
    stage.issue((Operation.WRITE, 0, 2 * 4096))  # the pages of its slot wait to be mapped
    assert stage.slots.purge() == 0
    stage.answer(stage.back.take_batch())
    assert stage.slots.purge() == 3
    assert granted(stage) == 1
    assert stage.granter.statistics().busy == 0
    stage.mapper.unmap(kept)
    assert stage.slots.purge() == 1
    serve(stage, (Operation.READ, 0, 4 * 4096))
    assert granted(stage) == 4


def test_purging_is_done_while_answers_come(stage: Stage) -> None:
    stage.slots.persist(True)
    serve(stage, *[(Operation.READ, 0, 11 * 4096)] * 2)
    stage.slots.core.purged_ms -= lib.PV_BLKFRONT_PURGE_MS
    serve(stage, (Operation.FLUSH_DISKCACHE, 0, 0))
    assert granted(stage) == 11  # but those of the flush's slot


def test_a_backend_without_them_after_one_with_them(stage: Stage) -> None:
    """All is taken back, also the pages of a slot in flight that its request does not use."""
    stage.slots.persist(True)
    serve(stage, *[(Operation.READ, 0, 11 * 4096)] * 4)
    stage.issue((Operation.READ, 0, 512), (Operation.WRITE, 0, 512), (Operation.READ, 0, 20 * 4096))
    stage.back.take_batch()
    assert reconnect(stage, persistent=False) == 3
    done, error = stage.answer(underneath(stage.back.take_batch()))
    assert error is None
    assert len(done) == 3
    assert granted(stage) == 0
    assert (stage.slots.free, stage.slots.held) == (N_SLOTS, 0)
    serve(stage, *[(Operation.READ, 0, 11 * 4096)] * N_SLOTS)
    assert granted(stage) == 0


def test_a_page_that_the_old_backend_holds_stays_out_of_use(stage: Stage) -> None:
    stage.slots.persist(True)
    kept, *_ = grefs(serve(stage, (Operation.READ, 0, 4096)))
    stage.mapper.map(kept)
    reconnect(stage, persistent=False)
    assert (stage.slots.free, stage.slots.held) == (N_SLOTS - 1, 1)
    assert kept not in grefs(serve(stage, (Operation.READ, 0, 4096)))
    stage.mapper.unmap(kept)
    assert stage.slots.reclaim() == N_SLOTS
    assert granted(stage) == 0


def test_a_backend_with_them_after_one_without(stage: Stage) -> None:
    """What is granted for reading only is not kept."""
    stage.issue((Operation.WRITE, 0, 4096), (Operation.READ, 0, 4096))
    stage.back.take_batch()
    assert reconnect(stage, persistent=True) == 2
    stage.answer(stage.back.take_batch())
    assert granted(stage) == 1
    for _ in range(3):
        for gref in grefs(serve(stage, (Operation.READ, 0, 11 * 4096))):
            stage.mapper.map(gref)
            stage.mapper.unmap(gref)


def test_a_backend_with_them_after_another(stage: Stage) -> None:
    stage.slots.persist(True)
    serve(stage, (Operation.READ, 0, 4096))
    stage.issue((Operation.WRITE, 0, 4096))
    stage.back.take_batch()
    assert reconnect(stage, persistent=True) == 1
    stage.answer(stage.back.take_batch())
    assert granted(stage) == 1


@pytest.mark.parametrize("persistent", [False, True])
def test_xsa_403_nothing_of_earlier_requests_stands_beside_a_payload(stage: Stage, persistent: bool) -> None:
    """Whatever was in a page before, longer or of another kind."""
    stage.slots.persist(persistent)
    lengths = [11 * 4096, 512, 4096, 1024, 2 * 4096 + 512, 20 * 4096 + 1536, 13 * 4096, 512, 11 * 4096, 3584, 10 * 4096]
    for length in lengths:
        for operation in (Operation.WRITE, Operation.READ):
            payload = os.urandom(length)
            kept, address = address_of(payload)
            stage.slots.ask(0, operation, 0, length, address if operation == Operation.WRITE else 0)
            slot = stage.slots.issue(stage.front, 1)[0]
            del kept
            taken = stage.back.take_batch()
            pages = pages_of(stage, taken)
            if operation == Operation.WRITE:
                assert b"".join(bytes(stage.data.view[page : page + 4096]) for page in pages[0])[:length] == payload
            tail = pages[0][-1] + (length - 1) % 4096 + 1
            assert not any(stage.data.view[tail : pages[0][-1] + 4096])
            if pages[1]:
                used = len(pages[0]) * 8
                assert not any(stage.data.view[pages[1][0] + used : pages[1][0] + 4096])
            for page in pages[0] if operation == Operation.READ else ():
                stage.data.view[page : page + 4096] = b"r" * 4096  # the backend fills it, beyond what was asked, too
            assert slot == taken["id"][0]
            assert stage.answer(underneath(taken))[1] is None


def pages_of(stage: Stage, request: np.ndarray) -> tuple[list[int], list[int]]:
    """Byte offsets of the pages with the data of a request, and of those with its segments."""
    if request["operation"][0] != Operation.INDIRECT:
        return [(gref - BASE) * 4096 for gref in grefs(request)], []
    indirect = np.frombuffer(request.tobytes(), INDIRECT_REQUEST)
    n = int(indirect["nr_segments"][0])
    at = (int(indirect["indirect_grefs"][0, 0]) - BASE) * 4096
    segments = np.frombuffer(bytes(stage.data.view[at : at + n * 8]), "<u4")[::2]
    return [(int(gref) - BASE) * 4096 for gref in segments], [at]
