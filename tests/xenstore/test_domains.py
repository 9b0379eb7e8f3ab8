# SPDX-License-Identifier: MIT
"""Domains come and go, as dialogues."""

import pytest

from paravirt.xenstore.wire import Errno, Op, encode
from tests.xenstore.story import World, tell


def test_introduce_serves_a_domain_and_tells_watchers() -> None:
    world = tell("""
        dom0> WATCH @introduceDomain|t|
        dom0< OK
        dom0< * @introduceDomain|t|
        dom0> IS_DOMAIN_INTRODUCED 5|
        dom0< F|
        dom0b> INTRODUCE 5|1234|7|
        dom0b< OK
        dom0< * @introduceDomain|t|
        dom0> IS_DOMAIN_INTRODUCED 5|
        dom0< T|
        dom0b> INTRODUCE 5|1234|8|      # again: another event channel, no news
        dom0b< OK
    """)
    assert world.control.rings == [(5, 1234, 7), (5, 1234, 8)]


@pytest.mark.parametrize(
    "arguments", ["", "5|", "5|1|", "5|1|7", "5|1|0|", "5|1|-7|", "5|1|x|", "0|1|7|", "99|1|7|", "x|1|7|"]
)
def test_malformed_introductions(arguments: str) -> None:
    world = World()
    assert world.ask("dom0", "INTRODUCE", arguments) == "! EINVAL"
    assert world.control.rings == []


def test_a_page_that_cannot_be_mapped() -> None:
    world = World()
    world.control.refusal = Errno.EINVAL
    assert world.ask("dom0", "INTRODUCE", "5|1|7|") == "! EINVAL"
    assert world.ask("dom0", "IS_DOMAIN_INTRODUCED", "5|") == "F|"
    assert world.control.connections[5].closed


def test_release_takes_all_a_domain_has() -> None:
    tell("""
        dom0> INTRODUCE 5|1|7|
        dom0< OK
        dom0> WATCH @releaseDomain|t|
        dom0< OK
        dom0< * @releaseDomain|t|
        dom0> WATCH @releaseDomain|which|1|
        dom0< OK
        dom0< * @releaseDomain|which|
        dom0> WRITE /home/sub|x
        dom0< OK
        dom0> SET_PERMS /home|n5|
        dom0< OK
        dom0> SET_PERMS /home/sub|n5|
        dom0< OK
        dom0> WRITE /other|x
        dom0< OK
        dom0> SET_PERMS /other|n6|r5|b7|
        dom0< OK
        dom0> RELEASE 5|
        dom0< * @releaseDomain|t|
        dom0< * @releaseDomain/5|which|
        dom0< OK
        dom0> READ /home|
        dom0< ! ENOENT
        dom0> GET_PERMS /other|
        dom0< n6|b7|
        dom0> IS_DOMAIN_INTRODUCED 5|
        dom0< F|
        dom0> RELEASE 5|
        dom0< ! ENOENT
        dom0> RELEASE 0|
        dom0< ! EINVAL
        dom0> RELEASE x|
        dom0< ! EINVAL
        dom0> RELEASE 5
        dom0< ! EINVAL
    """)


def test_release_closes_every_connection_of_the_domain() -> None:
    world = World()
    world.ask("dom0", "INTRODUCE", "5|1|7|")
    world.send("dom5", 4, b"/a\0t\0")
    world.received("dom5").clear()
    guest = world.client("dom5")
    assert world.ask("dom0", "RELEASE", "5|") == "OK"
    assert guest.closed
    assert world.control.detached == [5, 5]
    assert world.ask("dom0", "WRITE", "/a|1") == "OK"
    assert guest.n_output_bytes == 0


def test_shutdown_is_told_once_until_resume_and_death_again() -> None:
    world = World()
    world.tell("""
        dom0> INTRODUCE 5|1|7|
        dom0< OK
        dom6> WATCH @releaseDomain|t|   # everybody may by default
        dom6< OK
        dom6< * @releaseDomain|t|
    """)
    world.hub.shut_down(5)
    world.hub.shut_down(5)
    world.tell("""
        dom6< * @releaseDomain|t|
        dom0> RESUME 5|
        dom0< OK
        dom0> RESUME 6|
        dom0< ! ENOENT
        dom0> RESUME 0|
        dom0< ! EINVAL
    """)
    world.hub.shut_down(5)
    world.tell("dom6< * @releaseDomain|t|")
    world.hub.died([5])
    world.hub.died([5])
    world.tell("""
        dom6< * @releaseDomain|t|
        dom0> IS_DOMAIN_INTRODUCED 5|
        dom0< F|
    """)


def test_a_domain_that_was_never_introduced_dies_silently_but_its_nodes_go() -> None:
    world = World()
    world.tell("""
        dom0> WRITE /home|x
        dom0< OK
        dom0> SET_PERMS /home|n5|
        dom0< OK
        dom0> WATCH @releaseDomain|t|
        dom0< OK
        dom0< * @releaseDomain|t|
        dom0> WATCH /home|h|
        dom0< OK
        dom0< * /home|h|
    """)
    world.hub.died([5])
    world.tell("""
        dom0< * /home|h|
        dom0> READ /home|
        dom0< ! ENOENT
    """)


def test_special_watches_of_one_domain_or_of_all() -> None:
    world = tell("""
        dom0> WATCH @introduceDomain|plain|
        dom0< OK
        dom0< * @introduceDomain|plain|
        dom0> WATCH @introduceDomain|flat|0|
        dom0< OK
        dom0< * @introduceDomain|flat|
        dom0> WATCH @introduceDomain|which|1|
        dom0< OK
        dom0< * @introduceDomain|which|
        dom6> WATCH @releaseDomain/5|mine|
        dom6< OK
        dom6< * @releaseDomain/5|mine|
        dom6> WATCH @introduceDomain/5|never|  # it may not
        dom6< OK
        dom6< * @introduceDomain/5|never|
        dom0b> INTRODUCE 5|1|7|
        dom0b< OK
        dom0< * @introduceDomain|plain|
        dom0< * @introduceDomain|flat|
        dom0< * @introduceDomain/5|which|
        dom0b> INTRODUCE 7|1|7|
        dom0b< OK
        dom0< * @introduceDomain|plain|
        dom0< * @introduceDomain|flat|
        dom0< * @introduceDomain/7|which|
        dom0b> RELEASE 7|
        dom0b< OK
        dom0b> RELEASE 5|
        dom0b< OK
        dom6< * @releaseDomain/5|mine|
        dom0> SET_PERMS @releaseDomain|n0|
        dom0< OK
        dom0> INTRODUCE 5|1|7|
        dom0< * @introduceDomain|plain|
        dom0< * @introduceDomain|flat|
        dom0< * @introduceDomain/5|which|
        dom0< OK
        dom0> RELEASE 5|
        dom0< OK
    """)
    assert world.hub.check() == []


def test_special_events_are_not_merged() -> None:
    world = World()
    world.send("dom0", Op.WATCH, b"@releaseDomain\0t\0")
    for _ in range(3):
        world.send("dom0b", Op.INTRODUCE, b"5\x001\x007\0")
        world.send("dom0b", Op.RELEASE, b"5\0")
    assert world.received("dom0") == ["OK", *["* @releaseDomain|t|"] * 4]


def test_a_permission_made_in_a_transaction_does_not_outlive_its_domain() -> None:
    world = tell("""
        dom0> MKDIR /a|
        dom0< OK
        dom5> READ /a|
        dom5< ! EACCES
        dom0> TRANSACTION_START |
        dom0< 1|
        dom0> SET_PERMS@1 /a|n6|r5|
        dom0< OK
        dom0> TRANSACTION_START |
        dom0< 2|
        dom0> WRITE@2 /b|
        dom0< OK
        dom0> SET_PERMS@2 /b|n5|
        dom0< OK
        dom0> RELEASE 5|
        dom0< ! ENOENT
    """)
    world.hub.died([5])
    del world.clients["dom5"]
    world.tell("""
        dom0> TRANSACTION_END@1 T|
        dom0< OK
        dom0> GET_PERMS /a|
        dom0< n6|
        dom0> TRANSACTION_END@2 T|      # nobody owns that
        dom0< ! EAGAIN
        dom5> READ /a|
        dom5< ! EACCES
    """)
    assert world.hub.check() == []


def test_a_dead_domain_leaves_nothing_behind() -> None:
    world = World()
    for _ in range(3):
        world.tell("""
            dom0> MKDIR /local/domain/5|
            dom0< OK
            dom0> SET_PERMS /local/domain/5|n5|
            dom0< OK
            dom0> SET_FEATURE 5|1|
            dom0< OK
            dom0> SET_QUOTA 5|nodes|4|
            dom0< OK
            dom0> INTRODUCE 5|1|7|
            dom0< OK
            dom0> TRANSACTION_START |
            dom0< 1|
            dom5> WRITE a|1
            dom5< OK
            dom5> WATCH a|t|
            dom5< OK
            dom5< * a|t|
            dom5> TRANSACTION_START |
            dom5< 1|
            dom5> WRITE@1 b|1
            dom5< OK
        """)
        world.client("dom5").feed(encode(Op.READ, 42, 0, b"a\0") * 100)
        assert not world.client("dom5").wants_input
        dom0 = world.client("dom0")
        world.hub.died([5])
        assert (set(world.hub.domains), world.hub.statistics().transactions) == ({0}, 1)
        assert world.hub.next_timeout_ms() is None
        world.clients.clear()
        world.hub.disconnect(dom0)
        assert world.hub.statistics().nodes == 5  # /local and /local/domain stay
        assert world.hub.check() == []
        world.tell("""
            dom0> GET_FEATURE 5|
            dom0< 15|
            dom0> GET_QUOTA 5|nodes|
            dom0< 1000|
        """)
        world.hub.died([5])
        world.hub.disconnect(world.clients.pop("dom0"))


def test_homes_and_the_like() -> None:
    tell("""
        dom5> GET_DOMAIN_PATH 7|
        dom5< /local/domain/7|
        dom0> GET_DOMAIN_PATH 65535|
        dom0< /local/domain/65535|
        dom0> GET_DOMAIN_PATH 65536|
        dom0< ! EINVAL
        dom0> GET_DOMAIN_PATH abc|
        dom0< ! EINVAL
        dom0> GET_DOMAIN_PATH |
        dom0< ! EINVAL
        dom0> GET_DOMAIN_PATH 7
        dom0< ! EINVAL
        dom0> IS_DOMAIN_INTRODUCED 0|
        dom0< T|
        dom0> IS_DOMAIN_INTRODUCED 32752|
        dom0< T|
        dom0> IS_DOMAIN_INTRODUCED 7
        dom0< ! EINVAL
    """)
