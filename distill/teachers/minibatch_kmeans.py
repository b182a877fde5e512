"""Spherical k-means on mini-batches, for points that are spread over processes and stay on their device.

Sculley, "Web-scale k-means clustering" (2010), on the unit sphere. A centre is the direction of the sum of the points
assigned to it, of which older ones fade with a time constant of one epoch: Sculley's rate, one over the number of
points so far, never forgets the assignments to the poor first centres. With one batch per epoch this is Lloyd's
algorithm. The first centres are drawn in rounds, as in k-means|| (Bahmani et al., 2012): each adds an eighth of those
that there are, with probability proportional to the distance to the nearest one; the first 16 are k-means++'s.

Each process holds its points in 2 bytes per value, three copies of the centres in float32, one batch, and one block of
similarities (128 MB). No tensor grows with N times K. The result is a function of the points, the seed and the number
of processes.

N points of this process   K centres   D width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robx.distill.teachers.kmeans import nearest, sums_of
from robx.distill.teachers.team import Alone, Team
from robx.errors import InputError
from robx.progress import Progress

DTYPE = torch.bfloat16  # of the points
_ROWS = 65_536  # points that are converted at a time
_LEAST_BATCH = 16_384  # over all processes
_SHARE_PER_ROUND = 8  # one over the share that a round adds to the first centres
_FIRST_WEIGHT = 1e-3  # in points, of a first centre against the points assigned to it


@dataclass(frozen=True)
class Fit:
    """Centres, the same in all processes, and how well they fit."""

    centres: Tensor  # (K, D), unit rows, float32
    objective: float  # mean cosine between a point and its nearest centre, over all processes
    epochs: int


def unit_points(points: Tensor, shift: Tensor) -> None:
    """Replace points (N, D) by their directions from `shift` (D,), in place, a block at a time."""
    for block in torch.split(points, _ROWS):
        block.copy_(F.normalize(block.float() - shift, dim=1))


def minibatch_kmeans(
    points: Tensor,
    k: int,
    *,
    seed: int,
    team: Team | None = None,
    batch: int | None = None,
    epochs: int = 20,
    tolerance: float = 1e-4,
    progress: Progress | None = None,
) -> Fit:
    """Cluster unit points (N, D), of any floating-point type, until an epoch gains less than `tolerance`.

    Centres that an epoch assigns no point to restart at the points with the lowest similarity to their centres.

    Args:
        points: of this process, at least one.
        k: number of centres, at most the number of points of all processes.
        seed: of the first centres and of the order of the points.
        team: the processes that share the fit; None: this one alone.
        batch: points per update, over all processes; default: 16,384 or four per centre.
        epochs: at most.
        tolerance: of the mean cosine.
        progress: called with (epochs done, epochs, note).

    Raises:
        InputError: fewer points than centres.
    """
    team = team or Alone()
    counts = team.gather(len(points))
    total = sum(counts)
    if total < k:
        raise InputError(f"{k} prototypes need at least {k} images, got {total}: lower --prototypes")
    batches = max(1, math.ceil(total / (batch or max(_LEAST_BATCH, 4 * k))))
    generator = torch.Generator().manual_seed(seed * 100_003 + team.rank)
    centres = _first_centres(points, k, generator=generator, team=team)
    sums, objective = centres * _FIRST_WEIGHT, -1.0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(points), generator=generator).to(points.device)
        similarity, assigned = points.new_empty(len(points), dtype=torch.float32), torch.zeros_like(sums[:, 0])
        for rows in order.tensor_split(batches):
            block = points[rows].float()
            similarity[rows], nearby = nearest(block, centres)
            assigned += torch.bincount(nearby, minlength=k)
            fresh = sums_of(block, nearby, k)
            team.sum(fresh)
            sums.mul_(1 - 1 / batches).add_(fresh)
            centres = _directions(sums, centres)
        previous, objective = objective, _mean(similarity, total, team)
        team.sum(assigned)
        empty = (assigned == 0).nonzero().flatten()
        if progress is not None:
            progress(epoch, epochs, f"mini-batch k-means, mean cosine {objective:.3f}")
        if len(empty):
            centres[empty] = sums[empty] = _lowest(points, similarity, len(empty), team)
        elif objective - previous < tolerance:
            break
    similarity = torch.cat([nearest(block.float(), centres)[0] for block in torch.split(points, _ROWS)])
    return Fit(centres, _mean(similarity, total, team), epoch)


def _first_centres(points: Tensor, k: int, *, generator: torch.Generator, team: Team) -> Tensor:
    """K of the points, drawn in rounds; (K, D), unit rows."""
    distance = points.new_ones(len(points), dtype=torch.float32)
    found: list[Tensor] = []
    have = 0
    while have < k:
        # An exponential draw over a weight is smallest with probability proportional to the weight, and the m smallest
        # are m draws without replacement (Efraimidis and Spirakis, 2006).
        draws = torch.empty(len(points)).exponential_(generator=generator).to(points.device)
        count = min(k - have, max(1, have // _SHARE_PER_ROUND))
        found.append(_lowest(points, draws / distance, count, team))
        have += count
        for at in range(0, len(points), _ROWS):
            similarity = nearest(points[at : at + _ROWS].float(), found[-1])[0]
            torch.minimum(distance[at : at + _ROWS], (1 - similarity).clamp(min=0), out=distance[at : at + _ROWS])
    return F.normalize(torch.cat(found), dim=1)


def _lowest(points: Tensor, keys: Tensor, count: int, team: Team) -> Tensor:
    """The points with the `count` lowest keys (N,) of all processes, in that order, float32 (count, D)."""
    mine, rows = keys.topk(min(count, len(keys)), largest=False)
    everyone = team.gather(mine.cpu())
    start = sum(map(len, everyone[: team.rank]))
    chosen = torch.cat(everyone).argsort(stable=True)[:count].to(points.device)
    own = (chosen >= start) & (chosen < start + len(mine))
    found = torch.zeros(count, points.shape[1], device=points.device)
    found[own] = points[rows[chosen[own] - start]].float()
    team.sum(found)  # one process adds the row, the others zeros
    return found


def _directions(sums: Tensor, centres: Tensor) -> Tensor:
    """Unit rows; points that cancel out give no direction, and their centre stays where it was."""
    lost = sums.norm(dim=1, keepdim=True) < 1e-6
    return torch.where(lost, centres, F.normalize(sums, dim=1))


def _mean(values: Tensor, total: int, team: Team) -> float:
    found = values.double().sum().reshape(1)
    team.sum(found)
    return float(found) / total
