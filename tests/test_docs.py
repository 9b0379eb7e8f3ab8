# SPDX-License-Identifier: MIT
"""What the documents show is run, and what they name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from paravirt.backend.disks import DRIVERS, FILTERS, open_disk
from paravirt.errors import InvalidRequest
from tests.integration.exported import need

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "c_ext/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def run(arguments: list[str], directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=directory, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def example_of(document: str) -> re.Match[str]:
    example = re.search(r"<!-- example.*?-->\n```python\n(.*?)```", (ROOT / document).read_text(), re.S)
    assert example
    return example


def test_xenstore_guide_example(tmp_path: Path) -> None:
    said = run(["-c", example_of("docs/xenstore.md")[1]], tmp_path).splitlines()
    assert said == ["/tool/example/state", "/tool/example/state", "['a']"]


def test_looking_guide_example(tmp_path: Path) -> None:
    said = run(["-c", example_of("docs/looking.md")[1]], tmp_path).splitlines()
    assert said == ["front 1 200 0 True", "back 0 200 0 True", "200 16384"]


def test_device_guide_example(tmp_path: Path) -> None:
    said = run(["-c", example_of("docs/new-device.md")[1]], tmp_path).splitlines()
    assert said == ["16", "256 8", "9 4 pages of the ring"]


def test_device_guide_shows_the_example_as_it_is() -> None:
    guide, example = (ROOT / "docs/new-device.md").read_text(), (ROOT / "examples/compressor.py").read_text()
    pieces = re.findall(r"```python\n(.*?)```", guide, re.S)[1:]
    assert len(pieces) > 4
    for piece in pieces:
        assert piece in example


def test_disk_guide_example(tmp_path: Path) -> None:
    said = run(["-c", example_of("docs/disks.md")[1]], tmp_path).splitlines()
    assert said == ["bytearray(b'base') bytearray(b'new!') 1", r"b'\x00\x00\x00\x00'"]


def test_disk_guide_shows_the_example_as_it_is() -> None:
    guide, example = (ROOT / "docs/disks.md").read_text(), (ROOT / "examples/pattern_disk.py").read_text()
    pieces = re.findall(r"```python\n(.*?)```", guide, re.S)[1:]
    assert len(pieces) == 3
    for piece in pieces:
        assert piece in example


def test_export_guide_example(tmp_path: Path) -> None:
    need("nbdinfo")
    said = run(["-c", example_of("docs/nbd-export.md")[1]], tmp_path).splitlines()
    assert said == ["67108864", "67108864 0"]


def test_disk_guide_has_every_driver_and_option() -> None:
    rows = dict(re.findall(r"^\| `([a-z]+)` \| (.*)$", (ROOT / "docs/disks.md").read_text(), re.M))
    assert set(rows) == {*DRIVERS, *FILTERS}
    for name, row in rows.items():
        with pytest.raises(InvalidRequest) as caught:
            open_disk(f"{name},no-such-option=1", "null:1M", read_only=False)
        known = str(caught.value).partition("there are ")[2].split(", ")
        assert known
        for option in known:
            assert f"`{option}`" in row, f"{option} of {name}"


def test_a_device_takes_about_60_lines() -> None:
    example = (ROOT / "examples/compressor.py").read_text()
    device = example[example.index("@dataclass") : example.index("def use(")]
    assert len([line for line in device.splitlines() if line.strip()]) <= 60


def test_readme_example(tmp_path: Path) -> None:
    example = example_of("README.md")
    assert 10 <= len([line for line in example[1].splitlines() if line.strip()]) <= 16
    said = run(["-c", example[1]], tmp_path).splitlines()
    assert said == ["1048576 512 False", "b'hello from the guest'", "b'hello'", "2"]


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples(example: Path, tmp_path: Path) -> None:
    assert run([str(example)], tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_files_named_in_the_architecture_exist() -> None:
    for name in set(re.findall(r"`((?:[a-z_]+/)+[a-z_]{2,}\.(?:py|c|h))`", (ROOT / "ARCHITECTURE.md").read_text())):
        assert (ROOT / name).exists() or (ROOT / "src" / name).exists(), name


def test_names_in_the_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    core = "".join(path.read_text() for path in (ROOT / "c_ext").glob("*.h"))
    for name in set(re.findall(r"`(pv_[a-z_]+)`", text)):
        assert re.search(rf"\b{name}\(", core), name
    modules = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    for owner, method in set(re.findall(r"`([A-Z]\w+)\.(\w+)`", text)):
        assert any(f"class {owner}" in module and f"def {method}(" in module for module in modules), f"{owner}.{method}"


def test_commands_in_the_readme_exist() -> None:
    for line in re.findall(r"^ {4}paravirt ([a-z]+(?: [a-z]+)?)", (ROOT / "README.md").read_text(), re.M):
        words = line.split()
        words = words if words[0] in ("domain", "vbd", "vif", "bridge", "device", "xenstore", "bench") else words[:1]
        assert "Usage" in run(["-m", "paravirt", *words, "--help"], ROOT)


def test_block_frontend_guide_example(tmp_path: Path) -> None:
    guide = (ROOT / "docs/block-frontend.md").read_text()
    example = re.search(r"```python\n(.*?)```", guide, re.S)
    assert example
    assert run(["-c", example[1]], tmp_path) == "b'head'\n"


def test_async_disk_example(tmp_path: Path) -> None:
    said = run([str(ROOT / "examples/async_disk.py")], tmp_path).splitlines()
    assert said[0].startswith("2000 reads and 1000 writes in ")
    assert said[1] == "512000 of 1536000 bytes were not copied"


def test_network_guide_and_example(tmp_path: Path) -> None:
    said = run(["-c", example_of("docs/network.md")[1]], tmp_path)
    assert "hello" in said
    lines = run([str(ROOT / "examples/network.py")], tmp_path).splitlines()
    assert lines[:3] == [
        "other hears: is anybody here?",
        "the program hears: is anybody here?",
        "one hears: yes, a program",
    ]
    assert len(lines) == 5
    answers = run([str(ROOT / "examples/async_network.py")], tmp_path).splitlines()
    assert sorted(answers[:3]) == [f"the last answer: CLIENT {i} ASKS 4" for i in range(3)]
    assert answers[3:] == ["the server sent 15 answers and has closed"]
