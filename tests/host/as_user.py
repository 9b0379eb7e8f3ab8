# SPDX-License-Identifier: MIT
"""Run a command as an unprivileged user: `python as_user.py COMMAND...`, called by root.

What the command needs and that user could not enter (an interpreter below /root, say) is bound into a mount namespace
of its own, at the same path. Everything else is as it is for any user of the machine.
"""

import os
import sys
from pathlib import Path

from paravirt.host.namespaces import arrange
from paravirt.host.reach import LIVE_DIRECTORIES, needs_of, view_for
from paravirt.ring import process
from paravirt.ring.process import MountFlag, Namespace

UID = 12345


def main() -> None:
    command = sys.argv[1:]
    view = view_for([*needs_of(command, Path.cwd(), os.environ), Path(__file__).parents[1]], uid=UID)
    process.unshare(Namespace.MOUNT)
    process.mount("none", "/", flags=MountFlag.PRIVATE | MountFlag.RECURSIVE)
    # /tmp and its like stay the machine's, unless what is needed stands there and may be closed to that user.
    living = {path for path in LIVE_DIRECTORIES if any(needed.startswith(f"{path}/") for needed in view.expose)}
    arrange([path for path in view.cover if path not in LIVE_DIRECTORIES or path in living], view.expose)
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    os.execvpe(command[0], command, environment | {"HOME": "/nonexistent"})


if __name__ == "__main__":
    main()
