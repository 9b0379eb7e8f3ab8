# SPDX-License-Identifier: MIT
"""Watches and their events, as dialogues."""

import pytest

from paravirt.xenstore.limits import Limits
from tests.xenstore.story import World, tell


def test_a_watch_fires_at_once_and_for_every_change_below() -> None:
    tell("""
        dom0> WATCH /a|token|
        dom0< OK
        dom0< * /a|token|
        dom0b> WRITE /a/b/c|1
        dom0b< OK
        dom0< * /a/b/c|token|
        dom0b> WRITE /a|1
        dom0b< OK
        dom0< * /a|token|
        dom0b> MKDIR /a/new|
        dom0b< OK
        dom0< * /a/new|token|
        dom0b> MKDIR /a/new|            # changes nothing
        dom0b< OK
        dom0b> SET_PERMS /a/new|r0|
        dom0b< OK
        dom0< * /a/new|token|
        dom0b> WRITE /ab|1              # not below
        dom0b< OK
        dom0b> RM /a/missing|
        dom0b< OK
        dom0b> RM /a/b|
        dom0b< OK
        dom0< * /a/b|token|
        dom0> UNWATCH /a|token|
        dom0< OK
        dom0b> WRITE /a|2
        dom0b< OK
    """)


def test_ones_own_events_come_before_the_reply_but_the_first_after_it() -> None:
    tell("""
        dom0> WATCH /|t|
        dom0< OK
        dom0< * /|t|
        dom0> WRITE /x|1
        dom0< * /x|t|
        dom0< OK
    """)


def test_removing_a_tree_tells_exact_watches_below_first_and_subtree_watches_once() -> None:
    tell("""
        dom0> WRITE /a/b/c|1
        dom0< OK
        dom0> WRITE /a/b/d|1
        dom0< OK
        dom0b> WATCH /a|top|
        dom0b< OK
        dom0b< * /a|top|
        dom0b> WATCH /a/b/c|deep|
        dom0b< OK
        dom0b< * /a/b/c|deep|
        dom0b> WATCH /a/b/missing|never|
        dom0b< OK
        dom0b< * /a/b/missing|never|
        dom0> RM /a/b|
        dom0< OK
        dom0b< * /a/b/c|deep|
        dom0b< * /a/b|top|
    """)


def test_malformed_and_double_watches() -> None:
    tell("""
        dom0> WATCH /a|
        dom0< ! EINVAL
        dom0> WATCH /a|t
        dom0< ! EINVAL
        dom0> WATCH /a|t|0|x|
        dom0< ! EINVAL
        dom0> WATCH /a|t|-1|
        dom0< ! EINVAL
        dom0> WATCH /a|t|x|
        dom0< ! EINVAL
        dom0> WATCH /a/|t|
        dom0< ! EINVAL
        dom0> WATCH /a b|t|
        dom0< ! EINVAL
        dom0> WATCH /a|t|
        dom0< OK
        dom0< * /a|t|
        dom0> WATCH /a|t|
        dom0< ! EEXIST
        dom0> WATCH /a|t|1|
        dom0< ! EEXIST
        dom0> WATCH /a|other|
        dom0< OK
        dom0< * /a|other|
        dom0b> WATCH /a|t|
        dom0b< OK
        dom0b< * /a|t|
        dom0> UNWATCH /a|nothing|
        dom0< ! ENOENT
        dom0> UNWATCH /b|t|
        dom0< ! ENOENT
        dom0> UNWATCH /a|t
        dom0< ! EINVAL
        dom0> UNWATCH /a|t|x|
        dom0< ! EINVAL
        dom0> UNWATCH /a/|t|
        dom0< ! EINVAL
        dom0> WATCH @a b|t|
        dom0< ! EINVAL
        dom0> WATCH /a|t|1234567890|
        dom0< ! EINVAL
        dom0> UNWATCH /a|t|
        dom0< OK
        dom0> UNWATCH /a|t|
        dom0< ! ENOENT
    """)


def test_relative_watches_give_relative_paths() -> None:
    tell("""
        dom5> WATCH data|t|
        dom5< OK
        dom5< * data|t|
        dom0> WRITE /local/domain/5/data/x|1
        dom0< OK
        dom0> SET_PERMS /local/domain/5/data|n5|
        dom0< OK
        dom5< * data|t|
        dom5> WRITE data/y|1
        dom5< * data/y|t|
        dom5< OK
        dom5> UNWATCH data|t|
        dom5< OK
        dom5> WATCH data|t|
        dom5< OK
        dom5< * data|t|
        dom5> UNWATCH /local/domain/5/data|t|
        dom5< OK
    """)


@pytest.mark.parametrize(("depth", "told"), [(0, ["/a"]), (1, ["/a", "/a/b"]), (2, ["/a", "/a/b", "/a/b/c"])])
def test_a_watch_looks_only_as_deep_as_it_is_told(depth: int, told: list[str]) -> None:
    world = World()
    world.send("dom0", 4, b"/a\0t\0%d\0" % depth)
    world.received("dom0").clear()
    for path in ("/a", "/a/b", "/a/b/c", "/a/b/c/d"):
        assert world.ask("dom0b", "WRITE", f"{path}|") == "OK"
    assert world.received("dom0") == [f"* {path}|t|" for path in told]


def test_a_watch_of_the_root_with_a_depth() -> None:
    tell("""
        dom0> WATCH /|t|1|
        dom0< OK
        dom0< * /|t|
        dom0b> WRITE /a|1
        dom0b< OK
        dom0< * /a|t|
        dom0b> WRITE /a/b|1
        dom0b< OK
    """)


def test_a_transaction_tells_of_each_path_once_when_it_commits() -> None:
    tell("""
        dom0> WRITE /old|1
        dom0< OK
        dom0b> WATCH /|t|
        dom0b< OK
        dom0b< * /|t|
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> WRITE@1 /a|1
        dom0< OK
        dom0> WRITE@1 /b|1
        dom0< OK
        dom0> WRITE@1 /a|2
        dom0< OK
        dom0> WRITE@1 /c|1              # made and removed: nobody could have seen it
        dom0< OK
        dom0> RM@1 /c|
        dom0< OK
        dom0> RM@1 /old|
        dom0< OK
        dom0> TRANSACTION_END@1 T|
        dom0< OK
        dom0b< * /a|t|
        dom0b< * /b|t|
        dom0b< * /old|t|
        dom0> TRANSACTION_START |
        dom0< 2|
        dom0> WRITE@2 /a|3
        dom0< OK
        dom0> TRANSACTION_END@2 F|
        dom0< OK
    """)


def test_the_kind_of_an_event_in_a_transaction_is_the_widest() -> None:
    tell("""
        dom0> WRITE /a/old|1
        dom0< OK
        dom0b> WATCH /a|top|
        dom0b< OK
        dom0b< * /a|top|
        dom0b> WATCH /a/old|deep|
        dom0b< OK
        dom0b< * /a/old|deep|
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> WRITE@1 /a/old|2          # for all watches,
        dom0< OK
        dom0> RM@1 /a|                  # and then for those of exactly this path
        dom0< OK
        dom0> TRANSACTION_END@1 T|
        dom0< OK
        dom0b< * /a/old|top|
        dom0b< * /a/old|deep|
        dom0b< * /a|top|
        dom0> WRITE /a/old|1
        dom0< OK
        dom0b< * /a/old|top|
        dom0b< * /a/old|deep|
        dom0> TRANSACTION_START |
        dom0< 2|
        dom0> RM@2 /a|
        dom0< OK
        dom0> WRITE@2 /a/old|2          # the other way round
        dom0< OK
        dom0> TRANSACTION_END@2 T|
        dom0< OK
        dom0b< * /a|top|
        dom0b< * /a/old|top|
        dom0b< * /a/old|deep|
    """)


def test_equal_events_of_one_wake_up_are_one() -> None:
    world = World()
    world.send("dom0", 4, b"/a\0t\0")
    world.received("dom0").clear()
    for value in "123":
        world.send("dom0b", 11, f"/a\0{value}".encode())
    assert world.received("dom0") == ["* /a|t|"]


def test_reset_drops_watches_and_transactions() -> None:
    world = tell("""
        dom0> WATCH /a|t|
        dom0< OK
        dom0< * /a|t|
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> RESET_WATCHES |
        dom0< OK
        dom0> READ@1 /|
        dom0< ! ENOENT
        dom0b> WRITE /a|1
        dom0b< OK
        dom0> WATCH /a|t|
        dom0< OK
        dom0< * /a|t|
    """)
    assert world.hub.domains[0].n_watches == 1


def test_equal_events_that_wait_unread_are_merged_and_order_is_kept() -> None:
    world = World()
    world.send("dom0", 4, b"/a\0t\0")
    slow = world.client("dom0")
    n_first = len(slow.output())
    slow.sent(n_first - 5)  # the client takes all but five bytes, then nothing
    for _ in range(1000):
        world.ask("dom0b", "WRITE", "/a/x|1")
        world.ask("dom0b", "WRITE", "/a/y|1")
    assert slow.n_output_bytes < 100
    slow.sent(5)
    assert world.received("dom0") == ["* /a/x|t|", "* /a/y|t|"]


def test_a_guest_that_does_not_read_loses_events_and_nothing_else() -> None:
    world = World(limits=Limits(memory_bytes=10_000))
    world.ask("dom0", "MKDIR", "/a|")
    world.ask("dom0", "SET_PERMS", "/a|r0|")
    world.send("dom5", 4, b"/a\0t\0")
    guest = world.client("dom5")
    world.read("dom5", 1)
    for i in range(2000):
        world.ask("dom0", "WRITE", f"/a/{i}|")
    assert world.hub.domains[5].memory_bytes < 10_000
    assert guest.n_dropped_events == 2002 - world.unread("dom5")  # its reply and first event wait, too
    assert guest.broken is None


def test_a_connection_of_dom0_that_does_not_read_is_given_up() -> None:
    world = World(limits=Limits(privileged_output_bytes=10_000))
    world.send("dom0", 4, b"/a\0t\0")
    deaf = world.client("dom0")
    deaf.sent(1)
    for i in range(2000):
        world.ask("dom0b", "WRITE", f"/a/{i}|")
    assert deaf.broken is not None
    assert deaf.n_output_bytes <= 10_000


def test_requests_wait_while_replies_pile_up() -> None:
    world = World()
    world.ask("dom0", "WRITE", b"/big\0" + b"x" * 4000)
    greedy = world.client("dom0b")
    for _ in range(1000):
        world.send("dom0b", 2, b"/big\0")
    assert greedy.n_output_bytes < 300_000
    assert not greedy.wants_input
    n_replies = 0
    while greedy.n_output_bytes:
        n_replies += len(world.received("dom0b"))
        world.received("dom0b").clear()
        greedy.resume()
    assert n_replies == 1000
    assert greedy.wants_input


def test_of_a_removed_subtree_who_could_read_a_parent_hears_of_its_child() -> None:
    tell("""
        dom0> WRITE /a/b/c|1
        dom0< OK
        dom0> SET_PERMS /a/b|r0|
        dom0< OK
        dom0> SET_PERMS /a/b/c|n0|
        dom0< OK
        dom2> WATCH /a/b/c|t|
        dom2< OK
        dom2< * /a/b/c|t|
        dom0> RM /a|
        dom0< OK
        dom2< * /a/b/c|t|
    """)


def test_bytes_after_the_last_string_of_a_watch_are_ignored() -> None:
    tell("""
        dom0> WATCH /a|t|more
        dom0< OK
        dom0< * /a|t|
        dom0> UNWATCH /a|t|more
        dom0< OK
    """)
