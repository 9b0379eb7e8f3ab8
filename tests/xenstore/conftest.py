# SPDX-License-Identifier: MIT
"""Stories are told to both engines: the one in Python and the one in C."""

from collections.abc import Iterator

import pytest

from tests.xenstore import story


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The engine that `story.World` makes a hub of."""
    story.engine = request.param
    yield request.param
    story.engine = "python"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"tell", "World"} & vars(metafunc.module).keys() and "engine" not in metafunc.fixturenames:
        metafunc.fixturenames.insert(0, "engine")
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", getattr(metafunc.module, "ENGINES", ["python", "c"]), indirect=True)
