"""``recipe.json``: the record of every setting that a run's result depends on, and its check on resume."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robx.distill.recipes import Recipe, recipe_from_json
from robx.distill.training.run_checkpoint import checkpoints
from robx.errors import InputError
from robx.images.sources import ImageSource, data_info
from robx.records import to_json
from robx.store.files import read_json

_ABSENT = object()
_DERIVED = ("recipe.lr_batch", "recipe.warmup_lr", "recipe.final_lr")  # set by --lr as well


def settings_of(
    recipe: Recipe, students: Sequence[str], source: ImageSource, *, init: Mapping[str, str] | None, stored: bool
) -> dict[str, Any]:
    """What recipe.json records, except the teacher; `stored`: whether stored targets are used instead of a teacher."""
    settings: dict[str, Any] = {
        "recipe": to_json(recipe),
        "students": list(students),
        "data": to_json(data_info(source)),
        "stored_targets": stored,
    }
    return settings | ({"init": dict(init)} if init else {})


def refuse_changes(run: Path, settings: Mapping[str, Any], *, unknown: str = "") -> None:
    """Compare `settings` with those of the run in the folder, if it can be resumed; the `unknown` key is ignored.

    Raises:
        InputError: they differ; the message lists the differences.
    """
    path = run / "recipe.json"
    if path.exists() and checkpoints(run):
        before = {key: value for key, value in _comparable(read_json(path)).items() if key != unknown}
        compare(before, _comparable(settings), run=run)


def compare(old: Mapping[str, Any], new: Mapping[str, Any], *, run: Path) -> None:
    """Raise InputError with a diff if the run in the folder was started with other settings."""
    before, after = _leaves(old), _leaves(new)
    changed = [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted({*before, *after})
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    if any(line.startswith("recipe.lr:") for line in changed):  # the others follow from it
        changed = [line for line in changed if line.partition(":")[0] not in _DERIVED]
    if changed:
        raise InputError(
            f"{run} holds a run with other settings ({'; '.join(changed)}): restore the old settings to resume it, "
            "--force to continue with the new ones, --fresh to start over, or choose another --out"
        )


def _comparable(settings: Any) -> dict[str, Any]:
    """Settings that a resumed run must share: not the machine's, nor robx's version or the images' licence."""
    if not isinstance(settings, Mapping):
        return {}
    kept = {key: value for key, value in settings.items() if key not in ("robx_version", "compute")}
    if isinstance(kept.get("recipe"), dict):  # a key that a later robx added had its default value in an earlier run
        with contextlib.suppress(InputError):
            kept["recipe"] = to_json(recipe_from_json(kept["recipe"]))
    if isinstance(kept.get("data"), dict):
        kept["data"] = {key: value for key, value in kept["data"].items() if key != "licence"}
    return kept


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _leaves(item, f"{path}.{key}" if path else key).items()}
    return {path: value}
