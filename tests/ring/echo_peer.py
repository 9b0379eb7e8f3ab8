# SPDX-License-Identifier: MIT
"""A back end in a process of its own: answers until the front end sends an id of 2**64 - 1, then tells its counters.

Run as: python -m tests.ring.echo_peer PAGES MEMORY_FD HALF...
"""

import dataclasses
import json
import sys

import numpy as np

from paravirt.ring.event import Half, from_half
from paravirt.ring.memory import Mapping
from paravirt.ring.shared import BackRing

from .support import REQUEST, RESPONSE, answers

LAST = 2**64 - 1


def main() -> None:
    pages, memory_fd, *half = map(int, sys.argv[1:])
    waiter, port = from_half(Half(*half))
    with waiter, Mapping(memory_fd, pages * 4096) as mapping:
        with BackRing.attach(mapping, REQUEST, RESPONSE, port=port) as ring:
            print("ready", flush=True)
            batch = np.zeros(ring.size, REQUEST)
            last = False
            while not last:
                ring.wait()
                n = ring.take(batch)
                last = bool((batch["id"][:n] == LAST).any())
                ring.push(answers(batch[:n]))
            told = {"ring": ring.statistics(), "waiter": waiter.statistics(), "port": port.statistics()}
            print(json.dumps({name: dataclasses.asdict(one) for name, one in told.items()}), flush=True)


if __name__ == "__main__":
    main()
