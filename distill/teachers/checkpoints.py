"""Readers of the published layouts: DINO, iBOT, MSN, SwAV. Files from elsewhere are data, never code.

    DINO   {student, teacher, optimizer, epoch, args, dino_loss}      teacher: [module.]backbone.*, [module.]head.*
    iBOT   the same with ibot_loss; the backbone has masked_embed, the head last_layer2
    MSN    {target_encoder, prototypes, ...}                          target_encoder: module.*, module.fc.*
    SwAV   a state dict, flat or under state_dict: module.*, module.projection_head.*, module.prototypes.weight

Pickles are read with ``weights_only`` and two kinds of class allowed beside tensors: argparse.Namespace, which DINO and
iBOT store their options in, and the paths that a launcher left among those, read as pure ones, which open nothing.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from robx.errors import ArtifactError, InputError

Layout = Literal["dino", "ibot", "msn", "swav", "backbone"]
NAMES = {"dino": "DINO", "ibot": "iBOT", "msn": "MSN", "swav": "SwAV", "backbone": "backbone-only"}
# The largest published one, iBOT's ViT-L with both branches and the optimiser, has about 5 GB.
MAX_CHECKPOINT_BYTES = 16 * 1024**3
_ALLOWED: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath")),
    *((PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath")),
    *((PurePosixPath, f"pathlib._local.{name}") for name in ("PosixPath", "PurePosixPath")),  # Python 3.13's name
]
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class PublishedTeacher:
    """The teacher's part of a checkpoint, its keys without prefixes."""

    layout: Layout
    trunk: dict[str, Tensor]
    head: dict[str, Tensor]
    prototypes: Tensor | None = None  # MSN's; the other layouts hold them in the head
    arch: str | None = None  # what the file's own options say


def read_checkpoint(path: Path) -> Any:
    """What a ``.pth``, ``.pth.tar``, ``.pt`` or ``.safetensors`` file holds, on the CPU; tensors may stay mapped.

    Raises:
        InputError: no file there, or not readable.
        ArtifactError: too large, cut, damaged, or holding Python objects other than tensors.
    """
    _check_size(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_ALLOWED):
            # Mapping the file spares the memory of the student and the optimiser; only torch's zip format can be.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, ... for a damaged file
        raise ArtifactError(_refusal(path, error)) from error


def detect_layout(content: Any) -> Layout | None:
    """Which published layout this is, by its keys; None when it is none."""
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
    """The teacher in a checkpoint that is expected to have `layout`.

    Args:
        path: the file.
        layout: what it has to be.
        full: the full checkpoint to get instead of a backbone-only one; ends the message that refuses one.

    Raises:
        InputError: the file is not there.
        ArtifactError: damaged, of another method, or without the head that the method's loss needs.
    """
    content = read_checkpoint(path)
    found = detect_layout(content)
    headless = f"{path} has the backbone only, without the {NAMES[layout]} head and prototypes: {_get(full)}"
    if found is None:
        raise ArtifactError(f"{path} is no teacher's checkpoint (its top level is {_describe(content)}): {_get(full)}")
    if found == "backbone":
        raise ArtifactError(headless)
    if found != layout:
        raise ArtifactError(
            f"{path} is a checkpoint of {NAMES[found]} and {NAMES[layout]} was expected: "
            f"give it to --teacher {found} instead, or {_get(full)}"
        )
    match layout:
        case "dino" | "ibot":
            teacher = _read_dino(content, where=str(path))
        case "msn":
            teacher = _read_msn(content, where=str(path))
        case "swav":
            teacher = _read_swav(content)
        case _:
            raise InputError(f"{layout!r} is not the layout of a teacher with a head")
    if not teacher.head:
        raise ArtifactError(headless)
    if not teacher.trunk:
        raise ArtifactError(f"{path} has a head and no backbone: {_get(full)}")
    return teacher


def read_trunk(path: Path) -> dict[str, Tensor]:
    """The trunk's tensors of any layout, the head left out: for a teacher whose prototypes are fitted.

    Raises:
        InputError, ArtifactError: as :func:`read_checkpoint`; or no tensors in it.
    """
    content = read_checkpoint(path)
    match detect_layout(content):
        case "dino" | "ibot":
            return _read_dino(content, where=str(path)).trunk
        case "msn":
            return _split(_strip(_tensors(content["target_encoder"], where=str(path))), "fc.")[0]
        case "swav":
            return _read_swav(content).trunk
        case "backbone":
            return _flat(content) or {}
    raise ArtifactError(f"{path} holds no weights (its top level is {_describe(content)}): give a state dict")


def _read_dino(content: Mapping[str, Any], *, where: str) -> PublishedTeacher:
    state = _tensors(content["teacher"], where=where)
    while state and all(key.startswith(_PREFIXES) for key in state):
        state = {key.split(".", 1)[1]: value for key, value in state.items()}
    trunk = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
    head = {key.removeprefix("head."): v for key, v in state.items() if key.startswith("head.")}
    layout: Layout = "ibot" if detect_layout(content) == "ibot" else "dino"
    return PublishedTeacher(layout, trunk, head, arch=_arch(content))


def _read_msn(content: Mapping[str, Any], *, where: str) -> PublishedTeacher:
    trunk, head = _split(_strip(_tensors(content["target_encoder"], where=where)), "fc.")
    prototypes = content.get("prototypes")
    if isinstance(prototypes, Mapping):  # a training checkpoint may hold a module's state
        prototypes = next((value for value in prototypes.values() if isinstance(value, Tensor)), None)
    if not isinstance(prototypes, Tensor):
        raise ArtifactError(f"{where} has no prototypes beside its target_encoder: give MSN's own file")
    return PublishedTeacher("msn", trunk, head, prototypes=prototypes, arch=_arch(content))


def _read_swav(content: Mapping[str, Any]) -> PublishedTeacher:
    state = _flat(content) or {}
    head = {key: v for key, v in state.items() if key.startswith(("projection_head", "prototypes"))}
    trunk = {key: v for key, v in state.items() if key not in head}
    return PublishedTeacher("swav", trunk, head, arch=_arch(content))


def _arch(content: Mapping[str, Any]) -> str | None:
    """The network's name in the file's own options, where it has any."""
    args = content.get("args")
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    arch = options.get("arch")
    return arch if isinstance(arch, str) else None


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """A state dict without prefixes, also one level down under ``state_dict`` or ``model``; None when it is none."""
    for inner in (content.get("state_dict"), content.get("model"), content):
        if _is_state(inner) and inner:
            return _strip(dict(inner))
    return None


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without what wrappers put before them, such as DistributedDataParallel's ``module.``."""
    out = dict(state)
    for prefix in (*_PREFIXES, "backbone."):
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
        raise ArtifactError(f"{where}: the teacher's part is no state dict: it is another kind of file")
    return dict(state)


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the teacher's file to --teacher-weights")
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:  # a small archive may unpack to anything
                size = max(size, sum(member.file_size for member in archive.infolist()))
        except Exception as error:  # BadZipFile, and whatever else a damaged directory leads to
            raise ArtifactError(_refusal(path, error)) from error
    if size > MAX_CHECKPOINT_BYTES:
        raise ArtifactError(f"{path} unpacks to {size / 1e9:.0f} GB: larger than any teacher's checkpoint")


def _refusal(path: Path, error: Exception) -> str:
    text = str(error)
    if match := re.search(r"(?:GLOBAL|class) (\w+\.[\w.]*\w)", text):
        return (
            f"{path} holds Python objects ({match.group(1)}), which robx never loads, for they can run code: "
            "save its tensors alone, or get the published file"
        )
    first = text.strip().splitlines()[0][:120] if text.strip() else type(error).__name__
    return f"{path} is cut, damaged or no PyTorch file ({first}): get it again"


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = [str(key) for key in list(content)[:4]]
        return f"a mapping of {', '.join(keys)}" if keys else "an empty mapping"
    return f"of type {type(content).__name__}"


def _get(full: str) -> str:
    return f"get {full}" if full else "get the full checkpoint"
