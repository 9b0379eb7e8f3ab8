# SPDX-License-Identifier: MIT
"""The backend half of any device class that is declared as a `DeviceProtocol`: subclass `DeviceBackend`.

A driver sees private copies of requests, whose ids and grant references are dealt with already. It answers them in a
batch, one by one, or later from any thread.
"""

import errno
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import InvalidRequest, ParavirtError, PeerError
from paravirt.hypervisor.client import MappedPages
from paravirt.protocol.device import DeviceProtocol, put_message
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.grant import GrantFailed

log = logging.getLogger(__name__)


class DeviceBackend:
    """One device of a class. A subclass names its `protocol` and has `answer`, or `handle` for whole batches.

    `open` and `close` are called by the service's thread, `handle` by the device's own; the object stays when its
    frontend goes and another comes.
    """

    protocol: ClassVar[DeviceProtocol]
    in_place: ClassVar[bool] = False
    """True: `batch.responses` is the ring's own memory where that lies side by side, and is sent without a copy. The
    frontend may change it at any time, so write it and never read it back; and no request can be deferred."""

    def __init__(self, config: Any, path: DevicePath) -> None:
        """`config`: what the toolstack said, of the protocol's `config`."""
        self.config = config
        self.path = path

    def open(self) -> Any:
        """Take what the device stands for; what to offer, of the protocol's `offer`.

        A `ParavirtError` or `OSError` refuses the device, and is what the toolstack is told. `AlreadyExists`: it is in
        use, perhaps by a backend that is just dying; this is called again soon.
        """
        return self.protocol.offer()

    def handle(self, batch: "Batch") -> Any:
        """Answer a batch: fill `batch.responses`, or return an array with some of its fields.

        Here each request is given to `answer`, and what that raises becomes the status of that request. What `handle`
        raises becomes the status of all: the errno of an `OSError`, else EIO; a `PeerError` ends the device with its
        text, and so does anything that is neither `ParavirtError` nor `OSError`, being a defect. Other devices go on.
        """
        for request in batch:
            try:
                answer = self.answer(request)
                if inspect.iscoroutine(answer):
                    request.defer_to(answer)
                elif answer is not None:
                    request.answer(answer)
            except (ParavirtError, OSError) as error:
                if isinstance(error, PeerError) and not isinstance(error, GrantFailed):
                    raise
                request.fail(status_of(error))

    def answer(self, request: "Request") -> Any:
        """Answer one request: a dataclass or a dictionary of the response; None when `request.answer` was called, or
        will be (`request.defer`), or when every field is 0.

        It may be `async def`: then all requests are answered beside each other in an event loop of the device's own,
        and those under way are cancelled when the frontend goes.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither handle nor answer")

    def close(self) -> None:
        """Let go of what `open` took."""


def status_of(error: Exception) -> int:
    """A positive errno for what a driver raised."""
    if isinstance(error, GrantFailed):
        return errno.EFAULT
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number > 0:
        return number
    return errno.EINVAL if isinstance(error, InvalidRequest) else errno.EIO


class Connected(Protocol):
    """What requests need of the connection they came by."""

    protocol: DeviceProtocol
    in_place: bool

    def map_pages(self, request: "Request", grefs: Sequence[int], *, read_only: bool) -> MappedPages:
        """Those of a request, which are set there as `mapped`. Raises `GrantFailed`, `Closed`."""

    def keep(self, request: "Request") -> None:
        """It is answered later."""

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """In the event loop of the connection. Called by the thread that handles."""

    def send_later(self, request: "Request", response: NDArray[Any]) -> bool:
        """Send the answer of one that was kept; False when its frontend is gone."""


class Request:
    """One request. Valid until `handle` returns, or, after `defer`, until it is answered."""

    __slots__ = ("_connection", "_response", "deferred", "fields", "mapped")

    def __init__(self, connection: Connected, fields: NDArray[Any], response: NDArray[Any]) -> None:
        """`fields`, `response`: arrays of one."""
        self._connection = connection
        self._response = response
        self.mapped: MappedPages | None = None
        self.fields = fields
        """A private copy of what was sent: an array of one."""
        self.deferred = False

    def __getitem__(self, name: str) -> Any:
        return self.fields[name][0]

    @property
    def message(self) -> Any:
        """The dataclass of the protocol, or the numpy record where it has none."""
        kind = self._connection.protocol.request_class
        if kind is None:
            return self.fields[0]
        return kind(**{name: self.fields[name][0].item() for name in kind.__dataclass_fields__})

    @property
    def n_pages(self) -> int:
        """Pages that it carries."""
        return int(np.count_nonzero(self.fields["gref"])) if self._connection.protocol.pages else 0

    def pages(self, *, read_only: bool = False) -> memoryview:
        """Its pages side by side, the frontend's own memory, which it may change at any time. Pinned until the answer.

        Raises `GrantFailed` for references that are not granted, or not for writing; `InvalidRequest` for none;
        `Closed` when the frontend of a deferred one is gone.
        """
        n = self.n_pages
        if not n:
            raise InvalidRequest("this request carries no pages")
        return self._connection.map_pages(self, self.fields["gref"][0, :n].tolist(), read_only=read_only).view

    def array(self, dtype: Any = np.uint8, *, read_only: bool = False) -> NDArray[Any]:
        """Its pages as an array. Raises as `pages`."""
        return np.frombuffer(self.pages(read_only=read_only), dtype)

    def defer(self) -> "Request":
        """It is answered later, by `answer` or `fail` from any thread. `InvalidRequest` of who answers in place."""
        if self._connection.in_place:
            raise InvalidRequest("a driver that answers in place cannot defer")
        if not self.deferred:
            self.deferred = True
            self.fields, self._response = self.fields.copy(), self._response.copy()
            self._connection.keep(self)
        return self

    def answer(self, message: Any = None, **fields: Any) -> bool:
        """Answer with a dataclass, a dictionary or fields by name; False when the frontend is gone meanwhile.

        Raises `InvalidRequest` for a field that is none or does not fit, and when it is deferred and answered already.
        """
        put_message(self._connection.protocol, self._response, 0, fields if message is None else message)
        return self._send()

    def finish(self, work: Callable[["Request"], Any]) -> None:
        """Do `work` and answer with what it returns, or fail with what it raises: what a worker of a pool calls."""
        try:
            answer = work(self)
            self.answer({} if answer is None else answer)
        except Exception as error:
            self._fail_for(error)

    def defer_to(self, work: Coroutine[Any, Any, Any]) -> None:
        """The same in the device's event loop: answer with what a coroutine returns."""

        async def finish() -> None:
            try:
                answer = await work
                self.answer({} if answer is None else answer)
            except Exception as error:
                self._fail_for(error)

        try:
            self.defer()
        except InvalidRequest:
            work.close()
            raise
        self._connection.run(finish())

    def _fail_for(self, error: Exception) -> None:
        if not isinstance(error, ParavirtError | OSError):
            log.exception("a defect of the driver; request fails")
        self.fail(status_of(error))

    def fail(self, number: int = errno.EIO) -> bool:
        """Answer with an error, a positive errno."""
        self._response["status"] = -number
        return self._send()

    def _send(self) -> bool:
        return not self.deferred or self._connection.send_later(self, self._response)

    def unmap(self) -> None:
        """Unpin its pages."""
        mapped, self.mapped = self.mapped, None
        if mapped is not None:
            mapped.close()


class Batch:
    """Requests that were taken together: iterate over `Request`s, or use whole columns."""

    def __init__(self, connection: Connected, requests: NDArray[Any], responses: NDArray[Any]) -> None:
        self._connection = connection
        self._seen: dict[int, Request] = {}
        self.requests = requests
        """Private copies, in the protocol's request layout; valid until `handle` returns."""
        self.responses = responses
        """One for each request, zero but for the id."""

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, i: int) -> Request:
        request = self._seen.get(i)
        if request is None:
            if not 0 <= i < len(self.requests):
                raise IndexError(i)
            request = Request(self._connection, self.requests[i : i + 1], self.responses[i : i + 1])
            self._seen[i] = request
        return request

    def __iter__(self) -> Iterator[Request]:
        return (self[i] for i in range(len(self.requests)))

    def settle(self) -> NDArray[Any]:
        """The handler is done: unpin what is not deferred; the responses to send now."""
        later = []
        for i, request in self._seen.items():
            if request.deferred:
                later.append(i)
            else:
                request.unmap()
        return np.delete(self.responses, later) if later else self.responses
