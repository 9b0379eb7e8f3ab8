# SPDX-License-Identifier: MIT
"""Xen's paravirtual split drivers between ordinary Linux processes.

`Host` is a whole host inside this process; `Domain` is what a process of a domain sees of itself. A new device class is
a `DeviceProtocol`, a `DeviceBackend` and a `DeviceFrontend`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DeviceBackend", "DeviceFrontend", "DeviceProtocol", "Disk", "Domain", "Host", "__version__"]

if TYPE_CHECKING:
    from paravirt.backend.driver import DeviceBackend
    from paravirt.frontend.domain import Domain
    from paravirt.frontend.driver import DeviceFrontend
    from paravirt.frontend.vbd import Disk
    from paravirt.host.host import Host
    from paravirt.protocol.device import DeviceProtocol

_HOMES = {
    "DeviceBackend": "paravirt.backend.driver",
    "DeviceFrontend": "paravirt.frontend.driver",
    "DeviceProtocol": "paravirt.protocol.device",
    "Disk": "paravirt.frontend.vbd",
    "Domain": "paravirt.frontend.domain",
    "Host": "paravirt.host.host",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use, so that a command that needs none of them starts quickly."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
