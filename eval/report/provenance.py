"""What a reader checks a report by: provenance, licences, what the images are, what to doubt, and the sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from robx.eval.datasets.duplicates import warning_in
from robx.eval.report.collect import Packed, ReportData
from robx.eval.report.recommend import Advice
from robx.eval.report.report_names import device_label, student_names
from robx.eval.report.rows import Row
from robx.eval.report.tables import Cell, Table
from robx.eval.report.text import DASH, brief, spell
from robx.records import Accuracy, Bundle, DataInfo, Latency

_NON_COMMERCIAL = re.compile(r"\bnc\b|non-?\s?commercial", re.IGNORECASE)
_KINDS_OF_DATA = (
    (r"clip[ _-]?art", "clip art: drawings, not natural photographs, and not ImageNet"),
    (r"cifar", "CIFAR: photographs of 32 x 32 pixels, enlarged, and not ImageNet"),
    (r"scene|render|clevr|shapes", "rendered scenes of simple shapes: not photographs, and not ImageNet"),
    (r"mnist|digits", "small grey pictures of single things: not natural photographs, and not ImageNet"),
    (r"imagenette|imagewoof|tiny|100|10pct|subset", "not the whole of ImageNet"),
)


class Doubt(NamedTuple):
    """Something that a reader should not trust, or does not have."""

    kind: str
    what: str
    why: str


def licence_warnings(data: ReportData) -> list[str]:
    """One line for each teacher or data set whose licence forbids or does not state commercial use."""
    found = []
    for student in data.students.values():
        for what, made in (("teacher", student.teacher), ("training data", student.data)):
            if made is None:
                continue
            if what == "teacher" and made.licence.strip().lower().partition(" ")[0] in ("", "unknown"):
                known = made.licence.strip() or "unknown"
                found.append(f"{student.timm_name}: the licence of the {what} {made.name} is {known}.")
            elif _NON_COMMERCIAL.search(made.licence):
                found.append(
                    f"{student.timm_name} was distilled with the {what} {made.name}, licensed {made.licence}: "
                    "non-commercial use only. Ask a lawyer before this student is sold or shipped."
                )
    return list(dict.fromkeys(found))


def data_notes(data: ReportData) -> list[str]:
    """For each set of images that figures come from: what it is not, and how many doubles it has in training."""
    infos = [student.data for student in data.students.values() if student.data]
    judged = [m.record for m in data.of_kind(Accuracy) if isinstance(m.record, Accuracy)]
    infos += [record.data for record in judged]
    doubles = [(record.data.name, warning_in(record.settings)) for record in judged]
    named: dict[str, dict[DataInfo, None]] = {}
    for info in infos:
        named.setdefault(info.name, {})[info] = None
    notes = [_data_note(name, list(found)) for name, found in named.items()]
    return notes + [f"{name}: {warning}." for name, warning in dict.fromkeys(doubles) if warning]


def _data_note(name: str, infos: Sequence[DataInfo]) -> str:
    kind = next((text for pattern, text in _KINDS_OF_DATA if re.search(pattern, name, re.IGNORECASE)), None)
    alone = "figures compare only with figures on the same images"
    if kind:
        counts = " and ".join(str(info.images) for info in infos)
        return f"{name} ({counts} images) is {kind}. Its {alone}."
    prints = "; ".join(f"{info.images} images, fingerprint {info.fingerprint[:12]}" for info in infos)
    return f"{name} ({prints}): its {alone}."


def provenance(data: ReportData, labels: dict[str, str]) -> list[Table]:
    """Students, bundles and devices, each as a table of what identifies it."""
    found = [_student_table(data)] if data.students else []
    if data.bundles:
        found.append(_bundle_table(data.bundles, labels))
    devices: dict[str, tuple[Latency, str]] = {}
    for measurement in data.of_kind(Latency):
        if isinstance(measurement.record, Latency):
            record = measurement.record
            devices[device_label(record.device, record.settings)] = record, measurement.place
    if devices:
        found.append(_device_table(devices))
    return found


def doubts(data: ReportData, rows: Sequence[Row], advice: Sequence[Advice], labels: dict[str, str]) -> list[Doubt]:
    """What is UNSTABLE, INVALID, undecided, missing or damaged: the kind, the model, and why."""
    found = [Doubt("DAMAGED", problem.where, problem.what) for problem in data.problems]
    for row in rows:
        if row.validity in ("UNSTABLE", "INVALID"):
            why = "; ".join(row.reasons) or "no reason was recorded"
            found.append(Doubt(row.validity, f"{row.label} on {row.device}", why))
        if row.profile in ("rapid", "quick"):
            found.append(Doubt("SHORT", f"{row.label} on {row.device}", f"{row.profile} profile: not for publication"))
        found += [Doubt("MISSING", f"{row.label}: {what}", why) for what, why in sorted(row.missing.items())]
        if row.samples and row.samples not in data.samples:
            found.append(Doubt("MISSING", f"{row.label}: raw samples", "its distribution cannot be checked"))
        if not row.device and row.format != "torch":
            found.append(Doubt("MISSING", f"{row.label}: latency", f"never measured: robx bench {row.folder}"))
    for row in {row.model_id: row for row in rows}.values():
        if row.format != "torch" and row.gate != "PASS":
            found.append(Doubt(f"GATE {row.gate}", row.label, row.gate_reason))
        if row.judged in ("FAIL", "INCONCLUSIVE"):
            found.append(Doubt(row.judged, f"{row.label}: accuracy", row.judged_why))
        if not row.accuracy:
            found.append(Doubt("MISSING", f"{row.label}: accuracy", f"never measured: robx eval {row.folder}"))
    found += [Doubt("LEFT OUT", f"{out.row.label} on {one.device}", out.why) for one in advice for out in one.left_out]
    known = set(labels)
    for m in data.measurements:
        who = m.record.model_id if isinstance(m.record, Accuracy) else m.record.bundle_id
        if who not in known:
            found.append(Doubt("UNKNOWN", f"model {who}", f"{m.place} measured a model that is not in these folders"))
    return list(dict.fromkeys(found))


def _student_table(data: ReportData) -> Table:
    folders = {run.student.sha256: run.folder for run in data.runs}
    names = student_names(data)
    body = []
    for sha256, student in data.students.items():
        teacher, info, form = student.teacher, student.data, student.preprocessing
        body.append(
            (
                Cell(names[sha256], folders.get(sha256, "known from its bundles only")),
                Cell(sha256, f"width {student.width}, {form.size}/{form.crop} px, {form.interpolation}"),
                Cell(teacher.name, f"{teacher.sha256} prototypes: {teacher.prototypes}") if teacher else Cell("none"),
                Cell(teacher.licence) if teacher else Cell(DASH),
                Cell(f"{info.name}, {info.images} images", info.fingerprint) if info else Cell("not recorded"),
                Cell(info.licence) if info else Cell(DASH),
                Cell(str(student.images_seen), f"robx {student.robx_version or '?'}"),
            )
        )
    heads = ("Student", "SHA-256", "Teacher", "Its licence", "Data", "Its licence ", "Images seen")
    lines = tuple(Cell("Recipe", brief(student.recipe)) for student in data.students.values())
    return Table(caption="Students", heads=heads, rows=tuple(body), lines=lines)


def _bundle_table(bundles: Sequence[Packed], labels: dict[str, str]) -> Table:
    heads = ("Bundle", "Id", "Calibration", "Parity with torch", "Export gate")
    rows = tuple(_bundle_cells(packed.bundle, packed.folder, labels) for packed in bundles)
    return Table(caption="Bundles", heads=heads, rows=rows, lines=tuple(_bundle_line(p.bundle) for p in bundles))


def _bundle_line(bundle: Bundle) -> Cell:
    """What is shipped, byte for byte, and what made it."""
    files = "; ".join(f"{f.path} {f.bytes} B {f.sha256}" for f in bundle.files)
    versions = ", ".join(f"{k} {v}" for k, v in sorted(bundle.versions.items()))
    return Cell("Files", f"{files}. Made with {versions}, robx {bundle.robx_version or '?'}.")


def _bundle_cells(bundle: Bundle, folder: str, labels: dict[str, str]) -> tuple[Cell, ...]:
    seen = bundle.calibration
    calibration = Cell("none")
    if seen:
        prints = " ".join(filter(None, (seen.fingerprint, seen.screened_fingerprint, seen.judged_fingerprint)))
        chosen = f", chosen by {seen.screened_images}" if seen.screened_images else ""
        calibration = Cell(f"{seen.images} images{chosen}, judged on {seen.judged_images} others", prints)
    return (
        Cell(labels.get(bundle.id, bundle.id), folder),
        Cell(bundle.id, f"target {bundle.target}, {bundle.runtime}, opset {bundle.opset}"),
        calibration,
        Cell(", ".join(f"{key} {spell(value)}" for key, value in bundle.parity.items()) or DASH),
        Cell(bundle.verdict, bundle.reason, mark=bundle.verdict.lower()),
    )


def _device_table(devices: dict[str, tuple[Latency, str]]) -> Table:
    found = sorted(devices.items())
    return Table(
        caption="Devices, as they described themselves",
        heads=("Device", "Description"),
        rows=tuple((Cell(name, place), Cell(brief(record.device))) for name, (record, place) in found),
        lines=tuple(Cell("Settings", brief(record.settings)) for _, (record, _) in found),
    )


def source_table(data: ReportData, labels: dict[str, str]) -> Table:
    """Which line of which file each measurement is, and the raw samples behind it."""
    rows, lines = [], []
    for measurement in sorted(data.measurements, key=lambda m: (m.file, m.line)):
        record = measurement.record
        who = record.model_id if isinstance(record, Accuracy) else record.bundle_id
        what = f"{record.kind} {record.protocol}" if isinstance(record, Accuracy) else record.kind
        raw = Cell(DASH)
        if isinstance(record, Latency):
            what += f" on {device_label(record.device, record.settings)}"
            raw = Cell(record.samples or DASH, record.samples_sha256 or "")
        rows.append((Cell(measurement.place), Cell(what, labels.get(who, who)), Cell(record.started), raw))
        plain = brief({key: item for key, item in record.settings.items() if not isinstance(item, dict | list)})
        lines.append(Cell("Settings", plain))
    heads = ("File and line", "Measurement", "Started (UTC)", "Raw samples")
    return Table(caption="Where each figure comes from", heads=heads, rows=tuple(rows), lines=tuple(lines))
