# SPDX-License-Identifier: MIT
"""iceoryx2: publish and subscribe in shared memory, a topic for each direction; messages are filled in place.

One message a call; both ends spin. A topic that is full makes the publisher wait.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paravirt.testing.bench.peers.runner import CannotRun, Setup, main

try:
    import iceoryx2
except ImportError as error:
    missing: ImportError | None = error
else:
    missing = None


def _message_type(n_bytes: int) -> Any:
    """A structure: their sizes are part of the topic's type."""
    return type(f"Message{n_bytes}", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_uint8 * n_bytes)]})


class Iceoryx2End:
    def __init__(self, node: Any, setup: Setup, *, is_front: bool) -> None:
        self._node = node
        sizes = {"requests": setup.request_bytes, "responses": setup.response_bytes}
        topics = {name: _topic(node, name, n_bytes, setup) for name, n_bytes in sizes.items()}
        out, into = ("requests", "responses") if is_front else ("responses", "requests")
        blocks = iceoryx2.BackpressureStrategy.RetryUntilDelivered
        self._publisher = topics[out].publisher_builder().backpressure_strategy(blocks).create()
        self._subscriber = topics[into].subscriber_builder().create()
        self._in_bytes = sizes[into]

    def put(self, message: bytes) -> None:
        sample = self._publisher.loan_uninit()
        ctypes.memmove(sample.payload_ptr, message, len(message))
        sample.assume_init().send()

    def send(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            self.put(message)

    def _take(self, sample: Any) -> bytes:
        message = ctypes.string_at(sample.payload_ptr, self._in_bytes)
        sample.delete()
        return message

    def get(self) -> bytes:
        receive = self._subscriber.receive
        while (sample := receive()) is None:
            pass
        return self._take(sample)

    def receive(self, most: int) -> Sequence[bytes]:
        receive = self._subscriber.receive
        received: list[bytes] = []
        while len(received) < most and (sample := receive()) is not None:
            received.append(self._take(sample))
        return received


def _topic(node: Any, name: str, n_bytes: int, setup: Setup) -> Any:
    builder = node.service_builder(iceoryx2.ServiceName.new(f"paravirt/{name}"))
    builder = builder.publish_subscribe(_message_type(n_bytes)).enable_safe_overflow(False)
    return builder.subscriber_max_buffer_size(max(setup.slots, setup.in_flight)).open_or_create()


class Iceoryx2Link:
    BATCHES = False

    def __init__(self, setup: Setup, directory: Path) -> None:
        if missing is not None:
            raise CannotRun("iceoryx2 is not installed (pip install iceoryx2)")
        self._setup, self._directory = setup, directory

    def _end(self, *, is_front: bool) -> Iceoryx2End:
        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        config = iceoryx2.config.default()
        config.global_cfg.root_path = iceoryx2.Path.new(str(self._directory))
        config.global_cfg.prefix = iceoryx2.FileName.new(f"{self._directory.name}_")
        builder = iceoryx2.NodeBuilder.new().config(config)
        node = builder.signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled).create(iceoryx2.ServiceType.Ipc)
        return Iceoryx2End(node, self._setup, is_front=is_front)

    def front(self) -> Iceoryx2End:
        return self._end(is_front=True)

    def back(self) -> Iceoryx2End:
        return self._end(is_front=False)

    def close(self) -> None:
        """Its files stand in the directory; its memory objects go with the processes' /dev/shm."""
        for leftover in Path("/dev/shm").glob(f"{self._directory.name}_*"):
            leftover.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Iceoryx2Link)
