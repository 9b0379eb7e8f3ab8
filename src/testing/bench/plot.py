# SPDX-License-Identifier: MIT
"""Results as bars, one chart a mode: an SVG file, or an HTML page of all."""

from collections.abc import Sequence
from pathlib import Path

from paravirt.errors import InvalidRequest
from paravirt.testing.bench.case import Mode
from paravirt.testing.bench.results import Result

TITLES: dict[Mode, str] = {
    "echo": "pairs of request and response, millions a second",
    "oneway": "requests one way, millions a second",
    "pingpong": "round trip of a batch alone, median, µs",
}
SHOWN: dict[Mode, tuple[str, float]] = {
    "echo": ("messages_per_s", 1e6),
    "oneway": ("messages_per_s", 1e6),
    "pingpong": ("p50_ns", 1e3),
}
"""A field of `Sample`, and the unit of its bars."""


def check_plot(path: Path, modes: Sequence[Mode]) -> None:
    """Whether such a file can be written. Raises `InvalidRequest`."""
    if path.suffix not in (".svg", ".html"):
        raise InvalidRequest(f"{path}: a plot is an .svg or .html file")
    if path.suffix == ".svg" and len(modes) > 1:
        raise InvalidRequest(f"{path}: an .svg file has one mode; write an .html file for all {len(modes)}")
    try:
        import pygal  # noqa: F401
    except ImportError:
        raise InvalidRequest("plots need pygal (pip install 'paravirt[plot]')") from None


def write_plot(path: Path, results: Sequence[Result]) -> None:
    """One chart of results of one mode, or a page of one for each."""
    modes = list(dict.fromkeys(result.case.mode for result in results))
    charts = [chart(mode, [result for result in results if result.case.mode == mode]) for mode in modes]
    if path.suffix == ".svg":
        path.write_text(charts[0])
        return
    figures = "\n".join(f"<figure>{one.partition('?>')[2]}</figure>" for one in charts)
    head = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>paravirt bench ring</title>'
    path.write_text(f"{head}\n{figures}\n</html>\n")


def chart(mode: Mode, results: Sequence[Result]) -> str:
    """SVG: a group of bars a batch size, a colour a side, with the quartiles; pale where nothing is to be concluded."""
    import pygal

    field, unit = SHOWN[mode]
    batches = list(dict.fromkeys(result.case.batch for result in results))
    config = pygal.Config(js=[], title=TITLES[mode], x_title="batch", human_readable=True, width=900, height=500)
    config.x_labels = [str(batch) for batch in batches]
    highest = [spread.high / unit for result in results if (spread := result.counted().spread(field))]
    config.range = (0, 1.05 * max(highest, default=1.0))
    bars = pygal.Bar(config)
    for side in dict.fromkeys(result.side for result in results):
        of_batch = {result.case.batch: result for result in results if result.side == side}
        bars.add(side, [_bar(of_batch.get(batch)) for batch in batches])
    return str(bars.render(is_unicode=True))


def _bar(result: Result | None) -> dict[str, object] | None:
    if result is None:
        return None
    field, unit = SHOWN[result.case.mode]
    spread = result.counted().spread(field)
    if spread is None:
        return None
    bar: dict[str, object] = {
        "value": spread.median / unit,
        "ci": {"low": spread.low / unit, "high": spread.high / unit},
    }
    if result.doubt:
        bar |= {"label": f"inconclusive: {result.doubt}", "style": "opacity: 0.4"}
    return bar
