# SPDX-License-Identifier: MIT
"""Stuck rings: every verdict with a real ring put into that state, and the rules by themselves."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import PeerError
from paravirt.hypervisor.looking import Header
from paravirt.looking.stuck import verdicts
from paravirt.looking.view import EndView, PortView, RingView, process_state
from tests.looking.live import DEADLINE_S, REQUEST, RESPONSE, Live


@pytest.fixture
def live() -> Iterator[Live]:
    with Live() as made:
        yield made


def test_an_idle_ring_is_not_stuck(live: Live) -> None:
    assert live.kinds() == []
    live.push()
    live.answer()
    assert live.front.take(np.zeros(1, RESPONSE)) == 1
    assert live.kinds() == []


def test_a_lost_notification_and_the_kick_that_helps(live: Live) -> None:
    thread = live.sleeping(lambda: live.back.wait(timeout_s=DEADLINE_S))
    live.push(3, quietly=True)
    (verdict,) = live.verdicts()
    assert (verdict.kind, verdict.owes, verdict.kick) == ("lost-notify", "front", True)
    assert verdict.text.startswith("backend: 3 requests not taken for ")
    back = live.find().back
    assert back is not None
    live.looker.kick(back)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert live.back.take(np.zeros(3, REQUEST)) == 3


def test_a_sleeper_that_did_not_ask(live: Live) -> None:
    live.push()
    live.answer()  # without a final check: req_event stays where it was
    live.back_port.take_pending()
    live.sleeping(lambda: live.back_waiter.wait(live.back_port, timeout_s=DEADLINE_S))
    live.push()
    assert ("not-asked", "back") in live.kinds()
    live.back_waiter.kick()


def test_a_masked_port(live: Live) -> None:
    live.back_port.mask()
    live.sleeping(lambda: live.back_waiter.wait(live.back_port, timeout_s=DEADLINE_S))
    live.push()
    (verdict,) = live.verdicts()
    assert (verdict.kind, verdict.owes) == ("masked", "back")
    assert "pending and masked" in verdict.text
    live.back_waiter.kick()


def test_a_backend_that_does_not_look(live: Live) -> None:
    live.push(2)
    (verdict,) = live.verdicts()
    assert (verdict.kind, verdict.owes) == ("not-taken", "back")
    assert "2 requests not taken" in verdict.text
    assert "does not sleep" in verdict.text


def test_requests_that_the_backend_holds(live: Live) -> None:
    live.push(2)
    assert live.back.take(np.zeros(2, REQUEST)) == 2
    (verdict,) = live.verdicts()
    assert (verdict.kind, verdict.owes) == ("held", "back")
    assert "holds 2 requests" in verdict.text
    live.push(1)
    assert live.kinds() == [("not-taken", "back"), ("held", "back")]
    assert "with 2 requests at work" in live.verdicts()[0].text


def test_a_frontend_that_does_not_take_its_responses(live: Live) -> None:
    live.push(5)
    live.answer(5)
    (verdict,) = live.verdicts()
    assert (verdict.kind, verdict.owes) == ("not-taken", "front")
    assert verdict.text.startswith("frontend: 5 responses not taken for ")


def test_a_peer_that_broke_the_protocol(live: Live) -> None:
    live.write_index(0, 1000)
    assert live.kinds() == [("nonsense", "front")]
    assert "req_prod is 1000" in live.verdicts()[0].text
    with pytest.raises(PeerError):
        live.back.poll()
    assert live.kinds() == [("dead", "front")]


def test_a_backend_that_broke_the_protocol(live: Live) -> None:
    live.write_index(2, 3)
    assert live.kinds() == [("nonsense", "back")]
    with pytest.raises(PeerError):
        live.front.poll()
    assert live.kinds() == [("dead", "back")]


def test_an_end_that_is_gone(live: Live) -> None:
    live.push(2)
    live.back.close()
    (verdict,) = live.verdicts()
    assert (verdict.kind, verdict.owes) == ("no-back", "back")
    assert "2 requests wait" in verdict.text


def test_a_frontend_that_is_gone(live: Live) -> None:
    live.front.close()
    assert live.kinds() == [("no-front", "front")]


def test_the_ring_s_memory_is_gone(live: Live) -> None:
    before = live.view()
    assert verdicts(before, replace(before, shared=None))[0].kind == "gone"


def test_progress_between_the_views_is_no_verdict(live: Live) -> None:
    live.push(4)
    before = live.view()
    live.answer(2)
    assert [each.kind for each in verdicts(before, live.view())] == []


def test_a_stopped_process_is_seen() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert process_state(child.pid) == "running"
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert process_state(child.pid) == "stopped"
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(child.pid) == "gone", "a zombie does nothing any more"
    finally:
        child.kill()
        child.communicate()
    assert process_state(child.pid) == "gone"
    assert process_state(0) == "unknown"


def test_watching_does_not_disturb(live: Live) -> None:
    """A ring at work under continuous views loses nothing, and is not called stuck for ever."""
    done = threading.Event()

    def back() -> None:
        requests = np.zeros(64, REQUEST)
        while not done.is_set():
            n = live.back.take(requests)
            if n:
                live.back.push(np.zeros(n, RESPONSE))
            else:
                live.back.wait(timeout_s=0.01)

    thread = threading.Thread(target=back)
    thread.start()
    taken = 0
    while taken < 200:
        live.push()
        while not (n := live.front.take(np.zeros(1, RESPONSE))):
            live.front.wait(timeout_s=0.01)
        taken += n
        live.view()
    done.set()
    thread.join()
    assert live.kinds() == []


INDEX = st.one_of(st.integers(0, 40), st.integers(2**32 - 40, 2**32 - 1))
PORT = st.none() | st.builds(PortView, *(st.booleans(),) * 4)
END = st.none() | st.builds(
    EndView,
    prod=INDEX,
    cons=INDEX,
    pid=st.integers(0, 9),
    process=st.sampled_from(["running", "stopped", "gone", "unknown"]),
    dead=st.booleans(),
    port=PORT,
)
HEADER = st.none() | st.builds(Header, INDEX, INDEX, INDEX, INDEX)
VIEW = st.builds(RingView, st.just("r"), st.just("1:8"), st.floats(0, 9), st.sampled_from([1, 2, 32]), HEADER, END, END)


@settings(max_examples=150, deadline=None)
@given(VIEW, VIEW)
def test_any_two_views_have_a_verdict_or_none(before: RingView, after: RingView) -> None:
    for each in verdicts(before, after):
        assert each.owes in ("front", "back")
        assert each.text
    counts = (after.requests_waiting, after.held, after.responses_waiting, after.in_flight)
    assert all(0 <= n <= after.size for n in counts)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_counts_at_any_index(start: int, answered: int, taken: int, sent: int) -> None:
    rsp, cons, prod = ((start + n) % 2**32 for n in (answered, answered + taken, answered + taken + sent))
    front = EndView(prod=prod, cons=start)
    back = EndView(prod=rsp, cons=cons)
    view = RingView("r", "1:8", 0.0, 32, Header(prod, 0, rsp, 0), front, back)
    assert (view.responses_waiting, view.held, view.requests_waiting) == (answered, taken, sent)
    assert view.in_flight == answered + taken + sent
