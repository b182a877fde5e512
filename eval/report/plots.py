"""The report's plots: each function returns a painter of one kind of plot.

Each precision has its own colour (Okabe and Ito's palette) and its own marker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from robx.eval.report.svg import FP16, FP32, INK, INT8, MUTED, PAPER, RULE

COLOUR = {"fp32": FP32, "fp16": FP16, "int8": INT8}
SHAPE = {"fp32": "o", "fp16": "s", "int8": "D"}
# Where a label may be placed around its point: offset in points, horizontal and vertical alignment.
_PLACES = (
    *((0.0, 17.0, "center", "bottom"), (0.0, -17.0, "center", "top")),
    *((17.0, 0.0, "left", "center"), (-17.0, 0.0, "right", "center")),
    *((12.0, 14.0, "left", "bottom"), (-12.0, 14.0, "right", "bottom")),
    *((12.0, -14.0, "left", "top"), (-12.0, -14.0, "right", "top")),
    *((0.0, 32.0, "center", "bottom"), (0.0, -32.0, "center", "top")),
)


def pareto(
    points: Sequence[Mapping[str, Any]], *, mark: float | None, axis: str, front: Sequence[tuple[float, float]]
) -> Callable[[Canvas], None]:
    """Accuracy against latency, one point per model.

    Args:
        points: each with ``x`` (ms), ``y`` (%), ``low`` and ``high`` (% or None), ``bytes``, ``precision``, ``label``,
            ``valid`` (a hollow, dashed point when false) and ``picked``.
        mark: a level to show (%), such as fp32 minus the margin; None for no line.
        axis: the label of the y axis.
        front: the corners (ms, %) of the Pareto front.
    """

    def paint(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        largest = max((p["bytes"] or 0 for p in points), default=0) or 1
        if mark is not None:
            axes.axhline(mark, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
        if len(front) > 1:
            xs, ys = zip(*front, strict=True)
            axes.step(xs, ys, where="post", color=RULE, lw=1.6, zorder=1.5)
        areas = [40 + 560 * (p["bytes"] or 0) / largest for p in points]
        for p, area in zip(points, areas, strict=True):
            _point(axes, p, area=area)
        _ms_axis(axes, [p["x"] for p in points], margin=0.16)
        axes.set_xlabel("p90 latency, upper bound (ms)")
        axes.set_ylabel(axis)
        axes.grid(axis="y")
        axes.margins(y=0.15)
        _place_labels(axes, points, areas, mark)

    return paint


def distributions(rows: Sequence[Mapping[str, Any]]) -> Callable[[Canvas], None]:
    """One band per model: the distribution of its latencies (``ms``, an array), with ticks at ``p50`` and ``p90``.

    Two panels: milliseconds, to compare models; and per cent above each model's own median, to compare tails.
    """

    def paint(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2, sharey=True)
        medians = [float(np.median(row["ms"])) for row in rows]
        _bands(left, rows, scales=[1.0] * len(rows), log=True)
        _bands(right, rows, scales=medians, log=False)
        left.set_yticks([len(rows) - 1 - i + 0.3 for i in range(len(rows))], [row["label"] for row in rows])
        left.set_xlabel("latency per call (ms)")
        right.set_xlabel("relative to its median (%)")

    return paint


def longest(ms: np.ndarray) -> float:
    """The longest latency to draw of `ms`: the 99th percentile, and at most twice the 90th.

    On a loaded machine a few calls take many times as long, and would leave no room for all others.
    """
    p90, p99 = np.quantile(ms, (0.9, 0.99))
    return float(min(p99, 2 * p90))


def _bands(axes: Any, rows: Sequence[Mapping[str, Any]], *, scales: Sequence[float], log: bool) -> None:
    def shown(ms: Any, scale: float) -> Any:
        return ms if log else 100 * (np.asarray(ms) / scale - 1)

    values = [shown(row["ms"][row["ms"] <= longest(row["ms"])], scale) for row, scale in zip(rows, scales, strict=True)]
    low = min(float(v.min()) for v in values)
    high = max(float(v.max()) for v in values)
    room = 0.03 * (high - low) or 0.03 * abs(high) or 1.0
    bins = np.geomspace(low * 0.95, high * 1.05, 161) if log else np.linspace(low - room, high + room, 121)
    for i, (row, value, scale) in enumerate(zip(rows, values, scales, strict=True)):
        counts, _ = np.histogram(value, bins)
        base = len(rows) - 1 - i
        height = base + 0.78 * counts / max(1, counts.max())
        colour = COLOUR[row["precision"]]
        if row["valid"]:
            axes.stairs(height, bins, baseline=base, fill=True, color=colour, alpha=0.6)
        else:
            axes.stairs(height, bins, baseline=base, color=colour, lw=0.9, ls=(0, (2, 1)))
        for key, tall, width in (("p50", 0.88, 1.4), ("p90", 0.5, 1.0)):
            if row[key] is not None:
                axes.plot([shown(row[key], scale)] * 2, [base, base + tall], color=INK, lw=width)
    if log:
        _ms_axis(axes, [low, high], margin=0.0)
    axes.set_xlim(bins[0], bins[-1])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def pairs(rows: Sequence[Mapping[str, Any]], *, margin: float) -> Callable[[Canvas], None]:
    """Shared rows, two panels: ``speedup`` against 1, ``drop`` against `margin`; each (value, low, high) or None."""

    def paint(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2, sharey=True)
        for axes, key, at, name in (
            (left, "speedup", 1.0, "speed-up (ratio of medians)"),
            (right, "drop", margin, "top-1 drop (points)"),
        ):
            for place, row in enumerate(rows):
                _whisker(axes, row[key], len(rows) - 1 - place, row)
            axes.axvline(at, color=INK, lw=0.9, ls=(0, (4, 3)))
            axes.set_xlabel(name)
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.margins(x=0.12)
        right.axvline(0, color=RULE, lw=0.9)
        left.set_yticks(range(len(rows))[::-1], [row["label"] for row in rows])

    return paint


def curves(panels: Sequence[tuple[str, Sequence[tuple[str, np.ndarray, np.ndarray]]]], *, axis: str) -> Any:
    """One panel per quantity: its name, and a name with x and y for each line; lines differ in colour and dash."""
    colours, dashes = (FP32, INT8, FP16, INK, MUTED), ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)))

    def paint(canvas: Canvas) -> None:
        grid = canvas.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, lines) in zip(grid, panels, strict=True):
            for i, (_, x, y) in enumerate(lines):
                mark = "o" if len(x) < 30 else ""
                axes.plot(x, y, color=colours[i % 5], ls=dashes[i % 5], lw=1.5, marker=mark, ms=3.5)
            axes.set_title(name, loc="left", fontsize=9.5, color=INK)
            axes.set_xlabel(axis)
            axes.grid(axis="y")
            axes.margins(x=0.02)
            if len(lines) > 1:
                axes.legend([line[0] for line in lines], frameon=False, fontsize=8.5)

    return paint


def _point(axes: Any, p: Mapping[str, Any], *, area: float) -> None:
    colour = COLOUR[p["precision"]]
    if p["low"] is not None and p["high"] is not None:
        axes.vlines(p["x"], p["low"], p["high"], color=colour, lw=1.1, alpha=0.7, zorder=2)
    style: dict[str, Any] = {"marker": SHAPE[p["precision"]], "s": area, "zorder": 3}
    if p["valid"]:
        axes.scatter(p["x"], p["y"], color=colour, alpha=0.8, edgecolors=PAPER, linewidths=0.8, **style)
    else:
        axes.scatter(p["x"], p["y"], facecolors="none", edgecolors=colour, linestyles=(0, (2, 1.5)), lw=1.5, **style)
    if p["picked"]:
        axes.scatter(
            p["x"], p["y"], marker="o", s=area * 2 + 160, facecolors="none", edgecolors=INK, linewidths=1.1, zorder=4
        )


def _place_labels(axes: Any, points: Sequence[Mapping[str, Any]], areas: Sequence[float], mark: float | None) -> None:
    """Put each label where it covers least of points, lines and earlier labels; the picked one comes first."""
    renderer = axes.figure.canvas.get_renderer()
    axes.figure.canvas.draw()
    inside = axes.get_window_extent(renderer)
    centres = axes.transData.transform([(p["x"], p["y"]) for p in points])
    reach = [np.sqrt(area / np.pi) * axes.figure.dpi / 72 for area in areas]
    taken = [Bbox.from_bounds(x - r, y - r, 2 * r, 2 * r) for (x, y), r in zip(centres, reach, strict=True)]
    for p, (x, _) in zip(points, centres, strict=True):
        if p["low"] is not None and p["high"] is not None:
            low, high = axes.transData.transform([(p["x"], p["low"]), (p["x"], p["high"])])[:, 1]
            taken.append(Bbox.from_bounds(x - 2, low, 4, high - low))
    if mark is not None:
        _, level = axes.transData.transform((points[0]["x"], mark))
        taken.append(Bbox.from_bounds(inside.x0, level - 2, inside.width, 4))
    for p in sorted(points, key=lambda p: (not p["picked"], p["x"], p["y"], p["label"])):
        text = axes.annotate(
            p["label"],
            (p["x"], p["y"]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=INK,
            fontweight="bold" if p["picked"] else "normal",
        )
        boxes = []
        for place in _PLACES:
            _move(text, place)
            box = text.get_window_extent(renderer)
            outside = max(0.0, inside.x0 - box.x0) + max(0.0, box.x1 - inside.x1)
            outside += max(0.0, inside.y0 - box.y0) + max(0.0, box.y1 - inside.y1)
            far = 90 if abs(place[1]) > 20 else 0  # a label that stands off may be read as another point's
            boxes.append((sum(_overlap(box, other) for other in taken) + 40 * outside + far, box))
        best = min(range(len(_PLACES)), key=lambda i: (boxes[i][0], i))
        _move(text, _PLACES[best])
        taken.append(boxes[best][1])


def _move(text: Any, place: tuple[float, float, str, str]) -> None:
    x, y, across, up = place
    text.xyann = (x, y)
    text.set(ha=across, va=up)


def _overlap(a: Any, b: Any) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _whisker(axes: Any, value: tuple[float, float | None, float | None] | None, y: int, row: Mapping[str, Any]) -> None:
    if value is None:
        axes.set_yticks([])
        return
    middle, low, high = value
    colour = COLOUR[row["precision"]]
    if low is not None and high is not None:
        axes.hlines(y, low, high, color=colour, lw=2)
    axes.plot([middle], [y], SHAPE[row["precision"]], ms=7, mfc=colour, mec=colour, zorder=3)


def _ms_axis(axes: Any, values: Sequence[float], *, margin: float) -> None:
    """A logarithmic axis of milliseconds with plain numbers."""
    axes.set_xscale("log")
    low, high = min(values, default=1.0), max(values, default=1.0)
    if margin:
        room = max(np.log(high / low) * margin, 0.25)
        axes.set_xlim(low / np.exp(room), high * np.exp(room))
    wide = np.log10(axes.get_xlim()[1] / axes.get_xlim()[0])
    subs = (1, 2, 5) if wide > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
