# SPDX-License-Identifier: MIT
"""Any bytes, from any client, in any order: only the protocol's own answers, and the store's books stay right."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paravirt.xenstore.domains import Domain
from paravirt.xenstore.limits import Limits, reached
from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES, Errno, Op, Packet, encode
from tests.xenstore.story import World

LIMITS = Limits(
    nodes=12, watches=4, transactions=3, transaction_nodes=10, node_bytes=120, path_bytes=40, outstanding=4,
    memory_bytes=1500, soft_memory_bytes=500, watch_event_timeout_ms=50,
)  # fmt: skip
CLIENTS = ("dom0", "dom0b", "dom5", "dom5b", "dom6")
WORDS = (
    b"/", b"/a", b"/a/b", b"/a/b/c", b"a", b"b/c", b"/local/domain/5", b"/local/domain/5/x", b"/local/domain/6",
    b"@releaseDomain", b"@introduceDomain", b"n5", b"r0", b"b6", b"n0", b"5", b"6", b"1", b"0", b"-1", b"T", b"F", b"t",
    b"", b"//", b"/a/", b"x" * 60, b"r32757", b"@releaseDomain/5", b"7", b"15", b"log", b"quota", b"set", b"nodes",
    b"memory", b"outstanding", b"trace", b"help", b"check", b"max", b"-r", b"live-update", b"-s", b"-f", b"print",
    b"memreport",
)  # fmt: skip

payloads = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=4).map(lambda words: b"".join(word + b"\0" for word in words)),
    st.lists(st.sampled_from(WORDS), max_size=3).map(b"\0".join),
    st.binary(max_size=30),
)
requests = st.tuples(st.sampled_from(CLIENTS), st.integers(0, 27), st.integers(0, 3), payloads)
HAPPENINGS = ("dies", "shuts down", "leaves", "reads a little", "reads", "waits")
happenings = st.tuples(st.sampled_from(HAPPENINGS), st.sampled_from(("dom5", "dom5b", "dom6")))


def check_books(world: World) -> None:
    """Everything that is counted twice agrees."""
    hub = world.hub
    assert hub.check() == []
    for domain in hub.domains.values():
        assert domain.n_outstanding >= 0
        assert hub.statistics().memory_bytes >= domain.memory_bytes >= 0
        if domain.privileged:
            assert domain.n_outstanding == 0
        else:
            assert domain.n_outstanding <= 4 or domain.quotas["outstanding"] != 4
            assert domain.n_watches < LIMITS.watches
            assert domain.n_transactions < LIMITS.transactions


def holds_too_much(domain: Domain) -> bool:
    return not domain.privileged and reached(domain.memory_bytes, domain.quotas["memory"])


def check_that_all_go_on(world: World) -> None:
    """Once everybody reads and some time has passed nobody is held back, unless he holds too much memory."""
    for _ in range(1000):
        for name in world.clients:
            drain(world, name)
        world.pass_time(1000)
        if not any(connection.n_output_bytes or not connection.wants_input for connection in world.clients.values()):
            break
    for domain in world.hub.domains.values():
        assert domain.n_outstanding == 0
    for connection in world.clients.values():
        assert connection.wants_input is not holds_too_much(connection.domain)
    assert world.hub.next_timeout_ms() is None


def drain(world: World, name: str) -> None:
    """Read what a client got: well-formed packets, and errors that exist."""
    while world.client(name).n_output_bytes:
        check_packets(world.read(name))


def check_packets(packets: list[Packet]) -> None:
    for op, _, _, payload in packets:
        assert len(payload) <= PAYLOAD_MAX_BYTES
        if op == Op.ERROR:
            assert payload in {errno.value for errno in Errno}


def world_with_homes() -> World:
    world = World(limits=LIMITS)
    for path, owner in (("/a", "b0"), ("/local/domain/5", "n5"), ("/local/domain/6", "n6")):
        assert world.ask("dom0", "MKDIR", f"{path}|") == "OK"
        assert world.ask("dom0", "SET_PERMS", f"{path}|{owner}|") == "OK"
    return world


def happen(world: World, what: str, name: str) -> None:
    hub, client = world.hub, world.client(name)
    if what == "dies":
        hub.died([client.domain.domid])
    elif what == "shuts down":
        hub.shut_down(client.domain.domid)
    elif what == "leaves":
        hub.disconnect(client)
    elif what.startswith("reads"):
        check_packets(world.read(name, 20 if what == "reads a little" else 1 << 20))
    else:
        world.pass_time(5)


def send(world: World, name: str, op: int, transaction: int, payload: bytes) -> None:
    """A request; Dom0 reads at once, others when it happens."""
    client = world.client(name)
    client.feed(encode(op, 1, transaction, payload))
    assert client.broken is None
    if client.domain.privileged:
        drain(world, name)


def settle(world: World) -> None:
    world.let_go_on()
    for name in [name for name, connection in world.clients.items() if connection.closed]:
        del world.clients[name]
    check_books(world)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(requests, requests, happenings), max_size=80))
def test_any_requests_and_happenings(steps: list[tuple[str, int, int, bytes] | tuple[str, str]]) -> None:
    world = world_with_homes()
    for step in steps:
        if len(step) == 2:
            happen(world, *step)
        else:
            send(world, *step)
        settle(world)
    check_that_all_go_on(world)
    check_books(world)


@pytest.mark.parametrize("seed", range(8))
def test_long_lives(seed: int) -> None:
    """Guests that mostly read what they are sent and wait while they are told to, for long."""
    dice = random.Random(seed)
    world = world_with_homes()
    n_held_back = 0
    for _ in range(1500):
        name = dice.choice(CLIENTS)
        if name.startswith("dom0") or (dice.random() < 0.5 and world.client(name).wants_input):
            op = dice.choice((*range(27), *([Op.WRITE, Op.MKDIR, Op.WATCH, Op.TRANSACTION_START, Op.SET_PERMS] * 4)))
            words = dice.choices(WORDS, k=dice.randrange(4))
            send(world, name, op, dice.choice((0, 0, 0, 1, 2, 3)), b"".join(word + b"\0" for word in words))
        else:
            happen(world, dice.choices(HAPPENINGS, (1, 1, 1, 60, 60, 20))[0], name)
        n_held_back += not all(connection.wants_input for connection in world.clients.values())
        settle(world)
    assert n_held_back
    check_that_all_go_on(world)
    check_books(world)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CLIENTS), st.binary(max_size=80)), max_size=20))
def test_any_bytes(steps: list[tuple[str, bytes]]) -> None:
    world = World(limits=LIMITS)
    for name, data in steps:
        client = world.client(name)
        client.feed(data)
        drain(world, name)
    check_books(world)
