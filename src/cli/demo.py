# SPDX-License-Identifier: MIT
"""`paravirt demo`: the main job end to end, told in plain words, with every claim checked."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from paravirt.cli.context import emit_json, json_option
from paravirt.errors import ParavirtError
from paravirt.host import vbd
from paravirt.host.launch import DomainProcess
from paravirt.testing.image import VOLUME_NAME, Image, make_image
from paravirt.testing.report import Measured, cpu_seconds, disk_row, print_table, ring_rows
from paravirt.testing.ring_bench import measure_rings
from paravirt.testing.temporary import DAEMONS, TemporaryHost

BATCHES = (1, 8, 32)
DEPTHS = (1, 8, 32)
BLOCKS = 64


class Checks:
    """What was claimed and whether it held."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.held: list[str] = []
        self.failed: list[str] = []

    def expect(self, held: bool, claim: str, otherwise: str = "") -> None:
        """Print one checked claim."""
        if held:
            self.held.append(claim)
            self._console.print(f"   [green]ok[/]  {claim}")
        else:
            self.failed.append(claim)
            self._console.print(f"   [red]NOT TRUE[/]  {claim}{': ' + otherwise if otherwise else ''}")


class Demo:
    """The steps, in order, over one temporary host."""

    def __init__(self, console: Console, seconds: float) -> None:
        self._console = console
        self._seconds = seconds
        self.checks = Checks(console)
        self.measured: list[Measured] = []
        self._number = 0
        self._digest = ""  # of the image as it was made

    def run(self) -> int:
        """All of it; the exit code."""
        before = _shared_memory()
        self._say("Starting hypervisor, xenstored and block backend, each a process of its own")
        with TemporaryHost() as host:
            directory, pids = host.directory, {name: host.pid(name) for name in DAEMONS}
            self._console.print("   " + ", ".join(f"{name} {pid}" for name, pid in pids.items()))
            self._with_host(host)
            self._say("Stopping everything")
        self.checks.expect(not directory.exists(), "no file is left")
        self.checks.expect(not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "no process is left")
        self.checks.expect(_shared_memory() <= before, "nothing of ours is in /dev/shm")
        self._rings()
        self._console.print()
        print_table(self._console, self.measured)
        if self.checks.failed:
            self._console.print(f"\n[red]{len(self.checks.failed)} checks did not hold.[/]")
            return 1
        self._console.print("\nEvery check held.")
        return 0

    def _with_host(self, host: TemporaryHost) -> None:
        self._say("Making a disk image with real files")
        image = make_image(host.directory)
        self._digest = _sha256(image.path)
        what = f'an ext4 named "{VOLUME_NAME}"' if image.fs_bytes else "raw data (there is no mkfs.ext4 here)"
        self._console.print(f"   {image.size_bytes >> 20} MiB, {what}, {image.files} files")
        self._say("Creating a domain and giving it the image as its disk xvda")
        domain = host.create_domain("guest")
        vbd.attach(host.store, domain.domid, str(image.path))
        self._say("Starting the guest: it finds its disk in xenstore and connects through the xenbus handshake")
        arguments = ["--verify", "--write", str(BLOCKS), "--seconds", str(self._seconds)]
        depths = [argument for depth in DEPTHS for argument in ("--depth", str(depth))]
        command = [sys.executable, "-m", "paravirt.testing.guest", *arguments, *depths]
        with host.run(domain, command, stdout=subprocess.PIPE) as guest:
            self._follow(guest, image, host.pid("backend"))
            self.checks.expect(guest.wait(30) == 0, "the guest ended well")
        if image.fs_bytes:
            problem = image.check()
            self.checks.expect(problem is None, "the file system is clean", problem or "")
        self.checks.expect(
            [info.domid for info in host.hypervisor.list_domains()] == [0], "the domain ended with its guest"
        )

    def _follow(self, guest: DomainProcess, image: Image, backend: int) -> None:
        """Listen to the guest and check what it says against the file."""
        cpu = 0.0
        for what, value in self._lines(guest):
            match what:
                case "connected":
                    domid, name, size, uid, pid = value
                    self._console.print(f"   domain {domid}: process {pid}, uid {uid}, sees {name} of {size >> 20} MiB")
                    self.checks.expect(size == image.size_bytes, "the disk has the size of the image")
                    self._say("The guest reads the whole disk through the ring")
                case "read":
                    self.checks.expect(value == self._digest, f"same SHA-256 as the file: {value[:16]}...")
                case "superblock":
                    self._superblock(value, image)
                    self._say(f"The guest writes {BLOCKS} random blocks behind the file system, and flushes")
                case "wrote":
                    self.checks.expect(_same_blocks(image.path, value), f"all {len(value)} read back from the file")
                    self._say("The guest measures its disk: random 4 KiB reads")
                case "begin":
                    cpu = cpu_seconds(backend)
                case "result":
                    self.measured.append(disk_row(value, cpu_seconds(backend) - cpu))

    def _superblock(self, found: dict[str, Any] | None, image: Image) -> None:
        if not image.fs_bytes:
            self.checks.expect(found is None, "no file system, as was made")
            return
        name, size = (found["volume_name"], found["size_bytes"]) if found else (None, None)
        self.checks.expect(name == VOLUME_NAME, f'the superblock says: volume "{name}"')
        self.checks.expect(size == image.fs_bytes, f"and {size} bytes ({found['blocks'] if found else 0} blocks)")

    def _rings(self) -> None:
        self._say("Measuring a bare ring: requests and answers of blkif's size between two processes")
        with self._bar() as bar:
            task = bar.add_task("", total=1.0)

            def progress(label: str, share: float) -> None:
                bar.update(task, description=label, completed=share)

            results = measure_rings(BATCHES, self._seconds, progress=progress)
        self.measured = [*ring_rows(results), *self.measured]

    def _lines(self, guest: DomainProcess) -> Iterator[tuple[str, Any]]:
        assert guest.stdout is not None
        with self._bar() as bar:
            task = bar.add_task("", total=1.0)
            for line in guest.stdout:
                for what, value in json.loads(line).items():
                    if what == "progress":
                        bar.update(task, description=value[0], completed=value[1], visible=True)
                    else:
                        bar.update(task, visible=False)
                        yield what, value

    def _bar(self) -> Progress:
        columns = (TextColumn("  "), BarColumn(30), TextColumn("{task.percentage:>3.0f} % {task.description}"))
        return Progress(*columns, console=self._console, transient=True)

    def _say(self, text: str) -> None:
        self._number += 1
        self._console.print(f"[bold]{self._number}. {text}[/]")


def _shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("paravirt")}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same_blocks(path: Path, wrote: list[list[Any]]) -> bool:
    with open(path, "rb") as file:
        return all(_block(file, offset) == digest for offset, digest in wrote)


def _block(file: Any, offset: int) -> str:
    return hashlib.sha256(os.pread(file.fileno(), 4096, offset)).hexdigest()


@click.command()
@click.option(
    "--seconds",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="For each measurement.",
)
@json_option
def demo(seconds: float, as_json: bool) -> int:
    """Start a whole host and let a guest read and write a real disk.

    Takes about a minute, checks everything it claims, leaves nothing behind. Exit status 0 only if every check held.
    With --json the story goes to standard error.
    """
    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    with ExitStack() as stack:
        stack.callback(console.show_cursor)
        # Looked up once, before anything can interrupt: the look-up makes and removes a file.
        tempfile.gettempdir()
        story = Demo(console, seconds)
        try:
            status = story.run()
        except (ParavirtError, OSError) as error:
            console.print(f"[red]It failed:[/] {error}")
            status = 1
        if as_json:
            checks = {"held": story.checks.held, "failed": story.checks.failed}
            emit_json({"checks": checks, "measured": [asdict(row) for row in story.measured]})
        return status
