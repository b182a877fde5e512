"""`robx demo`: the whole pipeline on real images, as the commands a user would type, each printed before it runs."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from robx.cli import COMMANDS, main
from robx.console import print_line, print_table, progress_bar, say
from robx.demo.demo_data import DemoData, prepare_demo_data
from robx.errors import GateFailed, RobxError
from robx.images.sources import open_source
from robx.records import load_bundle
from robx.store.files import cache_folder, read_json, sha256_bytes, write_json, write_text
from robx.store.locks import lock_folder

TEACHER = "efficientnet_lite0"
STUDENT = "resnet10t"
# What differs from the published recipe, whose 150 epochs with batches of 1024 do not fit into minutes on two cores: a
# learning rate and a head that learn within the first hundred steps, milder colour jitter, and softer targets because
# there are few images.
RECIPE = """\
optimizer = "adamw"
batch_size = 32
lr = 0.001
lr_batch = 32
head = "native"
teacher_temperature = 0.05
color_strength = 0.4
prototypes = 256
crop_size = 64
local_crops = 0
"""
# Proving a drop below 1 point takes thousands of test images, and more when several candidates are tried. The demo has
# about 900, which can prove 4 points.
GATE_POINTS = "4"
BUNDLES = "BUNDLES"  # in a command: every bundle of the run that this machine can run


@dataclass(frozen=True)
class Step:
    """One command of the demo, the files it writes, and how long it takes on two cores, in seconds."""

    title: str
    command: tuple[str, ...]
    makes: tuple[Path, ...]
    seconds: float
    optional: bool = False  # if it fails, the demo says so and continues


@dataclass
class Ledger:
    """The steps that are done, so that a second run can reuse them; written after each step."""

    path: Path
    done: dict[str, str] = field(default_factory=dict)  # title -> hash of its command and of all commands before it

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Read the ledger, or start an empty one."""
        found = read_json(path) if path.is_file() else {}
        return cls(path, found if isinstance(found, dict) else {})

    def has(self, step: Step, state: str) -> bool:
        """Whether the step was done in this state and its files still exist."""
        return self.done.get(step.title) == state and all(made.exists() for made in step.makes)

    def add(self, step: Step, state: str) -> None:
        """Record the step as done."""
        self.done[step.title] = state
        write_json(self.path, self.done)


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="Labelled images in train/ and test/. [default: downloaded]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Output folder."
)
@click.option("--teacher", default=TEACHER, show_default=True, help="A name from `robx teachers`.")
@click.option("--student", default=STUDENT, show_default=True, help="A name from `robx students`, or any timm model.")
@click.option("--epochs", type=click.IntRange(1), default=2, show_default=True, help="Passes over the images.")
@click.option("--fresh", is_flag=True, help="Start over instead of reusing earlier results.")
def demo(data: Path | None, out: Path, teacher: str, student: str, epochs: int, fresh: bool) -> None:
    """Run the whole pipeline on real images, in minutes on two cores.

    Distils a small student from a real pretrained teacher, exports and evaluates it, measures each export on this
    machine and writes OUT/report.html. It can be interrupted at any time: the same command continues.

    \b
    robx demo
    robx demo --data images/ --student resnet18 --epochs 20 --out runs/mine
    """
    started = time.monotonic()
    with lock_folder(out):
        images = _images(data)
        steps = plan(images, out=out, teacher=teacher, student=student, epochs=epochs)
        _run_all(steps, images, out, fresh=fresh)
    say("")
    say(f"Total time: {_minutes(time.monotonic() - started)}. {images.caveat}")
    _show(out / "report.json")
    print_line(f"Report: {out / 'report.html'} (with report.md and report.json beside it)")


def plan(images: DemoData, *, out: Path, teacher: str, student: str, epochs: int) -> list[Step]:
    """The demo's commands, in order."""
    run, page = out / "student", out / "report.html"
    data = ("--data", str(images.folder))
    margin = ("--margin", GATE_POINTS)
    export = ("export", str(run), *data, "--format")
    gate = ("--int8", "--max-drop", GATE_POINTS)
    rapid = ("--profile", "rapid", "--processes", "2")
    engines = ("--fp16", "--target", "rtx:sm86+sm89")
    networks = ("--teacher", teacher, "--student", student)
    recipe = ("--objective", "msn", "--recipe", str(out / "recipe.toml"), "--epochs", str(epochs), "--probe-every", "2")
    return [
        Step(
            f"Distil {student} from {teacher}",
            ("distill", *networks, *data, "--out", str(run), *recipe),
            makes=(run / "student.json",),
            seconds=200,
        ),
        Step("Export to ONNX", (*export, "onnx"), makes=(run / "onnx-fp32",), seconds=15),
        Step("Export to OpenVINO", (*export, "openvino"), makes=(run / "openvino-fp32",), seconds=5),
        Step("Export to OpenVINO int8, checked by the gate", (*export, "openvino", *gate), makes=(), seconds=20),
        Step(
            "Build TensorRT engines",
            (*export, "trt", *engines),
            makes=(run / "trt-fp16",),
            seconds=15,
            optional=True,
        ),
        Step(
            "Evaluate the student and its exports",
            ("eval", str(run), BUNDLES, *data, "--knn", "--fidelity", *margin),
            makes=(run / "measurements.jsonl",),
            seconds=25,
        ),
        Step(
            "Measure latency on this machine",
            ("bench", BUNDLES, *rapid, *data),
            makes=(),
            seconds=35,
        ),
        Step("Write the report", ("report", str(out), *margin, "-o", str(page)), makes=(page,), seconds=5),
    ]


def _images(data: Path | None) -> DemoData:
    if data is None:
        with progress_bar() as progress:
            return prepare_demo_data(cache_folder(), say=say, progress=progress)
    for split in ("train", "test"):
        if open_source(data, split=split).classes is None:
            raise RobxError(f"{data} has no labels in its {split} split: give images in train/CLASS/ and test/CLASS/")
    return DemoData(data, data.name, "yours", "The figures are for your own images.")


def _run_all(steps: list[Step], images: DemoData, out: Path, *, fresh: bool) -> None:
    ledger = Ledger.open(out / "demo.json")
    write_text(out / "recipe.toml", RECIPE)
    state = sha256_bytes((open_source(images.folder, split="train").fingerprint + RECIPE).encode())
    spent = planned = 1.0  # seconds so far, measured and planned; their ratio is the speed of this machine
    for number, step in enumerate(steps, start=1):
        state = sha256_bytes((state + shlex.join(step.command)).encode())
        left = spent / planned * sum(s.seconds for s in steps[number - 1 :])
        say("")
        say(f"[{number}/{len(steps)}] {step.title}  (about {_minutes(left)} left)")
        if not fresh and ledger.has(step, state):
            say("  already done, reused")
            continue
        began = time.monotonic()
        _run(step, run=out / "student", fresh=fresh)
        ledger.add(step, state)
        spent, planned = spent + time.monotonic() - began, planned + step.seconds


def _run(step: Step, *, run: Path, fresh: bool) -> None:
    command = [*step.command, "--fresh"] if fresh and step.command[0] == "distill" else list(step.command)
    if BUNDLES in command:
        place = command.index(BUNDLES)
        command[place : place + 1] = [str(folder) for folder in _runnable_bundles(run)]
    say(f"  $ robx {shlex.join(command)}".replace(f" {Path.home()}/", " ~/"))
    try:
        _call(command)
    except GateFailed as error:
        say(f"  {error}")
    except RobxError as error:
        if not step.optional:
            raise
        say(f"  skipped: {error}")


def _runnable_bundles(run: Path) -> list[Path]:
    """The bundles below `run`, without TensorRT engines if there is no GPU."""
    import torch

    folders = [manifest.parent for manifest in sorted(run.glob("*/manifest.json"))]
    return [f for f in folders if torch.cuda.is_available() or load_bundle(f).format != "trt"]


def _call(arguments: list[str]) -> Any:
    """Run a robx command in this process, as the command line would."""
    command = main.get_command(click.Context(main), arguments[0])
    if command is None:
        raise RobxError(f"no command {arguments[0]!r}: known are {', '.join(COMMANDS)}")
    return command.main(arguments[1:], prog_name=f"robx {arguments[0]}", standalone_mode=False)


def _show(path: Path) -> None:
    """Print size, accuracy and latency of every model in the report."""
    page = read_json(path)
    headings = ("model", "MB", "kNN %", "drop against fp32, points", "p50 ms", "p90 bound", "validity")
    rows = []
    for row in page["rows"]:
        latency = row["latency"] or {}
        rows.append(
            (
                f"{row['name']} {row['format']} {row['precision']}",
                f"{row['bytes'] / 1e6:.1f}",
                _figure(row["accuracy"].get("knn"), ".1f"),
                f"{_figure(row['drop'], '.2f')} {row['judged'] or ''}",
                _figure(latency.get("p50"), ".2f"),
                _figure(latency.get("p90"), ".2f", bound="high"),
                row["validity"] or "not measured",
            )
        )
    print_table(headings, rows, title=page["title"], right=(1, 2, 3, 4, 5))


def _figure(figure: Any, form: str, *, bound: str = "value") -> str:
    number = figure["value"][bound] if figure else None
    return "" if number is None else format(number, form)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
