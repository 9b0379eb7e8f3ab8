# SPDX-License-Identifier: MIT
"""`paravirt bench vbd`: a domain's disk, measured from inside the domain, every part a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from paravirt.cli.context import emit_json, json_option
from paravirt.errors import InvalidRequest, ParavirtError
from paravirt.host import vbd
from paravirt.protocol.blkif import SECTOR_BYTES
from paravirt.testing.report import cpu_seconds, disk_row, print_table
from paravirt.testing.temporary import TemporaryHost


@click.command("vbd")
@click.option("--image", type=click.Path(path_type=Path), help="Measure this image (its content survives reads only).")
@click.option(
    "--driver",
    type=click.Choice(["memory", "null"]),
    default="memory",
    show_default=True,
    help="What is measured without an image.",
)
@click.option("--size", default="64M", show_default=True, help="Of a memory or null disk.")
@click.option(
    "--depth",
    "depths",
    multiple=True,
    type=click.IntRange(1, 512),
    default=(1, 8, 32),
    show_default=True,
    help="Requests in flight. May be repeated.",
)
@click.option(
    "--bytes",
    "n_bytes",
    type=click.IntRange(512, 45056),
    default=4096,
    show_default=True,
    help="Size of a request, in whole sectors.",
)
@click.option("--writes", is_flag=True, help="Random writes instead of reads.")
@click.option(
    "--seconds",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    help="For each depth.",
)
@click.option(
    "--wait",
    type=click.Choice(["adaptive", "spin", "sleep"]),
    default="adaptive",
    show_default=True,
    help="How an end waits for the other.",
)
@click.option("--isolated", is_flag=True, help="Run the domain isolated.")
@json_option
def bench_vbd(
    image: Path | None,
    driver: str,
    size: str,
    depths: tuple[int, ...],
    n_bytes: int,
    writes: bool,
    seconds: float,
    wait: str,
    isolated: bool,
    as_json: bool,
) -> None:
    """Random reads (or writes) of a disk, at several depths.

    Starts a host and a domain of its own, which go away afterwards.
    """
    if n_bytes % SECTOR_BYTES:
        raise InvalidRequest(f"--bytes {n_bytes} is no multiple of {SECTOR_BYTES}")
    spin_us = {"adaptive": 30.0, "spin": 1e6, "sleep": 0.0}[wait]
    command = [sys.executable, "-m", "paravirt.testing.guest", "--seconds", str(seconds), "--bytes", str(n_bytes)]
    command += ["--spin-us", str(spin_us), *(["--writes"] if writes else [])]
    for depth in depths:
        command += ["--depth", str(depth)]
    results: list[dict[str, Any]] = []
    console = Console(highlight=False, stderr=as_json)
    with TemporaryHost(log_level="error", backend_spin_us=spin_us) as host, console.status("connecting") as status:
        domain = host.create_domain("bench", isolated=isolated)
        if image is None:
            vbd.attach(host.store, domain.domid, size, driver=driver)
        else:
            vbd.attach(host.store, domain.domid, str(image), mode="w" if writes else "r")
        backend, cpu = host.pid("backend"), 0.0
        with host.run(domain, command, stdout=subprocess.PIPE) as guest:
            assert guest.stdout is not None
            for line in guest.stdout:
                said = json.loads(line)
                if "progress" in said:
                    status.update(f"{said['progress'][0]}: {said['progress'][1]:.0%}")
                elif "begin" in said:
                    cpu = cpu_seconds(backend)
                elif "result" in said:
                    results.append({**said["result"], "backend_cpu_s": cpu_seconds(backend) - cpu})
            if guest.wait(30) != 0:
                raise ParavirtError("the measuring guest failed")
    if as_json:
        emit_json(results)
    else:
        print_table(console, [disk_row(result, result["backend_cpu_s"]) for result in results])
