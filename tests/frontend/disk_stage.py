# SPDX-License-Identifier: MIT
"""A host in this process, and disks whose content a test knows."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paravirt
from paravirt.frontend.vbd import Disk

SIZE = 4 << 20
PAGE = 4096


@dataclass
class Opened:
    """A disk of a guest and its image."""

    host: paravirt.Host
    disk: Disk
    image: Path

    @property
    def content(self) -> bytes:
        return self.image.read_bytes()

    @property
    def device(self) -> Any:
        """The backend's half."""
        (device,) = self.host._backend._devices.values()
        return device


@contextmanager
def opened(tmp_path: Path, *, max_queues: int | None = None, **options: Any) -> Iterator[Opened]:
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(7).randbytes(SIZE))
    with paravirt.Host(max_queues=max_queues) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, str(image))
        with domain.open_disk("xvda", **options) as disk:
            yield Opened(host, disk, image)
