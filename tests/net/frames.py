# SPDX-License-Identifier: MIT
"""Frames for tests."""

BROADCAST = b"\xff" * 6
TYPE = b"\x88\xb5"  # for local experiments (IEEE 802)


def frame(to: bytes, source: bytes, content: bytes = b"", *, n_bytes: int = 60) -> bytes:
    """An Ethernet frame with `content`, filled up to `n_bytes`."""
    return (to + source + TYPE + content).ljust(n_bytes, b"\0")
