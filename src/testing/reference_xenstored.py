# SPDX-License-Identifier: MIT
"""Debian's own xenstore daemons, C and OCaml, without a hypervisor: to compare with side by side.

`python -m paravirt.testing.reference_xenstored` gets what is needed (the package is unpacked, not installed);
`ReferenceDaemon` runs one of them, and makes guests for it that speak through a ring page.
"""

import hashlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from paravirt.errors import AlreadyExists, Closed, InvalidRequest, NotFound, StoreGone, TimedOut, XenstoreError
from paravirt.testing.debian import run, unpack
from paravirt.xenstore.wire import Op, Packet, PacketParser, encode

PACKAGE: Final = "xen-utils-4.17"
CACHE_VARIABLE: Final = "PARAVIRT_REFERENCE_CACHE"
START_TIMEOUT_S: Final = 10.0
REPLY_TIMEOUT_S: Final = 30.0
PAGE_BYTES: Final = 4096
_SHIM_SOURCE: Final = Path(__file__).with_name("reference_shim.c")
_PROGRAMS: Final = "usr/lib/xen-4.17/bin"
_MODULE: Final = "paravirt.testing.reference_xenstored"
_DEATH_EVENT: Final = struct.pack("=I", 1)  # the shim's port of VIRQ_DOM_EXC
_FIRST_PORT: Final = 1000

Kind = Literal["c", "ox"]
_PROGRAM: Final[dict[Kind, str]] = {"c": "xenstored", "ox": "oxenstored"}


def default_cache() -> Path:
    """Where the package is unpacked and the shim compiled: named by PARAVIRT_REFERENCE_CACHE, or in this Python's
    environment."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path(sys.prefix) / "reference")


def fetch(cache: Path | None = None) -> None:
    """Get the daemons and compile the shim into `cache`. `NotFound` if this machine has no such package or no gcc."""
    cache = cache or default_cache()
    try:
        find_program("c", cache)
    except NotFound:
        unpack(PACKAGE, cache)
    find_shim(cache)


def find_program(kind: Kind, cache: Path) -> Path:
    """The daemon's program, unpacked or installed."""
    for root in (cache, Path("/")):
        program = root / _PROGRAMS / _PROGRAM[kind]
        if program.exists():
            return program
    raise NotFound(f"Debian's {_PROGRAM[kind]} is not in {cache}; get it with: python -m {_MODULE}")


def find_shim(cache: Path) -> Path:
    """The compiled shim; compiles it if it is not there."""
    source = _SHIM_SOURCE.read_bytes()
    path = cache / f"shim-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / path.name
            flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
            command = ["gcc", *flags, str(_SHIM_SOURCE), "-o", str(made)]
            run(command, scratch, hint=" (are libxen-dev and libc6-dev installed?)")
            made.rename(path)
    return path


class ReferenceDaemon:
    """A daemon that runs as long as this object: "c" is the C xenstored 4.17, "ox" oxenstored 4.17.

    `socket_path` is where Dom0's clients connect, `pid` the daemon's process. `folder` is made if it is not there; all
    that the daemon writes is in it, and stays. As root or not; no namespace is needed. If this process dies, so does
    the daemon.
    """

    def __init__(
        self,
        kind: Kind,
        folder: str | os.PathLike[str],
        *,
        arguments: Sequence[str] = (),
        cache: Path | None = None,
    ) -> None:
        """`arguments`: more of them for the daemon, as its --help says. `cache`: where `fetch` put things.

        `NotFound` says what is missing, `StoreGone` why the daemon does not start. `InvalidRequest` if the folder's
        path is too long for a Unix socket.
        """
        cache = cache or default_cache()
        self.kind = kind
        self.folder = Path(folder).absolute()
        self.socket_path = self.folder / "socket"
        self.log_path = self.folder / "output"
        if len(os.fsencode(self.folder)) > 90:
            raise InvalidRequest(f"{self.folder}: too long for the sockets in it")
        program, shim = find_program(kind, cache), find_shim(cache)
        with ExitStack() as stack:
            self._process = self._start([str(program), *self._prepare(), *arguments], shim)
            stack.callback(self._stop)
            self._wait_until_it_serves()
            self._events = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            self._stack = stack.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_died(self, timeout_s: float) -> bool:
        """Whether the daemon has ended by itself, or does so soon."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _prepare(self) -> list[str]:
        """Make what the daemon finds on a host; returns its arguments."""
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        for left in ("socket", "events", "tdb", "ox.pid"):
            (self.folder / left).unlink(missing_ok=True)
        for former in self.folder.glob("dom*"):
            former.unlink()
        (self.folder / "dom0.page").write_bytes(bytes(PAGE_BYTES))
        (self.folder / "port").write_text("5")
        if self.kind == "c":
            return ["--no-fork"]
        settings = {
            "pid-file": self.folder / "ox.pid",
            "xenstored-kva": self.folder / "dom0.page",
            "xenstored-port": self.folder / "port",
            "quota-activate": "true",
            "perms-activate": "true",
            "persistent": "false",
        }
        config = self.folder / "ox.conf"
        config.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        return ["--no-fork", "--config-file", str(config)]

    def _start(self, command: list[str], shim: Path) -> "subprocess.Popen[bytes]":
        environment = {
            **os.environ,
            "LD_PRELOAD": str(shim),
            "PARAVIRT_SHIM": str(self.folder),
            "XENSTORED_RUNDIR": str(self.folder),
            "XENSTORED_ROOTDIR": str(self.folder),
            "XENSTORED_PATH": str(self.socket_path),
        }
        with self.log_path.open("wb") as output:
            return subprocess.Popen(
                command, env=environment, cwd=self.folder, stdin=subprocess.PIPE, stdout=output, stderr=output
            )

    def _wait_until_it_serves(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.connect().close()
            except (FileNotFoundError, ConnectionRefusedError):
                pass
            else:
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = self.log_path.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
                raise StoreGone(f"{_PROGRAM[self.kind]} does not start: {' '.join(lines[-8:])}")
            time.sleep(0.01)

    def connect(self) -> socket.socket:
        """A new connection as Dom0."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(str(self.socket_path))
        except BaseException:
            client.close()
            raise
        return client

    def add_domain(self, domid: int, *, introduce: bool = True) -> "ReferenceGuest":
        """A guest that exists from now on and (unless not `introduce`) has its ring page served. It ends with the
        daemon."""
        guest = self._stack.enter_context(ReferenceGuest(self, domid))
        if introduce:
            self._ask(Op.INTRODUCE, b"%d\0001\0005\0" % domid)
        return guest

    def end_domain(self, domid: int, state: Literal["shutdown", "dying", "gone"] = "gone") -> None:
        """A guest shuts down, is dying, or is no longer there; the daemon is told that something happened."""
        path = self.folder / f"dom{domid}"
        if state == "gone":
            path.unlink()
        else:
            path.write_text(state)
        self._events.sendto(_DEATH_EVENT, str(self.folder / "events"))

    def send_event(self, domid: int) -> None:
        """An event from a guest's end of its channel."""
        self._events.sendto(struct.pack("=I", _FIRST_PORT + domid), str(self.folder / "events"))

    def _ask(self, op: Op, payload: bytes) -> None:
        with self.connect() as client:
            client.settimeout(REPLY_TIMEOUT_S)
            client.sendall(encode(op, 0, 0, payload))
            parser, packets = PacketParser(), list[Packet]()
            while not packets:
                packets = parser.feed(client.recv(PAGE_BYTES))
        if packets[0][0] == Op.ERROR:
            name = packets[0][3].rstrip(b"\0").decode()
            raise XenstoreError(f"{_PROGRAM[self.kind]} answers {op.name} with {name}", name)

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()

    def close(self) -> None:
        """End the daemon and its guests. Harmless when repeated."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ReferenceDaemon {_PROGRAM[self.kind]}, process {self.pid}: {self.socket_path}>"


class ReferenceGuest:
    """A guest's end of its xenstore ring page, as bytes. For one thread; made by `ReferenceDaemon.add_domain`.

    The indexes are written and read as whole words by one thread on each side. That a word is seen after the bytes it
    covers is left to x86, whose stores stay in order.
    """

    _REQ_CONS, _REQ_PROD, _RSP_CONS, _RSP_PROD = 512, 513, 514, 515  # words of the page
    _RING_BYTES = 1024

    def __init__(self, daemon: ReferenceDaemon, domid: int) -> None:
        if not 0 < domid < 0x7FF0:
            raise InvalidRequest(f"{domid} is no guest's domid")
        self.domid = domid
        self._daemon = daemon
        self.closed = False
        stem = daemon.folder / f"dom{domid}"
        if stem.exists():
            raise AlreadyExists(f"domain {domid} was made before")
        page, events = stem.with_suffix(".page"), stem.with_suffix(".events")
        page.write_bytes(bytes(PAGE_BYTES))
        with page.open("r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), PAGE_BYTES)
        self.page = memoryview(self._mapping)
        """The whole page, to do harm to."""
        self._words = self.page.cast("I")
        self._events = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        events.unlink(missing_ok=True)
        self._events.bind(str(events))
        stem.write_text("")

    def send(self, data: bytes, timeout_s: float = REPLY_TIMEOUT_S) -> None:
        """Put all of `data` into the request stream; waits for room, up to `timeout_s` each time."""
        self._check_open()
        while data:
            room = self._RING_BYTES - (self._words[self._REQ_PROD] - self._words[self._REQ_CONS]) % (1 << 32)
            n_bytes = min(room, len(data))
            if not n_bytes:
                self._wait(timeout_s)
                continue
            start = self._words[self._REQ_PROD]
            for i, byte in enumerate(data[:n_bytes], start):
                self.page[i % self._RING_BYTES] = byte
            self._words[self._REQ_PROD] = (start + n_bytes) % (1 << 32)
            self._daemon.send_event(self.domid)
            data = data[n_bytes:]

    def receive(self, timeout_s: float = REPLY_TIMEOUT_S) -> bytes:
        """What is in the response stream; waits until there is something. `TimedOut` after `timeout_s`."""
        self._check_open()
        while True:
            start = self._words[self._RSP_CONS]
            n_bytes = (self._words[self._RSP_PROD] - start) % (1 << 32)
            if n_bytes:
                break
            self._wait(timeout_s)
        data = bytes(self.page[self._RING_BYTES + i % self._RING_BYTES] for i in range(start, start + n_bytes))
        self._words[self._RSP_CONS] = (start + n_bytes) % (1 << 32)
        self._daemon.send_event(self.domid)
        return data

    def _wait(self, timeout_s: float) -> None:
        self._events.settimeout(timeout_s)
        try:
            self._events.recv(4)
        except TimeoutError:
            raise TimedOut(f"domain {self.domid} got no event in {timeout_s} s") from None

    def _check_open(self) -> None:
        if self.closed:
            raise Closed(f"domain {self.domid} is gone")

    def close(self) -> None:
        """Unmap the page. Harmless when repeated."""
        if not self.closed:
            self.closed = True
            self._events.close()
            self._words.release()
            self.page.release()
            self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def main() -> int:
    """Get what is needed; for scripts/setup."""
    try:
        fetch()
    except NotFound as error:
        print(f"note: no reference xenstore daemons to compare with: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
