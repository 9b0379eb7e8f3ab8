# SPDX-License-Identifier: MIT
"""Who may do what, as dialogues."""

import pytest

from paravirt.xenstore.permissions import ALL, DOMID_ANY, IGNORED, READ, WRITE, Permissions
from tests.xenstore.story import World, tell


@pytest.mark.parametrize("wire", ["n0", "r7", "w1 b2", "b0 n1 r2 w65535", f"n0 r{DOMID_ANY}"])
def test_permissions_keep_their_form(wire: str) -> None:
    words = wire.encode().split()
    parsed = Permissions.parse(words)
    assert parsed is not None
    assert parsed.format() == b"".join(word + b"\0" for word in words)
    assert parsed == Permissions.parse(words)


@pytest.mark.parametrize("wire", ["", "x0", "r", "r-1", "r65536", "r1x", "0", "r 1", "R1", "r999999999999"])
def test_malformed_permissions(wire: str) -> None:
    assert Permissions.parse([wire.encode()] if wire else []) is None


def test_the_first_entry_that_fits_decides() -> None:
    permissions = Permissions(((1, READ), (2, WRITE), (3, 0), (2, READ | WRITE), (5, IGNORED | WRITE)))
    assert permissions.access(1, None) == ALL
    assert permissions.access(2, None) == WRITE
    assert permissions.access(3, None) == 0
    assert permissions.access(4, None) == READ
    assert permissions.access(5, None) == READ
    assert permissions.access(9, 1) == ALL
    assert permissions.access(9, 2) == WRITE
    assert Permissions(((0, 0), (DOMID_ANY, READ))).access(77, None) == READ


def test_a_guest_reads_and_writes_what_it_is_given() -> None:
    tell("""
        dom0> WRITE /none|x
        dom0< OK
        dom0> WRITE /read|x
        dom0< OK
        dom0> SET_PERMS /read|n0|r5|
        dom0< OK
        dom0> WRITE /write|x
        dom0< OK
        dom0> SET_PERMS /write|n0|w5|
        dom0< OK
        dom0> WRITE /all|x
        dom0< OK
        dom0> SET_PERMS /all|b0|
        dom0< OK
        dom5> READ /none|
        dom5< ! EACCES
        dom5> READ /read|
        dom5< x
        dom5> DIRECTORY /read|
        dom5<
        dom5> GET_PERMS /read|
        dom5< n0|r5|
        dom5> WRITE /read|y
        dom5< ! EACCES
        dom5> READ /write|
        dom5< ! EACCES
        dom5> WRITE /write|y
        dom5< OK
        dom0> READ /write|
        dom0< y
        dom5> WRITE /all|z
        dom5< OK
        dom5> READ /all|
        dom5< z
        dom6> READ /all|
        dom6< z
        dom6> READ /read|
        dom6< ! EACCES
        dom5> RM /read|
        dom5< ! EACCES
        dom5> RM /write|
        dom5< OK
        dom5> SET_PERMS /all|b0|
        dom5< ! EACCES
    """)


def test_a_guest_learns_nothing_of_what_it_may_not_see() -> None:
    tell("""
        dom0> WRITE /secret/there|x
        dom0< OK
        dom0> WRITE /open|x
        dom0< OK
        dom0> SET_PERMS /open|r0|
        dom0< OK
        dom5> READ /secret/there|
        dom5< ! EACCES
        dom5> READ /secret/missing|
        dom5< ! EACCES
        dom5> READ /missing|
        dom5< ! EACCES
        dom5> RM /secret/missing|
        dom5< ! EACCES
        dom5> READ /open/missing|       # the nearest ancestor may be read
        dom5< ! ENOENT
        dom5> READ /open/deep/missing|
        dom5< ! ENOENT
        dom5> WRITE /open/missing|x     # but not written
        dom5< ! EACCES
        dom5> MKDIR /open/missing|
        dom5< ! EACCES
    """)


def test_new_nodes_inherit_permissions_but_a_guest_owns_what_it_makes() -> None:
    tell("""
        dom0> MKDIR /home|
        dom0< OK
        dom0> SET_PERMS /home|n5|r6|
        dom0< OK
        dom5> WRITE /home/a/b|x
        dom5< OK
        dom0> GET_PERMS /home/a/b|
        dom0< n5|r6|
        dom0> WRITE /home/by-dom0|x
        dom0< OK
        dom0> GET_PERMS /home/by-dom0|
        dom0< n5|r6|
        dom0> MKDIR /shared|
        dom0< OK
        dom0> SET_PERMS /shared|b0|r6|
        dom0< OK
        dom5> MKDIR /shared/mine|
        dom5< OK
        dom5> GET_PERMS /shared/mine|
        dom5< b5|r6|
    """)


def test_only_the_owner_sets_permissions_and_only_dom0_gives_away() -> None:
    tell("""
        dom0> MKDIR /home|
        dom0< OK
        dom0> SET_PERMS /home|n5|b6|
        dom0< OK
        dom6> SET_PERMS /home|n6|
        dom6< ! EACCES
        dom5> SET_PERMS /home|r5|w6|
        dom5< OK
        dom5> SET_PERMS /home|r6|
        dom5< ! EPERM
        dom5> SET_PERMS /home|r0|
        dom5< ! EPERM
        dom5> GET_PERMS /home|
        dom5< r5|w6|
        dom0> SET_PERMS /home|r6|
        dom0< OK
        dom0> SET_PERMS /missing|r6|
        dom0< ! ENOENT
        dom0> SET_PERMS /home|r55|      # no such domain
        dom0< ! ENOENT
        dom0> SET_PERMS /home|q6|
        dom0< ! EINVAL
    """)


def test_counts_follow_the_owner() -> None:
    world = World()
    for path in ("/a", "/a/1", "/a/2"):
        world.ask("dom0", "WRITE", f"{path}|")
        assert world.ask("dom0", "SET_PERMS", f"{path}|n5|") == "OK"
    assert world.n_nodes(5) == 3
    assert world.ask("dom0", "SET_PERMS", "/a/1|n6|") == "OK"
    assert (world.n_nodes(5), world.n_nodes(6)) == (2, 1)
    assert world.ask("dom0", "RM", "/a|") == "OK"
    assert world.owners() == {0: 3}


def test_a_domain_has_the_rights_of_its_target() -> None:
    tell("""
        dom0> INTRODUCE 5|1|7|
        dom0< OK
        dom0> INTRODUCE 6|1|7|
        dom0< OK
        dom0> WRITE /of-5|x
        dom0< OK
        dom0> SET_PERMS /of-5|n5|
        dom0< OK
        dom6> READ /of-5|
        dom6< ! EACCES
        dom0> SET_TARGET 6|5|
        dom0< OK
        dom6> WRITE /of-5|y
        dom6< OK
        dom6> WRITE /of-5/new|y
        dom6< OK
        dom0> GET_PERMS /of-5/new|
        dom0< n6|
        dom5> READ /of-5/new|
        dom5< ! EACCES
        dom0> SET_TARGET 6|7|
        dom0< ! ENOENT
        dom0> SET_TARGET 7|6|
        dom0< ! ENOENT
        dom0> SET_TARGET 6|
        dom0< ! EINVAL
    """)


def test_special_nodes_have_permissions_of_their_own() -> None:
    tell("""
        dom0> GET_PERMS @releaseDomain|
        dom0< n0|r32757|
        dom0> GET_PERMS @introduceDomain|
        dom0< n0|
        dom5> GET_PERMS @introduceDomain|
        dom5< ! EACCES
        dom5> SET_PERMS @introduceDomain|n0|r5|
        dom5< ! EACCES
        dom0> SET_PERMS @introduceDomain|n0|r5|
        dom0< OK
        dom5> GET_PERMS @introduceDomain|
        dom5< n0|r5|
        dom0> GET_PERMS @other|
        dom0< ! EINVAL
        dom0> SET_PERMS @other|n0|
        dom0< ! EINVAL
    """)
