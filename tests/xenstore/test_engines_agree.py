# SPDX-License-Identifier: MIT
"""Both engines, side by side: the same requests and happenings give the same packets, waits and books."""

import random
from collections.abc import Iterator

import pytest

from paravirt.xenstore.limits import Limits
from paravirt.xenstore.wire import Op, Packet, encode
from tests.xenstore import story
from tests.xenstore import test_session_fuzz as fuzz

OPERATIONS = (
    *range(28),
    *([Op.WRITE, Op.MKDIR, Op.RM, Op.WATCH, Op.SET_PERMS, Op.READ] * 4),
    *([Op.CONTROL, Op.TRANSACTION_START, Op.TRANSACTION_END] * 2),
    Op.TRANSACTION_END,
)
FIELDS = (
    "introduced", "shut_down", "target", "features", "n_nodes", "n_watches", "n_transactions", "n_outstanding",
    "memory_bytes",
)  # fmt: skip
ROOMY = Limits(nodes=40, watches=8, node_bytes=300, watch_event_timeout_ms=50)


class Pair:
    """A world of each engine."""

    def __init__(self, limits: Limits) -> None:
        self.worlds = []
        for engine in ("python", "c"):
            with Running(engine):
                self.worlds.append(story.World(limits=limits))
        for path, owner in (("/a", "b0"), ("/local/domain/5", "n5"), ("/local/domain/6", "n6")):
            self.send("dom0", Op.MKDIR, 0, f"{path}\0".encode())
            self.send("dom0", Op.SET_PERMS, 0, f"{path}\0{owner}\0".encode())

    def each(self) -> Iterator[story.World]:
        for engine, world in zip(("python", "c"), self.worlds, strict=True):
            with Running(engine):
                yield world

    def send(self, name: str, op: int, transaction: int, payload: bytes) -> None:
        for world in self.each():
            world.client(name).feed(encode(op, 1, transaction, payload))
            world.let_go_on()
        if name.startswith("dom0"):
            self.read(name, 1 << 20)

    def read(self, name: str, at_most: int) -> None:
        read = [list(map(comparable, world.read(name, at_most))) for world in self.each()]
        assert read[0] == read[1]

    def happen(self, what: str, name: str) -> None:
        if what.startswith("reads"):
            self.read(name, 20 if what == "reads a little" else 1 << 20)
        else:
            for world in self.each():
                fuzz.happen(world, what, name)

    def wants_input(self, name: str) -> bool:
        answers = [world.client(name).wants_input for world in self.each()]
        assert answers[0] == answers[1]
        return answers[0]

    def compare(self) -> None:
        seen = [observed(world) for world in self.each()]
        assert seen[0].keys() == seen[1].keys()
        for what in seen[0]:
            assert seen[0][what] == seen[1][what], what


def comparable(packet: Packet) -> Packet:
    """A packet without the generation of a node, which only has to change, and without what Dom0 holds: that of the
    request itself may be in it."""
    op, request_id, transaction_id, payload = packet
    if op == Op.DIRECTORY_PART:
        payload = payload.partition(b"\0")[2]
    elif payload.startswith(b"Domain 0:"):
        payload = b""
    return op, request_id, transaction_id, payload


def observed(world: story.World) -> dict[str, object]:
    """What can be seen of a world, by what it is."""
    world.let_go_on()
    for name in [name for name, connection in world.clients.items() if connection.closed]:
        del world.clients[name]
    hub = world.hub
    seen: dict[str, object] = {
        "timeout": hub.next_timeout_ms(),
        "statistics": hub.statistics(),
        "problems": hub.check(),
    }
    for domid, domain in sorted(hub.domains.items()):
        for field in FIELDS:
            seen[f"domain {domid}: {field}"] = getattr(domain, field)
        if domid:
            seen[f"domain {domid}: quotas"] = domain.quotas
            seen[f"domain {domid}: maxima"] = {name: count for name, count in domain.maxima.items() if count}
    for name, client in sorted(world.clients.items()):
        seen[f"client {name}"] = client.wants_input, client.n_output_bytes, client.n_dropped_events, world.unread(name)
    return seen


class Running:
    """Worlds are made and asked with this engine meanwhile."""

    def __init__(self, engine: str) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        story.engine = self._engine

    def __exit__(self, *_: object) -> None:
        story.engine = "python"


@pytest.mark.parametrize("limits", [fuzz.LIMITS, ROOMY], ids=["tight", "roomy"])
@pytest.mark.parametrize("seed", range(10))
def test_they_agree_over_long_lives(seed: int, limits: Limits) -> None:
    dice = random.Random(seed)
    pair = Pair(limits)
    for _ in range(600):
        name = dice.choice(fuzz.CLIENTS)
        if name.startswith("dom0") or (dice.random() < 0.6 and pair.wants_input(name)):
            words = dice.choices(fuzz.WORDS, k=dice.randrange(4))
            payload = b"".join(word + b"\0" for word in words)
            op = dice.choice(OPERATIONS)
            if op != Op.CONTROL or not payload.startswith(b"trace"):  # a trace has times in it
                pair.send(name, op, dice.choice((0, 0, 0, 1, 2, 3)), payload[: dice.choice((None, None, None, -1))])
        else:
            pair.happen(dice.choices(fuzz.HAPPENINGS, (1, 1, 1, 60, 60, 20))[0], name)
        pair.compare()
