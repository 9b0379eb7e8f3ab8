# SPDX-License-Identifier: MIT
"""Senders are held back by guests that take slowly, as by a wire, for a moment; nobody else is."""

import threading
from collections.abc import Iterator

import pytest

import paravirt
from paravirt.backend.bridge import PortView
from paravirt.errors import InvalidRequest
from paravirt.frontend.domain import Domain
from paravirt.frontend.vif import Vif
from paravirt.host import bridge as toolstack
from paravirt.protocol.bridge import BridgeConfig
from paravirt.protocol.vif import DEFAULT_BRIDGE
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.netif import Burst, NetCounters

from ..eventually import eventually
from .frames import BROADCAST, frame

N_FRAMES = 20_000
BURST = 64
PATIENT_S = 30.0
"""So that a machine that is busy with something else makes nobody slow."""


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host() as host:
        yield host


def vif_of(host: paravirt.Host, name: str) -> Vif:
    return join(host, name)[1]


def join(host: paravirt.Host, name: str) -> tuple[Domain, Vif]:
    domain = host.create_domain(name)
    host.attach_vif(domain)
    return domain, domain.open_vif()


def numbered(to: bytes, source: bytes, first: int, n: int, n_bytes: int) -> Burst:
    return Burst.of([frame(to, source, i.to_bytes(4), n_bytes=n_bytes) for i in range(first, first + n)])


def number_of(packet: bytes) -> int:
    return int.from_bytes(packet[14:18])


def teach(*vifs: Vif) -> None:
    """The switch knows where everybody is."""
    for vif in vifs:
        vif.announce()
    for vif in vifs:
        while vif.receive(timeout_s=0.05):
            pass


def counters_of(host: paravirt.Host, domid: int) -> NetCounters:
    return host.vif_statistics()[DevicePath("vif", domid, 0)].counters


def port_of(host: paravirt.Host, domid: int) -> PortView:
    with host.bridge() as bridge:
        return next(port for port in bridge.ports() if port.name == f"vif{domid}.0")


@pytest.mark.parametrize("n_bytes", [64, 9000, 60_000])
def test_a_receiver_that_goes_on_taking_loses_nothing(host: paravirt.Host, n_bytes: int) -> None:
    """However much faster the sender is: every frame, in order."""
    n = N_FRAMES if n_bytes < 1000 else 2_000
    one, other = vif_of(host, "one"), vif_of(host, "other")
    teach(one, other)
    with host.bridge() as bridge:
        bridge.set_hold(PATIENT_S)

    def send() -> None:
        for first in range(0, n, BURST):
            one.send(numbered(other.mac, one.mac, first, min(BURST, n - first), n_bytes))

    sender = threading.Thread(target=send)
    sender.start()
    found: list[int] = []
    burst = Burst(BURST, 1 << 23)
    while len(found) < n:
        burst.clear()
        if not other.receive_burst(burst, BURST, timeout_s=10.0):
            break
        found += [number_of(packet) for packet in burst]
    sender.join()
    assert found == list(range(n))
    counters = counters_of(host, 2)
    assert counters.rx_full == counters.rx_expired == 0


def test_a_guest_that_takes_nothing_holds_its_sender_back_for_a_moment_only(host: paravirt.Host) -> None:
    """What it has no room for is dropped, and the sender's frames to others go on."""
    one, dead, alive = vif_of(host, "one"), vif_of(host, "dead"), vif_of(host, "alive")
    teach(one, dead, alive)
    for first in range(0, N_FRAMES, BURST):
        assert one.send(numbered(dead.mac, one.mac, first, BURST, 1500), timeout_s=10.0) == BURST
    eventually(lambda: counters_of(host, 2).rx_full > 0)
    leg = port_of(host, 1).legs[0]
    assert leg.held >= 1
    held = leg.held
    assert one.send([frame(alive.mac, one.mac, b"for you")]) == 1
    assert b"for you" in alive.receive(1, timeout_s=10.0)[0]
    # Not again, as long as nothing of it is taken.
    for first in range(0, N_FRAMES, BURST):
        one.send(numbered(dead.mac, one.mac, first, BURST, 1500), timeout_s=10.0)
    assert port_of(host, 1).legs[0].held == held
    assert dead.receive(timeout_s=10.0)


def test_others_that_send_to_a_flooded_guest_are_not_held_back(host: paravirt.Host) -> None:
    flood, honest, dead = vif_of(host, "flood"), vif_of(host, "honest"), vif_of(host, "dead")
    teach(flood, honest, dead)
    for first in range(0, 4096, BURST):
        flood.send(numbered(dead.mac, flood.mac, first, BURST, 1500), timeout_s=10.0)
    honest.send(numbered(dead.mac, honest.mac, 0, BURST, 1500), timeout_s=10.0)
    honest.send([frame(flood.mac, honest.mac, b"to the one")])
    assert b"to the one" in flood.receive(1, timeout_s=10.0)[0]
    assert port_of(host, 2).legs[0].held == 0


def test_what_goes_to_everybody_holds_nobody_back(host: paravirt.Host) -> None:
    one, dead, alive = vif_of(host, "one"), vif_of(host, "dead"), vif_of(host, "alive")
    teach(one, dead, alive)
    stop = threading.Event()

    def take() -> None:
        while not stop.is_set():
            alive.receive(timeout_s=0.05)

    taker = threading.Thread(target=take)
    taker.start()
    for first in range(0, 4096, BURST):
        one.send(numbered(BROADCAST, one.mac, first, BURST, 1500), timeout_s=10.0)
    stop.set()
    taker.join()
    assert port_of(host, 1).legs[0].held == 0
    assert counters_of(host, 2).rx_full > 0


def test_a_sender_that_is_held_back_still_gets_its_own_frames(host: paravirt.Host) -> None:
    """Both flood each other and take nothing, then take: what waits comes, and all goes on."""
    one, other = vif_of(host, "one"), vif_of(host, "other")
    teach(one, other)
    for first in range(0, 2048, BURST):
        one.send(numbered(other.mac, one.mac, first, BURST, 1500), timeout_s=10.0)
        other.send(numbered(one.mac, other.mac, first, BURST, 1500), timeout_s=10.0)
    for vif in (one, other):
        numbers = []
        while came := vif.receive(timeout_s=1.0):
            numbers += [number_of(packet) for packet in came]
        assert numbers[:256] == list(range(256))
        assert numbers == sorted(set(numbers))
    one.send([frame(other.mac, one.mac, b"again")])
    assert b"again" in other.receive(1, timeout_s=10.0)[0]


def test_a_receiver_that_goes_away_frees_its_senders(host: paravirt.Host) -> None:
    one, (domain, dead), alive = vif_of(host, "one"), join(host, "dead"), vif_of(host, "alive")
    teach(one, dead, alive)
    for first in range(0, 2048, BURST):
        one.send(numbered(dead.mac, one.mac, first, BURST, 1500), timeout_s=10.0)
    host.detach_vif(domain)
    one.send([frame(alive.mac, one.mac, b"still here")])
    found: list[bytes] = []
    while not any(b"still here" in packet for packet in found):
        came = alive.receive(timeout_s=10.0)
        assert came
        found += came


def test_without_holding_back_frames_are_dropped_at_once(host: paravirt.Host) -> None:
    one, dead = vif_of(host, "one"), vif_of(host, "dead")
    teach(one, dead)
    with host.bridge() as bridge:
        bridge.set_hold(0)
        for bad in (-1.0, 61.0, float("nan")):
            with pytest.raises(InvalidRequest):
                bridge.set_hold(bad)
    for first in range(0, 2048, BURST):
        one.send(numbered(dead.mac, one.mac, first, BURST, 1500), timeout_s=10.0)
    assert port_of(host, 1).legs[0].held == 0
    assert counters_of(host, 2).rx_full > 0


def test_as_xenstore_says(host: paravirt.Host) -> None:
    one, dead = vif_of(host, "one"), vif_of(host, "dead")
    teach(one, dead)
    toolstack.set_bridge(host.store, DEFAULT_BRIDGE, BridgeConfig(hold_ms=0))
    with host.bridge() as bridge:
        eventually(lambda: bridge.hold_s == 0)
    for first in range(0, 2048, BURST):
        one.send(numbered(dead.mac, one.mac, first, BURST, 1500), timeout_s=10.0)
    assert port_of(host, 1).legs[0].held == 0
    assert counters_of(host, 2).rx_full > 0


@pytest.mark.parametrize("word", ["60001", "-1", "1.5", "", "9" * 30])
def test_times_that_are_none(word: str) -> None:
    with pytest.raises(InvalidRequest, match=r"hold-ms is .*, not a number of milliseconds up to 60000"):
        BridgeConfig.from_keys({"hold-ms": word})


def test_a_bridge_is_what_was_written() -> None:
    config = BridgeConfig(ageing_s=5, hold_ms=250, mirror="vif1.0", offloads=False, wire=True)
    assert BridgeConfig.from_keys(config.to_keys()) == config
    assert BridgeConfig.from_keys({}) == BridgeConfig()
