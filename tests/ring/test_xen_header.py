# SPDX-License-Identifier: MIT
"""A C program built with Xen's own ring.h at the other end, each way round."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from paravirt.ring.event import EventPort, WaitResult, from_half, make_pair
from paravirt.ring.memory import Mapping, create_object
from paravirt.ring.shared import BackRing, FrontRing

from .support import (
    C_CORE,
    DEADLINE_S,
    EVENT_SOURCES,
    HERE,
    NEAR_WRAP,
    REQUEST,
    RESPONSE,
    answers,
    compile_c,
    need_xen_header,
    output_of,
    peer_process,
    requests,
)

PAIRS = 1_000_000
PAGES = 4


@pytest.fixture(scope="module")
def xen_peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_xen_header()
    sources = [HERE / "xen_peer.c", *(C_CORE / f"{name}.c" for name in EVENT_SOURCES)]
    return compile_c(tmp_path_factory.mktemp("xen") / "xen_peer", sources)


@contextmanager
def ring_memory() -> Iterator[tuple[int, Mapping]]:
    fd = create_object("memfd", PAGES * 4096)
    with Mapping(fd, PAGES * 4096) as mapping:
        yield fd, mapping
    os.close(fd)


def command(peer: Path, role: str) -> list[str]:
    return [str(peer), role, str(PAIRS), str(NEAR_WRAP), "5", str(PAGES)]


def check_notifications(ring: FrontRing | BackRing, port: EventPort, peer_line: str) -> None:
    """Both ends slept, both were notified, and each of our notifications went through the port."""
    done, peer_notified, peer_sleeps = peer_line.split()
    statistics = ring.statistics()
    assert done == "done"
    assert statistics.requests == statistics.responses == PAIRS
    assert statistics.sleeps > 0
    assert int(peer_sleeps) > 0
    assert statistics.notifications_sent == port.statistics().sent > 0
    assert 0 < statistics.events <= int(peer_notified)


def test_we_are_the_front_end(xen_peer: Path) -> None:
    ours, theirs = make_pair()
    waiter, port = from_half(ours)
    choose = random.Random(6)
    answered = np.zeros(PAIRS, bool)
    with waiter, ring_memory() as (fd, mapping):
        with FrontRing.create(mapping, REQUEST, RESPONSE, port=port, start=NEAR_WRAP) as ring:
            with peer_process(command(xen_peer, "back"), fd, theirs) as process:
                assert output_of(process).readline() == "ready\n"
                sent = got = 0
                while got < PAIRS:
                    sent += ring.push(requests(sent, min(choose.randrange(1, 128), PAIRS - sent)))
                    batch = ring.take_batch()
                    assert np.array_equal(batch["sum"], answers(_requests_of(batch))["sum"])
                    assert not answered[batch["id"]].any()
                    answered[batch["id"]] = True
                    got += len(batch)
                    if len(batch) == 0 and (sent == PAIRS or ring.free == 0):
                        assert ring.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
                check_notifications(ring, port, output_of(process).readline())
    assert answered.all()


def test_we_are_the_back_end(xen_peer: Path) -> None:
    ours, theirs = make_pair()
    waiter, port = from_half(ours)
    choose = np.random.default_rng(7)
    with waiter, ring_memory() as (fd, mapping):
        with peer_process(command(xen_peer, "front"), fd, theirs) as process:
            assert output_of(process).readline() == "ready\n"
            with BackRing.attach(mapping, REQUEST, RESPONSE, port=port) as ring:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                done = 0
                while done < PAIRS:
                    batch = ring.take_batch(int(choose.integers(1, 128)))
                    if len(batch) == 0:
                        assert ring.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
                        continue
                    assert np.array_equal(batch["id"], np.arange(done, done + len(batch)))
                    assert np.array_equal(batch, _requests_of(batch))
                    ring.push(choose.permutation(answers(batch)))
                    done += len(batch)
                check_notifications(ring, port, output_of(process).readline())


def _requests_of(batch: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """The requests that have the ids of a batch."""
    out = np.zeros(len(batch), REQUEST)
    out["id"] = batch["id"]
    out["words"] = batch["id"][:, None] * np.uint64(0x9E3779B97F4A7C15) + np.arange(13, dtype=np.uint64)
    return out
