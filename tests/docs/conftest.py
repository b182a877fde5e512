"""A small world in which the commands of the pages run: scenes as images, tiny networks behind the usual names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import robx.distill.train
import robx.export.build
from robx.distill.recipes import Recipe, override
from robx.distill.resolve import DistillSettings, resolve_recipe
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.teachers.teacher import Teacher
from robx.export.gate import timing
from robx.images.scenes import make_scene, render
from robx.records import Bundle
from robx.runtime.bench import profiles
from robx.runtime.bench.profiles import PROFILES

SMALL = {"epochs": 1, "batch_size": 16, "crop_size": 32, "local_crops": 0, "prototypes": 8, "lr": 1e-3}
STAND_INS = dict.fromkeys(("resnet18", "mobilenetv3_large_100", "mobilenetv3_small_100"), "test_resnet")


@dataclass(frozen=True)
class World:
    """What has been run in the working directory: pytest may make another one for the rest of a module's tests."""

    commands: set[str] = field(default_factory=set)
    defined: dict[Path, dict[str, Any]] = field(default_factory=dict)  # by the Python of each page


@pytest.fixture(scope="module")  # not longer: other tests of the same process need the real networks
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A working directory with images/train, images/test and photos/, which all pages share, and the smaller settings.

    The commands are those of the pages; their networks, recipes, searches and measurements are small. Yields what
    has been run, which the tests add to.
    """
    folder = tmp_path_factory.mktemp("docs")
    for index in range(340):
        scene = make_scene(1, index)
        split = "train" if index < 310 else "test"
        places = [folder / "images" / split / str(scene.count_label), *([folder / "photos"] if index < 5 else [])]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            render(scene, size=32).save(place / f"{index}.png")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBX_CACHE", str(folder / "cache"))
        create, export = timm.create_model, robx.export.build.export
        patch.setattr(timm, "create_model", lambda name, **more: create(STAND_INS.get(name, name), **more))
        patch.setattr(robx.distill.train, "load_teacher", _teacher)
        patch.setattr(robx.distill.train, "resolve_recipe", _recipe)
        made: dict[str, Bundle] = {}  # an export that another page has made is not made again

        def export_once(settings: Any, **more: Any) -> Bundle:
            key = repr(settings)
            if key not in made:
                made[key] = export(_quick(settings), **more)
            return made[key]

        patch.setattr(robx.export.build, "export", export_once)
        patch.setattr(timing, "BLOCK_SECONDS", 0.0)
        patch.setattr(profiles, "RETRY_SECONDS", 0)  # an UNSTABLE figure is not measured again
        short = {"queries": 16, "seconds": 0.2, "processes": 1, "cool_down_seconds": 0}
        short |= {"warm_up_seconds": 0.05, "warm_up_limit": 0.1}
        for name in ("quick", "standard"):
            patch.setitem(PROFILES, name, replace(PROFILES[name], **short))
        os.chdir(folder)
        yield World()
        os.chdir(before)


def _quick(settings: Any) -> Any:
    """One int8 candidate, shipped whatever the gate says of a network with next to no training."""
    return replace(settings, candidates=1, force=settings.target.precision == "int8")


def _teacher(name: str, **settings: Any) -> Teacher:
    torch.manual_seed(0)
    return build_teacher_skeleton("timm:test_resnet", objective="msn", prototypes=8, image_size=32)


def _recipe(settings: DistillSettings) -> Recipe:
    return override(resolve_recipe(settings), SMALL)
