# SPDX-License-Identifier: MIT
"""Become another program that is killed when its parent ends. Arguments: a pidfd of the parent, the command."""

import os
import sys

from paravirt.ring import process

if __name__ == "__main__":
    parent = int(sys.argv[1])
    process.die_with_parent(parent)
    os.close(parent)
    os.execvp(sys.argv[2], sys.argv[2:])
