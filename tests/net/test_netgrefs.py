# SPDX-License-Identifier: MIT
"""Pages that a guest has its network backend keep mapped: lists that count as a whole, limits, pages in use, what is
left when the device goes, and lists that no guest should send.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import paravirt
from paravirt.errors import Closed, InvalidRequest
from paravirt.frontend.vif import Vif
from paravirt.hypervisor.arena import Arena
from paravirt.protocol.netif import GREF_ENTRY, CtrlStatus, CtrlType
from paravirt.ring.netif import Burst

from ..eventually import eventually
from .frames import frame

S, T = CtrlStatus, CtrlType
STATION = bytes.fromhex("020000000001")


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host(max_queues=4) as host:
        yield host


def join(host: paravirt.Host, name: str = "guest", **options: Any) -> Vif:
    domain = host.create_domain(name)
    host.attach_vif(domain)
    return domain.open_vif(**options)


def arena_of(vif: Vif) -> Arena:
    arena = vif.queue_end().tx_end.arena
    assert arena is not None
    return arena


def sent_pages(vif: Vif, queue: int = 0) -> list[int]:
    """References of the pages that frames of a queue are sent from; none is in flight."""
    pages = vif.queue_end(queue)._pages
    assert pages is not None
    return list(range(pages.gref, pages.gref + 256))


def pages_to_receive(vif: Vif) -> list[int]:
    return [gref + 256 for gref in sent_pages(vif)]


def mapped(vif: Vif, grefs: list[int]) -> list[int]:
    """Those of which the backend has a mapping, as the guest's grant entries say."""
    granter = arena_of(vif).granter
    return [gref for gref in grefs if granter.in_use(gref)]


def ask(vif: Vif, kind: CtrlType, grefs: list[int], *, flags: int = 1, queue: int = 0) -> tuple[Any, int, list[int]]:
    """(status, data, status of each entry afterwards)."""
    table = np.zeros(len(grefs), GREF_ENTRY)
    table["gref"], table["flags"], table["status"] = grefs, flags, 77
    status, data = vif.control.ask(kind, (queue, -1, len(grefs)), table.tobytes())
    page = vif.control._table
    assert page is not None
    return status, data, np.frombuffer(bytes(page.view[: table.nbytes]), GREF_ENTRY)["status"].tolist()


def test_pages_stay_mapped_until_they_are_unmapped(host: paravirt.Host) -> None:
    vif = join(host)
    grefs = sent_pages(vif)[:10]
    assert mapped(vif, grefs) == []
    vif.control.map_grefs(grefs, read_only=True)
    assert mapped(vif, grefs) == grefs
    assert not arena_of(vif).revoke(grefs[0])
    assert vif.control.unmap_grefs(grefs[:4]) == []
    assert mapped(vif, grefs) == grefs[4:]
    assert vif.control.unmap_grefs(grefs) == grefs[:4]
    assert mapped(vif, grefs) == []
    assert arena_of(vif).revoke(grefs[1])


def test_a_list_is_mapped_whole_or_not_at_all(host: paravirt.Host) -> None:
    vif = join(host)
    grefs = sent_pages(vif)[:5]
    spare = arena_of(vif).allocate(1).gref  # which is not granted
    for wrong in ([*grefs, spare], [*grefs, grefs[0]], [*grefs, 1 << 31], [*grefs, 0xFFFFFFFF]):
        assert ask(vif, T.ADD_GREF_MAPPING, wrong) == (S.INVALID_PARAMETER, 0, [77] * 6)
        assert mapped(vif, grefs) == []
    # Those pages are granted to be read.
    assert ask(vif, T.ADD_GREF_MAPPING, grefs, flags=0)[0] is S.INVALID_PARAMETER
    assert ask(vif, T.ADD_GREF_MAPPING, grefs, flags=3)[0] is S.INVALID_PARAMETER
    assert mapped(vif, grefs) == []
    assert ask(vif, T.ADD_GREF_MAPPING, grefs) == (S.SUCCESS, 0, [77] * 5)
    assert ask(vif, T.ADD_GREF_MAPPING, grefs[4:])[0] is S.INVALID_PARAMETER  # it is there already
    assert mapped(vif, grefs) == grefs


def test_each_entry_to_unmap_has_its_own_status(host: paravirt.Host) -> None:
    vif = join(host)
    first, second, third = sent_pages(vif)[:3]
    vif.control.map_grefs([first, third], read_only=True)
    found = ask(vif, T.DEL_GREF_MAPPING, [first, second, third, first, 1 << 31])
    assert found == (S.SUCCESS, 2, [0, 2, 0, 2, 2])
    assert mapped(vif, [first, second, third]) == []


def test_a_queue_has_512_and_no_queue_another_s(host: paravirt.Host) -> None:
    vif = join(host, queues=2)
    control = vif.control
    assert [control.gref_mapping_size(queue) for queue in range(2)] == [512, 512]
    sent, received = sent_pages(vif), pages_to_receive(vif)
    control.map_grefs(sent, read_only=True)
    control.map_grefs(received)
    assert control.unmap_grefs(sent[:1], queue=1) == sent[:1]
    with pytest.raises(InvalidRequest, match="ADD_GREF_MAPPING of 1 references with INVALID_PARAMETER"):
        control.map_grefs(sent_pages(vif, 1)[:1], read_only=True)
    control.map_grefs(sent_pages(vif, 1), queue=1, read_only=True)
    assert control.unmap_grefs(sent[:1]) == []
    control.map_grefs(sent_pages(vif, 1)[:1], read_only=True)  # the same page in two tables
    assert control.unmap_grefs(sent_pages(vif, 1)[:1]) == []
    assert mapped(vif, sent_pages(vif, 1)) == sent_pages(vif, 1)
    with pytest.raises(InvalidRequest, match="513 references"):
        control.map_grefs(range(513))


def test_a_page_that_a_request_names_is_not_unmapped_before_it_is_answered(host: paravirt.Host) -> None:
    vif = join(host)
    buffers = pages_to_receive(vif)
    vif.control.map_grefs(buffers)
    with host.bridge() as bridge:
        _, leg = bridge.add_user("program")
        leg.give(Burst.of([frame(vif.mac, STATION)]))
        assert len(vif.receive(timeout_s=10.0)) == 1
        # The backend has taken the other buffers, too, for what comes next.
        kept = vif.control.unmap_grefs(buffers)
        assert len(kept) == 255
        assert mapped(vif, buffers) == kept
        for _ in range(4):  # each of them once, and those of before again
            leg.give(Burst.of([frame(vif.mac, STATION)] * 64))
            came = 0
            while came < 64:
                came += len(vif.receive(timeout_s=10.0))


def test_frames_pass_through_mapped_pages_both_ways(host: paravirt.Host) -> None:
    vif = join(host)
    vif.control.map_grefs(sent_pages(vif), read_only=True)
    vif.control.map_grefs(pages_to_receive(vif))
    with host.bridge() as bridge:
        _, leg = bridge.add_user("program")
        burst = Burst(600, 1 << 22)
        for i in range(300):
            packet = frame(STATION, vif.mac, i.to_bytes(2, "little"), n_bytes=60 + 17 * (i % 300))
            leg.give(Burst.of([frame(vif.mac, STATION, i.to_bytes(2, "little"), n_bytes=60 + 13 * i)]))
            vif.send([packet])
            assert vif.receive(timeout_s=10.0) == [
                frame(vif.mac, STATION, i.to_bytes(2, "little"), n_bytes=60 + 13 * i)
            ]
            burst.clear()
            while not len(burst):
                leg.get(burst, timeout_s=10.0)
            assert packet in list(burst)


def test_a_new_backend_maps_them_again_and_one_that_has_gone_none(host: paravirt.Host) -> None:
    vif = join(host)
    grefs = sent_pages(vif)[:20]
    vif.control.map_grefs(grefs, read_only=True)
    vif.control.unmap_grefs(grefs[10:])
    vif.suspend()
    eventually(lambda: mapped(vif, grefs) in ([], grefs[:10]))
    vif.resume()
    eventually(lambda: mapped(vif, grefs) == grefs[:10])
    assert vif.control.unmap_grefs(grefs[:10]) == []


def test_all_are_unmapped_when_the_device_goes(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    host.attach_vif(domain)
    with domain.open_vif(queues=4) as vif:
        grefs = [sent_pages(vif, queue) for queue in range(4)]
        for queue in range(4):
            vif.control.map_grefs(grefs[queue], queue=queue, read_only=True)
        every = [gref for some in grefs for gref in some]
        assert mapped(vif, every) == every
        host.detach_vif(domain)
        eventually(lambda: mapped(vif, every) == [])
        with pytest.raises(Closed):
            vif.control.unmap_grefs(grefs[0])


@pytest.mark.parametrize("kind", [T.ADD_GREF_MAPPING, T.DEL_GREF_MAPPING])
def test_lists_that_no_guest_should_send(host: paravirt.Host, kind: CtrlType) -> None:
    vif = join(host, queues=2)
    gref = sent_pages(vif)[0]
    for data in [
        (2, -1, 1),  # no such queue
        (0xFFFFFFFF, -1, 1),
        (64, -1, 1),
        (0, -1, 513),  # more than a page
        (0, -1, 0xFFFFFFFF),
        (0, 1 << 31, 1),  # nothing is granted there
        (0, 0, 512),
    ]:
        assert vif.control.ask(kind, data)[0] is S.INVALID_PARAMETER
    assert vif.control.ask(kind, (1, 1 << 31, 0)) == (S.SUCCESS, 0)  # a list of none needs no page
    # The list in a page that the backend may only read.
    assert vif.control.ask(T.ADD_GREF_MAPPING, (0, gref, 0))[0] is S.SUCCESS
    table = vif.queue_end()._pages
    assert table is not None
    entry = np.array([(gref + 1, 1, 9)], GREF_ENTRY).tobytes()
    table.view[: len(entry)] = entry
    assert vif.control.ask(T.ADD_GREF_MAPPING, (0, gref, 1))[0] is S.SUCCESS
    # Its answer could not be told, so nothing changes.
    assert vif.control.ask(T.DEL_GREF_MAPPING, (0, gref, 1)) == (S.INVALID_PARAMETER, 0)
    assert mapped(vif, [gref + 1]) == [gref + 1]
    assert vif.control.unmap_grefs([gref + 1]) == []


def test_a_list_that_maps_its_own_page(host: paravirt.Host) -> None:
    vif = join(host)
    page = vif.control._table
    assert page is not None
    vif.control.map_grefs([page.gref])
    assert vif.control.mapping_size() == 128
    assert vif.control.unmap_grefs([page.gref]) == []
    vif.control.map_grefs([page.gref], read_only=True)
    assert vif.control.unmap_grefs([page.gref]) == []
