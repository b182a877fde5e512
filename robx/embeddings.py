"""Computations on embeddings that several stages share: comparing two sets row by row, collapse, and the kNN vote.

N images   D width of the embedding
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robx.errors import ArtifactError, InputError

# Relative to the length of the embeddings: rounding stays below it, and any two images differ by far more.
_ROUNDING = 1e-5
# Relative to the spread of the reference's embeddings.
_LEAST_SPREAD = 1e-4


def check_pair(reference: np.ndarray, candidate: np.ndarray) -> None:
    """Raise InputError unless both are (N, D) of the same images and the reference is finite."""
    if reference.ndim != 2 or reference.shape != candidate.shape or not len(reference):
        raise InputError(
            f"reference {reference.shape} and candidate {candidate.shape} do not pair: give both the same images"
        )
    if not np.isfinite(reference).all():
        raise InputError("the reference's own embeddings contain NaN or infinity: distil the student again")


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, float64 (N,); (N, D) each. A row of zeros gives 0, and NaN gives NaN."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: np.ndarray = np.einsum("nd,nd->n", a, b) / np.where(lengths == 0, 1, lengths)
    np.clip(found, -1, 1, out=found)
    return found


def centred_cosine(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows after the reference's mean row is subtracted from both, float64 (N,); (N, D) each.

    Embeddings share a large common component, which a plain cosine would mostly measure. A reference whose rows are all
    the same (one image, repeated) has nothing else, and is compared without centring. Rows that are both zero after
    centring give 1; a candidate row that is not finite gives -1.

    Raises:
        InputError: the sets do not pair, or the reference is not finite.
    """
    check_pair(reference, candidate)
    first = reference.astype(np.float64)
    mean = first.mean(axis=0) if np.ptp(first, axis=0).any() else 0.0
    finite = np.isfinite(candidate).all(axis=1)
    first, second = first - mean, np.where(finite[:, None], candidate, 0).astype(np.float64) - mean
    found = cosine(first, second)
    found[~first.any(axis=1) & ~second.any(axis=1)] = 1
    found[~finite] = -1
    return found


def spread(features: np.ndarray) -> float:
    """Root mean square distance of the embeddings (N, D) from their mean."""
    rows = features.astype(np.float64)
    return float(np.sqrt(np.square(rows - rows.mean(axis=0)).sum(axis=1).mean()))


def is_constant(features: np.ndarray, *, reference: np.ndarray | None = None) -> bool:
    """Whether the embeddings (N, D) of N different images are all the same, but for rounding.

    `reference` are the sound model's embeddings of the same images: a model with less than a ten-thousandth of their
    spread is constant too. One image says nothing.
    """
    if len(features) < 2:
        return False
    length = np.sqrt(np.square(features.astype(np.float64)).sum(axis=1).mean())
    least = _ROUNDING * length
    if reference is not None:
        least = max(least, _LEAST_SPREAD * spread(reference))
    return bool(spread(features) <= least)


def refuse_constant(features: np.ndarray, folder: Path | str) -> None:
    """Raise ArtifactError when the model in `folder` gives all images the same embedding."""
    if is_constant(features):
        raise ArtifactError(
            f"{folder} has collapsed: its embedding is the same for all {len(features)} images; distil again with a "
            "lower learning rate or another objective (metrics.jsonl has the embedding_std of each step)"
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
