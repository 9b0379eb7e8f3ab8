# SPDX-License-Identifier: MIT
"""A waiter of thousands of ports: idle ones wake nobody, and a wake-up does not look at them."""

from pathlib import Path

import pytest

from .support import C_CORE, DEADLINE_S, EVENT_SOURCES, HERE, compile_c, run_c

SLOTS = 4096


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [HERE / "looks.c", *(C_CORE / f"{name}.c" for name in EVENT_SOURCES)]
    target = tmp_path_factory.mktemp("looks") / "looks"
    return compile_c(target, sources, f"-I{HERE}", '-DPV_ATOMIC_SHIM="interrupt_shim.h"')


def looks(program: Path, ports: int) -> tuple[int, int, int]:
    idle, wakeups, event = map(int, run_c([program, str(ports)], timeout=DEADLINE_S).split())
    return idle, wakeups, event


def test_ports_of_one_inbox_cost_nothing(program: Path) -> None:
    assert looks(program, 1) == looks(program, SLOTS)


def test_ten_thousand_idle_ports(program: Path) -> None:
    one, many = looks(program, 1), looks(program, 10_000)
    assert many[1] == 0, "nobody is woken"
    for few, more in zip((one[0], one[2]), (many[0], many[2]), strict=True):
        inboxes = -(-10_000 // SLOTS)
        assert more <= few + 8 * (inboxes - 1), "a few looks an inbox, none a port"
