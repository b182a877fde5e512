"""Which records go into which figure, and what each figure says in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from robx.errors import counted
from robx.eval.report import plots
from robx.eval.report.collect import ReportData
from robx.eval.report.rows import Figure, Row
from robx.eval.report.svg import draw
from robx.eval.report.text import clean, hundredths, number, percent


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An SVG element, ready for the page, and its caption."""

    svg: Markup
    caption: str


def pareto_figure(
    name: str,
    rows: Sequence[Row],
    *,
    protocol: str | None,
    margin: float,
    axis: str,
    picked: Row | None,
    device: str,
) -> Picture | None:
    """Accuracy against the upper bound of p90, with the file size as area; None when no row has both."""
    shown = [(row, y) for row in rows if row.bound and row.validity != "INVALID" and (y := _height(row, protocol))]
    if not shown:
        return None
    points: list[dict[str, Any]] = [
        {
            "x": row.bound.value.value if row.bound else 0.0,
            "y": y[0],
            "low": y[1],
            "high": y[2],
            "bytes": row.bytes,
            "precision": row.precision,
            "label": short(f"{row.name} {row.kind}"),
            "valid": row.validity == "VALID",
            "picked": row is picked,
        }
        for row, y in shown
    ]
    best = max((y[0] for row, y in shown if row.precision == "fp32"), default=None)
    front = _front([(p["x"], p["y"]) for p in points if p["valid"]])
    words = "; ".join(
        f"{p['label']}: {percent(p['y'])} at {number(p['x'])} ms{'' if p['valid'] else ', UNSTABLE'}"
        f"{', recommended' if p['picked'] else ''}"
        for p in points
    )
    svg = draw(
        plots.pareto(points, mark=None if best is None else best - margin, axis=clean(short(axis, 60)), front=front),
        name=name,
        title=f"Accuracy against latency on {clean(device)}",
        text=clean(words),
        size=(7.0, 4.5),
    )
    caption = f"Up and left is better. Area: file size. Dashed line: {margin:g} pt below the best fp32 model."
    if any(not p["valid"] for p in points):
        caption += " Hollow: UNSTABLE."
    return Picture(svg=Markup(svg), caption=caption)


def latency_figures(rows: Sequence[Row], samples: Mapping[str, tuple[np.ndarray, ...]]) -> list[Picture]:
    """For each device, the latency distribution of each model from its raw samples."""
    found = []
    for index, device in enumerate(sorted({row.device for row in rows})):
        here = [r for r in rows if r.device == device and r.samples in samples and r.validity != "INVALID"]
        if not here:
            continue
        bands: list[dict[str, Any]] = [
            {
                "label": short(f"{row.name} {row.kind}") + ("" if row.validity == "VALID" else " ▲"),
                "ms": np.concatenate(samples[row.samples]),
                "precision": row.precision,
                "valid": row.validity == "VALID",
                "p50": _value(row.latency.get("p50")),
                "p90": _value(row.latency.get("p90")),
            }
            for row in here
        ]
        words = "; ".join(
            f"{b['label']}: {len(b['ms'])} calls, {number(float(b['ms'].min()))} to {number(float(b['ms'].max()))} ms"
            for b in bands
        )
        svg = draw(
            plots.distributions(bands),
            name=f"latency-{index}",
            title=f"Latency distribution on {clean(device)}",
            text=clean(words),
            size=(9.6, 0.9 + 0.52 * len(bands)),
        )
        left_out = sum(int(np.count_nonzero(b["ms"] > plots.longest(b["ms"]))) for b in bands)
        without = f", without the {left_out} above each model's 99th percentile or twice its p90" if left_out else ""
        caption = f"{device}: all raw samples{without}. Long tick: median. Short tick: p90. Hollow, ▲: UNSTABLE."
        found.append(Picture(svg=Markup(svg), caption=caption))
    return found


def pair_figure(pairs: Sequence[tuple[Row, Row, Figure | None]], *, margin: float) -> Picture | None:
    """How much faster and how much less accurate each lower precision is, with intervals."""
    rows: list[dict[str, Any]] = [
        {
            "label": short(f"{row.name} {row.kind} / {base.precision}", 44),
            "precision": row.precision,
            "speedup": _triple(figure),
            "drop": _triple(row.drop),
        }
        for base, row, figure in pairs
        if figure
    ]
    if not rows:
        return None
    words = "; ".join(
        f"{r['label']}: {r['speedup'][0]:.2f} times as fast"
        + (f", accuracy drop {hundredths(r['drop'][0])} points" if r["drop"] else "")
        for r in rows
        if r["speedup"]
    )
    svg = draw(
        plots.pairs(rows, margin=margin),
        name="pairs",
        title="Speed-up and accuracy drop",
        text=clean(words),
        size=(9.6, 1.0 + 0.42 * len(rows)),
    )
    caption = (
        "Faster is right of 1, and certain where the whole interval is. "
        f"A drop left of {margin:g} pt is within the margin."
    )
    if left_out := len(pairs) - len(rows):
        caption += f" Without {counted(left_out, 'pair')} whose speed-up is not known or not reliable."
    return Picture(svg=Markup(svg), caption=caption)


def curve_figures(data: ReportData) -> list[tuple[str, Picture]]:
    """For each run, its loss and the kNN accuracy that was monitored."""
    found = []
    for index, run in enumerate(data.runs):
        x_key = next((k for k in ("step", "epoch", "images_seen") if any(k in line for line in run.curves)), None)
        panels = [
            (title, lines)
            for title, wanted in (("Loss", _is_loss), ("Monitored kNN top-1 (%)", _is_probe))
            if x_key and (lines := _lines(run.curves, x_key, wanted))
        ]
        if not panels or x_key is None:
            continue
        words = "; ".join(
            f"{name} from {y[0]:.4g} to {y[-1]:.4g} in {len(y)} points" for _, lines in panels for name, _, y in lines
        )
        svg = draw(
            plots.curves(panels, axis=x_key.replace("_", " ")),
            name=f"curves-{index}",
            title=f"Training of {clean(data.names[run.student.sha256])}",
            text=clean(words),
            size=(9.6, 3.0),
        )
        caption = f"{run.folder}/metrics.jsonl, {len(run.curves)} lines."
        found.append((data.names[run.student.sha256], Picture(svg=Markup(svg), caption=caption)))
    return found


def short(text: str, most: int = 36) -> str:
    """`text` for a figure: clean, on one line, at most `most` characters, without its middle if it is longer.

    What tells two models apart (precision, folder) stands at the end.
    """
    line = " ".join(clean(text).split())
    head = (most - 1) // 3
    return line if len(line) <= most else f"{line[:head]}…{line[head + 1 - most :]}"


def _lines(curves: Sequence[Mapping[str, float]], x_key: str, wanted: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
    keys = list(dict.fromkeys(key for line in curves for key in line if wanted(key)))
    found = []
    for key in keys[:4]:
        pairs = [(line[x_key], line[key]) for line in curves if key in line and x_key in line]
        if pairs:
            x, y = np.array(sorted(pairs)).T
            if key.startswith("teacher") and len(x) == 1:  # a constant level to compare with
                x, y = np.array([x[0], max(line.get(x_key, x[0]) for line in curves)]), np.repeat(y, 2)
            found.append((short(key), x, y))
    return found


def _is_loss(key: str) -> bool:
    return key.rsplit(".", 1)[-1] == "loss"


def _is_probe(key: str) -> bool:
    return "knn" in key.lower() and "seconds" not in key


def _height(row: Row, protocol: str | None) -> tuple[float, float | None, float | None] | None:
    """Top-1 when there is a protocol; else the negated drop, with fp32 at zero."""
    if protocol is not None:
        return _triple(row.accuracy.get(protocol))
    if row.drop:
        v = row.drop.value
        return -v.value, None if v.high is None else -v.high, None if v.low is None else -v.low
    return (0.0, None, None) if row.precision == "fp32" else None


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, ordered by latency."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found


def _triple(figure: Figure | None) -> tuple[float, float | None, float | None] | None:
    return None if figure is None else (figure.value.value, figure.value.low, figure.value.high)


def _value(figure: Figure | None) -> float | None:
    return None if figure is None else figure.value.value
