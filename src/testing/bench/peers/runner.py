# SPDX-License-Identifier: MIT
"""The two processes of a peer that is a Python library: what is sent and counted, and that nothing is left behind.

PEER MODE CPU CPU SECONDS BATCH REQUEST_BYTES RESPONSE_BYTES SLOTS IN_FLIGHT [verify]

prints one line of JSON, or exits with 3 and a line that says why it cannot run here. `verify` numbers the messages, and
adds what was counted at both ends.

The front end's process is a child of the one that was started, and the back end's a child of that: who kills the first
kills all. They get a /dev/shm of their own where the kernel gives one, and its objects are gone with them.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from paravirt.ring import process
from paravirt.ring.process import MountFlag, Namespace

Mode = Literal["echo", "oneway", "pingpong"]
MODES: tuple[Mode, ...] = ("echo", "oneway", "pingpong")
CANNOT_RUN = 3
ROUNDS_PER_CLOCK_READ = 16
_END_S = 2.0
_PATIENCE_S = 20
_NUMBER_BYTES = 8
STOP = b"\xff" * _NUMBER_BYTES


class CannotRun(Exception):
    """Something this peer needs is not here; the text says what."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What to measure."""

    mode: Mode
    cpus: tuple[int, int]
    seconds: float
    batch: int
    """Messages in one call, for a library that takes more than one."""
    request_bytes: int
    response_bytes: int
    slots: int
    """Messages that fit into one direction."""
    in_flight: int
    """Requests without an answer, at most."""
    verify: bool = False

    @property
    def largest_bytes(self) -> int:
        return max(self.request_bytes, self.response_bytes)


class End(Protocol):
    """One end of both directions, in the process that uses it."""

    def put(self, message: bytes, /) -> object:
        """Send one message by the shortest way."""

    def get(self) -> bytes:
        """Wait for one."""

    def send(self, messages: Sequence[bytes]) -> None:
        """All of them, waiting for room."""

    def receive(self, most: int) -> Sequence[bytes]:
        """Up to so many of those that are there; a library that has no look without a wait waits for the first."""


class SingleEnd:
    """An end of a library that moves one message a call and waits for it in the kernel."""

    def __init__(self, put: Callable[[bytes], object], get: Callable[[], bytes]) -> None:
        self.put, self.get = put, get

    def send(self, messages: Sequence[bytes]) -> None:
        put = self.put
        for message in messages:
            put(message)

    def receive(self, most: int) -> Sequence[bytes]:
        """One: to look whether there is another costs more than to sleep for it."""
        return (self.get(),)


class Link(Protocol):
    """What one library makes for one run. Made before the fork, with names in `directory` or in /dev/shm."""

    BATCHES: bool
    """Whether one call moves more than one message: else as many calls follow each other as there are messages."""

    def __init__(self, setup: Setup, directory: Path) -> None:
        """Raises `CannotRun`."""

    def front(self) -> End:
        """In the front end's process, after the fork."""

    def back(self) -> End:
        """In the back end's process."""

    def close(self) -> None:
        """In the front end's process, after the run: remove what has a name."""


def message(number: int, n_bytes: int) -> bytes:
    return (number.to_bytes(8, sys.byteorder) + bytes(n_bytes))[:n_bytes] if n_bytes >= 8 else bytes(n_bytes)


def number_of(received: bytes) -> int:
    return int.from_bytes(received[:_NUMBER_BYTES], sys.byteorder)


class Messages:
    """What one end sends: always the same ones, or numbered ones whose sum is kept."""

    def __init__(self, n_bytes: int, batch: int, *, numbered: bool) -> None:
        self._n_bytes = n_bytes
        self._same = [message(0, n_bytes) for _ in range(batch)]
        self._numbered = numbered
        self.sent = self.sum = 0

    def some(self, n: int) -> Sequence[bytes]:
        """The next `n`, at most a batch."""
        self.sent += n
        if not self._numbered:
            return self._same if n == len(self._same) else self._same[:n]
        numbers = range(self.sent - n, self.sent)
        self.sum += sum(numbers)
        return [message(number, self._n_bytes) for number in numbers]

    def answers(self, requests: Sequence[bytes]) -> Sequence[bytes]:
        """One for each request, with its number."""
        if not self._numbered:
            return self.some(len(requests))
        return [message(number_of(request), self._n_bytes) for request in requests]

    def stop(self) -> Sequence[bytes]:
        """The last of all."""
        return [STOP.ljust(self._n_bytes, b"\0")]


@dataclass
class Count:
    """What one end received."""

    n: int = 0
    sum: int = 0
    ended: float = 0.0

    def add(self, received: Sequence[bytes], *, numbered: bool) -> None:
        self.n += len(received)
        if numbered:
            self.sum += sum(map(number_of, received))


def serve(end: End, setup: Setup, burst: int) -> Count:
    """The back end: answer, or only count, until the last message."""
    one_way, numbered, stop = setup.mode == "oneway", setup.verify, STOP
    messages, count = Messages(setup.response_bytes, burst, numbered=numbered), Count()
    receive, send = end.receive, end.send
    while True:
        requests = receive(burst)
        if not requests:
            continue
        if requests[-1][:_NUMBER_BYTES] == stop:
            count.add(requests[:-1], numbered=numbered)
            count.ended = time.perf_counter()
            return count
        if not one_way:
            send(messages.answers(requests))
        if one_way or numbered:
            count.add(requests, numbered=numbered)


def serve_each(end: End, setup: Setup) -> Count:
    """The same for one at a time."""
    numbered, n_bytes, stop, count = setup.verify, setup.response_bytes, STOP, Count()
    put, get, response = end.put, end.get, message(0, setup.response_bytes)
    while True:
        request = get()
        if request[:_NUMBER_BYTES] == stop:
            return count
        if numbered:
            count.add((request,), numbered=True)
            response = message(number_of(request), n_bytes)
        put(response)


def echo(end: End, setup: Setup, burst: int, messages: Messages) -> tuple[Count, float]:
    """Keep so many requests in flight: (responses, seconds)."""
    receive, send, some, numbered = end.receive, end.send, messages.some, setup.verify
    count, done = Count(), 0
    for n in pieces(setup.in_flight, burst):
        send(some(n))
    start = now = time.perf_counter()
    deadline = start + setup.seconds
    while now < deadline:
        for _ in range(ROUNDS_PER_CLOCK_READ):
            responses = receive(burst)
            if responses:
                done += len(responses)
                if numbered:
                    count.add(responses, numbered=True)
                send(some(len(responses)))
        now = time.perf_counter()
    left = setup.in_flight
    while left:
        responses = receive(min(burst, left))
        left -= len(responses)
        if numbered:
            count.add(responses, numbered=True)
    count.n = done
    return count, now - start


def one_way(end: End, setup: Setup, burst: int, messages: Messages) -> float:
    """Send as fast as it goes: when that began."""
    send, some = end.send, messages.some
    start = time.perf_counter()
    deadline = start + setup.seconds
    while time.perf_counter() < deadline:
        for _ in range(ROUNDS_PER_CLOCK_READ):
            send(some(burst))
    return start


def ping_pong(end: End, setup: Setup, messages: Messages) -> tuple[Count, list[int]]:
    """One request at a time: nanoseconds until its response is there."""
    put, get, some, numbered = end.put, end.get, messages.some, setup.verify
    count, samples, clock = Count(), [], time.perf_counter_ns
    now = clock()
    deadline = now + int(setup.seconds * 1e9)
    while now < deadline:
        request = some(1)[0]
        before = clock()
        put(request)
        response = get()
        now = clock()
        samples.append(now - before)
        count.add((response,), numbered=numbered)
    return count, samples


def pieces(n: int, most: int) -> Iterator[int]:
    """`n` in parts of at most `most`."""
    while n > 0:
        yield min(n, most)
        n -= most


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(end: End, setup: Setup, burst: int, theirs: "Report") -> dict[str, Any]:
    """The front end: run, stop the back end, and put both ends' numbers together."""
    messages = Messages(setup.request_bytes, burst, numbered=setup.verify)
    told: dict[str, Any] = {"messages_per_s": 0.0, "p50_ns": None, "p99_ns": None}
    before, count, start = cpu_s(), Count(), 0.0
    if setup.mode == "echo":
        count, took_s = echo(end, setup, burst, messages)
        told["messages_per_s"] = count.n / took_s
    elif setup.mode == "oneway":
        start = one_way(end, setup, burst, messages)
    else:
        count, samples = ping_pong(end, setup, messages)
        samples.sort()
        told["messages_per_s"] = 1e9 * len(samples) / sum(samples)
        told |= {"p50_ns": samples[len(samples) // 2], "p99_ns": samples[len(samples) * 99 // 100]}
    own_s = cpu_s() - before
    end.send(messages.stop())
    back = theirs.read()
    if setup.mode == "oneway":
        told["messages_per_s"] = back["n"] / (back["ended"] - start)
    told["cpu_s"] = own_s + back["cpu_s"]
    if setup.verify:
        told |= {"sent": messages.sent, "sum": messages.sum, "arrived": back["n"], "arrived_sum": back["sum"]}
        told["answered_sum"] = count.sum
    return told


class Report:
    """What the back end tells the front end: that it is ready, and in the end what it counted."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe()

    def write(self, what: dict[str, Any]) -> None:
        os.write(self._write_fd, json.dumps(what).encode() + b"\n")

    def only_read(self) -> None:
        """In the process that reads: so that the end of the other is seen."""
        os.close(self._write_fd)
        self._lines = os.fdopen(self._read_fd)

    def read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the back end's process ended early")
        return cast("dict[str, Any]", json.loads(line))


def own_shared_memory() -> bool:
    """A /dev/shm that only this process and its children see, which goes with them; False where that is refused."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        if process.may_become_others():
            process.unshare(Namespace.MOUNT)
        else:
            process.unshare(Namespace.MOUNT | Namespace.USER)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
            Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        process.mount("none", "/", flags=MountFlag.PRIVATE | MountFlag.RECURSIVE)
        process.mount("tmpfs", "/dev/shm", "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, "mode=1777")
    except OSError:
        return False
    return True


def run_back(link: Link, setup: Setup, burst: int, report: Report) -> None:
    os.sched_setaffinity(0, {setup.cpus[1]})
    end = link.back()
    report.write({})
    before = cpu_s()
    count = serve_each(end, setup) if setup.mode == "pingpong" else serve(end, setup, burst)
    report.write({"n": count.n, "sum": count.sum, "ended": count.ended, "cpu_s": cpu_s() - before})


def run_both(make: Callable[[Setup, Path], Link], setup: Setup) -> None:
    """In the process that is the front end."""
    where = "/dev/shm" if own_shared_memory() else None
    with tempfile.TemporaryDirectory(prefix="paravirt-peer-", dir=where) as directory:
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        link, report = make(setup, Path(directory)), Report()
        burst = setup.batch if link.BATCHES else max(1, setup.in_flight)
        try:
            back = in_child(lambda: run_back(link, setup, burst, report))
            report.only_read()
            os.sched_setaffinity(0, {setup.cpus[0]})
            end = link.front()
            report.read()
            print(json.dumps(measure(end, setup, burst, report)), flush=True)
            wait_for(back, _END_S)  # so that its CPU time counts as ours, not as somebody else's
        finally:
            link.close()


def in_child(work: Callable[[], None]) -> int:
    """A forked process that does this, ends without any clearing up, and is killed when its parent ends; its pid."""
    parent = os.pidfd_open(os.getpid())
    sys.stdout.flush()
    if pid := os.fork():
        os.close(parent)
        return pid
    try:
        process.die_with_parent(parent)
        work()
        status = 0
    except CannotRun as reason:
        print(reason, file=sys.stderr, flush=True)
        status = CANNOT_RUN
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        status = 1
    sys.stdout.flush()
    os._exit(status)


def parse(arguments: Sequence[str]) -> Setup:
    """Raises `ValueError` for what is not an order."""
    mode, front, back, seconds, *numbers = arguments[:9]
    verify = arguments[9:] == ["verify"]
    if mode not in MODES or (arguments[9:] and not verify):
        raise ValueError(f"a mode is one of {', '.join(MODES)}")
    batch, request, response, slots, in_flight = map(int, numbers)
    if min(batch, slots, in_flight) < 1 or min(request, response) < _NUMBER_BYTES:
        raise ValueError(f"counts are 1 or more, messages {_NUMBER_BYTES} bytes or more")
    return Setup(mode, (int(front), int(back)), float(seconds), batch, request, response, slots, in_flight, verify)


def main(make: Callable[[Setup, Path], Link]) -> None:
    """Run as the program of one peer."""
    try:
        setup = parse(sys.argv[1:])
    except ValueError as error:
        print(f"{error}\n{(__doc__ or '').splitlines()[2]}", file=sys.stderr)
        sys.exit(2)
    pid = in_child(lambda: run_both(make, setup))
    status = wait_for(pid, setup.seconds + _PATIENCE_S)
    if status is None:
        print(f"not done after {setup.seconds + _PATIENCE_S:g} s", file=sys.stderr)
    sys.exit(1 if status is None or status < 0 else status)


def wait_for(pid: int, seconds: float) -> int | None:
    """Its exit status; None when it was killed because it took longer."""
    deadline = time.monotonic() + seconds
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None
