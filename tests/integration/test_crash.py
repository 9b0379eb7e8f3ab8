# SPDX-License-Identifier: MIT
"""`kill -9` of any one process during I/O, with real processes: what goes on, what is freed, what is said."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from paravirt.errors import HypervisorGone, StoreGone
from paravirt.host import vbd
from paravirt.host.launch import DomainProcess
from paravirt.hypervisor.client import DomainInfo
from paravirt.testing.temporary import TemporaryHost
from tests.eventually import eventually
from tests.host.running import freeze

SIZE = 4 << 20
WORKER = Path(__file__).with_name("worker.py")
DEADLINE_S = 30.0

pytestmark = pytest.mark.timeout(120)


class Guest:
    """A worker in a domain and the lines it says."""

    def __init__(
        self, host: TemporaryHost, domain: DomainInfo, command: Sequence[str] = (sys.executable, str(WORKER))
    ) -> None:
        self.process: DomainProcess = host.run(domain, list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lines: list[str] = []
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._said:
                self._lines.append(line.decode().strip())
                self._said.notify_all()

    def says(self, *, more: int = 1) -> None:
        """Wait for `more` lines beyond those there are."""
        with self._said:
            wanted = len(self._lines) + more
            assert self._said.wait_for(lambda: len(self._lines) >= wanted, DEADLINE_S), f"silent after {self._lines}"
            assert "wrong data" not in self._lines

    def finish(self) -> tuple[int, int]:
        """Let it end and check everything; (reconnects, reissued)."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = self.process.wait(DEADLINE_S)
        self.close()
        assert status == 0, self._lines
        word, _, reconnects, reissued = self._lines[-1].split()
        assert word == "done"
        return int(reconnects), int(reissued)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        self.process.close()


def is_idle(pid: int) -> bool:
    """Whether it used no processor time in three looks."""
    times = set()
    for _ in range(3):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        times.add((fields[0], fields[11], fields[12]))
        subprocess.run(["sleep", "0.05"], check=True)
    return len(times) == 1 and next(iter(times))[0] == "S"


@pytest.fixture
def host() -> Iterator[TemporaryHost]:
    with TemporaryHost() as running:
        yield running
        pids = [pid for name in ("hypervisor", "xenstored", "backend") if (pid := running.supervisor.pid(name))]
    for pid in pids:
        eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"process {pid} ends")
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("paravirt")]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def attach(host: TemporaryHost, image: Path, *, isolated: bool, name: str = "guest") -> DomainInfo:
    domain = host.create_domain(name, isolated=isolated)
    vbd.attach(host.store, domain.domid, str(image))
    return domain


@pytest.fixture(params=[True, False], ids=["isolated", "shared"])
def isolated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def kill(host: TemporaryHost, name: str) -> None:
    host.supervisor.kill(name)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def held(host: TemporaryHost) -> list[tuple[int, ...]]:
    """What each domain holds: pages, arenas, ports, mappings."""
    return [(i.domid, i.pages, i.arenas, i.ports, i.maps) for i in host.hypervisor.list_domains()]


def test_nothing_happens(host: TemporaryHost, image: Path, isolated: bool) -> None:
    guest = Guest(host, attach(host, image, isolated=isolated))
    guest.says(more=3)
    assert guest.finish() == (0, 0)


def test_front(host: TemporaryHost, image: Path, isolated: bool) -> None:
    before, nothing = None, held(host)
    for round_number in range(3):
        domain = attach(host, image, isolated=isolated, name=f"guest-{round_number}")
        guest = Guest(host, domain)
        guest.says(more=2)
        os.kill(guest.process.pid, signal.SIGKILL)
        guest.process.wait(DEADLINE_S)
        guest.close()
        eventually(lambda: not vbd.list_vbds(host.store), "the backend forgets the device")
        domid = domain.domid
        eventually(
            lambda domid=domid: domid not in [info.domid for info in host.hypervisor.list_domains()],
            "the hypervisor forgets the domain",
        )
        eventually(lambda: held(host) == nothing, "what backend and guest held is free")
        if os.geteuid() == 0:
            now = tuple(descriptors(host.pid(name)) for name in ("hypervisor", "xenstored", "backend"))
            before = before or now
            assert now == before, "descriptors leak"


def test_back(host: TemporaryHost, image: Path, isolated: bool) -> None:
    guest = Guest(host, attach(host, image, isolated=isolated))
    guest.says(more=2)
    connected = held(host)
    for _ in range(4):
        kill(host, "backend")
        host.start("backend")
        guest.says(more=2)
        assert held(host) == connected, "a new connection holds more than the one before"
    reconnects, _ = guest.finish()
    assert reconnects == 4


def test_back_while_the_guest_waits(host: TemporaryHost, image: Path) -> None:
    """Requests that were in flight when the backend died are answered by the next one."""
    guest = Guest(host, attach(host, image, isolated=False))
    guest.says(more=2)
    freeze(host.pid("backend"))
    eventually(lambda: is_idle(guest.process.pid), "the guest waits for its answers")
    kill(host, "backend")
    host.start("backend")
    guest.says(more=2)
    reconnects, reissued = guest.finish()
    assert reconnects == 1
    assert reissued > 0


def test_broker(host: TemporaryHost, image: Path, isolated: bool) -> None:
    guest = Guest(host, attach(host, image, isolated=isolated))
    guest.says(more=2)
    kill(host, "hypervisor")
    guest.says(more=3)
    with pytest.raises(HypervisorGone):
        host.hypervisor.list_domains()
    with pytest.raises(HypervisorGone):
        host.create_domain("another")
    assert guest.finish() == (0, 0)


def test_store(host: TemporaryHost, image: Path, isolated: bool) -> None:
    guest = Guest(host, attach(host, image, isolated=isolated))
    guest.says(more=2)
    kill(host, "xenstored")
    guest.says(more=3)
    with pytest.raises(StoreGone):
        host.store.read("/local")
    assert guest.finish() == (0, 0)
