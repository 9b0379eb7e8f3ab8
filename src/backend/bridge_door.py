# SPDX-License-Identifier: MIT
"""The socket of a network backend: Dom0's processes ask it what its bridges do, and capture what passes them.

A request is a line (`protocol/bridge_state.py`), its answer one, too. To a capture's answer follow pieces of the file,
each with its length (4 bytes, little-endian) before it; a length of 0; and a last line with the report. To a replay's,
a last line when all was sent. Who wants either to end closes its own direction.
"""

import errno
import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from paravirt.backend.bridge import Bridge
from paravirt.backend.bridge_links import Replay, add_replay
from paravirt.errors import InvalidRequest, NotFound, ParavirtError, PermissionRefused
from paravirt.protocol.bridge_state import (
    MAX_REQUEST_BYTES,
    CaptureRequest,
    Look,
    ReplayRequest,
    parse_request,
)
from paravirt.xenstore.listener import identity, listen, peer_may_be_dom0, unlink_own

log = logging.getLogger(__name__)

MAX_CLIENTS = 64
GRACE_S = 1.0
"""At the end, for those that are being answered."""
TIMEOUT_S = 10.0
"""For a request to come, and an answer to be taken; captures take as long as they take."""


class BridgeDoor:
    """The socket, and a thread for each client of it. For `serve`, in a thread of its own."""

    def __init__(self, path: Path, bridges: Callable[[], Iterable[Bridge]]) -> None:
        """Raises `AlreadyExists`, `PermissionRefused`, `InvalidRequest` as `listen`."""
        self._path = str(path)
        self._bridges = bridges
        self._listener = listen(self._path)
        self._own = identity(self._path)
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._stopping = False
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._accept, name="bridge-door", daemon=True)
        self._listener.setblocking(True)
        self._thread.start()

    def close(self) -> None:
        """Nobody is served any more. Harmless when repeated."""
        unlink_own(self._path, self._own)
        with self._lock:
            self._stopping = True
            clients = dict(self._clients)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._thread.join()
        self._listener.close()
        deadline = time.monotonic() + GRACE_S
        for client, thread in clients.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    time.sleep(0.1)  # somebody will give some back
                elif error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    return
                continue
            with self._lock:
                if self._stopping or len(self._clients) >= MAX_CLIENTS:
                    _turn_away(client)
                    continue
                thread = threading.Thread(target=self._serve, args=(client,), name="bridge-client", daemon=True)
                self._clients[client] = thread
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            client.settimeout(TIMEOUT_S)
            try:
                if not peer_may_be_dom0(client):
                    raise PermissionRefused("only Dom0 may look at bridges")
                self._answer(client)
            except ParavirtError as error:
                client.sendall(_line({"error": str(error), "kind": type(error).__name__}))
        except OSError as error:  # it went, or takes nothing
            log.debug("a client of the bridges: %s", error)
        except Exception:
            log.exception("a request about bridges: a defect of the backend")
        finally:
            with self._lock:
                self._clients.pop(client, None)
            client.close()

    def _answer(self, client: socket.socket) -> None:
        line = _read_line(client)
        if line is None:
            return
        request = parse_request(line)
        if isinstance(request, Look):
            found = [one for one in self._bridges() if request.bridge in (None, one.name)]
            if request.bridge is not None and not found:
                raise NotFound(f"there is no bridge {request.bridge}")
            states = [one.state(stations=request.stations).to_json() for one in found]
            client.sendall(_line({"bridges": states}))
        elif isinstance(request, CaptureRequest):
            self._capture(client, request)
        else:
            self._replay(client, request)

    def _capture(self, client: socket.socket, request: CaptureRequest) -> None:
        bridge = find_bridge(self._bridges(), request)
        capture = bridge.capture(request.wish)
        try:
            client.sendall(_line({"capture": bridge.name}))
            client.settimeout(None)  # its reader may be as slow as it likes
            for chunk in capture.chunks(client.fileno()):
                client.sendall(len(chunk).to_bytes(4, "little"))
                client.sendall(chunk)
            client.sendall(bytes(4) + _line(capture.report().to_json()))
        finally:
            bridge.uncapture(capture)

    def _replay(self, client: socket.socket, request: ReplayRequest) -> None:
        bridge = next((one for one in self._bridges() if one.name == request.bridge), None)
        if bridge is None:
            raise NotFound(f"there is no bridge {request.bridge}")

        def wake(_: Replay) -> None:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)

        name = f"replay-{next(self._numbers)}"
        replay = add_replay(bridge, name, request.link, wake)
        try:
            client.sendall(_line({"replay": bridge.name, "port": name, "frames": replay.n_frames}))
            client.settimeout(None)
            client.recv(1)  # until it is done, or is to end
            replay.stop()
            client.settimeout(TIMEOUT_S)
            client.sendall(_line({"sent": replay.sent}))
        finally:
            bridge.remove_port(replay.port)


def find_bridge(bridges: Iterable[Bridge], request: CaptureRequest) -> Bridge:
    """Where a capture is meant. Raises `NotFound`, `InvalidRequest`."""
    port, every = request.wish.port, list(bridges)
    if request.bridge is not None:
        every = [one for one in every if one.name == request.bridge]
        if not every:
            raise NotFound(f"there is no bridge {request.bridge}")
        return every[0]
    if port is None:
        raise InvalidRequest("a capture is of a bridge, or of a port")
    for one in every:
        with suppress(NotFound):
            one.port(port)
            return one
    raise NotFound(f"no bridge has a port {port}")


def _turn_away(client: socket.socket) -> None:
    with client, suppress(OSError):
        client.setblocking(False)
        client.sendall(_line({"error": f"{MAX_CLIENTS} others ask the network backend", "kind": "ResourceLimit"}))


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read_line(client: socket.socket) -> bytes | None:
    """One request, in all within the time. None: the client went without any. Raises `InvalidRequest`."""
    line, deadline = b"", time.monotonic() + TIMEOUT_S
    while not line.endswith(b"\n"):
        client.settimeout(max(0.001, deadline - time.monotonic()))
        part = client.recv(MAX_REQUEST_BYTES + 1 - len(line))
        if not part and not line:
            return None
        line += part
        if not part or len(line) > MAX_REQUEST_BYTES:
            raise InvalidRequest(f"a request is a line of up to {MAX_REQUEST_BYTES} bytes")
    client.settimeout(TIMEOUT_S)
    return line
