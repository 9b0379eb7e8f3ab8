# SPDX-License-Identifier: MIT
"""What the disks of a host do, queue by queue, read from outside while they run.

The rings of a disk are found as all live rings are (`hypervisor/looking.py`); here those of one disk are put together,
and what its two ends have counted is added up.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property, reduce
from operator import add
from typing import Any, Literal

from paravirt.errors import InvalidRequest
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.looking import LiveRing, LookedEnd, Looker, percentile_ns
from paravirt.protocol.blkif import SECTOR_BYTES
from paravirt.protocol.vbd import device_name
from paravirt.ring.blkif_counters import BlkifCounters
from paravirt.ring.ring_statistics import RingStatistics

KIND = "vbd"
Which = Literal["front", "back"]

_RING_NAMES = tuple(field.name for field in fields(RingStatistics))


@dataclass(frozen=True, slots=True)
class EndStatistics:
    """One end of a queue; or that end of all queues of a disk (`+`)."""

    counters: BlkifCounters
    """Requests and bytes. A frontend's are counted since the disk was opened, a backend's since it was connected."""
    ring: RingStatistics
    """Of the present rings."""
    latency: tuple[int, ...]
    """Requests by latency, in the buckets of `hypervisor.looking.BUCKETS_NS`: one in 64 is measured. Backend: from
    taking to answering; frontend: from sending to being answered."""
    in_flight: int
    """Requests without an answer, now."""
    size: int
    """Requests that fit the ring."""

    @classmethod
    def of(cls, end: LookedEnd) -> "EndStatistics":
        """Of one end, as it says."""
        return cls(end.blkif or BlkifCounters(), end.statistics, end.latency, end.outstanding, end.size)

    def __add__(self, other: "EndStatistics") -> "EndStatistics":
        return EndStatistics(
            self.counters + other.counters,
            RingStatistics(*(getattr(self.ring, name) + getattr(other.ring, name) for name in _RING_NAMES)),
            tuple(map(add, self.latency, other.latency)),
            self.in_flight + other.in_flight,
            self.size + other.size,
        )

    def percentile_ns(self, share: float) -> int | None:
        """Upper bound of the latency that a `share` (0 to 1) of the measured requests kept to; None: none was."""
        return percentile_ns(self.latency, share)

    @property
    def blkback(self) -> dict[str, int]:
        """The counters by the names, and with the meaning, of Linux' blkback in
        /sys/bus/xen-backend/devices/vbd-DOMID-NUMBER/statistics, which know only requests that were let through.

        `oo_req` is there how often requests found no room: here those that found no memory.
        """
        done = self.counters
        return {
            "oo_req": done.no_memory,
            "rd_req": done.reads,
            "wr_req": max(0, done.writes - done.barriers),
            "f_req": done.flushes + done.barriers,
            "ds_req": done.discards,
            "rd_sect": done.read_bytes // SECTOR_BYTES,
            "wr_sect": done.written_bytes // SECTOR_BYTES,
        }


@dataclass(frozen=True)
class LiveDisk:
    """A disk that a frontend, a backend or both have a ring for."""

    domid: int
    """Whose disk it is."""
    domain: str
    """The name of that domain; its number when it has gone."""
    device_id: int
    queues: tuple[LiveRing, ...]
    """By number."""

    @property
    def device(self) -> str:
        """As the domain calls it: xvda; its number when that is none of a disk."""
        return _device(self.device_id)

    @property
    def name(self) -> str:
        """Domain and device: guest/xvda."""
        return f"{self.domain}/{self.device}"

    def ends(self, which: Which) -> Iterator[LookedEnd]:
        """That end of each queue that can be seen."""
        return (ring.ends[which] for ring in self.queues if which in ring.ends)

    def split(self) -> "list[LiveDisk]":
        """Each queue as a disk of its own."""
        return [LiveDisk(self.domid, self.domain, self.device_id, (ring,)) for ring in self.queues]

    @cached_property
    def back(self) -> EndStatistics | None:
        """Of all queues; None when no backend is seen."""
        return self._sum("back")

    @cached_property
    def front(self) -> EndStatistics | None:
        return self._sum("front")

    def _sum(self, which: Which) -> EndStatistics | None:
        each = [EndStatistics.of(end) for end in self.ends(which)]
        return reduce(add, each) if each else None


def look_at_disks(looker: Looker) -> list[LiveDisk]:
    """All disks now, by domain and number. Raises as `Looker.look`."""
    names = {info.domid: info.name for info in looker.hypervisor.list_domains(dying=True)}
    return disks_of(looker.look(), names)


def disks_of(rings: Iterable[LiveRing], names: dict[int, str]) -> list[LiveDisk]:
    """The disks among live rings. `names`: of domains."""
    found: dict[tuple[int, int], list[LiveRing]] = {}
    for ring in rings:
        if ring.end.kind == KIND:
            found.setdefault((ring.domid, ring.end.device_id), []).append(ring)
    return [
        LiveDisk(domid, names.get(domid, str(domid)), device_id, tuple(sorted(queues, key=_queue)))
        for (domid, device_id), queues in sorted(found.items())
    ]


def disk_statistics(hypervisor: Hypervisor) -> list[LiveDisk]:
    """One look at all disks of a host, as Dom0. Who looks again and again keeps a `Looker`."""
    with Looker(hypervisor) as looker:
        return look_at_disks(looker)


def is_named(text: str, domid: int, domain: str, device_id: int) -> bool:
    """Whether a user means this disk: guest/xvda, 1/51712, vbd/1/51712."""
    owner, _, device = text.removeprefix(f"{KIND}/").rpartition("/")
    return owner in (domain, str(domid)) and device in (_device(device_id), str(device_id))


def _queue(ring: LiveRing) -> Any:
    return ring.end.queue, ring.refs


def _device(device_id: int) -> str:
    with suppress(InvalidRequest):
        return device_name(device_id)
    return str(device_id)
