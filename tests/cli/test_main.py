# SPDX-License-Identifier: MIT
"""The command line around its commands: quick help, one line for a mistake, quiet ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from paravirt import __version__
from paravirt.cli import main
from paravirt.cli.context import emit
from paravirt.host.rundir import SOCKET_PATH_BYTES
from paravirt.hypervisor.domains import DomainState

DEADLINE_S = 30.0


def paravirt(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "paravirt", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, **environment},
        check=False,
    )


def complaint(*arguments: str, **environment: str) -> str:
    """The one line of a mistake, which exits with 2 and prints nothing else."""
    done = paravirt(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("paravirt: ")
    return lines[0].removeprefix("paravirt: ")


class TestHelp:
    def test_every_command_is_named(self) -> None:
        text = paravirt("--help").stdout
        assert all(f"\n  {name} " in text for name in main.COMMANDS)

    def test_it_loads_no_command(self) -> None:
        code = (
            "import sys\nfrom paravirt.cli.main import cli\ncli(['--help'], standalone_mode=False)\n"
            "loaded = {'numpy', 'rich', 'cffi', 'paravirt.cli.up', 'paravirt.ring._core'} & set(sys.modules)\n"
            "sys.exit(f'loaded: {loaded}' if loaded else 0)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE_S, stdout=subprocess.DEVNULL)

    @pytest.mark.parametrize("name", sorted(main.COMMANDS))
    def test_every_command_is_there(self, name: str) -> None:
        assert "Usage: " in paravirt(name, "--help").stdout

    @pytest.mark.parametrize("name", sorted(main.BENCHMARKS))
    def test_every_benchmark_is_there(self, name: str) -> None:
        assert "Usage: " in paravirt("bench", name, "--help").stdout

    def test_the_table_says_what_the_commands_say(self) -> None:
        context = click.Context(main.cli)
        for name, (_, line) in main.COMMANDS.items():
            command = main.cli.get_command(context, name)
            assert command is not None
            assert (command.help or "").splitlines()[0] == line, name

    def test_every_option_says_what_it_is(self) -> None:
        def look(command: click.Command, name: str) -> None:
            assert command.help, name
            for parameter in command.params:
                assert not isinstance(parameter, click.Option) or parameter.help, f"{name} {parameter.opts}"
            if isinstance(command, click.Group):
                context = click.Context(command)
                for each in command.list_commands(context):
                    found = command.get_command(context, each)
                    assert found is not None
                    look(found, f"{name} {each}")

        look(main.cli, "paravirt")

    def test_without_a_command(self) -> None:
        done = paravirt()
        assert done.returncode == 2
        assert "Commands:" in done.stderr

    def test_version(self) -> None:
        assert paravirt("--version").stdout == f"paravirt, version {__version__}\n"


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["nonsense"], "No such command 'nonsense' (see: paravirt --help)"),
            (["--nonsense"], "No such option"),
            (["bench", "nonsense"], "No such command 'nonsense' (see: paravirt bench --help)"),
            (["domain", "create"], "Missing argument 'NAME' (see: paravirt domain create --help)"),
            (["domain", "create", "--max-pages", "0", "g"], "Invalid value for '--max-pages'"),
            (["run", "g"], "Missing argument 'COMMAND...'"),
            (["--log-level", "loud", "info"], "Invalid value for '--log-level'"),
            (["--host", "a/b", "domain", "list"], "host name 'a/b' is not made of"),
        ],
    )
    def test_one_line(self, arguments: Sequence[str], said: str) -> None:
        assert said in complaint(*arguments)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["domain", "list"],
            ["domain", "create", "g"],
            ["domain", "destroy", "g"],
            ["run", "g", "--", "true"],
            ["vbd", "list"],
            ["vbd", "attach", "g", "/dev/null"],
            ["xenstore", "ls", "/"],
            ["backend"],
        ],
    )
    def test_no_host(self, arguments: Sequence[str], short_path: Path) -> None:
        text = complaint("--host", "one", "--run", str(short_path), *arguments, PARAVIRT_FD="")
        assert text == f"host one is not running (run directory {short_path}); start it with: paravirt up"

    def test_no_host_in_sight_of_a_domain(self, short_path: Path) -> None:
        for command in (["ring", "list"], ["grant", "list"], ["xenstore", "ls"]):
            text = complaint("--run", str(short_path), *command, PARAVIRT_FD="3")
            assert text == "no host is in sight of this process, which is a domain's: only Dom0 may do this"

    def test_a_run_directory_open_to_others(self, short_path: Path) -> None:
        short_path.chmod(0o755)
        for command in (["up"], ["hypervisor"], ["domain", "list"]):
            text = complaint("--run", str(short_path), *command)
            assert "is open to others (mode 0755); it must have mode 0700" in text

    def test_a_file_as_run_directory(self, short_path: Path) -> None:
        (short_path / "file").touch()
        assert "cannot make the run directory" in complaint("--run", str(short_path / "file"), "up")

    def test_a_run_directory_with_too_long_a_name(self, tmp_path: Path) -> None:
        path = tmp_path / ("x" * SOCKET_PATH_BYTES)
        assert f"socket paths in it may have {SOCKET_PATH_BYTES} bytes" in complaint("--run", str(path), "up")

    def test_a_log_file_that_cannot_be(self, short_path: Path) -> None:
        run, log = str(short_path / "run"), str(short_path / "none" / "log")
        assert "cannot write the log file" in complaint("--run", run, "--log-file", log, "up")

    def test_the_run_directory_comes_from_the_environment_too(self, short_path: Path) -> None:
        assert f"run directory {short_path / 'x'}" in complaint("domain", "list", PARAVIRT_RUN=str(short_path / "x"))


class TestStatus:
    @pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
    def test_what_a_command_returns(self, monkeypatch: pytest.MonkeyPatch, returned: int | None, status: int) -> None:
        monkeypatch.setattr("paravirt.cli.info.info.callback", lambda **_: returned)
        monkeypatch.setattr("sys.argv", ["paravirt", "info"])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == status


class TestQuietEnds:
    def test_a_closed_pipe(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "paravirt", "info", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.wait(DEADLINE_S) == 128 + signal.SIGPIPE
            assert process.stderr.read() == b""

    def test_an_interrupt(self) -> None:
        code = (
            "import click, signal\nfrom paravirt.cli import main\n"
            "@main.cli.command('wait')\ndef wait():\n    signal.raise_signal(signal.SIGINT)\n"
            "main.COMMANDS['wait'] = ('__main__:wait', '')\n"
            "import sys; sys.argv = ['paravirt', 'wait']\nmain.main()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=DEADLINE_S, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


class TestEmit:
    ROWS = [{"name": "one", "count": 1, "live": True}, {"name": "two", "count": 22, "live": None}]
    COLUMNS = {"name": "NAME", "count": "COUNT", "live": "LIVE"}

    def test_a_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        emit(self.ROWS, self.COLUMNS, as_json=False)
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert [lines[0], *lines[2:]] == [["NAME", "COUNT", "LIVE"], ["one", "1", "yes"], ["two", "22", "-"]]

    def test_a_pipe_never_folds(self, capsys: pytest.CaptureFixture[str]) -> None:
        emit([{"name": "x" * 300}], {"name": "NAME"}, as_json=False)
        assert "x" * 300 in capsys.readouterr().out

    def test_names_are_no_markup(self, capsys: pytest.CaptureFixture[str]) -> None:
        emit([{"name": "[bold]x[/nonsense]"}], {"name": "NAME"}, as_json=False)
        assert "[bold]x[/nonsense]" in capsys.readouterr().out

    def test_json_names_what_a_table_names(self, capsys: pytest.CaptureFixture[str]) -> None:
        emit([{"state": DomainState.RUNNING, "path": Path("/x")}], {"state": "State"}, as_json=True)
        assert json.loads(capsys.readouterr().out) == [{"state": "running", "path": "/x"}]

    def test_json_has_everything(self, capsys: pytest.CaptureFixture[str]) -> None:
        emit(self.ROWS, {"name": "NAME"}, as_json=True)
        assert json.loads(capsys.readouterr().out) == self.ROWS
