# SPDX-License-Identifier: MIT
"""A transaction of the blocking client."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from paravirt.errors import ParavirtError
from paravirt.xenstore.calls import StoreCalls
from paravirt.xenstore.pipeline import Pipeline
from paravirt.xenstore.protocol_state import Request
from paravirt.xenstore.transaction_steps import TransactionSteps
from paravirt.xenstore.wire import Op

if TYPE_CHECKING:
    from paravirt.xenstore.client import XenstoreClient


class Transaction(StoreCalls):
    """The calls of a client, all done at once at the end or not at all."""

    def __init__(self, client: "XenstoreClient", steps: TransactionSteps) -> None:
        """Made, and started, by `XenstoreClient.transaction`."""
        self._client = client
        self._steps = steps

    def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        return self._client.follow(self._steps.ask(op, payload, what))

    def pipeline(self) -> Pipeline:
        """Many requests at once inside this transaction; as `XenstoreClient.pipeline`."""
        return Pipeline(self)

    def make(self, op: Op, payload: bytes, what: str) -> Request:
        """For a pipeline: a request that is not sent yet."""
        return self._steps.make(op, payload, what)

    def send(self, requests: list[Request]) -> None:
        self._client.send(requests)

    def wait(self, request: Request) -> None:
        self._client.wait(request)

    def commit(self) -> None:
        """Make it real. `TransactionConflict`: something it has seen was changed meanwhile, nothing was done."""
        self._client.follow(self._steps.commit())

    def abort(self) -> None:
        """Give it up."""
        self._client.follow(self._steps.abort())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._steps.number:
            return
        if kind is None:
            self.commit()
            return
        try:
            self.abort()
        except ParavirtError:
            pass  # the first error tells more; the daemon forgets the transaction with the connection

    def __repr__(self) -> str:
        return f"<Transaction {self._steps.number or 'over'}>"
