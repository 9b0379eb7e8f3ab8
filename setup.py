# SPDX-License-Identifier: MIT
"""Build: `src/` is the package `paravirt`; cffi compiles `c_ext/` into `paravirt.ring._core`."""

from setuptools import find_packages, setup

# What measures the ring in C is compiled where it is used.
ring_parts = ("ring*", "spin", "event", "home", "wait*")
ring_sources = [f"c_core/pv_{part}.c" for part in ring_parts]

setup(
    package_dir={"paravirt": "src"},
    packages=["paravirt", *(f"paravirt.{name}" for name in find_packages("src"))],
    package_data={
        "paravirt": ["py.typed"],
        "paravirt.ring": ["_core.pyi"],
        "paravirt.testing": ["*.c"],
        "paravirt.testing.bench": ["peers/*.[ch]", "peers/*.cc", "c_core/*.h", *ring_sources],
    },
    cffi_modules=["c_ext/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    zip_safe=False,
)
