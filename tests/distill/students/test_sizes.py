"""Students at other image sizes than timm's own: networks of one fixed size are built for the crops."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from robx.distill.students.student import build_student
from robx.errors import InputError
from robx.images.sources import open_source
from robx.trunk import build_trunk, embedding_width, load_trunk, sizes_near

FIXED = (
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "levit_128s",
    "maxvit_pico_rw_256",
    "coat_lite_tiny",
)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", FIXED)
def test_a_network_of_one_size_is_built_for_the_crops(name: str, size: int) -> None:
    with torch.device("meta"):
        trunk = build_trunk(name, image_size=size).eval()
        assert trunk(torch.empty(2, 3, size, size)).shape == (2, embedding_width(trunk))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "levit_128s"])
def test_a_network_of_one_size_is_built_for_crops_that_are_not_square(name: str) -> None:
    with torch.device("meta"):
        trunk = build_trunk(name, image_size=(160, 96)).eval()
        assert trunk(torch.empty(2, 3, 160, 96)).shape == (2, embedding_width(trunk))


def test_a_network_that_takes_the_size_is_timms_own() -> None:
    for name in ("test_vit", "test_resnet", "mobilevit_xxs"):
        plain, sized = (build_trunk(name, image_size=size).state_dict() for size in (None, 64))
        assert {key: value.shape for key, value in plain.items()} == {key: value.shape for key, value in sized.items()}


def test_a_student_of_64_px_is_trained_saved_and_loaded(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe(objective="dino", base=True, head="mlp", crop_size=64, local_crops=0, batch_size=32)
    tiny.tiny_run(open_source(scenes), tmp_path / "run", students=("levit_128s",), recipe=recipe)
    record, trunk = load_trunk(tmp_path / "run")
    assert record.preprocessing.crop == 64
    assert trunk(torch.zeros(1, 3, 64, 64)).shape == (1, record.width)
    tiny.tiny_run(
        open_source(scenes), tmp_path / "more", students=("levit_128s",), recipe=recipe, init=tmp_path / "run"
    )


def test_a_refusal_names_sizes_that_work(tiny: ModuleType) -> None:
    assert sizes_near("test_vit", 100) == [96, 112]
    assert sizes_near("test_vit", (160, 90)) == ["160x80", "160x96"]
    assert sizes_near("nest_tiny", (64, 32)) == [64]  # timm's Nest takes squares alone
    recipe = tiny.tiny_recipe(objective="dino", kind="cnn", crop_size=100, local_crops=0)
    with pytest.raises(InputError, match=r"test_vit cannot process crops of 100 pixels .*nearest: 96 and 112\)"):
        build_student("test_vit", recipe, None)
    local = tiny.tiny_recipe(objective="dino", kind="cnn", crop_size=64, local_crop_size=32)
    with pytest.raises(
        InputError, match=r"levit_128s, built for crops of 64 .* set local_crop_size = 64 or local_crops"
    ):
        build_student("levit_128s", local, None)
