# SPDX-License-Identifier: MIT
"""Many requests at once, over a client or in a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paravirt.errors import XenstoreError
from paravirt.xenstore.calls import StoreCalls, encode_string
from paravirt.xenstore.wire import Op

Request = tuple[Op, bytes, str]
"""Operation, payload, and the path that errors name."""


def fetch(store: StoreCalls, requests: Iterable[Request]) -> list[bytes | XenstoreError]:
    """The replies to `requests`, in their order; an error reply is a value here."""
    replies: list[bytes | XenstoreError] = []
    for op, payload, path in requests:
        try:
            replies.append(store.request(op, payload, path))
        except XenstoreError as error:
            replies.append(error)
    return replies


def strict(replies: Iterable[bytes | XenstoreError]) -> list[bytes]:
    """All replies; raises the first error among them."""
    good = []
    for reply in replies:
        if isinstance(reply, XenstoreError):
            raise reply
        good.append(reply)
    return good


def split(payload: bytes) -> list[str]:
    """The strings of a payload, each with its NUL."""
    return [word.decode() for word in payload.split(b"\0")[:-1]]


def ask(op: Op, path: str) -> Request:
    """A request that has nothing but a path."""
    return op, encode_string(path), path


def set_value(path: str, value: bytes) -> Request:
    return Op.WRITE, encode_string(path) + value, path


def set_permissions(path: str, words: Sequence[str]) -> Request:
    return Op.SET_PERMS, encode_string(path) + b"".join(map(encode_string, words)), path
