# SPDX-License-Identifier: MIT
"""`measure_rings`: what it reports, never how fast."""

import pytest

from paravirt.errors import InvalidRequest
from paravirt.ring.waiting import Wait
from paravirt.testing.report import ring_rows
from paravirt.testing.ring_bench import RingRun, measure_rings
from paravirt.testing.ring_peer import SPIN_NS


@pytest.mark.parametrize("wait", SPIN_NS)
def test_every_way_of_waiting(wait: Wait) -> None:
    told: list[tuple[str, float]] = []
    results = measure_rings((1, 32), 0.1, wait=wait, progress=lambda label, share: told.append((label, share)))
    assert [result.batch for result in results] == [1, 32]
    for result in results:
        assert result.pairs > 0
        assert 0 < result.round_trip_p50_ns <= result.round_trip_p99_ns
        assert result.notifications_sent + result.notifications_suppressed >= result.pairs / result.batch
        assert result.cpu_s > 0
        if wait == "spin":
            assert result.sleeps == 0
    assert told[0] == ("ring: batches of 1", 0.0)
    assert told[-1][1] == 1.0
    assert sorted(share for _, share in told) == [share for _, share in told]
    assert [row.what for row in ring_rows(results)] == ["ring, batch 1", "ring, batch 32"]


def test_a_run_is_measured_again_and_again_and_leaves_nothing() -> None:
    with RingRun(pages=1, request_bytes=8, response_bytes=8) as run:
        assert run.size == 256
        assert all(run.measure(256, 0.01, round_trips=False).pairs > 0 for _ in range(3))
        with pytest.raises(InvalidRequest, match="does not fit"):
            run.measure(257, 0.01)
        processes = run._processes
    run.close()
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.parametrize(("pages", "n_bytes"), [(1, 5000), (0, 8), (17, 8), (1, 0)])
def test_what_fits_no_ring(pages: int, n_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match="fits"):
        RingRun(pages=pages, request_bytes=n_bytes, response_bytes=8)
