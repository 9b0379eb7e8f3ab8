# SPDX-License-Identifier: MIT
"""Copies out of and into granted pages, and what happens to a grant while a copy is under way."""

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from paravirt.errors import Closed
from paravirt.ring.grant import COPY_OP, GrantStatus
from paravirt.ring.memory import PAGE_BYTES

from ..ring.support import C_CORE, compile_c, run_c
from .test_grants import chunk

HERE = Path(__file__).parent
DEADLINE_S = 30


def test_a_grant_that_changes_at_any_moment_of_a_copy(tmp_path: Path) -> None:
    """A copy is okay with the content of the grant, or it fails: nothing is between that the page was used for."""
    program = compile_c(
        tmp_path / "copy_race",
        [HERE / "copy_race.c", C_CORE / "pv_grant.c", C_CORE / "pv_grant_copy.c"],
        f"-I{HERE.parent / 'ring'}",
        '-DPV_ATOMIC_SHIM="interrupt_shim.h"',
    )
    rows = [line.split() for line in run_c([program], timeout=DEADLINE_S).splitlines()]
    said = {name: tuple(map(int, numbers)) for name, *numbers in rows}
    accesses = said["revoked"][0]
    assert said["revoked"][1] == 2, "only what is revoked after the second look is copied"
    assert said["revoked"][2] == accesses - 2
    assert said["replaced"] == said["granted-again"] == (accesses, accesses, 0)
    assert said["mapped"] == (accesses - 1, accesses, 0), "everywhere but under the lock"


def test_arrays_that_are_used_again_are_copied_by_what_stands_in_them_now() -> None:
    """More arrays than are remembered, each used, filled anew and used again; buffers of every kind."""
    with chunk() as c:
        grefs = c.granter.access_many(range(4))
        for page in range(4):
            c.memory.view[page * PAGE_BYTES] = page + 1
        batches = [np.zeros(n, COPY_OP) for n in range(1, 20)]
        for turn in range(3):
            for n, ops in enumerate(batches, 1):
                wanted = (np.arange(n) + turn) % 4
                ops["gref"], ops["length"], ops["local_offset"] = grefs[wanted], 1, np.arange(n)
                local = (np.zeros(n, np.uint8), bytearray(n), memoryview(bytearray(n)))[(turn + n) % 3]
                assert c.mapper.copy_array(ops, local, to_grant=False).tolist() == [GrantStatus.OKAY] * n
                assert bytes(local) == bytes((wanted + 1).tolist())
        assert c.mapper.statistics().copies == 3 * sum(range(1, 20))


def test_an_array_is_refused_to_write_to_though_it_was_read_from() -> None:
    with chunk() as c:
        ops = np.zeros(1, COPY_OP)
        ops["gref"], ops["length"] = c.granter.access(0), 8
        local = np.frombuffer(b"abcdefgh", np.uint8)
        for _ in range(2):
            assert c.mapper.copy_array(ops, local, to_grant=True)[0] == GrantStatus.OKAY
            with pytest.raises((BufferError, ValueError)):
                c.mapper.copy_array(ops, local, to_grant=False)
        assert bytes(c.memory.view[:8]) == b"abcdefgh"
        with pytest.raises((BufferError, ValueError)):
            c.mapper.copy_array(ops, np.zeros(16, np.uint8)[::2], to_grant=False)


def test_arrays_are_let_go_with_the_mapper() -> None:
    with chunk() as c:
        ops, local = np.zeros(1, COPY_OP), np.zeros(8, np.uint8)
        c.mapper.copy_array(ops, local, to_grant=False)
        gone = weakref.ref(ops), weakref.ref(local)
        c.mapper.close()
        with pytest.raises(Closed):
            c.mapper.copy_array(ops, local, to_grant=False)
        del ops, local
        gc.collect()
        assert [it() for it in gone] == [None, None]


def test_threads_copy_by_arrays_of_their_own() -> None:
    """Each has more arrays than are remembered, so that they push each other's out."""
    with chunk() as c:
        gref = c.granter.access(0)
        c.memory.view[:4] = b"abcd"
        wrong: list[bytes] = []

        def work() -> None:
            arrays = [(np.zeros(1, COPY_OP), np.zeros(4, np.uint8)) for _ in range(6)]
            for n in range(2000):
                ops, local = arrays[n % 6]
                ops["gref"], ops["length"], local[:] = gref, 4, 0
                c.mapper.copy_array(ops, local, to_grant=False)
                if local.tobytes() != b"abcd":
                    wrong.append(local.tobytes())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert c.mapper.statistics().copies == 8000
