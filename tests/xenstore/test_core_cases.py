# SPDX-License-Identifier: MIT
"""Cases of the C engine alone: restarts, and requests that wait for the caller."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.xenstore.core import CoreHub
from paravirt.xenstore.journal import Journal
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.story import FakeDomains


def ask(hub: CoreHub, op: Op, payload: bytes) -> bytes:
    """A request of Dom0: the payload of its reply."""
    connection = hub.connect()
    connection.feed(encode(op, 1, 0, payload))
    reply = connection.output()[16:]
    hub.disconnect(connection)
    return reply


class Restarts:
    """A store with a journal, made anew from it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self) -> tuple[CoreHub, Journal]:
        self.hub = CoreHub(control=FakeDomains(set(range(10))))  # type: ignore[arg-type]
        self.journal = Journal(self.directory, self.hub)
        return self.hub, self.journal

    def again(self) -> CoreHub:
        self.stop()
        return self.start()[0]

    def stop(self) -> None:
        self.journal.close()
        self.hub.close()


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    restarts = Restarts(tmp_path / "journal")
    yield restarts
    restarts.stop()


def test_rights_over_a_target_that_died_do_not_come_back(restarts: Restarts) -> None:
    hub, _ = restarts.start()
    assert hub.known(5)
    assert hub.known(6)
    hub.set_target(5, 6)
    hub.died([6])
    assert restarts.again().domains[5].target is None


def test_a_node_made_after_the_last_one_of_a_snapshot_went(restarts: Restarts, tmp_path: Path) -> None:
    """The snapshot has come to the last node of the tree, which is removed; another one is made."""
    hub, _ = restarts.start()
    ask(hub, Op.MKDIR, b"/a\0")
    fd = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT)
    lib.pv_xs_snapshot_start(hub.core, fd)
    assert lib.pv_xs_snapshot_step(hub.core, hub.statistics().nodes - 1) == 0
    ask(hub, Op.RM, b"/a\0")
    ask(hub, Op.MKDIR, b"/b\0")
    while not lib.pv_xs_snapshot_step(hub.core, 1):
        pass
    lib.pv_xs_journal_flush(hub.core)
    lib.pv_xs_snapshot_abort(hub.core)
    os.close(fd)
    other = CoreHub()
    data = (tmp_path / "new").read_bytes()
    assert lib.pv_xs_journal_load(other.core, data, len(data), ffi.new("uint64_t *")) == 0
    assert ask(other, Op.DIRECTORY, b"/\0") == b"tool\0b\0"
    other.close()


def test_a_question_about_a_domain_ends_with_who_asked_it() -> None:
    """A guest names domain 9, and is gone before it is known whether that exists; then Dom0 asks something else."""
    with CoreHub(control=FakeDomains(set(range(10)))) as hub:  # type: ignore[arg-type]
        guest, dom0 = lib.pv_xs_connect(hub.core, 5), lib.pv_xs_connect(hub.core, 0)
        for connection, packet in (
            (guest, encode(Op.SET_PERMS, 1, 0, b"/\0n5\0r9\0")),
            (dom0, encode(Op.GET_QUOTA, 1, 0, b"nodes\0")),
        ):
            assert lib.pv_xs_feed(connection, packet, len(packet)) == lib.PV_XS_PARKED
            lib.pv_xs_reset(guest)
        assert not lib.pv_xs_unresolved(hub.core, ffi.new("uint32_t *"))
        request = ffi.new("struct pv_xs_request *")
        assert lib.pv_xs_parked(hub.core, request)
        assert request.op == Op.GET_QUOTA
        lib.pv_xs_conn_free(guest)
        lib.pv_xs_conn_free(dom0)
