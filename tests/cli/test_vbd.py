# SPDX-License-Identifier: MIT
"""`paravirt vbd` as a user types it: every mistake is one clear line and exit code 2."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.testing.temporary import TemporaryHost

DEADLINE_S = 30


@pytest.fixture(scope="module")
def host() -> Iterator[TemporaryHost]:
    with TemporaryHost() as running:
        yield running


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def guest(host: TemporaryHost) -> Iterator[str]:
    name = "guest"
    assert paravirt(host, "domain", "create", name).returncode == 0
    yield name
    assert paravirt(host, "domain", "destroy", name).returncode == 0


def paravirt(host: TemporaryHost, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "paravirt", "--run", str(host.rundir.path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def complaint(host: TemporaryHost, *arguments: str) -> str:
    """The one line a bad command says."""
    done = paravirt(host, *arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("paravirt: ")
    return lines[0]


def test_attach_list_detach(host: TemporaryHost, guest: str, image: Path) -> None:
    done = paravirt(host, "vbd", "attach", guest, str(image))
    assert (done.returncode, done.stderr) == (0, "")
    assert paravirt(host, "vbd", "attach", guest, "8M", "--driver", "memory", "--dev", "xvdb").returncode == 0
    listed = json.loads(paravirt(host, "vbd", "list", "--json").stdout)
    assert [(vbd["device"], vbd["driver"], vbd["spec"], vbd["mode"], vbd["size_bytes"]) for vbd in listed] == [
        ("xvda", "file", str(image), "w", 1 << 20),
        ("xvdb", "memory", "8M", "w", 8 << 20),
    ]
    table = paravirt(host, "vbd", "list", guest).stdout
    assert "xvda" in table
    assert str(image) in table
    for device in ("xvda", "xvdb"):
        assert paravirt(host, "vbd", "detach", guest, device).returncode == 0
    assert json.loads(paravirt(host, "vbd", "list", "--json").stdout) == []


def test_a_guest_started_by_hand_reads_its_disk(host: TemporaryHost, guest: str, image: Path) -> None:
    image.write_bytes(b"found me".ljust(512, b"\0") + bytes((1 << 20) - 512))
    assert paravirt(host, "vbd", "attach", guest, str(image), "--mode", "r").returncode == 0
    program = (
        "import paravirt\n"
        "with paravirt.Domain.from_environment() as domain, domain.open_disk() as disk:\n"
        "    print(domain.name, domain.disks(), disk.read_only, disk.pread(512, 0)[:8].decode())"
    )
    for _ in range(2):  # the domain and its disk outlive a command
        done = paravirt(host, "run", guest, "--", "python3", "-c", program)
        assert done.stdout == "guest ['xvda'] True found me\n", done
        assert done.returncode == 0


def test_missing_image(host: TemporaryHost, guest: str, tmp_path: Path) -> None:
    assert "none.img does not exist" in complaint(host, "vbd", "attach", guest, str(tmp_path / "none.img"))


def test_directory_instead_of_image(host: TemporaryHost, guest: str, tmp_path: Path) -> None:
    assert "is a directory" in complaint(host, "vbd", "attach", guest, str(tmp_path))


def test_size_not_in_sectors(host: TemporaryHost, guest: str, tmp_path: Path) -> None:
    (tmp_path / "odd.img").write_bytes(bytes(700))
    assert "not a positive multiple of 512" in complaint(host, "vbd", "attach", guest, str(tmp_path / "odd.img"))


def test_image_in_use(host: TemporaryHost, guest: str, image: Path) -> None:
    assert paravirt(host, "vbd", "attach", guest, str(image)).returncode == 0
    assert "already in use" in complaint(host, "vbd", "attach", guest, str(image), "--dev", "xvdb")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_no_rights(host: TemporaryHost, guest: str, image: Path) -> None:
    image.chmod(0)
    assert "no rights" in complaint(host, "vbd", "attach", guest, str(image))


def test_name_in_use(host: TemporaryHost, guest: str, image: Path) -> None:
    assert paravirt(host, "vbd", "attach", guest, str(image)).returncode == 0
    assert "has a disk xvda already" in complaint(host, "vbd", "attach", guest, "1M", "--driver", "memory")
    assert "guest" in complaint(host, "domain", "create", guest)


def test_unknown_domain_and_device(host: TemporaryHost, guest: str, image: Path) -> None:
    assert "no domain nobody" in complaint(host, "vbd", "attach", "nobody", str(image))
    assert "no domain 77" in complaint(host, "vbd", "detach", "77", "xvda")
    assert "no domain nobody" in complaint(host, "vbd", "list", "nobody")
    assert "no disk xvdc" in complaint(host, "vbd", "detach", guest, "xvdc")
    assert "device name 'sda'" in complaint(host, "vbd", "attach", guest, str(image), "--dev", "sda")


def test_bad_drivers_sizes_and_modes(host: TemporaryHost, guest: str) -> None:
    assert "unknown disk driver 'tape'" in complaint(host, "vbd", "attach", guest, "x", "--driver", "tape")
    assert "multiple of 512" in complaint(host, "vbd", "attach", guest, "12", "--driver", "memory")
    assert "memory" in complaint(host, "vbd", "attach", guest, "900000000T", "--driver", "memory")
    assert "--mode" in complaint(host, "vbd", "attach", guest, "1M", "--mode", "x")


def test_nothing_is_left_of_what_was_refused(host: TemporaryHost, guest: str, tmp_path: Path) -> None:
    complaint(host, "vbd", "attach", guest, str(tmp_path))
    assert json.loads(paravirt(host, "vbd", "list", "--json").stdout) == []
    assert paravirt(host, "xenstore", "ls", "/local/domain/0/backend/vbd").stdout == ""


def test_host_not_running(short_path: Path) -> None:
    for command in (["vbd", "list"], ["domain", "list"], ["xenstore", "ls"], ["run", "x", "--", "true"]):
        done = subprocess.run(
            [sys.executable, "-m", "paravirt", "--run", str(short_path / "nowhere"), *command],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 2
        assert "is not running" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_out_of_memory_budget(tmp_path: Path) -> None:
    """A guest gets one line, and with less it goes on."""
    program = (
        "import sys, paravirt\n"
        "try:\n"
        "    with paravirt.Domain.from_environment() as domain:\n"
        "        with domain.open_disk(ring_page_order=int(sys.argv[1])) as disk:\n"
        "            print(disk.size_bytes)\n"
        "except paravirt.errors.ResourceLimit as error:\n"
        "    print(error)"
    )
    with TemporaryHost(memory_mib=3) as host:
        assert paravirt(host, "domain", "create", "poor").returncode == 0
        assert paravirt(host, "vbd", "attach", "poor", "1M", "--driver", "memory").returncode == 0
        done = paravirt(host, "run", "poor", "--", "python3", "-c", program, "2")
        assert "budget" in done.stdout, done
        assert len(done.stdout.splitlines()) == 1
        done = paravirt(host, "run", "poor", "--", "python3", "-c", program, "0")
        assert done.stdout == "1048576\n", done


def test_a_disk_that_grows(host: TemporaryHost, guest: str, image: Path) -> None:
    assert paravirt(host, "vbd", "attach", guest, str(image), "--cdrom", "--removable", "--no-discard").returncode == 0
    os.truncate(image, 2 << 20)
    done = paravirt(host, "vbd", "resize", guest, "xvda")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "no disk xvdb" in complaint(host, "vbd", "resize", guest, "xvdb")
    assert paravirt(host, "vbd", "detach", guest, "xvda").returncode == 0


def test_limits(host: TemporaryHost, guest: str) -> None:
    done = paravirt(host, "vbd", "attach", guest, "8M", "--driver", "memory", "--iops", "100")
    assert done.returncode == 0, done
    shown = "100 IOPS"
    for options, now in (
        ((), shown),
        (("--iops", "50", "--iops-burst", "70", "--bytes", "1M"), "50 IOPS (burst 70), 1048576 B/s"),
        (("--bytes", "4k", "--bytes-burst", "8k"), "4096 B/s (burst 8192)"),
        ((), "4096 B/s (burst 8192)"),
        (("--none",), "no limits"),
    ):
        done = paravirt(host, "vbd", "limit", guest, "xvda", *options)
        assert done.returncode == 0, done
        assert done.stdout.rstrip().endswith(f": {now}")
    (told,) = json.loads(paravirt(host, "vbd", "list", guest, "--json").stdout)
    assert told["qos"] == ""
    assert "no disk xvdb" in complaint(host, "vbd", "limit", guest, "xvdb")
    assert "no disk xvdb" in complaint(host, "vbd", "limit", guest, "xvdb", "--iops", "5")
    assert "needs paravirt-qos-iops" in complaint(host, "vbd", "limit", guest, "xvda", "--iops-burst", "5")
    assert "--bytes 'much'" in complaint(host, "vbd", "limit", guest, "xvda", "--bytes", "much")
    assert "--none" in complaint(host, "vbd", "limit", guest, "xvda", "--none", "--iops", "5")


@pytest.mark.parametrize(("options", "trusted"), [((), "1"), (("--untrusted-backend",), "0")])
def test_the_frontend_is_told_whether_its_backend_is_trusted(
    host: TemporaryHost, guest: str, options: tuple[str, ...], trusted: str
) -> None:
    assert paravirt(host, "vbd", "attach", guest, "8M", "--driver", "memory", *options).returncode == 0
    domid = json.loads(paravirt(host, "vbd", "list", guest, "--json").stdout)[0]["domid"]
    read = paravirt(host, "xenstore", "read", f"/local/domain/{domid}/device/vbd/51712/trusted")
    assert read.stdout.strip() == trusted
