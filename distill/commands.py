"""`robx distill`, `robx teachers` and `robx students`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robx.console import hints, print_line, print_table, progress_bar, quiet_option, say
from robx.distill.presets import NAMED, ROB
from robx.errors import InputError, did_you_mean
from robx.options import Command, Number, PathType, WholeNumber

if TYPE_CHECKING:
    from robx.distill.recipes import Recipe
    from robx.distill.training.dry_run import RunCost

_OBJECTIVES = click.Choice(list(ROB))
_POSITIVE = Number(0, min_open=True)
_FILE = PathType(dir_okay=False)
_FOLDER = PathType(file_okay=False)


@click.command(cls=Command, repeated={"--recipe": 'give one file, which may begin with like = "quick"'})
@click.option("--teacher", metavar="NAME", help="A name from `robx teachers`, timm:NAME, or ema for the base method.")
@click.option("--teacher-weights", type=_FILE, help="The teacher's full checkpoint, instead of downloading it.")
@click.option(
    "--teacher-mean", type=Number(0, 1), nargs=3, metavar="R G B", help="Pixel mean (0 to 1) of its training."
)
@click.option(
    "--teacher-std",
    type=Number(0, min_open=True),
    nargs=3,
    metavar="R G B",
    help="Pixel standard deviation of its training.",
)
@click.option("--student", metavar="NAME", multiple=True, help="Any timm model; several students share one teacher.")
@click.option("--data", type=PathType(), help="Images: a folder, tar shards, IDX or CIFAR arrays.")
@click.option("--image-member", metavar="NAME", help="Image of a tar sample that has several, such as rgb.jpg.")
@click.option("--out", type=_FOLDER, help="Output folder; an unfinished run in it is resumed.")
@click.option("--objective", type=_OBJECTIVES, help="Default: the method that pretrained the teacher, else msn.")
@click.option("--init", metavar="RUN|FILE|pretrained", help="Initial weights of the student's trunk. Default: random.")
@click.option("--recipe", type=_FILE, metavar="quick|paper|FILE",
              help="quick: for minutes on a CPU. paper: as published (default). Or a TOML file.")  # fmt: skip
@click.option("--epochs", type=WholeNumber(1), help="Passes over the images.")
@click.option("--batch-size", type=WholeNumber(1), help="Images per step, over all processes and micro-batches.")
@click.option("--lr", type=_POSITIVE, help="Peak learning rate, not scaled by the batch size.")
@click.option("--crop-size", metavar="SIZE", help="Size of the two global crops, in pixels: 224, or HEIGHTxWIDTH.")
@click.option("--local-crop-size", metavar="SIZE", help="Size of the local crops, likewise.")
@click.option("--local-crops", type=WholeNumber(0), help="Local crops per image.")
@click.option("--prototypes", type=WholeNumber(2), help="Prototypes of base methods and of teachers without a head.")
@click.option("--seed", type=WholeNumber(0), help="Random seed.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Of forward passes. Default: bf16 on a GPU, else fp32; fp32 with --quantize.",
)
@click.option("--quantize", type=click.Choice(["int8"]), help="Simulate int8 in the trunk that --init gives.")
@click.option("--accumulate", type=WholeNumber(1), help="Micro-batches per optimiser step (gradient accumulation).")
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:1. Default: a GPU if one is available.")
@click.option(
    "--workers", type=WholeNumber(0), help="Data-loading processes. Default: all cores but one; on a CPU half."
)
@click.option("--compile", is_flag=True, help="torch.compile teacher and students.")
@click.option(
    "--resume/--fresh", default=True, help="Resume the run in --out (default), or start over. The last counts."
)
@click.option("--force", is_flag=True, help="Resume even if settings changed.")
@click.option("--probe-every", type=WholeNumber(0), metavar="EPOCHS", help="Run a kNN evaluation every N epochs.")
@click.option(
    "--checkpoint-minutes", type=_POSITIVE, default=10.0, show_default=True, help="Minutes between checkpoints."
)
@click.option("--checkpoint-steps", type=WholeNumber(0), help="Also save a checkpoint every N steps.")
@click.option("--store-targets", type=_FOLDER, help="Write the teacher's targets to this folder, for later runs.")
@click.option(
    "--store-k", "stored_k", type=WholeNumber(1), default=256, show_default=True,
    help="Most probable prototypes kept per stored target.",
)  # fmt: skip
@click.option("--target-epochs", type=WholeNumber(1), help="Replay the crops and targets of the first N epochs.")
@click.option("--targets", type=_FOLDER, help="Use stored targets instead of a teacher.")
@click.option("--cache", type=_FOLDER, help="Downloads and fitted prototypes. Default: $ROBX_CACHE or ~/.cache/robx.")
@click.option(
    "--corrupt-budget", type=Number(0, 1), default=0.001, show_default=True,
    help="Fraction of images that may fail to decode.",
)  # fmt: skip
@click.option("--tensorboard", is_flag=True, help="Also write RUN/tensorboard.")
@click.option(
    "--log-every", type=WholeNumber(1), default=10, show_default=True, help="Steps between lines of metrics.jsonl."
)
@click.option("--dry-run", is_flag=True, help="Check the settings and estimate the cost of the run; write nothing.")
@click.option("--gpu-memory", type=_POSITIVE, metavar="GB", help="With --dry-run: estimate the batch that fits.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def distill(*, resume: bool, dry_run: bool, gpu_memory: float | None, as_json: bool, **settings: Any) -> None:
    """Distil a large self-supervised teacher into a small student, without labels.

    RoB keeps the loss of the method that pretrained the teacher and replaces the branch that produces its targets with
    the teacher itself, including its original head and prototypes. The output folder holds the student's trunk, ready
    for eval and export.

    \b
    robx distill --teacher dino_vits16 --student resnet18 --data images/ --out runs/r18
    robx distill --teacher msn_vitl --teacher-weights vitl16_600ep.pth.tar \\
        --student mobilenetv3_large_100 --data /imagenet/train --out runs/mnv3
    robx distill --teacher timm:tf_efficientnet_lite2 --student resnet18 --data images/ --out runs/r18
    robx distill --teacher ema --objective dino --student resnet18 --data images/ --out runs/baseline
    robx distill --teacher timm:resnet50 --objective kd --student resnet18 --data images/ --out runs/kd

    \b
    Estimate a long run     robx distill ... --dry-run --gpu-memory 24
    Several GPUs            torchrun --nproc-per-node 8 -m robx.cli distill ...
    Several students        robx distill ... --student resnet18 --student mobilenetv3_large_100
    Store targets           robx distill ... --store-targets targets/
    and reuse them          robx distill ... --targets targets/ --student efficientnet_b0
    with fewer on disk      robx distill ... --target-epochs 10 --store-targets targets/
    Tolerate int8           robx distill ... --init runs/earlier --quantize int8 --epochs 10 --lr 1e-4
    Start from weights      robx distill ... --init pretrained (of timm), --init FILE or --init runs/earlier
    Non-square input        robx distill ... --crop-size 160x96 (height x width)
    Resume                  run the same command again; the result is identical, bit for bit on a CPU

    All other settings are keys of the TOML file given with --recipe; `robx recipe` prints them. The resolved recipe is
    written to RUN/recipe.json and metrics to RUN/metrics.jsonl. SIGTERM, SIGUSR1 and Ctrl-C stop the run after the
    current step, with a checkpoint and exit status 75; a second Ctrl-C stops it at once.
    """
    from robx.distill.resolve import DistillSettings
    from robx.distill.train import distill as run
    from robx.distill.train import estimate

    if gpu_memory is not None and not dry_run:
        raise InputError("--gpu-memory is for the estimate of a dry run: give --dry-run too")
    if settings["force"] and not resume:
        raise InputError("--force resumes a run whose settings changed, and --fresh starts over: give one of them")
    request = DistillSettings.of(fresh=not resume, **settings)
    if dry_run:
        recipe, cost = estimate(request, gpu_memory=gpu_memory, say=say)
        _show_cost(recipe, cost, as_json=as_json)
        return
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, this one prints
    with progress_bar(quiet=not first) as progress:
        folders = run(request, progress=progress, say=say)
    if first:
        _show_result(folders, data=request.data, image_member=request.image_member, as_json=as_json)


def _recipe_name(_: click.Context, __: click.Parameter, name: str) -> str:
    """The objective, or "quick"; --recipe also takes "paper", which is another recipe for each objective."""
    if name in ("quick", *ROB):
        return name
    choices = f"{', '.join(ROB)} or quick"
    if name in NAMED:
        raise click.UsageError(f"the recipe {name} is one per objective: give {choices}")
    raise click.UsageError(
        f"{name!r} is not a recipe: {did_you_mean(name, ('quick', *ROB), otherwise=f'give {choices}')}"
    )


@click.command(cls=Command)
@click.argument("objective", metavar=f"{{{'|'.join([*ROB, 'quick'])}}}", callback=_recipe_name)
@click.option("--student", metavar="NAME", required=True, help="A timm model; CNN, ViT and tiny ViT recipes differ.")
@click.option("--base", is_flag=True, help="The recipe of the base method, for --teacher ema.")
def recipe(objective: str, student: str, base: bool) -> None:
    """Print the published recipe of an objective for a student: every key with its value and meaning, in TOML.

    `quick` prints the recipe for runs of minutes on a CPU, which is measured here and not published.

    \b
    robx recipe dino --student vit_tiny_patch16_224 > mine.toml
    robx recipe quick --student resnet10t > mine.toml
    robx distill --recipe mine.toml --teacher dino_vits16 --student vit_tiny_patch16_224 ...

    Keep only the keys that you change: the others have these values anyway.
    """
    from robx.distill.recipe_toml import to_toml
    from robx.distill.recipes import override
    from robx.distill.resolve import student_kind, student_preset

    if objective in NAMED and base:
        raise click.UsageError(f"the recipe {objective} needs a teacher: drop --base")
    found = student_preset("msn" if objective in NAMED else objective, student, base=base)
    if objective in NAMED:  # quick, which is the same for every objective
        found = override(found, NAMED[objective][student_kind(student)])
    click.echo(to_toml(found), nl=False)


@click.command(cls=Command)
@click.option("--long", "with_files", is_flag=True, help="Also list each teacher's prototypes and checkpoint file.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON, checkpoints included.")
def teachers(with_files: bool, as_json: bool) -> None:
    """List the teachers: method, size, licence, published accuracy, and with --long the checkpoint to download.

    kNN and linear are ImageNet-1k top-1 accuracies in %, as published. In addition, --teacher dino, ibot, msn or swav
    with --teacher-weights reads any full checkpoint of that method, and timm:NAME uses any timm model.

    \b
    robx teachers
    robx teachers --long
    robx teachers --json
    """
    from robx.distill.teachers.zoo import teacher_rows

    rows = teacher_rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    note = " (non-commercial use only)"  # in a line of its own, so that the table fits 80 columns
    shown = [
        (
            row["name"],
            row["method"],
            f"{row['params'] / 1e6:.1f} M",
            _figure(row["knn"]),
            _figure(row["linear"]),
            row["licence"].replace(note, " *"),
        )
        for row in rows
    ]
    print_table(("teacher", "method", "params", "kNN", "linear", "licence"), shown, right=(2, 3, 4))
    click.echo("* non-commercial use only")
    for row in rows if with_files else ():
        prototypes = f"{row['prototypes']} prototypes" if row["prototypes"] else "fitted prototypes"
        click.echo(f"{row['name']}: {prototypes}, {row['file']}")


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def students(as_json: bool) -> None:
    """List the students that are tested end to end; any other timm model can be tried.

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


def _show_cost(recipe: Recipe, cost: RunCost, *, as_json: bool) -> None:
    from robx.records import to_json

    if as_json:
        both = {"recipe": to_json(recipe), "cost": to_json(cost) | {"batch_bytes": cost.batch_bytes}}
        click.echo(json.dumps(both, indent=2))
        return
    networks = [("teacher", cost.teacher)] if cost.teacher else []
    networks += [("student", student) for student in cost.students]
    rows = [
        (f"{role} {network.name}", f"{network.params / 1e6:.1f} M", f"{network.flops_per_image / 1e9:.2f}")
        for role, network in networks
    ]
    print_table(("network", "parameters", "GFLOPs per image"), rows, right=(1, 2))
    click.echo("\n".join(cost.lines(recipe.batch_size)))


def _figure(value: float | None) -> str:
    return "" if value is None else str(value)


def _show_result(folders: list[Path], *, data: Path, image_member: str | None, as_json: bool) -> None:
    from robx.distill.next_steps import knn_line, next_lines
    from robx.records import load_student, to_json

    for folder in folders:
        student = load_student(folder)
        if as_json:
            click.echo(json.dumps({"folder": str(folder)} | to_json(student)))
            continue
        made = f"{folder}: {student.timm_name}, embedding width {student.width}, {student.images_seen} images"
        knn = knn_line(folder)
        print_line(f"{made}, {knn}" if knn else made)
    if not as_json:
        hints("Next, with labelled images:", next_lines(folders, data=data, image_member=image_member))
