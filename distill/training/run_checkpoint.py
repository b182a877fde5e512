"""The whole state of a run, atomically: safetensors for tensors, JSON for the rest, hashes over both.

    RUN/checkpoints/step-00001200/   state.safetensors + state.json

A checkpoint appears whole or not at all. The last few are kept, and the best by the probe. Reading takes the newest one
whose hashes are right, and says which ones it passed over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from robx.errors import ArtifactError, InputError, RobxError
from robx.store.files import (
    read_json,
    require_space,
    sha256_bytes,
    sha256_file,
    unwritable,
    write_atomically,
    write_json,
)
from robx.store.folders import new_folder, remove_abandoned

SCHEMA = 1
_PREFIX = "step-"


def save_checkpoint(run: Path, state: Mapping[str, Any], *, step: int, keep: int = 2, best: int | None = None) -> Path:
    """Write `state` (nested dicts and lists of tensors and plain values) as the checkpoint of `step`.

    Afterwards the newest `keep` checkpoints and the one of step `best` stay. On failure the old ones are untouched.

    Raises:
        RobxError: no space or no permission; nothing half-written stays.
    """
    folder = run / "checkpoints" / f"{_PREFIX}{step:08d}"
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, tensors, "")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    require_space(folder.parent, int(1.1 * sum(t.nbytes for t in tensors.values())))
    with new_folder(folder) as temporary:
        weights = temporary / "state.safetensors"
        write_atomically(weights, lambda path: _save(tensors, path))
        record = {"schema": SCHEMA, "step": step, "sha256": sha256_file(weights), "tree": tree}
        write_json(temporary / "state.json", record | {"digest": _digest(record)})
    _prune(run, keep=max(1, keep), best=best)
    return folder


def load_newest(run: Path, *, say: Callable[[str], None] | None = None) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest valid checkpoint, or None when there is none at all.

    `say` is told of every checkpoint that is damaged and passed over.

    Raises:
        ArtifactError: there are checkpoints and none of them is valid, or the newest is of a newer robx.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            return read_checkpoint(folder)
        except _TooNew:
            raise
        except ArtifactError as error:
            if say:
                say(f"{error}; going back to the one before")
    if found:
        raise ArtifactError(f"{run}: none of its {len(found)} checkpoints is whole: start over with --fresh")
    return None


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob(f"{_PREFIX}*") if path.is_dir())


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) of one checkpoint folder.

    Raises:
        ArtifactError: damaged, incomplete, or of a newer schema.
    """
    record = read_json(folder / "state.json")
    if not isinstance(record, dict):
        raise ArtifactError(f"{folder} is damaged: its state.json is no object")
    weights = folder / "state.safetensors"
    try:
        digest = record.pop("digest", None)
        if digest != _digest(record):
            raise ArtifactError(f"{folder} is damaged: the SHA-256 of its state.json differs from what was written")
        # Only now: a flipped bit may turn one schema's number into another's.
        if record["schema"] > SCHEMA:
            raise _TooNew(f"{folder} has schema {record['schema']} and this robx reads up to {SCHEMA}: upgrade robx")
        if not weights.is_file() or sha256_file(weights) != record["sha256"]:
            raise ArtifactError(f"{folder} is damaged: the SHA-256 of {weights.name} differs from what was written")
        return int(record["step"]), _restore(record["tree"], load_file(weights))
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise ArtifactError(f"{folder} is damaged ({error})") from error


def clean(run: Path) -> None:
    """Remove what a killed process left half-written; call it under the run's lock."""
    for pattern in ("*/.*.tmp", "*/.*.old", ".*.tmp"):  # of checkpoints, of several students, of the run itself
        for path in run.glob(pattern):
            remove_abandoned(path)


def start_over(run: Path) -> None:
    """Remove from the folder of a run, or of one of its students, what distilling put there, and nothing else."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / name, ignore_errors=True)
    files = ("metrics.jsonl", "recipe.json", "student.json", "student.safetensors", "corrupt.txt", "teacher.pth")
    for name in files:
        (run / name).unlink(missing_ok=True)


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], *, run: Path) -> None:
    """Raise InputError with a diff when the run in the folder was started with other settings."""
    before, after = _leaves(old), _leaves(new)
    changed = [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted({*before, *after})
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    if changed:
        raise InputError(
            f"{run} holds a run with other settings ({'; '.join(changed)}): give the old ones to resume it, --force to "
            "go on with the new ones, --fresh to start over, or another --out"
        )


class _TooNew(ArtifactError):
    """A checkpoint of a later robx: going back would throw work away."""


_ABSENT = object()


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except Exception as error:
        # safetensors wraps what the file system says into an error of its own.
        text = str(error)
        if "os error" in text or isinstance(error, OSError):
            code = text.partition("os error ")[2].partition(")")[0]
            raise OSError(int(code) if code.isdigit() else 5, text) from error
        raise


def _prune(run: Path, *, keep: int, best: int | None) -> None:
    names = {f"{_PREFIX}{best:08d}"} if best is not None else set()
    for folder in checkpoints(run)[:-keep]:
        if folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)


def _digest(record: Mapping[str, Any]) -> str:
    return sha256_bytes(json.dumps(record, sort_keys=True, allow_nan=False).encode())


def _flatten(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`value` as JSON, its tensors put into `tensors` under their path. Keys of any plain type survive."""
    if isinstance(value, Tensor):
        # A copy in memory of its own: safetensors refuses tensors that share storage (tied heads).
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"items": [[key, _flatten(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RobxError(f"a {type(value).__name__} at {path} of the state cannot be saved")


def _restore(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "items" in tree:
        return {key: _restore(item, tensors) for key, item in tree["items"]}
    return [_restore(item, tensors) for item in tree["list"]]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _leaves(item, f"{path}.{key}" if path else key).items()}
    return {path: value}


def random_state(seed: int, *, step: int, rank: int) -> None:
    """Set torch's generators for one step of one process: drop path and patch drop need no state of their own."""
    torch.manual_seed((seed * 1_000_003 + step * 1009 + rank) % 2**63)
