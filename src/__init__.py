# SPDX-License-Identifier: MIT
"""Xen's paravirtual split drivers between ordinary Linux processes.

`Host` is a whole host inside this process; `Domain` is what a process of a domain sees of itself.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Disk", "Domain", "Host", "__version__"]

if TYPE_CHECKING:
    from paravirt.frontend.domain import Domain
    from paravirt.frontend.vbd import Disk
    from paravirt.host.host import Host

_HOMES = {"Host": "paravirt.host.host", "Domain": "paravirt.frontend.domain", "Disk": "paravirt.frontend.vbd"}


def __getattr__(name: str) -> Any:
    """Loaded on first use, so that a command that needs none of them starts quickly."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
