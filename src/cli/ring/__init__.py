# SPDX-License-Identifier: MIT
"""`paravirt ring`: looking at live rings."""

from paravirt.cli.main import LazyGroup

COMMANDS = {
    "list": ("paravirt.cli.ring.list:list_", "All live rings of this host."),
    "watch": ("paravirt.cli.ring.watch:watch", "Rates, occupancy, notifications and latencies, while they happen."),
    "dump": ("paravirt.cli.ring.dump:dump", "Both ends of one ring, and what is in flight, decoded."),
    "stuck": ("paravirt.cli.ring.stuck:stuck", "Rings that do not go on, and which side owes what."),
    "kick": ("paravirt.cli.ring.kick:kick", "Wake one or both ends of a ring, as if its peer had notified it."),
    "record": ("paravirt.cli.ring.record:record", "Write all requests and responses of a ring into a file."),
    "replay": ("paravirt.cli.ring.replay:replay", "Send the requests of a recording again, or answer as it says."),
    "show": ("paravirt.cli.ring.show:show", "What a recording says."),
}

ring = LazyGroup("ring", table=COMMANDS, help="Look at live rings, record them, replay recordings.")
