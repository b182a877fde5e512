"""`robx distill`, `robx teachers` and `robx students`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robx.console import print_line, print_table, progress_bar, say
from robx.distill.presets import ROB
from robx.errors import InputError

if TYPE_CHECKING:
    from robx.distill.recipes import Recipe
    from robx.distill.training.dry_run import RunCost
    from robx.distill.training.networks import Initial

_OBJECTIVES = click.Choice(list(ROB))
_POSITIVE = click.FloatRange(0, min_open=True)
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
@click.option("--lr", type=_POSITIVE, help="Peak rate at this batch size, as it is.")
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
@click.option(
    "--probe-every",
    type=click.IntRange(0),
    default=0,
    metavar="EPOCHS",
    help="A kNN score on labelled images, every so often.",
)
@click.option("--checkpoint-minutes", type=_POSITIVE, default=10.0, show_default=True, help="Time between checkpoints.")
@click.option(
    "--checkpoint-steps", type=click.IntRange(0), default=0, help="Steps between checkpoints, beside the time."
)
@click.option("--store-targets", "store", type=_FOLDER, help="Write the teacher's targets there, for later runs.")
@click.option(
    "--store-k", type=click.IntRange(1), default=256, show_default=True, help="Prototypes kept of each stored target."
)
@click.option("--targets", type=_FOLDER, help="Stored targets in the teacher's place.")
@click.option("--cache", type=_FOLDER, help="Downloads and fitted prototypes; default $ROBX_CACHE or ~/.cache/robx.")
@click.option(
    "--corrupt-budget",
    type=click.FloatRange(0, 1),
    default=0.001,
    show_default=True,
    help="Share of images that may fail.",
)
@click.option("--tensorboard", is_flag=True, help="Write RUN/tensorboard beside metrics.jsonl.")
@click.option(
    "--log-every", type=click.IntRange(1), default=10, show_default=True, help="Steps between lines of metrics.jsonl."
)
@click.option("--dry-run", "dry", is_flag=True, help="Check the settings, say what the run will cost, write nothing.")
@click.option("--gpu-memory", type=_POSITIVE, metavar="GB", help="With --dry-run: the batch that such a GPU takes.")
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
    from robx.distill.resolve import default_workers, resolve_recipe
    from robx.images.sources import open_source

    students = _required(students, "--student NAME")
    source = open_source(_required(data, "--data DIR"))
    base = teacher == "ema"
    if base and (teacher_weights or targets):
        raise InputError("--teacher ema is the base method: it goes with neither --teacher-weights nor --targets")
    if (teacher is None) == (targets is None):
        raise InputError("give one of --teacher NAME (see robx teachers; ema is the base method) and --targets DIR")
    recipe = resolve_recipe(
        student=students[0], teacher=teacher, targets=targets, objective=objective, file=recipe_file, options=settings
    )
    workers = default_workers() if workers is None else workers

    from robx.distill.teachers.load import load_teacher
    from robx.distill.train import train
    from robx.distill.training.processes import join_processes
    from robx.distill.training.run import Options

    if dry:
        from robx.distill.training.run import check_settings, refuse_changes, settings_of

        initial = check_settings(recipe, students, init)
        if out is not None and resume and not force:
            here = settings_of(recipe, students, source, initial, stored=targets is not None)
            refuse_changes(out, here, unknown="teacher")  # its weights are not read
        _warn_of_kinds(students, recipe)
        _dry_run(
            recipe, students, source, teacher, teacher_weights, targets, initial, device, workers, gpu_memory, as_json
        )
        return
    run: Path = _required(out, "--out DIR")
    with join_processes(device) as processes, progress_bar(quiet=not processes.first) as progress:
        if processes.first:
            _warn_of_kinds(students, recipe)
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
                workers=workers,
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
    from robx.distill.teachers.zoo import teacher_rows

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
    from robx.distill.teachers.zoo import student_rows

    rows = student_rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    shown = [
        (row["name"], f"{row['params'] / 1e6:.1f} M", str(row["width"]), "ViT" if row["vit"] else "CNN") for row in rows
    ]
    print_table(("student", "params", "width", "kind"), shown, right=(1, 2))


def _warn_of_kinds(students: Sequence[str], recipe: Recipe) -> None:
    """Say so when students that take different recipes train by one."""
    from robx.distill.training.networks import student_kind

    first, *others = students
    kind = student_kind(first) if others else None
    other = next((name for name in others if student_kind(name) != kind), None)
    if other is not None:
        say(
            f"{other} takes another recipe than {first} and trains by its: {recipe.optimizer}, lr {recipe.lr:g}, "
            f"weight decay {recipe.weight_decay:g}; give them runs of their own, or --recipe FILE for both"
        )


def _dry_run(
    recipe: Recipe,
    students: tuple[str, ...],
    source: Any,
    teacher: str | None,
    weights: Path | None,
    targets: Path | None,
    init: Initial | None,
    device: str | None,
    workers: int,
    gpu_memory: float | None,
    as_json: bool,
) -> None:
    from robx.distill.targets.build import open_targets
    from robx.distill.teachers.load import build_teacher_skeleton
    from robx.distill.training.dry_run import dry_run
    from robx.distill.training.processes import pick_device
    from robx.records import to_json

    skeleton = None
    if teacher is not None and teacher != "ema":
        if weights is not None and not weights.is_file():
            raise InputError(f"{weights} does not exist: give the teacher's file with --teacher-weights")
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
        init=init,
        device=pick_device(device),
        workers=workers,
        gpu_memory=gpu_memory,
    )
    if as_json:
        both = {"recipe": to_json(recipe), "cost": to_json(cost) | {"batch_bytes": cost.batch_bytes}}
        click.echo(json.dumps(both, indent=2))
    else:
        _show_cost(recipe, cost)


def _show_cost(recipe: Recipe, cost: RunCost) -> None:
    networks = [("teacher", cost.teacher)] if cost.teacher else []
    networks += [("student", student) for student in cost.students]
    rows = [
        (f"{role} {network.name}", f"{network.params / 1e6:.1f} M", f"{network.flops_per_image / 1e9:.2f}")
        for role, network in networks
    ]
    print_table(("network", "params", "GFLOPs an image"), rows, right=(1, 2))
    click.echo("\n".join(cost.lines(recipe.batch_size)))


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


def _required(value: Any, option: str) -> Any:
    if not value:
        raise InputError(f"{option} is missing: see robx distill --help")
    return value
