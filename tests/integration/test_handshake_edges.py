# SPDX-License-Identifier: MIT
"""The edges of connecting and closing, each seen in a real driver, and where they are tested from both sides.

The list is that of the handshakes' description in `protocol/xenbus.py` and of the drivers named there. A test that is
renamed or removed is missed here.
"""

import ast
import threading
from pathlib import Path

import pytest

import paravirt
from paravirt.errors import TransactionConflict
from paravirt.xenstore.client_transaction import Transaction

TESTS = Path(__file__).parent.parent
BACK, FRONT = "backend/test_handshake.py", "frontend/test_handshake.py"
QUEUES, RESTART, SUSPEND = "backend/test_queues.py", "backend/test_restart.py", "frontend/test_suspend.py"
HERE = "integration/test_handshake_edges.py"
FAULTS = "integration/test_connect_faults.py"

EDGES: dict[str, tuple[tuple[str, str], ...]] = {
    "one side goes straight to CONNECTED": (
        (BACK, "test_connect_and_unplug"),
        (FRONT, "test_a_backend_that_goes_straight_to_connected"),
        (FRONT, "test_a_backend_that_is_connected_to_somebody_else"),
    ),
    "the same state is seen twice": (
        (BACK, "test_the_same_state_twice_changes_nothing"),
        (FRONT, "test_the_same_state_twice_changes_nothing"),
    ),
    "one side starts over while connected": (
        (BACK, "test_crash_and_reboot_of_the_guest"),
        (FRONT, "test_a_backend_that_offers_anew_while_connected"),
        (SUSPEND, "test_a_disk_goes_on_over_a_new_ring"),
    ),
    "a directory is deleted while connected": (
        (BACK, "test_frontend_directory_deleted_while_connected"),
        (FRONT, "test_the_frontends_directory_is_deleted_while_connected"),
        (FRONT, "test_the_frontends_directory_is_deleted_while_it_negotiates"),
        (FRONT, "test_the_backends_directory_is_deleted"),
    ),
    "ring-page-order is there with 0, or not at all": (
        (BACK, "test_page_order_zero"),
        (FRONT, "test_rings_that_a_backend_takes"),
        ("frontend/test_negotiation.py", "test_a_smaller_ring_than_the_last_time"),
    ),
    "ring-ref is missing, no number, or of no page": (
        (BACK, "test_a_bad_frontend_is_refused_and_others_go_on"),
        (FRONT, "test_an_offer_that_makes_no_sense"),
    ),
    "the event channel is bound already": ((BACK, "test_event_channel_already_bound"),),
    "no queues, too many, or one whose directory is missing": (
        (QUEUES, "test_a_frontend_that_lies_about_its_queues"),
        ("frontend/test_negotiation.py", "test_one_queue_after_several"),
    ),
    "the protocol is unknown": ((BACK, "test_a_bad_frontend_is_refused_and_others_go_on"),),
    "hotplug-status never comes, or says error": (
        (BACK, "test_a_bad_image_is_looked_at_once"),
        (FRONT, "test_no_backend_takes_the_device_up"),
        (FRONT, "test_a_backend_that_reports_an_error_of_its_image"),
    ),
    "the device goes offline before it is connected": (
        (BACK, "test_offline_before_connecting"),
        (FRONT, "test_the_device_is_taken_away_before_it_is_connected"),
    ),
    "both sides close at once": (
        (BACK, "test_both_sides_close_at_once"),
        (FRONT, "test_both_sides_close_at_once"),
    ),
    "the backend is started anew": (
        (BACK, "test_a_backend_dies_just_after_it_connected"),
        (RESTART, "test_backends_that_come_and_go_at_any_moment"),
        (QUEUES, "test_a_backend_that_is_started_anew_asks_for_other_rings"),
        ("integration/test_crash.py", "test_back"),
    ),
    "every transaction meets another one": ((HERE, "test_every_transaction_meets_another_one"),),
    "a state that is none": (
        (BACK, "test_a_state_no_frontend_has"),
        (FRONT, "test_a_state_that_is_none"),
        (FRONT, "test_states_that_mean_nothing_to_a_frontend"),
    ),
    "states that flicker": (
        (BACK, "test_states_that_flicker_do_no_harm"),
        (FRONT, "test_a_backend_whose_state_flickers_does_no_harm"),
    ),
    "disconnecting twice": (
        (BACK, "test_disconnecting_twice_is_harmless"),
        (FRONT, "test_disconnecting_twice_is_harmless"),
    ),
    "any step fails": (
        (FAULTS, "test_each_call_of_the_frontend_fails_once"),
        (FAULTS, "test_each_call_of_the_backend_fails_once"),
    ),
    "a thousand devices come and go": ((FAULTS, "test_devices_that_come_and_go"),),
}


@pytest.mark.parametrize("tests", EDGES.values(), ids=EDGES)
def test_each_edge_has_its_tests(tests: tuple[tuple[str, str], ...]) -> None:
    for file, name in tests:
        tree = ast.parse((TESTS / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}: {name}"


def test_every_transaction_meets_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, in each thread of both halves and of the toolstack, before it comes through."""
    commit, tried, met = Transaction.commit, threading.local(), set[str]()

    def conflict(self: Transaction) -> None:
        tried.times = getattr(tried, "times", 0) + 1
        if tried.times % 3:
            met.add(threading.current_thread().name)
            self.abort()
            raise TransactionConflict("another one came first", "EAGAIN")
        commit(self)

    monkeypatch.setattr(Transaction, "commit", conflict)
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        for _ in range(3):
            host.attach_disk(domain, "1M", driver="memory")
            with domain.open_disk() as disk:
                disk.pwrite(b"x" * 512, 0)
                disk.suspend()
                disk.resume()
                assert disk.pread(512, 0) == b"x" * 512
            host.detach_disk(domain)
        assert domain.disks() == []
    assert {"MainThread", "vbd-backend", "vbd-51712"} <= met
