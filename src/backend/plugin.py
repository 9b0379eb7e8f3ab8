# SPDX-License-Identifier: MIT
"""Classes of a user's own, named on the command line."""

import importlib
import sys

from paravirt.errors import InvalidRequest, NotFound


def load(name: str) -> object:
    """What "module:Class" names, also in the directory we are in. `NotFound`, `InvalidRequest`."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InvalidRequest(f"{name!r} is not of the form module:Class")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: object = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise NotFound(f"there is no driver {name}: {error}") from error
    return found
