"""Teachers at other sizes than they were pretrained at, against plain second implementations of their releases."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))
import published as pub

from robx.distill.teachers.choose import find_teacher
from robx.distill.teachers.from_timm import build_trunk
from robx.distill.teachers.load import load_teacher
from robx.image_size import height_and_width

Size = int | tuple[int, int]


def pixels_of(size: Size) -> torch.Tensor:
    height, width = height_and_width(size)
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))


def vit_file(path: Path, method: str) -> tuple[Path, pub.State]:
    """A checkpoint of a ViT with a grid of 14 x 14, as at 224 pixels, here of 8 pixels a patch."""
    trunk = pub.random_state(pub.vit_shapes(grid=14), 1)
    if method == "msn":
        shapes: dict[str, tuple[int, ...]] = {"fc1.weight": (20, 64), "fc2.weight": (20, 20), "fc3.weight": (10, 20)}
        shapes |= {"fc1.bias": (20,), "fc2.bias": (20,), "fc3.bias": (10,)}
        shapes |= pub._norm("bn1", 20) | pub._norm("bn2", 20)
        encoder = trunk | pub.prefixed(pub.random_state(shapes, 2), "fc.")
        content = {"target_encoder": pub.prefixed(encoder, "module."), "prototypes": torch.randn(16, 10)}
    else:
        content = pub.dino_checkpoint(trunk, pub.random_state(pub.dino_head_shapes(64, 20), 2), loss=f"{method}_loss")
    torch.save(content, path / "teacher.pth")
    return path / "teacher.pth", trunk


@pytest.mark.parametrize(("method", "offset"), [("dino", 0.1), ("ibot", 0.1), ("msn", 0.0)])
# 7 x 28 patches, of 56 x 224 pixels, are as many as the 14 x 14 of the position embedding.
@pytest.mark.parametrize("size", [32, 48, 96, 112, 160, (160, 96), (32, 112), (56, 224)])
def test_a_vit_resamples_its_positions_as_its_release_does(
    tmp_path: Path, method: str, offset: float, size: Size
) -> None:
    path, trunk = vit_file(tmp_path, method)
    teacher = load_teacher(method, weights=path, image_size=size)
    pixels = pixels_of(size)
    want = pub.vit_tokens(trunk, pixels, heads=1, offset=offset)[:, 0]
    torch.testing.assert_close(teacher(pixels).features, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dinov2_vits14", "timm:vit_small_patch16_224.dino"])
@pytest.mark.parametrize("grid", [6, 16])
def test_timms_trunks_of_these_releases_resample_likewise(name: str, grid: int) -> None:
    torch.manual_seed(0)
    trunk = build_trunk(find_teacher(name))
    want = pub.resampled_positions(trunk.pos_embed.detach(), (grid, grid), 0.1)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        got = trunk._pos_embed(torch.zeros(1, grid, grid, 384))  # type: ignore[operator]
    got[:, 0] -= trunk.cls_token[0, 0]  # type: ignore[index]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_dinov2_with_registers_antialiases_as_timm_does() -> None:
    import timm

    torch.manual_seed(0)
    trunk = build_trunk(find_teacher("timm:vit_small_patch14_reg4_dinov2"))
    plain = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True)
    plain.load_state_dict(trunk.state_dict())
    x = torch.zeros(1, 16, 16, 384)
    assert torch.equal(trunk._pos_embed(x), plain._pos_embed(x))  # type: ignore[operator]


@pytest.mark.parametrize("size", [96, 160, 224, (160, 96)])
def test_a_swin_pads_before_it_rolls(tmp_path: Path, size: Size) -> None:
    torch.manual_seed(0)
    depths, heads = (2, 2, 2, 1), (1, 2, 2, 4)
    options = {"img_size": 224, "embed_dim": 16, "depths": depths, "num_heads": heads, "num_classes": 0}
    trunk = {}
    for key, value in SwinTransformer(**options).state_dict().items():
        stage = int(key.split(".")[1]) if "downsample" in key else 0
        moved = torch.randn_like(value) * 0.1 if "bias_table" in key else value
        trunk[key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")] = moved
    head = pub.random_state(pub.dino_head_shapes(128, 9), 2)
    torch.save(pub.dino_checkpoint(trunk, head, loss="ibot_loss", arch="swin_tiny"), tmp_path / "swin.pth")
    teacher = load_teacher("ibot", weights=tmp_path / "swin.pth", image_size=size)
    pixels = pixels_of(size)
    with torch.no_grad():
        want = pub.swin_features(trunk, pixels, depths, heads)
    torch.testing.assert_close(teacher(pixels).features, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("patch", "prefix"), [(16, ""), (8, "module.")])
def test_an_xcit_of_dino(tmp_path: Path, patch: int, prefix: str) -> None:
    trunk = pub.random_state(pub.xcit_shapes(64, 3, patch=patch, heads=4), 1)
    head = pub.random_state(pub.dino_head_shapes(64, 20), 2)
    torch.save(pub.dino_checkpoint(trunk, head, prefix=prefix, arch="xcit_small_12_p16"), tmp_path / "xcit.pth")
    teacher = load_teacher("dino", weights=tmp_path / "xcit.pth", image_size=96)
    pixels = pixels_of(96)
    features = pub.xcit_features(trunk, pixels, heads=4)
    got = teacher(pixels)
    torch.testing.assert_close(got.features, features, rtol=1e-3, atol=1e-4)
    want = pub.dino_bottleneck(head, features) @ pub.weight_normed(head, "last_layer").T
    torch.testing.assert_close(got.crops, want, rtol=1e-3, atol=1e-4)
