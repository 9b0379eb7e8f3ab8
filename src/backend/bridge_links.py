# SPDX-License-Identifier: MIT
"""Ports of bridges that are files: one that writes what goes to it, one that replays what was captured."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from paravirt.backend.bridge import Bridge, BridgePort
from paravirt.errors import InvalidRequest, ParavirtError, PermissionRefused, ResourceLimit
from paravirt.protocol.bridge_link import LinkConfig
from paravirt.protocol.bridge_state import CaptureWish
from paravirt.protocol.pcap import NS_PER_S, Recorded, require
from paravirt.ring.netif import Burst

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 30
MOST_NAMES = 10_000
_FRAMES_TOGETHER = 64
_ROOM_TIMEOUT_S = 0.2
LONGEST_NS = 1 << 62
"""From the first frame to another one: files may say anything."""
LONGEST_WAIT_S = 3600.0


def add_link(bridge: Bridge, name: str, link: LinkConfig) -> BridgePort:
    """A port that is nothing or a file. Raises `InvalidRequest` for a file that cannot be replayed,
    `PermissionRefused`, `AlreadyExists`, `ResourceLimit`.
    """
    if link.kind == "null":
        return bridge.add_null(name)
    if link.kind == "pcap":
        return _add_writer(bridge, name, link)
    return add_replay(bridge, name, link, lambda replayed: None).port


# -- a file that is written


def _add_writer(bridge: Bridge, name: str, link: LinkConfig) -> BridgePort:
    port = bridge.add_null(name)
    port.kind = "pcap"
    try:
        _Writer(bridge, port, link)
    except BaseException:
        bridge.remove_port(port)
        raise
    return port


class _Writer:
    """What goes to a port, into a file, by a thread that ends with the port."""

    def __init__(self, bridge: Bridge, port: BridgePort, link: LinkConfig) -> None:
        self._path, self._fd = _new_file(Path(link.file))
        self._failed = ""
        self._bridge = bridge
        try:
            wish = CaptureWish(port.name, direction="out", snaplen=link.snaplen, format=link.format)
            self._capture = bridge.capture(wish)
        except BaseException:
            os.close(self._fd)
            raise
        self._thread = threading.Thread(target=self._write, name=f"capture-{port.name}", daemon=True)
        port.detail, port.close = self._detail, self._close
        self._thread.start()

    def _write(self) -> None:
        try:
            with open(self._fd, "wb", buffering=0) as file:
                for chunk in self._capture.chunks():
                    while chunk:
                        chunk = chunk[file.write(chunk) :]
        except OSError as error:
            self._failed = error.strerror or "failed"
            log.warning("%s is not written any more: %s", self._path, self._failed)
        finally:
            self._bridge.uncapture(self._capture)

    def _detail(self) -> str:
        report = self._capture.report()
        lost = f", {report.dropped} lost" if report.dropped else ""
        return f"{self._path}: {self._failed or f'{report.captured} frames{lost}'}"

    def _close(self) -> None:
        """The port is gone, so the capture has ended."""
        self._thread.join()


def _new_file(path: Path) -> tuple[Path, int]:
    """A file that was not there: that one, or with a number behind it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    for number in range(MOST_NAMES):
        one = path.with_name(f"{path.name}.{number}") if number else path
        try:
            return one, os.open(one, flags, 0o600)
        except FileExistsError:
            continue
        except OSError as error:
            raise PermissionRefused(f"{one} cannot be written: {error.strerror}") from error
    raise ResourceLimit(f"there are {MOST_NAMES} files {path} already")


# -- a file that is replayed


class Replay:
    """Frames of a file as they come from a port, by a thread of its own."""

    def __init__(self, bridge: Bridge, name: str, link: LinkConfig, on_end: Callable[["Replay"], None]) -> None:
        """`on_end`: called by the thread when all was sent. Raises as `add_link`."""
        self._link = link
        self._frames = load(Path(link.file))
        self._due_ns = due_times(self._frames, link)
        self._bursts = [
            Burst.of([frame.data for frame in self._frames[at : at + _FRAMES_TOGETHER]])
            for at in range(0, len(self._frames), _FRAMES_TOGETHER)
        ]
        self.n_frames = len(self._frames)
        self._frames = []
        self.sent = 0
        self.is_done = False
        self._on_end = on_end
        self._stopping = threading.Event()
        self.port, self._leg = bridge.add_user(name)
        self._thread = threading.Thread(target=self._run, name=f"replay-{name}", daemon=True)
        self.port.kind, self.port.detail, self.port.stop = "replay", self._detail, self.stop
        self._thread.start()

    def _run(self) -> None:
        done = 0
        try:
            while not self._stopping.is_set() and (not self._link.loops or done < self._link.loops):
                self._play()
                done += 1
                if not self.n_frames:
                    break
        except ParavirtError as error:
            log.warning("replay of %s: %s", self._link.file, error)
        self.is_done = not self._stopping.is_set()
        self._on_end(self)

    def _play(self) -> None:
        start, at = time.monotonic_ns(), 0
        while at < self.n_frames and not self._stopping.is_set():
            elapsed = time.monotonic_ns() - start
            due = int(np.searchsorted(self._due_ns, elapsed, "right"))
            if due <= at:
                self._stopping.wait(min((int(self._due_ns[at]) - elapsed) / 1e9, LONGEST_WAIT_S))
                continue
            at += self._give(at, due)

    def _give(self, at: int, due: int) -> int:
        """Some of the frames from number `at` up to before `due`; how many."""
        burst, first = self._bursts[at // _FRAMES_TOGETHER], at % _FRAMES_TOGETHER
        n = self._leg.give(burst, first, first + due - at)
        self.sent += n
        if not n:
            self._leg.wait_room(int(burst.frames[first]["length"]), timeout_s=_ROOM_TIMEOUT_S)
        return n

    def stop(self) -> None:
        """Nothing more is sent. Harmless when repeated."""
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _detail(self) -> str:
        return f"{self._link.file}: {self.sent} frames{' (all)' if self.is_done else ''}"


def add_replay(bridge: Bridge, name: str, link: LinkConfig, on_end: Callable[[Replay], None]) -> Replay:
    """A port that frames of a file come from. Raises as `add_link`."""
    return Replay(bridge, name, link, on_end)


def load(path: Path) -> list[Recorded]:
    """All frames of a capture file. Raises `InvalidRequest`, which names it."""
    try:
        with path.open("rb") as file:
            if not path.is_file():
                raise InvalidRequest(f"{path} is no file")
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise InvalidRequest(f"{path} has more than {MAX_FILE_BYTES >> 20} MiB")
            return require(file, str(path))
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from error


def due_times(frames: Sequence[Recorded], link: LinkConfig) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """When each is to be sent, in nanoseconds after the first. What was recorded earlier than the one before it is sent
    together with it.
    """
    if link.rate:
        return np.arange(len(frames), dtype=np.int64) * NS_PER_S // link.rate
    if link.timing == "recorded" and frames:
        first = frames[0].time_ns
        times = [min(max(0, frame.time_ns - first), LONGEST_NS) for frame in frames]
        return np.maximum.accumulate(np.array(times, np.int64))
    return np.zeros(len(frames), np.int64)
