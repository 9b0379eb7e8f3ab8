# SPDX-License-Identifier: MIT
"""A broker in this process, over both memory providers, with and without isolation (so with both kinds of doorbell)."""

import logging
from collections.abc import Callable, Iterator

import pytest

from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.server import BrokerServer
from paravirt.ring.memory import Provider


class World:
    """A broker, Dom0, and connections of domains that are closed at the end."""

    def __init__(self, broker: BrokerServer, *, isolated: bool, provider: Provider) -> None:
        self.broker = broker
        self.isolated = isolated
        self.provider: Provider = "memfd" if isolated else provider
        self._opened: list[Hypervisor] = []
        self.dom0 = self.connect(0)

    def connect(self, domid: int) -> Hypervisor:
        """One more process of a domain."""
        made = Hypervisor.from_fd(self.broker.connect(domid))
        self._opened.append(made)
        return made

    def guest(self, name: str = "guest") -> Hypervisor:
        """A process of a new domain."""
        return self.connect(self.dom0.create_domain(name, isolated=self.isolated).domid)

    def close(self) -> None:
        for opened in reversed(self._opened):
            opened.close()
        self.broker.stop()


@pytest.fixture(autouse=True)
def no_defect(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does, the broker takes it for no mistake of its own."""
    caplog.set_level(logging.INFO)
    yield
    assert not [record for record in caplog.records if "defect" in record.getMessage()]


def settle(world: World, connections: int = 2) -> None:
    """Until the broker has noticed the end of all connections but these: Dom0's and one guest's."""
    while world.dom0.info().connections > connections:
        pass


@pytest.fixture(params=[("posix", False), ("memfd", False), ("posix", True)], ids=["posix", "memfd", "isolated"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    provider, isolated = request.param
    broker = BrokerServer(provider=provider)
    broker.start()
    made = World(broker, isolated=isolated, provider=provider)
    yield made
    made.close()


@pytest.fixture
def isolated_world() -> Iterator[World]:
    """For what is claimed of isolated domains only."""
    broker = BrokerServer()
    broker.start()
    made = World(broker, isolated=True, provider="posix")
    yield made
    made.close()


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    """For tests that choose the broker's arguments."""
    worlds: list[World] = []

    def make(*, isolated: bool = True, provider: Provider = "posix", **options: object) -> World:
        broker = BrokerServer(provider=provider, **options)  # type: ignore[arg-type]
        broker.start()
        worlds.append(World(broker, isolated=isolated, provider=provider))
        return worlds[-1]

    yield make
    for each in worlds:
        each.close()
