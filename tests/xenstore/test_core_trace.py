# SPDX-License-Identifier: MIT
"""The lines of text that the engine writes about requests: what stands in them, which are kept, where they go."""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.engine import Client, engine

TRACE_BYTES = 256 << 10


@pytest.fixture
def core() -> Iterator[Any]:
    with engine() as core:
        lib.pv_xs_trace_until(core, 1)
        yield core


def read(core: Any, first: int = 0, max_bytes: int = 2 * TRACE_BYTES) -> tuple[int, int, list[str]]:
    """(number after the last line, how many are lost, lines)"""
    number, lost, buffer = ffi.new("uint64_t *", first), ffi.new("uint64_t *"), ffi.new("uint8_t[]", max_bytes)
    n = lib.pv_xs_trace_read(core, number, lost, buffer, max_bytes)
    return number[0], lost[0], bytes(ffi.buffer(buffer, n)).decode().splitlines()


def said(core: Any) -> list[str]:
    """The lines without times."""
    return [re.sub(r"^\d+\.\d{3} (.*) \d+$", r"\1", line) for line in read(core)[2]]


def test_what_stands_in_a_line(core: Any) -> None:
    Client(core, 5).leave()
    dom0 = Client(core)
    dom0.do(Op.WRITE, b"/a\0secret")
    dom0.do(Op.SET_PERMS, b"/a\0n0\0r5\0")
    dom0.ask(Op.READ, b"/not here,\\\0")
    dom0.ask(Op.READ, b"/no string")
    transaction = dom0.begin()
    dom0.ask(Op.READ, b"/a\0", transaction)
    dom0.ask(99, b"x\0\xff\0")
    dom0.ask(Op.MKDIR, b"/" + b"a" * 600 + b"\0")
    assert said(core) == [
        "0.2 - WRITE /a OK",
        "0.2 - SET_PERMS /a,n0,r5 OK",
        r"0.2 - READ /not\x20here\x2c\x5c EINVAL",
        "0.2 - READ - EINVAL",
        "0.2 - TRANSACTION_START - OK",
        f"0.2 {transaction} READ /a OK",
        r"0.2 - 99 x,\xff ENOSYS",
        f"0.2 - MKDIR /{'a' * 511}... OK",
    ]


def test_what_the_caller_answers_is_traced_with_its_answer(core: Any) -> None:
    dom0 = Client(core)
    for error, payload in ((0, b"1\0"), (1, b"ENOENT\0"), (0, bytes(4097))):
        assert dom0.feed(encode(Op.GET_QUOTA, 1, 0, b"nodes\0")) == lib.PV_XS_PARKED
        assert lib.pv_xs_answer(core, error, payload, len(payload)) == lib.PV_XS_DONE
    assert [packet[3] for packet in dom0.receive()] == [b"1\0", b"ENOENT\0", b"E2BIG\0"]
    assert [line.split()[-1] for line in said(core)] == ["OK", "ENOENT", "E2BIG"]


def test_who_asks_for_the_trace_is_not_in_it(core: Any) -> None:
    dom0 = Client(core)
    for words in (b"trace\0", b"trace\0000\0", b"track\0", b"trac\0"):
        dom0.feed(encode(Op.CONTROL, 1, 0, words))
        lib.pv_xs_answer(core, 0, b"OK\0", 3)
    assert said(core) == ["0.1 - CONTROL track OK", "0.1 - CONTROL trac OK"]


def test_it_ends_by_itself(core: Any) -> None:
    dom0 = Client(core)
    lib.pv_xs_trace_until(core, 2)
    lib.pv_xs_set_now(core, 1)
    dom0.ask(Op.READ, b"/a\0")
    lib.pv_xs_set_now(core, 2)
    dom0.ask(Op.READ, b"/b\0")
    assert said(core) == ["0.1 - READ /a ENOENT"]


def test_old_lines_make_room(core: Any) -> None:
    dom0 = Client(core)
    n = 3 * TRACE_BYTES // 400
    for i in range(n):
        dom0.ask(Op.READ, b"/%04d" % i + b"x" * 400 + b"\0")
    after, lost, lines = read(core)
    assert (after, lost) == (n, n - len(lines))
    assert [int(line.split()[4][1:5]) for line in lines] == list(range(lost, n))
    assert 0 < TRACE_BYTES - sum(len(line) + 1 for line in lines) < 500
    assert read(core, n - 1)[1:] == (0, lines[-1:])
    assert read(core, n + 5) == (n, 0, [])
    some = read(core, lost, 1000)
    assert some == (lost + 2, 0, lines[:2])  # whole lines only


def test_the_access_log_has_the_same_lines_until_it_cannot_be_written(core: Any) -> None:
    dom0 = Client(core)
    reader, writer = os.pipe()
    lib.pv_xs_trace_to(core, writer)
    lib.pv_xs_set_now(core, 1)  # no other trace is kept
    dom0.ask(Op.READ, b"/a\0")
    assert re.fullmatch(rb"\d+\.\d{3} 0\.1 - READ /a ENOENT \d+\n", os.read(reader, 1000))
    os.close(reader)
    for _ in range(2):
        assert dom0.ask(Op.READ, b"/a\0") == b"! ENOENT\0"
    os.close(writer)
    assert read(core)[2] == []
