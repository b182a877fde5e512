"""The report's accuracy: one row a protocol, one a bundle against its fp32 student, and every figure of both."""

from __future__ import annotations

from collections.abc import Callable

from robx.eval.report.collect import ReportData, Sourced
from robx.eval.report.tables import Cell, Table
from robx.eval.report.text import DASH, hundredths, interval, percent, spell
from robx.records import Accuracy, Fidelity, Value


def _four(x: float) -> str:
    return f"{x:.4f}"


# Of a Fidelity: the figure, its heading, how it is written, and its unit.
_FIDELITY: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("probe_drop", "Probe drop", hundredths, " pt"),
    ("knn_drop", "kNN drop", hundredths, " pt"),
    ("probe_agreement", "Same answer", percent, " %"),
    ("neighbour_overlap", "Neighbours kept", percent, " %"),
    ("cosine_mean", "Cosine mean", _four, ""),
    ("cosine_p1", "Cosine p1", _four, ""),
    ("cka", "CKA", _four, ""),
    ("similarity_spearman", "Rank correlation", _four, ""),
    ("repeat_max_abs", "Repeat differs by", lambda x: f"{x:.2g}", ""),
)


def protocol_table(data: ReportData, labels: dict[str, str]) -> Table:
    """Each protocol's headline for each model, on whatever images."""
    found = [(m, m.record) for m in data.of_kind(Accuracy) if isinstance(m.record, Accuracy)]
    rows = tuple(
        (
            Cell(labels.get(record.model_id, record.model_id), record.protocol),
            *(_share(measurement, record.values.get(key), key) for key in ("top1", "top5")),
            Cell(_count(record)),
            Cell(f"{record.data.name}, {record.data.images} images"),
        )
        for measurement, record in found
    )
    heads = ("Model and protocol", "Top-1", "Top-5", "Judged", "On")
    return Table(caption="Accuracy by protocol", heads=heads, rows=rows, numeric=frozenset(heads[1:4]))


def fidelity_table(data: ReportData, labels: dict[str, str]) -> Table:
    """Each bundle's answers against its fp32 student's, and below each why it was judged so."""
    found = [(m, m.record) for m in data.of_kind(Fidelity) if isinstance(m.record, Fidelity)]
    shown = [figure for figure in _FIDELITY if any(figure[0] in record.values for _, record in found)]
    rows = tuple(
        (Cell(labels.get(r.bundle_id, r.bundle_id), source=m.place), *(_figure(m, r, *figure) for figure in shown))
        for m, r in found
    )
    lines = tuple(Cell(r.verdict, "; ".join(r.reasons), mark=r.verdict.lower()) for _, r in found)
    heads = [head for _, head, _, _ in shown]
    return Table(
        caption="Bundles against their fp32 student, on the same images",
        heads=("Bundle", *heads),
        rows=rows,
        numeric=frozenset(heads),
        lines=lines,
    )


def figure_table(data: ReportData, labels: dict[str, str]) -> Table:
    """Every accuracy and fidelity figure; what a record says of all its figures is a note that its rows refer to."""
    notes: dict[str, int] = {}
    body = []
    for measurement in [*data.of_kind(Accuracy), *data.of_kind(Fidelity)]:
        record = measurement.record
        if isinstance(record, Accuracy):
            who, what, on = record.model_id, record.protocol, f"{record.data.name}, {record.data.images} images"
        elif isinstance(record, Fidelity):
            who, what, on = record.bundle_id, "against fp32", "; ".join((record.verdict, *record.reasons))
        else:
            continue
        note = notes.setdefault(on, len(notes) + 1)
        for key, value in record.values.items():
            body.append(
                (
                    Cell(labels.get(who, who), what),
                    Cell(key),
                    Cell(spell(value), source=f"{measurement.place} values.{key}"),
                    Cell(interval(value, lambda x: f"{x:.4g}") or DASH),
                    Cell(DASH if value.n is None else str(value.n)),
                    Cell(str(note)),
                )
            )
    heads = ("Model and protocol", "Figure", "Value", "95 % interval", "n", "Note")
    return Table(
        caption="Every accuracy figure",
        heads=heads,
        rows=tuple(body),
        numeric=frozenset(heads[2:]),
        notes=tuple(notes),
    )


def _share(measurement: Sourced, value: Value | None, key: str) -> Cell:
    if value is None:
        return Cell(DASH, mark="missing")
    return Cell(f"{percent(value.value)} %", interval(value, percent), f"{measurement.place} values.{key}")


def _count(record: Accuracy) -> str:
    top1 = record.values.get("top1")
    return str(record.data.images if top1 is None or top1.n is None else top1.n)


def _figure(
    measurement: Sourced, record: Fidelity, key: str, head: str, write: Callable[[float], str], unit: str
) -> Cell:
    value = record.values.get(key)
    if value is None:
        return Cell(DASH, mark="missing")
    return Cell(write(value.value) + unit, interval(value, write), f"{measurement.place} values.{key}")
