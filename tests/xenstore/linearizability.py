# SPDX-License-Identifier: MIT
"""Whether a history can have come from a store that does one operation at a time, each between its call and its answer.

The store is a map of keys to values; a transaction is one operation on several keys. The search is that of Wing and
Gong with the memory of configurations that Lowe added. It goes through the answers in the order of time. An answer
whose operation has no place in the order yet gets one now, after any of the operations that are open at that time. A
configuration is how far it got, the values, and which open operations have a place; none is looked at twice.

What keeps it small: an operation that changes nothing gets its place as soon as what it saw is there; one whose outcome
is unknown is tried only where somebody may see it; keys that no operation joins are searched apart.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

MAX_CONFIGURATIONS: Final = 300_000
_ABSENT: Final = -1
_PRESENT: Final = -2  # what "exists" saw: some value
_NEVER: Final = -3
_ALWAYS: Final = float("inf")
_TOLD: Final = 12


class Undecided(Exception):
    """The search looked at `MAX_CONFIGURATIONS` and found no order; there may be one."""


class Kind(Enum):
    READ = "read"
    EXISTS = "exists"
    WRITE = "write"
    RM = "rm"


class Step(NamedTuple):
    """What was done to one key. `value`: what was written or read (None: nothing was there), or whether it exists."""

    kind: Kind
    key: str
    value: bytes | bool | None = None

    def __str__(self) -> str:
        if self.kind is Kind.RM:
            return f"rm {self.key}"
        arrow = "" if self.kind is Kind.WRITE else "-> "
        value = self.value.decode("latin-1") if isinstance(self.value, bytes) else self.value
        return f"{self.kind.value} {self.key} {arrow}{'missing' if value is None else value}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of one client; times are of one clock, in any unit.

    `returned_at` None: the outcome is unknown. It may have been done at any time after the call, but not later than
    `gone_at` if that is known, or never. `failed`: a transaction that was given up or met a conflict, so that it had no
    effect; what it saw means nothing.
    """

    client: int
    invoked_at: int
    returned_at: int | None
    steps: tuple[Step, ...]
    transaction: bool = False
    failed: bool = False
    gone_at: int | None = None

    def __str__(self) -> str:
        steps = "; ".join(map(str, self.steps))
        what = f"transaction {{{steps}}}" if self.transaction else steps
        end = "unknown" if self.returned_at is None else self.returned_at
        return f"client {self.client}: {what}  [{self.invoked_at} .. {end}]{' failed' if self.failed else ''}"


@dataclass(frozen=True, slots=True)
class Violation:
    """Why there is no order.

    The first `n_answers` answers of the history are the shortest prefix that cannot be ordered. `operation` is the one
    whose answer is the last of them. `states`: the values of its keys that orders of all before it lead to, with the
    operations that may still come then. `earlier`: the latest operations on these keys that were called before.
    """

    operation: Operation
    n_answers: int
    states: tuple[tuple[Mapping[str, bytes | None], tuple[Operation, ...]], ...]
    earlier: tuple[Operation, ...]

    def __str__(self) -> str:
        lines = [
            f"the first {self.n_answers} answers fit no order; all but the last do. The last:",
            f"  {self.operation}",
        ]
        for values, candidates in self.states:
            shown = ", ".join(str(Step(Kind.READ, key, value)) for key, value in values.items())
            lines.append(f"an order of all before it leads to: {shown}; candidates for the next place then:")
            lines += [f"  {operation}" for operation in candidates] or ["  none"]
        lines.append("the latest operations on these keys that were called before its answer:")
        lines += [f"  {operation}" for operation in self.earlier] or ["  none"]
        return "\n".join(lines)


def check(history: Iterable[Operation], initial: Mapping[str, bytes] | None = None) -> Violation | None:
    """Look for an order; None if there is one, else why not. `initial`: the values at the start."""
    done = [operation for operation in history if not operation.failed]
    search = _Compiler(initial or {})
    calls = _observable([call for operation in done if (call := search.compile(operation)) is not None])
    violations = []
    for group in _independent(calls):
        found = _Search(group, search.start()).run()
        if found is not None:
            violations.append(_explain(found, done, search))
    return min(violations, key=lambda violation: violation.n_answers, default=None)


# -- operations as numbers


Pairs = tuple[tuple[int, int], ...]
State = tuple[int, ...]


class _Call:
    """An operation with keys and values as numbers: what it needs to find, what it leaves."""

    __slots__ = ("bit", "needs", "operation", "seen_until", "sets", "simple", "unknown")

    def __init__(self, operation: Operation, needs: Pairs, sets: Pairs) -> None:
        self.operation = operation
        self.needs = needs
        self.sets = sets
        self.unknown = operation.returned_at is None
        self.simple = len(sets) == 1 and not needs
        self.bit = 0
        self.seen_until: tuple[float, ...] = ()  # for each of `sets`: after that nobody can see it

    def fits(self, state: State) -> bool:
        for key, value in self.needs:
            found = state[key]
            if found != value and (value != _PRESENT or found == _ABSENT):
                return False
        return True

    def after(self, state: State) -> State:
        if not self.sets:
            return state
        values = list(state)
        for key, value in self.sets:
            values[key] = value
        return tuple(values)

    def wanted_by(self, other: "_Call", state: State, now: float) -> bool:
        """Whether this, of unknown outcome, may have to come next in the order for the sake of `other`.

        Otherwise it can come later or be left out: either `other` waits for something that this sets, or `other` would
        spoil this, of which something else is seen after `now`.
        """
        for key, value in self.sets:
            for at, need in other.needs:
                if at == key and _matches(value, need) and not _matches(state[key], need):
                    return True
        if self.simple:
            return False
        spoilt = {key for key, _ in other.sets}
        if spoilt.isdisjoint(key for key, _ in (*self.sets, *self.needs)):
            return False
        return any(
            key not in spoilt and state[key] != value and until >= now
            for (key, value), until in zip(self.sets, self.seen_until, strict=True)
        )


def _matches(value: int, need: int) -> bool:
    return value == need or (need == _PRESENT and value != _ABSENT)


class _Compiler:
    """Numbers keys and values as they come."""

    def __init__(self, initial: Mapping[str, bytes]) -> None:
        self.keys: dict[str, int] = {}
        self.values: dict[bytes, int] = {}
        self._initial = {self._key(key): self._value(value) for key, value in initial.items()}

    def _key(self, key: str) -> int:
        return self.keys.setdefault(key, len(self.keys))

    def _value(self, value: bytes) -> int:
        return self.values.setdefault(value, len(self.values))

    def start(self) -> State:
        return tuple(self._initial.get(key, _ABSENT) for key in range(len(self.keys)))

    def compile(self, operation: Operation) -> _Call | None:
        """None if it had no effect that matters: it only looked and nobody knows what it saw."""
        needs: dict[int, int] = {}
        sets: dict[int, int] = {}
        consistent = True
        for kind, name, value in operation.steps:
            key = self._key(name)
            if kind is Kind.RM:
                sets[key] = _ABSENT
                continue
            number = self._value(value) if isinstance(value, bytes) else _PRESENT if value else _ABSENT
            if kind is Kind.WRITE:
                sets[key] = number
            elif key in sets:
                consistent &= _matches(sets[key], number)
            elif needs.get(key, _PRESENT) == _PRESENT:
                consistent &= key not in needs or number != _ABSENT
                needs[key] = number
            else:
                consistent &= _matches(needs[key], number)
        if operation.returned_at is None and not (sets and consistent):
            return None
        if not consistent:
            needs = dict.fromkeys([*needs, *sets], _NEVER)
        return _Call(operation, tuple(needs.items()), tuple(sets.items()))


def _observable(calls: list[_Call]) -> list[_Call]:
    """All but those of unknown outcome that nobody can have seen: without them an order is an order as well."""
    latest: dict[tuple[int, int], float] = {}
    kept: list[_Call] = []
    doubtful = calls
    while True:
        news = [call for call in doubtful if not call.unknown or _is_seen(call, latest)]
        if not news:
            break
        kept += news
        added = set(map(id, news))
        doubtful = [call for call in doubtful if id(call) not in added]
        for call in news:
            end = call.operation.returned_at
            for need in call.needs:
                latest[need] = max(latest.get(need, 0.0), _ALWAYS if end is None else end)
    for call in kept:
        if call.unknown:
            call.seen_until = tuple(_seen_until(setting, latest) for setting in call.sets)
    return kept


def _is_seen(call: _Call, latest: Mapping[tuple[int, int], float]) -> bool:
    return any(_seen_until(setting, latest) >= call.operation.invoked_at for setting in call.sets)


def _seen_until(setting: tuple[int, int], latest: Mapping[tuple[int, int], float]) -> float:
    """The last answer to a call that may have seen this value of this key."""
    until = latest.get(setting, -1.0)
    return until if setting[1] == _ABSENT else max(until, latest.get((setting[0], _PRESENT), -1.0))


def _independent(calls: list[_Call]) -> list[list[_Call]]:
    """Groups of calls that have no key in common with another group."""
    leaders: dict[int, int] = {}

    def leader(key: int) -> int:
        while leaders.setdefault(key, key) != key:
            leaders[key] = key = leaders[leaders[key]]
        return key

    for call in calls:
        touched = [key for key, _ in (*call.needs, *call.sets)]
        for key in touched[1:]:
            leaders[leader(key)] = leader(touched[0])
    groups: dict[int, list[_Call]] = {}
    for call in calls:
        for key, _ in (*call.needs, *call.sets)[:1]:
            groups.setdefault(leader(key), []).append(call)
    return list(groups.values())


# -- the search


class _End(Enum):
    """What happens at a deadline. Of the first two kinds only `ANSWER` must find its call in the order."""

    ANSWER = 0
    GONE = 1  # of unknown outcome, and cannot be done any longer
    FORGOTTEN = 2  # of unknown outcome, and nobody can see any longer whether it was done


class _Deadline(NamedTuple):
    """The end of `call`.

    The others are the calls that are open then, itself included: those that only look, those that change something,
    those whose outcome is unknown.
    """

    at: float
    end: _End
    call: _Call
    lookers: tuple[_Call, ...]
    changers: tuple[_Call, ...]
    unknown: tuple[_Call, ...]


class _Configuration(NamedTuple):
    """`n_deadlines` are behind; `placed` and `used` are the bits of open calls that have a place already."""

    n_deadlines: int
    state: State
    placed: int
    used: int


class _Stuck(NamedTuple):
    """The deadline that no configuration gets over, and those that come to it."""

    deadline: _Deadline
    configurations: list[_Configuration]


def _deadlines(calls: Sequence[_Call]) -> list[_Deadline]:
    events: list[tuple[float, int, int]] = []
    for i, call in enumerate(calls):
        events.append((call.operation.invoked_at, -1, i))
        events += [(at, end.value, i) for at, end in [_end(call)] if at < _ALWAYS]
    lookers: dict[int, _Call] = {}
    changers: dict[int, _Call] = {}
    unknown: dict[int, _Call] = {}
    free: tuple[list[int], list[int]] = ([], [])  # bits that no open call has any longer
    n_bits = [0, 0]
    found = []
    for at, end, i in sorted(events):
        call = calls[i]
        place = unknown if call.unknown else changers if call.sets else lookers
        if end >= 0:
            others = tuple(lookers.values()), tuple(changers.values()), tuple(unknown.values())
            found.append(_Deadline(at, _End(end), call, *others))
            del place[i]
            free[call.unknown].append(call.bit)
            continue
        if not free[call.unknown]:
            free[call.unknown].append(1 << n_bits[call.unknown])
            n_bits[call.unknown] += 1
        call.bit = free[call.unknown].pop()
        place[i] = call
    return found


def _end(call: _Call) -> tuple[float, _End]:
    operation = call.operation
    if operation.returned_at is not None:
        return operation.returned_at, _End.ANSWER
    until = max(call.seen_until)
    if operation.gone_at is not None and operation.gone_at <= until:
        return operation.gone_at, _End.GONE
    return until, _End.FORGOTTEN


class _Search:
    """Looks for an order of calls whose keys hang together."""

    def __init__(self, calls: Sequence[_Call], start: State) -> None:
        self._deadlines = _deadlines(calls)
        self._start = start
        self._seen: dict[tuple[int, State, int], list[int]] = {}
        self._furthest: list[_Configuration] = []

    def run(self) -> _Stuck | None:
        """None if there is an order. Raises `Undecided`."""
        n_looked_at = 0
        stack: list[Iterator[_Configuration]] = [iter([_Configuration(0, self._start, 0, 0)])]
        while stack:
            configuration = next(stack[-1], None)
            if configuration is None:
                stack.pop()
                continue
            configuration = self._advance(configuration)
            if configuration.n_deadlines == len(self._deadlines):
                return None
            if self._is_new(configuration):
                n_looked_at += 1
                if n_looked_at > MAX_CONFIGURATIONS:
                    raise Undecided
                stack.append(self._next(configuration))
        return _Stuck(self._deadlines[self._furthest[0].n_deadlines], self._furthest)

    def _advance(self, configuration: _Configuration) -> _Configuration:
        """Place what only looks and fits; go over the deadlines of calls that have their place."""
        n, state, placed, used = configuration
        while n < len(self._deadlines):
            _, end, call, lookers, _, _ = self._deadlines[n]
            for looker in lookers:
                if not placed & looker.bit and looker.fits(state):
                    placed |= looker.bit
            if end is _End.ANSWER:
                if not placed & call.bit:
                    break
                placed ^= call.bit
            elif end is _End.GONE and not used & call.bit:
                break
            else:
                used &= ~call.bit
            n += 1
        return _Configuration(n, state, placed, used)

    def _is_new(self, configuration: _Configuration) -> bool:
        """Not if it, or the same with fewer unknown calls used up, has been looked at."""
        n, state, placed, used = configuration
        before = self._seen.setdefault((n, state, placed), [])
        if any(other & used == other for other in before):
            return False
        before.append(used)
        if not self._furthest or n > self._furthest[0].n_deadlines:
            self._furthest = []
        if not self._furthest or n == self._furthest[0].n_deadlines:
            self._furthest.append(configuration)
        return True

    def _next(self, configuration: _Configuration) -> Iterator[_Configuration]:
        """What one more call in the order leads to, the likeliest first."""
        n, state, placed, used = configuration
        deadline = self._deadlines[n]
        call = deadline.call
        if deadline.end is _End.GONE:
            yield _Configuration(n + 1, state, placed, used)
            if call.fits(state):
                yield _Configuration(n, call.after(state), placed, used | call.bit)
        elif call.sets and call.fits(state):
            yield _Configuration(n, call.after(state), placed | call.bit, used)
        for other in deadline.changers:
            if other is not call and not placed & other.bit and other.fits(state):
                yield _Configuration(n, other.after(state), placed | other.bit, used)
        for other in _first_of_equals(deadline.unknown, used):
            if other is not call and other.fits(state) and self._wanted(other, deadline, state, placed):
                yield _Configuration(n, other.after(state), placed, used | other.bit)

    def _wanted(self, unknown: _Call, deadline: _Deadline, state: State, placed: int) -> bool:
        waiting = [call for call in (*deadline.lookers, *deadline.changers) if not placed & call.bit]
        waiting += [call for call in deadline.unknown if call is not unknown and (call.needs or not unknown.simple)]
        return any(unknown.wanted_by(call, state, deadline.at) for call in waiting)


def _first_of_equals(unknown: Iterable[_Call], used: int) -> Iterator[_Call]:
    """Those that are left; of equal ones that may be done at any time just one, as it does not matter which."""
    tried: set[tuple[Pairs, Pairs]] = set()
    for call in unknown:
        alike = call.needs, call.sets
        if not used & call.bit and (call.operation.gone_at is not None or alike not in tried):
            if call.operation.gone_at is None:
                tried.add(alike)
            yield call


def _explain(stuck: _Stuck, history: Sequence[Operation], compiler: _Compiler) -> Violation:
    deadline, configurations = stuck
    operation = deadline.call.operation
    end = operation.returned_at
    assert end is not None
    names = list(compiler.keys)
    values: list[bytes | None] = [*compiler.values, None]
    touched = dict(deadline.call.needs) | dict(deadline.call.sets)
    states: dict[State, tuple[Mapping[str, bytes | None], tuple[Operation, ...]]] = {}
    for _, state, placed, used in configurations:
        candidates = [call for call in (*deadline.lookers, *deadline.changers) if not placed & call.bit]
        candidates += [call for call in deadline.unknown if not used & call.bit]
        shown = {names[key]: values[state[key]] for key in touched}
        others = [call for call in candidates if call is not deadline.call]
        useful = [call.operation for call in others if not touched.keys().isdisjoint(dict(call.sets))]
        states.setdefault(tuple(state[key] for key in touched), (shown, tuple(useful)))
    on_these = {names[key] for key in touched}
    earlier = [
        other
        for other in history
        if other.invoked_at <= end and other is not operation and any(step.key in on_these for step in other.steps)
    ]
    earlier.sort(key=lambda other: other.invoked_at)
    n_answers = sum(other.returned_at is not None and other.returned_at <= end for other in history)
    return Violation(operation, n_answers, tuple(states.values())[:_TOLD], tuple(earlier[-_TOLD:]))
