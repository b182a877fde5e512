"""Every setting of a run in one frozen dataclass, with the published recipe of each method as a preset.

    recipe = preset("dino", "vit")                     # RoB-DINO for a ViT student
    recipe = preset("dino", "cnn", base=True)          # DINO itself: the EMA of the student is the target
    recipe = override(recipe, {"epochs": 10})          # unknown keys are refused
    recipe = override(recipe, read_toml(Path("mine.toml")))

The values of the presets are in presets.py.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robx.distill.presets import BASE, CNN, ROB
from robx.errors import ArtifactError, InputError
from robx.records import from_json, to_json

_MAX_RECIPE_BYTES = 1024 * 1024

Method = str  # one of METHODS
StudentKind = Literal["vit", "cnn"]
Pair = tuple[float, float]
Triple = tuple[float, float, float]

METHODS: tuple[Method, ...] = tuple(ROB)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does, whole. Two runs with the same recipe, data, teacher and student give the same weights."""

    # The objective.
    objective: Method
    base: bool = False  # the base method: the target is the student's moving average, not a teacher
    pairing: Literal["same", "swapped"] = "same"  # which teacher crop a student's global crop is matched to
    teacher_temperature: float = 0.07
    student_temperature: float = 0.1
    head: Literal["native", "mlp"] = "native"  # the method's own head, or d -> 2048 -> K
    swav_prototypes: Literal["own", "teacher"] = "own"  # the student's own, or the teacher's, frozen
    prototypes: int = 1024  # K that is fitted for a teacher without a head, and K of a base method
    sinkhorn_iterations: int = 0  # 0: a softmax
    sinkhorn_epsilon: float = 0.03
    queue: int = 0  # teacher scores kept for Sinkhorn
    teacher_mean: Triple | None = None  # of the pixels (0 to 1) that the teacher was trained with; None: as published
    teacher_std: Triple | None = None
    teacher_crops: int = 2  # global crops that the teacher sees; 1 halves its forward (RoB-SwAV's option)
    centering: bool = False
    center_momentum: float = 0.9
    me_max: float = 0.0  # weight of MSN's mean-entropy regulariser
    patch_weight: float = 1.0  # RoB-iBOT: weight of the masked-patch term beside the CLS term
    mask_ratios: tuple[Pair, ...] = ((0.0, 0.0), (0.3, 0.2))  # (ratio, +/-), one of them drawn for each crop
    patch_drop: float = 0.0  # RoB-MSN: share of a global crop's patches that a ViT student does not see

    # The base method alone.
    ema_momentum: Pair = (0.996, 1.0)  # cosine from first to last step
    teacher_temperature_start: float | None = None  # linear warm-up from here, over ...
    teacher_temperature_epochs: int = 0
    freeze_last_layer_epochs: int = 0
    freeze_trunk: bool = False  # the head alone learns, on a trunk that is given (--init): how a teacher gets its head

    # The student.
    drop_path: float = 0.0  # ViT only
    student_ema: float | None = None  # momentum of an averaged student, saved in the place of the raw one

    # The crops: a pure function of (seed, epoch, image).
    crop_size: int = 224
    local_crop_size: int = 96
    local_crops: int = 8
    global_scale: Pair = (0.4, 1.0)  # share of the image's area
    local_scale: Pair = (0.05, 0.4)
    color: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue, times ...
    color_strength: float = 0.5
    color_p: float = 0.8
    gray_p: float = 0.2
    flip_p: float = 0.5
    blur_p: tuple[float, float, float] = (1.0, 0.1, 0.5)  # global 1, global 2, local
    solarize_p: tuple[float, float, float] = (0.0, 0.2, 0.0)
    augment: Literal["pillow", "device"] = "pillow"  # crops are made by the workers, or in batches on the device

    # The optimiser.
    optimizer: Literal["adamw", "sgd", "larc"] = "adamw"
    lr: float = 2e-3  # peak, for a global batch of `lr_batch`, scaled linearly to `batch_size`
    lr_batch: int | None = 1024  # None: lr is taken as it is
    warmup_lr: float = 0.0  # scaled alike
    final_lr: float = 1e-5  # scaled alike: the cosine ends at the same share of its peak at any batch size
    warmup_share: float = 0.033  # of all steps
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    momentum: float = 0.9  # SGD
    nesterov: bool = False
    trust: float = 0.001  # LARC's trust coefficient
    clip_grad: float | None = None
    epochs: int = 300
    batch_size: int = 1024  # of all processes and accumulated micro-batches together
    accumulate: int = 1  # micro-batches an optimiser step
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        if self.objective not in METHODS:
            raise InputError(f"recipe: unknown objective {self.objective!r}: choose one of {', '.join(METHODS)}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"recipe: {name} = {value} is outside of {low} .. {high}")
        for name in ("global_scale", "local_scale"):
            first, last = getattr(self, name)
            if not 0 < first <= last <= 1:
                raise InputError(f"recipe: {name} = [{first}, {last}] is not a range within 0 .. 1")
        for name in ("blur_p", "solarize_p", "ema_momentum"):
            if not all(0 <= p <= 1 for p in getattr(self, name)):
                raise InputError(f"recipe: {name} = {list(getattr(self, name))} is outside of 0 .. 1")
        if not all(0 <= limit <= 2 for limit in self.color):
            raise InputError(f"recipe: color = {list(self.color)} is outside of 0 .. 2")
        if not self.mask_ratios or not all(
            0 <= ratio - spread <= ratio + spread <= 1 for ratio, spread in self.mask_ratios
        ):
            raise InputError(f"recipe: mask_ratios = {self.mask_ratios} are not shares (ratio, +/-) within 0 .. 1")
        if self.batch_size % self.accumulate:
            raise InputError(f"recipe: batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}")
        if self.base and self.objective not in BASE:
            raise InputError(f"recipe: {self.objective} has no base method: give a teacher instead of --teacher ema")
        if self.teacher_crops != 2 and self.base:
            raise InputError("recipe: teacher_crops is a teacher's: a base method has targets of both global crops")
        if self.teacher_crops != 2 and self.objective == "ibot" and self.patch_weight:
            raise InputError("recipe: teacher_crops = 1 leaves half the masked patches without a target: give 2")
        if self.freeze_trunk and not self.base:
            raise InputError(
                "recipe: freeze_trunk is a base method's (--teacher ema): a teacher's student has to learn"
            )

    @property
    def peak_lr(self) -> float:
        """The peak learning rate at this batch size."""
        return self.lr * self._scale

    @property
    def first_lr(self) -> float:
        """Where the warm-up starts, at this batch size."""
        return self.warmup_lr * self._scale

    @property
    def last_lr(self) -> float:
        """Where the cosine ends, at this batch size; never above the peak."""
        return min(self.final_lr, self.lr) * self._scale

    @property
    def _scale(self) -> float:
        return self.batch_size / self.lr_batch if self.lr_batch else 1.0


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("teacher_temperature", 1e-3, 100),
    ("teacher_temperature_start", 1e-3, 100),
    ("teacher_temperature_epochs", 0, 100_000),
    ("freeze_last_layer_epochs", 0, 100_000),
    ("student_temperature", 1e-3, 100),
    ("prototypes", 2, 1_000_000),
    ("sinkhorn_iterations", 0, 100),
    ("sinkhorn_epsilon", 1e-4, 10),
    ("queue", 0, 1_000_000),
    ("teacher_crops", 1, 2),
    ("center_momentum", 0, 1),
    ("me_max", 0, 100),
    ("patch_weight", 0, 100),
    ("patch_drop", 0, 0.95),
    ("drop_path", 0, 0.95),
    ("student_ema", 0, 1),
    ("crop_size", 16, 4096),
    ("local_crop_size", 16, 4096),
    ("local_crops", 0, 64),
    ("color_strength", 0, 2),
    ("color_p", 0, 1),
    ("gray_p", 0, 1),
    ("flip_p", 0, 1),
    ("lr", 0, 1000),
    ("lr_batch", 1, 1_000_000),
    ("warmup_lr", 0, 1000),
    ("final_lr", 0, 1000),
    ("warmup_share", 0, 1),
    ("weight_decay", 0, 10),
    ("weight_decay_end", 0, 10),
    ("momentum", 0, 0.9999),
    ("trust", 1e-8, 10),
    ("clip_grad", 1e-6, 1e6),
    ("epochs", 1, 100_000),
    ("batch_size", 1, 1_000_000),
    ("accumulate", 1, 100_000),
    ("seed", 0, 2**63 - 1),
)


def preset(method: Method, student: StudentKind, *, base: bool = False) -> Recipe:
    """The published recipe of a method for a ViT or a CNN student.

    `base` gives the base method itself (its EMA or itself as the target, swapped pairs, its guards against collapse):
    the baseline that RoB has to beat.
    """
    if method not in ROB:
        raise InputError(f"unknown objective {method!r}: choose one of {', '.join(METHODS)}")
    values = dict(ROB[method])
    if student == "cnn":
        values |= CNN.get(method, {})
    if base:
        values |= {"base": True, "pairing": "swapped", **BASE.get(method, {})}
    return Recipe(**values)


def override(recipe: Recipe, values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe with `values` in the place of its own.

    Raises:
        InputError: an unknown key (the known ones are listed), or a value of another type or outside of its range.
    """
    known = [f.name for f in dataclasses.fields(Recipe)]
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    return recipe_from_json(to_json(recipe) | dict(to_json(dict(values))), where=where)


def recipe_from_json(values: Any, *, where: str = "recipe") -> Recipe:
    """The recipe that ``robx.records.to_json`` made plain."""
    try:
        return from_json(Recipe, values, where=where)
    except ArtifactError as error:
        raise InputError(str(error)) from error


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a recipe file (TOML); ``override`` checks them.

    Raises:
        InputError: no such file, or not TOML.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > _MAX_RECIPE_BYTES):
            raise InputError(f"{path} is no file of at most {_MAX_RECIPE_BYTES} bytes: give a recipe in TOML")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a recipe in TOML") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML ({error})") from error
