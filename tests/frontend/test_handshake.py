# SPDX-License-Identifier: MIT
"""The frontend's negotiation against a scripted backend: every edge of connecting and closing.

`tests/integration/test_handshake_edges.py` lists the edges and where each is tested, from both sides.
"""

import threading
from collections.abc import Iterator

import pytest

import paravirt
from paravirt.errors import Closed, NotFound, ParavirtError, PeerError, PeerGone, TimedOut
from paravirt.host import device as devices
from paravirt.protocol.xenbus import XenbusState
from paravirt.xenstore import xenbus

from .scripted_backend import DEADLINE_S, S, ScriptedBackend

PLACE = ("ring-ref0", "event-channel")


@pytest.fixture
def back(host: paravirt.Host) -> Iterator[ScriptedBackend]:
    with ScriptedBackend(host) as made:
        yield made


def test_a_backend_that_is_connected_to_somebody_else(back: ScriptedBackend) -> None:
    """What is left of the last connection is not taken for ours: the frontend waits until it is asked."""
    back.write(S.CONNECTED)
    opening = back.open()
    back.expect(S.INITIALISING)
    assert back.keys(*PLACE) == {}
    back.offer()
    back.expect(S.INITIALISED)
    back.write(S.CONNECTED)
    back.finish(opening.result(DEADLINE_S))


def test_a_backend_that_goes_straight_to_connected(back: ScriptedBackend) -> None:
    """It cannot have seen a ring: the frontend believes nothing of it and says after a while what it waited for."""
    opening = back.open(timeout_s=0.2)
    back.write(S.CONNECTED)
    with pytest.raises(TimedOut, match="the backend is in state CONNECTED"):
        opening.result(DEADLINE_S)


@pytest.mark.parametrize("state", [S.INIT_WAIT, S.CONNECTED])
def test_the_same_state_twice_changes_nothing(back: ScriptedBackend, state: XenbusState) -> None:
    opening = back.open()
    back.offer()
    back.expect(S.INITIALISED)
    published = back.keys(*PLACE)
    if state is S.INIT_WAIT:
        for _ in range(20):
            back.write(state)
    back.write(S.CONNECTED)
    disk = opening.result(DEADLINE_S)
    if state is S.CONNECTED:
        for _ in range(20):
            back.write(state)
    assert (back.keys(*PLACE), back.frontend()) == (published, S.CONNECTED)
    assert disk.size_bytes == 1 << 20
    back.finish(disk)


def test_a_backend_that_offers_anew_while_connected(back: ScriptedBackend) -> None:
    """It was started again and knows nothing of our ring."""
    disk = back.connect()
    for reconnects in 1, 2:
        back.write(S.INIT_WAIT)
        back.expect(S.INITIALISED)
        back.write(S.CONNECTED)
        back.expect(S.CONNECTED)
        assert disk.statistics().reconnects == reconnects
    back.finish(disk)


def test_the_frontends_directory_is_deleted_while_connected(back: ScriptedBackend) -> None:
    """Nothing brings it back."""
    disk = back.connect()
    xenbus.remove(back.store, back.path.frontend)
    back.write(S.CLOSED)
    with pytest.raises(PeerGone):
        disk.pread(512, 0, timeout_s=DEADLINE_S)
    disk.close()
    assert back.domain.disks() == []


def test_the_frontends_directory_is_deleted_while_it_negotiates(back: ScriptedBackend) -> None:
    opening = back.open()
    back.expect(S.INITIALISING)
    xenbus.remove(back.store, back.path.frontend)
    back.offer()
    with pytest.raises((PeerError, NotFound), match=r"closed|does not exist"):
        opening.result(DEADLINE_S)
    assert back.domain.disks() == []


def test_the_backends_directory_is_deleted(back: ScriptedBackend) -> None:
    disk = back.connect()
    xenbus.remove_backend(back.store, back.path.backend)
    with pytest.raises(PeerGone):
        disk.pread(512, 0, timeout_s=DEADLINE_S)
    back.expect(S.CLOSED)
    disk.close()


@pytest.mark.parametrize(("offered", "pages"), [(None, 1), ("0", 1), ("1", 2), ("2", 4), ("30", 4)])
def test_rings_that_a_backend_takes(back: ScriptedBackend, offered: str | None, pages: int) -> None:
    """One page, under its own name, for a backend that does not say; never more than wanted."""
    opening = back.open(ring_page_order=2)
    name = "max-ring-page-order"
    back.offer({} if offered is None else {name: offered}, without=() if offered else (name,))
    back.expect(S.INITIALISED)
    order = {"ring-page-order": str(pages.bit_length() - 1)} if pages > 1 else {}
    assert back.keys("ring-page-order") == order
    names = ["ring-ref"] if pages == 1 else [f"ring-ref{i}" for i in range(pages)]
    there = back.keys("ring-ref", *(f"ring-ref{i}" for i in range(16)))
    assert sorted(there) == sorted(names)
    assert len(set(there.values())) == pages
    back.write(S.CONNECTED)
    back.finish(opening.result(DEADLINE_S))


NONSENSE = {
    "no size": ({}, ("sectors",), "sectors is missing"),
    "a size that is none": ({"sectors": "many"}, (), "sectors is 'many'"),
    "a size below nothing": ({"sectors": "-8"}, (), "sectors is '-8'"),
    "a size beyond all": ({"sectors": str(1 << 60)}, (), "sectors is"),
    "sectors of three bytes": ({"sector-size": "3"}, (), "sector-size is 3"),
    "half a sector": ({"sector-size": "4096", "sectors": "9"}, (), "not a whole number"),
    "flags that are none": ({"feature-flush-cache": "yes"}, (), "feature-flush-cache is 'yes'"),
    "rings that are none": ({"max-ring-page-order": "x"}, (), "max-ring-page-order is 'x'"),
}


@pytest.mark.parametrize(("keys", "without", "complaint"), NONSENSE.values(), ids=NONSENSE)
def test_an_offer_that_makes_no_sense(
    back: ScriptedBackend, keys: dict[str, str], without: tuple[str, ...], complaint: str
) -> None:
    """Whoever opens the disk hears why, the backend too, and it can be opened again."""
    opening = back.open()
    back.offer(keys, without=without)
    if "max-ring-page-order" not in keys:
        back.expect(S.INITIALISED)
        back.write(S.CONNECTED)
    back.expect(S.CLOSING)
    back.write(S.CLOSED)
    with pytest.raises(PeerError, match=complaint):
        opening.result(DEADLINE_S)
    home = f"/local/domain/{back.domain.domid}"
    said = xenbus.read_key(back.store, f"{home}/error/device/vbd/51712/error")
    assert said is not None
    assert said.startswith("22 ")
    assert complaint in said
    back.write(S.CLOSED)
    back.finish(back.connect())


@pytest.mark.parametrize("state", ["9", "x", "", "44"])
def test_a_state_that_is_none(back: ScriptedBackend, state: str) -> None:
    disk = back.connect()
    back.store.write(f"{back.path.backend}/state", state)
    with pytest.raises(PeerError, match="state is"):
        disk.pread(512, 0, timeout_s=DEADLINE_S)
    disk.close()


@pytest.mark.parametrize("state", [S.INITIALISED, S.RECONFIGURING, S.RECONFIGURED, S.INITIALISING])
def test_states_that_mean_nothing_to_a_frontend(back: ScriptedBackend, state: XenbusState) -> None:
    disk = back.connect()
    back.write(state)
    back.write(S.CONNECTED)
    assert back.frontend() is S.CONNECTED
    assert not disk.is_closed
    back.finish(disk)


def test_no_backend_takes_the_device_up(back: ScriptedBackend) -> None:
    with pytest.raises(TimedOut, match=r"did not connect in .* the backend is in state INITIALISING"):
        back.open(timeout_s=0.1).result(DEADLINE_S)
    back.finish(back.connect())


def test_a_backend_that_reports_an_error_of_its_image(back: ScriptedBackend) -> None:
    back.store.write(f"{back.path.backend}/hotplug-error", "the image is on fire")
    with pytest.raises(TimedOut, match=r"did not connect in .*: the image is on fire"):
        back.open(timeout_s=0.1).result(DEADLINE_S)


@pytest.mark.parametrize("state", [S.CLOSING, S.CLOSED, S.UNKNOWN])
def test_the_device_is_taken_away_before_it_is_connected(back: ScriptedBackend, state: XenbusState) -> None:
    """At once, not after the time-out."""
    opening = back.open()
    back.offer()
    back.expect(S.INITIALISED)
    if state is S.UNKNOWN:
        xenbus.remove_backend(back.store, back.path.backend)
    else:
        back.write(state)
    with pytest.raises(PeerError, match="closed"):
        opening.result(DEADLINE_S)
    assert back.frontend() is S.CLOSED


def test_both_sides_close_at_once(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """Whoever comes first: both come to an end, nothing is left, and nobody waits for a time-out."""
    for n in range(20):
        host.attach_disk(domain, "1M", driver="memory")
        disk, together = domain.open_disk(), threading.Barrier(2)

        def take(together: threading.Barrier = together) -> None:
            together.wait(DEADLINE_S)
            host.detach_disk(domain)

        taker = threading.Thread(target=take)
        taker.start()
        together.wait(DEADLINE_S)
        threading.Event().wait(n * 0.0002)
        disk.close()
        taker.join(4.0)
        assert not taker.is_alive()
        assert domain.disks() == []
        assert devices.list_devices(host.store) == []


def test_disconnecting_twice_is_harmless(back: ScriptedBackend) -> None:
    disk = back.connect()
    for _ in range(2):
        disk.pause()  # as when the backend goes
    back.write(S.CLOSING)
    back.expect(S.CLOSED)
    for _ in range(2):
        disk.pause()
        disk.closed(None)
    with pytest.raises(PeerGone):
        disk.pread(512, 0)
    for _ in range(2):
        disk.close()
    with pytest.raises(Closed):
        disk.pread(512, 0)


def test_a_backend_whose_state_flickers_does_no_harm(back: ScriptedBackend) -> None:
    disk = back.connect()
    for n in range(100):
        back.write(S(1 + n % 4))
    back.write(S.CLOSED)
    with pytest.raises(ParavirtError):
        disk.pread(512, 0, timeout_s=DEADLINE_S)
    disk.close()
    assert back.frontend() is S.CLOSED
