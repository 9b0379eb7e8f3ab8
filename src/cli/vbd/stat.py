# SPDX-License-Identifier: MIT
"""`paravirt vbd stat`."""

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import click

from paravirt.cli.context import Context, emit, emit_json, json_option, pass_context
from paravirt.cli.live import time_text
from paravirt.cli.ring.list import state
from paravirt.cli.ring.rates import SHARES
from paravirt.errors import NotFound, ParavirtError
from paravirt.host.disk_statistics import EndStatistics, LiveDisk, disks_of, is_named
from paravirt.host.vbd import VbdInfo, list_vbds
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.looking import BUCKETS_NS, LiveRing, Looker
from paravirt.protocol.vbd import device_number
from paravirt.testing.report import short

COLUMNS = {
    "disk": "Disk",
    "reads": "Reads",
    "writes": "Writes",
    "flushes": "Flushes",
    "discards": "Dis- cards",
    "read": "Bytes read",
    "written": "Bytes written",
    "errors": "Errors",
    "refused": "Re- fused",
    "in_flight": "In flight",
    "p50": "p50",
    "p99": "p99",
    "state": "State",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A disk that is attached, or used, or both."""

    domid: int
    domain: str
    device_id: int
    info: VbdInfo | None
    """What the toolstack knows; None: the store has no such disk, or does not answer."""
    live: LiveDisk | None
    """None: nobody uses it."""

    @property
    def disk(self) -> LiveDisk:
        """The disk; without queues when nobody uses it."""
        return self.live or LiveDisk(self.domid, self.domain, self.device_id, ())


@click.command()
@click.argument("disks", nargs=-1, metavar="[DISK]...")
@click.option("--queues", is_flag=True, help="A line for each queue.")
@json_option
@pass_context
def stat(context: Context, disks: tuple[str, ...], queues: bool, as_json: bool) -> None:
    """What each DISK (guest/xvda, vbd/1/51712), or each of this host, has done since it was connected.

    As its backend counts, or its frontend where no backend is seen; --json has both, each queue, and the counters of
    Linux' blkback by name. Percentiles are of the time from taking a request to answering it; one in 64 is measured.
    Nothing that is looked at is slowed.
    """
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        looker = stack.enter_context(Looker(hypervisor))
        found = rows(hypervisor, looker, attached(context))
        if disks:
            found = [choose(name, found) for name in disks]
    if as_json:
        emit_json([row_json(row) for row in found])
        return
    lines = [line for row in found for line in _lines(row, queues=queues)]
    emit(lines, COLUMNS, as_json=False, dense=True)


def attached(context: Context) -> list[VbdInfo]:
    """What the store says of disks; nothing, and a complaint, while it does not answer."""
    try:
        with context.store() as store:
            return list_vbds(store)
    except ParavirtError as error:
        click.echo(f"paravirt: {error}; only disks in use are shown", file=sys.stderr)
        return []


def rows(hypervisor: Hypervisor, looker: Looker, infos: Iterable[VbdInfo]) -> list[Row]:
    """All disks, by domain and number."""
    names = {info.domid: info.name for info in hypervisor.list_domains(dying=True)}
    live = {(disk.domid, disk.device_id): disk for disk in disks_of(looker.look(), names)}
    known = {(info.domid, device_number(info.device)): info for info in infos}
    return [
        Row(domid, names.get(domid, str(domid)), device_id, known.get((domid, device_id)), live.get((domid, device_id)))
        for domid, device_id in sorted({*live, *known})
    ]


def choose(name: str, there: list[Row]) -> Row:
    """The disk that a user named. Raises `NotFound`, which says what there is."""
    for row in there:
        if is_named(name, row.domid, row.domain, row.device_id):
            return row
    known = ", ".join(row.disk.name for row in there[:20]) or "none"
    raise NotFound(f"there is no disk {name!r}; there are: {known}")


def disk_state(rings: Iterable[LiveRing]) -> str:
    """The worst of its queues', in a word."""
    states = {state(ring) for ring in rings}
    return next((word for word in ("dead", "no front", "no back", "live") if word in states), "not in use")


def _lines(row: Row, *, queues: bool) -> list[dict[str, Any]]:
    disk = row.disk
    if not queues or len(disk.queues) < 2:
        return [_line(disk.name, disk)]
    return [_line(f"{disk.name} q{one.queues[0].end.queue}", one) for one in disk.split()]


def _line(name: str, disk: LiveDisk) -> dict[str, Any]:
    line: dict[str, Any] = {"disk": name, "state": disk_state(disk.queues)}
    end = disk.back or disk.front
    if end is None:
        return line
    done = end.counters
    counts = {"reads": done.reads, "writes": done.writes, "flushes": done.flushes, "discards": done.discards}
    more = {"read": done.read_bytes, "written": done.written_bytes, "errors": done.errors, "refused": done.refused}
    line.update({key: short(count) for key, count in {**counts, **more}.items()})
    line["in_flight"] = f"{end.in_flight}/{end.size}"
    line["p50"], line["p99"] = (time_text(end.percentile_ns(share)) for share in (0.5, 0.99))
    return line


def row_json(row: Row) -> dict[str, Any]:
    """All that is known."""
    disk, info = row.disk, row.info
    return {
        "disk": disk.name,
        "domid": disk.domid,
        "domain": disk.domain,
        "device": disk.device,
        "device_id": disk.device_id,
        "driver": info and info.driver,
        "spec": info and info.spec,
        "mode": info and info.mode,
        "size_bytes": info and info.size_bytes,
        "state": disk_state(disk.queues),
        **_ends_json(disk),
        "queues": [
            {
                "queue": one.queues[0].end.queue,
                "ring": one.queues[0].name,
                "place": one.queues[0].place,
                "state": state(one.queues[0]),
                **_ends_json(one),
            }
            for one in disk.split()
        ],
    }


def _ends_json(disk: LiveDisk) -> dict[str, Any]:
    back, front = disk.back, disk.front
    return {
        "statistics": back and back.blkback,
        "back": back and {"pids": [end.pid for end in disk.ends("back")], **end_json(back)},
        "front": front and {"pids": [end.pid for end in disk.ends("front")], **end_json(front)},
    }


def end_json(end: EndStatistics) -> dict[str, Any]:
    """All counters of an end."""
    return {
        **asdict(end.counters),
        **asdict(end.ring),
        "in_flight": end.in_flight,
        "size": end.size,
        "latency": {
            "count": sum(end.latency),
            **{name: end.percentile_ns(share) for name, share in SHARES.items()},
            "histogram_ns": [[BUCKETS_NS[bucket], n] for bucket, n in enumerate(end.latency) if n],
        },
    }
