"""Projection heads, with the parameter names of the published checkpoints.

Every head maps trunk features (N, D) to scores (N, K) before the temperature: logits, or cosines to prototypes.

    DinoHead   mlp.{0,2,4}, last_layer.{weight_g, weight_v}        (iBOT: last_layer2 beside it)
    MsnHead    projection.{fc1, bn1, fc2, bn2, fc3}, prototypes
    SwavHead   projection_head.{0, 1, 3}, prototypes.weight
    MlpHead    fc1, bn1, fc2
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robx.errors import InputError


class WeightNormLinear(nn.Module):
    """y = g (v / |v|) x without a bias, a row of v an output (Salimans and Kingma, arXiv 1602.07868, eq. 2).

    The parameters are called weight_g (K, 1) and weight_v (K, D), as in the published checkpoints.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_norm: bool = False) -> None:
        """`train_norm`: whether g is learnt; otherwise it is fixed at 1."""
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim).uniform_(-(in_dim**-0.5), in_dim**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, K)."""
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DinoHead(nn.Module):
    """DINO's head: an MLP with GELU, an L2-normalised bottleneck, a weight-normed linear layer to K outputs.

    Source: DINO, arXiv 2104.14294, appendix C, "projection head".
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        weight_norm: bool = True,
        train_norm: bool = False,
    ) -> None:
        """Build it with fresh weights.

        Args:
            in_dim: D, the trunk's width.
            out_dim: K.
            hidden: width of the MLP.
            bottleneck: width of the normalised output of the MLP.
            layers: linear layers of the MLP, at least 1.
            batch_norm: a BatchNorm after each hidden layer.
            weight_norm: False gives a plain last_layer without a bias.
            train_norm: whether the last layer's norms are learnt.
        """
        super().__init__()
        if layers < 1:
            raise InputError(f"a DINO head must have at least 1 layer, got {layers}")
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        steps: list[nn.Module] = []
        for i, (have, want) in enumerate(itertools.pairwise(widths)):
            steps.append(nn.Linear(have, want))
            if i < layers - 1:
                steps += [nn.BatchNorm1d(want), nn.GELU()] if batch_norm else [nn.GELU()]
        # A single layer is published without an index.
        self.mlp = nn.Sequential(*steps) if layers > 1 else steps[0]
        self.last_layer: nn.Module
        if weight_norm:
            self.last_layer = WeightNormLinear(bottleneck, out_dim, train_norm=train_norm)
        else:
            self.last_layer = nn.Linear(bottleneck, out_dim, bias=False)
        self.mlp.apply(_initialise)

    def bottleneck(self, x: Tensor) -> Tensor:
        """(N, D) -> unit vectors (N, bottleneck)."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> logits (N, K)."""
        return cast(Tensor, self.last_layer(self.bottleneck(x)))


class IbotHead(DinoHead):
    """DINO's head with a second last layer for patch tokens, or the same one for both (iBOT, arXiv 2111.07832).

    A shared layer is in the state dict under both names, last_layer and last_layer2, as iBOT publishes it.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        patch_out_dim: int | None = None,
        shared: bool = True,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        train_norm: bool = False,
    ) -> None:
        """Build it with fresh weights; see DinoHead. `patch_out_dim` is `out_dim` when the layer is shared."""
        super().__init__(in_dim, out_dim, hidden=hidden, bottleneck=bottleneck, layers=layers, train_norm=train_norm)
        width = patch_out_dim or out_dim
        if shared and width != out_dim:
            raise InputError(
                f"a shared iBOT head needs as many outputs for patches as for crops, got {width} and {out_dim}"
            )
        self.last_layer2 = self.last_layer if shared else WeightNormLinear(bottleneck, width, train_norm=train_norm)

    def patches(self, tokens: Tensor) -> Tensor:
        """Patch tokens (..., D) -> logits (..., K_patch)."""
        return cast(Tensor, self.last_layer2(self.bottleneck(tokens)))

    def mean_patch_scores(self, tokens: Tensor) -> Tensor:
        """The mean of ``patches(tokens)`` over all rows (N, D), as (K_patch,); the last layer is linear."""
        return cast(Tensor, self.last_layer2(self.bottleneck(tokens).mean(dim=0)))


class MsnProjection(nn.Module):
    """MSN's projection to the unit sphere: Linear-BN-GELU twice, then Linear (MSN, arXiv 2204.07141, appendix)."""

    def __init__(self, in_dim: int, *, hidden: int = 2048, out_dim: int = 256) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.bn2 = nn.BatchNorm1d(hidden)
        self.fc3 = nn.Linear(hidden, out_dim)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> unit vectors (N, out_dim) in float32."""
        x = F.gelu(self.bn1(self.fc1(x)))
        x = F.gelu(self.bn2(self.fc2(x)))
        return F.normalize(self.fc3(x).float(), dim=-1)


class MsnHead(nn.Module):
    """MSN's projection and its prototypes: the cosine to each (MSN, arXiv 2204.07141, section 3)."""

    def __init__(self, in_dim: int, out_dim: int, *, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.projection = MsnProjection(in_dim, hidden=hidden, out_dim=bottleneck)
        # Uniform in +-1/sqrt(d), as in MSN; only their directions matter.
        self.prototypes = nn.Parameter(torch.empty(out_dim, bottleneck).uniform_(-(bottleneck**-0.5), bottleneck**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> cosines (N, K)."""
        return F.linear(self.projection(x), F.normalize(self.prototypes, dim=-1))


class SwavProjection(nn.Module):
    """SwAV's projection to the unit sphere: Linear-BN-ReLU-Linear (SwAV, arXiv 2006.09882, appendix A)."""

    def __init__(self, in_dim: int, *, hidden: int = 2048, out_dim: int = 128) -> None:
        super().__init__()
        self.projection_head = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out_dim)
        )

    def project(self, x: Tensor) -> Tensor:
        """(N, D) -> unit vectors (N, out_dim) in float32."""
        return F.normalize(self.projection_head(x).float(), dim=-1)

    def score(self, projected: Tensor) -> Tensor:
        """Unit vectors (N, out_dim) -> scores (N, K); without prototypes the vectors themselves."""
        return projected

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> scores (N, K)."""
        return self.score(self.project(x))


class SwavHead(SwavProjection):
    """SwAV's projection and prototypes, kept on the unit sphere: cosines (SwAV, arXiv 2006.09882, section 3.1).

    SwAV normalises the prototypes before each step; here the forward pass does, which learns the same directions.
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden: int = 2048, bottleneck: int = 128) -> None:
        super().__init__(in_dim, hidden=hidden, out_dim=bottleneck)
        self.prototypes = nn.Linear(bottleneck, out_dim, bias=False)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=-1))

    def score(self, projected: Tensor) -> Tensor:
        """Unit vectors (N, bottleneck) -> cosines (N, K)."""
        return F.linear(projected, F.normalize(self.prototypes.weight, dim=-1))


class FrozenPrototypes(SwavProjection):
    """SwAV's projection into the teacher's space, scored against the teacher's own prototypes, which are frozen.

    RoB-SwAV's alternative head (arXiv 2301.09451). The prototypes are a buffer: part of the state dict, unseen by the
    optimiser.
    """

    prototypes: Tensor

    def __init__(self, in_dim: int, prototypes: Tensor, *, hidden: int = 2048) -> None:
        """`prototypes` (K, d); normalised here."""
        super().__init__(in_dim, hidden=hidden, out_dim=prototypes.shape[1])
        self.register_buffer("prototypes", F.normalize(prototypes.detach().float().clone(), dim=-1))

    def score(self, projected: Tensor) -> Tensor:
        """Unit vectors (N, d) -> cosines (N, K)."""
        return F.linear(projected, self.prototypes)


class MlpHead(nn.Module):
    """D -> hidden -> K logits: RoB's simple student head (arXiv 2301.09451, released configurations).

    ViTs have nothing between the two linear layers, ResNets a BatchNorm.
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden: int = 2048, batch_norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden)
        self.bn1 = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, out_dim)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> logits (N, K)."""
        return cast(Tensor, self.fc2(self.bn1(self.fc1(x))))

    def patches(self, tokens: Tensor) -> Tensor:
        """Patch tokens (M, D) -> logits (M, K)."""
        return cast(Tensor, self(tokens))

    def mean_patch_scores(self, tokens: Tensor) -> Tensor:
        """The mean of ``patches(tokens)`` over all rows (M, D), as (K,)."""
        return cast(Tensor, self(tokens).mean(dim=0))


def scores_and_embeddings(
    head: nn.Module, features: Tensor
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor] | None]:
    """Scores (N, K) of features (N, D); for SwAV's heads also the embeddings (N, E) behind them and what scores those.

    The embeddings are detached: the queue keeps them.
    """
    if not isinstance(head, SwavProjection):
        return cast(Tensor, head(features)), None, None
    projected = head.project(features)
    return head.score(projected), projected.detach(), head.score


def _initialise(module: nn.Module) -> None:
    # Truncated normal with std 0.02, the initialisation of DINO's, iBOT's and MSN's heads.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
