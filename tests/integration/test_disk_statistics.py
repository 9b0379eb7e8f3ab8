# SPDX-License-Identifier: MIT
"""What the two ends of a disk count, seen from outside, with all in one process."""

import os
from pathlib import Path
from typing import Any

import pytest

import paravirt
from paravirt.backend.service import BackendService
from paravirt.errors import IoError, PermissionRefused
from paravirt.host.disk_statistics import EndStatistics, LiveDisk, disk_statistics, is_named
from paravirt.hypervisor.looking import Looker, Wish
from paravirt.ring.blkif_counters import BlkifCounters

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def only(host: paravirt.Host) -> LiveDisk:
    (disk,) = host.disk_statistics()
    return disk


def ends(disk: LiveDisk) -> tuple[EndStatistics, EndStatistics]:
    assert disk.front is not None
    assert disk.back is not None
    return disk.front, disk.back


def test_both_ends_count_the_same(image: Path) -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, image)
        assert host.disk_statistics() == []
        with domain.open_disk("xvda") as disk:
            for i in range(70):
                disk.pread(4096, i * 4096)
            disk.pwrite(bytes(1024), 512)
            disk.pwrite(bytes(512), 0, barrier=True)
            disk.flush()
            disk.discard(8192, 4096)
            seen = only(host)
            front, back = ends(seen)
            done: dict[str, Any] = {
                "reads": 70, "writes": 2, "barriers": 1, "flushes": 1, "discards": 1, "read_bytes": 70 * 4096,
                "written_bytes": 1536, "discarded_bytes": 4096,
            }  # fmt: skip
            assert back.counters == BlkifCounters(**done)  # the kernel copies
            assert front.counters == BlkifCounters(**done, copied_bytes=70 * 4096 + 1536)
            assert back.blkback == {
                "oo_req": 0, "rd_req": 70, "wr_req": 1, "f_req": 2, "ds_req": 1, "rd_sect": 70 * 8, "wr_sect": 3,
            }  # fmt: skip
            assert (front.ring.requests, back.ring.responses, back.in_flight, back.size) == (74, 74, 0, 128)
            assert sum(front.latency) == sum(back.latency) == 2  # one in 64
            assert (back.percentile_ns(1.0) or 0) > (back.percentile_ns(0.0) or 0) > 0
            assert (seen.name, seen.domid, seen.device_id) == ("guest/xvda", domain.domid, 51712)
            assert [ring.name for ring in seen.queues] == ["vbd/1/51712"]
            assert disk.statistics().read_bytes == 70 * 4096
        assert host.disk_statistics() == []


def test_memory_is_copied_by_the_backend() -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1M", driver="memory")
        with domain.open_disk("xvda") as disk:
            disk.pwrite(os.urandom(128 << 10), 0)
            disk.pread(512, 0)
            _, back = ends(only(host))
            assert back.counters.copied_bytes == (128 << 10) + 512
            assert (back.counters.refused, back.counters.errors) == (0, 0)


def test_a_disk_that_fails_counts_errors_at_both_ends(image: Path) -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, image)
        with domain.open_disk("xvda") as disk:
            os.truncate(image, 0)
            with pytest.raises(IoError):
                disk.pread(4096, 0)
            front, back = ends(only(host))
            assert (front.counters.errors, front.counters.reads, front.counters.read_bytes) == (1, 0, 0)
            assert (back.counters.errors, back.counters.reads, back.counters.read_bytes) == (1, 1, 0)


def test_all_latencies_on_request(image: Path) -> None:
    with paravirt.Host() as host, Looker(host.hypervisor) as looker:
        domain = host.create_domain("guest")
        host.attach_disk(domain, image)
        with domain.open_disk("xvda") as disk:
            disk.pread(4096, 0)
            for ring in looker.look():
                for end in ring.ends.values():
                    looker.want(end, Wish.LATENCY)
            before = [sum(end.latency) for end in ends(only(host))]
            for i in range(50):
                disk.pread(4096, i * 4096)
            assert [sum(end.latency) - was for end, was in zip(ends(only(host)), before, strict=True)] == [50, 50]


def test_a_frontend_goes_on_counting_on_a_new_ring(image: Path) -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, image)
        with domain.open_disk("xvda") as disk:
            for _ in range(3):
                disk.pread(4096, 0)
            host._backend.stop()
            with BackendService(host.hypervisor, host.store):
                disk.pread(4096, 0)
                front, back = ends(only(host))
                assert (front.counters.reads, back.counters.reads) == (4, 1)
                assert disk.statistics().reads == 4
                disk.close()


def test_several_disks_and_domains_are_told_apart() -> None:
    with paravirt.Host() as host:
        for name in ("one", "two"):
            domain = host.create_domain(name)
            for device in ("xvda", "xvdb"):
                host.attach_disk(domain, "1M", driver="memory", device=device)
        one, two = host.domains
        with one.open_disk("xvdb") as b, two.open_disk("xvda") as a, two.open_disk("xvdb"):
            b.pread(512, 0)
            a.pwrite(bytes(512), 0)
            found = {disk.name: ends(disk)[1].counters for disk in host.disk_statistics()}
    assert list(found) == ["one/xvdb", "two/xvda", "two/xvdb"]
    assert [(done.reads, done.writes) for done in found.values()] == [(1, 0), (0, 1), (0, 0)]


def test_a_domain_may_not_look() -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        with pytest.raises(PermissionRefused):
            disk_statistics(domain.hypervisor)


def test_a_disk_has_several_names() -> None:
    for name in ("guest/xvda", "guest/51712", "1/xvda", "1/51712", "vbd/1/51712", "vbd/guest/xvda"):
        assert is_named(name, 1, "guest", 51712)
    for name in ("", "xvda", "guest", "guest/xvdb", "2/xvda", "other/xvda", "vbd/2/51712", "/xvda"):
        assert not is_named(name, 1, "guest", 51712)


def test_a_disk_of_nonsense_has_a_name() -> None:
    for device_id in (0, 1, 2**32 - 1, 202 << 8):
        assert LiveDisk(1, "guest", device_id, ()).name.startswith("guest/")
    assert LiveDisk(1, "guest", 0, ()).name == "guest/0"
    assert LiveDisk(1, "guest", 51712, ()).back is None
