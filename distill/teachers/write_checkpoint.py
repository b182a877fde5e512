"""Writing a pretrained network in the layout that its base method publishes, so that it can be read as a teacher.

    DINO   {student, teacher, epoch, args, dino_loss}     backbone.*, head.*; `module.` before all of the student
    iBOT   the same with ibot_loss; backbone.masked_embed, head.last_layer2
    MSN    {encoder, target_encoder, prototypes, epoch, args}     module.*, module.fc.*
    SwAV   {epoch, state_dict, args}, as its training saves it: module.*, module.projection_head.*, module.prototypes.*

The teacher is the moving average of the student; SwAV has a single network.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robx.distill.recipes import Recipe
from robx.errors import InputError
from robx.images.decode import IMAGENET_MEAN, IMAGENET_STD
from robx.store.files import write_bytes


def published_checkpoint(
    teacher: dict[str, Tensor],
    student: dict[str, Tensor],
    *,
    recipe: Recipe,
    timm_name: str,
    epoch: int,
    center: Tensor | None = None,
    patch_center: Tensor | None = None,
) -> dict[str, Any]:
    """The checkpoint of a base method's run in its published layout.

    Args:
        teacher: the state dict (``trunk.*``, ``head.*``) of the student's moving average, or of SwAV's one network.
        student: the student's state dict, without wrappers.
        recipe: of the run, a base method's with its native head.
        timm_name: of the trunk; stored as ``args.arch``, with the crops' ``args.mean`` and ``args.std``.
        epoch: number of finished epochs.
        center: (K,), of DINO's and iBOT's CLS targets.
        patch_center: (K,), of iBOT's patch targets.

    Raises:
        InputError: the recipe has no published layout.
    """
    if recipe.head != "native" or recipe.objective == "kd":
        raise InputError(f"{recipe.objective} with head = {recipe.head} has no published layout: set head = native")
    # Crops are normalised as ImageNet's, whatever the method's own release does (SwAV's standard deviation differs).
    args = argparse.Namespace(arch=timm_name, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    match recipe.objective:
        case "dino" | "ibot":
            loss = {"center": center, "center2": patch_center}
            centers = {name: value[None] for name, value in loss.items() if value is not None}
            return {
                "student": {f"module.{key}": value for key, value in _backbone(student).items()},
                "teacher": _backbone(teacher),
                "epoch": epoch,
                "args": args,
                f"{recipe.objective}_loss": centers,
            }
        case "msn":
            return {
                "encoder": _msn_encoder(student),
                "target_encoder": _msn_encoder(teacher),
                "prototypes": _cpu(teacher["head.prototypes"]),
                "epoch": epoch,
                "args": args,
            }
        case _:
            # Only the first prefix: a trunk may have a part named head.
            state = {f"module.{key.partition('.')[2]}": _cpu(value) for key, value in teacher.items()}
            return {"epoch": epoch, "state_dict": state, "args": args}


def save_published(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write the checkpoint as a ``.pth`` file, atomically; it loads with ``weights_only`` and argparse.Namespace.

    Raises:
        RobxError: no space or no permission.
    """
    # Through memory: torch's own writer fails an assertion on a full disk, and stores the file's name in the file.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_bytes(path, buffer.getvalue())


def _backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO's and iBOT's names: trunk.* -> backbone.*, the mask token moves to the backbone, head.* stays."""
    renamed = {}
    for key, value in state.items():
        name = f"backbone.{key}" if key == "masked_embed" else key
        renamed[f"backbone.{name.removeprefix('trunk.')}" if name.startswith("trunk.") else name] = _cpu(value)
    return renamed


def _msn_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        if key.startswith("trunk."):
            renamed[f"module.{key.removeprefix('trunk.')}"] = _cpu(value)
        elif key.startswith("head.projection."):
            renamed[f"module.fc.{key.removeprefix('head.projection.')}"] = _cpu(value)
    return renamed


def _cpu(value: Tensor) -> Tensor:
    return value.detach().cpu()
