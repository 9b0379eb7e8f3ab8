# SPDX-License-Identifier: MIT
"""vif negotiation as values: what each side writes to xenstore, and what it makes of the other side's keys.

Pure: `to_keys()` gives relative node names and texts, `from_keys()` takes the other end's and trusts none of it.
Source: Xen public/io/netif.h; names of queues and defaults as in Linux' xen-netback and xen-netfront.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from paravirt.errors import InvalidRequest, PeerError
from paravirt.protocol.keys import Keys, RingRequest, number
from paravirt.protocol.netif import MAX_RING_PAGE_ORDER, Mac

MAX_QUEUES = 64
DEFAULT_BRIDGE = "xenbr0"
DEFAULT_MTU = 1500
MIN_MTU, MAX_MTU = 68, 65521
QUEUES_KEY = "multi-queue-num-queues"
CTRL_REF_KEY = "ctrl-ring-ref"
CTRL_PORT_KEY = "event-channel-ctrl"
HEADROOM_KEY = "xdp-headroom"
MAX_HEADROOM = 2048
"""Bytes that a frontend may want free before what comes. Xen allows more, for which there is no room in a page."""
ORDER_KEY = "paravirt-max-ring-page-order"
"""Ours: the largest order of a ring that the backend takes. Absent: rings of one page, as Xen's."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", re.ASCII)
_MAC = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", re.ASCII)


def parse_mac(text: str) -> Mac:
    """Of a station: `InvalidRequest` for anything else."""
    if not _MAC.fullmatch(text):
        raise InvalidRequest(f"{text[:40]!r} is no address such as 00:16:3e:01:02:03")
    mac = Mac(bytes.fromhex(text.replace(":", "")))
    if mac.is_group or not any(mac):
        raise InvalidRequest(f"{text} is not the address of one station")
    return mac


def default_mac(domid: int, handle: int) -> Mac:
    """Of a vif that nobody gave one: in Xen's range, the same for the same domain and number."""
    return Mac(bytes((0x00, 0x16, 0x3E, domid >> 8 & 0x7F, domid & 0xFF, handle & 0xFF)))


def bridge_name(text: str) -> str:
    """A name for a bridge; `InvalidRequest`."""
    if not _NAME.fullmatch(text):
        raise InvalidRequest(f"{text[:40]!r} is no name of a bridge (letters, digits, . _ -, at most 32)")
    return text


@dataclass(frozen=True, slots=True)
class Rate:
    """How much a guest may send: `bytes` in each window of `window_us`; what is unused adds up to a burst."""

    bytes: int
    window_us: int = 50_000

    def __str__(self) -> str:
        return f"{self.bytes},{self.window_us}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """As in the key `rate`: "bytes,microseconds". `InvalidRequest` for anything else."""
        match = re.fullmatch(r"([0-9]{1,19}),([0-9]{1,9})", text, re.ASCII)
        if match is None or not 0 < int(match[1]) < 1 << 63 or not int(match[2]):
            raise InvalidRequest(f"rate is {text[:40]!r}, not BYTES,MICROSECONDS")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def per_second(cls, n_bytes: int) -> Self:
        """So many bytes a second, in windows of 50 ms."""
        if not 0 < n_bytes < 1 << 50:
            raise InvalidRequest(f"{n_bytes} bytes a second are no rate")
        return cls(max(1, n_bytes // 20))


@dataclass(frozen=True, slots=True)
class VifConfig:
    """What the toolstack writes into the backend's directory: the wish."""

    mac: Mac
    bridge: str = DEFAULT_BRIDGE
    handle: int = 0
    mtu: int = DEFAULT_MTU
    rate: Rate | None = None

    def to_keys(self) -> Keys:
        """Nodes of the backend's directory besides the xenbus ones."""
        keys = {
            "mac": str(self.mac),
            "bridge": self.bridge,
            "handle": str(self.handle),
            "mtu": str(self.mtu),
            "type": "vif",
            "script": "",
        }
        return keys | ({"rate": str(self.rate)} if self.rate else {})

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """The wish in a backend directory. Written by Dom0, still checked: `InvalidRequest`."""
        mtu = keys.get("mtu", str(DEFAULT_MTU))
        if not (mtu.isascii() and mtu.isdigit() and len(mtu) < 6 and MIN_MTU <= int(mtu) <= MAX_MTU):
            raise InvalidRequest(f"mtu is {mtu[:40]!r}, not a number from {MIN_MTU} to {MAX_MTU}")
        handle = keys.get("handle", "0")
        if not (handle.isascii() and handle.isdigit() and len(handle) < 10):
            raise InvalidRequest(f"handle is {handle[:40]!r}, not a number")
        return cls(
            parse_mac(keys.get("mac", "")),
            bridge_name(keys.get("bridge", DEFAULT_BRIDGE)),
            int(handle),
            int(mtu),
            Rate.from_text(keys["rate"]) if keys.get("rate") else None,
        )


MULTICAST_KEY = "request-multicast-control"
CONFIG_KEYS = ("mac", "bridge", "handle", "mtu", "rate")


@dataclass(frozen=True, slots=True)
class VifOffer:
    """What the backend publishes before INIT_WAIT: what it takes from the guest, and gives it."""

    sg: bool = True
    gso_tcpv4: bool = True
    gso_tcpv6: bool = True
    ipv6_csum: bool = True
    split_channels: bool = True
    multicast_control: bool = True
    dynamic_multicast: bool = True
    """It may be switched on and off while the device is connected."""
    ctrl_ring: bool = True
    xdp_headroom: bool = True
    max_queues: int = 1
    max_ring_page_order: int = MAX_RING_PAGE_ORDER

    def to_keys(self) -> Keys:
        return {
            "feature-rx-copy": "1",
            "feature-rx-flip": "0",
            "feature-sg": str(int(self.sg)),
            "feature-gso-tcpv4": str(int(self.gso_tcpv4)),
            "feature-gso-tcpv6": str(int(self.gso_tcpv6)),
            "feature-ipv6-csum-offload": str(int(self.ipv6_csum)),
            "feature-split-event-channels": str(int(self.split_channels)),
            "feature-multicast-control": str(int(self.multicast_control)),
            "feature-dynamic-multicast-control": str(int(self.dynamic_multicast)),
            "feature-ctrl-ring": str(int(self.ctrl_ring)),
            "feature-xdp-headroom": str(int(self.xdp_headroom)),
            "multi-queue-max-queues": str(self.max_queues),
            ORDER_KEY: str(self.max_ring_page_order),
        }

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """What a frontend makes of the backend's directory; `PeerError` where it cannot be used."""
        if number(keys, "feature-rx-copy", 0) == 0:
            raise PeerError("the backend does not copy to its guests (feature-rx-copy), and pages cannot be flipped")
        return cls(
            sg=_flag(keys, "feature-sg"),
            gso_tcpv4=_flag(keys, "feature-gso-tcpv4"),
            gso_tcpv6=_flag(keys, "feature-gso-tcpv6"),
            ipv6_csum=_flag(keys, "feature-ipv6-csum-offload"),
            split_channels=_flag(keys, "feature-split-event-channels"),
            multicast_control=_flag(keys, "feature-multicast-control"),
            dynamic_multicast=_flag(keys, "feature-dynamic-multicast-control"),
            ctrl_ring=_flag(keys, "feature-ctrl-ring"),
            xdp_headroom=_flag(keys, "feature-xdp-headroom"),
            max_queues=max(1, min(number(keys, "multi-queue-max-queues", 1), MAX_QUEUES)),
            max_ring_page_order=min(number(keys, ORDER_KEY, 0), MAX_RING_PAGE_ORDER),
        )


def _flag(keys: Mapping[str, str], name: str) -> bool:
    return number(keys, name, 0) != 0


OFFER_KEYS = tuple(VifOffer().to_keys())


@dataclass(frozen=True, slots=True)
class VifQueue:
    """Rings and ports of one queue. With one channel for both rings the ports are the same."""

    tx_refs: tuple[int, ...]
    rx_refs: tuple[int, ...]
    tx_port: int
    rx_port: int

    def to_keys(self) -> Keys:
        keys = {}
        for name, refs in (("tx", self.tx_refs), ("rx", self.rx_refs)):
            if len(refs) == 1:
                keys[f"{name}-ring-ref"] = str(refs[0])
            else:
                keys[f"{name}-ring-page-order"] = str(len(refs).bit_length() - 1)
                keys |= {f"{name}-ring-ref{i}": str(ref) for i, ref in enumerate(refs)}
        if self.tx_port == self.rx_port:
            return {**keys, "event-channel": str(self.tx_port)}
        return {**keys, "event-channel-tx": str(self.tx_port), "event-channel-rx": str(self.rx_port)}

    @classmethod
    def from_keys(cls, keys: Mapping[str, str], *, max_ring_page_order: int) -> Self:
        """Keys without the name of the queue before them; `PeerError`."""
        refs = [_refs(keys, name, max_ring_page_order) for name in ("tx", "rx")]
        every = refs[0] + refs[1]
        if len(set(every)) != len(every):
            raise PeerError(f"the rings name one page twice: their references are {', '.join(map(str, every))}")
        if "event-channel" in keys and "event-channel-tx" not in keys:
            ports = [_port(keys, "event-channel")] * 2
        else:
            ports = [_port(keys, "event-channel-tx"), _port(keys, "event-channel-rx")]
        return cls(refs[0], refs[1], *ports)

    @property
    def ring_refs(self) -> tuple[int, ...]:
        """Of the transmit ring."""
        return self.tx_refs

    @property
    def of_tx(self) -> RingRequest:
        return RingRequest(self.tx_refs, self.tx_port)

    @property
    def of_rx(self) -> RingRequest:
        return RingRequest(self.rx_refs, self.rx_port)


def _refs(keys: Mapping[str, str], name: str, max_order: int) -> tuple[int, ...]:
    order_key = f"{name}-ring-page-order"
    if order_key not in keys:
        return (number(keys, f"{name}-ring-ref"),)
    order = number(keys, order_key, maximum=max_order)
    return tuple(number(keys, f"{name}-ring-ref{i}") for i in range(1 << order))


def _port(keys: Mapping[str, str], name: str) -> int:
    port = number(keys, name)
    if port == 0:
        raise PeerError(f"{name} is 0, which is no port")
    return port


_QUEUE_KEYS = (
    *(f"{name}-ring-ref" for name in ("tx", "rx")),
    *(f"{name}-ring-page-order" for name in ("tx", "rx")),
    *(f"{name}-ring-ref{i}" for name in ("tx", "rx") for i in range(1 << MAX_RING_PAGE_ORDER)),
    "event-channel",
    "event-channel-tx",
    "event-channel-rx",
)
_FEATURE_KEYS = (
    QUEUES_KEY,
    "request-rx-copy",
    "feature-rx-notify",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    MULTICAST_KEY,
    CTRL_REF_KEY,
    CTRL_PORT_KEY,
    HEADROOM_KEY,
)
REQUEST_KEYS = (*_FEATURE_KEYS, *_QUEUE_KEYS)


def queue_keys(n_queues: int) -> Iterable[str]:
    """What `VifRequest.from_keys` looks at beside `REQUEST_KEYS`, with several queues."""
    return (f"queue-{i}/{key}" for i in range(n_queues) for key in _QUEUE_KEYS)


@dataclass(frozen=True, slots=True)
class VifRequest:
    """What a frontend publishes with INITIALISED, or CONNECTED."""

    queues: tuple[VifQueue, ...]
    rx_notify: bool = True
    sg: bool = True
    gso_tcpv4: bool = True
    gso_tcpv6: bool = True
    no_csum: bool = False
    ipv6_csum: bool = True
    multicast_control: bool = False
    ctrl: RingRequest | None = None
    """The control ring."""
    xdp_headroom: int = 0
    """Bytes to be left free before each part of a packet in its page."""
    request_rx_copy: bool = field(default=True)

    def to_keys(self) -> Keys:
        keys = {
            "request-rx-copy": str(int(self.request_rx_copy)),
            "feature-rx-notify": str(int(self.rx_notify)),
            "feature-sg": str(int(self.sg)),
            "feature-gso-tcpv4": str(int(self.gso_tcpv4)),
            "feature-gso-tcpv6": str(int(self.gso_tcpv6)),
            "feature-no-csum-offload": str(int(self.no_csum)),
            "feature-ipv6-csum-offload": str(int(self.ipv6_csum)),
            MULTICAST_KEY: str(int(self.multicast_control)),
        }
        if self.ctrl is not None:
            keys[CTRL_REF_KEY], keys[CTRL_PORT_KEY] = str(self.ctrl.ring_refs[0]), str(self.ctrl.event_channel)
        if self.xdp_headroom:
            keys[HEADROOM_KEY] = str(self.xdp_headroom)
        if len(self.queues) == 1:
            return keys | self.queues[0].to_keys()
        keys[QUEUES_KEY] = str(len(self.queues))
        for i, queue in enumerate(self.queues):
            keys |= {f"queue-{i}/{key}": value for key, value in queue.to_keys().items()}
        return keys

    @classmethod
    def count_queues(cls, keys: Mapping[str, str], max_queues: int) -> int:
        """`PeerError` for none, or more than are offered."""
        n = number(keys, QUEUES_KEY, 1)
        if not 1 <= n <= max_queues:
            raise PeerError(f"{QUEUES_KEY} is {n}, not from 1 to {max_queues}")
        return n

    @classmethod
    def from_keys(
        cls, keys: Mapping[str, str], *, max_queues: int, max_ring_page_order: int = MAX_RING_PAGE_ORDER
    ) -> Self:
        """What a backend makes of the frontend's directory: `PeerError` for anything it cannot serve."""
        if not _flag(keys, "request-rx-copy"):
            raise PeerError("request-rx-copy is not 1: pages cannot be flipped")
        n_queues = cls.count_queues(keys, max_queues)
        queues = []
        for i in range(n_queues):
            own = keys if n_queues == 1 else _of_queue(keys, i)
            try:
                queues.append(VifQueue.from_keys(own, max_ring_page_order=max_ring_page_order))
            except PeerError as error:
                if n_queues == 1:
                    raise
                raise PeerError(f"queue {i}: {error}") from error
        ctrl = _ctrl(keys)
        _check_distinct(queues, ctrl)
        headroom = number(keys, HEADROOM_KEY, 0)
        if not 0 <= headroom <= MAX_HEADROOM:
            raise PeerError(f"{HEADROOM_KEY} is {headroom}, not from 0 to {MAX_HEADROOM}")
        return cls(
            tuple(queues),
            rx_notify=_flag(keys, "feature-rx-notify"),
            sg=_flag(keys, "feature-sg"),
            gso_tcpv4=_flag(keys, "feature-gso-tcpv4"),
            gso_tcpv6=_flag(keys, "feature-gso-tcpv6"),
            no_csum=_flag(keys, "feature-no-csum-offload"),
            ipv6_csum=_flag(keys, "feature-ipv6-csum-offload"),
            multicast_control=_flag(keys, MULTICAST_KEY),
            ctrl=ctrl,
            xdp_headroom=headroom,
        )


def _of_queue(keys: Mapping[str, str], queue: int) -> Keys:
    """The keys of one of several queues, as they are called where there is one."""
    prefix = f"queue-{queue}/"
    return {name.removeprefix(prefix): text for name, text in keys.items() if name.startswith(prefix)}


def _ctrl(keys: Mapping[str, str]) -> RingRequest | None:
    if CTRL_REF_KEY not in keys:
        return None
    return RingRequest((number(keys, CTRL_REF_KEY),), _port(keys, CTRL_PORT_KEY))


def _check_distinct(queues: Iterable[VifQueue], ctrl: RingRequest | None) -> None:
    """A page or a port of one ring is not another's, too."""
    pages = set[int]() if ctrl is None else {*ctrl.ring_refs}
    ports = set[int]() if ctrl is None else {ctrl.event_channel}
    for i, queue in enumerate(queues):
        own_pages, own_ports = {*queue.tx_refs, *queue.rx_refs}, {queue.tx_port, queue.rx_port}
        if pages & own_pages or ports & own_ports:
            raise PeerError(f"queue {i} has a page or a port of another ring")
        pages |= own_pages
        ports |= own_ports
