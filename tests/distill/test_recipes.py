from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import get_type_hints

import pytest

from robx.arguments import is_enumerated
from robx.distill.recipe_toml import read_recipe, to_toml
from robx.distill.recipes import METHODS, Method, Recipe, StudentKind, override, preset, recipe_from_json
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


# arXiv 2301.09451's settings, line by line: what differs between the methods, then what they share.
TABLE: dict[str, tuple[object, object, object, object]] = {
    "objective": ("dino", "ibot", "msn", "swav"),
    "batch_size": (1024, 1024, 1024, 4096),
    "lr_batch": (1024, 1024, 1024, 4096),
    "optimizer": ("adamw", "adamw", "adamw", "larc"),
    "lr": (2e-3, 2e-3, 1e-3, 4.8),
    "warmup_lr": (1e-5, 1e-5, 2e-4, 0.3),
    "warmup_share": (0.033, 0.1, 0.1, 0.1),
    "final_lr": (1e-5, 1e-5, 1e-5, 4.8e-3),
    "weight_decay": (0.04, 0.04, 0.04, 1e-6),
    "weight_decay_end": (0.4, 0.48, 0.4, 1e-6),
    "epochs": (300, 100, 150, 100),
    "clip_grad": (None, None, 1.0, None),
    "drop_path": (0.1, 0.0, 0.0, 0.0),
    "patch_drop": (0.0, 0.0, 0.15, 0.0),
    "global_scale": ((0.4, 1.0), (0.25, 1.0), (0.3, 1.0), (0.14, 1.0)),
    "local_scale": ((0.05, 0.4), (0.05, 0.25), (0.05, 0.3), (0.05, 0.14)),
    "local_crops": (8, 10, 10, 4),
    "color_strength": (0.5, 0.5, 1.0, 1.0),
    "blur_p": ((1.0, 0.1, 0.5), (1.0, 0.1, 0.5), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "solarize_p": ((0.0, 0.2, 0.0), (0.0, 0.2, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    "head": ("native", "native", "mlp", "native"),
    "teacher_temperature": (0.07, 0.07, 0.025, 0.07),
    "sinkhorn_iterations": (0, 0, 0, 3),
}
SHARED = {
    "student_temperature": 0.1, "pairing": "same", "crop_size": 224, "local_crop_size": 96,
    "color": (0.8, 0.8, 0.8, 0.2), "color_p": 0.8, "gray_p": 0.2, "flip_p": 0.5, "momentum": 0.9, "trust": 0.001,
    "centering": False, "me_max": 0.0, "teacher_temperature_start": None, "freeze_last_layer_epochs": 0, "base": False,
    "student_ema": None, "swav_prototypes": "own", "patch_weight": 1.0, "mask_ratios": ((0.0, 0.0), (0.3, 0.2)),
}  # fmt: skip


WARMED_UP = ("teacher_temperature_start", "teacher_temperature_epochs", "freeze_last_layer_epochs")


@pytest.mark.parametrize(("place", "method"), enumerate(("dino", "ibot", "msn", "swav")))
def test_every_published_value(place: int, method: str) -> None:
    found = vars(preset(method, "vit"))  # type: ignore[arg-type]
    for key, row in TABLE.items():
        if key != "teacher_temperature" or method != "swav":  # SwAV has Sinkhorn's epsilon in its place
            assert found[key] == row[place], key
    assert SHARED.items() <= found.items()
    if method != "swav":
        cnn = vars(preset(method, "cnn"))  # type: ignore[arg-type]
        assert (cnn["optimizer"], cnn["lr"], cnn["weight_decay"], cnn["weight_decay_end"]) == ("larc", 0.2, 1e-6, 1e-6)
        assert (cnn["drop_path"], cnn["patch_drop"], cnn["momentum"]) == (0.0, 0.0, 0.9)
        of_a_cnn = {"optimizer", "lr", "warmup_lr", "weight_decay", "weight_decay_end", "drop_path", "patch_drop"}
        for key in TABLE.keys() - of_a_cnn:
            assert cnn[key] == TABLE[key][place], key
        assert SHARED.items() <= cnn.items()
    else:
        assert preset("swav", "cnn") == preset("swav", "vit")  # whose optimiser is made for CNNs as it is


def test_how_many_prototypes_the_methods_have() -> None:
    assert preset("msn", "vit").prototypes == preset("msn", "cnn").prototypes == 1024
    assert preset("ibot", "vit", base=True).prototypes == 8192


def test_the_values_of_supervised_distillation() -> None:
    kd = preset("kd", "cnn")
    assert kd == preset("kd", "vit") and kd.objective == "kd"
    assert (kd.teacher_temperature, kd.student_temperature) == (10.0, 10.0)
    assert (kd.optimizer, kd.nesterov, kd.lr, kd.lr_batch, kd.final_lr) == ("sgd", True, 0.01, 256, 0.0)
    assert (kd.weight_decay, kd.weight_decay_end, kd.momentum) == (5e-4, 5e-4, 0.9)


def test_the_values_that_the_base_methods_add() -> None:
    for method in ("dino", "ibot"):
        base = preset(method, "vit", base=True)  # type: ignore[arg-type]
        assert base.centering and base.ema_momentum == (0.996, 1.0) and base.freeze_last_layer_epochs == 1
        assert (base.teacher_temperature_start, base.teacher_temperature_epochs, base.clip_grad) == (0.04, 30, 3.0)
    msn, swav = preset("msn", "vit", base=True), preset("swav", "cnn", base=True)
    assert msn.head == "native"
    assert (msn.me_max, msn.sinkhorn_iterations, msn.ema_momentum) == (1.0, 3, (0.996, 1.0))
    assert (swav.sinkhorn_epsilon, swav.sinkhorn_iterations, swav.ema_momentum) == (0.05, 3, (0.0, 0.0))
    assert (msn.freeze_last_layer_epochs, swav.freeze_last_layer_epochs) == (0, 1)
    assert {preset(m, "vit", base=True).pairing for m in ("dino", "ibot", "msn", "swav")} == {"swapped"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dino", {"prototypes", "centering", "clip_grad", *WARMED_UP}),
        ("ibot", {"prototypes", "centering", "clip_grad", *WARMED_UP}),
        ("msn", {"head", "me_max", "sinkhorn_iterations"}),
        ("swav", {"sinkhorn_epsilon", "freeze_last_layer_epochs", "ema_momentum"}),
    ],
)
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_base_method_is_its_rob_in_all_else(method: Method, own: set[str], kind: StudentKind) -> None:
    """One seam: what the branch needs differs, and neither crops nor optimiser nor temperatures do."""
    rob, base = (vars(preset(method, kind, base=which)) for which in (False, True))
    assert {key for key in rob if base[key] != rob[key]} == own | {"base", "pairing"}


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"^a.toml: unknown key 'epoch': did you mean epochs[,?]"):
        override(preset("dino", "vit"), {"epoch": 3}, where="a.toml")
    with pytest.raises(InputError, match=r"^recipe: unknown key 'zzz': known are objective, .*epochs"):
        override(preset("dino", "vit"), {"zzz": 3})


def test_a_value_out_of_range_names_the_file_that_it_stands_in() -> None:
    with pytest.raises(InputError, match=r"^a.toml: epochs must be between 1 and 100000, got epochs = 0$"):
        override(preset("dino", "vit"), {"epochs": 0}, where="a.toml")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": "many"}, "'many'"),
        ({"teacher_crops": 3}, "teacher_crops = 3"),
        ({"teacher_crops": 1, "base": True}, "teacher_crops needs a teacher"),
        ({"teacher_crops": 1, "objective": "ibot"}, "half of the masked patches"),
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
        ({"freeze_trunk": True}, "freeze_trunk needs a base method"),
        ({"color": [0.8, -0.1, 0.8, 0.2]}, "color = [0.8, -0.1, 0.8, 0.2]"),
        ({"lr": float("nan")}, "nan"),
        ({"epochs": datetime.date(2020, 1, 1)}, "2020"),
        ({"crop_size": "160x8"}, "crop_size must be between 16 and 4096, got crop_size = '160x8'"),
        ({"crop_size": "160 by 96"}, "recipe: crop_size must be a number of pixels or HEIGHTxWIDTH, got '160 by 96'"),
        ({"local_crop_size": 96.5}, "recipe: local_crop_size must be a number of pixels or HEIGHTxWIDTH, got 96.5"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, object], named: str) -> None:
    with pytest.raises(InputError) as caught:
        override(preset("dino", "vit"), values)
    assert named in str(caught.value)


ENUMERATED = {name: kind for name, kind in get_type_hints(Recipe).items() if is_enumerated(kind)}


@pytest.mark.parametrize("name", ENUMERATED)
def test_a_name_in_another_case_is_refused_with_the_right_one(name: str) -> None:
    for choice in str(ENUMERATED[name]).split("'")[1::2]:
        with pytest.raises(InputError, match=rf"^mine\.toml: {name} must be .*: did you mean {choice}\?$"):
            override(preset("dino", "vit"), {name: choice.upper()}, where="mine.toml")
    with pytest.raises(InputError, match=r"^unknown objective 'DINO': did you mean dino\?$"):
        preset("DINO", "vit")


def test_a_toml_file_changes_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('objective = "msn"\nepochs = 7\nglobal_scale = [0.5, 1]\n')
    recipe = override(preset("msn", "vit"), read_recipe(path))
    assert recipe == Recipe(**(vars(preset("msn", "vit")) | {"epochs": 7, "global_scale": (0.5, 1.0)}))
    path.write_text("epochs = \n")
    with pytest.raises(InputError, match="not valid TOML"):
        read_recipe(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_printed_recipe_has_every_key_and_reads_back_to_itself(
    method: str, kind: StudentKind, tmp_path: Path
) -> None:
    path = tmp_path / "printed.toml"
    for base in (False,) if method == "kd" else (False, True):
        recipe = preset(method, kind, base=base)
        path.write_text(to_toml(recipe))
        values = read_recipe(path)
        assert list(values) == [f.name for f in dataclasses.fields(Recipe)]
        assert override(preset("swav", "vit", base=base), values) == recipe
    assert all(line.count("  # ") == 1 for line in path.read_text().splitlines() if " = " in line.partition("#")[0])


def test_a_size_is_a_number_or_height_times_width(tmp_path: Path) -> None:
    path, square = tmp_path / "mine.toml", preset("dino", "vit")
    path.write_text('crop_size = "160x96"\nlocal_crop_size = [64, 48]\n')
    recipe = override(square, read_recipe(path))
    assert (recipe.crop_size, recipe.crop_shape) == ("160x96", (160, 96))
    assert (recipe.local_crop_size, recipe.local_crop_shape) == ("64x48", (64, 48))
    path.write_text(to_toml(recipe))
    assert override(square, read_recipe(path)) == recipe == recipe_from_json(to_json(recipe))
    for square_size in (96, "96", "96x96", (96, 96)):
        assert to_json(override(square, {"crop_size": square_size}))["crop_size"] == 96
    assert override(square, {"crop_size": "160x96"}).local_crop_size == 96  # local crops keep their own size


@pytest.mark.parametrize("off", ["clip_grad = 0", "clip_grad = 0.0", 'clip_grad = "none"'])
def test_off_can_be_written_in_toml(off: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        f'{off}\nlr_batch = 0\nteacher_temperature_start = "none"\nstudent_ema = "none"\n'
    )
    recipe = override(preset("dino", "vit", base=True), read_recipe(tmp_path / "mine.toml"))
    assert preset("dino", "vit", base=True).clip_grad == 3.0 and recipe.clip_grad is None
    assert (recipe.lr_batch, recipe.teacher_temperature_start, recipe.student_ema) == (None, None, None)
    with pytest.raises(InputError, match="recipe: epochs must be a whole number, got 'none'"):
        override(recipe, {"epochs": "none"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr = nan\n", "mine.toml: lr must be a finite number, got nan"),
        ("global_scale = [0.1, inf]\n", "mine.toml: global_scale must be a list of 2 finite numbers, got [0.1, inf]"),
        (f"epochs = {'[' * 300}{']' * 300}\n", "epochs must be a whole number, got [["),
        (f"epochs = {'[' * 700}{']' * 700}\n", "nested too deeply"),
        (f"epochs = {'[' * 5000}{']' * 5000}\n", "nested too deeply"),
        (f"epochs = {'9' * 5001}\n", "is not valid TOML"),
        (f"epochs = {'9' * 4000}\n", "epochs must be between 1 and 100000, got epochs = 9999"),
        (f"lr = {'9' * 4000}\n", "lr must be a finite number, got 9999"),
        (f'"{"k" * 5000}" = 1\n', "unknown key 'kkk"),
        ("[lr]\na = 1\n", "mine.toml: lr must be a number, got {'a': 1}"),
        ('teacher_size = "big"\n', "mine.toml: teacher_size must be a whole number, or \"none\", got 'big'"),
        ('quantize = "int4"\n', "mine.toml: quantize must be 'int8', or \"none\", got 'int4'"),
        ("mixup = true\n", "mine.toml: mixup must be a number, got True"),
        ("teacher_mean = 5\n", 'mine.toml: teacher_mean must be a list of 3 numbers, or "none", got 5'),
        ("mask_ratios = 0.5\n", "mine.toml: mask_ratios must be a list of lists of 2 numbers, got 0.5"),
        ("crop_size = 3.5\n", "mine.toml: crop_size"),
        ("objective = 5\n", "mine.toml: objective must be a string, got 5"),
    ],
)
def test_a_hostile_recipe_is_one_short_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        override(preset("dino", "vit"), read_recipe(path), where="mine.toml")
    assert said in str(caught.value) and len(str(caught.value)) < 2000
