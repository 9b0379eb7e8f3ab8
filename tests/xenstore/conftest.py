# SPDX-License-Identifier: MIT
"""Stories are told to both engines: the one in Python and the one in C."""

from collections.abc import Iterator

import pytest

from tests.xenstore import story


@pytest.fixture(autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The engine that `story.World` makes a hub of."""
    story.engine = getattr(request, "param", "python")
    yield story.engine
    story.engine = "python"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"tell", "World"} & vars(metafunc.module).keys() or "engine" in metafunc.definition.obj.__code__.co_varnames:
        metafunc.parametrize("engine", getattr(metafunc.module, "ENGINES", ["python", "c"]), indirect=True)
