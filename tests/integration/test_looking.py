# SPDX-License-Identifier: MIT
"""Every device of every class shows both ends of its ring, with all in one process, too."""

import os
from pathlib import Path

import paravirt
from paravirt.hypervisor.looking import Looker
from paravirt.protocol import blkif
from tests.echo_device import ADD, ECHO, EchoBack, EchoFront


def test_rings_of_an_embedded_host(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with paravirt.Host() as host, Looker(host.hypervisor) as looker:
        domain = host.create_domain("guest")
        host.attach_disk(domain, image)
        host.attach(domain, EchoBack)
        assert looker.look() == []
        with domain.open_disk("xvda") as disk, domain.open(EchoFront) as echo:
            for i in range(8):
                disk.pread(4096, i * 4096)
            echo.call(operation=ADD, value=3)
            rings = {ring.end.kind: ring for ring in looker.look()}
            assert sorted(ring.name for ring in rings.values()) == ["vbd/1/51712", "vecho/1/0"]
            messages = {"vbd": (blkif.REQUEST, blkif.RESPONSE), "vecho": (ECHO.request, ECHO.response)}
            protocols = {"vbd": "blkif", "vecho": "vecho"}
            for kind, ring in rings.items():
                assert {end.pid for end in ring.ends.values()} == {os.getpid()}
                assert [end.domid for end in ring.ends.values()] == [1, 0]
                assert ring.end.protocol == protocols[kind]
                assert {end.layouts for end in ring.ends.values()} == {messages[kind]}
            front, back = rings["vbd"].front, rings["vbd"].back
            assert front is not None
            assert back is not None
            assert front.statistics.requests == back.statistics.requests == 8
        assert looker.look() == []
