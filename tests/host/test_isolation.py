# SPDX-License-Identifier: MIT
"""Every promise of isolation, tried from inside a domain against a whole host of daemons and a second domain.

`test_as_user.py` runs this file as an ordinary user too.
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paravirt.host.kernel import can_isolate
from paravirt.hypervisor.client import Hypervisor
from tests.host.running import DAEMONS, RunningHost, read_line

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(can_isolate() is not None, reason=f"the kernel gives no namespaces: {can_isolate()}")


@pytest.fixture(scope="module")
def host() -> Iterator[RunningHost]:
    with RunningHost() as running:
        yield running


@pytest.fixture(scope="module")
def victim(host: RunningHost) -> Iterator[dict[str, int]]:
    """A domain that waits, and what it has that nobody else may touch."""
    host.ask("domain", "create", "victim")
    with host.beside("run", "--expose", str(HERE), "victim", "--", "python3", str(HERE / "victim.py")) as process:
        yield {**json.loads(read_line(process.stdout)), "launcher": process.pid}
        assert process.poll() is None, "the victim did not survive"


@pytest.fixture(scope="module", params=["plain", "net"])
def answers(host: RunningHost, victim: dict[str, int], request: pytest.FixtureRequest) -> Any:
    """What each attack got, of a domain without and with a network of its own; None where it was refused."""
    attacker = f"attacker-{request.param}"
    host.ask("domain", "create", attacker)
    pids = [host.up.pid, *(host.pid(daemon) for daemon in DAEMONS), victim["launcher"], os.getpid()]
    targets = json.dumps({"run": str(host.run), "pids": pids, "victim": victim})
    options = ["--expose", str(HERE), *(["--net"] if request.param == "net" else [])]
    return json.loads(host.ask("run", *options, attacker, "--", "python3", str(HERE / "attacker.py"), targets))


def attacks() -> list[str]:
    """Names of all attacks, without loading what only a domain can load."""
    return re.findall(r"^@attack\ndef (\w+)", (HERE / "attacker.py").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", attacks())
def test_refused(answers: Any, name: str) -> None:
    assert answers[name] is None


def test_nothing_was_left_untried(answers: Any) -> None:
    assert sorted(answers) == sorted(attacks())


def test_the_host_is_unharmed(host: RunningHost, answers: Any, victim: dict[str, int]) -> None:
    assert host.up.poll() is None
    assert all(host.pid(daemon) for daemon in DAEMONS)
    assert host.ask("xenstore", "read", f"/local/domain/{victim['domid']}/data/secret").strip() == "for Dom0 and me"
    names = {row["name"] for row in json.loads(host.ask("domain", "list", "--json"))}
    assert "victim" in names
    assert "intruder" not in names


def test_dom0_may_do_it(host: RunningHost, answers: Any, victim: dict[str, int]) -> None:
    """The same calls with the same numbers, from where they are allowed: the attacks failed for the right reason."""
    domid = victim["domid"]
    with Hypervisor.connect(host.run / "hypervisor.sock") as hypervisor:
        arena = hypervisor.foreign_arena(domid, victim["gref"])
        offset = arena.mapper.map(victim["gref"])
        assert bytes(arena.data.view[offset : offset + 6]) == b"secret"
        arena.mapper.unmap(victim["gref"])
        with hypervisor.bind_interdomain(hypervisor.waiter(), domid, victim["port"]) as channel:
            assert channel.remote == (domid, victim["port"])
    for path in ("hypervisor.sock", f"domains/{domid}/hypervisor.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(host.run / path))
