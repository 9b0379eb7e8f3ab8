# SPDX-License-Identifier: MIT
"""Switching states over a connection that breaks: what has an unknown outcome is done again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from paravirt.errors import StoreGone
from paravirt.protocol.xenbus import XenbusState
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.wire import Op
from tests.xenstore.fake_store import Background, FakeStore, Peer

DIRECTORY = "/local/domain/0/backend/vbd/1/51712"


def serve_switch(peer: Peer, before: bytes) -> None:
    """All requests of one switch but its commit."""
    peer.answer(peer.next(Op.TRANSACTION_START), b"1\0")
    peer.answer(peer.next(Op.READ), before)
    if before != b"2":
        packet = peer.next(Op.WRITE)
        assert packet[3].endswith(b"\x002")
        peer.answer(packet)


def test_a_switch_whose_commit_is_lost_is_made_again(tmp_path: Path) -> None:
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path, reconnect=True) as client:
        switched = Background(lambda: xenbus.switch_state(client, DIRECTORY, XenbusState.INIT_WAIT))
        peer = fake.accept()
        serve_switch(peer, b"1")
        peer.next(Op.TRANSACTION_END)
        peer.close()
        peer = fake.accept()
        serve_switch(peer, b"2")  # it was done after all
        peer.answer(peer.next(Op.TRANSACTION_END))
        assert switched.result() is True


@pytest.mark.parametrize(
    ("change", "op"),
    [
        (lambda client: xenbus.write_error(client, DIRECTORY, 22, "no image"), Op.WRITE),
        (lambda client: xenbus.remove(client, DIRECTORY), Op.RM),
    ],
    ids=["write", "remove"],
)
def test_single_changes_are_made_again(tmp_path: Path, change: Callable[[XenstoreClient], None], op: Op) -> None:
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path, reconnect=True) as client:
        done = Background(lambda: change(client))
        peer = fake.accept()
        first = peer.next(op)
        peer.close()
        peer = fake.accept()
        again = peer.next(op)
        assert again[3] == first[3]
        peer.answer(again)
        done.result()


def test_a_store_that_is_gone_for_good_ends_it(tmp_path: Path) -> None:
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path) as client:
        done = Background(lambda: xenbus.remove(client, DIRECTORY))
        peer = fake.accept()
        peer.next(Op.RM)
        peer.close()
        with pytest.raises(StoreGone):
            done.result()
