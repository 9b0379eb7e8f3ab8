# SPDX-License-Identifier: MIT
"""The xenbus side of any frontend: one thread that follows the backend's state and takes the steps of the table.

A driver (`Driver`) supplies what is particular to a device class. Its methods are called from this thread, one at a
time.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from paravirt.errors import Closed, NotFound, ParavirtError, PeerError, StoreGone, TimedOut, XenstoreError
from paravirt.protocol.keys import ABSENT_FOR_ONE
from paravirt.protocol.xenbus import DevicePath, FrontendStep, XenbusState, frontend_step
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

MAX_STEPS = 8  # transitions in one look at the states
CLOSE_TIMEOUT_S = 5.0  # for each step of a closing backend
RESUME_TIMEOUT_S = 10.0
STORE_RETRY_S = 0.5  # after xenstored has refused something


class Driver(Protocol):
    """What a device class does at each step."""

    def negotiate(self, backend: str) -> dict[str, str]:
        """Read the backend's offer in directory `backend`, allocate ring and port; the keys to publish."""

    def connect(self, backend: str) -> None:
        """The backend is connected: start, or go on with what was in flight."""

    def refresh(self, backend: str) -> None:
        """The backend rewrote its state while connected."""

    def pause(self) -> None:
        """The backend is gone: use the ring no more, keep what is in flight."""

    def closed(self, error: ParavirtError | None) -> None:
        """The device is closed (None: in good order): no request will be answered any more."""


class FrontendDevice:
    """The states of one frontend device."""

    def __init__(self, store: XenstoreClient, path: DevicePath, driver: Driver) -> None:
        self.path = path
        self._store = store
        self._driver = driver
        self._own = XenbusState.UNKNOWN
        self._was_open = False
        self._error: ParavirtError | None = None
        self._failure: ParavirtError | None = None  # reported by the driver, not yet acted on
        self._suspend = self._suspended = False  # wanted; done
        self._refused = False  # xenstored did not let us look; to be tried again
        self._changed = threading.Condition()
        self._queue = store.watch_queue()
        self._stopping = False
        self._running = True
        self._thread = threading.Thread(target=self._run, name=f"{path.kind}-{path.device_id}", daemon=True)

    def start(self, timeout_s: float) -> None:
        """Connect. `NotFound` when there is no such device, `TimedOut` naming the backend's state, or what went
        wrong.
        """
        if not xenbus.switch_state(self._store, self.path.frontend, XenbusState.INITIALISING):
            raise NotFound(f"{self.path.frontend} does not exist in xenstore")
        self._own = XenbusState.INITIALISING
        self._queue.add(f"{self.path.backend}/state")
        self._thread.start()
        with self._changed:
            done = self._changed.wait_for(lambda: self._own is XenbusState.CONNECTED or self._finished, timeout_s)
        if self._error is not None:
            raise self._error
        if not done:
            raise TimedOut(f"{self.path.frontend} did not connect in {timeout_s:g} s: {self._why()}")
        if self._own is not XenbusState.CONNECTED:
            raise PeerError(f"the backend of {self.path.frontend} closed: {self._why()}")

    def suspend(self) -> None:
        """Let go of the connection, until `resume`: nothing is sent, what is in flight stays in the driver's shadow.
        Our state in xenstore stays as it is. Harmless when repeated. Raises what ended the device, `Closed`.

        Not to be called from the device's own thread.
        """
        self._suspend = True
        self._await(lambda: self._suspended, None)

    def resume(self, timeout_s: float = RESUME_TIMEOUT_S) -> None:
        """Connect anew, as a domain does that was suspended, perhaps moved: the backend that is there now gets new
        rings and ports, and what was in flight again. Harmless when nothing is suspended.

        Raises as `suspend`; `TimedOut` when the backend does not answer in time: it may still.
        """
        self._suspend = False
        self._await(lambda: not self._suspended and self._own is XenbusState.CONNECTED, timeout_s)

    def _await(self, done: Callable[[], bool], timeout_s: float | None) -> None:
        """Have the thread look, and wait until it has come to something."""
        self._queue.kick()
        with self._changed:
            came = self._changed.wait_for(lambda: done() or self._finished or not self._running, timeout_s)
        if self._error is not None:
            raise self._error
        if self._finished or not self._running:
            raise Closed(f"{self.path.frontend} is closed, or follows its backend no more")
        if not came:
            raise TimedOut(f"{self.path.frontend} did not connect again in {timeout_s:g} s: {self._why()}")

    def close(self) -> None:
        """Close in good order where the other side still plays along; never raises for a side that is gone."""
        self._stop_thread()
        # One that failed is CLOSING already. Whoever opens the device next must not meet this connection's end.
        answers = self._own in (XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING)
        answers = self._leave(XenbusState.CLOSING, answers, XenbusState.CLOSING, XenbusState.CLOSED)
        self._driver.pause()
        if self._own not in (XenbusState.CLOSED, XenbusState.UNKNOWN) and not self._is_fresh():
            self._leave(XenbusState.CLOSED, answers, XenbusState.CLOSED)
        self._queue.close()

    def _is_fresh(self) -> bool:
        """Whether no backend has taken notice of us: the device is as the toolstack made it. One that waits would close
        at our CLOSED, and might do so only when somebody else has opened the device.
        """
        if self._own is not XenbusState.INITIALISING:
            return False
        try:
            return xenbus.read_state(self._store, self.path.backend) <= XenbusState.INIT_WAIT
        except ParavirtError:
            return False

    def _leave(self, state: XenbusState, answers: bool, *expected: XenbusState) -> bool:
        """Go to a closing state and wait for the backend's, if it `answers`; whether it did."""
        try:
            if answers or state is XenbusState.CLOSED:
                self._switch(state)
            if answers:
                self._await_backend(*expected)
        except ParavirtError as error:
            log.info("%s: closing without the backend: %s", self.path.frontend, error)
            return False
        return answers

    @property
    def _finished(self) -> bool:
        return self._error is not None or self._own is XenbusState.CLOSED

    def _why(self) -> str:
        """What the backend's directory says about a device that does not come up."""
        try:
            error = xenbus.read_key(self._store, f"{self.path.backend}/hotplug-error")
            state = xenbus.read_state(self._store, self.path.backend)
        except ParavirtError as failure:
            return str(failure)
        return error or f"the backend is in state {state.name}"

    def _await_backend(self, *states: XenbusState) -> None:
        """Until the backend is in one of `states` or gone. The thread must not be using the queue."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while xenbus.read_state(self._store, self.path.backend) not in (*states, XenbusState.UNKNOWN):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOut("the backend does not answer")
            self._queue.get(timeout_s=left)

    def _stop_thread(self) -> None:
        self._stopping = True
        if self._thread.is_alive():
            self._queue.kick()
            self._thread.join()

    # -- the thread

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            with self._changed:
                self._running = False
                self._changed.notify_all()

    def _follow(self) -> None:
        try:
            while not self._stopping:
                self._queue.get(timeout_s=STORE_RETRY_S if self._refused else None)
                if not self._stopping:
                    self._look()
                if self._finished:
                    return
        except StoreGone as error:
            # Rings do not need xenstore: what is connected goes on; what is not never will.
            log.warning("%s: %s", self.path.frontend, error)
            if self._own is not XenbusState.CONNECTED:
                self._fail(error)
        except ParavirtError as error:
            self._fail(error)
        except Exception as error:
            log.exception("%s: the device's thread failed", self.path.frontend)
            self._fail(ParavirtError(f"the device's thread failed: {error}"))

    def _look(self) -> None:
        """Evaluate; what is connected does not end because xenstored refuses something once."""
        refused_before, self._refused = self._refused, False
        try:
            self._evaluate()
        except XenstoreError as error:
            if self._own is not XenbusState.CONNECTED:
                raise
            self._refused = True
            log.log(logging.DEBUG if refused_before else logging.WARNING, "%s: %s", self.path.frontend, error)

    def _evaluate(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._suspend or self._suspended:
            self._suspend_or_resume()
            if self._suspended:
                return
        for _ in range(MAX_STEPS):
            backend = xenbus.read_state(self._store, self.path.backend)
            step = frontend_step(self._own, backend, was_open=self._was_open)
            if backend not in (XenbusState.CLOSING, XenbusState.CLOSED, XenbusState.UNKNOWN):
                self._was_open = True
            log.debug("%s: %s sees %s: %s", self.path.frontend, self._own.name, backend.name, step.name)
            try:
                if not self._act(step):
                    return
            except PeerError:
                # What was read of its directory was no longer that of the state that it was read for.
                if xenbus.read_state(self._store, self.path.backend) is backend:
                    raise
        log.warning("%s: the backend keeps changing its state", self.path.frontend)

    def _suspend_or_resume(self) -> None:
        if self._suspend:
            if not self._suspended:
                self._driver.pause()
                with self._changed:
                    self._suspended = True
                    self._changed.notify_all()
            return
        keys = xenbus.read_keys(self._store, self.path.frontend, ("backend", "backend-id"))
        if keys.get("backend", self.path.backend) != self.path.backend:
            raise PeerError(f"{self.path.frontend} has another backend than before: {keys['backend'][:80]}")
        # A backend that is closing has given up on a connection that we have left, unless it is to go away.
        self._was_open = xenbus.read_key(self._store, f"{self.path.backend}/online") != "1"
        self._switch(XenbusState.INITIALISING)
        with self._changed:
            self._suspended = False
            self._changed.notify_all()

    def _act(self, step: FrontendStep) -> bool:
        """Take a step; whether there may be another."""
        driver, backend = self._driver, self.path.backend
        match step:
            case FrontendStep.NOTHING:
                return False
            case FrontendStep.REFRESH:
                driver.refresh(backend)
                return False
            case FrontendStep.NEGOTIATE:
                keys = driver.negotiate(backend)
                self._switch(XenbusState.INITIALISED, keys, forget=set(ABSENT_FOR_ONE) - keys.keys())
            case FrontendStep.CONNECT:
                driver.connect(backend)
                self._switch(XenbusState.CONNECTED)
            case FrontendStep.RECONNECT:
                driver.pause()
                self._switch(XenbusState.INITIALISING)
            case FrontendStep.CLOSE:
                driver.pause()
                self._switch(XenbusState.CLOSED)
                driver.closed(None)
                return False
        return True

    def _switch(self, state: XenbusState, keys: dict[str, str] | None = None, *, forget: Iterable[str] = ()) -> None:
        if not xenbus.switch_state(self._store, self.path.frontend, state, keys, forget=forget):
            state = XenbusState.CLOSED  # the directory was removed under us
            self._driver.pause()
            self._driver.closed(None)
        with self._changed:
            self._own = state
            self._changed.notify_all()

    def fail(self, error: ParavirtError) -> None:
        """From the driver: the backend broke the protocol; leave it."""
        self._failure = error
        self._queue.kick()

    def _fail(self, error: ParavirtError) -> None:
        log.warning("%s: %s", self.path.frontend, error)
        self._driver.pause()
        self._driver.closed(error)
        with self._changed:
            self._error = error
            self._changed.notify_all()
        try:
            xenbus.write_error(self._store, self.path.frontend, 22, str(error))
            self._switch(XenbusState.CLOSING)
        except ParavirtError as failure:
            log.info("%s: the backend cannot be told: %s", self.path.frontend, failure)
