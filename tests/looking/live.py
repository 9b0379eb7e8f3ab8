# SPDX-License-Identifier: MIT
"""A real ring between two domains of a broker in this process, to be put into any state."""

import struct
import threading
from collections.abc import Callable
from typing import Self

import numpy as np

from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.looking import LiveRing, Looker
from paravirt.hypervisor.server import BrokerServer
from paravirt.looking.stuck import Verdict, verdicts
from paravirt.looking.view import RingView, view_of
from paravirt.ring.looking import RingLabel
from paravirt.ring.shared import BackRing, FrontRing

REQUEST = np.dtype([("id", "<u8"), ("value", "<u8")])
RESPONSE = np.dtype([("id", "<u8")])
DEADLINE_S = 20.0
NAME = "vtest/1/3"


class Live:
    """Both ends in this thread's hands."""

    def __init__(self) -> None:
        self._broker = BrokerServer()
        self._broker.start()
        self.dom0 = Hypervisor.from_fd(self._broker.connect(0))
        domid = self.dom0.create_domain("guest").domid
        self.guest = Hypervisor.from_fd(self._broker.connect(domid))
        self.looker = Looker(self.dom0)
        self._make(domid)

    def _make(self, domid: int) -> None:
        self.arena = self.guest.create_arena(0, 4)
        self.pages = self.arena.allocate(1)
        self.arena.grant(self.pages.gref)
        self.front_waiter, self.back_waiter = self.guest.waiter(), self.dom0.waiter()
        self.front_port = self.guest.alloc_unbound(self.front_waiter, 0)
        self.foreign = self.dom0.foreign_arena(domid, self.pages.gref)
        self.mapped = self.foreign.map_pages([self.pages.gref])
        self.back_port = self.dom0.bind_interdomain(self.back_waiter, domid, self.front_port.port)
        label = {
            "kind": "vtest",
            "device_id": 3,
            "protocol": "vtest",
            "granter_domid": domid,
            "refs": (self.pages.gref,),
        }
        front = RingLabel(domid=domid, peer_domid=0, port=self.front_port.port, **label)  # type: ignore[arg-type]
        back = RingLabel(domid=0, peer_domid=domid, port=self.back_port.port, **label)  # type: ignore[arg-type]
        self.front = FrontRing.create(
            self.pages.view, REQUEST, RESPONSE, port=self.front_port, record=self.guest.ring_record(front)
        )
        self.back = BackRing.attach(
            self.mapped.view, REQUEST, RESPONSE, port=self.back_port, record=self.dom0.ring_record(back)
        )
        self._sleepers: list[threading.Thread] = []
        self.front_port.take_pending()  # a bind sets the port pending
        self.back_port.take_pending()

    def push(self, n: int = 1, *, quietly: bool = False) -> None:
        """Requests with ids from the ring's index on."""
        requests = np.zeros(n, REQUEST)
        requests["id"] = np.arange(n)
        assert (self.front.push_quietly if quietly else self.front.push)(requests) == n

    def answer(self, n: int = 1) -> None:
        """The back end takes and answers."""
        assert self.back.take(np.zeros(n, REQUEST)) == n
        assert self.back.push(np.zeros(n, RESPONSE)) == n

    def write_index(self, word: int, value: int) -> None:
        """What a peer that lies would do: 0 req_prod, 1 req_event, 2 rsp_prod, 3 rsp_event."""
        struct.pack_into("<I", self.pages.view, 4 * word, value % 2**32)

    def find(self) -> LiveRing:
        return self.looker.find(NAME)

    def view(self) -> RingView:
        return view_of(self.looker, self.dom0, self.find())

    def verdicts(self) -> list[Verdict]:
        """From two views with nothing between them."""
        return verdicts(self.view(), self.view())

    def kinds(self) -> list[tuple[str, str]]:
        """(kind, who owes) of each."""
        return [(each.kind, each.owes) for each in self.verdicts()]

    def sleeping(self, wait: Callable[[], object]) -> threading.Thread:
        """A thread in `wait`, once its end sleeps. It is joined by `close`."""
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        self._sleepers.append(thread)
        deadline = threading.Event()
        for _ in range(int(DEADLINE_S * 1000)):
            view = self.view()
            if any(end and end.port and end.port.asleep for end in (view.front, view.back)):
                return thread
            deadline.wait(0.001)
        raise AssertionError("nobody sleeps")

    def close(self) -> None:
        self.looker.close()
        for waiter in (self.front_waiter, self.back_waiter):
            waiter.kick()
        for thread in self._sleepers:
            thread.join(DEADLINE_S)
        self.front.close()
        self.back.close()
        self.guest.close()
        self.dom0.close()
        self._broker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
