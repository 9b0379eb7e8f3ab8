# SPDX-License-Identifier: MIT
"""Frontends of other ABIs against the real backend: what is on their ring is theirs, byte for byte."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

import paravirt
from paravirt.backend.c_engine import EngineName
from paravirt.protocol import blkif
from paravirt.protocol.blkif import Operation, Status
from paravirt.protocol.decode.blkif import BlkifDecoder
from paravirt.protocol.vbd import VbdRequest
from paravirt.protocol.xenbus import XenbusState
from paravirt.ring.event import WaitResult
from paravirt.ring.shared import FrontRing
from paravirt.xenstore import xenbus

DEADLINE_S = 20.0


@pytest.fixture
def host(vbd_engine: EngineName) -> Iterator[paravirt.Host]:
    with paravirt.Host(engine=vbd_engine) as running:
        yield running


@pytest.mark.parametrize("order", [0, 4])
@pytest.mark.parametrize(
    ("abi", "layout"),
    [
        ("x86_32-abi", blkif.X86_32_REQUEST),
        ("arm-abi", blkif.REQUEST),
        ("x86_64-abi", blkif.REQUEST),
        ("", blkif.REQUEST),
    ],
)
def test_each_abi(host: paravirt.Host, order: int, abi: str, layout: "np.dtype[np.void]") -> None:
    domain = host.create_domain("guest")
    path = host.attach_disk(domain, "1M", driver="memory")
    arena = domain.hypervisor.create_arena(0, 32)
    waiter = domain.hypervisor.waiter()
    pages, data = arena.allocate(1 << order), arena.allocate(2)
    channel = domain.hypervisor.alloc_unbound(waiter, 0)
    ring = FrontRing.create(pages.view, layout, blkif.RESPONSE, port=channel)
    assert ring.size == blkif.ring_entries(order)
    refs = tuple(arena.grant(pages.gref + i) for i in range(1 << order))
    keys = VbdRequest.single(refs, channel.port, abi).to_keys()
    if not abi:
        del keys["protocol"]
    assert xenbus.switch_state(domain.store, path.frontend, XenbusState.INITIALISED, keys)
    queue = domain.store.watch_queue()
    queue.add(f"{path.backend}/state")
    while xenbus.read_state(domain.store, path.backend) is not XenbusState.CONNECTED:
        assert queue.get(timeout_s=DEADLINE_S) is not None
    queue.close()

    def do(operation: Operation, page: int, id: int, segments: int = 1) -> np.ndarray:
        asked = np.zeros(1, layout)
        asked["operation"], asked["nr_segments"], asked["id"], asked["sector"] = operation, segments, id, 9
        asked["seg"][0, 0] = (data.gref + page, 1, 6)
        decoded = BlkifDecoder().request(asked.tobytes())
        assert (decoded.id, decoded.wrong) == (id, ())
        ring.push(asked)
        while not len(answer := ring.take_batch()):
            assert ring.wait(timeout_s=DEADLINE_S) is not WaitResult.TIMEOUT
        assert answer["id"].tolist() == [id]
        return answer

    content = os.urandom(6 * 512)
    data.view[512 : 7 * 512] = content
    for page in range(2):
        arena.grant(data.gref + page)
    for round_ in range(600 if order == 0 else 2):  # past the end of the ring
        id = (round_ << 40) + 0x12345678
        assert do(Operation.WRITE, 0, id)["status"][0] == Status.OKAY
        assert do(Operation.READ, 1, id + 1)["status"][0] == Status.OKAY
    assert bytes(data.view[4096:8192]) == bytes(512) + content + bytes(512)
    assert do(Operation.FLUSH_DISKCACHE, 0, 7, 0)["status"][0] == Status.OKAY
    ring.close()
    channel.close()
    waiter.close()
    arena.close()
