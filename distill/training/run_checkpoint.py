"""Checkpoints of a run, written atomically: safetensors for tensors, JSON for the rest, SHA-256 over both.

    RUN/checkpoints/step-00001200/   state.safetensors + state.json

A checkpoint appears complete or not at all. The last few and the best by kNN accuracy are kept. Loading uses the newest
one whose hashes are right, and reports the ones that it skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from robx.errors import ArtifactError, RobxError
from robx.store.files import (
    read_json,
    require_space,
    sha256_bytes,
    sha256_file,
    unwritable,
    write_atomically,
    write_json,
)
from robx.store.folders import new_folder, remove_leftovers
from robx.store.written import RECORD, Written

SCHEMA = 1
_PREFIX = "step-"
_FILES = ("state.safetensors", "state.json")


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state in host memory, which training does not change."""

    tree: Any  # the state as JSON, with references to tensors
    tensors: dict[str, Tensor]  # by their path in the state: "/learners/NAME/net/..."

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose path starts with `prefix`, by the rest of it."""
        return {path.removeprefix(prefix): t for path, t in self.tensors.items() if path.startswith(prefix)}


def snapshot(state: Mapping[str, Any]) -> Snapshot:
    """Copy `state`, nested dicts and lists of tensors and plain values.

    Raises:
        RobxError: a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    return Snapshot(_flatten(state, tensors, ""), tensors)


def save_checkpoint(run: Path, state: Snapshot, *, step: int, keep: int = 2, best: int | None = None) -> Path:
    """Write `state` as the checkpoint of `step`.

    Afterwards only the newest `keep` checkpoints and that of step `best` remain. On failure the old ones are untouched.

    Raises:
        RobxError: no space or no permission; nothing half-written remains.
        InputError: the checkpoint would replace files that robx did not write.
    """
    folder = run / "checkpoints" / f"{_PREFIX}{step:08d}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    require_space_for(folder.parent, sum(t.nbytes for t in state.tensors.values()))
    Written(run).claim(*(f"checkpoints/{folder.name}/{name}" for name in _FILES))
    with new_folder(folder, ours=_FILES) as temporary:
        weights = temporary / "state.safetensors"
        write_atomically(weights, lambda path: _save(state.tensors, path))
        record = {"schema": SCHEMA, "step": step, "sha256": sha256_file(weights), "tree": state.tree}
        write_json(temporary / "state.json", record | {"digest": _digest(record)})
    _prune(run, keep=max(1, keep), best=best)
    return folder


def require_space_for(folder: Path, size: int) -> None:
    """Raise InputError if the disk of `folder` has no room for a checkpoint of `size` bytes."""
    require_space(folder, int(1.1 * size))


def load_newest(run: Path, *, say: Callable[[str], None] | None = None) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest valid checkpoint, or None if there are no checkpoints.

    `say` is called for every damaged checkpoint that is skipped.

    Raises:
        ArtifactError: there are checkpoints but none is valid, or the newest was written by a newer robx.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            return read_checkpoint(folder)
        except _TooNew:
            raise
        except ArtifactError as error:
            if say:
                say(f"{error}; trying the previous checkpoint")
    if found:
        raise ArtifactError(f"{run}: none of its {len(found)} checkpoints is intact: give --fresh to start over")
    return None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders that robx wrote, oldest first."""
    found = sorted(path for path in (run / "checkpoints").glob(f"{_PREFIX}*") if path.is_dir())
    if not (run / RECORD).exists():  # a run of an earlier version, which recorded nothing
        return found if (run / "recipe.json").exists() else []
    written = Written(run)
    return [path for path in found if f"checkpoints/{path.name}" in written]


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) of one checkpoint folder.

    Raises:
        ArtifactError: damaged, incomplete, or of a newer schema.
    """
    record = read_json(folder / "state.json")
    if not isinstance(record, dict):
        raise ArtifactError(f"{folder} is damaged: its state.json is not an object")
    weights = folder / "state.safetensors"
    try:
        digest = record.pop("digest", None)
        if digest != _digest(record):
            raise ArtifactError(f"{folder} is damaged: the SHA-256 of its state.json differs from what was written")
        # Checked after the digest: a flipped bit may turn one schema number into another.
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
    """Remove what a killed process left half-written; the caller holds the run's lock."""
    if run.is_dir():
        for folder in (run, *(path for path in run.iterdir() if path.is_dir() and not path.is_symlink())):
            remove_leftovers(folder)  # of the run, its checkpoints and each of several students


class _TooNew(ArtifactError):
    """A checkpoint of a newer robx: resuming from an older one would lose work."""


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except Exception as error:
        # safetensors wraps the file system's error into its own.
        text = str(error)
        if "os error" in text or isinstance(error, OSError):
            code = text.partition("os error ")[2].partition(")")[0]
            raise OSError(int(code) if code.isdigit() else 5, text) from error
        raise


def _prune(run: Path, *, keep: int, best: int | None) -> None:
    kept = {f"{_PREFIX}{best:08d}"} if best is not None else set()
    old = [folder.name for folder in checkpoints(run)[:-keep] if folder.name not in kept]
    Written(run).remove(*(f"checkpoints/{name}" for name in old))


def _digest(record: Mapping[str, Any]) -> str:
    return sha256_bytes(json.dumps(record, sort_keys=True, allow_nan=False).encode())


def _flatten(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under their path. Keys of any plain type are kept."""
    if isinstance(value, Tensor):
        # A separate copy: safetensors refuses tensors that share storage (tied heads).
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
