# SPDX-License-Identifier: MIT
"""What is seen only from inside the engine in Python: its books, who is told of what, the lines of its trace."""

import pytest

from paravirt.xenstore.limits import Limits
from paravirt.xenstore.rate import WRITE
from paravirt.xenstore.session import Connection
from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES, Op, encode
from tests.xenstore.story import World
from tests.xenstore.test_control import control, world_with_actions
from tests.xenstore.test_flow_limits import READ_ROOT, world_with_home

ENGINES = ["python"]


def test_a_request_that_meets_a_mistake_of_ours_is_not_outstanding(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Connection, "_run", fail)
    with pytest.raises(ZeroDivisionError):
        world.client("dom5").feed(READ_ROOT)
    assert world.hub.domains[5].n_outstanding == 0
    assert world.hub.request is None


def test_a_guest_over_its_soft_quota_is_reported_now_and_then() -> None:
    world = world_with_home(Limits(soft_memory_bytes=500, memory_bytes=1000))
    lines: list[str] = []
    world.hub.log = lines.append
    assert world.ask("dom5", "WRITE", "a|" + "x" * 300) == "OK"
    assert lines == []
    assert world.ask("dom5", "WRITE", "a|" + "x" * 500) == "OK"
    assert lines == ["domain 5 holds 601 bytes, over its soft quota of 500"]
    world.pass_time(9_999)
    assert world.ask("dom5", "WRITE", "a|" + "x" * 501) == "OK"
    assert len(lines) == 1
    world.pass_time(1)
    assert world.ask("dom5", "WRITE", "a|" + "x" * 502) == "OK"
    assert len(lines) == 2
    world.pass_time(10_000)
    assert world.ask("dom0", "WRITE", "/local/domain/5/a|" + "x" * 2000) == "OK"
    assert world.ask("dom5", "READ", "missing|") == "! ENOENT"
    assert lines[2].endswith("over its soft quota of 500 and is not served for now")


def test_what_costs_and_what_does_not() -> None:
    world = world_with_home()
    credit = world.hub.connect(5).domain.credit
    assert credit is not None
    assert world.ask("dom0", "TRANSACTION_START") == "1|"
    for op, arguments, cost in (
        ("WRITE", "a/b/c|1", 1),
        ("MKDIR", "d|", 1),
        ("MKDIR", "d|", 0),
        ("SET_PERMS", "d|n5|r0|", 1),
        ("RM", "a|", 1),
        ("RM", "a|", 0),
        ("WRITE", "/tool|", 0),
        ("READ", "d|", 0),
        ("WATCH", "d|t|", 0),
    ):
        before = credit.balance
        world.send("dom5", Op[op], arguments.replace("|", "\0").encode())
        world.received("dom5").clear()
        assert before - credit.balance == cost * WRITE, op
    assert world.ask("dom5", "TRANSACTION_START") == "1|"
    before = credit.balance
    assert world.ask("dom5", "WRITE", "e|1", 1) == "OK"
    assert credit.balance == before
    assert world.ask("dom5", "TRANSACTION_END", "T|", 1) == "OK"
    assert credit.balance == before - WRITE
    assert world.ask("dom5", "TRANSACTION_START") == "2|"
    assert world.ask("dom0", "TRANSACTION_END", "F|", 1) == "OK"
    assert world.ask("dom5", "WRITE", "e|2", 2) == "OK"
    assert world.ask("dom5", "TRANSACTION_END", "T|", 2) == "OK"  # there was no other that it could spoil
    assert credit.balance == before - WRITE


def test_check_tells_what_is_inconsistent() -> None:
    world, actions = world_with_actions()
    assert control(world, "check") == "OK"
    world.hub.store.charge(0, 1, 0)
    assert control(world, "check") == "domain 0 owns 3 nodes of 108 bytes, not 4 of 108\n|"
    assert actions.done == [("print", "check: domain 0 owns 3 nodes of 108 bytes, not 4 of 108")]


def test_a_trace_is_kept_while_somebody_asks() -> None:
    world, _ = world_with_actions()
    times = iter(range(1_700_000_000_123_000, 1_800_000_000_000_000, 7))
    world.hub.clock_us = lambda: next(times)
    world.ask("dom5", "READ", "/a|")
    assert control(world, "trace|0") == "0\n"
    world.ask("dom5", "WRITE", "/a b,\\|secret")
    world.ask("dom5b", "TRANSACTION_START")
    world.ask("dom5b", "READ", "/a|", 1)
    world.send("dom0", 99, b"")
    world.received("dom0").clear()
    assert control(world, "trace|0") == (
        "4\n"
        "1700000000.123 5.1 - WRITE /a\\x20b\\x2c\\x5c EINVAL 7\n"
        "1700000000.123 5.3 - TRANSACTION_START - OK 7\n"
        "1700000000.123 5.3 1 READ /a EACCES 7\n"
        "1700000000.123 0.2 - 99 - ENOSYS 7\n"
    )
    assert control(world, "trace|4") == "4\n"
    assert control(world, "trace|3") == "4\n1700000000.123 0.2 - 99 - ENOSYS 7\n"
    assert control(world, "trace|99") == "4\n"
    world.pass_time(9_999)
    world.ask("dom5", "READ", "/late|")
    world.pass_time(1)
    world.ask("dom5", "READ", "/too-late|")
    assert control(world, "trace|4").startswith("5\n17")


def test_a_trace_says_how_many_lines_are_lost_and_gives_whole_lines() -> None:
    world, _ = world_with_actions()
    assert control(world, "trace|0") == "0\n"
    for i in range(5000):
        world.ask("dom0", "READ", f"/{i}|")
    reply = control(world, "trace|100")
    following, *lines = reply.splitlines()
    assert lines[0] == "... 804 lines lost"
    assert lines[1].split()[-3] == "/904"
    assert int(following) == 904 + len(lines) - 1
    assert len(reply) <= PAYLOAD_MAX_BYTES < len(reply) + 60
    seen, n_lines = int(following), len(lines) - 1
    while seen < 5000:
        following, *lines = control(world, f"trace|{seen}").splitlines()
        assert lines[0].split()[-3] == f"/{seen}"
        n_lines += len(lines)
        seen = int(following)
    assert n_lines == 4096


def test_an_access_log_gets_every_line() -> None:
    world, _ = world_with_actions()
    lines: list[str] = []
    world.hub.trace = lines.append
    world.ask("dom0", "READ", "/a|")
    world.ask("dom0", "CONTROL", "print|hello|")
    world.ask("dom0", "CONTROL", "trace|0|")
    world.ask("dom0", "MKDIR", "/" + "x" * 1000 + "|")
    world.hub.trace = None
    world.ask("dom0", "READ", "/b|")
    assert [line.split()[3] for line in lines] == ["READ", "CONTROL", "MKDIR"]
    assert lines[1].split()[4:] == ["print,hello", "OK", "0"]
    assert lines[2].split()[4] == "/" + "x" * 511 + "..."


def test_introducing_again_starts_the_connection_anew() -> None:
    world = World()
    assert world.ask("dom0", "INTRODUCE", "5|1|7|") == "OK"
    ring = world.control.connections[5]
    watch, read = encode(Op.WATCH, 1, 0, b"a\0t\0"), encode(Op.READ, 2, 0, b"/\0")
    ring.feed(watch[:-1])
    ring.feed(watch[-1:] + read[:5])
    assert world.hub.statistics().watches == 1
    assert ring.n_output_bytes
    assert world.ask("dom0", "INTRODUCE", "5|1|8|") == "OK"
    assert world.control.connections[5] is ring
    assert world.hub.statistics().watches == 0
    assert not ring.n_output_bytes
    assert world.hub.domains[5].n_watches == 0
    ring.feed(read)
    assert ring.output()[:4] == b"\x10\0\0\0"  # understood from its first byte on; a guest may not, so an error
