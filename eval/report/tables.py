"""The report's tables: rows and records in, cells with figures out. The templates write the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from robx.eval.report.collect import Packed
from robx.eval.report.rows import Figure, Row
from robx.eval.report.text import (
    DASH,
    FOUR_DECIMALS,
    IN_THE_HEAD,
    MS,
    PERCENT,
    POINTS,
    SIZE,
    TIMES,
    Form,
    brief,
    interval,
    verdict_text,
)
from robx.records import Rung, Value

# The figures of a latency record that the page shows, in this order, with their units; the JSON holds all of them.
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
# The figures of an export candidate: heading and form.
_CANDIDATE_FIGURES = {
    "probe_drop": ("Probe drop", POINTS),
    "knn_drop": ("kNN drop", POINTS),
    "cosine_mean": ("Mean cosine", FOUR_DECIMALS),
    "cosine_p1": ("p1 cosine", FOUR_DECIMALS),
    "cosine_min": ("Min cosine", FOUR_DECIMALS),
    "speedup_fp32": ("Speed-up vs fp32", TIMES),
    "speedup_fp16": ("Speed-up vs fp16", TIMES),
    "bytes": ("Size", SIZE),
}


@dataclass(frozen=True)
class Cell:
    """A text, or a figure and the form to write it in.

    `note` is a smaller second line, after a figure's interval; `source` is where the figure was read; `mark` names the
    style of its state.
    """

    what: str | Value
    note: str = ""
    source: str = ""
    mark: str = ""
    form: Form | None = None

    @property
    def second_line(self) -> str:
        """The figure's interval and the note."""
        known = interval(self.what, self.form) if isinstance(self.what, Value) and self.form else ""
        return ", ".join(filter(None, (known, self.note)))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A caption, column heads (those in `numeric` are right-aligned), and rows whose first cell is their head.

    `lines` is empty or holds one cell per row, shown below the row at full width. `notes` are shared by several rows,
    whose cells refer to them by number, from 1.
    """

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[str] = frozenset()
    lines: tuple[Cell, ...] = ()
    notes: tuple[str, ...] = ()


_UNRELIABLE = Cell("not reliable", mark="missing")  # a ratio of latencies that are not both VALID


def figure_cell(found: Figure | None, form: Form, *, mark: str = "", note: str = "") -> Cell:
    """The cell of a figure; a dash where there is none."""
    return Cell(found.value, note, found.source, mark, form) if found else Cell(DASH, mark="missing")


def model_table(rows: Sequence[Row], *, caption: str, picked: Row | None) -> Table:
    """The table of the first screen: one row per model on one device."""
    linear = any("linear" in row.accuracy for row in rows)  # a column of dashes says nothing
    accuracies = {"knn": "kNN top-1"} | ({"linear": "Linear top-1"} if linear else {})
    heads = ("Model", "Size", *accuracies.values(), "Drop vs fp32", "p50", "p90", "Speed-up", "Latency")
    body = tuple(
        (
            Cell(
                row.name,
                row.kind,
                row.folder,
                row.precision + (" picked" if row is picked else ""),
            ),
            Cell(Value(value=row.bytes), source=row.folder, form=SIZE) if row.bytes else Cell(DASH),
            *(_accuracy(row.accuracy.get(protocol)) for protocol in accuracies),
            _drop(row),
            figure_cell(row.latency.get("p50"), MS, mark=_state(row)),
            _p90(row),
            _speedup(row),
            validity(row),
        )
        for row in rows
    )
    numeric = frozenset({"Size", *accuracies.values(), "p50", "p90", "Speed-up"})
    return Table(caption=caption, heads=heads, rows=body, numeric=numeric)


def latency_table(rows: Sequence[Row]) -> Table:
    """The figures of every latency record that readers compare, with the verdict and its reasons below."""
    keys = [key for key in _LATENCIES if any(key in row.latency for row in rows)]
    heads = {key: _LATENCIES[key][0] + f" ({_LATENCIES[key][1]})" for key in keys}
    return Table(
        caption="All latencies",
        heads=("Model", *heads.values()),
        rows=tuple(
            (Cell(row.label, row.device, row.folder, row.precision), *(_latency(row, key) for key in keys))
            for row in rows
        ),
        numeric=frozenset(heads.values()),
        lines=tuple(_reasons(row) for row in rows),
    )


def pair_table(pairs: Sequence[tuple[Row, Row, Figure | None]]) -> Table:
    """Each lower precision against a higher one of the same student and format on the same device."""
    body = tuple(
        (
            Cell(row.label, f"against {base.precision} on {row.device}", row.folder, row.precision),
            figure_cell(base.latency.get("p50"), MS, mark=_state(base)),
            figure_cell(row.latency.get("p50"), MS, mark=_state(row)),
            figure_cell(speedup, TIMES) if speedup or base.validity == row.validity == "VALID" else _UNRELIABLE,
            Cell(Value(value=base.bytes / row.bytes), form=TIMES) if base.bytes and row.bytes else Cell(DASH),
            _drop(row),
            validity(base if base.validity == "UNSTABLE" else row),
        )
        for base, row, speedup in pairs
    )
    heads = ("Model", "p50 before", "p50 after", "Speed-up", "Size reduction", "Drop vs fp32", "Latency")
    return Table(caption="Lower precision vs higher", heads=heads, rows=body, numeric=frozenset(heads[1:5]))


def candidate_table(packed: Packed, label: str) -> Table:
    """What export tried for one bundle: the figures that decide, and the reason of each verdict below."""
    bundle = packed.bundle
    keys = [key for key in _CANDIDATE_FIGURES if any(key in rung.values for rung in bundle.rungs)]
    heads = [_CANDIDATE_FIGURES[key][0] for key in keys]
    healed = f"; {bundle.healing.said}" if bundle.healing is not None else ""
    return Table(
        caption=f"{label}: requested {bundle.requested}, shipped {bundle.precision}, gate {bundle.verdict}{healed}",
        heads=("Candidate", "Accuracy", "Speed", *heads),
        rows=tuple(_candidate(rung, i, packed, keys) for i, rung in enumerate(bundle.rungs)),
        numeric=frozenset(heads),
        lines=tuple(Cell(brief(rung.settings), rung.reason) for rung in bundle.rungs),
    )


def validity(row: Row) -> Cell:
    """VALID, UNSTABLE or INVALID, with the codes of its reasons."""
    if row.validity is None:
        return Cell("not measured", mark="missing")
    codes = ", ".join(dict.fromkeys(reason.split(":", 1)[0] or reason for reason in row.reasons))
    return Cell(row.validity, "; ".join(filter(None, (codes, _profile(row)))), mark=row.validity.lower())


def _reasons(row: Row) -> Cell:
    """As `validity`, with the reasons in full."""
    return replace(validity(row), note="; ".join(filter(None, (*row.reasons, _profile(row)))))


def _mark(rung: Rung) -> str:
    """How the accuracy of a candidate is marked: without a verdict on the judging images it is missing."""
    return rung.accuracy.lower() if rung.was_judged and rung.accuracy_said == rung.accuracy else "missing"


def _candidate(rung: Rung, index: int, packed: Packed, keys: Sequence[str]) -> tuple[Cell, ...]:
    place = f"{packed.folder}/manifest.json rungs[{index}]"
    margin = rung.values.get("margin")
    allowed = f"margin {margin.value:g} pt" if margin and rung.was_judged else ""
    return (
        Cell(rung.name + (" (shipped)" if rung.kept else ""), source=place, mark="picked" if rung.kept else ""),
        Cell(rung.accuracy_said, allowed, mark=_mark(rung)),
        Cell(rung.speed, mark=rung.speed.lower()) if rung.values else Cell(DASH, mark="missing"),
        *(_candidate_figure(rung, key, place) for key in keys),
    )


def _candidate_figure(rung: Rung, key: str, place: str) -> Cell:
    if key not in rung.values:
        return Cell(DASH)
    if key.startswith("speedup") and not rung.has_speed:
        return _UNRELIABLE
    return Cell(rung.values[key], source=f"{place} values.{key}", form=_CANDIDATE_FIGURES[key][1])


def _latency(row: Row, key: str) -> Cell:
    """One figure of a latency record, without its unit when that is in the column's head."""
    found = row.latency.get(key)
    if found is None:
        return Cell(DASH, row.missing.get(key, ""), mark="missing")
    unit = found.value.unit
    form = IN_THE_HEAD if unit == _LATENCIES[key][1] else replace(IN_THE_HEAD, unit=f" {unit}" if unit else "")
    return figure_cell(found, form, mark=_state(row))


def _profile(row: Row) -> str:
    return f"{row.profile} profile, not for publication" if row.profile in ("rapid", "quick") else ""


def _accuracy(found: Figure | None) -> Cell:
    if found is None:
        return Cell(DASH, "not measured", mark="missing")
    if found.how == "measured":
        return figure_cell(found, PERCENT, mark="measured")
    bare = replace(found, value=replace(found.value, low=None, high=None))  # the interval is another model's
    note = "same as its student" if found.how == "inherited" else "student minus drop"
    return figure_cell(bare, PERCENT, mark=found.how, note=note)


def _drop(row: Row) -> Cell:
    if row.gate == "REFERENCE":
        return Cell("reference")
    if row.drop is None:
        verdict = row.judged if row.precision != "fp32" else row.gate
        return Cell(verdict.replace("_", " "), row.judged_why or row.gate_reason, mark=verdict.lower())
    return figure_cell(row.drop, POINTS, mark=row.judged.lower(), note=verdict_text(row.judged, row.margin))


def _p90(row: Row) -> Cell:
    found = row.latency.get("p90") or row.bound
    if found is None:
        return Cell(DASH, mark="missing")
    value = replace(found.value, low=None, high=row.bound.value.value if row.bound else None)
    return Cell(value, "" if row.bound else "no upper bound", found.source, _state(row), MS)


def _speedup(row: Row) -> Cell:
    if row.precision == "fp32" and row.device and row.format != "torch":
        return Cell("1 ×", "baseline")
    return _UNRELIABLE if row.speedup_shaky else figure_cell(row.speedup, TIMES)


def _state(row: Row) -> str:
    return {"UNSTABLE": "shaky", "INVALID": "void"}.get(row.validity or "", "")
