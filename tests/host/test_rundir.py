# SPDX-License-Identifier: MIT
"""Where a host's run directory stands, who may own it, and who may be the host in it."""

import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, PermissionRefused
from paravirt.host.rundir import SOCKET_PATH_BYTES, RunDir

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def rundir(short_path: Path) -> RunDir:
    found = RunDir.locate(run=short_path / "run", environ={})
    found.create()
    return found


class TestLocate:
    def test_the_option_wins(self) -> None:
        assert RunDir.locate(run="/a/b", environ={"PARAVIRT_RUN": "/c"}).path == Path("/a/b")

    def test_then_the_environment(self) -> None:
        assert RunDir.locate(environ={"PARAVIRT_RUN": "/c"}).path == Path("/c")

    def test_a_relative_directory_is_made_absolute(self, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(short_path)
        assert RunDir.locate(run="here", environ={}).path == short_path / "here"

    @pytest.mark.skipif(not AS_ROOT, reason="/run/paravirt is root's")
    def test_root_has_run(self) -> None:
        found = RunDir.locate("one", environ={"XDG_RUNTIME_DIR": "/run/user/0"})
        assert found.path == Path("/run/paravirt/one")
        assert Path("/run/paravirt") in found.hidden

    def test_a_user_has_the_runtime_directory(self, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        found = RunDir.locate("one", environ={"XDG_RUNTIME_DIR": str(short_path)})
        assert found.path == short_path / "paravirt" / "one"
        assert found.hidden == [found.path, short_path / "paravirt"]

    @pytest.mark.parametrize("runtime", ["", "not/absolute", "/does/not/exist"])
    def test_else_a_directory_of_the_user_in_the_temporary_folder(
        self, runtime: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr("tempfile.gettempdir", lambda: "/var/tmp")
        assert RunDir.locate(environ={"XDG_RUNTIME_DIR": runtime}).path == Path("/var/tmp/paravirt-1000/default")

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "x" * 65, "ä"])
    def test_a_host_name_is_a_file_name(self, name: str) -> None:
        with pytest.raises(InvalidRequest, match="host name"):
            RunDir.locate(name, environ={})

    def test_the_longest_socket_path_fits_exactly(self) -> None:
        room = SOCKET_PATH_BYTES - len("/domains/32751/hypervisor.sock")
        path = "/" + "x" * (room - 1)
        assert len(os.fsencode(RunDir.locate(run=path, environ={}).domain_socket(32751))) == SOCKET_PATH_BYTES
        with pytest.raises(InvalidRequest, match="1 bytes too long: socket paths in it may have 107 bytes"):
            RunDir.locate(run=path + "x", environ={})

    def test_the_limit_is_the_kernels(self, short_path: Path) -> None:
        path = str(short_path / "s")
        path += "x" * (SOCKET_PATH_BYTES - len(path))
        with socket.socket(socket.AF_UNIX) as fits, socket.socket(socket.AF_UNIX) as too_long:
            fits.bind(path)
            with pytest.raises(OSError, match="too long"):
                too_long.bind(path + "x")


class TestCreate:
    def test_it_is_for_its_owner_alone(self, rundir: RunDir) -> None:
        assert stat.S_IMODE(rundir.path.stat().st_mode) == 0o700

    def test_missing_parents_are_made(self, short_path: Path) -> None:
        rundir = RunDir.locate(run=short_path / "a" / "b", environ={})
        rundir.create()
        assert rundir.path.is_dir()

    def test_again_is_fine(self, rundir: RunDir) -> None:
        rundir.create()

    @pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
    def test_open_to_others_is_refused(self, rundir: RunDir, mode: int) -> None:
        rundir.path.chmod(mode)
        with pytest.raises(PermissionRefused, match=f"mode {mode:04o}.*must have mode 0700"):
            rundir.create()

    @pytest.mark.skipif(not AS_ROOT, reason="only root can give a directory away")
    def test_somebody_elses_is_refused(self, rundir: RunDir) -> None:
        os.chown(rundir.path, 12345, 12345)
        with pytest.raises(PermissionRefused, match="belongs to uid 12345, not to 0"):
            rundir.create()

    def test_an_open_parent_of_all_hosts_is_refused(self, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (short_path / "paravirt").mkdir(mode=0o755)
        rundir = RunDir(short_path / "paravirt" / "one", "one", short_path / "paravirt")
        with pytest.raises(PermissionRefused, match="mode 0755"):
            rundir.create()

    def test_a_link_is_refused(self, rundir: RunDir, short_path: Path) -> None:
        link = short_path / "link"
        link.symlink_to(rundir.path)
        with pytest.raises(PermissionRefused, match="not a directory"):
            RunDir.locate(run=link, environ={}).create()

    def test_a_file_is_refused(self, short_path: Path) -> None:
        (short_path / "file").touch()
        with pytest.raises(PermissionRefused, match="cannot make the run directory"):
            RunDir.locate(run=short_path / "file", environ={}).create()

    def test_below_a_file_is_refused(self, short_path: Path) -> None:
        (short_path / "file").touch()
        with pytest.raises(PermissionRefused, match="cannot make the run directory"):
            RunDir.locate(run=short_path / "file" / "run", environ={}).create()


class TestLock:
    def test_one_host_at_a_time(self, rundir: RunDir) -> None:
        with rundir.lock("hypervisor"):
            with pytest.raises(AlreadyExists, match="host default is running already"), rundir.lock("hypervisor"):
                pass
            assert rundir.running
        assert not rundir.running

    def test_roles_are_apart(self, rundir: RunDir) -> None:
        with rundir.lock("hypervisor"), rundir.lock("xenstored"):
            with pytest.raises(AlreadyExists, match="the xenstored of host default"), rundir.lock("xenstored"):
                pass

    def test_asking_does_not_take_it(self, rundir: RunDir) -> None:
        (rundir.path / "hypervisor.lock").touch()
        assert not rundir.running
        with rundir.lock("hypervisor"):
            pass

    def test_it_goes_when_given_back(self, rundir: RunDir) -> None:
        with rundir.lock("hypervisor"):
            pass
        assert not list(rundir.path.iterdir())

    def test_a_killed_holder_leaves_a_stale_file_that_is_replaced(self, rundir: RunDir) -> None:
        code = (
            "import signal, sys\nfrom paravirt.host.rundir import RunDir\n"
            f"with RunDir.locate(run={str(rundir.path)!r}).lock('hypervisor'):\n"
            "    print('held', flush=True)\n    signal.pause()"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            assert rundir.running
            holder.kill()
        assert (rundir.path / "hypervisor.lock").exists()
        assert not rundir.running
        with rundir.lock("hypervisor"):
            assert rundir.running

    def test_a_file_removed_between_open_and_lock_is_not_taken_for_the_lock(
        self, rundir: RunDir, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = rundir.path / "hypervisor.lock"
        lock = fcntl.fcntl
        removals = []

        def lock_late(fd: int, command: int, argument: bytes) -> object:
            if command == fcntl.F_OFD_SETLK and not removals:
                removals.append(path.unlink())  # the former holder ends just now
            return lock(fd, command, argument)

        monkeypatch.setattr(fcntl, "fcntl", lock_late)
        with rundir.lock("hypervisor"):
            assert removals
            assert rundir.running

    def test_a_link_in_its_place_is_not_followed(self, rundir: RunDir, short_path: Path) -> None:
        (rundir.path / "hypervisor.lock").symlink_to(short_path / "victim")
        with pytest.raises(PermissionRefused, match="cannot open"), rundir.lock("hypervisor"):
            pass
        assert not (short_path / "victim").exists()


class TestRequireRunning:
    def test_no_directory(self, short_path: Path) -> None:
        with pytest.raises(NotFound, match="host one is not running"):
            RunDir.locate("one", run=short_path / "none", environ={}).require_running()

    def test_stale_sockets_are_no_host(self, rundir: RunDir) -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(rundir.hypervisor_socket))
        with pytest.raises(NotFound, match="not running"):
            rundir.require_running()

    def test_running(self, rundir: RunDir) -> None:
        with rundir.lock("hypervisor"):
            rundir.require_running()

    def test_a_directory_open_to_others_is_not_trusted(self, rundir: RunDir) -> None:
        with rundir.lock("hypervisor"):
            rundir.path.chmod(0o755)
            with pytest.raises(PermissionRefused, match="open to others"):
                rundir.require_running()


class TestSweep:
    def leave(self, rundir: RunDir) -> None:
        (rundir.domains / "3").mkdir(parents=True)
        for path in (rundir.hypervisor_socket, rundir.xenstored_socket, rundir.domain_socket(3)):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(path))
        (rundir.path / "hypervisor.lock").touch()

    def test_what_was_left_goes(self, rundir: RunDir) -> None:
        self.leave(rundir)
        rundir.sweep()
        rundir.remove()
        assert not rundir.path.exists()

    def test_what_is_in_use_stays(self, rundir: RunDir) -> None:
        self.leave(rundir)
        with rundir.lock("hypervisor"):
            rundir.sweep()
            assert rundir.running
            assert rundir.hypervisor_socket.exists()
            assert rundir.domain_socket(3).exists()
        assert not rundir.xenstored_socket.exists()

    def test_what_is_not_ours_stays(self, rundir: RunDir) -> None:
        (rundir.path / "note").touch()
        rundir.sweep()
        rundir.remove()
        assert (rundir.path / "note").exists()


class TestRemove:
    def test_what_is_empty_goes(self, short_path: Path) -> None:
        base = short_path / "paravirt"
        one, two = (RunDir(base / name, name, base) for name in ("one", "two"))
        one.create()
        two.create()
        one.domains.mkdir()
        one.remove()
        assert sorted(base.iterdir()) == [two.path]
        two.remove()
        assert not base.exists()

    def test_what_is_in_use_stays(self, rundir: RunDir) -> None:
        with rundir.lock("hypervisor"):
            rundir.remove()
            assert rundir.running
