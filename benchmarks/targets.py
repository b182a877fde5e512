"""Stored targets against a live teacher: the same losses, how many bytes an image, how much faster.

    python benchmarks/targets.py
    python benchmarks/targets.py --dino-weights runs/chain/dino/teacher/teacher.pth

Loss: the same run twice, once with the teacher in it (its targets stored on the way) and once from what was stored,
with real teachers: MSN's loss on EfficientNet-Lite0 with fitted prototypes at k = 64, and DINO's at k = 256 with a
teacher of benchmarks/chain.py. 1e-3 is the aim. Speed: a ViT-S/14 teacher (random weights: time does not depend on
them) and MobileNetV3 at 224 px, both sides whole runs of robx's loop, interleaved; 3 is the aim.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import CLIP_ART, demo_images, first_images, publish, say, shown, step_seconds

from robx.distill.recipes import Method, Recipe, override, preset
from robx.distill.run import Options
from robx.distill.stored import read_info
from robx.distill.teachers import Teacher, build_teacher_skeleton, load_teacher
from robx.distill.train import train
from robx.records import to_json
from robx.runtime.latency import paired_ratio
from robx.sources import ImageSource, open_source

Row = dict[str, Any]


def main() -> None:
    """Compare losses, then speeds, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of the runs whose losses are compared")
    parser.add_argument("--dino-weights", type=Path, help="a teacher.pth with DINO's head")
    parser.add_argument("--teacher", default="dinov2_vits14", help="of the speed")
    parser.add_argument("--student", default="mobilenetv3_large_100", help="of the speed")
    parser.add_argument("--size", type=int, default=224, help="of the speed's global crops")
    parser.add_argument("--batch", type=int, default=16, help="of the speed")
    parser.add_argument("--speed-steps", type=int, default=4, help="of a round, the first one left out")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    source = open_source(demo_images(), split="train")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fitted = load_teacher("efficientnet_lite0", source=source, prototypes=1024, objective="msn", image_size=64)
        rows = [compare("msn", fitted, 64, source, folder, given)]
        if given.dino_weights:
            published = load_teacher("dino", weights=given.dino_weights, image_size=64)
            rows.append(compare("dino", published, 256, source, folder, given))
        rows.append(speed(source, folder, given))
    cells = [
        [
            r["what"], str(r["prototypes"]), str(r["k"]), f"{r['bytes']:,}",
            f"{r['largest_difference']:.1e}" if "largest_difference" in r else "-",
            f"{r['mean_loss']:.3f}" if "mean_loss" in r else "-", shown(r.get("speed_up")),
        ]
        for r in rows
    ]  # fmt: skip
    publish(
        "targets",
        title="Stored targets against a live teacher",
        headings=[
            "what",
            "K",
            "k",
            "bytes an image and epoch",
            "largest loss difference",
            "mean loss",
            "times as fast",
        ],
        rows=cells,
        data=to_json(rows),
        notes=[
            f"Losses of each of {given.steps} steps, mobilenetv3_small_100 at 64 px, batch 64; the student's own "
            "course differs from the second step on, so this is more than the rounding of one target.",
            f"Speed: {given.teacher} and {given.student} at {given.size} px, batch {given.batch}, 2 global crops and "
            f"no local one, {given.workers} loader worker(s), {given.rounds} interleaved rounds; whole steps of robx's "
            "loop, whose data loading both sides pay.",
            *([] if given.dino_weights else ["No --dino-weights were given: DINO's loss was not compared."]),
            CLIP_ART,
        ],
        settings={key: str(value) for key, value in vars(given).items() if key != "dino_weights"},
    )


def compare(
    method: Method, teacher: Teacher, k: int, source: ImageSource, folder: Path, given: argparse.Namespace
) -> Row:
    """The losses of a live run and of the run from its stored targets."""
    say(f"{method}: live and stored losses")
    recipe = recipe_of(method, teacher, 64, 64, local_crops=2)
    few = first_images(source, 64 * given.steps)
    stored = folder / f"{method}-targets"
    live = losses(recipe, few, folder / f"{method}-live", given.workers, k, teacher=teacher, store=stored)
    again = losses(recipe, few, folder / f"{method}-stored", given.workers, k, targets=stored)
    return {
        "what": f"RoB-{method.upper()}, {teacher.name}",
        "prototypes": teacher.num_prototypes,
        "k": k,
        "bytes": read_info(stored).row.itemsize,
        "largest_difference": float(np.abs(live - again).max()),
        "first_difference": float(abs(live[0] - again[0])),
        "mean_loss": float(live.mean()),
    }


def losses(recipe: Recipe, source: ImageSource, out: Path, workers: int, k: int, **branch: Any) -> np.ndarray:
    """The loss of every step of a run."""
    options = Options(device="cpu", workers=workers, fresh=True, measure=False, log_every=1, stored_k=k)
    train(recipe, students=["mobilenetv3_small_100"], source=source, out=out, options=options, **branch)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def speed(source: ImageSource, folder: Path, given: argparse.Namespace) -> Row:
    """How many times as fast a run is without its teacher."""
    teacher = build_teacher_skeleton(given.teacher, objective="msn", prototypes=1024, image_size=given.size)
    recipe = recipe_of("msn", teacher, given.size, given.batch, local_crops=0)
    few = first_images(source, given.batch * given.speed_steps)
    stored, run = folder / "speed-targets", folder / "speed"
    step_seconds(recipe, [given.student], few, run, workers=given.workers, teacher=teacher, store=stored)
    blocks: dict[str, list[np.ndarray]] = {"live": [], "stored": []}
    for number in range(given.rounds):
        for side in ("live", "stored") if number % 2 else ("stored", "live"):
            branch: dict[str, Any] = {"teacher": teacher} if side == "live" else {"targets": stored}
            seconds = step_seconds(recipe, [given.student], few, run, workers=given.workers, **branch)
            blocks[side].append(np.array([1e9 * s for s in seconds], dtype=np.int64))
        say(f"speed: round {number + 1} of {given.rounds}")
    info = read_info(stored)
    return {
        "what": f"{given.teacher} -> {given.student}, {given.size} px",
        "prototypes": info.prototypes,
        "k": info.k,
        "bytes": info.row.itemsize,
        "speed_up": paired_ratio(blocks["live"], blocks["stored"]),
        "milliseconds": {side: float(np.median(np.concatenate(found))) / 1e6 for side, found in blocks.items()},
    }


def recipe_of(method: Method, teacher: Teacher, size: int, batch: int, *, local_crops: int) -> Recipe:
    """The method's preset for one epoch with AdamW."""
    return override(
        preset(method, "cnn"),
        {"optimizer": "adamw", "lr": 0.002, "lr_batch": None, "epochs": 1, "batch_size": batch, "crop_size": size,
         "local_crops": local_crops, "local_crop_size": 32, "prototypes": teacher.num_prototypes},
    )  # fmt: skip


if __name__ == "__main__":
    main()
