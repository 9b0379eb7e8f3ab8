# SPDX-License-Identifier: MIT
"""Dialogues with the store, told as text: who says what, what comes back.

    dom0> WRITE /a|one          a request; "|" is a NUL, "@3" after the operation a transaction
    dom0< OK                    the next packet this client gets: a reply's payload, or
    dom0< ! ENOENT              an error, or
    dom0< * /a|token|           a watch event

Clients are called dom0, dom5, dom5b (a second connection of domain 5) and so on, and connect when they first speak.
After each request every other packet must have been told of: a story that leaves one out fails.
"""

import copy
import re
from typing import Any

from paravirt.xenstore.core import CoreHub
from paravirt.xenstore.hub import Hub
from paravirt.xenstore.limits import Limits
from paravirt.xenstore.session import Connection
from paravirt.xenstore.wire import Errno, Op, Packet, PacketParser, encode

REQUEST_ID = 42
engine = "python"
"""What new worlds run on: "python" or "c"."""


class FakeDomains:
    """A hypervisor's side that only remembers what it was asked for."""

    def __init__(self, existing: set[int]) -> None:
        self.existing = existing
        self.rings: list[tuple[int, int, int]] = []
        self.detached: list[int] = []
        self.connections: dict[int, Connection] = {}
        self.refusal: Errno | None = None

    def exists(self, domid: int) -> bool:
        return domid in self.existing

    def attach_ring(self, connection: Connection, page: int, port: int) -> Errno | None:
        self.rings.append((connection.domain.domid, page, port))
        self.connections[connection.domain.domid] = connection
        return self.refusal

    def detach(self, connection: Connection) -> None:
        self.detached.append(connection.domain.domid)


class World:
    """A hub and named clients of it."""

    def __init__(self, *, limits: Limits | None = None, existing: set[int] = frozenset(range(10))) -> None:  # type: ignore[assignment]
        self.control = FakeDomains(set(existing))
        self.hub: Any = {"python": Hub, "c": CoreHub}[engine](limits=limits, control=self.control)
        self.clients: dict[str, Connection] = {}
        self._parsers: dict[str, PacketParser] = {}
        self._inboxes: dict[str, list[str]] = {}

    def client(self, name: str) -> Connection:
        if name not in self.clients:
            match = re.fullmatch(r"dom(\d+)[a-z]*", name)
            assert match, name
            self.clients[name] = self.hub.connect(int(match[1]))
            self._parsers[name] = PacketParser()
            self._inboxes[name] = []
        return self.clients[name]

    def send(self, name: str, op: int, payload: bytes, transaction: int = 0) -> None:
        self.client(name).feed(encode(op, REQUEST_ID, transaction, payload))

    def received(self, name: str) -> list[str]:
        """What a client has got and not been asked for yet, in the notation of stories."""
        connection = self.client(name)
        inbox = self._inboxes[name]
        self.let_go_on()
        while connection.n_output_bytes:
            for op, request_id, _, payload in self.read(name):
                assert request_id == (0 if op == Op.WATCH_EVENT else REQUEST_ID)
                mark = {Op.ERROR: "! ", Op.WATCH_EVENT: "* "}.get(Op(op), "")
                text = payload.rstrip(b"\0") if op == Op.ERROR or payload == b"OK\0" else payload
                inbox.append(mark + text.decode("latin-1").replace("\0", "|"))
            self.let_go_on()
        return inbox

    def read(self, name: str, at_most: int = 1 << 20) -> list[Packet]:
        """Have a client read bytes; the packets they complete. `received` has to read the rest of what was begun."""
        connection = self.client(name)
        if not connection.n_output_bytes:
            return []
        data = connection.output()[:at_most]
        connection.sent(len(data))
        packets = self._parsers[name].feed(data)
        assert self._parsers[name].broken is None
        return packets

    def unread(self, name: str) -> int:
        """How many packets wait for a client, one that it has read in part among them."""
        connection = self.client(name)
        return len(copy.deepcopy(self._parsers[name]).feed(connection.output())) if connection.n_output_bytes else 0

    def n_nodes(self, domid: int) -> int:
        """How many nodes a domain owns, whether it is known or not."""
        domain = self.hub.domains.get(domid)
        return domain.n_nodes if domain is not None else 0

    def owners(self) -> dict[int, int]:
        """How many nodes each domain owns that has any."""
        return {domid: self.n_nodes(domid) for domid in self.hub.domains if self.n_nodes(domid)}

    def tree(self, path: str = "/") -> dict[str, tuple[str, str]]:
        """(value, permissions) of every node from a path on, as Dom0 sees it."""
        found, paths = {}, [path]
        while paths:
            at = paths.pop()
            found[at] = self.ask("dom0tree", "READ", f"{at}|"), self.ask("dom0tree", "GET_PERMS", f"{at}|")
            names = self.ask("dom0tree", "DIRECTORY", f"{at}|").split("|")[:-1]
            paths += [f"{at.rstrip('/')}/{name}" for name in names]
        return found

    def take_dirty(self) -> set[Connection]:
        """The connections that whoever moves bytes has to look at; they are taken off the list."""
        if engine == "python":
            taken = set(self.hub.dirty)
            self.hub.dirty.clear()
            return taken
        return set(iter(self.hub.next_dirty, None))

    def let_go_on(self) -> None:
        """What whoever moves bytes does: requests that waited are handled as soon as they may."""
        if engine == "c":
            while (connection := self.hub.next_dirty()) is not None:
                connection.resume()
            return
        while self.hub.dirty:
            self.hub.dirty.pop().resume()

    def pass_time(self, milliseconds: int) -> None:
        """Let time pass."""
        self.hub.now_ms += milliseconds
        self.hub.on_time()
        self.let_go_on()

    def ask(self, name: str, op: str, payload: bytes | str = b"", transaction: int = 0) -> str:
        """One request and its reply; fails if anything else comes to this client."""
        data = payload.replace("|", "\0").encode("latin-1") if isinstance(payload, str) else payload
        self.send(name, Op[op], data, transaction)
        inbox = self.received(name)
        assert len(inbox) == 1, inbox
        return inbox.pop()

    def tell(self, story: str) -> None:
        """Play a story; the line that does not fit is in the error."""
        for number, raw in enumerate(story.splitlines(), 1):
            line = raw.split("#")[0].strip()
            if not line:
                continue
            match = re.fullmatch(r"(dom\w+)([<>]) ?(.*)", line)
            assert match, f"line {number}: not a story: {line}"
            name, direction, text = match.groups()
            if direction == ">":
                self._expect_nothing(number)
                self._request(name, text)
            else:
                inbox = self.received(name)
                assert inbox, f"line {number}: {name} got nothing, not {text!r}"
                got = inbox.pop(0)
                assert got == text, f"line {number}: {name} got {got!r}, not {text!r}"
        self._expect_nothing(0)

    def _expect_nothing(self, number: int) -> None:
        left = {name: self.received(name) for name in self.clients if self.received(name)}
        assert not left, f"before line {number}: not told of {left}"

    def _request(self, name: str, text: str) -> None:
        op, _, payload = text.partition(" ")
        op, _, transaction = op.partition("@")
        code = int(op) if op.isdigit() else Op[op]
        self.send(name, code, payload.replace("|", "\0").encode("latin-1"), int(transaction or 0))


def tell(story: str, **options: object) -> World:
    """Play a story in a new world."""
    world = World(**options)  # type: ignore[arg-type]
    world.tell(story)
    return world
