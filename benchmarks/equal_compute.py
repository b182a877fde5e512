"""Which way of distilling makes the best small student from the same CPU time?

    OMP_NUM_THREADS=1 python benchmarks/equal_compute.py --budgets 2 --seeds 1       # minutes
    OMP_NUM_THREADS=1 python benchmarks/equal_compute.py                             # hours

Same teacher, images, student, first weights and CPU seconds of one core. What a budget buys is found by timing a few
steps of each method; fitting prototypes counts as part of the budget. The images of a run are the first ones of an
order that depends on the seed alone, and every run ends with its learning rate at the end of its schedule.

The methods are those of equal_compute.toml: recipes of robx, and LightlyTrain, which runs in its own environment (
``--lightly DIR/bin/python``) through its public API. judged.py judges every student. Differences are paired: the same
seeds and the same test images. Every run is kept, the losing ones too; the same command continues. The table's JSON has
the answers to all images that differences are computed from: ``--published`` adds seeds and methods to it, on a machine
without those runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import CLIP_ART, RESULTS, Chosen, demo_images, publish, save_student, say, shown
from judged import NEIGHBOURS, SHOTS, JudgedSet, difference, judge, judged_sets
from torch import nn

from robx.distill.batches.loader import CropDataset, collate
from robx.distill.recipes import Recipe, override, preset
from robx.distill.resolve import student_kind
from robx.distill.teachers.load import load_teacher
from robx.distill.teachers.teacher import Teacher
from robx.distill.train import train
from robx.distill.training.optimizers import build_optimizer, set_rates
from robx.distill.training.run import Options, RunSpec
from robx.distill.training.schedules import learning_rate
from robx.errors import InputError, RobxError
from robx.images.sources import ImageSource, open_source
from robx.store.files import cache_folder, read_json, write_json
from robx.store.toml import read_toml
from robx.trunk import build_trunk, embedding_width

WARM_STEPS, TIMED_STEPS = 3, 10
RESULT = "result.json"
TABLE = Path(__file__).with_suffix(".toml")
# What the table has differences and their intervals of.
COMPARED = ("kNN, clip art", "linear, clip art", "LOO kNN, clip art", "kNN, Fashion-MNIST")


@dataclass(frozen=True)
class Method:
    """One way of distilling."""

    name: str
    says: str
    keys: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, or arguments of LightlyTrain
    tool: str = "robx"  # or "lightly", or "loop": the regression below
    teacher: bool = True  # False: the base method
    screened: bool = False  # tried at one budget only; not part of the default comparison


def methods() -> dict[str, Method]:
    """The methods of equal_compute.toml; each has the keys of [shared], then its own."""
    table = read_toml(TABLE, what="the methods")
    own: dict[str, dict[str, Any]] = {}
    found = {}
    for name, values in table["method"].items():
        keys = {} if values.get("tool") == "lightly" else dict(table["shared"])
        own[name] = {key: value for other in values.pop("like", ()) for key, value in own[other].items()}
        own[name] |= values.pop("keys", {})
        found[name] = Method(name=name, keys=keys | own[name], **values)
    return found


def main() -> None:
    """Run what is missing, and write the table after every seed."""
    known = methods()
    given = arguments(known)
    sets = judged_sets()
    images = open_source(demo_images(), split="train")
    runs: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        for minutes in given.budgets:
            for name in given.methods:
                if given.finished and finished(name, seed, minutes, given) is None:
                    continue
                run = one_run(known[name], images, sets, seed=seed, minutes=minutes, given=given)
                figures = ", ".join(f"{what} {value:.1f}" for what, value in run["top1"].items())
                say(f"seed {seed}, {minutes:g} min, {name}: {figures}")
                runs.append(run)
        write_down(runs, known, given)


def arguments(known: Mapping[str, Method]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name, method in known.items() if not method.screened]
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--student", default="resnet10t")
    parser.add_argument("--methods", nargs="+", choices=known, default=default, metavar="NAME")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2, 5, 15], help="minutes of one core")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--against", choices=known, default="quick", metavar="NAME", help="what differences refer to")
    parser.add_argument("--lightly", type=Path, help="python of an environment with lightly-train and timm")
    parser.add_argument("--dino", type=Path, metavar="FILE", help="the teacher with a DINO head, from chain.py")
    parser.add_argument("--finished", action="store_true", help="train nothing: the table of the finished runs")
    parser.add_argument("--published", action="store_true", help="count the runs of the published table as finished")
    parser.add_argument("--out", type=Path, default=Path("runs/equal-compute"))
    parser.add_argument("--name", help="name of the result; default: equal-compute-TEACHER-STUDENT")
    given = parser.parse_args()
    given.name = given.name or f"equal-compute-{given.teacher}-{given.student}"
    try:
        given.earlier = published_runs(RESULTS / f"{given.name}.json") if given.published else {}
    except RobxError as error:
        parser.exit(2, f"{parser.prog}: error: --published: {error}\n")
    return given


def folder_of(name: str, seed: int, minutes: float, given: argparse.Namespace) -> Path:
    """The folder of one run."""
    return Path(given.out / f"{given.teacher}-{given.student}" / name.replace(" ", "-") / f"{minutes:g}min-{seed}")


def one_run(
    method: Method,
    images: ImageSource,
    sets: Sequence[JudgedSet],
    *,
    seed: int,
    minutes: float,
    given: argparse.Namespace,
) -> dict[str, Any]:
    """Train one student for its budget and judge it, unless that is done."""
    if (done := finished(method.name, seed, minutes, given)) is not None:
        return done
    folder = folder_of(method.name, seed, minutes, given)
    run = {"robx": run_robx, "lightly": run_lightly, "loop": run_loop}[method.tool]
    spent = run(method, images, folder, seed=seed, seconds=60 * minutes, given=given)
    facts = {"method": method.name, "seed": seed, "minutes": minutes, **spent}
    write_json(folder / RESULT, {**facts, "hits": judge(folder / "run", sets)})
    return read_run(folder / RESULT)


def finished(name: str, seed: int, minutes: float, given: argparse.Namespace) -> dict[str, Any] | None:
    """A finished run, of its folder or the published table, with its hits and top-1 in %; None if there is none."""
    path = folder_of(name, seed, minutes, given) / RESULT
    earlier: dict[str, Any] | None = given.earlier.get((name, seed, minutes))
    return read_run(path) if path.is_file() else earlier


def read_run(path: Path) -> dict[str, Any]:
    """A run that `one_run` wrote, and its top-1 in %."""
    run = dict(read_json(path))
    return run | {"top1": {what: 100 * float(np.mean(hits)) for what, hits in run["hits"].items()}}


def published_runs(path: Path) -> dict[tuple[str, int, float], dict[str, Any]]:
    """The runs of a table that `write_down` wrote, as `finished` gives them, by method, seed and minutes.

    Raises:
        InputError: the table is older than the answers in it, or is not one of equal compute.
        ArtifactError: the file is missing or damaged.
    """
    table, runs = read_json(path), {}
    rows = table.get("rows") if isinstance(table, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "hits" in row for row in rows):
        raise InputError(f"{path} lacks the answers (hits) of its runs: leave out --published to run all of them again")
    for row in rows:
        hits = {what: unpacked(text) for what, text in row["hits"].items()}
        runs[row["method"], row["seed"], row["minutes"]] = row | {"hits": hits}
    return runs


def packed(hits: Sequence[float]) -> str:
    """Right and wrong answers as their number and hexadecimal digits."""
    return f"{len(hits)} {np.packbits(np.array(hits, dtype=bool)).tobytes().hex()}"


def unpacked(text: str) -> list[float]:
    """The answers of `packed`."""
    count, digits = text.split()
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=int(count))
    return [float(bit) for bit in bits]


# ----------------------------------------------------------------------------------------------------------------- robx


def run_robx(
    method: Method, images: ImageSource, folder: Path, *, seed: int, seconds: float, given: argparse.Namespace
) -> dict[str, Any]:
    """One run of ``robx distill`` within `seconds` of CPU time; what it spent."""
    recipe = recipe_of(method, given, seed)
    teacher, fitted = teacher_of(recipe, images, given) if method.teacher else (None, 0.0)
    step = step_seconds(recipe, images, teacher, folder / "timing", given)
    steps = int((seconds - fitted) / step)
    if steps < 2 * WARM_STEPS:
        raise InputError(f"{seconds:g} seconds are too short for {method.name}: a step takes {step:.2f} s")
    epochs, chosen = share(images, seed, steps * recipe.batch_size)
    began = time.process_time()
    fit(override(recipe, {"epochs": epochs}), chosen, teacher, folder / "run", given)
    spent = fitted + time.process_time() - began
    return {"cpu_seconds": round(spent, 1), "images": steps * recipe.batch_size, "fitting_seconds": round(fitted, 1)}


def recipe_of(method: Method, given: argparse.Namespace, seed: int) -> Recipe:
    """RoB-MSN's preset, or that of the method's own objective, with the method's keys."""
    keys = dict(method.keys)
    base = preset(keys.pop("objective", "msn"), student_kind(given.student), base=not method.teacher)
    sizes = {"crop_size": given.size, "local_crop_size": given.size // 2, "seed": seed}
    return override(base, sizes | keys)


def teacher_of(recipe: Recipe, images: ImageSource, given: argparse.Namespace) -> tuple[Teacher, float]:
    """The teacher, and the CPU seconds that fitting its prototypes takes: measured once, in an empty cache."""

    def load(prototypes: int, cache: Path | None) -> tuple[Teacher, float]:
        began = time.process_time()
        teacher = load_teacher(
            given.teacher,
            source=images,
            prototypes=prototypes,
            fit_images=recipe.fit_images if prototypes > 2 else None,
            objective=recipe.objective,
            image_size=recipe.teacher_shape,
            cache=cache,
        )
        return teacher, time.process_time() - began

    if recipe.objective == "dino":
        head = {"weights": given.dino, "objective": "dino", "image_size": recipe.teacher_shape}
        return load_teacher("dino", **head), 0.0
    if not recipe.prototype_weight or recipe.objective == "kd":  # nothing reads the prototypes: any two will do
        return load(2, None)[0], 0.0
    what = f"fitting-{recipe.prototypes}-{recipe.fit_images or 'all'}-{recipe.teacher_shape[0]}.json"
    path = given.out / f"{given.teacher}-{given.student}" / what
    if not path.is_file():
        with tempfile.TemporaryDirectory() as cache:
            (Path(cache) / "teachers").symlink_to(cache_folder() / "teachers")
            load(2, None)  # imports
            write_json(path, load(recipe.prototypes, Path(cache))[1] - load(2, None)[1])
    return load(recipe.prototypes, None)[0], float(read_json(path))


def step_seconds(
    recipe: Recipe, images: ImageSource, teacher: Teacher | None, out: Path, given: argparse.Namespace
) -> float:
    """CPU seconds of a step, of the later ones of a short run."""
    moments: list[float] = []
    few = share(images, recipe.seed, (WARM_STEPS + TIMED_STEPS) * recipe.batch_size)[1]

    def tick(*_: object) -> None:
        moments.append(time.process_time())

    fit(override(recipe, {"epochs": 1}), few, teacher, out, given, progress=tick)
    return (moments[-1] - moments[WARM_STEPS - 1]) / TIMED_STEPS


def fit(
    recipe: Recipe, images: ImageSource, teacher: Teacher | None, out: Path, given: argparse.Namespace, **callbacks: Any
) -> None:
    """One run of ``robx distill`` on one core, without workers so that all of its CPU time is counted."""
    options = Options(device="cpu", workers=0, measure=False, fresh=True, checkpoint_minutes=1e6, monitor_every=50)
    spec = RunSpec(recipe=recipe, students=[given.student], source=images, out=out, teacher=teacher, options=options)
    train(spec, **callbacks)


def share(images: ImageSource, seed: int, count: int) -> tuple[int, ImageSource]:
    """Epochs, and the images of each, that make about `count`: the first of an order that depends on the seed alone."""
    epochs = -(-count // len(images))
    order = np.random.default_rng(seed).permutation(len(images))
    return epochs, Chosen(images, order[: count // epochs].tolist())


# --------------------------------------------------------------------------------------------------------- twenty lines


def run_loop(
    method: Method, images: ImageSource, folder: Path, *, seed: int, seconds: float, given: argparse.Namespace
) -> dict[str, Any]:
    """The regression that anybody would write first, with robx's crops and optimiser; what it spent."""
    recipe = recipe_of(method, given, seed)
    teacher, _ = teacher_of(recipe, images, given)
    timed = share(images, seed, (WARM_STEPS + TIMED_STEPS) * recipe.batch_size)[1]
    step = regress(override(recipe, {"epochs": 1}), timed, teacher, given)[1]
    count = int(seconds / step) * recipe.batch_size
    epochs, chosen = share(images, seed, count)
    began = time.process_time()
    trunk, _ = regress(override(recipe, {"epochs": epochs}), chosen, teacher, given)
    spent = time.process_time() - began
    save_student(trunk, given.student, folder / "run", given.size)
    return {"cpu_seconds": round(spent, 1), "images": count, "fitting_seconds": 0.0}


def regress(
    recipe: Recipe, images: ImageSource, teacher: Teacher, given: argparse.Namespace
) -> tuple[nn.Module, float]:
    """Match the features by the cosine through a linear map; the trunk, and the CPU seconds of a late step."""
    torch.manual_seed(seed := recipe.seed)
    trunk = build_trunk(given.student).to(memory_format=torch.channels_last)
    net = nn.Sequential(trunk, nn.Linear(embedding_width(trunk), teacher.width))
    teacher.enlarge_to(recipe.teacher_shape)
    optimizer, crops = build_optimizer(net, recipe), CropDataset(images, recipe)
    batch, moments = recipe.batch_size, [time.process_time()]
    steps = recipe.epochs * (len(images) // batch)
    for epoch in range(recipe.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(images))
        for rows in order[: len(images) // batch * batch].reshape(-1, batch).tolist():
            pixels = collate([crops[epoch, row] for row in rows]).views(torch.device("cpu")).globals[0]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                features = teacher.features(pixels)
                loss = 1 - F.cosine_similarity(net(pixels).float(), features).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_grad or 1e9)
            rate = learning_rate(len(moments) - 1, steps=steps, recipe=recipe)
            set_rates(optimizer, lr=rate, weight_decay=recipe.weight_decay)
            optimizer.step()
            optimizer.zero_grad()
            moments.append(time.process_time())
    return trunk, (moments[-1] - moments[WARM_STEPS]) / max(1, steps - WARM_STEPS)


# --------------------------------------------------------------------------------------------------------- LightlyTrain


def run_lightly(
    method: Method, images: ImageSource, folder: Path, *, seed: int, seconds: float, given: argparse.Namespace
) -> dict[str, Any]:
    """One run of LightlyTrain in its own environment, as its user would start it; what it spent."""
    if given.lightly is None:
        raise InputError(f"{method.name} needs --lightly PYTHON: an environment with lightly-train and timm")
    batch = int(method.keys["batch_size"])
    pictures = given.out / f"{given.teacher}-{given.student}" / "pictures"
    write_pictures(images, pictures)
    work = folder / "lightly"
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(build_trunk(given.student).state_dict(), work / "first.pt")  # the weights that robx starts from
    teacher = load_teacher(given.teacher, objective="kd", image_size=given.size)
    torch.save(
        {"weights": teacher.trunk.state_dict(), "scale": teacher.scale, "shift": teacher.shift}, work / "teacher.pt"
    )
    order = np.random.default_rng(seed).permutation(len(images))

    def start(epochs: int, count: int) -> dict[str, Any]:
        job = {
            "out": str(work / "out"), "first": str(work / "first.pt"), "teacher": str(work / "teacher.pt"),
            "student": given.student, "trunk": teacher.trunk.pretrained_cfg["architecture"],  # type: ignore[index]
            "width": teacher.width, "size": given.size, "epochs": epochs, "seed": seed, "arguments": dict(method.keys),
            "files": [str(pictures / f"{index:05d}.png") for index in order[:count]],
            "weights": str(work / "last.pt"),
        }  # fmt: skip
        write_json(work / "job.json", job)
        command = [str(given.lightly), str(Path(__file__).with_name("lightly_runner.py")), str(work / "job.json")]
        with (work / "log.txt").open("a") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True)
        return dict(json.loads((work / "spent.json").read_text()))

    timed = start(1, 12 * batch)
    steps = int((seconds - timed["outside"]) / timed["step"])
    epochs = -(-steps * batch // len(images))
    spent = start(epochs, steps // epochs * batch)
    trunk = build_trunk(given.student)
    trunk.load_state_dict(torch.load(work / "last.pt", weights_only=True))
    save_student(trunk, given.student, folder / "run", given.size)
    return {"cpu_seconds": round(spent["total"], 1), "images": steps * batch, "fitting_seconds": 0.0}


def write_pictures(images: ImageSource, folder: Path) -> None:
    """The images as files, which LightlyTrain reads."""
    if (folder / f"{len(images) - 1:05d}.png").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(images)):
        images.read(index).save(folder / f"{index:05d}.png", compress_level=1)


# ------------------------------------------------------------------------------------------------------------ the table


def write_down(runs: Sequence[Mapping[str, Any]], known: Mapping[str, Method], given: argparse.Namespace) -> None:
    """The table of all runs so far."""
    judged = list(runs[0]["top1"])
    rows = []
    for minutes in given.budgets:
        found = {n: {r["seed"]: r for r in runs if (r["method"], r["minutes"]) == (n, minutes)} for n in given.methods}
        against = found.get(given.against, {})
        for name, of in found.items():
            if not of:
                continue
            compared = [""] * len(COMPARED)
            if name != given.against and (seeds := sorted(set(of) & set(against))):
                pairs = [
                    [np.array([side[seed]["hits"][what] for seed in seeds]) for side in (of, against)]
                    for what in COMPARED
                ]
                compared = [shown(difference(*pair), 1) for pair in pairs]
            figures = [f"{np.mean([run['top1'][what] for run in of.values()]):.1f}" for what in judged]
            spent = [f"{np.mean([run[key] for run in of.values()]):,.0f}" for key in ("cpu_seconds", "images")]
            rows.append([f"{minutes:g} min", name, str(len(of)), *figures, *compared, *spent, known[name].says])
    earlier = sum(run is given.earlier.get((run["method"], run["seed"], run["minutes"])) for run in runs)
    publish(
        given.name,
        title=f"{given.teacher} -> {given.student}: top-1 in % at equal CPU time",
        headings=[
            "budget", "method", "seeds", *judged,
            *(f"{what} - {given.against}" for what in COMPARED), "CPU s", "images", "what it is",
        ],
        rows=rows,
        data=[dict(run, hits={what: packed(run["hits"][what]) for what in COMPARED}) for run in runs],
        notes=[
            f"kNN (k = {NEIGHBOURS}), a linear head and {SHOTS}-shot "
            "regression on features extracted once; LOO kNN is leave-one-out over the labelled images of both parts. "
            "Of Fashion-MNIST 1,000 training and 1,000 test images. Differences "
            "are paired by seed and image, with 95 % bootstrap intervals over both. With one seed the "
            "interval covers the test images alone.",
            "quick was chosen by trials of two minutes with seed 7 of ResNet-10t and MobileNetV3-small, and its rate "
            "for a ViT with seed 0, judged on the same clip art (equal-compute-screening.md).",
            "CPU s: of training and of fitting prototypes. Methods were run one after another on one core.",
            CLIP_ART,
            *([f"{earlier} of the runs are those of an earlier version of this table."] if earlier else []),
        ],
        settings={k: str(v) for k, v in vars(given).items() if k not in ("out", "lightly", "name", "earlier")},
    )  # fmt: skip


if __name__ == "__main__":
    main()
