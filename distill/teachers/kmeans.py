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


class StreamingKMeans:
    """Spherical k-means in one pass without keeping the batches: each centre is the mean of its points so far.

    The first `warm_up` points are kept, clustered together, and give the first centres (Sculley, "Web-scale k-means
    clustering", 2010, with per-centre counts as learning rates). Memory does not grow with the stream.
    """

    def __init__(self, k: int, *, seed: int, warm_up: int | None = None) -> None:
        """`warm_up` is 16 K points by default."""
        self.k, self.seed = k, seed
        self.warm_up = max(k, warm_up if warm_up is not None else 16 * k)
        self.seen = 0
        self._buffer: list[Tensor] = []
        self._sums: Tensor | None = None  # (K, D), of unit points

    def update(self, points: Tensor) -> None:
        """Add a batch (B, D)."""
        points = F.normalize(points.float(), dim=1)
        self.seen += len(points)
        if self._sums is not None:
            self._add(points)
            return
        self._buffer.append(points)
        if self.seen >= self.warm_up:
            self._start()

    def centres(self) -> Tensor:
        """The centres so far, (K, D), unit rows.

        Raises:
            InputError: fewer points than centres.
        """
        sums = self._start() if self._sums is None else self._sums
        return F.normalize(sums, dim=1)

    def _start(self) -> Tensor:
        points = torch.cat(self._buffer) if self._buffer else torch.empty(0, 1)
        found = spherical_kmeans(points, self.k, seed=self.seed)
        sums = torch.zeros_like(found.centres).index_add_(0, found.assignment, points)
        # A centre whose points cancel out, or that has none, keeps its direction with a small weight.
        self._sums = sums.add_(found.centres, alpha=1e-3)
        self._buffer = []
        return sums

    def _add(self, points: Tensor) -> None:
        sums = self._sums
        if sums is not None:
            _, assignment = nearest(points, F.normalize(sums, dim=1))
            sums.index_add_(0, assignment, points)


def nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the nearest of the centres (K, D), and its index, both (N,), for unit points (N, D)."""
    rows = max(1, _BLOCK_NUMBERS // len(centres))
    found = [(points[at : at + rows] @ centres.T).max(dim=1) for at in range(0, len(points), rows)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


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
    sums = torch.zeros_like(centres).index_add_(0, assignment, points)
    counts = torch.bincount(assignment, minlength=len(centres))
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        sums[empty] = points[similarity.argsort()[: len(empty)]]
    # Points that cancel out give no direction: such a centre stays where it was.
    lost = sums.norm(dim=1) < 1e-6
    sums[lost] = centres[lost]
    return F.normalize(sums, dim=1)
