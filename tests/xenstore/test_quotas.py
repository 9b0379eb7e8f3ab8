# SPDX-License-Identifier: MIT
"""What a guest may take at most, counted exactly; Dom0 may take more."""

import pytest

from paravirt.xenstore.limits import Limits
from tests.xenstore.story import World

SMALL = Limits(
    nodes=10, watches=4, transactions=3, transaction_nodes=6, node_permissions=4, path_bytes=40, node_bytes=100
)


def world_with_home(limits: Limits | None = None) -> World:
    """Domain 5 owns its home, one node."""
    world = World(limits=limits)
    assert world.ask("dom0", "MKDIR", "/local/domain/5|") == "OK"
    assert world.ask("dom0", "SET_PERMS", "/local/domain/5|n5|") == "OK"
    return world


def take_until_refused(world: World, client: str, op: str, arguments: str) -> int:
    """How often a request works before it is ENOSPC; `{}` in the arguments is a running number."""
    for i in range(10_000):
        world.send(
            client,
            {"MKDIR": 12, "WATCH": 4, "TRANSACTION_START": 6}[op],
            arguments.format(i).replace("|", "\0").encode(),
        )
        first = world.received(client)[0]
        world.received(client).clear()
        if first == "! ENOSPC":
            return i
    raise AssertionError("never refused")


def test_the_c_daemons_defaults() -> None:
    world = world_with_home()
    assert take_until_refused(world, "dom5", "WATCH", "/w|{}|") == 127
    assert take_until_refused(world, "dom5", "TRANSACTION_START", "|") == 9
    assert world.ask("dom5", "RESET_WATCHES") == "OK"  # else it may not write as fast as it will now
    assert take_until_refused(world, "dom5", "MKDIR", "{}/x|") == 499  # two nodes each, one home
    assert world.n_nodes(5) == 999
    assert world.ask("dom5", "SET_PERMS", "0|n5|r1|r2|r3|") == "OK"
    assert world.ask("dom5", "SET_PERMS", "0|n5|r1|r2|r3|r4|") == "! ENOSPC"


def test_names_of_children_count_as_the_c_daemon_counts_them() -> None:
    world = world_with_home()
    assert world.ask("dom5", "MKDIR", "d|") == "OK"
    assert take_until_refused(world, "dom5", "MKDIR", "d/{}|") == 533


@pytest.mark.parametrize(("value_bytes", "answer"), [(75, "OK"), (76, "! ENOSPC")])
def test_a_value_counts_with_its_node(value_bytes: int, answer: str) -> None:
    world = world_with_home(SMALL)
    assert world.ask("dom5", "WRITE", b"n\0" + b"x" * value_bytes) == answer
    assert world.ask("dom5", "MKDIR", "m|") == "OK"
    assert world.ask("dom5", "WRITE", b"m\0" + b"x" * value_bytes) == answer
    assert world.ask("dom0", "WRITE", b"/local/domain/5/m\0" + b"x" * 4000) == "OK"
    assert world.ask("dom5", "MKDIR", "m/below|") == "! ENOSPC"
    assert world.ask("dom5", "SET_PERMS", "m|n5|r0|") == "! ENOSPC"


def test_what_was_refused_leaves_nothing_behind() -> None:
    world = world_with_home(SMALL)
    before = world.tree(), world.owners()
    assert world.ask("dom5", "WRITE", b"a/b/c\0" + b"x" * 200) == "! ENOSPC"
    assert world.ask("dom5", "MKDIR", "1/2/3/4/5/6/7/8/9|") == "! ENOSPC"
    assert (world.tree(), world.owners()) == before
    assert world.ask("dom0", "DIRECTORY", "/local/domain/5|") == ""


def test_removing_makes_room_again() -> None:
    world = world_with_home(SMALL)
    for _ in range(5):
        assert take_until_refused(world, "dom5", "MKDIR", "n{}|") == 8
        for i in range(8):
            assert world.ask("dom5", "RM", f"n{i}|") == "OK"
    assert world.n_nodes(5) == 1


def test_removing_a_child_of_a_node_that_is_over_its_quota() -> None:
    world = world_with_home(SMALL)
    assert world.ask("dom5", "MKDIR", "d/child|") == "OK"
    assert world.ask("dom0", "WRITE", b"/local/domain/5/d\0" + b"x" * 500) == "OK"
    assert world.ask("dom5", "RM", "d/child|") == "OK"


def test_paths_are_limited_below_a_home() -> None:
    world = world_with_home(SMALL)
    assert world.ask("dom5", "WRITE", b"x" * 39 + b"\0v") == "OK"
    assert world.ask("dom5", "WRITE", b"x" * 40 + b"\0v") == "! EINVAL"
    assert world.ask("dom5", "READ", b"/" + b"y" * 39 + b"\0") == "! EINVAL"
    assert world.ask("dom0", "WRITE", b"/local/domain/5/" + b"x" * 40 + b"\0v") == "OK"
    assert world.ask("dom5", "READ", b"x" * 40 + b"\0") == "! EINVAL"
    assert world.ask("dom5", "WATCH", b"x" * 40 + b"\0t\0") == "! EINVAL"


def test_a_transaction_looks_at_so_many_nodes_only() -> None:
    world = world_with_home(SMALL)
    for i in range(4):
        assert world.ask("dom5", "MKDIR", f"n{i}|") == "OK"
    assert world.ask("dom5", "TRANSACTION_START") == "1|"
    for i in range(4):
        assert world.ask("dom5", "READ", f"n{i}|", 1) == ""
    assert world.ask("dom5", "READ", "n0|", 1) == ""
    assert world.ask("dom5", "READ", "/local/domain/5|", 1) == ""
    for op, arguments in (("READ", "m|"), ("WRITE", "m|v"), ("RM", "m|"), ("DIRECTORY", "m|"), ("GET_PERMS", "m|")):
        assert world.ask("dom5", op, arguments, 1) == "! ENOSPC"
    assert world.ask("dom5", "TRANSACTION_END", "T|", 1) == "! ENOMEM"


def test_removing_a_tree_in_a_transaction_counts_its_nodes() -> None:
    world = world_with_home(SMALL)
    for i in range(6):
        assert world.ask("dom5", "MKDIR", f"d/n{i}|") == "OK"
    assert world.ask("dom5", "TRANSACTION_START") == "1|"
    assert world.ask("dom5", "RM", "d|", 1) == "! ENOSPC"
    assert world.ask("dom5", "TRANSACTION_END", "T|", 1) == "! ENOMEM"
    assert world.ask("dom5", "RM", "d|") == "OK"


def test_a_failed_write_fails_the_transaction() -> None:
    world = world_with_home(SMALL)
    assert world.ask("dom5", "TRANSACTION_START") == "1|"
    assert world.ask("dom5", "WRITE", "good|1", 1) == "OK"
    assert world.ask("dom5", "WRITE", b"bad\0" + b"x" * 200, 1) == "! ENOSPC"
    assert world.ask("dom5", "TRANSACTION_END", "T|", 1) == "! ENOMEM"
    assert world.ask("dom5", "READ", "good|") == "! ENOENT"


def test_nodes_are_counted_again_when_transactions_commit() -> None:
    world = world_with_home(SMALL)
    assert world.ask("dom5", "MKDIR", "a|") == "OK"
    assert world.ask("dom5", "MKDIR", "b|") == "OK"
    for name, number in (("a", 1), ("b", 2)):
        assert world.ask("dom5", "TRANSACTION_START") == f"{number}|"
        for i in range(3):
            assert world.ask("dom5", "MKDIR", f"{name}/n{i}|", number) == "OK"
    assert world.ask("dom5", "TRANSACTION_END", "T|", 1) == "OK"
    assert world.ask("dom5", "MKDIR", "c|") == "OK"
    assert world.n_nodes(5) == 7
    assert world.ask("dom5", "TRANSACTION_END", "T|", 2) == "! ENOSPC"
    assert world.n_nodes(5) == 7
    assert world.ask("dom5", "READ", "b/n0|") == "! ENOENT"


def test_a_quota_of_zero_is_none() -> None:
    world = world_with_home(Limits(nodes=0, watches=0, transactions=0, node_bytes=0, path_bytes=0, node_permissions=0))
    for i in range(1500):
        assert world.ask("dom5", "MKDIR", f"d/node-{i}|") == "OK"
    assert world.ask("dom5", "SET_PERMS", "d|n5" + "|r0" * 30 + "|") == "OK"
    for i in range(50):
        assert world.ask("dom5", "TRANSACTION_START") == f"{i + 1}|"


def test_dom0_has_no_quota() -> None:
    world = World(limits=SMALL)
    for i in range(50):
        assert world.ask("dom0", "WRITE", f"/d/node-{i}|{'x' * 1000}") == "OK"
        assert world.ask("dom0", "TRANSACTION_START") == f"{i + 1}|"
        for j in range(20):
            assert world.ask("dom0", "READ", f"/d/{j}|", i + 1) in ("! ENOENT", "x" * 1000)
    assert world.ask("dom0", "SET_PERMS", "/d|n0" + "|r5" * 30 + "|") == "OK"


def test_quotas_are_per_domain_not_per_connection() -> None:
    world = world_with_home(SMALL)
    assert take_until_refused(world, "dom5", "WATCH", "/w|{}|") == 3
    assert take_until_refused(world, "dom5b", "WATCH", "/w|{}|") == 0
    assert take_until_refused(world, "dom6", "WATCH", "/w|{}|") == 3
    world.hub.disconnect(world.client("dom5"))
    assert take_until_refused(world, "dom5b", "WATCH", "/w|{}|") == 3
