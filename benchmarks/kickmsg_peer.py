# SPDX-License-Identifier: MIT
"""kickmsg's echo, in two processes of its own. Run as: python -m benchmarks.kickmsg_peer front|back NAME CPU"""

import json
import os
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

REQUEST_BYTES, RESPONSE_BYTES = 112, 16
ROUNDS_PER_CLOCK_READ = 1024
STOP = b"stop"


def _topics(name: str) -> tuple[Any, Any]:
    """Publisher and subscriber regions of requests and responses."""
    import kickmsg

    config = kickmsg.Config()
    config.max_subscribers, config.pool_size = 2, 1024
    config.max_payload_size, config.sub_ring_capacity = REQUEST_BYTES, 512
    return tuple(
        kickmsg.SharedRegion.create_or_open(f"/{name}-{topic}", kickmsg.ChannelType.PubSub, config)
        for topic in ("requests", "responses")
    )


def front(publisher: Any, subscriber: Any, in_flight: int, seconds: float) -> float:
    """Keep `in_flight` requests out: pairs a second."""
    send, receive, request = publisher.send, subscriber.try_receive, bytes(REQUEST_BYTES)
    for _ in range(in_flight):
        send(request)
    done, start = 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        for _ in range(ROUNDS_PER_CLOCK_READ):
            if receive() is not None:
                send(request)
                done += 1
    left = in_flight
    while left:
        left -= receive() is not None
    return done / (now - start)


def back(publisher: Any, subscriber: Any) -> None:
    """Answer until told to stop."""
    send, receive, response = publisher.send, subscriber.try_receive, bytes(RESPONSE_BYTES)
    while (request := receive()) != STOP:
        if request is not None:
            send(response)


def main() -> None:
    import kickmsg

    role, name, cpu = sys.argv[1:]
    os.sched_setaffinity(0, {int(cpu)})
    requests, responses = _topics(name)
    ours, theirs = (requests, responses) if role == "front" else (responses, requests)
    publisher, subscriber = kickmsg.Publisher(ours), kickmsg.Subscriber(theirs)
    print("ready", flush=True)
    if role == "back":
        back(publisher, subscriber)
        return
    for line in sys.stdin:
        print(front(publisher, subscriber, **json.loads(line)), flush=True)
    publisher.send(STOP)


class KickmsgRun:
    """Both processes, ready to be measured again and again."""

    def __init__(self, cpus: tuple[int, int]) -> None:
        self._name = f"paravirt-bench-{os.getpid()}"
        self._processes = []
        for role, cpu in zip(("front", "back"), cpus, strict=True):
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.kickmsg_peer", role, self._name, str(cpu)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._processes.append(process)
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                self.close()
                raise RuntimeError("kickmsg's peer process did not start")

    def measure(self, in_flight: int, seconds: float) -> float:
        """Pairs a second."""
        front, back = self._processes
        assert front.stdin is not None
        assert front.stdout is not None
        back.send_signal(signal.SIGCONT)
        print(json.dumps({"in_flight": in_flight, "seconds": seconds}), file=front.stdin, flush=True)
        rate = float(front.stdout.readline())
        back.send_signal(signal.SIGSTOP)  # it would spin while others are measured
        return rate

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self) -> None:
        import kickmsg

        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        for topic in ("requests", "responses"):
            kickmsg.unlink_shm(f"/{self._name}-{topic}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


if __name__ == "__main__":
    main()
