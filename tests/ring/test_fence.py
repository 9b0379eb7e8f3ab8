# SPDX-License-Identifier: MIT
"""Who pays for the order of "publish, then look": chosen before the first message, full where the kernel refuses."""

import subprocess
import sys

import pytest

from paravirt.errors import InvalidRequest
from paravirt.ring import waiting
from paravirt.ring._core import lib
from paravirt.ring.event import WaitResult
from paravirt.ring.shared import BackRing, FrontRing
from paravirt.ring.waiting import Fence

from .support import NEAR_WRAP, REQUEST, RESPONSE, ROOT, answers, requests, ring_pair

FENCES: tuple[Fence, ...] = ("full", "process", "host")
needs_membarrier = pytest.mark.skipif(
    not (waiting.offer_fence("process") and waiting.offer_fence("host")), reason="this kernel has no membarrier(2)"
)


@needs_membarrier
@pytest.mark.parametrize("fence", FENCES)
def test_the_sleeper_pays(fence: Fence) -> None:
    """A heavy fence for each look before sleeping; none for pushing or for a look that finds something."""
    with ring_pair(start=NEAR_WRAP, fence=fence) as pair:
        assert pair.front.fence == pair.back.fence == fence
        for i in range(3):
            assert not pair.back.final_check()
            pair.front.push(requests(i, 1))
            assert pair.back.final_check()
            pair.back.push(answers(pair.back.take_batch()))
            assert pair.front.wait() is WaitResult.EVENT
            pair.front.take_batch()
        assert pair.back.statistics().heavy_fences == (0 if fence == "full" else 3)
        assert pair.front.statistics().heavy_fences == 0
        assert pair.front.statistics().notifications_sent == 3


@needs_membarrier
@pytest.mark.parametrize("fence", FENCES)
def test_waking_up(fence: Fence) -> None:
    with ring_pair(fence=fence) as pair:
        assert pair.back.wait(timeout_s=0.01) is WaitResult.TIMEOUT
        pair.front.push(requests(0, 2))
        assert pair.back_port.core.received == 0
        assert pair.back.wait(timeout_s=10) is WaitResult.EVENT
        assert pair.back.statistics().events == 1


@needs_membarrier
def test_a_live_ring_keeps_its_fence() -> None:
    with ring_pair() as pair:
        assert lib.pv_ring_set_fence(pair.front.core, 1) == 0, "nothing was sent yet"
        pair.front.push(requests(0, 1))
        pair.back.take_batch()
        for ring in (pair.front, pair.back):
            before = ring.fence
            assert lib.pv_ring_set_fence(ring.core, 2) < 0
            assert ring.fence == before


def test_an_unknown_fence() -> None:
    with pytest.raises(InvalidRequest, match="full, process, host"):
        FrontRing.create(bytearray(4096), REQUEST, RESPONSE, fence="none")  # type: ignore[arg-type]
    with ring_pair() as pair:
        assert lib.pv_ring_set_fence(pair.front.core, 3) < 0


@needs_membarrier
def test_only_the_asymmetric_fence_tells_where_it_runs() -> None:
    """Xen's padding stays 0 with the full barrier; else a waiting end leaves the number of its CPU there."""
    for fence in FENCES:
        memory = bytearray(4096)
        with FrontRing.create(memory, REQUEST, RESPONSE, fence=fence, wait="adaptive") as front:
            with BackRing.attach(memory, REQUEST, RESPONSE, fence=fence):
                front.take_batch(1, spin_ns=waiting.LEARNT)
                told = int.from_bytes(memory[56:60], "little")
                assert (told > 0) == (fence != "full")
                assert bytes(memory[16:56]) == bytes(40)


# Refuses membarrier(2) with ENOSYS from now on: seccomp's smallest program.
REFUSE = """
import ctypes, platform, struct
def refuse_membarrier():
    number = {"x86_64": 324, "aarch64": 283}[platform.machine()]
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()
from paravirt.errors import InvalidRequest
from paravirt.ring import waiting
from tests.ring.support import REQUEST, RESPONSE, requests, ring_pair
from paravirt.ring.shared import FrontRing
"""


def run_refused(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", REFUSE + program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_where_the_kernel_refuses_the_barrier_is_full() -> None:
    program = """
refuse_membarrier()
assert not waiting.offer_fence("process") and not waiting.offer_fence("host") and waiting.offer_fence("full")
with ring_pair(fence="process") as pair:
    assert pair.front.fence == pair.back.fence == "full"
    assert not pair.back.final_check()
    pair.front.push(requests(0, 1))
    assert len(pair.back.take_batch()) == 1
try:
    FrontRing.create(bytearray(4096), REQUEST, RESPONSE, fence="host")
except InvalidRequest as error:
    print(error)
"""
    assert "no 'host' fence here" in run_refused(program)


@needs_membarrier
def test_a_fence_that_fails_later_is_an_error_and_not_a_sleep() -> None:
    program = """
with ring_pair(fence="host") as pair:
    assert not pair.back.final_check()
    refuse_membarrier()
    try:
        pair.back.wait()
    except OSError as error:
        print(error.errno)
"""
    assert run_refused(program) == "38\n"
