# SPDX-License-Identifier: MIT
"""Results of network devices as charts: an SVG file of packets a second, or an HTML page of that, bits and times."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from paravirt.testing.bench.vbd.plot import bar_of, check_plot, config_of
from paravirt.testing.bench.vif.results import VifResult

__all__ = ["check_plot", "write_plot"]

BARS: Final = (
    ("pps", "million packets a second", 1e6),
    ("gbit_per_s", "Gbit/s", 1.0),
    ("p50_ns", "round trip, median, µs", 1e3),
    ("front_cpu_ns", "CPU time of the sender for a packet, ns", 1.0),
)
"""A field of `VifSample`, a title, and the unit of the bars."""


def write_plot(path: Path, results: Sequence[VifResult]) -> None:
    if path.suffix == ".svg":
        path.write_text(bars(results, *BARS[0]))
        return
    figures = "\n".join(f"<figure>{bars(results, *what).partition('?>')[2]}</figure>" for what in BARS)
    head = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>paravirt bench vif</title>'
    path.write_text(f"{head}\n{figures}\n</html>\n")


def bars(results: Sequence[VifResult], field: str, title: str, unit: float) -> str:
    """SVG: a group of bars a case, a colour a side, with the quartiles; pale where nothing is to be concluded."""
    import pygal

    cases = list(dict.fromkeys(result.case for result in results))
    labels = [f"{case.way} {case.size or 'mix'} x {case.burst}" for case in cases]
    config = config_of(title, x_labels=labels, x_label_rotation=30)
    highest = [spread.high / unit for result in results if (spread := result.counted().spread(field))]
    config.range = (0, 1.05 * max(highest, default=1.0))
    chart = pygal.Bar(config)
    for side in dict.fromkeys(result.side for result in results):
        of_case = {result.case: result for result in results if result.side == side}
        chart.add(side, [bar_of(of_case.get(case), field, unit) for case in cases])
    return str(chart.render(is_unicode=True))
