# SPDX-License-Identifier: MIT
"""Packages of Debian's that are unpacked: from an archive of the test's own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from paravirt.errors import NotFound
from paravirt.testing.debian import unpack

CONTROL = "Package: small\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: none\n"
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, and an apt-get that has no others."""
    packages, programs = tmp_path / "packages", tmp_path / "programs"
    packages.mkdir()
    programs.mkdir()
    apt_get = programs / "apt-get"
    apt_get.write_text(
        f'#!/bin/sh\n[ -e "{packages}/$3.deb" ] || {{ echo "first line" >&2; echo "no package $3" >&2; exit 100; }}\n'
        f'cp "{packages}/$3.deb" "$3_1_all.deb"\n'
    )
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return packages


@needs_dpkg
def test_a_package_is_unpacked_and_nothing_else_is_left(archive: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(CONTROL)
    (tree / "usr").mkdir()
    (tree / "usr/file").write_text("content")
    subprocess.run(["dpkg-deb", "-b", tree, archive / "small.deb"], check=True, capture_output=True)
    to = tmp_path / "a/b"
    unpack("small", to)
    assert (to / "usr/file").read_text() == "content"
    assert [it.name for it in to.iterdir()] == ["usr"]


def test_a_package_that_is_not_there(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="apt-get download -qq failed: no package other"):
        unpack("other", tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


@needs_dpkg
def test_a_file_that_is_no_package(archive: Path, tmp_path: Path) -> None:
    (archive / "broken.deb").write_text("nothing")
    with pytest.raises(NotFound, match=r"dpkg -x .* failed"):
        unpack("broken", tmp_path / "to")
