# SPDX-License-Identifier: MIT
"""The same sequences of requests for our daemon and Debian's C daemon 4.17: every reply and event is compared.

PARAVIRT_DIFFERENTIAL=N compares N sequences of each kind, new ones each time, and looks for a short one where there is
a difference; without it there are a few, always the same.
"""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from paravirt.errors import NotFound
from paravirt.testing.reference_xenstored import default_cache, find_program
from paravirt.xenstore.wire import Op, number
from tests.needs import missing

from .differential import DESTROY, NORMAL, OVERSIZE, SHUT_DOWN, TIGHT, Limited, Pair, ReferenceDied, Step
from .differential_known import known
from .differential_steps import sequences

N_SEQUENCES = os.environ.get("PARAVIRT_DIFFERENTIAL")
LENGTH = 60

try:
    find_program("c", default_cache())
except NotFound as error:
    missing(str(error), module=True)


class Play:
    """A sequence as far as it can be played; fails at the first difference that the table does not know."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._told: list[Step] = []
        self._targets: set[int] = set()

    def play(self, sequence: list[Step]) -> None:
        for step in sequence:
            if self._can(step) and not self._goes_on(step):
                return

    def _can(self, step: Step) -> bool:
        clients = self._pair.ours.clients
        if step.client not in clients:
            return False
        if step.op in (SHUT_DOWN, DESTROY):
            again = step.op == SHUT_DOWN and step in self._told
            return f"dom{number(step.payload)}" in clients and not again and not self._is_target(step)
        return step.op != Op.RELEASE or not self._is_target(step)

    def _is_target(self, step: Step) -> bool:
        """The C daemon keeps a domain whose rights another one has for as long as that other one."""
        return number(step.payload) in self._targets

    def _goes_on(self, step: Step) -> bool:
        self._told.append(step)
        if step.op == Op.SET_TARGET:
            self._targets.update(number(word) for word in step.payload.split(b"\0")[1:2])
        try:
            difference = self._pair.play(step)
        except ReferenceDied:
            return False
        if difference is None:
            return True
        entry = known(difference)
        assert entry is not None, "\n".join([*map(repr, self._told[:-1]), str(difference)])
        return not entry.diverges


@pytest.mark.timeout(0 if N_SEQUENCES else 120)
@pytest.mark.parametrize("limited", [NORMAL, TIGHT], ids=["normal", "tight"])
def test_random_sequences(limited: Limited) -> None:
    @settings(
        max_examples=int(N_SEQUENCES or 60),
        derandomize=not N_SEQUENCES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if N_SEQUENCES else [Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(sequences(LENGTH))
    def compare(sequence: list[Step]) -> None:
        with tempfile.TemporaryDirectory() as folder, Pair(Path(folder), limited) as pair:
            Play(pair).play(sequence)

    compare()


def test_a_directory_larger_than_a_reply(tmp_path: Path) -> None:
    names = [f"child-number-{n}" for n in range(1200)]
    with Pair(tmp_path) as pair:
        Play(pair).play(
            [
                *(Step("dom0", Op.MKDIR, b"/a/%s\0" % name.encode()) for name in names),
                Step("dom0", Op.DIRECTORY, b"/a\0"),
                *(Step("dom0", Op.DIRECTORY_PART, b"/a\0%d\0" % offset) for offset in range(0, 24_000, 397)),
                Step("dom1", Op.RM, b"/a/child-number-7\0"),
                Step("dom0", Op.DIRECTORY_PART, b"/a\0000\0"),
                Step("dom0", Op.RM, b"/a\0"),
                Step("dom0", Op.DIRECTORY_PART, b"/a\0000\0"),
            ]
        )


def test_a_payload_larger_than_allowed(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        Play(pair).play(
            [
                Step("dom0b", Op.WATCH, b"/a\0t\0"),
                Step("dom0b", Op.TRANSACTION_START, b"\0"),
                Step("dom0b", OVERSIZE),
                Step("dom1", Op.WRITE, b"/a/b\0v"),
                Step("dom0b", Op.READ, b"/a/b\0", 1),
                Step("dom0b", Op.WRITE, b"/a/c\0" + b"v" * 4091),
                Step("dom0b", Op.READ, b"/a/c\0"),
            ]
        )
