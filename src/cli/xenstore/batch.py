# SPDX-License-Identifier: MIT
"""Many requests at once, over a client or in a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from paravirt.errors import XenstoreError
from paravirt.xenstore.client import Transaction, XenstoreClient
from paravirt.xenstore.operations import Call

Store = XenstoreClient | Transaction
T = TypeVar("T")


def fetch(store: Store, calls: Iterable[Call[T]]) -> list[T | XenstoreError]:
    """What the calls come to, in their order; an error reply is a value here."""
    with store.pipeline() as pipeline:
        results = [pipeline.call(call) for call in calls]
    outcomes: list[T | XenstoreError] = []
    for result in results:
        try:
            outcomes.append(result.value)
        except XenstoreError as error:
            outcomes.append(error)
    return outcomes


def perform(store: Store, calls: Iterable[Call[T]]) -> list[T]:
    """What the calls return, in their order; raises the first error among them, when all are done."""
    values = []
    for outcome in fetch(store, calls):
        if isinstance(outcome, XenstoreError):
            raise outcome
        values.append(outcome)
    return values


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
