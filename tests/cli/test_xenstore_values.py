# SPDX-License-Identifier: MIT
"""Values as text: what is shown can be typed again, and JSON gives back what it was given."""

import json

import pytest

from paravirt.cli.xenstore.values import from_json, json_value, printable, unescaped
from paravirt.errors import InvalidRequest

VALUES = [
    b"",
    b"plain text",
    bytes(range(256)),
    b"\\n is no newline, \n is",
    b"\x001\x077\xff",
    "größer".encode(),
    b"\xc3",
    *(bytes([byte]) for byte in range(256)),
]


@pytest.mark.parametrize("value", VALUES)
def test_there_and_back(value: bytes) -> None:
    assert unescaped(printable(value)) == value
    assert printable(value).isascii()
    assert printable(value).isprintable() or value == b""
    assert from_json(json.loads(json.dumps(json_value(value)))) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    [(b"\0\x07\x08", "\\000\\007\\x08"), (b"\t\n\r\\", "\\t\\n\\r\\\\"), (b'"~\x7f', '"~\\x7f'), (b"\xe4", "\\xe4")],
)
def test_how_it_is_shown(value: bytes, shown: str) -> None:
    assert printable(value) == shown


@pytest.mark.parametrize(("text", "value"), [("ä", "ä".encode()), ("\\101\\x41", b"AA"), ("\\377", b"\xff")])
def test_more_than_is_shown_is_understood(text: str, value: bytes) -> None:
    assert unescaped(text) == value


@pytest.mark.parametrize("text", ["\\", "\\x", "\\x1", "\\xgg", "\\400", "\\1", "\\ä", "\\\n"])
def test_what_is_no_escape(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no escape"):
        unescaped(text)


@pytest.mark.parametrize(
    ("value", "json_form"), [(b"text\0", "text\0"), ("ä".encode(), "ä"), (b"\xff", {"base64": "/w=="})]
)
def test_json(value: bytes, json_form: object) -> None:
    assert json_value(value) == json_form


@pytest.mark.parametrize(
    ("json_form", "said"),
    [
        (1, "neither"),
        (None, "neither"),
        ({}, "neither"),
        ({"base64": 1}, "neither"),
        ({"base64": "", "x": ""}, "neither"),
        ({"base64": "/w="}, "no base64"),
        ({"base64": "ä"}, "no base64"),
        ({"base64": "/w==\n"}, "no base64"),
        ("\ud800", "no text"),
    ],
)
def test_no_value(json_form: object, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        from_json(json_form)
