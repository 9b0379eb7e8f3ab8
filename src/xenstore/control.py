# SPDX-License-Identifier: MIT
"""CONTROL: what an administrator may ask of the daemon. For any engine (`admin`). The forms are the C daemon's.

A payload is the name of a command and its words, a NUL after each. Text that is answered ends with a NUL too, but for
the lines of a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from paravirt.xenstore.admin import AdminHub
from paravirt.xenstore.limits import QUOTAS, SOFT_PREFIX
from paravirt.xenstore.wire import ACK, PAYLOAD_MAX_BYTES, Errno, Reply, number, strings

SWITCHES: Final = ("obj", "io", "wrl", "acc", "tdb")
BUSY: Final = "BUSY"
UPDATE_TIMEOUT_S: Final = 60
UPDATE_VERSIONS: Final = (1, 2)
"""Of the stream of state that a live update hands over."""
_NO_UPDATE: Final = "Not in live-update session."


class Command(NamedTuple):
    run: Callable[[AdminHub, list[str]], Reply]
    usage: str


def control(hub: AdminHub, payload: bytes) -> Reply:
    """Run the command a payload names; EINVAL if there is none of that name, or its words do not fit."""
    words = [word.decode("utf-8", "surrogateescape") for word in strings(payload)]
    command = COMMANDS.get(words[0]) if words else None
    return command.run(hub, words[1:]) if command is not None else Errno.EINVAL


def _text(lines: list[str]) -> bytes:
    """Whole lines as far as they fit."""
    reply = bytearray()
    for line in lines:
        data = line.encode("utf-8", "surrogateescape") + b"\n"
        if len(reply) + len(data) >= PAYLOAD_MAX_BYTES:
            break
        reply += data
    return bytes(reply) + b"\0"


def _done(refusal: Errno | None) -> Reply:
    return ACK if refusal is None else refusal


def _check(hub: AdminHub, words: list[str]) -> Reply:
    if words:
        return Errno.EINVAL
    problems = hub.check()
    for problem in problems:
        hub.actions.print(f"check: {problem}")
    return _text(problems) if problems else ACK


def _log(hub: AdminHub, words: list[str]) -> Reply:
    switches = hub.admin_state.switches
    if not words:
        states = (f"{name:<8}: {'on' if name in switches else 'off'}" for name in SWITCHES)
        return _text(["Log switch settings:", *states])
    if len(words) != 1:
        return Errno.EINVAL
    if words[0] in ("on", "off"):
        return _done(hub.actions.log(words[0] == "on"))
    sign, name = words[0][:1], words[0][1:]
    if sign not in ("+", "-") or name not in SWITCHES:
        return Errno.EINVAL
    if sign == "+":
        switches.add(name)
    else:
        switches.discard(name)
    return ACK


def _logfile(hub: AdminHub, words: list[str]) -> Reply:
    return _done(hub.actions.log_file(words[0])) if len(words) == 1 else Errno.EINVAL


def _memreport(hub: AdminHub, words: list[str]) -> Reply:
    if len(words) > 1:
        return Errno.EINVAL
    total = hub.statistics()
    lines = [
        f"store: {total.memory_bytes} bytes, {total.nodes} nodes, {total.watches} watches, "
        f"{total.connections} connections, {total.transactions} transactions"
    ]
    lines += [
        f"domain {domain.domid}: {domain.memory_bytes} bytes, {domain.n_nodes} nodes, {domain.n_watches} watches, "
        f"{domain.n_outstanding} outstanding requests, {domain.n_transactions} transactions"
        for domain in sorted(hub.domains.values(), key=lambda domain: domain.domid)
    ]
    return _done(hub.actions.report(words[0] if words else None, "".join(line + "\n" for line in lines)))


def _print(hub: AdminHub, words: list[str]) -> Reply:
    if len(words) != 1:
        return Errno.EINVAL
    hub.actions.print(f"control: {words[0]}")
    return ACK


# -- quotas


def _hard_quotas() -> list[str]:
    return [name for name in QUOTAS if not name.startswith(SOFT_PREFIX)]


def _quota(hub: AdminHub, words: list[str]) -> Reply:
    if not words:
        return _quota_settings(hub, "")
    if words[0] == "set":
        return _set_global_quota(hub, "", words[1:])
    if words[0] == "max":
        return _quota_maxima(hub, words[1:])
    return _quota_of_domain(hub, words[0]) if len(words) == 1 else Errno.EINVAL


def _soft_quota(hub: AdminHub, words: list[str]) -> Reply:
    if not words:
        return _quota_settings(hub, SOFT_PREFIX)
    return _set_global_quota(hub, SOFT_PREFIX, words[1:]) if words[0] == "set" else Errno.EINVAL


def _quota_settings(hub: AdminHub, prefix: str) -> Reply:
    names = [name for name in _hard_quotas() if prefix + name in QUOTAS]
    settings = (f"{name:<17}: {hub.quota(None, prefix + name):8d} {QUOTAS[prefix + name]}" for name in names)
    return _text(["Quota settings:", *settings])


def _set_global_quota(hub: AdminHub, prefix: str, words: list[str]) -> Reply:
    if len(words) != 2 or prefix + words[0] not in QUOTAS or words[0].startswith(SOFT_PREFIX):
        return Errno.EINVAL
    value = number(words[1].encode("utf-8", "surrogateescape"))
    if not 1 <= value < 1 << 31:
        return Errno.EINVAL
    hub.set_quota(None, prefix + words[0], value)
    return ACK


def _quota_of_domain(hub: AdminHub, domid: str) -> Reply:
    domain = hub.domains.get(number(domid.encode("utf-8", "surrogateescape")))
    if domain is None:
        return Errno.ENOENT
    counts = {
        "nodes": domain.n_nodes,
        "watches": domain.n_watches,
        "outstanding": domain.n_outstanding,
        "memory": domain.memory_bytes,
        "transactions": domain.n_transactions,
    }
    lines = []
    for name in _hard_quotas():
        count = counts.get(name, 0)
        lines.append(f"{name:<17}: {count:8d} (max {max(count, domain.maxima.get(name, 0)):8d})")
    return _text([f"Domain {domain.domid}:", *lines])


def _quota_maxima(hub: AdminHub, words: list[str]) -> Reply:
    if words not in ([], ["-r"]):
        return Errno.EINVAL
    maxima = hub.quota_maxima(bool(words))
    return _text(
        ["Max. seen accounting values:", *(f"{name:<17}: {maxima.get(name, 0):8d}" for name in _hard_quotas())]
    )


# -- live update: each step is answered with "OK" or with the reason why not


def _live_update(hub: AdminHub, words: list[str]) -> Reply:
    step = _UPDATE_STEPS.get(words[0]) if words else None
    answer = step(hub, words[1:]) if step is not None else Errno.EINVAL
    if answer is None:
        return ACK
    return answer if isinstance(answer, Errno) else answer.encode("utf-8", "surrogateescape") + b"\0"


def _update_program(hub: AdminHub, words: list[str]) -> str | Errno | None:
    if len(words) != 1:
        return Errno.EINVAL
    state = hub.admin_state
    if state.update_program is not None:
        return "live-update session already active."
    refusal = hub.actions.check_program(words[0])
    if refusal is None:
        state.update_program, state.update_command_line = words[0], None
    return refusal


def _update_command_line(hub: AdminHub, words: list[str]) -> str | Errno | None:
    if len(words) != 1:
        return Errno.EINVAL
    if hub.admin_state.update_program is None:
        return _NO_UPDATE
    hub.admin_state.update_command_line = words[0]
    return None


def _update_abort(hub: AdminHub, words: list[str]) -> str | Errno | None:
    if words:
        return Errno.EINVAL
    if hub.admin_state.update_program is None:
        return "No live-update session active."
    hub.admin_state.update_program = None
    return None


def _update_start(hub: AdminHub, words: list[str]) -> str | Errno | None:
    """Refused with "BUSY" while transactions are open, unless forced: they end with the old program. After any other
    answer the session is over."""
    force, numbers = False, {"-t": UPDATE_TIMEOUT_S, "-v": UPDATE_VERSIONS[-1]}
    rest = iter(words)
    for word in rest:
        if word == "-F":
            force = True
            continue
        value = next(rest, "")
        if word not in numbers or not value.isdecimal():
            return Errno.EINVAL
        numbers[word] = int(value)
    state = hub.admin_state
    if state.update_program is None:
        return _NO_UPDATE
    if numbers["-v"] not in UPDATE_VERSIONS:
        return "Migration stream version not supported."
    if hub.statistics().transactions and not force:
        return BUSY
    program, state.update_program = state.update_program, None
    return hub.actions.live_update(program, state.update_command_line, numbers["-t"])


_UPDATE_STEPS: Final = {
    "-f": _update_program,
    "-c": _update_command_line,
    "-a": _update_abort,
    "-s": _update_start,
}


# -- the rest


def _trace(hub: AdminHub, words: list[str]) -> Reply:
    """The number to ask for next, then the lines from the asked one on, as many as fit."""
    if len(words) != 1 or not words[0].isdecimal() or len(words[0]) > 19:
        return Errno.EINVAL
    asked = int(words[0])
    first, lines = hub.trace_lines(asked)
    text = [f"... {first - asked} lines lost".encode()] if first > asked else []
    room = PAYLOAD_MAX_BYTES - 21 - sum(len(line) + 1 for line in text)
    n_lines = 0
    for line in lines:
        data = line.encode("ascii", "replace")
        room -= len(data) + 1
        if room < 0:
            break
        text.append(data)
        n_lines += 1
    return b"".join(line + b"\n" for line in (b"%d" % (first + n_lines), *text))


def _help(hub: AdminHub, words: list[str]) -> Reply:
    if words:
        return Errno.EINVAL
    return _text([f"{name:<15} {command.usage}" for name, command in COMMANDS.items()])


COMMANDS: Final = {
    "check": Command(_check, ""),
    "log": Command(_log, "[on|off|+<switch>|-<switch>]"),
    "live-update": Command(_live_update, "-f <file>|-c <command line>|-a|-s [-F] [-t <timeout>] [-v <version>]"),
    "logfile": Command(_logfile, "<file>"),
    "memreport": Command(_memreport, "[<file>]"),
    "print": Command(_print, "<string>"),
    "quota": Command(_quota, "[set <name> <val>|<domid>|max [-r]]"),
    "quota-soft": Command(_soft_quota, "[set <name> <val>]"),
    "trace": Command(_trace, "<number of a line>"),
    "help": Command(_help, ""),
}
