# SPDX-License-Identifier: MIT
"""Any disk beside an array of bytes: both are told the same, and read the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from paravirt.backend.disks import Disk

Step = tuple[str, int, int, int]  # operation, first sector, sectors, seed of the data


def steps(n_sectors: int, *operations: str, longest: int = 24) -> st.SearchStrategy[list[Step]]:
    """Things to do to a disk of `n_sectors`."""

    def place(operation: str) -> st.SearchStrategy[Step]:
        return st.tuples(st.integers(0, n_sectors - 1), st.integers(1, longest), st.integers(0, 255)).map(
            lambda drawn: (operation, drawn[0], min(drawn[1], n_sectors - drawn[0]), drawn[2])
        )

    return st.lists(st.sampled_from(operations).flatmap(place), max_size=12)


def data_of(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)


def read(disk: Disk, *lengths: int, at: int) -> bytes:
    """What stands at `at`, read into buffers of `lengths`."""
    buffers = [bytearray(length) for length in lengths]
    disk.preadv([memoryview(buffer) for buffer in buffers], at)
    return b"".join(buffers)


def write(disk: Disk, data: bytes, *, at: int) -> None:
    """In two pieces, as a guest's pages come."""
    middle = len(data) // 1024 * 512
    view = memoryview(data)
    disk.pwritev([piece for piece in (view[:middle], view[middle:]) if piece], at)


def follow(disk: Disk, todo: list[Step], model: bytearray, reopen: Callable[[], Disk] | None = None) -> Disk:
    """Do all steps to `disk` and `model`, compare each read and in the end everything. Gives back the disk, perhaps
    another one: "reopen" is a step, too. What is discarded must read as zeroes here.
    """
    for operation, first, n, seed in todo:
        offset, length = first * disk.sector_size, n * disk.sector_size
        place = slice(offset, offset + length)
        if operation == "write":
            model[place] = data = data_of(seed, length)
            write(disk, data, at=offset)
        elif operation == "read":
            assert read(disk, *_cut(length, seed), at=offset) == model[place]
        elif operation == "discard":
            model[place] = bytes(length)
            disk.discard(offset, length)
        elif operation == "zeroes":
            model[place] = bytes(length)
            disk.write_zeroes(offset, length)
        elif operation == "flush":
            disk.flush()
        else:
            assert reopen is not None
            disk.close()
            disk = reopen()
    assert read(disk, disk.size_bytes, at=0) == model
    return disk


def _cut(length: int, seed: int) -> list[int]:
    first = seed * 512 % length
    return [piece for piece in (first, length - first) if piece]


def raises(call: Callable[..., Any], *arguments: Any) -> int | None:
    """The errno with which a call of a disk fails; None when it does not."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None
