# SPDX-License-Identifier: MIT
"""A short run of the network's fuzz target, and mistakes that it has to find; `make fuzz-net` runs it at length."""

from pathlib import Path

import pytest

from tests.ring.fuzz import Change, build, run
from tests.xenstore.fuzz.build import has_clang

from .fuzz import NET

MISTAKES: dict[str, Change] = {
    "answers of any id": ("pv_netfront.c", "response->id >= front->tx->size || ", ""),
    "answers to nothing": ("pv_netfront.c", " || !front->in_flight[response->id]", ""),
    "packets that end behind their page": (
        "pv_netfront_rx.c",
        "response->status < 0 || (uint32_t)response->offset + (uint32_t)response->status > PAGE_BYTES",
        "response->status < 0",
    ),
    "queues of any number": ("pv_netctrl.c", "if (table[i] >= hash->n_queues)", "if (0)"),
    "too many queues to map": ("pv_netctrl.c", "from > hash->mapping_size || n > hash->mapping_size - from", "0"),
}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_a_hostile_peer_breaks_nothing(folder: Path) -> None:
    done = run(build(folder, clang=has_clang(), target=NET), 20_000)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, folder: Path) -> None:
    done = run(build(folder, clang=has_clang(), change=MISTAKES[mistake], target=NET), 1_000_000)
    assert done.returncode
    assert any(said in done.stderr for said in ("does not hold", "Sanitizer", "runtime error"))
