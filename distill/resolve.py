"""From what the user asks for to a run's settings: the preset, overridden by the recipe file, then by the options."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from robx.arguments import argument_hint, check_types
from robx.distill.presets import NAMED, TINY
from robx.distill.recipe_toml import read_recipe
from robx.distill.recipes import METHODS, Recipe, StudentKind, override, preset
from robx.distill.targets.stored import read_info
from robx.distill.teachers.choose import default_objective, takes_prototypes
from robx.distill.training.compute import KEYS, decide, facts_of
from robx.distill.training.run import Options
from robx.errors import InputError, RobxError, did_you_mean
from robx.store.files import read_json
from robx.store.written import RECORD
from robx.trunk import has_batch_norm


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What the user asks for: the options of ``robx distill`` and the arguments of ``robx.api.distill``."""

    students: tuple[str, ...]  # timm names; several share one teacher
    data: Path  # images: a folder, tar shards, IDX or CIFAR arrays
    image_member: str | None = None  # which image of a tar sample to read when it has several ("rgb.jpg")
    out: Path | None = None  # the run's folder; None is enough for an estimate
    teacher: str | None = None  # a name of `robx teachers`, timm:NAME, or "ema" for the base method
    teacher_weights: Path | None = None  # the teacher's checkpoint; None downloads it
    targets: Path | None = None  # stored targets used instead of a teacher
    objective: str | None = None  # None: the method that pretrained the teacher, or msn
    init: Path | None = None  # weights to start from: a run, a file, or Path("pretrained") for timm's; None: random
    recipe: Path | None = None  # "quick", "paper", or a TOML file with keys of Recipe
    store_targets: Path | None = None  # where to write the targets of this run
    cache: Path | None = None  # downloads and fitted prototypes; None: $ROBX_CACHE or ~/.cache/robx
    overrides: Mapping[str, Any] = field(default_factory=dict)  # keys of Recipe; None means not given
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        """Check what the settings say of each other.

        Raises:
            InputError: no student, no unambiguous source of targets, or a folder to write to among the images.
        """
        if not self.students:
            raise InputError("--student NAME is missing: see robx distill --help")
        for option, folder in (("--out", self.out), ("--store-targets", self.store_targets)):
            if folder is not None and self.data.is_dir() and _holds_images(folder, self.data):
                raise InputError(f"{option} {folder} is a folder of the images of --data {self.data}: give another one")
        if self.base and (self.teacher_weights or self.targets):
            raise InputError(
                "--teacher ema is the base method and has no teacher: drop --teacher-weights and --targets"
            )
        if (self.teacher is None) == (self.targets is None):
            raise InputError("give one of --teacher NAME (see robx teachers; ema is the base method) and --targets DIR")
        if self.targets is not None and self.teacher_weights is not None:
            raise InputError("--targets takes the place of a teacher: drop --teacher-weights")
        if self.options.stored_k != Options.stored_k and self.store_targets is None:
            raise InputError("--store-k is about the targets that are written: give --store-targets DIR too")

    @property
    def base(self) -> bool:
        """Whether this is the base method, which learns from a moving average of the student."""
        return self.teacher == "ema"

    @classmethod
    def of(cls, **values: Any) -> DistillSettings:
        """Settings from one flat set of names: fields of this class, of Options, and keys of Recipe.

        A path may be a string, `student` one name or several, and None always means not given.

        Raises:
            InputError: an unknown setting, one that is missing, or settings that contradict each other.
        """
        if unknown := [name for name in values if name not in _OWN | _OPTIONS | _KEYS | {"student"}]:
            known = sorted(_OWN | _OPTIONS | _KEYS | {"student"})
            hint = argument_hint(
                unknown[0], known, otherwise="see help(robx.api.distill), and robx recipe for its keys"
            )
            if unknown[0] == "like":
                hint = 'it is a line of a recipe file: give recipe="quick"'
            raise InputError(f"distill() has no argument {unknown[0]!r}: {hint}")
        values = {name: value for name, value in values.items() if value is not None}
        names = values.pop("student", ())
        students = (names,) if isinstance(names, str) else tuple(names)
        if "data" not in values:
            raise InputError(f"--{'data DIR' if students else 'student NAME'} is missing: see robx distill --help")
        own = {name: values.pop(name) for name in _OWN & set(values)}
        paths = {name: Path(value) for name, value in own.items() if name in _PATHS}
        options = check_types(get_type_hints(Options), {name: values.pop(name) for name in _OPTIONS & set(values)})
        options.setdefault("workers", decide(facts_of(options.get("device")), {}).workers)
        return cls(students=students, **own | paths, options=Options(**options), overrides=values)


def _holds_images(folder: Path, data: Path) -> bool:
    """Whether `folder` is `data` or exists inside it without being robx's; a new folder inside it is harmless."""
    ours = (RECORD, "recipe.json", "targets.json")
    inside = folder.is_dir() and folder.resolve().is_relative_to(data.resolve())
    return inside and (folder.resolve() == data.resolve() or not any((folder / name).exists() for name in ours))


_PATHS = {"data", "out", "teacher_weights", "targets", "init", "recipe", "store_targets", "cache"}
_OWN = {"teacher", "objective", "image_member"} | _PATHS
_OPTIONS = {f.name for f in dataclasses.fields(Options)}
_KEYS = {f.name for f in dataclasses.fields(Recipe)}


def resolve_recipe(settings: DistillSettings) -> Recipe:
    """The preset of the objective and the first student's kind, overridden by the recipe file, then by the options.

    An ``lr`` among the options is used as it is, at any batch size, unless they also have an ``lr_batch``.

    Raises:
        InputError: an unknown name or key, or values that contradict each other.
        ArtifactError: the stored targets are missing or damaged.
    """
    file, student = settings.recipe, settings.students[0]
    name, values = recipe_values(file, student_kind(student)) if file else ("paper", {})
    _require_match(name, settings)
    given = {name: value for name, value in settings.overrides.items() if value is not None}
    base = (values | given).get("base", settings.base)
    if bool(base) != settings.base:
        raise InputError(f"{file or 'recipe'}: base = {str(base).lower()} contradicts --teacher {settings.teacher}")
    check_types({f"{file}: objective": str}, {f"{file}: objective": values.get("objective", "")})
    method: Any = settings.objective or values.get("objective")
    if method is None and settings.targets is not None:
        method = read_info(settings.targets).decided_by.get("objective")
    recipe = student_preset(method or _default_objective(settings.teacher), student, base=settings.base)
    recipe = override(recipe, values | {"objective": recipe.objective}, where=str(file or "recipe"))
    if isinstance(lr := given.get("lr"), int | float):  # the first and the last rate keep their ratio to the peak
        first, last = (min(1.0, rate / recipe.lr) if recipe.lr else 0.0 for rate in (recipe.warmup_lr, recipe.final_lr))
        given = {"lr_batch": None, "warmup_lr": first * lr, "final_lr": last * lr} | given
    given |= _decided_by_device(settings, values | given, quick=name == "quick")
    try:
        recipe = override(recipe, given)
    except InputError as error:
        raise InputError(_naming_options(str(error), settings.overrides)) from None
    if not recipe.prototype_weight and recipe.local_crops:  # they are scored against prototypes alone
        recipe = override(recipe, {"local_crops": 0})
    if recipe.quantize is not None and settings.init is None:
        raise InputError("--quantize starts from a trained student: give --init RUN, a finished run of this student")
    if settings.store_targets is not None and not recipe.prototype_weight:
        raise InputError(
            "--store-targets stores the scores of prototypes, which this recipe does not use (prototype_weight = 0): "
            "drop the option, or give --recipe paper"
        )
    return recipe


def recipe_values(recipe: Path, kind: StudentKind) -> tuple[str, dict[str, Any]]:
    """The name and the keys, for a `kind` of student, of a recipe given by name, "quick" or "paper", or as a file.

    A file may start from a named recipe with a line ``like = "quick"``; its own keys then win.

    Raises:
        InputError: the file is missing or is not TOML, or is like an unknown recipe.
    """
    given = str(recipe)
    if given in NAMED:
        return given, dict(NAMED[given][kind])
    try:
        values = read_recipe(recipe)
    except InputError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        hint = did_you_mean(given, NAMED, otherwise=f"give {', '.join(NAMED)}, or a file in TOML (see robx recipe)")
        if given in METHODS:
            hint = f"give --objective {given}, whose published recipe is the default"
        raise InputError(f"--recipe {recipe} is neither a recipe's name nor a file: {hint}") from None
    name = values.pop("like", "paper")
    if not isinstance(name, str) or name not in NAMED:
        hint = did_you_mean(str(name), NAMED, otherwise=f"give one of {', '.join(NAMED)}")
        raise InputError(f"{recipe}: like = {name!r} is not a recipe: {hint}")
    return name, NAMED[name][kind] | values


def _require_match(name: str, settings: DistillSettings) -> None:
    """Refuse a named recipe with a target branch that it was not made for."""
    if name == "quick" and (settings.base or settings.targets is not None):
        given = "--targets DIR" if settings.targets is not None else "--teacher ema"
        raise InputError(f"the recipe {name} needs a teacher's features, which {given} lacks: give --teacher NAME")


def _naming_options(message: str, overrides: Mapping[str, Any]) -> str:
    """A message about a recipe key that the user gave as an option, with the option's name."""
    for name in _RECIPE_OPTIONS & {name for name, value in overrides.items() if value is not None}:
        message = re.sub(rf"^recipe: {name}\b", f"--{name.replace('_', '-')}", message)
    return message


# Recipe keys that are options of ``robx distill``.
_RECIPE_OPTIONS = (
    {"epochs", "batch_size", "lr", "crop_size", "local_crop_size", "local_crops", "prototypes", "seed", "precision"}
    | {"quantize", "accumulate", "target_epochs", "teacher_mean", "teacher_std"}
)  # fmt: skip


def student_preset(method: str, student: str, *, base: bool = False) -> Recipe:
    """The published recipe of a method for a student, by its timm name.

    Raises:
        InputError: an unknown method or student.
    """
    kind = student_kind(student)
    recipe = preset(method, kind, base=base)
    if kind == "vit" and "_tiny_" in student:
        recipe = override(recipe, TINY.get(recipe.objective, {}))
    return recipe


def student_kind(name: str) -> StudentKind:
    """Which recipe a timm name takes: "cnn" for networks with BatchNorm, "vit" for those without.

    Raises:
        InputError: timm has no model of that name.
    """
    return "cnn" if has_batch_norm(name) else "vit"


def mixed_kinds(settings: DistillSettings, recipe: Recipe) -> str:
    """A warning if students that need different recipes share one; empty otherwise."""
    first, *others = settings.students
    kind = student_kind(first) if others else None
    other = next((name for name in others if student_kind(name) != kind), None)
    if other is None:
        return ""
    alone = resolve_recipe(dataclasses.replace(settings, students=(other,)))
    changed = [key.name for key in dataclasses.fields(Recipe) if getattr(alone, key.name) != getattr(recipe, key.name)]
    if not changed:
        return ""
    more = [] if {"optimizer", "lr", "weight_decay"} & set(changed) else changed
    shared, own = (
        ", ".join(
            [f"{each.optimizer}, lr {each.lr:g}, weight decay {each.weight_decay:g}"]
            + [f"{key} {getattr(each, key)}" for key in more]
        )
        for each in (recipe, alone)
    )
    return (
        f"{other} is trained with the recipe of {first} ({shared}), and would have another one in a run of its own "
        f"({own}): use separate runs, or --recipe FILE for both"
    )


def unused_options(settings: DistillSettings, recipe: Recipe) -> list[str]:
    """A warning for each option of the recipe that nothing in the run reads; a file may be a whole recipe.

    Raises:
        InputError: an unknown teacher.
        ArtifactError: the stored targets are missing or damaged.
    """
    given, found = {name for name, value in settings.overrides.items() if value is not None}, list[str]()
    if settings.base and given & {"teacher_mean", "teacher_std"}:
        found.append("--teacher-mean and --teacher-std are not used: --teacher ema has no teacher")
    if "local_crop_size" in given and not recipe.local_crops:
        found.append("--local-crop-size is not used: there are no local crops (--local-crops)")
    if not recipe.prototype_weight:
        unused = {"--objective": settings.objective, "--prototypes": settings.overrides.get("prototypes")}
        unused["--local-crops"] = settings.overrides.get("local_crops") or None
        if settings.recipe is not None and str(settings.recipe) not in NAMED:
            unused[f"{settings.recipe}: local_crops"] = read_recipe(settings.recipe).get("local_crops") or None
        found += [
            f"{option} {value} is not used: the recipe has prototype_weight = 0, and so no loss of prototypes"
            for option, value in unused.items()
            if value is not None
        ]
        return found
    if "prototypes" not in given or settings.base:
        return found
    if settings.targets is not None:
        if (stored := read_info(settings.targets).prototypes) != recipe.prototypes:
            found.append(f"--prototypes {recipe.prototypes} is not used: the stored targets have {stored}")
    elif settings.teacher is not None and not takes_prototypes(settings.teacher, recipe.objective):
        outputs = "classes" if recipe.objective == "kd" else "prototypes of its own"
        found.append(f"--prototypes {recipe.prototypes} is not used: teacher {settings.teacher} has {outputs}")
    return found


def odd_precision(settings: DistillSettings, recipe: Recipe) -> list[str]:
    """A warning where int8 does not keep the precision of the run to resume, and for fp16 on a CPU."""
    facts, found = facts_of(settings.options.device), list[str]()
    earlier = _inherited(settings).get("precision", recipe.precision)
    if recipe.quantize is not None and settings.overrides.get("precision") is None and earlier != recipe.precision:
        found.append(
            f"quantize {recipe.quantize} is simulated in {recipe.precision}; the run in {settings.out} used {earlier}"
        )
    if facts.kind == "cpu" and recipe.precision == "fp16":
        faster = "bf16" if facts.bf16 else "fp32"
        found.append(f"fp16 is several times slower than {faster} on this CPU: give --precision {faster}")
    return found


def _decided_by_device(settings: DistillSettings, chosen: Mapping[str, Any], *, quick: bool) -> dict[str, Any]:
    """Recipe keys that the user left open: as in the run to resume or the stored targets, else by the device."""
    known = _inherited(settings)
    if chosen.get("quantize", "none") != "none":
        known["precision"] = "fp32"  # in which alone int8 is simulated
    known |= {key: chosen[key] for key in KEYS if key in chosen}
    compute = decide(facts_of(settings.options.device), known, quick=quick)
    return {key: getattr(compute, key) for key in KEYS if key not in chosen}


def _inherited(settings: DistillSettings) -> dict[str, Any]:
    """What the run in ``--out`` and the stored targets were made with; keys that they lack had the recipe's default."""
    found: dict[str, Any] = {}
    earlier = settings.out / "recipe.json" if settings.out is not None else None
    if earlier is not None and earlier.is_file() and not settings.options.fresh:
        with contextlib.suppress(RobxError, AttributeError, KeyError, TypeError):
            recipe = read_json(earlier)["recipe"]
            found = {key: recipe.get(key, _DEFAULTS[key]) for key in KEYS}
    if settings.targets is not None:
        decided_by = read_info(settings.targets).decided_by
        found |= {key: str(decided_by.get(key, _DEFAULTS[key])) for key in ("augment", "decode")}
    return found


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Recipe) if f.name in KEYS}


def _default_objective(teacher: str | None) -> Any:
    """The method that pretrained the teacher; msn for a teacher without a head; dino for ema."""
    if teacher is None or teacher == "ema":
        return "dino"
    return default_objective(teacher)
