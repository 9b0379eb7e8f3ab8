# SPDX-License-Identifier: MIT
"""The security advisories about xenstored, by number, which are about how much a guest may take.

The others are in `test_advisories`.
"""

import pytest

from paravirt.xenstore.limits import Limits
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.story import World, tell


def test_xsa_115_a_child_of_a_node_over_its_quota_can_be_removed_and_what_failed_is_not_counted() -> None:
    world = World(limits=Limits(node_bytes=60, nodes=4))
    world.tell("""
        dom0> WRITE /home/child|
        dom0< OK
        dom0> SET_PERMS /home|n5|
        dom0< OK
        dom0> SET_PERMS /home/child|n5|
        dom0< OK
        dom0> WRITE /home|longer than a guest may make it, by a few bytes
        dom0< OK
        dom5> MKDIR /home/more|
        dom5< ! ENOSPC
        dom5> RM /home/child|
        dom5< OK
        dom5> WRITE /home|
        dom5< OK
        dom5> MKDIR /home/a/b/c|
        dom5< ! ENOSPC
        dom5> MKDIR /home/a/b|
        dom5< OK
    """)
    assert world.hub.domains[5].n_nodes == 3
    assert world.hub.check() == []


def test_xsa_206_a_guest_that_writes_all_the_time_does_not_stop_a_commit() -> None:
    world = tell("""
        dom0> MKDIR /shared|
        dom0< OK
        dom0> SET_PERMS /shared|b0|
        dom0< OK
    """)
    guest = world.client("dom5")
    write = encode(Op.WRITE, 42, 0, b"/shared\0x")
    n_tries = 0
    committed = False
    while not committed:
        n_tries += 1
        number = world.ask("dom0", "TRANSACTION_START").rstrip("|")
        assert world.ask("dom0", "READ", "/shared|", int(number)) in ("", "x")
        for _ in range(5):  # it takes a while, in which the guest writes as much as it may
            if guest.wants_input:
                guest.feed(write * 10)
            world.received("dom5").clear()
            world.pass_time(0)
        committed = world.ask("dom0", "TRANSACTION_END", "T|", int(number)) == "OK"
        assert n_tries < 20
    assert not guest.wants_input


def test_xsa_272_making_nodes_is_not_free() -> None:
    world = World(limits=Limits(nodes=5))
    world.tell("""
        dom0> MKDIR /home|
        dom0< OK
        dom0> SET_PERMS /home|n5|
        dom0< OK
    """)
    for op, path in (("MKDIR", "/home/a|"), ("WRITE", "/home/b|"), ("WRITE", "/home/c|x")):
        assert world.ask("dom5", op, path) == "OK"
    for transaction in (0, int(world.ask("dom5", "TRANSACTION_START").rstrip("|"))):
        assert world.ask("dom5", "MKDIR", "/home/d|", transaction) == "! ENOSPC"
        assert world.ask("dom5", "WRITE", "/home/d|x", transaction) == "! ENOSPC"


def test_xsa_326_what_a_guest_holds_is_bounded_whatever_it_does() -> None:
    world = World(limits=Limits(memory_bytes=20_000))
    world.tell("""
        dom0> MKDIR /local/domain/5|
        dom0< OK
        dom0> SET_PERMS /local/domain/5|n5|
        dom0< OK
    """)
    guest = world.client("dom5")
    requests = b"".join(
        encode(Op.WATCH, 1, 0, b"%d\0%b\0" % (i, b"t" * 500))
        + encode(Op.TRANSACTION_START, 1, 0, b"\0")
        + encode(Op.WRITE, 1, i, b"n%d\0%b" % (i, b"v" * 1000))
        + encode(Op.WRITE, 1, 0, b"n%d\0%b" % (i, b"v" * 1000))
        + encode(Op.READ, 1, 0, b"n%d\0" % (i % 5))
        for i in range(200)
    )
    for at in range(0, len(requests), 1000):
        if guest.wants_input:
            guest.feed(requests[at : at + 1000])
        if guest.n_output_bytes > 500:
            guest.sent(500)
        world.let_go_on()
        assert world.hub.domains[5].memory_bytes < 20_000 + 2 * 4096
    assert world.hub.domains[5].n_outstanding <= 20
    assert guest.broken is None
    assert world.hub.check() == []


def test_xsa_330_resetting_watches_frees_them() -> None:
    world = World(limits=Limits(watches=10))
    for _ in range(1000):
        for i in range(9):
            world.send("dom5", Op.WATCH, b"/x\0%d\0" % i)
        world.received("dom5").clear()
        assert world.ask("dom5", "RESET_WATCHES") == "OK"
    assert world.hub.domains[5].n_watches == 0
    assert world.hub.statistics().watches == 0


def test_xsa_354_what_a_toolstack_reads_of_a_guest_is_bounded() -> None:
    world = World()
    world.tell("""
        dom0> MKDIR /local/domain/5/control|
        dom0< OK
        dom0> SET_PERMS /local/domain/5/control|n5|
        dom0< OK
        dom5> WRITE control/key|
        dom5< OK
    """)
    length = 0
    while world.ask("dom5", "WRITE", f"control/key|{'x' * (length + 1)}") == "OK":
        length += 1
    assert len(world.ask("dom0", "READ", "/local/domain/5/control/key|")) == length < 2048
    for i in range(2000):
        if world.ask("dom5", "MKDIR", f"control/{i}|") != "OK":
            break
    assert len(world.ask("dom0", "DIRECTORY", "/local/domain/5/control|")) < 2048


@pytest.mark.parametrize("in_transaction", [0, 1])
def test_xsa_414_415_what_cannot_be_made_leaves_nothing(in_transaction: int) -> None:
    world = World(limits=Limits(node_bytes=200))
    world.tell("""
        dom0> MKDIR /home|
        dom0< OK
        dom0> SET_PERMS /home|n5|
        dom0< OK
    """)
    if in_transaction:
        assert world.ask("dom5", "TRANSACTION_START") == "1|"
    nodes = world.tree()
    assert world.ask("dom5", "WRITE", b"/home/a/b/c\0" + b"x" * 300, in_transaction) == "! ENOSPC"
    if in_transaction:
        assert world.ask("dom5", "TRANSACTION_END", "T|", 1) == "! ENOMEM"
    assert world.tree() == nodes
    assert world.n_nodes(5) == 1
    assert world.ask("dom5", "WRITE", "/home/a/b/c|x") == "OK"


def test_xsa_416_replies_to_a_slow_guest_hold_what_they_are_and_no_more() -> None:
    world = World()
    world.ask("dom0", "WRITE", b"/big\0" + b"x" * 3000)
    world.ask("dom0", "SET_PERMS", "/big|r0|")
    guest, before = world.client("dom5"), world.hub.domains[5].memory_bytes
    for _ in range(10):
        guest.feed(encode(Op.READ, 1, 0, b"/big\0") * 5 + encode(Op.WATCH, 1, 0, b"/big\0t\0"))
        guest.feed(encode(Op.RESET_WATCHES, 1, 0, b"\0"))
        assert world.hub.domains[5].memory_bytes == before + guest.n_output_bytes
        while guest.n_output_bytes:
            guest.sent(min(7, guest.n_output_bytes))
        assert world.hub.domains[5].memory_bytes == before
    guest.feed(encode(Op.READ, 1, 0, b"/big\0") * 5)
    guest.sent(10)
    world.hub.disconnect(guest)
    assert world.hub.domains[5].memory_bytes == before


def test_xsa_483_the_count_of_a_domain_starts_anew_with_its_id() -> None:
    world = World(limits=Limits(nodes=5))
    for _ in range(3):
        assert world.ask("dom0", "MKDIR", "/home|") == "OK"
        assert world.ask("dom0", "INTRODUCE", "5|1|7|") == "OK"
        assert world.ask("dom0", "SET_PERMS", "/home|n5|") == "OK"
        world.clients.pop("dom5", None)
        assert [world.ask("dom5", "MKDIR", f"/home/{i}|") for i in range(4)] == ["OK", "OK", "OK", "! ENOSPC"]
        assert world.ask("dom0", "RELEASE", "5|") == "OK"
        assert world.n_nodes(5) == 0
