# SPDX-License-Identifier: MIT
"""Two daemons, ours and Debian's C daemon 4.17, that are told the same; what each client gets is compared.

Each has Dom0's sockets "dom0", "dom0b", the guests "dom1", "dom2" over ring pages, and a domain 3 that exists but is
not introduced. A request is sent, its reply awaited, then every client asks a question of its own: what comes before
that question's answer are the events of the request.
"""

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from paravirt.errors import TimedOut
from paravirt.hypervisor.client import XENSTORE_GREF, Hypervisor
from paravirt.hypervisor.server import BrokerServer
from paravirt.ring.event import WaitResult
from paravirt.ring.stream import XENSTORE_FRONT, ByteStream
from paravirt.testing.reference_xenstored import ReferenceDaemon
from paravirt.xenstore.limits import Limits
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import HEADER, Op, Packet, PacketParser, encode, number

DEADLINE_S: Final = 5.0
GUESTS: Final = (1, 2)
NOT_INTRODUCED: Final = 3
CLIENTS: Final = ("dom0", "dom0b", *(f"dom{domid}" for domid in GUESTS))
REQUEST_ID: Final = 42
SYNC_ID: Final = 0x5E4C
UNKNOWN_TRANSACTION: Final = 7777
OBSERVER: Final = "observer"
"""A connection of Dom0 that no step uses: it watches @releaseDomain, to know when a death has been seen."""

PORT: Final = b"%PORT%"
"""In an INTRODUCE of domain 3: replaced by its event channel."""


@dataclass(frozen=True, slots=True)
class Limited:
    """Quotas, as each daemon is told them: the C daemon 4.17 refuses the one above its limit, ours the one that
    reaches it; the size of a node and the transactions are counted alike."""

    limits: Limits
    arguments: tuple[str, ...]


NORMAL: Final = Limited(Limits(), ())
TIGHT: Final = Limited(
    Limits(nodes=8, watches=4, transactions=3, transaction_nodes=10, node_permissions=4, node_bytes=120),
    (
        *("--entry-nb=7", "--watch-nb=2", "--transaction=1", "--perm-nb=3", "--entry-size=119"),
        "--quota=transaction-nodes=9",
    ),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One request. `transaction`: 0 none, 1 the newest of this client's, 2 the one before ..., -1 one that never was.

    Beside the operations of the wire: SHUT_DOWN and DESTROY with a domid as payload, OVERSIZE.
    """

    client: str
    op: int
    payload: bytes = b""
    transaction: int = 0

    def __repr__(self) -> str:
        name = Op(self.op).name if self.op in set(Op) else EXTRA.get(self.op, str(self.op))
        at = f"@{self.transaction}" if self.transaction else ""
        payload = self.payload if len(self.payload) < 80 else self.payload[:30] + b"...%d bytes" % len(self.payload)
        return f"{self.client}> {name}{at} {repr(payload)[2:-1]}"


SHUT_DOWN: Final = -1
DESTROY: Final = -2
OVERSIZE: Final = -3
EXTRA: Final = {SHUT_DOWN: "(shut down)", DESTROY: "(destroy)", OVERSIZE: "(a payload of 4097 bytes)"}


class Endpoint(Protocol):
    """A client's byte stream."""

    def send(self, data: bytes) -> None: ...

    def receive(self) -> bytes:
        """What came, waiting for it; empty at the end. `TimedOut` after a while."""


class SocketEndpoint:
    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        connected.settimeout(DEADLINE_S)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> bytes:
        try:
            return self._socket.recv(1 << 16)
        except TimeoutError:
            raise TimedOut("a client got nothing") from None
        except ConnectionResetError:
            return b""


class RingEndpoint:
    """A guest of our broker."""

    def __init__(self, guest: Hypervisor) -> None:
        self._waiter = guest.waiter()
        self.channel = guest.alloc_unbound(self._waiter, 0)
        self._memory = guest.reserved_page(XENSTORE_GREF).memory
        self._stream = ByteStream(self._memory, XENSTORE_FRONT, port=self.channel)

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            n_bytes = self._stream.write_nowait(rest)
            rest = rest[n_bytes:]
            if rest:
                self._wait()

    def receive(self) -> bytes:
        while not (data := self._stream.read_nowait()):
            self._wait()
        return data

    def _wait(self) -> None:
        result = self._waiter.wait(self.channel, timeout_s=DEADLINE_S)
        if result is WaitResult.TIMEOUT:
            raise TimedOut("a guest got no event")
        if result is WaitResult.STALE:
            self.channel.notify()

    def close(self) -> None:
        self._stream.close()


class Daemon(Protocol):
    """What a `Side` asks of one of the two."""

    port: int

    def connect(self) -> Endpoint: ...

    def guest(self, domid: int) -> Endpoint: ...

    def end(self, domid: int, *, destroy: bool) -> None: ...


class Theirs:
    """Debian's."""

    port = 5

    def __init__(self, stack: ExitStack, folder: Path, limited: Limited) -> None:
        self._stack = stack
        self.daemon = stack.enter_context(ReferenceDaemon("c", folder, arguments=limited.arguments))
        self.daemon.add_domain(NOT_INTRODUCED, introduce=False)

    def connect(self) -> Endpoint:
        return SocketEndpoint(self._stack.enter_context(self.daemon.connect()))

    def guest(self, domid: int) -> Endpoint:
        return self.daemon.add_domain(domid)

    def end(self, domid: int, *, destroy: bool) -> None:
        self.daemon.end_domain(domid, "gone" if destroy else "shutdown")

    def check_alive(self) -> None:
        """`ReferenceDied` if it did: that is not ours to explain."""
        died = self.daemon.has_died(DEADLINE_S)
        output = self.daemon.log_path.read_text(errors="replace")
        if died and "Assertion" in output:
            raise ReferenceDied(output.strip().splitlines()[-1])


class ReferenceDied(Exception):
    """The reference daemon failed an assertion of its own."""


class Ours:
    """Ours, with a broker for its guests, all in this process."""

    def __init__(self, stack: ExitStack, limited: Limited) -> None:
        self._stack = stack
        self._broker = BrokerServer()
        self._broker.start()
        stack.callback(self._broker.stop)
        self._dom0 = self._hypervisor(0)
        self._server = XenstoreServer(hypervisor=self._hypervisor(0), limits=limited.limits)
        stack.callback(self._server.stop)
        self._server.start()
        self._guests: dict[int, Hypervisor] = {}
        for domid in (*GUESTS, NOT_INTRODUCED):
            assert self._dom0.create_domain(f"guest{domid}", isolated=False).domid == domid
            self._guests[domid] = self._hypervisor(domid)
        self.port = self._ring(NOT_INTRODUCED).channel.port

    def _hypervisor(self, domid: int) -> Hypervisor:
        return self._stack.enter_context(Hypervisor.from_fd(self._broker.connect(domid)))

    def _ring(self, domid: int) -> RingEndpoint:
        endpoint = RingEndpoint(self._guests[domid])
        self._stack.callback(endpoint.close)
        return endpoint

    def connect(self) -> Endpoint:
        return SocketEndpoint(self._stack.enter_context(self._server.connect()))

    def guest(self, domid: int) -> Endpoint:
        endpoint = self._ring(domid)
        with self._server.connect() as dom0:
            client = SocketEndpoint(dom0)
            client.send(encode(Op.INTRODUCE, 0, 0, b"%d\0001\000%d\0" % (domid, endpoint.channel.port)))
            assert client.receive()[HEADER.size :] == b"OK\0"
        return endpoint

    def end(self, domid: int, *, destroy: bool) -> None:
        if destroy:
            self._dom0.destroy_domain(domid)
        else:
            self._guests[domid].shutdown()


class Side:
    """One daemon and its clients, and what they got, in terms that can be compared."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._parsers: dict[str, PacketParser] = {}
        self._inboxes: dict[str, list[Packet]] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._transactions: dict[str, list[int]] = {}
        self._generations: dict[bytes, list[bytes]] = {}
        for name in (OBSERVER, *CLIENTS):
            domid = 0 if name == OBSERVER else int(name[3])
            self._add(name, daemon.guest(domid) if domid else daemon.connect())
        self._ask(OBSERVER, Op.WATCH, b"@releaseDomain\0observer\0", 0)
        self._next(OBSERVER)
        for path, entry in ((b"/", b"r0"), (b"/a", b"b0"), (b"/local/domain/1", b"n1"), (b"/local/domain/2", b"n2")):
            self._ask("dom0", Op.MKDIR, path + b"\0", 0)
            self._ask("dom0", Op.SET_PERMS, path + b"\0" + entry + b"\0", 0)
        self._collect()

    def _add(self, name: str, endpoint: Endpoint) -> None:
        self._parsers[name] = PacketParser()
        self._inboxes[name] = []
        self._endpoints[name] = endpoint
        self._transactions[name] = []

    @property
    def clients(self) -> list[str]:
        """Those that are still there."""
        return [name for name in self._endpoints if name != OBSERVER]

    def play(self, step: Step) -> dict[str, list[str]]:
        """What each client got because of a step, the reply included."""
        if step.op in (SHUT_DOWN, DESTROY):
            return self._end_domain(int(step.payload), destroy=step.op == DESTROY)
        if step.op == OVERSIZE:
            return self._oversize(step.client)
        transaction = self._number_of(step)
        got = self._ask(step.client, step.op, step.payload.replace(PORT, b"%d" % self._daemon.port), transaction)
        if step.op == Op.RELEASE and got[-1][0] == Op.RELEASE:
            self._endpoints.pop(f"dom{number(step.payload)}", None)
        self._remember(step, got[-1])
        told = {step.client: [self._text(step, packet) for packet in got]}
        for client, packets in self._collect().items():
            told.setdefault(client, []).extend(self._text(step, packet) for packet in packets)
        return told

    def _number_of(self, step: Step) -> int:
        if step.transaction <= 0:
            return UNKNOWN_TRANSACTION if step.transaction else 0
        numbers = self._transactions[step.client]
        return numbers[-step.transaction] if step.transaction <= len(numbers) else 0

    def _remember(self, step: Step, reply: Packet) -> None:
        if reply[0] == Op.TRANSACTION_START:
            self._transactions[step.client].append(int(reply[3][:-1]))

    def _end_domain(self, domid: int, *, destroy: bool) -> dict[str, list[str]]:
        self._daemon.end(domid, destroy=destroy)
        self._next(OBSERVER)
        if destroy:
            del self._endpoints[f"dom{domid}"]
        return {name: [self._text(None, packet) for packet in got] for name, got in self._collect().items()}

    def _oversize(self, client: str) -> dict[str, list[str]]:
        self._endpoints[client].send(HEADER.pack(Op.READ, REQUEST_ID, 0, 4097))
        try:
            got = self._packets_until_end(client)
        finally:
            self._add(client, self._daemon.connect())
        return {client: [self._text(None, packet) for packet in got]}

    # -- packets

    def _ask(self, client: str, op: int, payload: bytes, transaction: int) -> list[Packet]:
        """Everything that comes to a client up to its reply."""
        self._endpoints[client].send(encode(op & 0xFFFFFFFF, REQUEST_ID, transaction, payload))
        return self._packets_until(client, REQUEST_ID)

    def _collect(self) -> dict[str, list[Packet]]:
        """What came to all clients so far."""
        for name in self.clients:
            self._endpoints[name].send(encode(Op.GET_DOMAIN_PATH, SYNC_ID, 0, b"0\0"))
        return {name: self._packets_until(name, SYNC_ID)[:-1] for name in self.clients}

    def _packets_until(self, client: str, request_id: int) -> list[Packet]:
        packets: list[Packet] = []
        while not packets or packets[-1][0] == Op.WATCH_EVENT or packets[-1][1] != request_id:
            packets.append(self._next(client))
        return packets

    def _next(self, client: str) -> Packet:
        inbox = self._inboxes[client]
        while not inbox:
            data = self._endpoints[client].receive()
            assert data, f"{client}: the connection ended"
            inbox += self._parsers[client].feed(data)
        return inbox.pop(0)

    def _packets_until_end(self, client: str) -> list[Packet]:
        packets = self._inboxes[client]
        while data := self._endpoints[client].receive():
            packets += self._parsers[client].feed(data)
        return packets

    # -- words

    def _text(self, step: Step | None, packet: Packet) -> str:
        op, _, _, payload = packet
        if op == Op.WATCH_EVENT:
            return f"* {_shown(payload)}"
        if op == Op.ERROR:
            return f"! {payload[:-1].decode()}"
        assert step is not None
        assert op == step.op & 0xFFFFFFFF, (step, packet)
        if op == Op.TRANSACTION_START:
            return "a transaction"
        if op == Op.DIRECTORY_PART:
            generation, _, rest = payload.partition(b"\0")
            known = self._generations.setdefault(step.payload.split(b"\0")[0], [])
            if generation not in known:
                known.append(generation)
            return f"generation {known.index(generation)} {_shown(rest)}"
        return _shown(payload)


def _shown(payload: bytes) -> str:
    text = repr(payload)[2:-1].replace("\\x00", "|")
    return text if len(text) < 200 else f"{text[:100]}...({len(payload)} bytes, {hash(payload)})"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the two are not alike: what each client got of ours and of theirs."""

    step: Step
    ours: dict[str, list[str]]
    theirs: dict[str, list[str]]

    def replies(self) -> tuple[str, str]:
        """Ours and theirs, if everything else is alike; else two empty strings."""
        client = self.step.client
        pairs = [(self._split(self.ours, name), self._split(self.theirs, name)) for name in (*self.ours, *self.theirs)]
        if any(ours[1] != theirs[1] for ours, theirs in pairs):
            return "", ""
        return self._split(self.ours, client)[0], self._split(self.theirs, client)[0]

    def reply(self, told: dict[str, list[str]]) -> str:
        """That of one side."""
        return self._split(told, self.step.client)[0]

    def _split(self, told: dict[str, list[str]], client: str) -> tuple[str, list[str]]:
        lines = told.get(client, [])
        reply = next((line for line in lines if not line.startswith("*")), "") if client == self.step.client else ""
        return reply, [line for line in lines if line != reply]

    def __str__(self) -> str:
        lines = [repr(self.step)]
        for name in dict.fromkeys((*self.ours, *self.theirs)):
            ours, theirs = self.ours.get(name, []), self.theirs.get(name, [])
            mark = "" if ours == theirs else "   <-- differ"
            lines += [f"  {name}< ours   {ours}{mark}", f"  {name}< theirs {theirs}"]
        return "\n".join(lines)


class Pair:
    """Both, side by side."""

    def __init__(self, folder: Path, limited: Limited = NORMAL) -> None:
        self._stack = ExitStack()
        try:
            self._reference = Theirs(self._stack, folder, limited)
            self.theirs = Side(self._reference)
            self.ours = Side(Ours(self._stack, limited))
        except BaseException:
            self._stack.close()
            raise

    def play(self, step: Step) -> Difference | None:
        """One step on both; what it came to, if that was not the same."""
        ours = self.ours.play(step)
        try:
            theirs = self.theirs.play(step)
        except Exception:
            self._reference.check_alive()
            raise
        same = {k: v for k, v in ours.items() if v} == {k: v for k, v in theirs.items() if v}
        return None if same else Difference(step, ours, theirs)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
