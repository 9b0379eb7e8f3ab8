# SPDX-License-Identifier: MIT
"""What several tests of backends need."""

from collections.abc import Iterator

import pytest

from .blkif_pair import Pair, make_pair


@pytest.fixture
def pair() -> Iterator[Pair]:
    with make_pair() as made:
        yield made
