# SPDX-License-Identifier: MIT
"""A broker in this process and xenstored in another one, which may be killed and started again."""

import os
import signal
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

from paravirt.hypervisor.client import XENSTORE_GREF, Hypervisor
from paravirt.hypervisor.server import BrokerServer
from paravirt.xenstore.client import WatchQueue, XenstoreClient
from tests.xenstore.history import DEADLINE_S, PARAVIRT


class Durable:
    """What a test needs of both, closed with `stack`."""

    def __init__(self, stack: ExitStack, directory: Path, *options: str, broker: bool = True) -> None:
        """`options` of xenstored beside its places."""
        self._stack = stack
        self.directory = directory
        self.socket = directory / "store.sock"
        self.process: subprocess.Popen[str] | None = None
        place = [*PARAVIRT, "--run", str(directory / "run"), "--log-level", "warning"]
        self.command = [*place, "xenstored", "--socket", str(self.socket), *options]
        stack.callback(self.kill)
        if broker:
            self.command += ["--hypervisor", str(directory / "hypervisor.sock")]
            self.start_broker()

    def start_broker(self) -> None:
        self.broker = BrokerServer(self.directory)
        self.broker.start()
        self._stack.callback(self.broker.stop)
        self.dom0 = self.hypervisor(0)

    def hypervisor(self, domid: int) -> Hypervisor:
        return self._stack.enter_context(Hypervisor.from_fd(self.broker.connect(domid)))

    def start(self) -> None:
        """Start xenstored and wait until it serves; its messages are in `stderr`."""
        with open(self.directory / "stderr", "a") as stderr:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), self.said()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def said(self) -> str:
        """All that it has logged."""
        return (self.directory / "stderr").read_text()

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate(timeout=DEADLINE_S)

    def terminate(self) -> None:
        """Stop it as a supervisor does."""
        process, self.process = self.process, None
        assert process is not None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0

    def client(self, *, reconnect: bool = False) -> XenstoreClient:
        return self._stack.enter_context(XenstoreClient.connect(self.socket, reconnect=reconnect))

    def domain(self, name: str) -> int:
        """A new domain with a home of its own."""
        domid = self.dom0.create_domain(name, isolated=False).domid
        home = f"/local/domain/{domid}"
        with XenstoreClient.connect(self.socket) as store:
            store.mkdir(home)
            store.set_perms(home, [f"n{domid}"])
        return domid

    def n_descriptors(self) -> int:
        """Of the daemon; 0 where only root may look."""
        return len(os.listdir(f"/proc/{self.pid}/fd")) if os.geteuid() == 0 else 0


class Ring:
    """A guest's xenstore page and event channel, introduced to xenstored."""

    def __init__(self, durable: Durable, domid: int) -> None:
        self.guest = durable.hypervisor(domid)
        self.memory = self.guest.reserved_page(XENSTORE_GREF).memory
        self.waiter = self.guest.waiter()
        self.channel = self.guest.alloc_unbound(self.waiter, 0)
        with XenstoreClient.connect(durable.socket) as store:
            store.introduce(domid, XENSTORE_GREF, self.channel.port)

    def client(self, *, reconnect: bool = False) -> XenstoreClient:
        return XenstoreClient.over_ring(self.memory, self.waiter, self.channel, reconnect=reconnect)


def await_event(queue: WatchQueue, path: str) -> None:
    """Wait for an event of this path; others are thrown away."""
    while True:
        event = queue.get(DEADLINE_S)
        assert event is not None, f"no event for {path}"
        if event.path == path:
            return


def drain(queue: WatchQueue, store: XenstoreClient) -> list[str]:
    """Paths of all events that came before the reply to a request made now."""
    with suppress(Exception):
        store.get_domain_path(0)
    found = []
    while (event := queue.get(0)) is not None:
        found.append(event.path)
    return found
