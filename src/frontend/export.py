# SPDX-License-Identifier: MIT
"""A block device of a domain as an NBD export, for programs that know nothing of Xen.

This process follows xenstore, as for any frontend. The data path is another process, nbdkit with a plugin in C
(c_ext/nbdkit_plugin.c): it has a connection to the hypervisor of its own, and so the arena, the ring and the event
channel, and no Python between an NBD client and the ring. When the backend dies, what clients have asked for is sent
again to the next one: they see a pause.
"""

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, ParavirtError, PeerError, PeerGone
from paravirt.frontend.device import FrontendDevice
from paravirt.frontend.disk_device import CONNECT_TIMEOUT_S, DEFAULT_RING_PAGE_ORDER, DEFAULT_SPIN_NS, ORDER_KEY
from paravirt.frontend.domain import Domain
from paravirt.frontend.nbdkit import DEFAULT_THREADS, Nbdkit
from paravirt.frontend.requests import max_request_bytes
from paravirt.protocol import blkif
from paravirt.protocol.blkif import SECTOR_BYTES
from paravirt.protocol.keys import FENCE_KEY, number
from paravirt.protocol.vbd import OFFER_KEYS, VbdOffer, VbdRequest, device_number
from paravirt.ring import blkdisk
from paravirt.ring.blkdisk import Counters, Kind, Shape
from paravirt.ring.waiting import Wait, spin_limit
from paravirt.xenstore import xenbus

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_BACKLOG = 64


def listen_unix(path: Path) -> socket.socket:
    """A listening socket at a new `path`, for this user alone; whoever made it removes it.

    A socket there that nobody listens on any more is replaced. Raises `AlreadyExists`, `InvalidRequest`.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        if path.is_socket() and not _is_served(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"{path} exists already") from error
        raise InvalidRequest(f"no socket can be made at {path}: {error.strerror or error}") from error
    finally:
        os.umask(before)
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) != errno.ECONNREFUSED


def listen_tcp(port: int) -> socket.socket:
    """A listening socket on the loopback interface; 0: any free port. Raises `AlreadyExists`, `InvalidRequest`."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"port {port} of {LOOPBACK} is in use") from error
        raise InvalidRequest(f"nobody can listen on port {port}: {error}") from error
    return listener


def broker_of_environment() -> int:
    """Another connection of this domain to the hypervisor, for nbdkit; the descriptor is the caller's."""
    path = os.environ.get("PARAVIRT_SOCKET", "")
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connected.connect(path)
    except OSError as error:
        connected.close()
        raise NotFound(f"no further connection to the hypervisor at {path or '$PARAVIRT_SOCKET'}: {error}") from error
    return connected.detach()


class DiskExport:
    """An open block device that NBD clients read and write. A context manager."""

    def __init__(
        self,
        domain: Domain,
        name: str,
        listener: socket.socket,
        broker_fd: int,
        *,
        threads: int = DEFAULT_THREADS,
        read_only: bool = False,
        ring_page_order: int = DEFAULT_RING_PAGE_ORDER,
        max_segments: int = blkif.DEFAULT_INDIRECT_SEGMENTS,
        spin_ns: int = DEFAULT_SPIN_NS,
        wait: Wait = "adaptive",
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Open the disk and serve it on `listener`. `broker_fd`: a second connection of the domain to the hypervisor.

        Both descriptors stay the caller's. `threads`: requests that one client can have in flight; the rest as
        `frontend.vbd.Disk`. Raises `NotFound` (no such disk; nbdkit or its plugin is not installed), `AlreadyExists`
        while it is open, and as `FrontendDevice.start`.
        """
        if not 0 <= ring_page_order <= blkif.MAX_RING_PAGE_ORDER:
            raise InvalidRequest(f"ring_page_order is {ring_page_order}, not from 0 to {blkif.MAX_RING_PAGE_ORDER}")
        self.name = name
        self._store = domain.store
        there = domain.disks()
        if name not in there:
            raise NotFound(f"domain {domain.domid} has no disk {name} (it has: {', '.join(there) or 'none'})")
        self._path = domain.locate("vbd", device_number(name))
        self._wanted_order, self._order = ring_page_order, -1
        self._max_segments = max_segments
        self._max_spin_ns = spin_limit(wait, spin_ns)
        self._offer: VbdOffer | None = None
        self._max_bytes = 0
        self._connects = 0
        self._error: ParavirtError | None = None
        self._closed = False
        self._ended = threading.Event()
        self._device = FrontendDevice(self._store, self._path, self)
        self._nbdkit = Nbdkit(
            listener,
            broker_fd,
            threads=threads,
            read_only=read_only,
            on_complaint=lambda text: self._device.fail(PeerError(text)),
            on_end=self._ended.set,
        )
        try:
            self._device.start(timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of nbdkit."""
        return self._nbdkit.pid

    @property
    def size_bytes(self) -> int:
        """Of the disk, now. A client that is connected goes by what it was when it came."""
        return self._offer.sectors * SECTOR_BYTES if self._offer else 0

    @property
    def reconnects(self) -> int:
        """Times a new backend was connected."""
        return max(0, self._connects - 1)

    def statistics(self) -> Counters:
        """What was asked of the backend. Raises `PeerGone`."""
        return self._nbdkit.do(blkdisk.plain(Kind.COUNT), "nbdkit cannot count").counters

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call this from a thread when the export has come to an end by itself; at once if it has."""

        def run() -> None:
            self._ended.wait()
            callback()

        threading.Thread(target=run, name="export-end", daemon=True).start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it ends by itself: then raises why, `PeerGone` or `PeerError`. False when the time is over."""
        if not self._ended.wait(timeout_s):
            return False
        if self._closed:
            return True
        status = self._nbdkit.wait(1.0)
        raise self._error or PeerGone(f"nbdkit has ended (status {status})")

    def close(self) -> None:
        """Answer what is under way, end nbdkit, close the device. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._nbdkit.close(failing=blkdisk.fail(errno.ESHUTDOWN))
        self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DiskExport {self.name} of domain {self._path.frontend_domid}, {self.size_bytes} bytes>"

    # -- the driver's part of xenbus: called from the device's thread

    def negotiate(self, backend: str) -> dict[str, str]:
        """A new ring and port, as the backend's offer allows."""
        keys = xenbus.read_keys(self._store, backend, (ORDER_KEY, FENCE_KEY))
        max_order = min(number(keys, ORDER_KEY, 0), blkif.MAX_RING_PAGE_ORDER)
        if self._order < 0:
            self._order = min(self._wanted_order, max_order)
        if max_order < self._order:
            raise PeerError(f"the new backend takes rings of {1 << max_order} pages only")
        asked = blkdisk.make(self._path.backend_domid, self._order, self._max_spin_ns)
        made = self._nbdkit.do(asked, f"no ring for disk {self.name}")
        request = VbdRequest.single(made.refs, made.port).to_keys()
        return {**request, FENCE_KEY: "full"} if keys.get(FENCE_KEY) else request

    def connect(self, backend: str) -> None:
        """Go: what was in flight is sent again on the new ring."""
        offer = VbdOffer.from_keys(xenbus.read_keys(self._store, backend, OFFER_KEYS))
        n_slots = blkif.ring_entries(self._order)
        max_bytes = max_request_bytes(n_slots, min(offer.max_indirect_segments, self._max_segments))
        before, known = self._offer, self._max_bytes
        if max_bytes < known:
            raise PeerError(f"a new backend takes requests of {max_bytes} bytes, the last one of {known}")
        if before is not None and offer.sector_size != before.sector_size:
            raise PeerError(f"a new backend has sectors of {offer.sector_size} bytes, not {before.sector_size}")
        self._max_bytes = known or max_bytes
        self._offer = offer
        self._nbdkit.do(blkdisk.shape(Kind.GO, self._shape(offer)), f"disk {self.name} cannot be used")
        self._connects += 1

    def refresh(self, backend: str) -> None:
        """Take over another size, and what the disk can no longer do."""
        self._offer = offer = VbdOffer.from_keys(xenbus.read_keys(self._store, backend, OFFER_KEYS))
        self._nbdkit.do(blkdisk.shape(Kind.RESHAPE, self._shape(offer)), f"disk {self.name} cannot become that")

    def _shape(self, offer: VbdOffer) -> Shape:
        return Shape(
            size_bytes=offer.sectors * SECTOR_BYTES,
            sector_size=offer.sector_size,
            physical_sector_size=offer.physical_sector_size or offer.sector_size,
            max_request_bytes=self._max_bytes,
            read_only=offer.read_only,
            flush=offer.flush,
            barrier=offer.barrier,
            discard=offer.discard,
        )

    def pause(self) -> None:
        """Let go of ring and port; what is in flight stays with nbdkit."""
        try:
            self._nbdkit.ask(blkdisk.plain(Kind.PAUSE))
        except ParavirtError as error:
            log.debug("%s: nothing to pause: %s", self._path.frontend, error)

    def closed(self, error: ParavirtError | None) -> None:
        """No answer will come any more: clients are told, and nbdkit ends."""
        self._error = error or PeerGone(f"the backend of disk {self.name} has closed")
        try:
            self._nbdkit.ask(blkdisk.fail(errno.ESHUTDOWN))
        except ParavirtError as failure:
            log.debug("%s: nobody to tell: %s", self._path.frontend, failure)
        self._nbdkit.terminate()
