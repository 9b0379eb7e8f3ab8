# SPDX-License-Identifier: MIT
"""`paravirt xenstore`: look at the store and change it.

`group` is what all commands belong to; `show` and `change` have the commands; `values`, `batch` and `walk` are what
they share.
"""

from paravirt.cli.xenstore import change, show
from paravirt.cli.xenstore.group import xenstore

__all__ = ["change", "show", "xenstore"]
