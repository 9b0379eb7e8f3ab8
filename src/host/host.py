# SPDX-License-Identifier: MIT
"""A whole host inside one process: hypervisor, xenstored and backends as threads of the caller's.

The same classes as the daemons use, in other shells. Everything shares one address space, so no isolation is claimed:
this is for embedding, tests and benchmarks.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paravirt.backend.bridge import Bridge
from paravirt.backend.c_engine import EngineName, engine_factory
from paravirt.backend.capture import Capture
from paravirt.backend.driver import DeviceBackend
from paravirt.backend.driver_engine import DriverStatistics
from paravirt.backend.driver_service import DriverService
from paravirt.backend.engine import EngineFactory, EngineStatistics
from paravirt.backend.service import DEFAULT_SPIN_NS, BackendService
from paravirt.backend.vif import VifStatistics
from paravirt.backend.vif_service import VifService
from paravirt.errors import Closed, InvalidRequest, NotFound
from paravirt.frontend.domain import Domain
from paravirt.frontend.export import DiskExport, listen_unix
from paravirt.frontend.nbdkit import DEFAULT_THREADS
from paravirt.host import device as devices
from paravirt.host import domains, vbd, vif
from paravirt.host.disk_statistics import LiveDisk, disk_statistics
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.server import BrokerServer
from paravirt.protocol.bridge_state import BridgeState, CaptureWish
from paravirt.protocol.device import to_keys
from paravirt.protocol.vbd import DeviceType, Mode
from paravirt.protocol.vbd_qos import Qos
from paravirt.protocol.vif import DEFAULT_BRIDGE, DEFAULT_MTU, Rate, bridge_name
from paravirt.protocol.vif_port import PortConfig
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.waiting import Fence, Wait
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer


class Host:
    """The host. `with paravirt.Host() as host: ...`; on close everything it started is gone."""

    def __init__(
        self,
        *,
        engine: EngineName | EngineFactory = "auto",
        spin_ns: int = DEFAULT_SPIN_NS,
        fence: Fence = "full",
        wait: Wait = "adaptive",
        max_queues: int | None = None,
        persistent: bool = False,
    ) -> None:
        """`spin_ns`: how long backends watch an empty ring at most before they sleep. `wait`: as long as that pays
        ("adaptive"), always ("spin") or never ("sleep").

        `fence`: "process" lets both ends of a ring push without a barrier, and who goes to sleep pays: for many
        requests in flight. See `paravirt.ring.waiting.Fence`. `max_queues`: that a domain may have for a disk; None: as
        many as there are CPUs. `persistent`: grants of disks stay mapped from one request to the next.

        `engine`: of block devices; "auto" is in C where the disk allows it. See `paravirt.backend.c_engine`.
        """
        make = engine_factory(engine) if isinstance(engine, str) else engine
        self._max_queues = max_queues
        self._rings: dict[str, Any] = {"spin_ns": spin_ns, "fence": fence, "wait": wait}
        with ExitStack() as stack:
            self._broker = BrokerServer()
            self._broker.start()
            stack.callback(self._broker.stop)
            store_hypervisor = stack.enter_context(self._connect(0))
            store = XenstoreServer(hypervisor=store_hypervisor)
            store.start()
            stack.callback(store.stop)
            self.hypervisor = stack.enter_context(self._connect(0))
            self.store = stack.enter_context(XenstoreClient.from_socket(store.connect()))
            self._backend = BackendService(
                self.hypervisor,
                self.store,
                engine=make,
                max_queues=max_queues,
                persistent=persistent,
                **self._rings,
            )
            stack.enter_context(self._backend)
            self._vifs: VifService | None = None
            stack.callback(self._stop_vifs)
            self._services: dict[str, DriverService] = {}
            stack.callback(self._stop_services)
            self._domains: list[Domain] = []
            stack.callback(self._close_domains)
            self._stack: ExitStack | None = stack.pop_all()

    def _connect(self, domid: int) -> Hypervisor:
        return Hypervisor.from_fd(self._broker.connect(domid))

    @property
    def domains(self) -> tuple[Domain, ...]:
        """Those that were created here and not destroyed."""
        return tuple(self._domains)

    def create_domain(self, name: str, *, max_pages: int | None = None) -> Domain:
        """A new domain, seen from inside. `AlreadyExists` for a name in use. `max_pages`: that it may share."""
        self._check_open()
        info = domains.create(self.hypervisor, self.store, name, isolated=False, max_pages=max_pages)
        domain = Domain(self._connect(info.domid))
        self._domains.append(domain)
        return domain

    def destroy_domain(self, domain: Domain) -> None:
        """End a domain and tear its devices down. `NotFound` when it is none of `domains`."""
        self._check_open()
        if domain not in self._domains:
            raise NotFound(f"{domain!r} is no domain of this host, or was destroyed already")
        domain.close()
        self._domains.remove(domain)
        domains.destroy(self.hypervisor, self.store, domain.domid)

    def attach_disk(
        self,
        domain: Domain,
        spec: str | os.PathLike[str],
        *,
        device: str = "xvda",
        driver: str = "file",
        mode: Mode = "w",
        device_type: DeviceType = "disk",
        removable: bool = False,
        discard: bool = True,
        trusted: bool = True,
        qos: Qos | None = None,
    ) -> DevicePath:
        """Give a domain a disk; arguments and errors as `paravirt.host.vbd.attach`."""
        self._check_open()
        return vbd.attach(
            self.store,
            domain.domid,
            os.fspath(spec),
            device=device,
            driver=driver,
            mode=mode,
            device_type=device_type,
            removable=removable,
            discard=discard,
            trusted=trusted,
            qos=qos,
        )

    def resize_disk(self, domain: Domain, device: str = "xvda") -> None:
        """The image has grown or shrunk: its domain shall hear of it. `NotFound` when there is none."""
        self._check_open()
        vbd.resize(self.store, domain.domid, device)

    def limit_disk(self, domain: Domain, device: str = "xvda", qos: Qos | None = None) -> None:
        """How much it may do a second from now on; None: as much as it can. `NotFound` when there is none."""
        self._check_open()
        vbd.limit(self.store, domain.domid, device, qos or Qos())

    def detach_disk(self, domain: Domain, device: str = "xvda") -> None:
        """Take it away; `NotFound` when there is none."""
        self._check_open()
        vbd.detach(self.store, domain.domid, device)

    @contextmanager
    def export_disk(
        self,
        domain: Domain,
        path: Path,
        device: str = "xvda",
        *,
        threads: int = DEFAULT_THREADS,
        read_only: bool = False,
    ) -> Iterator[DiskExport]:
        """Serve a disk of a domain to NBD clients on a Unix socket at `path`, which is removed at the end.

        Errors as `frontend.export.listen_unix` and `DiskExport`.
        """
        self._check_open()
        with ExitStack() as stack:
            listener = stack.enter_context(listen_unix(path))
            stack.callback(path.unlink, missing_ok=True)
            broker_fd = self._broker.connect(domain.domid)
            stack.callback(os.close, broker_fd)
            yield stack.enter_context(
                DiskExport(domain, device, listener, broker_fd, threads=threads, read_only=read_only)
            )

    def attach_vif(
        self,
        domain: Domain,
        handle: int = 0,
        *,
        mac: str | None = None,
        bridge: str = DEFAULT_BRIDGE,
        mtu: int = DEFAULT_MTU,
        rate: Rate | None = None,
        port: PortConfig | None = None,
    ) -> DevicePath:
        """Give a domain a network device; arguments and errors as `paravirt.host.vif.attach`. The first one starts the
        backend of network devices.
        """
        self._check_open()
        self._have_vifs()
        return vif.attach(
            self.store, domain.domid, handle=handle, mac=mac, bridge=bridge, mtu=mtu, rate=rate, port=port
        )

    def limit_vif(self, domain: Domain, handle: int = 0, rate: Rate | None = None) -> None:
        """How much its guest may send from now on; None: as much as it likes. `NotFound` when there is none."""
        self._check_open()
        vif.set_rate(self.store, domain.domid, handle, rate)

    def configure_vif(self, domain: Domain, handle: int, port: PortConfig) -> None:
        """How the switch treats it from now on. `NotFound` when there is none."""
        self._check_open()
        vif.set_port(self.store, domain.domid, handle, port)

    def detach_vif(self, domain: Domain, handle: int = 0) -> None:
        """Take it away; `NotFound` when there is none."""
        self._check_open()
        vif.detach(self.store, domain.domid, handle)

    @contextmanager
    def bridge(self, name: str = DEFAULT_BRIDGE) -> Iterator[Bridge]:
        """The bridge of this name, made if there is none, and kept as long as this is open: for ports of the caller's
        own, interfaces of the kernel, counters.
        """
        self._check_open()
        bridges = self._have_vifs().bridges
        bridge = bridges.take(bridge_name(name))
        try:
            yield bridge
        finally:
            bridges.give_back(bridge)

    def vif_statistics(self) -> dict[DevicePath, VifStatistics]:
        """Counters of every connected network device, as its backend sees it."""
        return {} if self._vifs is None else self._vifs.statistics()

    def bridge_states(self) -> list[BridgeState]:
        """What every bridge says of itself: ports with counters and queues, addresses that were learnt."""
        return [] if self._vifs is None else [bridge.state() for bridge in self._vifs.bridges.all()]

    @contextmanager
    def capture(self, wish: CaptureWish, bridge: str = DEFAULT_BRIDGE) -> Iterator[Capture]:
        """What passes ports of a bridge, as the pieces of a capture file (`Capture.chunks`); at the end it is over.
        Errors as `Bridge.capture`.
        """
        with self.bridge(bridge) as found:
            capture = found.capture(wish)
            try:
                yield capture
            finally:
                found.uncapture(capture)

    def _have_vifs(self) -> VifService:
        if self._vifs is None:
            self._vifs = VifService(self.hypervisor, self.store, max_queues=self._max_queues, **self._rings)
            self._vifs.start()
        return self._vifs

    def _stop_vifs(self) -> None:
        if self._vifs is not None:
            self._vifs.stop()

    def attach(self, domain: Domain, driver: type[DeviceBackend], device_id: int = 0, **config: Any) -> DevicePath:
        """Give a domain a device of a class of one's own; `config` are the fields of the protocol's `config`.

        The first device of a class starts its backend. Errors as `paravirt.host.device.attach`; `InvalidRequest` when
        another class of that name is served.
        """
        self._check_open()
        protocol = driver.protocol
        service = self._services.get(protocol.name)
        if service is None:
            service = DriverService(self.hypervisor, self.store, driver, **self._rings)
            service.start()
            self._services[protocol.name] = service
        if service.driver_class is not driver:
            raise InvalidRequest(f"{protocol.name} is served by {service.driver_class.__name__} here")
        try:
            keys = to_keys(protocol.config(**config))
        except TypeError as error:
            raise InvalidRequest(f"configuration of {protocol.name}: {error}") from error
        path = DevicePath(protocol.name, domain.domid, device_id)
        return devices.attach(self.store, path, keys, name=f"{protocol.name} {device_id}")

    def detach(self, domain: Domain, driver: type[DeviceBackend], device_id: int = 0) -> None:
        """Take it away; `NotFound` when there is none."""
        self._check_open()
        kind = driver.protocol.name
        devices.detach(self.store, DevicePath(kind, domain.domid, device_id), name=f"{kind} {device_id}")

    def driver_statistics(self, driver: type[DeviceBackend]) -> dict[DevicePath, DriverStatistics]:
        """Counters of every connected device of a class, as its backend sees it."""
        service = self._services.get(driver.protocol.name)
        return {} if service is None else service.statistics()

    def backend_statistics(self) -> dict[DevicePath, EngineStatistics]:
        """Counters of every connected disk, as the backend sees it."""
        return self._backend.statistics()

    def disk_statistics(self) -> list[LiveDisk]:
        """What both ends of every disk in use have done, queue by queue, with latencies."""
        self._check_open()
        return disk_statistics(self.hypervisor)

    def close(self) -> None:
        """Stop everything, devices first. Harmless when repeated."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _close_domains(self) -> None:
        for domain in self._domains:
            domain.close()

    def _stop_services(self) -> None:
        for service in self._services.values():
            service.stop()

    def _check_open(self) -> None:
        if self._stack is None:
            raise Closed("this host is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
