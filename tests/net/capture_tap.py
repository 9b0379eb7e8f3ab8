# SPDX-License-Identifier: MIT
"""UDP of the kernel through a TAP interface whose card makes checksums, captured: to be run by `unshare`.

`capture_tap.py DIRECTORY` prints how many of the packets that were sent had a blank checksum.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import paravirt
from paravirt.protocol.bridge_state import CaptureWish
from paravirt.ring.netif import Burst, FrameFlag

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
N = 20
STATION = "02:00:00:00:00:01"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, env={**os.environ, "PATH": PATH})


def main() -> None:
    with paravirt.Host() as host, host.bridge() as bridge:
        bridge.add_tap("host0")
        _, leg = bridge.add_user("station")
        ip("addr", "add", "10.7.0.1/24", "dev", "host0")
        ip("link", "set", "host0", "up")
        ip("neigh", "add", "10.7.0.2", "lladdr", STATION, "dev", "host0", "nud", "permanent")
        burst, blank, found = Burst(), 0, 0
        with host.capture(CaptureWish("host0")) as capture:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for i in range(N):
                    sender.sendto(bytes([i]) * (100 + i), ("10.7.0.2", 4000))
            while found < N:
                burst.clear()
                assert leg.get(burst, timeout_s=10.0)
                for frame, packet in zip(burst.frames, burst, strict=True):
                    if packet[12:14] == b"\x08\x00" and packet[23] == socket.IPPROTO_UDP:
                        found += 1
                        blank += bool(frame["flags"] & FrameFlag.CSUM_BLANK)
            capture.finish("all is there")
            Path(sys.argv[1], "capture").write_bytes(b"".join(bytes(chunk) for chunk in capture.chunks()))
    print(blank)


main()
