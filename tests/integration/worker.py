# SPDX-License-Identifier: MIT
"""A guest that writes and reads back until its standard input ends, and says how far it is.

Every block holds its own number and a version; what is read must be the last version that was written.
"""

import random
import struct
import sys
import threading

import paravirt

BLOCK = 4096
RECORD = struct.Struct("<QQ")


def content(place: int, version: int) -> bytes:
    return RECORD.pack(place, version) * (BLOCK // RECORD.size)


def main() -> None:
    stop = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    chance, versions, rounds = random.Random(11), {}, 0
    with paravirt.Domain.from_environment() as domain, domain.open_disk("xvda") as disk:
        places = disk.size_bytes // BLOCK
        print("ready", flush=True)
        while not stop.is_set():
            chosen = chance.sample(range(places), 8)
            for place in chosen:
                versions[place] = versions.get(place, 0) + 1
            disk.write_many((place * BLOCK, content(place, versions[place])) for place in chosen)
            for place in chance.sample(sorted(versions), min(8, len(versions))):
                if disk.pread(BLOCK, place * BLOCK) != content(place, versions[place]):
                    print("wrong data", flush=True)
                    sys.exit(1)
            rounds += 1
            if rounds % 20 == 0:
                print(rounds, flush=True)
        disk.flush()
        for place, version in versions.items():
            if disk.pread(BLOCK, place * BLOCK) != content(place, version):
                print("wrong data", flush=True)
                sys.exit(1)
        counts = disk.statistics()
        print("done", rounds, counts.reconnects, counts.reissued, flush=True)


if __name__ == "__main__":
    main()
