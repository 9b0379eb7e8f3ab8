# SPDX-License-Identifier: MIT
"""Log records of the daemons: one line each."""

import logging
import os

from paravirt.errors import PermissionRefused


class _OneLine(logging.Formatter):
    """Whatever a record carries, a traceback for one, stays on its line."""

    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        return " | ".join(line.strip() for line in super().format(record).splitlines() if line.strip())


def configure(name: str, level: str, file: str | None = None) -> None:
    """Write the records of this process, from `level` up, to `file` (appending) or to standard error.

    Raises `PermissionRefused` when the file cannot be opened.
    """
    try:
        handler = logging.StreamHandler() if file is None else logging.FileHandler(file, delay=False)
    except OSError as error:
        raise PermissionRefused(f"cannot write the log file {file}: {error.strerror}") from error
    handler.setFormatter(_OneLine(f"%(asctime)s {name}[{os.getpid()}] %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
