# SPDX-License-Identifier: MIT
"""A lazy transaction can see parent and child as they were at different times: it conflicts, and nothing breaks."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from paravirt.errors import XenstoreError
from paravirt.xenstore.client import Transaction, XenstoreClient
from paravirt.xenstore.client import TransactionConflict as Conflict
from paravirt.xenstore.server import XenstoreServer


@pytest.fixture
def clients() -> Iterator[tuple[XenstoreClient, XenstoreClient]]:
    with XenstoreServer().start() as server:
        with XenstoreClient.from_socket(server.connect()) as one, XenstoreClient.from_socket(server.connect()) as two:
            for path in ("/a/b/c", "/a/d"):
                one.write(path, "x")
            yield one, two


Look = Callable[[Transaction], object]


@pytest.mark.parametrize(
    "look",
    [
        lambda tx: tx.read("/a/b/c"),
        lambda tx: tx.ls("/a/b"),
        lambda tx: (tx.ls("/a"), tx.read("/a/b/c")),
        lambda tx: (tx.ls("/a"), tx.ls("/a/b")),
    ],
)
@pytest.mark.parametrize("meanwhile", ["/a/b/c", "/a/b", "/a"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tx: tx.rm("/a/b/c"),
        lambda tx: tx.rm("/a/b"),
        lambda tx: tx.rm("/a"),
        lambda tx: tx.write("/a/b/c", "y"),
        lambda tx: tx.mkdir("/a/b/e"),
    ],
)
def test_conflict(clients: tuple[XenstoreClient, XenstoreClient], look: Look, meanwhile: str, change: Look) -> None:
    one, two = clients
    transaction = one.transaction()
    look(transaction)
    two.rm(meanwhile)
    with suppress(XenstoreError):  # ENOENT is a right answer too
        change(transaction)
    with pytest.raises(Conflict):
        transaction.commit()
    assert two.ls("/") == ["tool"] if meanwhile == "/a" else "d" in two.ls("/a")


def test_transact_tries_again(clients: tuple[XenstoreClient, XenstoreClient]) -> None:
    one, two = clients
    seen: list[list[str]] = []

    def function(transaction: Transaction) -> None:
        seen.append(transaction.ls("/a/b"))
        if len(seen) == 1:
            two.rm("/a/b/c")
        transaction.rm("/a/b")

    one.transact(function)
    assert seen == [["c"], []]
    assert two.ls("/a") == ["d"]
