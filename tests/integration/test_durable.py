# SPDX-License-Identifier: MIT
"""What a flush has answered is in the image, whatever dies then: `kill -9` of hypervisor, store, backend and guest."""

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.backend.c_engine import EngineName
from paravirt.backend.disks import open_disk
from paravirt.errors import AlreadyExists
from paravirt.host import vbd
from paravirt.testing.temporary import DAEMONS, TemporaryHost
from tests.eventually import eventually
from tests.integration.flush_worker import BLOCKS
from tests.integration.test_crash import DEADLINE_S, Guest
from tests.integration.worker import BLOCK, RECORD

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def host(
    monkeypatch: pytest.MonkeyPatch, vbd_engine: EngineName, request: pytest.FixtureRequest
) -> Iterator[TemporaryHost]:
    monkeypatch.chdir(ROOT)  # where the guests find tests.integration
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--engine", vbd_engine, *request.param]
    with TemporaryHost(backend_options=options) as running:
        yield running


class FlushedGuest(Guest):
    """Writes, flushes, and says what is durable."""

    def versions(self) -> list[tuple[int, list[int]]]:
        """Of each round that was said to be durable: its number, and the blocks that it wrote."""
        rounds = [[int(word) for word in line.split()] for line in self._lines]
        return [(version, places) for version, *places in rounds]


def kill_all(host: TemporaryHost, guest: Guest, chance: random.Random) -> None:
    """In any order, as close together as they can be."""
    victims = [host.pid(name) for name in DAEMONS] + [guest.process.pid]
    chance.shuffle(victims)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    for name in DAEMONS:
        host.supervisor.kill(name)  # as it does not know yet


def stored(image: Path, place: int) -> int:
    """The version that the image has of a block; every sector must be of the same one, or of one that came later."""
    block = image.read_bytes()[place * BLOCK : (place + 1) * BLOCK]
    records = list(RECORD.iter_unpack(block))
    assert {number for number, _ in records} <= {place, 0}
    return min(version for _, version in records)


@pytest.mark.parametrize("host", [(), ("--persistent",)], indirect=True, ids=["usual", "persistent"])
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "shared"])
def test_after_a_flush_data_outlives_everybody(host: TemporaryHost, tmp_path: Path, isolated: bool) -> None:
    chance = random.Random(isolated)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(BLOCKS * BLOCK))
    domain = host.create_domain("guest", isolated=isolated)
    vbd.attach(host.store, domain.domid, str(image))
    guest = FlushedGuest(host, domain, [sys.executable, "-m", "tests.integration.flush_worker"])
    try:
        guest.says(more=10)
        threading.Event().wait(chance.random() * 0.1)
        kill_all(host, guest, chance)
        guest.process.wait(DEADLINE_S)
        guest._reader.join(DEADLINE_S)
        # The image is free when the last write of the dead is done.
        eventually(lambda: _can_be_opened(image), "the image is free")
        latest: dict[int, int] = {}
        for version, places in guest.versions():
            latest |= dict.fromkeys(places, version)
        assert len(latest) > BLOCKS // 2
        for place, version in latest.items():
            assert stored(image, place) >= version
    finally:
        guest.close()


def _can_be_opened(image: Path) -> bool:
    try:
        open_disk("file", str(image), read_only=False).close()
    except AlreadyExists:
        return False
    return True
