# SPDX-License-Identifier: MIT
"""The processes between a launcher and a domain's command: `python -m paravirt.host.sandbox PLAN_FD`.

    launcher -> keeper -> init (pid 1 of the domain's pid namespace) -> command

The *keeper* is a fresh interpreter with one thread, because namespaces and rights must not change under the threads of
whoever launches. It enters the new namespaces, makes *init*, and then only watches: when the launcher dies, it ends the
domain. *init* makes the domain's view of the files, gives up all rights, starts the command, hands signals on to it and
reaps; when it ends, the kernel ends every process of the domain. In shared mode there are no namespaces and no init of
ours: the command itself is the domain's init.

They report on a socket, one JSON object a packet: `{"pid": n}` with init's pidfd, then `{"error": text, "kind": name}`
if the command could not be started. End-of-file without that means that it runs.
"""

import fcntl
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from paravirt.errors import NotFound, ParavirtError, PermissionRefused
from paravirt.host import namespaces
from paravirt.host.plan import COMMAND_FD, Plan
from paravirt.ring import process

FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
"""Signals that init hands on to the command."""

EXIT_NOT_STARTED = 126


def main() -> NoReturn:
    """The keeper."""
    with open(int(sys.argv[1]), "rb") as file:
        file.seek(0)
        plan = Plan.load(file.read())
    os.chdir("/")  # a working directory is a hold of what may be hidden
    status = socket.socket(fileno=_out_of_the_way(plan.status_fd))
    hypervisor = _out_of_the_way(plan.hypervisor_fd)
    with _reporting(status):
        launcher = _pidfd_of_parent(plan.launcher)
        keeper = os.pidfd_open(os.getpid())
        if plan.isolated:
            namespaces.enter(plan)
        if plan.isolated:
            child = _fork(lambda: _init(plan, status, hypervisor, keeper))
        else:
            child = _fork(lambda: _command(plan, status, hypervisor, keeper))
        init = os.pidfd_open(child)
        socket.send_fds(status, [json.dumps({"pid": child}).encode()], [init])
    status.close()
    os.close(hypervisor)
    if plan.uid is None:
        process.drop_capabilities()
    process.set_dumpable(False)
    _let_go_of_terminal()
    os._exit(_watch(child, init, launcher))


def _watch(child: int, init: int, launcher: int) -> int:
    """Wait for the end of `child`, end it when the launcher ends; the exit status, as a shell would give it."""
    poller = select.poll()
    poller.register(init, select.POLLIN)
    poller.register(launcher, select.POLLIN)
    ready = {fd for fd, _ in poller.poll()}
    if init not in ready:
        signal.pidfd_send_signal(init, signal.SIGKILL)
    # The process group of a shared domain goes with its init; in a pid namespace nothing is left of it.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return _status_of(os.waitpid(child, 0)[1])


def _init(plan: Plan, status: socket.socket, hypervisor: int, keeper: int) -> NoReturn:
    """Pid 1 of the domain."""
    with _reporting(status):
        namespaces.build_view(plan)
        namespaces.give_up_rights(plan)
        process.die_with_parent(keeper)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is somebody to hand them on to
        child = _fork(lambda: _command(plan, status, hypervisor, None))
    status.close()
    os.close(hypervisor)
    _let_go_of_terminal()

    def hand_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child, number)

    with suppress(OSError):
        os.setpgid(child, child)  # it does so itself; whoever comes first
    for number in FORWARDED:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    while True:
        ended, code = os.wait()
        if ended == child:
            os._exit(_status_of(code))


def _command(plan: Plan, status: socket.socket, hypervisor: int, keeper: int | None) -> NoReturn:
    """Become the domain's command. In shared mode this is a child of the keeper, and dies with it."""
    with _reporting(status):
        os.setpgid(0, 0)
        if keeper is not None:
            process.die_with_parent(keeper)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        with suppress(OSError):
            os.chdir(plan.directory)
        os.dup2(hypervisor, COMMAND_FD)  # all other descriptors above 2 close on exec
        try:
            os.execvpe(plan.command[0], plan.command, plan.environment)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"command not found: {plan.command[0]}") from error
        except OSError as error:
            raise PermissionRefused(f"cannot run {plan.command[0]}: {error.strerror}") from error


@contextmanager
def _reporting(status: socket.socket) -> Iterator[None]:
    """Tell the launcher what goes wrong in the block, and end this process."""
    try:
        yield
    except ParavirtError as error:
        report = {"error": str(error), "kind": type(error).__name__}
    except OSError as error:
        report = {"error": f"cannot isolate the domain: {error.strerror}", "kind": "ParavirtError"}
    else:
        return
    status.send(json.dumps(report).encode())
    os._exit(EXIT_NOT_STARTED)


def _fork(child: Callable[[], NoReturn]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(EXIT_NOT_STARTED)  # never back into the parent's code
    return pid


def _out_of_the_way(fd: int) -> int:
    """Move a descriptor above COMMAND_FD and out of the reach of exec."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16)
    os.close(fd)
    return moved


def _pidfd_of_parent(parent: int) -> int:
    """A pidfd of the launcher. It lived until now if it is still our parent after the open."""
    pidfd = os.pidfd_open(parent)
    if os.getppid() != parent:
        raise ParavirtError("the launcher ended")
    return pidfd


def _let_go_of_terminal() -> None:
    """Point 0-2 elsewhere: readers of the command's output see its end, not ours."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nowhere, fd)


def _status_of(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
