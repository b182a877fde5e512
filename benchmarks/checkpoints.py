"""What a checkpoint costs training: the step time while one is written in the background, against that without.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --prototypes 8192

A run of ``robx.distill.train`` on the CPU with an MSN head of 65,536 prototypes (134 million weights, each with two
moments of AdamW). Steps that lie wholly inside a write are compared with those outside of any, interleaved within one
run; the wait is the time in which training stands still for the copy. The alternative, writing at once, would stand
still for copy and write.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from common import first_images, publish, say
from loader import photos

from robx.distill import train as training
from robx.distill.recipes import Recipe, override, preset
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.training.background import BackgroundWriter
from robx.distill.training.run import Options, Run, RunSpec
from robx.distill.training.run_state import save_run
from robx.images.sources import FolderSource, ImageSource

Span = tuple[float, float]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--every", type=int, default=16, help="steps between checkpoints")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "photos").mkdir()
        for number, data in enumerate(photos(64, 500, 375)):
            (place / "photos" / f"{number:03d}.jpg").write_bytes(data)
        source = first_images(FolderSource(place / "photos"), given.batch * given.steps)
        found = measure(recipe_of(given), source, place / "run", given)
    row = [
        f"{given.prototypes:,}",
        f"{found['checkpoint_gb']:.2f}",
        f"{found['wait_s']:.2f}",
        f"{found['write_s']:.1f}",
        f"{found['step_s']:.2f}",
        f"{found['step_during_write_s']:.2f}",
        f"{found['ratio']:.2f}",
    ]
    publish(
        "checkpoints",
        title="Training while a checkpoint is written",
        headings=["prototypes", "checkpoint, GB", "wait, s", "write, s", "step, s", "step during a write, s", "ratio"],
        rows=[row],
        data=[found],
        notes=[
            f"{given.student} with MSN's mlp head, AdamW, batch {given.batch}, crops of 64 and 32 px, random weights, "
            f"a checkpoint every {given.every} of {given.steps} steps. Medians of {found['steps_during']} steps inside "
            f"a write and {found['steps_without']} outside.",
            "Wait: training stands still while the state is copied. Write: what it would stand still for besides if "
            "it waited for the file (serialising, SHA-256, fsync).",
            "On a CPU the thread that writes takes time from the cores that train; this table says nothing of a GPU.",
        ],
        settings=vars(given),
    )


def recipe_of(given: argparse.Namespace) -> Recipe:
    """MSN's recipe with its mlp head, whose last layer is as wide as there are prototypes."""
    values = {"head": "mlp", "optimizer": "adamw", "lr": 1e-4, "batch_size": given.batch, "epochs": 1, "local_crops": 2}
    return override(preset("msn", "cnn"), values | {"crop_size": 64, "local_crop_size": 32})


def measure(recipe: Recipe, source: ImageSource, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run, and sort the steps by whether a checkpoint was being written."""
    teacher = build_teacher_skeleton(
        "timm:test_resnet", objective="msn", prototypes=given.prototypes, image_size=recipe.crop_shape
    )
    writes, waits, moments = list[Span](), list[Span](), list[float]()
    real_start = BackgroundWriter.start

    def start(writer: BackgroundWriter, write: Callable[[], object]) -> None:
        def timed() -> None:
            began = time.perf_counter()
            write()
            writes.append((began, time.perf_counter()))

        real_start(writer, timed)

    def save(run: Run, done: int) -> None:
        began = time.perf_counter()
        save_run(run, done)
        waits.append((began, time.perf_counter()))
        say(f"step {done}: training waited {waits[-1][1] - began:.2f} s")

    options = Options(device="cpu", measure=False, workers=1, checkpoint_steps=given.every, keep=1)
    spec = RunSpec(recipe=recipe, students=[given.student], source=source, out=out, teacher=teacher, options=options)
    with mock.patch.object(BackgroundWriter, "start", start), mock.patch.object(training, "save_run", save):
        training.train(spec, progress=lambda *_: moments.append(time.perf_counter()))
    (weights,) = out.glob("checkpoints/*/state.safetensors")
    steps = [step for step in itertools.pairwise(moments[1:]) if not any(_overlap(step, wait) for wait in waits)]
    during = [b - a for a, b in steps if any(began <= a and b <= ended for began, ended in writes)]
    without = [b - a for a, b in steps if not any(_overlap((a, b), write) for write in writes)]
    return {
        "checkpoint_gb": weights.stat().st_size / 1e9,
        "wait_s": statistics.median(b - a for a, b in waits[:-1]),
        "write_s": statistics.median(b - a for a, b in writes),
        "step_s": statistics.median(without),
        "step_during_write_s": statistics.median(during),
        "ratio": statistics.median(during) / statistics.median(without),
        "steps_during": len(during),
        "steps_without": len(without),
    }


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


if __name__ == "__main__":
    main()
