# SPDX-License-Identifier: MIT
"""`paravirt bridge`: the switches that network devices are on."""

from paravirt.cli.main import LazyGroup

COMMANDS = {
    "list": ("paravirt.cli.bridge.config:list_", "Bridges, and what is on them."),
    "set": (
        "paravirt.cli.bridge.config:set_",
        "Make or change a bridge: interfaces, files, wire, mirror, ageing, hold.",
    ),
    "ports": ("paravirt.cli.bridge.look:ports", "What each port of a bridge has passed and dropped."),
    "addresses": ("paravirt.cli.bridge.look:addresses", "The stations that a bridge has heard, and where."),
    "replay": ("paravirt.cli.bridge.replay:replay", "Send the frames of a capture file into a bridge."),
    "remove": ("paravirt.cli.bridge.config:remove", "Take a bridge's interfaces away; devices keep it alive."),
}

bridge = LazyGroup("bridge", table=COMMANDS, help="Switches between network devices and the kernel.")
