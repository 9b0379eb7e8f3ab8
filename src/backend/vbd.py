# SPDX-License-Identifier: MIT
"""The backend half of one block device: its image, its offer, its engine.

Source: Xen public/io/blkif.h.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from paravirt.backend.connection import Connection
from paravirt.backend.device import BackendDevice, RingPolicy
from paravirt.backend.disks import Disk, open_disk
from paravirt.backend.engine import Engine, EngineFactory, EngineStatistics
from paravirt.errors import AlreadyExists, ParavirtError
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol import blkif
from paravirt.protocol.keys import RING_KEYS
from paravirt.protocol.vbd import VbdConfig, VbdOffer, VbdRequest
from paravirt.protocol.xenbus import DevicePath
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

CONFIG_KEYS = ("params", "mode", "dev", "device-type", "type")
REQUEST_KEYS = (*RING_KEYS, "protocol", "multi-queue-num-queues")
LOCK_PATIENCE_S = 0.5  # how long an image may stay locked before that is reported as an error
LOCK_RETRY_S = 0.02
LOCK_LATE_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Policy:
    """What all devices of a service share."""

    engine: EngineFactory
    rings: RingPolicy


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
        self._lock_deadline: float | None = None
        self._said_locked = False

    def _prepare(self) -> dict[str, str] | None:
        if self._disk is None and not self._open_disk():
            return None
        assert self._disk is not None
        return VbdOffer(
            sectors=self._disk.size_bytes // blkif.SECTOR_BYTES,
            sector_size=self._disk.sector_size,
            read_only=self._disk.read_only,
        ).to_keys()

    def _open_disk(self) -> bool:
        self.retry_at = None
        keys = xenbus.read_keys(self._store, self.path.backend, CONFIG_KEYS)
        if self._is_refused(keys):
            return False
        try:
            config = VbdConfig.from_keys(keys)
            self._disk = open_disk(config.driver, config.spec, read_only=config.mode == "r")
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
        return VbdRequest.from_keys(xenbus.read_keys(self._store, self.path.frontend, REQUEST_KEYS))

    def _make_engine(self, connection: Connection) -> Engine:
        assert self._disk is not None
        return self._policy.engine(connection, self._disk, spin_ns=self._rings.max_spin_ns, on_failure=self.fail)

    def _release(self) -> None:
        if self._disk is not None:
            self._disk.close()
            self._disk = None
