# SPDX-License-Identifier: MIT
"""The journal's file: what is loaded is what there was, a torn end is repaired, damage is found."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import AlreadyExists, DamagedJournal, PermissionRefused
from paravirt.xenstore.core import CoreHub
from paravirt.xenstore.journal import Journal
from paravirt.xenstore.wire import ACK, Op
from tests.xenstore.journaled import Store, everything, journal_file, loaded

FRAME_HEADER_BYTES = 12
GUESTS = (1, 2, 3)
PATHS = ("/a", "/a/b", "/a/b/c", "/a/d", "/e", "/e/f", "/local/domain/1", "/local/domain/1/x", "/local/domain/2/y/z")
PERMS = ("n0", "n1", "b1", "r2", "b3", "n3", "w5", "n9")

paths = st.sampled_from(PATHS)
who = st.sampled_from((0, 0, *GUESTS))
inside = st.booleans()
perms = st.lists(st.sampled_from(PERMS), min_size=1, max_size=3)
steps = st.one_of(
    st.tuples(st.just("write"), who, inside, paths, st.binary(max_size=8)),
    st.tuples(st.just("write"), who, inside, paths, st.binary(max_size=8)),
    st.tuples(st.just("mkdir"), who, inside, paths),
    st.tuples(st.just("rm"), who, inside, paths),
    st.tuples(st.just("perms"), who, inside, paths, perms),
    st.tuples(st.just("special"), st.sampled_from(("@introduceDomain", "@releaseDomain")), perms),
    st.tuples(st.just("begin"), who),
    st.tuples(st.just("end"), who, st.sampled_from("TTTF")),
    st.tuples(st.just("introduce"), st.sampled_from(GUESTS)),
    st.tuples(st.just("release"), st.sampled_from(GUESTS)),
    st.tuples(st.just("shut down"), st.sampled_from(GUESTS)),
    st.tuples(st.just("target"), st.sampled_from(GUESTS), st.sampled_from(GUESTS)),
    st.tuples(st.just("die"), st.lists(st.sampled_from(GUESTS), min_size=1, max_size=2)),
    st.tuples(st.just("quota"), st.sampled_from((None, *GUESTS)), st.integers(1, 2000)),
    st.tuples(st.just("feature"), st.sampled_from(GUESTS), st.integers(0, 15)),
)


class Play:
    """Does steps in a store; each client may have one transaction open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[int, int] = {}

    def do(self, step: tuple) -> None:  # type: ignore[type-arg]
        kind, *arguments = step
        store = self._store
        if kind in ("write", "mkdir", "rm", "perms"):
            self._change(kind, *arguments)
        elif kind == "special":
            store.ask(0, Op.SET_PERMS, "\0".join([arguments[0], *arguments[1], ""]).encode())
        elif kind == "begin" and arguments[0] not in self._open:
            answer = store.ask(arguments[0], Op.TRANSACTION_START, b"\0")
            if answer.rstrip(b"\0").isdigit():
                self._open[arguments[0]] = int(answer.rstrip(b"\0"))
        elif kind == "end" and arguments[0] in self._open:
            store.ask(arguments[0], Op.TRANSACTION_END, f"{arguments[1]}\0".encode(), self._open.pop(arguments[0]))
        elif kind == "introduce":
            store.ask(0, Op.INTRODUCE, b"%d\x001\x00%d\0" % (arguments[0], arguments[0] + 7))
        elif kind == "release":
            store.ask(0, Op.RELEASE, b"%d\0" % arguments[0])
            self._open.pop(arguments[0], None)
        elif kind == "shut down":
            store.hub.shut_down(arguments[0])
        elif kind == "target":
            store.ask(0, Op.SET_TARGET, b"%d\x00%d\0" % tuple(arguments))
        elif kind == "die":
            store.hub.died(arguments[0])
            for domid in arguments[0]:
                self._open.pop(domid, None)
        elif kind == "quota":
            store.hub.set_quota(arguments[0], "nodes", arguments[1])
        elif kind == "feature":
            store.ask(0, Op.SET_FEATURE, b"%d\x00%d\0" % tuple(arguments))

    def _change(self, kind: str, domid: int, inside: bool, path: str, *rest: object) -> None:
        op = {"write": Op.WRITE, "mkdir": Op.MKDIR, "rm": Op.RM, "perms": Op.SET_PERMS}[kind]
        payload = path.encode() + b"\0"
        for part in rest:
            payload += part if isinstance(part, bytes) else "\0".join([*part, ""]).encode()  # type: ignore[misc]
        self._store.ask(domid, op, payload, self._open.get(domid, 0) if inside else 0)


def assert_kept(store: Store, *journals: bytes) -> None:
    store.leave()
    expected = everything(store.hub)
    for journal in (*journals, store.journal()):
        status, n_good, hub = loaded(journal)
        with hub:
            assert (status, n_good) == (0, len(journal))
            assert everything(hub) == expected


def prepare(store: Store) -> None:
    for domid in GUESTS:
        store.ask(0, Op.WRITE, b"/local/domain/%d/x\0" % domid)
        store.ask(0, Op.SET_PERMS, b"/local/domain/%d\0n%d\0" % (domid, domid))
    store.ask(0, Op.SET_PERMS, b"/\0b0\0")


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=40))
def test_what_is_loaded_is_what_there_was(plan: list[tuple]) -> None:  # type: ignore[type-arg]
    with Store() as store:
        prepare(store)
        play = Play(store)
        for step in plan:
            play.do(step)
        assert_kept(store)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(steps, st.integers(0, 4)), max_size=40), st.integers(0, 20), st.integers(0, 20), st.booleans()
)
def test_a_snapshot_that_is_written_meanwhile(
    plan: list[tuple[tuple, int]],  # type: ignore[type-arg]
    begin: int,
    n_after: int,
    given_up_before: bool,
) -> None:
    """It begins before step `begin`, goes on by so many nodes before each step, and is adopted at some point."""
    with Store() as store:
        prepare(store)
        play = Play(store)
        if given_up_before:
            store.begin_snapshot()
            store.step_snapshot(3)
            store.abort_snapshot()
        complete = False
        for number, (step, n_nodes) in enumerate(plan):
            if number == begin:
                store.begin_snapshot()
            if store.snapshot_fd >= 0:
                if complete and number > begin + n_after:
                    store.adopt_snapshot()
                elif n_nodes:
                    complete = store.step_snapshot(n_nodes)
            play.do(step)
        former = store.journal()
        journals = [former]
        if store.snapshot_fd >= 0:
            store.adopt_snapshot()
        assert_kept(store, *journals)


@pytest.mark.parametrize("n_nodes", range(1, 12))
def test_nodes_that_come_and_go_at_the_end_of_a_snapshot(n_nodes: int) -> None:
    with Store() as store:
        store.ask(0, Op.WRITE, b"/a\x001")
        store.ask(0, Op.WRITE, b"/last\x001")
        store.begin_snapshot()
        store.step_snapshot(n_nodes)
        store.ask(0, Op.RM, b"/last\0")
        store.ask(0, Op.WRITE, b"/new\x002")
        store.ask(0, Op.WRITE, b"/new/below\x003")
        store.adopt_snapshot()
        assert_kept(store)


def test_a_snapshot_after_very_many_that_were_given_up() -> None:
    with Store() as store:
        store.ask(0, Op.WRITE, b"/a/b\x001")
        store.begin_snapshot()
        store.adopt_snapshot()
        store.ask(0, Op.WRITE, b"/c\x001")
        for _ in range(255):
            store.begin_snapshot()
            store.step_snapshot(2)
            store.abort_snapshot()
        store.begin_snapshot()
        store.ask(0, Op.RM, b"/a\0")
        store.ask(0, Op.WRITE, b"/c\x002")
        store.adopt_snapshot()
        assert_kept(store)


def test_a_domain_that_only_a_permission_names_is_remembered() -> None:
    """So that it is seen to be dead if it dies while no xenstored runs."""
    with Store() as store:
        store.ask(0, Op.WRITE, b"/a\x001")
        assert store.ask(0, Op.SET_PERMS, b"/a\0n0\0r4\0") == ACK
        _, _, hub = loaded(store.journal())
        with hub:
            assert 4 in hub.domains
            hub.died([4])
            assert everything(hub)["nodes"]["/a"][2] == b"n0\0"


def test_the_rights_of_a_dead_target_are_gone_after_a_restart() -> None:
    with Store() as store:
        prepare(store)
        for domid in (1, 2):
            store.ask(0, Op.INTRODUCE, b"%d\x001\x007\0" % domid)
        assert store.ask(0, Op.SET_TARGET, b"1\x002\0") == ACK
        store.hub.died([2])
        _, _, hub = loaded(store.journal())
        with hub:
            assert hub.domains[1].target is None


def test_generations_do_not_come_again() -> None:
    with Store() as store:
        for i in range(20):
            store.ask(0, Op.WRITE, b"/a/%d\0" % i)
        store.ask(0, Op.RM, b"/a\0")
        before = store.hub.counters().generation
        journal = store.journal()
    hubs = []
    for _ in range(2):
        _, n_good, hub = loaded(journal)
        fd = os.memfd_create("journal")
        os.write(fd, journal)
        with Restarted(hub, fd, n_good) as again:
            assert hub.counters().generation > before
            before = hub.counters().generation + 1000  # as many changes may follow
            journal = again
        hubs.append(hub)


class Restarted:
    """Goes on with a journal as a new daemon does."""

    def __init__(self, hub: CoreHub, fd: int, n_bytes: int) -> None:
        from paravirt.ring._core import lib

        self._hub, self._fd = hub, fd
        lib.pv_xs_journal_to(hub.core, fd, n_bytes, 0)
        assert lib.pv_xs_journal_flush(hub.core) == 0

    def __enter__(self) -> bytes:
        return os.pread(self._fd, 1 << 20, 0)

    def __exit__(self, *_: object) -> None:
        from paravirt.ring._core import lib

        lib.pv_xs_journal_to(self._hub.core, -1, 0, 0)
        self._hub.close()
        os.close(self._fd)


# -- a file that was cut off, or damaged


class History:
    """A journal, and what was acknowledged when it had so many bytes."""

    def __init__(self) -> None:
        with Store() as store:
            self.states = [(0, everything(store.hub))]
            self.start = len(store.journal())
            self.states = [(self.start, everything(store.hub))]
            prepare(store)
            self._note(store)
            for step in (
                (0, Op.WRITE, b"/a/b/c\x00value"),
                (0, Op.SET_PERMS, b"/a\0n0\0r1\0"),
                (1, Op.WRITE, b"y\x00mine"),
                (0, Op.RM, b"/a/b\0"),
            ):
                assert store.ask(*step) == ACK
                self._note(store)
            number = int(store.ask(0, Op.TRANSACTION_START, b"\0").rstrip(b"\0"))
            for path in (b"/t/1", b"/t/2", b"/t/3"):
                assert store.ask(0, Op.WRITE, path + b"\x00in one", number) == ACK
            assert store.ask(0, Op.TRANSACTION_END, b"T\0", number) == ACK
            self._note(store)
            store.hub.died([1])
            self._note(store)
            self.journal = store.journal()

    def _note(self, store: Store) -> None:
        store.leave()
        self.states.append((len(store.journal()), everything(store.hub)))


@pytest.fixture(scope="module")
def history() -> History:
    return History()


def test_a_journal_cut_at_any_byte(history: History) -> None:
    for n_bytes in range(len(history.journal)):
        status, n_good, hub = loaded(history.journal[:n_bytes])
        with hub:
            if n_bytes < history.start:
                assert status < 0, "its snapshot was complete once"
                continue
            assert status == 0
            assert n_good <= n_bytes
            acknowledged = [state for state in history.states if state[0] <= n_bytes]
            assert n_good >= acknowledged[-1][0]
            if n_good in dict(history.states):
                assert everything(hub) == dict(history.states)[n_good]


def test_zeros_at_the_end_are_no_damage(history: History) -> None:
    for n_zeros in (1, 11, 12, 13, 4096):
        status, n_good, hub = loaded(history.journal + bytes(n_zeros))
        with hub:
            assert (status, n_good) == (0, len(history.journal))
            assert everything(hub) == history.states[-1][1]


def frames(journal: bytes) -> list[int]:
    """Where each starts."""
    at, found = 16, []
    while at < len(journal):
        found.append(at)
        at += FRAME_HEADER_BYTES + int.from_bytes(journal[at : at + 4], "little")
    assert at == len(journal)
    return found


@pytest.mark.parametrize("mask", [1, 0x80, 0xFF])
def test_one_changed_byte_is_found(history: History, mask: int) -> None:
    starts = frames(history.journal)
    for at in range(len(history.journal)):
        damaged = bytearray(history.journal)
        damaged[at] ^= mask
        status, n_good, hub = loaded(bytes(damaged))
        with hub:
            frame = max([start for start in starts if start <= at], default=0)
            if at >= starts[-1] + FRAME_HEADER_BYTES:  # the last one cannot be told from a torn write
                assert (status, n_good) == (0, starts[-1])
            elif at >= starts[-1]:
                assert n_good == starts[-1]
            else:
                assert status < 0
                assert n_good == frame


# -- the directory


def open_journal(directory: Path, *, sync: bool = False) -> tuple[CoreHub, Journal]:
    hub = CoreHub()
    try:
        return hub, Journal(directory, hub, sync=sync)
    except BaseException:
        hub.close()
        raise


def write_journal(directory: Path, history: History, journal: bytes | None = None) -> Path:
    directory.mkdir()
    journal_file(directory).write_bytes(history.journal if journal is None else journal)
    return journal_file(directory)


def test_a_torn_end_is_removed_with_a_message(
    tmp_path: Path, history: History, caplog: pytest.LogCaptureFixture
) -> None:
    starts = frames(history.journal)
    path = write_journal(tmp_path / "j", history, history.journal[: starts[-1] + 5])
    hub, journal = open_journal(tmp_path / "j")
    assert path.stat().st_size == starts[-1]
    assert f"{path}: the last write was cut off; its 5 bytes" in caplog.text
    journal.close()
    hub.close()
    status, n_good, again = loaded(path.read_bytes())
    with again:
        assert (status, n_good) == (0, path.stat().st_size)


def test_damage_is_refused_and_left_as_it_is(tmp_path: Path, history: History) -> None:
    starts = frames(history.journal)
    damaged = bytearray(history.journal)
    damaged[starts[-2] + 20] ^= 1
    path = write_journal(tmp_path / "j", history, bytes(damaged))
    with pytest.raises(DamagedJournal, match=f"damaged at byte {starts[-2]} of {len(damaged)}"):
        open_journal(tmp_path / "j")
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a journal at all, but text"])
def test_another_file_is_refused(tmp_path: Path, history: History, content: bytes) -> None:
    path = write_journal(tmp_path / "j", history, content)
    with pytest.raises(DamagedJournal, match="damaged at byte 0"):
        open_journal(tmp_path / "j")
    assert path.read_bytes() == content


def test_another_version_is_refused(tmp_path: Path, history: History) -> None:
    import struct

    start = history.journal[:8] + struct.pack("<I", 99)
    write_journal(tmp_path / "j", history, start + struct.pack("<I", crc32c(start)) + history.journal[16:])
    with pytest.raises(DamagedJournal, match="another version"):
        open_journal(tmp_path / "j")


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_checksum_is_crc_32c(history: History) -> None:
    assert crc32c(b"123456789") == 0xE3069283
    start = frames(history.journal)[3]
    n, n_crc, crc = (int.from_bytes(history.journal[at : at + 4], "little") for at in range(start, start + 12, 4))
    assert n_crc == crc32c(history.journal[start : start + 4])
    assert crc == crc32c(history.journal[start + 12 : start + 12 + n])


def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    hub, journal = open_journal(tmp_path / "some" / "where")
    assert (tmp_path / "some" / "where").stat().st_mode & 0o777 == 0o700
    assert journal_file(tmp_path / "some" / "where").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "some" / "where" / "journal.new").exists()
    journal.close()
    journal.close()
    hub.close()


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PermissionRefused, match="Not a directory"):
            open_journal(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_rights(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir(mode=0o500)
    with pytest.raises(PermissionRefused, match="Permission denied"):
        open_journal(tmp_path / "j")


def test_a_journal_is_for_one_daemon(tmp_path: Path) -> None:
    hub, journal = open_journal(tmp_path / "j")
    with pytest.raises(AlreadyExists, match="another xenstored"):
        open_journal(tmp_path / "j")
    journal.close()
    hub.close()
    hub, journal = open_journal(tmp_path / "j")
    journal.close()
    hub.close()


def test_a_new_file_that_was_never_complete_is_thrown_away(tmp_path: Path, history: History) -> None:
    write_journal(tmp_path / "j", history)
    (tmp_path / "j" / "journal.new").write_bytes(history.journal[:70])
    hub, journal = open_journal(tmp_path / "j")
    assert not (tmp_path / "j" / "journal.new").exists()
    assert everything(hub) == history.states[-1][1]
    journal.close()
    hub.close()


def test_what_is_open_is_closed_when_it_cannot_start(tmp_path: Path, history: History) -> None:
    write_journal(tmp_path / "j", history, b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(DamagedJournal):
            open_journal(tmp_path / "j")
    assert len(os.listdir("/proc/self/fd")) == before


def test_whose_domains_it_has(tmp_path: Path) -> None:
    hub, journal = open_journal(tmp_path / "j")
    assert not journal.is_of("one")
    journal.assign("one")
    assert journal.is_of("one")
    assert not journal.is_of("other")
    journal.close()
    hub.close()
