# SPDX-License-Identifier: MIT
"""The atomic accesses of the C core: which there are, and which of them the explorer shows to be needed.

A *site* is one use of a macro of pv_atomic.h, named by file, function, macro and word. Weakening it by a step makes a
mutant; what the explorer does not find (or never reaches) has to stand in c_ext/README.md with the reason.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .jobs import each

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "c_ext"
# What the scenarios run.
FILES = [
    path.stem
    for pattern in (
        "pv_ring*.c",
        "pv_spin*.c",
        "pv_event*.c",
        "pv_wait*.c",
        "pv_stream*.c",
        "pv_flex*.c",
        "pv_grant*.c",
        "pv_home.c",
    )
    for path in sorted(CORE.glob(pattern))
]
SITES_A_FILE = 200
SCENARIOS = ["scenarios_ring", "scenarios_event", "scenarios_page"]
EXPLORER = ["explore", "explore_memory", "explore_system"]

MACROS = (
    "load_relaxed|load_acquire|load_ordered|store_relaxed|store_release|fetch_or|fetch_and|exchange|add|count"
    "|compare_exchange|fence_full|fence_heavy|fence_light|fence_acquire|fence_release|fence_compiler"
)
# How each can be weakened, weakest last; what is not here has nothing to lose in this model.
WEAKER = {
    "load_acquire": ["relaxed"],
    "store_release": ["relaxed"],
    "load_ordered": ["acquire", "relaxed"],
    "fetch_or": ["acquire and release", "relaxed"],
    "fetch_and": ["acquire and release", "relaxed"],
    "exchange": ["acquire and release", "relaxed"],
    "compare_exchange": ["acquire and release", "relaxed"],
    "fence_full": ["acquire and release", "removed"],
    "fence_heavy": ["here only", "removed"],
    "fence_acquire": ["removed"],
    "fence_release": ["removed"],
}


@dataclass(frozen=True)
class Site:
    number: int
    file: str
    function: str
    macro: str
    word: str  # the first argument, without blanks

    def __str__(self) -> str:
        return f"`{self.file}` `{self.function}` `{self.macro}({self.word})`"


def first_argument(text: str, at: int) -> str:
    """The text from `at`, just behind an opening parenthesis, to its comma or end."""
    depth = 0
    for end in range(at, len(text)):
        if depth == 0 and text[end] in ",)":
            return re.sub(r"\s+", " ", text[at:end].strip())
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(text[end], 0)
    raise ValueError("no closing parenthesis")


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.DOTALL)


def sites_of(file: str, base: int) -> list[Site]:
    """In the order of the text, as the compiler's counter numbers them."""
    text = without_comments((CORE / f"{file}.c").read_text())
    functions = [
        (match.start(), match[1]) for match in re.finditer(r"^[a-z_].*?\b(\w+)\([^;]*?\)\s*\{", text, re.M | re.S)
    ]
    found = []
    for match in re.finditer(rf"\bpv_({MACROS})\(", text):
        function = [name for start, name in functions if start <= match.start()][-1]
        found.append(Site(base + len(found), file, function, match[1], first_argument(text, match.end())))
    return found


def all_sites() -> list[Site]:
    return [site for index, file in enumerate(FILES) for site in sites_of(file, index * SITES_A_FILE)]


def build(folder: Path, *switches: str) -> Path:
    """Compile the explorer with the C core; raises CalledProcessError."""
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-value", "-Wno-tsan"]
    common = [*flags, "-U_FORTIFY_SOURCE", f"-I{CORE}", f"-I{HERE}", *switches]
    traced = ["-fsanitize=thread"]
    own = {
        file: [*traced, '-DPV_ATOMIC_SHIM="explore_shim.h"', f"-DSITE_BASE={n * SITES_A_FILE}"]
        for n, file in enumerate(FILES)
    }
    own |= dict.fromkeys(SCENARIOS, traced) | {name: ["-O3"] for name in EXPLORER}

    def compile_file(name: str) -> None:
        source = (CORE if name in FILES else HERE) / f"{name}.c"
        subprocess.run(["gcc", *common, *own[name], "-c", source, "-o", folder / f"{name}.o"], check=True)

    for _ in each(compile_file, own):
        pass
    program = folder / "explore"
    subprocess.run(["gcc", *(folder / f"{name}.o" for name in own), "-o", program], check=True)
    return program


def explore(
    program: Path, bound: int, scenario: str = "", *, site: int = -1, level: int = 0, part: int = 0, parts: int = 1
) -> tuple[bool, str]:
    """Whether no violation was found, and what the explorer said. Of all scenarios or one, or a part of its executions;
    with all orders as they are or one a level weaker."""
    command = [program, *map(str, (bound, site, level)), scenario, str(part), str(parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the explorer ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.returncode == 0, done.stdout


def scenarios() -> list[str]:
    """Their names, in the order of their tables."""
    return [
        name for file in SCENARIOS for name in re.findall(r'^\t\{"([^"]+)", ', (HERE / f"{file}.c").read_text(), re.M)
    ]
