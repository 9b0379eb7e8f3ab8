# SPDX-License-Identifier: MIT
"""pyxs, a Python client written by others, against this daemon: every call it has."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paravirt.xenstore.server import XenstoreServer
from tests.needs import missing

try:
    import pyxs
except ImportError:
    missing("pyxs is not installed (the extra `test` has it)", module=True)

DEADLINE_S = 30.0


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    with XenstoreServer(tmp_path / "s").start():
        yield str(tmp_path / "s")


@pytest.fixture
def client(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(pyxs.Client, "SU", True)  # it asks a file of a Xen host whether this is Dom0
    with pyxs.Client(unix_socket_path=path) as client:
        yield client


def refused(code: int) -> Any:
    """For a block that must end with an error of the store."""
    return pytest.raises(pyxs.PyXSError, match=rf"\({code}, ")


def test_it_finds_the_daemon_as_c_programs_do(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XENSTORED_PATH", path)
    with pyxs.Client() as client:
        assert client.router.is_connected
        assert client.list(b"/") == [b"tool"]


def test_nodes(client: Any) -> None:
    client.write(b"/a/b", b"1")
    client[b"/a/c"] = b"two"
    client.mkdir(b"/a/d")
    assert client.read(b"/a/b") == client[b"/a/b"] == b"1"
    assert client.read(b"/a/d") == b""
    assert client.list(b"/a") == [b"b", b"c", b"d"]
    assert client.list(b"/a/d") == []
    assert client.exists(b"/a/b")
    assert not client.exists(b"/a/x")
    assert client.read(b"/a/x", b"default") == b"default"
    client.delete(b"/a/b")
    del client[b"/a/c"]
    client.delete(b"/a/c")  # there is no such node, but there is its parent
    assert client.list(b"/a") == [b"d"]
    for call in (client.read, client.list, client.get_perms):
        with refused(errno.ENOENT):
            call(b"/a/x")
    with refused(errno.ENOENT):
        client.delete(b"/x/y")
    with refused(errno.EINVAL):
        client.delete(b"/")


def test_relative_paths_are_dom0s(client: Any) -> None:
    client.write(b"mine", b"1")
    assert client.read(b"/local/domain/0/mine") == b"1"


def test_large_values(client: Any) -> None:
    value = b"v" * (4096 - len(b"/a\0"))
    client.write(b"/a", value)
    assert client.read(b"/a") == value


def test_walk(client: Any) -> None:
    client.write(b"/a/b/c", b"1")
    client.write(b"/a/d", b"2")
    tree = [(b"/a", b"", [b"b", b"d"]), (b"/a/b", b"", [b"c"]), (b"/a/b/c", b"1", []), (b"/a/d", b"2", [])]
    assert list(client.walk(b"/a")) == tree
    assert list(client.walk(b"/a", topdown=False))[-1] == tree[0]


def test_permissions(client: Any) -> None:
    client.write(b"/a", b"1")
    assert client.get_perms(b"/a") == [b"n0"]
    client.set_perms(b"/a", [b"b0", b"r0", b"w0"])
    assert client.get_perms(b"/a") == [b"b0", b"r0", b"w0"]
    with refused(errno.ENOENT):  # there is no domain 7 to own it
        client.set_perms(b"/a", [b"n7"])


def test_transactions(client: Any, path: str) -> None:
    with pyxs.Client(unix_socket_path=path) as other:
        client.transaction()
        client.write(b"/a/b", b"1")
        assert client.read(b"/a/b") == b"1"
        assert not other.exists(b"/a")
        assert client.commit() is True
        assert other.read(b"/a/b") == b"1"

        client.transaction()
        client.write(b"/a/b", b"2")
        client.rollback()
        assert client.read(b"/a/b") == b"1"

        client.transaction()
        value = int(client.read(b"/a/b"))
        other.write(b"/a/b", b"10")
        client.write(b"/a/b", b"%d" % (value + 1))
        assert client.commit() is False
        assert client.read(b"/a/b") == b"10"

        client.tx_id = 77
        with refused(errno.ENOENT):
            client.read(b"/a/b")
        client.tx_id = 0
        with refused(errno.ENOENT):
            client.commit()


def test_counting_in_transactions_of_many_threads(client: Any, path: str) -> None:
    client.write(b"/n", b"0")

    def count() -> None:
        with pyxs.Client(unix_socket_path=path) as mine:
            for _ in range(20):
                done = False
                while not done:
                    mine.transaction()
                    mine.write(b"/n", b"%d" % (int(mine.read(b"/n")) + 1))
                    done = mine.commit()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert client.read(b"/n") == b"80"


def test_monitors(client: Any, path: str) -> None:
    with pyxs.Client(unix_socket_path=path) as other, client.monitor() as monitor:
        monitor.watch(b"/a", b"first")
        events = monitor.wait()
        assert next(events) == (b"/a", b"first")  # every new watch fires once
        other.write(b"/a/b", b"1")
        assert next(events) == (b"/a/b", b"first")
        other.set_perms(b"/a/b", [b"r0"])
        assert next(events) == (b"/a/b", b"first")
        other.transaction()
        other.write(b"/a/c", b"1")
        other.write(b"/a/d", b"1")
        other.commit()
        assert {next(events), next(events)} == {(b"/a/c", b"first"), (b"/a/d", b"first")}
        with refused(errno.EEXIST):
            monitor.watch(b"/a", b"first")
        monitor.watch(b"@releaseDomain", b"deaths")
        assert monitor.watched == {b"/a", b"@releaseDomain"}
        monitor.unwatch(b"/a", b"first")
        with refused(errno.ENOENT):
            client.monitor().unwatch(b"/a", b"first")


def test_domains(client: Any) -> None:
    assert client.get_domain_path(7) == b"/local/domain/7"
    assert client.is_domain_introduced(0) is True
    assert client.is_domain_introduced(7) is False
    with refused(errno.EINVAL):
        client.introduce_domain(7, 1, 5)
    for call in (client.release_domain, client.resume_domain):
        with refused(errno.ENOENT):
            call(7)
    with refused(errno.ENOENT):
        client.set_target(7, 0)


def test_one_router_for_many_threads(path: str) -> None:
    router = pyxs.Router(pyxs.connection.UnixSocketConnection(path))
    with pyxs.Client(router=router) as first:
        found: list[bytes] = []

        def work(n: int) -> None:
            mine = pyxs.Client(router=router)
            for i in range(50):
                mine.write(b"/t/%d" % n, b"%d" % i)
            found.append(mine.read(b"/t/%d" % n))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert found == [b"49"] * 4
        assert sorted(first.list(b"/t")) == [b"0", b"1", b"2", b"3"]
