# SPDX-License-Identifier: MIT
"""Edges of the engine's trees and transactions: what was missing when it was looked at, tables that grow, who pays."""

from collections.abc import Iterator
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.xenstore.wire import ACK, Op, encode
from tests.xenstore.engine import Client, engine, make_home

NODES, WATCHES, OUTSTANDING, MEMORY, SOFT_MEMORY, TRANSACTIONS, TRANSACTION_NODES, PERMISSIONS, PATH_MAX, SIZE = range(
    10
)


@pytest.fixture
def core() -> Iterator[Any]:
    with engine() as core:
        make_home(Client(core), 5)
        yield core


@pytest.mark.parametrize(
    ("meanwhile", "outcome"),
    [
        ([], ACK),
        ([(Op.WRITE, b"/other\0")], ACK),
        ([(Op.WRITE, b"/a\0"), (Op.RM, b"/a\0")], b"! EAGAIN\0"),
        ([(Op.WRITE, b"/a/b\0")], b"! EAGAIN\0"),
        ([(Op.WRITE, b"/a/b/c\0")], b"! EAGAIN\0"),
        ([(Op.WRITE, b"/a/b/c/d\0")], b"! EAGAIN\0"),
        ([(Op.RM, b"/a\0")], b"! EAGAIN\0"),
        ([(Op.RM, b"/a\0"), (Op.WRITE, b"/a\0")], b"! EAGAIN\0"),
        ([(Op.RM, b"/a\0"), (Op.WRITE, b"/a/b/c\0")], b"! EAGAIN\0"),
    ],
)
def test_a_path_that_was_missing(core: Any, meanwhile: list[tuple[int, bytes]], outcome: bytes) -> None:
    dom0 = Client(core)
    dom0.do(Op.WRITE, b"/a\0")
    transaction = dom0.begin()
    assert dom0.ask(Op.DIRECTORY, b"/a/b/c\0", transaction) == b"! ENOENT\0"
    for op, payload in meanwhile:
        dom0.do(op, payload)
    assert dom0.commit(transaction) == outcome


def test_permission_lists_and_watched_paths_beyond_the_first_tables(core: Any) -> None:
    dom0 = Client(core)
    for domid in range(1, 301):
        lib.pv_xs_conn_free(lib.pv_xs_connect(core, domid))
        dom0.do(Op.WRITE, b"/n/%d\0%d" % (domid, domid))
        dom0.do(Op.SET_PERMS, b"/n/%d\0n%d\0r1\0" % (domid, domid))
        dom0.do(Op.WATCH, b"/n/%d\0%d\0" % (domid, domid))
    assert len(dom0.events()) == 300
    for domid in range(1, 301):
        assert dom0.ask(Op.GET_PERMS, b"/n/%d\0" % domid) == b"n%d\0r1\0" % domid
        dom0.do(Op.WRITE, b"/n/%d\0" % domid)
        assert dom0.events() == [(b"/n/%d" % domid, b"%d" % domid)]


def test_one_change_is_told_to_more_watches_than_one_table_has(core: Any) -> None:
    dom0 = Client(core)
    for number in range(200):
        dom0.do(Op.WATCH, b"/\0%d\0" % number)
    dom0.events()
    dom0.do(Op.WRITE, b"/a\0")
    assert dom0.events() == [(b"/a", b"%d" % number) for number in range(200)]


def test_a_transaction_charges_many_domains(core: Any) -> None:
    dom0 = Client(core)
    for domid in range(1, 8):
        lib.pv_xs_conn_free(lib.pv_xs_connect(core, domid))
    transaction = dom0.begin()
    for domid in range(1, 8):
        dom0.do(Op.WRITE, b"/n/%d/x\0" % domid, transaction)
        dom0.do(Op.SET_PERMS, b"/n/%d\0n%d\0" % (domid, domid), transaction)
    assert dom0.commit(transaction) == ACK
    domain = ffi.new("struct pv_xs_domain *")
    for domid in range(1, 8):
        assert lib.pv_xs_get_domain(core, domid, domain)
        assert domain.n_nodes == 1 + (domid == 5)


def test_a_transaction_removes_a_wide_directory(core: Any) -> None:
    dom0 = Client(core)
    for number in range(100):
        dom0.do(Op.WRITE, b"/wide/%d/x\0" % number)
    transaction = dom0.begin()
    dom0.do(Op.RM, b"/wide\0", transaction)
    assert dom0.ask(Op.DIRECTORY, b"/wide\0", transaction) == b"! ENOENT\0"
    assert dom0.ask(Op.DIRECTORY, b"/wide\0").count(b"\0") == 100
    assert dom0.commit(transaction) == ACK
    assert dom0.ask(Op.DIRECTORY, b"/wide/7\0") == b"! ENOENT\0"


def test_a_removal_that_may_not_look_at_the_parent(core: Any) -> None:
    guest = Client(core, 5)
    guest.do(Op.WRITE, b"a/b\0")
    lib.pv_xs_set_quota(core, 5, TRANSACTION_NODES, 2)
    transaction = guest.begin()
    assert guest.ask(Op.RM, b"a/b\0", transaction) == b"! ENOSPC\0"
    assert guest.commit(transaction) == b"! ENOMEM\0"
    assert guest.ask(Op.READ, b"a/b\0") == b""


def test_a_watch_between_two_others_goes(core: Any) -> None:
    dom0 = Client(core)
    for token in (b"1", b"2", b"3", b"4"):
        dom0.do(Op.WATCH, b"/a\0" + token + b"\0")
    dom0.events()
    for token, left in ((b"2", b"134"), (b"4", b"13"), (b"1", b"3")):
        dom0.do(Op.UNWATCH, b"/a\0" + token + b"\0")
        dom0.do(Op.WRITE, b"/a\0")
        assert b"".join(token for _, token in dom0.events()) == left
    lib.pv_xs_reset(dom0.connection)
    dom0.do(Op.WRITE, b"/a\0")
    assert dom0.events() == []


def test_who_owns_a_special_name_gives_it_to_nobody(core: Any) -> None:
    dom0, guest = Client(core), Client(core, 5)
    name = b"@releaseDomain\0"
    assert guest.ask(Op.SET_PERMS, name + b"n5\0") == b"! EACCES\0"
    dom0.do(Op.SET_PERMS, name + b"n5\0")
    assert guest.ask(Op.SET_PERMS, name + b"n0\0") == b"! EPERM\0"
    guest.do(Op.SET_PERMS, name + b"n5\0r5\0")
    assert dom0.ask(Op.GET_PERMS, name) == b"n5\0r5\0"


def test_a_guest_in_debt_is_helped_by_what_others_do_not_use(core: Any) -> None:
    guest, other = Client(core, 5), Client(core, 6)
    assert other.begin()
    domain = ffi.new("struct pv_xs_domain *")
    for now in (0, 60_000, 120_000):  # what comes beyond its burst is kept for others
        lib.pv_xs_set_now(core, now)
        guest.do(Op.WRITE, b"/local/domain/5/x\0")
    n = 0
    while lib.pv_xs_wants_input(guest.connection):
        guest.do(Op.WRITE, b"/local/domain/5/x\0%d" % n)
        n += 1
    assert lib.pv_xs_get_domain(core, 5, domain)
    assert domain.credit < 0
    assert n < 20
    assert 0 < lib.pv_xs_next_timeout(core) < 1000
    lib.pv_xs_set_now(core, 120_001)
    lib.pv_xs_on_time(core)
    assert lib.pv_xs_next_timeout(core) == -1  # it is out of debt at once
    assert guest.ask(Op.READ, b"/local/domain/5/x\0") == b"%d" % (n - 1)


def test_what_does_not_exist_is_forgotten_without_harm(core: Any) -> None:
    for gone in ([0], [77], [5, 5], [0xFFFF], []):
        lib.pv_xs_forget(core, gone, len(gone))
    assert Client(core).ask(Op.DIRECTORY, b"/local/domain\0") == b""


def test_numbers_are_read_as_atoi_does(core: Any) -> None:
    dom0 = Client(core)
    for number in (b"99999999999999999999", b"-99999999999999999999", b"x", b"", b"0"):
        assert dom0.ask(Op.DIRECTORY_PART, b"/\0" + number + b"\0").split(b"\0")[1] == b"tool"
    for domid, answer in (
        (b"0", b"T\0"),
        (b"-1", b"F\0"),
        (b"65536", b"F\0"),
        (b"5", b"F\0"),
        (b"32752", b"T\0"),
        (b"77", b"F\0"),
    ):
        assert dom0.ask(Op.IS_DOMAIN_INTRODUCED, domid + b"\0") == answer
    for payload in (b"", b"1", b"1\0\0"):
        assert dom0.ask(Op.IS_DOMAIN_INTRODUCED, payload) == b"! EINVAL\0"


def test_the_longest_paths(core: Any) -> None:
    dom0, guest = Client(core), Client(core, 5)
    assert dom0.ask(Op.READ, b"/" + b"a" * 3071 + b"\0") == b"! ENOENT\0"
    for path in (b"/" + b"a" * 3072, b"a" * 2049, b"", b"@x"):
        assert dom0.ask(Op.READ, path + b"\0") == b"! EINVAL\0"
    for special in (b"@" + b"a" * 2048, b"@?"):
        assert dom0.ask(Op.WATCH, special + b"\0t\0") == b"! EINVAL\0"
    lib.pv_xs_set_quota(core, 5, PATH_MAX, 10)
    # What stands after a home does not count, what looks like one does.
    for path, answer in (
        (b"/local/domain/5/123456789", b"! ENOENT\0"),
        (b"/local/domain/5/1234567890", b"! EINVAL\0"),
        (b"/local/domain/123456/1", b"! EINVAL\0"),
        (b"/local/domain/x/1", b"! EINVAL\0"),
        (b"/local/domain/12345", b"! EINVAL\0"),
        (b"/local/domain/", b"! EINVAL\0"),
        (b"123456789", b"! ENOENT\0"),
    ):
        assert guest.ask(Op.READ, path + b"\0") == answer, path
    assert guest.ask(Op.WATCH, b"@releaseDomain\0t\0") == b"! EINVAL\0"  # it is longer
    assert dom0.ask(Op.WATCH, b"@releaseDomain\0t\0") == ACK


def test_permissions_that_are_none(core: Any) -> None:
    dom0 = Client(core)
    for words in (b"x5\0", b"n\0", b"r65536\0", b"r123456\0", b"n5x\0", b"\0", b"n0\0q\0"):
        assert dom0.ask(Op.SET_PERMS, b"/tool\0" + words) == b"! EINVAL\0", words
    assert dom0.ask(Op.SET_PERMS, b"/tool\0") == b"! EINVAL\0"
    assert dom0.ask(Op.SET_PERMS, b"@other\0n0\0") == b"! EINVAL\0"


def test_an_event_too_long_for_a_packet_is_none(core: Any) -> None:
    dom0 = Client(core)
    dom0.do(Op.WATCH, b"/a\0" + b"t" * 4000 + b"\0")
    assert len(dom0.events()) == 1
    dom0.do(Op.WRITE, b"/a/" + b"b" * 200 + b"\0")
    assert dom0.events() == []
    dom0.do(Op.WRITE, b"/a/b\0")
    assert len(dom0.events()) == 1


def test_an_answer_for_a_client_that_left_is_for_nobody(core: Any) -> None:
    guest, dom0 = Client(core, 5), Client(core)
    assert guest.feed(encode(Op.SET_PERMS, 1, 0, b"/local/domain/5\0n5\0r9\0")) == lib.PV_XS_PARKED
    assert lib.pv_xs_wants_input(guest.connection) == 0
    domid = ffi.new("uint32_t *")
    assert lib.pv_xs_unresolved(core, domid)
    assert domid[0] == 9
    assert not lib.pv_xs_parked(core, ffi.new("struct pv_xs_request *"))
    guest.leave()
    assert lib.pv_xs_resolve(core, 1) == lib.PV_XS_DONE
    assert not lib.pv_xs_unresolved(core, domid)
    assert lib.pv_xs_answer(core, 0, b"OK\0", 3) == lib.PV_XS_DONE
    assert dom0.receive() == []
    assert not lib.pv_xs_get_domain(core, 9, ffi.new("struct pv_xs_domain *"))


def test_a_client_that_is_closed_or_given_up_takes_nothing_more(core: Any) -> None:
    one, two = Client(core, 5), Client(core, 5)
    lib.pv_xs_give_up(one.connection, ffi.new("char[]", b"x"))
    lib.pv_xs_disconnect(two.connection)
    for client in (one, two):
        assert client.feed(encode(Op.READ, 1, 0, b"/\0")) == lib.PV_XS_DONE
        assert lib.pv_xs_n_output(client.connection) == 0
        assert lib.pv_xs_wants_input(client.connection) == 0
    assert (lib.pv_xs_closed(one.connection), lib.pv_xs_closed(two.connection)) == (0, 1)
    one.leave()
    two.leave()


def test_the_255th_snapshot_is_followed_by_another(core: Any, tmp_path: Any) -> None:
    """Nodes remember the snapshot that has them in a byte."""
    dom0 = Client(core)
    with (tmp_path / "snapshot").open("w+b") as file:
        for _ in range(256):
            lib.pv_xs_snapshot_start(core, file.fileno())
            lib.pv_xs_snapshot_step(core, 1)
            lib.pv_xs_snapshot_abort(core)
        file.truncate(0)
        file.seek(0)
        lib.pv_xs_snapshot_start(core, file.fileno())
        assert lib.pv_xs_snapshot_step(core, 1) == 0
        dom0.do(Op.WRITE, b"/tool\0not in it yet")
        while lib.pv_xs_snapshot_step(core, 1) == 0:
            pass
        lib.pv_xs_snapshot_abort(core)
        data = (tmp_path / "snapshot").read_bytes()
    with engine() as other:
        assert lib.pv_xs_journal_load(other, data, len(data), ffi.new("uint64_t *")) == 0
        assert Client(other).ask(Op.READ, b"/tool\0") == b"not in it yet"
