# SPDX-License-Identifier: MIT
"""nbdkit as a child process, with this project's plugin: found, started, told, ended."""

import fcntl
import os
import queue
import select
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from paravirt.errors import NotFound, ParavirtError, PeerError, PeerGone, TimedOut
from paravirt.ring import blkdisk
from paravirt.ring.blkdisk import Answer, Kind

DEFAULT_THREADS = 16
ANSWER_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0

_FIRST_FREE_FD = 16  # above those that the child gets
_LISTEN_FD, _CONTROL_FD, _BROKER_FD = 3, 4, 5  # the first one as systemd's socket activation has it
_WITH_OWN_PID = 'LISTEN_PID=$$; export LISTEN_PID; exec "$@"'
_UNBLOCK: tuple[int, ...] = ()


def find_nbdkit() -> str:
    """Its path. Raises `NotFound`, which says what to install."""
    found = shutil.which("nbdkit", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    if found is None:
        raise NotFound("nbdkit is not installed, which serves NBD (package nbdkit)")
    return found


def find_plugin() -> Path:
    """The plugin, which is built with the package. Raises `NotFound`, which says what to install."""
    for path in sorted(Path(__file__).parent.glob("_nbdkit*.so")):
        return path
    raise NotFound("this installation has no plugin for nbdkit: install nbdkit-plugin-dev, then install paravirt again")


class Nbdkit:
    """A running nbdkit that has a block device of its own and serves it on a listening socket."""

    def __init__(
        self,
        listener: socket.socket,
        broker_fd: int,
        *,
        threads: int = DEFAULT_THREADS,
        read_only: bool = False,
        on_complaint: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        """Start it. `broker_fd`: connected to the hypervisor and labelled with the domain; both stay the caller's.

        `threads`: requests that one client can have in flight. `on_complaint` is told how the backend has broken the
        protocol, `on_end` that nbdkit has ended; both from a thread of this object.
        """
        program, plugin = find_nbdkit(), find_plugin()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [
            *(program, "--foreground", "--threads", str(threads), *(["--readonly"] if read_only else [])),
            # NBD's clients may ask for any bytes; disks have sectors.
            *("--filter=blocksize", str(plugin), f"broker={_BROKER_FD}", f"control={_CONTROL_FD}"),
        ]
        given = {_LISTEN_FD: listener.fileno(), _CONTROL_FD: theirs.fileno(), _BROKER_FD: broker_fd}
        try:
            with theirs:
                self.pid = _start(arguments, given)
        except BaseException:
            ours.close()
            raise
        self._pidfd = os.pidfd_open(self.pid)
        self._control = ours
        self._on_complaint, self._on_end = on_complaint, on_end
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._reaping = threading.Lock()
        self._status: int | None = None
        self._reader = threading.Thread(target=self._read, name="nbdkit", daemon=True)
        self._reader.start()

    # -- what the device does

    def ask(self, message: bytes) -> Answer:
        """Say something and wait for the answer, whatever its status is. Raises `PeerGone`, `TimedOut`."""
        with self._asking:
            try:
                self._control.sendall(message)
                answer = self._answers.get(timeout=ANSWER_TIMEOUT_S)
            except OSError:
                answer = None
            except queue.Empty:
                self.kill()  # an answer that comes later must not be taken for another one's
                raise TimedOut(f"nbdkit does not answer within {ANSWER_TIMEOUT_S:g} s") from None
        if answer is None:
            raise PeerGone("nbdkit has ended")
        return answer

    def do(self, message: bytes, what: str) -> Answer:
        """The same; raises `ParavirtError` with `what` failed when the status is not 0."""
        answer = self.ask(message)
        if answer.status:
            raise ParavirtError(f"{what}: {os.strerror(-answer.status)}")
        return answer

    def _read(self) -> None:
        """In a thread of its own: sort what comes."""
        while True:
            try:
                data = self._control.recv(blkdisk.MESSAGE_BYTES)
                answer = blkdisk.parse(data) if data else None
            except (OSError, PeerError):
                answer = None
            if answer is None:
                break
            if answer.kind == Kind.COMPLAIN:
                self._on_complaint(answer.text)
            else:
                self._answers.put(answer)
        self.terminate()  # it may have closed its end only
        self._answers.put(None)
        self._on_end()

    # -- its end

    def poll(self) -> int | None:
        """Its exit status as `os.waitstatus_to_exitcode` has it; None while it runs."""
        return self.wait(0)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The same, after waiting for its end."""
        if self._status is not None:
            return self._status
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000)))
        with self._reaping:
            if self._status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def terminate(self) -> None:
        """Ask it to end: it answers what it has been asked."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self, *, failing: bytes) -> None:
        """End it in good order: what is under way is answered, by `failing` if the backend does not."""
        self.terminate()
        if self.wait(STOP_TIMEOUT_S) is None:
            with suppress(ParavirtError):
                self.ask(failing)
            if self.wait(STOP_TIMEOUT_S) is None:
                self.kill()
                self.wait()
        self._reader.join()
        self._control.close()
        os.close(self._pidfd)


def _start(arguments: Iterable[str], given: dict[int, int]) -> int:
    """Start a program with these descriptors at these numbers, the first of which is a socket to listen on; its pid."""
    # Out of the way first: a source must not be overwritten before it is copied.
    moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD) for number, fd in given.items()}
    try:
        return os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", _WITH_OWN_PID, "sh", *arguments],
            {**os.environ, "LISTEN_FDS": "1"},
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in moved.items()],
            setpgroup=0,  # a Ctrl-C is for us, who end it in good order
            setsigmask=_UNBLOCK,
            setsigdef=(signal.SIGPIPE,),
        )
    finally:
        for fd in moved.values():
            os.close(fd)
