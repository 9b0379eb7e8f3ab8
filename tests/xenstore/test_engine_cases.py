# SPDX-License-Identifier: MIT
"""Cases in which the two engines were once found to differ."""

from paravirt.xenstore.limits import Limits
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.story import World, tell


def test_the_first_event_of_a_watch_that_is_partly_read_counts_for_nobody() -> None:
    world = World()
    world.client("dom5").feed(encode(Op.WATCH, 42, 0, b"/a\0t\0"))
    world.read("dom5", 16 + 3 + 5)
    assert world.hub.domains[5].n_outstanding == 0


def test_what_was_asked_before_an_impossible_length_is_answered_first() -> None:
    world = World(limits=Limits(outstanding=2))
    guest = world.client("dom5")
    guest.feed(encode(Op.GET_DOMAIN_PATH, 42, 0, b"1\0") * 3)
    guest.feed(b"\xff" * 16)
    assert guest.broken is None
    n_got = 0
    while guest.n_output_bytes:
        n_got += len(world.read("dom5"))
        world.let_go_on()
    assert n_got == 3
    assert guest.broken is not None


def test_a_domain_that_comes_again_has_the_quotas_of_new_ones() -> None:
    world = World()
    world.client("dom5")
    world.hub.died([5])
    assert world.ask("dom0", "SET_QUOTA", "watches|7|") == "OK"
    del world.clients["dom5"]
    world.client("dom5")
    assert world.ask("dom0", "GET_QUOTA", "5|watches|") == "7|"


def test_what_a_transaction_makes_and_removes_again_is_no_event() -> None:
    tell("""
        dom0> WATCH /a|t|
        dom0< OK
        dom0< * /a|t|
        dom0> MKDIR /a|
        dom0< * /a|t|
        dom0< OK
        dom0b> TRANSACTION_START |
        dom0b< 1|
        dom0b> WRITE@1 /a/b|value
        dom0b< OK
        dom0b> RM@1 /a|
        dom0b< OK
        dom0b> TRANSACTION_END@1 T|
        dom0b< OK
        dom0< * /a|t|
    """)
