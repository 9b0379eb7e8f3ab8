# SPDX-License-Identifier: MIT
"""`paravirt vif`: the network devices of domains."""

from paravirt.cli.main import LazyGroup

COMMANDS = {
    "attach": ("paravirt.cli.vif.config:attach", "Give a domain a network device."),
    "detach": ("paravirt.cli.vif.config:detach", "Take a network device away from a domain."),
    "set": ("paravirt.cli.vif.config:set_", "How much a guest may send, and how the switch treats its device."),
    "list": ("paravirt.cli.vif.config:list_", "All network devices, or those of one domain."),
    "stat": ("paravirt.cli.vif.stat:stat", "What network devices have sent, received and dropped."),
    "watch": ("paravirt.cli.vif.watch:watch", "Watch network devices: packets and bits a second, drops, wake-ups."),
    "capture": ("paravirt.cli.vif.capture:capture", "Capture what passes a device, a port or a bridge into a file."),
    "tap": ("paravirt.cli.vif.tap:tap", "In a domain: make its network device an interface of the kernel."),
}

vif = LazyGroup("vif", table=COMMANDS, help="Attach, detach, list and use the network devices of domains.")
