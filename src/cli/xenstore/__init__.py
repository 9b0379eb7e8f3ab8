# SPDX-License-Identifier: MIT
"""`paravirt xenstore`: look at the store and change it.

`group` is what all commands belong to; `show`, `change`, `watch`, `script`, `backup`, `trace`, `admin` and `update`
have the commands; `values`, `batch`, `walk` and `dumpfile` are what they share.
"""

from paravirt.cli.xenstore import admin, backup, change, script, show, trace, update, watch
from paravirt.cli.xenstore.group import xenstore

__all__ = ["admin", "backup", "change", "script", "show", "trace", "update", "watch", "xenstore"]
