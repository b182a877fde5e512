"""From scores to assignments: a softmax, or Sinkhorn-Knopp, which makes a batch use all prototypes equally.

SwAV, arXiv 2006.09882, section 3.1.

Q crops   B batch   K prototypes
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def assignments(scores: Tensor, *, temperature: float, iterations: int) -> Tensor:
    """softmax(scores / temperature) of (Q, B, K); with iterations, Sinkhorn over each crop's batch instead.

    In float32, or in float64 for float64 scores.
    """
    logits = wide(scores) / temperature
    if not iterations:
        return logits.softmax(dim=-1)
    return torch.stack([sinkhorn(crop, iterations=iterations) for crop in logits])


@torch.no_grad()
def sinkhorn(log_scores: Tensor, *, iterations: int) -> Tensor:
    """The entropic transport plan between B samples and K prototypes with uniform marginals, one row per sample.

    With Q = exp(log_scores), each iteration scales Q's columns to sum to B/K and then its rows to sum to 1
    (SwAV, arXiv 2006.09882, eq. 4-5). Only the two scaling vectors are updated, in the log domain, so that large scores
    do not overflow. Under torch.distributed the batch is that of all processes.

    Args:
        log_scores: (B, K); SwAV's scores / epsilon, or MSN's log of the sharpened probabilities.
        iterations: at least 1; each row of the result sums to 1 after any number of them.

    Returns:
        Probabilities (B, K) in float32, or in float64 for float64 scores.
    """
    scores = wide(log_scores)
    log_share = math.log(scores.shape[0] * _processes() / scores.shape[1])
    rows = scores.new_zeros(scores.shape[0], 1)
    columns = scores.new_zeros(1, scores.shape[1])
    for _ in range(iterations):
        columns = log_share - _logsumexp_over_batch(scores + rows)
        rows = -torch.logsumexp(scores + columns, dim=1, keepdim=True)
    return (scores + columns + rows).exp_()


def wide(scores: Tensor) -> Tensor:
    """float64 unchanged, everything else in float32: half precision is too coarse for logits divided by 0.03."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _logsumexp_over_batch(scores: Tensor) -> Tensor:
    local = torch.logsumexp(scores, dim=0, keepdim=True)
    if _processes() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(_processes())]
    dist.all_gather(parts, local)
    return torch.logsumexp(torch.cat(parts), dim=0, keepdim=True)
