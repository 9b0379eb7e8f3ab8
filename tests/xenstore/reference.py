# SPDX-License-Identifier: MIT
"""Debian's daemons in tests."""

from pathlib import Path

from paravirt.errors import NotFound
from paravirt.testing.reference_xenstored import Kind, ReferenceDaemon
from tests.needs import missing


def start_reference(kind: Kind, folder: Path) -> ReferenceDaemon:
    """A reference daemon, which the caller closes."""
    try:
        return ReferenceDaemon(kind, folder)
    except NotFound as error:
        missing(str(error))
