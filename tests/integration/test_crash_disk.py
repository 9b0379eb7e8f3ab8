# SPDX-License-Identifier: MIT
"""`kill -9` of the backend while a guest uses its disk in every way: nothing acknowledged is lost."""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.testing.temporary import TemporaryHost

from .test_crash import Guest, attach, kill

SIZE = 4 << 20
WORKER = Path(__file__).with_name("disk_worker.py")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def host() -> Iterator[TemporaryHost]:
    with TemporaryHost() as running:
        yield running


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize("queues", [1, 2])
def test_backends_that_die(host: TemporaryHost, image: Path, queues: int) -> None:
    chance = random.Random(queues)
    guest = Guest(host, attach(host, image, isolated=False), (sys.executable, str(WORKER), str(queues)))
    guest.says(more=2)
    for _ in range(5):
        time.sleep(chance.random() * 0.2)
        kill(host, "backend")
        host.start("backend")
        guest.says(more=2)  # the first may be of what was done before
    reconnects, reissued = guest.finish()
    assert reconnects == 5
    assert reissued > 0


def test_a_storm_of_deaths(host: TemporaryHost, image: Path) -> None:
    """Backends that die while they connect, too."""
    chance = random.Random(9)
    guest = Guest(host, attach(host, image, isolated=True), (sys.executable, str(WORKER), "2"))
    guest.says(more=2)
    for _ in range(12):
        kill(host, "backend")
        host.start("backend")
        time.sleep(chance.random() * 0.15)
    guest.says(more=2)
    guest.finish()
