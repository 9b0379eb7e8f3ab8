# SPDX-License-Identifier: MIT
"""The client's state without I/O: what becomes of requests, watches and transactions when a connection breaks."""

import contextlib
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravirt.errors import (
    XENSTORE_ERRORS,
    Closed,
    OutcomeUnknown,
    ParavirtError,
    PeerError,
    StoreGone,
    TransactionConflict,
    XenstoreError,
)
from paravirt.xenstore.operations import error_of
from paravirt.xenstore.protocol_state import REPEATED, ClientProtocol, Patience, Request, Subscription
from paravirt.xenstore.wire import ACK, Errno, Op, Packet, PacketParser, encode


class Sink:
    """What a watch queue is for the client."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def put(self, subscription: Subscription, path: str) -> None:
        self.seen.append(path)

    def forget_watches(self) -> None:
        self.seen.append("forget")

    def end(self, error: ParavirtError) -> None:
        self.seen.append(f"end {type(error).__name__}")


def send_all(protocol: ClientProtocol) -> list[Packet]:
    """Everything that waits to go out goes out."""
    parser, packets = PacketParser(), []
    while protocol.has_output:
        packets += parser.feed(protocol.take_output())
        protocol.all_sent()
    return packets


def submit(protocol: ClientProtocol, op: Op, payload: bytes = b"x\0", *, transaction_id: int = 0) -> Request:
    request = Request(op, payload, "x", transaction_id, protocol.epoch)
    protocol.submit(request)
    return request


def watching(protocol: ClientProtocol, path: str = "/a") -> tuple[Subscription, Sink]:
    """A watch that is registered."""
    sink = Sink()
    protocol.sinks.add(sink)
    subscription = Subscription(sink, path, "token", protocol.new_token(), None)
    request = subscription.watch()
    protocol.submit(request)
    send_all(protocol)
    protocol.receive(encode(Op.WATCH, request.request_id, 0, ACK))
    assert request.outcome() == ACK
    return subscription, sink


@pytest.fixture
def protocol() -> ClientProtocol:
    return ClientProtocol(reconnects=True)


GONE = StoreGone("gone")
REQUESTS = [op for op in Op if op not in (Op.WATCH_EVENT, Op.ERROR, Op.RESTRICT, Op.UNWATCH, Op.TRANSACTION_END)]


def test_every_errno_of_the_wire_has_a_class() -> None:
    assert set(XENSTORE_ERRORS) == {errno.name for errno in Errno}
    for name, kind in XENSTORE_ERRORS.items():
        error = error_of(name, "/what")
        assert type(error) is kind
        assert error.name == name
        assert issubclass(kind, XenstoreError)
        assert "/what" in str(error)
    assert type(error_of("EQUOTA", "/what")) is XenstoreError


@pytest.mark.parametrize("op", REQUESTS, ids=lambda op: op.name)
def test_a_request_that_was_sent_is_repeated_or_has_an_unknown_outcome(protocol: ClientProtocol, op: Op) -> None:
    request = submit(protocol, op)
    [first] = send_all(protocol)
    protocol.lost(GONE)
    if op in REPEATED:
        assert not request.done
        protocol.connected()
        [again] = send_all(protocol)
        assert again == first
        protocol.receive(encode(op, again[1], 0, b"reply"))
        assert request.outcome() == b"reply"
    else:
        with pytest.raises(OutcomeUnknown, match=op.name):
            request.outcome()
        protocol.connected()
        assert send_all(protocol) == []


@pytest.mark.parametrize("op", REQUESTS, ids=lambda op: op.name)
def test_a_request_that_was_not_sent_is_sent_later(protocol: ClientProtocol, op: Op) -> None:
    before = submit(protocol, op)
    protocol.lost(GONE)
    between = submit(protocol, op)
    assert not protocol.has_output
    protocol.connected()
    sent = send_all(protocol)
    assert [packet[1] for packet in sent] == [before.request_id, between.request_id]
    assert not before.done


def test_half_a_write_has_an_unknown_outcome_and_the_ones_behind_it_are_sent(protocol: ClientProtocol) -> None:
    first, second = submit(protocol, Op.WRITE, b"/a\x001"), submit(protocol, Op.WRITE, b"/b\x002")
    protocol.take_output()
    protocol.give_back(5)
    protocol.take_output()
    protocol.give_back(0)
    protocol.lost(GONE)
    with pytest.raises(OutcomeUnknown):
        first.outcome()
    protocol.connected()
    assert [packet[3] for packet in send_all(protocol)] == [b"/b\x002"]
    assert not second.done


def test_output_goes_on_where_it_stopped(protocol: ClientProtocol) -> None:
    for i in range(3):
        submit(protocol, Op.READ, b"/%d\0" % i)
    whole = protocol.take_output()
    protocol.give_back(21)
    assert protocol.take_output() == whole[21:]
    protocol.give_back(len(whole) - 21)
    assert protocol.take_output() == b""


def test_transactions_are_over(protocol: ClientProtocol) -> None:
    start = submit(protocol, Op.TRANSACTION_START, b"\0")
    send_all(protocol)
    protocol.receive(encode(Op.TRANSACTION_START, start.request_id, 0, b"7\0"))
    assert start.epoch == protocol.epoch
    read = submit(protocol, Op.READ, transaction_id=7)
    write = submit(protocol, Op.WRITE, transaction_id=7)
    abort = submit(protocol, Op.TRANSACTION_END, b"F\0", transaction_id=7)
    send_all(protocol)
    commit = submit(protocol, Op.TRANSACTION_END, b"T\0", transaction_id=7)
    protocol.lost(GONE)
    late = Request(Op.READ, b"x\0", "x", 7, start.epoch)
    protocol.submit(late)
    for request in (read, write, commit, late):
        with pytest.raises(TransactionConflict):
            request.outcome()
    assert abort.outcome() == ACK
    protocol.connected()
    assert send_all(protocol) == []


def test_a_commit_that_was_sent_has_an_unknown_outcome(protocol: ClientProtocol) -> None:
    commit = submit(protocol, Op.TRANSACTION_END, b"T\0", transaction_id=7)
    send_all(protocol)
    protocol.lost(GONE)
    with pytest.raises(OutcomeUnknown, match="commit"):
        commit.outcome()


def test_watches_are_registered_again_before_anything_else(protocol: ClientProtocol) -> None:
    subscription, sink = watching(protocol)
    read = submit(protocol, Op.READ)
    protocol.lost(GONE)
    protocol.connected()
    protocol.lost(GONE)  # also when that is lost too
    protocol.connected()
    sent = send_all(protocol)
    assert [packet[0] for packet in sent] == [Op.WATCH, Op.READ]
    assert sent[0][3] == b"/a\0%b\0" % subscription.wire_token.encode()
    protocol.receive(encode(Op.WATCH, sent[0][1], 0, ACK))
    protocol.receive(encode(Op.WATCH_EVENT, 0, 0, sent[0][3]))
    assert sink.seen == ["/a"]
    assert not read.done


def test_a_watch_that_waits_for_its_reply_is_registered_once(protocol: ClientProtocol) -> None:
    subscription = Subscription(Sink(), "/a", "token", protocol.new_token(), 2)
    request = subscription.watch()
    protocol.submit(request)
    [first] = send_all(protocol)
    protocol.lost(GONE)
    protocol.connected()
    assert send_all(protocol) == [first]
    assert first[3].endswith(b"\x002\0")


def test_a_watch_that_cannot_be_registered_again_ends_its_queue(protocol: ClientProtocol) -> None:
    subscription, sink = watching(protocol)
    protocol.lost(GONE)
    protocol.connected()
    [again] = send_all(protocol)
    protocol.receive(encode(Op.ERROR, again[1], 0, b"ENOSPC\0"))
    assert sink.seen == ["end QuotaReached"]
    assert subscription.wire_token not in protocol.subscriptions


def test_a_watch_that_is_taken_away_goes_with_the_connection(protocol: ClientProtocol) -> None:
    subscription, sink = watching(protocol)
    other, _ = watching(protocol, "/b")
    del protocol.subscriptions[subscription.wire_token]
    sent_before = subscription.unwatch()
    protocol.submit(sent_before)
    send_all(protocol)
    protocol.lost(GONE)
    assert sent_before.outcome() == ACK
    del protocol.subscriptions[other.wire_token]
    while_lost = other.unwatch()
    protocol.submit(while_lost)
    assert while_lost.outcome() == ACK
    protocol.connected()
    assert send_all(protocol) == []
    assert sink.seen == []


def test_reset_forgets_all_watches(protocol: ClientProtocol) -> None:
    _, sink = watching(protocol)
    reset = submit(protocol, Op.RESET_WATCHES, b"")
    send_all(protocol)
    protocol.lost(GONE)
    protocol.connected()
    watch, again = send_all(protocol)
    protocol.receive(encode(Op.WATCH, watch[1], 0, ACK) + encode(Op.RESET_WATCHES, again[1], 0, ACK))
    assert reset.outcome() == ACK
    assert sink.seen == ["forget"]
    assert protocol.subscriptions == {}


def test_a_start_that_nobody_waits_for_is_aborted(protocol: ClientProtocol) -> None:
    start = submit(protocol, Op.TRANSACTION_START, b"\0")
    send_all(protocol)
    protocol.abandon_start(start)
    protocol.receive(encode(Op.TRANSACTION_START, start.request_id, 0, b"9\0"))
    [abort] = send_all(protocol)
    assert (abort[0], abort[2], abort[3]) == (Op.TRANSACTION_END, 9, b"F\0")


@pytest.mark.parametrize(
    "stream",
    [
        encode(Op.READ, 77, 0, b"reply to nobody"),
        encode(Op.READ, 1, 0, b"")[:12] + (4097).to_bytes(4, "little"),
        b"\xff" * 64,
    ],
    ids=["unknown request", "too long", "garbage"],
)
def test_a_peer_that_breaks_the_protocol_is_an_error(protocol: ClientProtocol, stream: bytes) -> None:
    submit(protocol, Op.READ)
    send_all(protocol)
    with pytest.raises(PeerError):
        protocol.receive(stream)
    protocol.lost(GONE)
    protocol.connected()
    [again] = send_all(protocol)
    protocol.receive(encode(Op.READ, again[1], 0, b"right"))


def test_a_reply_to_another_operation_is_an_error_of_that_call(protocol: ClientProtocol) -> None:
    request = submit(protocol, Op.READ)
    send_all(protocol)
    protocol.receive(encode(Op.MKDIR, request.request_id, 0, ACK))
    with pytest.raises(PeerError, match="READ"):
        request.outcome()


@pytest.mark.parametrize("payload", [b"", b"/a", b"/a\0nobody\0", b"\xff\0\xff\0", b"\0\0\0"])
def test_events_for_nobody_are_harmless(protocol: ClientProtocol, payload: bytes) -> None:
    _, sink = watching(protocol)
    protocol.receive(encode(Op.WATCH_EVENT, 0, 0, payload))
    assert sink.seen == []


def test_without_another_connection_the_first_is_the_last() -> None:
    protocol = ClientProtocol(reconnects=False)
    _, sink = watching(protocol)
    waits = [submit(protocol, op) for op in (Op.READ, Op.WRITE)]
    protocol.lost(GONE)
    waits.append(submit(protocol, Op.READ))
    for request in waits:
        with pytest.raises(StoreGone):
            request.outcome()
    assert sink.seen == ["end StoreGone"]
    with pytest.raises(StoreGone):
        protocol.check()


def test_the_end_is_told_to_all_who_wait(protocol: ClientProtocol) -> None:
    _, sink = watching(protocol)
    request = submit(protocol, Op.READ)
    protocol.end(Closed("closed"))
    protocol.end(GONE)
    protocol.lost(GONE)
    with pytest.raises(Closed):
        request.outcome()
    assert sink.seen == ["end Closed"]


def test_requests_leave_nothing_behind(protocol: ClientProtocol) -> None:
    """Their numbers go round for ever, and are not remembered."""
    tracemalloc.start()
    try:
        for n in range(5000):
            if n == 100:
                before = tracemalloc.get_traced_memory()[0]
            request = submit(protocol, Op.READ)
            send_all(protocol)
            protocol.receive(encode(Op.READ, request.request_id, 0, b"value"))
            assert request.request_id == n + 1
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()
    protocol._requests = itertools.count(2**32 - 3)
    assert [submit(protocol, Op.READ).request_id for _ in range(4)] == [2**32 - 2, 2**32 - 1, 1, 2]


def test_a_request_longer_than_a_packet_is_never_sent(protocol: ClientProtocol) -> None:
    request = submit(protocol, Op.WRITE, b"x" * 4097)
    with pytest.raises(XenstoreError) as caught:
        request.outcome()
    assert caught.value.name == "E2BIG"
    assert not protocol.has_output


def test_patience_ends_and_begins_anew() -> None:
    patience = Patience(10.0, 0.0)
    patience.lost(100.0, answered=False)  # the first connection counts
    delays = [patience.next_delay_s(100.0) for _ in range(20)]
    assert delays[:4] == [0.0, 0.002, 0.004, 0.008]
    assert delays[-1] == 0.5
    assert patience.next_delay_s(109.9) == pytest.approx(0.1)
    patience.connected(109.9)
    patience.lost(109.95, answered=False)  # broke at once
    assert patience.next_delay_s(109.95) == pytest.approx(0.05)
    assert patience.next_delay_s(110.0) is None
    for answered, lost_at in ((True, 109.95), (False, 112.0)):
        patience.connected(109.9)
        patience.lost(lost_at, answered=answered)
        assert patience.next_delay_s(lost_at) == 0.0
        assert patience.next_delay_s(lost_at + 9.9) is not None


@given(st.lists(st.binary(max_size=40) | st.just(encode(Op.WATCH_EVENT, 0, 0, b"/a\x001\0")), max_size=8))
def test_any_bytes_of_a_daemon_are_a_reply_or_a_peer_error(chunks: list[bytes]) -> None:
    protocol = ClientProtocol(reconnects=True)
    watching(protocol)
    requests = [submit(protocol, op) for op in (Op.READ, Op.WRITE, Op.RESET_WATCHES)]
    send_all(protocol)
    try:
        for chunk in chunks:
            protocol.receive(chunk)
    except PeerError:
        protocol.lost(GONE)
        protocol.connected()
        assert send_all(protocol)
    for request in requests:
        if request.done:
            with contextlib.suppress(ParavirtError):
                request.outcome()


STEPS = st.lists(
    st.tuples(st.just("ask"), st.sampled_from([Op.READ, Op.WRITE, Op.RM, Op.GET_PERMS]))
    | st.tuples(st.just("send"), st.integers(1, 60))
    | st.tuples(st.just("serve"), st.integers(1, 4))
    | st.tuples(st.just("break"), st.just(0)),
    max_size=40,
)


@given(STEPS)
def test_nothing_runs_twice_that_must_not_and_nothing_is_forgotten(steps: list[tuple[str, int]]) -> None:
    """A daemon that runs what reaches it whole, and answers some of it, over connections that break anywhere."""
    protocol = ClientProtocol(reconnects=True)
    requests: list[Request] = []
    ran: list[bytes] = []
    parser, unanswered = PacketParser(), list[Packet]()
    for step, argument in [*steps, ("break", 0), ("send", 1 << 20), ("serve", 1 << 20)]:
        if step == "ask":
            requests.append(submit(protocol, Op(argument), b"%d\0" % len(requests)))
        elif step == "send":
            data = protocol.take_output()[:argument]
            protocol.give_back(len(data))
            packets = parser.feed(data)
            ran += [packet[3] for packet in packets]
            unanswered += packets
        elif step == "serve":
            for op, request_id, _, _ in unanswered[:argument]:
                protocol.receive(encode(op, request_id, 0, ACK))
            del unanswered[:argument]
        else:
            protocol.lost(GONE)
            parser, unanswered = PacketParser(), []
            protocol.connected()
    for request in requests:
        assert request.done
        times = ran.count(request.payload)
        if request.error is not None:
            assert isinstance(request.error, OutcomeUnknown)
            assert request.op not in REPEATED
            assert times <= 1
        elif request.op not in REPEATED:
            assert times == 1
        else:
            assert times >= 1
