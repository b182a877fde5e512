"""The folder of a run: its settings, its metrics, and the student, which is there at any time.

RUN/  student.safetensors  student.json   the trunk, updated at every checkpoint
      recipe.json                         every setting that the result depends on
      metrics.jsonl                       one JSON object per line
      corrupt.txt                         images that could not be decoded, if any
      tensorboard/                        the metrics again, with --tensorboard
      teacher.pth                         a base method's run in its published layout: a teacher for the next run
      checkpoints/                        the state to resume from

With several students each has its own folder below RUN for everything except recipe.json and checkpoints/. What robx
wrote is recorded (``robx.store.written``): nothing else is removed or replaced.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robx.distill.recipes import recipe_from_json
from robx.errors import InputError, MissingExtra, RobxError
from robx.store.files import read_json, unwritable, write_text
from robx.store.written import RECORD, Written


class Metrics:
    """``metrics.jsonl``: appended line by line, truncated to the step that a run resumes from."""

    def __init__(self, folder: Path, *, step: int, tensorboard: Any = None) -> None:
        """Keep the lines up to `step` and drop later ones and an incomplete last one; 0 starts a new file."""
        self.path = folder / "metrics.jsonl"
        self._board = tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            lines = self.path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if step and _step_of(line) <= step]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, values: dict[str, Any]) -> None:
        """Append one object; NaN and infinity become null.

        Raises:
            RobxError: no space, no permission, or the folder is gone.
        """
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(plain, allow_nan=False) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error
        if self._board is not None:
            for key, value in plain.items():
                if isinstance(value, int | float) and key not in ("step", "epoch"):
                    self._board.add_scalar(key, value, plain["step"])

    def close(self) -> None:
        """Flush TensorBoard's writer, which buffers for two minutes."""
        if self._board is not None:
            self._board.close()


def check_folders(out: Path, folders: Sequence[Path], *, inputs: Sequence[Path], base: bool, fresh: bool) -> None:
    """Refuse a run that would remove or replace files that robx did not write, or that it reads; writes nothing.

    Args:
        out: the run's folder.
        folders: of the students.
        inputs: files and folders that the run reads.
        base: whether the run writes teacher.pth.
        fresh: whether what an earlier run wrote is going to be removed.

    Raises:
        InputError: the message names the file.
    """
    for path in (folder / name for folder in {out, *folders} for name in ("checkpoints", "tensorboard")):
        if path.is_symlink():
            raise InputError(
                f"{path} is a link, and robx does not write or remove files behind it: remove it, or make {out} a link"
            )
    earlier = _earlier(out, folders)
    for folder in {out, *folders}:
        written = [*Written(folder), *earlier.get(folder, ())]
        for name in _names(folder, out=out, folders=folders, base=base):
            if name not in written and os.path.lexists(folder / name):
                raise InputError(
                    f"{folder / name} was not written by robx and would be replaced: move it, or choose another --out"
                )
        for path in inputs if fresh else ():
            if path.resolve() == folder.resolve() or any(path.resolve() == (folder / w).resolve() for w in written):
                raise InputError(f"--fresh would remove {path}, which this run reads: move it, or choose another --out")


def claim_folders(out: Path, folders: Sequence[Path], *, base: bool, fresh: bool) -> None:
    """Record the files that a run is about to write, after removing with `fresh` what an earlier one wrote."""
    for folder, names in _earlier(out, folders).items():
        Written(folder).adopt(*names)
    for folder in {out, *folders}:
        written = Written(folder)
        if fresh:
            written.remove(*written)
        written.claim(*_names(folder, out=out, folders=folders, base=base))


def _names(folder: Path, *, out: Path, folders: Sequence[Path], base: bool) -> list[str]:
    """The files that a run writes into `folder`, except checkpoints and TensorBoard's."""
    run = ["recipe.json", "corrupt.txt"] if folder == out else []
    student = ["student.json", "student.safetensors", "metrics.jsonl"] if folder in folders else []
    return run + student + (["teacher.pth"] if student and base else [])


def _earlier(out: Path, folders: Sequence[Path]) -> dict[Path, list[str]]:
    """The files of a run of an earlier version of robx, which kept no record, by folder."""
    try:
        settings = read_json(out / "recipe.json") if (out / "recipe.json").is_file() else None
        recipe_from_json(settings["recipe"] if isinstance(settings, dict) else None)
    except (RobxError, KeyError):
        return {}  # not a run
    usual = ("recipe.json", "corrupt.txt", "student.json", "student.safetensors", "metrics.jsonl", "teacher.pth")
    below = ("checkpoints/step-*/state.*", "tensorboard/events.out.tfevents.*")
    found = {}
    for folder in {out, *folders}:
        if not (folder / RECORD).exists():
            found[folder] = [name for name in usual if (folder / name).is_file()]
            found[folder] += [path.relative_to(folder).as_posix() for pattern in below for path in folder.glob(pattern)]
    return found


def student_folders(out: Path, students: Sequence[str]) -> list[Path]:
    """Each student's folder: the run's own for a single student, one below it for each of several."""
    return [out] if len(students) == 1 else [out / name for name in students]


def tensorboard_writer(folder: Path, *, step: int) -> Any:
    """A TensorBoard writer into ``RUN/tensorboard`` that continues after `step` and hides later entries.

    Raises:
        MissingExtra: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard", "tensorboard", purpose="--tensorboard", cause=error) from error
    board = folder / "tensorboard"
    before = set(board.iterdir()) if board.exists() else set()
    writer = SummaryWriter(str(board), purge_step=step + 1 if step else 0)
    Written(folder).adopt(*(f"tensorboard/{path.name}" for path in set(board.iterdir()) - before))
    return writer


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
