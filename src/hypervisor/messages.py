# SPDX-License-Identifier: MIT
"""The broker's messages: `struct pv_hv_message` of c_ext/pv_hv.h, packed and unpacked by the C definitions."""

from enum import IntEnum
from typing import Any

from paravirt.errors import PeerError
from paravirt.ring._core import ffi, lib

CData = Any

MESSAGE_BYTES = lib.PV_HV_MESSAGE_BYTES
MAX_FDS = lib.PV_HV_MAX_FDS
NAME_BYTES = lib.PV_HV_NAME_BYTES
MAGIC = lib.PV_HV_MAGIC
VERSION = lib.PV_HV_VERSION
NO_UID = 2**32 - 1


class Op(IntEnum):
    """What a message asks for."""

    HELLO = lib.PV_HV_HELLO
    INFO = lib.PV_HV_INFO
    DOMAIN_CREATE = lib.PV_HV_DOMAIN_CREATE
    DOMAIN_DESTROY = lib.PV_HV_DOMAIN_DESTROY
    DOMAIN_INFO = lib.PV_HV_DOMAIN_INFO
    DOMAIN_SET_INIT = lib.PV_HV_DOMAIN_SET_INIT
    DOMAIN_ADD_PROCESS = lib.PV_HV_DOMAIN_ADD_PROCESS
    DOMAIN_CONNECT = lib.PV_HV_DOMAIN_CONNECT
    DOMAIN_SHUTDOWN = lib.PV_HV_DOMAIN_SHUTDOWN
    WAITER_CREATE = lib.PV_HV_WAITER_CREATE
    WAITER_DESTROY = lib.PV_HV_WAITER_DESTROY
    EVTCHN_ALLOC_UNBOUND = lib.PV_HV_EVTCHN_ALLOC_UNBOUND
    EVTCHN_BIND = lib.PV_HV_EVTCHN_BIND
    EVTCHN_BIND_VIRQ = lib.PV_HV_EVTCHN_BIND_VIRQ
    EVTCHN_BIND_IPI = lib.PV_HV_EVTCHN_BIND_IPI
    EVTCHN_CLOSE = lib.PV_HV_EVTCHN_CLOSE
    EVTCHN_SEND = lib.PV_HV_EVTCHN_SEND
    EVTCHN_STATUS = lib.PV_HV_EVTCHN_STATUS
    EVTCHN_RESET = lib.PV_HV_EVTCHN_RESET
    EVTCHN_BIND_VCPU = lib.PV_HV_EVTCHN_BIND_VCPU
    EVTCHN_NEXT = lib.PV_HV_EVTCHN_NEXT
    VIRQ_RAISE = lib.PV_HV_VIRQ_RAISE
    VIRQ_HANDLER = lib.PV_HV_VIRQ_HANDLER
    ARENA_CREATE = lib.PV_HV_ARENA_CREATE
    ARENA_DESTROY = lib.PV_HV_ARENA_DESTROY
    ARENA_RESERVED = lib.PV_HV_ARENA_RESERVED
    ARENA_MAP = lib.PV_HV_ARENA_MAP
    ARENA_UNMAP = lib.PV_HV_ARENA_UNMAP
    NOTIFY_SET = lib.PV_HV_NOTIFY_SET
    NOTIFY_RUN = lib.PV_HV_NOTIFY_RUN
    STORE_REGISTER = lib.PV_HV_STORE_REGISTER
    STORE_CONNECT = lib.PV_HV_STORE_CONNECT
    LOOK_CREATE = lib.PV_HV_LOOK_CREATE
    LOOK_NEXT = lib.PV_HV_LOOK_NEXT
    ARENA_LOOK = lib.PV_HV_ARENA_LOOK
    EVTCHN_KICK = lib.PV_HV_EVTCHN_KICK
    STORE_CONNECTION = lib.PV_HV_STORE_CONNECTION
    STORE_RELEASED = lib.PV_HV_STORE_RELEASED


def new_message(op: int, seq: int = 0) -> CData:
    """A zeroed message."""
    message = ffi.new("struct pv_hv_message *")
    message.header.op, message.header.seq = op, seq
    return message


def parse(data: bytes) -> CData:
    """A private copy of a received message. Raises `PeerError` when it has the wrong size."""
    if len(data) != MESSAGE_BYTES:
        raise PeerError(f"a message of {len(data)} bytes; all have {MESSAGE_BYTES}")
    message = ffi.new("struct pv_hv_message *")
    ffi.memmove(message, data, MESSAGE_BYTES)
    return message


def to_bytes(message: CData) -> bytes:
    return bytes(ffi.buffer(message))


def get_text(field: CData) -> str:
    """A NUL-terminated UTF-8 field."""
    return bytes(ffi.buffer(field)).split(b"\0", 1)[0].decode(errors="replace")


def put_text(field: CData, text: str) -> None:
    """What does not fit is cut."""
    data = text.encode()[: len(field) - 1]
    ffi.buffer(field)[:] = data.decode(errors="ignore").encode().ljust(len(field), b"\0")


def make_failure(message: CData, code: int, text: str) -> None:
    """Turn a reply into the refusal with a positive errno value."""
    message.header.status = -code
    put_text(message.failure.text, text)
