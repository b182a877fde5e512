"""Stored targets against a live teacher: difference of the losses, bytes per image, and speed-up.

    python benchmarks/targets.py
    python benchmarks/targets.py --dino-weights dino_deitsmall16_pretrain_full_checkpoint.pth

Loss: the same run twice, once with the teacher (storing its targets) and once from the stored targets; and, at the
final weights of the first run, the loss of each batch with both kinds of targets, whose largest difference should stay
below 1e-3. The teachers are real: MSN's loss on EfficientNet-Lite0 with fitted prototypes at k = 64, and DINO's loss at
k = 256 with a head that DINO trained on EfficientNet-Lite0's trunk, or with a published checkpoint.
Speed: a ViT-S/14 teacher (random weights: time does not depend on them) and MobileNetV3 at 224 px, both sides complete
runs of robx's loop, interleaved; the aim is 3.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chain import save_real
from common import CLIP_ART, demo_images, first_images, publish, say, shown, step_seconds

from robx.distill.batches.loader import build_loader
from robx.distill.recipes import Method, Recipe, override, preset
from robx.distill.targets.build import open_targets
from robx.distill.targets.stored import read_info, table_path
from robx.distill.teachers.load import build_teacher_skeleton, load_teacher
from robx.distill.teachers.teacher import Teacher
from robx.distill.train import train
from robx.distill.training.networks import build_networks
from robx.distill.training.processes import join_processes
from robx.distill.training.run import Options, RunSpec
from robx.distill.training.run_checkpoint import load_newest
from robx.images.sources import ImageSource, open_source
from robx.records import to_json
from robx.runtime.bench.latency import paired_ratio

Row = dict[str, Any]
TRUNK, STUDENT, BATCH = "tf_efficientnet_lite0", "mobilenetv3_small_100", 64


def main() -> None:
    """Compare losses, then speeds, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="steps of the runs whose losses are compared")
    parser.add_argument("--dino-weights", type=Path, help="a full DINO checkpoint; default: one trained here")
    parser.add_argument("--dino-epochs", type=int, default=12, help="epochs of the one trained here")
    parser.add_argument("--dino-outputs", type=int, default=1024, help="outputs of the one trained here")
    parser.add_argument("--teacher", default="dinov2_vits14", help="teacher of the speed test")
    parser.add_argument("--student", default="mobilenetv3_large_100", help="student of the speed test")
    parser.add_argument("--size", type=int, default=224, help="pixels of the speed test's global crops")
    parser.add_argument("--batch", type=int, default=16, help="batch size of the speed test")
    parser.add_argument(
        "--speed-steps", type=int, default=4, help="steps per round, including the first, which is excluded"
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/targets"), help="where the teacher trained here is kept")
    given = parser.parse_args()
    source = open_source(demo_images(), split="train")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fitted = load_teacher("efficientnet_lite0", source=source, prototypes=1024, objective="msn", image_size=64)
        rows = [compare("msn", fitted, 64, source, folder, given)]
        weights = given.dino_weights or dino_checkpoint(source, given)
        published = load_teacher("dino", weights=weights, image_size=64)
        rows.append(compare("dino", published, 256, source, folder, given))
        rows.append(speed(source, folder, given))
    cells = [
        [
            r["what"], str(r["prototypes"]), str(r["k"]), f"{r['bytes']:,}",
            *([f"{r['tail']:.1e}", f"{r['largest_difference']:.1e}", f"{r['live_loss']:.3f}", f"{r['stored_loss']:.3f}"]
              if "tail" in r else ["-"] * 4),
            shown(r.get("speed_up")),
        ]
        for r in rows
    ]  # fmt: skip
    publish(
        "targets",
        title="Stored targets against a live teacher",
        headings=[
            "what", "K", "k", "bytes per image and epoch", "mass beyond k", "largest difference", "loss, live",
            "loss, stored", "speed-up",
        ],
        rows=cells,
        data=to_json(rows),
        notes=[
            f"Losses of {STUDENT} at 64 px, batch {BATCH}, {given.steps} steps. Largest difference: of the losses of "
            "one batch with live and with stored targets, at the final weights of the live run. Loss, live and "
            "stored: the mean over the last ten steps of each run; the runs gradually diverge, as any two runs do that "
            "differ by a rounding error.",
            f"Speed: {given.teacher} and {given.student} at {given.size} px, batch {given.batch}, 2 global crops and "
            f"no local crops, {given.workers} loader worker(s), {given.rounds} interleaved rounds; complete steps of "
            "robx's loop, with data loading on both sides.",
            *([] if given.dino_weights else [_of_the_head(source, given)]),
            CLIP_ART,
        ],
        settings={key: str(value) for key, value in vars(given).items() if key not in ("dino_weights", "out")},
    )  # fmt: skip


def _of_the_head(source: ImageSource, given: argparse.Namespace) -> str:
    return (
        f"DINO's head of {given.dino_outputs} outputs was trained by DINO itself on EfficientNet-Lite0's frozen trunk, "
        f"{given.dino_epochs} epochs of {len(source):,} images, and read back from its published layout."
    )


def dino_checkpoint(source: ImageSource, given: argparse.Namespace) -> Path:
    """A DINO teacher in its published layout: EfficientNet-Lite0's real trunk and a head that DINO trained on it."""
    say("dino: training a head")
    recipe = override(
        preset("dino", "cnn", base=True),
        {"optimizer": "adamw", "lr": 1e-3, "lr_batch": None, "warmup_share": 0.1, "epochs": given.dino_epochs,
         "batch_size": 32, "crop_size": 64, "local_crops": 0, "prototypes": given.dino_outputs, "freeze_trunk": True,
         "ema_momentum": [0.99, 1.0], "teacher_temperature_epochs": 1, "freeze_last_layer_epochs": 0,
         "weight_decay": 0.04, "weight_decay_end": 0.04},
    )  # fmt: skip
    real = save_real("efficientnet_lite0", TRUNK, given.out / "real", 64)
    options = Options(device="cpu", workers=given.workers, measure=False)
    out: Path = given.out / "dino-teacher"
    train(RunSpec(recipe=recipe, students=[TRUNK], source=source, out=out, init=real, options=options))
    return out / "teacher.pth"


def compare(
    method: Method, teacher: Teacher, k: int, source: ImageSource, folder: Path, given: argparse.Namespace
) -> Row:
    """Losses of a live run, of the run from its stored targets, and of both at the same weights."""
    say(f"{method}: live and stored losses")
    recipe = recipe_of(method, teacher, 64, BATCH, local_crops=2)
    few = first_images(source, BATCH * given.steps)
    stored = folder / f"{method}-targets"
    live = losses(recipe, few, folder / f"{method}-live", given.workers, k, teacher=teacher, store=stored)
    again = losses(recipe, few, folder / f"{method}-stored", given.workers, k, targets=stored)
    pairs = at_the_same_weights(recipe, teacher, few, stored, folder / f"{method}-live")
    return {
        "what": f"RoB-{method.upper()}, {teacher.name}",
        "prototypes": teacher.num_prototypes,
        "k": k,
        "bytes": read_info(stored).row.itemsize,
        "tail": float(np.load(table_path(stored, 0))["tail"].mean()),
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "same_weights": pairs,
        "live_loss": float(live[-10:].mean()),
        "stored_loss": float(again[-10:].mean()),
    }


@torch.no_grad()
def at_the_same_weights(
    recipe: Recipe, teacher: Teacher, source: ImageSource, stored: Path, run: Path, *, batches: int = 8
) -> list[tuple[float, float]]:
    """The losses of some batches with live and with stored targets, at the final weights of `run`."""
    steps = len(source) // recipe.batch_size
    with join_processes("cpu") as processes:
        networks = build_networks(
            recipe, [STUDENT], teacher=teacher, processes=processes, steps=steps, steps_per_epoch=steps
        )
    (learner,), found = networks.learners, load_newest(run)
    if found is None or networks.branch is None:
        raise SystemExit(f"{run} has no checkpoint")
    learner.load(found[1]["learners"][STUDENT])
    kept = open_targets(stored, recipe, source).branch
    pairs = []
    for batch in build_loader(source, recipe, start=0, end=batches):
        views = batch.views(torch.device("cpu"))
        scores = learner.net(views)
        both = (learner.objective(scores, branch.targets(views), views)[0] for branch in (networks.branch, kept))
        live, again = (float(loss) for loss in both)
        pairs.append((live, again))
    return pairs


def losses(recipe: Recipe, source: ImageSource, out: Path, workers: int, k: int, **branch: Any) -> np.ndarray:
    """The loss of every step of a run."""
    options = Options(device="cpu", workers=workers, fresh=True, measure=False, log_every=1, stored_k=k)
    train(RunSpec(recipe=recipe, students=[STUDENT], source=source, out=out, options=options, **branch))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def speed(source: ImageSource, folder: Path, given: argparse.Namespace) -> Row:
    """The speed-up of a run without its teacher."""
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
        {"optimizer": "adamw", "lr": 5e-4, "lr_batch": None, "epochs": 1, "batch_size": batch, "crop_size": size,
         "local_crops": local_crops, "local_crop_size": 32, "prototypes": teacher.num_prototypes},
    )  # fmt: skip


if __name__ == "__main__":
    main()
