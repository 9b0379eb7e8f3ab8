# SPDX-License-Identifier: MIT
"""The checker of histories against histories made by hand and against all permutations; then the store against it.

LINEARIZABILITY_ROUNDS, a number, makes the second part that much longer; each round has another seed.
"""

import itertools
import os
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from paravirt.xenstore.server import XenstoreServer
from tests.xenstore import linearizability, stand_in
from tests.xenstore.history import (
    READER,
    Client,
    History,
    drive,
    run_clients,
    run_with_kills,
    xenstored,
)
from tests.xenstore.linearizability import Kind, Operation, Step, check

ROUNDS = int(os.environ.get("LINEARIZABILITY_ROUNDS", "1"))


def steps(text: str) -> tuple[Step, ...]:
    """ "w x 1, r x 1, r x -, rm x, e x +" as steps: "-" is missing, "+" is there."""
    found = []
    for one in text.split(", "):
        kind, key, *rest = one.split()
        if kind == "w":
            found.append(Step(Kind.WRITE, key, rest[0].encode()))
        elif kind == "r":
            found.append(Step(Kind.READ, key, None if rest[0] == "-" else rest[0].encode()))
        else:
            found.append(Step(Kind.EXISTS, key, rest[0] == "+") if kind == "e" else Step(Kind.RM, key))
    return tuple(found)


def history(text: str) -> list[Operation]:
    """One line an operation: "1..4 w x 1". No end: unknown; "1../5": unknown and gone at 5; a last "!": failed."""
    operations = []
    for client, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        times, _, what = line.partition(" ")
        begin, _, end = times.partition("..")
        done = steps(what.removesuffix(" !"))
        operations.append(
            Operation(
                client,
                int(begin),
                int(end) if end.isdigit() else None,
                done,
                transaction=len(done) > 1,
                failed=what.endswith("!"),
                gone_at=int(end[1:]) if end.startswith("/") else None,
            )
        )
    return operations


LEGAL = {
    "nothing": "",
    "one after the other": "1..2 w x 1 \n 3..4 r x 1 \n 5..6 rm x \n 7..8 r x - \n 9..10 e x -",
    "a read beside a write sees either": "1..5 w x 1 \n 2..3 r x - \n 2..4 r x 1",
    "answers in another order than effects": "1..9 w x 1 \n 2..8 w x 2 \n 3..4 r x 2 \n 5..6 r x 1",
    "a transaction is one step": "1..4 w x 1, w y 1 \n 2..3 r x 1, r y 1 \n 5..6 r y 1",
    "a transaction sees what it wrote": "1..2 w x 1, r x 1, rm x, r x -, e x - \n 3..4 e x -",
    "a conflict has no effect": "1..2 w x 1 \n 3..4 r x -, w x 2 ! \n 5..6 r x 1",
    "unknown and never done": "1.. w x 1 \n 2..3 r x - \n 4..5 r x -",
    "unknown and done later": "1.. w x 1 \n 2..3 r x - \n 4..5 r x 1 \n 6..7 r x 1",
    "unknown and done after another write": "1.. w x 1 \n 2..3 w x 2 \n 4..5 r x 2 \n 6..7 r x 1",
    "unknown and removed in between": "1.. w x 1 \n 2..3 r x 1 \n 4..5 rm x \n 6..7 r x -",
    "an unknown transaction seen whole": "1.. w x 1, w y 1 \n 2..3 r x -, r y - \n 4..5 r x 1, r y 1",
    "half of an unknown transaction written over": "1.. w x 1, w y 1 \n 2..3 w x 2 \n 4..5 r x 2, r y 1",
    "unknown ones that need each other": "1.. w x 1 \n 1.. r x 1, w y 1 \n 3..4 r y 1",
    "an unknown removal": "1..2 w x 1 \n 3.. rm x \n 4..5 r x 1 \n 6..7 r x - \n 8..9 w x 2 \n 10..11 r x 2",
    "unknown, done before it was gone": "1../4 w x 1 \n 5..6 r x 1",
    "unknown, gone and never seen": "1../4 w x 1 \n 5..6 r x -",
    "gone while a reader was waiting": "1../4 w x 1 \n 2..6 r x 1 \n 5..7 r x 1",
    "only its existence is seen": "1.. w x 1 \n 2..3 e x - \n 4..5 e x +",
}  # fmt: skip

ILLEGAL = {
    "a stale read": ("1..2 w x 1 \n 3..4 w x 2 \n 5..6 r x 1", 3),
    "a write is lost": ("1..2 w x 1 \n 3..4 r x -", 2),
    "a value from nowhere": ("1..2 w x 1 \n 3..4 r x 7", 2),
    "a removal is lost": ("1..2 w x 1 \n 3..4 rm x \n 5..6 e x +", 3),
    "two readers see two orders": ("1..9 w x 1 \n 1..9 w x 2 \n 2..3 r x 1 \n 4..5 r x 2 \n 6..7 r x 1", 3),
    "seen before it was written": ("1..2 r x 1 \n 3..4 w x 1", 1),
    "half a transaction": ("1..2 w x 1, w y 1 \n 3..4 r x 1, r y -", 2),
    "half a transaction while it runs": ("1..8 w x 1, w y 1 \n 2..3 r x 1 \n 4..5 r y -", 2),
    "a transaction that forgets what it wrote": ("1..2 w x 1, r x -", 1),
    "a transaction whose reads differ": ("1..2 w x 1 \n 1..4 r x 1, r x -", 2),
    "a commit over a conflict": ("1..2 w x 1 \n 3..4 w x 2 \n 5..6 r x 1, w y 1", 3),
    "both of two that exclude each other": ("1..9 r x -, w y 1 \n 2..8 r y -, w x 1", 2),
    "a failed transaction shows": ("1..2 w x 1, w y 1 ! \n 3..4 r x 1", 1),
    "acknowledged and lost at the restart": ("1..2 w x 1 \n 3..4 w x 2 \n 3../5 w y 1 \n 6..7 r x 1, r y 1", 3),
    "unknown, seen and gone again": ("1.. w x 1 \n 2..3 r x 1 \n 4..5 r x -", 2),
    "unknown, seen, overwritten and back": ("1.. w x 1 \n 2..3 r x 1 \n 4..5 w x 2 \n 6..7 r x 2 \n 8..9 r x 1", 4),
    "half of an unknown transaction": ("1.. w x 1, w y 1 \n 2..3 r x 1 \n 4..5 r y -", 2),
    "seen before an unknown call": ("1..2 r x 1 \n 3.. w x 1", 1),
    "unknown, gone, missing, and there later": ("1../4 w x 1 \n 5..6 r x - \n 7..8 r x 1", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_a_history_with_an_order(name: str) -> None:
    assert check(history(LEGAL[name])) is None


@pytest.mark.parametrize("name", ILLEGAL)
def test_a_history_without(name: str) -> None:
    text, n_answers = ILLEGAL[name]
    violation = check(history(text))
    assert violation is not None
    assert violation.n_answers == n_answers


def test_what_was_there_at_the_start() -> None:
    assert check(history("1..2 r x 0"), {"x": b"0"}) is None
    assert check(history("1..2 r x -"), {"x": b"0"}) is not None


def test_the_explanation_has_the_answer_the_values_and_the_candidates() -> None:
    violation = check(history("1..2 w x 1 \n 3..4 w x 2 \n 5..9 w x 3 \n 5..8 w y 7 \n 6..7 r x 1 \n 10..11 r x 9"))
    assert str(violation).splitlines() == [
        "the first 3 answers fit no order; all but the last do. The last:",
        "  client 4: read x -> 1  [6 .. 7]",
        "an order of all before it leads to: read x -> 2; candidates for the next place then:",
        "  client 2: write x 3  [5 .. 9]",
        "an order of all before it leads to: read x -> 3; candidates for the next place then:",
        "  none",
        "the latest operations on these keys that were called before its answer:",
        "  client 0: write x 1  [1 .. 2]",
        "  client 1: write x 2  [3 .. 4]",
        "  client 2: write x 3  [5 .. 9]",
    ]


def test_it_gives_up_on_a_search_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearizability, "MAX_CONFIGURATIONS", 2)
    with pytest.raises(linearizability.Undecided):
        check(history("1..9 w x 1 \n 1..9 w x 2 \n 1..9 w x 3 \n 1..9 r x 9"))


# -- against all permutations


def orders(operations: list[Operation]) -> bool:
    """Whether any permutation of any subset that has all answered ones is an order: slow and obvious."""
    answered = [operation for operation in operations if operation.returned_at is not None]
    unknown = [operation for operation in operations if operation.returned_at is None]
    for n in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, n):
            if any(map(is_order, itertools.permutations([*answered, *chosen]))):
                return True
    return False


def is_order(operations: tuple[Operation, ...]) -> bool:
    values: dict[str, bytes] = {}
    for i, operation in enumerate(operations):
        for other in operations[i + 1 :]:
            end = other.returned_at if other.returned_at is not None else other.gone_at
            if end is not None and end < operation.invoked_at:
                return False
        for kind, key, value in operation.steps:
            if kind is Kind.WRITE:
                assert isinstance(value, bytes)
                values[key] = value
            elif kind is Kind.RM:
                values.pop(key, None)
            elif (values.get(key) if kind is Kind.READ else key in values) != value:
                return False
    return True


def prefix(operations: list[Operation], until: int) -> list[Operation]:
    """What was called and answered up to then; what is open then may or may not be done."""
    called = [operation for operation in operations if operation.invoked_at <= until]
    return [replace(o, returned_at=None) if o.returned_at is not None and o.returned_at > until else o for o in called]


def any_operation(chance: random.Random, client: int) -> Operation:
    def step() -> str:
        key, value = chance.choice("xy"), chance.choice("12")
        return chance.choice(
            [f"r {key} {chance.choice('12-')}", f"w {key} {value}", f"rm {key}", f"e {key} {chance.choice('+-')}"]
        )

    done = steps(", ".join(step() for _ in range(chance.choice([1, 1, 1, 2, 3]))))
    begin = chance.randrange(12)
    end, unknown = begin + chance.randrange(1, 6), chance.random() < 0.35
    gone_at = end if unknown and chance.random() < 0.5 else None
    return Operation(client, begin, None if unknown else end, done, gone_at=gone_at)


def test_it_agrees_with_all_permutations() -> None:
    chance = random.Random(1)
    n_legal = 0
    for _ in range(2000):
        operations = [any_operation(chance, client) for client in range(chance.randrange(2, 6))]
        expected = orders(operations)
        found = check(operations)
        assert (found is None) is expected, "\n".join(map(str, operations))
        n_legal += expected
        if found is not None:
            end = found.operation.returned_at
            assert end is not None
            assert not orders(prefix(operations, end))
            assert orders(prefix(operations, end - 1)) or end in [
                o.returned_at for o in operations if o is not found.operation
            ]
    assert 200 < n_legal < 1800


# -- stores with and without mistakes


@pytest.mark.parametrize("seed", range(3 * ROUNDS))
@pytest.mark.parametrize(("loss", "restarts"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.002), (0.01, 0.001)])
def test_every_history_of_the_store_has_an_order(seed: int, loss: float, restarts: float) -> None:
    operations = stand_in.simulate(stand_in.Store(), seed, loss=loss, restarts=restarts)
    assert any(operation.transaction and not operation.failed for operation in operations)
    assert any(operation.failed for operation in operations)
    assert any(operation.returned_at is None for operation in operations) is (loss + restarts > 0)
    assert check(operations) is None


@pytest.mark.parametrize("seed", range(3 * ROUNDS))
@pytest.mark.parametrize(
    "mistaken",
    [stand_in.StaleReads, stand_in.ForgetsAtRestart, stand_in.CommitsByHalves, stand_in.IgnoresConflicts],
)
def test_a_mistake_of_a_store_is_found(mistaken: type[stand_in.Store], seed: int) -> None:
    assert check(stand_in.simulate(mistaken(), seed, n_operations=2000, restarts=0.002)) is not None


def test_a_long_history() -> None:
    assert check(stand_in.simulate(stand_in.Store(), 1, n_operations=5000, loss=0.001)) is None


# -- over sockets


def assert_ordered(operations: list[Operation]) -> None:
    assert any(operation.transaction and not operation.failed for operation in operations)
    violation = check(operations)
    assert violation is None, f"\n{violation}"


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_threads_of_one_process(seed: int) -> None:
    with XenstoreServer() as server:
        server.start()
        assert_ordered(free_run(server.connect, seed))


def free_run(dial: Callable[[], socket.socket], seed: int) -> list[Operation]:
    history = History(3000)
    drive(Client(READER, history, random.Random(seed)).prepare(), dial)
    run_clients(history, dial, seed)
    return history.operations


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_daemon(tmp_path: Path, seed: int) -> None:
    with xenstored(tmp_path) as daemon:
        daemon.open()
        assert_ordered(free_run(daemon.dial, seed))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_store_that_saves_before_it_answers_may_be_killed(tmp_path: Path, seed: int) -> None:
    with stand_in.saving(tmp_path, every=1) as daemon:
        assert_ordered(run_with_kills(daemon, n_operations=600, n_kills=3, seed=seed))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_one_that_saves_too_seldom_is_found(tmp_path: Path, seed: int) -> None:
    with stand_in.saving(tmp_path, every=25) as daemon:
        operations = run_with_kills(daemon, n_operations=600, n_kills=3, seed=seed)
    assert check(operations) is not None


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_daemon_with_a_journal_may_be_killed(tmp_path: Path, seed: int) -> None:
    with xenstored(tmp_path, "--journal", str(tmp_path / "journal")) as daemon:
        assert_ordered(run_with_kills(daemon, n_operations=3000, n_kills=6, seed=seed))
