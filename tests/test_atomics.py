# SPDX-License-Identifier: MIT
"""Memory orders are named in one header, and every use of them is explained in one table."""

import re
from pathlib import Path

CORE = Path(__file__).parent.parent / "c_ext"
TABLE = (CORE / "README.md").read_text()


def test_the_table_of_atomics_names_every_function_that_has_one() -> None:
    """c_ext/README.md says of each atomic access what it pairs with, by function."""
    macro = re.compile(
        r"\bpv_(?:load|store|fetch|exchange|compare|add|fence_(?:full|light|heavy|acquire|release)|copy_racing)\w*\("
    )
    for path in sorted(CORE.glob("pv_*.c")):
        function = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if (start := re.match(r"[a-z].*?\b(\w+)\(", line)) and not line.endswith(";"):
                function = start[1]
            if macro.search(line):
                where = f"{path.name}:{number}: {function}"
                assert function in TABLE, f"{where} is not in the table of atomics"


def test_only_one_header_names_memory_orders() -> None:
    for path in sorted([*CORE.glob("*.c"), *CORE.glob("*.h")]):
        if path.name != "pv_atomic.h":
            assert not re.search(r"__atomic_|__ATOMIC_|__sync_|stdatomic|\bvolatile\b", path.read_text()), path.name


def test_every_file_is_listed() -> None:
    for stem in {path.stem for path in CORE.glob("pv_*")}:
        assert f"`{stem}." in TABLE, stem
