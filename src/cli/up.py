# SPDX-License-Identifier: MIT
"""`paravirt up` and daemons it is made of, each of which also runs alone; xenstored has a file of its own."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paravirt.cli.context import Context, pass_context
from paravirt.host import log
from paravirt.host.daemon import StopRequest, become_daemon, raise_descriptor_limit, serve
from paravirt.host.supervise import Daemon, DaemonFailed, Supervisor
from paravirt.protocol.vbd import MAX_QUEUES
from paravirt.protocol.vif import MAX_QUEUES as MAX_VIF_QUEUES
from paravirt.ring.waiting import Fence

if TYPE_CHECKING:
    from paravirt.backend.c_engine import EngineName

EXIT_LOST = 1
"""`up` was stopped, but a daemon had died before."""

memory_option = click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(1),
    metavar="MIB",
    help="Shared memory that all domains together may have (else half of what is available).",
)

disk_driver_option = click.option(
    "--disk-driver",
    "disk_drivers",
    multiple=True,
    metavar="NAME=MODULE:CLASS",
    help="Serve disks of this class, found in the directory you are in, too, as NAME; may be given several times.",
)

max_queues_option = click.option(
    "--max-queues",
    type=click.IntRange(1, MAX_QUEUES),
    metavar="N",
    help="Queues that a domain may have for a device (else one a CPU); those of a disk have a thread each.",
)

persistent_option = click.option(
    "--persistent",
    is_flag=True,
    help="Keep what domains have granted for disks mapped from one request to the next, where they do that, too.",
)


engine_option = click.option(
    "--engine",
    type=click.Choice(["auto", "c", "python"]),
    default="auto",
    show_default=True,
    help="What serves disks: threads in C, or Python; auto: C where the disk allows it (c: others are refused).",
)


@click.command()
@memory_option
@click.option(
    "--journal",
    type=Path,
    metavar="DIR",
    help="Where xenstored keeps its tree; it is then started again if it dies (else it ends with its tree).",
)
@click.option(
    "--device",
    "drivers",
    multiple=True,
    metavar="MODULE:CLASS",
    help="Serve the devices of this DeviceBackend, too; may be given several times.",
)
@disk_driver_option
@max_queues_option
@engine_option
@persistent_option
@pass_context
def up(
    context: Context,
    memory_mib: int | None,
    journal: Path | None,
    drivers: tuple[str, ...],
    disk_drivers: tuple[str, ...],
    max_queues: int | None,
    engine: "EngineName",
    persistent: bool,
) -> None:
    """Start a host: hypervisor, xenstored and backends, in the foreground.

    One line on standard output says that it is ready. Ctrl-C or SIGTERM stops it and leaves nothing behind.
    """
    rundir = context.rundir
    log.configure("up", context.log_level, context.log_file)
    raise_descriptor_limit()
    with Supervisor(_program(context)) as supervisor:
        supervisor.stop_on_signals()
        rundir.create()
        with ExitStack() as stack:
            stack.callback(rundir.remove)
            stack.enter_context(rundir.lock("host"))
            rundir.sweep()
            stack.callback(rundir.sweep)
            stack.callback(supervisor.stop)
            options = _disk_options(disk_drivers, max_queues, engine, persistent)
            for daemon in _daemons(memory_mib, journal, drivers, options, max_queues):
                _start(supervisor, daemon)
            if not supervisor.stopping:
                click.echo(f"host {context.host} is up, run directory {rundir.path}; Ctrl-C stops it")
                sys.stdout.flush()
            supervisor.watch()
    if supervisor.lost:
        sys.exit(EXIT_LOST)


def _daemons(
    memory_mib: int | None,
    journal: Path | None,
    drivers: tuple[str, ...],
    disk_options: tuple[str, ...],
    max_queues: int | None,
) -> tuple[Daemon, ...]:
    """In the order in which they are started."""
    memory = () if memory_mib is None else ("--memory", str(memory_mib))
    queues = () if max_queues is None else ("--max-queues", str(max_queues))
    kept = () if journal is None else ("--journal", str(journal.absolute()))
    return (
        Daemon("hypervisor", ("hypervisor", *memory)),
        Daemon("xenstored", ("xenstored", *kept), restart=journal is not None),
        Daemon("backend", ("backend", *disk_options), restart=True),
        Daemon("network backend", ("backend", "--network", *queues), restart=True),
        *(Daemon(f"backend {driver}", ("backend", "--device", driver), restart=True) for driver in drivers),
    )


def _disk_options(
    disk_drivers: tuple[str, ...], max_queues: int | None, engine: str, persistent: bool
) -> tuple[str, ...]:
    """Of the backend of disks."""
    drivers = [argument for driver in disk_drivers for argument in ("--disk-driver", driver)]
    queues = [] if max_queues is None else ["--max-queues", str(max_queues)]
    return (*drivers, *queues, "--engine", engine, *(["--persistent"] if persistent else []))


def _start(supervisor: Supervisor, daemon: Daemon) -> None:
    if supervisor.stopping:
        return
    try:
        supervisor.start(daemon)
    except DaemonFailed as error:
        if error.status == 2:
            sys.exit(2)  # it has said why
        raise


def _program(context: Context) -> list[str]:
    options = ["--host", context.host, "--run", str(context.rundir.path), "--log-level", context.log_level]
    if context.log_file is not None:
        options += ["--log-file", str(Path(context.log_file).absolute())]
    return [sys.executable, "-P", "-m", "paravirt", *options]


@click.command()
@memory_option
@pass_context
def hypervisor(context: Context, memory_mib: int | None) -> None:
    """Run the hypervisor broker alone."""
    with daemon_role(context, "hypervisor") as request:
        from paravirt.hypervisor.server import BrokerServer

        budget_bytes = None if memory_mib is None else memory_mib << 20
        serve(BrokerServer(context.rundir.path, budget_bytes=budget_bytes), request)


@click.command()
@click.option(
    "--spin-us",
    default=30.0,
    show_default=True,
    help="How long to watch an empty ring at most before sleeping; 0: not at all, from 10000 on: for ever.",
)
@click.option(
    "--fence",
    type=click.Choice(["full", "host"]),
    default="full",
    show_default=True,
    help="host: frontends that take part push without a barrier. Only where all of them are trusted.",
)
@click.option(
    "--device",
    metavar="MODULE:CLASS",
    help="Serve the devices of this DeviceBackend (found in the directory you are in, too) instead of disks.",
)
@click.option("--network", is_flag=True, help="Serve network devices, and the bridges they are on, instead of disks.")
@disk_driver_option
@max_queues_option
@engine_option
@persistent_option
@pass_context
def backend(
    context: Context,
    spin_us: float,
    fence: Fence,
    device: str | None,
    network: bool,
    disk_drivers: tuple[str, ...],
    max_queues: int | None,
    engine: "EngineName",
    persistent: bool,
) -> None:
    """Run one backend alone: of disks, network devices, or a device class of your own."""
    if network:
        if device is not None or disk_drivers:
            raise click.UsageError("--network serves nothing else: one backend for each kind")
        _serve_network(context, int(spin_us * 1000), fence, max_queues)
        return
    from paravirt.backend.disks import own

    for disk_driver in disk_drivers:
        own.load(disk_driver)
    driver, role, spin_ns = None, "backend", int(spin_us * 1000)
    if device is not None:
        from paravirt.backend.driver_service import DriverService, load_driver

        driver = load_driver(device)
        role = f"backend-{driver.protocol.name}"
    with ExitStack() as stack:
        request = stack.enter_context(daemon_role(context, role))
        connection = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store(reconnect=True))
        from paravirt.backend.c_engine import engine_factory
        from paravirt.backend.service import BackendService

        if driver is None:
            service = BackendService(
                connection,
                store,
                engine=engine_factory(engine),
                spin_ns=spin_ns,
                fence=fence,
                max_queues=max_queues,
                persistent=persistent,
            )
            serve(service, request)
        else:
            serve(DriverService(connection, store, driver, spin_ns=spin_ns, fence=fence), request)


def _serve_network(context: Context, spin_ns: int, fence: Fence, max_queues: int | None) -> None:
    from paravirt.backend.bridge_door import BridgeDoor
    from paravirt.backend.vif_service import VifService

    with ExitStack() as stack:
        request = stack.enter_context(daemon_role(context, "backend-vif"))
        connection = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store(reconnect=True))
        most = None if max_queues is None else min(max_queues, MAX_VIF_QUEUES)
        service = VifService(connection, store, spin_ns=spin_ns, fence=fence, max_queues=most)
        stack.enter_context(BridgeDoor(context.rundir.network_socket, service.bridges.all))
        serve(service, request)


@contextmanager
def daemon_role(context: Context, role: str, *, needs_place: bool = True) -> Iterator[StopRequest]:
    """Be this host's only `role`; the run directory goes with the last one in it."""
    request = become_daemon()
    log.configure(role, context.log_level, context.log_file)
    if not needs_place:
        yield request
        return
    context.rundir.create()
    try:
        with context.rundir.lock(role):
            yield request
    finally:
        context.rundir.remove()
