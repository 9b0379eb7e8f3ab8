# SPDX-License-Identifier: MIT
"""What a client does for a transaction, step by step: start, calls, commit, and again after a conflict. Pure.

A `with` block cannot run twice. So with more than one attempt the answers that the block got are kept, and after a
conflict its requests are sent again in a new transaction. As long as each gets the answer it got before, the block
would have done the same once more, so committing this is what it wants. If one gets another answer, the block has to
run again, which only its owner can do: `TransactionConflict`.
"""

from collections.abc import Generator
from typing import TypeVar

from paravirt.errors import InvalidRequest, PeerError, StoreFailure, TransactionConflict, XenstoreError
from paravirt.xenstore.operations import error_of
from paravirt.xenstore.protocol_state import ABORT, COMMIT, Request
from paravirt.xenstore.wire import Op

T = TypeVar("T")

Requests = Generator[Request, None, T]
"""Requests to make one after the other; each is to be done before the next one is asked for."""


class TransactionSteps:
    """One transaction. `number` is 0 before it was started and when it is over."""

    def __init__(self, attempts: int) -> None:
        """`attempts`: how often to try to commit, at least 1."""
        if attempts < 1:
            raise InvalidRequest(f"a transaction needs at least one attempt, not {attempts}")
        self.number = 0
        self._epoch = 0
        self._attempts_left = attempts
        self._keeps = attempts > 1
        self._made: list[Request] = []

    def start(self) -> Requests[None]:
        request = Request(Op.TRANSACTION_START, b"\0", "transaction")
        yield request
        number = request.outcome().rstrip(b"\0")
        if not number.isdigit() or not int(number):
            raise PeerError(f"xenstored started a transaction with the number {number[:40]!r}")
        self.number, self._epoch = int(number), request.epoch

    def make(self, op: Op, payload: bytes, what: str) -> Request:
        """A request inside the transaction."""
        if not self.number:
            raise InvalidRequest("this transaction is over")
        request = Request(op, payload, what, self.number, self._epoch)
        if self._keeps and op != Op.TRANSACTION_END:
            self._made.append(request)
        return request

    def ask(self, op: Op, payload: bytes, what: str) -> Requests[bytes]:
        """One request; where the connection broke before, all of them again over the new one."""
        request = self.make(op, payload, what)
        yield request
        while True:
            try:
                return request.outcome()
            except TransactionConflict as conflict:
                if not self._keeps or not self.number:  # it is tried again at another place
                    raise
                self._made.remove(request)
                yield from self._again(conflict)
            request = self.make(op, payload, what)
            yield request

    def commit(self) -> Requests[None]:
        while True:
            request = self.make(Op.TRANSACTION_END, COMMIT, "transaction")
            try:
                yield request
                request.outcome()
            except TransactionConflict as conflict:
                if not self._keeps:
                    self.number = 0
                    raise
                yield from self._again(conflict)
            except BaseException:
                self.number = 0
                raise
            else:
                self.number = 0
                return

    def abort(self) -> Requests[None]:
        request = self.make(Op.TRANSACTION_END, ABORT, "transaction")
        self.number = 0
        yield request
        request.outcome()

    def _again(self, conflict: TransactionConflict) -> Requests[None]:
        """A new transaction in which all that was done has happened again, with the same answers."""
        self.number = 0
        while self._attempts_left > 1:
            self._attempts_left -= 1
            yield from self.start()
            former, self._made = self._made, []
            for number, before in enumerate(former):
                request = self.make(before.op, before.payload, before.what)
                yield request
                if _answer(request) == _answer(before):
                    continue
                self._made = former
                yield from self._give_up()
                if _conflicts(request):
                    break
                number += 1
                raise error_of(
                    "EAGAIN",
                    before.what,
                    f"request {number} of the transaction is answered differently by now, and a `with` block cannot "
                    "run again; `transact` runs a function again",
                )
            else:
                return
        raise conflict

    def _give_up(self) -> Requests[None]:
        request = self.make(Op.TRANSACTION_END, ABORT, "transaction")
        self.number = 0
        yield request


def _answer(request: Request) -> tuple[int, bytes, str]:
    """What the caller was told. The generation in front of a part of a listing is not."""
    if request.error is not None:
        return -1, b"", str(request.error)
    part = request.reply_op == Op.DIRECTORY_PART
    return request.reply_op, request.reply.partition(b"\0")[2] if part else request.reply, ""


def _conflicts(request: Request) -> bool:
    """Whether it is worth another attempt; raises what is no answer at all."""
    try:
        request.outcome()
    except XenstoreError as error:
        return isinstance(error, (TransactionConflict, StoreFailure))
    return False
