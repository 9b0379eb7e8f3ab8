# SPDX-License-Identifier: MIT
"""Any bytes, from any client, in any order: only the protocol's own answers, and the store's books stay right."""

from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.xenstore.limits import Limits
from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES, Errno, Op, PacketParser, encode
from tests.xenstore.story import World

LIMITS = Limits(nodes=12, watches=4, transactions=3, transaction_nodes=10, node_bytes=120, path_bytes=40)
CLIENTS = ("dom0", "dom0b", "dom5", "dom5b", "dom6")
WORDS = (
    b"/", b"/a", b"/a/b", b"/a/b/c", b"a", b"b/c", b"/local/domain/5", b"/local/domain/5/x", b"/local/domain/6",
    b"@releaseDomain", b"@introduceDomain", b"n5", b"r0", b"b6", b"n0", b"5", b"6", b"1", b"0", b"-1", b"T", b"F", b"t",
    b"", b"//", b"/a/", b"x" * 60,
)  # fmt: skip

payloads = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=4).map(lambda words: b"".join(word + b"\0" for word in words)),
    st.lists(st.sampled_from(WORDS), max_size=3).map(b"\0".join),
    st.binary(max_size=30),
)
requests = st.tuples(st.sampled_from(CLIENTS), st.integers(0, 27), st.integers(0, 3), payloads)
deaths = st.tuples(st.sampled_from(["dies", "shuts down", "leaves"]), st.sampled_from([5, 6]))


def check_books(world: World) -> None:
    """Everything that is counted twice agrees."""
    hub = world.hub
    nodes = hub.store.nodes
    owners: dict[int, int] = {}
    for path, node in nodes.items():
        owners[node.permissions.owner] = owners.get(node.permissions.owner, 0) + 1
        assert node.listing == b"".join(name + b"\0" for name in node.children or ())
        assert node.n_name_bytes == len(node.listing)
        for name in node.children or ():
            assert path.rstrip(b"/") + b"/" + name in nodes
        if path != b"/":
            parent, _, name = path.rpartition(b"/")
            assert nodes[parent or b"/"].has_child(name)
    assert hub.store.statistics() == owners
    assert all(owner in hub.domains for owner in owners)
    for domain in hub.domains.values():
        assert domain.n_watches == sum(len(connection.watches) for connection in domain.connections)
        assert domain.n_transactions == sum(len(connection.transactions) for connection in domain.connections)
        if not domain.privileged:
            assert hub.store.owned(domain.domid) <= 40  # Dom0 may give a guest more than it may make
            assert domain.n_watches < LIMITS.watches
            assert domain.n_transactions < LIMITS.transactions
    n_watches = sum(map(len, hub.watches._by_path.values()))
    assert n_watches == sum(domain.n_watches for domain in hub.domains.values())


def drain(world: World, name: str) -> None:
    """Read what a client got: well-formed packets, and errors that exist."""
    connection = world.client(name)
    parser = PacketParser()
    while connection.n_output_bytes:
        data = connection.output()
        connection.sent(len(data))
        for op, _, _, payload in parser.feed(data):
            assert len(payload) <= PAYLOAD_MAX_BYTES
            if op == Op.ERROR:
                assert payload in {errno.value for errno in Errno}
    assert parser.broken is None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(requests, deaths), max_size=60))
def test_any_requests_and_deaths(steps: list[tuple[str, int, int, bytes] | tuple[str, int]]) -> None:
    world = World(limits=LIMITS)
    for path, owner in (("/a", "b0"), ("/local/domain/5", "n5"), ("/local/domain/6", "n6")):
        assert world.ask("dom0", "MKDIR", f"{path}|") == "OK"
        assert world.ask("dom0", "SET_PERMS", f"{path}|{owner}|") == "OK"
    for step in steps:
        if len(step) == 2:
            what, domid = step
            if what == "dies":
                world.hub.died([domid])
            elif what == "shuts down":
                world.hub.shut_down(domid)
            else:
                world.hub.disconnect(world.client(f"dom{domid}"))
            for name in [name for name, connection in world.clients.items() if connection.closed]:
                del world.clients[name]
        else:
            name, op, transaction, payload = step
            client = world.client(name)
            client.feed(encode(op, 1, transaction, payload))
            assert client.broken is None
            for other in [name for name, connection in world.clients.items() if connection.closed]:
                del world.clients[other]
            if not client.closed:
                drain(world, name)
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
