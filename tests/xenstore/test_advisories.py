# SPDX-License-Identifier: MIT
"""Tests for each security advisory about xenstored (Xen Security Advisories, by number).

Those about how much a guest may take are in `test_advisories_quotas`.
"""

import struct

import pytest

from paravirt.xenstore.wire import HEADER, Op, encode
from tests.xenstore.story import World, tell


def test_xsa_38_partial_messages_wait_and_harm_nobody() -> None:
    world = World()
    guest = world.client("dom5")
    for junk in (b"\2", b"\0" * 7, b"\0\0\0\0\0\0\0\0"):
        guest.feed(junk)
    assert guest.broken is None
    assert world.ask("dom0", "READ", "/tool|") == ""


def test_xsa_72_replies_that_are_too_long_are_an_error() -> None:
    world = World()
    for i in range(400):
        assert world.ask("dom0", "MKDIR", f"/d/name-of-a-child-{i}|") == "OK"
    assert world.ask("dom0", "DIRECTORY", "/d|") == "! E2BIG"
    assert world.ask("dom0", "SET_PERMS", "/d|" + "n0|" * 1300) == "OK"
    assert world.ask("dom0", "GET_PERMS", "/d|") == "n0|" * 1300


def test_xsa_115_events_only_for_what_a_guest_may_read() -> None:
    tell("""
        dom5> WATCH /|t|
        dom5< OK
        dom5< * /|t|
        dom0> WRITE /secret/x|1
        dom0< OK
        dom0> RM /secret/x|
        dom0< OK
        dom0> WRITE /open|1
        dom0< OK
        dom0> SET_PERMS /open|r0|
        dom0< OK
        dom5< * /open|t|
        dom0> WRITE /open|2
        dom0< OK
        dom5< * /open|t|
        dom0> WRITE /open/child|1       # inherits; its parent may be read
        dom0< OK
        dom5< * /open/child|t|
        dom0> SET_PERMS /open/child|n0| # it could read it before
        dom0< OK
        dom5< * /open/child|t|
        dom0> WRITE /open/child|2       # its parent may still be read
        dom0< OK
        dom5< * /open/child|t|
        dom0> SET_PERMS /open|n0|
        dom0< OK
        dom5< * /open|t|
        dom0> WRITE /open/child|3
        dom0< OK
    """)


def test_xsa_115_special_watches_want_a_permission() -> None:
    tell("""
        dom5> WATCH @introduceDomain|t|
        dom5< OK
        dom5< * @introduceDomain|t|
        dom0> INTRODUCE 6|1|7|
        dom0< OK
        dom0> SET_PERMS @introduceDomain|n0|r5|
        dom0< OK
        dom0> INTRODUCE 7|1|7|
        dom0< OK
        dom5< * @introduceDomain|t|
        dom5> IS_DOMAIN_INTRODUCED 7|
        dom5< ! EACCES
    """)


def test_xsa_115_each_watch_fires_once_for_a_removal() -> None:
    tell("""
        dom0> WRITE /a/b/c/d|1
        dom0< OK
        dom0b> WATCH /a|t|
        dom0b< OK
        dom0b< * /a|t|
        dom0> RM /a|
        dom0< OK
        dom0b< * /a|t|
    """)


def test_xsa_115_watches_do_not_look_at_the_transaction() -> None:
    tell("""
        dom5> WATCH@77 /a|t|
        dom5< OK
        dom5< * /a|t|
        dom5> UNWATCH@77 /a|t|
        dom5< OK
    """)


def test_xsa_233_a_domain_and_its_device_model_die_together() -> None:
    for deaths in ([5, 6], [6, 5]):
        world = tell("""
            dom0> INTRODUCE 5|1|7|
            dom0< OK
            dom0> INTRODUCE 6|1|7|
            dom0< OK
            dom0> SET_TARGET 6|5|
            dom0< OK
            dom0> WATCH @releaseDomain|t|
            dom0< OK
            dom0< * @releaseDomain|t|
        """)
        world.hub.died(deaths)
        world.tell("""
            dom0< * @releaseDomain|t|
            dom0< * @releaseDomain|t|
            dom0> INTRODUCE 6|1|7|
            dom0< OK
        """)
        assert world.hub.domains[6].target is None
        assert world.hub.check() == []


def test_xsa_322_a_new_domain_gets_nothing_of_the_old_one_with_its_id() -> None:
    world = tell("""
        dom0> INTRODUCE 5|1|7|
        dom0< OK
        dom0> WRITE /owned|1
        dom0< OK
        dom0> SET_PERMS /owned|n5|
        dom0< OK
        dom0> WRITE /granted|1
        dom0< OK
        dom0> SET_PERMS /granted|n0|b5|
        dom0< OK
        dom0> SET_PERMS @introduceDomain|n0|b5|
        dom0< OK
        dom0> RELEASE 5|
        dom0< OK
        dom0> INTRODUCE 5|1|7|
        dom0< OK
    """)
    world.clients.pop("dom5", None)
    world.tell("""
        dom5> READ /owned|
        dom5< ! EACCES
        dom5> READ /granted|
        dom5< ! EACCES
        dom5> WRITE /granted|2
        dom5< ! EACCES
        dom5> GET_PERMS @introduceDomain|
        dom5< ! EACCES
        dom0> GET_PERMS @introduceDomain|
        dom0< n0|
    """)
    assert world.n_nodes(5) == 0


def test_xsa_322_the_root_and_special_nodes_of_a_dead_owner_are_dom0s() -> None:
    world = tell("""
        dom0> SET_PERMS /|n5|
        dom0< OK
        dom0> SET_PERMS @introduceDomain|n5|
        dom0< OK
    """)
    world.client("dom5")
    world.hub.died([5])
    world.tell("""
        dom0> GET_PERMS /|
        dom0< n0|
        dom0> GET_PERMS @introduceDomain|
        dom0< n0|
        dom0> DIRECTORY /|
        dom0< tool|
    """)
    assert world.owners() == {0: 3}


def test_xsa_323_the_limit_of_a_path_is_that_of_its_canonical_form() -> None:
    world = World()
    relative = b"x" * 2040
    assert world.ask("dom0", "WRITE", relative + b"\0v") == "OK"
    assert world.ask("dom0", "READ", b"/local/domain/0/" + relative + b"\0") == "v"


def test_xsa_324_events_that_are_too_long_are_dropped() -> None:
    world = World()
    token = b"t" * 2500
    world.send("dom0", Op.WATCH, b"/\0" + token + b"\0")
    world.received("dom0").clear()
    for length in (1000, 1594, 1595, 3000):
        path = b"/" + b"x" * (length - 1)
        assert world.ask("dom0b", "WRITE", path + b"\0") == "OK"
        assert len(world.received("dom0")) == (1 if length + 1 + len(token) + 1 <= 4096 else 0)
        world.received("dom0").clear()


def test_xsa_325_a_guest_that_breaks_the_protocol_still_dies_with_news() -> None:
    world = tell("""
        dom0> INTRODUCE 5|1|7|
        dom0< OK
        dom0> WATCH @releaseDomain|t|
        dom0< OK
        dom0< * @releaseDomain|t|
    """)
    ring = world.control.connections[5]
    ring.feed(HEADER.pack(2, 1, 0, 5000))
    assert ring.broken is not None
    assert world.ask("dom0", "IS_DOMAIN_INTRODUCED", "5|") == "T|"
    world.hub.died([5])
    world.tell("dom0< * @releaseDomain|t|")


def test_xsa_323_no_path_can_be_made_that_cannot_be_read_or_listed() -> None:
    world = World()
    assert world.ask("dom0", "MKDIR", "/local/domain/5|") == "OK"
    assert world.ask("dom0", "SET_PERMS", "/local/domain/5|n5|") == "OK"
    made = ""
    while world.ask("dom5", "MKDIR", f"{made}{'n' * 100}|") == "OK":
        made += "n" * 100 + "/"
    assert 1900 < len(made) < 2048
    for prefix in ("", "/local/domain/5/"):
        assert world.ask("dom5", "READ", f"{prefix}{made[:-1]}|") == ""
        assert world.ask("dom5", "DIRECTORY", f"{prefix}{made[:-1]}|") == ""
        assert world.ask("dom0", "READ", f"/local/domain/5/{made[:-1]}|") == ""
    assert world.ask("dom5", "MKDIR", "../x|") == "! EINVAL"


def test_xsa_352_only_dom0_changes_an_owner() -> None:
    tell("""
        dom0> MKDIR /x|
        dom0< OK
        dom0> SET_PERMS /x|b5|b6|
        dom0< OK
        dom5> SET_PERMS /x|b6|
        dom5< ! EPERM
        dom6> SET_PERMS /x|b6|
        dom6< ! EACCES
    """)


def test_xsa_353_the_root_is_guarded_like_any_node() -> None:
    tell("""
        dom5> READ /|
        dom5< ! EACCES
        dom5> WRITE /|x
        dom5< ! EACCES
        dom5> DIRECTORY /|
        dom5< ! EACCES
        dom5> DIRECTORY_PART /|0|
        dom5< ! EACCES
        dom5> GET_PERMS /|
        dom5< ! EACCES
        dom5> SET_PERMS /|b5|
        dom5< ! EACCES
        dom5> RM /|
        dom5< ! EACCES
        dom5> MKDIR /x|
        dom5< ! EACCES
    """)


def test_xsa_417_a_permission_for_a_domain_that_never_was_grants_nothing_when_it_comes() -> None:
    world = World(existing={1, 2})
    world.tell("""
        dom0> WRITE /x|1
        dom0< OK
        dom0> SET_PERMS /x|n0|b5|
        dom0< OK
        dom0> SET_PERMS /x|n5|
        dom0< ! ENOENT
    """)
    world.control.existing.add(5)
    world.tell("""
        dom0> INTRODUCE 5|1|7|
        dom0< OK
        dom5> READ /x|
        dom5< ! EACCES
        dom0> SET_PERMS /x|n0|b5|
        dom0< OK
        dom5> READ /x|
        dom5< 1
    """)


def test_xsa_418_421_very_deep_trees_are_made_checked_and_removed() -> None:
    world = World()
    path = b"/a" * 1530
    assert world.ask("dom0", "WRITE", path + b"\0deep") == "OK"
    assert world.ask("dom0", "READ", path + b"\0") == "deep"
    assert world.ask("dom5", "READ", path + b"/x\0") == "! EINVAL"
    assert world.ask("dom5", "READ", b"/a" * 1000 + b"/x\0") == "! EACCES"
    assert world.ask("dom0", "TRANSACTION_START") == "1|"
    assert world.ask("dom0", "RM", "/a|", 1) == "OK"
    assert world.ask("dom0", "WRITE", path + b"\0again", 1) == "OK"
    assert world.ask("dom0", "TRANSACTION_END", "T|", 1) == "OK"
    assert world.ask("dom0", "SET_PERMS", "/a/a|n5|") == "OK"
    world.hub.died([5])
    world.client("dom5")
    world.hub.died([5])
    assert world.ask("dom0", "DIRECTORY", "/a|") == ""
    assert len(world.tree()) == 4


def test_xsa_419_all_nodes_of_a_dead_domain_go_wherever_they_are() -> None:
    world = World()
    for path in ("/shared", "/local/domain/5"):
        assert world.ask("dom0", "MKDIR", f"{path}|") == "OK"
        assert world.ask("dom0", "SET_PERMS", f"{path}|b0|") == "OK"
    for path in ("/shared/of-5", "/shared/of-5/of-6", "/local/domain/5/data/x"):
        assert world.ask("dom6" if path.endswith("6") else "dom5", "WRITE", f"{path}|1").startswith(("OK", "!"))
    world.hub.died([5])
    assert world.ask("dom0", "DIRECTORY", "/shared|") == ""
    assert world.ask("dom0", "DIRECTORY", "/local/domain/5|") == ""
    assert world.n_nodes(5) == 0
    assert sum(world.owners().values()) == len(world.tree())


@pytest.mark.parametrize("length", [4097, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF])
def test_xsa_420_a_negative_length_makes_a_bad_client_and_no_loop(length: int) -> None:
    world = World()
    guest = world.client("dom5")
    guest.feed(struct.pack("<IIII", 2, 1, 0, length) + b"x" * 1000)
    assert guest.broken is not None
    assert not guest.wants_input
    assert guest.n_output_bytes == 0


def test_xsa_421_making_and_removing_in_one_transaction() -> None:
    world = tell("""
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> WRITE@1 /a/b|1
        dom0< OK
        dom0> RM@1 /a|
        dom0< OK
        dom0> WRITE@1 /c|1
        dom0< OK
        dom0> TRANSACTION_END@1 T|
        dom0< OK
        dom0> DIRECTORY /|
        dom0< tool|c|
    """)
    assert world.owners() == {0: 4}


@pytest.mark.parametrize("n_bytes", [0, 1, 15, 16, 17, 22])
def test_xsa_425_a_guest_that_starts_anew_in_the_middle_of_a_packet(n_bytes: int) -> None:
    world = World()
    assert world.ask("dom0", "INTRODUCE", "5|1|7|") == "OK"
    ring = world.control.connections[5]
    watch, read = encode(Op.WATCH, 1, 0, b"a\0t\0"), encode(Op.READ, 2, 0, b"/local\0")
    for _ in range(3):
        ring.feed(watch + encode(Op.TRANSACTION_START, 1, 0, b"\0") + read[:n_bytes])
        ring.sent(5)  # of the reply
        ring.reset()
        ring.reset()
        assert (ring.n_output_bytes, ring.wants_input) == (0, True)
        assert world.hub.check() == []
        assert world.hub.domains[5].n_outstanding == 0
        ring.feed(read)
        assert ring.output() == encode(Op.ERROR, 2, 0, b"EACCES\0")
        ring.reset()


@pytest.mark.parametrize("path", ["/local/domain/", "/local/domain//", "/local/domain/x/", "/local/domain/5/"])
def test_xsa_481_odd_homes_are_invalid(path: str) -> None:
    for client in ("dom0", "dom5"):
        assert World().ask(client, "READ", f"{path}|") == "! EINVAL"
        assert World().ask(client, "WATCH", f"{path}|t|") == "! EINVAL"


def test_xsa_484_reset_inside_a_transaction() -> None:
    world = tell("""
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> WRITE@1 /a|1
        dom0< OK
        dom0> RESET_WATCHES@1
        dom0< OK
        dom0> TRANSACTION_END@1 T|
        dom0< ! ENOENT
        dom0> READ /a|
        dom0< ! ENOENT
    """)
    assert world.hub.domains[0].n_transactions == 0


def test_xsa_484_a_client_that_breaks_off_in_a_transaction() -> None:
    world = World()
    assert world.ask("dom5", "TRANSACTION_START") == "1|"
    guest = world.client("dom5")
    guest.feed(encode(Op.READ, 1, 1, b"/x\0") + struct.pack("<IIII", 2, 1, 1, 9999))
    world.hub.disconnect(guest)
    world.hub.disconnect(guest)
    assert world.hub.domains[5].n_transactions == 0
