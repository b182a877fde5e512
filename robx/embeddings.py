"""Computations on embeddings that several stages share: the collapse test and the kNN vote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robx.errors import ArtifactError

# Of the embeddings' own length: what rounding alone makes of one answer, and far below what any two images differ by.
_ROUNDING = 1e-5


def is_constant(features: np.ndarray) -> bool:
    """Whether the embeddings (N, D) of different images are one and the same, but for rounding."""
    if len(features) < 2:
        return False
    rows = features.astype(np.float64)
    spread = np.sqrt(np.square(rows - rows.mean(axis=0)).sum(axis=1).mean())
    return bool(spread <= _ROUNDING * np.sqrt(np.square(rows).sum(axis=1).mean()))


def refuse_constant(features: np.ndarray, folder: Path | str) -> None:
    """Raise ArtifactError when the model in `folder` gave all images the same embedding."""
    if is_constant(features):
        raise ArtifactError(
            f"{folder} has collapsed: its embedding is the same for all {len(features)} images; distil again, with a "
            "lower rate or another objective (metrics.jsonl has the embedding_std of each step)"
        )


# -------------------------------------------------------------------------------------------- the kNN vote (DINO)

KNN_K = 20
KNN_TEMPERATURE = 0.07
TOP = 5
_VOTE_ROWS = 1024


def knn_vote(similarities: np.ndarray, labels: np.ndarray, *, temperature: float = KNN_TEMPERATURE) -> np.ndarray:
    """The five classes (M, 5) with the largest weighted vote, the largest first; -1 where fewer classes have a vote.

    Each neighbour votes for its class with weight exp(similarity / temperature) (Caron et al. 2021, DINO). Memory
    depends on the classes that occur among the neighbours, not on the largest class number.

    Args:
        similarities: cosine similarities (M, K) of the neighbours, the largest first; -inf casts no vote.
        labels: their classes (M, K), 0 or more.
        temperature: of the weights.
    """
    found = np.full((len(labels), TOP), -1, np.int64)
    for start in range(0, len(labels), _VOTE_ROWS):
        rows = slice(start, start + _VOTE_ROWS)
        classes, numbers = np.unique(labels[rows], return_inverse=True)
        numbers = np.reshape(numbers, labels[rows].shape)
        shifted = similarities[rows].astype(np.float64)
        # The first is the largest, so exp cannot overflow.
        shifted -= np.where(np.isfinite(shifted[:, :1]), shifted[:, :1], 0)
        cells = np.arange(len(numbers))[:, None] * len(classes) + numbers
        weights = np.exp(shifted / temperature)
        votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(numbers) * len(classes))
        votes = votes.reshape(-1, len(classes))
        best = np.argsort(-votes, axis=1, kind="stable")[:, :TOP]
        found[rows, : best.shape[1]] = np.where(np.take_along_axis(votes, best, axis=1) > 0, classes[best], -1)
    return found
