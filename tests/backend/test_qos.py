# SPDX-License-Identifier: MIT
"""Limits of disks: how much comes through in a time read from the clock, with each engine, and what changes them."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import paravirt
from paravirt.backend.c_engine import EngineName
from paravirt.errors import Closed, InvalidRequest, NotFound
from paravirt.host import vbd
from paravirt.protocol.vbd_qos import MAX_RATE, QOS_KEYS, Qos
from paravirt.ring.vbd_throttle import Throttle
from tests.eventually import eventually

PAGE = 4096
BATCH = 16
"""What one queue may take too much at once."""


@contextmanager
def disk_of(
    engine: EngineName, qos: Qos | None, driver: str = "memory", spec: str = "1M", queues: int = 1
) -> Iterator[tuple[paravirt.Host, paravirt.Domain, paravirt.Disk]]:
    with paravirt.Host(engine=engine, max_queues=queues) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, spec, driver=driver, qos=qos)
        with domain.open_disk(queues=queues) as disk:
            yield host, domain, disk


def read_for(disk: paravirt.Disk, seconds: float, n_bytes: int = PAGE) -> tuple[int, float]:
    """How many single reads came back, and in which time."""
    start, n = time.monotonic(), 0
    while (took := time.monotonic() - start) < seconds:
        disk.pread(n_bytes, 0)
        n += 1
    return n, took


@pytest.fixture(params=["memory", "io_uring"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Driver and spec."""
    if request.param == "memory":
        return "memory", "1M"
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return "file,io=uring", str(path)


@pytest.mark.parametrize("engine", ["c", "python"])
def test_no_more_requests_than_allowed_and_hardly_fewer(engine: EngineName, image: tuple[str, str]) -> None:
    with disk_of(engine, Qos(requests=400, requests_burst=20), *image) as (_, _, disk):
        n, took = read_for(disk, 0.5)
        assert n <= 20 + 400 * took + BATCH
        # A busy machine may do less, but not because it was limited twice.
        assert n >= 20


@pytest.mark.parametrize("engine", ["c", "python"])
def test_no_more_bytes_than_allowed(engine: EngineName, image: tuple[str, str]) -> None:
    rate, burst, size = 4 << 20, 256 << 10, 64 << 10
    with disk_of(engine, Qos(bytes=rate, bytes_burst=burst), *image) as (_, _, disk):
        n, took = read_for(disk, 0.5, size)
        assert n * size <= burst + rate * took + BATCH * size
        assert n * size >= burst


@pytest.mark.parametrize("engine", ["c", "python"])
def test_all_queues_together_are_limited(engine: EngineName) -> None:
    with disk_of(engine, Qos(requests=300, requests_burst=30), queues=2) as (_, _, disk):
        assert disk.n_queues == 2
        done: list[int] = []
        start = time.monotonic()
        threads = [threading.Thread(target=lambda: done.append(read_for(disk, 0.5)[0])) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(done) <= 30 + 300 * (time.monotonic() - start) + 2 * BATCH
        assert min(done) > 0


@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_flush_is_a_request_and_what_is_given_back_moves_no_bytes(
    engine: EngineName, caplog: pytest.LogCaptureFixture
) -> None:
    with disk_of(engine, Qos(bytes=1024, bytes_burst=1024)) as (host, domain, disk):
        for _ in range(8):
            disk.discard(0, 1 << 20)
        with caplog.at_level(logging.INFO, "paravirt.backend.vbd"):
            host.limit_disk(domain, qos=Qos(requests=1, requests_burst=4))
            eventually(lambda: "1 IOPS (burst 4)" in caplog.text, "the backend has seen the limits")
        start = time.monotonic()
        for _ in range(5):
            disk.flush()
        assert time.monotonic() - start > 0.5  # the fifth had to wait for a second to fill the bucket


@pytest.mark.parametrize("engine", ["c", "python"])
def test_limits_change_and_go_while_requests_wait_for_them(engine: EngineName, image: tuple[str, str]) -> None:
    with disk_of(engine, Qos(requests=1, requests_burst=1), *image) as (host, domain, disk):
        disk.pread(PAGE, 0)
        waiting = threading.Thread(target=lambda: [disk.pread(PAGE, 0) for _ in range(3000)])
        waiting.start()
        assert waiting.is_alive()
        host.limit_disk(domain)
        waiting.join(20)  # it would be 50 minutes
        assert not waiting.is_alive()
        host.limit_disk(domain, qos=Qos(requests=100, requests_burst=1))
        eventually(lambda: read_for(disk, 0.2)[0] <= 1 + 100 * 0.4 + BATCH, "limited again")


@pytest.mark.parametrize("engine", ["c", "python"])
def test_who_waits_for_limits_closes_at_once(engine: EngineName, image: tuple[str, str]) -> None:
    """In an hour it would be let through."""
    with disk_of(engine, Qos(bytes=1, bytes_burst=1), *image) as (host, domain, disk):
        disk.pread(PAGE, 0)
        ended: list[str] = []

        def write() -> None:
            try:
                disk.pwrite(bytes(512), 0)
            except Closed as error:
                ended.append(str(error))

        waiting = threading.Thread(target=write)
        waiting.start()
        eventually(lambda: disk.statistics().in_flight == 1)
        disk.close()
        waiting.join()
        assert ended
        host.detach_disk(domain)


def test_what_is_no_limit_is_told_and_leaves_the_limits_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    with disk_of("auto", Qos(requests=200, requests_burst=1)) as (host, domain, disk):
        backend = vbd.DevicePath("vbd", domain.domid, 51712).backend
        for garbage in ("-1", "many", "9" * 40, "1e9", "\u0661"):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "paravirt.backend.vbd"):
                host.store.write(f"{backend}/{QOS_KEYS[0]}", garbage)
                eventually(lambda: "stay as they were" in caplog.text, "the warning")
            assert QOS_KEYS[0] in caplog.text
            assert garbage[:40] in caplog.text
        n, took = read_for(disk, 0.3)
        assert n <= 1 + 200 * took + BATCH
        assert vbd.list_vbds(host.store)[0].qos == "malformed"
        with pytest.raises(InvalidRequest, match="paravirt-qos-iops"):
            vbd.limits_of(host.store, domain.domid, "xvda")


def test_limits_as_keys_and_as_text() -> None:
    every = Qos(100, 200, 4096, 8192)
    assert Qos.from_keys(every.to_keys()) == every
    assert Qos.from_keys({}) == Qos()
    assert Qos().to_keys() == {}
    assert str(every) == "100 IOPS (burst 200), 4096 B/s (burst 8192)"
    assert str(Qos()) == ""
    for wrong in ({"requests": -1}, {"bytes": MAX_RATE + 1}, {"requests_burst": 5}, {"bytes_burst": 5, "requests": 1}):
        with pytest.raises(InvalidRequest, match="paravirt-qos-"):
            Qos(**wrong)


def test_limits_of_a_disk_that_is_not_there() -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        with pytest.raises(NotFound, match="xvda"):
            host.limit_disk(domain, qos=Qos(requests=1))
        with pytest.raises(NotFound, match="xvda"):
            vbd.limits_of(host.store, domain.domid, "xvda")


def test_a_bucket() -> None:
    throttle = Throttle()
    assert not throttle.is_on
    assert throttle.room(7) == 7
    throttle.set(requests=1, requests_burst=3)
    assert throttle.is_on
    assert throttle.room(7) == 3
    throttle.charge(2, 1 << 40)  # bytes are not limited
    assert throttle.room(7) == 1
    throttle.charge(10, 0)
    assert throttle.room(7) == 0
    assert 8 < throttle.wait_s <= 10
    throttle.set(bytes=1 << 20, bytes_burst=64 << 10)
    assert throttle.room(100) == 16  # of a page each
    throttle.charge(1, 1 << 62)
    assert throttle.room(1) == 0
    assert throttle.wait_s == 3600  # it looks again then
    throttle.set()
    assert throttle.room(1 << 20) == 1 << 20
