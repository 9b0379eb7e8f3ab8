# SPDX-License-Identifier: MIT
"""A disk and a filter of one's own.

Run it for a host, a guest and its disks in one process. As daemons, from this directory:

    paravirt up --disk-driver pattern=pattern_disk:PatternDisk --disk-driver upper=pattern_disk:UpperFilter &
    paravirt domain create guest
    paravirt vbd attach guest 64M --driver pattern
    paravirt run guest -- python3 my_program.py
"""

import errno
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

import paravirt
from paravirt.backend.disks import Disk, own
from paravirt.backend.disks.base import parse_size
from paravirt.backend.disks.filters.base import Filter
from paravirt.backend.disks.spec import Opening


class PatternDisk(Disk):
    """`pattern,step=N:SIZE`: every eight bytes are their own place on the disk, times N."""

    read_only = True

    def __init__(self, size_bytes: int, step: int) -> None:
        self.size_bytes, self.step = size_bytes, step

    @classmethod
    def open(cls, opening: Opening) -> Self:
        step = opening.options.count("step") or 1
        opening.options.end()
        return cls(parse_size(opening.argument, "size of a pattern disk"), step)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        for buffer in buffers:
            places = np.arange(offset, offset + len(buffer), 8, dtype=">u8") * self.step
            buffer[:] = places.astype(">u8").tobytes()
            offset += len(buffer)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        raise OSError(errno.EROFS, "a pattern cannot be written")

    def flush(self) -> None:
        """Nothing to keep."""


class UpperFilter(Filter):
    """`upper:DISK`: what is read comes in upper case."""

    @classmethod
    def open(cls, opening: Opening) -> Self:
        opening.options.end()
        return cls(opening.below(opening.read_only))

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        super().preadv(buffers, offset)
        for buffer in buffers:
            buffer[:] = bytes(buffer).upper()


def main() -> None:
    own.register("pattern", PatternDisk)
    own.register("upper", UpperFilter)
    with paravirt.Host() as host, tempfile.TemporaryDirectory() as directory:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "64M", driver="pattern,step=2")
        image = Path(directory, "disk.img")
        image.write_bytes(b"hello from the image".ljust(4096, b"\0"))
        host.attach_disk(domain, str(image), driver="stats:upper:file", device="xvdb")
        with domain.open_disk("xvda") as disk:
            print(int.from_bytes(disk.pread(512, 4096)[8:16]))
        with domain.open_disk("xvdb") as disk:
            print(disk.pread(512, 0).rstrip(b"\0"))


if __name__ == "__main__":
    main()
