# SPDX-License-Identifier: MIT
"""`paravirt vbd export` with NBD clients that know nothing of it: what they read, write and are told; who dies."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import paravirt
from tests.eventually import eventually
from tests.host.running import DEADLINE_S, RunningHost, ended

from .exported import Export, Killer, attached_image, client, exported, need

MIB = 1 << 20
SIZE = 16 * MIB

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def host() -> Iterator[RunningHost]:
    need("nbdinfo", "nbdcopy")
    with RunningHost() as running:
        running.ask("domain", "create", "guest")
        yield running


@pytest.fixture
def image(host: RunningHost) -> Iterator[Path]:
    with attached_image(host, os.urandom(SIZE)) as path:
        yield path


def test_what_it_says_of_itself(host: RunningHost, image: Path) -> None:
    with exported(host) as export:
        said = json.loads(client("nbdinfo", "--json", export.uri))["exports"][0]
        assert said["export-size"] == SIZE
        assert said["contexts"] == ["base:allocation"]
        for able in ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"):
            assert said[able], able
        for unable in ("is_read_only", "can_fast_zero", "is_rotational"):
            assert not said[unable], unable
        assert (said["block_size_minimum"], said["block_size_preferred"]) == (1, 4096)
        # blkif says nothing of what is allocated, so all of it is.
        extents = json.loads(client("nbdinfo", "--map", "--json", export.uri))
        assert sum(extent["length"] for extent in extents) == SIZE
        assert {extent["type"] for extent in extents} == {0}


def test_copies_there_and_back(host: RunningHost, image: Path, tmp_path: Path) -> None:
    """With four connections, many requests each."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(SIZE))
    digest = hashlib.sha256(source.read_bytes()).digest()
    with exported(host) as export:
        client("nbdcopy", "--connections=4", "--requests=32", "--flush", str(source), export.uri)
        assert hashlib.sha256(image.read_bytes()).digest() == digest
        client("nbdcopy", "--connections=4", export.uri, str(copy))
        assert hashlib.sha256(copy.read_bytes()).digest() == digest


def test_qemu_img(host: RunningHost, image: Path, tmp_path: Path) -> None:
    need("qemu-img")
    raw, qcow = tmp_path / "raw", tmp_path / "qcow2"
    raw.write_bytes(os.urandom(4 * MIB) + bytes(8 * MIB) + os.urandom(4 * MIB))
    client("qemu-img", "convert", "-O", "qcow2", str(raw), str(qcow))
    with exported(host) as export:
        assert json.loads(client("qemu-img", "info", "--output=json", export.uri))["virtual-size"] == SIZE
        client("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", str(qcow), export.uri)
        client("qemu-img", "compare", str(raw), export.uri)
    assert image.read_bytes() == raw.read_bytes()


def test_fio_verifies_what_it_wrote(host: RunningHost, image: Path) -> None:
    need("fio")
    with exported(host) as export:
        fio(export.uri, "--rw=randwrite", "--bsrange=4k-128k", "--fsync=64", "--size=16m")


def test_fio_verifies_while_backends_are_killed(host: RunningHost, image: Path) -> None:
    """Clients see pauses and nothing else."""
    need("fio")
    with exported(host) as export, Killer(host) as killer:
        fio(export.uri, "--rw=randrw", "--bsrange=4k-64k", "--fsync=64", "--size=4m", "--rate_iops=80,80")
    assert killer.killed == 3


def fio(uri: str, *options: str) -> None:
    directory = tempfile.gettempdir()  # where fio keeps what it has written, to verify it
    command = ["fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--iodepth=16", "--verify=crc32c"]
    command += ["--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--thread", f"--aux-path={directory}"]
    client(*command, *options)


def test_odd_places_and_lengths(host: RunningHost) -> None:
    """Any bytes of a disk of 513 sectors, also where two that are written stand in one sector."""
    need("qemu-io")
    path = host.directory / "odd.img"
    path.write_bytes(bytes(513 * 512))
    host.ask("vbd", "attach", "guest", str(path), "--dev", "xvdb")
    with exported(host, disk="xvdb") as export:
        assert client("nbdinfo", "--size", export.uri).strip() == str(513 * 512)
        commands = ["write -P 1 100 700", "write -P 2 800 1", "write -P 3 262000 656", "read -P 1 100 700"]
        qemu_io(export.uri, *commands, "read -P 2 800 1", "read -P 3 262000 656")
    host.ask("vbd", "detach", "guest", "xvdb")
    expected = bytearray(513 * 512)
    expected[100:800], expected[800:801], expected[262000:262656] = b"\1" * 700, b"\2", b"\3" * 656
    assert path.read_bytes() == bytes(expected)


def qemu_io(uri: str, *commands: str) -> str:
    return client("qemu-io", "-f", "raw", *(part for command in commands for part in ("-c", command)), uri)


def test_a_read_only_export(host: RunningHost, image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    with exported(host, "--read-only") as export:
        assert json.loads(client("nbdinfo", "--json", export.uri))["exports"][0]["is_read_only"]
        done = subprocess.run(["nbdcopy", str(image), export.uri], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        client("nbdcopy", export.uri, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == before


def test_a_disk_that_grows(host: RunningHost, image: Path) -> None:
    """Who comes afterwards sees it."""
    with exported(host) as export:
        os.truncate(image, 2 * SIZE)
        host.ask("vbd", "resize", "guest", "xvda")
        deadline = time.monotonic() + DEADLINE_S
        while client("nbdinfo", "--size", export.uri).strip() != str(2 * SIZE):
            assert time.monotonic() < deadline


def test_a_big_disk(host: RunningHost) -> None:
    need("qemu-io")
    host.ask("vbd", "attach", "guest", "16T", "--driver", "null", "--dev", "xvdb")
    with exported(host, disk="xvdb") as export:
        assert client("nbdinfo", "--size", export.uri).strip() == str(16 << 40)
        qemu_io(export.uri, f"read {(16 << 40) - MIB} 1M", f"write {(16 << 40) - MIB} 1M")
    host.ask("vbd", "detach", "guest", "xvdb")


def test_on_tcp_in_a_domain_that_shares(host: RunningHost) -> None:
    """From inside a domain; one that is not isolated has the machine's loopback interface."""
    host.ask("domain", "create", "open", "--shared")
    host.ask("vbd", "attach", "open", "1M", "--driver", "memory")
    arguments = (
        "run",
        "--shared",
        "open",
        "--",
        sys.executable,
        "-m",
        "paravirt",
        "vbd",
        "export",
        "xvda",
        "--tcp",
        "0",
    )
    with host.beside(*arguments) as process:
        export = Export(process, Path())
        assert export.uri.startswith("nbd://127.0.0.1:")
        assert client("nbdinfo", "--size", export.uri).strip() == str(MIB)
        assert export.stop() == 0
    host.ask("domain", "destroy", "open")


# -- who dies


def test_nbdkit_is_killed(host: RunningHost, image: Path) -> None:
    with exported(host) as export:
        os.kill(export.nbdkit(), signal.SIGKILL)
        assert export.process.wait(DEADLINE_S) == 2
        assert not export.path.exists()
    with exported(host) as export:  # nothing is in its way
        assert client("nbdinfo", "--size", export.uri).strip() == str(SIZE)


def test_who_started_it_is_killed(host: RunningHost, image: Path) -> None:
    with exported(host) as export:
        pidfd = os.pidfd_open(export.nbdkit())
        export.process.kill()
        assert ended(pidfd)
        os.close(pidfd)
    with exported(host) as export:  # what is left of its socket is replaced
        assert client("nbdinfo", "--size", export.uri).strip() == str(SIZE)


def test_the_domain_ends(host: RunningHost) -> None:
    host.ask("domain", "create", "short")
    host.ask("vbd", "attach", "short", "1M", "--driver", "memory")
    with exported(host, domain="short") as export:
        pidfd = os.pidfd_open(export.nbdkit())
        host.ask("domain", "destroy", "short")
        assert ended(pidfd)
        os.close(pidfd)
        assert export.process.wait(DEADLINE_S) != 0
        assert not export.path.exists()


def test_the_disk_is_taken_away(host: RunningHost) -> None:
    host.ask("vbd", "attach", "guest", "1M", "--driver", "memory", "--dev", "xvdb")
    with exported(host, disk="xvdb") as export:
        host.ask("vbd", "detach", "guest", "xvdb")
        assert export.process.wait(DEADLINE_S) == 2


# -- mistakes


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "--socket PATH or --tcp PORT"),
        (["--socket", "x", "--tcp", "0"], "--socket PATH or --tcp PORT"),
        (["--socket", "/nowhere/x", "--domain", "guest"], "no socket can be made at /nowhere/x"),
        (["--socket", "a" * 200, "--domain", "guest"], "no socket can be made"),
        (["--tcp", "0", "--domain", "nobody"], "no domain nobody"),
        (["--tcp", "0", "--domain", "guest"], "has no disk xvda"),
        (["--tcp", "0"], "this process is not in a domain"),
        (["--tcp", "70000"], "--tcp"),
    ],
)
def test_mistakes(host: RunningHost, options: list[str], text: str) -> None:
    done = host.attempt("vbd", "export", "xvda", *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_place_that_is_taken(host: RunningHost, image: Path) -> None:
    with exported(host) as export:
        done = host.attempt("vbd", "export", "xvda", "--domain", "guest", "--socket", str(export.path))
        assert f"{export.path} exists already" in done.stderr
        done = host.attempt("vbd", "export", "xvda", "--domain", "guest", "--tcp", "0")
        assert "is open already" in done.stderr
        assert client("nbdinfo", "--size", export.uri).strip() == str(SIZE)


def test_without_nbdkit(host: RunningHost, image: Path) -> None:
    program = (
        "import paravirt.frontend.nbdkit as nbdkit\n"
        "nbdkit.shutil.which = lambda *_, **__: None\n"
        "from paravirt.cli.main import main\n"
        "import sys; sys.argv = ['paravirt', 'vbd', 'export', 'xvda', '--tcp', '0']\nmain()"
    )
    done = host.attempt("run", "guest", "--", sys.executable, "-c", program)
    assert "nbdkit is not installed, which serves NBD (package nbdkit)" in done.stderr


# -- in one process


def test_flushes_fua_trims_and_zeroes_reach_the_backend() -> None:
    """Each as often as a client asks, in an embedded host."""
    need("qemu-io")
    with tempfile.TemporaryDirectory(prefix="pv") as directory, paravirt.Host() as host:
        image = Path(directory) / "image"
        image.write_bytes(b"\xff" * MIB)
        domain = host.create_domain("guest")
        path = host.attach_disk(domain, image)
        place = Path(directory) / "socket"
        with host.export_disk(domain, place) as served:
            uri = f"nbd+unix:///?socket={place}"

            def asked(*commands: str) -> tuple[int, int, int]:
                before = host.backend_statistics()[path]
                qemu_io(uri, *commands)
                after = host.backend_statistics()[path]
                return after.flushes - before.flushes, after.writes - before.writes, after.discards - before.discards

            quiet, _, _ = asked("read 0 4k")  # what qemu-io does by itself at its end
            assert asked("read 0 4k", "flush")[0] == quiet + 1
            flushes, writes, _ = asked("write -f 0 4k", "write -f 4k 4k")
            assert (flushes >= quiet + 2, writes) == (True, 2)
            assert asked("discard 8k 4k")[2] == 1
            _, writes, discards = asked("write -z 16k 64k")
            assert (writes > 0, discards) == (True, 0)
            assert served.statistics().errors == 0
        data = image.read_bytes()
        assert data[16384 : 16384 + 65536] == bytes(65536)
        assert data[16384 + 65536 :] == b"\xff" * (MIB - 16384 - 65536)


def test_an_embedded_export_again_and_again_leaks_nothing() -> None:
    need("nbdinfo")
    with tempfile.TemporaryDirectory(prefix="pv") as directory, paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1M", driver="memory")
        place = Path(directory) / "socket"
        held = []
        for _ in range(6):
            with host.export_disk(domain, place):
                assert client("nbdinfo", "--size", f"nbd+unix:///?socket={place}").strip() == str(MIB)
            held.append(len(os.listdir("/proc/self/fd")))
        # What the last device's threads hold goes a moment later.
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= held[1], f"descriptors stay open: {held}")
