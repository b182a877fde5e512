from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from robx.distill.recipes import METHODS, Recipe, override, preset, read_toml, recipe_from_json
from robx.errors import InputError
from robx.records import to_json


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_every_preset_survives_json(method: str, kind: str) -> None:
    for base in (False,) if method == "kd" else (False, True):
        recipe = preset(method, kind, base=base)  # type: ignore[arg-type]
        assert recipe_from_json(to_json(recipe)) == recipe and recipe.base == base


def test_the_published_table() -> None:
    dino, ibot, msn, swav = (preset(m, "vit") for m in ("dino", "ibot", "msn", "swav"))  # type: ignore[arg-type]
    assert (dino.lr, dino.epochs, dino.weight_decay_end, dino.drop_path, dino.local_crops) == (2e-3, 300, 0.4, 0.1, 8)
    assert (ibot.lr, ibot.epochs, ibot.weight_decay_end, ibot.local_crops) == (2e-3, 100, 0.48, 10)
    assert (msn.lr, msn.warmup_lr, msn.epochs, msn.clip_grad, msn.teacher_temperature) == (1e-3, 2e-4, 150, 1.0, 0.025)
    assert (swav.optimizer, swav.lr, swav.warmup_lr, swav.batch_size, swav.trust) == ("larc", 4.8, 0.3, 4096, 0.001)
    assert [r.color_strength for r in (dino, ibot, msn, swav)] == [0.5, 0.5, 1.0, 1.0]
    assert dino.blur_p == (1.0, 0.1, 0.5) and dino.solarize_p == (0.0, 0.2, 0.0) and msn.solarize_p == (0.0, 0.0, 0.0)
    assert dino.global_scale == (0.4, 1.0) and swav.local_scale == (0.05, 0.14)
    for recipe in (dino, ibot, msn):  # no guard against collapse with a frozen teacher
        assert not recipe.centering and not recipe.sinkhorn_iterations and not recipe.me_max
        assert recipe.teacher_temperature_start is None and not recipe.freeze_last_layer_epochs
    assert swav.sinkhorn_iterations == 3 and swav.sinkhorn_epsilon == 0.03
    assert preset("dino", "cnn").optimizer == "larc" and preset("dino", "cnn").weight_decay == 1e-6


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown key 'epoch'; known are objective, .*epochs"):
        override(preset("dino", "vit"), {"epoch": 3})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": "many"}, "'many'"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"global_scale": [0.5, 0.1]}, "global_scale"),
        ({"blur_p": [2, 0, 0]}, "blur_p"),
        ({"batch_size": 10, "accumulate": 3}, "accumulate 3"),
        ({"objective": "simclr"}, "'simclr'"),
        ({"student_ema": 1.5}, "student_ema"),
        ({"ema_momentum": [0.9, 1.1]}, "ema_momentum = [0.9, 1.1]"),
        ({"teacher_temperature_start": 0.0}, "teacher_temperature_start = 0.0"),
        ({"freeze_last_layer_epochs": -1}, "freeze_last_layer_epochs = -1"),
        ({"mask_ratios": [[0.3, 0.4]]}, "mask_ratios"),
        ({"freeze_trunk": True}, "freeze_trunk is a base method's"),
        ({"color": [0.8, -0.1, 0.8, 0.2]}, "color = [0.8, -0.1, 0.8, 0.2]"),
        ({"lr": float("nan")}, "nan"),
        ({"epochs": datetime.date(2020, 1, 1)}, "2020"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, object], named: str) -> None:
    with pytest.raises(InputError) as caught:
        override(preset("dino", "vit"), values)
    assert named in str(caught.value)


def test_a_toml_file_changes_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('objective = "msn"\nepochs = 7\nglobal_scale = [0.5, 1]\n')
    recipe = override(preset("msn", "vit"), read_toml(path))
    assert recipe == Recipe(**(vars(preset("msn", "vit")) | {"epochs": 7, "global_scale": (0.5, 1.0)}))
    path.write_text("epochs = \n")
    with pytest.raises(InputError, match="not valid TOML"):
        read_toml(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_toml(tmp_path / "none.toml")
