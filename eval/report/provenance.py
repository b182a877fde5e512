"""What a reader checks a report by: provenance, licences, what the images are, caveats, and sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from robx.eval.datasets.duplicates import warning_in
from robx.eval.report.collect import Packed, ReportData, text_of
from robx.eval.report.recommend import Advice
from robx.eval.report.rows import Row, headline_data, images_of
from robx.eval.report.tables import Cell, Table
from robx.eval.report.text import DASH, brief, figure
from robx.image_size import plain_size
from robx.records import Accuracy, Bundle, DataInfo, Latency, Student

_NON_COMMERCIAL = re.compile(r"\bnc\b|non-?\s?commercial", re.IGNORECASE)
_KINDS_OF_DATA = (
    (r"clip[ _-]?art", "clip art: drawings, not natural photographs, and not ImageNet"),
    (r"cifar", "CIFAR: upscaled photographs of 32 x 32 pixels, and not ImageNet"),
    (r"scene|render|clevr|shapes", "rendered scenes of simple shapes: not photographs, and not ImageNet"),
    (r"mnist|digits", "small greyscale pictures of single objects: not natural photographs, and not ImageNet"),
    (r"imagenette|imagewoof|tiny|100|10pct|subset", "a subset of ImageNet"),
)


class Doubt(NamedTuple):
    """Something that is not reliable, or missing."""

    kind: str
    what: str
    why: str


def licence_warnings(data: ReportData) -> list[str]:
    """One line for each teacher or data set whose licence forbids commercial use, or is unknown."""
    found = []
    for sha256, student in data.students.items():
        name = data.names[sha256]
        for what, made in (("teacher", student.teacher), ("training data", student.data)):
            if made is None:
                continue
            if what == "teacher" and made.licence.strip().lower().partition(" ")[0] in ("", "unknown"):
                known = made.licence.strip() or "unknown"
                found.append(f"{name}: the licence of the {what} {made.name} is {known}.")
            elif _NON_COMMERCIAL.search(made.licence):
                found.append(
                    f"{name} was distilled with the {what} {made.name}, licensed {made.licence}: "
                    "non-commercial use only. Get legal advice before you sell or ship this student."
                )
    return list(dict.fromkeys(found))


def data_notes(data: ReportData) -> list[str]:
    """The licence of what each student was made from; what each set of images is not, and which test images repeat."""
    infos = [student.data for student in data.students.values() if student.data]
    infos += [record.data for _, record in data.accuracies]
    doubles = [(record.data.name, warning_in(record.settings)) for _, record in data.accuracies]
    named: dict[str, dict[DataInfo, None]] = {}
    for info in infos:
        named.setdefault(info.name, {})[info] = None
    notes = [_data_note(name, list(found)) for name, found in named.items()]
    notes = [
        note for sha256, student in data.students.items() if (note := _licences(data.names[sha256], student))
    ] + notes
    return notes + [f"{name}: {warning}." for name, warning in dict.fromkeys(doubles) if warning]


def _licences(name: str, student: Student) -> str:
    """The licences of what a student was made from, in a sentence; empty where nothing was recorded."""
    found = [
        f"the {what} {made.name} (licence: {made.licence.strip() or 'unknown'})"
        for what, made in (("teacher", student.teacher), ("images", student.data))
        if made is not None
    ]
    return f"{name} was made from {' and '.join(found)}." if found else ""


def _data_note(name: str, infos: Sequence[DataInfo]) -> str:
    kind = next((text for pattern, text in _KINDS_OF_DATA if re.search(pattern, name, re.IGNORECASE)), None)
    compare = "Compare its figures only with figures on the same images."
    if kind:
        counts = " and ".join(str(info.images) for info in infos)
        return f"{name} ({counts} images) is {kind}. {compare}"
    prints = "; ".join(f"{info.images} images, fingerprint {info.fingerprint[:12]}" for info in infos)
    return f"{name} ({prints}). {compare}"


def provenance(data: ReportData) -> list[Table]:
    """Students, bundles and devices, each as a table of what identifies it."""
    found = [_student_table(data)] if data.students else []
    if data.bundles:
        found.append(_bundle_table(data))
    devices = {data.device_of(record): (record, measurement.place) for measurement, record in data.latencies}
    if devices:
        found.append(_device_table(devices))
    return found


def doubts(data: ReportData, rows: Sequence[Row], advice: Sequence[Advice]) -> list[Doubt]:
    """What is UNSTABLE, INVALID, undecided, missing or damaged: the kind, the model, and why."""
    found = [Doubt(problem.kind, problem.where, problem.what) for problem in data.problems]
    found += _other_test_sets(data)
    for row in rows:
        found += _latency_doubts(row, data)
    for row in {row.model_id: row for row in rows}.values():
        found += _accuracy_doubts(row)
    found += [Doubt("EXCLUDED", f"{out.row.label} on {one.device}", out.why) for one in advice for out in one.left_out]
    found += [
        Doubt("UNKNOWN", f"model {m.model_id}", f"{m.place} measures a model that is not in these folders")
        for m in data.measurements
        if m.model_id not in data.labels
    ]
    return list(dict.fromkeys(found))


def _other_test_sets(data: ReportData) -> list[Doubt]:
    """Which images the accuracy is of, where the same protocol was run on others as well."""
    headline = headline_data(data)
    if headline is None:
        return []
    sets: dict[tuple[str, str], str] = {}
    for _, record in data.accuracies:
        if record.protocol == headline[0]:
            info, (_, bank) = record.data, images_of(record)
            trained = f", training images {bank[:12]}" if bank else ""
            sets[images_of(record)] = (
                f"{info.name} ({info.images} images, fingerprint {info.fingerprint[:12]}{trained})"
            )
    used = sets.pop(headline[1:])
    why = f"evaluated on {len(sets) + 1} test sets: this is the one that most models share, and of those the largest"
    others = f"not used here: {'; '.join(sets.values())}"
    return [Doubt("TEST SET", f"accuracy on {used}", f"{why}; {others}")] if sets else []


def _latency_doubts(row: Row, data: ReportData) -> list[Doubt]:
    found, where = [], f"{row.label} on {row.device}"
    if row.validity in ("UNSTABLE", "INVALID"):
        found.append(Doubt(row.validity, where, "; ".join(row.reasons) or "no reason was recorded"))
    if row.profile in ("rapid", "quick"):
        found.append(Doubt("SHORT", where, f"{row.profile} profile: not for publication"))
    if row.emulated:
        return found
    found += [Doubt("MISSING", f"{row.label}: {what}", why) for what, why in sorted(row.missing.items())]
    if row.samples and row.samples not in data.samples:
        found.append(Doubt("MISSING", f"{row.label}: raw samples", "its latency distribution cannot be checked"))
    if not row.device and row.format != "torch":
        found.append(Doubt("MISSING", f"{row.label}: latency", f"not measured: run robx bench {row.folder}"))
    return found


def _accuracy_doubts(row: Row) -> list[Doubt]:
    found = []
    if row.format != "torch" and row.gate != "PASS":
        found.append(Doubt(f"GATE {row.gate}", row.label, row.gate_reason))
    if row.judged in ("FAIL", "INCONCLUSIVE"):
        found.append(Doubt(row.judged, f"{row.label}: accuracy", row.judged_why))
    if not row.accuracy:
        found.append(Doubt("MISSING", f"{row.label}: accuracy", f"not measured: run robx eval {row.folder}"))
    return found


def _student_table(data: ReportData) -> Table:
    folders = {run.student.sha256: run.folder for run in data.runs}
    body = []
    for sha256, student in data.students.items():
        teacher, info, form = student.teacher, student.data, student.preprocessing
        body.append(
            (
                Cell(data.names[sha256], folders.get(sha256, "known from its bundles only")),
                Cell(sha256, f"width {student.width}, {form.size}/{plain_size(form.shape)} px, {form.interpolation}"),
                Cell(teacher.name, f"{teacher.sha256} prototypes: {teacher.prototypes}") if teacher else Cell("none"),
                Cell(teacher.licence) if teacher else Cell(DASH),
                Cell(f"{info.name}, {info.images} images", info.fingerprint) if info else Cell("not recorded"),
                Cell(info.licence) if info else Cell(DASH),
                Cell(str(student.images_seen), f"robx {student.robx_version or '?'}"),
            )
        )
    heads = ("Student", "SHA-256", "Teacher", "Teacher licence", "Training data", "Data licence", "Images seen")
    lines = tuple(Cell("Recipe", brief(student.recipe)) for student in data.students.values())
    return Table(caption="Students", heads=heads, rows=tuple(body), lines=lines)


def _bundle_table(data: ReportData) -> Table:
    heads = ("Bundle", "Id", "Calibration", "Parity with PyTorch", "Export gate")
    rows = tuple(_bundle_cells(packed, data.labels[packed.bundle.id]) for packed in data.bundles)
    return Table(caption="Bundles", heads=heads, rows=rows, lines=tuple(_bundle_line(p.bundle) for p in data.bundles))


def _bundle_line(bundle: Bundle) -> Cell:
    """The files with their hashes, and the versions that made them."""
    files = "; ".join(f"{f.path} {f.bytes} B {f.sha256}" for f in bundle.files)
    versions = ", ".join(f"{k} {v}" for k, v in sorted(bundle.versions.items()))
    made = f"{files}. Made with {versions}, robx {bundle.robx_version or '?'}."
    cpu = text_of(bundle.chosen_on.get("model")) or text_of(bundle.chosen_on.get("arch"))
    chosen = f"Selected by its speed on {cpu}." if cpu else ""
    rewritten = f"Rewritten before export: {', '.join(bundle.rewrites)}." if bundle.rewrites else ""
    return Cell("Files", " ".join(filter(None, (made, chosen, rewritten))))


def _bundle_cells(packed: Packed, label: str) -> tuple[Cell, ...]:
    bundle = packed.bundle
    seen = bundle.calibration
    calibration = Cell("none")
    if seen:
        prints = " ".join(filter(None, (seen.fingerprint, seen.screened_fingerprint, seen.judged_fingerprint)))
        screened = f", screened on {seen.screened_images}" if seen.screened_images else ""
        calibration = Cell(f"{seen.images} images{screened}, evaluated on {seen.judged_images} others", prints)
    return (
        Cell(label, packed.folder),
        Cell(bundle.id, f"target {bundle.target}, {bundle.runtime}, opset {bundle.opset}"),
        calibration,
        Cell(", ".join(f"{key} {figure(value)}" for key, value in bundle.parity.items()) or DASH),
        Cell(bundle.verdict, bundle.reason, mark=bundle.verdict.lower()),
    )


def _device_table(devices: dict[str, tuple[Latency, str]]) -> Table:
    found = sorted(devices.items())
    return Table(
        caption="Devices",
        heads=("Device", "Description"),
        rows=tuple((Cell(name, place), Cell(brief(record.device))) for name, (record, place) in found),
        lines=tuple(Cell("Settings", brief(record.settings)) for _, (record, _) in found),
    )


def source_table(data: ReportData) -> Table:
    """The file and line of each measurement, and the raw samples behind it."""
    rows, lines = [], []
    for measurement in sorted(data.measurements, key=lambda m: (m.file, m.line)):
        record = measurement.record
        what = f"{record.kind} {record.protocol}" if isinstance(record, Accuracy) else record.kind
        raw = Cell(DASH)
        if isinstance(record, Latency):
            what += f" on {data.device_of(record)}"
            raw = Cell(record.samples or DASH, record.samples_sha256 or "")
        model = data.labels.get(measurement.model_id, measurement.model_id)
        rows.append((Cell(measurement.place), Cell(what, model), Cell(record.started), raw))
        plain = brief({key: item for key, item in record.settings.items() if not isinstance(item, dict | list)})
        lines.append(Cell("Settings", plain))
    heads = ("File and line", "Measurement", "Started (UTC)", "Raw samples")
    return Table(caption="Measurements", heads=heads, rows=tuple(rows), lines=tuple(lines))
