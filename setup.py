# SPDX-License-Identifier: MIT
"""Build: `src/` is the package `paravirt`; cffi compiles `c_ext/` into `paravirt.ring._core`."""

import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# What measures rings and disks in C is compiled where it is used.
ring_parts = ("ring*", "spin", "event", "home", "wait*", "histogram", "pattern")
ring_sources = [f"c_core/pv_{part}.c" for part in ring_parts]

# The plugin of nbdkit is a library of its own, not a module of Python's: nbdkit loads it. Without nbdkit's header there
# is none, and `paravirt vbd export` says so.
nbdkit_header = Path("/usr/include/nbdkit-plugin.h")
not_for_nbdkit = ("pv_xs", "pv_process", "pv_vbd")
nbdkit_sources = [path for path in sorted(Path("c_ext").glob("pv_*.c")) if not path.name.startswith(not_for_nbdkit)]
nbdkit_plugin = Extension(
    "paravirt.frontend._nbdkit",
    ["c_ext/nbdkit_plugin.c", *map(str, nbdkit_sources)],
    depends=sorted(map(str, Path("c_ext").glob("*.h"))),
    include_dirs=["c_ext"],
    extra_compile_args=[
        *("-std=gnu11", os.environ.get("PARAVIRT_OPTIMIZE", "-O2"), "-Wall", "-Wextra", "-Wno-unused-parameter"),
        *("-fno-strict-aliasing", "-fvisibility=hidden", "-ffunction-sections"),
    ],
    extra_link_args=["-Wl,--gc-sections"],
    py_limited_api=True,
    optional=True,
)


class BuildApart(build_ext):
    """The plugin has sources of the core: their objects must not be taken for the core's."""

    def build_extension(self, ext: Extension) -> None:
        shared = self.build_temp
        if ext is nbdkit_plugin:
            self.build_temp = f"{shared}-nbdkit"
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


setup(
    package_dir={"paravirt": "src"},
    packages=["paravirt", *(f"paravirt.{name}" for name in find_packages("src"))],
    package_data={
        "paravirt": ["py.typed"],
        "paravirt.ring": ["_core.pyi"],
        "paravirt.testing": ["*.c"],
        "paravirt.testing.bench": ["peers/*.[ch]", "peers/*.cc", "c_core/*.h", *ring_sources],
    },
    ext_modules=[nbdkit_plugin] if nbdkit_header.exists() else [],
    cmdclass={"build_ext": BuildApart},
    cffi_modules=["c_ext/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    zip_safe=False,
)
