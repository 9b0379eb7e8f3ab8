# SPDX-License-Identifier: MIT
"""A guest on a network: `vif_worker.py echo` sends back what it gets; `vif_worker.py ask` asks again and again whether
anybody answers, and says "answered N" for every tenth number that came back, in the end how many did not;
`vif_worker.py flood` sends to who has answered, as fast as it can, takes nothing, and says "sent N". All until their
standard input ends. A word behind that: only those with the same one talk to each other.
"""

import sys
import threading
import time
import zlib

import paravirt
from paravirt.frontend.vif import Vif
from paravirt.ring.netif import Burst

BROADCAST = b"\xff" * 6


def main() -> None:
    role = sys.argv[1]
    kind = (0x8000 | zlib.crc32(sys.argv[2].encode()) & 0xFFF if sys.argv[2:] else 0x88B5).to_bytes(2, "big")
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    with paravirt.Domain.from_environment() as domain:
        vif = domain.open_vif()
        print("connected", flush=True)
        number = lost = 0
        while not done.is_set():
            if role == "echo":
                for packet in vif.receive(timeout_s=0.2):
                    if packet[12:14] == kind:
                        vif.send([packet[6:12] + vif.mac + packet[12:]], timeout_s=0.2)
                continue
            content = number.to_bytes(8, "little")
            vif.send([(BROADCAST + vif.mac + kind + content).ljust(60, b"\0")], timeout_s=0.2)
            answers = answers_to(vif, kind + content)
            lost += not answers
            if answers and role == "flood":
                flood(vif, answers[0][6:12], kind, done)
            elif answers:
                number += 1
                if number % 10 == 0:
                    print(f"answered {number}", flush=True)
        print(f"lost {lost}\nreconnects {vif.statistics().reconnects}", flush=True)


def answers_to(vif: Vif, content: bytes) -> list[bytes]:
    """Frames with it that come within a second; what others say to everybody comes, too."""
    until = time.monotonic() + 1.0
    found: list[bytes] = []
    while not found and (left := until - time.monotonic()) > 0:
        found = [packet for packet in vif.receive(timeout_s=left) if packet[12:22] == content]
    return found


def flood(vif: Vif, to: bytes, kind: bytes, done: threading.Event) -> None:
    burst = Burst.of([(to + vif.mac + kind).ljust(1000, b"f")] * 50)
    sent = told = 0
    while not done.is_set():
        sent += vif.send(burst, timeout_s=0.2)
        if sent - told >= 10_000:
            print(f"sent {sent}", flush=True)
            told = sent


main()
