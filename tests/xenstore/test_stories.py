# SPDX-License-Identifier: MIT
"""Operations and their errors as dialogues (`story`): the tree, transactions, listings.

Permissions, watches and domains have files of their own.
"""

import pytest

from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES, Op
from tests.xenstore.story import World, tell


def test_a_new_store_has_what_the_c_daemon_has() -> None:
    tell("""
        dom0> DIRECTORY /|
        dom0< tool|
        dom0> DIRECTORY /tool|
        dom0< xenstored|
        dom0> DIRECTORY /tool/xenstored|
        dom0<
        dom0> GET_PERMS /tool|
        dom0< n0|
    """)


def test_write_makes_parents_and_read_gives_the_value_back() -> None:
    tell("""
        dom0> WRITE /a/b/c|one
        dom0< OK
        dom0> READ /a/b/c|
        dom0< one
        dom0> READ /a/b|
        dom0<
        dom0> WRITE /a/b/c|two|with a NUL|
        dom0< OK
        dom0> READ /a/b/c|
        dom0< two|with a NUL|
        dom0> WRITE /a/b/c|
        dom0< OK
        dom0> READ /a/b/c|
        dom0<
        dom0> WRITE /|root has a value too
        dom0< OK
        dom0> READ /|
        dom0< root has a value too
    """)


def test_relative_paths_start_at_home() -> None:
    tell("""
        dom0> WRITE here|1
        dom0< OK
        dom0> READ /local/domain/0/here|
        dom0< 1
        dom0> WRITE /local/domain/5|
        dom0< OK
        dom5> READ /local/domain/5|
        dom5< ! EACCES
        dom0> SET_PERMS /local/domain/5|n5|
        dom0< OK
        dom5> WRITE data/x|2
        dom5< OK
        dom0> READ /local/domain/5/data/x|
        dom0< 2
    """)


def test_malformed_requests_are_invalid() -> None:
    tell("""
        dom0> READ
        dom0< ! EINVAL
        dom0> READ /a
        dom0< ! EINVAL
        dom0> READ |
        dom0< ! EINVAL
        dom0> READ /a|/b|
        dom0< ! EINVAL
        dom0> READ /a/|
        dom0< ! EINVAL
        dom0> READ @releaseDomain|
        dom0< ! EINVAL
        dom0> WRITE /a
        dom0< ! EINVAL
        dom0> WRITE /a b|v
        dom0< ! EINVAL
        dom0> MKDIR //|
        dom0< ! EINVAL
        dom0> RM |
        dom0< ! EINVAL
        dom0> DIRECTORY /tool
        dom0< ! EINVAL
        dom0> GET_PERMS tool//|
        dom0< ! EINVAL
        dom0> SET_PERMS /tool|
        dom0< ! EINVAL
        dom0> SET_PERMS /tool|n0
        dom0< ! EINVAL
        dom0> SET_PERMS //|n0|
        dom0< ! EINVAL
    """)


def test_mkdir_of_what_exists_changes_nothing() -> None:
    tell("""
        dom0> MKDIR /a/b|
        dom0< OK
        dom0> WRITE /a/b|v
        dom0< OK
        dom0> MKDIR /a/b|
        dom0< OK
        dom0> READ /a/b|
        dom0< v
        dom0> MKDIR /|
        dom0< OK
    """)


def test_rm_takes_everything_below() -> None:
    tell("""
        dom0> WRITE /a/b/c|1
        dom0< OK
        dom0> RM /a/b|
        dom0< OK
        dom0> READ /a/b/c|
        dom0< ! ENOENT
        dom0> DIRECTORY /a|
        dom0<
        dom0> RM /a/b|                  # missing, but its parent is there
        dom0< OK
        dom0> RM /a/b/c|
        dom0< ! ENOENT
        dom0> RM /|
        dom0< ! EINVAL
    """)


def test_children_stand_in_the_order_they_were_made() -> None:
    tell("""
        dom0> WRITE /d/z|
        dom0< OK
        dom0> WRITE /d/a|
        dom0< OK
        dom0> WRITE /d/m|
        dom0< OK
        dom0> RM /d/z|
        dom0< OK
        dom0> WRITE /d/z|
        dom0< OK
        dom0> DIRECTORY /d|
        dom0< a|m|z|
    """)


def test_unknown_operations_do_not_exist() -> None:
    for op in (*range(15, 17), 20, 27, 99, 0xFFFF, 0xFFFFFFFF):
        tell(f"""
            dom0> {op} /|
            dom0< ! ENOSYS
            dom5> {op}@7 /|
            dom5< ! ENOSYS
        """)


def test_the_order_of_checks() -> None:
    tell("""
        dom5> RELEASE@9 junk            # Dom0's only, before the transaction is looked for
        dom5< ! EACCES
        dom0> RELEASE@9 junk            # the transaction before the arguments
        dom0< ! ENOENT
        dom0> READ@9 junk
        dom0< ! ENOENT
        dom0> RESET_WATCHES@9
        dom0< ! ENOENT
        dom0> WATCH@9 /x|t|             # watches do not look at it
        dom0< OK
        dom0< * /x|t|
        dom0> UNWATCH@9 /x|t|
        dom0< OK
    """)


DOM0_ONLY = (
    "CONTROL", "INTRODUCE", "RELEASE", "RESUME", "SET_TARGET", "IS_DOMAIN_INTRODUCED", "GET_FEATURE", "SET_FEATURE",
    "GET_QUOTA", "SET_QUOTA",
)  # fmt: skip


@pytest.mark.parametrize("op", DOM0_ONLY)
def test_what_only_dom0_may_ask(op: str) -> None:
    assert World().ask("dom5", op, "5|5|5|") == "! EACCES"


def test_transactions_show_nothing_before_they_commit() -> None:
    tell("""
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> WRITE@1 /a|mine
        dom0< OK
        dom0> READ@1 /a|
        dom0< mine
        dom0> READ /a|
        dom0< ! ENOENT
        dom0b> READ /a|
        dom0b< ! ENOENT
        dom0b> READ@1 /a|               # ids are per connection
        dom0b< ! ENOENT
        dom0> TRANSACTION_END@1 T|
        dom0< OK
        dom0b> READ /a|
        dom0b< mine
        dom0> READ@1 /a|
        dom0< ! ENOENT
    """)


def test_the_ways_a_transaction_ends() -> None:
    tell("""
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> TRANSACTION_START@1 |     # none inside another
        dom0< ! EBUSY
        dom0> TRANSACTION_END@1 X|
        dom0< ! EINVAL
        dom0> TRANSACTION_END@1 T
        dom0< ! EINVAL
        dom0> WRITE@1 /a|v
        dom0< OK
        dom0> TRANSACTION_END@1 F|
        dom0< OK
        dom0> READ /a|
        dom0< ! ENOENT
        dom0> TRANSACTION_END@1 T|
        dom0< ! ENOENT
        dom0> TRANSACTION_END T|
        dom0< ! ENOENT
        dom0> TRANSACTION_START         # its payload is not looked at; ids are not used again at once
        dom0< 2|
    """)


CONFLICTS = {
    "what it read was changed": ("READ@1 /d/n|", "WRITE /d/n|new"),
    "what it read was removed": ("READ@1 /d/n|", "RM /d/n|"),
    "what it missed was made": ("READ@1 /d/missing|", "WRITE /d/missing|x"),
    "the directory of what it missed got another child": ("READ@1 /d/missing|", "WRITE /d/other|x"),
    "what it wrote was written": ("WRITE@1 /d/n|mine", "WRITE /d/n|theirs"),
    "it made a node and somebody else made a sister": ("WRITE@1 /d/new|mine", "WRITE /d/sister|theirs"),
    "permissions of what it read were changed": ("READ@1 /d/n|", "SET_PERMS /d/n|r0|"),
    "what it listed got a child": ("DIRECTORY@1 /d|", "WRITE /d/more|x"),
    "what it listed was written": ("DIRECTORY@1 /d|", "WRITE /d|x"),
    "what it removed was written": ("RM@1 /d/n|", "WRITE /d/n|x"),
}


@pytest.mark.parametrize("why", CONFLICTS)
def test_a_transaction_fails_because(why: str) -> None:
    in_transaction, outside = CONFLICTS[why]
    world = World()
    assert world.ask("dom0", "WRITE", "/d/n|old") == "OK"
    assert world.ask("dom0", "TRANSACTION_START") == "1|"
    world.send("dom0", Op[in_transaction.split("@")[0]], in_transaction.split(" ")[1].replace("|", "\0").encode(), 1)
    world.received("dom0").clear()
    assert world.ask("dom0b", *outside.split(" ", 1)) == "OK"
    assert world.ask("dom0", "TRANSACTION_END", "T|", 1) == "! EAGAIN"
    assert world.ask("dom0", "TRANSACTION_END", "T|", 1) == "! ENOENT"


PEACE = {
    "others wrote elsewhere": ("WRITE@1 /d/n|mine", "WRITE /elsewhere/x|theirs"),
    "a child's value is not its parent's": ("DIRECTORY@1 /d|", "WRITE /d/n|theirs"),
    "it looked at nothing": ("TRANSACTION_START@1 |", "WRITE /d/n|theirs"),
}


@pytest.mark.parametrize("why", PEACE)
def test_a_transaction_commits_because(why: str) -> None:
    in_transaction, outside = PEACE[why]
    world = World()
    assert world.ask("dom0", "WRITE", "/d/n|old") == "OK"
    assert world.ask("dom0", "TRANSACTION_START") == "1|"
    world.send("dom0", Op[in_transaction.split("@")[0]], in_transaction.split(" ")[1].replace("|", "\0").encode(), 1)
    world.received("dom0").clear()
    assert world.ask("dom0b", *outside.split(" ", 1)) == "OK"
    assert world.ask("dom0", "TRANSACTION_END", "T|", 1) == "OK"


def test_a_transaction_sees_a_node_as_it_was_at_the_first_look() -> None:
    tell("""
        dom0> WRITE /a|1
        dom0< OK
        dom0> WRITE /b|1
        dom0< OK
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0b> WRITE /a|2
        dom0b< OK
        dom0> READ@1 /a|                # not a snapshot of the start: the first look
        dom0< 2
        dom0b> WRITE /a|3
        dom0b< OK
        dom0b> WRITE /b|3
        dom0b< OK
        dom0> READ@1 /a|
        dom0< 2
        dom0> READ@1 /b|
        dom0< 3
        dom0> READ@1 /c|
        dom0< ! ENOENT
        dom0b> WRITE /c|3
        dom0b< OK
        dom0> READ@1 /c|                # missing stays missing
        dom0< ! ENOENT
        dom0> DIRECTORY@1 /|
        dom0< tool|a|b|                 # the root was looked at when /c was missing
        dom0> TRANSACTION_END@1 T|
        dom0< ! EAGAIN
    """)


def test_a_transaction_may_make_change_and_remove() -> None:
    world = tell("""
        dom0> WRITE /keep/x|1
        dom0< OK
        dom0> WRITE /gone/x/y|1
        dom0< OK
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> RM@1 /gone|
        dom0< OK
        dom0> WRITE@1 /gone/x|again
        dom0< OK
        dom0> WRITE@1 /fresh/a/b|1
        dom0< OK
        dom0> RM@1 /fresh/a|
        dom0< OK
        dom0> SET_PERMS@1 /keep|r0|
        dom0< OK
        dom0> DIRECTORY@1 /gone|
        dom0< x|
        dom0> TRANSACTION_END@1 T|
        dom0< OK
        dom0> DIRECTORY /gone|
        dom0< x|
        dom0> DIRECTORY /gone/x|
        dom0<
        dom0> DIRECTORY /fresh|
        dom0<
        dom0> GET_PERMS /keep|
        dom0< r0|
        dom0> DIRECTORY /|
        dom0< tool|keep|gone|fresh|
    """)
    assert world.owners() == {0: len(world.tree())}


def test_long_listings_come_in_parts() -> None:
    world = World()
    names = [f"child-{i:04d}" for i in range(1200)]
    for name in names:
        assert world.ask("dom0", "WRITE", f"/many/{name}|") == "OK"
    assert world.ask("dom0", "DIRECTORY", "/many|") == "! E2BIG"
    listing, generations = "", set()
    while not listing.endswith("||"):
        generation, _, part = world.ask("dom0", "DIRECTORY_PART", f"/many|{len(listing)}|").partition("|")
        assert len(generation) + 1 + len(part) <= PAYLOAD_MAX_BYTES
        generations.add(generation)
        listing += part
    assert listing.split("|")[:-2] == names
    assert len(generations) == 1
    world.ask("dom0", "WRITE", "/many/one-more|")
    assert world.ask("dom0", "DIRECTORY_PART", "/many|0|").partition("|")[0] not in generations


def test_edges_of_listings_in_parts() -> None:
    world = World()
    assert world.ask("dom0", "WRITE", "/d/ab|") == "OK"
    generation = world.ask("dom0", "DIRECTORY_PART", "/d|0|").partition("|")[0]
    for offset, expected in (("0", "ab||"), ("1", "b||"), ("3", "|"), ("99", "|"), ("-1", "|"), ("x", "ab||")):
        assert world.ask("dom0", "DIRECTORY_PART", f"/d|{offset}|") == f"{generation}|{expected}"
    assert world.ask("dom0", "DIRECTORY_PART", "/d/ab|0|").endswith("||")
    for malformed in ("", "/d|", "/d|0|x|"):
        assert world.ask("dom0", "DIRECTORY_PART", malformed) == "! EINVAL"
    assert world.ask("dom0", "DIRECTORY_PART", "/no|0|") == "! ENOENT"
    assert world.ask("dom5", "DIRECTORY_PART", "/d|0|") == "! EACCES"


def test_a_listing_of_exactly_one_payload_fits() -> None:
    world = World()
    for i in range(16):
        assert world.ask("dom0", "MKDIR", f"/d/{i:0255d}|") == "OK"
    assert len(world.ask("dom0", "DIRECTORY", "/d|")) == PAYLOAD_MAX_BYTES
    assert world.ask("dom0", "MKDIR", "/d/x|") == "OK"
    assert world.ask("dom0", "DIRECTORY", "/d|") == "! E2BIG"
