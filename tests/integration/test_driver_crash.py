# SPDX-License-Identifier: MIT
"""A declared device in processes of its own: isolated and shared, and `kill -9` of either half."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.host import device
from paravirt.hypervisor.client import DomainInfo
from paravirt.protocol.xenbus import DevicePath
from paravirt.testing.temporary import TemporaryHost
from tests.eventually import eventually
from tests.host.running import freeze
from tests.integration.test_crash import DEADLINE_S, Guest, descriptors, held, is_idle

ROOT = Path(__file__).parent.parent.parent
DRIVER = "tests.echo_device:EchoBack"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[TemporaryHost]:
    monkeypatch.chdir(ROOT)  # where the backend and the guests find tests.echo_device
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with TemporaryHost(drivers=[DRIVER]) as running:
        yield running
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("paravirt")]


@pytest.fixture(params=[True, False], ids=["isolated", "shared"])
def isolated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class EchoGuest(Guest):
    """A worker that uses the device."""

    def __init__(self, host: TemporaryHost, domain: DomainInfo) -> None:
        device.attach(host.store, DevicePath("vecho", domain.domid, 0), {"step": "1"}, name="vecho 0")
        super().__init__(host, domain, [sys.executable, "-m", "tests.integration.echo_worker"])


def test_nothing_happens(host: TemporaryHost, isolated: bool) -> None:
    guest = EchoGuest(host, host.create_domain("guest", isolated=isolated))
    guest.says(more=3)
    assert guest.finish() == (0, 0)


def test_front(host: TemporaryHost, isolated: bool) -> None:
    before, nothing = None, held(host)
    for round_number in range(3):
        domain = host.create_domain(f"guest-{round_number}", isolated=isolated)
        guest = EchoGuest(host, domain)
        guest.says(more=2)
        os.kill(guest.process.pid, signal.SIGKILL)
        guest.process.wait(DEADLINE_S)
        guest.close()
        eventually(lambda: not device.paths(host.store), "the backend forgets the device")
        eventually(lambda: held(host) == nothing, "what backend and guest held is free")
        if os.geteuid() == 0:
            now = tuple(descriptors(host.pid(name)) for name in ("hypervisor", "xenstored", DRIVER))
            before = before or now
            assert now == before, "descriptors leak"


def test_back(host: TemporaryHost, isolated: bool) -> None:
    guest = EchoGuest(host, host.create_domain("guest", isolated=isolated))
    guest.says(more=2)
    connected = held(host)
    for _ in range(4):
        host.supervisor.kill(DRIVER)
        host.start(DRIVER)
        guest.says(more=2)
        assert held(host) == connected, "a new connection holds more than the one before"
    reconnects, _ = guest.finish()
    assert reconnects == 4


def test_back_while_requests_are_in_flight(host: TemporaryHost) -> None:
    guest = EchoGuest(host, host.create_domain("guest", isolated=False))
    guest.says(more=2)
    pid = host.pid(DRIVER)
    freeze(pid)
    said = len(guest._lines)
    eventually(lambda: is_idle(guest.process.pid), "the guest waits for its answers")
    assert len(guest._lines) <= said + 1
    host.supervisor.kill(DRIVER)
    host.start(DRIVER)
    guest.says(more=2)
    reconnects, reissued = guest.finish()
    assert reconnects == 1
    assert reissued > 0


def test_commands(host: TemporaryHost) -> None:
    def paravirt(*arguments: str) -> str:
        program = [sys.executable, "-m", "paravirt", "--run", str(host.rundir.path)]
        done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=50, check=False)
        return done.stdout + done.stderr

    host.create_domain("guest", isolated=False)
    assert paravirt("device", "attach", "guest", "vecho", "step=3") == "domain guest has vecho 0\n"
    assert "has a vecho 0 already" in paravirt("device", "attach", "guest", "vecho")
    assert "step is 'x'" in paravirt("device", "attach", "guest", "vecho", "step=x", "--number", "1")
    assert "KEY=VALUE" in paravirt("device", "attach", "guest", "vecho", "step", "--number", "1")
    assert "state has a meaning" in paravirt("device", "attach", "guest", "vecho", "state=4", "--number", "1")
    assert "no name of a device class" in paravirt("device", "attach", "guest", "../x")
    assert "vecho" in paravirt("device", "list")
    assert '"device_id": 0' in paravirt("device", "list", "guest", "--json")
    assert paravirt("device", "detach", "guest", "vecho") == ""
    assert "no vecho 0" in paravirt("device", "detach", "guest", "vecho")
    assert "running already" in paravirt("backend", "--device", DRIVER)
    assert "no driver" in paravirt("backend", "--device", "tests.echo_device:Nothing")
