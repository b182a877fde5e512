"""A model that answers every image alike has learned nothing; no figure of it means anything."""

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
