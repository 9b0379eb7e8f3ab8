# SPDX-License-Identifier: MIT
"""Print the type stub of `paravirt.ring._core` (`make stub` writes src/ring/_core.pyi from it)."""

from typing import Any

from build import ffibuilder

HEADER = """# SPDX-License-Identifier: MIT
# Made by `make stub` from the headers in c_ext/; a test holds it to the compiled module.
from typing import Any, Protocol

CData = Any

class _Lib(Protocol):
"""
INTEGERS = {"char", "short", "int", "long", "size_t", "ssize_t", "_Bool"}


def python_type(c_type: Any) -> str:
    name = c_type.get_c_name().replace("const ", "")
    if name == "void":
        return "None"
    if name.endswith(("*", "]")):
        return "CData"
    if name in INTEGERS or name.rstrip("_t").removeprefix("u").startswith("int") or name.startswith("unsigned"):
        return "int"
    return "float" if name in ("double", "float") else "CData"


def members() -> dict[str, str]:
    """Name to stub line of everything `lib` has."""
    found = {}
    for key, (declared, _) in ffibuilder._parser._declarations.items():
        kind, _, name = key.partition(" ")
        if kind == "function":
            arguments = ", ".join(
                f"a{i}: {python_type(arg)}, /" if i == len(declared.args) - 1 else f"a{i}: {python_type(arg)}"
                for i, arg in enumerate(declared.args)
            )
            found[name] = (
                f"    def {name}(self{', ' if arguments else ''}{arguments}) -> {python_type(declared.result)}: ...\n"
            )
        elif kind == "macro":
            found[name] = f"    {name}: int\n"
    return found


if __name__ == "__main__":
    print(HEADER + "".join(line for _, line in sorted(members().items())) + "\nlib: _Lib\nffi: Any", end="\n")
