# SPDX-License-Identifier: MIT
"""Recorded, replayed, the same; and each sort of difference is told."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paravirt
from paravirt.errors import AlreadyExists, InvalidRequest, IoError, PeerError, PeerGone
from paravirt.hypervisor.looking import Looker
from paravirt.looking.compare import Report
from paravirt.looking.messages import rewriter_for
from paravirt.looking.recorder import Recorder, offer_of
from paravirt.looking.replay_to_back import BackReplay, pattern
from paravirt.looking.serve import FrontReplay, recorded_device
from paravirt.protocol import blkif
from paravirt.protocol.decode import decoder_for
from paravirt.protocol.recording import Header, Kind, Reader, Record, Writer
from tests.echo_device import ADD, ECHO, FILL, HOLD, SUM, EchoBack, EchoFront
from tests.protocol.test_decode import blkif_request

DEADLINE_S = 20.0
BLKIF = Header("vbd/1/51712", "blkif", 1, "back", 128, 112, 112, 16, 1_000_000_000)


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host() as made:
        yield made


@pytest.fixture
def guest(host: paravirt.Host) -> paravirt.Domain:
    return host.create_domain("guest")


def record(host: paravirt.Host, name: str, file: Path, use: Callable[[], None]) -> None:
    """What `use` does with a ring that is up."""
    stop, asked = threading.Event(), threading.Semaphore(0)

    def look() -> bool:
        asked.release()
        return stop.is_set()

    with Looker(host.hypervisor) as looker, file.open("wb") as opened:
        ring = looker.find(name)
        recorder = Recorder(looker, ring, offer=offer_of(host.store, ring))
        thread = threading.Thread(target=recorder.run, args=(opened,), kwargs={"seconds": None, "stop": look})
        thread.start()
        for _ in range(2):
            assert asked.acquire(timeout=DEADLINE_S)
        use()
        stop.set()
        thread.join(DEADLINE_S)
        assert recorder.recorded.lost == 0


def use_disk(disk: Any) -> None:
    disk.pwrite(b"x" * 100 * 512, 0)
    disk.read_many([i * 4096 for i in range(30)], 4096)
    disk.flush()
    assert disk.pread(4096, 65536)


def use_echo(device: Any) -> None:
    buffer = device.buffer(3 * 4096)
    device.exchange([{"operation": ADD, "value": i} for i in range(40)])
    device.call(operation=FILL, value=3, buffer=buffer)
    device.call(operation=SUM, value=0, buffer=device.buffer(4096))


@pytest.fixture
def disk_file(host: paravirt.Host, guest: paravirt.Domain, tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    host.attach_disk(guest, image)
    with guest.open_disk(max_segments=11, merge=False) as disk:
        record(host, "vbd/1/51712", tmp_path / "disk.pcapng", lambda: use_disk(disk))
    return tmp_path / "disk.pcapng"


@pytest.fixture
def echo_file(host: paravirt.Host, guest: paravirt.Domain, tmp_path: Path) -> Path:
    host.attach(guest, EchoBack)
    with guest.open(EchoFront) as device:
        record(host, "vecho/1/0", tmp_path / "echo.pcapng", lambda: use_echo(device))
    return tmp_path / "echo.pcapng"


def to_back(guest: paravirt.Domain, file: Path, kind: str, number: int, **options: Any) -> Report:
    data = options.pop("data", "zero")
    with file.open("rb") as opened:
        reader = Reader(opened)
        with BackReplay(guest, guest.locate(kind, number), reader.header, data=data) as replaying:
            return replaying.run(reader, **options)


@pytest.mark.parametrize(
    "options", [{"speed": 0}, {"speed": 1}, {"speed": 0, "in_flight": 1}, {"speed": 5, "in_flight": 99}]
)
def test_a_disk_answers_as_it_did(guest: paravirt.Domain, disk_file: Path, options: dict[str, Any]) -> None:
    report = to_back(guest, disk_file, "vbd", 51712, **options)
    assert report.is_same
    assert (report.requests, report.responses, report.unknown, report.skipped) == (34, 34, 0, 0)


def test_writes_are_done_with_what_was_asked_for(host: paravirt.Host, guest: paravirt.Domain, disk_file: Path) -> None:
    to_back(guest, disk_file, "vbd", 51712, speed=0, data="pattern")
    with guest.open_disk(max_segments=11, merge=False) as disk:
        assert disk.pread(512, 0) == pattern(0, 512)
        assert disk.pread(512, 88 * 512) == pattern(1, 512), "the second of 44 KiB"
    to_back(guest, disk_file, "vbd", 51712, speed=0)
    with guest.open_disk(max_segments=11, merge=False) as disk:
        assert not any(disk.pread(51200, 0))


def test_another_disk_answers_differently(host: paravirt.Host, guest: paravirt.Domain, disk_file: Path) -> None:
    host.attach_disk(guest, "64K", device="xvdb", driver="memory")
    report = to_back(guest, disk_file, "vbd", 51728, speed=0)
    assert not report.is_same
    assert report.responses == 34
    assert report.different == 15, "14 reads of the batch lie beyond its end, and the last one"
    assert str(report.differences[0]) == (
        "request 18, its answer: recorded read status 0 is okay; now read status -1 is error"
    )


def test_a_declared_device_answers_as_it_did(guest: paravirt.Domain, echo_file: Path) -> None:
    report = to_back(guest, echo_file, "vecho", 0, speed=0)
    assert report.is_same
    assert (report.requests, report.responses) == (42, 42)


def test_other_fields_of_an_answer_are_a_difference(
    host: paravirt.Host, guest: paravirt.Domain, echo_file: Path
) -> None:
    host.attach(guest, EchoBack, 1, step=2)
    report = to_back(guest, echo_file, "vecho", 1, speed=0)
    assert report.different == 40
    assert "value 1; now" in str(report.differences[0])
    assert "value 2" in str(report.differences[0])


def test_no_more_are_in_flight_than_recorded(host: paravirt.Host, guest: paravirt.Domain, tmp_path: Path) -> None:
    """Two were in flight, then two more: the device holds them, so a third one would be seen."""
    host.attach(guest, EchoBack)
    header = Header(
        "vecho/1/0", "vecho", 1, "back", 64, ECHO.request.itemsize, ECHO.request.itemsize, ECHO.response.itemsize, 0
    )
    header = header.with_messages(rewriter_messages())
    records = []
    for first in (0, 2):
        records += [echo_record(Kind.REQUEST, identity, HOLD) for identity in (first, first + 1)]
        records += [echo_record(Kind.RESPONSE, identity, 0) for identity in (first, first + 1)]
    seen = []

    def answer() -> None:
        while len(seen) < 4:
            time.sleep(0.05)
            held = EchoBack.take_held()
            seen.extend(held)
            assert len(held) <= 2
            for request in held:
                request.answer({"value": 0})

    thread = threading.Thread(target=answer)
    thread.start()
    with BackReplay(guest, guest.locate("vecho", 0), header) as replaying:
        report = replaying.run(records, speed=0)
    thread.join(DEADLINE_S)
    assert report.is_same
    assert report.requests == 4


def rewriter_messages() -> Any:
    from paravirt.protocol.layout import MessagePair

    return MessagePair.of(ECHO)


def echo_record(kind: Kind, identity: int, operation: int) -> Record:
    message = np.zeros(1, ECHO.request if kind is Kind.REQUEST else ECHO.response)
    message["id"] = identity
    if kind is Kind.REQUEST:
        message["operation"] = operation
    return Record(0, kind, identity, message.tobytes())


def test_a_request_that_is_not_answered_is_told(host: paravirt.Host, guest: paravirt.Domain) -> None:
    host.attach(guest, EchoBack)
    size = ECHO.request.itemsize
    header = Header("vecho/1/0", "vecho", 1, "back", 64, size, size, ECHO.response.itemsize, 0)
    header = header.with_messages(rewriter_messages())
    with BackReplay(guest, guest.locate("vecho", 0), header, answer_timeout_s=0.2) as replaying:
        report = replaying.run([echo_record(Kind.REQUEST, 0, HOLD)], speed=0)
        assert (report.unanswered, report.is_same) == (1, False)
        EchoBack.take_held()


def test_a_backend_that_goes_ends_the_replay(host: paravirt.Host, guest: paravirt.Domain) -> None:
    host.attach(guest, EchoBack)
    size = ECHO.request.itemsize
    header = Header("vecho/1/0", "vecho", 1, "back", 64, size, size, ECHO.response.itemsize, 0)
    header = header.with_messages(rewriter_messages())
    with BackReplay(guest, guest.locate("vecho", 0), header) as replaying:
        timer = threading.Timer(0.2, host.detach, (guest, EchoBack))
        timer.start()
        with pytest.raises((PeerGone, PeerError)):
            replaying.run([echo_record(Kind.REQUEST, 0, HOLD)], speed=0)
        EchoBack.take_held()
    timer.join()


def test_what_cannot_be_replayed_is_passed_over(host: paravirt.Host, guest: paravirt.Domain) -> None:
    host.attach_disk(guest, "1M", driver="memory")
    indirect = bytes([6, 0, 1]).ljust(112, b"\0")
    records = [Record(0, Kind.REQUEST, 0, indirect), Record(0, Kind.REQUEST, 1, blkif_request(0, 9, 0, (5, 0, 7)))]
    with BackReplay(guest, guest.locate("vbd", 51712), BLKIF) as replaying:
        report = replaying.run(records, speed=0)
    assert (report.skipped, report.requests, report.unknown) == (1, 1, 1)


def test_recordings_that_fit_no_device_are_refused(host: paravirt.Host, guest: paravirt.Domain) -> None:
    host.attach_disk(guest, "1M", driver="memory")
    host.attach(guest, EchoBack)
    with pytest.raises(InvalidRequest, match="--driver"):
        BackReplay(guest, guest.locate("vbd", 51712), replace(BLKIF, protocol="vnothing"))
    with pytest.raises(InvalidRequest, match="do not fit"):
        rewriter_for(replace(BLKIF, request_bytes=111))
    with pytest.raises(PeerError, match="messages"):
        BackReplay(guest, guest.locate("vecho", 0), BLKIF)
    with pytest.raises(InvalidRequest, match="no device"):
        recorded_device(replace(BLKIF, device="nonsense"))
    assert recorded_device(replace(BLKIF, device="vbd/1/51712/q1")) == ("vbd", 51712)


def test_a_front_end_gets_the_recorded_answers(host: paravirt.Host, guest: paravirt.Domain, disk_file: Path) -> None:
    with FrontReplay(host.hypervisor, host.store, 1, disk_file, device=("vbd", 51728), fill=True) as replaying:
        with guest.open_disk("xvdb", max_segments=11, merge=False) as disk:
            assert disk.size_bytes == 1 << 20
            use_disk(disk)
            report = replaying.wait(timeout_s=DEADLINE_S)
    assert report.is_same
    assert (report.requests, report.responses) == (34, 34)
    assert guest.disks() == ["xvda"], "the device is gone"
    assert len(host.hypervisor.list_domains()) == 2


def test_data_that_is_read_is_zeros_or_a_pattern(host: paravirt.Host, guest: paravirt.Domain, tmp_path: Path) -> None:
    file = tmp_path / "one.pcapng"
    with file.open("wb") as opened:
        writer = Writer(opened, replace(BLKIF, offer={"sectors": "8", "max-ring-page-order": "0"}))
        writer.write(BLKIF.started_ns, Kind.REQUEST, 0, blkif_request(0, 4, 0, (5, 0, 7)))
        response = np.zeros(1, blkif.RESPONSE)
        response["id"] = 4
        writer.write(BLKIF.started_ns, Kind.RESPONSE, 0, response.tobytes())
        writer.finish()
    for fill, expected in ((False, bytes(4096)), (True, pattern(0, 4096))):
        with (
            FrontReplay(host.hypervisor, host.store, 1, file, fill=fill) as replaying,
            guest.open_disk(max_segments=11, merge=False) as disk,
        ):
            assert disk.pread(4096, 0) == expected
            assert replaying.wait(timeout_s=DEADLINE_S).is_same


def test_a_front_end_that_asks_for_something_else(host: paravirt.Host, guest: paravirt.Domain, echo_file: Path) -> None:
    with FrontReplay(host.hypervisor, host.store, 1, echo_file, device=("vecho", 5)) as replaying:
        with guest.open(EchoFront, 5) as device:
            assert device.call(operation=ADD, value=77).value == 1, "as recorded"
            for value in range(1, 40):
                device.call(operation=ADD, value=value)
            buffers = [device.buffer(3 * 4096), device.buffer(4096)]
            device.call(operation=FILL, value=3, buffer=buffers[0])
            device.call(operation=SUM, value=0, buffer=buffers[1])
            with pytest.raises(IoError):
                device.call(operation=ADD, value=1)
            report = replaying.wait(timeout_s=DEADLINE_S)
    assert (report.different, report.beyond) == (1, 1)
    assert "value 77" in str(report.differences[0])


def test_a_device_that_is_there_is_not_replaced(host: paravirt.Host, guest: paravirt.Domain, echo_file: Path) -> None:
    with pytest.raises(AlreadyExists):
        FrontReplay(host.hypervisor, host.store, 1, echo_file)
    assert len(host.hypervisor.list_domains()) == 2, "its domain is gone"


def test_rewriting_changes_ids_and_pages_alone() -> None:
    rewriter, decoder = rewriter_for(BLKIF), decoder_for("blkif")
    message = blkif_request(1, 7, 64, (9, 1, 7), (10, 2, 3))
    entry = decoder.request(rewriter.request(message, 2**40, [100, 200]))
    assert str(entry) == f"write id {2**40} sector 64 sectors 9 segments (100/1/7 200/2/3)"
    file = io.BytesIO(message)
    assert rewriter.request(file.getvalue(), 7, [9, 10]) == message
