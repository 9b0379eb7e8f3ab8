# SPDX-License-Identifier: MIT
"""The quick ones of the proofs by ESBMC; `make proofs` runs all of them."""

from pathlib import Path

import pytest

from tests.needs import missing

from .prove import PROOFS, SEEDED, esbmc, prove

QUICK = [name for name, proof in PROOFS.items() if proof.quick]


@pytest.fixture
def checker() -> str:
    return esbmc() or missing("ESBMC is not installed: pip install 'paravirt[proofs]'")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", QUICK, ids=" ".join)
def test_no_peer_value_breaks_it(name: tuple[str, str], checker: str, tmp_path: Path) -> None:
    holds, said = prove(checker, *name, tmp_path)
    assert holds, said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in QUICK if name in SEEDED], ids=" ".join)
def test_a_seeded_bug_is_found(name: tuple[str, str], checker: str, tmp_path: Path) -> None:
    holds, _ = prove(checker, *name, tmp_path, seeded=True)
    assert not holds
