"""Published trunks: the architecture inferred from a state dict, and the network built from it.

Only the shapes of the tensors count, never the name of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import timm
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as swin_filter_fn
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from timm.models.xcit import checkpoint_filter_fn as xcit_filter_fn
from torch import Tensor, nn

from robx.distill.teachers.release_forward import follow_release
from robx.distill.teachers.trunk_specs import ResNetTrunk, SwinTrunk, TimmTrunk, TrunkSpec, VitTrunk, XcitTrunk
from robx.distill.teachers.wide_resnet import WideResNet
from robx.errors import ArtifactError
from robx.trunk import build_trunk, embedding_width

State = Mapping[str, Tensor]

# The width of XCiT-Nano, whose class attention does not normalise the patch tokens; all others do.
_XCIT_NANO = 128
_BASIC_RESNETS = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}


def infer_trunk(state: State, *, arch: str | None, where: str) -> TrunkSpec:
    """The architecture of a trunk's state dict.

    Args:
        state: tensors without prefixes and without the head.
        arch: the architecture named in the file; used only if timm knows it.
        where: the file, for error messages.

    Raises:
        ArtifactError: an unknown architecture.
    """
    if arch is not None and timm.is_model(arch):
        return TimmTrunk(arch)
    try:
        return _infer(state, where=where)
    except (KeyError, IndexError) as error:  # a tensor is missing or has fewer axes
        raise ArtifactError(f"{where} contains a truncated or damaged trunk ({error}): get it again") from error


def _infer(state: State, *, where: str) -> TrunkSpec:
    if "pos_embed" in state and "blocks.0.mlp.fc1.weight" in state:
        return _infer_vit(state, where)
    if "layer1.0.conv3.weight" in state:
        depths = tuple(_count(state, rf"layer{n}\.(\d+)\.") for n in range(1, _count(state, r"layer(\d+)\.", 1) + 1))
        return ResNetTrunk(stem=state["conv1.weight"].shape[0], depths=depths)
    if "layer1.0.conv2.weight" in state:
        depths = tuple(_count(state, rf"layer{n}\.(\d+)\.") for n in range(1, 5))
        if depths in _BASIC_RESNETS:
            return TimmTrunk(_BASIC_RESNETS[depths])
    if "layers.0.blocks.0.attn.relative_position_bias_table" in state:
        return _infer_swin(state)
    if "cls_attn_blocks.0.mlp.fc1.weight" in state:
        return _infer_xcit(state)
    first = next(iter(state), "nothing")
    raise ArtifactError(
        f"{where} contains a trunk that is not a ViT, ResNet, Swin or XCiT (first key: {first}): check the file"
    )


def build_published_trunk(spec: TrunkSpec) -> nn.Module:
    """The network, without a classifier and with random weights; pixels (N, 3, H, W) to features (N, D)."""
    match spec:
        case VitTrunk():
            trunk: nn.Module = VisionTransformer(
                img_size=spec.grid * spec.patch,
                patch_size=spec.patch,
                embed_dim=spec.width,
                depth=spec.depth,
                num_heads=max(1, spec.width // 64),
                mlp_ratio=(spec.hidden or 4 * spec.width) / spec.width,
                num_classes=0,
                global_pool="token",
                dynamic_img_size=True,
            )
            follow_release(trunk, position_offset=spec.position_offset)
            return trunk
        case ResNetTrunk():
            return WideResNet(stem=spec.stem, depths=spec.depths)
        case SwinTrunk():
            trunk = SwinTransformer(
                img_size=224,
                patch_size=spec.patch,
                embed_dim=spec.width,
                depths=spec.depths,
                num_heads=spec.heads,
                window_size=spec.window,
                always_partition=spec.always_partition,
                num_classes=0,
                strict_img_size=False,
            )
            follow_release(trunk)
            return trunk
        case XcitTrunk():
            return Xcit(
                patch_size=spec.patch,
                embed_dim=spec.width,
                depth=spec.depth,
                num_heads=spec.heads,
                mlp_ratio=(spec.hidden or 4 * spec.width) / spec.width,
                num_classes=0,
                tokens_norm=spec.width != _XCIT_NANO,
            )
        case TimmTrunk():
            return build_trunk(spec.name)


def load_trunk_state(trunk: nn.Module, state: State, *, where: str) -> None:
    """Copy a published state dict into `trunk`, every key of it.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of another shape; the message names the first.
    """
    # iBOT's mask token is only used for masked student crops; a teacher's input is never masked.
    tensors = {key: value for key, value in state.items() if key != "masked_embed"}
    if isinstance(trunk, SwinTransformer):
        tensors = swin_filter_fn(tensors, trunk)
    elif isinstance(trunk, Xcit):  # its keys are renamed, and the class attention's qkv is split
        tensors = xcit_filter_fn(tensors, trunk)  # type: ignore[no-untyped-call]
    load_strictly(trunk, tensors, where=where)


def load_strictly(module: nn.Module, tensors: State, *, where: str) -> None:
    """``load_state_dict`` with a one-line error that names the first offending key.

    Raises:
        ArtifactError: the tensors do not fit.
    """
    want = module.state_dict()
    for key, value in tensors.items():
        if key in want and want[key].shape != value.shape:
            shapes = f"{tuple(value.shape)} and {tuple(want[key].shape)} was expected"
            raise ArtifactError(f"{where} does not fit: {key} is {shapes}; check that it is the right file")
    counters = {key for key in want if key.endswith("num_batches_tracked")}
    if missing := [key for key in want if key not in tensors and key not in counters]:
        raise ArtifactError(f"{where} lacks {missing[0]} ({len(missing)} tensors in total): get the complete file")
    if extra := [key for key in tensors if key not in want]:
        raise ArtifactError(
            f"{where} has {extra[0]}, which is unknown ({len(extra)} in total): check that it is the right file"
        )
    module.load_state_dict(dict(tensors), strict=False)


def trunk_width(trunk: nn.Module) -> int:
    """D, the width of the trunk's output."""
    return trunk.num_features if isinstance(trunk, WideResNet) else embedding_width(trunk)


def patch_size_of(trunk: nn.Module) -> int | None:
    """Side of one patch token in pixels, or None for a network without tokens."""
    if isinstance(trunk, SwinTransformer):
        return _patch(trunk) << (len(trunk.layers) - 1)
    return _patch(trunk) or None


def has_tokens(trunk: nn.Module) -> bool:
    """Whether :func:`tokens` supports the trunk."""
    return isinstance(trunk, VisionTransformer | SwinTransformer)


def tokens(trunk: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) and patch tokens (N, P, D), both after the final norm, of a ViT or a Swin."""
    if isinstance(trunk, VisionTransformer):
        x = trunk.forward_features(pixels)
        return x[:, 0], x[:, trunk.num_prefix_tokens :]
    if isinstance(trunk, SwinTransformer):
        x = trunk.forward_features(pixels).flatten(1, 2)
        return x.mean(dim=1), x
    raise ArtifactError(f"{type(trunk).__name__} has no patch tokens: use a ViT or Swin as an iBOT teacher")


def _patch(trunk: nn.Module) -> int:
    sizes: object = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    return int(sizes[0]) if isinstance(sizes, tuple | list) else 0


def _infer_vit(state: State, where: str) -> VitTrunk:
    depth = _count(state, r"blocks\.(\d+)\.")
    width, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    places = state["pos_embed"].shape[1] - 1
    grid = math.isqrt(places)
    if grid * grid != places:
        raise ArtifactError(f"{where} has {places} position embeddings, which is not a square grid: check the file")
    if width > 64 and width % 64:
        raise ArtifactError(
            f"{where} contains a ViT {width} wide, which is not a multiple of 64: its number of heads is unknown, "
            "use another file"
        )
    return VitTrunk(width, depth, patch, grid, state["blocks.0.mlp.fc1.weight"].shape[0])


def _infer_swin(state: State) -> SwinTrunk:
    stages = _count(state, r"layers\.(\d+)\.")
    tables = [state[f"layers.{n}.blocks.0.attn.relative_position_bias_table"] for n in range(stages)]
    windows = [(math.isqrt(table.shape[0]) + 1) // 2 for table in tables]
    patch = state["patch_embed.proj.weight"].shape[-1]
    smallest_map = 224 // patch // 2 ** (stages - 1)
    return SwinTrunk(
        width=state["patch_embed.proj.weight"].shape[0],
        depths=tuple(_count(state, rf"layers\.{n}\.blocks\.(\d+)\.") for n in range(stages)),
        heads=tuple(table.shape[1] for table in tables),
        window=windows[0],
        patch=patch,
        always_partition=windows[-1] > smallest_map,
    )


def _infer_xcit(state: State) -> XcitTrunk:
    convolutions = _count(state, r"patch_embed\.proj\.(\d+)\.0\.weight")  # an activation after each but the last
    return XcitTrunk(
        width=state["cls_token"].shape[-1],
        depth=_count(state, r"blocks\.(\d+)\."),
        patch=2 ** ((convolutions + 1) // 2),
        heads=state["blocks.0.attn.temperature"].shape[0],
        hidden=state["blocks.0.mlp.fc1.weight"].shape[0],
    )


def _count(state: State, pattern: str, first: int = 0) -> int:
    found = [int(m.group(1)) for key in state if (m := re.match(pattern, key))]
    return max(found) + 1 - first if found else 0
