"""How export_table.py tells what it measured: one row a bundle, and where the vendor's default is the better one."""

from __future__ import annotations

import argparse
from typing import Any

from common import CLIP_ART, publish, shown

from robx.records import Value, from_json, to_json

ENGINES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "trt": "TensorRT form"}
Row = dict[str, Any]
_HEADINGS = (
    "student", "engine", "variant", "ships", "MB", "centred cosine", "kNN drop", "probe drop", "latency / fp32",
)  # fmt: skip


def row_from_json(stored: Row) -> Row:
    """A row as it was before `robx.records.to_json`."""
    values = {name: from_json(Value, value) for name, value in stored["values"].items()}
    ratio = stored["latency_ratio"]
    return stored | {"values": values, "latency_ratio": None if ratio is None else from_json(Value, ratio)}


def write_down(rows: list[Row], missing: list[str], learnt: list[str], given: argparse.Namespace) -> None:
    """The table of what is known so far."""
    cells = [
        [
            r["student"], ENGINES[r["engine"]], r["variant"],
            r["ships"] if r["variant"] == "robx int8" else "", f"{r['bytes'] / 1e6:.1f}",
            f"{r['values']['cosine_mean'].value:.4f}", shown(r["values"].get("knn_drop"), 1),
            shown(r["values"].get("probe_drop"), 1), shown(r["latency_ratio"]),
        ]
        for r in rows
    ]  # fmt: skip
    publish(
        given.name,
        title="Exports of one student, side by side",
        headings=_HEADINGS,
        rows=cells,
        data=to_json(rows),
        notes=[
            "Latency is that of one image, one thread, as a ratio to fp32 in the same engine, the engine's models of a "
            f"student interleaved in random order ({given.blocks} blocks of {given.seconds} s); below 1 is faster.",
            "Centred cosine and the drops, in points, are against the fp32 student in PyTorch: kNN with the fp32 bank, "
            "a linear probe trained on fp32 features and frozen.",
            "The vendor's default and robx calibrate on the same "
            f"{given.calibration_images} images and are judged on the same others.",
            f"robx's gate allows a drop of {given.max_drop:g} points and nothing slower than fp32 or fp16. It chose by "
            "speed and by other images which of its candidates to hold to the judged ones.",
            *_trt_note(rows, given.trt),
            *exceptions(rows),
            *missing,
            f"kNN top-1 of the fp32 students, in %: {'; '.join(learnt)}. The table is about exports, not about them.",
            *dict.fromkeys(f"{r['student']}, {ENGINES[r['engine']]}: {r['note']}." for r in rows if r["note"]),
            *_warm_note(given.warm),
            *([CLIP_ART] if given.data is None else []),
            *_held_out_note(given.hold_out),
            "Where robx ships fp32 its row is the fp32 file once more: how far its ratio is from 1 is this run's "
            "noise, whatever the interval says.",
        ],
        settings={k: str(v) for k, v in vars(given).items() if k not in ("data", "out", "runs")},
    )


def exceptions(rows: list[Row]) -> list[str]:
    """Where the vendor's default beats what robx ships: clearly faster, or as fast and closer to fp32."""
    found = []
    pairs = {(r["student"], r["engine"], r["variant"]): r for r in rows}
    for (student, engine, variant), vendor in pairs.items():
        ours = pairs.get((student, engine, "robx int8"))
        if variant != "vendor int8" or ours is None or ours["latency_ratio"] is None:
            continue
        faster = ours["latency_ratio"].value / vendor["latency_ratio"].value
        mine, theirs = (r["values"]["cosine_mean"].value for r in (ours, vendor))
        if faster > 1.03:
            drops = (shown(vendor["values"].get(f"{name}_drop"), 1) for name in ("knn", "probe"))
            found.append(
                f"{student}, {ENGINES[engine]}: the vendor's default is {faster:.2f} times as fast as what robx ships "
                f"({ours['ships']}), at centred cosine {theirs:.4f} against {mine:.4f} and drops of "
                f"{' (kNN) and '.join(drops)} (probe) points. robx's own int8 rungs: {_rungs_of(ours)}."
            )
        elif theirs > mine + 0.001:
            found.append(
                f"{student}, {ENGINES[engine]}: the vendor's default is no slower and closer to fp32, centred cosine "
                f"{theirs:.4f} against {mine:.4f}."
            )
    return found or [
        "Nowhere is the vendor's default faster (by 3 %) than what robx ships, or as fast and closer to fp32."
    ]


def _rungs_of(row: Row) -> str:
    """Why each int8 rung did not ship, in a few words."""
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
        f"{', '.join(names)} began from EfficientNet-Lite0's ImageNet weights in every tensor that both have alike, "
        "the other students from random ones."
    ]


def _held_out_note(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"Here {count:,} of the labelled images to train on are judged instead, and no student was distilled from "
        "them: the more are judged, the smaller the drops that show."
    ]


def _trt_note(rows: list[Row], target: str | None) -> list[str]:
    if target is None or not any(r["engine"] == "trt" for r in rows):
        return []
    built = f" Its engines for {target} were built ahead of time." if target.startswith("rtx:") else ""
    return [
        "TensorRT form: the checked file, computed literally on the CPU where no GPU is: its accuracy is that of the "
        f"file, its speed is measured on the device.{built}"
    ]
