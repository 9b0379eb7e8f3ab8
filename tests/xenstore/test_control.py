# SPDX-License-Identifier: MIT
"""CONTROL, command by command, with a fake of what lies outside of the store."""

import pytest

from paravirt.xenstore.admin import NoActions
from paravirt.xenstore.limits import Limits
from paravirt.xenstore.wire import Errno
from tests.xenstore.story import World


class FakeActions(NoActions):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.done: list[tuple[object, ...]] = []
        self.refusal: Errno | None = None
        self.update_refusal: str | None = None

    def log(self, on: bool) -> Errno | None:
        self.done.append(("log", on))
        return self.refusal

    def log_file(self, path: str) -> Errno | None:
        self.done.append(("log_file", path))
        return self.refusal

    def report(self, path: str | None, text: str) -> Errno | None:
        self.done.append(("report", path, text))
        return self.refusal

    def print(self, text: str) -> None:
        self.done.append(("print", text))

    def check_program(self, path: str) -> str | None:
        return "No such file." if path == "/missing" else None

    def live_update(self, program: str, command_line: str | None, timeout_s: int) -> str | None:
        self.done.append(("live_update", program, command_line, timeout_s))
        return self.update_refusal


def world_with_actions(limits: Limits | None = None) -> tuple[World, FakeActions]:
    world, actions = World(limits=limits), FakeActions()
    world.hub.actions = actions
    return world, actions


def control(world: World, words: str) -> str:
    return world.ask("dom0", "CONTROL", f"{words}|")


@pytest.mark.parametrize(
    "words",
    [
        "", "nothing", "check|x", "log|x", "log|on|off", "log|+x", "log|obj", "logfile", "logfile|a|b", "memreport|a|b",
        "print", "print|a|b", "quota|set", "quota|set|nodes", "quota|set|nothing|1", "quota|set|nodes|0",
        "quota|set|nodes|x", "quota|set|nodes|-1", "quota|set|soft-memory|1", "quota|max|x", "quota|max|-r|-r",
        "quota|5|6", "quota-soft|5", "quota-soft|set|nodes|1", "quota-soft|set|memory|0",
        "quota-soft|set|soft-memory|1",
        "live-update", "live-update|/bin/x", "live-update|-x", "live-update|-f", "live-update|-a|x", "live-update|-c",
        "live-update|-s|-x", "live-update|-s|-t", "live-update|-s|-t|x", "trace", "trace|x", "trace|-1", "trace|1|2",
        "help|x",
    ],
)  # fmt: skip
def test_what_is_no_command(words: str) -> None:
    world, actions = world_with_actions()
    assert control(world, words) == "! EINVAL"
    assert world.ask("dom0", "CONTROL", words.replace("|", " ")) == "! EINVAL"  # without a NUL there is no word
    assert actions.done == []


def test_only_dom0_may() -> None:
    world, _ = world_with_actions()
    assert world.ask("dom5", "CONTROL", "help|") == "! EACCES"


def test_help_names_every_command() -> None:
    world, _ = world_with_actions()
    lines = control(world, "help").removesuffix("\n|").splitlines()
    assert [line.split()[0] for line in lines] == [
        "check", "log", "live-update", "logfile", "memreport", "print", "quota", "quota-soft", "trace", "help",
    ]  # fmt: skip
    assert lines[1] == "log             [on|off|+<switch>|-<switch>]"


def test_log_switches() -> None:
    world, actions = world_with_actions()
    assert control(world, "log|on") == "OK"
    assert control(world, "log|off") == "OK"
    assert actions.done == [("log", True), ("log", False)]
    assert control(world, "log") == (
        "Log switch settings:\nobj     : on\nio      : on\nwrl     : off\nacc     : off\ntdb     : off\n|"
    )
    for words in ("log|+wrl", "log|-io", "log|-io", "log|+wrl"):
        assert control(world, words) == "OK"
    assert control(world, "log") == (
        "Log switch settings:\nobj     : on\nio      : off\nwrl     : on\nacc     : off\ntdb     : off\n|"
    )


def test_files_and_messages_are_others_work() -> None:
    world, actions = world_with_actions()
    assert control(world, "logfile|/var/log/x") == "OK"
    assert control(world, "print|hello there") == "OK"
    actions.refusal = Errno.EACCES
    assert control(world, "logfile|/root/x") == "! EACCES"
    assert control(world, "log|on") == "! EACCES"
    assert control(world, "memreport|/root/x") == "! EACCES"
    assert actions.done[:3] == [("log_file", "/var/log/x"), ("print", "control: hello there"), ("log_file", "/root/x")]


def test_a_memory_report_says_what_each_domain_holds() -> None:
    world, actions = world_with_actions()
    world.ask("dom5", "TRANSACTION_START")
    world.send("dom5", 4, b"/a\0token\0")
    assert control(world, "memreport") == "OK"
    kind, path, text = actions.done[0]
    assert (kind, path) == ("report", None)
    store, dom0, guest = str(text).splitlines()
    assert store.endswith(" bytes, 3 nodes, 1 watches, 2 connections, 1 transactions")
    assert dom0.endswith(" bytes, 3 nodes, 0 watches, 0 outstanding requests, 0 transactions")
    assert guest == (
        "domain 5: 51 bytes, 0 nodes, 1 watches, 1 outstanding requests, 1 transactions"
    )  # 5 holds its watch, 7 bytes; a reply of 16 + 3 and an event of 16 + 9
    assert control(world, "memreport|/tmp/report") == "OK"
    assert actions.done[1][:2] == ("report", "/tmp/report")


def test_quotas_are_shown_and_set() -> None:
    world, _ = world_with_actions()
    shown = control(world, "quota").removesuffix("\n|").splitlines()
    assert shown[0] == "Quota settings:"
    assert shown[1] == "nodes            :     1000 nodes a domain owns"
    assert [line.split(":")[0].rstrip() for line in shown[1:]] == [
        "nodes", "watches", "outstanding", "memory", "transactions", "transaction-nodes", "node-permissions",
        "path-max", "node-size",
    ]  # fmt: skip
    assert control(world, "quota|set|nodes|7") == "OK"
    assert control(world, "quota|set|memory|1234567") == "OK"
    assert control(world, "quota-soft|set|memory|12345") == "OK"
    shown = control(world, "quota").splitlines()
    assert shown[1].split()[:3] == ["nodes", ":", "7"]
    assert shown[4].split()[:3] == ["memory", ":", "1234567"]
    assert control(world, "quota-soft").splitlines()[1].split()[:3] == ["memory", ":", "12345"]
    assert world.ask("dom0", "GET_QUOTA", "soft-memory|") == "12345|"
    assert world.ask("dom0", "GET_QUOTA", "5|nodes|") == "7|"


def test_what_a_domain_uses_and_has_used() -> None:
    world, _ = world_with_actions(Limits(nodes=10))
    world.tell("""
        dom0> MKDIR /local/domain/5|
        dom0< OK
        dom0> SET_PERMS /local/domain/5|n5|
        dom0< OK
        dom5> MKDIR a|
        dom5< OK
        dom5> MKDIR b|
        dom5< OK
        dom5> RM a|
        dom5< OK
        dom5> WATCH a|t|
        dom5< OK
        dom5< * a|t|
        dom5> SET_PERMS b|n5|r0|r6|
        dom5< OK
    """)
    lines = control(world, "quota|5").removesuffix("\n|").splitlines()
    assert lines[:3] == [
        "Domain 5:", "nodes            :        2 (max        3)", "watches          :        1 (max        1)"
    ]  # fmt: skip
    assert {line.split(":")[0].rstrip(): line.split()[-1] for line in lines[5:]} == {
        "transactions": "0)",
        "transaction-nodes": "0)",
        "node-permissions": "3)",
        "path-max": "1)",
        "node-size": str(16 + 3 * 8) + ")",
    }
    assert control(world, "quota|55") == "! ENOENT"


def test_the_highest_counts_of_all_domains() -> None:
    world, _ = world_with_actions()
    for client, n_watches in (("dom5", 3), ("dom6", 5), ("dom0", 9)):
        for i in range(n_watches):
            world.send(client, 4, b"/a\0%d\0" % i)
        world.received(client).clear()
    world.hub.died([6])
    maxima = control(world, "quota|max").splitlines()
    assert maxima[0] == "Max. seen accounting values:"
    assert maxima[2] == "watches          :        5"
    assert control(world, "quota|max|-r").splitlines()[2] == "watches          :        0"
    world.send("dom5", 4, b"/a\0x\0")
    assert control(world, "quota|max").splitlines()[2] == "watches          :        4"


# -- live update


def test_a_live_update_step_by_step() -> None:
    world, actions = world_with_actions()
    assert control(world, "live-update|-c|--debug") == "Not in live-update session.|"
    assert control(world, "live-update|-s") == "Not in live-update session.|"
    assert control(world, "live-update|-a") == "No live-update session active.|"
    assert control(world, "live-update|-f|/missing") == "No such file.|"
    assert control(world, "live-update|-f|/usr/bin/new") == "OK"
    assert control(world, "live-update|-f|/usr/bin/new") == "live-update session already active.|"
    assert control(world, "live-update|-a") == "OK"
    assert control(world, "live-update|-f|/usr/bin/newer") == "OK"
    assert control(world, "live-update|-c|--debug -x") == "OK"
    assert control(world, "live-update|-s|-v|3") == "Migration stream version not supported.|"
    assert control(world, "live-update|-s|-t|5|-v|2|-F") == "OK"
    assert actions.done == [("live_update", "/usr/bin/newer", "--debug -x", 5)]
    assert control(world, "live-update|-s") == "Not in live-update session.|"


def test_a_live_update_waits_for_transactions_unless_forced() -> None:
    world, actions = world_with_actions()
    assert control(world, "live-update|-f|/usr/bin/new") == "OK"
    assert world.ask("dom5", "TRANSACTION_START") == "1|"
    assert control(world, "live-update|-s") == "BUSY|"
    assert control(world, "live-update|-s|-t|1") == "BUSY|"
    assert actions.done == []
    assert world.ask("dom5", "TRANSACTION_END", "F|", 1) == "OK"
    actions.update_refusal = "no memory"
    assert control(world, "live-update|-s") == "no memory|"
    assert actions.done == [("live_update", "/usr/bin/new", None, 60)]
    actions.update_refusal = None
    assert world.ask("dom5", "TRANSACTION_START") == "2|"
    assert control(world, "live-update|-f|/usr/bin/new") == "OK"
    assert control(world, "live-update|-s|-F") == "OK"


def test_a_store_in_another_program_cannot_be_replaced() -> None:
    world = World()
    assert control(world, "live-update|-f|/usr/bin/new") == "Not supported.|"
    assert control(world, "logfile|/tmp/x") == "! ENOSYS"
    assert control(world, "memreport") == "! ENOSYS"
    assert control(world, "log|on") == "OK"
    assert control(world, "print|x") == "OK"
