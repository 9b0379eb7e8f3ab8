# SPDX-License-Identifier: MIT
"""What the questions about disks under a load share: ours and its peers, measured in turn, and held to marks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from paravirt.testing.bench.vbd.case import BlockCase, BlockSample
from paravirt.testing.bench.vbd.own import own_side
from paravirt.testing.bench.vbd.peers import open_peers
from paravirt.testing.bench.vbd.results import BlockResult, BlockSide, measure
from paravirt.testing.bench.vbd.target import target_of

from .harness import ALONE, Answer, Bench, Mark, NotHere, Pair, alone

QEMU = "qemu-storage-daemon"
IN_THOUSANDS = 1e3


def iops(sample: BlockSample) -> float:
    """I/Os a second."""
    return sample.iops


def cpu_us(sample: BlockSample) -> float:
    """CPU time of both ends for an I/O, µs; raises `NotHere` where the other end's is not known."""
    if sample.cpu_us is None:
        raise NotHere("the CPU time of the other side is not in sight")
    return sample.cpu_us


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of an answer."""

    what: str
    case: BlockCase
    peer: str
    """A peer of `paravirt bench vbd`, or `ALONE`."""
    mark: Mark
    value: Callable[[BlockSample], float] = iops
    unit: float = IN_THOUSANDS


def ask_disk(bench: Bench, spec: str, claims: Sequence[Claim]) -> Iterable[Answer]:
    """Measure a disk, all cases of which wait alike, beside the peers it is held against.

    A case's `n_bytes` of 0 is the whole disk. Raises `NotHere` for a peer that is missing, after all others.
    """
    target = target_of(spec)
    names = [name for name in dict.fromkeys(claim.peer for claim in claims) if name != ALONE]
    wait = claims[0].case.wait
    with (
        own_side(target, wait=wait, cpus=bench.cpus, writes=False) as own,
        open_peers(names, target, own.n_bytes, bench.cpus, bench.programs) as (peers, missing),
    ):
        sides: list[BlockSide] = [own, *peers]
        for case in dict.fromkeys(claim.case for claim in claims):
            whole = replace(case, n_bytes=own.n_bytes)
            ours, *theirs = measure(bench, sides, spec, whole)
            found = {result.side: result for result in theirs}
            for claim in claims:
                if claim.case == case and claim.peer not in missing:
                    yield _answer(bench, claim, ours, found.get(claim.peer))
    if missing:
        raise NotHere("; ".join(f"{name}: {why}" for name, why in missing.items()))


def _answer(bench: Bench, claim: Claim, ours: BlockResult, theirs: BlockResult | None) -> Answer:
    if theirs is None:
        values = [claim.value(one.sample) for one in ours.rounds]
        tag = ours.rounds[0].cache_line_ns
        return alone(claim.what, values, claim.mark, tag=tag, load=ours.outside_load, unit=claim.unit)
    pairs = [
        Pair(claim.value(mine.sample), claim.value(other.sample), mine.cache_line_ns)
        for mine, other in zip(ours.rounds, theirs.rounds, strict=True)
    ]
    return bench.compare(claim.what, claim.peer, pairs, ours.outside_load, claim.mark, unit=claim.unit)
