"""robx's training step, with data loading, against a floor: the bare forward and backward of the same networks.

    python benchmarks/step.py --size 64 --batch 64
    python benchmarks/step.py --size 224 --batch 32 --rounds 8

A round is a complete run of ``robx.distill.train`` (loader, crops, targets, loss, checks, optimiser, log; without its
first step, which waits for the loader to start) and, in random order, as many bare steps: the teacher's forward without
gradients, the student's forward, and a backward from a fixed gradient, on tensors in memory. The floor has no loss, no
optimiser and no data loading. The ratio is of the medians, with a bootstrap interval over the rounds; the aim is 1.10.
The weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLIP_ART, demo_images, first_images, publish, say, shown, step_seconds

from robx.distill.batches.loader import CropDataset, PlaceSampler, Share, collate
from robx.distill.recipes import Recipe, override, preset
from robx.distill.resolve import student_kind
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.teachers.teacher import Teacher
from robx.distill.training.learner import autocast
from robx.distill.training.networks import build_networks
from robx.distill.training.processes import join_processes
from robx.images.scenes import make_scene, render
from robx.images.sources import FolderSource, ImageSource, open_source
from robx.records import to_json
from robx.runtime.bench.latency import paired_ratio

STUDENTS = ("resnet18", "mobilenetv3_large_100", "vit_tiny_patch16_224")
SCENES = 64


def main() -> None:
    """Measure each student and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels of the global crops")
    parser.add_argument("--local-crops", type=int, default=None, help="default: the published recipe's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--steps", type=int, default=6, help="robx's steps per round, including the first, which is excluded"
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--teacher", default="dino_vits16")
    parser.add_argument("--students", nargs="+", default=STUDENTS)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = images(given.size, Path(name))
        teacher = build_teacher_skeleton(given.teacher, image_size=given.size)
        found = [measure(student, teacher, source, given, Path(name)) for student in given.students]
    rows = [
        [f["student"], f"{f['floor_ms']:.0f}", f"{f['robx_ms']:.0f}", shown(f["ratio"]), f"{f['images_per_s']:.1f}"]
        for f in found
    ]
    publish(
        f"step-{given.size}",
        title=f"robx's step against bare forward and backward, {given.size} px",
        headings=["student", "floor, ms", "robx, ms", "ratio [95 %]", "images/s"],
        rows=rows,
        data=to_json(found),
        notes=[
            f"Teacher {given.teacher} and students with random weights; RoB's recipe of that method; batch "
            f"{given.batch}, 2 global crops of {given.size} px and {found[0]['local_crops']} local ones of "
            f"{found[0]['local_size']} px; {given.workers} loader worker(s); {given.rounds} rounds of "
            f"{given.steps - 1} steps per side, interleaved.",
            CLIP_ART if given.size <= 96 else f"Images: {SCENES} rendered scenes of 400 x 400 pixels as JPEG.",
            "The floor has no loss, optimiser, checks or data loading: a ratio of 1 cannot be reached.",
            "These figures do not apply to a GPU, where the loader has to be many times as fast.",
        ],
        settings=vars(given) | {"students": list(given.students)},
    )


def measure(
    student: str, teacher: Teacher, source: ImageSource, given: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Time rounds of robx's own steps and of bare steps, in random order."""
    recipe = recipe_of(student, teacher, given)
    few = first_images(source, given.batch * given.steps)
    bare = bare_step(student, teacher, recipe, few)
    bare()
    sides = {
        "robx": lambda: step_seconds(recipe, [student], few, folder / student, workers=given.workers, teacher=teacher),
        "floor": lambda: [bare() for _ in range(given.steps - 1)],
    }
    blocks: dict[str, list[np.ndarray]] = {"robx": [], "floor": []}
    shuffle = random.Random(0)
    for number in range(given.rounds):
        for side in shuffle.sample(sorted(sides), 2):
            blocks[side].append(np.array([1e9 * s for s in sides[side]()], dtype=np.int64))
        say(f"{student}: round {number + 1} of {given.rounds}")
    medians = {side: float(np.median(np.concatenate(found))) / 1e6 for side, found in blocks.items()}
    return {
        "student": student,
        "floor_ms": medians["floor"],
        "robx_ms": medians["robx"],
        "ratio": paired_ratio(blocks["robx"], blocks["floor"]),
        "images_per_s": 1000 * given.batch / medians["robx"],
        "local_crops": recipe.local_crops,
        "local_size": recipe.local_crop_size,
        "samples_ms": {side: [np.round(b / 1e6, 1).tolist() for b in found] for side, found in blocks.items()},
    }


def recipe_of(student: str, teacher: Teacher, given: argparse.Namespace) -> Recipe:
    """The method's recipe at this size; local crops keep their ratio to the global ones (96 to 224)."""
    method = teacher.method if teacher.method in ("dino", "ibot", "msn", "swav") else "msn"
    recipe = preset(method, student_kind(student))
    local = max(32, 16 * round(given.size * 96 / 224 / 16))
    crops = recipe.local_crops if given.local_crops is None else given.local_crops
    return override(
        recipe,
        {
            "crop_size": given.size,
            "local_crop_size": local,
            "local_crops": crops,
            "batch_size": given.batch,
            "epochs": 1,
        },
    )


def bare_step(
    student: str, teacher: Teacher, recipe: Recipe, source: ImageSource, *, device: str = "cpu"
) -> Callable[[], float]:
    """A function that runs one bare step on crops in memory and returns its duration in seconds."""
    with join_processes(device) as processes:
        networks = build_networks(recipe, [student], teacher=teacher, processes=processes, steps=1, steps_per_epoch=1)
    net = networks.learners[0].net
    places = next(iter(PlaceSampler(len(source), recipe, share=Share(), start=0, end=1)))
    dataset = CropDataset(source, recipe, mask_grid=networks.mask_grid)
    views = collate([dataset[place] for place in places]).views(processes.device)
    pixels = views.globals.flatten(0, 1)
    with autocast(recipe, processes.device):
        gradient = torch.full_like(net(views).crops, 1e-6)

    def step() -> float:
        started = time.perf_counter()
        with torch.inference_mode(), autocast(recipe, processes.device):
            teacher(pixels, patches=False)
        with autocast(recipe, processes.device):
            scores = net(views).crops
        torch.autograd.backward(scores, gradient)
        net.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def images(size: int, folder: Path) -> ImageSource:
    """128-pixel clip art for small crops, larger JPEG scenes for large ones, so that decoding costs are realistic."""
    if size <= 96:
        return open_source(demo_images(), split="train")
    scenes = folder / "scenes"
    scenes.mkdir()
    for index in range(SCENES):
        render(make_scene(0, index), size=400).save(scenes / f"{index:03d}.jpg", quality=90)
    return FolderSource(scenes)


if __name__ == "__main__":
    main()
