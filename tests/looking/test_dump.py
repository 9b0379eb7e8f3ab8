# SPDX-License-Identifier: MIT
"""What stands in a live ring: places, states, ages, grants, and what is torn."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import paravirt
from paravirt.errors import InvalidRequest
from paravirt.hypervisor.looking import Looker
from paravirt.looking.dump import messages_of, slots_of
from paravirt.looking.view import view_of
from paravirt.protocol.layout import MessagePair
from tests.echo_device import ADD, ECHO, HOLD, EchoBack, EchoFront
from tests.looking.live import REQUEST, RESPONSE, Live


@pytest.fixture
def live() -> Iterator[Live]:
    with Live() as made:
        yield made


def states(live: Live, *, every: bool = False) -> list[tuple[int, str, int | None]]:
    slots = slots_of(live.looker, live.find(), live.view(), every=every)
    assert not any(slot.torn for slot in slots)
    return [(slot.index, slot.state, slot.entry.id) for slot in slots]


def test_every_state_of_an_entry(live: Live) -> None:
    assert states(live) == []
    live.push(6)
    live.answer(2)
    assert live.back.take(np.zeros(1, REQUEST)) == 1
    assert states(live) == [
        (0, "response not taken", 0),
        (1, "response not taken", 0),
        (2, "taken", 2),
        (3, "not taken", 3),
        (4, "not taken", 4),
        (5, "not taken", 5),
    ]
    assert live.front.take(np.zeros(2, RESPONSE)) == 2
    assert [state for _, state, _ in states(live)] == ["taken", "not taken", "not taken", "not taken"]


def test_what_is_left_of_old_entries(live: Live) -> None:
    live.push(2)
    live.back.take(np.zeros(2, REQUEST))
    responses = np.zeros(2, RESPONSE)
    responses["id"] = 8, 9
    live.back.push(responses)
    live.front.take(np.zeros(2, RESPONSE))
    assert states(live) == []
    assert states(live, every=True) == [(0, "old", 8), (1, "old", 9)]


def test_ages_of_what_is_in_flight(live: Live) -> None:
    live.push(1)
    (slot,) = slots_of(live.looker, live.find(), live.view())
    assert slot.age_s is not None
    assert 0 <= slot.age_s[0] < 60
    live.back.take(np.zeros(1, REQUEST))
    (slot,) = slots_of(live.looker, live.find(), live.view())
    assert slot.state == "taken"
    assert slot.age_s is not None


def test_what_is_given_away_meanwhile_is_torn(live: Live) -> None:
    live.push(2)
    before = live.view()
    live.answer(1)
    slots = slots_of(live.looker, live.find(), before)
    assert [(slot.index, slot.torn) for slot in slots] == [(0, True), (1, False)]


def test_indexes_out_of_range_show_nothing_and_do_no_harm(live: Live) -> None:
    live.push(2)
    view = live.view()
    assert view.shared is not None
    for word in range(4):
        live.write_index(word, 0x80000000 + word)
    ring = live.find()
    assert isinstance(slots_of(live.looker, ring, live.view(), every=True), list)
    wild = replace(view, shared=replace(view.shared, req_prod=2**32 - 1, rsp_prod=2**31))
    assert isinstance(slots_of(live.looker, ring, wild, every=True), list)


def test_a_declared_device_by_its_own_names_and_grants() -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach(domain, EchoBack)
        with domain.open(EchoFront) as device, Looker(host.hypervisor) as looker:
            device.call(operation=ADD, value=1)
            buffer = device.buffer(8192)
            pending = device.send(operation=HOLD, value=7, buffer=buffer)
            (held,) = EchoBack.take_held()
            ring = looker.find("vecho/1/0")
            messages = messages_of(ring)
            assert messages is not None
            assert messages.request.names == ECHO.request.names
            assert messages.response == MessagePair.of(ECHO).response
            (slot,) = slots_of(looker, ring, view_of(looker, host.hypervisor, ring))
            assert (slot.state, slot.entry.fields["operation"], slot.entry.fields["value"]) == ("taken", HOLD, 7)
            assert len(slot.grants) == 2
            assert all(grant is not None and grant.writing for grant in slot.grants)
            held.answer({"value": 1})
            pending.result()


def test_a_disk_s_ring_is_decoded() -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1M", driver="memory")
        with domain.open_disk() as disk, Looker(host.hypervisor) as looker:
            disk.pread(4096, 8192)
            ring = looker.find("vbd/1/51712")
            slots = slots_of(looker, ring, view_of(looker, host.hypervisor, ring), every=True)
            assert "read" in [slot.entry.kind for slot in slots]


def test_a_control_ring_is_found_and_decoded() -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_vif(domain)
        with domain.open_vif() as vif, Looker(host.hypervisor) as looker:
            assert vif.control.mapping_size() == 128
            with pytest.raises(InvalidRequest):
                looker.find("vif/1/0")  # it has three
            ring = looker.find("vif/1/0/ctrl")
            assert ring.end.protocol == "netif-ctrl"
            slots = slots_of(looker, ring, view_of(looker, host.hypervisor, ring), every=True)
            assert "get-hash-mapping-size" in [slot.entry.kind for slot in slots]
