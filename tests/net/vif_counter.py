# SPDX-License-Identifier: MIT
"""A guest that does as it is told, a line each: `send MAC N BYTES` or `receive N`. Says its address first, in hex."""

import sys

import paravirt

TYPE = b"\x88\xb5"


def main() -> None:
    with paravirt.Domain.from_environment() as domain:
        vif = domain.open_vif()
        print(vif.mac.hex(), flush=True)
        for line in sys.stdin:
            what, *rest = line.split()
            if what == "send":
                packet = (bytes.fromhex(rest[0]) + vif.mac + TYPE).ljust(int(rest[2]), b"\0")
                print("sent", vif.send([packet] * int(rest[1]), timeout_s=20.0), flush=True)
            else:
                n = int(rest[0])
                found = 0
                while found < n and (came := vif.receive(n - found, timeout_s=20.0)):
                    found += len(came)
                print("received", found, flush=True)


main()
