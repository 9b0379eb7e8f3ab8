# SPDX-License-Identifier: MIT
"""The commands control and quota: asking the daemon itself."""

from __future__ import annotations

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.cli.xenstore.batch import fetch, strict
from paravirt.cli.xenstore.group import example, xenstore
from paravirt.errors import InvalidRequest
from paravirt.xenstore.calls import encode_string
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.wire import Op


def ask_daemon(store: XenstoreClient, words: tuple[str, ...]) -> str:
    """Send CONTROL; its answer as text, without the NUL at the end."""
    payload = b"".join(word.encode(errors="surrogateescape") + b"\0" for word in words)
    reply = store.request(Op.CONTROL, payload, f"control {' '.join(words)}")
    return reply.rstrip(b"\0").decode(errors="backslashreplace")


@xenstore.command(epilog=example("control quota max"), context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, metavar="WORD...", type=click.UNPROCESSED)
@pass_context
def control(context: Context, words: tuple[str, ...]) -> None:
    """Send the daemon a CONTROL command and print the answer. `control help` lists what it knows."""
    with context.store() as store:
        answer = ask_daemon(store, words)
    click.echo(answer, nl=not answer.endswith("\n"))


@xenstore.command(epilog=example("quota 1 nodes 2000"))
@click.argument("words", nargs=-1, metavar="[DOMID] [NAME [VALUE]]")
@json_option
@pass_context
def quota(context: Context, words: tuple[str, ...], as_json: bool) -> None:
    """The quotas of domains: list them, show one, or set one.

    With DOMID those of one domain, else those for all domains that have none of their own. 0 is no limit.
    """
    domid, name, value = _split(words)
    with context.store() as store:
        if value is not None:
            store.request(Op.SET_QUOTA, b"".join(map(encode_string, [*domid, name, value])), _what(domid, name))
            return
        names = [name] if name else _names(store)
        requests = [(Op.GET_QUOTA, b"".join(map(encode_string, [*domid, each])), _what(domid, each)) for each in names]
        values = [int(reply.rstrip(b"\0")) for reply in strict(fetch(store, requests))]
    if name and not as_json:
        click.echo(values[0])
        return
    rows = [{"name": each, "value": limit} for each, limit in zip(names, values, strict=True)]
    emit(rows, {"name": "Quota", "value": "Value"}, as_json=as_json)


def _split(words: tuple[str, ...]) -> tuple[list[str], str, str | None]:
    """(domid or nothing, name or "", value or None)."""
    domid, rest = (list(words[:1]), words[1:]) if words[:1] and words[0].isdigit() else ([], words)
    if len(rest) > 2:
        raise InvalidRequest("quota wants at most a domain id, a name and a value")
    if len(rest) == 2 and not (rest[1].isascii() and rest[1].isdigit()):
        raise InvalidRequest(f"the value of a quota is a number, not {rest[1]!r}")
    return domid, rest[0] if rest else "", rest[1] if len(rest) == 2 else None


def _names(store: XenstoreClient) -> list[str]:
    return store.request(Op.GET_QUOTA, b"", "quota").replace(b"\0", b" ").decode().split()


def _what(domid: list[str], name: str) -> str:
    return f"quota {name} of domain {domid[0]}" if domid else f"quota {name}"
