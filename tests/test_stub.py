# SPDX-License-Identifier: MIT
"""The committed type stub names exactly what the compiled core has."""

import ast
from pathlib import Path

from paravirt.ring._core import lib

STUB = Path(__file__).parent.parent / "src" / "ring" / "_core.pyi"


def test_stub_names_what_the_core_has() -> None:
    (protocol,) = (node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef))
    functions = {node.name for node in protocol.body if isinstance(node, ast.FunctionDef)}
    constants = {
        node.target.id
        for node in protocol.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert functions | constants == set(dir(lib)), "run `make stub`"
    assert {name for name in dir(lib) if callable(getattr(lib, name))} == functions
