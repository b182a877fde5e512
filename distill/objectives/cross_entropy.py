"""Which target crop teaches which student crop, and their cross-entropy without keeping a (pairs, B, K) tensor.

H(t, z) = -t . log_softmax(z / tau) is linear in the target t, so the targets of one student crop are summed first, and
each crop's scores are read once. Forward saves only its inputs; backward recomputes the softmax. Both work in blocks of
rows that fit the cache. At K = 65536 the autograd of log_softmax would keep 2 + 2L such tensors.

V student crops   Q target crops   B batch   K prototypes   k stored columns   M rows
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from robx.distill.batches.views import Targets
from robx.errors import InputError

Pairing = Literal["same", "swapped"]
Pairs = tuple[tuple[int, int], ...]  # (target crop q, student crop v)

# Elements processed at a time: a float32 block that fits a core's cache, or enough to fill a GPU.
CPU_BLOCK, GPU_BLOCK = 1 << 17, 1 << 25


def crop_pairs(pairing: Pairing, *, student_crops: int, teacher_crops: int = 2) -> Pairs:
    """Which target crop teaches which student crop: the terms (q, v) of the loss.

    Student crops are numbered 0 .. V - 1, the two global crops first; the target branch sees the first one or two of
    them. With two, either pairing has 2 + 2L terms for L local crops.

    ``same`` (RoB, arXiv 2301.09451): a student crop that the target branch also sees is matched to that crop only;
    every other crop is matched to all crops that the target branch sees. ``swapped`` (SwAV, arXiv 2006.09882, eq. 1;
    DINO, arXiv 2104.14294, eq. 3): every pair except a crop with itself.

    Raises:
        InputError: an unknown pairing, or a pairing without any term.
    """
    every = [(q, v) for v in range(student_crops) for q in range(teacher_crops)]
    if pairing == "same":
        pairs = [(q, v) for q, v in every if v == q or v >= teacher_crops]
    elif pairing == "swapped":
        pairs = [(q, v) for q, v in every if v != q]
    else:
        raise InputError(f"unknown pairing {pairing!r}: choose same or swapped")
    if not pairs:
        raise InputError(
            f"pairing {pairing!r} of {teacher_crops} teacher and {student_crops} student crops has no terms: "
            "add local crops or choose another pairing"
        )
    return tuple(pairs)


def crops_cross_entropy(
    scores: Tensor, targets: Targets, *, pairs: Pairs, temperature: float, block: int | None = None
) -> Tensor:
    """Mean over `pairs` (q, v) and over the batch of H(targets[q], softmax(scores[v] / temperature)), a scalar.

    -sum p_t log_softmax(z_s / tau_s), as in DINO (arXiv 2104.14294, eq. 2) and RoB (arXiv 2301.09451).

    Args:
        scores: (V, B, K), logits in the graph; any floating type, sums are computed in float32 or better.
        targets: dense or sparse probabilities of Q crops; each row sums to 1.
        pairs: (q, v) from ``crop_pairs``.
        temperature: tau_s.
        block: elements processed at a time; the result does not depend on it.
    """
    crops, batch = scores.shape[:2]
    taught_by = tuple(tuple(q for q, at in pairs if at == v) for v in range(crops))
    weights = torch.full((batch,), 1 / (len(pairs) * batch), device=scores.device, dtype=torch.float64)
    loss: Tensor = _CrossEntropy.apply(
        scores, targets.probs, targets.columns, targets.tail, weights, taught_by, temperature, block
    )
    return loss


def rows_cross_entropy(
    scores: Tensor, probs: Tensor, *, weights: Tensor, temperature: float, block: int | None = None
) -> Tensor:
    """sum_i weights[i] H(probs[i], softmax(scores[i] / temperature)) over the rows of (M, K); 0 when M is 0."""
    loss: Tensor = _CrossEntropy.apply(scores[None], probs[None], None, None, weights, ((0,),), temperature, block)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        probs: Tensor,
        columns: Tensor | None,
        tail: Tensor | None,
        weights: Tensor,
        taught_by: tuple[tuple[int, ...], ...],
        temperature: float,
        block: int | None,
    ) -> Tensor:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        per_row = torch.zeros(scores.shape[1], dtype=dtype, device=scores.device)
        for rows in _blocks(scores, block):
            mix = _Mix(probs, columns, tail, rows, width=scores.shape[2], dtype=dtype)
            for v, teachers in enumerate(taught_by):
                if teachers:
                    logs = (scores[v, rows].to(dtype) / temperature).log_softmax(dim=-1)
                    per_row[rows] -= mix.dot(teachers, logs)
        ctx.save_for_backward(scores, probs, columns, tail, weights)
        ctx.taught_by, ctx.temperature, ctx.block = taught_by, temperature, block
        return (per_row * weights.to(dtype)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, probs, columns, tail, weights = ctx.saved_tensors
        dtype = torch.promote_types(scores.dtype, torch.float32)
        scale = (weights * (grads[0] / ctx.temperature)).to(dtype)[:, None]
        result = torch.empty_like(scores)
        for rows in _blocks(scores, ctx.block):
            mix = _Mix(probs, columns, tail, rows, width=scores.shape[2], dtype=dtype)
            for v, teachers in enumerate(ctx.taught_by):
                if not teachers:
                    result[v, rows] = 0
                    continue
                softmax = (scores[v, rows].to(dtype) / ctx.temperature).softmax(dim=-1)
                if len(teachers) > 1:
                    softmax.mul_(len(teachers))
                mix.subtract(teachers, softmax)
                result[v, rows] = softmax.mul_(scale[rows])
        return result, None, None, None, None, None, None, None


class _Mix:
    """For a block of rows, the sum of the targets that teach a crop: dense, or k columns and an evenly spread tail."""

    def __init__(
        self, probs: Tensor, columns: Tensor | None, tail: Tensor | None, rows: slice, *, width: int, dtype: torch.dtype
    ) -> None:
        self.probs, self.dtype = probs[:, rows], dtype
        self.columns = None if columns is None else columns[:, rows].long()
        self.even: Tensor | None = None  # the tail's share of each column that is not stored
        if columns is not None:
            mass = probs.new_zeros(self.probs.shape[:2]) if tail is None else tail[:, rows]
            self.even = (mass.to(dtype) / max(1, width - probs.shape[2]))[..., None]
        self._sums: dict[tuple[int, ...], Tensor] = {}

    def dot(self, teachers: tuple[int, ...], logs: Tensor) -> Tensor:
        """The sum over `teachers` of t . logs, one number per row."""
        if self.columns is None or self.even is None:
            found: Tensor = torch.linalg.vecdot(self._sum(teachers), logs)
            return found
        total = logs.sum(dim=-1) * self._even_of(self.even, teachers)[:, 0]
        for q in teachers:
            total += ((self.probs[q].to(self.dtype) - self.even[q]) * logs.gather(1, self.columns[q])).sum(dim=-1)
        return total

    def subtract(self, teachers: tuple[int, ...], softmax: Tensor) -> None:
        """softmax -= the sum over `teachers` of t, in place."""
        if self.columns is None or self.even is None:
            softmax.sub_(self._sum(teachers))
            return
        softmax.sub_(self._even_of(self.even, teachers))
        for q in teachers:
            softmax.scatter_add_(1, self.columns[q], self.even[q] - self.probs[q].to(self.dtype))

    @staticmethod
    def _even_of(even: Tensor, teachers: tuple[int, ...]) -> Tensor:
        """The summed shares (rows, 1); indexing with a list would make the host wait for a GPU."""
        total = even[teachers[0]]
        for q in teachers[1:]:
            total = total + even[q]
        return total

    def _sum(self, teachers: tuple[int, ...]) -> Tensor:
        if teachers not in self._sums:
            total = self.probs[teachers[0]].to(self.dtype)
            for q in teachers[1:]:
                total = total + self.probs[q]
            self._sums[teachers] = total
        return self._sums[teachers]


def _blocks(scores: Tensor, block: int | None) -> list[slice]:
    _, rows, width = scores.shape
    step = max(1, (block or (CPU_BLOCK if scores.device.type == "cpu" else GPU_BLOCK)) // width)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]
