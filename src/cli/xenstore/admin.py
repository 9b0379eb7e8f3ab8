# SPDX-License-Identifier: MIT
"""The commands control and quota: asking the daemon itself."""

from __future__ import annotations

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.cli.xenstore.group import example, text, xenstore
from paravirt.errors import InvalidRequest


@xenstore.command(epilog=example("control quota max"), context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, metavar="WORD...", type=text)
@pass_context
def control(context: Context, words: tuple[str, ...]) -> None:
    """Send the daemon a CONTROL command and print the answer. `control help` lists what it knows."""
    with context.store() as store:
        answer = store.control(*words)
    click.echo(answer, nl=not answer.endswith("\n"))


@xenstore.command(epilog=example("quota 1 nodes 2000"))
@click.argument("words", nargs=-1, metavar="[DOMID] [NAME [VALUE]]", type=text)
@json_option
@pass_context
def quota(context: Context, words: tuple[str, ...], as_json: bool) -> None:
    """The quotas of domains: list them, show one, or set one.

    With DOMID those of one domain, else those for all domains that have none of their own. 0 is no limit.
    """
    domid, name, value = _split(words)
    with context.store() as store:
        if value is not None:
            store.set_quota(name, value, domid)
            return
        names = [name] if name else store.quota_names()
        values = [store.get_quota(each, domid) for each in names]
    if name and not as_json:
        click.echo(values[0])
        return
    rows = [{"name": each, "value": limit} for each, limit in zip(names, values, strict=True)]
    emit(rows, {"name": "Quota", "value": "Value"}, as_json=as_json)


def _split(words: tuple[str, ...]) -> tuple[int | None, str, int | None]:
    """(domid or None, name or "", value or None)."""
    domid, rest = (int(words[0]), words[1:]) if words and _is_number(words[0]) else (None, words)
    if len(rest) > 2:
        raise InvalidRequest("quota wants at most a domain id, a name and a value")
    if len(rest) < 2:
        return domid, "".join(rest), None
    if not _is_number(rest[1]):
        raise InvalidRequest(f"the value of a quota is a number, not {rest[1]!r}")
    return domid, rest[0], int(rest[1])


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()
