# SPDX-License-Identifier: MIT
"""Groups: which of their frames a device gets, as it joins and leaves them, with every backend that comes."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

import paravirt
from paravirt.errors import Closed, InvalidRequest, ResourceLimit, TimedOut
from paravirt.frontend.vif import Vif
from paravirt.protocol.netif import MAX_GROUPS, Mac
from paravirt.protocol.vif import MULTICAST_KEY
from paravirt.protocol.xenbus import DevicePath

from ..eventually import eventually
from ..needs import missing
from .frames import BROADCAST, frame

SECOND = 5.0
ONE, OTHER = bytes.fromhex("01005e000001"), bytes.fromhex("333300000002")
LAST = b"that is all"


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host(max_queues=2) as host:
        yield host


def join(host: paravirt.Host, name: str, *, without: str | None = None, **options: object) -> tuple[DevicePath, Vif]:
    """An open device of a new domain; `without` a feature of its backend."""
    domain = host.create_domain(name)
    path = host.attach_vif(domain)
    if without:
        host.store.write(f"{path.backend}/{without}", "0")
    return path, domain.open_vif(**options)


def heard(sender: Vif, listener: Vif) -> set[bytes]:
    """To which of two groups, to everybody, to itself: what the listener gets of frames to each, on all its queues."""
    sources = [sender.mac[:5] + bytes([i]) for i in range(16)]  # flows, for all queues
    last = LAST + os.urandom(8)
    for to in (ONE, OTHER, BROADCAST, listener.mac):
        sender.send([frame(to, source, b"group" + last[-8:]) for source in sources])
    sender.send([frame(listener.mac, source, last) for source in sources])
    found: set[bytes] = set()
    for queue in range(listener.n_queues):
        packets: list[bytes] = []
        while not any(last in packet for packet in packets):
            packets = listener.receive(queue=queue, timeout_s=SECOND)
            assert packets
            found |= {packet[:6] for packet in packets if b"group" + last[-8:] in packet}
    return found


def test_all_groups_come_to_a_device_that_does_not_ask(host: paravirt.Host) -> None:
    (_, sender), (_, listener) = join(host, "sender"), join(host, "listener")
    assert listener.groups == ()
    assert heard(sender, listener) == {ONE, OTHER, BROADCAST, listener.mac}


def test_groups_that_are_named_when_it_opens(host: paravirt.Host) -> None:
    (_, sender), (_, listener) = join(host, "sender"), join(host, "listener", multicast=[ONE])
    assert listener.groups == (ONE,)
    assert heard(sender, listener) == {ONE, BROADCAST, listener.mac}


def test_groups_are_joined_and_left(host: paravirt.Host) -> None:
    (_, sender), (path, listener) = join(host, "sender"), join(host, "listener", multicast=())
    assert heard(sender, listener) == {BROADCAST, listener.mac}
    for group in (ONE, OTHER, ONE):
        listener.join(group, timeout_s=SECOND)
    assert listener.groups == (ONE, OTHER)
    assert heard(sender, listener) == {ONE, OTHER, BROADCAST, listener.mac}
    for _ in range(2):
        listener.leave(ONE, timeout_s=SECOND)
    assert listener.groups == (OTHER,)
    assert heard(sender, listener) == {OTHER, BROADCAST, listener.mac}
    counters = host.vif_statistics()[path].counters
    assert counters.mcast_changes == 3, "what is so already is not said again"
    assert counters.rx_filtered > 0
    assert listener.statistics().queues[0].tx_errors == 0


def test_a_next_backend_is_told_of_them(host: paravirt.Host) -> None:
    (_, sender), (_, listener) = join(host, "sender"), join(host, "listener", multicast=[ONE])
    listener.join(OTHER, timeout_s=SECOND)
    listener.leave(ONE, timeout_s=SECOND)
    listener.suspend()
    listener.resume()
    assert heard(sender, listener) == {OTHER, BROADCAST, listener.mac}


def test_filtering_is_switched_on_and_off_while_it_is_connected(host: paravirt.Host) -> None:
    (_, sender), (_, listener) = join(host, "sender"), join(host, "listener")
    listener.join(ONE, timeout_s=SECOND)
    assert heard(sender, listener) == {ONE, OTHER, BROADCAST, listener.mac}
    for on, groups in ((True, {ONE}), (False, {ONE, OTHER}), (True, {ONE})):
        listener.filter_multicast(on)
        eventually(lambda groups=groups: heard(sender, listener) == groups | {BROADCAST, listener.mac})  # type: ignore[misc]
    listener.suspend()
    listener.resume()
    assert heard(sender, listener) == {ONE, BROADCAST, listener.mac}


@pytest.mark.parametrize("word", ["", "2", "-1", "yes", "1" * 100])
def test_a_word_that_is_none_changes_nothing(host: paravirt.Host, word: str) -> None:
    (_, sender), (path, listener) = join(host, "sender"), join(host, "listener", multicast=[ONE])
    host.store.write(f"{path.frontend}/{MULTICAST_KEY}", word)
    join(host, "next")  # the service has looked at what was before
    assert heard(sender, listener) == {ONE, BROADCAST, listener.mac}


def test_queues_have_their_groups_together(host: paravirt.Host) -> None:
    (_, sender), (_, listener) = join(host, "sender"), join(host, "listener", multicast=[ONE], queues=2)
    assert listener.n_queues == 2
    assert heard(sender, listener) == {ONE, BROADCAST, listener.mac}
    listener.join(OTHER, timeout_s=SECOND)
    listener.leave(ONE, timeout_s=SECOND)
    assert heard(sender, listener) == {OTHER, BROADCAST, listener.mac}


def test_there_are_64(host: paravirt.Host) -> None:
    path, vif = join(host, "guest", multicast=())
    groups = [bytes([1, 0, 0x5E, 0, 1, i]) for i in range(MAX_GROUPS + 1)]
    for group in groups[:-1]:
        vif.join(group, timeout_s=SECOND)
    with pytest.raises(ResourceLimit, match="64 groups at most, so not 01:00:5e:00:01:40 too"):
        vif.join(groups[-1], timeout_s=SECOND)
    vif.join(groups[0], timeout_s=SECOND)
    vif.leave(groups[0], timeout_s=SECOND)
    vif.join(groups[-1], timeout_s=SECOND)
    assert len(vif.groups) == MAX_GROUPS
    vif.suspend()
    vif.resume()
    vif.leave(groups[1], timeout_s=SECOND)
    assert host.vif_statistics()[path].counters.mcast_changes == MAX_GROUPS + 1


def test_one_that_the_backend_refuses(host: paravirt.Host) -> None:
    """It is not joined, and the device goes on."""
    (_, sender), (_, vif) = join(host, "sender"), join(host, "guest", multicast=())
    for i in range(MAX_GROUPS):  # behind the back of who counts
        assert vif.queue_end().wish(Mac([1, 0, 0x5E, 0, 1, i]), join=True, deadline=None)
    with pytest.raises(ResourceLimit, match="the backend takes no more groups than it has, not 01:00:5e:00:00:01"):
        vif.join(ONE, timeout_s=SECOND)
    assert vif.groups == ()
    assert heard(sender, vif) == {BROADCAST, vif.mac}


@pytest.mark.parametrize(
    ("address", "wrong"),
    [
        (b"\x01" * 5, "an address has 6 bytes, not the 5 of 01:01:01:01:01"),
        (b"\x02" * 6, "02:02:02:02:02:02 is the address of one station, of no group"),
        (b"\xff" * 6, "ff:ff:ff:ff:ff:ff is the address of everybody, of no group"),
    ],
)
def test_what_is_no_group(host: paravirt.Host, address: bytes, wrong: str) -> None:
    domain = host.create_domain("guest")
    host.attach_vif(domain)
    with pytest.raises(InvalidRequest, match=wrong):
        domain.open_vif(multicast=[address])
    with domain.open_vif() as vif:
        for call in (vif.join, vif.leave):
            with pytest.raises(InvalidRequest, match=wrong):
                call(address)


def test_too_many_from_the_beginning(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    host.attach_vif(domain)
    with pytest.raises(ResourceLimit, match="64 groups at most"):
        domain.open_vif(multicast=[bytes([1, 0, 0, 0, 0, i]) for i in range(MAX_GROUPS + 1)])


def test_backends_that_can_less(host: paravirt.Host) -> None:
    _, sender = join(host, "sender")
    _, deaf = join(host, "deaf", multicast=[ONE], without="feature-multicast-control")
    for call in (deaf.join, deaf.leave):
        with pytest.raises(InvalidRequest, match="knows nothing of groups"):
            call(ONE)
    with pytest.raises(InvalidRequest, match="knows nothing of groups"):
        deaf.filter_multicast(True)
    assert heard(sender, deaf) == {ONE, OTHER, BROADCAST, deaf.mac}
    _, static = join(host, "static", multicast=[], without="feature-dynamic-multicast-control")
    static.join(ONE, timeout_s=SECOND)
    with pytest.raises(InvalidRequest, match="takes that when it connects only"):
        static.filter_multicast(False)
    assert heard(sender, static) == {ONE, BROADCAST, static.mac}


def test_who_waits_for_an_answer_is_not_forgotten(host: paravirt.Host) -> None:
    """While there is no backend, the time runs out; when the device is closed, it says so."""
    _, vif = join(host, "guest", multicast=())
    vif.suspend()
    with pytest.raises(TimedOut, match="did not say in time whether 01:00:5e:00:00:01 is joined"):
        vif.join(ONE, timeout_s=0.05)
    closing = threading.Timer(0.05, vif.close)
    closing.start()
    with pytest.raises(Closed):
        vif.join(ONE)
    closing.join()


TAP = """
import paravirt
from paravirt.frontend.vif_tap import VifTap
with paravirt.Host() as host:
    guest = host.create_domain("guest")
    host.attach_vif(guest)
    with guest.open_vif(multicast=[]) as vif, VifTap(vif, "eth0"):
        for i in range(64):
            vif.join(bytes([1, 0, 0x5E, 0, 0, i]))
        vif.suspend()
        vif.resume()
        vif.leave(bytes([1, 0, 0x5E, 0, 0, 1]))
        print(sum(one.counters.mcast_changes for one in host.vif_statistics().values()))
"""


def test_groups_are_joined_while_an_interface_has_the_queue() -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        missing("no network namespace can be made here")
    command = ["unshare", "-rn", sys.executable, "-c", TAP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("65\n", "")
