"""The report's tables: rows and records in, text cells out. What is shown is here; how it looks is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from robx.eval.report.collect import Packed, Sourced
from robx.eval.report.rows import Figure, Row, ratio
from robx.eval.report.text import DASH, at_most, brief, hundredths, interval, megabytes, number, percent, spell
from robx.records import Rung, Value

# What the page shows of a record, in this order; the JSON beside it holds every other figure as well.
_LATENCIES = {
    "p50": ("p50", "ms"),
    "p90": ("p90", "ms"),
    "p99": ("p99", "ms"),
    "sustained": ("Sustained p50", "ms"),
    "sustained_p90": ("Sustained p90", "ms"),
    "slowdown": ("Slow-down", "%"),
    "first": ("First call", "ms"),
    "load": ("Load", "ms"),
    "preprocess": ("Preprocess", "ms"),
    "end_to_end": ("End to end", "ms"),
    "peak_memory": ("Peak memory", "MB"),
    "gpu_memory": ("GPU memory", "MB"),
    "energy": ("Energy", "J"),
    "gpu_energy": ("GPU energy", "J"),
    "throughput": ("Throughput", "images/s"),
}
_RUNG_FIGURES = {
    "probe_drop": "Probe drop",
    "knn_drop": "kNN drop",
    "cosine_mean": "Cosine mean",
    "cosine_p1": "Cosine p1",
    "cosine_min": "Cosine min",
    "speedup_fp32": "Speed-up vs fp32",
    "speedup_fp16": "Speed-up vs fp16",
    "bytes": "Size",
}


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller second line, where the figure comes from, and the style of its state."""

    text: str
    note: str = ""
    source: str = ""
    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A caption, column heads (those in `numeric` are right-aligned), and rows whose first cell is their head.

    `lines` is empty or holds one cell a row: what is too long for a column, shown below its row at full width.
    `notes` are what several rows have in common: cells refer to them by number, from 1.
    """

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[str] = frozenset()
    lines: tuple[Cell, ...] = ()
    notes: tuple[str, ...] = ()


def model_table(rows: Sequence[Row], *, caption: str, picked: Row | None) -> Table:
    """The table of the first screen: one row a model on one device."""
    linear = any("linear" in row.accuracy for row in rows)  # a column of dashes says nothing
    accuracies = ("kNN top-1", "Linear top-1") if linear else ("kNN top-1",)
    numeric = ("Size", *accuracies, "p50", "p90", "Speed-up")
    heads = ("Model", "Size", *accuracies, "Drop vs fp32", "p50", "p90", "Speed-up", "Latency is")
    body = tuple(
        (
            Cell(
                row.name,
                f"{row.format} {row.precision}",
                row.folder,
                _precision(row) + (" picked" if row is picked else ""),
            ),
            Cell(megabytes(row.bytes), source=row.folder) if row.bytes else Cell(DASH),
            _accuracy(row.accuracy.get("knn")),
            *([_accuracy(row.accuracy.get("linear"))] if linear else []),
            _drop(row),
            _ms(row, row.latency.get("p50")),
            _p90(row),
            _speedup(row),
            validity(row),
        )
        for row in rows
    )
    return Table(caption=caption, heads=heads, rows=body, numeric=frozenset(numeric))


def latency_table(rows: Sequence[Row]) -> Table:
    """The figures of every latency record that a reader compares, and its verdict with the reasons in full below."""
    keys = [key for key in _LATENCIES if any(key in row.latency for row in rows)]
    heads = {key: _LATENCIES[key][0] + f" ({_LATENCIES[key][1]})" for key in keys}
    return Table(
        caption="Every latency, with its interval",
        heads=("Model", *heads.values()),
        rows=tuple(
            (Cell(row.label, row.device, row.folder, _precision(row)), *(_latency(row, key) for key in keys))
            for row in rows
        ),
        numeric=frozenset(heads.values()),
        lines=tuple(_verdict(row) for row in rows),
    )


def pair_rows(rows: Sequence[Row]) -> list[tuple[Row, Row, Figure | None]]:
    """(slower precision, quicker precision, times faster) on the same student, format and device."""
    found = []
    for low, high in (("int8", "fp32"), ("int8", "fp16"), ("fp16", "fp32")):
        for row in rows:
            if row.precision != low or not row.device or row.validity == "INVALID":
                continue
            for base in rows:
                same = (base.student, base.format, base.device) == (row.student, row.format, row.device)
                if same and base.precision == high and base.validity != "INVALID":
                    found.append((base, row, row.speedup if high == "fp32" else ratio(base, row)))
    return found


def pair_table(pairs: Sequence[tuple[Row, Row, Figure | None]]) -> Table:
    """Each low precision against the higher one of the same student and format on the same device."""
    body = tuple(
        (
            Cell(row.label, f"against {base.precision} on {row.device}", row.folder, _precision(row)),
            _ms(base, base.latency.get("p50")),
            _ms(row, row.latency.get("p50")),
            Cell(*_times(figure), _state(row) or _state(base)),
            Cell(f"{base.bytes / row.bytes:.2f} ×" if base.bytes and row.bytes else DASH),
            _drop(row),
            _worse(base, row),
        )
        for base, row, figure in pairs
    )
    heads = ("Pair", "p50 before", "p50 after", "Times faster", "Times smaller", "Drop vs fp32", "Latency is")
    return Table(caption="Precisions in pairs", heads=heads, rows=body, numeric=frozenset(heads[1:5]))


def rung_table(packed: Packed, label: str) -> Table:
    """What the export ladder tried for one bundle: the figures that decide, and below each rung why it stands so."""
    bundle = packed.bundle
    keys = [key for key in _RUNG_FIGURES if any(key in rung.values for rung in bundle.rungs)]
    heads = [_RUNG_FIGURES[key] for key in keys]
    return Table(
        caption=f"{label}: asked for {bundle.requested}, shipped {bundle.precision}, gate {bundle.verdict}",
        heads=("Rung", "Accuracy", "Speed", *heads),
        rows=tuple(_rung(rung, i, packed, keys) for i, rung in enumerate(bundle.rungs)),
        numeric=frozenset(heads),
        lines=tuple(Cell(brief(rung.settings), rung.reason) for rung in bundle.rungs),
    )


def validity(row: Row) -> Cell:
    """VALID, UNSTABLE or INVALID, with the reasons' codes; what to doubt has them in full."""
    if row.validity is None:
        return Cell("not measured", mark="missing")
    codes = ", ".join(dict.fromkeys(reason.split(":", 1)[0] or reason for reason in row.reasons))
    return Cell(row.validity, "; ".join(filter(None, (codes, _profile(row)))), mark=row.validity.lower())


def measured_span(measurements: Iterable[Sourced]) -> tuple[str, str] | None:
    """First and last start of the measurements."""
    times = sorted(m.record.started for m in measurements)
    return (times[0], times[-1]) if times else None


def _worse(base: Row, row: Row) -> Cell:
    return validity(base if base.validity == "UNSTABLE" else row)


def _rung(rung: Rung, index: int, packed: Packed, keys: Sequence[str]) -> tuple[Cell, ...]:
    place = f"{packed.folder}/manifest.json rungs[{index}]"
    name = rung.name + (" (shipped)" if rung.kept else "")
    return (
        Cell(name, source=place, mark="picked" if rung.kept else ""),
        Cell(rung.accuracy_said, mark=rung.accuracy.lower() if rung.was_judged else "missing"),
        Cell(rung.speed, mark=rung.speed.lower()),
        *(_rung_figure(key, rung.values.get(key), place) for key in keys),
    )


def _rung_figure(key: str, value: Value | None, place: str) -> Cell:
    if value is None:
        return Cell(DASH)
    source = f"{place} values.{key}"
    if key.endswith("_drop"):
        return Cell(f"{hundredths(value.value)} pt", interval(value, hundredths), source)
    if key.startswith("speedup"):
        return Cell(*_times(Figure(value=value, source=source)))
    if key == "bytes":
        return Cell(megabytes(int(value.value)), source=source)
    return Cell(f"{value.value:.4f}", interval(value, lambda x: f"{x:.3f}"), source)


def _latency(row: Row, key: str) -> Cell:
    """One figure of a latency record, without the unit when that is its column's."""
    figure = row.latency.get(key)
    if figure is None:
        return Cell(DASH, row.missing.get(key, ""), mark="missing")
    value = figure.value
    text = number(value.value) if value.unit == _LATENCIES[key][1] else spell(value)
    bound = f"at most {at_most(value.high)}" if value.low is None and value.high is not None else ""
    return Cell(text, interval(value) or bound, figure.source, _state(row))


def _verdict(row: Row) -> Cell:
    """As `validity`, with the reasons in full."""
    return replace(validity(row), note="; ".join(filter(None, (*row.reasons, _profile(row)))))


def _profile(row: Row) -> str:
    return f"{row.profile} profile, not for publication" if row.profile in ("rapid", "quick") else ""


def _accuracy(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell(DASH, "not measured", mark="missing")
    note = interval(figure.value, percent)
    if figure.how != "measured":
        note = "as its student" if figure.how == "inherited" else "student minus drop"
    return Cell(f"{percent(figure.value.value)} %", note, figure.source, figure.how)


def _drop(row: Row) -> Cell:
    if row.gate == "REFERENCE":
        return Cell("reference")
    verdict = row.judged if row.precision != "fp32" or row.drop else row.gate
    if row.drop is None:
        return Cell(verdict.replace("_", " "), row.judged_why or row.gate_reason, mark=verdict.lower())
    value = row.drop.value
    span = interval(value, hundredths)
    return Cell(
        f"{hundredths(value.value)} pt", ", ".join(filter(None, (span, verdict))), row.drop.source, verdict.lower()
    )


def _ms(row: Row, figure: Figure | None) -> Cell:
    if figure is None:
        return Cell(DASH, mark="missing")
    return Cell(f"{number(figure.value.value)} ms", interval(figure.value), figure.source, _state(row))


def _p90(row: Row) -> Cell:
    figure = row.latency.get("p90") or row.bound
    if figure is None:
        return Cell(DASH, mark="missing")
    note = f"at most {at_most(row.bound.value.value)}" if row.bound else "no upper bound"
    return Cell(f"{number(figure.value.value)} ms", note, figure.source, _state(row))


def _speedup(row: Row) -> Cell:
    if row.speedup is None:
        return (
            Cell("1 ×", "baseline") if row.precision == "fp32" and row.device and row.format != "torch" else Cell(DASH)
        )
    return Cell(*_times(row.speedup), _state(row) or ("shaky" if row.speedup_shaky else ""))


def _times(figure: Figure | None) -> tuple[str, str, str]:
    if figure is None:
        return DASH, "", ""
    return f"{figure.value.value:.2f} ×", interval(figure.value, lambda x: f"{x:.2f}"), figure.source


def _precision(row: Row) -> str:
    return row.precision


def _state(row: Row) -> str:
    return {"UNSTABLE": "shaky", "INVALID": "void"}.get(row.validity or "", "")
