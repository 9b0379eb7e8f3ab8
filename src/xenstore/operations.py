# SPDX-License-Identifier: MIT
"""What a client can ask of xenstored: arguments in, a request's payload out; a reply in, its value out. Pure.

One function an operation, used alike by the blocking client, its pipelines and the asyncio client. Source: Xen
docs/misc/xenstore.txt.
"""

from collections.abc import Callable, Generator, Iterable
from typing import Any, Final, Generic, TypeVar

from paravirt.errors import XENSTORE_ERRORS, InvalidRequest, NoSuchNode, PeerError, TooLarge, XenstoreError
from paravirt.xenstore.wire import Op

T = TypeVar("T")

_MEANING: Final = {
    "EINVAL": "is not a valid request",
    "EACCES": "permission refused",
    "EEXIST": "is there already",
    "ENOENT": "does not exist",
    "ENOMEM": "the transaction has failed",
    "ENOSPC": "a quota is reached",
    "ENOSYS": "the daemon does not know this operation",
    "EBUSY": "is busy",
    "EAGAIN": "something the transaction has seen was changed meanwhile",
    "E2BIG": "is too long",
    "EPERM": "only Dom0 may give a node away",
}


def error_of(name: str, what: str, why: str = "") -> XenstoreError:
    """The exception for an error reply to a request about `what`; `why` instead of what the errno usually means."""
    message = f"{what}: {why or _MEANING.get(name, 'refused')} ({name})"
    return XENSTORE_ERRORS.get(name, XenstoreError)(message, name)


def encode_string(text: str) -> bytes:
    """A string argument with its NUL."""
    if "\0" in text:
        raise InvalidRequest(f"{text!r} has a NUL inside")
    return _encode(text) + b"\0"


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{text!r} is not UTF-8") from error


class Call(Generic[T]):
    """One request and what its reply means; `what` names it in errors. One is made for each call, so it is cheap."""

    __slots__ = ("decode", "op", "payload", "what")

    def __init__(self, op: Op, payload: bytes, what: str, decode: Callable[[bytes], T]) -> None:
        self.op = op
        self.payload = payload
        self.what = what
        self.decode = decode


Steps = Generator[Call[Any], bytes, T]
"""Several requests, one after the other: yields each, is sent its reply, returns the value."""


def _nothing(_reply: bytes) -> None:
    return None


def _same(reply: bytes) -> bytes:
    return reply


def _number(what: str) -> Callable[[bytes], int]:
    def decode(reply: bytes) -> int:
        text = reply.rstrip(b"\0")
        if not text.isdigit():
            raise PeerError(f"{what}: xenstored answered {text[:40]!r} where a number is due")
        return int(text)

    return decode


def _text(reply: bytes, what: str) -> str:
    try:
        return reply.decode()
    except UnicodeDecodeError as error:
        raise PeerError(f"{what} is not text") from error


def _names(reply: bytes) -> list[str]:
    return _text(reply, "the list that xenstored answered with").split("\0")[:-1]


# -- the tree


def read(path: str) -> Call[bytes]:
    return Call(Op.READ, encode_string(path), path, _same)


def read_text(path: str) -> Call[str]:
    return Call(Op.READ, encode_string(path), path, lambda reply: _text(reply, path))


def write(path: str, value: str | bytes) -> Call[None]:
    data = _encode(value) if isinstance(value, str) else bytes(value)
    return Call(Op.WRITE, encode_string(path) + data, path, _nothing)


def mkdir(path: str) -> Call[None]:
    return Call(Op.MKDIR, encode_string(path), path, _nothing)


def rm(path: str) -> Call[None]:
    return Call(Op.RM, encode_string(path), path, _nothing)


def get_perms(path: str) -> Call[list[str]]:
    return Call(Op.GET_PERMS, encode_string(path), path, _names)


def set_perms(path: str, permissions: Iterable[str]) -> Call[None]:
    words = b"".join(encode_string(word) for word in permissions)
    return Call(Op.SET_PERMS, encode_string(path) + words, path, _nothing)


def directory(path: str) -> Call[list[str]]:
    return Call(Op.DIRECTORY, encode_string(path), path, _names)


def ls(path: str) -> Steps[list[str]]:
    """A listing; in parts when it is longer than one reply."""
    try:
        return _names((yield directory(path)))
    except TooLarge:
        return (yield from ls_in_parts(path))


def ls_in_parts(path: str) -> Steps[list[str]]:
    """A listing longer than one reply; anew if it changes meanwhile."""
    first_generation, parts = b"", [b""]
    while True:
        offset = sum(map(len, parts))
        reply = yield Call(Op.DIRECTORY_PART, encode_string(path) + b"%d\0" % offset, path, _same)
        generation, _, part = reply.partition(b"\0")
        if offset and generation != first_generation:
            parts = [b""]
            continue
        if not part:
            raise PeerError(f"{path}: xenstored answered with an empty part of a listing")
        first_generation = generation
        if part == b"\0" or part.endswith(b"\0\0"):
            return _names(b"".join([*parts, part[:-1]]))
        parts.append(part)


def exists(path: str) -> Steps[bool]:
    try:
        yield read(path)
    except NoSuchNode:
        return False
    return True


# -- domains


def get_domain_path(domid: int) -> Call[str]:
    def decode(reply: bytes) -> str:
        return _text(reply.rstrip(b"\0"), f"the path of domain {domid}")

    return Call(Op.GET_DOMAIN_PATH, b"%d\0" % domid, f"domain {domid}", decode)


def introduce(domid: int, gfn: int, port: int) -> Call[None]:
    return Call(Op.INTRODUCE, b"%d\0%d\0%d\0" % (domid, gfn, port), f"domain {domid}", _nothing)


def release(domid: int) -> Call[None]:
    return Call(Op.RELEASE, b"%d\0" % domid, f"domain {domid}", _nothing)


def resume(domid: int) -> Call[None]:
    return Call(Op.RESUME, b"%d\0" % domid, f"domain {domid}", _nothing)


def set_target(domid: int, target: int) -> Call[None]:
    return Call(Op.SET_TARGET, b"%d\0%d\0" % (domid, target), f"domain {domid}", _nothing)


def is_domain_introduced(domid: int) -> Call[bool]:
    return Call(Op.IS_DOMAIN_INTRODUCED, b"%d\0" % domid, f"domain {domid}", lambda reply: reply == b"T\0")


def get_feature(domid: int | None) -> Call[int]:
    what = "features" if domid is None else f"features of domain {domid}"
    return Call(Op.GET_FEATURE, b"" if domid is None else b"%d\0" % domid, what, _number(what))


def set_feature(domid: int, features: int) -> Call[None]:
    return Call(Op.SET_FEATURE, b"%d\0%d\0" % (domid, features), f"features of domain {domid}", _nothing)


def _quota_of(name: str, domid: int | None) -> tuple[bytes, str]:
    if domid is None:
        return encode_string(name), f"quota {name}"
    return b"%d\0" % domid + encode_string(name), f"quota {name} of domain {domid}"


def get_quota(name: str, domid: int | None) -> Call[int]:
    payload, what = _quota_of(name, domid)
    return Call(Op.GET_QUOTA, payload, what, _number(what))


def set_quota(name: str, value: int, domid: int | None) -> Call[None]:
    payload, what = _quota_of(name, domid)
    return Call(Op.SET_QUOTA, payload + b"%d\0" % value, what, _nothing)


def quota_names() -> Call[list[str]]:
    # The names stand in one string with blanks between them; a NUL there is understood too.
    return Call(
        Op.GET_QUOTA, b"", "quotas", lambda reply: reply.replace(b"\0", b" ").decode("ascii", "replace").split()
    )


def control(words: tuple[str, ...]) -> Call[str]:
    payload = b"".join(encode_string(word) for word in words)
    return Call(Op.CONTROL, payload, " ".join(words), lambda reply: reply.rstrip(b"\0").decode("utf-8", "replace"))
