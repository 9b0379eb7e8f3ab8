# SPDX-License-Identifier: MIT
"""What can be at a port of a bridge beside devices and the kernel: nothing, or a file. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from paravirt.errors import InvalidRequest

LinkKind = Literal["null", "pcap", "replay"]
_KINDS: tuple[LinkKind, ...] = get_args(LinkKind)
Timing = Literal["fast", "recorded"]
MAX_RATE = 1_000_000_000
MAX_LOOPS = 1 << 32
MAX_SNAPLEN = 262_144
_MAX_PATH = 4096
_FIELDS: dict[LinkKind, tuple[str, ...]] = {
    "null": (),
    "pcap": ("file", "format", "snaplen"),
    "replay": ("file", "timing", "rate", "loops"),
}


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """null: takes everything and gives nothing. pcap: what goes to the port is written to a file. replay: frames of a
    file come from the port; what goes to it is let fall.
    """

    kind: LinkKind
    file: str = ""
    """An absolute path."""
    format: Literal["pcapng", "pcap"] = "pcapng"
    snaplen: int = 0
    """Bytes of a frame that are written; 0: all."""
    timing: Timing = "fast"
    """recorded: with the pauses of the file."""
    rate: int = 0
    """Frames a second; 0: as `timing` says."""
    loops: int = 1
    """How often; 0: for ever."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidRequest(f"a link is {str(self.kind)[:40]!r}, not one of {', '.join(_KINDS)}")
        if self.kind != "null":
            is_path = isinstance(self.file, str) and self.file.startswith("/") and "\0" not in self.file
            if not is_path or len(self.file) > _MAX_PATH:
                raise InvalidRequest(f"the file of a {self.kind} link is {str(self.file)[:40]!r}, not an absolute path")
        if self.format not in ("pcapng", "pcap"):
            raise InvalidRequest(f"format is {str(self.format)[:40]!r}, not pcapng or pcap")
        if self.timing not in get_args(Timing):
            raise InvalidRequest(f"timing is {str(self.timing)[:40]!r}, not fast or recorded")
        for name, most in (("snaplen", MAX_SNAPLEN), ("rate", MAX_RATE), ("loops", MAX_LOOPS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise InvalidRequest(f"{name} is {str(value)[:40]!r}, not a number from 0 to {most}")
        if self.rate and self.timing == "recorded":
            raise InvalidRequest("frames are replayed at a rate or as they were recorded, not both")

    def to_json(self) -> dict[str, Any]:
        """With what is meant for its kind alone."""
        said = asdict(self)
        return {"kind": self.kind, **{name: said[name] for name in _FIELDS[self.kind]}}

    @classmethod
    def from_json(cls, name: str, said: Mapping[str, Any]) -> Self:
        """Raises `InvalidRequest`, which names the port."""
        kind = said.get("kind")
        if kind not in _KINDS:
            raise InvalidRequest(f"{name}: a link is {str(kind)[:40]!r}, not one of {', '.join(_KINDS)}")
        if unknown := sorted(set(said) - {"kind", *_FIELDS[kind]}):
            raise InvalidRequest(f"{name}: a {kind} link has no {str(unknown[0])[:40]}")
        try:
            return cls(**said)
        except InvalidRequest as error:
            raise InvalidRequest(f"{name}: {error}") from None
