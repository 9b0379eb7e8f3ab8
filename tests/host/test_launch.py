# SPDX-License-Identifier: MIT
"""Commands as domains: what an isolated one can see and do, and that nothing of any domain outlives its launcher.

All of it holds for domains started by root and by an ordinary user; `test_as_user.py` runs this file as the latter.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paravirt.errors import InvalidRequest, NotFound, PermissionRefused, TimedOut
from paravirt.host.kernel import can_isolate
from paravirt.host.launch import GUEST_UID_BASE, DomainProcess, can_give_uids, launch
from tests.host.running import DEADLINE_S, ended, read_all, read_line

DOMID = 7

isolation = pytest.mark.skipif(can_isolate() is not None, reason=f"the kernel gives no namespaces: {can_isolate()}")
EITHER = [pytest.param(True, marks=isolation, id="isolated"), pytest.param(False, id="shared")]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Stands for the broker's end and the domain's end of a hypervisor connection."""
    broker, domain = socket.socketpair()
    with broker, domain:
        broker.settimeout(DEADLINE_S)
        yield broker, domain


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory that other users may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def start(ends: tuple[socket.socket, socket.socket]) -> Iterator[Any]:
    """`launch` with the connection in place; what it starts is ended."""
    started: list[DomainProcess] = []

    def begin(*command: str, **options: Any) -> DomainProcess:
        options.setdefault("domid", DOMID)
        process = launch(command, hypervisor_fd=ends[1].fileno(), **options)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.close()


@pytest.fixture
def evaluate(start: Any) -> Any:
    """Run Python code as a domain and return what it leaves in `result`."""

    def run(code: str, *arguments: str, **options: Any) -> Any:
        body = f"import json, os, sys\n{textwrap.dedent(code)}\nprint(json.dumps(result))"
        process = start("python3", "-c", body, *arguments, stdout=subprocess.PIPE, **options)
        answer = read_all(process.stdout)
        assert process.wait(DEADLINE_S) == 0
        return json.loads(answer)

    return run


@isolation
class TestRights:
    def test_uid_and_groups(self, evaluate: Any) -> None:
        uid, gid, groups = evaluate("result = [os.getresuid(), os.getresgid(), os.getgroups()]")
        own = GUEST_UID_BASE + DOMID if can_give_uids() else os.geteuid()
        assert uid == [own] * 3
        if can_give_uids():
            assert (gid, groups) == ([own] * 3, [])

    def test_no_capabilities_and_no_way_to_any(self, evaluate: Any) -> None:
        lines = evaluate("result = [line.split() for line in open('/proc/self/status')]")
        status = {line[0].rstrip(":"): line[-1] for line in lines}
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["NoNewPrivs"] == "1"

    def test_only_the_descriptors_it_was_given(self, evaluate: Any) -> None:
        with tempfile.TemporaryFile() as file:
            os.set_inheritable(file.fileno(), True)
            listing = "result = sorted(int(fd) for fd in os.listdir('/proc/self/fd'))[:-1]"
            assert evaluate(listing) == [0, 1, 2, 3]

    def test_namespaces_of_its_own(self, evaluate: Any) -> None:
        kinds = ["mnt", "pid", "ipc", "net"] + ([] if can_give_uids() else ["user"])
        own = evaluate("result = {kind: os.readlink(f'/proc/self/ns/{kind}') for kind in sys.argv[1:]}", *kinds)
        assert all(own[kind] != os.readlink(f"/proc/self/ns/{kind}") for kind in kinds)


@isolation
class TestView:
    def test_no_process_but_its_own(self, evaluate: Any) -> None:
        assert evaluate("result = sorted(int(n) for n in os.listdir('/proc') if n.isdigit())") == [1, 2]

    def test_init_is_closed_to_the_command(self, evaluate: Any) -> None:
        code = """
            result = []
            for name in ("environ", "mem", "fd", "maps", "root", "cwd", "exe"):
                try:
                    path = f"/proc/1/{name}"
                    os.listdir(path) if name in ("fd", "root", "cwd") else open(path).close()
                    result.append(name)
                except OSError:
                    pass
        """
        assert evaluate(code) == []

    def test_living_directories_are_its_own(self, evaluate: Any) -> None:
        with tempfile.NamedTemporaryFile(dir="/tmp"), tempfile.NamedTemporaryFile(dir="/dev/shm"):
            code = "result = [os.listdir(path) for path in ('/tmp', '/var/tmp', '/dev/shm', '/run')]"
            scratch, *others = evaluate(code, directory=Path("/"))
        # The way to our interpreter and package is there, also where that is below /tmp.
        needed = [Path(path).resolve() for path in (sys.prefix, sys.base_prefix, __file__)]
        assert set(scratch) <= {path.parts[2] for path in needed if path.is_relative_to("/tmp")}
        assert others == [[], [], []]

    def test_scratch_files_can_be_made(self, evaluate: Any) -> None:
        code = """
            import tempfile
            with tempfile.NamedTemporaryFile() as one, tempfile.NamedTemporaryFile(dir="/dev/shm") as two:
                result = [os.path.dirname(file.name) for file in (one, two)]
        """
        assert evaluate(code, directory=Path("/")) == ["/tmp", "/dev/shm"]

    def test_the_rest_is_read_only(self, evaluate: Any) -> None:
        code = """
            import errno
            result = []
            for path in sys.argv[1:]:
                try:
                    open(os.path.join(path, "probe"), "w").close()
                    result.append(path)
                except OSError as error:
                    assert error.errno in (errno.EROFS, errno.EACCES, errno.ENOENT), error
        """
        places = ["/", "/etc", "/usr", "/home", os.path.expanduser("~"), os.getcwd(), sys.prefix]
        assert evaluate(code, *places, directory=Path("/")) == []

    def test_a_hidden_directory(self, evaluate: Any, scratch: Path) -> None:
        (scratch / "run").mkdir()
        (scratch / "run/secret").touch()
        (scratch / "public").touch()
        code = """
            result = [sorted(os.listdir(sys.argv[1]))]
            try:
                result.append(os.listdir(sys.argv[1] + "/run"))
            except OSError as error:
                result.append("refused")
        """
        whole, hidden = evaluate(code, str(scratch), hide=[scratch / "run"], expose=[scratch])
        assert whole == ["public", "run"]
        assert hidden in ([], "refused")

    @pytest.mark.parametrize("exposed", [True, False])
    def test_a_hidden_working_directory(
        self, evaluate: Any, scratch: Path, monkeypatch: pytest.MonkeyPatch, exposed: bool
    ) -> None:
        """No process brings its hold of the directory along."""
        (scratch / "run").mkdir()
        (scratch / "run/secret").touch()
        monkeypatch.chdir(scratch / "run")
        code = """
            try:
                result = os.listdir(".")
            except OSError:
                result = []
        """
        assert "secret" not in evaluate(code, hide=[scratch / "run"], expose=[scratch] if exposed else [])

    def test_covers_cannot_be_taken_away(self, start: Any, scratch: Path) -> None:
        """Namespaces inside the domain give it rights over its own mounts, never over those it came with."""
        (scratch / "run").mkdir()
        (scratch / "run/secret").touch()
        hide, expose = [scratch / "run"], [scratch]
        script = f"""
            unshare -Urm sh -c '
                umount {scratch}/run; umount -l /proc; umount /tmp; umount /run
                mount --bind {scratch} /mnt && ls /mnt/run
                mount -o remount,bind,rw / && touch {scratch}/written
                ls {scratch}/run /tmp'
        """
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = start("sh", "-c", script, hide=hide, expose=expose, **quiet)
        assert b"secret" not in read_all(process.stdout)
        assert not (scratch / "written").exists()

    def test_abstract_sockets_are_out_of_reach(self, evaluate: Any) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(b"\0paravirt-test-%d" % os.getpid())
            listener.listen()
            code = """
                import socket
                result = socket.socket(socket.AF_UNIX).connect_ex(b"\\0" + sys.argv[1].encode())
            """
            assert evaluate(code, f"paravirt-test-{os.getpid()}") != 0

    def test_no_network_but_its_own_loopback(self, evaluate: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            code = """
                import socket
                names = [name for _, name in socket.if_nameindex()]
                with socket.create_server(("127.0.0.1", 0)) as own, socket.socket() as other:
                    socket.create_connection(own.getsockname()).close()
                    result = [names, other.connect_ex(("127.0.0.1", int(sys.argv[1])))]
            """
            names, refused = evaluate(code, str(server.getsockname()[1]))
        assert "lo" in names
        assert refused != 0

    def test_what_the_command_needs_is_there(self, evaluate: Any) -> None:
        code = "import paravirt.ring.process; result = sys.executable"
        assert Path(evaluate(code)).resolve() == Path(sys.executable).resolve()

    def test_exposed_is_seen_where_it_is(self, evaluate: Any, scratch: Path) -> None:
        (scratch / "file").write_text("text")
        (scratch / "file").chmod(0o644)
        code = "result = open(sys.argv[1]).read()"
        assert evaluate(code, str(scratch / "file"), expose=[scratch / "file"]) == "text"

    def test_names_of_the_hosts_places_are_not_in_its_environment(self, evaluate: Any) -> None:
        given = {
            **os.environ,
            "XDG_RUNTIME_DIR": "/run/user/1",
            "PARAVIRT_RUN": "/x",
            "SSH_AUTH_SOCK": "/y",
            "KEPT": "1",
        }
        own = evaluate("result = dict(os.environ)", environment=given)
        assert own["KEPT"] == "1"
        assert not {"XDG_RUNTIME_DIR", "PARAVIRT_RUN", "SSH_AUTH_SOCK"} & set(own)


class TestConnection:
    @pytest.mark.parametrize("isolated", EITHER)
    def test_the_first_process_has_the_brokers_socket(
        self, ends: tuple[socket.socket, socket.socket], evaluate: Any, isolated: bool
    ) -> None:
        code = "result = os.write(int(os.environ['PARAVIRT_FD']), b'hello')"
        evaluate(code, isolated=isolated)
        assert ends[0].recv(5) == b"hello"

    @pytest.mark.parametrize("isolated", EITHER)
    def test_further_ones_connect_to_the_domains_socket(self, evaluate: Any, scratch: Path, isolated: bool) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(scratch / "hypervisor.sock"))
            (scratch / "hypervisor.sock").chmod(0o600)
            listener.listen()
            code = """
                import socket
                result = socket.socket(socket.AF_UNIX).connect_ex(os.environ["PARAVIRT_SOCKET"])
            """
            options = {"domain_socket": scratch / "hypervisor.sock", "hide": [scratch]}
            assert evaluate(code, isolated=isolated, **options) == 0


@pytest.mark.parametrize("isolated", EITHER)
class TestLife:
    def test_exit_status(self, start: Any, isolated: bool) -> None:
        assert start("sh", "-c", "exit 37", isolated=isolated).wait(DEADLINE_S) == 37

    def test_status_of_a_killed_command(self, start: Any, isolated: bool) -> None:
        assert start("sh", "-c", "kill -9 $$", isolated=isolated).wait(DEADLINE_S) == 128 + signal.SIGKILL

    def test_a_signal_reaches_the_command(self, start: Any, isolated: bool) -> None:
        process = start("python3", "-c", WAITS, isolated=isolated, stdout=subprocess.PIPE)
        assert read_line(process.stdout) == "ready"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM

    def test_kill_ends_all_its_processes(self, start: Any, isolated: bool) -> None:
        process = start("sh", "-c", FAMILY, isolated=isolated, stdout=subprocess.PIPE)
        assert read_line(process.stdout) == "ready"
        process.kill()
        read_all(process.stdout)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL

    def test_the_end_of_the_command_ends_all_its_processes(self, start: Any, isolated: bool) -> None:
        process = start("sh", "-c", "sleep 1000 & echo ready", isolated=isolated, stdout=subprocess.PIPE)
        read_all(process.stdout)
        assert process.wait(DEADLINE_S) == 0

    def test_the_pidfd_is_that_of_init(self, start: Any, isolated: bool) -> None:
        process = start("sleep", "1000", isolated=isolated)
        os.kill(process.pid, signal.SIGKILL)
        assert ended(process.pidfd)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL

    def test_waiting_has_a_limit(self, start: Any, isolated: bool) -> None:
        process = start("sleep", "1000", isolated=isolated)
        with pytest.raises(TimedOut, match="sleep still runs"):
            process.wait(0.01)
        assert process.poll() is None

    def test_close_twice(self, start: Any, isolated: bool) -> None:
        process = start("sleep", "1000", isolated=isolated)
        process.close()
        process.close()
        process.kill()

    @pytest.mark.parametrize("victim", ["launcher", "keeper"])
    def test_a_killed_launcher_takes_the_domain_along(self, isolated: bool, victim: str) -> None:
        with subprocess.Popen([sys.executable, "-c", LAUNCHER, str(isolated)], stdout=subprocess.PIPE) as launcher:
            ready, keeper = sorted((read_line(launcher.stdout), read_line(launcher.stdout)), reverse=True)
            assert ready == "ready"
            os.kill(launcher.pid if victim == "launcher" else int(keeper), signal.SIGKILL)
            read_all(launcher.stdout)

    def test_a_thread_of_the_launcher_may_end(self, isolated: bool) -> None:
        """The kernel's parent-death signal is about threads; the domain's life is about the launcher's process."""
        code = f"import threading\n{LAUNCHER_THREAD}"
        command = [sys.executable, "-c", code, str(isolated)]
        done = subprocess.run(command, timeout=DEADLINE_S, check=True, text=True, capture_output=True)
        assert done.stdout.split() == ["None", "0"]

    def test_an_unknown_command(self, start: Any, isolated: bool) -> None:
        with pytest.raises(NotFound, match="command not found: no-such-command"):
            start("no-such-command", isolated=isolated)

    def test_a_directory_is_no_command(self, start: Any, isolated: bool) -> None:
        with pytest.raises(PermissionRefused, match="cannot run /etc"):
            start("/etc", isolated=isolated)

    def test_no_command(self, start: Any, isolated: bool) -> None:
        with pytest.raises(InvalidRequest, match="no command"):
            start(isolated=isolated)

    def test_failed_starts_leave_no_descriptor(self, start: Any, isolated: bool) -> None:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(NotFound):
            start("no-such-command", isolated=isolated)
        assert os.listdir("/proc/self/fd") == before


@isolation
def test_orphans_are_reaped(evaluate: Any) -> None:
    code = """
        import select, subprocess
        for _ in range(20):
            subprocess.run(["sh", "-c", "sleep 0 &"], check=True)
        for _ in range(1000):
            result = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
            if result == [1, 2]:
                break
            select.select([], [], [], 0.01)
    """
    assert evaluate(code) == [1, 2]


@isolation
def test_a_kernel_that_refuses_is_named() -> None:
    """In a user namespace whose limit of further ones is 0."""
    code = (
        "import socket\nfrom paravirt.errors import ParavirtError\nfrom paravirt.host.launch import launch\n"
        "try: launch(['true'], domid=1, hypervisor_fd=socket.socketpair()[0].fileno())\n"
        "except ParavirtError as error: print(type(error).__name__, error)"
    )
    limit = "echo 0 > /proc/sys/user/max_user_namespaces"
    script = f'{limit} && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", script, sys.executable, code],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stdout.startswith("PermissionRefused the kernel refuses to isolate a domain")
    assert "--shared, which isolates nothing" in done.stdout


WAITS = "import signal\nprint('ready', flush=True)\nsignal.pause()"

FAMILY = "sleep 1000 & sleep 1000 & echo ready; wait"

LAUNCHER = """
import os, socket, sys
from paravirt.host.launch import launch
domain, broker = socket.socketpair()
script = "echo ready; exec sleep 1000"
process = launch(["sh", "-c", script], domid=7, hypervisor_fd=domain.fileno(), isolated=sys.argv[1] == "True")
os.write(1, b"%d\\n" % process._keeper.pid)
process.wait()
"""

LAUNCHER_THREAD = """
import socket, subprocess, sys
from paravirt.host.launch import launch
domain, broker = socket.socketpair()
found = []
def work():
    found.append(launch(["cat"], domid=7, hypervisor_fd=domain.fileno(), isolated=sys.argv[1] == "True",
                        stdin=subprocess.PIPE))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(found[0].poll())
found[0].stdin.close()
print(found[0].wait(20))
"""
