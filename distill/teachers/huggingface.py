"""Hugging Face transformers' names of ViTs (ViT, DeiT, MSN, DINOv2), mapped to the releases' names, which timm reads.

Only backbones were converted: a checkpoint of transformers has no projection head or prototypes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from robx.errors import ArtifactError

_CLS = "embeddings.cls_token"
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
}
_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_ATTENTION = r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)"
_QKV = ("query", "key", "value")


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a network of transformers."""
    return any(re.search(r"(^|\.)(embeddings|embedder)\.", key) for key in state)


def from_transformers(state: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """The state dict of a ViT of transformers under the release's names; the unused pooler is left out.

    Raises:
        ArtifactError: another network, or a key that has no counterpart.
    """
    prefix = next((key.removesuffix(_CLS) for key in state if key.endswith(_CLS)), None)
    renamed: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        short = key.removeprefix(prefix or "")
        if short.startswith("pooler."):
            continue
        if match := re.fullmatch(_ATTENTION, short):
            number, part, kind = match.groups()
            qkv.setdefault(f"blocks.{number}.attn.qkv.{kind}", {})[part] = value
        else:
            renamed[_name(short, where=where)] = value
    for name, parts in qkv.items():
        if set(parts) != set(_QKV):
            raise ArtifactError(f"{where} lacks a part of {name}: it is truncated, get it again")
        renamed[name] = torch.cat([parts[part] for part in _QKV])
    return renamed


def _name(key: str, *, where: str) -> str:
    module, _, part = key.rpartition(".")
    if key in _TOP:
        return _TOP[key]
    if module in _TOP:
        return f"{_TOP[module]}.{part}"
    if match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", key):
        number, rest = match.groups()
        module, _, part = rest.rpartition(".")
        if rest in _BLOCK:
            return f"blocks.{number}.{_BLOCK[rest]}"
        if module in _BLOCK:
            return f"blocks.{number}.{_BLOCK[module]}.{part}"
    raise ArtifactError(
        f"{where} is a checkpoint of Hugging Face transformers that cannot be converted (key {key[:80]}): "
        "give timm's weights of this model (huggingface.co/timm), or the file of its release"
    )
