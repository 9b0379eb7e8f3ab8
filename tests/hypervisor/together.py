# SPDX-License-Identifier: MIT
"""Several threads at once, of which each may fail the test."""

import threading
from collections.abc import Callable

DEADLINE_S = 30


def run_all(*calls: Callable[[], None]) -> None:
    """Each in a thread of its own; whatever one raises is raised here."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "stuck"
    if errors:
        raise errors[0]
