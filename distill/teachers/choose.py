"""Which teacher a name and a file mean: the entry that says how to build it, load it and use it.

dino_vits16 ...       a published teacher of the zoo
dino, ibot, msn, swav any full checkpoint of that layout, with --teacher-weights
timm:NAME             any model of timm
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import timm

from robx.distill.objectives.build import OBJECTIVES
from robx.distill.teachers.checkpoints import NAMES, Channels
from robx.distill.teachers.trunk_specs import TimmTrunk
from robx.distill.teachers.zoo import ALIASES, FULL_CHECKPOINTS, ZOO, Method, ZooEntry
from robx.errors import InputError, did_you_mean

# Names that stand for any full checkpoint of a layout.
LAYOUT_NAMES = tuple(name for name in NAMES if name != "backbone")


def choose_teacher(
    name: str,
    *,
    weights: Path | None = None,
    objective: str | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> ZooEntry:
    """The entry of a teacher, its method the one that is used under `objective` (None: the one it has).

    Args:
        name: a name of the zoo, a layout's name (with `weights`), or ``timm:NAME``.
        weights: the user's own file.
        objective: a name of ``objectives.build.OBJECTIVES``.
        mean: of the pixels (0 to 1) that the teacher was trained with, if not the entry's.
        std: likewise.

    Raises:
        InputError: an unknown name, or a teacher that does not fit the objective; the message says what to do.
    """
    entry = _layout_entry(name, weights) if name in LAYOUT_NAMES else find_teacher(name)
    mean, std = mean or entry.mean, std or entry.std
    if not all(0 <= value <= 1 for value in mean) or not all(1e-3 <= value <= 10 for value in std):
        raise InputError(
            f"the teacher's mean {mean} must be within 0 .. 1 and its std {std} within 0.001 .. 10: "
            "give both for pixels of 0 .. 1"
        )
    return replace(entry, method=_method(entry, objective), mean=mean, std=std)


def find_teacher(name: str) -> ZooEntry:
    """The entry of a zoo name, or one made for ``timm:NAME``.

    Raises:
        InputError: unknown; the message offers the nearest names.
    """
    if name.startswith("timm:"):
        return _timm_entry(name)
    name = ALIASES.get(name, name)
    if name in ZOO:
        return ZOO[name]
    if timm.is_model(name):
        raise InputError(f"unknown teacher {name!r}: did you mean timm:{name}?")
    hint = did_you_mean(name, ZOO, otherwise="robx teachers lists them; timm:NAME takes any model of timm")
    raise InputError(f"unknown teacher {name!r}: {hint}")


def default_objective(name: str) -> str:
    """The method that a teacher was pretrained with; msn for one whose prototypes are fitted."""
    method = name if name in LAYOUT_NAMES else find_teacher(name).method
    return "msn" if method == "headless" else method


def takes_prototypes(name: str, objective: str) -> bool:
    """Whether prototypes are fitted to a teacher: it was published without a head, and the loss needs prototypes.

    Raises:
        InputError: an unknown name.
    """
    headless = name not in LAYOUT_NAMES and find_teacher(name).method == "headless"
    return headless and OBJECTIVES[objective].traits.teacher != "classifier"


def with_head(entry: ZooEntry) -> ZooEntry | None:
    """The published full checkpoint of which `entry` is only the backbone; None if there is none."""
    name = entry.trunk.name if isinstance(entry.trunk, TimmTrunk) else ""
    return ZOO[FULL_CHECKPOINTS[name]] if name in FULL_CHECKPOINTS else None


def _layout_entry(name: str, weights: Path | None) -> ZooEntry:
    """An entry for any file of the layout `name`; its architecture is read from the file."""
    published = [entry for entry in ZOO.values() if entry.method == name]
    if weights is None:
        names = ", ".join(entry.name for entry in published)
        raise InputError(f"--teacher {name} needs a checkpoint: give --teacher-weights FILE, or use one of {names}")
    first = published[0]  # all of a method have one licence and one normalisation
    return ZooEntry(name, first.method, TimmTrunk(""), None, 0, first.licence, mean=first.mean, std=first.std)


def licence(entry: ZooEntry, *, weights: Path | None, sha256: str) -> str:
    """The licence of the weights: the published one only for the published file, as a user's own file may be any."""
    if weights is None or (entry.sha256 and sha256 == entry.sha256):
        return entry.licence
    return f"unknown (own file; the weights published as {entry.name} are under {entry.licence})"


def _timm_entry(name: str) -> ZooEntry:
    timm_name = name.removeprefix("timm:")
    if not timm.is_model(timm_name):
        base, others = timm_name.partition(".")[0], "timm.list_models() lists them"
        hint = did_you_mean(base, timm.list_models(), otherwise=others, prefix="timm:")
        raise InputError(f"unknown teacher {name!r}: {hint}")
    try:
        config = timm.models.get_pretrained_cfg(timm_name)
    except RuntimeError:  # the model has no such tag
        config = None
    if config is None:
        tags = timm.list_pretrained(timm_name.partition(".")[0] + "*")[:3]
        raise InputError(f"unknown teacher {name!r}: timm has {', '.join(tags) or 'no weights of that name'}")
    entry = ZooEntry(name, "headless", TimmTrunk(timm_name), None, 0, config.license or "unknown")
    (r, g, b), (sr, sg, sb) = config.mean, config.std
    return replace(entry, mean=(r, g, b), std=(sr, sg, sb))


def _method(entry: ZooEntry, objective: str | None) -> Method:
    """What the teacher provides under `objective`: its own method's scores, fitted prototypes, or class logits."""
    if objective is None:
        return entry.method
    if objective not in OBJECTIVES:
        hint = did_you_mean(objective, OBJECTIVES, otherwise=f"choose one of {', '.join(OBJECTIVES)}")
        raise InputError(f"unknown objective {objective!r}: {hint}")
    wanted = OBJECTIVES[objective].traits
    headless = entry.method == "headless"
    if wanted.teacher == "classifier":
        if not headless:
            raise InputError(
                f"teacher {entry.name} has no classifier, which --objective {objective} needs: use timm:NAME"
            )
        return "classifier"
    if headless and wanted.teacher == "own head":
        if full := with_head(entry):
            raise InputError(
                f"teacher {entry.name} is only the backbone, and {wanted.title}'s loss needs the head that it was "
                f"pretrained with: use --teacher {full.name} --objective {full.method} ({full.file})"
            )
        raise InputError(
            f"teacher {entry.name} was published without a head, and {wanted.title}'s loss needs the one that it was "
            "pretrained with: use --objective msn or swav, whose prototypes can be fitted"
        )
    if not headless and objective != entry.method:
        raise InputError(
            f"teacher {entry.name} has the prototypes of {NAMES[entry.method]}, not of {wanted.title}: "
            f"use --objective {entry.method}, or fit prototypes to a timm model (--teacher timm:NAME)"
        )
    return entry.method
