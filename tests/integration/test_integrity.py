# SPDX-License-Identifier: MIT
"""Data through everything at once: fio and file systems on an exported disk, for as long as is wished, in peace and
while backends are killed, often before they are connected. What was written is read, and file systems are checked where
they are stored, too.

INTEGRITY_SECONDS: of each of the four tests. INTEGRITY_SEED: of what they do; it is printed.
"""

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests import needs
from tests.host.running import RunningHost

from .exported import Killer, attached_image, client, exported, need
from .file_system import check, fill, mounted

SECONDS = float(os.environ.get("INTEGRITY_SECONDS", "2"))
SEED = int(os.environ.get("INTEGRITY_SEED", "1"))
MIB = 1 << 20
SIZE = 64 * MIB
SHAPES = (
    ("--rw=write", "--bs=128k"),
    ("--rw=randwrite", "--bs=4k"),
    ("--rw=randrw", "--bsrange=4k-64k"),
    ("--rw=randwrite", "--bs=64k", "--fsync=8"),
    ("--rw=randwrite", "--bsrange=512-32k", "--bs_unaligned=0", "--ba=512", "--fsync=32"),
)

pytestmark = pytest.mark.timeout(180 + 20 * SECONDS)


@pytest.fixture(scope="module")
def host() -> Iterator[RunningHost]:
    need("fio", "nbdfuse", "fusermount3", "mkfs.ext4", "e2fsck", "debugfs")
    with RunningHost() as running:
        running.ask("domain", "create", "guest")
        yield running


@pytest.fixture
def image(host: RunningHost) -> Iterator[Path]:
    with attached_image(host, bytes(SIZE)) as path:
        yield path


def rounds(killer: Killer | None = None) -> Iterator[int]:
    """Numbers, from 1 on, until enough seconds are over and somebody was killed, if that is the point."""
    end, done = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or not done or (killer is not None and not killer.killed):
        done += 1
        yield done


def killing(host: RunningHost, chance: random.Random, *, deadly: bool) -> "Killer | nullcontext[None]":
    return Killer(host, times=10**9, pause_s=4.0, chance=chance) if deadly else nullcontext()


def tell(what: str, killer: Killer | None) -> None:
    """Somebody may be waiting for hours."""
    print(f"{what}, {killer.killed if killer else 0} backends killed (seed {SEED})", flush=True)


@pytest.mark.parametrize("deadly", [False, True], ids=["in_peace", "under_kills"])
def test_fio_finds_what_it_wrote(host: RunningHost, image: Path, deadly: bool) -> None:
    """Two connections, each with half of the disk and 32 requests in flight."""
    chance = random.Random(SEED)
    with exported(host) as export, killing(host, random.Random(SEED), deadly=deadly) as killer:
        for passes in rounds(killer):
            n_bytes = chance.choice((4, 8, 16)) * MIB
            command = ["fio", "--name=verify", "--ioengine=nbd", f"--uri={export.uri}", "--iodepth=32", "--thread"]
            command += ["--numjobs=2", f"--size={n_bytes}", f"--offset_increment={SIZE // 2}"]
            command += ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"]
            command += [f"--randseed={chance.getrandbits(31)}", f"--aux-path={tempfile.gettempdir()}"]
            client(*command, *chance.choice(SHAPES), timeout_s=120)
            tell(f"fio: {passes} passes", killer)
    assert killer is None or killer.killed >= SECONDS / 20


@pytest.mark.parametrize("deadly", [False, True], ids=["in_peace", "under_kills"])
def test_a_file_system_keeps_its_files(host: RunningHost, image: Path, tmp_path: Path, deadly: bool) -> None:
    """Made, filled, checked, and checked again where it is stored, when nobody serves it any more."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        needs.missing("/dev/fuse cannot be opened")
    chance = random.Random(SEED)
    for done in rounds():
        with mounted(host) as (_, file):
            with killing(host, random.Random(SEED + done), deadly=deadly) as killer:
                client("mkfs.ext4", "-q", "-F", *chance.choice(((), ("-b", "1024"), ("-O", "^has_journal"))), str(file))
                names = range(1, chance.randint(20, 60))
                fill(file, tmp_path, names, done)
                check(file, tmp_path, names, done)
                while killer is not None and not killer.killed:
                    check(file, tmp_path, names, done)
        check(image, tmp_path, names, done)
        tell(f"ext4: {done} file systems", killer)
