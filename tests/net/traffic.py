# SPDX-License-Identifier: MIT
"""Two domains and the host on one bridge, each with the kernel's TCP/IP on top, in network namespaces of this process'
own: to be run by `unshare` with the rights of an administrator there. `traffic.py OFFLOADS MTU` prints as JSON what it
saw.
"""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import paravirt
from paravirt.frontend.vif_tap import VifTap

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ENVIRONMENT = {**os.environ, "PATH": PATH, "LC_ALL": "C"}
DOWNLOAD_BYTES = 8 << 20


def inside(pid: int | None, *command: str) -> list[str]:
    """A command in the network namespace of a process; None: in our own."""
    return [*(("nsenter", "-t", str(pid), "-n") if pid else ()), *command]


def run(pid: int | None, *command: str) -> str:
    done = subprocess.run(
        inside(pid, *command), capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def beside(pid: int | None, *command: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        inside(pid, *command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


def iperf(server: int | None, client: int | None, address: str, *options: str) -> dict[str, Any]:
    """Bits a second that arrived, and what was lost of UDP."""
    with beside(server, "iperf3", "-s", "-1", "--forceflush") as listening:
        assert listening.stdout is not None
        while "listening" not in listening.stdout.readline():
            pass
        found = json.loads(run(client, "iperf3", "-J", "-c", address, *options))
    end = found["end"]
    return {"bits_per_s": (end.get("sum_received") or end["sum"])["bits_per_second"]}


def ping(pid: int | None, address: str, n_bytes: int = 56) -> int:
    """Answers to three."""
    said = run(pid, "ping", "-c", "3", "-i", "0.2", "-W", "2", "-s", str(n_bytes), address)
    return int(re.search(r"(\d+) received", said)[1])  # type: ignore[index]


def download(server_address: str, client: int) -> bool:
    """A file from a server at the host to a domain: whether it came whole."""
    with TemporaryDirectory() as folder:
        content = os.urandom(DOWNLOAD_BYTES)
        Path(folder, "file").write_bytes(content)
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        handler.log_message = lambda *_: None  # type: ignore[attr-defined]
        with http.server.ThreadingHTTPServer((server_address, 8080), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            code = (
                "import hashlib, urllib.request as r;"
                f"print(hashlib.sha256(r.urlopen('http://{server_address}:8080/file').read()).hexdigest())"
            )
            digest = run(client, sys.executable, "-c", code).strip()
            server.shutdown()
        return digest == hashlib.sha256(content).hexdigest()


def wrong_checksums(pid: int, other: int) -> tuple[int, int]:
    """Packets of a short transfer as tcpdump sees them at their destination, and those with a wrong checksum."""
    capture = ("tcpdump", "-i", "pv2", "-n", "-vv", "-Q", "in", "-c", "100", "tcp")
    with beside(other, *capture) as sniffer:
        time.sleep(1.0)
        iperf(other, pid, "10.9.0.2", "-n", "4M")
        said = sniffer.communicate(timeout=20)[0]
    assert "cksum" in said, said
    return said.count("cksum"), said.count("incorrect")


def main() -> None:
    offloads, mtu = sys.argv[1] == "1", int(sys.argv[2])
    seen: dict[str, Any] = {}
    with ExitStack() as stack:
        host = stack.enter_context(paravirt.Host())
        pids = []
        for i in (1, 2):
            domain = host.create_domain(f"d{i}")
            host.attach_vif(domain, mtu=mtu)
            tap = stack.enter_context(VifTap(domain.open_vif(offloads=offloads), f"pv{i}", offloads=offloads))
            place = stack.enter_context(beside(None, "unshare", "-n", "sleep", "300"))
            while os.readlink(f"/proc/{place.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
                time.sleep(0.01)
            pids.append(place.pid)
            run(None, "ip", "link", "set", tap.name, "netns", str(place.pid))
            run(place.pid, "ip", "addr", "add", f"10.9.0.{i}/24", "dev", tap.name)
            run(place.pid, "ip", "addr", "add", f"fd00::{i}/64", "dev", tap.name, "nodad")
            run(place.pid, "ip", "link", "set", tap.name, "up")
            run(place.pid, "ip", "link", "set", "lo", "up")
        bridge = stack.enter_context(host.bridge())
        bridge.add_tap("host0", offloads=offloads)
        run(None, "ip", "addr", "add", "10.9.0.100/24", "dev", "host0")
        run(None, "ip", "link", "set", "host0", "mtu", str(mtu), "up")
        run(None, "ip", "link", "set", "lo", "up")
        one, other = pids
        seen["ping v4"] = ping(one, "10.9.0.2")
        seen["ping v6"] = ping(one, "fd00::2")
        seen["ping host"] = ping(None, "10.9.0.1")
        seen["ping large"] = ping(one, "10.9.0.2", 20_000)
        seen["tcp v4"] = iperf(other, one, "10.9.0.2", "-n", "64M")
        seen["tcp v6"] = iperf(other, one, "fd00::2", "-n", "64M")
        seen["udp"] = iperf(other, one, "10.9.0.2", "-u", "-b", "20M", "-n", "1M")
        seen["tcp host"] = iperf(None, one, "10.9.0.100", "-n", "64M")
        seen["download"] = download("10.9.0.100", other)
        if not offloads:
            seen["checksums"] = wrong_checksums(one, other)
        seen["segmented"] = sum(found.counters.rx_segmented for found in host.vif_statistics().values())
        seen["largest"] = max(
            found.counters.rx_bytes / max(1, found.counters.rx_packets) for found in host.vif_statistics().values()
        )
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
