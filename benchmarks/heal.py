"""What healing gives: the int8 that robx exports from a student's own weights and from healed ones, by its own gate.

    OMP_NUM_THREADS=2 python benchmarks/heal.py --minutes 5                  # EfficientNet-Lite0 with its real weights
    OMP_NUM_THREADS=2 python benchmarks/heal.py --run runs/mnv3 --formats onnx openvino --minutes 10

Both exports are those of ``robx export --int8``: the same candidates, the same calibration images, judged on the same
held-out images in the same runtime. Only accuracy is shown: it does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common import CLIP_ART, demo_images, publish, say, shown, unused_healing
from export_page import held_out_note
from export_table import save_lite0
from more_judged import hold_out

from robx.export.build import ExportSettings, export
from robx.export.gate.gate import Limits
from robx.export.heal.heal import HealSettings
from robx.export.request import ExportTarget
from robx.records import Bundle, Rung, Student, load_student, to_json

COLUMNS = {"cosine_mean": "centred cosine", "cosine_p1": "1st percentile", "cosine_min": "smallest"}


def main() -> None:
    """Export twice to each format and publish the table."""
    given = _arguments()
    data = given.data or demo_images()
    if given.hold_out or given.hold_out_unlabelled:
        data = hold_out(data, given.out / "images", labelled=given.hold_out, unlabelled=given.hold_out_unlabelled)
    run = given.run or save_lite0(given.out / "efficientnet_lite0", given.size)
    student, rows, records = load_student(run), list[list[str]](), list[dict[str, Any]]()
    for name in given.formats:
        for healing in (None, HealSettings(minutes=given.minutes, steps=given.steps)):
            target = ExportTarget(format=name, precision="int8", device=given.target)
            settings = ExportSettings(
                run=run, target=target, data=data, out=_folder(given.out, student, name, healed=healing is not None),
                limits=Limits(max_drop=given.max_drop, min_speedup=0.01), candidates=given.candidates, heal=healing,
            )  # fmt: skip
            before = time.process_time()
            bundle = export(settings, say=say, on_candidate=lambda rung: say(f"{rung.name}: {rung.accuracy_said}"))
            minutes = (time.process_time() - before) / 60
            rows += _rows(name, bundle, healed=healing is not None, minutes=minutes)
            records.append(
                {"format": name, "healed": healing is not None, "cpu_minutes": minutes, "bundle": to_json(bundle)}
            )
    headings = (
        "format", "weights", "int8", *COLUMNS.values(), "probe drop, points", "images", "healing", "CPU minutes",
    )  # fmt: skip
    publish(
        given.name,
        title=f"int8 of {student.timm_name} at {student.preprocessing.crop} px, from its own and from healed weights",
        headings=headings,
        rows=rows,
        data=records,
        notes=[
            "Of each export, the int8 candidate that ships or, if none does, the closest one; where an export with "
            "healing ships one of the student's own weights, both are shown.",
            "Centred cosine with the float student's embeddings, and drop of the frozen probe, on the judging images, "
            "or on the screening images for a candidate that was not judged.",
            f"robx's gate allows a drop of {given.max_drop:g} points, and any speed.",
            *([CLIP_ART] if given.data is None else [f"{data}"]),
            *held_out_note(given),
            "CPU minutes are of the whole export, with the healing where it was not in the export cache yet. The "
            "machine was busy: no other times are shown, and they decide only which candidate is judged first.",
        ],
        settings={"minutes": given.minutes, "steps": given.steps, "candidates": given.candidates},
    )


def _folder(out: Path, student: Student, fmt: str, *, healed: bool) -> Path:
    """The bundle's folder; students of one architecture have different weights, which its name tells apart."""
    return out / f"{student.timm_name}-{student.sha256[:8]}" / f"{fmt}-{'healed' if healed else 'plain'}"


def _rows(fmt: str, bundle: Bundle, *, healed: bool, minutes: float) -> list[list[str]]:
    """The closest int8 candidate from the weights that the export was about, and the one that ships, if another."""
    tried = [rung for rung in bundle.rungs if rung.precision == "int8"]
    about = [rung for rung in tried if bool(rung.settings.get("healed")) is healed]
    compared = [rung for rung in about if "cosine_mean" in rung.values]
    weights = "healed" if healed else "own"
    if not compared:
        why = about[0].reason if about else bundle.reason
        rows = [[fmt, weights, f"none: {why}", *[""] * 6]]
    else:
        rows = [_cells(fmt, max(compared, key=lambda r: (r.kept, r.values["cosine_mean"].value)), bundle)]
    rows += [_cells(fmt, rung, bundle) for rung in tried if rung.kept and rung not in about]
    return [[*row, f"{minutes:.1f}"] for row in rows]


def _cells(fmt: str, rung: Rung, bundle: Bundle) -> list[str]:
    healed = bool(rung.settings.get("healed"))
    return [
        fmt,
        "healed" if healed else "own",
        f"{rung.name}: {'ships' if rung.kept else rung.accuracy_said}",
        *(shown(rung.values.get(key), 4) for key in COLUMNS),
        shown(rung.values.get("probe_drop")),
        "judging" if rung.was_judged else "screening",
        _training(bundle) if healed else "",
    ]


def _training(bundle: Bundle) -> str:
    """How the weights were healed, for the table."""
    done = bundle.healing
    if done is None:
        return unused_healing(bundle)
    loss = f"loss {done.loss_before:.4f} -> {done.loss_after:.4f}"
    return f"{done.steps} steps of {done.batch} of {done.images} images; {loss}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a student; default: EfficientNet-Lite0 with its real weights")
    parser.add_argument("--size", type=int, default=64, help="image size of EfficientNet-Lite0, in pixels")
    parser.add_argument("--formats", nargs="+", default=["onnx"], help="formats to export to")
    parser.add_argument("--target", default="local", help="as robx export --target")
    parser.add_argument("--minutes", type=float, default=5.0, help="as robx export --heal")
    parser.add_argument("--steps", type=int, help="steps of healing, instead of as many as fit into the minutes")
    parser.add_argument("--candidates", type=int, help="int8 candidates of each kind of weights; default: all")
    parser.add_argument("--max-drop", type=float, default=4.0, help="points that the gate allows")
    parser.add_argument("--data", type=Path, help="labelled images in train/ and test/; default: the demo's")
    parser.add_argument("--hold-out", type=int, default=0, help="labelled training images to move into the test set")
    parser.add_argument(
        "--hold-out-unlabelled", type=int, default=0, help="unlabelled training images to move there, for the cosines"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/heal"))
    parser.add_argument("--name", default="heal", help="name of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
