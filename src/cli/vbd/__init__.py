# SPDX-License-Identifier: MIT
"""`paravirt vbd`: the disks of domains."""

from paravirt.cli.main import LazyGroup

COMMANDS = {
    "attach": ("paravirt.cli.vbd.config:attach", "Give a domain a disk."),
    "detach": ("paravirt.cli.vbd.config:detach", "Take a disk away from a domain."),
    "resize": ("paravirt.cli.vbd.config:resize", "Tell a domain that the image of a disk has another size."),
    "limit": ("paravirt.cli.vbd.config:limit", "How much a disk may do a second."),
    "export": ("paravirt.cli.vbd.export:export", "Serve a disk to NBD clients."),
    "mount": ("paravirt.cli.vbd.mount:mount", "Make a disk a file."),
    "list": ("paravirt.cli.vbd.config:list_", "All attached disks, or those of one domain."),
    "stat": ("paravirt.cli.vbd.stat:stat", "What disks have done: requests, bytes, errors, latencies."),
    "watch": ("paravirt.cli.vbd.watch:watch", "Requests and bytes a second and latencies of disks, while they happen."),
}

vbd = LazyGroup("vbd", table=COMMANDS, help="Attach, detach, list and use the disks of domains.")
