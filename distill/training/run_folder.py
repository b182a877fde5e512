"""The folder of a run: its settings, its metrics, and the student, which is there at any time.

RUN/  student.safetensors  student.json   the trunk, updated at every checkpoint
      recipe.json                         every setting that the result depends on
      metrics.jsonl                       one JSON object per line
      corrupt.txt                         images that could not be decoded, if any
      tensorboard/                        the metrics again, with --tensorboard
      teacher.pth                         a base method's run in its published layout: a teacher for the next run
      checkpoints/                        the state to resume from

With several students each has its own folder below RUN for everything except recipe.json and checkpoints/.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robx.errors import MissingExtra
from robx.records import Preprocessing
from robx.store.files import unwritable, write_text


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


def start_over(folder: Path) -> None:
    """Remove what distilling wrote into the folder of a run or of one of its students, and nothing else."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = ("metrics.jsonl", "recipe.json", "student.json", "student.safetensors", "corrupt.txt", "teacher.pth")
    for name in files:
        (folder / name).unlink(missing_ok=True)


def student_folders(out: Path, students: Sequence[str]) -> list[Path]:
    """Each student's folder: the run's own for a single student, one below it for each of several."""
    return [out] if len(students) == 1 else [out / name for name in students]


def student_preprocessing(crop_size: int) -> Preprocessing:
    """Evaluation of a student trained on crops of `crop_size`: the usual 256 / 224 resize and a centre crop."""
    return Preprocessing(size=round(crop_size * 256 / 224), crop=crop_size)


def tensorboard_writer(folder: Path, *, step: int) -> Any:
    """A TensorBoard writer into ``RUN/tensorboard`` that continues after `step` and hides later entries.

    Raises:
        MissingExtra: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard", "tensorboard", purpose="--tensorboard", cause=error) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
