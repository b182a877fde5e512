"""Tiny networks in the published layouts, as plain dictionaries, and what they answer, written out a second time.

Nothing here imports robx: the names of the keys and the arithmetic come from the releases.
"""

from __future__ import annotations

import argparse
import itertools
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


def bicubic_weights(grid: int, size: int, offset: float) -> torch.Tensor:
    """(size, grid): cubic convolution with a = -0.75 at (i + .5) grid / (size + offset) - .5, the border repeated."""

    def kernel(distance: float) -> float:
        x, a = abs(distance), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weights = torch.zeros(size, grid, dtype=torch.float64)
    for i in range(size):
        place = (i + 0.5) * grid / (size + offset) - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(tap, 0), grid - 1)] += kernel(place - tap)
    return weights


def resampled_positions(positions: torch.Tensor, size: tuple[int, int], offset: float) -> torch.Tensor:
    """The release's position embedding (1, 1 + H W, D) for another number of patches, `size` (H, W)."""
    grid = math.isqrt(positions.shape[1] - 1)
    if size == (grid, grid):
        return positions
    down, across = (bicubic_weights(grid, side, offset) for side in size)
    patches = positions[0, 1:].double().view(grid, grid, -1)
    patches = torch.einsum("ia,jb,abd->ijd", down, across, patches).flatten(0, 1).to(positions.dtype)
    return torch.cat([positions[0, :1], patches])[None]


def vit_tokens(state: State, pixels: torch.Tensor, heads: int, offset: float = 0.1) -> torch.Tensor:
    """All tokens after the final norm; at other sizes with the release's `offset` in the position embedding."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    positions = resampled_positions(state["pos_embed"], (x.shape[2], x.shape[3]), offset)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions
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


def swin_features(state: State, pixels: torch.Tensor, depths: tuple[int, ...], heads: tuple[int, ...]) -> torch.Tensor:
    """Microsoft's and iBOT's Swin, trained at 224 with windows of 7: pad, then roll; key names as in the release."""
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4).permute(0, 2, 3, 1)
    x = layer_norm(state, "patch_embed.norm", x, eps=1e-5)
    for stage, depth in enumerate(depths):
        trained = 56 // 2**stage
        window = min(7, trained)
        for block in range(depth):
            shift = 3 if block % 2 and trained > 7 else 0
            x = _swin_block(state, f"layers.{stage}.blocks.{block}", x, window, shift, heads[stage])
        if stage + 1 < len(depths):
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
            x = layer_norm(state, f"layers.{stage}.downsample.norm", x, eps=1e-5)
            x = F.linear(x, state[f"layers.{stage}.downsample.reduction.weight"])
    return layer_norm(state, "norm", x, eps=1e-5).mean(dim=(1, 2))


def _swin_block(state: State, name: str, x: torch.Tensor, window: int, shift: int, heads: int) -> torch.Tensor:
    _, height, width, channels = x.shape
    y = layer_norm(state, f"{name}.norm1", x, eps=1e-5)
    rows, columns = (math.ceil(side / window) * window for side in (height, width))
    padded = torch.zeros(len(x), rows, columns, channels)
    padded[:, :height, :width] = y
    padded = torch.roll(padded, (-shift, -shift), dims=(1, 2))
    # What came from the far edge does not attend to its neighbours in the window.
    region_of = [
        [(0 if i < side - window else 1) + (shift > 0 and i >= side - shift) for i in range(side)]
        for side in (rows, columns)
    ]
    cells = [(i, j) for i in range(window) for j in range(window)]
    table = state[f"{name}.attn.relative_position_bias_table"]
    bias = torch.stack(
        [
            torch.stack([table[(i - k + window - 1) * (2 * window - 1) + j - m + window - 1] for k, m in cells])
            for i, j in cells
        ]
    ).permute(2, 0, 1)
    result = torch.zeros_like(padded)
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            part = padded[:, top : top + window, left : left + window].flatten(1, 2)
            q, k, v = F.linear(part, state[f"{name}.attn.qkv.weight"], state[f"{name}.attn.qkv.bias"]).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            logits = q @ k.transpose(-1, -2) / math.sqrt(channels // heads) + bias
            if shift:
                regions = torch.tensor([3 * region_of[0][top + i] + region_of[1][left + j] for i, j in cells])
                logits = logits - 100.0 * (regions[:, None] != regions[None, :])
            mixed = (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
            mixed = F.linear(mixed, state[f"{name}.attn.proj.weight"], state[f"{name}.attn.proj.bias"])
            result[:, top : top + window, left : left + window] = mixed.unflatten(1, (window, window))
    x = x + torch.roll(result, (shift, shift), dims=(1, 2))[:, :height, :width]
    return x + mlp(state, f"{name}.mlp", layer_norm(state, f"{name}.norm2", x, eps=1e-5))


def layer_norm(state: State, name: str, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=eps)


def mlp(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    x = F.gelu(F.linear(x, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
    return F.linear(x, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])


def xcit_shapes(width: int, depth: int, *, patch: int, heads: int) -> dict[str, tuple[int, ...]]:
    """The keys of XCiT's release: pos_embeder, and one qkv in the class attention."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embeder.token_projection.weight": (width, 64, 1, 1),
        "pos_embeder.token_projection.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    widths = [3, *[width * 2 * 2**i // patch for i in range(int(math.log2(patch)))]]
    for i, (have, want) in enumerate(itertools.pairwise(widths)):
        shapes |= {
            f"patch_embed.proj.{2 * i}.0.weight": (want, have, 3, 3),
            **_norm(f"patch_embed.proj.{2 * i}.1", want),
        }
    for block in [f"blocks.{i}" for i in range(depth)] + [f"cls_attn_blocks.{i}" for i in range(2)]:
        of_class = block.startswith("cls")
        for name, shape in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
            **({} if of_class else {"local_mp.conv1": (width, 1, 3, 3), "local_mp.conv2": (width, 1, 3, 3)}),
            **{f"norm{n}": (width,) for n in (1, 2) if of_class},
            **{f"norm{n}": (width,) for n in (1, 2, 3) if not of_class},
        }.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes |= {f"{block}.gamma{n}": (width,) for n in ((1, 2) if of_class else (1, 2, 3))}
        if not of_class:
            shapes |= {f"{block}.attn.temperature": (heads, 1, 1), **_norm(f"{block}.local_mp.bn", width)}
    return shapes


def xcit_features(state: State, pixels: torch.Tensor, heads: int) -> torch.Tensor:
    """XCiT (arXiv 2106.09681), its class attention with normalised patch tokens."""
    last = max(int(key.split(".")[2]) for key in state if key.startswith("patch_embed.proj."))
    x = pixels
    for i in range(0, last + 1, 2):
        x = F.conv2d(x, state[f"patch_embed.proj.{i}.0.weight"], stride=2, padding=1)
        x = batch_norm(state, f"patch_embed.proj.{i}.1", x)
        x = F.gelu(x) if i < last else x
    number, width, rows, columns = x.shape
    x = x.flatten(2).transpose(1, 2) + _xcit_positions(state, rows, columns)
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        b = f"blocks.{i}"
        q, k, v = F.linear(
            layer_norm(state, f"{b}.norm1", x), state[f"{b}.attn.qkv.weight"], state[f"{b}.attn.qkv.bias"]
        ).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, width // heads)).permute(0, 2, 3, 1) for t in (q, k, v))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)) * state[f"{b}.attn.temperature"]
        y = (weights.softmax(dim=-1) @ v).permute(0, 3, 1, 2).flatten(2)
        x = x + state[f"{b}.gamma1"] * F.linear(y, state[f"{b}.attn.proj.weight"], state[f"{b}.attn.proj.bias"])
        y = layer_norm(state, f"{b}.norm3", x).transpose(1, 2).unflatten(2, (rows, columns))
        y = F.conv2d(y, state[f"{b}.local_mp.conv1.weight"], state[f"{b}.local_mp.conv1.bias"], padding=1, groups=width)
        y = batch_norm(state, f"{b}.local_mp.bn", F.gelu(y))
        y = F.conv2d(y, state[f"{b}.local_mp.conv2.weight"], state[f"{b}.local_mp.conv2.bias"], padding=1, groups=width)
        x = x + state[f"{b}.gamma3"] * y.flatten(2).transpose(1, 2)
        x = x + state[f"{b}.gamma2"] * mlp(state, f"{b}.mlp", layer_norm(state, f"{b}.norm2", x))
    x = torch.cat([state["cls_token"].expand(number, -1, -1), x], dim=1)
    for i in range(2):
        b = f"cls_attn_blocks.{i}"
        normed = layer_norm(state, f"{b}.norm1", x)
        q, k, v = F.linear(normed, state[f"{b}.attn.qkv.weight"], state[f"{b}.attn.qkv.bias"]).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, width // heads)).transpose(1, 2) for t in (q, k, v))
        weights = ((q[:, :, :1] * k).sum(dim=-1) / math.sqrt(width // heads)).softmax(dim=-1)
        first = (weights[:, :, None] @ v).transpose(1, 2).flatten(2)
        first = F.linear(first, state[f"{b}.attn.proj.weight"], state[f"{b}.attn.proj.bias"])
        x = x + state[f"{b}.gamma1"] * torch.cat([first, normed[:, 1:]], dim=1)
        x = layer_norm(state, f"{b}.norm2", x)
        x = x + torch.cat([state[f"{b}.gamma2"] * mlp(state, f"{b}.mlp", x[:, :1]), x[:, 1:]], dim=1)
    return layer_norm(state, "norm", x)[:, 0]


def _xcit_positions(state: State, rows: int, columns: int) -> torch.Tensor:
    waves = torch.zeros(rows, columns, 64)
    for i in range(rows):
        for j in range(columns):
            for axis, share in enumerate(((i + 1) / (rows + 1e-6), (j + 1) / (columns + 1e-6))):
                for k in range(32):
                    angle = share * 2 * math.pi / 10000 ** (2 * (k // 2) / 32)
                    waves[i, j, 32 * axis + k] = math.cos(angle) if k % 2 else math.sin(angle)
    projection = state["pos_embeder.token_projection.weight"][:, :, 0, 0]
    return F.linear(waves, projection, state["pos_embeder.token_projection.bias"]).flatten(0, 1)


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
