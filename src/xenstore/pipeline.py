# SPDX-License-Identifier: MIT
"""Many requests under way at once: sent together, answered in order."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar

from paravirt.errors import InvalidRequest, NoSuchNode, TooLarge
from paravirt.xenstore import operations
from paravirt.xenstore.operations import Call, Steps
from paravirt.xenstore.protocol_state import Request
from paravirt.xenstore.wire import Op

BATCH: Final = 128
"""Requests that are sent together."""
UNDER_WAY_MAX: Final = 8 * BATCH
_ANSWERS_ONLY: Final = frozenset({Op.READ, Op.DIRECTORY, Op.DIRECTORY_PART, Op.GET_PERMS})
"""Without a result that somebody keeps it does not matter how these end."""

T = TypeVar("T")
V = TypeVar("V")


class Sender(Protocol):
    """What a pipeline needs of its client or transaction."""

    def make(self, op: Op, payload: bytes, what: str) -> Request:
        """A request that is not sent yet."""

    def send(self, requests: list[Request]) -> None:
        """Send them all, together; does not wait for replies."""

    def wait(self, request: Request) -> None:
        """Until it is done."""

    def take_steps(self, steps: Steps[T]) -> T:
        """Make calls that depend on each other."""


class Result(Generic[T]):
    """What one request of a pipeline comes to."""

    __slots__ = ("__weakref__", "_decode", "_pipeline", "_recover", "_request")

    def __init__(
        self, pipeline: "Pipeline", request: Request, decode: Callable[[bytes], T], recover: "Recover[T] | None"
    ) -> None:
        self._pipeline = pipeline
        self._request = request
        self._decode = decode
        self._recover = recover

    @property
    def done(self) -> bool:
        """Whether the reply is there."""
        return self._request.done

    @property
    def value(self) -> T:
        """What the call of that name would have returned, or raised; waits for it, and sends it before if need be."""
        self._pipeline.look_at(self._request)
        try:
            reply = self._request.outcome()
        except Exception as error:
            if self._recover is not None:
                return self._recover(error)
            raise
        return self._decode(reply)

    def __repr__(self) -> str:
        return f"<Result of {self._request.op.name} {self._request.what}: {'done' if self.done else 'waits'}>"


Recover = Callable[[Exception], T]
"""The value in spite of an error, or the error again."""


class Pipeline:
    """Made by `client.pipeline()` or `transaction.pipeline()`; a context manager. One thread uses it.

    Each call gives a `Result` at once; its requests go out together, with few writes, and are handled in order. Any
    number may be made: when many are under way, a call first waits for the oldest. The end of the block waits for all.
    An error belongs to its result and comes when one asks for its `value`. Of requests that change something and whose
    result nobody has kept, the first error is raised at the end of the block.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._batch: list[Request] = []
        self._under_way: deque[tuple[Request, weakref.ref[Result[Any]]]] = deque()
        self._looked_at: set[Request] = set()
        self._unseen: Exception | None = None
        self._closed = False

    def call(self, call: Call[T], recover: Recover[T] | None = None) -> Result[T]:
        """Any call of `operations`."""
        if self._closed:
            raise InvalidRequest("this pipeline is over")
        while len(self._under_way) >= UNDER_WAY_MAX:
            self._take_oldest()
        request = self._sender.make(call.op, call.payload, call.what)
        result = Result(self, request, call.decode, recover)
        self._batch.append(request)
        self._under_way.append((request, weakref.ref(result)))
        if len(self._batch) >= BATCH:
            self.flush()
        return result

    def flush(self) -> None:
        """Send what was not sent yet."""
        batch, self._batch = self._batch, []
        try:
            if batch:
                self._sender.send(batch)
        except BaseException:
            self._batch = [request for request in batch if not (request.request_id or request.done)]
            raise

    def look_at(self, request: Request) -> None:
        """Somebody asks what became of a request of this pipeline: wait until it is done."""
        if not self._closed:
            self._looked_at.add(request)
        self._wait_for(request)

    def _wait_for(self, request: Request) -> None:
        if not request.done:
            self.flush()
            self._sender.wait(request)

    def _take_oldest(self) -> None:
        request, result = self._under_way[0]
        self._wait_for(request)
        self._under_way.popleft()
        if request in self._looked_at:
            self._looked_at.remove(request)
        elif self._unseen is None and result() is None and request.op not in _ANSWERS_ONLY:
            try:
                request.outcome()
            except Exception as error:
                self._unseen = error

    def close(self) -> None:
        """Wait for all replies; raises the first error of a change whose result nobody has kept. Twice is harmless."""
        self._closed = True
        while self._under_way:
            self._take_oldest()
        unseen, self._unseen = self._unseen, None
        if unseen is not None:
            raise unseen

    def read(self, path: str) -> Result[bytes]:
        return self.call(operations.read(path))

    def read_text(self, path: str) -> Result[str]:
        return self.call(operations.read_text(path))

    def write(self, path: str, value: str | bytes) -> Result[None]:
        return self.call(operations.write(path, value))

    def mkdir(self, path: str) -> Result[None]:
        return self.call(operations.mkdir(path))

    def rm(self, path: str) -> Result[None]:
        return self.call(operations.rm(path))

    def ls(self, path: str) -> Result[list[str]]:
        """A listing longer than one reply is fetched in parts when one asks for the value."""

        def recover(error: Exception) -> list[str]:
            if isinstance(error, TooLarge):
                return self._sender.take_steps(operations.ls_in_parts(path))
            raise error

        return self.call(operations.directory(path), recover)

    def exists(self, path: str) -> Result[bool]:
        def recover(error: Exception) -> bool:
            if isinstance(error, NoSuchNode):
                return False
            raise error

        call = operations.read(path)
        return self.call(Call(call.op, call.payload, call.what, _yes), recover)

    def get_perms(self, path: str) -> Result[list[str]]:
        return self.call(operations.get_perms(path))

    def set_perms(self, path: str, permissions: Iterable[str]) -> Result[None]:
        return self.call(operations.set_perms(path, permissions))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        # What was not sent yet never is. The rest is not waited for: the block's own error is what counts.
        self._closed = True
        self._under_way.clear()
        batch, self._batch = self._batch, []
        for request in batch:
            request.fail(InvalidRequest(f"{request.what}: not sent, as its pipeline ended with an error"))

    def __repr__(self) -> str:
        return f"<Pipeline: {len(self._under_way)} under way>"


def _yes(_reply: bytes) -> bool:
    return True
