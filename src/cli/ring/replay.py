# SPDX-License-Identifier: MIT
"""`paravirt ring replay`."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paravirt.cli.context import Context, emit_json, json_option, pass_context
from paravirt.cli.ring.given import asked_to_stop, messages_of, messages_option
from paravirt.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from paravirt.frontend.domain import Domain
    from paravirt.looking.compare import Report
    from paravirt.protocol.recording import Header

EXIT_DIFFERENT = 1


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("domain", required=False)
@click.option("--device", metavar="CLASS/NUMBER", help="Another device than the recorded one, such as vbd/51728.")
@click.option(
    "--to",
    type=click.Choice(["back", "front"]),
    default="back",
    show_default=True,
    help="Send the requests to the device, or be a device that answers as recorded.",
)
@click.option(
    "--speed", type=click.FloatRange(0), default=1.0, show_default=True, help="2: twice as fast; 0: as fast as it goes."
)
@click.option("--in-flight", type=click.IntRange(min=1), help="To back: at most so many, else as many as recorded.")
@click.option(
    "--data",
    type=click.Choice(["zero", "pattern"]),
    default="zero",
    show_default=True,
    help="What is in pages that are written (to back) or read (to front).",
)
@messages_option
@json_option
@pass_context
def replay(
    context: Context,
    file: Path,
    domain: str | None,
    device: str | None,
    to: str,
    speed: float,
    in_flight: int | None,
    data: str,
    driver: str | None,
    as_json: bool,
) -> int:
    """Replay the recording FILE with a device of DOMAIN, and say which answers are others than recorded.

    To back: the requests go to the device, which nobody else may have open; without DOMAIN, of the domain we are in.
    Writes write. To front: DOMAIN gets a device that answers as recorded, until all of it is replayed or until Ctrl-C.

    Exit status 1 if something was different, or a request was not answered.
    """
    from paravirt.looking.serve import open_recording, recorded_device

    header = open_recording(file)
    messages = messages_of(driver)
    if messages is not None:
        header = header.with_messages(messages)
    chosen = recorded_device(header) if device is None else _device(device)
    if to == "front":
        if domain is None:
            raise InvalidRequest("which domain is to get the device?")
        report = _to_front(context, file, header, domain, chosen, speed=speed, fill=data == "pattern")
    else:
        report = _to_back(context, file, header, domain, chosen, speed=speed, in_flight=in_flight, data=data)
    _tell(report, as_json=as_json)
    return 0 if report.is_same else EXIT_DIFFERENT


def _device(text: str) -> tuple[str, int]:
    kind, slash, number = text.partition("/")
    if not slash or not kind.replace("_", "").isalnum() or not number.isdecimal():
        raise InvalidRequest(f"{text!r} is not of the form CLASS/NUMBER")
    return kind, int(number)


def _to_back(
    context: Context,
    file: Path,
    header: "Header",
    domain: str | None,
    device: tuple[str, int],
    *,
    speed: float,
    in_flight: int | None,
    data: str,
) -> "Report":
    from paravirt.looking.replay_to_back import BackReplay
    from paravirt.protocol.recording import Reader

    with ExitStack() as stack:
        inside = stack.enter_context(_enter(context, domain))
        path = inside.locate(*device)
        opened = stack.enter_context(file.open("rb"))
        reader = Reader(opened)
        chosen = "pattern" if data == "pattern" else "zero"
        replaying = stack.enter_context(BackReplay(inside, path, header, data=chosen))  # type: ignore[arg-type]
        report = replaying.run(reader, speed=speed, in_flight=in_flight)
        report.torn = reader.torn
    return report


def _enter(context: Context, domain: str | None) -> "Domain":
    """The domain we are in, or, from Dom0, the one that was named."""
    from paravirt.frontend.domain import Domain
    from paravirt.host import domains
    from paravirt.hypervisor.client import Hypervisor

    if domain is None:
        try:
            return Domain.from_environment()
        except NotFound:
            raise InvalidRequest("which domain has the device?") from None
    with context.hypervisor() as hypervisor:
        fd = hypervisor.domain_socket(domains.find(hypervisor, domain).domid)
    return Domain(Hypervisor.from_fd(fd))


def _to_front(
    context: Context,
    file: Path,
    header: "Header",
    domain: str,
    device: tuple[str, int],
    *,
    speed: float,
    fill: bool,
) -> "Report":
    from paravirt.host import domains
    from paravirt.looking.serve import FrontReplay

    with context.hypervisor() as hypervisor, context.store() as store, asked_to_stop() as asked:
        domid = domains.find(hypervisor, domain).domid
        with FrontReplay(
            hypervisor, store, domid, file, header=header, device=device, speed=speed, fill=fill
        ) as replaying:
            click.echo(f"domain {domain} has {device[0]} {device[1]}, which answers as recorded", err=True)
            return replaying.wait(stop=lambda: bool(asked))


def _tell(report: "Report", *, as_json: bool) -> None:
    if as_json:
        emit_json(asdict(report))
        return
    for difference in report.differences:
        click.echo(str(difference))
    counts = {
        "requests": report.requests,
        "answers": report.responses,
        "different": report.different,
        "unanswered": report.unanswered,
        "skipped": report.skipped,
        "without a recorded answer": report.unknown,
        "answered early": report.reordered,
        "beyond the recording": report.beyond,
    }
    first = ("requests", "answers", "different")
    said = [f"{n} {what}" for what, n in counts.items() if n or what in first]
    click.echo(f"{', '.join(said)}; {report.seconds:.3f} s")
    if report.torn is not None:
        click.echo(f"paravirt: {report.torn}", err=True)
