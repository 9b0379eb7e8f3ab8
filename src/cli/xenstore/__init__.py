# SPDX-License-Identifier: MIT
"""`paravirt xenstore`: look at the store and change it.

`group` is what all commands belong to; `show`, `change`, `watch` and `script` have the commands; `values`, `batch` and
`walk` are what they share.
"""

from paravirt.cli.xenstore import change, script, show, watch
from paravirt.cli.xenstore.group import xenstore

__all__ = ["change", "script", "show", "watch", "xenstore"]
