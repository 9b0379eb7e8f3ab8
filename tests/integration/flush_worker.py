# SPDX-License-Identifier: MIT
"""A guest that writes versions of blocks for ever, flushes each round, and then says that it is durable."""

import random
import sys

import paravirt
from tests.integration.worker import BLOCK, content

BLOCKS = 64


def main() -> None:
    with paravirt.Domain.from_environment() as domain, domain.open_disk("xvda") as disk:
        chance, version = random.Random(5), 0
        while True:
            version += 1
            places = chance.sample(range(BLOCKS), 16)
            disk.write_many((place * BLOCK, content(place, version)) for place in places)
            disk.flush()
            print(version, *places, flush=True)


if __name__ == "__main__":
    sys.exit(main())
