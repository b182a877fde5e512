"""Comparing an exported model's embeddings with those of the student in PyTorch."""

from __future__ import annotations

import numpy as np

from robx.embeddings import cosine
from robx.errors import ArtifactError
from robx.records import Value

# Relative to the largest value; PyTorch's and a runtime's float32 kernels differ by 1e-5 and less on real images.
FP32_TOLERANCE = 1e-3
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999}


def parity(
    reference: np.ndarray, candidate: np.ndarray, *, precision: str, what: str, refuse: bool = True
) -> dict[str, Value]:
    """Compare the exported model's embeddings (N, D) with PyTorch's; a float model that differs is refused.

    Without `refuse` the figures are only reported; another shape, NaN and infinity are refused all the same.

    Raises:
        ArtifactError: NaN, or a larger difference than the precision explains: the file is broken, not imprecise.
    """
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    if a.shape != b.shape:
        raise ArtifactError(f"{what} returns {b.shape} where PyTorch returns {a.shape}: not shipped")
    if not np.isfinite(b).all():
        raise ArtifactError(f"{what} returns NaN or infinity where PyTorch does not: not shipped")
    # Two rows of zeros have no direction and are equal all the same: the caller reports such a student as collapsed.
    cosines = np.where((a == b).all(axis=1), 1.0, cosine(a, b))
    least, largest, spread = float(cosines.min()), float(np.abs(a - b).max()), float(np.abs(a).max())
    relative = largest / max(spread, 1e-6)
    figures = {
        "max_abs": Value(value=largest, n=len(a)),
        "max_relative": Value(value=relative, n=len(a)),  # to the largest value of all
        "cosine_min": Value(value=least, n=len(a)),
    }
    if not refuse:
        return figures
    if precision in MIN_COSINE and least < MIN_COSINE[precision]:
        raise ArtifactError(f"{what} differs from PyTorch: cosine {least:.5f} on one image; not shipped")
    if precision == "fp32" and relative > FP32_TOLERANCE:
        raise ArtifactError(f"{what} differs from PyTorch by {largest:.2e} (values up to {spread:.2e}); not shipped")
    return figures
