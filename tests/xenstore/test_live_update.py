# SPDX-License-Identifier: MIT
"""xenstored goes on as another program: same process, same connections, nothing lost, nothing doubled."""

import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from paravirt.errors import StoreGone
from paravirt.xenstore.client import TransactionConflict, XenstoreClient
from paravirt.xenstore.ring_page import RingError, RingPage
from paravirt.xenstore.wire import ACK, Op, Packet, PacketParser, encode
from tests.xenstore.durable import Durable, Ring, await_event
from tests.xenstore.history import DEADLINE_S, PARAVIRT

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(params=["memory", "journal"])
def store_options(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    return ["--journal", str(tmp_path / "journal")] if request.param == "journal" else ["--memory"]


@pytest.fixture
def alone(tmp_path: Path, store_options: list[str]) -> Iterator[Durable]:
    """Without a hypervisor."""
    with ExitStack() as stack:
        made = Durable(stack, tmp_path, *store_options, broker=False)
        made.start()
        yield made


@pytest.fixture
def full(tmp_path: Path, store_options: list[str]) -> Iterator[Durable]:
    with ExitStack() as stack:
        made = Durable(stack, tmp_path, *store_options)
        made.start()
        yield made


def update(durable: Durable, *options: str, program: str = sys.executable) -> str:
    """The answer to the last step; the next request is answered by whoever serves now."""
    with durable.client() as store:
        answer = store.control("live-update", "-f", program)
        if answer == "OK":
            answer = store.control("live-update", "-s", *options)
            store.control("help")
        if answer != "OK":
            store.control("live-update", "-a")
        return answer


def started(durable: Durable) -> bytes:
    """What tells a program from the one before in the same process: where the kernel has put it. Only root may see."""
    return Path(f"/proc/{durable.pid}/auxv").read_bytes() if os.geteuid() == 0 else os.urandom(16)


def assert_same_program(durable: Durable, before: bytes) -> None:
    assert os.geteuid() != 0 or started(durable) == before


class Raw:
    """A client that counts every byte."""

    def __init__(self, durable: Durable) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(durable.socket))
        self._parser = PacketParser()
        self._packets: list[Packet] = []

    def send(self, op: Op, payload: bytes, request_id: int = 1) -> None:
        self.socket.sendall(encode(op, request_id, 0, payload))

    def next(self) -> Packet:
        while not self._packets:
            data = self.socket.recv(65536)
            assert data, "the daemon closed the connection"
            self._packets += self._parser.feed(data)
        return self._packets.pop(0)

    def close(self) -> None:
        self.socket.close()


def test_the_process_stays_and_so_does_the_tree(alone: Durable) -> None:
    with alone.client() as store:
        for i in range(300):
            store.write(f"/tree/{i}", b"\0" * i)
        store.control("quota", "set", "nodes", "777")
        before = started(alone)
        assert update(alone) == "OK"
        assert started(alone) != before, "it is another program"
        assert [len(store.read(f"/tree/{i}")) for i in range(300)] == list(range(300))
        assert store.ls("/tree") == [str(i) for i in range(300)]
        assert "      777 " in store.control("quota")
        assert store.control("check") == "OK"
    assert alone.process is not None
    assert alone.process.poll() is None
    assert alone.said() == ""
    alone.terminate()
    assert not alone.socket.exists()


def test_connections_with_all_that_is_under_way(alone: Durable) -> None:
    request = encode(Op.WRITE, 5, 0, b"/half\0" + b"x" * 500)
    half, unread, watcher = Raw(alone), Raw(alone), Raw(alone)
    half.socket.sendall(request[:100])
    watcher.send(Op.WATCH, b"/watched\0token\0")
    assert [watcher.next()[3] for _ in range(2)] == [ACK, b"/watched\0token\0"]
    with alone.client() as store:
        store.write("/big", b"y" * 4000)
        for i in range(150):  # more than a socket holds
            unread.send(Op.READ, b"/big\0", i)
        store.write("/watched/before", "1")
        assert update(alone) == "OK"
        store.write("/watched/after", "1")
    half.socket.sendall(request[100:])
    assert half.next() == (Op.WRITE, 5, 0, ACK)
    for i in range(150):
        assert unread.next() == (Op.READ, i, 0, b"y" * 4000)
    assert [watcher.next()[3] for _ in range(2)] == [b"/watched/before\0token\0", b"/watched/after\0token\0"]
    watcher.send(Op.UNWATCH, b"/watched\0token\0")
    assert watcher.next()[3] == ACK
    for client in (half, unread, watcher):
        client.close()


def test_many_clients_ask_on_during_updates(alone: Durable) -> None:
    """Every request is answered once and in its order, and every event comes."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            with alone.client() as store, store.watch(f"/busy/{number}") as events:
                await_event(events, f"/busy/{number}")
                count = 0
                while not stop.is_set():
                    count += 1
                    store.write(f"/busy/{number}", str(count))
                    await_event(events, f"/busy/{number}")
                    assert store.read(f"/busy/{number}") == b"%d" % count
                assert events.get(0) is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert update(alone) == "OK"
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert failures == []


def test_open_transactions(alone: Durable) -> None:
    with alone.client() as store:
        store.write("/a", "1")
        transaction = store.transaction()
        transaction.write("/a", "2")
        assert update(alone) == "BUSY"
        assert update(alone, "-F") == "OK"
        transaction.write("/b", "2")
        with pytest.raises(TransactionConflict):
            transaction.commit()
        assert store.read("/a") == b"1"
        assert not store.exists("/b")
        with store.transaction() as another:
            another.write("/a", "3")
        assert store.read("/a") == b"3"


def test_nothing_piles_up(alone: Durable) -> None:
    clients = [Raw(alone) for _ in range(5)]
    with alone.client() as store:
        store.write("/a", "1")
        assert update(alone) == "OK"
        sizes = []
        before = n_descriptors(alone, store)
        for _ in range(10):
            assert update(alone) == "OK"
            status = Path(f"/proc/{alone.pid}/status").read_text()
            sizes.append(int(status.partition("VmRSS:")[2].split()[0]))
        assert n_descriptors(alone, store) == before
        assert max(sizes[5:]) < max(sizes[:5]) + 1024, sizes
    for client in clients:
        client.send(Op.READ, b"/a\0")
        assert client.next()[3] == b"1"
        client.close()


def n_descriptors(durable: Durable, store: XenstoreClient) -> int:
    """When connections whose client has left are closed."""
    counts = [-1]
    while len(counts) < 20 or len(set(counts[-20:])) > 1:
        store.read("/tool")
        counts.append(durable.n_descriptors())
    return counts[-1]


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_program_that_cannot_take_over_is_refused(alone: Durable, tmp_path: Path) -> None:
    with alone.client() as store:
        store.write("/a", "1")
        before = started(alone)
        assert update(alone, program="/missing/program") == "/missing/program is not a program"
        fails = script(tmp_path / "fails", "#!/bin/sh\necho no such luck >&2\nexit 3\n")
        assert update(alone, program=fails) == f"{fails} does not start (status 3): no such luck"
        other = shutil.which("true")
        assert other is not None
        assert update(alone, program=other) == f"{other} is no xenstored"
        broken = script(tmp_path / "broken", "#!/no/such/interpreter\n")
        assert "cannot be run: " in update(alone, program=broken)
        assert store.control("live-update", "-f", sys.executable) == "OK"
        assert store.control("live-update", "-c", "xenstored --no-such-option") == "OK"
        assert "No such option" in store.control("live-update", "-s")
        assert store.control("live-update", "-f", sys.executable) == "OK"
        assert store.control("live-update", "-c", "an 'open quote") == "OK"
        assert "cannot be run" in store.control("live-update", "-s")
        assert_same_program(alone, before)
        assert store.read("/a") == b"1"
        assert update(alone) == "OK", "and it can still be updated"


def test_a_program_that_is_gone_in_the_last_moment(full: Durable, tmp_path: Path) -> None:
    """It could be tried, but not be started: the old one goes on, with its guests."""
    program = script(tmp_path / "once", f'#!/bin/sh\nrm "$0"\nexec {sys.executable} -P -m paravirt "$@"\n')
    domid = full.domain("guest")
    with Ring(full, domid).client() as guest, full.client() as store:
        guest.write("x", "1")
        before = started(full)
        assert update(full, program=program) == "OK"
        assert "the live update failed, this program goes on" in full.said()
        assert_same_program(full, before)
        assert guest.read("x") == b"1"
        assert store.read(f"/local/domain/{domid}/x") == b"1"
        with XenstoreClient.from_socket(full.hypervisor(domid).store_connection()) as on_socket:
            assert on_socket.read("x") == b"1"
        assert update(full) == "OK"
        assert guest.read("x") == b"1"


def test_guests_notice_nothing(full: Durable) -> None:
    """On rings and sockets, without reconnection: a connection that broke would be seen."""
    domid = full.domain("guest")
    stop = threading.Event()
    failures: list[BaseException] = []

    def ask(name: str, client: XenstoreClient) -> None:
        try:
            with client.watch(name) as events:
                await_event(events, name)
                count = 0
                while not stop.is_set():
                    count += 1
                    client.write(name, str(count) + "x" * 500)
                    await_event(events, name)
                    assert client.read(name).startswith(b"%dx" % count)
        except BaseException as error:
            failures.append(error)

    with ExitStack() as stack:
        clients = {
            "ring": stack.enter_context(Ring(full, domid).client()),
            "socket": stack.enter_context(XenstoreClient.from_socket(full.hypervisor(domid).store_connection())),
        }
        threads = [threading.Thread(target=ask, args=item) for item in clients.items()]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                assert update(full) == "OK"
        finally:
            stop.set()
            for thread in threads:
                thread.join(DEADLINE_S)
        assert failures == []
        with full.client() as store:
            assert store.is_domain_introduced(domid)
        for name, client in clients.items():
            client.write(name, "last")
            assert client.read(name) == b"last"


def test_what_a_guest_has_sent_meanwhile_is_answered(full: Durable) -> None:
    ring = Ring(full, full.domain("guest"))
    with ring.client() as guest:
        guest.write("x", "1")
        os.kill(full.pid, signal.SIGSTOP)
        with guest.pipeline() as pipeline:
            asked = pipeline.read("x")
            threading.Timer(0.1, os.kill, (full.pid, signal.SIGCONT)).start()
        assert asked.value == b"1"
        assert update(full) == "OK"
        assert guest.read("x") == b"1"


def test_a_guest_that_was_given_up_stays_so(full: Durable) -> None:
    ring = Ring(full, full.domain("guest"))
    page = RingPage(ring.memory)
    struct.pack_into("<I", page.view, 2052, 5000)  # an index that cannot be
    while page.error != RingError.INDEX:
        ring.channel.notify()
        ring.waiter.wait(ring.channel, timeout_s=0.01)
    struct.pack_into("<4I", page.view, 2048, 0, 0, 0, 0)  # now they could be, but nobody has asked for that
    assert update(full) == "OK"
    request = encode(Op.GET_DOMAIN_PATH, 1, 0, b"0\0")
    page.view[: len(request)] = request
    struct.pack_into("<I", page.view, 2052, len(request))
    ring.channel.notify()
    with full.client() as store:
        store.read("/tool")
        store.read("/tool")
    assert struct.unpack_from("<4I", page.view, 2048) == (0, len(request), 0, 0), "nobody reads it"
    assert page.error == RingError.INDEX
    with ring.client(reconnect=True) as guest:
        guest.write("x", "1")
        assert guest.read("x") == b"1"
    assert page.error == RingError.NONE


def test_a_domain_that_is_destroyed_after_an_update(full: Durable) -> None:
    domid = full.domain("guest")
    with Ring(full, domid).client() as guest, full.client() as store, store.watch("@releaseDomain") as events:
        guest.write("x", "1")
        await_event(events, "@releaseDomain")
        assert update(full) == "OK"
        full.dom0.destroy_domain(domid)
        await_event(events, "@releaseDomain")
        assert not store.exists(f"/local/domain/{domid}")
    assert [info.domid for info in full.dom0.list_domains(dying=True)] == [0]


def test_updates_leave_nothing_in_the_broker(full: Durable) -> None:
    ring = Ring(full, full.domain("guest"))

    def held() -> tuple[int, list[tuple[int, ...]]]:
        with full.client() as store:
            n_files = n_descriptors(full, store)
        return n_files, [(i.domid, i.pages, i.arenas, i.ports, i.maps) for i in full.dom0.list_domains()]

    with ring.client() as guest:
        assert update(full) == "OK"
        before = held()
        for _ in range(5):
            assert update(full) == "OK"
            guest.write("x", "1")
        assert held() == before


def test_an_update_while_the_journal_cannot_be_written_is_refused(tmp_path: Path) -> None:
    import resource

    with ExitStack() as stack:
        durable = Durable(stack, tmp_path, "--journal", str(tmp_path / "j"), broker=False)
        durable.start()
        with durable.client() as store:
            store.write("/a", "1")
            assert store.control("live-update", "-f", sys.executable) == "OK"
            n_bytes = (tmp_path / "j" / "journal").stat().st_size
            resource.prlimit(durable.pid, resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
            with store.pipeline() as pipeline:
                pipeline.write("/a", "2")
                control = Raw(durable)
                control.send(Op.CONTROL, b"live-update\0-s\0")
                while "cannot be written" not in durable.said():
                    pass
                resource.prlimit(durable.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                answer = control.next()[3]
            control.close()
            assert answer in (ACK, b"the journal cannot be written: File too large\0")
            assert store.read("/a") == b"2"


def test_killed_at_any_moment_of_an_update(tmp_path: Path) -> None:
    """With a journal nothing is lost: neither what the old program has acknowledged nor what the new one has."""
    chance = random.Random(3)
    with ExitStack() as stack:
        durable = Durable(stack, tmp_path, "--journal", str(tmp_path / "j"), broker=False)
        durable.start()
        with durable.client() as store:
            store.write("/count", "0")
        for _ in range(6):
            acknowledged = []
            with durable.client() as store:
                assert store.control("live-update", "-f", sys.executable) == "OK"
                writer = threading.Thread(target=count_up, args=(store, acknowledged))
                updater = Raw(durable)
                writer.start()
                updater.send(Op.CONTROL, b"live-update\0-s\0")
                time.sleep(chance.random())  # trial, hand over, start of the next one, or after all that
                durable.kill()
                writer.join(DEADLINE_S)
                updater.close()
            durable.start()
            with durable.client() as store:
                found = int(store.read("/count"))
                assert not acknowledged or acknowledged[-1] <= found <= acknowledged[-1] + 1
                assert store.control("check") == "OK"


def count_up(store: XenstoreClient, acknowledged: list[int]) -> None:
    """Until the daemon dies."""
    try:
        count = int(store.read("/count"))
        while True:
            count += 1
            store.write("/count", str(count))
            acknowledged.append(count)
    except StoreGone:
        pass


def test_the_command(alone: Durable, tmp_path: Path) -> None:
    def command(*words: str) -> "subprocess.CompletedProcess[str]":
        line = [*PARAVIRT, "xenstore", "--socket", str(alone.socket), "live-update", *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    before = started(alone)
    done = command()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    after = started(alone)
    assert after != before
    refused = command("/missing")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "/missing is not a program" in refused.stderr
    with alone.client() as store:
        transaction = store.transaction()
        busy = command("-t", "0")
        assert busy.returncode == 2
        assert "--force" in busy.stderr
        assert_same_program(alone, after)
        assert command("--force").returncode == 0
        transaction.abort()
