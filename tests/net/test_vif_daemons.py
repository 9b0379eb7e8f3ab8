# SPDX-License-Identifier: MIT
"""Network devices on a host of daemons: the commands, and `kill -9` of the backend while guests talk."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from ..eventually import eventually
from ..host.running import RunningHost, read_all, read_line

WORKER = Path(__file__).with_name("vif_worker.py")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def host() -> Iterator[RunningHost]:
    with RunningHost() as running:
        yield running


def run(host: RunningHost, domain: str, role: str, *options: str, word: str = "") -> "subprocess.Popen[bytes]":
    """A guest, once it is connected. `word`: of those that talk to each other."""
    guest = host.spawn(
        "run",
        *options,
        domain,
        "--",
        sys.executable,
        str(WORKER),
        role,
        *([word] if word else []),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert read_line(guest.stdout) == "connected"
    return guest


def network_backend(host: RunningHost, before: int) -> int:
    """Its process, once there is another one than `before`."""
    found = [before]

    def is_another() -> bool:
        with suppress(AssertionError):
            found[0] = host.pid("--network")
        return found[0] != before

    eventually(is_another)
    return found[0]


def test_the_commands_of_network_devices_and_bridges(host: RunningHost) -> None:
    host.ask("domain", "create", "plain")
    host.ask("vif", "attach", "plain", "--rate", "1M", "--vlan", "10", "--mtu", "9000")
    (vif,) = json.loads(host.ask("vif", "list", "plain", "--json"))
    assert (vif["bridge"], vif["mtu"], vif["rate"]) == ("xenbr0", 9000, "52428,50000")
    assert vif["port"] == "vlan 10"
    host.ask("vif", "set", "plain", "--rate", "none", "--locking", "locked", "--ipv4", "10.0.0.1")
    (vif,) = json.loads(host.ask("vif", "list", "plain", "--json"))
    assert vif["rate"] == ""
    assert vif["port"] == "locking-mode locked, ipv4-allowed 10.0.0.1, vlan 10"
    host.ask("bridge", "set", "xenbr0", "--ageing", "60", "--hold", "250", "--mirror", "vif9.9")
    (bridge,) = json.loads(host.ask("bridge", "list", "--json"))
    assert (bridge["name"], bridge["ageing_s"], bridge["hold_ms"], bridge["mirror"]) == ("xenbr0", 60, 250, "vif9.9")
    assert [name.startswith("vif") for name in bridge["vifs"]] == [True]
    assert "xenbr0" in host.ask("bridge", "list")
    host.ask("vif", "detach", "plain")
    host.ask("bridge", "remove", "xenbr0")
    assert json.loads(host.ask("bridge", "list", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("vif", "attach", "plain", "--mac", "ff:ff:ff:ff:ff:ff"), "not the address of one station"),
        (("vif", "attach", "plain", "--mtu", "5"), "mtu"),
        (("vif", "attach", "plain", "--rate", "0,5"), "rate"),
        (("vif", "attach", "plain", "--vlan", "4095"), "VLAN"),
        (("vif", "set", "plain"), "nothing is to be changed"),
        (("vif", "set", "plain", "--rate", "none"), "no network device"),
        (("vif", "detach", "plain"), "no network device"),
        (("bridge", "remove", "none"), "not configured"),
        (("bridge", "set", "a/b"), "no name of a bridge"),
        (("backend", "--network", "--device", "a:b"), "--network"),
        (("vif", "tap"), "not in a domain"),
    ],
)
def test_mistakes_are_one_line(host: RunningHost, arguments: tuple[str, ...], reason: str) -> None:
    done = host.attempt(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert reason in done.stderr


@pytest.mark.parametrize("isolated", [False, True])
def test_guests_talk_on_after_the_backend_was_killed(host: RunningHost, isolated: bool) -> None:
    names = [f"{role}-{isolated}" for role in ("echo", "ask")]
    options = () if isolated else ("--shared",)
    for name in names:
        host.ask("domain", "create", name, *options)
        host.ask("vif", "attach", name, "--bridge", f"br-{isolated}")
    echo, ask = run(host, names[0], "echo", *options), run(host, names[1], "ask", *options)
    try:
        assert read_line(ask.stdout) == "answered 10"
        pid = 0
        for _ in range(2):
            pid = network_backend(host, pid)
            os.kill(pid, signal.SIGKILL)
            before = int(read_line(ask.stdout).split()[1])
            while int(read_line(ask.stdout).split()[1]) < before + 30:
                pass
        for guest in (ask, echo):
            assert guest.stdin is not None
            guest.stdin.close()
        assert read_all(ask.stdout).decode().splitlines()[-1] == "reconnects 2"
        assert ask.wait(20) == 0
        assert echo.wait(20) == 0
    finally:
        for guest in (ask, echo):
            guest.kill()
            with guest:  # closes its pipes
                pass
    for name in names:
        host.ask("vif", "detach", name)


@contextmanager
def flooded(host: RunningHost, bridge: str) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """Two guests that talk, and beside them on the same bridge one that floods another, which sends everything back."""
    roles = {"echo": "echo", "ask": "ask", "target": "echo", "flood": "flood"}
    for name in roles:
        host.ask("domain", "create", f"{bridge}-{name}", "--shared")
        host.ask("vif", "attach", f"{bridge}-{name}", "--bridge", bridge)
    with ExitStack() as stack:
        guests: dict[str, subprocess.Popen[bytes]] = {}
        for name, role in roles.items():
            word = "flood" if name in ("target", "flood") else ""
            guest = guests[name] = stack.enter_context(run(host, f"{bridge}-{name}", role, "--shared", word=word))
            stack.callback(guest.kill)
        assert read_line(guests["ask"].stdout) == "answered 10"
        yield guests


def go_on(ask: "subprocess.Popen[bytes]") -> None:
    """Until so many answers more have come that they were asked for after now."""
    before = int(read_line(ask.stdout).split()[1])
    while int(read_line(ask.stdout).split()[1]) < before + 50:
        pass


def program_of(guest: "subprocess.Popen[bytes]") -> int:
    """The process that `paravirt run` has started."""
    (pid,) = Path(f"/proc/{guest.pid}/task/{guest.pid}/children").read_text().split()
    return int(pid)


def last_words(guest: "subprocess.Popen[bytes]") -> list[str]:
    assert guest.stdin is not None
    guest.stdin.close()
    words = read_all(guest.stdout).decode().splitlines()[-2:]
    assert guest.wait(20) == 0
    return words


@pytest.mark.parametrize("victim", ["flood", "target"])
def test_a_guest_that_is_killed_in_its_traffic_costs_others_nothing(host: RunningHost, victim: str) -> None:
    with flooded(host, f"br-{victim}") as guests:
        assert read_line(guests["flood"].stdout).startswith("sent ")
        go_on(guests["ask"])
        os.kill(program_of(guests[victim]), signal.SIGKILL)
        assert guests[victim].wait(20) != 0
        go_on(guests["ask"])
        role = "ask" if victim == "flood" else "echo"
        again = run(host, f"br-{victim}-{victim}", role, "--shared", word="flood")
        with again:
            try:
                if victim == "flood":
                    # What was on its way when it died is in no queue's way.
                    assert read_line(again.stdout) == "answered 10"
                else:
                    for _ in range(3):
                        assert read_line(guests["flood"].stdout).startswith("sent ")
            finally:
                again.kill()
        assert last_words(guests["ask"]) == ["lost 0", "reconnects 0"]


def test_a_backend_that_is_killed_in_the_traffic_leaves_no_queue_stuck(host: RunningHost) -> None:
    with flooded(host, "br-backend") as guests:
        pid = 0
        for _ in range(2):
            read_line(guests["flood"].stdout)
            pid = network_backend(host, pid)
            os.kill(pid, signal.SIGKILL)
            for _ in range(3):
                read_line(guests["flood"].stdout)
            go_on(guests["ask"])
        assert last_words(guests["ask"])[1] == "reconnects 2"
