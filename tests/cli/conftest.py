# SPDX-License-Identifier: MIT
"""What the tests of `paravirt xenstore` share."""

from collections.abc import Iterator

import pytest

from paravirt.xenstore.server import XenstoreServer
from tests.cli.store import StandIn


@pytest.fixture
def context() -> Iterator[StandIn]:
    with XenstoreServer() as server:
        server.start()
        yield StandIn(server)
