"""Writers of the published layouts, for teachers that robx itself pretrains: what they write, checkpoints.py reads.

A teacher and a student are modules with a ``trunk`` and a ``head`` whose parameters have the published names
(heads.py). The options hold ``arch``, the timm name of the trunk, so that any trunk can be built again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robx.errors import InputError
from robx.files import write_atomically


def save_teacher_checkpoint(
    path: Path,
    method: str,
    *,
    student: nn.Module,
    teacher: nn.Module,
    arch: str,
    epoch: int = 0,
    options: Mapping[str, Any] | None = None,
    center: Tensor | None = None,
    optimizer: Mapping[str, Any] | None = None,
) -> None:
    """Write `teacher` in the layout of its `method`: ``dino``, ``ibot``, ``msn`` or ``swav``; see the writers below.

    Raises:
        InputError: another method, no space, or no permission.
    """
    match method:
        case "dino" | "ibot":
            save_dino_checkpoint(
                path,
                student=student,
                teacher=teacher,
                arch=arch,
                epoch=epoch,
                options=options,
                center=center,
                optimizer=optimizer,
                loss_key=f"{method}_loss",
            )
        case "msn":
            save_msn_checkpoint(path, teacher=teacher, arch=arch, epoch=epoch, options=options)
        case "swav":
            save_swav_checkpoint(path, teacher=teacher, arch=arch, epoch=epoch, options=options)
        case _:
            raise InputError(f"{method!r} has no published layout: save a dino, ibot, msn or swav teacher")


def save_dino_checkpoint(
    path: Path,
    *,
    student: nn.Module,
    teacher: nn.Module,
    arch: str,
    epoch: int = 0,
    options: Mapping[str, Any] | None = None,
    center: Tensor | None = None,
    optimizer: Mapping[str, Any] | None = None,
    loss_key: str = "dino_loss",
) -> None:
    """Write DINO's full checkpoint, or iBOT's with ``loss_key="ibot_loss"``, atomically.

    Top level: student (``module.backbone.*``, ``module.head.*``), teacher (``backbone.*``, ``head.*``), optimizer,
    epoch, args (argparse.Namespace), and the loss's ``center`` (1, K).
    """
    branch = {f"backbone.{k}": v for k, v in _state(student, "trunk").items()}
    branch |= {f"head.{k}": v for k, v in _state(student, "head").items()}
    content = {
        "student": {f"module.{key}": value for key, value in branch.items()},
        "teacher": {f"backbone.{k}": v for k, v in _state(teacher, "trunk").items()}
        | {f"head.{k}": v for k, v in _state(teacher, "head").items()},
        "optimizer": dict(optimizer or {}),
        "epoch": epoch,
        "args": _options(arch, options),
        loss_key: {} if center is None else {"center": center.detach().cpu()},
    }
    _save(path, content)


def save_msn_checkpoint(
    path: Path, *, teacher: nn.Module, arch: str, epoch: int = 0, options: Mapping[str, Any] | None = None
) -> None:
    """Write MSN's layout, atomically: target_encoder (``module.*``, ``module.fc.*``), prototypes (K, E), epoch, args.

    The teacher's head is heads.MsnHead: ``projection.{fc1, bn1, fc2, bn2, fc3}`` and ``prototypes``.
    """
    head = _state(teacher, "head")
    encoder = _state(teacher, "trunk") | {
        f"fc.{key.removeprefix('projection.')}": v for key, v in head.items() if key != "prototypes"
    }
    content = {
        "target_encoder": {f"module.{key}": value for key, value in encoder.items()},
        "prototypes": head["prototypes"],
        "epoch": epoch,
        "args": _options(arch, options),
    }
    _save(path, content)


def save_swav_checkpoint(
    path: Path, *, teacher: nn.Module, arch: str, epoch: int = 0, options: Mapping[str, Any] | None = None
) -> None:
    """Write SwAV's training layout, atomically: state_dict (``module.*`` with head and prototypes), epoch, args.

    The teacher's head is heads.SwavHead: ``projection_head.{0, 1, 3}`` and ``prototypes.weight``.
    """
    state = _state(teacher, "trunk") | _state(teacher, "head")
    content = {
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "epoch": epoch,
        "args": _options(arch, options),
    }
    _save(path, content)


def _state(branch: nn.Module, part: str) -> dict[str, Tensor]:
    module = getattr(branch, part, None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{type(branch).__name__} has no {part}")
    return {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def _options(arch: str, options: Mapping[str, Any] | None) -> argparse.Namespace:
    # Plain values only: readers of the published files allow a Namespace and nothing else of Python's.
    plain = {k: v for k, v in (options or {}).items() if v is None or isinstance(v, bool | int | float | str)}
    return argparse.Namespace(**{**plain, "arch": arch})


def _save(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save(dict(content), temporary))
