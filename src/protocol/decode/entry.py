# SPDX-License-Identifier: MIT
"""One decoded entry, what every decoder does, and the one for messages of which nothing is known."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEX_BYTES = 32
"""Of an unknown message that are shown as text."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one entry says."""

    kind: str
    """In lower case: the operation, or what sort of entry it is."""
    id: int | None = None
    status: int | None = None
    """Of a response."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The rest, of numbers, texts, lists and mappings."""
    grefs: tuple[int, ...] = ()
    """References of the pages that a request carries."""
    wrong: tuple[str, ...] = ()
    """What no well-behaved peer would have written."""

    def to_json(self) -> dict[str, Any]:
        """Of plain values; what an entry does not have is left out."""
        every: dict[str, Any] = {
            "kind": self.kind,
            "id": self.id,
            "status": self.status,
            **({"fields": dict(self.fields)} if self.fields else {}),
            **({"grefs": list(self.grefs)} if self.grefs else {}),
            **({"wrong": list(self.wrong)} if self.wrong else {}),
        }
        return {key: value for key, value in every.items() if value is not None}

    def __str__(self) -> str:
        words = [self.kind]
        words += [f"id {self.id}"] if self.id is not None else []
        words += [f"status {self.status}"] if self.status is not None else []
        words += [f"{name} {_text(value)}" for name, value in self.fields.items()]
        return printable(" ".join(words) + "".join(f" [{what}]" for what in self.wrong))


def printable(text: str) -> str:
    """For a terminal: what a peer wrote moves no cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "/".join(_text(part) for part in value.values())
    if isinstance(value, list | tuple):
        return "(" + " ".join(map(_text, value)) + ")"
    return str(value)


class Decoder(ABC):
    """Of one direction of one ring; told entries in their order."""

    @abstractmethod
    def request(self, message: bytes) -> Entry:
        """Never raises, whatever the bytes are."""

    @abstractmethod
    def response(self, message: bytes) -> Entry:
        """Never raises, whatever the bytes are."""


class HexDecoder(Decoder):
    """Of messages whose layout is not known."""

    def request(self, message: bytes) -> Entry:
        return Entry("request", fields={"bytes": hexadecimal(message)})

    def response(self, message: bytes) -> Entry:
        return Entry("response", fields={"bytes": hexadecimal(message)})


def hexadecimal(message: bytes) -> str:
    """The first bytes, in groups of four; how many more there are."""
    shown = message[:HEX_BYTES].rstrip(b"\0") or message[:1]
    rest = message[len(shown) :]
    more = f" and {len(rest)} {'more' if any(rest) else 'zeros'}" if rest else ""
    return shown.hex(" ", -4) + more


def fitted(message: bytes, n_bytes: int) -> tuple[bytes, tuple[str, ...]]:
    """A message of just that size, with zeros for what is missing, and what is wrong if something is."""
    if len(message) >= n_bytes:
        return message[:n_bytes], ()
    return message.ljust(n_bytes, b"\0"), (f"only {len(message)} of {n_bytes} bytes",)
