"""Tiny networks in the published layouts, as plain dictionaries, and what they answer, written out a second time.

Nothing here imports robx: the names of the keys and the arithmetic come from the releases.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * 0.2
        if key.endswith(("running_var", "weight_g")):
            value = value.abs() + 0.5
        state[key] = value
    return state


def vit_shapes(width: int = 64, depth: int = 2, patch: int = 8, grid: int = 4) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid * grid + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        for name, shape in {
            "norm1": (width,),
            "norm2": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def vit_tokens(state: State, pixels: torch.Tensor, heads: int) -> torch.Tensor:
    """All tokens after the final norm; pixels at the size of the position embedding."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    width = x.shape[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for i in range(depth):
        block = {key.removeprefix(f"blocks.{i}."): v for key, v in state.items() if key.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (width,), block["norm1.weight"], block["norm1.bias"], eps=1e-6)
        q, k, v = F.linear(y, block["attn.qkv.weight"], block["attn.qkv.bias"]).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, width // heads)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(dim=-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, block["attn.proj.weight"], block["attn.proj.bias"])
        y = F.layer_norm(x, (width,), block["norm2.weight"], block["norm2.bias"], eps=1e-6)
        y = F.gelu(F.linear(y, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        x = x + F.linear(y, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    return F.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"], eps=1e-6)


def resnet_shapes(stem: int, depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (stem, 3, 7, 7), **_norm("bn1", stem)}
    channels = stem
    for stage, depth in enumerate(depths):
        planes = stem * 2**stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            shapes[f"{name}.conv1.weight"] = (planes, channels, 1, 1)
            shapes[f"{name}.conv2.weight"] = (planes, planes, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * planes, planes, 1, 1)
            for number, width in ((1, planes), (2, planes), (3, 4 * planes)):
                shapes |= _norm(f"{name}.bn{number}", width)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * planes, channels, 1, 1)
                shapes |= _norm(f"{name}.downsample.1", 4 * planes)
            channels = 4 * planes
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def batch_norm(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, variance = (state[f"{name}.{part}"].view(shape) for part in ("running_mean", "running_var"))
    weight, bias = state[f"{name}.weight"].view(shape), state[f"{name}.bias"].view(shape)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def resnet_features(state: State, pixels: torch.Tensor, depths: tuple[int, ...]) -> torch.Tensor:
    x = batch_norm(state, "bn1", F.conv2d(pixels, state["conv1.weight"], stride=2, padding=3)).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name, stride = f"layer{stage + 1}.{block}", 2 if block == 0 and stage else 1
            y = batch_norm(state, f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"])).relu()
            y = F.conv2d(y, state[f"{name}.conv2.weight"], stride=stride, padding=1)
            y = batch_norm(state, f"{name}.bn2", y).relu()
            y = batch_norm(state, f"{name}.bn3", F.conv2d(y, state[f"{name}.conv3.weight"]))
            if block == 0:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                x = batch_norm(state, f"{name}.downsample.1", x)
            x = (x + y).relu()
    return x.mean(dim=(2, 3))


def dino_head_shapes(width: int, k: int, *, hidden: int = 24, bottleneck: int = 12) -> dict[str, tuple[int, ...]]:
    return {
        "mlp.0.weight": (hidden, width),
        "mlp.0.bias": (hidden,),
        "mlp.2.weight": (hidden, hidden),
        "mlp.2.bias": (hidden,),
        "mlp.4.weight": (bottleneck, hidden),
        "mlp.4.bias": (bottleneck,),
        "last_layer.weight_g": (k, 1),
        "last_layer.weight_v": (k, bottleneck),
    }


def dino_bottleneck(state: State, x: torch.Tensor) -> torch.Tensor:
    for number in (0, 2):
        x = F.gelu(F.linear(x, state[f"mlp.{number}.weight"], state[f"mlp.{number}.bias"]))
    x = F.linear(x, state["mlp.4.weight"], state["mlp.4.bias"])
    return x / x.norm(dim=-1, keepdim=True)


def weight_normed(state: State, name: str) -> torch.Tensor:
    v = state[f"{name}.weight_v"]
    return state[f"{name}.weight_g"] * v / v.norm(dim=1, keepdim=True)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def dino_checkpoint(trunk: State, head: State, *, prefix: str = "", loss: str = "dino_loss", **options: object) -> dict:
    """The top level of DINO's and iBOT's full checkpoints, everything in it that the releases put there."""
    student = prefixed(prefixed(trunk, "backbone."), "module.") | prefixed(prefixed(head, "head."), "module.")
    k = head.get("last_layer.weight_g", head.get("last_layer.weight"))
    assert k is not None
    return {
        # The student's numbers are others: reading it instead of the teacher has to show.
        "student": {key: value + 1 for key, value in student.items()},
        "teacher": prefixed(prefixed(trunk, "backbone.") | prefixed(head, "head."), prefix),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(**{"arch": "vit_small", "patch_size": 16, "lr": 5e-4, **options}),
        loss: {"center": torch.zeros(1, len(k))},
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 12},
    }
