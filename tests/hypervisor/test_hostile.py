# SPDX-License-Identifier: MIT
"""Clients that lie: only their own connection ends, everybody else is served, and nothing of it is a defect."""

import array
import fcntl
import mmap
import os
import random
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paravirt.errors import ParavirtError
from paravirt.hypervisor.client import PortState
from paravirt.hypervisor.link import Link, Reply
from paravirt.hypervisor.messages import MAGIC, MESSAGE_BYTES, VERSION, Op, new_message, parse, to_bytes
from paravirt.ring._core import ffi
from paravirt.ring.event import NotifyResult, WaitResult

from .conftest import World, settle

DEADLINE_S = 30
TAKE_FD = (Op.DOMAIN_SET_INIT, Op.DOMAIN_ADD_PROCESS)
OPS = [op.value for op in Op if op is not Op.HELLO]


def raw(world: World, domid: int = 1) -> socket.socket:
    """A connected socket of that domain with nothing said yet; asking it for too long is a failure, not a hang."""
    connected = socket.socket(fileno=world.broker.connect(domid))
    connected.settimeout(DEADLINE_S)
    return connected


def hello(seq: int = 1) -> bytes:
    message = new_message(Op.HELLO, seq)
    message.hello.magic, message.hello.version = MAGIC, VERSION
    return to_bytes(message)


def greeted(world: World, domid: int = 1) -> socket.socket:
    connected = raw(world, domid)
    connected.send(hello())
    receive(connected)
    return connected


def receive(connected: socket.socket) -> bytes:
    data, fds, _, _ = socket.recv_fds(connected, MESSAGE_BYTES, 8)
    for fd in fds:
        os.close(fd)
    return data


def is_closed(connected: socket.socket) -> bool:
    """The broker has ended this connection."""
    try:
        while data := receive(connected):
            assert len(data) == MESSAGE_BYTES
    except ConnectionError:
        pass
    return True


def flood(connected: socket.socket, data: bytes) -> int:
    """Send without reading until the kernel takes no more; how many."""
    connected.setblocking(False)
    for sent in range(100_000):
        try:
            connected.send(data)
        except BlockingIOError:
            return sent
    raise AssertionError("a flood without end")


def fill(pipe: int) -> None:
    while True:
        os.write(pipe, bytes(4096))


def is_well(world: World) -> None:
    """Dom0 and another process of the same domain are served as before."""
    assert world.dom0.list_domains()[1].domid == 1
    with world.connect(1) as sibling:
        waiter = sibling.waiter()
        assert sibling.alloc_unbound(waiter, 0).status().state is PortState.UNBOUND


BAD_MESSAGES = {
    "one byte": b"x",
    "too short": bytes(MESSAGE_BYTES - 1),
    "too long": bytes(MESSAGE_BYTES + 1),
    "very long": bytes(60000),
    "op 0": bytes(MESSAGE_BYTES),
    "op 65535": b"\xff" * MESSAGE_BYTES,
    "no greeting": to_bytes(new_message(Op.INFO, 1)),
    "other magic": to_bytes(new_message(Op.HELLO, 1)),
    "a push meant for xenstored": to_bytes(new_message(Op.STORE_CONNECTION, 1)),
    "an answer meant from xenstored": to_bytes(new_message(Op.STORE_RELEASED, 1)),
}


@pytest.mark.parametrize(
    ("bad", "greet"),
    # After a greeting the message without one is an honest one.
    [(bad, greet) for bad in BAD_MESSAGES for greet in (False, True) if not (greet and bad == "no greeting")],
)
def test_malformed_messages_close_the_connection(
    world: World, bad: str, greet: bool, caplog: pytest.LogCaptureFixture
) -> None:
    world.guest()
    with greeted(world) if greet else raw(world) as connected:
        connected.send(BAD_MESSAGES[bad])
        assert is_closed(connected)
    is_well(world)
    assert any("of domain 1 closed:" in record.getMessage() for record in caplog.records)


def test_a_second_greeting_closes_the_connection(world: World) -> None:
    world.guest()
    with greeted(world) as connected:
        connected.send(hello(2))
        assert is_closed(connected)
    is_well(world)


@pytest.mark.parametrize(
    ("op", "n"),
    # One descriptor is what those of TAKE_FD take.
    [(op, n) for op in (Op.INFO, Op.HELLO, *TAKE_FD) for n in (1, 4, 200) if not (op in TAKE_FD and n == 1)],
)
def test_unexpected_descriptors_are_closed(world: World, op: Op, n: int) -> None:
    world.guest()
    reader, writer = os.pipe()
    with raw(world) if op is Op.HELLO else greeted(world) as connected:
        socket.send_fds(connected, [hello() if op is Op.HELLO else to_bytes(new_message(op, 2))], [writer] * n)
        os.close(writer)
        assert is_closed(connected)
    assert os.read(reader, 1) == b"", "nobody holds the other end any more"
    os.close(reader)
    is_well(world)


def test_a_descriptor_of_a_guest_is_refused_and_closed(world: World) -> None:
    world.guest()
    reader, writer = os.pipe()
    with greeted(world) as connected:
        socket.send_fds(connected, [to_bytes(new_message(Op.DOMAIN_SET_INIT, 2))], [writer])
        os.close(writer)
        assert parse(receive(connected)).header.status == -1
        assert os.read(reader, 1) == b""
    os.close(reader)
    is_well(world)


def test_an_empty_message_is_an_end(world: World) -> None:
    world.guest()
    with greeted(world) as connected:
        connected.send(b"")
        assert is_closed(connected)
    is_well(world)


@pytest.mark.parametrize("op", [Op.INFO, Op.WAITER_CREATE, Op.ARENA_CREATE, Op.DOMAIN_CREATE])
def test_a_flood_without_reading_stops_itself(world: World, op: Op) -> None:
    """The broker listens to nobody whose replies are unread, so the sender's own buffer fills; others are served."""
    world.guest()
    message = new_message(op, 2)
    if op is Op.ARENA_CREATE:
        message.arena.n_pages = 1
    data = to_bytes(message)
    with greeted(world) as connected:
        sent = flood(connected, data)
        is_well(world)
        # It was only slow, not hostile: once it reads, every request has its answer.
        connected.settimeout(DEADLINE_S)
        for _ in range(sent):
            assert parse(receive(connected)).header.op == op
    is_well(world)


def test_a_flood_that_dies_is_forgotten(world: World) -> None:
    world.guest()
    before = len(os.listdir("/proc/self/fd"))
    data = to_bytes(new_message(Op.INFO, 2))
    for _ in range(20):
        with greeted(world) as connected:
            flood(connected, data)
    is_well(world)
    settle(world)
    assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(OPS), st.binary(max_size=112)), max_size=20), st.booleans())
def test_random_payloads_of_every_operation_get_an_answer(
    world: World, requests: list[tuple[int, bytes]], guest: bool
) -> None:
    """Whatever the payload says, an honest header gets an answer, and Dom0's operations are refused to a guest."""
    if len(world.dom0.list_domains()) == 1:
        world.guest()
    with greeted(world, 1 if guest else 0) as connected:
        for seq, (op, payload) in enumerate(requests, 2):
            if op in (Op.STORE_CONNECTION, Op.STORE_RELEASED, *TAKE_FD, Op.DOMAIN_DESTROY):
                continue
            message = new_message(op, seq)
            ffi.memmove(ffi.addressof(message, "raw"), payload, len(payload))
            connected.send(to_bytes(message))
            answer = parse(receive(connected))
            assert (answer.header.seq, answer.header.op) == (seq, op)
            assert answer.header.status <= 0
            if guest and op in (Op.DOMAIN_CREATE, Op.DOMAIN_INFO, Op.DOMAIN_CONNECT, Op.STORE_REGISTER):
                assert answer.header.status == -1


def test_random_bytes(world: World) -> None:
    world.guest()
    noise = random.Random(7)
    for _ in range(300):
        with greeted(world) if noise.random() < 0.5 else raw(world) as connected:
            try:
                for _ in range(noise.randrange(1, 5)):
                    size = noise.choice([MESSAGE_BYTES, noise.randrange(1, 300)])
                    data = bytearray(noise.randbytes(size))
                    if noise.random() < 0.7 and size >= 2:
                        data[0:2] = noise.choice(OPS).to_bytes(2, "little")
                    connected.send(data)
            except ConnectionError:
                pass
    is_well(world)


def call(link: Link, op: Op, **fields: int) -> Reply:
    """One request with the payload fields "part__name"."""

    def fill(request: object) -> None:
        for name, value in fields.items():
            part, field = name.split("__")
            setattr(getattr(request, part), field, value)

    return link.call(op, fill)


def test_a_guest_gets_nothing_by_guessing(world: World) -> None:
    """Ports, arenas, mappings, waiters and domids of others: every number is tried, none works."""
    victim, thief = world.guest("victim"), world.guest("thief")
    waiter = victim.waiter()
    channel = victim.alloc_unbound(waiter, 0)
    arena = victim.create_arena(0, 8)
    arena.grant(arena.allocate(1).gref)
    foreign = world.dom0.foreign_arena(1, arena.base)
    thief_waiter = thief.waiter()
    got = []
    for number in [*range(20), 0x7FF0, 0x7FF2, 2**32 - 1]:
        for op, fields in [
            (
                Op.EVTCHN_BIND,
                {"port__waiter": thief_waiter.index, "port__remote_domid": 1, "port__remote_port": number},
            ),
            (Op.EVTCHN_CLOSE, {"port__port": number}),
            (Op.EVTCHN_SEND, {"port__port": number}),
            (Op.EVTCHN_STATUS, {"port__domid": 1, "port__port": number}),
            (Op.EVTCHN_STATUS, {"port__domid": 0, "port__port": number}),
            (Op.ARENA_MAP, {"arena__domid": 1, "arena__gref": number}),
            (Op.ARENA_MAP, {"arena__domid": 0, "arena__gref": number}),
            (Op.ARENA_DESTROY, {"arena__gref": number}),
            (Op.ARENA_UNMAP, {"arena__map": number}),
            (Op.NOTIFY_RUN, {"notify__map": number, "notify__id": number}),
            (Op.DOMAIN_CONNECT, {"domain__domid": number & 0xFFFF}),
            (Op.DOMAIN_DESTROY, {"domain__domid": number & 0xFFFF}),
            (Op.DOMAIN_INFO, {"domain__domid": number & 0xFFFF}),
        ]:
            try:
                with call(thief.link, op, **fields):
                    got.append((op, number))
            except ParavirtError:
                pass
    assert got == []
    assert channel.status().state is PortState.UNBOUND
    with foreign.map_pages([arena.base], read_only=True):
        pass
    foreign.close()


def test_a_sender_cannot_block_the_brokers_bell(isolated_world: World) -> None:
    """A guest clears O_NONBLOCK on the doorbell it got and fills it; binding, closing and dying still go through."""
    world = isolated_world
    guest = world.guest()
    theirs_waiter = guest.waiter()
    waiter = world.dom0.waiter()
    ours = world.dom0.alloc_unbound(waiter, 1)
    theirs = guest.bind_interdomain(theirs_waiter, 0, ours.port)
    bell = theirs.core.tx_bell
    with pytest.raises(BlockingIOError):
        fill(bell)
    fcntl.fcntl(bell, fcntl.F_SETFL, fcntl.fcntl(bell, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    guest.close()  # rings the full bell
    assert world.dom0.list_domains()[1].ports == 0
    assert waiter.wait(ours, timeout_s=DEADLINE_S) is WaitResult.STALE
    assert ours.status().state is PortState.UNBOUND


def test_a_sender_has_only_the_writing_end_of_a_pipe(world: World) -> None:
    guest = world.guest()
    ours = world.dom0.alloc_unbound(world.dom0.waiter(), 1)
    theirs = guest.bind_interdomain(guest.waiter(), 0, ours.port)
    bell = theirs.core.tx_bell
    assert (os.readlink(f"/proc/self/fd/{bell}")[:4] == "pipe") is world.isolated
    if world.isolated:
        with pytest.raises(OSError):
            os.read(bell, 1)


def test_the_bindings_page_cannot_be_written(world: World) -> None:
    """Not through a new mapping either: only the broker has a writable one."""
    guest = world.guest()
    guest.waiter()
    with raw(world) as connected:
        connected.send(hello())
        _, fds, _, _ = socket.recv_fds(connected, MESSAGE_BYTES, 4)
        assert len(fds) == 1
        with pytest.raises(PermissionError):
            mmap.mmap(fds[0], 4096)
        with pytest.raises(OSError):
            os.pwrite(fds[0], b"x", 0)
        with pytest.raises(OSError):
            os.ftruncate(fds[0], 0)
        os.close(fds[0])


def test_isolated_memory_cannot_be_resized_by_its_holders(isolated_world: World) -> None:
    world = isolated_world
    world.guest()
    with greeted(world) as connected:
        message = new_message(Op.ARENA_CREATE, 2)
        message.arena.n_pages = 4
        connected.send(to_bytes(message))
        _, fds, _, _ = socket.recv_fds(connected, MESSAGE_BYTES, 4)
        for fd in fds:
            for size in (0, 4096 * 100):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
            os.close(fd)


def test_read_only_arenas_of_isolated_domains_are_sealed(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 2, read_only=True)
    run = arena.allocate(1)
    foreign = world.dom0.foreign_arena(1, run.gref)
    reopened = -1
    try:
        # The peer opens the object it holds once more, for writing.
        reopened = os.open(f"/proc/self/fd/{foreign._data_fd}", os.O_RDWR)
        if world.isolated:
            with pytest.raises(PermissionError):
                os.pwrite(reopened, b"x", 0)
    except PermissionError:
        pass
    finally:
        if reopened >= 0:
            os.close(reopened)
    run.view[0] = 1
    assert foreign.data.view[0] == 1, "the owner's mapping stays writable"
    foreign.close()


def test_inbox_contents_of_a_hostile_sender_harm_only_its_channels(world: World) -> None:
    """A guest fills its page of our inbox with ones: spurious events of its own ports, nothing else."""
    guest, honest = world.guest("hostile"), world.guest("honest")
    waiter = world.dom0.waiter()
    ours = world.dom0.alloc_unbound(waiter, guest.domid)
    other = world.dom0.alloc_unbound(waiter, honest.domid)
    theirs = guest.bind_interdomain(guest.waiter(), 0, ours.port)
    ffi.memmove(ffi.cast("uint8_t *", theirs.core.tx) + 128, b"\xff" * (4096 - 128), 4096 - 128)
    assert set(waiter.take_pending()) <= {ours}
    assert not other.take_pending()
    again = honest.bind_interdomain(honest.waiter(), 0, other.port)
    again.notify()
    assert other in waiter.take_pending()


def test_a_domain_that_binds_and_closes_for_ever_loses_nobody_an_event(world: World) -> None:
    """Each time all ports of our waiter become stale; a send to an honest domain still arrives."""
    hostile, honest = world.guest("hostile"), world.guest("honest")
    waiter = world.dom0.waiter()
    bait = world.dom0.alloc_unbound(waiter, hostile.domid)
    ours = world.dom0.alloc_unbound(waiter, honest.domid)
    honest_waiter = honest.waiter()
    theirs = honest.bind_interdomain(honest_waiter, 0, ours.port)
    theirs.take_pending()
    stop = threading.Event()
    rounds = []

    def attack() -> None:
        hostile_waiter = hostile.waiter()
        while not stop.is_set():
            hostile.bind_interdomain(hostile_waiter, 0, bait.port).close()
            rounds.append(1)

    thread = threading.Thread(target=attack)
    thread.start()
    while not rounds:
        pass
    for _ in range(300):
        assert ours.notify() in (NotifyResult.SUPPRESSED, NotifyResult.RANG)
        assert honest_waiter.wait(theirs, timeout_s=DEADLINE_S) is WaitResult.EVENT
    stop.set()
    thread.join()


def test_many_hostile_connections_at_once(world: World) -> None:
    guest = world.guest()
    stop = threading.Event()

    def attack(seed: int) -> None:
        noise = random.Random(seed)
        while not stop.is_set():
            try:
                with greeted(world) as connected:
                    connected.setblocking(False)
                    for _ in range(noise.randrange(50)):
                        message = new_message(noise.choice(OPS), 2)
                        ffi.memmove(ffi.addressof(message, "raw"), noise.randbytes(112), 112)
                        if message.header.op != Op.DOMAIN_DESTROY:
                            socket.send_fds(connected, [to_bytes(message)], [0] * noise.choice([0, 0, 0, 1]))
            except (OSError, ParavirtError):
                pass

    threads = [threading.Thread(target=attack, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    waiter = guest.waiter()
    for _ in range(100):
        channel = guest.alloc_unbound(waiter, 0)
        channel.close()
        with guest.create_arena(0, 1) as arena:
            arena.allocate(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert world.dom0.list_domains()[1].ports == 0


def test_truncated_control_data_is_no_leak(world: World) -> None:
    world.guest()
    before = len(os.listdir("/proc/self/fd"))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 100))]
    for _ in range(5):
        with greeted(world) as connected:
            connected.sendmsg([to_bytes(new_message(Op.INFO, 2))], rights)
            assert is_closed(connected)
    is_well(world)
    settle(world)
    assert len(os.listdir("/proc/self/fd")) == before
