# SPDX-License-Identifier: MIT
"""kill -9 again and again while writers write: nothing acknowledged is lost, no transaction is there by halves.

LINEARIZABILITY_ROUNDS above 1 makes it ten times as long.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from paravirt.xenstore.wire import ACK, Errno, Op
from tests.xenstore import stand_in
from tests.xenstore.history import DEADLINE_S, Daemon, Request, Wire, xenstored

N_WRITERS = 4
N_KILLS = 20 if os.environ.get("LINEARIZABILITY_ROUNDS", "1") == "1" else 200


class Broken(AssertionError):
    """The store has not kept a promise."""


class Value:
    """What may be found in one place: the number acknowledged last, or the one that was tried since. 0: no node."""

    def __init__(self, *paths: str) -> None:
        self.paths = paths
        self.acknowledged = 0
        self.tried = 0

    def compare(self, found: list[int]) -> None:
        """`found` at the paths after a restart; it is what has to be there from now on."""
        acknowledged, tried = self.acknowledged, self.tried
        if len(set(found)) != 1:
            raise Broken(f"a transaction by halves at {self.paths}: {found}, {tried} was tried")
        if found[0] not in (acknowledged, tried):
            raise Broken(f"{self.paths} have {found[0]}; {acknowledged} was acknowledged, then {tried} tried")
        self.acknowledged = self.tried = found[0]


class Writer:
    """Counts in nodes of its own: in one by writes, in two by transactions, in one that it also removes."""

    def __init__(self, number: int, stopped: Callable[[], bool], progress: Callable[[], None]) -> None:
        home = f"/crash/{number}"
        self.alone, self.gone = Value(f"{home}/alone"), Value(f"{home}/gone")
        self.pair = Value(f"{home}/left", f"{home}/right")
        self.values = (self.alone, self.gone, self.pair)
        self._stopped = stopped
        self._progress = progress

    def run(self, daemon: Daemon) -> None:
        n = 0
        while not self._stopped():
            try:
                wire = Wire(daemon.dial())
            except ConnectionError:
                continue
            try:
                while not self._stopped():
                    n += 1
                    self._round(wire, n)
                    self._progress()
            except ConnectionError:
                pass
            finally:
                wire.close()

    def _round(self, wire: Wire, n: int) -> None:
        self._write(wire, self.alone, n)
        self._write(wire, self.gone, n)
        started = wire.ask(Request(Op.TRANSACTION_START, b"\0"))
        assert isinstance(started, bytes)
        transaction = int(started.rstrip(b"\0"))
        for path in self.pair.paths:
            assert wire.ask(Request(Op.WRITE, f"{path}\0{n}".encode(), transaction)) == ACK
        self.pair.tried = n
        assert wire.ask(Request(Op.TRANSACTION_END, b"T\0", transaction)) == ACK
        self.pair.acknowledged = n
        self.gone.tried = 0
        assert wire.ask(Request(Op.RM, f"{self.gone.paths[0]}\0".encode())) == ACK
        self.gone.acknowledged = 0

    def _write(self, wire: Wire, value: Value, n: int) -> None:
        value.tried = n
        assert wire.ask(Request(Op.WRITE, f"{value.paths[0]}\0{n}".encode())) == ACK
        value.acknowledged = n


class CrashLoop:
    """Writers in threads, and a daemon that is killed while they write."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self._daemon = daemon
        self._chance = random.Random(seed)
        self._changed = threading.Condition()
        self._n_rounds = 0
        self._stop = False
        self._writers = [Writer(i, lambda: self._stop, self._progress) for i in range(N_WRITERS)]

    def _progress(self) -> None:
        with self._changed:
            self._n_rounds += 1
            self._changed.notify_all()

    def run(self, n_kills: int) -> None:
        """Raises `Broken`."""
        daemon, chance = self._daemon, self._chance
        self._prepare()
        with ThreadPoolExecutor(N_WRITERS) as threads:
            results = [threads.submit(writer.run, daemon) for writer in self._writers]
            try:
                for _ in range(n_kills):
                    daemon.open()
                    self._wait(results, chance.randrange(1, 30))
                    time.sleep(chance.random() * 0.003)  # anywhere in a round
                    daemon.kill()
                    daemon.start()
                    self._compare()
            finally:
                self._stop = True
                daemon.open()
        for result in results:
            result.result()

    def _prepare(self) -> None:
        wire = Wire(self._daemon.dial_now())
        for writer in self._writers:
            for value in writer.values:
                directory = value.paths[0].rpartition("/")[0]
                assert wire.ask(Request(Op.MKDIR, f"{directory}\0".encode())) == ACK
        wire.close()

    def _wait(self, results: "list[Future[None]]", n_rounds: int) -> None:
        with self._changed:
            until = self._n_rounds + n_rounds
            done = self._changed.wait_for(
                lambda: self._n_rounds >= until or any(result.done() for result in results), DEADLINE_S
            )
        assert done, "writers hang"
        for result in results:
            if result.done():
                result.result()

    def _compare(self) -> None:
        wire = Wire(self._daemon.dial_now())
        try:
            for writer in self._writers:
                for value in writer.values:
                    value.compare([self._number(wire, path) for path in value.paths])
        finally:
            wire.close()

    def _number(self, wire: Wire, path: str) -> int:
        answer = wire.ask(Request(Op.READ, f"{path}\0".encode()))
        assert isinstance(answer, bytes) or answer is Errno.ENOENT, answer
        return int(answer) if isinstance(answer, bytes) else 0


def test_what_may_be_found_after_a_restart() -> None:
    pair = Value("/left", "/right")
    pair.acknowledged, pair.tried = 4, 5
    with pytest.raises(Broken, match="by halves"):
        pair.compare([4, 5])
    for lost in (0, 3, 6):
        with pytest.raises(Broken, match="4 was acknowledged, then 5 tried"):
            pair.compare([lost, lost])
    pair.compare([4, 4])
    with pytest.raises(Broken):
        pair.compare([5, 5])  # it was not done, so it must not be there later


def test_the_loop_passes_a_store_that_saves_before_it_answers(tmp_path: Path) -> None:
    with stand_in.saving(tmp_path, every=1) as daemon:
        CrashLoop(daemon, 1).run(3)


def test_the_loop_finds_a_store_that_saves_too_seldom(tmp_path: Path) -> None:
    with stand_in.saving(tmp_path, every=50) as daemon, pytest.raises(Broken):
        CrashLoop(daemon, 1).run(10)


@pytest.mark.timeout(900)
def test_a_daemon_with_a_journal_keeps_its_promises(tmp_path: Path) -> None:
    with xenstored(tmp_path, "--journal", str(tmp_path / "journal")) as daemon:
        CrashLoop(daemon, 1).run(N_KILLS)
