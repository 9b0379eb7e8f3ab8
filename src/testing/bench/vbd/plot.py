# SPDX-License-Identifier: MIT
"""Results of block devices as charts: an SVG file of I/Os a second, or an HTML page of that, times and CPU time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from paravirt.errors import InvalidRequest
from paravirt.testing.bench.rounds import Rounds
from paravirt.testing.bench.vbd.results import BlockResult

BARS: Final = (
    ("iops", "thousand I/Os a second", 1e3),
    ("p50_ns", "time of a request, median, µs", 1e3),
    ("p99_ns", "time of a request, 99 %, µs", 1e3),
    ("cpu_us", "CPU time of both sides for an I/O, µs", 1.0),
)
"""A field of `BlockSample`, a title, and the unit of the bars."""


def check_plot(path: Path) -> None:
    """Whether such a file can be written. Raises `InvalidRequest`."""
    if path.suffix not in (".svg", ".html"):
        raise InvalidRequest(f"{path}: a plot is an .svg or .html file")
    try:
        import pygal  # noqa: F401
    except ImportError:
        raise InvalidRequest("plots need pygal (pip install 'paravirt[plot]')") from None


def write_plot(path: Path, results: Sequence[BlockResult]) -> None:
    if path.suffix == ".svg":
        path.write_text(bars(results, *BARS[0]))
        return
    charts = [bars(results, *what) for what in BARS] + [histogram(results)]
    figures = "\n".join(f"<figure>{one.partition('?>')[2]}</figure>" for one in charts)
    head = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>paravirt bench vbd</title>'
    path.write_text(f"{head}\n{figures}\n</html>\n")


def config_of(title: str, **options: Any) -> Any:
    """What all charts look like."""
    import pygal

    return pygal.Config(js=[], title=title, human_readable=True, width=900, height=500, **options)


def bars(results: Sequence[BlockResult], field: str, title: str, unit: float) -> str:
    """SVG: a group of bars a depth, a colour a side, with the quartiles; pale where nothing is to be concluded."""
    import pygal

    depths = list(dict.fromkeys(result.case.depth for result in results))
    config = config_of(title, x_title="requests in flight", x_labels=[str(depth) for depth in depths])
    highest = [spread.high / unit for result in results if (spread := result.counted().spread(field))]
    config.range = (0, 1.05 * max(highest, default=1.0))
    chart = pygal.Bar(config)
    for side in dict.fromkeys(result.side for result in results):
        of_depth = {result.case.depth: result for result in results if result.side == side}
        chart.add(side, [bar_of(of_depth.get(depth), field, unit) for depth in depths])
    return str(chart.render(is_unicode=True))


def bar_of(result: Rounds[Any] | None, field: str, unit: float) -> dict[str, object] | None:
    """One bar with its quartiles; None where nothing was measured."""
    spread = None if result is None else result.counted().spread(field)
    if spread is None or result is None:
        return None
    bar: dict[str, object] = {
        "value": spread.median / unit,
        "ci": {"low": spread.low / unit, "high": spread.high / unit},
    }
    if result.doubt:
        bar |= {"label": f"inconclusive: {result.doubt}", "style": "opacity: 0.4"}
    return bar


def histogram(results: Sequence[BlockResult]) -> str:
    """SVG: the share of requests that took longer, over the time, a line a side and depth; axes by powers of ten."""
    import pygal

    config = config_of("share of requests that took longer, over µs", x_title="µs", show_dots=False, logarithmic=True)
    config.x_value_formatter = lambda power: f"{10**power:.3g}"
    chart = pygal.XY(config)
    for result in results:
        chart.add(f"{result.side} x {result.case.depth}", _longer(result.buckets))
    return str(chart.render(is_unicode=True))


def _longer(buckets: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """(Power of ten of the time in µs, share of requests that took longer)."""
    from math import log10

    n, longer, points = sum(count for _, count in buckets), 1.0, []
    for ns, count in buckets:
        points.append((log10(max(ns, 1) / 1e3), longer))
        longer = max(longer - count / n, 1 / n / 10)
    return points
