# SPDX-License-Identifier: MIT
"""A frontend and a backend agree on who pays for the order between pushing and falling asleep."""

import pytest

import paravirt
from paravirt.frontend.vbd import Disk
from paravirt.protocol.keys import FENCE_KEY
from paravirt.ring import waiting
from paravirt.ring.waiting import Fence

needs_membarrier = pytest.mark.skipif(
    not (waiting.offer_fence("process") and waiting.offer_fence("host")), reason="this kernel has no membarrier(2)"
)


def fences_of(host: paravirt.Host, disk: object) -> tuple[Fence, Fence]:
    (device,) = host._backend._devices.values()
    (connection,) = device._connections
    assert isinstance(disk, Disk)
    ring = disk.queue.end.ring
    assert ring is not None
    return ring.fence, connection.ring.fence


@needs_membarrier
@pytest.mark.parametrize("fence", ["full", "process", "host"])
def test_both_ends_do_what_was_offered(fence: Fence) -> None:
    with paravirt.Host(fence=fence) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, str(1 << 20), driver="memory")
        for _ in range(2):  # the second frontend starts from the directories that the first has left
            with domain.open_disk("xvda") as disk:
                assert fences_of(host, disk) == (fence, fence)
                disk.pwrite(b"x" * 512, 512)
                assert disk.pread(512, 512) == b"x" * 512
                for path in disk._path.frontend, disk._path.backend:
                    assert FENCE_KEY not in host.store.ls(path)


@needs_membarrier
def test_a_frontend_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with paravirt.Host(fence="process") as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, str(1 << 20), driver="memory")
        monkeypatch.setattr("paravirt.frontend.disk_device.fence_for", lambda word: "full")
        with domain.open_disk("xvda") as disk:
            assert fences_of(host, disk) == ("full", "full")
            assert disk.pread(512, 0) == bytes(512)


@needs_membarrier
def test_words() -> None:
    assert waiting.fence_word("full") == ""
    assert waiting.fence_word("host") == "host"
    ours = waiting.fence_word("process")
    assert waiting.fence_for(ours) == "process"
    for word in ("", "process:", "process:" + "0" * 32, "full", "HOST", "x" * 64):
        assert waiting.fence_for(word) == "full"
