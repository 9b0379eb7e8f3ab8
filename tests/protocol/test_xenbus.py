# SPDX-License-Identifier: MIT
"""The transition table of xenbus, told as dialogues of the two ends."""

import pytest

from paravirt.errors import PeerError
from paravirt.protocol.xenbus import (
    BackendStep,
    DevicePath,
    FrontendStep,
    XenbusState,
    backend_step,
    frontend_step,
    parse_state,
)

S = XenbusState
STATE_AFTER = {
    FrontendStep.NEGOTIATE: S.INITIALISED,
    FrontendStep.CONNECT: S.CONNECTED,
    FrontendStep.RECONNECT: S.INITIALISING,
    FrontendStep.CLOSE: S.CLOSED,
    BackendStep.OFFER: S.INIT_WAIT,
    BackendStep.RESTART: S.INIT_WAIT,
    BackendStep.CONNECT: S.CONNECTED,
    BackendStep.CLOSING: S.CLOSING,
    BackendStep.DISCONNECT: S.CLOSED,
    BackendStep.REMOVE: S.CLOSED,
    BackendStep.FAIL: S.CLOSING,
}


def settle(front: S, back: S, *, online: bool = True) -> list[tuple[str, S]]:
    """Let both ends look in turn until neither moves: who went to which state."""
    story: list[tuple[str, S]] = []
    was_open = front is not S.INITIALISING or back not in (S.CLOSING, S.CLOSED, S.UNKNOWN)
    for _ in range(20):
        step = backend_step(back, front, online=online)
        if step in STATE_AFTER and STATE_AFTER[step] is not back:
            back = STATE_AFTER[step]
            story.append(("back", back))
            continue
        move = frontend_step(front, back, was_open=was_open)
        was_open = was_open or back not in (S.CLOSING, S.CLOSED, S.UNKNOWN)
        if move not in STATE_AFTER or STATE_AFTER[move] is front:
            return story
        front = STATE_AFTER[move]
        story.append(("front", front))
    raise AssertionError(f"the two ends never settle: {story}")


def test_connect() -> None:
    assert settle(S.INITIALISING, S.INITIALISING) == [
        ("back", S.INIT_WAIT),
        ("front", S.INITIALISED),
        ("back", S.CONNECTED),
        ("front", S.CONNECTED),
    ]


def test_connected_ends_stay() -> None:
    assert settle(S.CONNECTED, S.CONNECTED) == []


def test_toolstack_unplugs() -> None:
    assert settle(S.CONNECTED, S.CLOSING, online=False) == [("front", S.CLOSED), ("back", S.CLOSED)]


def test_guest_closes_and_the_backend_stays_for_a_reconnect() -> None:
    assert settle(S.CLOSING, S.CONNECTED) == [("back", S.CLOSING), ("front", S.CLOSED), ("back", S.CLOSED)]


def test_guest_starts_again_after_closing() -> None:
    assert settle(S.INITIALISING, S.CLOSED)[0] == ("back", S.INIT_WAIT)
    assert settle(S.INITIALISING, S.CLOSED)[-1] == ("front", S.CONNECTED)


def test_guest_crashed_and_rebooted_unseen() -> None:
    assert settle(S.INITIALISING, S.CONNECTED) == [
        ("back", S.INIT_WAIT),
        ("front", S.INITIALISED),
        ("back", S.CONNECTED),
        ("front", S.CONNECTED),
    ]


def test_backend_restarted_and_offers_anew() -> None:
    # The backend's own rule keeps it from connecting a CONNECTED frontend's old ring; the frontend starts over.
    assert frontend_step(S.CONNECTED, S.INIT_WAIT) is FrontendStep.RECONNECT
    assert settle(S.INITIALISING, S.INIT_WAIT)[-1] == ("front", S.CONNECTED)


def test_an_old_init_wait_event_changes_nothing_while_initialised() -> None:
    assert frontend_step(S.INITIALISED, S.INIT_WAIT) is FrontendStep.NOTHING


def test_frontend_of_mirages_kind_skips_initialised() -> None:
    assert backend_step(S.INIT_WAIT, S.CONNECTED, online=True) is BackendStep.CONNECT


def test_both_sides_close_at_once() -> None:
    assert settle(S.CLOSING, S.CLOSING) == [("front", S.CLOSED), ("back", S.CLOSED)]


@pytest.mark.parametrize("own", list(S))
def test_frontend_directory_gone_removes_the_backend(own: S) -> None:
    assert backend_step(own, S.UNKNOWN, online=True) is BackendStep.REMOVE


@pytest.mark.parametrize("own", [S.INITIALISING, S.INITIALISED, S.CONNECTED])
def test_backend_directory_gone_closes_the_frontend(own: S) -> None:
    assert frontend_step(own, S.UNKNOWN) is FrontendStep.CLOSE


@pytest.mark.parametrize("frontend", [S.INITIALISING, S.CLOSED])
def test_offline_before_connecting_is_removed_at_once(frontend: S) -> None:
    assert backend_step(S.INIT_WAIT, frontend, online=False) is BackendStep.REMOVE


@pytest.mark.parametrize("frontend", [S.INIT_WAIT, S.RECONFIGURING, S.RECONFIGURED])
def test_states_no_vbd_frontend_has_are_its_error(frontend: S) -> None:
    assert backend_step(S.CONNECTED, frontend, online=True) is BackendStep.FAIL


def test_every_pair_of_states_has_an_answer_and_settles() -> None:
    for front in S:
        for back in S:
            for online in (True, False):
                settle(front, back, online=online)


@pytest.mark.parametrize(("text", "state"), [(None, S.UNKNOWN), ("1", S.INITIALISING), ("8", S.RECONFIGURED)])
def test_parse_state(text: str | None, state: S) -> None:
    assert parse_state(text) is state


@pytest.mark.parametrize("text", ["", "9", "-1", "04", "four", "4 ", "²", "4\0"])
def test_parse_state_refuses(text: str) -> None:
    with pytest.raises(PeerError, match="state is"):
        parse_state(text)


def test_device_path() -> None:
    path = DevicePath("vbd", 7, 51712)
    assert path.frontend == "/local/domain/7/device/vbd/51712"
    assert path.backend == "/local/domain/0/backend/vbd/7/51712"
    assert DevicePath.from_backend(path.backend) == path
    assert DevicePath.from_backend(path.backend + "/state") == path


@pytest.mark.parametrize(
    "path",
    ["", "/", "/local/domain/0/backend/vbd", "/local/domain/0/backend/vbd/7", "/local/domain/0/backend/vbd/x/51712"],
)
def test_paths_that_are_no_device(path: str) -> None:
    assert DevicePath.from_backend(path) is None
