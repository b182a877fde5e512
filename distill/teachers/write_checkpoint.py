"""Writing a pretrained network in the layout that its base method publishes, so that the zoo reads it as a teacher.

    DINO   {student, teacher, epoch, args, dino_loss}     backbone.*, head.*; `module.` before all of the student
    iBOT   the same with ibot_loss; backbone.masked_embed, head.last_layer2
    MSN    {encoder, target_encoder, prototypes, epoch, args}     module.*, module.fc.*
    SwAV   {epoch, state_dict, args}, as its training saves it: module.*, module.projection_head.*, module.prototypes.*

The teacher is the average of the student; SwAV has one network alone.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robx.distill.recipes import Recipe
from robx.distill.students.student import StudentNet
from robx.distill.targets.centering import Shaping
from robx.errors import InputError
from robx.store.files import write_bytes


def published_checkpoint(
    network: StudentNet, student: StudentNet, *, shaping: Shaping, recipe: Recipe, timm_name: str, epoch: int
) -> dict[str, Any]:
    """The checkpoint of a base method's run in its published layout.

    Args:
        network: the teacher: the average of the student, or SwAV's one network.
        student: the run's, without wrappers.
        shaping: of the run's branch; it has the centres.
        recipe: of the run, a base method's with its native head.
        timm_name: of the trunk; stored as ``args.arch``.
        epoch: how many are done.

    Raises:
        InputError: the recipe has no published layout.
    """
    if recipe.head != "native" or recipe.objective == "kd":
        raise InputError(f"{recipe.objective} with the head {recipe.head} has no published layout: use a native head")
    args = argparse.Namespace(arch=timm_name)
    mine, theirs = network.state_dict(), student.state_dict()
    match recipe.objective:
        case "dino" | "ibot":
            loss = {"center": shaping.center, "center2": shaping.patch_center}
            centers = {name: center[None] for name, center in loss.items() if center is not None}
            return {
                "student": {f"module.{key}": value for key, value in _backbone(theirs).items()},
                "teacher": _backbone(mine),
                "epoch": epoch,
                "args": args,
                f"{recipe.objective}_loss": centers,
            }
        case "msn":
            return {
                "encoder": _msn_encoder(theirs),
                "target_encoder": _msn_encoder(mine),
                "prototypes": _cpu(mine["head.prototypes"]),
                "epoch": epoch,
                "args": args,
            }
        case _:
            # One prefix of each: a trunk may have a part that is called head.
            state = {f"module.{key.partition('.')[2]}": _cpu(value) for key, value in mine.items()}
            return {"epoch": epoch, "state_dict": state, "args": args}


def save_published(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write the checkpoint as a ``.pth`` file, atomically; it loads with ``weights_only`` and argparse.Namespace.

    Raises:
        RobxError: no space or no permission.
    """
    # Through memory: torch's own writer tells a full disk by an assertion, and puts the file's name into the file.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_bytes(path, buffer.getvalue())


def _backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO's and iBOT's names: trunk.* -> backbone.*, the mask token into the backbone, head.* as it is."""
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
