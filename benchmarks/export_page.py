"""The page of export_table.py: one row per bundle, and the cases in which the vendor's default is better."""

from __future__ import annotations

import argparse
from typing import Any

from common import CLIP_ART, publish, shown
from table_judging import SECOND

from robx.records import Value, from_json, to_json

ENGINES = {
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "litert": "LiteRT",
    "trt": "TensorRT file",
}
Row = dict[str, Any]
_HEADINGS = ("student", "engine", "variant", "ships", "MB")
# Heading, key of the figure, digits.
_COLUMNS = (
    ("centred cosine", "cosine_mean", 4),
    ("1st percentile", "cosine_p1", 3),
    ("kNN drop", "knn_drop", 1),
    ("probe drop", "probe_drop", 1),
    ("centred cosine, Fashion-MNIST", f"{SECOND}cosine_mean", 4),
    ("probe drop, Fashion-MNIST", f"{SECOND}probe_drop", 1),
)
_OURS, _HEALED, _VENDOR = "robx int8", "robx int8 healed", "vendor int8"
_COUNTED = ("cosine_mean", "probe_drop", f"{SECOND}cosine_mean")
AIM = 0.99  # centred cosine of an int8 model that nobody has to think about


def row_from_json(stored: Row) -> Row:
    """The inverse of `robx.records.to_json` for a row."""
    values = {name: from_json(Value, value) for name, value in stored["values"].items()}
    ratio = stored["latency_ratio"]
    return stored | {"values": values, "latency_ratio": None if ratio is None else from_json(Value, ratio)}


def write_down(rows: list[Row], missing: list[str], learnt: list[str], given: argparse.Namespace) -> None:
    """Write the table of the results so far."""
    timed = ["latency / fp32"] if _timed(rows) else []
    columns = [column for column in _COLUMNS if any(column[1] in row["values"] for row in rows)]
    cells = [
        [
            r["student"], ENGINES[r["engine"]], r["variant"], r["ships"] if r["variant"].startswith("robx") else "",
            f"{r['bytes'] / 1e6:.1f}", *(_cell(r, key, digits) for _, key, digits in columns),
            *(shown(r["latency_ratio"]) for _ in timed),
        ]
        for r in rows
    ]  # fmt: skip
    publish(
        given.name,
        title="Exports of each student side by side",
        headings=[*_HEADINGS, *(name for name, _, _ in columns), *timed],
        rows=cells,
        data=to_json(rows),
        notes=[
            *_latency_notes(rows, given),
            "Centred cosine and the drops, in points, are against the fp32 student in PyTorch: kNN with the fp32 "
            "embeddings as the bank, and a frozen linear probe trained on fp32 features.",
            _judged_note(rows),
            "The vendor's default and robx calibrate on the same "
            f"{given.calibration_images} images and are judged on the same test images.",
            *_search_note(given),
            f"robx's gate allows a drop of {given.max_drop:g} points and {_speed_rule(given.min_speedup)}. It selects "
            "the candidate to judge by speed and on separate images.",
            *_trt_note(rows, given.trt),
            *(exceptions(rows) if _timed(rows) else []),
            *closer_vendors(rows),
            *_refusals(rows),
            *_short_of_aim(rows),
            *_healing_notes(rows),
            *missing,
            f"kNN top-1 of the fp32 students, in %: {'; '.join(learnt)}. The table compares exports, not students.",
            *dict.fromkeys(f"{r['student']}, {ENGINES[r['engine']]}: {r['note']}." for r in rows if r["note"]),
            *_warm_note(given.warm),
            *([CLIP_ART] if given.data is None else [f"Images: {given.data.name}."]),
            *held_out_note(given),
        ],
        settings={k: str(v) for k, v in vars(given).items() if k not in ("data", "out", "runs")},
    )


def _search_note(given: argparse.Namespace) -> list[str]:
    limits = []
    if given.candidates is not None:
        limits.append(
            f"at most {given.candidates} int8 candidates of each kind of weights, none of them with its most "
            "sensitive layers in float"
        )
    if given.budget is not None:
        limits.append(f"none that would begin more than {given.budget:g} s after the first")
    return [f"The search was limited to {' and '.join(limits)}."] if limits else []


def _cell(row: Row, key: str, digits: int) -> str:
    """A cosine without its interval, which is narrower than a digit, and a drop with it."""
    value = row["values"].get(key)
    return shown(value, digits) if value is None or "drop" in key else f"{value.value:.{digits}f}"


def _judged_note(rows: list[Row]) -> str:
    """How many images the figures are of."""
    counts = {key: max((r["values"][key].n or 0 for r in rows if key in r["values"]), default=0) for key in _COUNTED}
    first, labelled, second = counts.values()
    said = f"The cosines are of {first:,} test images and the drops of the {labelled:,} labelled ones among them"
    if not second:
        return f"{said}."
    return (
        f"{said}; those of Fashion-MNIST are of {second:,} test images, with a bank of 1,000 training images. No image "
        "of Fashion-MNIST trained, calibrated, healed or chose anything."
    )


def _refusals(rows: list[Row]) -> list[str]:
    """Why no int8 shipped, for each row of robx in which none did: its closest candidate."""
    found = []
    for row in rows:
        if not row["variant"].startswith("robx") or row["ships"] == "int8":
            continue
        tried = [r for r in row["rungs"] if r["precision"] == "int8" and "cosine_mean" in r["values"]]
        said = "none could be run"
        if tried:
            closest = max(tried, key=lambda r: (not _screened(r), r["values"]["cosine_mean"]["value"]))
            drop = shown(from_json(Value, lost), 1) if (lost := closest["values"].get("probe_drop")) else "-"
            images = "screening" if _screened(closest) else "judged"
            said = (
                f"the best of {len(tried)} was {closest['name']}, {closest['accuracy']} with a centred cosine of "
                f"{closest['values']['cosine_mean']['value']:.4f} and a probe drop of {drop} on the {images} images"
            )
        found.append(f"{_place(row)} ships {row['ships']}: {said}.")
    return found


def _screened(rung: dict[str, Any]) -> bool:
    return "screened" in rung["values"]


def _short_of_aim(rows: list[Row]) -> list[str]:
    """The int8 models of robx that ship and whose mean centred cosine is below the aim."""
    short = [
        f"{_place(row)} {row['values']['cosine_mean'].value:.4f}"
        for row in rows
        if row["variant"].startswith("robx") and row["ships"] == "int8" and row["values"]["cosine_mean"].value < AIM
    ]
    return [f"Int8 that ships with a centred cosine below {AIM}: {'; '.join(short)}."] if short else []


def _place(row: Row) -> str:
    return f"{row['student']}, {ENGINES[row['engine']]}, {row['variant']}"


def _speed_rule(least: float) -> str:
    if least == 1:
        return "nothing slower than fp32 or fp16"
    if least < 0.1:
        return "any speed, as the machine was busy: timings decide only which candidate is judged first"
    return f"nothing below {least:g} times the speed of fp32 and fp16"


def exceptions(rows: list[Row]) -> list[str]:
    """The cases in which the vendor's default beats what robx ships: clearly faster, or as fast and closer to fp32."""
    found = []
    pairs = {(r["student"], r["engine"], r["variant"]): r for r in rows}
    for (student, engine, variant), vendor in pairs.items():
        ours = pairs.get((student, engine, _OURS))
        if variant != _VENDOR or ours is None or not (ours["latency_ratio"] and vendor["latency_ratio"]):
            continue
        faster = ours["latency_ratio"].value / vendor["latency_ratio"].value
        mine, theirs = (r["values"]["cosine_mean"].value for r in (ours, vendor))
        if faster > 1.03:
            drops = (shown(vendor["values"].get(f"{name}_drop"), 1) for name in ("knn", "probe"))
            found.append(
                f"{student}, {ENGINES[engine]}: the vendor's default is {faster:.2f} times as fast as robx's export "
                f"({ours['ships']}), at centred cosine {theirs:.4f} against {mine:.4f} and drops of "
                f"{' (kNN) and '.join(drops)} (probe) points. robx's own int8 candidates: {_rungs_of(ours)}."
            )
        elif theirs > mine + 0.001:
            found.append(
                f"{student}, {ENGINES[engine]}: the vendor's default is no slower and closer to fp32, centred cosine "
                f"{theirs:.4f} against {mine:.4f}."
            )
    return found or [
        "In no case is the vendor's default faster (by 3 %) than robx's export, or as fast and closer to fp32."
    ]


def closer_vendors(rows: list[Row]) -> list[str]:
    """The cases in which the vendor's default is closer to fp32 than what robx exports, where no time was measured."""
    pairs = {(r["student"], r["engine"], r["variant"]): r for r in rows}
    found, compared = list[str](), 0
    for (student, engine, variant), vendor in pairs.items():
        for name in (_OURS, _HEALED):
            ours = pairs.get((student, engine, name))
            if variant != _VENDOR or ours is None:
                continue
            compared += 1
            mine, theirs = (r["values"]["cosine_mean"].value for r in (ours, vendor))
            if theirs > mine + 0.001:
                found.append(
                    f"{student}, {ENGINES[engine]}: the vendor's default is closer to fp32 than {name}, centred cosine "
                    f"{theirs:.4f} against {mine:.4f}."
                )
    return found or ([f"In none of {compared} cases is the vendor's default closer to fp32."] if compared else [])


def _timed(rows: list[Row]) -> bool:
    return any(row["latency_ratio"] for row in rows)


def _latency_notes(rows: list[Row], given: argparse.Namespace) -> list[str]:
    if not _timed(rows):
        return ["No latency was measured: the machine was busy."]
    return [
        "Latency is for one image and one thread, as a ratio to fp32 in the same engine; a student's models are "
        f"interleaved in random order ({given.blocks} blocks of {given.seconds} s); below 1 is faster.",
        *(["Rows without a latency were not timed."] if any(not row["latency_ratio"] for row in rows) else []),
        "Where robx ships fp32, its row is the fp32 file again: the distance of its ratio from 1 is this run's noise, "
        "whatever the interval says.",
    ]


def _healing_notes(rows: list[Row]) -> list[str]:
    """For each row with healed weights: what ships, and what healing cost."""
    return [
        f"{r['student']}, {ENGINES[r['engine']]}, healed: ships {r['rung'] or r['ships']}; {r['healing']}."
        for r in rows
        if r.get("healing")
    ]


def _rungs_of(row: Row) -> str:
    """Why each int8 candidate did not ship, briefly."""
    said = []
    for rung in row["rungs"]:
        values = rung["values"]
        if rung["precision"] == "int8" and "probe_drop" in values and "speedup_fp32" in values:
            drop, fast = values["probe_drop"]["value"], values["speedup_fp32"]["value"]
            seen = "screened" if "screened" in values else rung["accuracy"]
            said.append(f"{rung['name']} {seen}, probe drop {drop:.1f}, {fast:.1f} times as fast as fp32")
    return "; ".join(said) or "none was judged"


def _warm_note(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{', '.join(names)} started from EfficientNet-Lite0's ImageNet weights in every tensor that matches, the "
        "other students from random weights."
    ]


def held_out_note(given: argparse.Namespace) -> list[str]:
    """How many training images are judged instead, if any are."""
    counts = {"labelled": given.hold_out, "unlabelled": given.hold_out_unlabelled}
    said = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    if not said:
        return []
    return [
        f"{said} training images were moved to the test set, and no student was distilled from them: a larger test set "
        "can show smaller drops. Unlabelled images count for the cosines only."
    ]


def _trt_note(rows: list[Row], target: str) -> list[str]:
    if not any(r["engine"] == "trt" for r in rows):
        return []
    built = f" Its engines for {target} were built ahead of time." if target.startswith("rtx:") else ""
    return [
        "TensorRT file: the checked ONNX, evaluated on the CPU if there is no GPU: its accuracy is that of the file, "
        f"its speed is measured on the device.{built}"
    ]
