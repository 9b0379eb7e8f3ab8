# SPDX-License-Identifier: MIT
"""Something done in a forked child of the test."""

import os
import signal
import sys
import traceback
from collections.abc import Callable


def in_child(work: Callable[[], object], *, seconds: int = 30) -> int:
    """What waitpid says of a child that runs `work`: 0, or 256 when it raised, which stderr then shows."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]
