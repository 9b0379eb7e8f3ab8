# SPDX-License-Identifier: MIT
"""cffi builder of `paravirt.ring._core`.

The public headers are the one source of the C API: they are fed to `cdef` with every preprocessor line dropped but
`#define NAME number`. `pv_atomic.h` and headers without `pv_` are private to the C files and are left out.
"""

import os
import re
import subprocess
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
HEADERS = sorted(path.name for path in HERE.glob("pv_*.h") if path.name != "pv_atomic.h")
PRIVATE = ["pv_atomic.h", *sorted(path.name for path in HERE.glob("*.h") if not path.name.startswith("pv_"))]
SOURCES = sorted(path.name for path in HERE.glob("pv_*.c"))
CONSTANT = re.compile(r"#define\s+([A-Z]\w+)\s+\(?(-?(?:0x[0-9a-fA-F]+|\d+))[uUlL]*\)?\s*(?:/\*.*)?$")


def declarations(header: str) -> str:
    """The part of a header that cffi's C parser reads."""
    lines = []
    for line in (HERE / header).read_text().splitlines():
        if constant := CONSTANT.match(line.strip()):
            lines.append(f"#define {constant[1]} {constant[2]}")
        elif not line.lstrip().startswith("#"):
            lines.append(line)
    return "\n".join(lines)


def liburing() -> dict[str, list[str]]:
    """How to build with liburing, from its archive if there is one: then it is not needed afterwards. {}: without."""
    if os.environ.get("PARAVIRT_LIBURING") == "0":
        return {}
    try:
        version, folder = (
            subprocess.run(["pkg-config", what, "liburing"], capture_output=True, check=True, text=True).stdout.strip()
            for what in ("--modversion", "--variable=libdir")
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    archive = Path(folder) / "liburing.a"
    return {
        "extra_compile_args": [f'-DPV_LIBURING="{version}"'],
        **({"extra_objects": [str(archive)]} if archive.exists() else {"libraries": ["uring"]}),
    }


# After Python's own flags, which have an -O of their own; tests that look at the code as it is written want less.
OPTIMIZE = os.environ.get("PARAVIRT_OPTIMIZE", "-O2")
# setuptools wants paths relative to setup.py, whatever the working directory of the caller is.
ROOT = Path(os.path.relpath(HERE))

LIBURING = liburing()

ffibuilder = FFI()
for name in HEADERS:
    ffibuilder.cdef(declarations(name))
ffibuilder.set_source(
    "paravirt.ring._core",
    "".join(f'#include "{name}"\n' for name in HEADERS),
    sources=[str(ROOT / name) for name in SOURCES],
    depends=[str(ROOT / name) for name in [*HEADERS, *PRIVATE, *SOURCES]],
    include_dirs=[str(ROOT)],
    extra_compile_args=[
        *["-std=gnu11", OPTIMIZE, "-Wall", "-Wextra", "-Wno-unused-parameter", "-fno-strict-aliasing"],
        *LIBURING.get("extra_compile_args", []),
    ],
    extra_objects=LIBURING.get("extra_objects", []),
    libraries=["rt", *LIBURING.get("libraries", [])],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
