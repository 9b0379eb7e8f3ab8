# SPDX-License-Identifier: MIT
"""What a domain's command needs, and how it gets to see it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.host import reach
from paravirt.host.kernel import can_isolate
from paravirt.host.reach import everywhere, needs_of, view_for

ANYBODY = 0x7E000001


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tree that others may enter but for `closed`; only `live` in it counts as a living host's directory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        root = Path(name)
        root.chmod(0o755)
        monkeypatch.setattr(reach, "LIVE_DIRECTORIES", (str(root / "live"),))
        for folder in ("live/inside/deep", "open", "closed/inside/deep", "closed/also"):
            (root / folder).mkdir(parents=True)
        (root / "closed").chmod(0o700)
        yield root


def test_nothing_needed_only_covers_what_lives(tree: Path) -> None:
    view = view_for([], uid=ANYBODY)
    assert (view.cover, view.expose) == ([str(tree / "live")], [])


def test_a_reachable_path_needs_nothing(tree: Path) -> None:
    assert view_for([tree / "open"], uid=ANYBODY).expose == []


def test_below_a_covered_directory_is_exposed(tree: Path) -> None:
    assert view_for([tree / "live/inside"], uid=None).expose == [str(tree / "live/inside")]


def test_a_covered_directory_itself_is_never_exposed(tree: Path) -> None:
    assert view_for([tree / "live"], uid=ANYBODY).expose == []


def test_a_closed_directory_is_covered_and_what_is_needed_in_it_exposed(tree: Path) -> None:
    view = view_for([tree / "closed/inside"], uid=ANYBODY)
    assert view.cover == [str(tree / "live"), str(tree / "closed")]
    assert view.expose == [str(tree / "closed/inside")]


def test_ones_own_closed_directory_is_open_to_oneself(tree: Path) -> None:
    assert view_for([tree / "closed/inside"], uid=None).cover == [str(tree / "live")]


def test_what_is_itself_closed_stays_so(tree: Path) -> None:
    view = view_for([tree / "closed"], uid=ANYBODY)
    assert (view.cover, view.expose) == ([str(tree / "live")], [])


def test_a_path_below_an_exposed_one_is_not_named_twice(tree: Path) -> None:
    view = view_for([tree / "closed/inside/deep", tree / "closed/inside", tree / "closed/also"], uid=ANYBODY)
    assert view.expose == [str(tree / "closed/also"), str(tree / "closed/inside")]


def test_what_is_not_there_is_not_needed(tree: Path) -> None:
    assert view_for([tree / "live/nothing"], uid=ANYBODY).expose == []


def test_needs_are_the_interpreter_the_package_and_the_directory(tmp_path: Path) -> None:
    needed = needs_of(["true"], tmp_path, {"PATH": "/bin:/usr/bin"})
    for path in (tmp_path, Path(sys.prefix), Path(sys.base_prefix), Path(reach.__file__).parent.parent):
        assert path in needed


def test_a_program_is_followed_through_every_link(tmp_path: Path) -> None:
    for name in ("bin", "hop", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "real/tool").write_text("#!/bin/sh\n")
    (tmp_path / "real/tool").chmod(0o755)
    (tmp_path / "hop/tool").symlink_to("../real/tool")
    (tmp_path / "bin/tool").symlink_to(tmp_path / "hop/tool")
    needed = needs_of(["tool"], Path("/"), {"PATH": str(tmp_path / "bin")})
    assert {tmp_path / "bin", tmp_path / "real"} <= set(needed)
    assert any(path.resolve() == tmp_path / "hop" for path in needed)


class TestEverywhere:
    def test_once(self, tmp_path: Path) -> None:
        assert everywhere(tmp_path) == [str(tmp_path)]

    def test_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "real")
        (tmp_path / "real").mkdir()
        assert everywhere(tmp_path / "link") == [str(tmp_path / "real")]

    @pytest.mark.skipif(can_isolate() is not None, reason="the kernel gives no namespaces to mount in")
    def test_mounted_again(self, tmp_path: Path) -> None:
        """Once more as a whole, and once one directory up, at a place with a blank in its name."""
        home, again, parent = tmp_path / "a/run", tmp_path / "again", tmp_path / "the parent"
        for path in (home, again, parent):
            path.mkdir(parents=True)
        code = "import sys; from paravirt.host.reach import everywhere; print(*everywhere(sys.argv[1]), sep='\\n')"
        script = 'mount --bind "$1" "$2" && mount --bind "$(dirname "$1")" "$3" && exec "$0" -c "$4" "$1"'
        unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
        done = subprocess.run(
            [*unshare, "sh", "-c", script, sys.executable, str(home), str(again), str(parent), code],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.stdout.splitlines() == sorted([str(home), str(again), str(parent / "run")])
