"""How close a candidate's embeddings are to its reference's, without labels; all figures are of the same images.

Cosine alone does not say whether neighbours stay neighbours, so two figures of the whole set complement it: linear CKA,
and the rank correlation of all pairwise similarities, which is what retrieval ranks by. Both are invariant to rotation
and scale; the cosine is not invariant to rotation.

M images   D width
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from robx.embeddings import centred_cosine, check_pair, is_constant
from robx.errors import InputError
from robx.eval.neighbours import nearest, unit_rows
from robx.records import Value
from robx.stats import mean_value, quantile_value

NEIGHBOURS = 20
# More images hardly change these two but cost time in proportion, or its square; a fixed random subset is used.
MOST_CKA_IMAGES = 10_000
MOST_PAIRED_IMAGES = 1_000  # 499,500 pairs


def relative_error(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """|candidate - reference| / |reference| of each row (M,); a row that is not finite, or should be 0, gives 1."""
    check_pair(reference, candidate)
    gap = np.linalg.norm(candidate.astype(np.float64) - reference, axis=1)
    length = np.linalg.norm(reference.astype(np.float64), axis=1)
    error = gap / np.where(length > 0, length, np.where(gap > 0, gap, 1))
    return np.where(np.isfinite(error), error, 1.0)


def broken(reference: np.ndarray, candidate: np.ndarray) -> list[str]:
    """What makes the candidate unusable whatever its accuracy: NaN, infinity, a constant output; [] if nothing."""
    check_pair(reference, candidate)
    finite = np.isfinite(candidate).all(axis=1)
    if not finite.all():
        return [f"{np.count_nonzero(~finite)} of {len(candidate)} embeddings contain NaN or infinity"]
    if is_constant(candidate, reference=reference):
        return [f"the embedding is the same for all {len(candidate)} images: the output is constant"]
    return []


def linear_cka(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets (M, D) and (M, D'), from 0 to 1 (Kornblith et al. 2019, eq. 3).

    |Y'X|^2 / (|X'X| |Y'Y|) of the centred sets, with Frobenius norms. Unrelated sets of M images give about D / (M +
    D), not 0. A constant set gives 0.
    """
    first, second = (rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64) for rows in (reference, candidate))
    if len(first) < max(first.shape[1], second.shape[1]):
        # The same three numbers from the smaller M x M products.
        ours, theirs = first @ first.T, second @ second.T
        cross, norms = float(np.vdot(ours, theirs)), np.linalg.norm(ours) * np.linalg.norm(theirs)
    else:
        cross = float(np.sum((second.T @ first) ** 2))
        norms = np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    return min(1.0, cross / float(norms)) if norms > 0 else 0.0


def similarity_spearman(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Spearman's rank correlation between the pairwise cosine similarities of the two sets.

    1 means that every ranking by similarity is preserved. A set whose similarities are all equal gives 0.

    Args:
        reference: (M, D), M of at least 3; the cost grows with M squared.
        candidate: the same images, (M, D').
    """
    pairs = np.triu_indices(len(reference), k=1)
    found = []
    for rows in (reference, candidate):
        unit = unit_rows(rows)[0].astype(np.float64)
        found.append((unit @ unit.T)[pairs])
    if min(float(np.ptp(similarities)) for similarities in found) == 0:
        return 0.0
    return float(stats.spearmanr(*found).statistic)


def neighbour_overlap(reference: np.ndarray, candidate: np.ndarray, *, k: int = NEIGHBOURS) -> Value:
    """The share of each image's k nearest others that the candidate preserves, each set (M, D) searched in itself."""
    k = min(k, len(reference) - 1)
    if k < 1:
        raise InputError("neighbours need at least two images: give more")
    own = np.arange(len(reference))[:, None]
    found = []
    for features in (reference, candidate):
        rows = nearest(features, features, k + 1)[1]
        # An image is its own nearest neighbour and is removed; where a duplicate ranks before it, the last one is.
        stay = rows != own
        stay[stay.all(axis=1), -1] = False
        found.append(rows[stay].reshape(-1, k))
    return overlap(*found)


def closeness(reference: np.ndarray, candidate: np.ndarray) -> dict[str, Value]:
    """All figures of two sets (M, D) that need no labels, except the neighbour overlap; broken rows are counted."""
    cosine = centred_cosine(reference, candidate)
    error = relative_error(reference, candidate)
    varies = reference.std(axis=0) > 0
    with np.errstate(invalid="ignore"):
        stuck = varies & ~(np.ptp(candidate, axis=0) > 0)
    found = {
        "cosine_mean": mean_value(cosine),
        "cosine_p5": quantile_value(cosine, 0.05),
        "cosine_p1": quantile_value(cosine, 0.01),
        "cosine_min": Value(value=float(cosine.min()), n=len(cosine)),
        "relative_error": mean_value(error),
        "not_finite": Value(value=float(np.count_nonzero(~np.isfinite(candidate).all(axis=1))), n=len(candidate)),
        "constant_dimensions": Value(value=float(np.count_nonzero(stuck)), n=reference.shape[1]),
    }
    return found | _of_the_whole_set(reference, candidate)


def _of_the_whole_set(reference: np.ndarray, candidate: np.ndarray) -> dict[str, Value]:
    """CKA and rank correlation of the images whose candidate rows are finite; empty for fewer than three."""
    finite = np.isfinite(candidate).all(axis=1)
    order = np.random.default_rng(0).permutation(len(reference))
    order = order[finite[order]]
    if len(order) < 3:
        return {}
    found = {}
    for name, figure, most in (
        ("cka", linear_cka, MOST_CKA_IMAGES),
        ("similarity_spearman", similarity_spearman, MOST_PAIRED_IMAGES),
    ):
        rows = order[:most]
        found[name] = Value(value=figure(reference[rows], candidate[rows]), n=len(rows))
    return found


def overlap(first: np.ndarray, second: np.ndarray) -> Value:
    """The mean share of row numbers (M, k) that two searches have in common, in %."""
    shared = (first[:, :, None] == second[:, None, :]).any(axis=2).sum(axis=1)
    return mean_value(100 * shared / first.shape[1], unit="%")
