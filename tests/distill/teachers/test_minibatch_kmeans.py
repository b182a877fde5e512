"""Mini-batch spherical k-means against Lloyd's algorithm, in bounded memory, and alike on all processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from robx.distill.teachers.kmeans import nearest, spherical_kmeans, sums_of
from robx.distill.teachers.minibatch_kmeans import minibatch_kmeans, unit_points
from robx.errors import InputError
from tests.preloaded import Preloaded


def mixture(count: int, kinds: int, *, width: int = 32, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit points around random directions, in bf16, and the number of each point's direction."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, width, generator=generator)
    labels = torch.randint(kinds, (count,), generator=generator)
    points = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return F.normalize(points, dim=1).bfloat16(), labels


@pytest.mark.parametrize("batch", [250, 1000, 100_000], ids=["many batches", "few batches", "one batch"])
def test_the_fit_is_within_one_percent_of_lloyds(batch: int) -> None:
    points, _ = mixture(3000, 30, spread=1.2)
    full = spherical_kmeans(points.float(), 50, seed=0)
    found = minibatch_kmeans(points, 50, seed=0, batch=batch)
    assert found.objective > 0.99 * full.objective
    torch.testing.assert_close(found.centres.norm(dim=1), torch.ones(50))
    similarity, assigned = nearest(points.float(), found.centres)
    assert found.objective == pytest.approx(float(similarity.mean()), abs=1e-5)
    assert len(assigned.unique()) > 47


@pytest.mark.parametrize("seed", range(3))
def test_separate_kinds_are_found(seed: int) -> None:
    points, labels = mixture(800, 8, spread=0.03, seed=seed)
    found = minibatch_kmeans(points, 8, seed=seed, batch=100)
    assert adjusted_rand_score(labels, nearest(points.float(), found.centres)[1]) == 1


def test_one_batch_per_epoch_is_lloyds_iteration() -> None:
    """From the same first centres, two epochs are two iterations of assignment and mean."""
    points, _ = mixture(300, 20)
    rows = points.float()
    one, two = (minibatch_kmeans(points, 5, seed=0, epochs=epochs, tolerance=-1) for epochs in (1, 2))
    assigned = nearest(rows, one.centres)[1]
    means = torch.stack([rows[assigned == centre].mean(dim=0) for centre in range(5)])
    torch.testing.assert_close(two.centres, F.normalize(means, dim=1), rtol=1e-4, atol=1e-5)


def test_the_result_depends_on_the_seed_alone() -> None:
    points, _ = mixture(2000, 30)
    first = minibatch_kmeans(points, 40, seed=3, batch=300)
    assert torch.equal(first.centres, minibatch_kmeans(points, 40, seed=3, batch=300).centres)
    assert not torch.equal(first.centres, minibatch_kmeans(points, 40, seed=4, batch=300).centres)


def test_an_empty_centre_restarts_at_the_worst_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three first centres coincide: one of them loses all points, and moves to the kind without a centre."""
    points = F.normalize(torch.eye(3).repeat_interleave(20, dim=0) + 0.01 * torch.randn(60, 3), dim=1).bfloat16()
    first = torch.eye(3)[[0, 0, 1]]
    module = "robx.distill.teachers.minibatch_kmeans"
    monkeypatch.setattr(f"{module}._first_centres", lambda *_, **__: first)
    assert minibatch_kmeans(points, 3, seed=0).objective > 0.99  # two centres for three kinds: at most 0.81


def test_repeated_points_and_too_few() -> None:
    same = minibatch_kmeans(torch.ones(8, 4).bfloat16() / 2, 4, seed=0)
    assert same.objective == pytest.approx(1) and torch.isfinite(same.centres).all()
    with pytest.raises(InputError, match="9 prototypes need at least 9 images, got 8: lower --prototypes"):
        minibatch_kmeans(torch.ones(8, 4), 9, seed=0)


def test_points_become_directions_from_the_mean() -> None:
    points = torch.randn(50, 6) + 3
    want = F.normalize(points - points.mean(dim=0), dim=1)
    shift = points[0].clone()
    kept = (points - shift).bfloat16()
    unit_points(kept, points.mean(dim=0) - shift)
    torch.testing.assert_close(kept.float(), want, rtol=0.02, atol=0.01)


def test_sums_by_centre() -> None:
    points, assigned = torch.randn(40, 3), torch.randint(5, (40,))
    want = F.one_hot(assigned, 6).float().T @ points
    torch.testing.assert_close(sums_of(points, assigned, 6), want)


class _Largest(TorchDispatchMode):
    """Records the bytes of the largest new tensor."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return found


def test_memory_does_not_grow_with_points_times_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than the centres, a batch or a block, and none copies all points in float32."""
    monkeypatch.setattr("robx.distill.teachers.kmeans._BLOCK_NUMBERS", 20_000)
    monkeypatch.setattr("robx.distill.teachers.minibatch_kmeans._ROWS", 256)
    points, _ = mixture(8000, 30, width=16)
    with _Largest() as largest:
        minibatch_kmeans(points, 100, seed=0, batch=400, epochs=2)
        unit_points(points, torch.zeros(16))
    batch, block, rows = 400 * 16 * 4, 20_000 * 4, 8000 * 8  # the last: one number for each point
    assert 0 < largest.bytes <= max(batch, block, rows) < 8000 * 16 * 4 < 8000 * 100 * 4


WORKER = """
import dataclasses, sys
from pathlib import Path
import numpy as np, torch
from robx.distill.teachers.prototypes import FitSettings, fit_or_load
from robx.distill.training.processes import join_processes
from robx.images.arrays import ArraySource
from robx.records import Preprocessing

pixels = np.random.default_rng(0).integers(0, 255, (203, 8, 8, 3)).astype(np.uint8)
source, calls = ArraySource("noise", pixels, None, None), []
settings = FitSettings("t", source.fingerprint, prototypes=12, size=8, crop=8, method="minibatch")

def embed(pixels):
    calls.append(len(pixels))
    return pixels.mean(dim=2).flatten(1) + 3

with join_processes("cpu") as team:
    def fit(name):
        folder = Path(sys.argv[1]) / name
        return fit_or_load(embed, source, Preprocessing(size=8, crop=8), settings, folder=folder, team=team)
    first, again = fit("a"), fit("b")
    made = sum(calls)
    kept = fit("a")
    assert sum(calls) == made, "embedded again"
    for other in (again, kept):
        assert torch.equal(first.vectors, other.vectors) and torch.equal(first.mean, other.mean)
        assert (other.images, other.skipped, other.processes) == (203, 0, 2)
    everyone = team.gather((first.vectors, first.mean, made))
    assert torch.equal(everyone[0][0], everyone[1][0]) and torch.equal(everyone[0][1], everyone[1][1])
    assert [one[2] for one in everyone] == [2 * 103, 2 * 102]  # each embeds its half, and one image for the width
    if team.first:
        torch.save(first.objective, Path(sys.argv[1]) / "objective.pt")
"""


def test_two_processes_fit_together_and_repeat_the_result(tmp_path: Path, preloaded: Preloaded) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = ["-c", WORKER, tmp_path]
    ranks = [preloaded.start(command, env=os.environ | shared | {"RANK": str(rank)}) for rank in range(2)]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    (one, two) = ((tmp_path / name).glob("*.safetensors") for name in "ab")
    vectors = load_file(next(one))["vectors"]
    assert vectors.shape == (12, 24) and torch.equal(vectors, load_file(next(two))["vectors"])
    assert 0.3 < torch.load(tmp_path / "objective.pt") < 1
