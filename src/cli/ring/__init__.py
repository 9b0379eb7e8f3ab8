# SPDX-License-Identifier: MIT
"""`paravirt ring`: looking at live rings."""

from paravirt.cli.main import LazyGroup

COMMANDS = {
    "list": ("paravirt.cli.ring.list:list_", "All live rings of this host."),
    "watch": ("paravirt.cli.ring.watch:watch", "Rates, occupancy, notifications and latencies, while they happen."),
    "kick": ("paravirt.cli.ring.kick:kick", "Wake one or both ends of a ring, as if its peer had notified it."),
}

ring = LazyGroup("ring", table=COMMANDS, help="Look at live rings, without stopping them.")
