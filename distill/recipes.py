"""All settings of a run in one frozen dataclass, with the published recipe of each method as a preset.

    recipe = preset("dino", "vit")                     # RoB-DINO for a ViT student
    recipe = preset("dino", "cnn", base=True)          # DINO itself: the EMA of the student is the target
    recipe = override(recipe, {"epochs": 10})          # unknown keys are refused

The values of the presets are in presets.py; recipe_toml.py reads and prints recipes as TOML.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from robx.arguments import check_types
from robx.distill.presets import BASE, CNN, ROB
from robx.errors import ArtifactError, InputError, did_you_mean
from robx.image_size import Shape, parse_size, plain_size
from robx.records import from_json, to_json

Method = str  # one of METHODS
StudentKind = Literal["vit", "cnn"]
Pair = tuple[float, float]
Triple = tuple[float, float, float]

METHODS: tuple[Method, ...] = tuple(ROB)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting that the result depends on: the same recipe, data, teacher and student give the same weights.

    The text beside each key is printed by ``robx recipe``.
    """

    objective: Annotated[Method, "dino, ibot, msn, swav or kd"]
    base: Annotated[bool, "base method: targets from the student's moving average, with --teacher ema"] = False
    pairing: Annotated[Literal["same", "swapped"], "same: a student's global crop predicts the same crop"] = "same"
    teacher_temperature: Annotated[float, "softmax temperature of the targets"] = 0.07
    student_temperature: Annotated[float, "softmax temperature of the student"] = 0.1
    head: Annotated[Literal["native", "mlp"], "native: the method's own head; mlp: d -> 2048 -> K"] = "native"
    swav_prototypes: Annotated[Literal["own", "teacher"], "teacher: use the teacher's prototypes, frozen"] = "own"
    prototypes: Annotated[int, "K of a base method, and fitted to a teacher without a head"] = 1024
    fit_images: Annotated[int | None, "images that prototypes are fitted to, at most; none: 256 per prototype"] = None
    sinkhorn_iterations: Annotated[int, "0: softmax instead of Sinkhorn"] = 0
    sinkhorn_epsilon: Annotated[float, "regularisation of Sinkhorn"] = 0.03
    queue: Annotated[int, "scores kept for Sinkhorn; 0 disables"] = 0
    teacher_mean: Annotated[Triple | None, "RGB mean of the teacher's pixels (0 to 1); none: as published"] = None
    teacher_std: Annotated[Triple | None, "their standard deviation; none: as published"] = None
    teacher_size: Annotated[
        int | None, "enlarge smaller crops for the teacher to this shorter side, in pixels; none disables"
    ] = None
    teacher_crops: Annotated[int, "global crops that the teacher sees, at most; 1 halves its cost"] = 2
    prototype_weight: Annotated[float, "weight of the method's own loss; 0: the feature and stage terms alone"] = 1.0
    feature_weight: Annotated[float, "weight of a term that matches the teacher's features; 0 disables"] = 0.0
    feature_projection: Annotated[
        Literal["mlp", "linear"], "of the student's features in that term; mlp: d -> 1024 -> the teacher's width"
    ] = "mlp"
    stage_weight: Annotated[
        float, "weight of a term that matches the feature maps of the teacher's stages; 0 disables"
    ] = 0.0
    centering: Annotated[bool, "subtract a running mean from the target scores (base DINO, iBOT)"] = False
    center_momentum: Annotated[float, "momentum of that mean"] = 0.9
    me_max: Annotated[float, "weight of MSN's mean-entropy regulariser; 0 disables"] = 0.0
    patch_weight: Annotated[float, "iBOT: weight of the masked-patch loss; 0 disables"] = 1.0
    mask_ratios: Annotated[tuple[Pair, ...], "iBOT: (ratio, +/-) of masked patches, one pair drawn per crop"] = (
        (0.0, 0.0),
        (0.3, 0.2),
    )
    patch_drop: Annotated[float, "MSN: fraction of patches dropped from global crops (ViT only)"] = 0.0

    ema_momentum: Annotated[Pair, "momentum of the average at the first and the last step"] = (0.996, 1.0)
    teacher_temperature_start: Annotated[float | None, "warm-up of teacher_temperature from here"] = None
    teacher_temperature_epochs: Annotated[int, "epochs of that warm-up; 0 disables"] = 0
    freeze_last_layer_epochs: Annotated[int, "epochs during which the head's last layer is frozen"] = 0
    freeze_trunk: Annotated[bool, "train only the head, on the trunk given with --init"] = False

    drop_path: Annotated[float, "stochastic depth (ViT only)"] = 0.0
    quantize: Annotated[
        Literal["int8"] | None, "int8: simulate int8 in the trunk, with --init a trained student; none disables"
    ] = None
    student_ema: Annotated[float | None, "momentum of a weight average that is saved instead of the student"] = None

    crop_size: Annotated[int | str, 'pixels: a number, or height x width as "160x96"'] = 224
    local_crop_size: Annotated[int | str, "likewise; it does not follow crop_size"] = 96
    global_crops: Annotated[int, "per image, 1 or 2"] = 2
    local_crops: Annotated[int, "per image"] = 8
    global_scale: Annotated[Pair, "fraction of the image's area"] = (0.4, 1.0)
    local_scale: Annotated[Pair, "fraction of the image's area"] = (0.05, 0.4)
    color: Annotated[
        tuple[float, float, float, float], "jitter of brightness, contrast, saturation, hue, times color_strength"
    ] = (0.8, 0.8, 0.8, 0.2)
    color_strength: Annotated[float, "0 disables colour jitter"] = 0.5
    color_p: Annotated[float, "probability of colour jitter"] = 0.8
    gray_p: Annotated[float, "probability of grayscale"] = 0.2
    flip_p: Annotated[float, "probability of a horizontal flip"] = 0.5
    blur_p: Annotated[tuple[float, float, float], "probability for global crop 1, 2 and local crops"] = (1.0, 0.1, 0.5)
    solarize_p: Annotated[tuple[float, float, float], "likewise"] = (0.0, 0.2, 0.0)
    mixup: Annotated[float, "blend pairs of images by Beta(mixup, mixup), for teacher and student; 0 disables"] = 0.0
    augment: Annotated[
        Literal["pillow", "device"],
        "pillow: workers make the crops; device: batched on the training device; on a GPU device",
    ] = "pillow"
    decode: Annotated[
        Literal["full", "scaled"], "scaled: decode a JPEG at 1/2, 1/4 or 1/8 if that is as large as all crops need"
    ] = "full"

    optimizer: Annotated[Literal["adamw", "sgd", "larc"], "larc: SGD with layer-wise scaling"] = "adamw"
    lr: Annotated[float, "peak learning rate at a batch of lr_batch, scaled linearly to batch_size"] = 2e-3
    lr_batch: Annotated[int | None, "none: lr is not scaled"] = 1024
    warmup_lr: Annotated[float, "first learning rate, scaled like lr"] = 0.0
    final_lr: Annotated[float, "last learning rate, scaled like lr"] = 1e-5
    warmup_share: Annotated[float, "fraction of all steps"] = 0.033
    weight_decay: Annotated[float, "at the first step"] = 0.04
    weight_decay_end: Annotated[float, "at the last step (cosine)"] = 0.4
    momentum: Annotated[float, "of sgd and larc"] = 0.9
    nesterov: Annotated[bool, "of sgd"] = False
    trust: Annotated[float, "trust coefficient of larc"] = 0.001
    clip_grad: Annotated[float | None, "maximum gradient norm; 0 or none disables"] = None
    epochs: Annotated[int, "passes over the images"] = 300
    target_epochs: Annotated[int, "replay the crops and stored targets of the first N epochs; 0 disables"] = 0
    batch_size: Annotated[int, "images per step, over all processes and micro-batches"] = 1024
    accumulate: Annotated[int, "micro-batches per step (gradient accumulation)"] = 1
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], "of the forward pass (autocast); on a GPU bf16, or fp16 without bf16"
    ] = "fp32"
    tf32: Annotated[bool, "CUDA: float32 products in TF32; on by default unless precision is given as fp32"] = False
    seed: Annotated[int, "random seed"] = 0

    def __post_init__(self) -> None:
        """Refuse invalid values, by name, and those that contradict each other."""
        self._check_values()
        self._check_against_each_other()

    def _check_values(self) -> None:
        if self.objective not in METHODS:
            raise InputError(f"recipe: {_unknown_objective(self.objective)}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            numbers = parse_size(value, name=f"recipe: {name}") if name in _SIZES else (value,)
            if value is not None and not all(low <= number <= high for number in numbers):
                raise InputError(f"recipe: {name} must be between {low} and {high}, got {name} = {_shown(value)}")
        for name in ("global_scale", "local_scale"):
            first, last = getattr(self, name)
            if not 0 < first <= last <= 1:
                raise InputError(f"recipe: {name} must be a range within 0 and 1, got [{first}, {last}]")
        for name in ("blur_p", "solarize_p", "ema_momentum"):
            if not all(0 <= p <= 1 for p in getattr(self, name)):
                raise InputError(f"recipe: {name} must be between 0 and 1, got {name} = {list(getattr(self, name))}")
        if not all(0 <= limit <= 2 for limit in self.color):
            raise InputError(f"recipe: color must be between 0 and 2, got color = {list(self.color)}")
        if not self.mask_ratios or not all(
            0 <= ratio - spread <= ratio + spread <= 1 for ratio, spread in self.mask_ratios
        ):
            raise InputError(f"recipe: mask_ratios must be pairs (ratio, +/-) within 0 and 1, got {self.mask_ratios}")

    def _check_against_each_other(self) -> None:
        if self.batch_size % self.accumulate:
            raise InputError(f"recipe: batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.base and self.objective not in BASE:
            raise InputError(f"recipe: {self.objective} has no base method: give a teacher instead of --teacher ema")
        for name in ("teacher_crops", "global_crops"):
            if getattr(self, name) != 2 and self.base:
                raise InputError(f"recipe: {name} needs a teacher: a base method uses both global crops, give 2")
        if self.teacher_shape != self.crop_shape:
            if self.base:
                raise InputError("recipe: teacher_size needs a teacher, not --teacher ema: drop it")
            if self.objective == "ibot" and self.patch_weight:
                raise InputError(
                    "recipe: teacher_size gives the teacher other patches than the student: give teacher_size = none, "
                    "or patch_weight = 0"
                )
        if self.target_crops < self.global_crops and self.objective == "ibot" and self.patch_weight:
            raise InputError("recipe: teacher_crops = 1 leaves half of the masked patches without a target: give 2")
        if self.pairing == "swapped" and self.global_crops + self.local_crops < 2:
            raise InputError("recipe: swapped pairs need two crops of an image: give global_crops = 2 or local crops")
        if self.base and (self.feature_weight or self.stage_weight or self.prototype_weight != 1):
            raise InputError(
                "recipe: feature_weight, stage_weight and prototype_weight need a teacher, not --teacher ema: drop them"
            )
        if not self.feature_weight and not self.prototype_weight:
            raise InputError(
                "recipe: with prototype_weight = 0 and feature_weight = 0 no loss is left for the embedding: give "
                "feature_weight"
            )
        if self.quantize and (self.base or self.precision != "fp32"):
            needs = "a teacher: drop --teacher ema" if self.base else "fp32: give --precision fp32"
            raise InputError(f"recipe: quantize = {self.quantize} needs {needs}")
        if self.freeze_trunk and not self.base:
            raise InputError(
                "recipe: freeze_trunk needs a base method (--teacher ema): with a teacher the trunk has to be trained"
            )

    @property
    def crop_shape(self) -> Shape:
        """Height and width of a global crop, in pixels."""
        return parse_size(self.crop_size)

    @property
    def local_crop_shape(self) -> Shape:
        """Height and width of a local crop, in pixels."""
        return parse_size(self.local_crop_size)

    @property
    def teacher_shape(self) -> Shape:
        """Height and width, in pixels, at which the teacher sees a global crop; never smaller than the crop."""
        height, width = self.crop_shape
        factor = max(1.0, (self.teacher_size or 0) / min(height, width))
        return round(height * factor), round(width * factor)

    @property
    def target_crops(self) -> int:
        """Global crops that the teacher sees."""
        return min(self.teacher_crops, self.global_crops)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate at this batch size."""
        return self.lr * self._scale

    @property
    def first_lr(self) -> float:
        """The learning rate of the first step at this batch size."""
        return self.warmup_lr * self._scale

    @property
    def last_lr(self) -> float:
        """The learning rate of the last step at this batch size; never above the peak."""
        return min(self.final_lr, self.lr) * self._scale

    @property
    def _scale(self) -> float:
        return self.batch_size / self.lr_batch if self.lr_batch else 1.0


_SIZES = ("crop_size", "local_crop_size")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("teacher_temperature", 1e-3, 100),
    ("teacher_temperature_start", 1e-3, 100),
    ("teacher_temperature_epochs", 0, 100_000),
    ("target_epochs", 0, 100_000),
    ("freeze_last_layer_epochs", 0, 100_000),
    ("student_temperature", 1e-3, 100),
    ("prototypes", 2, 1_000_000),
    ("fit_images", 2, 1_000_000_000),
    ("sinkhorn_iterations", 0, 100),
    ("sinkhorn_epsilon", 1e-4, 10),
    ("queue", 0, 1_000_000),
    ("teacher_size", 16, 4096),
    ("teacher_crops", 1, 2),
    ("prototype_weight", 0, 1000),
    ("feature_weight", 0, 1000),
    ("stage_weight", 0, 1000),
    ("global_crops", 1, 2),
    ("mixup", 0, 100),
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

    `base` gives the base method itself, the baseline of RoB: targets from the student, swapped pairs, and the method's
    own measures against collapse.
    """
    if method not in ROB:
        raise InputError(_unknown_objective(method))
    values = dict(ROB[method])
    if student == "cnn":
        values |= CNN.get(method, {})
    if base:
        values |= {"base": True, "pairing": "swapped", **BASE.get(method, {})}
    return Recipe(**values)


def _unknown_objective(name: str) -> str:
    hint = did_you_mean(name, METHODS, otherwise=f"choose one of {', '.join(METHODS)}")
    return f"unknown objective {name!r}: {hint}"


def override(recipe: Recipe, values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe with some values replaced; "none" stands for None, and 0 for a clip_grad or lr_batch of None.

    Raises:
        InputError: an unknown key (the known ones are listed), or a value of the wrong type or out of range.
    """
    known = [f.name for f in dataclasses.fields(Recipe)]
    if unknown := sorted(set(values) - set(known)):
        hint = did_you_mean(str(unknown[0]), known, otherwise=f"known are {', '.join(known)}")
        raise InputError(f"{where}: unknown key {_shown(unknown[0])}: {hint}")
    given = {name: None if _is_off(name, value) else value for name, value in values.items()}
    try:
        given = _checked(given, where=where)
        return recipe_from_json(to_json(recipe) | dict(to_json(given)), where=where)
    except RecursionError:
        raise InputError(f"{where}: a value is nested too deeply: see robx recipe for examples") from None
    except InputError as error:
        raise InputError(re.sub("^recipe(?=: )", lambda _: where, str(error))) from None  # the file that says so


def _checked(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Values of the right types, by their keys; sizes are as `plain_size` writes them."""
    found: dict[str, Any] = {}
    kinds = get_type_hints(Recipe)
    for name, value in values.items():
        label, kind = f"{where}: {name}", kinds[name]
        if name in _SIZES:
            found[name] = plain_size(parse_size(value, name=label))
            continue
        try:
            found |= {name: check_types({label: kind}, {label: value})[label]}
        except InputError as error:
            off = ', or "none"' if name in _OPTIONAL else ""
            raise InputError(re.sub(r"(?=, got )", off, str(error), count=1)) from None
    return found


def recipe_from_json(values: Any, *, where: str = "recipe") -> Recipe:
    """The recipe from the plain values of ``robx.records.to_json``."""
    try:
        return from_json(Recipe, values, where=where)
    except ArtifactError as error:
        raise InputError(str(error)) from None


def _is_off(name: str, value: Any) -> bool:
    """Whether a value means None, which TOML cannot express."""
    if isinstance(value, str):
        return value == "none" and name in _OPTIONAL
    return name in ("clip_grad", "lr_batch") and isinstance(value, int | float) and value == 0


def _shown(value: Any) -> str:
    short = reprlib.Repr()
    short.maxlong = short.maxstring = 60
    return short.repr(value)


_OPTIONAL = (
    *("teacher_mean", "teacher_std", "teacher_temperature_start", "student_ema", "lr_batch", "clip_grad"),
    *("quantize", "fit_images", "teacher_size"),
)
