# SPDX-License-Identifier: MIT
"""Disks behind NBD: real servers, and servers that come and go."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from paravirt.backend.disks import Disk, open_disk
from paravirt.backend.disks.nbd import parse_address
from paravirt.errors import InvalidRequest
from tests import needs
from tests.backend import disk_model, nbd_servers
from tests.backend.disk_model import Step, data_of, raises, read, write
from tests.backend.nbd_servers import connect, nbdkit, running, scripted, shake_hands

SIZE = 256 << 10
SERVERS = {
    "nbdkit": ("memory", "256k"),
    "simple replies": ("--no-sr", "memory", "256k"),
    "small blocks": ("--filter=blocksize-policy", "memory", "256k", "blocksize-maximum=4k", "blocksize-preferred=4k"),
    "no zeroes": ("--filter=nozero", "memory", "256k", "zeromode=none"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("nbd") / "s"
    with running(path, *nbdkit(path, *SERVERS[request.param])):
        yield path


@settings(max_examples=20, deadline=None)
@given(todo=disk_model.steps(SIZE // 512, "write", "read", "discard", "zeroes", "flush", "reopen", longest=200))
def test_it_is_what_was_written(served: Path, todo: list[Step]) -> None:
    disk = connect(served)
    assert (disk.size_bytes, disk.sector_size, disk.can_discard) == (SIZE, 512, True)
    disk.write_zeroes(0, SIZE)
    disk_model.follow(disk, todo, bytearray(SIZE), lambda: connect(served)).close()


@pytest.mark.parametrize("kind", ["qcow2", "vpc", "raw"])
def test_images_of_qemu(tmp_path: Path, path: Path, kind: str) -> None:
    if shutil.which("qemu-img") is None:
        needs.missing("qemu-img is not installed")
    image = str(tmp_path / "image")
    options = ["-o", "force_size=on"] if kind == "vpc" else []
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", kind, *options, image, "4M"], check=True, env=needs.own_environment()
    )
    with running(path, "qemu-nbd", "--persistent", "--shared=0", "-k", str(path), "-f", kind, image):
        disk = connect(path)
        assert disk.size_bytes == 4 << 20
        data = data_of(1, 1 << 20)
        write(disk, data, at=1 << 20)
        disk.discard(0, 1 << 20)
        disk.write_zeroes((1 << 20) + 512, 512)
        disk.flush()
        disk.close()
        disk = connect(path, read_only=True)
        assert read(disk, 4 << 20, at=0) == bytes(1 << 20) + data[:512] + bytes(512) + data[1024:] + bytes(2 << 20)
        disk.close()


def test_tcp_and_the_name_of_an_export() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serving = ("memory", "1M", "exportname=a/b c", "exportname-strict=true")
    command = ("nbdkit", "-f", "--exit-with-parent", "-i127.0.0.1", f"-p{port}", "--filter=exportname", *serving)
    if shutil.which(command[0]) is None:
        needs.missing("nbdkit is not installed")
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + nbd_servers.DEADLINE_S
        while True:
            try:
                disk = open_disk("nbd", f"127.0.0.1:{port}/a/b c", read_only=False)
                break
            except InvalidRequest:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        assert disk.size_bytes == 1 << 20
        disk.close()
        open_disk("nbd,export=a/b c", f"127.0.0.1:{port}", read_only=False).close()
        with pytest.raises(InvalidRequest, match="does not give us export 'other'"):
            open_disk("nbd", f"127.0.0.1:{port}/other", read_only=False)
        with pytest.raises(InvalidRequest, match="has two names"):
            open_disk("nbd,export=x", f"127.0.0.1:{port}/other", read_only=False)
    finally:
        process.kill()
        process.wait()


def test_a_read_only_export(path: Path) -> None:
    with running(path, *nbdkit(path, "--readonly", "memory", "1M")):
        with pytest.raises(InvalidRequest, match="is read-only"):
            connect(path)
        disk = connect(path, read_only=True)
        assert not disk.can_discard
        assert raises(disk.discard, 0, 512) == errno.EOPNOTSUPP
        disk.close()


def test_sizes_that_are_none(path: Path) -> None:
    with running(path, *nbdkit(path, "memory", "1000")), pytest.raises(InvalidRequest, match="has 1000 bytes, not a"):
        connect(path)


def test_errors_of_the_server_have_their_number(path: Path) -> None:
    filters = ("--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    with running(path, *nbdkit(path, *filters)):
        disk = connect(path)
        for _ in range(3):
            assert raises(disk.pwritev, [memoryview(bytes(4096))], 0) == errno.ENOSPC
            assert read(disk, 512, at=0) == bytes(512)  # the connection is as it was
        disk.close()


def test_an_old_handshake_is_refused_clearly(path: Path) -> None:
    with running(path, *nbdkit(path, "--mask-handshake=0", "memory", "1M")):
        with pytest.raises(InvalidRequest, match="does not speak fixed newstyle"):
            connect(path)


@pytest.fixture
def file_server(tmp_path: Path, path: Path) -> Iterator[nbd_servers.Server]:
    (tmp_path / "image").write_bytes(bytes(SIZE))
    with running(path, *nbdkit(path, "file", str(tmp_path / "image"))) as server:
        yield server


def test_a_server_that_is_killed_and_comes_back_is_a_pause(file_server: nbd_servers.Server) -> None:
    disk = connect(file_server.path)
    model = bytearray(SIZE)
    writes = 0
    stopping = threading.Event()
    failed: list[OSError] = []

    def use() -> None:
        nonlocal writes
        try:
            while not stopping.is_set():
                offset = writes * 7919 % (SIZE // 512) * 512
                model[offset : offset + 512] = data = bytes([writes % 251]) * 512
                write(disk, data, at=offset)
                writes += 1
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    # The server is started from here: it ends with the thread that has started it.
    for _ in range(5):
        seen = writes
        while writes < seen + 10 and not failed:
            time.sleep(0.001)
        file_server.kill()
        file_server.start()
    stopping.set()
    thread.join()
    assert not failed
    assert read(disk, SIZE, at=0) == model
    disk.close()


def test_patience_ends(file_server: nbd_servers.Server) -> None:
    disk = connect(file_server.path, ",patience=50ms")
    file_server.kill()
    assert raises(disk.preadv, [memoryview(bytearray(512))], 0) == errno.EIO
    file_server.start()
    assert read(disk, 512, at=0) == bytes(512)
    disk.close()


def interrupted(disk: Disk, *, when: Callable[[], None] = lambda: None) -> int | None:
    """The errno of a flush that waits for ever, interrupted again and again as an engine does it."""
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(raises(disk.flush)))
    thread.start()
    when()
    deadline = time.monotonic() + nbd_servers.DEADLINE_S
    while thread.is_alive() and time.monotonic() < deadline:
        disk.interrupt()
        thread.join(0.01)
    (error,) = found
    return error


def test_waiting_for_a_server_can_be_interrupted(file_server: nbd_servers.Server) -> None:
    disk = connect(file_server.path, ",patience=1000s")
    file_server.kill()
    assert interrupted(disk) == errno.ECANCELED
    file_server.start()
    disk.flush()  # the next call is as always
    disk.close()
    disk.interrupt()
    assert raises(disk.flush) == errno.EBADF
    disk.close()


def test_waiting_for_an_answer_can_be_interrupted(path: Path) -> None:
    asked = threading.Event()

    def silent(client: socket.socket) -> None:
        shake_hands(client)
        nbd_servers.take_request(client)
        asked.set()
        client.recv(1)

    with scripted(path, silent):
        disk = connect(path, ",timeout=1000s,patience=1000s")
        # The connection is cut; there is no other to be had, and waiting for one is cut as well.
        assert interrupted(disk, when=lambda: path_gone(asked, path)) == errno.ECANCELED
        disk.close()


def path_gone(asked: threading.Event, path: Path) -> None:
    assert asked.wait(nbd_servers.DEADLINE_S)
    path.unlink()


def test_a_silent_server_is_left(file_server: nbd_servers.Server) -> None:
    disk = connect(file_server.path, ",timeout=300ms,patience=1ms")
    file_server.send(signal.SIGSTOP)
    assert raises(disk.flush) == errno.EIO
    file_server.send(signal.SIGCONT)
    deadline = time.monotonic() + nbd_servers.DEADLINE_S
    while raises(disk.flush) is not None:
        assert time.monotonic() < deadline
    disk.close()


def test_an_export_that_grows_is_seen_after_a_new_connection(file_server: nbd_servers.Server, tmp_path: Path) -> None:
    disk = connect(file_server.path, ",patience=10ms")
    file_server.kill()
    os.truncate(tmp_path / "image", 2 * SIZE)
    file_server.start()
    assert read(disk, 512, at=0) == bytes(512)
    assert disk.current_size() == 2 * SIZE
    file_server.kill()
    os.truncate(tmp_path / "image", SIZE)
    file_server.start()
    assert raises(disk.flush) == errno.EIO  # it is smaller than a guest knows it
    assert disk.current_size() == 2 * SIZE
    disk.close()


def test_nothing_leaks(file_server: nbd_servers.Server) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        connect(file_server.path).close()
        with pytest.raises(InvalidRequest):
            connect(file_server.path.parent / "none")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("argument", "address", "export"),
    [
        ("unix:/a:b/c", "/a:b/c", ""),
        ("localhost:10809", ("localhost", 10809), ""),
        ("localhost:1/", ("localhost", 1), ""),
        ("10.0.0.1:65535/a:b/c", ("10.0.0.1", 65535), "a:b/c"),
        ("[::1]:7/x", ("::1", 7), "x"),
    ],
)
def test_addresses(argument: str, address: object, export: str) -> None:
    assert parse_address(argument) == (address, export)


@pytest.mark.parametrize("argument", ["", "localhost", "localhost:0", "localhost:65536", ":1", "a b:1", "::1:7"])
def test_addresses_that_are_none(argument: str) -> None:
    with pytest.raises(InvalidRequest, match="is neither HOST:PORT"):
        open_disk("nbd", argument, read_only=False)


@pytest.mark.parametrize(
    ("driver", "argument", "wrong"),
    [
        ("nbd", "unix:s", "is not unix: and an absolute path"),
        ("nbd", "unix:/\0", "is not unix: and an absolute path"),
        ("nbd", "unix:/" + "x" * 200, "no NBD server answers: AF_UNIX path too long"),
        ("nbd", "unix:/none", "NBD export '' of unix:/none: no NBD server answers: No such file"),
        ("nbd,timeout=0s", "unix:/none", "option timeout of nbd: is '0s', not longer than nothing"),
        ("nbd,export=" + "x" * 4097, "unix:/none", "has at most 4096 bytes"),
        ("nbd,tls=1", "unix:/none", "nbd: has no option 'tls'; there are export, timeout, patience"),
    ],
)
def test_what_is_wrong_is_named(driver: str, argument: str, wrong: str) -> None:
    with pytest.raises(InvalidRequest, match=wrong):
        open_disk(driver, argument, read_only=False)
