# SPDX-License-Identifier: MIT
"""A guest that uses its disk and writes nonsense into what it shows of it, until its standard input ends."""

import random
import sys
import threading

import paravirt
from paravirt.ring._core import ffi, lib

NAMES = ("latency", "counters", "stamps", "created_ns", "queue", "device_id", "port", "domid", "peer_domid", "protocol")


def main() -> None:
    stop = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    chance = random.Random(5)
    with paravirt.Domain.from_environment() as domain, domain.open_disk("xvda") as disk:
        disk.pread(512, 0)
        record = lib.pv_look_at(domain.hypervisor._records._objects[0]._head, 0)
        kept = record.generation
        print("ready", flush=True)
        while not stop.is_set():
            for name in NAMES:
                field = ffi.addressof(record, name)
                n_bytes = ffi.sizeof(ffi.typeof(field).item)
                choices = (b"\xff" * n_bytes, bytes(n_bytes), chance.randbytes(n_bytes))
                ffi.memmove(field, chance.choice(choices), n_bytes)
            if chance.random() < 0.7:
                record.device_id = 51712
            record.counts = chance.choice((0, 1, 1, 1, 2**32 - 1))
            for name in ("produced", "consumed", "batches", "notified", "prod", "cons", "max_outstanding", "dead"):
                setattr(record.ring, name, chance.getrandbits(32))
            record.generation = chance.choice((kept, chance.getrandbits(32)))
            stop.wait(0.001)


if __name__ == "__main__":
    main()
