# SPDX-License-Identifier: MIT
"""Two real processes: echo, and an idle sleeping pair that nothing wakes."""

import json
import os
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from paravirt.ring.event import EventPort, WaitResult, from_half, make_pair
from paravirt.ring.memory import Mapping, create_object
from paravirt.ring.shared import FrontRing

from .echo_peer import LAST
from .support import (
    DEADLINE_S,
    NEAR_WRAP,
    REQUEST,
    RESPONSE,
    answers,
    output_of,
    peer_process,
    python_peer,
    requests,
)


def last_request() -> Any:
    batch = requests(0, 1)
    batch["id"] = LAST
    return batch


def until_asleep(port: EventPort, pid: int) -> None:
    """Until the peer has armed (its word in the shared page) and left the CPU."""
    while not (port.core.tx.asleep and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"):
        os.sched_yield()


def voluntary_switches(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches"):
            return int(line.split()[1])
    raise AssertionError("no such line")


@pytest.mark.parametrize("bell", ["eventfd", "pipe"])
def test_echo_of_random_batches(bell: Literal["eventfd", "pipe"]) -> None:
    total = 50_000
    memory_fd = create_object("posix", 4 * 4096)
    ours, theirs = make_pair(bell, "posix")
    waiter, port = from_half(ours)
    choose = random.Random(4)
    with waiter, Mapping(memory_fd, 4 * 4096) as mapping:
        with FrontRing.create(mapping, REQUEST, RESPONSE, port=port, start=NEAR_WRAP) as ring:
            with peer_process(python_peer("echo_peer", "4"), memory_fd, theirs) as process:
                assert output_of(process).readline() == "ready\n"
                sent = got = 0
                while got < total:
                    if sent < total:
                        sent += ring.push(requests(sent, min(choose.randrange(1, 60), total - sent)))
                    if choose.random() < 0.3:
                        assert ring.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
                    batch = ring.take_batch()
                    assert np.array_equal(batch, answers(requests(got, len(batch))))
                    got += len(batch)
                    if sent == total and not len(batch) and got < total:
                        assert ring.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
                ring.push(last_request())
                assert ring.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
                told = json.loads(output_of(process).readline())
            statistics = ring.statistics()
    os.close(memory_fd)
    assert told["ring"]["requests"] == told["ring"]["responses"] == total + 1 == statistics.requests
    assert told["port"]["sent"] == told["ring"]["notifications_sent"]
    assert statistics.batches == statistics.notifications_sent + statistics.notifications_suppressed


def test_an_idle_sleeping_pair_is_never_woken() -> None:
    """While both ends sleep nothing happens at all; each request wakes the other end exactly once."""
    rounds = 5
    memory_fd = create_object("memfd", 4096)
    ours, theirs = make_pair()
    waiter, port = from_half(ours)
    with waiter, Mapping(memory_fd, 4096) as mapping:
        with FrontRing.create(mapping, REQUEST, RESPONSE, port=port) as ring:
            with peer_process(python_peer("echo_peer", "1"), memory_fd, theirs) as process:
                assert output_of(process).readline() == "ready\n"
                for i in range(rounds):
                    until_asleep(port, process.pid)
                    before = voluntary_switches(process.pid)
                    assert ring.wait(timeout_s=0.1) is WaitResult.TIMEOUT
                    assert voluntary_switches(process.pid) == before
                    ring.push(requests(i, 1) if i < rounds - 1 else last_request())
                    assert ring.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
                    assert len(ring.take_batch()) == 1
                told = json.loads(output_of(process).readline())
                ours_woken = waiter.statistics().wakeups
    os.close(memory_fd)
    assert told["waiter"] == {"sleeps": rounds, "wakeups": rounds, "unheard": 0}
    assert told["ring"]["sleeps"] == rounds
    assert told["ring"]["events"] == rounds
    assert told["ring"]["notifications_spurious"] == 0
    assert ours_woken <= rounds
