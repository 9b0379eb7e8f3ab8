# SPDX-License-Identifier: MIT
"""What holds shared memory can stand in a cycle, and the garbage collector takes the cycle away."""

import subprocess
import sys

import pytest

_CYCLE = """
import gc
import numpy as np
from paravirt.ring.flex import FlexRing
from paravirt.ring.memory import Mapping, address_of, map_new, pinned
from paravirt.ring.shared import FrontRing
from paravirt.ring.stream import XENSTORE_FRONT, ByteStream

class Holder:
    pass

def held(make, view):
    holder = Holder()
    holder.me, holder.view, holder.made = holder, view, make(view)

message = np.dtype([("id", "<u8")])
for _ in range(50):
    fd, mapping = map_new("memfd", 8192)
    held({make}, mapping._view[:{n_bytes}])
    del mapping
    gc.collect()
print("alive")
"""


@pytest.mark.parametrize(
    ("make", "n_bytes"),
    [
        ("pinned", 4096),
        ("address_of", 4096),
        ("lambda view: FrontRing.create(view, message, message)", 4096),
        ("lambda view: FlexRing.create(view[:4096], view[4096:], refs=[1])", 8192),
        ("lambda view: ByteStream(view, XENSTORE_FRONT)", 4096),
    ],
)
def test_a_cycle_of_what_holds_a_view(make: str, n_bytes: int) -> None:
    program = _CYCLE.replace("{make}", make).replace("{n_bytes}", str(n_bytes))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
