# SPDX-License-Identifier: MIT
"""A domain that shares memory, a port and store keys with Dom0 alone; it says where they are and then waits."""

import json
import os
import signal

from paravirt.hypervisor.client import Hypervisor
from paravirt.xenstore.client import XenstoreClient


def main() -> None:
    with Hypervisor.from_environment() as hypervisor:
        store = XenstoreClient.from_socket(hypervisor.store_connection())
        store.write(f"/local/domain/{hypervisor.domid}/data/secret", "for Dom0 and me")
        run = hypervisor.create_arena(0, 4).allocate(1)
        run.view[:6] = b"secret"
        run.arena.grant(run.gref)
        channel = hypervisor.alloc_unbound(hypervisor.waiter(), 0)
        found = {"domid": hypervisor.domid, "gref": run.gref, "port": channel.port, "pid": os.getpid()}
        print(json.dumps(found), flush=True)
        signal.pause()


main()
