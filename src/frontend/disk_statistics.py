# SPDX-License-Identifier: MIT
"""What a block frontend counts, for each queue and in all."""

from dataclasses import dataclass, fields

from paravirt.ring.shared import RingStatistics


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """Counts of one queue since the disk was opened."""

    reads: int  # requests answered well
    writes: int  # with and without a barrier
    flushes: int
    discards: int
    read_bytes: int
    written_bytes: int
    errors: int  # requests answered with an error
    in_flight: int
    held_slots: int  # out of use: the backend kept a grant of an answered request
    waiting: int  # transfers that are not wholly sent
    merged: int  # pieces that went with the request of their neighbour
    copied_bytes: int  # between callers' memory and pages that are shared
    direct_bytes: int  # in buffers of the disk: not copied
    reissued: int  # requests sent again to a new backend
    ring: RingStatistics | None  # of the present ring; None while there is none


@dataclass(frozen=True, slots=True)
class DiskStatistics(QueueStatistics):
    """Counts since the disk was opened, of all queues together; `ring` is that of the first one."""

    reconnects: int  # times a new backend was connected
    queues: tuple[QueueStatistics, ...]


def total(queues: tuple[QueueStatistics, ...], reconnects: int) -> DiskStatistics:
    """Of at least one queue."""
    sums = {
        field.name: sum(getattr(queue, field.name) for queue in queues)
        for field in fields(QueueStatistics)
        if field.name != "ring"
    }
    return DiskStatistics(**sums, ring=queues[0].ring, reconnects=reconnects, queues=queues)
