# SPDX-License-Identifier: MIT
"""What holds a guest back: requests outstanding, memory, the rate of writes; and events that nobody reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravirt.xenstore.limits import Limits
from paravirt.xenstore.rate import DOMAIN_BURST, N_NEW_DOMAINS, RATE_PER_S, RESERVE_MAX, WRITE, Credit, WriteRate
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.story import World

READ_ROOT = encode(Op.READ, 42, 0, b"/\0")


def world_with_home(limits: Limits | None = None, domids: tuple[int, ...] = (5,)) -> World:
    world = World(limits=limits)
    for domid in domids:
        assert world.ask("dom0", "MKDIR", f"/local/domain/{domid}|") == "OK"
        assert world.ask("dom0", "SET_PERMS", f"/local/domain/{domid}|n{domid}|") == "OK"
    return world


# -- outstanding


def test_requests_wait_when_too_many_are_not_answered() -> None:
    world = World()
    guest, other = world.client("dom5"), world.client("dom5b")
    guest.feed(READ_ROOT * 19)
    assert guest.wants_input
    assert world.hub.domains[5].n_outstanding == 19
    guest.feed(READ_ROOT * 11)
    assert world.hub.domains[5].n_outstanding == 20
    assert not guest.wants_input
    assert not other.wants_input
    assert world.client("dom6").wants_input
    other.feed(READ_ROOT * 2)
    assert world.unread("dom5b") == 0
    assert len(world.received("dom5")) == 30
    assert len(world.received("dom5b")) == 2
    assert guest.wants_input
    assert other.wants_input
    assert world.hub.domains[5].n_outstanding == 0
    assert world.hub.check() == []


def test_who_may_go_on_is_told() -> None:
    world = World()
    guest, other = world.client("dom5"), world.client("dom5b")
    guest.feed(READ_ROOT * 20)
    assert not guest.wants_input
    assert not other.wants_input
    world.take_dirty()
    world.read("dom5", 10)
    assert world.take_dirty() == set()
    world.read("dom5", 14)
    assert world.take_dirty() == {guest, other}
    assert other.wants_input


def test_a_request_is_outstanding_until_its_events_are_read() -> None:
    world = world_with_home(Limits(outstanding=3))
    world.send("dom0b", Op.WATCH, b"/local\0t\0")
    world.received("dom0b").clear()
    assert world.ask("dom5", "WRITE", "a|1") == "OK"
    assert world.ask("dom5", "WRITE", "a|2") == "OK"  # an equal event waits already
    assert world.hub.domains[5].n_outstanding == 1
    assert world.ask("dom5", "WRITE", "b|1") == "OK"
    assert world.client("dom5").wants_input
    assert world.ask("dom5", "WRITE", "c|1") == "OK"
    assert world.hub.domains[5].n_outstanding == 3
    assert not world.client("dom5").wants_input
    world.send("dom5", Op.READ, b"a\0")
    assert not world.client("dom5").wants_input
    assert len(world.received("dom0b")) == 3
    assert world.received("dom5") == ["2"]
    assert world.hub.domains[5].n_outstanding == 0


def test_a_reader_who_leaves_keeps_nobody() -> None:
    world = world_with_home(Limits(outstanding=2))
    world.send("dom6", Op.WATCH, b"/local/domain/5\0t\0")
    world.received("dom6").clear()
    assert world.ask("dom0", "SET_PERMS", "/local/domain/5|r5|") == "OK"
    assert world.ask("dom5", "MKDIR", "a|") == "OK"
    assert world.ask("dom5", "MKDIR", "b|") == "OK"
    assert not world.client("dom5").wants_input
    world.hub.disconnect(world.client("dom6"))
    assert world.client("dom5").wants_input


def test_the_first_event_of_a_watch_counts_for_nobody_and_dom0_is_not_counted() -> None:
    world = World(limits=Limits(outstanding=2))
    guest = world.client("dom5")
    guest.feed(encode(Op.WATCH, 42, 0, b"/a\0t\0"))
    guest.sent(16 + 3)
    assert world.hub.domains[5].n_outstanding == 0
    world.client("dom0").feed(READ_ROOT * 100)
    assert world.unread("dom0") == 100
    assert world.client("dom0").wants_input


@pytest.mark.parametrize("quota", [0, 50])
def test_another_quota_of_outstanding_requests(quota: int) -> None:
    world = World()
    guest = world.client("dom5")
    guest.feed(READ_ROOT * 30)
    assert world.unread("dom5") == 20
    assert world.ask("dom0", "SET_QUOTA", f"5|outstanding|{quota}|") == "OK"
    world.let_go_on()
    assert world.unread("dom5") == 30
    assert guest.wants_input


def test_the_highest_number_of_outstanding_requests_is_remembered() -> None:
    world = World()
    world.client("dom5").feed(READ_ROOT * 7)
    world.received("dom5")
    assert world.hub.quota_maxima(reset=False)["outstanding"] == 7


def test_a_connection_that_is_closed_is_not_read() -> None:
    world = World(limits=Limits(outstanding=1))
    guest = world.client("dom5")
    guest.feed(READ_ROOT)
    world.hub.died([5])
    assert not guest.wants_input
    world.hub.connect(6)
    world.pass_time(1000)
    assert world.take_dirty() == set()


# -- memory


def test_what_a_domain_holds_is_counted() -> None:
    world = world_with_home()
    domain = world.hub.domains[5]
    home = 15 + 16 + 8
    assert domain.memory_bytes == home
    world.tell("dom5> WRITE key|value\ndom5< OK")
    node = 19 + 16 + 8 + 5
    assert domain.memory_bytes == home + 4 + node
    world.tell("dom5> WATCH key|token|\ndom5< OK\ndom5< * key|token|")
    assert domain.memory_bytes == home + 4 + node + 19 + 5
    world.tell("dom5> UNWATCH key|token|\ndom5< OK\ndom5> TRANSACTION_START\ndom5< 1|")
    assert domain.memory_bytes == home + 4 + node
    world.tell("dom5> READ@1 key|\ndom5< value")
    assert domain.memory_bytes == home + 4 + 2 * node
    world.tell("dom5> WRITE@1 key|longer value\ndom5< OK")
    assert domain.memory_bytes == home + 4 + 2 * node + 7
    world.tell("dom5> TRANSACTION_END@1 T|\ndom5< OK")
    assert domain.memory_bytes == home + 4 + node + 7
    world.client("dom5").feed(READ_ROOT)
    assert domain.memory_bytes == home + 4 + node + 7 + 16 + 7  # the reply is EACCES and a NUL
    world.client("dom5").sent(22)
    assert domain.memory_bytes == home + 4 + node + 7 + 16 + 7
    world.client("dom5").sent(1)
    world.tell("dom5> RM key|\ndom5< OK")
    assert domain.memory_bytes == home
    assert world.hub.check() == []


def test_over_the_memory_quota_a_guest_gets_no_more() -> None:
    world = world_with_home(Limits(memory_bytes=1000))
    assert world.ask("dom5", "WRITE", b"a\0" + b"x" * 800) == "OK"
    before = world.hub.domains[5].memory_bytes
    for op, payload in (
        (Op.WRITE, b"b\0" + b"x" * 100),
        (Op.WRITE, b"a\0" + b"x" * 1000),
        (Op.MKDIR, b"b/c/d\0"),
        (Op.SET_PERMS, b"a\0n5\0" + b"r0\0" * 3),
        (Op.WATCH, b"a\0" + b"t" * 120 + b"\0"),
    ):
        world.send("dom5", op, payload)
        expected = "! ENOMEM" if op is not Op.SET_PERMS else "OK"
        assert world.received("dom5") == [expected], op
        world.received("dom5").clear()
        if op is Op.SET_PERMS:
            assert world.ask("dom5", "SET_PERMS", "a|n5|") == "OK"
    assert world.hub.domains[5].memory_bytes == before
    assert world.ask("dom5", "READ", "a|") == "! ENOMEM"  # there is no room for the reply
    assert world.ask("dom5", "WRITE", b"a\0" + b"y" * 200) == "OK"
    assert world.ask("dom5", "READ", "a|") == "y" * 200
    assert world.ask("dom0", "WRITE", b"/local/domain/5/a\0" + b"x" * 4000) == "OK"
    assert not world.client("dom5").wants_input
    assert world.ask("dom5", "RM", "a|") == "OK"  # it was read before
    assert world.client("dom5").wants_input
    assert world.hub.check() == []


def test_a_guest_over_its_memory_is_read_again_when_dom0_takes_from_it() -> None:
    world = world_with_home(Limits(memory_bytes=1000))
    guest = world.client("dom5")
    assert world.ask("dom0", "WRITE", b"/local/domain/5/a\0" + b"x" * 1000) == "OK"
    assert not guest.wants_input
    world.take_dirty()
    assert world.ask("dom0", "WRITE", b"/local/domain/5/a\0") == "OK"
    assert guest.wants_input
    assert world.ask("dom0", "WRITE", b"/local/domain/5/a\0" + b"x" * 1000) == "OK"
    assert not guest.wants_input
    assert world.ask("dom0", "SET_QUOTA", "5|memory|0|") == "OK"
    assert guest.wants_input


def test_what_was_read_is_handled_whatever_memory_is_held() -> None:
    world = world_with_home(Limits(memory_bytes=1000, outstanding=1))
    guest = world.client("dom5")
    assert world.ask("dom5", "MKDIR", "a|") == "OK"
    guest.feed(READ_ROOT + encode(Op.RM, 42, 0, b"a\0"))
    assert world.ask("dom0", "WRITE", b"/local/domain/5/a\0" + b"x" * 1000) == "OK"
    assert not guest.wants_input
    assert world.received("dom5") == ["! EACCES", "OK"]
    assert guest.wants_input


def test_a_guest_pays_only_for_nodes_of_its_own() -> None:
    world = world_with_home(Limits(memory_bytes=1000))
    assert world.ask("dom5", "WRITE", "a|" + "x" * 900) == "OK"
    assert world.ask("dom0", "MKDIR", "/shared|") == "OK"
    assert world.ask("dom0", "SET_PERMS", "/shared|n0|w5|") == "OK"
    assert world.ask("dom5", "WRITE", "/shared|" + "x" * 500) == "OK"
    assert world.ask("dom5", "MKDIR", "/shared/mine|") == "! ENOMEM"
    number = int(world.ask("dom5", "TRANSACTION_START").rstrip("|"))
    assert world.ask("dom5", "WRITE", "/shared|", number) == "! ENOMEM"  # it would hold a copy


def test_transactions_hold_memory_and_fail_without() -> None:
    world = world_with_home(Limits(memory_bytes=3000))
    for name in "abcd":
        assert world.ask("dom5", "WRITE", f"{name}|{'x' * 400}") == "OK"
    assert world.ask("dom5", "TRANSACTION_START") == "1|"
    assert world.ask("dom5", "READ", "a|", 1) == "x" * 400
    assert world.ask("dom5", "READ", "b|", 1) == "! ENOMEM"  # there is none for the reply
    assert world.ask("dom5", "READ", "c|", 1) == "! ENOMEM"  # there is none for another copy
    assert world.ask("dom5", "TRANSACTION_END", "T|", 1) == "! ENOMEM"
    assert world.ask("dom5", "TRANSACTION_START") == "2|"
    assert world.ask("dom5", "WRITE", f"a|{'x' * 900}", 2) == "OK"
    assert world.ask("dom5", "WRITE", f"a|{'x' * 1200}", 2) == "! ENOMEM"
    assert world.ask("dom5", "TRANSACTION_END", "T|", 2) == "! ENOMEM"
    assert world.ask("dom5", "READ", "a|") == "x" * 400
    assert world.hub.check() == []


def test_events_over_the_memory_quota_are_dropped() -> None:
    world = world_with_home(Limits(memory_bytes=300))
    guest = world.client("dom5")
    guest.feed(encode(Op.WATCH, 42, 0, b"/local/domain/5\0t\0"))
    for i in range(30):
        assert world.ask("dom0", "WRITE", f"/local/domain/5/{i}|") == "OK"
        assert world.ask("dom0", "RM", f"/local/domain/5/{i}|") == "OK"
    assert world.hub.domains[5].memory_bytes < 300
    assert guest.n_dropped_events > 20
    assert guest.broken is None


# -- events that are not read


def test_events_that_are_not_read_in_time_are_dropped_but_replies_are_not() -> None:
    world = world_with_home()
    guest = world.client("dom5")
    guest.feed(encode(Op.WATCH, 42, 0, b"/local/domain/5\0t\0"))
    world.read("dom5", 16 + 3 + 4)  # the acknowledgement, and the first event in part
    for milliseconds, path in ((0, "a"), (8_000, "b"), (0, "c")):
        world.hub.now_ms += milliseconds
        assert world.ask("dom0", "MKDIR", f"/local/domain/5/{path}|") == "OK"
    guest.feed(READ_ROOT)
    assert world.hub.next_timeout_ms() == 12_000
    world.hub.now_ms += 11_999
    world.hub.on_time()
    assert (world.unread("dom5"), guest.n_dropped_events) == (5, 0)
    assert world.hub.next_timeout_ms() == 1
    world.hub.now_ms += 1
    world.hub.on_time()
    assert (world.unread("dom5"), guest.n_dropped_events) == (4, 1)
    assert world.hub.next_timeout_ms() == 8_000
    world.pass_time(9_000)
    assert (world.unread("dom5"), guest.n_dropped_events) == (2, 3)
    assert world.hub.next_timeout_ms() is None
    assert guest.output() == (encode(15, 0, 0, b"/local/domain/5\0t\0") + encode(16, 42, 0, b"EACCES\0"))[4:]
    assert world.hub.check() == []


def test_a_dropped_event_may_come_again_and_lets_who_caused_it_go_on() -> None:
    world = world_with_home(Limits(outstanding=1, watch_event_timeout_ms=100))
    assert world.ask("dom0", "SET_PERMS", "/local/domain/5|r5|") == "OK"
    world.send("dom6", Op.WATCH, b"/local/domain/5\0t\0")
    world.received("dom6").clear()
    assert world.ask("dom5", "WRITE", "a|1") == "OK"
    assert not world.client("dom5").wants_input
    world.send("dom5", Op.WRITE, b"a\0002")
    world.pass_time(100)
    assert world.client("dom6").n_dropped_events == 1
    assert world.received("dom5") == ["OK"]
    assert world.received("dom6") == ["* /local/domain/5/a|t|"]


def test_dom0_loses_no_event_and_a_time_out_of_zero_is_none() -> None:
    world = world_with_home(Limits(watch_event_timeout_ms=0))
    for name in ("dom0b", "dom5"):
        world.client(name).feed(encode(Op.WATCH, 42, 0, b"/local/domain/5\0t\0"))
    assert world.hub.next_timeout_ms() is None
    world.pass_time(1_000_000)
    assert world.unread("dom5") == 2
    world = World()
    world.client("dom0").feed(encode(Op.WATCH, 42, 0, b"/a\0t\0"))
    world.pass_time(1_000_000)
    assert world.unread("dom0") == 2


# -- the rate of writes


def write_often(world: World, client: str, n_writes: int) -> int:
    """Ask for many writes at once; how many are done. The others wait."""
    for i in range(n_writes):
        world.send(client, Op.WRITE, b"/local/domain/%s/a\0%d" % (client[3:].encode(), i))
    n_done = len(world.received(client))
    world.received(client).clear()
    return n_done


def test_without_transactions_everybody_writes_as_fast_as_he_can() -> None:
    world = world_with_home()
    assert write_often(world, "dom5", 500) == 500
    assert world.hub.next_timeout_ms() is None


def test_while_a_transaction_is_open_guests_write_slowly() -> None:
    world = world_with_home()
    assert world.ask("dom0", "TRANSACTION_START") == "1|"
    assert write_often(world, "dom5", 100) == 11  # a burst of ten, and one on credit
    guest = world.client("dom5")
    assert not guest.wants_input
    assert world.hub.next_timeout_ms() == 5  # 200 a second
    world.pass_time(4)
    assert len(world.received("dom5")) == 0
    world.pass_time(1)
    assert len(world.received("dom5")) == 1
    world.received("dom5").clear()
    world.pass_time(50)
    assert len(world.received("dom5")) == 10
    world.received("dom5").clear()
    assert world.ask("dom0", "TRANSACTION_END", "F|", 1) == "OK"
    world.pass_time(5)  # the debt stays
    assert len(world.received("dom5")) == 78


def test_the_rate_is_shared() -> None:
    world = world_with_home(domids=(5, 6))
    assert world.ask("dom0", "TRANSACTION_START") == "1|"
    world.client("dom6")
    assert write_often(world, "dom5", 100) == 11
    assert world.hub.next_timeout_ms() == 10
    assert write_often(world, "dom6", 100) == 11
    n_done = {"dom5": 0, "dom6": 0}
    for _ in range(178):
        assert not world.client("dom5").wants_input
        world.pass_time(5)
        for name in n_done:
            n_done[name] += len(world.received(name))
            world.received(name).clear()
    assert n_done == {"dom5": 89, "dom6": 89}


def test_who_is_looked_at_often_gets_credit_too() -> None:
    rate = WriteRate()
    credits = [rate.join(0) for _ in range(1000)]
    for _ in range(11):
        rate.spend(credits[0], 0)
    for now_ms in range(1, 5001):  # each has a write in five seconds
        assert credits[0].balance < 0
        rate.update(credits[0], now_ms)
    assert credits[0].balance == 0


def test_a_reserve_helps_out() -> None:
    rate = WriteRate()
    credits = [rate.join(0) for _ in range(N_NEW_DOMAINS + 2)]
    assert [credit.balance for credit in credits] == [DOMAIN_BURST] * N_NEW_DOMAINS + [0, 0]
    assert rate.reserve == -N_NEW_DOMAINS * DOMAIN_BURST
    rate.update(credits[0], 70_000)  # a seventh of 200 a second
    assert credits[0].balance == DOMAIN_BURST
    assert rate.reserve == RESERVE_MAX
    rate.spend(credits[-1], 0)
    assert credits[-1].balance == -WRITE
    rate.update(credits[-1], 1)
    assert credits[-1].balance == 0
    assert RESERVE_MAX - WRITE <= rate.reserve < RESERVE_MAX
    n_before = rate.reserve
    rate.leave(credits[0])
    assert rate.reserve == n_before  # it has more than one burst already
    assert rate.n_domains == N_NEW_DOMAINS + 1


steps = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "spend", "update"]), st.integers(0, 5), st.integers(0, 2000)),
    max_size=80,
)


@given(steps)
def test_credit_is_never_made_of_nothing(steps: list[tuple[str, int, int]]) -> None:
    rate, now_ms, n_spent, nobody_left = WriteRate(), 0, 0, True
    members: list[Credit] = []
    for what, which, passed_ms in steps:
        now_ms += passed_ms
        if what == "join" or not members:
            members.append(rate.join(now_ms))
            continue
        credit = members[which % len(members)]
        if what == "leave":
            members.remove(credit)
            rate.leave(credit)
            nobody_left = False
        elif what == "update" or credit.balance < 0:
            rate.update(credit, now_ms)
        else:
            rate.spend(credit, now_ms)
            n_spent += WRITE
        assert rate.n_domains == len(members)
        assert -N_NEW_DOMAINS * DOMAIN_BURST <= rate.reserve <= RESERVE_MAX
        assert all(-WRITE <= member.balance <= DOMAIN_BURST for member in members)
        held = rate.reserve + sum(member.balance for member in members)
        if nobody_left:  # who stays has the shares of all for the time since his last look
            assert held + n_spent <= now_ms * RATE_PER_S // 1000
        if credit in members and credit.balance < 0:
            wait_ms = rate.wait_ms(credit)
            probe = Credit(credit.at_ms)
            probe.balance = credit.balance
            other = WriteRate()
            other.n_domains = rate.n_domains
            other.update(probe, credit.at_ms + wait_ms)
            assert probe.balance >= 0
            assert wait_ms <= 1000 * rate.n_domains // 200 + 1
