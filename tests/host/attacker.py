# SPDX-License-Identifier: MIT
"""Everything a domain must not be able to do, tried from inside: `attacker.py TARGETS` (JSON), a JSON object out.

Each attack returns what it got; one that is refused raises. The answer says for each what it got, or None.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paravirt.errors import HypervisorError, ParavirtError
from paravirt.hypervisor.client import Hypervisor
from paravirt.xenstore.client import XenstoreClient

SO_PEERPIDFD = 77
SYS_PIDFD_GETFD = 438
PTRACE_SEIZE = 0x4206

ATTACKS: dict[str, Callable[["Attacker"], Any]] = {}


def attack(function: Callable[["Attacker"], Any]) -> Callable[["Attacker"], Any]:
    ATTACKS[function.__name__] = function
    return function


class Attacker:
    """What the attacks have in hand: the targets' names and numbers, and this domain's own connections."""

    def __init__(self, targets: dict[str, Any]) -> None:
        self.run = Path(targets["run"])
        self.pids: list[int] = targets["pids"]
        self.victim: dict[str, int] = targets["victim"]
        self.hypervisor = Hypervisor.from_environment()
        self.store = XenstoreClient.from_socket(self.hypervisor.store_connection())
        self.libc = ctypes.CDLL(None, use_errno=True)

    @property
    def broker_pidfd(self) -> int:
        """The broker's pidfd, as the kernel gives it to whoever is connected to it."""
        with self.own_connection() as connection:
            return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)

    def own_connection(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(os.environ["PARAVIRT_SOCKET"])
        return connection


def connected(path: Path | str, kind: socket.SocketKind) -> str:
    with socket.socket(socket.AF_UNIX, kind) as client:
        client.connect(str(path))
        return f"connected to {path}"


def check(returned: int) -> int:
    if returned < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return returned


# Memory and ports of others


@attack
def map_memory_of_another_domain(own: Attacker) -> Any:
    return repr(own.hypervisor.foreign_arena(own.victim["domid"], own.victim["gref"]))


@attack
def map_reserved_pages_of_another_domain(own: Attacker) -> Any:
    return [repr(own.hypervisor.foreign_arena(own.victim["domid"], gref)) for gref in (0, 1)]


@attack
def map_memory_of_another_domain_as_that_of_dom0(own: Attacker) -> Any:
    return repr(own.hypervisor.foreign_arena(0, own.victim["gref"]))


@attack
def bind_a_port_of_another_domain(own: Attacker) -> Any:
    waiter = own.hypervisor.waiter()
    return repr(own.hypervisor.bind_interdomain(waiter, own.victim["domid"], own.victim["port"]))


@attack
def bind_any_port_of_dom0(own: Attacker) -> Any:
    waiter = own.hypervisor.waiter()
    bound = []
    for port in range(1, 64):
        with contextlib.suppress(HypervisorError):
            bound.append(repr(own.hypervisor.bind_interdomain(waiter, 0, port)))
    return bound or refused()


# Another domain's name


@attack
def get_a_connection_of_another_domain(own: Attacker) -> Any:
    return own.hypervisor.domain_socket(own.victim["domid"])


@attack
def get_a_connection_of_dom0(own: Attacker) -> Any:
    return own.hypervisor.domain_socket(0)


@attack
def be_somebody_else_over_the_domains_socket(own: Attacker) -> Any:
    with Hypervisor.connect(os.environ["PARAVIRT_SOCKET"]) as another:
        return another.domid if another.domid != own.hypervisor.domid else refused()


@attack
def be_xenstored(own: Attacker) -> Any:
    return repr(own.hypervisor.register_store())


@attack
def create_a_domain(own: Attacker) -> Any:
    return repr(own.hypervisor.create_domain("intruder"))


@attack
def destroy_another_domain(own: Attacker) -> Any:
    return repr(own.hypervisor.destroy_domain(own.victim["domid"]))


@attack
def become_init_of_another_domain(own: Attacker) -> Any:
    return repr(own.hypervisor.set_init(own.victim["domid"], os.pidfd_open(os.getpid())))


# The store


@attack
def read_the_store_of_another_domain(own: Attacker) -> Any:
    return own.store.read_text(f"/local/domain/{own.victim['domid']}/data/secret")


@attack
def list_the_store_of_another_domain(own: Attacker) -> Any:
    return own.store.ls(f"/local/domain/{own.victim['domid']}/data")


@attack
def write_the_store_of_another_domain(own: Attacker) -> Any:
    return repr(own.store.write(f"/local/domain/{own.victim['domid']}/data/secret", "mine now"))


@attack
def write_the_store_of_dom0(own: Attacker) -> Any:
    return repr(own.store.write("/local/domain/0/backend/vbd/intruder", "x"))


@attack
def open_the_permissions_of_another_domain(own: Attacker) -> Any:
    return repr(own.store.set_perms(f"/local/domain/{own.victim['domid']}/data/secret", [f"b{own.hypervisor.domid}"]))


@attack
def introduce_another_domain(own: Attacker) -> Any:
    return repr(own.store.introduce(own.victim["domid"], 1, 1))


@attack
def see_watch_events_of_another_domain(own: Attacker) -> Any:
    queue = own.store.watch_queue()
    home = f"/local/domain/{own.victim['domid']}"
    queue.add(home)
    queue.get(timeout_s=10)  # every watch fires once when it is set, also where nothing may be seen
    event = queue.get(timeout_s=0.2)
    return event.path if event is not None else refused()


# Sockets


@attack
def open_dom0s_hypervisor_socket(own: Attacker) -> Any:
    return connected(own.run / "hypervisor.sock", socket.SOCK_SEQPACKET)


@attack
def open_dom0s_xenstored_socket(own: Attacker) -> Any:
    return connected(own.run / "xenstored.sock", socket.SOCK_STREAM)


@attack
def open_the_socket_of_another_domain(own: Attacker) -> Any:
    return connected(own.run / f"domains/{own.victim['domid']}/hypervisor.sock", socket.SOCK_SEQPACKET)


@attack
def find_any_file_of_the_host(own: Attacker) -> Any:
    return [str(path) for path in own.run.iterdir()] or refused()


@attack
def reach_dom0s_sockets_from_the_domains_own(own: Attacker) -> Any:
    here = Path(os.environ["PARAVIRT_SOCKET"]).parent
    beside = {str(path) for path in here.rglob("*")} - {os.environ["PARAVIRT_SOCKET"]}
    return sorted(beside) or refused()


@attack
def take_covers_away_in_namespaces_of_its_own(own: Attacker) -> Any:
    script = f"umount -l {own.run}; umount -l {own.run.parent}; umount -l /tmp; umount -l /run; umount -l /proc; "
    script += f"ls {own.run}/hypervisor.sock {own.run}/domains"
    seen = os.popen(f"unshare -Urm sh -c '{script}' 2>/dev/null").read()
    return seen or refused()


# Processes


@attack
def see_processes_of_the_host(own: Attacker) -> Any:
    return [pid for pid in own.pids if os.path.exists(f"/proc/{pid}/status")] or refused()


@attack
def read_proc_entries_of_the_host(own: Attacker) -> Any:
    got = []
    for pid in own.pids:
        for name in ("mem", "maps", "environ", "fd", "root", "cwd"):
            with contextlib.suppress(OSError):
                path = f"/proc/{pid}/{name}"
                got.append(os.listdir(path) if name in ("fd", "root", "cwd") else Path(path).read_bytes())
    return got or refused()


@attack
def read_proc_entries_of_the_domains_init(own: Attacker) -> Any:
    with open("/proc/1/mem", "rb") as memory:
        return memory.name


@attack
def signal_processes_of_the_host_by_number(own: Attacker) -> Any:
    hit = []
    for pid in own.pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            hit.append(pid)
    return hit or refused()


@attack
def signal_everybody(own: Attacker) -> Any:
    with contextlib.suppress(OSError):
        os.kill(-1, signal.SIGKILL)
    return refused()  # whoever was hit was not of the host, whose daemons and second domain are looked at afterwards


@attack
def signal_the_broker_by_pidfd(own: Attacker) -> Any:
    signal.pidfd_send_signal(own.broker_pidfd, signal.SIGKILL)
    return "killed"


@attack
def take_a_descriptor_of_the_broker(own: Attacker) -> Any:
    return [check(own.libc.syscall(SYS_PIDFD_GETFD, own.broker_pidfd, fd, 0)) for fd in range(3, 20)]


@attack
def enter_the_brokers_namespaces(own: Attacker) -> Any:
    return check(own.libc.setns(own.broker_pidfd, 0x20000))


@attack
def trace_the_host(own: Attacker) -> Any:
    got = []
    for pid in [*own.pids, 1]:
        with contextlib.suppress(OSError):
            check(own.libc.ptrace(PTRACE_SEIZE, pid, 0, 0))
            got.append(pid)
    return got or refused()


def refused() -> Any:
    raise PermissionError


def main() -> None:
    own = Attacker(json.loads(sys.argv[1]))
    answer = {}
    for name, function in ATTACKS.items():
        try:
            answer[name] = repr(function(own))
        except (ParavirtError, OSError):
            answer[name] = None
    print(json.dumps(answer), flush=True)


main()
