# SPDX-License-Identifier: MIT
"""`paravirt vbd mount`: a domain's disk as a file, by nbdfuse on top of an export."""

import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, pass_context
from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, ParavirtError, PeerGone

if TYPE_CHECKING:
    from paravirt.host.daemon import StopRequest

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
LOOK_S = 0.02

Process = subprocess.Popen[Any]


@click.command()
@click.argument("disk")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--domain", metavar="DOMAIN", help="For Dom0: whose disk it is (a name or number).")
@click.option("--read-only", is_flag=True, help="Let nobody write.")
@click.option("--connections", type=click.IntRange(1, 64), default=4, show_default=True, help="From nbdfuse to nbdkit.")
@pass_context
def mount(context: Context, disk: str, file: Path, domain: str | None, read_only: bool, connections: int) -> None:
    """Make DISK (xvda, xvdb ...) the FILE, by nbdfuse on top of `vbd export`, until it is stopped.

    FILE is made, or is an empty one; it goes, or is empty again, when this command is stopped by Ctrl-C or SIGTERM.
    What programs have written is the disk's by then.
    """
    from paravirt.host.daemon import StopRequest

    nbdfuse, unmount = _find("nbdfuse", "nbdfuse"), _find("fusermount3", "fuse3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise NotFound("/dev/fuse cannot be opened here: a file system in userspace needs it")
    request = StopRequest()
    with ExitStack() as stack:
        _take_place(file, stack)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paravirt-")))
        socket = directory / "nbd"
        flags = [*(["--domain", domain] if domain else []), *(["--read-only"] if read_only else [])]
        served = _start(
            _export_command(context, [disk, "--socket", str(socket), *flags]), stack, stdout=subprocess.PIPE
        )
        _await_export(served)
        command = [nbdfuse, "--connections", str(connections), "--pidfile", str(directory / "ready")]
        command += [*(["--readonly"] if read_only else []), str(file), "--unix", str(socket)]
        fuse = _start(command, stack, before_stop=partial(_unmount, unmount, file))
        _await_file(fuse, directory / "ready")
        click.echo(f"{disk} is {file}")
        sys.stdout.flush()
        for process in (served, fuse):
            threading.Thread(target=_watch, args=(process, request), daemon=True).start()
        request.wait()
        if served.poll() is not None:
            raise PeerGone(f"the export of {disk} has ended (status {served.returncode})")


def _find(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise NotFound(f"{program} is not installed (package {package})")
    return found


def _take_place(file: Path, stack: ExitStack) -> None:
    """An empty file to mount over."""
    try:
        if file.exists():
            if not file.is_file() or file.stat().st_size:
                raise AlreadyExists(f"{file} exists and is no empty file")
            return
        file.touch(0o600, exist_ok=False)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be made: {error.strerror}") from error

    def remove() -> None:
        with suppress(OSError):
            file.unlink()

    stack.callback(remove)


def _export_command(context: Context, arguments: list[str]) -> list[str]:
    options = ["--host", context.host, *(["--run", context.run] if context.run else [])]
    options += ["--log-level", context.log_level, *(["--log-file", context.log_file] if context.log_file else [])]
    return [sys.executable, "-P", "-m", "paravirt", *options, "vbd", "export", *arguments]


def _start(command: list[str], stack: ExitStack, *, before_stop: Any = None, **streams: Any) -> Process:
    """A child that is ended with this command, however that ends; a Ctrl-C is not for it."""
    inherited = os.environ.get("PARAVIRT_FD", "")
    setpriv = shutil.which("setpriv")
    process = subprocess.Popen(
        [*([setpriv, "--pdeathsig", "TERM"] if setpriv else []), *command],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=[int(inherited)] if inherited.isdigit() else [],
        **streams,
    )
    stack.callback(_stop, process)
    if before_stop is not None:
        stack.callback(before_stop, process)
    return process


def _stop(process: Process) -> None:
    """In good order, else by force."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _unmount(program: str, file: Path, fuse: Process) -> None:
    """What programs have open they lose: better than a command that cannot be stopped."""
    if fuse.poll() is None:
        done = subprocess.run([program, "-u", str(file)], capture_output=True, text=True, check=False)
        if done.returncode and fuse.poll() is None:
            click.echo(f"paravirt: {file} is in use: {done.stderr.strip()}; it is taken away all the same", err=True)
            subprocess.run([program, "-u", "-z", str(file)], capture_output=True, check=False)
    elif os.path.ismount(file):
        subprocess.run([program, "-u", "-z", str(file)], capture_output=True, check=False)
    if fuse.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            fuse.wait(STOP_TIMEOUT_S)


def _await_export(served: Process) -> None:
    """Until it says that it serves; what is wrong otherwise it has said itself."""
    assert served.stdout is not None
    ready, _, _ = select.select([served.stdout], [], [], START_TIMEOUT_S)
    if ready and served.stdout.readline():
        return
    with suppress(subprocess.TimeoutExpired):
        served.wait(1)
    raise ParavirtError(f"there is no export to mount (status {served.poll()})")


def _await_file(fuse: Process, ready: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready.exists():
        if fuse.poll() is not None or time.monotonic() > deadline:
            raise ParavirtError(f"nbdfuse made no file (status {fuse.poll()})")
        time.sleep(LOOK_S)


def _watch(process: Process, request: "StopRequest") -> None:
    process.wait()
    request.stop()
