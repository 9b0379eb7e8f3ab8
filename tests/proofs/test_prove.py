# SPDX-License-Identifier: MIT
"""The quick ones of the proofs by ESBMC; `make proofs` runs all of them."""

import pytest

from tests.needs import missing

from .jobs import each
from .prove import CORE, PROOFS, SEEDED, esbmc, prove

QUICK = [name for name, proof in PROOFS.items() if proof.quick]


@pytest.fixture
def checker() -> str:
    return esbmc() or missing("ESBMC is not installed: pip install 'paravirt[proofs]'")


@pytest.mark.timeout(300)
def test_no_peer_value_breaks_it_and_seeded_bugs_are_found(
    checker: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def run(piece: tuple[tuple[str, str], bool]) -> tuple[bool, str]:
        name, seeded = piece
        return prove(checker, *name, tmp_path_factory.mktemp("prove"), seeded=seeded)

    pieces = [(name, False) for name in QUICK] + [(name, True) for name in QUICK if name in SEEDED]
    for (name, seeded), (holds, said) in each(run, pieces):
        assert holds != seeded, f"{name}{', bug seeded' if seeded else ''}: {said}"


def test_each_seeded_bug_still_fits_the_code() -> None:
    for (module, function), (good, bad) in SEEDED.items():
        assert (CORE / f"pv_{module}.c").read_text().count(good) == 1, f"{module} {function}"
        assert (module, function) in PROOFS
        assert good != bad
