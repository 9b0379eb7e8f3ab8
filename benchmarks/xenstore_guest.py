# SPDX-License-Identifier: MIT
"""A process of a domain that puts the load generator on xenstored over the domain's own, labelled connections.

For each line on standard input, a JSON list of the program and its arguments, it opens connections (as many as its own
argument says), runs the program with them and passes on what that prints. Then comes a line "ended".
"""

import json
import subprocess
import sys

from paravirt.hypervisor.client import Hypervisor


def main(connections: int) -> None:
    with Hypervisor.from_environment() as hypervisor:
        print("ready", flush=True)
        for line in sys.stdin:
            sockets = [hypervisor.store_connection() for _ in range(connections)]
            fds = [each.fileno() for each in sockets]
            given = [word for fd in fds for word in ("--fd", str(fd))]
            subprocess.run([*json.loads(line), *given], pass_fds=fds, check=False)
            for each in sockets:
                each.close()
            print("ended", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
