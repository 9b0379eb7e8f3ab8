# SPDX-License-Identifier: MIT
"""The one table of how we differ from the C daemon 4.17 on purpose: where it differs from 4.22, which we follow."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from paravirt.xenstore.wire import Op

from .differential import NORMAL, TIGHT, Difference, Step
from .differential_steps import SPECIAL

PATH: Final = re.compile(rb"(?!.*//)(/|/?[-A-Za-z0-9/_@]*[-A-Za-z0-9_@])")
ENTRY: Final = re.compile(rb"[nrwb][0-9]{1,5}")
HOME: Final = re.compile(rb"/local/domain/[0-9]{1,5}/")
N_WORDS: Final = {Op.WRITE: (1, 9999), Op.SET_PERMS: (2, 9999), Op.WATCH: (2, 2), Op.UNWATCH: (2, 2)}


def path_of(step: Step) -> bytes:
    return step.payload.split(b"\0")[0]


def malformed(step: Step) -> bool:
    """Whether the path or the number of strings is wrong, from the protocol's text alone."""
    words = step.payload.split(b"\0")
    least, most = N_WORDS.get(Op(step.op), (1, 1)) if step.op != Op.DIRECTORY_PART else (2, 2)
    path = words[0]
    return (
        not least <= len(words) - 1 <= most
        or (step.op != Op.WRITE and words[-1] != b"")
        or not PATH.fullmatch(path)
        or len(path) > (3072 if path.startswith(b"/") else 2048)
        or (step.op == Op.SET_PERMS and not all(well_formed_entry(word) for word in words[1:-1]))
        or (step.op not in (Op.WATCH, Op.UNWATCH, Op.SET_PERMS) and path.startswith(b"@"))
    )


def well_formed_entry(word: bytes) -> bool:
    return ENTRY.fullmatch(word) is not None and int(word[1:]) < 65536


def from_guest(it: Difference) -> bool:
    return it.step.client not in ("dom0", "dom0b")


def quota_length(path: bytes) -> int:
    """Bytes that count against a guest's longest path."""
    return len(HOME.sub(b"", path, count=1))


@dataclass(frozen=True, slots=True)
class Known:
    """`is_it` says whether a difference is this one. `diverges`: the two daemons hold different things afterwards, so
    a comparison ends there."""

    reason: str
    is_it: Callable[[Difference], bool]
    diverges: bool = False


def errors(difference: Difference, ours: str, theirs: str | None = None) -> bool:
    """Whether nothing differs but the errors replied; `theirs` None: any error."""
    mine, other = difference.replies()
    return mine == f"! {ours}" and (other.startswith("! ") if theirs is None else other == f"! {theirs}")


def special(it: Difference) -> bool:
    return path_of(it.step).startswith(b"@")


def without(told: dict[str, list[str]], gone: Callable[[str, str], bool]) -> dict[str, list[str]]:
    """What clients got, less the lines that `gone(client, line)` names."""
    kept = {name: [line for line in lines if not gone(name, line)] for name, lines in told.items()}
    return {name: lines for name, lines in kept.items() if lines}


def only_guests_release_events(it: Difference) -> bool:
    """Whether guests got @releaseDomain from ours only, and all else is alike."""

    def event(client: str, line: str) -> bool:
        return not client.startswith("dom0") and line.startswith("* @releaseDomain")

    return without(it.theirs, event) == without(it.theirs, lambda *_: False) == without(it.ours, event)


def only_fewer_guests_events(fewer: dict[str, list[str]], more: dict[str, list[str]], client: str) -> bool:
    """Whether guests (other than `client`, who asked) got some of the events only, and all else is alike."""
    some, all_ = (without(told, lambda *_: False) for told in (fewer, more))
    for name in (*some, *all_):
        lines = iter(all_.get(name, ()))
        if some.get(name) != all_.get(name) and (name.startswith("dom0") or name == client):
            return False
        if not all(line in lines for line in some.get(name, ())):
            return False
    return True


def only_order_of_release(it: Difference) -> bool:
    """Whether everybody got the same of a RELEASE, in whatever order."""
    mine, other = (without(told, lambda *_: False) for told in (it.ours, it.theirs))
    return it.step.op == Op.RELEASE and {k: sorted(v) for k, v in mine.items()} == {
        k: sorted(v) for k, v in other.items()
    }


KNOWN: Final = (
    Known(
        "a malformed request is EINVAL; 4.17 answers whatever errno was left from before",
        lambda it: it.step.op in range(23) and malformed(it.step) and errors(it, "EINVAL"),
    ),
    Known(
        "who may not set a special node's permissions gets EACCES, one that is none EINVAL; 4.17 answers what was left",
        lambda it: (
            it.step.op == Op.SET_PERMS
            and special(it)
            and (errors(it, "EACCES") or (errors(it, "EINVAL") and path_of(it.step) not in SPECIAL))
        ),
    ),
    Known(
        "only Dom0 may give a special node another owner; 4.17 lets the owner",
        lambda it: it.step.op == Op.SET_PERMS and special(it) and it.replies() == ("! EPERM", "OK|"),
        diverges=True,
    ),
    Known(
        "the permissions of special nodes can be read; 4.17 takes them for a bad path",
        lambda it: it.step.op == Op.GET_PERMS and special(it) and it.replies()[1] == "! EINVAL",
    ),
    Known(
        "@releaseDomain may be read by everybody; 4.17 keeps it to Dom0",
        only_guests_release_events,
    ),
    Known(
        "the longest path is a guest's quota; 4.17 has Dom0 keep to it too",
        lambda it: not from_guest(it) and len(path_of(it.step)) > 2047 and it.reply(it.theirs) == "! EINVAL",
        diverges=True,
    ),
    Known(
        "a quota may not be reached; 4.17 allows a path of just 2048",
        lambda it: from_guest(it) and quota_length(path_of(it.step)) == 2048 and it.reply(it.ours) == "! EINVAL",
        diverges=True,
    ),
    Known(
        "a quota may not be reached; 4.17 allows just as many permissions",
        lambda it: (
            from_guest(it)
            and it.step.op == Op.SET_PERMS
            and it.reply(it.ours) == "! ENOSPC"
            and it.step.payload.count(b"\0") - 1 in (NORMAL.limits.node_permissions, TIGHT.limits.node_permissions)
        ),
        diverges=True,
    ),
    Known(
        "over the quota of watches is ENOSPC; 4.17 says E2BIG",
        lambda it: it.step.op == Op.WATCH and errors(it, "ENOSPC", "E2BIG"),
    ),
    Known(
        "a domain id is a number up to 65535; 4.17 makes a path of anything",
        lambda it: (
            it.step.op == Op.GET_DOMAIN_PATH
            and it.replies()[0] == "! EINVAL"
            and it.replies()[1].startswith("/local/domain/")
        ),
    ),
    Known(
        "the events of a RELEASE come before its reply; C puts off the end of the connection its loop would serve next",
        only_order_of_release,
    ),
    Known(
        "a commit is all at once; C tells of a node before it has stored a parent that was made with it",
        lambda it: it.step.op == Op.TRANSACTION_END and only_fewer_guests_events(it.theirs, it.ours, it.step.client),
    ),
    Known(
        "4.17 has no features and no quotas on the wire",
        lambda it: it.step.op in (Op.GET_FEATURE, Op.GET_QUOTA) and it.replies()[1] == "! ENOSYS",
    ),
    Known(
        "a permission names a decimal number up to 65535; C takes signs, blanks and what follows the number",
        lambda it: (
            it.step.op == Op.SET_PERMS
            and malformed(it.step)
            and (it.reply(it.ours), it.reply(it.theirs)) == ("! EINVAL", "OK|")
        ),
        diverges=True,
    ),
    Known(
        "a negative port is none; 4.17 takes it for a large one",
        lambda it: it.step.op == Op.INTRODUCE and b"-1" in it.step.payload and it.reply(it.ours) == "! EINVAL",
        diverges=True,
    ),
    Known(
        "Dom0 has no ring page here",
        lambda it: (
            it.step.op == Op.INTRODUCE and it.step.payload.startswith(b"0\0") and it.replies() == ("! EINVAL", "OK|")
        ),
    ),
)


def known(difference: Difference) -> Known | None:
    """The entry that explains a difference, if there is one."""
    return next((entry for entry in KNOWN if entry.is_it(difference)), None)
