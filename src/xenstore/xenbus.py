# SPDX-License-Identifier: MIT
"""Xenbus on top of a xenstore client: reading the other end's keys, switching our own state.

Source: the rules of Linux' xenbus_client.c: a state is written only if it changes, in a transaction that first reads
our own `state` node, so that a device directory that was removed is never brought back.

Everything here may be done twice without harm. So over a client that reconnects, what has an unknown outcome is just
done again; when the store is gone for good, `StoreGone` ends that.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from paravirt.errors import OutcomeUnknown, PeerError, XenstoreError
from paravirt.protocol.xenbus import XenbusState, parse_state
from paravirt.xenstore.client import Transaction, XenstoreClient

Reader = XenstoreClient | Transaction
T = TypeVar("T")


def read_key(store: Reader, path: str) -> str | None:
    """The text of a node, None when there is none. `PeerError` when it is not UTF-8."""
    try:
        value = store.read(path)
    except XenstoreError as error:
        # EACCES hides a missing node below a directory that is gone or not ours.
        if error.name in ("ENOENT", "EACCES"):
            return None
        raise
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise PeerError(f"{path} is not UTF-8") from error


def read_keys(store: Reader, directory: str, names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that exist in `directory`. Only what is asked for is read: the directory is the other end's."""
    found = {}
    for name in names:
        value = read_key(store, f"{directory}/{name}")
        if value is not None:
            found[name] = value
    return found


def read_state(store: Reader, directory: str) -> XenbusState:
    """The state in a device directory; UNKNOWN when it is gone."""
    return parse_state(read_key(store, f"{directory}/state"))


def _until_known(change: Callable[[], T]) -> T:
    while True:
        try:
            return change()
        except OutcomeUnknown:
            continue


def switch_state(
    store: XenstoreClient,
    directory: str,
    state: XenbusState,
    keys: Mapping[str, str] | None = None,
    *,
    forget: Iterable[str] = (),
) -> bool:
    """Write our state, and with it `keys`, in one transaction that also removes the nodes `forget`. False when the
    directory is gone: nothing was written.
    """

    def write(transaction: Transaction) -> bool:
        current = read_key(transaction, f"{directory}/state")
        if current is None:
            return False
        for name in forget:
            if read_key(transaction, f"{directory}/{name}") is not None:
                transaction.rm(f"{directory}/{name}")
        for name, value in (keys or {}).items():
            transaction.write(f"{directory}/{name}", value)
        if current != str(int(state)):
            transaction.write(f"{directory}/state", str(int(state)))
        return True

    return _until_known(lambda: store.transact(write))


def announce(store: XenstoreClient, directory: str, state: XenbusState, keys: Mapping[str, str]) -> bool:
    """Write `keys` and our `state` once more, so that the other end looks at them, in one transaction. False when that
    is not our state: nothing was written.
    """

    def write(transaction: Transaction) -> bool:
        if read_key(transaction, f"{directory}/state") != str(int(state)):
            return False
        for name, value in keys.items():
            transaction.write(f"{directory}/{name}", value)
        transaction.write(f"{directory}/state", str(int(state)))
        return True

    return _until_known(lambda: store.transact(write))


def write_error(store: XenstoreClient, directory: str, code: int, text: str) -> None:
    """Leave `"<errno> text"` where people look for a device's error: `error/<device>/error` in our home."""
    home, _, node = directory.removeprefix("/local/domain/").partition("/")
    value = f"{code} {text}"[:1000]
    _until_known(lambda: store.write(f"/local/domain/{home}/error/{node}/error", value))


def write_hotplug(store: XenstoreClient, directory: str, status: str, error: str = "") -> None:
    """What came of a backend's look at its image: "connected", or "error" and why. Nothing if the device is gone."""

    def write(transaction: Transaction) -> None:
        if read_key(transaction, f"{directory}/state") is not None:
            transaction.write(f"{directory}/hotplug-error", error[:1000])
            transaction.write(f"{directory}/hotplug-status", status)

    _until_known(lambda: store.transact(write))


def remove(store: XenstoreClient, path: str) -> None:
    """Remove a subtree; one that is gone already is fine."""
    try:
        _until_known(lambda: store.rm(path))
    except XenstoreError as error:
        if error.name != "ENOENT":
            raise


def remove_backend(store: XenstoreClient, directory: str, *, unless: str | None = None) -> None:
    """Remove a backend's directory, and the one of its guest if no other device stands in it.

    `unless`: a node; where it exists the device was attached anew meanwhile, and nothing is removed.
    """

    def take_away(transaction: Transaction) -> None:
        if unless is not None and read_key(transaction, unless) is not None:
            return
        parent = directory.rpartition("/")[0]
        try:
            transaction.rm(directory)
            if not transaction.ls(parent):
                transaction.rm(parent)
        except XenstoreError as error:
            if error.name != "ENOENT":
                raise

    _until_known(lambda: store.transact(take_away))
