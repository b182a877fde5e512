"""Targets on disk: one pass of the teacher, then any number of students and runs without it.

A folder of targets holds

    targets.json       TargetsInfo: K, k, the images, and everything that determines the global crops
    epoch-00000.npy    one row per image of the source, in the source's order (NumPy format 2.0, memory-mapped):
                         columns  uint16 or int32 (crops, k)   the k most probable prototypes, most probable first
                         probs    float16 or float32 (crops, k)
                         tail     float32 (crops,)             the mass of the other K - k, spread evenly when read
    epoch-00000.json   written when the epoch is complete; without it the table is not read

A row is addressed by (epoch, index), so the result does not depend on the order or number of processes that wrote it,
and writing a row twice changes nothing. The row of an image that was in no batch is all zero. Crops are not stored:
they are a function of (seed, epoch, index). A run with `target_epochs` N replays the crops of N epochs, so that N
tables serve any number of epochs: 10 epochs of 1.28 million images at k = 64 take 6.7 GB. Source of the sparse form:
"marginal smoothing" of FKD, arXiv 2112.01528.

Q crops of a row   B batch   K prototypes   k kept
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robx.distill.batches.crops import needed_side
from robx.distill.batches.views import Targets, Views
from robx.distill.recipes import Recipe
from robx.errors import ArtifactError, InputError, first_line
from robx.records import from_json, to_json
from robx.store.files import read_json

# Recipe keys that determine the teacher's input and output. Local crops and the student's settings may differ.
_DECIDING = (
    *("objective", "seed", "crop_size", "global_scale", "color", "color_strength", "color_p", "gray_p", "flip_p"),
    *("teacher_temperature", "sinkhorn_iterations", "sinkhorn_epsilon", "queue", "centering"),
)
_MAX_PROTOTYPES = 1_000_000  # of a recipe
_WARM_UP = ("teacher_temperature_start", "teacher_temperature_epochs")


@dataclass(frozen=True, kw_only=True)
class TargetsInfo:
    """The contents of a folder of targets; it fits a run if all but `k` and the types is equal."""

    prototypes: int  # K
    images: int  # rows of a table: the length of the source
    data_fingerprint: str
    teacher_sha256: str
    decided_by: dict[str, Any]  # the recipe settings that the targets depend on
    crops: int = 2
    k: int = 64
    dtype: Literal["float16", "float32"] = "float16"
    columns: Literal["int32", "uint16"] = "int32"  # of the prototypes' numbers
    schema: int = 1

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        prototypes: int,
        images: int,
        data_fingerprint: str,
        teacher_sha256: str,
        k: int = 64,
        dtype: Literal["float16", "float32"] = "float16",
    ) -> TargetsInfo:
        """The info of a run of `recipe`: what it writes, or needs."""
        values = to_json(recipe)
        decided_by = {name: values[name] for name in _DECIDING}
        # Only the global crops' blur and solarize.
        decided_by |= {name: values[name][:2] for name in ("blur_p", "solarize_p")}
        if recipe.augment != "pillow":  # folders of before this key hold Pillow's crops
            decided_by["augment"] = values["augment"]
        if recipe.decode != "full":  # likewise
            decided_by["decode"] = values["decode"]
        if recipe.augment != "pillow" or recipe.decode != "full":  # large images are reduced as far as all crops allow
            decided_by["needed_side"] = needed_side(recipe)
        if recipe.teacher_shape != recipe.crop_shape:
            decided_by["teacher_size"] = values["teacher_size"]
        if recipe.centering:
            decided_by["center_momentum"] = values["center_momentum"]
        decided_by |= {name: values[name] for name in ("teacher_mean", "teacher_std") if values[name] is not None}
        if recipe.teacher_temperature_start is not None:
            decided_by |= {name: values[name] for name in _WARM_UP}
        return cls(
            prototypes=prototypes,
            images=images,
            data_fingerprint=data_fingerprint,
            teacher_sha256=teacher_sha256,
            decided_by=decided_by,
            crops=recipe.target_crops,
            k=min(k, prototypes),
            dtype=dtype,
            columns="uint16" if prototypes <= 1 << 16 else "int32",
        )

    @property
    def row(self) -> np.dtype[Any]:
        """The record of one image."""
        probs = "<f2" if self.dtype == "float16" else "<f4"
        columns = "<u2" if self.columns == "uint16" else "<i4"
        return np.dtype(
            [
                ("columns", columns, (self.crops, self.k)),
                ("probs", probs, (self.crops, self.k)),
                ("tail", "<f4", (self.crops,)),
            ]
        )


class StoredBranch:
    """Reads the targets that a TargetWriter wrote; needs no teacher."""

    def __init__(self, folder: Path, *, expect: TargetsInfo | None = None) -> None:
        """Open `folder`; with `expect`, refuse targets made from other crops, images or another teacher.

        Raises:
            ArtifactError: no targets there, or damaged ones.
            InputError: they differ from `expect`; the message names the difference.
        """
        self.folder, self.info = folder, read_info(folder)
        if expect is not None:
            require_same(self.info, expect, folder=folder, every=False)
        self._epoch = -1
        self._rows: NDArray[Any] = np.empty(0, dtype=self.info.row)

    @property
    def epochs(self) -> list[int]:
        """The complete epochs."""
        names = (path.stem.removeprefix("epoch-") for path in self.folder.glob("epoch-*.json"))
        return sorted(int(name) for name in names if name.isdecimal())

    def targets(self, views: Views) -> Targets:
        """The sparse targets of a batch, on the device of its crops.

        Raises:
            ArtifactError: the epoch or an image of it is missing or damaged.
        """
        if views.epoch != self._epoch:
            self._rows, self._epoch = self._open(views.epoch), views.epoch
        index = views.index.cpu().numpy()
        if index.size and (index.min() < 0 or index.max() >= len(self._rows)):
            raise ArtifactError(
                f"{self.folder} has targets of {len(self._rows)} images, none of {index.max()}: store them again"
            )
        targets, mass = unpack(self._rows[index])
        if (bad := ~(mass.sub(1).abs() < 0.02).all(dim=0)).any():
            raise ArtifactError(
                f"{table_path(self.folder, self._epoch)} has no valid targets of image {index[bad.numpy()][0]}: "
                "store them again"
            )
        if targets.columns is not None and (targets.columns.min() < 0 or targets.columns.max() >= self.info.prototypes):
            raise ArtifactError(f"{table_path(self.folder, self._epoch)} is damaged: store it again")
        return _to(targets, views.globals.device)

    def update(self, step: int, student: nn.Module) -> None:
        """Stored targets do not follow the student."""

    def state_dict(self) -> dict[str, Any]:
        """Stored targets have no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stored targets have no state."""

    def _open(self, epoch: int) -> NDArray[Any]:
        path = table_path(self.folder, epoch)
        if not path.with_suffix(".json").is_file():
            have = ", ".join(map(str, self.epochs)) or "none"
            raise ArtifactError(f"{self.folder} has no targets of epoch {epoch} (complete: {have}): store more epochs")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing or not a regular file: store it again")
        try:
            rows: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy raises OSError, ValueError, EOFError, TokenError, ... for a damaged header
            raise ArtifactError(f"{path} is damaged ({first_line(error)}): store it again") from error
        if not isinstance(rows, np.ndarray) or rows.dtype != self.info.row or rows.shape != (self.info.images,):
            raise ArtifactError(f"{path} does not match targets.json: store it again")
        table: NDArray[Any] = rows
        return table


def pack(targets: Targets, info: TargetsInfo) -> NDArray[Any]:
    """Targets of Q crops as B rows of ``info.row``: the k most probable columns and the mass of the others."""
    probs, columns = targets.probs.detach().float(), targets.columns
    top, at = probs.topk(min(info.k, probs.shape[2]), dim=-1)
    chosen = at if columns is None else columns.gather(2, at)
    rows = np.zeros(probs.shape[1], dtype=info.row)
    if (len(probs), top.shape[2]) != rows["probs"].shape[1:]:
        raise InputError(
            f"targets {tuple(top.shape)} do not fit {info.crops} crops x {info.k} columns: store them in another folder"
        )
    rows["columns"] = chosen.transpose(0, 1).cpu().numpy()
    rows["probs"] = top.transpose(0, 1).cpu().numpy()
    rows["tail"] = (1 - top.sum(dim=-1)).clamp(min=0).transpose(0, 1).cpu().numpy()
    return rows


def unpack(rows: NDArray[Any]) -> tuple[Targets, Tensor]:
    """B rows as sparse targets (Q, B, k) normalised to mass 1, and their stored mass (Q, B), 1 up to rounding."""
    probs = torch.from_numpy(rows["probs"].astype(np.float32)).transpose(0, 1)
    columns = torch.from_numpy(rows["columns"].astype(np.int64)).transpose(0, 1)
    tail = torch.from_numpy(np.ascontiguousarray(rows["tail"])).transpose(0, 1)
    mass = probs.sum(dim=-1) + tail
    safe = mass.clamp(min=1e-6)
    return Targets(probs=probs / safe[..., None], columns=columns, tail=tail / safe), mass


def read_info(folder: Path) -> TargetsInfo:
    """The TargetsInfo of `folder`.

    Raises:
        ArtifactError: no targets there, damaged ones, or written by a newer robx.
    """
    path = folder / "targets.json"
    info = from_json(TargetsInfo, read_json(path), where=str(path))
    limits = {"prototypes": (1, _MAX_PROTOTYPES), "k": (1, info.prototypes), "crops": (1, 2), "images": (1, 2**31)}
    for name, (low, high) in limits.items():
        if not low <= (value := getattr(info, name)) <= high:
            raise ArtifactError(f"{path}: {name} = {value} is outside of {low} .. {high}: store the targets again")
    return info


def require_same(have: TargetsInfo, want: TargetsInfo, *, folder: Path, every: bool) -> None:
    """Raise InputError, naming the difference, unless `have` equals `want` (including k and the types if `every`)."""
    ignored = () if every else ("k", "dtype", "columns")
    for field in dataclasses.fields(TargetsInfo):
        ours, theirs = getattr(have, field.name), getattr(want, field.name)
        if field.name in ignored or to_json(ours) == to_json(theirs):
            continue
        if field.name == "decided_by":
            differ = [key for key in theirs | ours if ours.get(key) != theirs.get(key)]
            what = ", ".join(f"{key} = {ours.get(key)}, not {theirs.get(key)}" for key in differ)
        else:
            what = f"{field.name} = {ours}, not {theirs}"
        raise InputError(
            f"{folder} holds targets of another run ({what}): choose another folder, or use that run's settings"
        )


def table_path(folder: Path, epoch: int) -> Path:
    """The table file of one epoch."""
    return folder / f"epoch-{epoch:05d}.npy"


def _to(targets: Targets, device: torch.device) -> Targets:
    if device.type == "cpu":
        return targets
    columns, tail = targets.columns, targets.tail
    return Targets(
        probs=_send(targets.probs, device),
        columns=None if columns is None else _send(columns, device),
        tail=None if tail is None else _send(tail, device),
    )


def _send(values: Tensor, device: torch.device) -> Tensor:
    """On the device, by a copy that the host does not wait for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
