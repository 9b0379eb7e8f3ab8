# SPDX-License-Identifier: MIT
"""A queue of a network device in one process without a host: rings, pages and ports, and what stands at each end."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paravirt.protocol import netif
from paravirt.ring.event import EventPort, from_half, make_pair
from paravirt.ring.grant import Granter, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import Mapping
from paravirt.ring.netif import Feature, NetBack, NetFront, Takes
from paravirt.ring.shared import BackRing, FrontRing

from ..backend.blkif_pair import shared

BASE = 8
SLOTS = 256
TX_PAGE, RX_PAGE = 0, SLOTS  # of the arena, the first of each ring
PAGES = 2 * SLOTS
ALL = Feature.SG | Feature.GSO4 | Feature.GSO6 | Feature.CSUM6 | Feature.RX_NOTIFY

EVERYTHING = Takes.SG | Takes.GSO4 | Takes.GSO6 | Takes.CSUM6


@dataclass
class NetStage:
    """Both ends of two rings over one arena. A test drives the frontend's rings by hand, or makes a `NetFront`."""

    granter: Granter
    mapper: Mapper
    data: Mapping
    tx: FrontRing
    rx: FrontRing
    tx_back: BackRing
    rx_back: BackRing
    front_port: EventPort
    back_port: EventPort
    tx_memory: Mapping
    rx_memory: Mapping
    entries: Mapping
    stack: ExitStack
    posted: int = 0
    _ids: dict[int, int] = field(default_factory=dict)

    def back(self, features: Feature = ALL, **options: float) -> NetBack:
        back = NetBack(self.tx_back, self.rx_back, self.mapper, features, **options)
        self.stack.callback(back.close)
        return back

    def front(self, features: Takes = EVERYTHING) -> NetFront:
        """With all pages granted, and none posted yet."""
        self.granter.access_many(range(RX_PAGE), read_only=True)
        self.granter.access_many(range(RX_PAGE, PAGES))
        front = NetFront(
            self.tx,
            self.rx,
            (self.data.pointer("uint8_t *", TX_PAGE * 4096), BASE + TX_PAGE),
            (self.data.pointer("uint8_t *", RX_PAGE * 4096), BASE + RX_PAGE),
            features,
        )
        self.stack.callback(front.close)
        return front

    # -- a frontend by hand

    def page(self, page: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.data.view, np.uint8)[page * 4096 : (page + 1) * 4096]

    def put(self, page: int, content: bytes, offset: int = 0) -> None:
        """Bytes into a page of the arena, which is granted to be read if it is not yet."""
        self.page(page)[offset : offset + len(content)] = np.frombuffer(content, np.uint8)
        self.grant(page)

    def grant(self, page: int, *, read_only: bool = True) -> None:
        if page not in self._ids:
            self._ids[page] = self.granter.access(page, read_only=read_only)

    def request(self, page: int, size: int, *, offset: int = 0, flags: int = 0, id: int = 0) -> NDArray[np.void]:
        request = np.zeros(1, netif.TX_REQUEST)
        request["gref"], request["offset"], request["flags"] = BASE + page, offset, flags
        request["id"], request["size"] = id, size
        return request

    @staticmethod
    def extra(kind: int, content: bytes = b"", *, more: bool = False) -> NDArray[np.void]:
        """A slot of extra information, as a request."""
        slot = bytes((kind, int(more))) + content.ljust(6, b"\0")
        return np.frombuffer(slot.ljust(12, b"\xee"), netif.TX_REQUEST)

    def send(self, *requests: NDArray[np.void]) -> None:
        every = np.concatenate(requests)
        assert self.tx.push(every) == len(every)

    def answers(self) -> list[tuple[int, int]]:
        """(id, status) of each response that has come."""
        return [(int(answer["id"]), int(answer["status"])) for answer in self.tx.take_batch()]

    def post(self, n: int) -> None:
        """Offer n more receive buffers, page after page."""
        requests = np.zeros(n, netif.RX_REQUEST)
        for request in requests:
            page = RX_PAGE + self.posted % SLOTS
            self.grant(page, read_only=False)
            request["id"], request["gref"] = self.posted % 65536, BASE + page
            self.posted += 1
        assert self.rx.push(requests) == n

    def received(self) -> NDArray[np.void]:
        return self.rx.take_batch()


@contextmanager
def make_net_stage(*, start: int = 2**32 - 40) -> Iterator[NetStage]:
    """`start`: where the indexes of both rings begin, near their wrap."""
    entries, data, maptrack = shared(entries_bytes(PAGES)), shared(PAGES * 4096), shared(maptrack_bytes(PAGES))
    memory = [shared(4096), shared(4096)]
    init_maptrack(maptrack, BASE, PAGES)
    granter = Granter(entries, base=BASE, n_pages=PAGES, peer=0)
    mapper = Mapper(entries, data, maptrack, base=BASE, n_pages=PAGES, domid=0)
    with ExitStack() as stack:
        front_half, back_half = make_pair()
        front_waiter, front_port = from_half(front_half)
        back_waiter, back_port = from_half(back_half)
        stack.callback(front_waiter.close)
        stack.callback(back_waiter.close)
        rings = []
        for place, layouts in zip(
            memory, ((netif.TX_REQUEST, netif.TX_RESPONSE), (netif.RX_REQUEST, netif.RX_RESPONSE)), strict=True
        ):
            front = FrontRing.create(place, *layouts, port=front_port, start=start)
            back = BackRing.attach(place, *layouts, port=back_port)
            stack.callback(front.close)
            stack.callback(back.close)
            rings += [front, back]
        yield NetStage(
            granter,
            mapper,
            data,
            rings[0],
            rings[2],
            rings[1],
            rings[3],
            front_port,
            back_port,
            *memory,
            entries,
            stack.enter_context(ExitStack()),
        )
        assert mapper.statistics().pinned_pages == 0
