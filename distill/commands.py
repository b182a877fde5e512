"""`robx distill`, `robx teachers` and `robx students`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robx.console import print_line, print_table, progress_bar, say
from robx.errors import InputError

if TYPE_CHECKING:
    from robx.distill.dryrun import RunCost
    from robx.distill.recipes import Recipe

_OBJECTIVES = click.Choice(["dino", "ibot", "msn", "swav", "kd"])
_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--teacher", metavar="NAME", help="A name of `robx teachers`, timm:NAME, or ema for the base method.")
@click.option("--teacher-weights", type=_FILE, help="The teacher's full checkpoint, instead of downloading it.")
@click.option("--student", "students", metavar="NAME", multiple=True, help="Any timm model; several share one teacher.")
@click.option("--data", type=click.Path(path_type=Path), help="Images: a folder, tar shards, IDX or CIFAR arrays.")
@click.option("--out", type=_FOLDER, help="The run's folder; a run that is there is resumed.")
@click.option("--objective", type=_OBJECTIVES, help="Default: the one that the teacher was pretrained with, else msn.")
@click.option("--init", type=_FOLDER, help="A run whose student to start from, instead of random weights.")
@click.option("--recipe", "recipe_file", type=_FILE, help="TOML file with any of the recipe's keys.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the images.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, of all processes and micro-batches.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak rate at this batch size, as it is.")
@click.option("--crop-size", type=click.IntRange(16), help="Pixels of the two global crops.")
@click.option("--local-crop-size", type=click.IntRange(16), help="Pixels of the local crops.")
@click.option("--local-crops", type=click.IntRange(0), help="How many local crops an image.")
@click.option("--prototypes", type=click.IntRange(2), help="K, for a teacher without prototypes and for base methods.")
@click.option("--seed", type=click.IntRange(0), help="Of everything random.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the forward passes (autocast).")
@click.option("--accumulate", type=click.IntRange(1), help="Micro-batches a step.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU when there is one.")
@click.option("--workers", type=click.IntRange(0), help="Processes that cut crops; default: from the processors.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile teacher and student.")
@click.option("--resume/--fresh", default=True, help="Go on with the run in --out (default), or start over.")
@click.option("--force", is_flag=True, help="Resume although settings changed.")
@click.option("--probe-every", default=0, metavar="EPOCHS", help="A kNN score on labelled images, every so often.")
@click.option("--checkpoint-minutes", default=10.0, show_default=True, help="Time between checkpoints.")
@click.option("--checkpoint-steps", default=0, help="Steps between checkpoints, beside the time.")
@click.option("--store-targets", "store", type=_FOLDER, help="Write the teacher's targets there, for later runs.")
@click.option("--store-k", default=256, show_default=True, help="Most probable prototypes of each stored target.")
@click.option("--targets", type=_FOLDER, help="Stored targets in the teacher's place.")
@click.option("--cache", type=_FOLDER, help="Downloads and fitted prototypes; default $ROBX_CACHE or ~/.cache/robx.")
@click.option("--corrupt-budget", default=0.001, show_default=True, help="Share of images that may fail to decode.")
@click.option("--tensorboard", is_flag=True, help="Write RUN/tensorboard beside metrics.jsonl.")
@click.option("--log-every", default=10, show_default=True, help="Steps between lines of metrics.jsonl.")
@click.option("--dry-run", "dry", is_flag=True, help="Check the settings, say what the run will cost, write nothing.")
@click.option("--gpu-memory", type=float, metavar="GB", help="With --dry-run: the batch that such a GPU takes.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def distill(
    teacher: str | None,
    teacher_weights: Path | None,
    students: tuple[str, ...],
    data: Path | None,
    out: Path | None,
    objective: str | None,
    init: Path | None,
    recipe_file: Path | None,
    device: str | None,
    workers: int | None,
    compiled: bool,
    resume: bool,
    force: bool,
    probe_every: int,
    checkpoint_minutes: float,
    checkpoint_steps: int,
    store: Path | None,
    store_k: int,
    targets: Path | None,
    cache: Path | None,
    corrupt_budget: float,
    tensorboard: bool,
    log_every: int,
    dry: bool,
    gpu_memory: float | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Teach a small student what a large self-supervised teacher sees, without labels.

    RoB keeps the loss of the method that pretrained the teacher and replaces the branch that makes its targets by the
    teacher itself, with its own head and prototypes. The student's folder holds its trunk, ready for eval and export.

    \b
    robx distill --teacher dino_vits16 --student resnet18 --data images/ --out runs/r18
    robx distill --teacher msn_vitl --teacher-weights vitl16_600ep.pth.tar \\
        --student mobilenetv3_large_100 --data /imagenet/train --out runs/mnv3
    robx distill --teacher timm:tf_efficientnet_lite2 --student resnet18 --data images/ --out runs/r18
    robx distill --teacher ema --objective dino --student resnet18 --data images/ --out runs/baseline
    robx distill --teacher timm:resnet50 --objective kd --student resnet18 --data images/ --out runs/kd

    \b
    Before a long run      robx distill ... --dry-run --gpu-memory 24
    Several GPUs           torchrun --nproc-per-node 8 -m robx.cli distill ...
    Several students       robx distill ... --student resnet18 --student mobilenetv3_large_100
    Once the teacher       robx distill ... --store-targets targets/
    and never again        robx distill ... --targets targets/ --student efficientnet_b0
    On from another run    robx distill ... --init runs/earlier
    Stopped or killed      the same command goes on, bit for bit on a CPU

    Every other setting is a key of --recipe FILE, a TOML file; the resolved recipe is written to RUN/recipe.json,
    metrics to RUN/metrics.jsonl. SIGTERM, SIGUSR1 and Ctrl-C end the run after its step, with a checkpoint and exit
    status 75; a second Ctrl-C ends it at once.
    """
    from robx.sources import open_source

    students = _required(students, "--student NAME")
    source = open_source(_required(data, "--data DIR"))
    base = teacher == "ema"
    if base and (teacher_weights or targets):
        raise InputError("--teacher ema is the base method: it goes with neither --teacher-weights nor --targets")
    if (teacher is None) == (targets is None):
        raise InputError("give one of --teacher NAME (see robx teachers; ema is the base method) and --targets DIR")
    recipe = _resolve(objective, settings, recipe_file, teacher=teacher, targets=targets, student=students[0])

    from robx.distill.processes import join_processes
    from robx.distill.run import Options
    from robx.distill.teachers import load_teacher
    from robx.distill.train import train

    if dry:
        cost = _dry_run(recipe, students, source, teacher, teacher_weights, targets, device, workers, gpu_memory)
        click.echo(json.dumps(cost, indent=2)) if as_json else _show_cost(cost)
        return
    run: Path = _required(out, "--out DIR")
    with join_processes(device) as processes, progress_bar(quiet=not processes.first) as progress:
        loaded = None
        if teacher is not None and not base:
            loaded = load_teacher(
                teacher,
                weights=teacher_weights,
                cache=cache,
                source=source,
                prototypes=recipe.prototypes,
                objective=recipe.objective,
                image_size=recipe.crop_size,
                seed=recipe.seed,
                device=processes.device,
                progress=progress,
            )
            if processes.first:
                say(f"teacher {loaded.name}, licence {loaded.info.licence}, prototypes {loaded.info.prototypes}")
        folders = train(
            recipe,
            students=students,
            source=source,
            out=run,
            teacher=loaded,
            targets=targets,
            store=store,
            init=init,
            options=Options(
                device=device,
                workers=_default_workers() if workers is None else workers,
                compile=compiled,
                fresh=not resume,
                force=force,
                probe_every=probe_every,
                checkpoint_minutes=checkpoint_minutes,
                checkpoint_steps=checkpoint_steps,
                corrupt_budget=corrupt_budget,
                log_every=log_every,
                tensorboard=tensorboard,
                stored_k=store_k,
            ),
            progress=progress,
            say=say,
            processes=processes,
        )
        if processes.first:
            _show_result(folders, as_json=as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def teachers(as_json: bool) -> None:
    """List the teachers: method, size, licence, the accuracy that their authors report, and the file to get.

    kNN and linear are ImageNet-1k top-1 in % as published. Besides these, --teacher dino, ibot, msn or swav with
    --teacher-weights reads any full checkpoint of that layout, and timm:NAME takes any trunk of timm's.

    \b
    robx teachers
    robx teachers --json
    """
    from robx.distill.zoo import teacher_rows

    rows = teacher_rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    shown = [
        (
            row["name"],
            row["method"],
            f"{row['params'] / 1e6:.1f} M",
            _figure(row["knn"]),
            _figure(row["linear"]),
            str(row["prototypes"] or "fitted"),
            row["licence"],
            row["file"],
        )
        for row in rows
    ]
    headings = ("teacher", "method", "params", "kNN", "linear", "K", "licence", "file")
    print_table(headings, shown, right=(2, 3, 4, 5))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def students(as_json: bool) -> None:
    """List the students that are tested the whole way; any other timm model may do.

    \b
    robx students
    robx students --json
    """
    from robx.distill.zoo import student_rows

    rows = student_rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    shown = [
        (row["name"], f"{row['params'] / 1e6:.1f} M", str(row["width"]), "ViT" if row["vit"] else "CNN") for row in rows
    ]
    print_table(("student", "params", "width", "kind"), shown, right=(1, 2))


def _resolve(
    objective: str | None,
    settings: dict[str, Any],
    recipe_file: Path | None,
    *,
    teacher: str | None,
    targets: Path | None,
    student: str,
) -> Recipe:
    """The preset of the objective and the student's kind, then the recipe file, then the options."""
    from robx.distill.networks import student_kind
    from robx.distill.recipes import override, preset, read_toml
    from robx.distill.stored import read_info

    values = read_toml(recipe_file) if recipe_file else {}
    base = teacher == "ema" or bool(values.get("base", False))
    if base != (teacher == "ema"):
        raise InputError(f"{recipe_file}: base = true goes with --teacher ema")
    method: Any = objective or values.get("objective")
    if method is None and targets is not None:
        method = read_info(targets).decided_by["objective"]
    recipe: Recipe = preset(method or _default_objective(teacher), student_kind(student), base=base)
    recipe = override(recipe, values | {"objective": recipe.objective}, where=str(recipe_file or "recipe"))
    given = {name: value for name, value in settings.items() if value is not None}
    if "lr" in given:
        given |= {"lr_batch": None, "warmup_lr": 0.0, "final_lr": min(recipe.final_lr, given["lr"])}
    return override(recipe, given, where="options")


def _default_objective(teacher: str | None) -> Any:
    """The method that the teacher was pretrained with; msn for one whose prototypes are fitted; dino for ema."""
    from robx.distill.zoo import find_teacher

    if teacher is None or teacher == "ema":
        return "dino"
    if teacher in ("dino", "ibot", "msn", "swav"):
        return teacher
    method = find_teacher(teacher).method
    return "msn" if method == "headless" else method


def _dry_run(
    recipe: Recipe,
    students: tuple[str, ...],
    source: Any,
    teacher: str | None,
    weights: Path | None,
    targets: Path | None,
    device: str | None,
    workers: int | None,
    gpu_memory: float | None,
) -> dict[str, Any]:
    import torch

    from robx.distill.dryrun import dry_run
    from robx.distill.networks import open_targets
    from robx.distill.teachers import build_teacher_skeleton
    from robx.records import to_json

    skeleton = None
    if teacher is not None and teacher != "ema":
        skeleton = build_teacher_skeleton(
            teacher,
            weights=weights,
            objective=recipe.objective,
            prototypes=recipe.prototypes,
            image_size=recipe.crop_size,
        )
    cost: RunCost = dry_run(
        recipe,
        students=students,
        source=source,
        teacher=skeleton,
        stored=None if targets is None else open_targets(targets, recipe, source),
        device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        workers=_default_workers() if workers is None else workers,
        gpu_memory=gpu_memory,
    )
    return {"recipe": to_json(recipe), "cost": to_json(cost) | {"batch_bytes": cost.batch_bytes}}


def _show_cost(result: dict[str, Any]) -> None:
    cost, recipe = result["cost"], result["recipe"]
    networks = [("teacher", cost["teacher"])] if cost["teacher"] else []
    networks += [("student", student) for student in cost["students"]]
    rows = [
        (f"{role} {network['name']}", f"{network['params'] / 1e6:.1f} M", f"{network['flops_per_image'] / 1e9:.2f}")
        for role, network in networks
    ]
    print_table(("network", "params", "GFLOPs an image"), rows, right=(1, 2))
    per_image = cost["image_bytes"] / 1e6
    lines = [
        f"{cost['images']} images x {cost['epochs']} epochs, batch {recipe['batch_size']}: {cost['steps']} steps",
        f"memory: {cost['fixed_bytes'] / 1e9:.2f} GB fixed + {per_image:.1f} MB an image = "
        f"{cost['batch_bytes'] / 1e9:.2f} GB at a micro-batch of {cost['batch_size']}",
        f"measured on {cost['device']}: bound {cost['bound_images_per_s']:.1f} images/s "
        f"(teacher alone {cost['teacher_images_per_s']:.1f}, students alone {cost['student_images_per_s']:.1f}); "
        f"one loader worker {cost['loader_images_per_s']:.1f} images/s",
        f"at that rate the run takes {cost['hours']:.2f} hours",
    ]
    if cost["gpu_batch"] is not None:
        fits = f"a micro-batch of about {cost['gpu_batch']}" if cost["gpu_batch"] else "no batch at all"
        lines.append(f"a GPU of {cost['gpu_memory_gb']:g} GB takes {fits} (estimated)")
    click.echo("\n".join(lines))


def _figure(value: float | None) -> str:
    return "" if value is None else str(value)


def _show_result(folders: list[Path], *, as_json: bool) -> None:
    from robx.records import load_student, to_json

    for folder in folders:
        student = load_student(folder)
        if as_json:
            click.echo(json.dumps({"folder": str(folder)} | to_json(student)))
        else:
            print_line(f"{folder}: {student.timm_name}, {student.width} wide, {student.images_seen} images seen")


def _default_workers() -> int:
    """Half of the processors, at least one, at most eight: the other half computes."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def _required(value: Any, option: str) -> Any:
    if not value:
        raise InputError(f"{option} is missing: see robx distill --help")
    return value
