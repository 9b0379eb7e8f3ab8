# SPDX-License-Identifier: MIT
"""Many network devices: those that come and go while others talk, those that are there and do nothing.

At length: `make devices`.
"""

import os
import threading
import time
from collections.abc import Iterator

import pytest

import paravirt
from paravirt.errors import ParavirtError
from paravirt.frontend.domain import Domain
from paravirt.frontend.vif import Vif
from paravirt.ring.netif import Burst

from ..eventually import eventually, steady
from ..held import Held, settled
from .frames import BROADCAST, frame

ROUNDS = int(os.environ.get("DEVICE_ROUNDS", "20"))
"""Devices that come and go, one after the other."""
IDLE = int(os.environ.get("IDLE_DEVICES", "24"))
BURST = 32


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host() as host:
        yield host


def join(host: paravirt.Host, name: str) -> tuple[Domain, Vif]:
    domain = host.create_domain(name)
    host.attach_vif(domain)
    return domain, domain.open_vif()


def send_for_ever(vif: Vif, packets: list[bytes]) -> None:
    while True:
        vif.send(packets, timeout_s=5.0)


class Stream:
    """Numbered frames from one device to another, as fast as they go, until it is stopped."""

    def __init__(self, one: Vif, other: Vif) -> None:
        self._one, self._other = one, other
        self._stop, self._sent_all = threading.Event(), threading.Event()
        self.sent = self.came = 0
        self.misplaced: list[tuple[int, int]] = []
        self._threads = [threading.Thread(target=run) for run in (self._send, self._take)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._stop.is_set():
            packets = [frame(self._other.mac, self._one.mac, (self.sent + i).to_bytes(8)) for i in range(BURST)]
            self.sent += self._one.send(packets)

    def _take(self) -> None:
        """Broadcasts of the others aside, each is the next."""
        burst = Burst(64)
        while not (self._sent_all.is_set() and self.came >= self.sent):
            burst.clear()
            if not self._other.receive_burst(burst, timeout_s=2.0) and self._sent_all.is_set():
                return
            for packet in burst:
                if packet[:6] != BROADCAST:
                    number = int.from_bytes(packet[14:22])
                    if number != self.came:
                        self.misplaced.append((number, self.came))
                    self.came = number + 1

    def stop(self) -> None:
        self._stop.set()
        self._threads[0].join()
        self._sent_all.set()
        self._threads[1].join()


@pytest.mark.timeout(60 + ROUNDS)
def test_devices_come_and_go_and_the_others_lose_nothing(host: paravirt.Host) -> None:
    """Closed in peace, closed while its frames fly, or unplugged under it; nothing stays behind."""
    _, one = join(host, "one")
    _, other = join(host, "other")
    domain = host.create_domain("guest")
    one.announce(), other.announce()
    with host.bridge() as bridge:
        bridge.set_hold(30.0)  # the machine may be busy with something else

    def life(n: int) -> None:
        host.attach_vif(domain)
        vif = domain.open_vif(ring_page_order=n % 2)
        packets = [frame(BROADCAST, vif.mac, n.to_bytes(4)), *[frame(one.mac, vif.mac)] * (BURST if n % 3 else 0)]
        vif.send(packets)
        vif.receive(timeout_s=0.0)
        if n % 4 == 3:
            host.detach_vif(domain)
            with pytest.raises(ParavirtError):
                send_for_ever(vif, [frame(one.mac, vif.mac)] * BURST)
        vif.close()
        if n % 4 != 3:
            host.detach_vif(domain)

    for n in range(12):
        life(n)
    before = steady(lambda: Held.now(host))
    stream = Stream(one, other)
    try:
        for n in range(ROUNDS):
            life(n)
    finally:
        stream.stop()
    assert stream.sent == stream.came > 0
    assert stream.misplaced == []
    assert settled(lambda: Held.now(host) == before), f"{Held.now(host)}, not {before}"
    with host.bridge() as bridge:
        assert {view.name for view in bridge.ports()} == {"vif1.0", "vif2.0"}
    assert list(domain.hypervisor.list_ports()) == []


def sleeps_of_threads() -> int:
    """How often the threads of this process have gone to sleep."""
    found = 0
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/status") as status:
            found += sum(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))
    return found


@pytest.mark.timeout(120 + IDLE)
def test_idle_devices_wake_nobody(host: paravirt.Host) -> None:
    vifs = [join(host, f"d{i}")[1] for i in range(IDLE)]
    vifs[0].send([frame(BROADCAST, vifs[0].mac)])
    assert vifs[-1].receive(1, timeout_s=10.0)
    with host.bridge() as bridge:

        def rested() -> bool:
            before = bridge.sleeps, sleeps_of_threads()
            time.sleep(1.0)
            # This thread sleeps once, and may have looked at the others while they came to rest.
            return bridge.sleeps == before[0] and sleeps_of_threads() - before[1] <= 3

        eventually(rested)
        woken = {view.name: view.legs[0].wakeups for view in bridge.ports()}
        time.sleep(0.5)
        assert woken == {view.name: view.legs[0].wakeups for view in bridge.ports()}
