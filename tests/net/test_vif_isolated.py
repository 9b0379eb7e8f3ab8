# SPDX-License-Identifier: MIT
"""Isolated domains with the kernel's TCP/IP on their network devices: `run --net`, `vif tap`."""

import os
import shutil
from collections.abc import Iterator

import pytest

from paravirt.host.kernel import can_isolate
from tests import needs

from ..eventually import eventually
from ..host.running import RunningHost, read_line

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
CONNECT = "import socket, sys; print(socket.create_connection((sys.argv[1], 7), 20).recv(100).decode())"
SERVE = (
    "import socket; s = socket.create_server(('::', 7), family=socket.AF_INET6, dualstack_ipv6=True);"
    "print('serves', flush=True)\n"
    "while True: s.accept()[0].send(b'who calls?')"
)

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(can_isolate() is not None, reason=f"the kernel gives no namespaces: {can_isolate()}"),
]


@pytest.fixture(scope="module")
def host() -> Iterator[RunningHost]:
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("there is no /dev/net/tun")
    if os.geteuid() and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("/dev/net/tun may not be opened")
    with RunningHost() as running:
        for name in ("web", "db"):
            running.ask("domain", "create", name)
            running.ask("vif", "attach", name)
        yield running


def tap(*addresses: str) -> list[str]:
    return ["paravirt", "vif", "tap", "eth0", *(part for address in addresses for part in ("--ip", address)), "--"]


def test_two_isolated_domains_talk_over_tcp(host: RunningHost) -> None:
    """On port 7, which only an administrator of the network may serve."""
    served = ("run", "--net", "db", "--", *tap("10.0.0.2/24", "fd00::2/64"), "python3", "-c", SERVE)
    with host.beside(*served) as server:
        assert read_line(server.stdout) == "serves"
        for mine, theirs in (("10.0.0.1/24", "10.0.0.2"), ("fd00::1/64", "fd00::2")):
            command = ("run", "--net", "web", "--", *tap(mine), "python3", "-c", CONNECT, theirs)
            found = [""]

            def answers(command: tuple[str, ...] = command, found: list[str] = found) -> bool:
                # An IPv6 address may not be used before the kernel has looked for another station with it.
                done = host.attempt(*command)
                found[0] = done.stdout.strip() or done.stderr
                return found[0] == "who calls?"

            eventually(answers)


def test_the_interface_is_the_device(host: RunningHost) -> None:
    if shutil.which("ip", path=PATH) is None:
        needs.missing("ip is not installed")
    said = host.ask("run", "--net", "web", "--", *tap("10.0.0.1/24"), "ip", "addr", "show", "eth0")
    assert "inet 10.0.0.1/24" in said
    assert "mtu 1500" in said
    mac = next(line.split()[3] for line in host.ask("vif", "list").splitlines() if line.split()[1:2] == ["0"])
    assert mac in said or mac.count(":") != 5


def test_the_exit_status_is_the_commands(host: RunningHost) -> None:
    assert host.attempt("run", "--net", "web", "--", *tap(), "sh", "-c", "exit 3").returncode == 3
    assert host.attempt("run", "--net", "web", "--", *tap(), "sh", "-c", "kill -9 $$").returncode == 137


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("run", "--net", "web", "--", *tap(), "no-such-command"), "command not found: no-such-command"),
        (("run", "--net", "web", "--", *tap("10.0.0.1/99"), "true"), "'10.0.0.1/99' does not appear to be"),
        (("run", "web", "--", *tap(), "true"), "run --net"),
        (("run", "--net", "web", "--", "paravirt", "vif", "tap", "a/b"), "no name of an interface"),
    ],
)
def test_mistakes_have_one_clear_line(host: RunningHost, command: tuple[str, ...], reason: str) -> None:
    done = host.attempt(*command)
    assert done.returncode
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_shared_command_gets_no_network(host: RunningHost) -> None:
    host.ask("domain", "create", "--shared", "open")
    done = host.attempt("run", "--net", "--shared", "open", "--", "true")
    assert done.returncode
    assert "--net is for isolated commands" in done.stderr
    host.ask("domain", "destroy", "open")


def test_rights_end_at_the_network_of_the_command(host: RunningHost) -> None:
    said = host.ask(
        "run", "--net", "web", "--", "sh", "-c", "grep Cap /proc/self/status; mount -t tmpfs x /mnt || echo no"
    )
    rights = {line.split()[1] for line in said.splitlines() if line.startswith("Cap")}
    assert {int(each, 16) for each in rights} == {1 << 10 | 1 << 12 | 1 << 13}
    assert said.splitlines()[-1] == "no"


def test_a_command_that_is_killed_leaves_the_device_for_the_next(host: RunningHost) -> None:
    with host.beside("run", "--net", "web", "--", "paravirt", "vif", "tap", "eth0") as first:
        assert "eth0 is network device 0" in read_line(first.stdout)
        first.kill()
    eventually(lambda: host.attempt("run", "--net", "web", "--", *tap("10.0.0.1/24"), "true").returncode == 0)
