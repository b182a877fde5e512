from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from robx.distill.training.knn_probe import build_probe, run_probe, weighted_vote
from robx.images.arrays import ArraySource
from robx.images.sources import open_source
from robx.records import Preprocessing

PREPROCESSING = Preprocessing(size=36, crop=32)


def test_the_vote_is_scikit_learns_with_the_same_weights() -> None:
    torch.manual_seed(0)
    bank, queries = F.normalize(torch.randn(200, 8), dim=1), F.normalize(torch.randn(60, 8), dim=1)
    labels = torch.randint(0, 5, (200,))
    reference = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), algorithm="brute"
    ).fit(bank.numpy(), labels.numpy())
    assert np.array_equal(weighted_vote(bank, labels, queries).numpy(), reference.predict(queries.numpy()))


def test_a_trunk_that_sees_the_colour_scores_full_and_is_left_in_its_mode() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    pixels = rng.integers(0, 60, (90, 40, 40, 3)).astype(np.uint8)
    for row, label in zip(pixels, labels, strict=True):
        row[..., label] += 150
    source = ArraySource("colours", pixels, labels, ("r", "g", "b"))
    probe = build_probe(source, PREPROCESSING, images=80)
    assert probe is not None and not set(probe.bank) & set(probe.queries) and len(probe.bank) == 64
    trunk = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert run_probe(probe, trunk, torch.device("cpu")) == 100.0 and trunk.training
    assert build_probe(source, PREPROCESSING, images=80) == probe


def test_no_probe_without_labels(scenes: Path) -> None:
    flat = ArraySource("plain", np.zeros((20, 8, 8, 3), dtype=np.uint8), None, None)
    assert build_probe(flat, PREPROCESSING) is None
    assert build_probe(open_source(scenes), PREPROCESSING) is not None


@pytest.mark.parametrize("seed", [0, 1])
def test_the_draw_hangs_on_the_seed(scenes: Path, seed: int) -> None:
    first, other = (build_probe(open_source(scenes), PREPROCESSING, images=30, seed=s) for s in (seed, seed + 1))
    assert first is not None and other is not None and first.queries != other.queries
