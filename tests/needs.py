# SPDX-License-Identifier: MIT
"""The one rule for tests of programs that are not ours: where CI=true a missing one is a failure, elsewhere a skip."""

import os
from typing import NoReturn

import pytest


def own_environment() -> dict[str, str]:
    """For a program that is not ours: without the sanitizers that this process may have been started with."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def missing(reason: str, *, module: bool = False) -> NoReturn:
    """Skip, or fail in CI, as something is not on this machine. `module`: called while a module is collected."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=module)
