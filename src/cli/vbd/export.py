# SPDX-License-Identifier: MIT
"""`paravirt vbd export`: a domain's disk as an NBD export."""

import os
import socket
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import click

from paravirt.cli.context import Context, pass_context
from paravirt.cli.run import catch_signals, hand_on
from paravirt.errors import InvalidRequest


@click.command()
@click.argument("disk")
@click.option("--domain", metavar="DOMAIN", help="For Dom0: whose disk it is (a name or number).")
@click.option(
    "--socket", "path", type=click.Path(path_type=Path), metavar="PATH", help="Listen on a Unix socket there."
)
@click.option(
    "--tcp", "port", type=click.IntRange(0, 65535), metavar="PORT", help="Listen on the loopback interface; 0: any."
)
@click.option("--read-only", is_flag=True, help="Let nobody write.")
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="Requests that one client can have in flight.",
)
@click.option(
    "--wait",
    type=click.Choice(["adaptive", "spin", "sleep"]),
    default="adaptive",
    show_default=True,
    help="How a request waits for the backend.",
)
@click.option("--inherited", metavar="URI", hidden=True, help="Standard input listens, at this place.")
@pass_context
def export(
    context: Context,
    disk: str,
    domain: str | None,
    path: Path | None,
    port: int | None,
    read_only: bool,
    threads: int,
    wait: str,
    inherited: str | None,
) -> None:
    """Serve DISK (xvda, xvdb ...) to NBD clients, by nbdkit, until it is stopped.

    In a domain (`paravirt run guest -- paravirt vbd export ...`) it is a disk of that domain, and clients come from
    where the domain's files and its network are. For Dom0, --domain says whose disk it is: nbdkit then runs as a
    process of that domain, isolated as the domain is, and clients come from here. A line says where, once it is served.
    """
    if sum(given is not None for given in (path, port, inherited)) != 1:
        raise InvalidRequest("an export needs --socket PATH or --tcp PORT, one of them")
    options = ["--threads", str(threads), "--wait", wait, *(["--read-only"] if read_only else [])]
    with ExitStack() as stack:
        if inherited is not None:
            listener, uri = stack.enter_context(socket.socket(fileno=os.dup(0))), inherited
        elif path is not None:
            listener, uri = _listen_at(path, stack)
        else:
            listener, uri = _listen_on(port or 0, stack)
        if domain is not None:
            sys.exit(_launch(context, domain, ["vbd", "export", disk, "--inherited", uri, *options], listener))
        _serve(disk, listener, uri, read_only=read_only, threads=threads, wait=wait)


def _listen_at(path: Path, stack: ExitStack) -> tuple[socket.socket, str]:
    from urllib.parse import quote

    from paravirt.frontend.export import listen_unix

    path = path.absolute()
    listener = stack.enter_context(listen_unix(path))

    def remove() -> None:
        with suppress(OSError):
            path.unlink()

    stack.callback(remove)
    return listener, f"nbd+unix:///?socket={quote(str(path))}"


def _listen_on(port: int, stack: ExitStack) -> tuple[socket.socket, str]:
    from paravirt.frontend.export import listen_tcp

    listener = stack.enter_context(listen_tcp(port))
    host, port = listener.getsockname()
    return listener, f"nbd://{host}:{port}"


def _serve(disk: str, listener: socket.socket, uri: str, *, read_only: bool, threads: int, wait: str) -> None:
    """In a process of the domain."""
    from paravirt.frontend.domain import Domain
    from paravirt.frontend.export import DiskExport, broker_of_environment
    from paravirt.host.daemon import StopRequest

    request = StopRequest()
    with ExitStack() as stack:
        domain = stack.enter_context(Domain.from_environment())
        broker = broker_of_environment()
        try:
            served = stack.enter_context(
                DiskExport(domain, disk, listener, broker, read_only=read_only, threads=threads, wait=wait)  # type: ignore[arg-type]
            )
        finally:
            os.close(broker)
        listener.close()  # nbdkit has it: whoever comes after its end is refused
        click.echo(f"{disk} of domain {domain.name} is served at {uri}")
        sys.stdout.flush()
        served.when_ended(request.stop)
        request.wait()
        served.wait(0)


def _launch(context: Context, domain: str, arguments: list[str], listener: socket.socket) -> int:
    """For Dom0: run this command in the domain, with the listening socket as its input; its exit status."""
    from paravirt.host import domains
    from paravirt.host.launch import launch

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        info = domains.find(hypervisor, domain)
        socket_fd = hypervisor.domain_socket(info.domid)
        stack.callback(os.close, socket_fd)
        process = stack.enter_context(
            launch(
                [sys.executable, "-P", "-m", "paravirt", "--log-level", context.log_level, *arguments],
                domid=info.domid,
                hypervisor_fd=socket_fd,
                isolated=info.isolated,
                hide=context.rundir.hidden,
                domain_socket=context.rundir.domain_socket(info.domid),
                directory=Path("/"),
                stdin=listener.fileno(),
            )
        )
        listener.close()
        signals = catch_signals()
        hypervisor.add_process(info.domid, process.pidfd)
        hand_on(signals, process)
        return process.wait()
