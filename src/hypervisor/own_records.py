# SPDX-License-Identifier: MIT
"""Where a process keeps the ends of its rings, so that Dom0 can look at them (`looking` is the other side)."""

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from paravirt.errors import ParavirtError
from paravirt.hypervisor.messages import Op
from paravirt.ring.looking import Record, Records, RingLabel

if TYPE_CHECKING:
    from paravirt.hypervisor.link import Link


class OwnRecords:
    """The statistics objects of this process, made when they are needed. Thread-safe."""

    def __init__(self, link: "Link") -> None:
        self._link = link
        self._lock = threading.Lock()
        self._objects: list[Records] = []

    def claim(self, label: RingLabel) -> Record | None:
        """A record; None when the broker is gone or gives no more memory."""
        with self._lock:
            for records in self._objects:
                if record := records.claim(label):
                    return record
            with suppress(ParavirtError, OSError):
                self._objects.append(self._make())
                return self._objects[-1].claim(label)
        return None

    def close(self) -> None:
        """The memory goes with the last ring in it."""
        with self._lock:
            self._objects = []

    def _make(self) -> Records:
        with self._link.call(Op.LOOK_CREATE) as reply:
            fd = reply.take_fd()
        try:
            return Records(fd)
        finally:
            os.close(fd)
