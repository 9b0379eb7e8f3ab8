# SPDX-License-Identifier: MIT
"""What frontends write into a directory in which others have been before."""

import paravirt
from paravirt.xenstore import xenbus

ABSENT = ("ring-page-order", "multi-queue-num-queues")


def test_a_smaller_ring_than_the_last_time(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """What says how large the last one was would be taken for what is said of this one."""
    path = host.attach_disk(domain, "1M", driver="memory")
    for order in (2, 0, 4, 0):
        with domain.open_disk(ring_page_order=order) as disk:
            disk.pwrite(b"x" * 512, 512 * order)
            assert disk.pread(512, 512 * order) == b"x" * 512
            said = xenbus.read_keys(host.store, path.frontend, ABSENT)
            assert said == ({"ring-page-order": str(order)} if order else {})


def test_one_queue_after_several(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """A frontend of another kind had four of them."""
    path = host.attach_disk(domain, "1M", driver="memory")
    for name, value in {"multi-queue-num-queues": "4", "queue-0/ring-ref": "8", "queue-0/event-channel": "1"}.items():
        domain.store.write(f"{path.frontend}/{name}", value)
    with domain.open_disk(ring_page_order=0) as disk:
        assert disk.pread(512, 0) == bytes(512)
        assert xenbus.read_keys(host.store, path.frontend, ABSENT) == {}
