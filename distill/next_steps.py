"""What `robx distill` ends with: the student's accuracy so far, and the commands that usually come next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from robx.errors import RobxError
from robx.images.splits import split_of_folder
from robx.store.files import read_bytes

_MAX_BYTES = 256 * 2**20  # of metrics.jsonl


def knn_line(folder: Path) -> str:
    """The kNN evaluations of a run in one line, from its metrics.jsonl; empty if there were none (--probe-every)."""
    probes = [line for line in _metrics(folder / "metrics.jsonl") if isinstance(line.get("probe_knn"), int | float)]
    if not probes:
        return ""
    last, start = probes[-1], next((p for p in probes if p.get("step") == 0), {})
    known = [f"{start['probe_knn']:.1f} % before training"] if start and len(probes) > 1 else []
    if isinstance(teacher := start.get("teacher_probe_knn"), int | float):
        known.append(f"teacher {teacher:.1f} %")
    return f"kNN accuracy {last['probe_knn']:.1f} % in epoch {last.get('epoch', 0):g}" + (
        f" ({', '.join(known)})" if known else ""
    )


def next_lines(folders: Iterable[Path], *, data: Path, image_member: str | None = None) -> list[str]:
    """Commands to copy: evaluate the students, export the first one, and load it in Python.

    Args:
        folders: of the students.
        data: the images of the run; for its training split alone, the folder that holds both splits is shown.
        image_member: as given to the run.
    """
    paths = list(folders)
    images = data.parent if split_of_folder(data.name) == "train" and data.is_dir() else data
    shown = f"--data {shlex.quote(str(images))}"
    if image_member:
        shown += f" --image-member {shlex.quote(image_member)}"
    first, runs = shlex.quote(str(paths[0])), " ".join(shlex.quote(str(path)) for path in paths)
    return [
        f"robx eval {runs} {shown} --knn",
        f"robx export {first} --format openvino --int8 {shown}",
        f"python -c {shlex.quote(f'from robx import api; model = api.load({str(paths[0])!r})')}",
    ]


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = read_bytes(path, limit=_MAX_BYTES).decode(errors="replace")
    except RobxError:
        return
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a line that is being written
        if isinstance(values, dict):
            yield values
