# SPDX-License-Identifier: MIT
"""Both engines, the one in Python and the one in C, are told the same: every byte, event and count must be the same.

Long: `make engines`, or ENGINES_ROUNDS=5000.
"""

import os
import random
from typing import Any

import pytest

from paravirt.xenstore.core import CoreHub
from paravirt.xenstore.hub import Hub
from paravirt.xenstore.limits import QUOTAS, Limits
from paravirt.xenstore.wire import Op, PacketParser, encode
from tests.xenstore.story import FakeDomains

ROUNDS = int(os.environ.get("ENGINES_ROUNDS", "60"))
FIRST = int(os.environ.get("ENGINES_SEED", "0"))
N_STEPS = 250
LIMITS = Limits(
    nodes=20, watches=5, transactions=5, transaction_nodes=12, node_bytes=120, path_bytes=40, outstanding=4,
    memory_bytes=2500, soft_memory_bytes=500, watch_event_timeout_ms=50, node_permissions=4,
    privileged_output_bytes=3000,
)  # fmt: skip
CLIENTS = ("dom0", "dom0b", "dom5", "dom5b", "dom6", "dom7")
PATHS = (
    b"/", b"/a", b"/a/b", b"/a/b/c", b"/a/d", b"/a/b/c/d/e", b"a", b"b", b"b/c", b"/local/domain/5",
    b"/local/domain/5/x", b"/local/domain/6", b"/local/domain/6/b", b"@releaseDomain", b"@introduceDomain",
    b"@releaseDomain/5", b"@other", b"", b"//", b"/a/", b"x" * 60, b"/a/a b", b"/local/domain",
)  # fmt: skip
SPECIAL = (b"@releaseDomain", b"@introduceDomain", b"@releaseDomain/5", b"@other")
OWNERS = (b"n5", b"b5", b"r6", b"b6", b"n7", b"n0", b"b0", b"w5")
PERMISSIONS = (b"r5", b"b6", b"n7", b"w7", b"r32757", b"n32757", b"r8", b"b20", b"n0")
DOMIDS = (b"5", b"6", b"7", b"0", b"9", b"20")
QUOTA_NAMES = tuple(name.encode() for name in QUOTAS)
WORDS = (
    *OWNERS, *PERMISSIONS, *DOMIDS, b"b5x", b"n99999", b"-1", b"T", b"token", b"", b"y" * 50, b"v" * 130, b"nodes",
    b" 5", b"5x", b"32752",
)  # fmt: skip
CHANGES = (
    *(Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS, Op.WATCH, Op.TRANSACTION_START, Op.TRANSACTION_END) * 4,
    Op.READ, Op.DIRECTORY, Op.UNWATCH, Op.WRITE, Op.WRITE,
)  # fmt: skip
OTHERS = (
    Op.DIRECTORY_PART, Op.GET_PERMS, Op.GET_DOMAIN_PATH, Op.IS_DOMAIN_INTRODUCED, Op.RESET_WATCHES,
)  # fmt: skip
ADMIN = (
    Op.INTRODUCE, Op.INTRODUCE, Op.RELEASE, Op.RESUME, Op.SET_TARGET, Op.SET_FEATURE, Op.SET_QUOTA, Op.GET_QUOTA,
    Op.GET_FEATURE,
)  # fmt: skip

Step = tuple[Any, ...]


def join(*parts: bytes) -> bytes:
    """Strings with a NUL after each."""
    return b"".join(part + b"\0" for part in parts)


class Dice(random.Random):
    """What the clients do, at random: mostly what makes sense."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.open: dict[str, list[int]] = {}
        """Transactions that a client may have open: a refusal to start one is not foreseen."""
        self.n_started: dict[str, int] = {}

    def transaction(self, name: str, op: int) -> int:
        """What a request of a client is part of."""
        mine = self.open.setdefault(name, [])
        if op == Op.TRANSACTION_START:
            if self.random() < 0.98 and len(mine) < 3:
                self.n_started[name] = self.n_started.get(name, 0) + 1
                mine.append(self.n_started[name])
                return 0
        elif op == Op.TRANSACTION_END and mine:
            return mine.pop(self.randrange(len(mine)))
        if self.random() < 0.03:
            return self.randrange(5)
        return self.choice(mine) if mine and self.random() < 0.7 else 0

    def end(self, kind: str) -> tuple[str, str]:
        """Somebody is not there any more, or in part."""
        name = self.choice(CLIENTS[2:])
        for other in CLIENTS:
            if other == name or (kind == "dies" and other.startswith(name[:4])):
                self.open.pop(other, None)
                if kind != "resets":
                    self.n_started.pop(other, None)
        return kind, name

    def path(self) -> bytes:
        return self.choice(PATHS[:12] if self.random() < 0.85 else PATHS)

    def word(self) -> bytes:
        return self.choice(WORDS)

    def permissions(self) -> list[bytes]:
        if self.random() < 0.1:
            return self.choices(WORDS, k=self.randrange(5))
        return [self.choice(OWNERS), *self.choices(PERMISSIONS, k=self.randrange(3))]

    def payload(self, op: int) -> bytes:
        """One that fits the operation, as a rule."""
        if self.random() < 0.04:
            parts = self.choices((*PATHS, *WORDS), k=self.randrange(5))
            return self.choice((b"\0".join(parts), join(*parts), self.randbytes(self.randrange(30))))
        match op:
            case Op.WRITE:
                return self.path() + b"\0" + self.word()
            case Op.SET_PERMS:
                return join(self.path(), *self.permissions())
            case Op.WATCH | Op.UNWATCH:
                depth = [self.choice((b"0", b"1", b"2", b"-1"))] if op == Op.WATCH and self.random() < 0.2 else []
                return join(self.choice((*PATHS[:12], *SPECIAL)), self.choice((b"t", b"u", b"y" * 50)), *depth)
            case Op.TRANSACTION_START | Op.RESET_WATCHES:
                return b"\0"
            case Op.TRANSACTION_END:
                return self.choice((b"T\0", b"T\0", b"T\0", b"F\0", b"X\0"))
            case Op.DIRECTORY_PART:
                return join(self.path(), self.choice((b"0", b"0", b"2", b"7", b"x", b"-1")))
            case Op.INTRODUCE:
                return join(self.choice(DOMIDS), b"1", self.choice((b"3", b"3", b"0")))
            case Op.SET_TARGET:
                return join(self.choice(DOMIDS), self.choice(DOMIDS))
            case Op.SET_FEATURE:
                return join(self.choice(DOMIDS), self.choice((b"0", b"4", b"8", b"15", b"15", b"15", b"16")))
            case Op.SET_QUOTA:
                domid = [self.choice(DOMIDS)] if self.random() < 0.8 else []
                return join(*domid, self.choice(QUOTA_NAMES), self.choice((b"0", b"2", b"5", b"40", b"1500")))
            case Op.GET_QUOTA | Op.GET_FEATURE | Op.RELEASE | Op.RESUME | Op.IS_DOMAIN_INTRODUCED | Op.GET_DOMAIN_PATH:
                return join(self.choice(DOMIDS))
        return join(self.path())

    def request(self, name: str) -> tuple[str, int, int, bytes]:
        ops = [*CHANGES, *OTHERS, *(ADMIN if name == "dom0" and self.random() < 0.5 else ())]
        op = int(self.choice(ops)) if self.random() < 0.98 else self.randrange(1, 30)
        return name, op, self.transaction(name, op), self.payload(op)

    def step(self) -> Step:
        name = self.choice(CLIENTS)
        chance = self.random()
        if chance < 0.62:
            return "ask", *self.request(name)
        if chance < 0.65:
            return "half", *self.request(name)
        if chance < 0.655:
            return "bytes", name, self.randbytes(self.randrange(40))
        if chance < 0.9:
            return "reads", name, self.choice((3, 16, 40, 100, 5000, 5000, 5000, 5000))
        if chance < 0.99:
            return "waits", self.choice((1, 5, 30, 60, 1000))
        return (
            self.end(self.choice(("dies", "leaves", "resets")))
            if self.random() < 0.8
            else ("stops", self.choice(CLIENTS[2:]))
        )


class Pair:
    """The same clients of two stores, and what each of them was sent."""

    def __init__(self) -> None:
        self.hubs: tuple[Any, Any] = (
            Hub(limits=LIMITS, control=FakeDomains(set(range(10)))),
            CoreHub(limits=LIMITS, control=FakeDomains(set(range(10)))),
        )
        self.clients: dict[str, tuple[Any, Any]] = {}
        self.parsers: dict[str, tuple[PacketParser, PacketParser]] = {}
        self.request_id = 0

    def client(self, name: str) -> tuple[Any, Any]:
        if name not in self.clients:
            python, c = (hub.connect(int(name[3])) for hub in self.hubs)
            self.clients[name] = python, c
            self.parsers[name] = PacketParser(), PacketParser()
        return self.clients[name]

    def feed(self, name: str, data: bytes) -> None:
        for connection in self.client(name):
            if connection.broken is None:
                connection.feed(data)

    def play(self, step: Step) -> None:
        kind, *rest = step
        match kind, rest:
            case "ask", (name, op, transaction, payload):
                self.request_id += 1
                self.feed(name, encode(op, self.request_id, transaction, payload))
            case "half", (name, op, transaction, payload):
                packet = encode(op, 1, transaction, payload)
                self.feed(name, packet[: len(packet) // 2])
                self.let_go_on()
                self.feed(name, packet[len(packet) // 2 :])
            case "bytes", (name, data):
                self.feed(name, data)
            case "reads", (name, n_bytes):
                self.read(name, n_bytes)
            case "waits", (milliseconds,):
                self.wait(milliseconds)
            case "resets", (name,):
                for connection in self.client(name):
                    connection.reset()
                self.parsers[name] = PacketParser(), PacketParser()
            case _, (name,):
                self.end(kind, name)
        self.let_go_on()
        for name in [name for name, pair in self.clients.items() if pair[0].closed]:
            assert self.clients.pop(name)[1].closed

    def end(self, kind: str, name: str) -> None:
        domid = int(name[3])
        for hub, connection in zip(self.hubs, self.client(name), strict=True):
            if kind == "dies":
                hub.died([domid])
            elif kind == "stops":
                hub.shut_down(domid)
            else:
                hub.disconnect(connection)

    def wait(self, milliseconds: int) -> None:
        for hub in self.hubs:
            hub.now_ms += milliseconds
            hub.on_time()

    def let_go_on(self) -> None:
        """In the order of the names in both, until nobody is to go on."""
        names = {connection: name for name, pair in self.clients.items() for connection in pair}
        while any(dirty := [self._dirty(0), self._dirty(1)]):
            for side in dirty:
                for connection in sorted(side, key=lambda connection: names.get(connection, "")):
                    connection.resume()

    def _dirty(self, engine: int) -> list[Any]:
        hub = self.hubs[engine]
        if engine == 0:
            dirty = list(hub.dirty)
            hub.dirty.clear()
            return dirty
        return list(iter(hub.next_dirty, None))

    def read(self, name: str, n_bytes: int) -> None:
        """Some bytes to both; what they get is the same but for generations of nodes."""
        python, c = self.client(name)
        outputs = python.output(), c.output()
        n_bytes = min(n_bytes, *map(len, outputs))
        assert n_bytes or not any(outputs)
        got = []
        for connection, output, parser in zip((python, c), outputs, self.parsers[name], strict=True):
            connection.sent(n_bytes)
            got.append(parser.feed(output[:n_bytes]))
        assert got[0] == got[1], name
        assert self.parsers[name][0].broken is self.parsers[name][1].broken is None

    def compare(self) -> None:
        python, c = self.hubs
        assert list(python.domains) == list(c.domains) or sorted(python.domains) == sorted(c.domains)
        for domid in python.domains:
            assert counts(python.domains[domid]) == counts(c.domains[domid]), domid
        for name, (left, right) in self.clients.items():
            assert state(left) == state(right), name
        assert python.next_timeout_ms() == c.next_timeout_ms()
        assert python.statistics().nodes == c.statistics().nodes


def counts(domain: Any) -> dict[str, Any]:
    names = (
        "n_outstanding",
        "n_watches",
        "n_nodes",
        "n_transactions",
        "memory_bytes",
        "features",
        "target",
        "introduced",
    )
    return {name: getattr(domain, name) for name in names}


def state(connection: Any) -> dict[str, Any]:
    names = ("wants_input", "n_output_bytes", "n_dropped_events", "closed")
    return {name: getattr(connection, name) for name in names} | {"broken": connection.broken is None}


def play(steps: list[Step]) -> Pair:
    pair = Pair()
    for name in CLIENTS:
        pair.client(name)
    for path, owner in (("/a", "b0"), ("/local/domain/5", "n5"), ("/local/domain/6", "n6")):
        pair.feed("dom0", encode(Op.MKDIR, 0, 0, path.encode() + b"\0"))
        pair.feed("dom0", encode(Op.SET_PERMS, 0, 0, f"{path}\0{owner}\0".encode()))
        pair.read("dom0", 5000)
    for step in steps:
        pair.play(step)
        pair.compare()
    for _ in range(40):
        for name in list(pair.clients):
            pair.read(name, 1 << 20)
        pair.play(("waits", 1000))
        pair.compare()
    for hub in pair.hubs:
        assert hub.check() == []
    pair.hubs[1].close()
    return pair


def fails(steps: list[Step]) -> bool:
    try:
        play(steps)
    except AssertionError:
        return True
    return False


def shrunk(steps: list[Step]) -> list[Step]:
    """Fewer steps that still fail: none of them can be left out."""
    n = len(steps) // 2
    while n:
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + n :]
            if fails(fewer):
                steps = fewer
            else:
                at += n
        n //= 2
    return steps


@pytest.mark.timeout(0)
def test_same() -> None:
    for seed in range(ROUNDS):
        dice = Dice(seed + FIRST)
        steps = [dice.step() for _ in range(N_STEPS)]
        if fails(steps):
            steps = shrunk(steps)
            print(f"seed {seed + FIRST}:", *steps, sep="\n    ")
            play(steps)
