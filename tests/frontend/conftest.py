# SPDX-License-Identifier: MIT
"""A host with the device class that the tests of declared devices use."""

from collections.abc import Iterator

import pytest

import paravirt
from tests.echo_device import EchoBack, EchoFront

from .blkfront_stage import Stage, make_stage


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    EchoBack.held.clear()
    with paravirt.Host() as running:
        yield running


@pytest.fixture
def domain(host: paravirt.Host) -> paravirt.Domain:
    return host.create_domain("guest")


@pytest.fixture
def device(host: paravirt.Host, domain: paravirt.Domain) -> Iterator[EchoFront]:
    host.attach(domain, EchoBack)
    with domain.open(EchoFront) as opened:
        yield opened


@pytest.fixture
def stage() -> Iterator[Stage]:
    with make_stage() as made:
        yield made
