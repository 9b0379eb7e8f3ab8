# SPDX-License-Identifier: MIT
"""A short run of the fuzz target, and mistakes that it has to find; `make fuzz-ring` runs it at length."""

from pathlib import Path

import pytest

from tests.xenstore.fuzz.build import has_clang

from .fuzz import Change, build, run

MISTAKES: dict[str, Change] = {
    "no check": ("pv_ring.c", "pv_ring_prod_overflow(ring, peer) || ", ""),
    "read twice": ("pv_ring.c", "return peer - ring->cons;", "return pv_load_relaxed(ring->peer_prod) - ring->cons;"),
    "stream, no check": ("pv_stream.c", "if (prod - cons > size) {", "if (0) {"),
    "grant, no check": ("pv_grant.c", "first ? check_entry(mapper, entry, read_only) : PV_GNTST_OKAY", "PV_GNTST_OKAY"),
    "blkif, no range": ("pv_blkif.c", "if (sector > limits->sectors || sectors > limits->sectors - sector)", "if (0)"),
    "blkif, no room": ("pv_blkif.c", "if (wanted <= pool->capacity)", "if (1)"),
    "blkif, too many": ("pv_blkif.c", " || *n > most)", " || *n > 2 * most)"),
    "event, slot not cut": ("pv_event.c", "return (slot % PV_INBOX_SLOTS) / 64;", "return slot / 64;"),
    "log, no check": ("pv_look_read.c", "n_bytes > PV_RING_MAX_BYTES || ", ""),
    "log, read twice": ("pv_look_read.c", "(uint64_t)entry->n *", "(uint64_t)pv_load_relaxed(&found->n) *"),
    "log, place not cut": ("pv_look_read.c", " || position % 64", ""),
    "record, no check": ("pv_look_read.c", "copy->n_refs > PV_LOOK_REFS", "0"),
    "record, no end of a name": ("pv_look_read.c", "copy->protocol[PV_LOOK_NAME_BYTES - 1] = 0", "0"),
}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_a_hostile_peer_breaks_nothing(folder: Path) -> None:
    done = run(build(folder, clang=has_clang()), 20_000)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, folder: Path) -> None:
    done = run(build(folder, clang=has_clang(), change=MISTAKES[mistake]), 1_000_000)
    assert done.returncode
    assert any(said in done.stderr for said in ("does not hold", "Sanitizer", "runtime error"))
