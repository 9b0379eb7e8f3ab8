# SPDX-License-Identifier: MIT
"""The process that is measured: a host with two guests on a bridge. For each line with a job on standard input, a JSON
object, it runs that and prints what came of it, or `{"error": text}`.

Arguments: two CPUs, one for the guests and one for the thread that moves frames; pages of a ring; how both wait.
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any, cast

import paravirt
from paravirt.backend.bridge import Bridge
from paravirt.errors import ParavirtError
from paravirt.frontend.vif import Vif
from paravirt.protocol.netif import Mac
from paravirt.ring.netif import Burst
from paravirt.ring.netload import NetLoad, NetLoadResult, Way
from paravirt.ring.waiting import Wait

NOBODY = Mac(bytes.fromhex("020000000001"))
SPIN_NS = {"spin": 1_000_000_000, "adaptive": 50_000, "sleep": 0}
SETTLE_S = 0.05


def thread_cpu_s(tid: int) -> float:
    """CPU time of a thread so far."""
    return time.clock_gettime(~tid << 3 | 6)  # the kernel's clock id of a thread


class Stage:
    """Two guests, a bridge, and a port that nothing comes from."""

    def __init__(self, host: paravirt.Host, bridge: Bridge, cpus: tuple[int, int], pages: int, wait: Wait) -> None:
        self.bridge = bridge
        bridge.set_hold(1.0)
        self._wait = wait
        self.one, self.other = (self._join(host, name, pages, wait) for name in ("one", "other"))
        self.null = bridge.add_null("null", NOBODY)
        self.leg = bridge.port("vif1.0").legs[0]
        os.sched_setaffinity(bridge.thread, {cpus[1]})
        os.sched_setaffinity(0, {cpus[0]})

    @staticmethod
    def _join(host: paravirt.Host, name: str, pages: int, wait: Wait) -> Vif:
        domain = host.create_domain(name)
        host.attach_vif(domain)
        return domain.open_vif(ring_page_order=pages.bit_length() - 1, wait=wait, spin_ns=SPIN_NS[wait])

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job: its way, and the fields of a load."""
        way = job.pop("way")
        wired = {"wire": self.null.legs[0], "python": self.null.legs[0], "echo": self.leg}.get(way)
        self.bridge.wire(self.leg, wired)
        back, notified = thread_cpu_s(self.bridge.thread), self._notified()
        told = getattr(self, f"_{way.replace('-', '_')}")(**job)
        told["back_cpu_s"] = thread_cpu_s(self.bridge.thread) - back
        told["notified"] = self._notified() - notified
        return cast(dict[str, Any], told)

    def _notified(self) -> int:
        queue = self.one.statistics().queues[0]
        return queue.tx_ring.notifications_sent + queue.rx_ring.notifications_sent

    def _load(self, way: Way, to: bytes, **job: Any) -> NetLoad:
        return NetLoad(way, to=to, source=bytes(self.one.mac), spin_ns=SPIN_NS[self._wait], **job)

    def _send(self, to: bytes, job: dict[str, Any]) -> dict[str, Any]:
        found = self.one.queue_end().run(self._load(Way.SEND, to, **job), takes=False)
        return {
            "sent": found.sent,
            "arrived": found.sent,
            "seconds": found.seconds,
            "front_cpu_s": found.cpu_s,
            "waits": found.waits,
        }

    def _wire(self, **job: Any) -> dict[str, Any]:
        return self._send(NOBODY, job)

    def _switch(self, **job: Any) -> dict[str, Any]:
        return self._send(NOBODY, job)

    def _echo(self, **job: Any) -> dict[str, Any]:
        found = self.one.queue_end().run(self._load(Way.TRIP, self.one.mac, **job), takes=False)
        latency = found.latency.percentiles_ns
        return {
            "sent": found.sent,
            "arrived": found.taken,
            "seconds": found.seconds,
            "front_cpu_s": found.cpu_s,
            "p50_ns": latency[50.0],
            "p99_ns": latency[99.0],
            "p999_ns": latency[99.9],
            **_wrong(found),
        }

    def _guests(self, **job: Any) -> dict[str, Any]:
        """One sends, the other takes."""
        taker = self._load(Way.TAKE, self.other.mac, **job | {"seconds": 10.0})
        found: list[NetLoadResult] = []
        self.other.announce()
        while self.one.receive(timeout_s=SETTLE_S):
            pass
        taking = threading.Thread(target=lambda: found.append(self.other.queue_end().run(taker, takes=True)))
        taking.start()
        told = self._send(self.other.mac, job)
        time.sleep(SETTLE_S)
        taker.stop()
        taking.join()
        return told | {"arrived": found[0].taken} | _wrong(found[0])

    def _python(self, *, seconds: float, burst: int, sizes: list[int], verify: bool) -> dict[str, Any]:
        """Bursts by Python."""
        made = Burst(burst, sum(sizes[i % len(sizes)] + 128 for i in range(burst)))
        for i in range(burst):
            made.add((NOBODY + self.one.mac + b"\x88\xb5").ljust(sizes[i % len(sizes)], b"\0"))
        sent, cpu, start = 0, time.thread_time(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(16):
                sent += self.one.send(made)
        took = time.perf_counter() - start
        return {"sent": sent, "arrived": sent, "seconds": took, "front_cpu_s": time.thread_time() - cpu}

    def _python_receive(self, *, seconds: float, burst: int, **job: Any) -> dict[str, Any]:
        """A load in C sends to a guest whose Python takes bursts."""
        self.other.announce()
        load = self._load(Way.SEND, self.other.mac, seconds=seconds, burst=burst, **job)
        found: list[NetLoadResult] = []
        sending = threading.Thread(target=lambda: found.append(self.one.queue_end().run(load, takes=False)))
        into, taken = Burst(burst, 1 << 18), 0
        sending.start()
        cpu, start = time.thread_time(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(16):
                into.clear()
                taken += self.other.receive_burst(into, burst, timeout_s=0.01)
        took = time.perf_counter() - start
        cpu = time.thread_time() - cpu
        sending.join()
        while self.other.receive(timeout_s=SETTLE_S):
            pass
        return {"sent": found[0].sent, "arrived": taken, "seconds": took, "front_cpu_s": cpu}


def _wrong(found: NetLoadResult) -> dict[str, int]:
    return {name: getattr(found, name) for name in ("misplaced", "missing", "wrong")}


def main(cpus: tuple[int, int], pages: int, wait: Wait) -> None:
    spin = {} if wait == "adaptive" else {"wait": wait}
    with paravirt.Host(**spin) as host, host.bridge() as bridge:  # type: ignore[arg-type]
        stage = Stage(host, bridge, cpus, pages, wait)
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            try:
                told = stage.run(json.loads(line))
            except ParavirtError as error:
                told = {"error": str(error)}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    with suppress(BrokenPipeError, KeyboardInterrupt):
        main((int(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3]), cast(Wait, sys.argv[4]))
