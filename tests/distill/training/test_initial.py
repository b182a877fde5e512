"""Where a student starts from: random weights, timm's, a run's, or a file's; always in one line."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from robx.distill.training.initial import open_initial, starting_line
from robx.errors import InputError, RobxError
from robx.images.sources import open_source
from robx.trunk import build_trunk


def full_model(name: str = "test_resnet", **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(timm.create_model(name, **options).state_dict())


def assert_loaded(path: Path, expected: dict[str, Tensor], student: str = "test_resnet") -> None:
    initial, trunk = open_initial(path, student, image_size=64), build_trunk(student)
    initial.load_into(trunk)
    for key, value in trunk.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert str(path) in starting_line(student, initial)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_state_dict_below_usual_wrappers_and_prefixes(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    state = full_model()
    content: Any = {f"{prefix}{key}": value for key, value in state.items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "weights.pth")
    assert_loaded(tmp_path / "weights.pth", state)


def test_safetensors_and_networks_beside_the_backbone(tmp_path: Path) -> None:
    state = full_model(num_classes=0)
    save_file(state, tmp_path / "weights.safetensors")
    assert_loaded(tmp_path / "weights.safetensors", state)
    other = {f"backbone.{key}": value for key, value in state.items()} | {"projector.0.weight": torch.zeros(3, 3)}
    torch.save(other, tmp_path / "lightly.pth")
    assert_loaded(tmp_path / "lightly.pth", state)


def test_torchvisions_resnet(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(2)
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    assert_loaded(tmp_path / "resnet18.pth", model.state_dict(), "resnet18")
    initial, trunk = open_initial(tmp_path / "resnet18.pth", "resnet18", image_size=64), build_trunk("resnet18").eval()
    initial.load_into(trunk)
    model.fc = torch.nn.Identity()
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.allclose(trunk(pixels), model.eval()(pixels), atol=1e-5)


def test_a_vit_of_another_size_has_its_positions_resampled(tmp_path: Path) -> None:
    torch.save(full_model("test_vit", img_size=64), tmp_path / "vit.pth")
    open_initial(tmp_path / "vit.pth", "test_vit", image_size=64).load_into(build_trunk("test_vit"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: full_model("test_vit"), "does not fit the student test_resnet"),
        (lambda: {k: v for k, v in full_model().items() if k != "conv1.0.weight"}, "lacks conv1.0.weight"),
        (lambda: full_model() | {"stages.weight": torch.zeros(1)}, "stages.weight, which is unknown"),
        (dict, "no weights"),
        (lambda: [1, 2], "no weights"),
    ],
)
def test_weights_of_another_network_are_one_line(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content(), tmp_path / "weights.pth")
    with pytest.raises(RobxError, match=said) as caught:
        open_initial(tmp_path / "weights.pth", "test_resnet", image_size=64)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist: give a run's folder, a file of weights, or pretrained"):
        open_initial(tmp_path / "none.pth", "test_resnet", image_size=64)


def test_timms_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = timm.create_model, []

    def create(name: str, **options: Any) -> Any:
        asked.append((name, options.pop("pretrained", False), options.pop("cache_dir", None)))
        torch.manual_seed(7)
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr("robx.distill.training.initial.require_hub", lambda *_: None)
    initial = open_initial(Path("pretrained"), "test_resnet.r160_in1k", image_size=64, cache=tmp_path)
    assert [call for call in asked if call[1]] == [("test_resnet.r160_in1k", True, tmp_path / "timm")]
    trunk = build_trunk("test_resnet")
    torch.nn.init.zeros_(next(trunk.parameters()))
    initial.load_into(trunk)
    torch.manual_seed(7)
    assert torch.equal(next(trunk.parameters()), next(real("test_resnet", num_classes=0).parameters()))
    assert "timm's pretrained weights timm/test_resnet.r160_in1k" in starting_line("test_resnet.r160_in1k", initial)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"are not available \(no route\): check the network, or give --init FILE"):
        open_initial(Path("pretrained"), "test_resnet", image_size=64, cache=tmp_path)


def test_a_run_says_what_it_starts_from(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    said: list[str] = []
    source, recipe = open_source(scenes), tiny.tiny_recipe(objective="msn", kind="cnn")
    tiny.tiny_run(source, tmp_path / "a", students=("test_resnet.r160_in1k",), recipe=recipe, say=said.append)
    hint = "test_resnet.r160_in1k starts from random weights: its name chooses pretrained weights, give"
    assert any(text.startswith(hint) for text in said)
    torch.save(full_model(), tmp_path / "w.pth")
    tiny.tiny_run(
        source, tmp_path / "b", students=("test_resnet",), recipe=recipe, say=said.append, init=tmp_path / "w.pth"
    )
    assert f"test_resnet starts from {tmp_path / 'w.pth'}" in said
    assert starting_line("resnet18", None) == "resnet18 starts from random weights"
