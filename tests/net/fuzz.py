# SPDX-License-Identifier: MIT
"""Build the fuzz target of the network's core and run it: `python -m tests.net.fuzz [RUNS]`; `make fuzz-net`."""

import sys
from pathlib import Path

from tests.ring.fuzz import RINGS, Target, main

NET = Target(
    Path(__file__).parent / "fuzz_net.c",
    (*RINGS, "pv_netif", "pv_netback*", "pv_netfront*", "pv_netctrl*", "pv_netgrefs*", "pv_offload*", "pv_switch*"),
)

if __name__ == "__main__":
    sys.exit(main(NET))
