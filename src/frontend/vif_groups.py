# SPDX-License-Identifier: MIT
"""The groups whose frames a network device wants, as its backend is told.

Source: Xen public/io/netif.h, feature-multicast-control and feature-dynamic-multicast-control.
"""

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from paravirt.errors import InvalidRequest, ResourceLimit
from paravirt.protocol.netif import MAX_GROUPS, Mac

if TYPE_CHECKING:
    from paravirt.frontend.vif_queue import VifQueueEnd

BROADCAST = Mac(b"\xff" * 6)


class VifGroups:
    """What is asked for stays asked for, whatever backend comes. From any thread."""

    def __init__(self, wanted: Iterable[bytes] | None) -> None:
        """`wanted`: groups to begin with, and no others come; None: all do. `InvalidRequest`, `ResourceLimit`."""
        self.is_filtered = wanted is not None
        self._lock = threading.Lock()
        self._groups: dict[Mac, None] = {}  # in order
        for address in wanted or ():
            self._check_room(group := checked_group(address))
            self._groups[group] = None

    def all(self) -> tuple[Mac, ...]:
        return tuple(self._groups)

    def join(self, queue: "VifQueueEnd", address: bytes, deadline: float | None) -> None:
        """Harmless when repeated. As `change`; `ResourceLimit` where one has too many."""
        group = checked_group(address)
        with self._lock:
            if group in self._groups:
                return
            self._check_room(group)
            if not queue.wish(group, join=True, deadline=deadline):
                raise ResourceLimit(f"the backend takes no more groups than it has, not {group}")
            self._groups[group] = None

    def leave(self, queue: "VifQueueEnd", address: bytes, deadline: float | None) -> None:
        """Harmless when it is not joined."""
        group = checked_group(address)
        with self._lock:
            if group in self._groups:
                del self._groups[group]  # first: a backend that comes meanwhile is not told of it any more
                queue.wish(group, join=False, deadline=deadline)

    def _check_room(self, group: Mac) -> None:
        if group not in self._groups and len(self._groups) == MAX_GROUPS:
            raise ResourceLimit(f"a network device has {MAX_GROUPS} groups at most, so not {group} too")


def checked_group(address: bytes) -> Mac:
    """`InvalidRequest` for what is the address of no group that can be joined."""
    if len(address) != 6:
        raise InvalidRequest(f"an address has 6 bytes, not the {len(address)} of {address[:8].hex(':')}")
    group = Mac(address)
    if not group.is_group or group == BROADCAST:
        whose = "everybody" if group == BROADCAST else "one station"
        raise InvalidRequest(f"{group} is the address of {whose}, of no group")
    return group
