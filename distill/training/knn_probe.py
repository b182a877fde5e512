"""A quick kNN evaluation during training, on held-out labelled images: a training curve, not a result.

Bank and queries are a fixed random subset of the source's labelled images. ``robx eval --knn`` is the full protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robx.embeddings import KNN_K, knn_vote
from robx.images.reading import read_batches, reader
from robx.images.sources import ImageSource, labels_of
from robx.records import Preprocessing

_BATCH = 128
_THREADS = 4
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Probe:
    """The images of the evaluation."""

    source: ImageSource
    preprocessing: Preprocessing
    bank: tuple[int, ...]
    queries: tuple[int, ...]


def build_probe(
    source: ImageSource, preprocessing: Preprocessing, *, images: int = 2000, seed: int = 0
) -> Probe | None:
    """Bank and queries, 4 to 1, of at most `images` labelled images; None if there are fewer than ten, or one class."""
    labels = labels_of(source)
    labelled = np.flatnonzero(labels >= 0)
    if len(np.unique(labels[labelled])) < 2 or len(labelled) < 10:
        return None
    chosen = np.random.Generator(np.random.Philox(key=seed + 2)).permutation(labelled)[:images]
    cut = max(1, len(chosen) // 5)
    return Probe(source, preprocessing, tuple(chosen[cut:].tolist()), tuple(chosen[:cut].tolist()))


def run_probe(probe: Probe, trunk: nn.Module, device: torch.device) -> float:
    """Weighted kNN top-1 in % (k = 20, weight exp(sim / 0.07)) of the trunk in eval mode; its mode is restored."""
    training = trunk.training
    trunk.eval()
    try:
        return score(probe, trunk, device)
    finally:
        trunk.train(training)


def score(probe: Probe, embed: Embed, device: torch.device) -> float:
    """The same for any function from pixels (N, 3, H, W) to embeddings (N, D)."""
    bank, bank_labels = _embed(probe, probe.bank, embed, device)
    queries, labels = _embed(probe, probe.queries, embed, device)
    predicted = weighted_vote(bank, bank_labels, queries)
    return 100 * float((predicted == labels).float().mean())


def weighted_vote(bank: Tensor, bank_labels: Tensor, queries: Tensor) -> Tensor:
    """The class (M,) that the nearest of `bank` (N, D) vote for; all rows L2-normalised."""
    similarity, place = (queries @ bank.T).topk(min(KNN_K, len(bank)), dim=1)
    votes = knn_vote(similarity.cpu().numpy(), bank_labels[place].cpu().numpy())
    return torch.from_numpy(votes[:, 0]).to(queries.device)


@torch.no_grad()
def _embed(probe: Probe, indices: Sequence[int], embed: Embed, device: torch.device) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    read = reader(probe.source, probe.preprocessing)
    for found, pixels in read_batches(indices, read, batch_size=_BATCH, threads=_THREADS):
        features.append(F.normalize(embed(torch.from_numpy(pixels).to(device)).float(), dim=1))
        labels += [probe.source.label(index) or 0 for index in found]
    return torch.cat(features), torch.tensor(labels, device=device)
