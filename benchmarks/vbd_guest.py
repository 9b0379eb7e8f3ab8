# SPDX-License-Identifier: MIT
"""The measured guest of `vbd_pread`: for each line with a number of seconds on standard input, reads that long.

Answers with reads a second. Arguments: CPU to run on, spin in ns.
"""

import os
import sys
import time

from paravirt.frontend.domain import Domain

PLACES = 4096


def main(cpu: int, spin_ns: int) -> None:
    os.sched_setaffinity(0, {cpu})
    with Domain.from_environment() as domain, domain.open_disk(spin_ns=spin_ns) as disk:
        print("ready", flush=True)
        offsets = [place * 7919 % PLACES * 4096 for place in range(PLACES)]
        for line in sys.stdin:
            reads, start = 0, time.perf_counter()
            end = start + float(line)
            while time.perf_counter() < end:
                for offset in offsets[:64]:
                    disk.pread(4096, offset)
                reads += 64
                offsets = offsets[64:] + offsets[:64]
            print(reads / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
