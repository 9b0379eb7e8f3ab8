# SPDX-License-Identifier: MIT
"""Two domains and a program on one bridge: who hears whom."""

import paravirt
from paravirt.ring.netif import Burst

TYPE = b"\x88\xb5"  # for local experiments
BROADCAST = b"\xff" * 6
STATION = bytes.fromhex("020000000001")


def frame(to: bytes, source: bytes, text: bytes) -> bytes:
    return (to + source + TYPE + text).ljust(60, b"\0")


def text(packet: bytes) -> str:
    return packet[14:].rstrip(b"\0").decode()


with paravirt.Host() as host, host.bridge() as bridge:
    domains = [host.create_domain(name) for name in ("one", "other")]
    for domain in domains:
        host.attach_vif(domain)
    one, other = (domain.open_vif() for domain in domains)
    port, leg = bridge.add_user("program")

    one.send([frame(BROADCAST, one.mac, b"is anybody here?")])
    print("other hears:", text(other.receive(timeout_s=5.0)[0]))
    heard = Burst()
    leg.get(heard, timeout_s=5.0)
    print("the program hears:", text(heard[0]))

    leg.give(Burst.of([frame(one.mac, STATION, b"yes, a program")]))
    print("one hears:", text(one.receive(timeout_s=5.0)[0]))

    for name, address in bridge.addresses():
        print(f"the bridge has learnt {address.mac} at {name}")
