# SPDX-License-Identifier: MIT
"""What the questions about network devices share: ours and its peers, measured in turn, and held to marks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paravirt.testing.bench.vif.case import VifCase, VifSample
from paravirt.testing.bench.vif.own import own_side
from paravirt.testing.bench.vif.peers import open_peers
from paravirt.testing.bench.vif.results import VifResult, measure

from .harness import ALONE, Answer, Bench, Mark, NotHere, Pair, alone

IN_MILLIONS = 1e6


def pps(sample: VifSample) -> float:
    """Packets a second."""
    return sample.pps


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of an answer."""

    what: str
    case: VifCase
    peer: str
    """A peer of `paravirt bench vif`, or `ALONE`."""
    mark: Mark
    value: Callable[[VifSample], float] = pps
    unit: float = IN_MILLIONS


def ask_vif(bench: Bench, claims: Sequence[Claim]) -> Iterable[Answer]:
    """Measure cases that all wait alike and have the same rings beside the peers they are held against.

    Raises `NotHere` for a peer that is missing, after all others.
    """
    names = [name for name in dict.fromkeys(claim.peer for claim in claims) if name != ALONE]
    with own_side(claims[0].case, bench.cpus) as own:
        peers, missing = open_peers(names, bench.cpus, bench.programs)
        for case in dict.fromkeys(claim.case for claim in claims):
            wanted = {claim.peer for claim in claims if claim.case == case}
            ours, *theirs = measure(bench, [own, *(peer for peer in peers if peer.name in wanted)], case)
            found = {result.side: result for result in theirs}
            for claim in claims:
                if claim.case == case and claim.peer not in missing:
                    yield _answer(bench, claim, ours, found.get(claim.peer))
    if missing:
        raise NotHere("; ".join(f"{name}: {why}" for name, why in missing.items()))


def _answer(bench: Bench, claim: Claim, ours: VifResult, theirs: VifResult | None) -> Answer:
    if theirs is None:
        values = [claim.value(one.sample) for one in ours.rounds]
        tag = ours.rounds[0].cache_line_ns
        return alone(claim.what, values, claim.mark, tag=tag, load=ours.outside_load, unit=claim.unit)
    pairs = [
        Pair(claim.value(mine.sample), claim.value(other.sample), mine.cache_line_ns)
        for mine, other in zip(ours.rounds, theirs.rounds, strict=True)
    ]
    return bench.compare(claim.what, claim.peer, pairs, ours.outside_load, claim.mark, unit=claim.unit)
