"""A record's figures as a picture: groups of bars, or a line over many names.

Proof: tests/test_bench.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO


@dataclass
class Chart:
    """Numbers of several series under common labels; None where there is nothing to show."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    log: bool = False


def png(chart: Chart) -> bytes:
    """Draw it: bars with their numbers, or lines where there are too many labels for bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count, many = len(chart.labels), len(chart.labels) > 20
    figure, axes = pyplot.subplots(figsize=(max(6, min(16, 0.7 * count)), 4), layout="constrained")
    width = 0.8 / len(chart.series)
    for i, (name, values) in enumerate(chart.series.items()):
        numbers = [float("nan") if value is None else value for value in values]
        if many:
            axes.plot(range(count), numbers, marker=".", lw=0.8, label=name)
        else:
            places = [x + (i - (len(chart.series) - 1) / 2) * width for x in range(count)]
            bars = axes.bar(places, numbers, width, label=name)
            axes.bar_label(bars, fmt="%.3g", fontsize=7)
    size = 6 if many else 9
    axes.set_xticks(range(count), chart.labels, rotation=90 if many else 30, fontsize=size)
    axes.set_title(chart.title)
    if chart.log:
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120)
    pyplot.close(figure)
    return content.getvalue()
