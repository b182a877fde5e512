"""Shared by the benchmarks: the demo's images, the timing of robx's own steps, and the writing of results."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from robx.console import print_table
from robx.demo.demo_data import prepare_demo_data
from robx.distill.recipes import Recipe
from robx.distill.train import train
from robx.distill.training.run import Options, RunSpec
from robx.image_size import usual_preprocessing
from robx.images.sources import ImageSource
from robx.records import Bundle, Student, TeacherInfo, Value
from robx.runtime.device.describe import describe
from robx.store.files import cache_folder, sha256_bytes, write_json, write_text
from robx.trunk import embedding_width, save_trunk

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("robx", "torch", "torchvision", "timm", "numpy", "pillow", "onnx", "onnxruntime", "openvino", "nncf")
CLIP_ART = (
    "Images: the demo's clip art (Debian openclipart-png, cleaned), 5,188 for training, of which 1,917 are labelled, "
    "and 867 for testing, in 12 noisy classes. It is neither ImageNet nor photographs."
)
_BEGAN, _BEGAN_LOAD = datetime.now(UTC), os.getloadavg()[0]


def demo_images() -> Path:
    """The demo's prepared shards; downloaded if they are missing."""
    return prepare_demo_data(cache_folder(), say=say, progress=lambda *_: None).folder


def say(text: str) -> None:
    """Print a message to stderr: only the table goes to stdout."""
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


class Chosen:
    """A source with some images of another, in the given order; an image may occur more than once."""

    def __init__(self, source: ImageSource, places: Sequence[int]) -> None:
        self.name, self.classes, self.licence, self.note = source.name, source.classes, source.licence, source.note
        self._source, self._places = source, places
        self.fingerprint = sha256_bytes(f"{source.fingerprint} {list(places)}".encode())[:16]

    @property
    def stamp(self) -> str:
        """That of the whole source."""
        return self._source.stamp

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        """The image's name, with its index to keep it unique."""
        return f"{index}/{self._source.key(self._places[index])}"

    def label(self, index: int) -> int | None:
        """As the source says."""
        return self._source.label(self._places[index])

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        """As the source reads it."""
        return self._source.read(self._places[index], at_least=at_least)

    def read_pixels(self, index: int, *, at_least: int | None = None) -> NDArray[np.uint8]:
        """As the source reads it."""
        return self._source.read_pixels(self._places[index], at_least=at_least)


def first_images(source: ImageSource, count: int) -> ImageSource:
    """The first `count` images of a source, repeated if it has fewer."""
    return Chosen(source, [index % len(source) for index in range(count)])


def step_seconds(
    recipe: Recipe,
    students: Sequence[str],
    source: ImageSource,
    out: Path,
    *,
    workers: int,
    device: str = "cpu",
    log_every: int = 10,
    **branch: Any,
) -> list[float]:
    """Seconds per step of a complete run of ``robx.distill.train``, with loader, optimiser, checks and log.

    The first step is excluded: it waits for the loader to start. `branch` has teacher, targets or store.
    """
    moments: list[float] = []
    options = Options(
        device=device, workers=workers, fresh=True, measure=False, checkpoint_minutes=1e6, log_every=log_every
    )
    spec = RunSpec(recipe=recipe, students=students, source=source, out=out, options=options, **branch)
    train(spec, progress=lambda *_: moments.append(time.perf_counter()))
    return [after - before for before, after in itertools.pairwise(moments)]


def save_student(
    trunk: nn.Module, timm_name: str, folder: Path, size: int, *, teacher: TeacherInfo | None = None, **pixels: Any
) -> None:
    """Write a Student with this trunk, for images of `size`; `pixels` overrides fields of its preprocessing."""
    record = Student(
        timm_name=timm_name,
        width=embedding_width(trunk),
        preprocessing=dataclasses.replace(usual_preprocessing(size), **pixels),
        sha256="",
        teacher=teacher,
        data=None,
        recipe={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_trunk(folder, trunk, record)


def unused_healing(bundle: Bundle) -> str:
    """What the reason says of healed weights that the shipped model is not made from; "" if it says nothing."""
    return next((part for part in bundle.reason.split("; ") if "healing was" in part or "were healed in" in part), "")


def shown(value: Value | None, digits: int = 2) -> str:
    """A figure with its interval."""
    if value is None:
        return "-"
    text = f"{value.value:.{digits}f}"
    return (
        text if value.low is None or value.high is None else f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    )


def publish(
    name: str,
    *,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    data: Any,
    notes: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """Print the table and write ``results/NAME.json`` and ``results/NAME.md``."""
    print_table(headings, rows, title=title)
    machine = _machine()
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    write_json(
        RESULTS / f"{name}.json",
        {"command": command, "settings": settings, "machine": machine, "notes": list(notes), "rows": data},
    )
    table = [headings, ["---"] * len(headings), *rows]
    lines = [f"# {title}", "", f"    {command}", ""]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in table]
    lines += ["", *(f"- {note}" for note in notes), f"- {_machine_line(machine)}", ""]
    write_text(RESULTS / f"{name}.md", "\n".join(lines))


def _machine() -> dict[str, Any]:
    facts = describe()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": facts["cpu"]["model"],
        "cores": facts["cpu"]["cores"],
        "flags": facts["cpu"]["flags"],
        "virtual": facts["cpu"]["hypervisor"],
        "os": facts["os"],
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "the libraries' default"),
        "nice": os.nice(0),
        "load_before_and_after": [round(_BEGAN_LOAD, 1), round(os.getloadavg()[0], 1)],
        "started": _BEGAN.isoformat(timespec="seconds"),
        "minutes": round((datetime.now(UTC) - _BEGAN).total_seconds() / 60, 1),
        "versions": versions,
    }


def _machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    before, after = machine["load_before_and_after"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])}), "
        f"{'virtual machine, ' if machine['virtual'] else ''}{machine['os']}, Python {machine['python']}; "
        f"OMP_NUM_THREADS {machine['threads']}, nice {machine['nice']}, load {before} before and {after} after; "
        f"{machine['started']}, {machine['minutes']} minutes; {versions}"
    )
