# SPDX-License-Identifier: MIT
"""The disk in C in this process instead of nbdkit's, told by the same messages; and a backend of it played by hand."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

import paravirt
from paravirt.errors import ParavirtError, PeerGone
from paravirt.protocol.blkif import REQUEST, RESPONSE, Operation
from paravirt.ring import blkdisk
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkdisk import Answer, Kind, Shape
from paravirt.ring.event import WaitResult
from paravirt.ring.shared import BackRing

DEADLINE_S = 30.0
SHAPE = Shape(1 << 20, 512, 4096, 11 * 4096, read_only=False, flush=True, barrier=False, discard=True)


class CDisk:
    """`struct pv_blkdisk` and what the plugin of nbdkit does with it; stands in for `frontend.nbdkit.Nbdkit`, too."""

    pid = 0

    def __init__(
        self,
        listener: socket.socket | None,
        broker_fd: int,
        *,
        on_complaint: Callable[[str], None],
        on_end: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        self.complaints: list[str] = []

        def complain(context: object, text: Any) -> None:
            self.complaints.append(ffi.string(text).decode())
            threading.Thread(target=on_complaint, args=(self.complaints[-1],)).start()

        self._callback = ffi.callback("pv_blkdisk_complain", complain)
        error = ffi.new("int *")
        self.core = lib.pv_blkdisk_open(os.dup(broker_fd), self._callback, ffi.NULL, error)
        self.opening_error = error[0]
        self._pool = ThreadPoolExecutor(64)
        self._on_end = on_end
        self._closed = False

    def ask(self, message: bytes) -> Answer:
        if self._closed:
            raise PeerGone("it is closed")
        said = ffi.new("struct pv_nbdkit_message *")
        ffi.buffer(said)[:] = message
        match said.kind:
            case Kind.MAKE:
                asked = (said.backend, said.ring_order, said.max_spin_ns, ffi.addressof(said, "keys"))
                said.status = lib.pv_blkdisk_make(self.core, *asked)
            case Kind.GO:
                said.status = lib.pv_blkdisk_go(self.core, ffi.addressof(said, "shape"))
            case Kind.RESHAPE:
                said.status = lib.pv_blkdisk_reshape(self.core, ffi.addressof(said, "shape"))
            case Kind.PAUSE:
                lib.pv_blkdisk_pause(self.core)
            case Kind.FAIL:
                lib.pv_blkdisk_fail(self.core, said.error)
            case Kind.COUNT:
                lib.pv_blkdisk_count(self.core, ffi.addressof(said, "counters"))
        return blkdisk.parse(bytes(ffi.buffer(said)))

    def do(self, message: bytes, what: str) -> Answer:
        answer = self.ask(message)
        if answer.status:
            raise ParavirtError(f"{what}: {os.strerror(-answer.status)}")
        return answer

    def terminate(self) -> None:
        self._on_end()

    def wait(self, timeout_s: float | None = None) -> int | None:
        return 0

    def close(self, *, failing: bytes) -> None:
        self.ask(failing)
        self._pool.shutdown()
        self._closed = True
        lib.pv_blkdisk_close(self.core)

    # -- calls that move data; each in a thread of its own

    def beside(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        return self._pool.submit(call, *arguments)

    def read(self, length: int, offset: int) -> bytes | int:
        """What is there, or the negative errno."""
        into = bytearray(length)
        status = lib.pv_blkdisk_read(self.core, ffi.from_buffer(into), length, offset)
        return int(status) or bytes(into)

    def write(self, data: bytes, offset: int) -> int:
        return int(lib.pv_blkdisk_write(self.core, ffi.from_buffer(data), len(data), offset))

    def zero(self, length: int, offset: int) -> int:
        return int(lib.pv_blkdisk_zero(self.core, length, offset))

    def flush(self) -> int:
        return int(lib.pv_blkdisk_flush(self.core))

    def discard(self, length: int, offset: int) -> int:
        return int(lib.pv_blkdisk_discard(self.core, length, offset))


class HandMade:
    """A backend without xenstore, which answers what it is told to."""

    def __init__(self, host: paravirt.Host, *, order: int = 0, shape: Shape = SHAPE) -> None:
        host._backend.stop()
        self._host, self._order, self._shape = host, order, shape
        self.domain = host.create_domain("guest")
        broker = host._broker.connect(self.domain.domid)
        try:
            self.disk = CDisk(None, broker, on_complaint=lambda text: None)
        finally:
            os.close(broker)
        self.ring: BackRing | None = None

    def connect(self, shape: Shape | None = None) -> Answer:
        """A new ring, and go; the answer to the latter."""
        made = self.disk.do(blkdisk.make(0, self._order, 0), "make")
        self._arena = self._host.hypervisor.foreign_arena(self.domain.domid, made.refs[0])
        self._pages = self._arena.map_pages(made.refs)
        self._waiter = self._host.hypervisor.waiter()
        self._port = self._host.hypervisor.bind_interdomain(self._waiter, self.domain.domid, made.port)
        self.ring = BackRing.attach(self._pages.view, REQUEST, RESPONSE, port=self._port)
        return self.disk.ask(blkdisk.shape(Kind.GO, shape or self._shape))

    def take(self, n: int = 1) -> Any:
        """The next `n` requests."""
        assert self.ring is not None
        taken = [self.ring.take_batch(n)]
        while sum(map(len, taken)) < n:
            result = self.ring.wait(timeout_s=DEADLINE_S)
            assert result is not WaitResult.TIMEOUT, "no more requests"
            taken.append(self.ring.take_batch(n - sum(map(len, taken))))
        return np.concatenate(taken)

    def answer(self, requests: Any, **forged: int) -> None:
        """As they are, or with fields forged."""
        assert self.ring is not None
        answers = np.zeros(len(requests), RESPONSE)
        answers["id"] = requests["id"]
        # Of an indirect request the second byte says what it does.
        indirect = requests["operation"] == Operation.INDIRECT
        answers["operation"] = np.where(indirect, requests["nr_segments"], requests["operation"])
        for name, value in forged.items():
            answers[name] = value
        self.ring.push(answers)

    def die(self) -> None:
        """As a killed process: its pins are gone and its port is closed. The frontend is told to pause."""
        assert self.ring is not None
        self.ring.close()
        self._waiter.close()
        self._pages.close()
        self._arena.close()
        self.ring = None
        self.disk.ask(blkdisk.plain(Kind.PAUSE))

    def close(self) -> None:
        if self.ring is not None:
            self.die()
        self.disk.close(failing=blkdisk.fail(5))


@contextmanager
def hand_made(**options: Any) -> Iterator[HandMade]:
    with paravirt.Host() as host:
        made = HandMade(host, **options)
        try:
            yield made
        finally:
            made.close()
