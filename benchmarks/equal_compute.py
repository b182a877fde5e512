"""Which way of distilling makes the best small student from the same CPU time?

    OMP_NUM_THREADS=1 python benchmarks/equal_compute.py --budgets 2 --seeds 1       # minutes
    OMP_NUM_THREADS=1 python benchmarks/equal_compute.py                             # hours

Same teacher, images, student, first weights and CPU seconds of one core. What a budget buys is found by timing a few
steps of each method; fitting prototypes counts as part of the budget. The images of a run are the first ones of an
order that depends on the seed alone, and every run ends with its learning rate at the end of its schedule.

Each student is judged by kNN and by a linear head on cached features. Differences are paired: the same seeds and the
same test images, with a bootstrap over both. Every run is kept, the losing ones too; the same command continues.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLIP_ART, Chosen, demo_images, publish, say, shown

from robx.distill.recipes import Recipe, override, preset
from robx.distill.resolve import student_kind
from robx.distill.teachers.load import load_teacher
from robx.distill.teachers.teacher import Teacher
from robx.distill.train import train
from robx.distill.training.run import Options, RunSpec
from robx.errors import InputError
from robx.eval.datasets.features import extract
from robx.eval.datasets.splits import Split, open_split
from robx.eval.neighbours import nearest
from robx.eval.protocols.knn import knn_vote
from robx.eval.protocols.linear import linear_cached
from robx.images.sources import ImageSource, open_source
from robx.records import Value
from robx.runtime.session import SessionSettings, open_session
from robx.store.files import cache_folder, read_json, write_json

WARM_STEPS, TIMED_STEPS = 3, 12
BOOTSTRAP = 2000


@dataclass(frozen=True)
class Method:
    """One way of distilling: what it says, and the keys of the recipe in which it differs from SHARED."""

    says: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    teacher: bool = True


# Runs of minutes: AdamW for all, small batches, a warm-up of a tenth of the steps.
SHARED: dict[str, Any] = {
    "optimizer": "adamw", "lr": 1e-3, "lr_batch": None, "warmup_lr": 0.0, "final_lr": 1e-5, "warmup_share": 0.1,
    "weight_decay": 0.04, "weight_decay_end": 0.04, "batch_size": 32, "clip_grad": 3.0, "color_strength": 0.4,
    "local_crops": 0, "prototypes": 256, "head": "native", "teacher_temperature": 0.05,
}  # fmt: skip
_FEATURES = {"prototype_weight": 0.0, "feature_weight": 1.0, "prototypes": 2}
METHODS = {
    "published": Method(
        "RoB-MSN as published: mlp head, sharp targets, strong colours",
        {"head": "mlp", "teacher_temperature": 0.025, "color_strength": 1.0, "prototypes": 1024},
    ),
    "rob": Method("RoB-MSN with the demo's recipe: native head, soft targets, 256 prototypes"),
    "base": Method("the base method alone: MSN with a moving average", {"ema_momentum": [0.99, 1.0]}, teacher=False),
    "features": Method("control: centred cosine through an MLP, without prototypes", _FEATURES),
    "both": Method("RoB-MSN and the feature term", {"feature_weight": 1.0}),
    "one crop": Method("RoB-MSN, one global crop of twice the images", {"global_crops": 1}),
    "mixup": Method("RoB-MSN, one global crop, mixup", {"global_crops": 1, "mixup": 0.4}),
    "2048": Method("RoB-MSN with 2048 prototypes, one global crop", {"global_crops": 1, "prototypes": 2048}),
    "sharp": Method(
        "RoB-MSN with 2048 prototypes and sharper targets, one global crop",
        {"global_crops": 1, "prototypes": 2048, "teacher_temperature": 0.03},
    ),
    "features, one crop": Method("control with one global crop", {**_FEATURES, "global_crops": 1}),
    "features, mixup": Method("control, one crop, mixup", {**_FEATURES, "global_crops": 1, "mixup": 0.4}),
    "both, one crop": Method("RoB-MSN and the feature term, one crop", {"feature_weight": 1.0, "global_crops": 1}),
}


def main() -> None:
    """Run what is missing, and write the table after every seed."""
    given = arguments()
    split = open_split(demo_images(), None)
    images = open_source(demo_images(), split="train")
    runs: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        for minutes in given.budgets:
            for name in given.methods:
                run = one_run(name, images, split, seed=seed, minutes=minutes, given=given)
                say(f"seed {seed}, {minutes:g} min, {name}: kNN {100 * np.mean(run['knn']):.1f}")
                runs.append(run)
        write_down(runs, split, given)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--student", default="resnet10t")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[2, 5, 15], help="minutes of one core")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--against", choices=METHODS, default="rob", help="method that the differences refer to")
    parser.add_argument("--out", type=Path, default=Path("runs/equal-compute"))
    return parser.parse_args()


def one_run(
    name: str, images: ImageSource, split: Split, *, seed: int, minutes: float, given: argparse.Namespace
) -> dict[str, Any]:
    """Train one student for its budget and judge it; a finished one is read from its folder."""
    folder = given.out / f"{given.teacher}-{given.student}" / f"{name.replace(', ', '-').replace(' ', '-')}"
    folder = folder / f"{minutes:g}min-{seed}"
    path = folder / "result.json"
    if path.is_file():
        return dict(read_json(path))
    method = METHODS[name]
    recipe = recipe_of(method, given, seed)
    teacher, fitted = teacher_of(recipe, images, given) if method.teacher else (None, 0.0)
    step = step_seconds(recipe, images, teacher, folder / "timing", given)
    steps = int((60 * minutes - fitted) / step)
    if steps < 2 * WARM_STEPS:
        raise InputError(f"{minutes:g} minutes are too short for {name}: a step takes {step:.2f} s")
    epochs = -(-steps * recipe.batch_size // len(images))
    chosen = shuffled(images, seed, count=steps * recipe.batch_size // epochs)
    began = time.process_time()
    fit(override(recipe, {"epochs": epochs}), chosen, teacher, folder / "run", given)
    used = fitted + time.process_time() - began
    found = judge(folder / "run", split)
    write_json(path, {"method": name, "seed": seed, "minutes": minutes, "cpu_seconds": used, "steps": steps, **found})
    return dict(read_json(path))


def recipe_of(method: Method, given: argparse.Namespace, seed: int) -> Recipe:
    """RoB-MSN's preset with the settings that all methods share, then the method's own."""
    base = preset("msn", student_kind(given.student), base=not method.teacher)
    sizes = {"crop_size": given.size, "local_crop_size": given.size // 2, "seed": seed}
    own = {key: value for key, value in SHARED.items() if method.teacher or key not in ("head", "teacher_temperature")}
    return override(base, own | sizes | dict(method.keys))


def teacher_of(recipe: Recipe, images: ImageSource, given: argparse.Namespace) -> tuple[Teacher, float]:
    """The teacher, and the CPU seconds that fitting its prototypes took: beyond those of two, which need no time."""
    took = []
    for prototypes in (2, recipe.prototypes):
        began = time.process_time()
        with tempfile.TemporaryDirectory() as cache:  # so that nothing fitted earlier is reused
            (Path(cache) / "teachers").symlink_to(cache_folder() / "teachers")
            teacher = load_teacher(
                given.teacher,
                source=images,
                prototypes=prototypes,
                objective="msn",
                image_size=given.size,
                cache=Path(cache),
            )
        took.append(time.process_time() - began)
    return teacher, max(0.0, took[1] - took[0]) if recipe.prototypes > 2 else 0.0


def step_seconds(
    recipe: Recipe, images: ImageSource, teacher: Teacher | None, out: Path, given: argparse.Namespace
) -> float:
    """CPU seconds of a step, of the later ones of a short run."""
    moments: list[float] = []
    few = shuffled(images, recipe.seed, count=(WARM_STEPS + TIMED_STEPS) * recipe.batch_size)
    fit(
        override(recipe, {"epochs": 1}),
        few,
        teacher,
        out,
        given,
        progress=lambda *_: moments.append(time.process_time()),
    )
    return (moments[-1] - moments[WARM_STEPS - 1]) / TIMED_STEPS


def shuffled(images: ImageSource, seed: int, *, count: int) -> ImageSource:
    """The first `count` images of an order that depends on the seed alone."""
    order = np.random.default_rng(seed).permutation(len(images))
    return Chosen(images, [int(index) for index in order[:count]])


def fit(
    recipe: Recipe,
    images: ImageSource,
    teacher: Teacher | None,
    out: Path,
    given: argparse.Namespace,
    **callbacks: Any,
) -> None:
    """One run of ``robx distill`` on one core, without workers so that all of its CPU time is counted."""
    options = Options(device="cpu", workers=0, measure=False, fresh=True, checkpoint_minutes=1e6, monitor_every=10**9)
    spec = RunSpec(recipe=recipe, students=[given.student], source=images, out=out, teacher=teacher, options=options)
    train(spec, **callbacks)


def judge(folder: Path, split: Split) -> dict[str, Any]:
    """Whether each test image is answered rightly by kNN (k = 20), and the linear head's top-1 in %."""
    with open_session(folder, SessionSettings(threads=torch.get_num_threads())) as session:
        bank = extract(session, split.bank)
        test = split.aligned(extract(session, split.test))
    known = bank.labels >= 0
    similarities, indices = nearest(bank.features[known], test.features, 20)
    answers = knn_vote(similarities, bank.labels[known][indices])[:, 0]
    linear = linear_cached(bank, test, classes=split.classes)["top1"].value
    return {"knn": (answers == test.labels).astype(int).tolist(), "linear": linear}


def difference(ours: np.ndarray, theirs: np.ndarray) -> Value:
    """Mean difference in points of (seeds, images) hits, with a 95 % bootstrap interval over seeds and images."""
    points = 100 * (ours - theirs)
    rng = np.random.default_rng(0)
    seeds, count = points.shape
    means = [
        points[rng.integers(seeds, size=seeds)][:, rng.integers(count, size=count)].mean() for _ in range(BOOTSTRAP)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return Value(value=float(points.mean()), low=float(low), high=float(high), n=points.size, unit="%")


def write_down(runs: list[dict[str, Any]], split: Split, given: argparse.Namespace) -> None:
    """The table of all runs so far."""
    rows = []
    for minutes in given.budgets:
        of = {n: [r for r in runs if (r["method"], r["minutes"]) == (n, minutes)] for n in given.methods}
        hits = {name: np.array([run["knn"] for run in found]) for name, found in of.items()}
        for name, found in of.items():
            against = hits.get(given.against)
            compared = name != given.against and against is not None
            means = {key: np.mean([run[key] for run in found]) for key in ("linear", "cpu_seconds", "steps")}
            rows.append(
                [
                    f"{minutes:g} min",
                    name,
                    f"{100 * hits[name].mean():.1f}",
                    f"{means['linear']:.1f}",
                    shown(difference(hits[name], against), 1) if compared else "",
                    f"{means['cpu_seconds']:.0f}",
                    f"{means['steps']:.0f}",
                    METHODS[name].says,
                ]
            )
    data = [{**run, "knn": float(np.mean(run["knn"]))} for run in runs]
    publish(
        f"equal-compute-{given.teacher}-{given.student}",
        title=f"{given.teacher} -> {given.student}: top-1 in % at equal CPU time",
        headings=["budget", "method", "kNN", "linear", f"kNN - {given.against}", "CPU s", "steps", "what it is"],
        rows=rows,
        data=data,
        notes=[
            f"{len({run['seed'] for run in runs})} seed(s); kNN (k = 20) and a linear head on {len(split.test)} test "
            "images; differences are paired, with 95 % bootstrap intervals over seeds and images.",
            "CPU s: of training and of fitting prototypes. Methods were run one after another on one core each.",
            CLIP_ART,
        ],
        settings={key: str(value) for key, value in vars(given).items() if key != "out"},
    )


if __name__ == "__main__":
    main()
