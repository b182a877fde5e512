"""A whole run in a second or two: a tiny teacher with random weights, a tiny student, scenes of 32 pixels.

As a script: python tiny.py DATA OUT [key=value of the recipe ...], with the options in the environment as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from robx.distill.recipes import Recipe, override, preset
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.teachers.teacher import Teacher
from robx.distill.train import train
from robx.distill.training.run import Options, RunSpec
from robx.errors import RobxError
from robx.images.sources import ImageSource, open_source

VALUES: dict[str, Any] = {
    "crop_size": 32,
    "local_crop_size": 16,
    "local_crops": 1,
    "batch_size": 8,
    "epochs": 1,
    "head": "mlp",
    "prototypes": 12,
    "drop_path": 0.1,
    "optimizer": "adamw",
    "lr": 1e-3,
    "lr_batch": None,
}


def tiny_recipe(**values: Any) -> Recipe:
    kind, base = values.pop("kind", "vit"), values.pop("base", False)
    method = values.pop("objective", "msn")
    return override(preset(method, kind, base=base), VALUES | values)


def tiny_teacher() -> Teacher:
    torch.manual_seed(11)
    return build_teacher_skeleton("timm:test_resnet", objective="msn", prototypes=12, image_size=32)


def tiny_run(
    data: ImageSource, out: Path, *, students: Sequence[str] = ("test_vit",), recipe: Recipe | None = None, **more: Any
) -> list[Path]:
    recipe = recipe or tiny_recipe()
    options = Options(**({"measure": False, "log_every": 1, "device": "cpu"} | more.pop("options", {})))
    call = {name: more.pop(name) for name in ("progress", "say", "processes") if name in more}
    if not recipe.base and "targets" not in more:
        more.setdefault("teacher", tiny_teacher())
    spec = RunSpec(recipe=recipe, students=students, source=data, out=out, options=options, **more)
    return train(spec, **call)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def main() -> None:
    torch.set_num_threads(1)
    data, out, *values = sys.argv[1:]
    settings = dict(value.split("=", 1) for value in values)
    recipe = tiny_recipe(**{key: json.loads(value) for key, value in settings.items()})
    options = json.loads(os.environ.get("TINY_OPTIONS", "{}"))

    def progress(done: int, total: int, note: str) -> None:
        print(done, flush=True)

    try:
        tiny_run(open_source(Path(data)), Path(out), recipe=recipe, options=options, progress=progress)
    except RobxError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
