# SPDX-License-Identifier: MIT
"""A guest on a network: `vif_worker.py echo` sends back what it gets; `vif_worker.py ask` asks again and again whether
anybody answers, and says "answered N" for each number that came back. Both until their standard input ends.
"""

import sys
import threading

import paravirt

TYPE = b"\x88\xb5"
BROADCAST = b"\xff" * 6


def main() -> None:
    role = sys.argv[1]
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    with paravirt.Domain.from_environment() as domain:
        vif = domain.open_vif()
        print("connected", flush=True)
        number = 0
        while not done.is_set():
            if role == "echo":
                for packet in vif.receive(timeout_s=0.2):
                    if packet[12:14] == TYPE:
                        vif.send([packet[6:12] + vif.mac + packet[12:]], timeout_s=0.2)
                continue
            content = number.to_bytes(8, "little")
            vif.send([(BROADCAST + vif.mac + TYPE + content).ljust(60, b"\0")], timeout_s=0.2)
            if any(packet[14:22] == content for packet in vif.receive(timeout_s=0.2)):
                number += 1
                if number % 10 == 0:
                    print(f"answered {number}", flush=True)
        print(f"reconnects {vif.statistics().reconnects}", flush=True)


main()
