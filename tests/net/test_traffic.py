# SPDX-License-Identifier: MIT
"""The kernel's TCP/IP over network devices: ping, iperf3, a download, with and without offloads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import needs

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = ("ip", "ping", "iperf3", "tcpdump", "nsenter", "unshare")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
UNSHARE = ("unshare", "-U", "--map-user=1000", "--keep-caps", "-n")
"""Not as root there: tcpdump would want to become somebody else."""

pytestmark = pytest.mark.timeout(180)


def see(offloads: bool, mtu: int) -> dict[str, Any]:
    for program in PROGRAMS:
        if shutil.which(program, path=PATH) is None:
            needs.missing(f"{program} is not installed")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("/dev/net/tun is not there, or may not be opened")
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("user namespaces are refused here")
    command = [*UNSHARE, sys.executable, "-m", "tests.net.traffic", str(int(offloads)), str(mtu)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize(("offloads", "mtu"), [(True, 1500), (False, 1500), (True, 9000), (False, 9000)])
def test_the_kernels_stack_between_domains_and_with_the_host(offloads: bool, mtu: int) -> None:
    seen = see(offloads, mtu)
    assert [seen[f"ping {what}"] for what in ("v4", "v6", "host", "large")] == [3] * 4
    for what in ("tcp v4", "tcp v6", "tcp host"):
        assert seen[what]["bits_per_s"] > 1e6, what
    assert seen["udp"]["bits_per_s"] > 1e6
    assert seen["download"]
    if offloads:
        assert seen["largest"] > mtu  # large packets went through whole
    else:
        checked, wrong = seen["checksums"]
        assert checked > 50
        assert wrong == 0
        assert seen["largest"] <= mtu + 14
