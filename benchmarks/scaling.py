"""Time and memory of a training step against batch, crops and prototypes, and the effect of a second process.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py

Each point is a fresh process that runs a few steps of ``robx.distill.train`` and reports their median time and its peak
memory (VmHWM: weights, activations, optimiser and libraries). One setting changes at a time. Two processes under
torchrun (gloo) share the same global batch: their losses have to equal those of one process to 1e-5 for a student
without BatchNorm. The weights are random: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLIP_ART, RESULTS, demo_images, first_images, publish, say, step_seconds
from matplotlib.figure import Figure

from robx.distill.recipes import Recipe, override, preset
from robx.distill.resolve import student_kind
from robx.distill.teachers.load import build_teacher_skeleton
from robx.images.sources import open_source
from robx.store.files import write_atomically

Point = dict[str, Any]
BASE: Point = {"student": "vit_tiny_patch16_224", "batch": 32, "local_crops": 4, "prototypes": 4096, "processes": 1}
SWEEPS: dict[str, list[int]] = {
    "batch": [8, 16, 32, 64],
    "local_crops": [0, 2, 4, 8],
    "prototypes": [1024, 4096, 16384, 65536],
}
TITLES = {"batch": "images per step", "local_crops": "local crops per image", "prototypes": "prototypes K"}


def main() -> None:
    """Measure every point and write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels of the global crops")
    parser.add_argument("--steps", type=int, default=5, help="steps per point, including the first, which is excluded")
    parser.add_argument("--teacher", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--students", nargs="+", default=["vit_tiny_patch16_224", "resnet18"])
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point is not None:
        measure_here(given.point, given)
        return
    demo_images()
    rows = [
        measured(BASE | {"student": student, name: value}, given, sweep=name)
        for student in given.students
        for name, values in SWEEPS.items()
        for value in values
    ]
    pairs = [two_processes(student, given) for student in given.students]
    write_atomically(RESULTS / "scaling.svg", lambda path: picture(rows, given.students, path))
    publish(
        "scaling",
        title=f"Time and memory of a training step, {given.size} px",
        headings=["student", "batch", "local crops", "K", "processes", "ms per step", "peak MB", "losses differ by"],
        rows=[cells(row) for row in [*rows, *pairs]],
        data={"sweeps": rows, "processes": pairs},
        notes=[
            f"Teacher {given.teacher} with prototypes, objective MSN, 2 global crops of {given.size} px and local ones "
            f"of {given.size // 2} px, AdamW, 1 loader worker in each process; median of {given.steps - 1} steps. A "
            "point is one short run: look at the trend, not at a single figure.",
            "Peak memory is that of one complete process, libraries included; of two processes, the larger.",
            "A student with BatchNorm sees half the batch in each of two processes, so its losses differ: "
            "SyncBatchNorm needs a GPU.",
            CLIP_ART,
        ],
        settings={key: value for key, value in vars(given).items() if key not in ("point", "out")},
    )


def measured(point: Point, given: argparse.Namespace, *, sweep: str) -> Point:
    """Measure a point in fresh processes: milliseconds per step, peak bytes and losses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if point["processes"] > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point["processes"])]
        command += [__file__, "--point", json.dumps(point), "--out", folder]
        command += ["--size", str(given.size), "--steps", str(given.steps), "--teacher", given.teacher]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    row = point | {
        "sweep": sweep,
        "ms": 1000 * float(np.median(found[0]["seconds"])),
        "peak_bytes": max(rank["peak_bytes"] for rank in found),
        "losses": found[0]["losses"],
    }
    say(f"{point}: {row['ms']:.0f} ms, {row['peak_bytes'] / 1e6:.0f} MB")
    return row


def two_processes(student: str, given: argparse.Namespace) -> Point:
    """Two processes with the global batch of one, and the largest difference of the losses."""
    one = measured(BASE | {"student": student}, given, sweep="processes")
    two = measured(BASE | {"student": student, "processes": 2}, given, sweep="processes")
    apart = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
    return two | {"apart": apart, "ms_of_one": one["ms"]}


def measure_here(point: Point, given: argparse.Namespace) -> None:
    """Run the steps in this process and write their time and memory to ``rank-N.json``."""
    recipe = recipe_of(point, given)
    source = first_images(open_source(demo_images(), split="train"), recipe.batch_size * given.steps)
    torch.manual_seed(0)  # the same random teacher in every process
    teacher = build_teacher_skeleton(
        given.teacher, objective="msn", prototypes=recipe.prototypes, image_size=given.size
    )
    run = given.out / "run"
    seconds = step_seconds(recipe, [point["student"]], source, run, workers=1, log_every=1, teacher=teacher)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        "seconds": seconds,
        "peak_bytes": peak,
        "losses": [line["loss"] for line in metrics if "loss" in line],
    }
    (given.out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def recipe_of(point: Point, given: argparse.Namespace) -> Recipe:
    """RoB-MSN with AdamW at this point."""
    values = {
        "optimizer": "adamw", "lr": 1e-3, "lr_batch": None, "epochs": 1, "crop_size": given.size,
        "local_crop_size": given.size // 2, "local_crops": point["local_crops"], "batch_size": point["batch"],
        "prototypes": point["prototypes"],
    }  # fmt: skip
    return override(preset("msn", student_kind(point["student"])), values)


def cells(row: Point) -> list[str]:
    """A row of the table."""
    time = f"{row['ms']:.0f}" + (f" (one: {row['ms_of_one']:.0f})" if "ms_of_one" in row else "")
    apart = f"{row['apart']:.1e}" if "apart" in row else "-"
    settings = [str(row[key]) for key in ("batch", "local_crops", "prototypes", "processes")]
    return [row["student"], *settings, time, f"{row['peak_bytes'] / 1e6:.0f}", apart]


def picture(rows: list[Point], students: list[str], path: Path) -> None:
    """Plot time above and memory below: one column per setting, one line per student."""
    canvas = Figure(figsize=(9, 5), layout="constrained")
    axes = canvas.subplots(2, len(SWEEPS))
    styles = [("o", "-"), ("s", "--"), ("D", ":")]
    for column, name in enumerate(SWEEPS):
        for student, (marker, line) in zip(students, styles, strict=False):
            mine = [row for row in rows if row["student"] == student and row["sweep"] == name]
            x = [row[name] for row in mine]
            for axis, y in zip(axes[:, column], ("ms", "MB"), strict=True):
                values = [row["ms"] if y == "ms" else row["peak_bytes"] / 1e6 for row in mine]
                axis.plot(x, values, marker=marker, ls=line, label=student)
        axes[1, column].set_xlabel(TITLES[name])
    for axis in axes[:, list(SWEEPS).index("prototypes")]:
        axis.set_xscale("log", base=2)
    for axis in axes.flat:  # last: setting one limit freezes the other
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("ms per step")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[0, 0].legend(fontsize="small")
    canvas.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
