"""Joins the records into one row per model and device; every figure keeps the place that it was read from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from robx.eval.report.collect import Packed, ReportData, Sourced, model_label, text_of
from robx.records import Accuracy, Bundle, Latency, Rung, Validity, Value

# The drop that decides comes first: a user's head is already trained on fp32 features.
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
    """One model on one device; `device` is "" when no latency was measured."""

    model_id: str
    student: str  # SHA-256 of the fp32 student
    name: str  # of the student, unique in the report, with the input size if that is not the student's
    format: str  # a Bundle's, or "torch" for the student itself
    precision: str
    folder: str
    bytes: int | None
    gate: str  # the export gate's verdict; "REFERENCE" for the student itself
    gate_reason: str
    device: str = ""
    accuracy: dict[str, Figure] = field(default_factory=dict)  # protocol -> top-1 in %, all on the headline's images
    drop: Figure | None = None  # top-1 drop against the fp32 student in points, paired
    judged: str = "NOT_JUDGED"  # PASS, FAIL or INCONCLUSIVE of the drop
    judged_why: str = ""
    margin: float | None = None  # the drop that PASS accepts, where the record says it
    latency: dict[str, Figure] = field(default_factory=dict)  # every value of the Latency record
    bound: Figure | None = None  # upper confidence bound of p90, ms
    speedup: Figure | None = None  # over the fp32 bundle of the same format, ratio of medians; both are VALID
    speedup_shaky: bool = False  # not reliable, and left out: a latency behind it is not VALID
    validity: Validity | None = None
    reasons: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    samples: str = ""  # SHA-256 of the raw samples
    profile: str = ""
    variant: str = ""  # the precision, with the bundle's folder where several bundles share it; "": the precision

    @property
    def label(self) -> str:
        """``resnet18 · openvino int8``, unique in the report."""
        return model_label(self.name, self.format, self.variant or self.precision)

    @property
    def emulated(self) -> str:
        """Why its device counts as emulated; "" where it does not."""
        return next((reason.partition(": ")[2] for reason in self.reasons if reason.startswith("emulated:")), "")

    @property
    def kind(self) -> str:
        """``openvino int8``, the label without the student."""
        return f"{self.format} {self.variant or self.precision}"


def build_rows(data: ReportData) -> tuple[Row, ...]:
    """One row per model and device, ordered by device, student, format and precision."""
    models = [_student_row(data, sha256, name) for sha256, name in data.names.items()]
    unique = {packed.bundle.id: packed for packed in reversed(data.bundles)}
    models += [_bundle_row(packed, data) for packed in unique.values()]
    judged = [_with_drop(row, data, unique.get(row.model_id)) for row in models]
    accurate = _with_accuracy(judged, data)
    rows = [measured for row in accurate for measured in _with_latency(row, data)]
    rows = [replace(row, speedup=_speedup(row, rows), speedup_shaky=_shaky(row, rows)) for row in rows]
    return tuple(sorted(rows, key=_order))


def kept_rung(bundle: Bundle) -> tuple[int, Rung] | None:
    """The index of the candidate that was shipped, and the candidate."""
    return next(((i, rung) for i, rung in enumerate(bundle.rungs) if rung.kept), None)


def headline_data(data: ReportData) -> tuple[str, str, str] | None:
    """(protocol, fingerprint of the test and of the training images) that most models share.

    On a tie kNN, and then the largest test set.
    """
    seen: dict[tuple[str, str, str], set[str]] = {}
    images: dict[tuple[str, str, str], int] = {}
    for _, record in data.accuracies:
        if top1(record.values):
            key = (record.protocol, *images_of(record))
            seen.setdefault(key, set()).add(record.model_id)
            images[key] = record.data.images
    order = {"knn": 0, "linear": 1}
    return min(seen, key=lambda key: (-len(seen[key]), order.get(key[0], 2), -images[key], key), default=None)


def images_of(record: Accuracy) -> tuple[str, str]:
    """Fingerprints of the test and of the training images: with others, an accuracy is another task's."""
    bank = record.settings.get("bank")
    return record.data.fingerprint, str(bank.get("fingerprint", "")) if isinstance(bank, Mapping) else ""


def top1(values: Mapping[str, Value]) -> str | None:
    """The key of the top-1 figure: ``top1``, or the first that begins with it."""
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


def _bundle_row(packed: Packed, data: ReportData) -> Row:
    bundle, name = packed.bundle, data.name_of(packed.bundle)
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
        variant=data.variant_of(bundle),
    )


def _with_drop(row: Row, data: ReportData, packed: Packed | None) -> Row:
    """The paired drop: of the latest Fidelity, else of the shipped candidate as the export gate measured it."""
    if packed is None:
        return row
    for measurement, record in reversed(data.fidelities):
        if record.bundle_id == row.model_id:
            margin = record.settings.get("margin")
            return replace(
                row,
                drop=_drop_of(record.values, measurement.place),
                judged=record.verdict,
                judged_why="; ".join(record.reasons),
                margin=float(margin) if isinstance(margin, int | float) else None,
            )
    kept = kept_rung(packed.bundle)
    if kept is None:
        return replace(row, judged_why=packed.bundle.reason)
    index, rung = kept
    allowed = rung.values.get("margin")
    return replace(
        row,
        drop=_drop_of(rung.values, f"{packed.folder}/manifest.json rungs[{index}]"),
        judged=rung.accuracy,
        judged_why=f"export gate: {rung.reason}",
        margin=allowed.value if allowed else None,
    )


def _drop_of(values: Mapping[str, Value], place: str) -> Figure | None:
    key = next((key for key in DROPS if key in values), None)
    return Figure(value=values[key], source=f"{place} values.{key}") if key else None


def _with_accuracy(rows: Iterable[Row], data: ReportData) -> list[Row]:
    """Each row's top-1 by protocol, on the headline's images only: figures on others cannot be compared."""
    headline = headline_data(data)
    found: dict[str, dict[str, Figure]] = {}
    for measurement, record in data.accuracies:
        if headline and images_of(record) == headline[1:] and (key := top1(record.values)):
            figure = Figure(value=record.values[key], source=f"{measurement.place} values.{key}")
            found.setdefault(record.model_id, {})[record.protocol] = figure
    return [replace(row, accuracy=_accuracy_of(row, found)) for row in rows]


def _accuracy_of(row: Row, found: Mapping[str, dict[str, Figure]]) -> dict[str, Figure]:
    """As measured; else the student's for an fp32 bundle that passed its gate, and the student's minus the drop."""
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
    """One row per device, with its latest Latency there: taking the latest, whatever it says, leaves no choice."""
    latest: dict[str, tuple[Sourced, Latency]] = {}
    for measurement, record in data.latencies:
        if record.bundle_id == row.model_id:
            latest[data.device_of(record)] = measurement, record
    return [_measured(row, device, *found) for device, found in latest.items()] or [row]


def _measured(row: Row, device: str, measurement: Sourced, record: Latency) -> Row:
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
    """The upper confidence bound of p90, of the sustained p90 where measured. A p90 without an interval has none."""
    p90 = latency.get("sustained_p90", latency.get("p90"))
    if p90 is None or p90.value.high is None:
        return None
    return Figure(value=Value(value=p90.value.high, n=p90.value.n, unit=p90.value.unit), source=f"{p90.source}.high")


def _speedup(row: Row, rows: Iterable[Row]) -> Figure | None:
    """Over the fp32 bundle of the same student, format and device: measured in pairs, else from the two medians."""
    if "speedup_fp32" in row.latency:
        return row.latency["speedup_fp32"] if row.validity == "VALID" else None
    base = _base(row, rows)
    return ratio(base, row) if base and row.precision != "fp32" else None


def _base(row: Row, rows: Iterable[Row]) -> Row | None:
    return next((r for r in rows if _same_place(r, row) and r.precision == "fp32"), None)


def _shaky(row: Row, rows: Iterable[Row]) -> bool:
    """Whether a latency behind the speed-up is not VALID; a paired speed-up was measured along with the row's own."""
    base = _base(row, rows)
    behind = [row] if "speedup_fp32" in row.latency else [base, row] if base else []
    return any(one.validity != "VALID" for one in behind)


def ratio(base: Row, row: Row) -> Figure | None:
    """How many times faster `row` is than `base`: ratio of medians, with the widest interval that theirs allow.

    None unless both are VALID: what disturbs one of two separate runs may multiply their ratio.
    """
    slow, fast = base.latency.get("p50"), row.latency.get("p50")
    if slow is None or fast is None or fast.value.value <= 0 or not base.validity == row.validity == "VALID":
        return None
    a, b = slow.value, fast.value
    low = a.low / b.high if a.low is not None and b.high else None
    high = a.high / b.low if a.high is not None and b.low else None
    value = Value(value=a.value / b.value, low=low, high=high)
    return Figure(value=value, source=f"{slow.source} / {fast.source}", how="derived")


def precision_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row, Figure | None]]:
    """(higher precision, lower precision, times faster) on the same student, format and device; none INVALID."""
    valid = [row for row in rows if row.validity != "INVALID"]
    return [
        (base, row, row.speedup if high == "fp32" else ratio(base, row))
        for low, high in (("int8", "fp32"), ("int8", "fp16"), ("fp16", "fp32"))
        for row in valid
        for base in valid
        if (base.precision, row.precision) == (high, low) and _same_place(row, base)
    ]


def _same_place(a: Row, b: Row) -> bool:
    # The name has the input size: figures at two sizes are not a pair.
    return bool(a.device) and (a.student, a.name, a.format, a.device) == (b.student, b.name, b.format, b.device)


def _order(row: Row) -> tuple[bool, str, str, bool, str, int, str]:
    rank = PRECISIONS.index(row.precision)
    return (not row.device, row.device, row.name, row.format != "torch", row.format, rank, row.model_id)
