# SPDX-License-Identifier: MIT
"""What a domain may use and how much it may take, set domain by domain, as dialogues."""

import pytest

from paravirt.xenstore.limits import QUOTAS, Limits
from paravirt.xenstore.wire import Op
from tests.xenstore.story import World, tell

NAMES = (
    "nodes watches outstanding memory soft-memory transactions transaction-nodes node-permissions path-max node-size"
)
DEFAULTS = (1000, 128, 20, 2621440, 2097152, 10, 1024, 5, 2048, 2048)


def test_features_are_all_on_until_they_are_taken() -> None:
    tell("""
        dom0> GET_FEATURE
        dom0< 15|
        dom0> GET_FEATURE |             # as C clients ask
        dom0< 15|
        dom0> GET_FEATURE 5|
        dom0< 15|
        dom0> SET_FEATURE 5|3|
        dom0< OK
        dom0> GET_FEATURE 5|
        dom0< 3|
        dom0> GET_FEATURE 6|
        dom0< 15|
        dom0> SET_FEATURE 5|0|
        dom0< OK
        dom0> GET_FEATURE 5|
        dom0< 0|
    """)


def test_features_are_set_before_a_domain_is_introduced() -> None:
    tell("""
        dom0> SET_FEATURE 5|7|
        dom0< OK
        dom0> INTRODUCE 5|1|7|
        dom0< OK
        dom0> SET_FEATURE 5|15|
        dom0< ! EBUSY
        dom0> GET_FEATURE 5|
        dom0< 7|
        dom0> SET_FEATURE 0|15|
        dom0< ! EBUSY
        dom0> RELEASE 5|
        dom0< OK
        dom0> GET_FEATURE 5|            # another domain with that id
        dom0< 15|
    """)


def test_malformed_features() -> None:
    tell("""
        dom0> SET_FEATURE 5|16|
        dom0< ! EINVAL
        dom0> SET_FEATURE 5|-1|
        dom0< ! EINVAL
        dom0> SET_FEATURE 5|x|
        dom0< ! EINVAL
        dom0> SET_FEATURE 5|
        dom0< ! EINVAL
        dom0> SET_FEATURE 5|1|1|
        dom0< ! EINVAL
        dom0> SET_FEATURE 55|1|
        dom0< ! ENOENT
        dom0> GET_FEATURE 55|
        dom0< ! ENOENT
        dom0> GET_FEATURE 5|5|
        dom0< ! EINVAL
        dom5> GET_FEATURE
        dom5< ! EACCES
        dom5> SET_FEATURE 5|15|
        dom5< ! EACCES
    """)


def test_a_domain_without_watch_depth_may_not_give_one() -> None:
    tell("""
        dom0> SET_FEATURE 5|11|
        dom0< OK
        dom5> WATCH /a|t|1|
        dom5< ! EINVAL
        dom5> WATCH /a|t|
        dom5< OK
        dom5< * /a|t|
        dom6> WATCH /a|t|1|
        dom6< OK
        dom6< * /a|t|
    """)


def test_a_domain_without_the_wildcard_may_not_give_it() -> None:
    tell("""
        dom0> SET_FEATURE 5|7|
        dom0< OK
        dom0> MKDIR /a|
        dom0< OK
        dom0> SET_PERMS /a|n5|
        dom0< OK
        dom5> SET_PERMS /a|n5|r32757|
        dom5< ! EINVAL
        dom5> SET_PERMS /a|n5|r6|
        dom5< OK
        dom0> SET_PERMS /a|n5|r32757|
        dom0< OK
        dom7> GET_PERMS /a|
        dom7< n5|r32757|
        dom0> SET_PERMS /a|n32757|      # nobody of that id can own anything
        dom0< ! ENOENT
    """)


def test_quotas_have_the_c_daemons_names_and_values() -> None:
    world = World()
    assert tuple(QUOTAS) == tuple(NAMES.split())
    assert world.ask("dom0", "GET_QUOTA") == f"{NAMES}|"
    assert world.ask("dom0", "GET_QUOTA", "|") == f"{NAMES}|"
    for name, value in zip(QUOTAS, DEFAULTS, strict=True):
        assert world.ask("dom0", "GET_QUOTA", f"{name}|") == f"{value}|"
        assert world.ask("dom0", "GET_QUOTA", f"5|{name}|") == f"{value}|"


def test_a_global_quota_is_that_of_new_domains() -> None:
    tell("""
        dom0> GET_QUOTA 5|watches|
        dom0< 128|
        dom0> SET_QUOTA watches|2|
        dom0< OK
        dom0> GET_QUOTA watches|
        dom0< 2|
        dom0> GET_QUOTA 5|watches|      # was known before
        dom0< 128|
        dom0> GET_QUOTA 6|watches|
        dom0< 2|
        dom6> WATCH /a|1|
        dom6< OK
        dom6< * /a|1|
        dom6> WATCH /a|2|
        dom6< ! ENOSPC
        dom0> SET_QUOTA 6|watches|3|
        dom0< OK
        dom6> WATCH /a|2|
        dom6< OK
        dom6< * /a|2|
        dom6> WATCH /a|3|
        dom6< ! ENOSPC
        dom0> SET_QUOTA 6|watches|0|
        dom0< OK
        dom6> WATCH /a|3|
        dom6< OK
        dom6< * /a|3|
        dom0> GET_QUOTA 6|watches|
        dom0< 0|
        dom0> INTRODUCE 6|1|7|
        dom0< OK
        dom0> RELEASE 6|
        dom0< OK
        dom0> GET_QUOTA 6|watches|      # another domain with that id
        dom0< 2|
    """)


def test_malformed_quotas() -> None:
    tell("""
        dom0> GET_QUOTA nothing|
        dom0< ! EINVAL
        dom0> GET_QUOTA soft-nodes|
        dom0< ! EINVAL
        dom0> GET_QUOTA 55|nodes|
        dom0< ! ENOENT
        dom0> GET_QUOTA 5|nodes|x|
        dom0< ! EINVAL
        dom0> SET_QUOTA nodes|
        dom0< ! EINVAL
        dom0> SET_QUOTA nodes|-1|
        dom0< ! EINVAL
        dom0> SET_QUOTA nodes|x|
        dom0< ! EINVAL
        dom0> SET_QUOTA nodes|99999999999|
        dom0< ! EINVAL
        dom0> SET_QUOTA 55|nodes|1|
        dom0< ! ENOENT
        dom0> SET_QUOTA 5|nothing|1|
        dom0< ! EINVAL
        dom5> GET_QUOTA nodes|
        dom5< ! EACCES
        dom5> SET_QUOTA nodes|0|
        dom5< ! EACCES
    """)


@pytest.mark.parametrize(
    ("quota", "value", "op", "arguments", "transaction"),
    [
        ("nodes", 2, "MKDIR", "a|", 0),
        ("watches", 1, "WATCH", "a|t|", 0),
        ("transactions", 2, "TRANSACTION_START", "|", 0),
        ("transaction-nodes", 1, "READ", "/home|", 1),
        ("node-permissions", 2, "SET_PERMS", "/home|n{}|r7|", 0),
        ("node-size", 28, "WRITE", "/home|value", 0),
    ],
)
def test_each_quota_is_the_domains_own(quota: str, value: int, op: str, arguments: str, transaction: int) -> None:
    world = World()
    assert world.ask("dom0", "SET_QUOTA", f"6|{quota}|{value}|") == "OK"
    for domid in (5, 6):
        home = f"/local/domain/{domid}"
        assert world.ask("dom0", "MKDIR", f"{home}|") == "OK"
        assert world.ask("dom0", "SET_PERMS", f"{home}|n{domid}|") == "OK"
        assert world.ask(f"dom{domid}", "TRANSACTION_START") == "1|"
        payload = arguments.replace("/home", home).format(domid).replace("|", "\0").encode()
        world.send(f"dom{domid}", Op[op], payload, transaction)
        reply = world.received(f"dom{domid}").pop(0)
        assert (reply == "! ENOSPC") is (domid == 6)
        world.received(f"dom{domid}").clear()
    assert world.hub.check() == []


def test_the_path_quota_is_the_domains_own() -> None:
    world = World()
    assert world.ask("dom0", "SET_QUOTA", "5|path-max|10|") == "OK"
    assert world.ask("dom5", "WATCH", "123456789x|t|") == "! EINVAL"
    assert world.ask("dom6", "READ", "123456789x|") == "! EACCES"
    assert world.ask("dom5", "READ", "123456789|") == "! EACCES"
    assert world.ask("dom0", "SET_QUOTA", "5|path-max|0|") == "OK"
    assert world.ask("dom5", "READ", "123456789x|") == "! EACCES"


def test_at_a_commit_each_owner_has_its_own_quota() -> None:
    world = World()
    for domid in (5, 6):
        assert world.ask("dom0", "MKDIR", f"/of-{domid}|") == "OK"
        assert world.ask("dom0", "SET_PERMS", f"/of-{domid}|n{domid}|") == "OK"
        assert world.ask(f"dom{domid}", "TRANSACTION_START") == "1|"
        assert world.ask(f"dom{domid}", "MKDIR", f"/of-{domid}/a|", 1) == "OK"
    assert world.ask("dom0", "SET_QUOTA", "5|nodes|2|") == "OK"
    assert world.ask("dom5", "TRANSACTION_END", "T|", 1) == "! ENOSPC"
    assert world.ask("dom6", "TRANSACTION_END", "T|", 1) == "OK"


def test_a_commit_over_the_quota_is_that_also_if_it_is_outdated() -> None:
    world = World(limits=Limits(nodes=3))
    world.tell("""
        dom0> MKDIR /of-5|
        dom0< OK
        dom0> SET_PERMS /of-5|n5|
        dom0< OK
        dom5> TRANSACTION_START |
        dom5< 1|
        dom5> MKDIR@1 /of-5/a|
        dom5< OK
        dom5b> MKDIR /of-5/b|
        dom5b< OK
        dom5> TRANSACTION_END@1 T|
        dom5< ! ENOSPC
    """)
