# SPDX-License-Identifier: MIT
"""Imports go down only: what each folder may import, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"

BELOW: dict[str, set[str]] = {
    "errors": set(),
    "ring": {"errors"},
    "protocol": {"errors"},
}
BELOW["hypervisor"] = {"errors", "ring", "protocol"}
BELOW["xenstore"] = {*BELOW["hypervisor"], "hypervisor"}
BELOW["frontend"] = BELOW["backend"] = {*BELOW["xenstore"], "xenstore"}
BELOW["host"] = {*BELOW["xenstore"], "xenstore", "frontend", "backend"}
BELOW["looking"] = {*BELOW["host"], "host"}
BELOW["cli"] = BELOW["testing"] = {*BELOW["looking"], "looking"}
BELOW["cli"] = {*BELOW["cli"], "testing"}

MAY_USE_THE_CORE = {"ring", "hypervisor", "xenstore"}
# The top of the package has a version and a place for everybody; the names it lends from below are for users alone.
TOP = "paravirt"
ALWAYS = {TOP, f"{TOP}.__version__"}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of the package's own modules, also those inside functions."""
    package = [TOP, *path.relative_to(SRC).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == TOP)


def layer_of(path: Path) -> str:
    first = path.relative_to(SRC).parts[0].removesuffix(".py")
    return "cli" if first == "__main__" else first


FILES = sorted(path for path in SRC.rglob("*.py") if layer_of(path) != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_down(path: Path) -> None:
    layer = layer_of(path)
    assert layer in BELOW, f"{layer} has no place in the layers"
    for line, name in imported(path):
        if name in ALWAYS:
            continue
        target = name.split(".")[1]
        assert target in BELOW[layer] | {layer}, f"{path}:{line}: {layer} may not import {name}"
        if name.startswith(f"{TOP}.ring._core"):
            assert layer in MAY_USE_THE_CORE, f"{path}:{line}: only {MAY_USE_THE_CORE} use the C core directly"


def test_protocol_is_pure() -> None:
    """Bytes in, values out: nothing there opens, waits or reads a clock."""
    impure = {
        "os",
        "socket",
        "select",
        "selectors",
        "subprocess",
        "threading",
        "time",
        "asyncio",
        "pathlib",
        "mmap",
        "random",
    }
    for path in (SRC / "protocol").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            assert not {name.split(".")[0] for name in names} & impure, f"{path}:{node.lineno}"


def test_the_layers_have_no_cycle() -> None:
    for layer, below in BELOW.items():
        assert layer not in below
        assert all(BELOW[lower] <= below for lower in below), layer
