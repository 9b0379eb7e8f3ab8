# SPDX-License-Identifier: MIT
"""kickmsg: a lock-free topic in shared memory for each direction, one message a call; both ends spin.

A topic that is full forgets its oldest message: one way, what arrived is counted.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from paravirt.testing.bench.peers.runner import CannotRun, Setup, main

try:
    import kickmsg
except ImportError as error:
    missing: ImportError | None = error
else:
    missing = None

TOPICS = ("requests", "responses")


class KickmsgEnd:
    def __init__(self, out: Any, into: Any) -> None:
        self._publisher, self._subscriber = kickmsg.Publisher(out), kickmsg.Subscriber(into)
        self.put = self._publisher.send
        self._receive: Callable[[], Any] = self._subscriber.try_receive

    def get(self) -> bytes:
        receive = self._receive
        while (message := receive()) is None:
            pass
        return bytes(message)

    def send(self, messages: Sequence[bytes]) -> None:
        send = self.put
        for message in messages:
            send(message)

    def receive(self, most: int) -> Sequence[bytes]:
        receive = self._receive
        received: list[bytes] = []
        while most and (message := receive()) is not None:
            received.append(message)
            most -= 1
        return received


class KickmsgLink:
    BATCHES = False

    def __init__(self, setup: Setup, directory: Path) -> None:
        if missing is not None:
            raise CannotRun("kickmsg is not installed (pip install kickmsg)")
        self._setup = setup
        self._name = f"/paravirt-peer-{os.getpid()}"

    def _region(self, topic: str) -> Any:
        config = kickmsg.Config()
        config.max_subscribers, config.max_payload_size = 2, self._setup.largest_bytes
        config.sub_ring_capacity = 1 << max(self._setup.slots, 2 * self._setup.in_flight, 2).bit_length()
        config.pool_size = 2 * config.sub_ring_capacity
        return kickmsg.SharedRegion.create_or_open(f"{self._name}-{topic}", kickmsg.ChannelType.PubSub, config)

    def front(self) -> KickmsgEnd:
        requests, responses = map(self._region, TOPICS)
        return KickmsgEnd(requests, responses)

    def back(self) -> KickmsgEnd:
        requests, responses = map(self._region, TOPICS)
        return KickmsgEnd(responses, requests)

    def close(self) -> None:
        for topic in TOPICS:
            with suppress(OSError):
                kickmsg.unlink_shm(f"{self._name}-{topic}")


if __name__ == "__main__":
    main(KickmsgLink)
