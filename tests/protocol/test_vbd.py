# SPDX-License-Identifier: MIT
"""vbd negotiation as values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravirt.errors import InvalidRequest, PeerError
from paravirt.protocol import blkif
from paravirt.protocol.keys import RingRequest
from paravirt.protocol.vbd import (
    OFFER_KEYS,
    REQUEST_KEYS,
    VbdConfig,
    VbdOffer,
    VbdRequest,
    device_name,
    device_number,
    max_queues,
    queue_keys,
)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("xvda", 51712),
        ("xvda1", 51713),
        ("xvdb", 51728),
        ("xvdp15", 202 << 8 | 15 << 4 | 15),
        ("xvdq", 1 << 28 | 16 << 8),
        ("xvda16", 1 << 28 | 16),
        ("xvdaa3", 1 << 28 | 26 << 8 | 3),
    ],
)
def test_device_numbers(name: str, number: int) -> None:
    assert device_number(name) == number
    assert device_name(number) == name


@given(st.integers(0, 5000), st.integers(0, 255))
def test_device_numbers_go_both_ways(disk: int, partition: int) -> None:
    number = 202 << 8 | disk << 4 | partition if disk < 16 and partition < 16 else 1 << 28 | disk << 8 | partition
    assert device_number(device_name(number)) == number


@pytest.mark.parametrize("name", ["", "sda", "xvd", "xvd1", "XVDA", "xvda256", "xvda/../x", "xvdaaaa"])
def test_names_that_are_no_device(name: str) -> None:
    with pytest.raises(InvalidRequest, match="device name"):
        device_number(name)


def test_request_of_one_page() -> None:
    request = VbdRequest.single((8,), 3)
    assert request.to_keys() == {
        "ring-ref": "8",
        "event-channel": "3",
        "protocol": "x86_64-abi",
        "feature-persistent": "0",
    }
    assert VbdRequest.from_keys(request.to_keys()) == request


def test_request_of_four_pages() -> None:
    keys = VbdRequest.single((8, 9, 10, 11), 3).to_keys()
    assert keys["ring-page-order"] == "2"
    assert [keys[f"ring-ref{i}"] for i in range(4)] == ["8", "9", "10", "11"]
    assert "ring-ref" not in keys
    assert VbdRequest.from_keys(keys).queues == (RingRequest((8, 9, 10, 11), 3),)


def test_page_order_zero_means_the_numbered_name() -> None:
    keys = {"ring-page-order": "0", "ring-ref0": "9", "event-channel": "1"}
    assert VbdRequest.from_keys(keys).queues == (RingRequest((9,), 1),)


def test_request_of_two_queues() -> None:
    """Each has a directory of its own; how large their rings are is said once."""
    request = VbdRequest((RingRequest((8,), 3), RingRequest((9,), 4)), persistent=True)
    assert request.to_keys() == {
        "multi-queue-num-queues": "2",
        "queue-0/ring-ref": "8",
        "queue-0/event-channel": "3",
        "queue-1/ring-ref": "9",
        "queue-1/event-channel": "4",
        "protocol": "x86_64-abi",
        "feature-persistent": "1",
    }
    assert VbdRequest.from_keys(request.to_keys(), max_queues=2) == request
    assert set(request.to_keys()) <= {*REQUEST_KEYS, *queue_keys(2)}


def test_request_of_queues_with_large_rings() -> None:
    request = VbdRequest(tuple(RingRequest(tuple(range(8 + 4 * i, 12 + 4 * i)), 3 + i) for i in range(3)))
    keys = request.to_keys()
    assert keys["ring-page-order"] == "2"
    assert [keys[f"queue-2/ring-ref{i}"] for i in range(4)] == ["16", "17", "18", "19"]
    assert "queue-0/ring-page-order" not in keys
    assert "ring-ref0" not in keys
    assert VbdRequest.from_keys(keys, max_queues=4) == request


def test_one_queue_by_number_keeps_the_flat_names() -> None:
    keys = {"multi-queue-num-queues": "1", "ring-ref": "8", "event-channel": "3"}
    assert VbdRequest.from_keys(keys, max_queues=8) == VbdRequest.single((8,), 3)


GOOD = {"ring-ref": "8", "event-channel": "3"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ring-ref": None}, "ring-ref is missing"),
        ({"ring-ref": "eight"}, "ring-ref is 'eight'"),
        ({"ring-ref": "-1"}, "ring-ref is '-1'"),
        ({"ring-ref": "4294967296"}, "ring-ref is '4294967296'"),
        ({"event-channel": None}, "event-channel is missing"),
        ({"event-channel": "0"}, "event-channel is 0"),
        ({"ring-page-order": "5"}, "ring-page-order is '5'"),
        ({"ring-page-order": "2"}, "ring-ref0 is missing"),
        ({"protocol": "x86_16-abi"}, "protocol is"),
        ({"multi-queue-num-queues": "0"}, "multi-queue-num-queues"),
        ({"multi-queue-num-queues": "2"}, "multi-queue-num-queues"),
    ],
)
def test_requests_a_backend_refuses(change: dict[str, str | None], complaint: str) -> None:
    keys = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(PeerError, match=complaint):
        VbdRequest.from_keys(keys)


TWO = VbdRequest((RingRequest((8, 9), 3), RingRequest((10, 11), 4))).to_keys()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"multi-queue-num-queues": "0"}, "multi-queue-num-queues is 0, not from 1 to the 2 that are offered"),
        ({"multi-queue-num-queues": "3"}, "multi-queue-num-queues is 3, not from 1 to the 2 that are offered"),
        ({"multi-queue-num-queues": "-1"}, "multi-queue-num-queues is '-1'"),
        ({"multi-queue-num-queues": "two"}, "multi-queue-num-queues is 'two'"),
        ({"multi-queue-num-queues": "1"}, "^ring-ref0 is missing"),
        ({"queue-1/ring-ref1": None}, "queue 1: ring-ref1 is missing"),
        ({"queue-0/event-channel": None}, "queue 0: event-channel is missing"),
        ({"queue-1/event-channel": "0"}, "queue 1: event-channel is 0"),
        ({"queue-1/ring-ref0": "x"}, "queue 1: ring-ref0 is 'x'"),
        ({"queue-1/ring-ref1": "10"}, "queue 1: the ring names one page twice"),
        ({"queue-1/ring-ref1": "8"}, "two queues name the same ring page, 8"),
        ({"queue-1/event-channel": "3"}, "two queues name the same event channel, 3"),
        ({"ring-page-order": "5"}, "queue 0: ring-page-order is '5'"),
    ],
)
def test_requests_of_queues_that_a_backend_refuses(change: dict[str, str | None], complaint: str) -> None:
    keys = {name: value for name, value in {**TWO, **change}.items() if value is not None}
    with pytest.raises(PeerError, match=complaint):
        VbdRequest.from_keys(keys, max_queues=2)


@given(st.dictionaries(st.sampled_from([*TWO]), st.text("-0189x ", max_size=4)))
def test_no_keys_of_queues_raise_anything_else(change: dict[str, str]) -> None:
    try:
        made = VbdRequest.from_keys({**TWO, **change}, max_queues=2)
    except PeerError:
        return
    refs = [ref for queue in made.queues for ref in queue.ring_refs]
    ports = [queue.event_channel for queue in made.queues]
    assert len(set(refs)) == len(refs)
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize(("said", "taken"), [(None, 1), ("0", 1), ("1", 1), ("7", 7), ("100000", 256)])
def test_queues_that_a_backend_takes(said: str | None, taken: int) -> None:
    assert max_queues({} if said is None else {"multi-queue-max-queues": said}) == taken


@given(st.dictionaries(st.sampled_from([*GOOD, "ring-page-order", "ring-ref0", "protocol"]), st.text(max_size=12)))
def test_no_frontend_keys_raise_anything_else(keys: dict[str, str]) -> None:
    try:
        VbdRequest.from_keys(keys)
    except PeerError:
        pass


@given(st.dictionaries(st.sampled_from(OFFER_KEYS), st.text(max_size=12) | st.integers(0, 9000).map(str)))
def test_no_backend_keys_raise_anything_else(keys: dict[str, str]) -> None:
    try:
        VbdOffer.from_keys(keys)
    except PeerError:
        pass


def test_offer_goes_both_ways() -> None:
    offer = VbdOffer(sectors=2048, sector_size=4096, read_only=True, physical_sector_size=4096)
    assert VbdOffer.from_keys(offer.to_keys()) == offer
    assert offer.to_keys()["info"] == "4"
    full = VbdOffer(
        sectors=2048,
        sector_size=512,
        flush=False,
        barrier=True,
        discard=True,
        discard_granularity=65536,
        discard_alignment=4096,
        discard_secure=True,
        max_indirect_segments=4096,
        physical_sector_size=4096,
        removable=True,
        cdrom=True,
        max_queues=8,
        persistent=True,
    )
    assert VbdOffer.from_keys(full.to_keys()) == full
    assert full.to_keys()["info"] == "3"


def test_offer_defaults_are_blkifs() -> None:
    offer = VbdOffer.from_keys({"sectors": "8"})
    assert offer == VbdOffer(
        8, 512, flush=False, max_ring_page_order=0, max_indirect_segments=0, physical_sector_size=512
    )
    some = VbdOffer.from_keys({"sectors": "8", "sector-size": "4096", "feature-discard": "1"})
    assert (some.discard, some.discard_granularity, some.discard_alignment) == (True, 4096, 0)
    assert some.physical_sector_size == 4096


def test_discard_has_to_be_enabled() -> None:
    assert not VbdOffer.from_keys({"sectors": "8", "feature-discard": "1", "discard-enable": "0"}).discard
    assert not VbdOffer.from_keys({"sectors": "8", "discard-secure": "1"}).discard_secure


@pytest.mark.parametrize(("offered", "used"), [("0", 0), ("11", 0), ("12", 12), ("256", 256), ("100000", 4096)])
def test_indirect_segments_that_are_a_gain(offered: str, used: int) -> None:
    assert VbdOffer.from_keys({"sectors": "8", "feature-max-indirect-segments": offered}).max_indirect_segments == used


def test_config_goes_both_ways() -> None:
    config = VbdConfig("file", "/images/a:b.img", "xvda", "r", "cdrom", removable=True, discard=False)
    assert VbdConfig.from_keys(config.to_keys()) == config
    assert VbdConfig.from_keys({"params": "null:1M"}).discard


def test_device_types() -> None:
    with pytest.raises(InvalidRequest, match="device-type is 'floppy'"):
        VbdConfig.from_keys({"params": "null:1M", "device-type": "floppy"})


@pytest.mark.parametrize("protocol", ["x86_64-abi", "x86_32-abi", "arm-abi"])
def test_abis(protocol: str) -> None:
    assert VbdRequest.from_keys({**GOOD, "protocol": protocol}).protocol == protocol


@pytest.mark.parametrize("mode", ["r", "", "x", "R"])
def test_a_mode_without_w_is_read_only(mode: str) -> None:
    assert VbdConfig.from_keys({"params": "null:1M", "mode": mode}).mode == "r"


def test_params_need_a_driver() -> None:
    with pytest.raises(InvalidRequest, match="params"):
        VbdConfig.from_keys({"params": "/images/a.img"})


def test_message_layouts() -> None:
    assert blkif.REQUEST.itemsize == 112
    assert {name: blkif.REQUEST.fields[name][1] for name in blkif.REQUEST.names} == {
        "operation": 0,
        "nr_segments": 1,
        "handle": 2,
        "id": 8,
        "sector": 16,
        "seg": 24,
    }
    assert blkif.RESPONSE.itemsize == 16
    assert {name: blkif.RESPONSE.fields[name][1] for name in blkif.RESPONSE.names} == {
        "id": 0,
        "operation": 8,
        "status": 10,
    }
    assert [blkif.ring_entries(order) for order in range(5)] == [32, 64, 128, 256, 512]
