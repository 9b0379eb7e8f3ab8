# SPDX-License-Identifier: MIT
"""The measured process of `vif_tcp`, to be run by `unshare` as administrator of a network namespace: two more of them,
and several ways between them. For each line with the name of a way and seconds on standard input it prints iperf3's
bits a second.

Argument: the relay's program.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import paravirt
from paravirt.frontend.vif_tap import VifTap

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ENVIRONMENT = {**os.environ, "PATH": PATH, "LC_ALL": "C"}
WAYS = ("paravirt", "tap relay", "veth")


def run(pid: int | None, *command: str) -> str:
    """In the namespace of a process."""
    words = [*(("nsenter", "-t", str(pid), "-n") if pid else ()), *command]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    return done.stdout


@contextmanager
def beside(pid: int | None, *command: str) -> Iterator["subprocess.Popen[str]"]:
    words = [*(("nsenter", "-t", str(pid), "-n") if pid else ()), *command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            yield process
        finally:
            process.terminate()


def namespace(stack: ExitStack) -> int:
    """The process that holds a new one."""
    holder = stack.enter_context(beside(None, "unshare", "-n", "sleep", "3600"))
    while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    run(holder.pid, "ip", "link", "set", "lo", "up")
    return holder.pid


def put(pid: int, interface: str, address: str) -> None:
    run(None, "ip", "link", "set", interface, "netns", str(pid))
    run(pid, "ip", "addr", "add", f"{address}/24", "dev", interface)
    run(pid, "ip", "link", "set", interface, "up")


def measure(one: int, other: int, address: str, seconds: float) -> float:
    """Bits a second that arrived."""
    with beside(other, "iperf3", "-s", "-1", "--forceflush") as server:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            pass
        told = json.loads(run(one, "iperf3", "-J", "-c", address, "-t", str(max(1, round(seconds)))))
    return float(told["end"]["sum_received"]["bits_per_second"])


def main(relay: str) -> None:
    with ExitStack() as stack:
        one, other = namespace(stack), namespace(stack)
        host = stack.enter_context(paravirt.Host())
        for i, pid in enumerate((one, other), 1):
            domain = host.create_domain(f"d{i}")
            host.attach_vif(domain)
            tap = stack.enter_context(VifTap(domain.open_vif(), f"pv{i}"))
            put(pid, tap.name, f"10.9.0.{i}")
        process = stack.enter_context(beside(None, relay, "re1", "re2"))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the relay does not run"
        run(None, "ip", "link", "add", "ve1", "type", "veth", "peer", "name", "ve2")
        for i, pid in enumerate((one, other), 1):
            put(pid, f"re{i}", f"10.9.1.{i}")
            put(pid, f"ve{i}", f"10.9.2.{i}")
        print("ready", flush=True)
        for line in sys.stdin:
            name, _, seconds = line.strip().rpartition(" ")
            print(measure(one, other, f"10.9.{WAYS.index(name)}.2", float(seconds)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
