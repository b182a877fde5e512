"""`robx demo`: the whole pipeline on real images, as a plan of `robx ship`."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path

import click

from robx.console import announce, progress_bar, quiet_option, say
from robx.demo.demo_data import DemoData, prepare_demo_data
from robx.errors import RobxError, duration
from robx.images.sources import open_source
from robx.options import Command, PathType, WholeNumber
from robx.ship.commands import run_and_show
from robx.store.files import cache_folder
from robx.store.folders import require_writable

PLAN = "plan.toml"  # beside this file


@click.command(cls=Command)
@click.option("--data", type=PathType(), help="Labelled images in train/ and test/. [default: downloaded]")
@click.option("--out", type=PathType(), default=Path("runs/demo"), show_default=True, help="Output folder.")
@click.option("--teacher", help="A name from `robx teachers`. [default: efficientnet_lite0]")
@click.option("--student", help="A name from `robx students`, or any timm model. [default: resnet10t]")
@click.option("--epochs", type=WholeNumber(1), help="Passes over the images. [default: 4]")
@click.option("--fresh", is_flag=True, help="Start over instead of reusing earlier results.")
@quiet_option
def demo(
    data: Path | None, out: Path, teacher: str | None, student: str | None, epochs: int | None, fresh: bool
) -> None:
    """Run the whole pipeline on real images, in minutes on two cores.

    Distils a small student from a real pretrained teacher, exports and evaluates it, measures each export on this
    machine and writes OUT/report.html. It can be interrupted at any time: the same command continues.

    \b
    robx demo
    robx demo --data images/ --student resnet18 --epochs 20 --out runs/mine
    """
    from robx.ship.plan import read_plan

    started = time.monotonic()
    require_writable(out, remedy="give --out in another folder")  # before the images are downloaded
    images = _images(data)
    with resources.as_file(resources.files("robx.demo") / PLAN) as path:
        plan = read_plan(path, data=str(images.folder), out=str(out), teacher=teacher, student=student)
    if epochs is not None:
        plan = plan.with_distill(epochs=epochs)
    shipped = run_and_show(plan, fresh=fresh)
    for refused in shipped.refused:
        say(f"refused by a gate: {refused}")
    if shipped.failed:
        raise RobxError(shipped.failed[0])
    announce(f"Total time: {duration(time.monotonic() - started)}.")
    say(images.caveat)


def _images(data: Path | None) -> DemoData:
    if data is None:
        with progress_bar() as progress:
            return prepare_demo_data(cache_folder(), say=say, progress=progress)
    for split in ("train", "test"):
        if open_source(data, split=split).classes is None:
            raise RobxError(f"{data} has no labels in its {split} split: give images in train/CLASS/ and test/CLASS/")
    return DemoData(data, data.name, "yours", "The figures are for your own images.")
