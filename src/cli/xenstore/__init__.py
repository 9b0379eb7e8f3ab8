# SPDX-License-Identifier: MIT
"""`paravirt xenstore`: look at the store and change it.

`group` is what all commands belong to; `show`, `change`, `watch`, `script` and `backup` have the commands; `values`,
`batch`, `walk` and `dumpfile` are what they share.
"""

from paravirt.cli.xenstore import backup, change, script, show, watch
from paravirt.cli.xenstore.group import xenstore

__all__ = ["backup", "change", "script", "show", "watch", "xenstore"]
