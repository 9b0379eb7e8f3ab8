# SPDX-License-Identifier: MIT
"""Network devices on a whole host in one process: bursts, queues, bridges, rates, what becomes of bad guests."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

import paravirt
from paravirt.errors import AlreadyExists, Closed, InvalidRequest, NotFound, PeerGone
from paravirt.frontend.domain import Domain
from paravirt.frontend.vif import Vif
from paravirt.protocol.netif import TX_REQUEST
from paravirt.protocol.vif import Rate
from paravirt.protocol.vif_port import PortConfig, Vlans
from paravirt.ring.netif import Burst

from ..eventually import eventually
from .frames import BROADCAST, frame

SECOND = 5.0


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host() as host:
        yield host


def join(host: paravirt.Host, name: str, **options: object) -> tuple[Domain, Vif]:
    """A domain with an open network device on the usual bridge."""
    domain = host.create_domain(name)
    host.attach_vif(domain, **options)  # type: ignore[arg-type]
    return domain, domain.open_vif()


def receive(vif: Vif, n: int) -> list[bytes]:
    """n packets, or fewer when they do not come."""
    found: list[bytes] = []
    while len(found) < n:
        came = vif.receive(n - len(found), timeout_s=SECOND)
        if not came:
            break
        found += came
    return found


def test_frames_go_from_one_domain_to_the_other_whole_and_in_order(host: paravirt.Host) -> None:
    _, one = join(host, "one")
    _, other = join(host, "other")
    sizes = [14, 60, 1514, 4096, 4097, 9014, 65535]
    sent = [frame(other.mac, one.mac, bytes([i]) * 20, n_bytes=size)[:size] for i, size in enumerate(sizes)]
    assert one.send(sent) == len(sent)
    assert receive(other, len(sent)) == sent
    assert other.send([frame(one.mac, other.mac)]) == 1
    assert receive(one, 1) == [frame(one.mac, other.mac)]


def test_a_broadcast_reaches_all_but_its_sender_and_a_known_station_alone_gets_its_frames(host: paravirt.Host) -> None:
    vifs = [join(host, name)[1] for name in ("a", "b", "c")]
    vifs[0].send([frame(BROADCAST, vifs[0].mac)])
    assert all(receive(vif, 1) for vif in vifs[1:])
    vifs[1].send([frame(vifs[0].mac, vifs[1].mac, b"for a")])
    assert b"for a" in receive(vifs[0], 1)[0]
    vifs[0].send([frame(vifs[1].mac, vifs[0].mac, b"for b")])
    assert b"for b" in receive(vifs[1], 1)[0]
    assert vifs[2].receive(timeout_s=0.1) == []
    assert vifs[0].receive(timeout_s=0.0) == []


def test_a_program_has_a_port_of_its_own_on_a_bridge(host: paravirt.Host) -> None:
    _, vif = join(host, "guest")
    station = bytes.fromhex("020000000001")
    with host.bridge() as bridge:
        port, leg = bridge.add_user("program")
        leg.give(Burst.of([frame(BROADCAST, station, b"hello")]))
        assert b"hello" in receive(vif, 1)[0]
        vif.send([frame(station, vif.mac, b"answer")])
        burst = Burst()
        assert leg.get(burst, timeout_s=SECOND) == 1
        assert b"answer" in burst[0]
        assert {address.mac for _, address in bridge.addresses()} == {station.hex(":"), str(vif.mac)}
        assert {view.name for view in bridge.ports()} == {"program", "vif1.0"}
        bridge.remove_port(port)
        with pytest.raises(Closed):
            leg.get(burst)


def test_a_device_with_several_queues_gets_each_flow_on_one_of_them() -> None:
    with paravirt.Host(max_queues=4) as host:
        domain = host.create_domain("wide")
        host.attach_vif(domain)
        wide = domain.open_vif(queues=4)
        assert wide.n_queues == 4
        _, other = join(host, "other")
        for queue in range(4):
            wide.send([frame(other.mac, wide.mac, bytes([queue]))], queue=queue)
        assert len(receive(other, 4)) == 4
        stations = [bytes((2, 0, 0, 0, 0, i)) for i in range(32)]
        for _ in range(2):
            other.send([frame(wide.mac, station) for station in stations])
        counted = [0] * 4

        def all_came() -> bool:
            for queue in range(4):
                counted[queue] += len(wide.receive(queue=queue, timeout_s=0.01))
            return sum(counted) == 64

        eventually(all_came)
        assert sum(n > 0 for n in counted) > 1
        assert all(n % 2 == 0 for n in counted)


def test_a_rate_holds_a_guest_back_and_can_be_changed(host: paravirt.Host) -> None:
    domain, slow = join(host, "slow", rate=Rate(50_000, 50_000))
    _, other = join(host, "other")
    burst = Burst.of([frame(other.mac, slow.mac, n_bytes=1500)] * 64)
    start = time.monotonic()
    for _ in range(4):  # 384,000 bytes: a burst of 131,072 (as netback has it), and five windows more
        slow.send(burst, timeout_s=SECOND)
    assert len(receive(other, 256)) == 256
    assert time.monotonic() - start > 0.15
    host.limit_vif(domain, 0, None)
    eventually(lambda: host.vif_statistics() != {})
    slow.send(burst)
    assert len(receive(other, 64)) == 64


def test_vlans_keep_domains_apart_and_locked_ports_cannot_lie(host: paravirt.Host) -> None:
    ten, twenty = PortConfig(vlans=Vlans(access=10)), PortConfig(vlans=Vlans(access=20))
    _, a = join(host, "a", port=ten)
    _, b = join(host, "b", port=ten)
    domain, c = join(host, "c", port=twenty)
    a.send([frame(BROADCAST, a.mac)])
    assert receive(b, 1)
    assert c.receive(timeout_s=0.1) == []
    host.configure_vif(domain, 0, PortConfig(vlans=Vlans(access=10), locking="locked"))
    time.sleep(0.1)
    c.send([frame(BROADCAST, a.mac, b"a lie")])
    assert a.receive(timeout_s=0.1) == []
    with host.bridge() as bridge:
        drops = next(view.switch.drops for view in bridge.ports() if view.name == "vif3.0")
    assert "spoof" in drops


def test_a_guest_that_breaks_the_protocol_loses_its_device_and_nobody_elses(host: paravirt.Host) -> None:
    _, bad = join(host, "bad")
    _, one = join(host, "one")
    _, other = join(host, "other")
    ring = bad.queue_end().tx_end.ring
    assert ring is not None
    request = np.zeros(1, TX_REQUEST)
    request["size"], request["offset"] = 4000, 4000
    ring.push(request)
    with pytest.raises(PeerGone):
        bad.receive(timeout_s=SECOND)
    one.send([frame(other.mac, one.mac)])
    assert receive(other, 1)


def test_a_guest_that_takes_nothing_costs_only_itself(host: paravirt.Host) -> None:
    _, lazy = join(host, "lazy")
    _, one = join(host, "one")
    _, other = join(host, "other")
    lazy.send([frame(BROADCAST, lazy.mac)])
    receive(one, 1), receive(other, 1)
    flood = Burst.of([frame(lazy.mac, one.mac, n_bytes=1500)] * 64)
    for _ in range(32):
        one.send(flood)
    one.send([frame(other.mac, one.mac, b"still here")])
    assert b"still here" in receive(other, 1)[0]
    counters = {path.frontend_domid: found.counters for path, found in host.vif_statistics().items()}
    assert counters[1].rx_full > 0
    assert counters[1].rx_waited <= 524_288 // 1500 + 256  # those that buffers came for are counted, too


def test_what_cannot_be_is_refused(host: paravirt.Host) -> None:
    domain, vif = join(host, "one")
    with pytest.raises(AlreadyExists):
        host.attach_vif(domain)
    with pytest.raises(AlreadyExists):
        domain.open_vif()
    with pytest.raises(NotFound):
        domain.open_vif(3)
    with pytest.raises(InvalidRequest):
        host.attach_vif(domain, 1, mac="01:00:5e:00:00:01")
    with pytest.raises(InvalidRequest):
        host.attach_vif(domain, 1, bridge="no/bridge")
    assert vif.send([b"short"]) == 1
    assert vif.statistics().queues[0].tx_refused == 1
    vif.close()
    vif.close()
    with pytest.raises(Closed):
        vif.send([frame(BROADCAST, vif.mac)])
    host.detach_vif(domain)
    with pytest.raises(NotFound):
        host.detach_vif(domain)


def test_suspend_and_resume_make_new_rings(host: paravirt.Host) -> None:
    _, one = join(host, "one")
    _, other = join(host, "other")
    one.suspend()
    one.resume()
    one.send([frame(other.mac, one.mac, b"again")])
    assert b"again" in receive(other, 1)[0]
    assert one.statistics().reconnects == 1
