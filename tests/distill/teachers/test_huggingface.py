"""Checkpoints of Hugging Face transformers and of Lightning as teachers, or the file that is needed instead."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import published as pub

from robx.distill.teachers.checkpoints import read_trunk
from robx.distill.teachers.load import load_teacher
from robx.errors import ArtifactError


def vit_names(state: pub.State, *, prefix: str, dinov2: bool) -> pub.State:
    """timm's keys of a ViT under the names of ViTModel, ViTMSNModel (or Dinov2Model), as transformers writes them."""
    renamed = {}
    for key, value in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = tensor.clone()
            continue
        name = key
        for ours, theirs in (
            (r"^cls_token", "embeddings.cls_token"),
            (r"^pos_embed", "embeddings.position_embeddings"),
            (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
            (r"^norm\.", "layernorm."),
            (r"^head\.", "classifier."),
            (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
            (r"attn\.proj", "attention.output.dense"),
            (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
            *(() if dinov2 else ((r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"))),
            *(() if dinov2 else ((r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"))),
        ):
            name = re.sub(ours, theirs, name)
        renamed[name] = value
    found = {key if key.startswith("classifier.") else f"{prefix}{key}": value for key, value in renamed.items()}
    return found | {f"{prefix}pooler.dense.weight": torch.ones(2, 2)}


def pixels_for(teacher: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the teacher is given, and what its trunk then sees."""
    seen = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return (seen - teacher.shift) / teacher.scale, seen


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_a_vit_of_transformers_is_read(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()
    save_file(vit_names(model.state_dict(), prefix=prefix, dinov2=False), tmp_path / "model.safetensors")
    teacher = load_teacher("timm:vit_tiny_patch16_224", weights=tmp_path / "model.safetensors", objective="kd")
    given, seen = pixels_for(teacher)
    with torch.no_grad():
        torch.testing.assert_close(teacher(given).crops, model(seen), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_of_transformers_is_read(tmp_path: Path, registers: bool) -> None:
    torch.manual_seed(0)
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    state = {key: value for key, value in model.state_dict().items() if key != "reg_token"}
    if registers:  # timm adds the CLS token's position to the token; the release keeps it apart
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 384), model.state_dict()["pos_embed"]], dim=1)
        state["cls_token"] = model.state_dict()["cls_token"] - state["pos_embed"][:, :1]
    renamed = vit_names(state, prefix="dinov2.", dinov2=True)
    renamed["dinov2.embeddings.mask_token"] = torch.zeros(1, 384)
    if registers:
        renamed["dinov2.embeddings.register_tokens"] = model.state_dict()["reg_token"]
    save_file(renamed, tmp_path / "model.safetensors")
    from robx.distill.teachers import from_timm
    from robx.distill.teachers.choose import find_teacher

    entry = find_teacher(f"timm:{name}")
    teacher = from_timm.load(
        entry, weights=tmp_path / "model.safetensors", folder=tmp_path, image_size=224, progress=None
    )
    want = model.state_dict()
    for key, value in teacher.trunk.state_dict().items():
        torch.testing.assert_close(value, want[key], msg=key)


def test_another_network_of_transformers_names_the_file_to_take(tmp_path: Path) -> None:
    save_file({"resnet.embedder.embedder.convolution.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"Hugging Face transformers.*huggingface\.co/timm"):
        read_trunk(tmp_path / "model.safetensors")


def test_transformers_backbones_have_no_head_for_a_prototype_loss(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save_file(vit_names(state, prefix="vit.", dinov2=False), tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"only the backbone.*dino_deitsmall16_pretrain_full_checkpoint"):
        load_teacher("dino_vits16", weights=tmp_path / "model.safetensors")


def lightning(state: pub.State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "callbacks": {"ModelCheckpoint": {"best_model_path": "x"}},
        "hyper_parameters": {"lr": 0.1},
    }


def test_a_lightning_module_around_one_network_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).eval()
    for prefix in ("model.", "net.", "model.backbone."):
        torch.save(lightning(pub.prefixed(model.state_dict(), prefix)), tmp_path / "last.ckpt")
        teacher = load_teacher("timm:resnet18", weights=tmp_path / "last.ckpt", objective="kd")
        given, seen = pixels_for(teacher)
        with torch.no_grad():
            torch.testing.assert_close(teacher(given).crops, model(seen), rtol=1e-3, atol=1e-4)


def test_a_lightning_module_with_dinos_teacher_is_read(tmp_path: Path) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 20), 2)
    both = pub.prefixed(trunk, "backbone.") | pub.prefixed(head, "head.")
    student = {key: value + 1 for key, value in pub.prefixed(both, "student.").items()}
    torch.save(lightning(student | pub.prefixed(both, "teacher.")), tmp_path / "last.ckpt")
    teacher = load_teacher("dino", weights=tmp_path / "last.ckpt", image_size=32)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        teacher(pixels).features, pub.vit_tokens(trunk, pixels, heads=1)[:, 0], rtol=1e-4, atol=1e-4
    )


def test_a_lightning_module_of_several_networks_says_what_to_save(tmp_path: Path) -> None:
    state = {"backbone.conv1.weight": torch.ones(2), "projector.0.weight": torch.ones(2)}
    torch.save(lightning(state), tmp_path / "last.ckpt")
    with pytest.raises(
        ArtifactError, match="Lightning checkpoint with backbone, projector: save the state dict of backbone"
    ):
        read_trunk(tmp_path / "last.ckpt")
