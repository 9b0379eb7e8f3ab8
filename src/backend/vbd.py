# SPDX-License-Identifier: MIT
"""The backend half of one block device: its image, its offer, its engines.

Source: Xen public/io/blkif.h.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from paravirt.backend.connection import Connection
from paravirt.backend.device import BackendDevice, Layout, RingPlaces, RingPolicy
from paravirt.backend.disks import Disk, open_disk
from paravirt.backend.disks.serial import SerialDisk
from paravirt.backend.engine import EngineFactory, EngineStatistics, Terms, VbdEngine, total
from paravirt.errors import AlreadyExists, InvalidRequest, ParavirtError
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol import blkif
from paravirt.protocol.blkif import SECTOR_BYTES, Operation
from paravirt.protocol.vbd import REQUEST_KEYS, X86_32_ABI, VbdConfig, VbdOffer, VbdRequest, queue_keys
from paravirt.protocol.vbd_qos import QOS_KEYS, Qos
from paravirt.protocol.xenbus import DevicePath, XenbusState
from paravirt.ring.vbd_throttle import Throttle
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

CONFIG_KEYS = ("params", "mode", "dev", "device-type", "type", "removable", "discard-enable")
LOCK_PATIENCE_S = 0.5  # how long an image may stay locked before that is reported as an error
LOCK_RETRY_S = 0.02
LOCK_LATE_RETRY_S = 0.5

# What may change while a frontend is connected.
LIVE_KEYS = ("sectors", "feature-barrier", "feature-flush-cache", "feature-discard")


@dataclass(frozen=True, slots=True)
class Policy:
    """What all devices of a service share."""

    engine: EngineFactory
    rings: RingPolicy
    max_indirect_segments: int = blkif.DEFAULT_INDIRECT_SEGMENTS
    max_queues: int = 1
    persistent: bool = False


class VbdBackend(BackendDevice[EngineStatistics]):
    """The backend half of one vbd."""

    messages = (blkif.REQUEST, blkif.RESPONSE)
    message_protocol = blkif.NAME

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        on_failure: Callable[[BackendDevice[EngineStatistics]], None],
        *,
        policy: Policy,
    ) -> None:
        super().__init__(hypervisor, store, path, on_failure, rings=policy.rings)
        self._policy = policy
        self._disk: Disk | None = None
        self._shared: Disk | None = None  # the same disk, as engines beside each other may call it
        self._config: VbdConfig | None = None
        self._sectors = 0
        self._throttle: Throttle | None = None  # made with the first look at its keys
        self._qos_keys: dict[str, str] = {}  # as they were found last, well or not
        self._persistent = False  # both ends have said so
        self._unsupported: set[Operation] = set()  # the disk has turned out not to have them
        self._lock_deadline: float | None = None
        self._said_locked = False

    def _prepare(self) -> dict[str, str] | None:
        if self._disk is None and not self._open_disk():
            return None
        self._look_at_qos()
        return self._make_offer().to_keys()

    def _make_offer(self) -> VbdOffer:
        disk, config = self._disk, self._config
        assert disk is not None
        assert config is not None
        # A file that was emptied is no disk of no sectors: what is read of it fails.
        self._sectors = disk.current_size() // SECTOR_BYTES or self._sectors
        gone = self._unsupported
        can_flush = Operation.FLUSH_DISKCACHE not in gone
        return VbdOffer(
            sectors=self._sectors,
            sector_size=disk.sector_size,
            physical_sector_size=disk.physical_sector_size,
            read_only=disk.read_only,
            flush=can_flush,
            barrier=can_flush and not disk.read_only and Operation.WRITE_BARRIER not in gone,
            discard=disk.can_discard and config.discard and not disk.read_only and Operation.DISCARD not in gone,
            discard_granularity=disk.discard_granularity_bytes,
            discard_alignment=disk.discard_alignment_bytes,
            discard_secure=disk.can_discard_secure,
            max_indirect_segments=self._policy.max_indirect_segments,
            persistent=self._policy.persistent,
            removable=config.removable or disk.removable,
            cdrom=config.device_type == "cdrom" or disk.cdrom,
            max_queues=self._policy.max_queues,
        )

    def _open_disk(self) -> bool:
        self.retry_at = None
        keys = xenbus.read_keys(self._store, self.path.backend, CONFIG_KEYS)
        if self._is_refused(keys):
            return False
        try:
            config = VbdConfig.from_keys(keys)
            self._disk = open_disk(config.driver, config.spec, read_only=config.mode == "r")
            self._shared = self._disk if self._disk.many_threads else SerialDisk(self._disk)
            self._config = config
        except AlreadyExists as error:
            self._await_lock(error)
            return False
        except (ParavirtError, OSError) as error:
            self._refuse(keys, error)
            return False
        self._lock_deadline, self._said_locked = None, False
        return True

    def _await_lock(self, error: AlreadyExists) -> None:
        """After a crash the kernel may still be finishing the writes of our predecessor: look again, however long it
        takes, but say so when it takes long.
        """
        now = time.monotonic()
        self._lock_deadline = self._lock_deadline or now + LOCK_PATIENCE_S
        late = now >= self._lock_deadline
        if late and not self._said_locked:
            self._said_locked = True
            self._hotplug_error(error)
        self.retry_at = now + (LOCK_LATE_RETRY_S if late else LOCK_RETRY_S)

    def _read_request(self) -> VbdRequest:
        max_queues, directory = self._policy.max_queues, self.path.frontend
        keys = xenbus.read_keys(self._store, directory, REQUEST_KEYS)
        n_queues = VbdRequest.count_queues(keys, max_queues)
        if n_queues > 1:
            keys |= xenbus.read_keys(self._store, directory, queue_keys(n_queues))
        request = VbdRequest.from_keys(keys, max_queues=max_queues)
        self._persistent = self._policy.persistent and request.persistent
        return request

    def _layouts(self, request: RingPlaces) -> tuple[Layout, Layout]:
        x86_32 = isinstance(request, VbdRequest) and request.protocol == X86_32_ABI
        return (blkif.X86_32_REQUEST if x86_32 else blkif.REQUEST), blkif.RESPONSE

    def _make_engine(self, connection: Connection) -> VbdEngine:
        disk = self._disk if len(self._connections) == 1 else self._shared
        assert disk is not None
        terms = Terms(
            offer=self._make_offer(),
            on_failure=self.fail if len(self._connections) == 1 else partial(self._queue_failed, connection.queue),
            on_unsupported=self._withdraw,
            x86_32=connection.ring.request == blkif.X86_32_REQUEST,
            spin_ns=self._rings.max_spin_ns,
            persistent=self._persistent,
            throttle=self._throttle,
        )
        return self._policy.engine(connection, disk, terms)

    def _queue_failed(self, queue: int, error: ParavirtError) -> None:
        """From the thread of one of several engines: the device cannot go on."""
        self.fail(ParavirtError(f"queue {queue}: {error}"))

    def _total(self, queues: Sequence[EngineStatistics]) -> EngineStatistics:
        return total(queues)

    @property
    def _vbd_engines(self) -> list[VbdEngine]:
        """Those that `_make_engine` has made."""
        return cast(list[VbdEngine], self._engines)

    def _withdraw(self, operation: Operation) -> None:
        """From an engine's thread: the disk does not have it. The service's thread says so to the others and to the
        frontend.
        """
        self._unsupported.add(operation)
        self._on_failure(self)

    def _look_at_qos(self) -> None:
        """Hold the disk to what the toolstack allows it; what is not well leaves it as it was."""
        keys = xenbus.read_keys(self._store, self.path.backend, QOS_KEYS)
        throttle = self._throttle = self._throttle or Throttle()
        if keys == self._qos_keys:
            return
        self._qos_keys = keys
        try:
            qos = Qos.from_keys(keys)
        except InvalidRequest as error:
            log.warning("%s: %s; its limits stay as they were", self.path.backend, error)
            return
        throttle.set(qos.requests, qos.requests_burst, qos.bytes, qos.bytes_burst)
        log.info("%s: %s", self.path.backend, str(qos) or "no limits")

    def _look_again(self) -> None:
        """Publish a size that has changed, and what the disk has turned out not to have."""
        if self._disk is None:
            return
        self._look_at_qos()
        gone = frozenset(self._unsupported)
        try:
            offer = self._make_offer()
        except OSError as error:
            self._complain(f"the size of the disk cannot be told: {error}")
            return
        wanted, found = offer.to_keys(), xenbus.read_keys(self._store, self.path.backend, LIVE_KEYS)
        changed = {name: wanted[name] for name in LIVE_KEYS if wanted[name] != found.get(name)}
        if not changed:
            return
        log.info("%s: %s", self.path.backend, ", ".join(f"{name} is now {value}" for name, value in changed.items()))
        for engine in self._vbd_engines:
            engine.resize(offer.sectors)
            for operation in gone:
                engine.withdraw(operation)
        # With the state once more, unchanged: that is how a frontend is told to look.
        xenbus.announce(self._store, self.path.backend, XenbusState.CONNECTED, changed)

    def _release(self) -> None:
        if self._disk is not None:
            self._disk.close()
            self._disk = self._shared = None
        self._unsupported.clear()
