"""Shared by the mobile converters: a fixed batch, attention that all support, and which layers stay in float."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from torch import Tensor, nn

from robx.errors import InputError
from robx.export.formats.builder import Source
from robx.export.int8.float_scope import module_names
from robx.export.parity import parity
from robx.export.request import ExportRequest
from robx.records import TensorSpec
from robx.store.onnx_safety import load_checked


def mobile_model(model: nn.Module | None, request: ExportRequest) -> nn.Module:
    """A copy of `model` whose attention is plain matrix products and a softmax on tensors of at most four axes.

    timm's attention puts query, key and value into one tensor of five axes, which ncnn and older Core ML targets do not
    support, and its fused kernel decomposes into a dozen operators that accelerators do not take.

    Raises:
        InputError: no PyTorch model to convert from.
        ArtifactError: the copy does not give the model's embeddings.
    """
    if model is None:
        raise InputError(f"{request.target.format} is converted from a student's PyTorch weights: give a run's folder")
    mobile = copy.deepcopy(model).eval()
    _replace_attention(mobile)
    pixels = torch.randn((2, 3, *request.image_shape), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (_embedding(network(pixels)) for network in (model.eval(), mobile))
    parity(expected, found, precision="fp32", what=f"{request.student.timm_name} with plain attention")
    return mobile


def _embedding(output: Tensor | tuple[Tensor, ...]) -> np.ndarray:
    return (output if isinstance(output, Tensor) else output[0]).numpy()


def example_input(request: ExportRequest) -> Tensor:
    """Zeros of the exported input's shape, with its batch fixed."""
    return torch.zeros((request.fixed_batch, 3, *request.image_shape))


def fix_batch(specs: tuple[TensorSpec, ...], batch: int) -> tuple[TensorSpec, ...]:
    """`specs` with their first axis fixed."""
    return tuple(dataclasses.replace(spec, shape=(batch, *spec.shape[1:])) for spec in specs)


def calibration_batches(calibration: np.ndarray | None, request: ExportRequest) -> list[Tensor]:
    """The calibration images (N, 3, H, W) in batches of the exported size; an incomplete last batch is dropped.

    Raises:
        InputError: fewer images than one batch.
    """
    batch = request.fixed_batch
    if calibration is None or len(calibration) < batch:
        have = 0 if calibration is None else len(calibration)
        raise InputError(f"{have} calibration images are fewer than one batch of {batch}: give more with --data")
    images = torch.from_numpy(calibration)
    return list(torch.split(images[: len(images) // batch * batch], batch))


def float_modules(source: Source, mobile: nn.Module) -> list[str]:
    """Names of the modules of `mobile`, a `mobile_model` of ``source.model``, that the candidate keeps in float.

    Raises:
        ArtifactError: a node of the candidate is not one of the model's layers.
    """
    candidate = source.candidate
    if candidate is None or not candidate.float_nodes or source.model is None:
        return []
    found = []
    for name in module_names(source.model, load_checked(source.onnx), candidate):
        parent, _, last = name.rpartition(".")
        if last == "qkv" and isinstance(mobile.get_submodule(parent), PlainAttention):
            found += [f"{parent}.{part}" for part in ("query", "key", "value")]
        else:
            found.append(name)
    return found


class PlainAttention(nn.Module):
    """timm's `Attention` with separate projections, the scale folded into the query's."""

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.heads, self.head_dim = source.num_heads, source.head_dim
        self.query, self.key, self.value = (_rows(source.qkv, part) for part in range(3))
        self.q_norm, self.k_norm, self.norm = source.q_norm, source.k_norm, source.norm
        self.scale = source.scale
        if isinstance(self.q_norm, nn.Identity):
            self.query.weight.data *= self.scale
            if self.query.bias is not None:
                self.query.bias.data *= self.scale
            self.scale = 1.0
        self.proj = source.proj

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(N, T, C) -> (N, T, C); masks are not supported, as no student has one."""
        if attn_mask is not None or is_causal:
            raise InputError("attention with a mask cannot be exported to a mobile format")
        n, tokens, _ = x.shape
        q, k, v = (
            layer(x).reshape(n, tokens, self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.scale != 1.0:
            q = q * self.scale
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        mixed = (weights @ v).transpose(1, 2).reshape(n, tokens, self.heads * self.head_dim)
        embedded: Tensor = self.proj(self.norm(mixed))
        return embedded


def _rows(joint: nn.Linear, part: int) -> nn.Linear:
    """The `part`-th of the three projections that `joint` stacks."""
    width = joint.out_features // 3
    rows = slice(part * width, (part + 1) * width)
    layer = nn.Linear(joint.in_features, width, bias=joint.bias is not None)
    layer.weight = nn.Parameter(joint.weight[rows].detach().clone(), requires_grad=False)
    if joint.bias is not None:
        layer.bias = nn.Parameter(joint.bias[rows].detach().clone(), requires_grad=False)
    return layer


def _replace_attention(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Attention) and getattr(child, "gate", None) is None:
            setattr(module, name, PlainAttention(child))
        else:
            _replace_attention(child)
