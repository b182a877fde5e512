"""The report's accuracy tables: one row per protocol, one per bundle against its fp32 student, and all figures."""

from __future__ import annotations

from robx.eval.report.collect import ReportData, Sourced
from robx.eval.report.tables import Cell, Table
from robx.eval.report.text import (
    DASH,
    FOUR_DECIMALS,
    FOUR_DIGITS,
    PERCENT,
    POINTS,
    TWO_DIGITS,
    Form,
    interval,
    verdict_text,
)
from robx.records import Accuracy, Fidelity, Value

# The figures of a Fidelity that the page shows: key, heading, form.
_FIDELITY: tuple[tuple[str, str, Form], ...] = (
    ("probe_drop", "Probe drop", POINTS),
    ("knn_drop", "kNN drop", POINTS),
    ("probe_agreement", "Agreement", PERCENT),
    ("neighbour_overlap", "Neighbour overlap", PERCENT),
    ("cosine_mean", "Mean cosine", FOUR_DECIMALS),
    ("cosine_p1", "p1 cosine", FOUR_DECIMALS),
    ("cka", "CKA", FOUR_DECIMALS),
    ("similarity_spearman", "Rank correlation", FOUR_DECIMALS),
    ("repeat_max_abs", "Repeat difference", TWO_DIGITS),
)


def protocol_table(data: ReportData) -> Table:
    """Top-1 and top-5 of each protocol for each model, on any images."""
    rows = tuple(
        (
            Cell(data.labels.get(record.model_id, record.model_id), record.protocol),
            *(_cell(measurement, record.values, key, PERCENT) for key in ("top1", "top5")),
            Cell(_count(record)),
            Cell(f"{record.data.name}, {record.data.images} images"),
        )
        for measurement, record in data.accuracies
    )
    heads = ("Model and protocol", "Top-1", "Top-5", "Evaluated", "Test set")
    return Table(caption="Accuracy by protocol", heads=heads, rows=rows, numeric=frozenset(heads[1:4]))


def fidelity_table(data: ReportData) -> Table:
    """Each bundle against its fp32 student, with the verdict and its reasons below."""
    shown = [(k, head, form) for k, head, form in _FIDELITY if any(k in r.values for _, r in data.fidelities)]
    rows = tuple(
        (
            Cell(data.labels.get(record.bundle_id, record.bundle_id), source=measurement.place),
            *(_cell(measurement, record.values, key, form) for key, _, form in shown),
        )
        for measurement, record in data.fidelities
    )
    lines = tuple(Cell(_verdict(r), "; ".join(r.reasons), mark=r.verdict.lower()) for _, r in data.fidelities)
    heads = [head for _, head, _ in shown]
    return Table(
        caption="Bundles vs their fp32 student, on the same images",
        heads=("Bundle", *heads),
        rows=rows,
        numeric=frozenset(heads),
        lines=lines,
    )


def figure_table(data: ReportData) -> Table:
    """Every accuracy and fidelity figure; what a record says of all its figures is a numbered note below."""
    notes: dict[str, int] = {}
    body = []
    records: list[tuple[Sourced, Accuracy | Fidelity]] = [*data.accuracies, *data.fidelities]
    for measurement, record in records:
        if isinstance(record, Accuracy):
            what, on = record.protocol, f"{record.data.name}, {record.data.images} images"
        else:
            what, on = "vs fp32", "; ".join((_verdict(record), *record.reasons))
        note = str(notes.setdefault(on, len(notes) + 1))
        model = Cell(data.labels.get(measurement.model_id, measurement.model_id), what)
        body += [
            (
                model,
                Cell(key),
                Cell(value, source=f"{measurement.place} values.{key}"),
                Cell(interval(value, FOUR_DIGITS) or DASH),
                Cell(DASH if value.n is None else str(value.n)),
                Cell(note),
            )
            for key, value in record.values.items()
        ]
    heads = ("Model and protocol", "Figure", "Value", "95 % interval", "n", "Note")
    return Table(
        caption="All accuracy figures", heads=heads, rows=tuple(body), numeric=frozenset(heads[2:]), notes=tuple(notes)
    )


def _cell(measurement: Sourced, values: dict[str, Value], key: str, form: Form) -> Cell:
    if key not in values:
        return Cell(DASH, mark="missing")
    return Cell(values[key], source=f"{measurement.place} values.{key}", form=form)


def _verdict(record: Fidelity) -> str:
    margin = record.settings.get("margin")
    return verdict_text(record.verdict, margin if isinstance(margin, int | float) else None)


def _count(record: Accuracy) -> str:
    top1 = record.values.get("top1")
    return str(record.data.images if top1 is None or top1.n is None else top1.n)
