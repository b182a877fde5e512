"""Spherical k-means: centres on the unit sphere that maximise the mean cosine to their nearest points.

Dhillon and Modha, "Concept decompositions for large sparse text data using clustering" (2001); first centres by
k-means++ (Arthur and Vassilvitskii, 2007) with the distance 1 - cosine. Deterministic given the seed.

N points   K centres   D width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robx.errors import InputError
from robx.progress import Progress

_BLOCK_NUMBERS = 2**25  # similarities in memory at once: 128 MB in float32


@dataclass(frozen=True)
class Clustering:
    """Centres, each point's centre, and the mean cosine between the two."""

    centres: Tensor  # (K, D), unit rows
    assignment: Tensor  # (N,) int64
    objective: float  # mean cosine, at most 1; never falls from one iteration to the next
    iterations: int


def spherical_kmeans(
    points: Tensor,
    k: int,
    *,
    seed: int,
    iterations: int = 30,
    tolerance: float = 1e-4,
    progress: Progress | None = None,
) -> Clustering:
    """Cluster points (N, D), which are normalised here, until the objective gains less than `tolerance`.

    A centre that loses all its points restarts at the point with the lowest similarity to its centre.

    Raises:
        InputError: fewer points than centres.
    """
    if len(points) < k:
        raise InputError(f"{k} prototypes need at least {k} images, got {len(points)}: lower --prototypes")
    points = F.normalize(points.float(), dim=1)
    centres = _plus_plus(points, k, seed=seed)
    objective = -1.0
    for iteration in range(1, iterations + 1):
        similarity, assignment = nearest(points, centres)
        previous, objective = objective, float(similarity.double().mean())
        if objective - previous < tolerance:
            break
        centres = _means(points, assignment, similarity, centres)
        if progress is not None:
            progress(iteration, iterations, f"k-means, mean cosine {objective:.3f}")
    similarity, assignment = nearest(points, centres)
    return Clustering(centres, assignment, float(similarity.double().mean()), iteration)


def nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the nearest of the centres (K, D), and its index, both (N,), for unit points (N, D)."""
    rows = max(1, _BLOCK_NUMBERS // len(centres))
    found = [(points[at : at + rows] @ centres.T).max(dim=1) for at in range(0, len(points), rows)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def sums_of(points: Tensor, assignment: Tensor, k: int) -> Tensor:
    """The sum of the points (N, D) assigned to each of K centres, (K, D); the same in every call, on a GPU too."""
    sums = points.new_zeros(k, points.shape[1])
    if points.is_cuda:  # sorts first; index_add_ adds in any order there
        return sums.index_put_((assignment,), points, accumulate=True)
    return sums.index_add_(0, assignment, points)


def _plus_plus(points: Tensor, k: int, *, seed: int) -> Tensor:
    """K points, each drawn with probability proportional to its distance from the points drawn before."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [first]
    distance = 1 - points @ points[first]
    for _ in range(k - 1):
        mass = distance.clamp(min=0).double().cumsum(0)
        total = float(mass[-1])
        # With fewer distinct points than centres the mass is 0: any point will do.
        draw = float(torch.rand(1, generator=generator, dtype=torch.float64)) * total
        index = min(int(torch.searchsorted(mass, draw, right=True)), len(points) - 1)
        chosen.append(index)
        distance = torch.minimum(distance, 1 - points @ points[index])
    return points[chosen].clone()


def _means(points: Tensor, assignment: Tensor, similarity: Tensor, centres: Tensor) -> Tensor:
    sums = sums_of(points, assignment, len(centres))
    counts = torch.bincount(assignment, minlength=len(centres))
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        sums[empty] = points[similarity.argsort()[: len(empty)]]
    # Points that cancel out give no direction: such a centre stays where it was.
    lost = sums.norm(dim=1) < 1e-6
    sums[lost] = centres[lost]
    return F.normalize(sums, dim=1)
