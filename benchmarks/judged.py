"""How the students of a comparison are judged: hits per test image, so that differences can be paired.

kNN (k = 20), a linear head and 5-shot regression on features that are extracted once, on the demo's clip art and on
Fashion-MNIST; "LOO kNN" is leave-one-out over all labelled clip art, three times as many images
as its test set. Both sets were chosen before any run; no student was trained on pictures like those of Fashion-MNIST.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import Chosen, demo_images

from robx.demo.demo_data import unpack_debian
from robx.embeddings import knn_vote
from robx.eval.datasets.features import Features, extract
from robx.eval.datasets.splits import Split, make_split, open_split
from robx.eval.neighbours import nearest
from robx.eval.protocols.linear import train_cached
from robx.eval.protocols.lowshot import centred_unit_rows, draw_splits, logistic_regression
from robx.images.sources import open_source
from robx.records import Value
from robx.runtime.session import Session, SessionSettings, open_session
from robx.store.files import cache_folder

NEIGHBOURS, SHOTS, BOOTSTRAP = 20, "5", 2000
FASHION_BANK, FASHION_TEST = 1000, 1000  # images of Fashion-MNIST: more would take as long to judge as to train
FASHION_MNIST = cache_folder() / "fashion-mnist"
Hits = list[float]  # per test image: 1 for a right answer; 5-shot has the mean over its splits


@dataclass(frozen=True)
class JudgedSet:
    """Labelled images that students are judged on."""

    name: str
    split: Split
    linear: bool = True  # whether a linear head is trained; it takes as long as everything else


def judged_sets() -> list[JudgedSet]:
    """The demo's clip art, and a part of Fashion-MNIST."""
    clip_art = JudgedSet("clip art", open_split(demo_images(), None))
    return [clip_art, JudgedSet("Fashion-MNIST", fashion_mnist(), linear=False)]


def fashion_mnist() -> Split:
    """A part of Fashion-MNIST, downloaded once."""
    folder = FASHION_MNIST
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            found = unpack_debian("dataset-fashion-mnist", Path(scratch)) / "usr/share/datasets/fashion-mnist"
            found.rename(folder)
    order = np.random.default_rng(0).permutation(10_000)
    bank, test = (open_source(folder, split=part) for part in ("train", "test"))
    return make_split(Chosen(bank, order[:FASHION_BANK].tolist()), Chosen(test, order[:FASHION_TEST].tolist()))


def judge(folder: Path, sets: Sequence[JudgedSet]) -> dict[str, Hits]:
    """Hits of the Student in `folder` by "protocol, set": of all test images of the set, in their order."""
    found = {}
    with open_session(folder, SessionSettings(threads=torch.get_num_threads())) as session:
        for judged in sets:
            for protocol, hits in _judge(session, judged).items():
                found[f"{protocol}, {judged.name}"] = [round(float(hit), 3) for hit in hits]
    return found


def _judge(session: Session, judged: JudgedSet) -> dict[str, np.ndarray]:
    split = judged.split
    bank, test = extract(session, split.bank), split.aligned(extract(session, split.test))
    similarities, rows = nearest(bank.features, test.features, NEIGHBOURS)
    hits = {"kNN": knn_vote(similarities, bank.labels[rows])[:, 0] == test.labels}
    if judged.linear:
        hits["linear"] = _linear(bank, test, classes=split.classes)
        hits["LOO kNN"] = _leave_one_out(bank, test)
    hits["5-shot"] = _few_shots(bank, test)
    return hits


def _leave_one_out(bank: Features, test: Features) -> np.ndarray:
    """Hits of kNN on every labelled image among all others: three times as many images as the test set has."""
    features, labels = (
        np.concatenate([getattr(part, name) for part in (bank, test)]) for name in ("features", "labels")
    )
    similarities, rows = nearest(features, features, NEIGHBOURS + 1)
    others = rows != np.arange(len(rows))[:, None]
    others[others.all(axis=1), -1] = False  # not among its own neighbours: look-alikes were as near
    similarities, rows = (found[others].reshape(len(rows), NEIGHBOURS) for found in (similarities, rows))
    hits: np.ndarray = knn_vote(similarities, labels[rows])[:, 0] == labels
    return hits


def _linear(bank: Features, test: Features, *, classes: int) -> np.ndarray:
    """Hits of the cached linear protocol's headline."""
    heads, headline = train_cached(bank, classes=classes, kinds={"embedding": slice(0, bank.features.shape[1])})
    best: np.ndarray = heads.top({"embedding": torch.from_numpy(test.features)})[headline][:, 0]
    hits: np.ndarray = best == test.labels
    return hits


def _few_shots(bank: Features, test: Features) -> np.ndarray:
    """Mean hits over the splits of the low-shot protocol with 5 images a class."""
    judged, hits = centred_unit_rows(test.features), []
    for rows in draw_splits(bank.labels, SHOTS):
        weights, seen = logistic_regression(centred_unit_rows(bank.features[rows]), bank.labels[rows])
        hits.append(seen[(judged @ weights).argmax(axis=1)] == test.labels)
    mean: np.ndarray = np.mean(hits, axis=0)
    return mean


def difference(ours: np.ndarray, theirs: np.ndarray) -> Value:
    """Mean difference in points of (seeds, images) hits, with a 95 % bootstrap interval over seeds and images.

    Both sides are resampled together: the same seeds, first weights and test images count for both.
    """
    points = 100 * (ours - theirs)
    rng = np.random.default_rng(0)
    seeds, count = points.shape
    means = [
        points[rng.integers(seeds, size=seeds)][:, rng.integers(count, size=count)].mean() for _ in range(BOOTSTRAP)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return Value(value=float(points.mean()), low=float(low), high=float(high), n=points.size, unit="%")
