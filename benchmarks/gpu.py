"""Everything that needs a GPU, in one script: `make gpu`. It installs and downloads nothing.

    python benchmarks/gpu.py            the tests marked gpu, then the training speed
    python benchmarks/gpu.py --quick    fewer steps, for a short lease

It needs Python with torch (CUDA), torchvision, timm and pytest, and at most 8 minutes. For each pair of teacher and
student (random weights: speed does not depend on them) it runs robx's own training with its defaults for a GPU, loader
included, and the bare forward and backward of the same networks on tensors in memory, in the same precision. The ratio
of both rates is the aim: at least .85 while the processor's cores suffice; where they do not, the table says how many
would. Results go to benchmarks/results/gpu-NAME.md.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import first_images, publish, say, step_seconds
from loader import photos
from step import bare_step

from robx.distill.batches.loader import CropDataset
from robx.distill.recipes import Recipe, override, preset
from robx.distill.resolve import student_kind
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.training.compute import KEYS, DeviceFacts, compute_of, cuda_settings, decide, facts_of
from robx.distill.training.networks import prepare_network
from robx.images.sources import FolderSource, ImageSource

ROOT = Path(__file__).resolve().parent.parent
PAIRS = (("dino_vits16", "resnet18"), ("msn_vitl", "mobilenetv3_large_100"))
SKIPPED = 6  # first steps of a run: the loader starts, kernels are chosen


def main() -> int:
    """Run the tests, measure, and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", type=int, default=224, help="of the global crops, in pixels")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--quick", action="store_true", help="20 steps of 128 images")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu: check the script itself, on a machine without a GPU")
    given = parser.parse_args()
    if given.quick:
        given.batch, given.steps = 128, 20
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU: run make gpu on a machine with one; nothing was measured", file=sys.stderr)
        return 2
    tests = "not run" if given.no_tests else run_tests(given.device)
    with tempfile.TemporaryDirectory() as folder:
        source = write_photos(Path(folder))
        found = [measure(teacher, student, source, Path(folder), given) for teacher, student in PAIRS]
    write(found, tests, given)
    return 0 if re.match(r"\d+ passed", tests) or given.no_tests else 1


def run_tests(device: str) -> str:
    """The last line of the tests marked gpu."""
    environment = os.environ | {"ROBX_GPU": device, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    return (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")


def write_photos(folder: Path) -> ImageSource:
    """The JPEG files of `loader.py` as a source."""
    place = folder / "photos"
    place.mkdir()
    for number, data in enumerate(photos(64, 500, 375)):
        (place / f"{number:03d}.jpg").write_bytes(data)
    return FolderSource(place)


def measure(teacher: str, student: str, photos: ImageSource, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Images per second of a run and of the bare networks, and what the loader needs."""
    device = torch.device(given.device)
    recipe = gpu_recipe(teacher, student, given)
    skeleton = build_teacher_skeleton(teacher, objective=recipe.objective, image_size=given.size)
    prepare_network(skeleton, device)
    few = first_images(photos, given.batch * given.steps)
    with cuda_settings(compute_of(recipe, device, workers=given.workers)):
        bare = bare_rate(student, skeleton, recipe, few, given)
    say(f"{teacher} -> {student}: bare {bare:.0f} images/s")
    cpu_ms = worker_ms(few, recipe)
    with BusyShare(device) as busy:
        seconds = step_seconds(
            recipe, [student], few, folder / student, workers=given.workers, device=given.device, teacher=skeleton
        )
    kept = seconds[min(SKIPPED, len(seconds) - 1) :]
    rate = given.batch * len(kept) / sum(kept)
    say(f"{teacher} -> {student}: robx {rate:.0f} images/s")
    return {
        "teacher": teacher,
        "student": student,
        "precision": recipe.precision,
        "augment": recipe.augment,
        "bare_images_per_s": bare,
        "robx_images_per_s": rate,
        "ratio": rate / bare,
        "busy": busy.share,
        "worker_cpu_ms": cpu_ms,
        "cores_needed": math.ceil(bare * cpu_ms / 1000),
        "step_ms": [round(1000 * s, 2) for s in seconds],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def gpu_recipe(teacher: str, student: str, given: argparse.Namespace) -> Recipe:
    """The published recipe with robx's defaults for a GPU."""
    method: Any = teacher.split("_")[0]
    stand_in = DeviceFacts(kind="cuda", bf16=True)
    compute = decide(facts_of(given.device) if given.device == "cuda" else stand_in, {})
    values = {key: getattr(compute, key) for key in KEYS} | {
        "batch_size": given.batch,
        "epochs": 1,
        "crop_size": given.size,
        "local_crop_size": max(32, 16 * round(given.size * 96 / 224 / 16)),
    }
    return override(preset(method, student_kind(student)), values)


def bare_rate(student: str, teacher: Any, recipe: Recipe, source: ImageSource, given: argparse.Namespace) -> float:
    """Images per second of the teacher's forward and the student's forward and backward, on tensors in memory."""
    step = bare_step(student, teacher, recipe, source, device=given.device)
    steps = max(3, given.steps // 2)
    for _ in range(3):
        step()
    synchronise(given.device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(given.device)
    return float(given.batch * steps / (time.perf_counter() - began))


def worker_ms(source: ImageSource, recipe: Recipe) -> float:
    """CPU milliseconds of a loader worker per image."""
    dataset = CropDataset(source, recipe)
    began = time.process_time()
    for index in range(48):
        dataset[0, index % len(source)]
    return 1000 * (time.process_time() - began) / 48


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


class BusyShare:
    """The share of time in which the GPU was at work, as NVML reports it, sampled ten times a second."""

    def __init__(self, device: torch.device) -> None:
        self._samples: list[int] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample) if device.type == "cuda" else None

    @property
    def share(self) -> float | None:
        """The mean over the second half of the samples, when the run is under way; None without NVML."""
        later = self._samples[len(self._samples) // 2 :]
        return sum(later) / len(later) / 100 if later else None

    def _sample(self) -> None:
        while not self._end.wait(0.1):
            try:
                self._samples.append(torch.cuda.utilization())
            except Exception as error:  # no NVML: the column stays empty
                say(f"the GPU's busy share cannot be read ({error})")
                return

    def __enter__(self) -> BusyShare:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()


def write(found: list[dict[str, Any]], tests: str, given: argparse.Namespace) -> None:
    """The table, named after the GPU."""
    name = torch.cuda.get_device_name() if given.device == "cuda" else "none"
    cores = len(os.sched_getaffinity(0))
    rows = [
        [
            f"{one['teacher']} -> {one['student']}",
            one["precision"],
            f"{one['bare_images_per_s']:.0f}",
            f"{one['robx_images_per_s']:.0f}",
            f"{one['ratio']:.2f}",
            "-" if one["busy"] is None else f"{one['busy']:.0%}",
            f"{one['worker_cpu_ms']:.2f}",
            f"{one['cores_needed']}",
        ]
        for one in found
    ]
    publish(
        f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}",
        title=f"Training on {name}",
        headings=[
            *("teacher -> student", "precision", "bare, images/s", "robx, images/s", "ratio"),
            *("GPU busy", "worker CPU ms/image", "cores for the bare rate"),
        ],
        rows=rows,
        data=found,
        notes=[
            f"Tests marked gpu: {tests}.",
            f"Random weights; batch {given.batch}, crops of {given.size} px, {given.steps} steps, the first {SKIPPED} "
            f"left out; {given.workers} loader workers on {cores} cores; crops are made on the device.",
            "Bare: the teacher's forward and the student's forward and backward on tensors in memory, no loss, no "
            "optimiser, no data.",
            f"torch {torch.__version__}, CUDA {torch.version.cuda}.",
        ],
        settings={key: str(value) for key, value in vars(given).items()},
    )


if __name__ == "__main__":
    raise SystemExit(main())
