# SPDX-License-Identifier: MIT
"""Steps for the comparison of two daemons: few names and values, so that they meet, and many ways to get it wrong."""

from collections.abc import Callable
from itertools import chain
from typing import Final

from hypothesis import strategies as st

from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES, Op, number

from .differential import CLIENTS, DESTROY, PORT, SHUT_DOWN, Step

MISSING_OP: Final = (27, 100, 65535, 0xFFFFFFFF)

NODES: Final = (
    *(b"/a", b"/a/b", b"/a/b/c", b"/a/d", b"/a/d/e", b"/tool", b"/"),
    *(b"/local", b"/local/domain", b"/local/domain/1", b"/local/domain/2"),
    *(b"/local/domain/1/k", b"/local/domain/1/k/l", b"/local/domain/2/k", b"/local/domain/2/k/l"),
    *(b"k", b"k/l", b"m", b"data"),
)
SPECIAL: Final = (b"@introduceDomain", b"@releaseDomain")
LONG: Final = (
    *(b"/" + b"n" * 2047, b"/" + b"n" * 2048, b"/" + b"n" * 3070),
    *(b"/local/domain/1/" + b"n" * n for n in (2047, 2048, 3000)),
    *(b"n" * n for n in (2030, 2047, 2048, 2049)),
    b"/d" * 300,
)
BAD_PATHS: Final = (
    *(b"", b"//", b"/a/", b"/a//b", b"a/", b"/a b", b"/a.b", b"/\xff", b"/a\n", b"~", b"@", b"@other", b"/@x", b"@a b"),
    *(b"/local/domain/", b"/local/domain/1/", b"/" + b"n" * 3071, b"/" + b"n" * 3072, b"n" * 3000),
)
VALUES: Final = (b"", b"v", b"w", b"two\0strings\0", b"x" * 100, b"y" * 1900, b"z" * 2048, b"\xff\0\x01")
ENTRIES: Final = tuple(b"%s%d" % (letter, domid) for letter in (b"n", b"r", b"w", b"b") for domid in (0, 1, 2, 3, 9))
BAD_ENTRIES: Final = (b"", b"n", b"x1", b"r-1", b"r99999", b"r65535", b"b1x", b"R1", b"r 1", b"r32752")
TOKENS: Final = (b"t", b"u", b"", b"token with \xff", b"k" * 4000)
DOMIDS: Final = (
    b"0",
    b"1",
    b"2",
    b"3",
    b"9",
    b"32752",
    b"65535",
    b"65536",
    b"-1",
    b"",
    b"x",
    b"1x",
    b" 1",
    b"99999999",
)

node_paths = st.sampled_from(NODES)
paths = st.integers(0, 9).flatmap(lambda n: node_paths if n else st.sampled_from(SPECIAL + LONG + BAD_PATHS))
entries = st.sampled_from(ENTRIES)
permissions = st.one_of(
    st.lists(entries, min_size=1, max_size=3),
    st.lists(st.one_of(entries, st.sampled_from(BAD_ENTRIES)), max_size=7),
)
tokens = st.one_of(st.sampled_from(TOKENS[:2]), st.sampled_from(TOKENS))
domids = st.sampled_from(DOMIDS)


def words(*parts: bytes) -> bytes:
    """Strings, each with its NUL."""
    return b"".join(part + b"\0" for part in parts)


def not_itself(payload: bytes) -> bool:
    """A domain that is its own target never dies for the C daemon 4.17."""
    domid, target, *_ = payload.split(b"\0")
    return number(domid) != number(target)


one_path = paths.map(words)
watch_paths = st.one_of(node_paths, st.sampled_from(SPECIAL), paths)
PAYLOADS: Final[dict[int, st.SearchStrategy[bytes]]] = {
    Op.CONTROL: st.sampled_from((b"check\0", b"nonsense\0", b"", b"\0", b"log\0on\0", b"print\0text\0")),
    Op.DIRECTORY: one_path,
    Op.READ: one_path,
    Op.GET_PERMS: st.one_of(one_path, st.sampled_from(SPECIAL).map(words)),
    Op.WATCH: st.builds(words, watch_paths, tokens),
    Op.UNWATCH: st.builds(words, watch_paths, tokens),
    Op.TRANSACTION_START: st.just(b"\0"),
    Op.TRANSACTION_END: st.sampled_from((b"T\0", b"T\0", b"T\0", b"F\0", b"X\0", b"TT\0")),
    Op.INTRODUCE: st.sampled_from(
        (
            *(words(b"3", b"1", PORT), words(b"3", b"1", PORT), words(b"3", b"1", b"0"), words(b"3", b"1", b"-1")),
            *(words(b"9", b"1", b"5"), words(b"3", b"1"), words(b"3"), words(b"0", b"1", b"5")),
        )
    ),
    Op.RELEASE: domids.map(words),
    Op.GET_DOMAIN_PATH: domids.map(words),
    Op.WRITE: st.builds(lambda path, value: words(path) + value, paths, st.sampled_from(VALUES)),
    Op.MKDIR: one_path,
    Op.RM: one_path,
    Op.SET_PERMS: st.builds(
        lambda path, entries: words(path, *entries), st.one_of(paths, st.sampled_from(SPECIAL)), permissions
    ),
    Op.WATCH_EVENT: st.builds(words, paths, tokens),
    Op.ERROR: st.just(b"EINVAL\0"),
    Op.IS_DOMAIN_INTRODUCED: domids.map(words),
    Op.RESUME: domids.map(words),
    Op.SET_TARGET: st.builds(words, domids, domids).filter(not_itself),
    Op.RESTRICT: st.just(b"1\0"),
    Op.RESET_WATCHES: st.just(b"\0"),
    Op.DIRECTORY_PART: st.builds(words, paths, st.sampled_from((b"0", b"0", b"2", b"5", b"4000", b"-1", b"x", b""))),
    Op.GET_FEATURE: domids.map(words),
    Op.GET_QUOTA: st.just(b""),
    **{op: st.just(b"") for op in MISSING_OP},
}
OFTEN: Final = (
    *(Op.WRITE, Op.WRITE, Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS, Op.READ, Op.DIRECTORY, Op.GET_PERMS),
    *(Op.WATCH, Op.WATCH, Op.TRANSACTION_START, Op.TRANSACTION_START, Op.TRANSACTION_END, Op.DIRECTORY_PART),
)
TRANSACTIONS: Final = (0, 0, 0, 1, 1, 1, 2, -1)


def torn(payload: bytes, how: int) -> bytes:
    """A payload as no client library sends it."""
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: payload[:-1],
        lambda: payload + b"\0",
        lambda: b"",
        lambda: payload.replace(b"\0", b""),
        lambda: b"\0" + payload,
        lambda: (payload + b"p" * PAYLOAD_MAX_BYTES)[:PAYLOAD_MAX_BYTES],
        lambda: payload + b"extra",
        lambda: payload * 2,
    )
    return ways[how]()[:PAYLOAD_MAX_BYTES]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """A request, well-formed more often than not; rarely the end of a domain."""
    if draw(st.integers(0, 79)) == 79:
        return Step("dom0", draw(st.sampled_from((SHUT_DOWN, DESTROY))), draw(st.sampled_from((b"1", b"2"))))
    client = draw(st.sampled_from(CLIENTS))
    op = int(draw(st.sampled_from(OFTEN if draw(st.integers(0, 5)) else sorted(PAYLOADS))))
    payload = draw(PAYLOADS[op])
    if draw(st.integers(0, 19)) == 19 and op not in (Op.INTRODUCE, Op.SET_TARGET):
        payload = torn(payload, draw(st.integers(0, 7)))
    transaction = 0 if op == Op.TRANSACTION_START else draw(st.sampled_from(TRANSACTIONS))
    if op == Op.RESET_WATCHES:
        transaction = 0  # in a transaction the C daemon 4.17 dies of it (XSA-484)
    return Step(client, op, payload[:PAYLOAD_MAX_BYTES], transaction)


HOT: Final = (b"/a", b"/a/b", b"/a/b/c", b"/a/d", b"/local/domain/1/k")
CHANGES: Final = (Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS)
LOOKS: Final = (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.DIRECTORY_PART)
hot = st.sampled_from(HOT)
clients = st.sampled_from(CLIENTS)


@st.composite
def hot_request(draw: st.DrawFn, ops: tuple[int, ...], client: str, transaction: int = 0) -> Step:
    """A well-formed request for one of few nodes, so that others have to do with it."""
    op, payload = draw(st.sampled_from(ops)), words(draw(hot))
    if op == Op.WRITE:
        payload += draw(st.sampled_from(VALUES[:3]))
    elif op == Op.SET_PERMS:
        payload += words(*draw(st.lists(st.sampled_from((b"n0", b"b0", b"r0", b"n1", b"b2")), min_size=1, max_size=2)))
    elif op == Op.DIRECTORY_PART:
        payload += words(b"0")
    return Step(client, op, payload, transaction)


@st.composite
def changed_during_a_transaction(draw: st.DrawFn) -> list[Step]:
    """A transaction that looks at nodes and changes some, while others do so too."""
    one, other = draw(clients), draw(clients)
    inside = st.lists(hot_request((*LOOKS, *CHANGES), one, 1), min_size=1, max_size=4)
    outside = st.lists(hot_request(CHANGES, other), max_size=2)
    start, end = Step(one, Op.TRANSACTION_START, b"\0"), Step(one, Op.TRANSACTION_END, b"T\0", 1)
    return [start, *draw(inside), *draw(outside), *draw(inside), end]


@st.composite
def watched(draw: st.DrawFn) -> list[Step]:
    """Several watches of one client, and changes that fire more than one of them."""
    watcher, other = draw(clients), draw(clients)
    places = draw(st.lists(st.sampled_from((*HOT, b"/", b"/local", b"k")), min_size=2, max_size=3, unique=True))
    watches = [Step(watcher, Op.WATCH, words(place, draw(st.sampled_from(TOKENS[:2])))) for place in places]
    return [*watches, *draw(st.lists(hot_request(CHANGES, other), min_size=2, max_size=5))]


@st.composite
def with_a_target(draw: st.DrawFn) -> list[Step]:
    """A guest that gets the rights of the other one and uses them."""
    one, other = draw(st.sampled_from(((b"1", b"2"), (b"2", b"1"))))
    node = b"/local/domain/%s/k" % other
    theirs = Step(f"dom{other.decode()}", Op.WRITE, words(node) + b"v")
    mine = st.sampled_from((Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.RM, Op.WRITE)).map(
        lambda op: Step(f"dom{one.decode()}", int(op), words(node))
    )
    return [theirs, Step("dom0", Op.SET_TARGET, words(one, other)), *draw(st.lists(mine, min_size=1, max_size=3))]


def sequences(length: int) -> st.SearchStrategy[list[Step]]:
    """Of up to `length` steps, most of them nearly as long; as pieces, so that they can still shrink to nothing."""
    anything = st.lists(steps(), max_size=12)  # five on average
    piece = st.one_of(anything, changed_during_a_transaction(), watched(), with_a_target())
    return st.tuples(*[piece] * (length // 6)).map(lambda pieces: list(chain.from_iterable(pieces))[:length])
