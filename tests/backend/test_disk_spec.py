# SPDX-License-Identifier: MIT
"""How disks are written: what is wrong is named, what is right means the same everywhere."""

import os
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.backend.disks import absolute, open_disk
from paravirt.backend.disks.spec import SECONDS, Layer, Options, parse
from paravirt.errors import InvalidRequest, ParavirtError


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("memory,sector-size=1024:1M", "option sector-size of memory: is '1024', not 512 or 4096"),
        ("memory,sector-size=4096:512", "not a positive multiple of 4096"),
        ("memory,size=1:1M", "memory: has no option 'size'; there are sector-size"),
        ("memory,sector-size:1M", "'sector-size' in 'memory,sector-size' is not of the form OPTION=VALUE"),
        ("memory,=1:1M", "not of the form OPTION=VALUE"),
        ("memory,:1M", "not of the form OPTION=VALUE"),
        ("memory,sector-size=512,sector-size=512:1M", "stands twice"),
        ("file,direct=yes:/x", "option direct of file: is 'yes', not 0 or 1"),
        ("tape:x", "unknown disk driver 'tape'; there are file, memory"),
        (":x", "unknown disk driver ''"),
    ],
)
def test_what_is_wrong_is_named(spec: str, wrong: str) -> None:
    driver, _, argument = spec.partition(":")
    with pytest.raises(InvalidRequest, match=wrong.replace("(", r"\(")):
        open_disk(driver, argument, read_only=False)


def test_a_disk_needs_a_colon() -> None:
    with pytest.raises(InvalidRequest, match="DRIVER:ARGUMENT is wanted"):
        parse("disk.img")


@pytest.mark.parametrize("path", ["/a:b", "/a?b=c&d", "/a|b", "/a,b=c", "/a%2Cb", "/a b", "/ä"])
def test_a_path_may_be_any(path: str) -> None:
    assert parse(f"file,direct=1:{path}") == Layer("file", {"direct": "1"}, path)
    assert absolute("file,direct=1", path) == ("file,direct=1", path)


def test_paths_become_absolute() -> None:
    assert absolute("file", "a/../b.img") == ("file", os.path.abspath("b.img"))
    assert absolute("memory", "1M") == ("memory", "1M")


@settings(max_examples=40)
@given(st.text(), st.dictionaries(st.text(min_size=1), st.text()), st.text())
def test_a_layer_is_read_as_it_was_written(name: str, options: dict[str, str], argument: str) -> None:
    names = "".join([name, *options])
    if not set(names) & set(",:="):
        options = {option: value.encode("utf-8", "replace").decode() for option, value in options.items()}
        layer = Layer(name, options, argument)
        assert parse(str(layer)) == layer


@given(st.text(alphabet="filenum,:=-%0159kMs/|?", max_size=60))
def test_any_text_is_a_disk_or_a_clear_error(text: str) -> None:
    driver, _, spec = text.partition(":")
    with suppress(ParavirtError):
        open_disk(driver, spec, read_only=True).close()


def option(value: str) -> Options:
    return Options("driver", {"x": value})


@pytest.mark.parametrize(("text", "seconds"), [("500us", 500e-6), ("1.5ms", 1.5e-3), ("2s", 2), ("0s", 0)])
def test_durations(text: str, seconds: float) -> None:
    assert option(text).duration_s("x") == pytest.approx(seconds)
    assert set(SECONDS) == {"us", "ms", "s"}


@pytest.mark.parametrize("text", ["", "1", "-1s", "1m", "1e3s", "4000s", "nans", "1 s", "٣s"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"option x of driver: is .* not a time such as"):
        option(text).duration_s("x")


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "01", "1" * 30, "٣"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"option x of driver: is .* not a whole number from 1 on"):
        option(text).count("x")


@pytest.mark.parametrize("text", ["", "1.5", "-0.5", "inf", "nan", "1e-3"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"option x of driver: is .* not a number from 0 to 1"):
        option(text).number("x", 0, 1)


def test_options_that_are_not_given() -> None:
    nothing = Options("driver", {})
    assert nothing.count("a", 7) == 7
    assert nothing.number("b", 0, 1) is nothing.duration_s("c") is nothing.size("d") is nothing.text("e") is None
    assert nothing.flag("f") is False
    nothing.end()
