# SPDX-License-Identifier: MIT
"""A small cast for the broker's tables."""

from collections.abc import Callable

import pytest

from paravirt.hypervisor.rules import DOM0, Limits, Refused
from paravirt.hypervisor.state import State


def refused(code: int, call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as info:
        call()
    assert info.value.code == code, info.value
    return str(info.value)


class Story:
    """A state with Dom0 and two guests, a connection and a waiter each."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.state = State(limits)
        self.dom0 = self.state.connect(DOM0)
        self.guests = [
            self.state.create_domain(f"guest-{n}", isolated=True, max_pages=None, uid=None).domid for n in (1, 2)
        ]
        self.a, self.b = (self.state.connect(domid) for domid in self.guests)
        self.waiter = {number: self.new_waiter(number) for number in (self.dom0, self.a, self.b)}

    def new_waiter(self, connection: int) -> int:
        domain = self.state.domain_of(connection)
        return self.state.events.create_waiter(connection, domain.domid, domain.limits.max_waiters)[0].index

    def unbound(self, connection: int, remote: int) -> int:
        return self.state.alloc_unbound(connection, self.waiter[connection], remote).port.number

    def bound(self) -> tuple[int, int]:
        """A channel from guest 1 to Dom0: (guest's port, Dom0's port)."""
        theirs = self.unbound(self.a, DOM0)
        ours = self.state.bind_interdomain(self.dom0, self.waiter[self.dom0], self.guests[0], theirs).port
        return theirs, ours.number
