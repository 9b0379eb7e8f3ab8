# SPDX-License-Identifier: MIT
"""`paravirt info`: what is isolated from what here, and what the kernel gives."""

import platform
from dataclasses import asdict
from typing import Any

import click

from paravirt import __version__
from paravirt.cli.context import Context, emit, emit_json, json_option, pass_context
from paravirt.host.kernel import can_isolate, probe

CLAIMS = {
    "isolated": "a domain reaches only memory, ports, store keys and sockets made for it, and no host process",
    "shared": "NO isolation claim is made: between processes of one uid the kernel protects nothing",
}
PROVIDERS = {"isolated": "memfd (sealed)", "shared": "posix"}


@click.command()
@json_option
@pass_context
def info(context: Context, as_json: bool) -> None:
    """What this host isolates, and what the kernel offers and refuses."""
    offers = probe()
    levels = _levels()
    host = _host(context)
    if as_json:
        kernel = [asdict(offer) for offer in offers]
        emit_json({"version": __version__, "host": host, "isolation": levels, "kernel": kernel})
        return
    click.echo(f"paravirt {__version__}, Python {platform.python_version()}, Linux {platform.release()}")
    state = "running" if host["running"] else "not running"
    click.echo(f"host {host['name']}: {state}, run directory {host['run_directory']}\n")
    emit(
        levels,
        {"level": "Isolation", "possible": "Possible", "memory": "Memory", "claim": "Claim"},
        as_json=False,
    )
    if host["domains"]:
        emit(
            host["domains"],
            {"domid": "Domain", "name": "Name", "level": "Isolation", "claim": "Claim"},
            as_json=False,
        )
    emit(offers, {"name": "Kernel", "offered": "Offered", "detail": "Detail"}, as_json=False)


def _levels() -> list[dict[str, Any]]:
    refused = can_isolate()
    claims = {**CLAIMS, "isolated": CLAIMS["isolated"] if refused is None else f"not possible here: {refused}"}
    return [
        {"level": level, "possible": level == "shared" or refused is None, "memory": PROVIDERS[level], "claim": claim}
        for level, claim in claims.items()
    ]


def _host(context: Context) -> dict[str, Any]:
    running = context.rundir.running
    domains = []
    if running:
        with context.hypervisor() as hypervisor:
            for domain in hypervisor.list_domains():
                level = "isolated" if domain.isolated else "shared"
                domains.append({"domid": domain.domid, "name": domain.name, "level": level, "claim": CLAIMS[level]})
    return {
        "name": context.host,
        "run_directory": str(context.rundir.path),
        "running": running,
        "domains": domains,
    }
