# SPDX-License-Identifier: MIT
"""A device class for tests: its backend does what each request says, also what no driver should."""

import errno
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from paravirt.backend.driver import Batch, DeviceBackend, Request
from paravirt.errors import InvalidRequest, PeerError
from paravirt.frontend.driver import DeviceFrontend
from paravirt.protocol.device import U32, U64, DeviceProtocol

ADD, FILL, SUM, HOLD, NO_SPACE, LIE, DEFECT = range(7)
PAGES = 4


@dataclass(frozen=True)
class Config:
    step: int = 1
    fault: str = ""


@dataclass(frozen=True)
class Offer:
    step: int


@dataclass
class Ask:
    operation: U32
    value: U64


@dataclass
class Answer:
    value: U64


ECHO = DeviceProtocol("vecho", request=Ask, response=Answer, pages=PAGES, config=Config, offer=Offer)


class EchoBack(DeviceBackend):
    """Answers one by one."""

    protocol = ECHO
    held: ClassVar[list[Request]] = []
    holds: ClassVar[threading.Condition] = threading.Condition()
    closed: ClassVar[int] = 0

    def open(self) -> Any:
        if self.config.fault == "refuse":
            raise InvalidRequest("this device is refused")
        if self.config.fault == "defect":
            raise ZeroDivisionError("no device")
        if self.config.fault == "type":
            return None
        return Offer(self.config.step)

    def answer(self, request: Request) -> Any:
        ask = request.message
        if ask.operation == ADD:
            return Answer(ask.value + self.config.step)
        if ask.operation == FILL:
            request.array()[:] = ask.value
            return Answer(request.n_pages)
        if ask.operation == SUM:
            return {"value": int(request.array("u1", read_only=True).sum(dtype=np.uint64))}
        if ask.operation == HOLD:
            if request.n_pages:
                request.pages()
            with self.holds:
                self.held.append(request.defer())
                self.holds.notify_all()
            return None
        if ask.operation == NO_SPACE:
            raise OSError(errno.ENOSPC, "no space")
        if ask.operation == LIE:
            raise PeerError("the frontend lied")
        raise ZeroDivisionError("a defect")

    def close(self) -> None:
        type(self).closed += 1

    @classmethod
    def take_held(cls, n: int = 1) -> list[Request]:
        """Wait until so many are held, and take them."""
        with cls.holds:
            assert cls.holds.wait_for(lambda: len(cls.held) >= n, 20.0)
            taken, cls.held[:] = list(cls.held), []
        return taken


class EchoFront(DeviceFrontend):
    protocol = ECHO


class ColumnBack(DeviceBackend):
    """Adds in whole columns; the highest bit of a value asks for a fault."""

    protocol = DeviceProtocol("vcolumn", request=Ask, response=Answer)

    def handle(self, batch: Batch) -> Any:
        values = batch.requests["value"]
        operation = int(batch.requests["operation"].max())
        if operation == NO_SPACE:
            raise OSError(errno.ENOSPC, "no space")
        if operation == DEFECT:
            return [1, 2, 3]
        if operation == FILL:
            answers = np.zeros(len(batch), batch.responses.dtype)
            answers["value"] = values + 1
            answers["id"] = 77  # not the driver's business
            return answers
        batch.responses["value"] = values + 1
        return None


class ColumnFront(DeviceFrontend):
    protocol = ColumnBack.protocol


def granted(device: DeviceFrontend) -> int:
    """Pages granted beside the ring's."""
    return device.statistics().granted_pages - 4
