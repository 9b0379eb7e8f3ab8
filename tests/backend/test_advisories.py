# SPDX-License-Identifier: MIT
"""Xen's security advisories that concern block devices, as tests of what has to hold here.

| advisory | fault | held by |
|---|---|---|
| 142 | a read-only disk is written | test_xsa_142_... |
| 155 | what a peer shares is fetched twice | test_xsa_155_... |
| 175 | a toolstack trusts what guests can write | test_xsa_175_... |
| 216 | memory of the backend in the padding of responses | test_xsa_216_... |
| 229 | neighbours by number are taken for neighbours in memory | test_xsa_229_... |
| 332, 391 | storms of events, from either side | tests/backend/test_storm.py |
| 349 | watch events queue up without bound | test_xsa_349_...; tests/xenstore/test_advisories.py for the store |
| 350 | quick connects and disconnects | test_xsa_350_... |
| 361, 362, 365 | statuses of a batch of maps are not looked at one by one | test_xsa_361_362_365_... |
| 371 | grants that stay mapped after a disconnect | test_xsa_371_... |
| 396 | a page is used again that the backend still holds | tests/frontend/test_blkfront.py, test_blkfront_large.py |
| 403 | other data beside what is granted | test_xsa_403_... |
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import paravirt
from paravirt.backend.c_engine import EngineName
from paravirt.frontend.vbd import Disk
from paravirt.host import vbd
from paravirt.protocol.blkif import DISCARD_REQUEST, REQUEST, RESPONSE, Operation, Status
from paravirt.protocol.xenbus import XenbusState
from paravirt.ring._core import lib
from paravirt.ring.blkif import Limits
from paravirt.ring.memory import address_of
from paravirt.ring.shared import BackRing, FrontRing
from paravirt.xenstore import xenbus

from .blkif_pair import BASE, PAGES, SECTORS, Pair, in_use, indirect, make_pair, request, shared, together

DEADLINE_S = 20.0


@pytest.fixture(params=["usual", "persistent"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """With grants that are mapped for each request, and such that stay mapped."""
    with make_pair() as made:
        if request.param == "persistent":
            made.persist()
        yield made


@pytest.fixture(params=[False, True], ids=["usual", "persistent"])
def host(request: pytest.FixtureRequest, vbd_engine: EngineName) -> Iterator[paravirt.Host]:
    """The same with whole disks."""
    with paravirt.Host(engine=vbd_engine, persistent=request.param) as running:
        yield running


def settled(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(DEADLINE_S / 0.005)):
        if condition():
            return
        waiting.wait(0.005)
    raise AssertionError("it does not become true")


def discard(sector: int, sectors: int) -> np.ndarray:
    made = np.zeros(1, DISCARD_REQUEST)
    made["operation"], made["id"], made["sector"], made["nr_sectors"] = Operation.DISCARD, 1, sector, sectors
    return np.frombuffer(made.tobytes(), REQUEST)


def test_xsa_142_the_backend_itself_keeps_a_read_only_disk_from_being_written(pair: Pair) -> None:
    pair.batch.set_limits(
        Limits(SECTORS, read_only=True, barrier=True, discard=True, discard_secure=True, max_indirect_segments=256)
    )
    pair.granter.access(0)
    pair.granter.access(PAGES - 1)
    writes = [
        request(Operation.WRITE),
        request(Operation.WRITE_BARRIER),
        indirect(pair, [(BASE, 0, 7)], Operation.WRITE),
        discard(0, 8),
    ]
    disk = bytearray(b"d" * SECTORS * 512)
    assert pair.run(together(writes), disk)["status"].tolist() == [Status.ERROR] * 4
    assert disk == b"d" * SECTORS * 512


def test_xsa_155_requests_are_not_fetched_twice(pair: Pair) -> None:
    """A frontend that rewrites its slots after they were taken changes nothing."""
    memory = shared(4096)
    with (
        memory,
        FrontRing.create(memory, REQUEST, RESPONSE) as front,
        BackRing.attach(memory, REQUEST, RESPONSE) as back,
    ):
        pair.granter.access(0)
        front.push(together([request(sector=8, id=1), request(Operation.FLUSH_DISKCACHE, id=2)]))
        assert back.take(pair.batch.requests) == 2
        memory.view[64:] = b"\xff" * (4096 - 64)
        assert pair.batch.prepare(2) == 2
        memory.view[64:] = b"\x01" * (4096 - 64)
        assert pair.batch.place(0) == (8 * 512, 4096)
        disk = bytearray(os.urandom(SECTORS * 512))
        pair.batch.set_disk(memory=address_of(disk)[0], n_bytes=len(disk))
        pair.batch.do(2)
        pair.batch.finish(2)
        back.push(pair.batch.responses, 2)
        assert front.take_batch()["id"].tolist() == [1, 2]
        assert pair.data.view[:4096] == disk[8 * 512 : 16 * 512]


def test_xsa_175_the_toolstack_believes_nothing_a_guest_can_write(host: paravirt.Host, tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("own.img", "other.img")]
    for image in images:
        image.write_bytes(bytes(1 << 20))
    guest, other = host.create_domain("guest"), host.create_domain("other")
    path = host.attach_disk(guest, str(images[0]))
    victim = host.attach_disk(other, str(images[1]))
    for name, value in {"backend": victim.backend, "backend-id": "7", "virtual-device": "51728"}.items():
        guest.store.write(f"{path.frontend}/{name}", value)
    listed = {info.domid: info for info in vbd.list_vbds(host.store)}
    assert listed[guest.domid].spec == str(images[0])
    assert listed[guest.domid].device == "xvda"
    host.detach_disk(guest)
    assert [info.domid for info in vbd.list_vbds(host.store)] == [other.domid]
    with other.open_disk() as disk:
        assert disk.pread(512, 0) == bytes(512)


def test_xsa_216_every_byte_of_a_response_in_the_ring_is_defined(pair: Pair) -> None:
    memory = shared(4096)
    with (
        memory,
        FrontRing.create(memory, REQUEST, RESPONSE) as front,
        BackRing.attach(memory, REQUEST, RESPONSE) as back,
    ):
        pair.batch.responses[:] = 0xEE
        asked = together([request(99, id=0x0102030405060708), request(Operation.FLUSH_DISKCACHE, id=9)])
        front.push(asked)
        back.take(pair.batch.requests)
        memory.view[64:] = b"\xdd" * (4096 - 64)
        pair.batch.set_disk(memory=address_of(bytearray(8))[0], n_bytes=8)
        assert pair.batch.serve(back, 2)
        assert bytes(memory.view[64:80]).hex() == "0807060504030201" + "6300" + "feff" + "00000000"
        assert bytes(memory.view[64 + 112 : 80 + 112]).hex() == "0900000000000000" + "0300" + "0000" + "00000000"


def test_xsa_229_neighbouring_references_are_not_neighbouring_memory(pair: Pair) -> None:
    """What is joined to one piece lies side by side in memory, whatever its numbers are."""
    frames = {0: 9, 1: 4, 2: 5, 3: 2}
    for page, frame in frames.items():
        assert lib.pv_grant_access(pair.granter.core, BASE + page, 0, BASE + frame, False) == 0
    disk = bytearray(os.urandom(SECTORS * 512))
    asked = request(segments=[(BASE + page, 0, 7) for page in frames])
    pair.batch.requests[:112] = np.frombuffer(asked.tobytes(), np.uint8)
    assert pair.batch.prepare(1) == 1
    assert [len(buffer) for buffer in pair.batch.buffers(0)] == [4096, 8192, 4096]
    pair.batch.set_disk(memory=address_of(disk)[0], n_bytes=len(disk))
    pair.batch.do(1)
    pair.batch.finish(1)
    for i, frame in enumerate(frames.values()):
        assert pair.data.view[frame * 4096 : (frame + 1) * 4096] == disk[i * 4096 : (i + 1) * 4096]


def test_xsa_349_a_guest_that_rewrites_its_state_queues_nothing(host: paravirt.Host) -> None:
    """Events of one node are one event while nobody has looked."""
    guest = host.create_domain("guest")
    path = host.attach_disk(guest, "1M", driver="memory")
    with guest.open_disk() as disk:
        node, most = f"{path.frontend}/state", 0
        queue = host._backend._queue
        for i in range(3000):
            guest.store.write(node, str(int(XenbusState.CONNECTED)))
            if i % 100 == 0:
                most = max(most, len(queue._pending))
        assert most <= 32, "an event for each node there is, not for each write"
        assert disk.pread(512, 0) == bytes(512)


def test_xsa_350_quick_connects_and_disconnects(host: paravirt.Host) -> None:
    guest = host.create_domain("guest")
    path = host.attach_disk(guest, "1M", driver="memory")
    before = threading.active_count()
    chance = random.Random(5)
    for _ in range(8):
        with guest.open_disk(timeout_s=DEADLINE_S) as disk:
            disk.pwrite(b"x" * 4096, 0)
    states = [XenbusState.INITIALISING, XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING]
    for _ in range(200):
        guest.store.write(f"{path.frontend}/state", str(int(chance.choice(states))))
    guest.store.write(f"{path.frontend}/state", str(int(XenbusState.CLOSED)))
    settled(lambda: xenbus.read_state(host.store, path.backend) is XenbusState.CLOSED)
    with guest.open_disk(timeout_s=DEADLINE_S) as disk:
        assert disk.pread(4096, 0) == b"x" * 4096
    settled(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("bad", [0, 3, 10])
@pytest.mark.parametrize("kind", ["direct", "indirect"])
def test_xsa_361_362_365_one_segment_that_cannot_be_mapped_fails_its_request_alone(
    pair: Pair, bad: int, kind: str
) -> None:
    pair.batch.set_limits(Limits(SECTORS, max_indirect_segments=256))
    for page in [*range(11), 20, 21, PAGES - 1]:
        if page != bad:
            pair.granter.access(page)
    segments = [(BASE + page, 0, 7) for page in range(11)]
    wrong = request(segments=segments) if kind == "direct" else indirect(pair, segments)
    good = request(segments=[(BASE + 20, 0, 7)], id=2), request(segments=[(BASE + 21, 0, 7)], id=3)
    disk = bytearray(os.urandom(SECTORS * 512))
    pair.data.view[: 11 * 4096] = bytes(11 * 4096)
    answers = pair.run(together([good[0], wrong, good[1]]), disk)
    assert answers["status"].tolist() == [Status.OKAY, Status.ERROR, Status.OKAY]
    assert bytes(pair.data.view[: 11 * 4096]) == bytes(11 * 4096)
    assert pair.data.view[20 * 4096 : 22 * 4096] == 2 * disk[:4096]
    assert in_use(pair) == 0
    pair.let_go()
    assert all(pair.granter.revoke(BASE + page) for page in range(11) if page != bad)


def test_xsa_371_nothing_stays_mapped_after_a_disconnect(host: paravirt.Host) -> None:
    guest = host.create_domain("guest")
    host.attach_disk(guest, str(8 << 20), driver="memory")
    disk = guest.open_disk()
    assert isinstance(disk, Disk)
    disk.pwrite(os.urandom(3 << 20), 0)
    arena = disk.queue.end.arena
    assert arena is not None
    (device,) = host._backend._devices.values()
    device.close()
    assert arena.statistics().held_pages == 0
    for gref in range(arena.base, arena.base + arena.n_pages):
        assert lib.pv_grant_in_use(arena.granter.core, gref) == 0
    disk.close()


def test_xsa_403_a_granted_page_has_nothing_beside_its_payload(host: paravirt.Host) -> None:
    """Pages are of the disk alone, zeroed before their first use: nothing else of the guest's stands beside them."""
    guest = host.create_domain("guest")
    host.attach_disk(guest, "1M", driver="memory")
    secret = os.urandom(64)
    kept = [bytearray(secret * 64) for _ in range(64)]
    with guest.open_disk() as disk:
        disk.pwrite(b"p" * 512, 0)
        arena = disk.queue.end.arena
        assert arena is not None
        seen = bytes(arena.memory.view)
        start = seen.index(b"p" * 512)
        assert seen[start + 512 : start + 4096] == bytes(4096 - 512)
        disk.pwrite(b"q" * (20 * 4096 + 512), 4096)
        assert secret not in bytes(arena.memory.view)
    assert kept
