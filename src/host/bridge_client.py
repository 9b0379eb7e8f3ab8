# SPDX-License-Identifier: MIT
"""What another process asks of the network backend: the state of its bridges, captures of what passes them."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from paravirt.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    ParavirtError,
    PeerError,
    PeerGone,
    PermissionRefused,
    ResourceLimit,
)
from paravirt.protocol.bridge_state import (
    MAX_ANSWER_BYTES,
    BridgeState,
    CaptureReport,
    CaptureRequest,
    Look,
    ReplayRequest,
    Request,
    request_line,
)

TIMEOUT_S = 30.0
MAX_CHUNK_BYTES = 1 << 24
ERRORS: dict[str, type[ParavirtError]] = {
    kind.__name__: kind for kind in (AlreadyExists, InvalidRequest, NotFound, PermissionRefused, ResourceLimit)
}


def look(path: Path, bridge: str | None = None, *, stations: bool = True) -> list[BridgeState]:
    """All bridges of the backend that serves the socket at `path`, or the one of this name. Raises `NotFound` (no
    backend, no such bridge), `PeerGone`.
    """
    with _ask(path, Look(bridge, stations)) as answer:
        return [BridgeState.from_json(said) for said in answer.line()["bridges"]]


class RemoteCapture:
    """A capture by the backend: pieces of the file, then a report. A context manager."""

    def __init__(self, path: Path, request: CaptureRequest) -> None:
        """Raises `NotFound`, `InvalidRequest`, and what else the backend says."""
        self._answer = _ask(path, request)
        self.report: CaptureReport | None = None
        try:
            self.bridge: str = self._answer.line()["capture"]
        except BaseException:
            self._answer.close()
            raise

    def chunks(self) -> Iterator[bytes]:
        """Pieces of the file, until it ends. Raises `PeerGone` when the backend dies."""
        while n_bytes := int.from_bytes(self._answer.exactly(4), "little"):
            if n_bytes > MAX_CHUNK_BYTES:
                raise PeerError(f"a piece of {n_bytes} bytes from the network backend")
            yield self._answer.exactly(n_bytes)
        self.report = CaptureReport.from_json(self._answer.line())

    def stop(self) -> None:
        """It shall end: `chunks` goes on until it has. From any thread, or a signal; harmless when repeated."""
        self._answer.end()

    def close(self) -> None:
        """Harmless when repeated."""
        self._answer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RemoteReplay:
    """A file that the backend replays into a bridge. A context manager; it ends with it."""

    def __init__(self, path: Path, request: ReplayRequest) -> None:
        """Raises `NotFound`, `InvalidRequest` for a file that is none, and what else the backend says."""
        self._answer = _ask(path, request)
        try:
            said = self._answer.line()
            self.port, self.n_frames = str(said["port"]), int(said["frames"])
        except BaseException:
            self._answer.close()
            raise

    def wait(self) -> int:
        """Until it has ended: frames that were sent. Raises `PeerGone` when the backend dies."""
        return int(self._answer.line()["sent"])

    def stop(self) -> None:
        """It shall end: `wait` goes on until it has. From any thread, or a signal; harmless when repeated."""
        self._answer.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._answer.close()


class _Answer:
    """What comes back on one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb", buffering=1 << 18)

    def line(self) -> Any:
        """One value. Raises what it says, if that is an error."""
        said = self._read(lambda: self._file.readline(MAX_ANSWER_BYTES))
        try:
            value = json.loads(said)
        except ValueError as error:
            raise PeerGone("the network backend has ended") if not said else PeerError(str(error)) from error
        if isinstance(value, dict) and "error" in value:
            raise ERRORS.get(str(value.get("kind")), ParavirtError)(str(value["error"]))
        return value

    def exactly(self, n: int) -> bytes:
        data: bytes = self._read(lambda: self._file.read(n))
        if len(data) < n:
            raise PeerGone("the network backend has ended")
        return data

    @staticmethod
    def _read(read: Any) -> bytes:
        try:
            data: bytes = read()
        except TimeoutError as error:
            raise PeerGone("the network backend does not answer") from error
        except ConnectionError as error:
            raise PeerGone("the network backend has ended") from error
        return data

    def endless(self) -> None:
        """What comes may take as long as it likes."""
        self._connection.settimeout(None)

    def end(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._file.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(path: Path, request: Request) -> _Answer:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        # Who is turned away without being listened to is told why.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request_line(request))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        connection.close()
        raise NotFound("no backend of network devices runs") from error
    except OSError as error:
        connection.close()
        raise PeerGone(f"the network backend cannot be asked: {error.strerror}") from error
    answer = _Answer(connection)
    if not isinstance(request, Look):
        answer.endless()
    return answer
