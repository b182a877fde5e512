"""Published projection heads and prototypes, rebuilt from the shapes of their tensors.

All four methods compute normalise(projection(x)) times the prototypes. They differ in the projection (layers, norm,
activation) and in the norm of the prototypes: 1 (MSN, SwAV) or trained (DINO, iBOT).

N images   P patches   D width   E width of the projection   K prototypes
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robx.errors import ArtifactError

State = Mapping[str, Tensor]


class PrototypeHead(nn.Module):
    """Scores of features against prototypes: normalise(projection(x - mean)) @ prototypes.T."""

    mean: Tensor | None
    prototypes: Tensor
    patch_prototypes: Tensor | None

    def __init__(
        self,
        projection: nn.Module,
        prototypes: Tensor,
        *,
        patch_prototypes: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """`prototypes` (K, E) are used unchanged; `patch_prototypes` (Kp, E) score patch tokens; `mean` is (D,)."""
        super().__init__()
        self.projection = projection
        self.register_buffer("mean", mean)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("patch_prototypes", patch_prototypes)

    def project(self, x: Tensor) -> Tensor:
        """Unit vectors (N, E) of features (N, D), in float32."""
        centred = x if self.mean is None else x - self.mean
        return F.normalize(self.projection(centred).float(), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of features (N, D), in float32."""
        return self._score(self.project(x), self.prototypes)

    def patches(self, x: Tensor) -> Tensor:
        """Scores (N, P, Kp) of patch tokens (N, P, D); a shared head uses the CLS prototypes."""
        prototypes = self.prototypes if self.patch_prototypes is None else self.patch_prototypes
        scores = self._score(self.project(x.flatten(0, 1)), prototypes)
        return scores.reshape(x.shape[0], x.shape[1], -1)

    @staticmethod
    def _score(projected: Tensor, prototypes: Tensor) -> Tensor:
        """In float32 even under autocast: bf16 rounds a cosine by about .004, which a temperature of .03 makes .13."""
        with torch.autocast(projected.device.type, enabled=False):
            return F.linear(projected, prototypes)


def dino_head(state: State, *, where: str) -> PrototypeHead:
    """DINO's and iBOT's head: an MLP with GELU (``mlp.*``), then a linear layer, weight-normed or plain.

    iBOT's ``last_layer2`` scores the patches; a shared head repeats ``last_layer`` under that name or omits it.
    """
    numbers = sorted({int(m.group(1)) for key in state if (m := re.match(r"mlp\.(\d+)\.weight$", key))})
    names = [f"mlp.{n}" for n in numbers] or ["mlp"]
    projection = _stack(state, names, nn.GELU, where=where)
    last = _last_layer(state, "last_layer", where=where)
    has_patches = any(key.startswith("last_layer2.") for key in state)
    patches = _last_layer(state, "last_layer2", where=where) if has_patches else None
    _require_known(state, [*names, "last_layer", "last_layer2"], where=where)
    for prototypes in (last,) if patches is None else (last, patches):
        _require_width(prototypes, state[f"{names[-1]}.weight"], where=where)
    if patches is not None and patches.shape == last.shape and torch.equal(patches, last):
        patches = None  # shared: keep one copy
    return PrototypeHead(projection, last, patch_prototypes=patches)


def msn_head(state: State, prototypes: Tensor, *, where: str) -> PrototypeHead:
    """MSN's head, ``fc.{fc1,bn1,fc2,bn2,fc3}`` with GELU, and its prototypes (K, E), normalised here."""
    names = [name for name in ("fc1", "bn1", "fc2", "bn2", "fc3") if f"{name}.weight" in state]
    projection = _stack(state, names, nn.GELU, where=where)
    _require_known(state, names, where=where)
    return PrototypeHead(projection, _matching(prototypes, state, names, where=where))


def swav_head(state: State, *, where: str) -> PrototypeHead:
    """SwAV's head, ``projection_head.{0,1,3}`` with ReLU, and ``prototypes.weight`` (K, E).

    SwAV normalises its prototypes before every step, so they are normalised here.
    """
    pattern = r"(projection_head(?:\.\d+)?)\.weight$"
    names = sorted({m.group(1) for key in state if (m := re.match(pattern, key))}, key=_number)
    if "prototypes.weight" not in state:
        raise ArtifactError(
            f"{where} has no single set of prototypes (prototypes.weight): give the file that SwAV published"
        )
    projection = _stack(state, names, nn.ReLU, where=where)
    _require_known(state, [*names, "prototypes"], where=where)
    return PrototypeHead(projection, _matching(state["prototypes.weight"], state, names, where=where))


def fitted_head(mean: Tensor, vectors: Tensor) -> PrototypeHead:
    """The head of a teacher published without one: cosines to fitted prototypes (K, D), centred on `mean` (D,)."""
    return PrototypeHead(nn.Identity(), F.normalize(vectors.float(), dim=1), mean=mean.float())


def random_head(
    width: int,
    *,
    prototypes: int,
    hidden: int = 2048,
    layers: int = 3,
    bottleneck: int = 256,
    patch_prototypes: int | None = None,
    batch_norm: bool = False,
) -> PrototypeHead:
    """A head of published shapes with random weights, for measuring a teacher whose file is not there."""
    widths = [width, *[hidden] * (layers - 1), bottleneck]
    steps: list[nn.Module] = []
    for place, (have, want) in enumerate(itertools.pairwise(widths), start=1):
        steps.append(nn.Linear(have, want))
        if place < layers:
            steps += [nn.BatchNorm1d(want), nn.GELU()] if batch_norm else [nn.GELU()]
    patches = None if patch_prototypes is None else torch.randn(patch_prototypes, bottleneck)
    return PrototypeHead(nn.Sequential(*steps), torch.randn(prototypes, bottleneck), patch_prototypes=patches)


def _stack(state: State, names: Sequence[str], activation: type[nn.Module], *, where: str) -> nn.Sequential:
    """Linear and BatchNorm layers by the shapes of their weights; an activation between two linear layers."""
    layers: list[nn.Module] = []
    linear = [name for name in names if f"{name}.weight" in state and state[f"{name}.weight"].ndim == 2]
    if not linear:
        raise ArtifactError(f"{where} has no projection head: give the full checkpoint")
    for name in names:
        if name in linear:
            layers += [activation()] if layers else []
            layers.append(_linear(state, name, layers, where=where))
        else:
            layers.append(_batch_norm(state, name, where=where))
    return nn.Sequential(*layers)


def _linear(state: State, name: str, layers: Sequence[nn.Module], *, where: str) -> nn.Linear:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    before = next((layer.out_features for layer in reversed(layers) if isinstance(layer, nn.Linear)), None)
    if before is not None and before != weight.shape[1]:
        raise ArtifactError(
            f"{where}: the head's {name} takes {weight.shape[1]} numbers and gets {before}: it is damaged, get it again"
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.detach().float().clone()
    if bias is not None:
        layer.bias.data = bias.detach().float().clone()
    return layer


def _batch_norm(state: State, name: str, *, where: str) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(state[f"{name}.weight"].shape[0])
    for part in ("weight", "bias", "running_mean", "running_var"):
        if f"{name}.{part}" not in state:
            raise ArtifactError(f"{where}: the head's {name} lacks its {part}: give the full checkpoint")
        getattr(layer, part).data = state[f"{name}.{part}"].detach().float().clone()
    return layer


def _last_layer(state: State, name: str, *, where: str) -> Tensor:
    """The prototypes (K, E) of a linear layer: weight-normed, g v / |v| row by row, or plain."""
    for size, direction in (
        (f"{name}.weight_g", f"{name}.weight_v"),
        (f"{name}.parametrizations.weight.original0", f"{name}.parametrizations.weight.original1"),
    ):
        if size in state and direction in state:
            g, v = state[size].detach().float(), state[direction].detach().float()
            return g * F.normalize(v, dim=1)
    if f"{name}.weight" in state:
        return state[f"{name}.weight"].detach().float().clone()
    raise ArtifactError(f"{where} has no {name}, the prototypes: give the full checkpoint, not the backbone")


def _require_known(state: State, layers: Sequence[str], *, where: str) -> None:
    """Refuse a head with tensors that the rebuilt one would ignore, such as a last layer's bias."""
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = [name for name in layers if f"{name}.weight" in state and state[f"{name}.weight"].ndim == 1]
    known = {f"{name}.{part}" for name in norms for part in parts}
    for name in layers:
        if name.startswith(("last_layer", "prototypes")):
            known |= {f"{name}.{part}" for part in ("weight", "weight_g", "weight_v")}
            known |= {f"{name}.parametrizations.weight.original{number}" for number in (0, 1)}
        else:
            known |= {f"{name}.weight", f"{name}.bias"}
    if unknown := sorted(set(state) - known):
        raise ArtifactError(
            f"{where}: the head has {unknown[0]}, which robx does not know ({len(unknown)} in total): its scores would "
            "be wrong without it, give the published file"
        )


def _matching(prototypes: Tensor, state: State, names: Sequence[str], *, where: str) -> Tensor:
    _require_width(prototypes, state[f"{names[-1]}.weight"], where=where)
    return F.normalize(prototypes.detach().float(), dim=1)


def _require_width(prototypes: Tensor, projection: Tensor, *, where: str) -> None:
    """Refuse prototypes (K, E) whose width is not that of the projection's last layer (E, ...)."""
    if prototypes.ndim != 2 or prototypes.shape[1] != projection.shape[0]:
        raise ArtifactError(
            f"{where}: the prototypes are {tuple(prototypes.shape)}, the head has {projection.shape[0]} outputs: "
            "get it again"
        )


def _number(name: str) -> int:
    return int(name.rpartition(".")[2]) if "." in name else 0
