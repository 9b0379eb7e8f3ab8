# SPDX-License-Identifier: MIT
"""Two implementations of what a chain of transmit requests says, the C core's and one in Python, are held against each
other: thousands of chains, good ones, good ones that were changed, and noise.
"""

import random
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from paravirt.backend import netif_chain
from paravirt.protocol.netif import TX_REQUEST, Extra, Fatal, Status, TxFlag
from paravirt.ring.netif import Chain, parse_chain

Requests = NDArray[np.void]
EDGES = [0, 1, 13, 14, 15, 60, 127, 128, 4095, 4096, 4097, 8192, 65534, 65535]


def row(gref: int, offset: int, flags: int, id: int, size: int) -> Requests:
    return np.array([(gref, offset, flags, id, size)], TX_REQUEST)


def extra(kind: int, content: bytes = b"", *, flags: int = 0) -> Requests:
    return np.frombuffer((bytes([kind, flags]) + content.ljust(6, b"\0")).ljust(12, b"\x5a"), TX_REQUEST)


def some_extra(random_: random.Random, *, more: bool) -> Requests:
    kind = random_.choice([Extra.GSO] * 3 + [Extra.MCAST_ADD, Extra.MCAST_DEL] + [Extra.HASH, Extra.XDP] * 3)
    content = random_.randbytes(6)
    if kind == Extra.HASH and random_.random() < 0.7:
        content = bytes([random_.randrange(5), random_.randrange(2)]) + content[2:]
    if kind == Extra.GSO:
        content = random_.choice([1, 536, 1448, 65535]).to_bytes(2, "little") + bytes([random_.choice([1, 2])])
    return extra(kind, content, flags=int(more))


def good_chain(random_: random.Random) -> Requests:
    """That every backend takes."""
    n_extras, following = random_.choice([0, 0, 0, 1, 1, 2, 3, 9]), random_.choice([0, 0, 1, 2, 5, 17, 18])
    sizes = [random_.choice([0, 1, 64, 1000, 3500]) for _ in range(following)]
    own = random_.choice([14, 60, 128, 1514])
    flags = random_.choice([0, 1, 2, 3]) | (TxFlag.EXTRA_INFO if n_extras else 0)
    parts = [row(random_.randrange(1 << 32), 0, flags | (4 if following else 0), random_.randrange(1 << 16), own)]
    parts[0]["size"] += sum(sizes)
    parts += [some_extra(random_, more=i < n_extras - 1) for i in range(n_extras)]
    for i, size in enumerate(sizes):
        offset = random_.choice([0, 4096 - size])
        parts.append(row(random_.randrange(1 << 32), offset, 4 if i < following - 1 else 0, i, size))
    return np.concatenate(parts)


def changed(random_: random.Random, chain: Requests) -> Requests:
    """With a few fields, bytes or rows that are other ones."""
    chain = chain.copy()
    for _ in range(random_.randrange(1, 4)):
        at = random_.randrange(len(chain)) if len(chain) else -1
        match random_.randrange(8) if at >= 0 else 7:
            case 0:
                chain["size"][at] = random_.choice(EDGES)
            case 1:
                chain["offset"][at] = random_.choice(EDGES)
            case 2:
                chain["flags"][at] ^= 1 << random_.randrange(4)
            case 3:
                chain.view(np.uint8)[random_.randrange(len(chain) * 12)] = random_.randrange(256)
            case 4:
                chain = chain[:at]
            case 5:
                chain = np.concatenate([chain[:at], chain[at:], chain[at:]])
            case 6:
                chain.view(np.uint8)[at * 12 + 2 : at * 12 + 4] = 0
            case _:
                chain = np.concatenate([chain, noise(random_)])
    return chain


def noise(random_: random.Random) -> Requests:
    chain = np.frombuffer(random_.randbytes(12 * random_.randrange(40)), TX_REQUEST).copy()
    chain["flags"] &= random_.choice([4, 15, 0xFFFF])
    chain["flags"] |= random_.choice([0, 4])
    chain["size"] %= random_.choice([1, 100, 4097, 65535])
    chain["offset"] %= random_.choice([1, 100, 65535])
    return chain


def kind_of(said: Chain | int) -> str:
    if isinstance(said, int):
        return Fatal(said).name if said else "unfinished"
    return "wish" if said.mcast else Status(said.status).name


@pytest.mark.parametrize("seed", range(8))
def test_both_say_the_same_of_good_bad_and_random_chains(seed: int) -> None:
    random_ = random.Random(seed)
    seen = Counter[str]()
    for _ in range(1500):
        chain = good_chain(random_)
        chain = random_.choice([chain, changed(random_, chain), changed(random_, chain), noise(random_)])
        expected = netif_chain.parse_chain(chain)
        assert parse_chain(chain) == expected, chain.tolist()
        seen[kind_of(expected)] += 1
    assert set(seen) == {"OKAY", "ERROR", "wish", "unfinished", *(reason.name for reason in Fatal)} - {
        "SHORT",
        "NO_EXTRA",
    }


@pytest.mark.parametrize("seed", range(4))
def test_good_chains_are_taken_whole(seed: int) -> None:
    random_ = random.Random(1000 + seed)
    for _ in range(300):
        chain = good_chain(random_)
        said = parse_chain(np.concatenate([chain, noise(random_)]))
        assert isinstance(said, Chain)
        assert said.status == Status.OKAY
        if not said.mcast:
            assert said.n_requests == len(chain)
            assert sum(piece.n_bytes for piece in said.pieces) == said.n_bytes == chain["size"][0]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_cut_short_takes_nothing_and_what_follows_changes_nothing(seed: int) -> None:
    """Whatever a chain is, a shorter beginning of it has not ended, or is fatal for the same reason."""
    random_ = random.Random(2000 + seed)
    for _ in range(300):
        chain = changed(random_, good_chain(random_))
        whole = parse_chain(chain)
        for n in range(len(chain)):
            part = parse_chain(chain[:n])
            assert part == netif_chain.parse_chain(chain[:n])
            assert part in (0, whole)
        if whole != 0:
            assert parse_chain(np.concatenate([chain, noise(random_)])) == whole


def test_a_wish_to_add_beats_one_to_remove_and_the_last_of_a_type_counts() -> None:
    first = row(1, 0, TxFlag.EXTRA_INFO, 7, 60)
    one, two, three = (bytes([1, 0, 0x5E, 0, 0, i]) for i in range(3))
    for kinds, expected in [
        ([(Extra.MCAST_ADD, one), (Extra.MCAST_DEL, two)], (Extra.MCAST_ADD, one)),
        ([(Extra.MCAST_DEL, two), (Extra.MCAST_ADD, one)], (Extra.MCAST_ADD, one)),
        ([(Extra.MCAST_DEL, two), (Extra.MCAST_DEL, three)], (Extra.MCAST_DEL, three)),
        ([(Extra.GSO, bytes(6)), (Extra.MCAST_DEL, three)], (Extra.MCAST_DEL, three)),
    ]:
        slots = [extra(kind, content, flags=int(i < len(kinds) - 1)) for i, (kind, content) in enumerate(kinds)]
        chain = np.concatenate([first, *slots])
        assert parse_chain(chain) == Chain(3, 2, mcast=expected[0], mcast_address=expected[1])
        assert netif_chain.parse_chain(chain) == parse_chain(chain)
    gso = np.concatenate([first, extra(Extra.GSO, bytes(6), flags=1), extra(Extra.GSO, b"\xe8\3\1")])
    said = parse_chain(gso)
    assert isinstance(said, Chain)
    assert (said.gso_size, said.gso_type) == (1000, 1)


def test_segments_of_what_is_dropped_are_not_looked_at() -> None:
    chain = np.concatenate([row(1, 0, TxFlag.EXTRA_INFO, 7, 13), extra(Extra.GSO, bytes(6))])
    assert parse_chain(chain) == netif_chain.parse_chain(chain) == Chain(2, 1, status=Status.ERROR)
    chain["size"][0] = 14
    assert parse_chain(chain) == netif_chain.parse_chain(chain) == Fatal.GSO_SIZE


def test_a_hash_is_read_and_one_that_nobody_knows_is_passed_over() -> None:
    first = row(1, 0, TxFlag.EXTRA_INFO, 7, 60)
    for content, expected in [
        (b"\x00\x01\x78\x56\x34\x12", (0, 0x12345678)),
        (b"\x03\x01\xff\xff\xff\xff", (3, 0xFFFFFFFF)),
        (b"\x04\x01\x78\x56\x34\x12", None),  # no such type
        (b"\x00\x00\x78\x56\x34\x12", None),  # of no algorithm
    ]:
        chain = np.concatenate([first, extra(Extra.HASH, content)])
        said = parse_chain(chain)
        assert isinstance(said, Chain)
        assert said.status == Status.OKAY
        assert said.hash == expected
        assert netif_chain.parse_chain(chain) == said
    again = [extra(Extra.HASH, b"\0\1\1\0\0\0", flags=1), extra(Extra.HASH, b"\x09\1\1\0\0\0")]
    last = parse_chain(np.concatenate([first, *again]))
    assert isinstance(last, Chain)
    assert last.hash is None


def test_extra_information_is_bounded_by_a_ring_of_one_page() -> None:
    first = row(1, 0, TxFlag.EXTRA_INFO, 7, 60)
    slots = [extra(Extra.XDP, flags=1)] * 234
    for n, expected in [(8, 10), (234, 236)]:
        said = parse_chain(np.concatenate([first, *slots[:n], extra(Extra.XDP)]))
        assert isinstance(said, Chain)
        assert (said.n_requests, said.n_extras, said.status) == (expected, n + 1, Status.OKAY)
    chain = np.concatenate([first, *slots, slots[0], extra(Extra.XDP)])
    assert parse_chain(chain) == netif_chain.parse_chain(chain) == Fatal.EXTRA
