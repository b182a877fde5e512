"""Readers of the published layouts: DINO, iBOT, MSN, SwAV. Foreign files are read as data, never run as code.

DINO   {student, teacher, optimizer, epoch, args, dino_loss}      teacher: [module.]backbone.*, [module.]head.*
iBOT   the same with ibot_loss; the backbone has masked_embed, the head last_layer2
MSN    {target_encoder, prototypes, ...}                          target_encoder: module.*, module.fc.*
SwAV   a state dict, flat or under state_dict: module.*, module.projection_head.*, module.prototypes.weight
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from robx.distill.teachers.foreign_files import read_checkpoint, require_sound
from robx.distill.teachers.huggingface import from_transformers, is_transformers
from robx.errors import ArtifactError, InputError

Channels = tuple[float, float, float]  # red, green, blue
Layout = Literal["dino", "ibot", "msn", "swav", "backbone"]
NAMES = {"dino": "DINO", "ibot": "iBOT", "msn": "MSN", "swav": "SwAV", "backbone": "backbone-only"}
# Options of iBOT's head, and the values with which it is the one that frozen_heads.py rebuilds.
_HEAD_OPTIONS = {"act_in_head": (None, "gelu"), "norm_in_head": (None, "bn", "syncbn", "psyncbn")}
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_LIGHTNING = "pytorch-lightning_version"
# Usual attributes of a Lightning module that hold a network.
_NETWORKS = ("teacher", "teacher_backbone", "model", "net", "network", "backbone", "encoder", "trunk", "student")


@dataclass(frozen=True)
class PublishedTeacher:
    """The teacher's part of a checkpoint, with prefixes removed from the keys."""

    layout: Layout
    trunk: dict[str, Tensor]
    head: dict[str, Tensor]
    prototypes: Tensor | None = None  # MSN's; the other layouts have them in the head
    arch: str | None = None  # from the options in the file, as the next
    normalisation: tuple[Channels, Channels] | None = None  # mean and std; robx writes them


def detect_layout(content: Any) -> Layout | None:
    """The published layout that the keys indicate, or None."""
    if not isinstance(content, Mapping):
        return None
    keys = set(content)
    if "target_encoder" in keys:
        return "msn"
    if isinstance(content.get("teacher"), Mapping):
        has_patches = any("last_layer2" in str(key) or "masked_embed" in str(key) for key in content["teacher"])
        return "ibot" if "ibot_loss" in keys or has_patches else "dino"
    flat = _flat(content)
    if flat is None:
        return None
    return "swav" if any(key.startswith("projection_head") for key in flat) else "backbone"


def read_teacher(path: Path, layout: Layout, *, full: str = "") -> PublishedTeacher:
    """The teacher in a checkpoint of the given `layout`.

    Args:
        path: the file.
        layout: the expected layout.
        full: the full checkpoint to get instead of a backbone-only one, for the error message.

    Raises:
        InputError: the file does not exist.
        ArtifactError: damaged, of another method, or without the head that the method's loss needs.
    """
    content = _unwrapped(read_checkpoint(path))
    found = detect_layout(content)
    headless = f"{path} contains only the backbone, without the {NAMES[layout]} head and prototypes: {_get(full)}"
    if found is None:
        raise ArtifactError(f"{path} is not a teacher checkpoint (its top level is {_describe(content)}): {_get(full)}")
    if found == "backbone":
        raise ArtifactError(headless)
    if found != layout:
        raise ArtifactError(
            f"{path} is in the layout of {NAMES[found]}, and {NAMES[layout]} was expected: "
            f"use --teacher {found}, or {_get(full)}"
        )
    match layout:
        case "dino" | "ibot":
            teacher = _read_dino(content, where=str(path))
            _require_known_options(content, where=str(path))
        case "msn":
            teacher = _read_msn(content, where=str(path))
        case "swav":
            teacher = _read_swav(content)
        case _:
            raise InputError(f"{layout!r} is not a layout with a head: choose dino, ibot, msn or swav")
    if not teacher.head:
        raise ArtifactError(headless)
    if not teacher.trunk:
        raise ArtifactError(f"{path} contains a head but no backbone: {_get(full)}")
    require_sound(teacher.trunk | teacher.head, where=str(path))
    if teacher.prototypes is not None:
        require_sound({"prototypes": teacher.prototypes}, where=str(path))
    return teacher


def read_trunk(path: Path) -> dict[str, Tensor]:
    """The trunk's tensors of any layout, without the head: for a teacher whose prototypes are fitted.

    Raises:
        InputError, ArtifactError: as :func:`read_checkpoint`, or the file contains no tensors.
    """
    content = _unwrapped(read_checkpoint(path))
    match detect_layout(content):
        case "dino" | "ibot":
            trunk = _read_dino(content, where=str(path)).trunk
        case "msn":
            trunk = _split(_strip(_tensors(content["target_encoder"], where=str(path))), "fc.")[0]
        case "swav":
            trunk = _read_swav(content).trunk
        case "backbone":
            trunk = _flat(content) or {}
            if is_transformers(trunk):
                trunk = from_transformers(trunk, where=str(path))
            elif _LIGHTNING in content:
                _require_one_network(trunk, where=str(path))
        case _:
            top = _describe(content)
            raise ArtifactError(f"{path} contains no weights (its top level is {top}): give a state dict")
    require_sound(trunk, where=str(path))
    return trunk


def _unwrapped(content: Any) -> Any:
    """A Lightning checkpoint whose one state dict has a teacher beside the student, in DINO's layout."""
    if not isinstance(content, Mapping) or not _is_state(content.get("state_dict")):
        return content
    state = _strip(content["state_dict"])
    teacher = {key.removeprefix("teacher."): value for key, value in state.items() if key.startswith("teacher.")}
    if not any(key.startswith("backbone.") for key in teacher):
        return content
    return {key: value for key, value in content.items() if key != "state_dict"} | {"teacher": teacher}


def _require_one_network(trunk: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse a Lightning module's state dict with several networks, as nothing says which one is the teacher."""
    names = sorted({key.partition(".")[0] for key in trunk})
    if networks := [name for name in names if name in _NETWORKS]:
        raise ArtifactError(
            f"{where} is a Lightning checkpoint with {', '.join(names[:6])}: save the state dict of "
            f"{networks[0]} alone and give that file"
        )


def _read_dino(content: Mapping[str, Any], *, where: str) -> PublishedTeacher:
    state = _tensors(content["teacher"], where=where)
    while state and all(key.startswith(_PREFIXES) for key in state):
        state = {key.split(".", 1)[1]: value for key, value in state.items()}
    trunk = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
    head = {key.removeprefix("head."): v for key, v in state.items() if key.startswith("head.")}
    layout: Layout = "ibot" if detect_layout(content) == "ibot" else "dino"
    return PublishedTeacher(layout, trunk, head, arch=_arch(content), normalisation=_normalisation(content))


def _read_msn(content: Mapping[str, Any], *, where: str) -> PublishedTeacher:
    trunk, head = _split(_strip(_tensors(content["target_encoder"], where=where)), "fc.")
    prototypes = content.get("prototypes")
    if isinstance(prototypes, Mapping):  # a training checkpoint may contain a module's state
        prototypes = next((value for value in prototypes.values() if isinstance(value, Tensor)), None)
    if not isinstance(prototypes, Tensor):
        raise ArtifactError(f"{where} has no prototypes besides its target_encoder: give the file that MSN published")
    return PublishedTeacher(
        "msn", trunk, head, prototypes=prototypes, arch=_arch(content), normalisation=_normalisation(content)
    )


def _read_swav(content: Mapping[str, Any]) -> PublishedTeacher:
    state = _flat(content) or {}
    head = {key: v for key, v in state.items() if key.startswith(("projection_head", "prototypes"))}
    trunk = {key: v for key, v in state.items() if key not in head}
    return PublishedTeacher("swav", trunk, head, arch=_arch(content), normalisation=_normalisation(content))


def _arch(content: Mapping[str, Any]) -> str | None:
    """The network's name in the options of the file, if any."""
    arch = _options(content).get("arch")
    return arch if isinstance(arch, str) else None


def _normalisation(content: Mapping[str, Any]) -> tuple[Channels, Channels] | None:
    """Mean and standard deviation in the options of the file, if any."""
    found = tuple(_options(content).get(name) for name in ("mean", "std"))
    numbers = all(isinstance(v, tuple) and len(v) == 3 and all(isinstance(x, float) for x in v) for v in found)
    return cast(tuple[Channels, Channels], found) if numbers else None


def _require_known_options(content: Mapping[str, Any], *, where: str) -> None:
    """Refuse a head that was built with options of which its tensors show nothing."""
    for name, known in _HEAD_OPTIONS.items():
        value = _options(content).get(name)
        if value not in known:
            raise ArtifactError(
                f"{where}: its head was built with {name} = {str(value)[:40]}, which robx does not know "
                f"({', '.join(str(option) for option in known if option)} it knows): give the published file"
            )


def _options(content: Mapping[str, Any]) -> Mapping[str, Any]:
    args = content.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """A state dict without prefixes, also below ``state_dict`` or ``model``; None if there is none."""
    for inner in (content.get("state_dict"), content.get("model"), content):
        if _is_state(inner) and inner:
            return _strip(dict(inner))
    return None


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes of wrappers, such as DistributedDataParallel's ``module.``."""
    out = dict(state)
    for prefix in (*_PREFIXES, "backbone.", "encoder."):
        while out and all(key.startswith(prefix) for key in out):
            out = {key.removeprefix(prefix): value for key, value in out.items()}
    return out


def _split(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    head = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if not key.startswith(prefix)}, head


def _tensors(state: Any, *, where: str) -> dict[str, Tensor]:
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not _is_state(state):
        raise ArtifactError(f"{where}: the teacher part is not a state dict: give the full checkpoint")
    return dict(state)


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = [key[:40] if isinstance(key, str) else f"a {type(key).__name__}" for key in list(content)[:4]]
        return f"a mapping of {', '.join(keys)}" if keys else "an empty mapping"
    return f"of type {type(content).__name__}"


def _get(full: str) -> str:
    return f"get {full}" if full else "get the full checkpoint"
