"""The folder of a run: its settings, its metrics line by line, and the student that it holds at any time.

RUN/  student.safetensors  student.json   the trunk, refreshed at every checkpoint
      recipe.json                         every setting that the result depends on
      metrics.jsonl                       one JSON object a line
      corrupt.txt                         images that could not be decoded, if any
      tensorboard/                        the metrics once more, if asked for
      teacher.pth                         what a base method's run leaves for the next
      checkpoints/                        the state to resume from

With several students each has a folder of its own below RUN for all but recipe.json and checkpoints/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robx.errors import MissingExtra
from robx.records import Preprocessing
from robx.store.files import unwritable, write_text


class Metrics:
    """``metrics.jsonl``: appended line by line, cut back to the step that a run resumes from."""

    def __init__(self, folder: Path, *, step: int, tensorboard: Any = None) -> None:
        """Keep the lines of steps up to `step`, drop later ones and a half-written last one; 0 begins anew."""
        self.path = folder / "metrics.jsonl"
        self._board = tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            lines = self.path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if step and _step_of(line) <= step]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, values: dict[str, Any]) -> None:
        """Append one object; floats that are not finite become null.

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
        """Put on the disk what TensorBoard's writer, which is two minutes late, still holds."""
        if self._board is not None:
            self._board.close()


def student_folders(out: Path, students: Sequence[str]) -> list[Path]:
    """Where each student goes: one into the run's folder itself, several into one each below it."""
    return [out] if len(students) == 1 else [out / name for name in students]


def student_preprocessing(crop_size: int) -> Preprocessing:
    """How a student that was trained on crops of `crop_size` is evaluated: the usual 256 / 224 resize, centre crop."""
    return Preprocessing(size=round(crop_size * 256 / 224), crop=crop_size)


def tensorboard_writer(folder: Path, *, step: int) -> Any:
    """A TensorBoard writer into ``RUN/tensorboard`` that goes on after `step`; what is there of later ones is hidden.

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
