"""Joins the records of a report into one row a model and device; every figure keeps the place it was read from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from robx.eval.report.collect import Packed, ReportData, Sourced
from robx.eval.report.report_names import device_label, student_names, text_of
from robx.records import Accuracy, Bundle, Fidelity, Latency, Rung, Validity, Value

# The headline drop first: the customer's head is already trained on fp32 features.
DROPS = ("probe_drop", "knn_drop", "drop")
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value and where it comes from.

    `how`: "measured" (the record's own), "inherited" (an fp32 bundle that equals its student), or "derived"
    (computed here from the figures that `source` names).
    """

    value: Value
    source: str
    how: str = "measured"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one device; `device` is "" when it was never measured on one."""

    model_id: str
    student: str  # SHA-256 of the fp32 student
    name: str  # of the student, unique in the report
    format: str  # a Bundle's, or "torch" for the student itself
    precision: str
    folder: str
    bytes: int | None
    gate: str  # the export gate's verdict; "REFERENCE" for the student itself
    gate_reason: str
    device: str = ""
    accuracy: dict[str, Figure] = field(default_factory=dict)  # protocol -> top-1 in %, all on the headline's images
    drop: Figure | None = None  # points of top-1 lost against the fp32 student, paired
    judged: str = "NOT_JUDGED"  # PASS, FAIL or INCONCLUSIVE of the drop
    judged_why: str = ""
    margin: float | None = None  # points that PASS allowed, where the record says
    latency: dict[str, Figure] = field(default_factory=dict)  # every value of the Latency record
    bound: Figure | None = None  # upper confidence bound of p90, ms
    speedup: Figure | None = None  # over the fp32 sibling, ratio of medians
    speedup_shaky: bool = False  # the sibling's latency is not VALID
    validity: Validity | None = None
    reasons: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    samples: str = ""  # SHA-256 of the raw samples
    profile: str = ""

    @property
    def label(self) -> str:
        """``resnet18 · openvino int8``."""
        return f"{self.name} · {self.format} {self.precision}"


def build_rows(data: ReportData) -> tuple[Row, ...]:
    """One row a model and device, ordered by device, student, format and precision."""
    names = student_names(data)
    models = [_student_row(data, sha256, name) for sha256, name in names.items()]
    unique = {packed.bundle.id: packed for packed in reversed(data.bundles)}
    models += [_bundle_row(packed, names[packed.bundle.student.sha256]) for packed in unique.values()]
    judged = [_with_drop(row, data, unique.get(row.model_id)) for row in models]
    accurate = _with_accuracy(judged, data)
    rows = [measured for row in accurate for measured in _with_latency(row, data)]
    rows = [replace(row, speedup=_speedup(row, rows), speedup_shaky=_shaky(row, rows)) for row in rows]
    return tuple(sorted(rows, key=_order))


def model_labels(data: ReportData, rows: Iterable[Row]) -> dict[str, str]:
    """model id -> label."""
    names = {sha256[:16]: f"{name} · torch fp32" for sha256, name in student_names(data).items()}
    return names | {row.model_id: row.label for row in rows}


def kept_rung(bundle: Bundle) -> tuple[int, Rung] | None:
    """The rung that was shipped and its index."""
    return next(((i, rung) for i, rung in enumerate(bundle.rungs) if rung.kept), None)


def headline_data(data: ReportData) -> tuple[str, str, str] | None:
    """(protocol, fingerprint of the judged and of the training images) that most models have; kNN on a tie."""
    seen: dict[tuple[str, str, str], set[str]] = {}
    for measurement in data.of_kind(Accuracy):
        record = measurement.record
        if isinstance(record, Accuracy) and top1(record.values):
            seen.setdefault((record.protocol, *images_of(record)), set()).add(record.model_id)
    order = {"knn": 0, "linear": 1}
    return min(seen, key=lambda key: (-len(seen[key]), order.get(key[0], 2), key), default=None)


def images_of(record: Accuracy) -> tuple[str, str]:
    """Fingerprints of the images that were judged, and of those that they were judged by: of others is another task."""
    bank = record.settings.get("bank")
    return record.data.fingerprint, str(bank.get("fingerprint", "")) if isinstance(bank, Mapping) else ""


def top1(values: Mapping[str, Value]) -> str | None:
    """The name of the top-1 figure among `values`: ``top1`` itself, or the first that ends in it."""
    return "top1" if "top1" in values else next((key for key in sorted(values) if key.startswith("top1")), None)


def _student_row(data: ReportData, sha256: str, name: str) -> Row:
    run = next((run for run in data.runs if run.student.sha256 == sha256), None)
    return Row(
        model_id=sha256[:16],
        student=sha256,
        name=name,
        format="torch",
        precision="fp32",
        folder=run.folder if run else "",
        bytes=run.bytes if run else None,
        gate="REFERENCE",
        gate_reason="the fp32 student itself",
    )


def _bundle_row(packed: Packed, name: str) -> Row:
    bundle = packed.bundle
    return Row(
        model_id=bundle.id,
        student=bundle.student.sha256,
        name=name,
        format=bundle.format,
        precision=bundle.precision,
        folder=packed.folder,
        bytes=bundle.bytes,
        gate=bundle.verdict,
        gate_reason=bundle.reason,
    )


def _with_drop(row: Row, data: ReportData, packed: Packed | None) -> Row:
    """The paired drop: the latest Fidelity's; else the shipped rung's, as the export gate measured it."""
    if packed is None:
        return row
    for measurement in reversed(list(data.of_kind(Fidelity))):
        record = measurement.record
        if isinstance(record, Fidelity) and record.bundle_id == row.model_id:
            drop = _drop_of(record.values, measurement.place)
            margin = record.settings.get("margin")
            return replace(
                row,
                drop=drop,
                judged=record.verdict,
                judged_why="; ".join(record.reasons),
                margin=float(margin) if isinstance(margin, int | float) else None,
            )
    kept = kept_rung(packed.bundle)
    if kept is None:
        return replace(row, judged_why=packed.bundle.reason)
    index, rung = kept
    drop = _drop_of(rung.values, f"{packed.folder}/manifest.json rungs[{index}]")
    return replace(row, drop=drop, judged=rung.accuracy, judged_why=f"export gate: {rung.reason}")


def _drop_of(values: Mapping[str, Value], place: str) -> Figure | None:
    key = next((key for key in DROPS if key in values), None)
    return Figure(value=values[key], source=f"{place} values.{key}") if key else None


def _with_accuracy(rows: Iterable[Row], data: ReportData) -> list[Row]:
    """Each row's top-1 by protocol, on the headline's data only: figures on other images do not compare."""
    headline = headline_data(data)
    found: dict[str, dict[str, Figure]] = {}
    for measurement in data.of_kind(Accuracy):
        record = measurement.record
        if not isinstance(record, Accuracy) or not headline or images_of(record) != headline[1:]:
            continue
        if key := top1(record.values):
            figure = Figure(value=record.values[key], source=f"{measurement.place} values.{key}")
            found.setdefault(record.model_id, {})[record.protocol] = figure
    return [replace(row, accuracy=_accuracy_of(row, found)) for row in rows]


def _accuracy_of(row: Row, found: Mapping[str, dict[str, Figure]]) -> dict[str, Figure]:
    """Measured where it was; an fp32 bundle whose gate passed has its student's; else the student's minus the drop."""
    own = dict(found.get(row.model_id, {}))
    for protocol, figure in found.get(row.student[:16], {}).items():
        if protocol in own:
            continue
        if row.precision == "fp32" and row.gate == "PASS":
            own[protocol] = replace(figure, how="inherited")
        elif row.drop and row.drop.source.endswith(f"{_drop_for(protocol)}"):
            less = Value(value=figure.value.value - row.drop.value.value, n=row.drop.value.n, unit=figure.value.unit)
            own[protocol] = Figure(value=less, source=f"{figure.source} minus {row.drop.source}", how="derived")
    return own


def _drop_for(protocol: str) -> str:
    return {"knn": "values.knn_drop", "linear": "values.probe_drop"}.get(protocol, "values.drop")


def _with_latency(row: Row, data: ReportData) -> list[Row]:
    """One row a device: its latest Latency there. The latest counts, whatever it says, so that none can be picked."""
    latest: dict[str, Sourced] = {}
    for measurement in data.of_kind(Latency):
        record = measurement.record
        if isinstance(record, Latency) and record.bundle_id == row.model_id:
            latest[device_label(record.device, record.settings)] = measurement
    return [_measured(row, device, measurement) for device, measurement in latest.items()] or [row]


def _measured(row: Row, device: str, measurement: Sourced) -> Row:
    record = measurement.record
    if not isinstance(record, Latency):
        return row
    latency = {
        key: Figure(value=value, source=f"{measurement.place} values.{key}") for key, value in record.values.items()
    }
    return replace(
        row,
        device=device,
        latency=latency,
        bound=_bound(latency),
        validity=record.verdict,
        reasons=record.reasons,
        missing=record.missing,
        samples=record.samples_sha256 or "",
        profile=text_of(record.settings.get("profile")),
    )


def _bound(latency: Mapping[str, Figure]) -> Figure | None:
    """The upper confidence bound of p90, sustained where that was measured. A bare p90 is no bound."""
    p90 = latency.get("sustained_p90", latency.get("p90"))
    if p90 is None or p90.value.high is None:
        return None
    return Figure(value=Value(value=p90.value.high, n=p90.value.n, unit=p90.value.unit), source=f"{p90.source}.high")


def _speedup(row: Row, rows: Iterable[Row]) -> Figure | None:
    """Over the fp32 bundle of the same student, format and device: paired if it was, else from the two medians."""
    if "speedup_fp32" in row.latency:
        return row.latency["speedup_fp32"]
    base = _base(row, rows)
    return ratio(base, row) if base and base.validity != "INVALID" and row.precision != "fp32" else None


def _base(row: Row, rows: Iterable[Row]) -> Row | None:
    return next((r for r in rows if _same_place(r, row) and r.precision == "fp32"), None)


def _shaky(row: Row, rows: Iterable[Row]) -> bool:
    """Whether the speed-up stands on a latency of fp32 that is not VALID; a paired one was measured with it."""
    base = _base(row, rows)
    return "speedup_fp32" not in row.latency and base is not None and base.validity != "VALID"


def ratio(base: Row, row: Row) -> Figure | None:
    """How many times faster `row` is than `base`: ratio of medians, with the widest interval that theirs allow."""
    slow, fast = base.latency.get("p50"), row.latency.get("p50")
    if slow is None or fast is None or fast.value.value <= 0:
        return None
    a, b = slow.value, fast.value
    low = a.low / b.high if a.low is not None and b.high else None
    high = a.high / b.low if a.high is not None and b.low else None
    value = Value(value=a.value / b.value, low=low, high=high)
    return Figure(value=value, source=f"{slow.source} / {fast.source}", how="derived")


def _same_place(a: Row, b: Row) -> bool:
    return bool(a.device) and (a.student, a.format, a.device) == (b.student, b.format, b.device)


def _order(row: Row) -> tuple[bool, str, str, bool, str, int, str]:
    rank = PRECISIONS.index(row.precision)
    return (not row.device, row.device, row.name, row.format != "torch", row.format, rank, row.model_id)
