"""How export_table.py judges a bundle: its embeddings against the fp32 student's, on two sets of images.

The first set is the one that robx's gate judges on. The second, Fashion-MNIST, is unlike anything that calibrated,
healed or judged: it shows whether an int8 model is right only on the images that it was chosen with.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from judged import FASHION_BANK, FASHION_MNIST, FASHION_TEST, fashion_mnist

from robx.embeddings import KNN_K
from robx.eval.fidelity.fidelity import Bank, fidelity, make_bank
from robx.eval.protocols.knn import weighted_knn
from robx.export.gate.half import in_half_arithmetic
from robx.export.image_splits import Images, Splits, SplitSizes, normalise, open_data, read_splits
from robx.export.onnx_run import run_model
from robx.records import Preprocessing, Student, Value, load_bundle, load_student
from robx.runtime.session import SessionSettings, open_session
from robx.stats import accuracy_value
from robx.store.onnx_safety import load_checked

FIGURES = ("cosine_mean", "cosine_p1", "cosine_min", "knn_top1_reference", "knn_drop", "probe_drop")
SECOND = "second_"  # prefix of the figures on the second set
_SECOND_FIGURES = ("cosine_mean", "cosine_p1", "probe_top1_reference", "probe_drop")
_BATCH = 32


@dataclass(frozen=True)
class Expected:
    """Test images, the fp32 student's embeddings of them, and its probe and bank."""

    images: Images
    embeddings: np.ndarray
    bank: Bank

    def compare(self, found: np.ndarray) -> dict[str, Value]:
        """All figures of a bundle's embeddings (M, D) of the test images."""
        return fidelity(self.embeddings, found, labels=self.images.labels, bank=self.bank).values


@dataclass
class Judges:
    """Both sets for one student; what the student itself gives is computed once."""

    run: Path  # the student's folder
    data: Path
    given: argparse.Namespace

    @cached_property
    def student(self) -> Student:
        """Its record."""
        return load_student(self.run)

    @cached_property
    def splits(self) -> Splits:
        """The images that robx's export reads: the same calibration and test images for all."""
        train, test = open_data(self.data)
        count = self.given.calibration_images
        sizes = SplitSizes(calibration=count, least=count, judging=self.given.judging_images)
        return read_splits(train, test, self.student.preprocessing, sizes=sizes)

    @cached_property
    def first(self) -> Expected:
        """The images of robx's gate."""
        return self._expected(self.splits)

    @cached_property
    def second(self) -> Expected | None:
        """A part of Fashion-MNIST; None where the student was distilled from it."""
        split = fashion_mnist()
        if self.data == FASHION_MNIST:
            return None
        sizes = SplitSizes(calibration=_BATCH, bank=FASHION_BANK, screening=0, judging=FASHION_TEST, least=_BATCH)
        return self._expected(read_splits(split.bank, split.test, self.student.preprocessing, sizes=sizes))

    def judge(self, folder: Path) -> dict[str, Value]:
        """The figures of the bundle in `folder`, those on the second set with the prefix SECOND."""
        values = self.first.compare(embed(folder, self.first.images, self.student.preprocessing))
        found = {key: values[key] for key in FIGURES if key in values}
        if self.second is None:
            return found
        values = self.second.compare(embed(folder, self.second.images, self.student.preprocessing))
        return found | {f"{SECOND}{key}": values[key] for key in _SECOND_FIGURES if key in values}

    def knn(self, run: Path) -> Value:
        """Weighted kNN top-1 of a student's embeddings in PyTorch, on the first set."""
        bank, judging = self.splits.bank, self.splits.judging
        known, asked = (embed(run, images, self.student.preprocessing) for images in (bank, judging))
        keep, wanted = bank.labels >= 0, judging.labels >= 0
        classes = len(bank.classes or ())
        votes = weighted_knn(known[keep], bank.labels[keep], asked[wanted], k=KNN_K, classes=classes)[:, 0]
        return accuracy_value(votes == judging.labels[wanted])

    def _expected(self, splits: Splits) -> Expected:
        known, found = self._own(splits.bank), self._own(splits.judging)
        bank = make_bank(known, splits.bank.labels, classes=len(splits.bank.classes or ()))
        return Expected(splits.judging, found, bank)

    def _own(self, images: Images) -> np.ndarray:
        """The fp32 student's embeddings, kept for the next command: each engine may need its own environment."""
        path = self.run / "table" / f"own-{self.student.sha256[:16]}-{images.fingerprint}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, embed(self.run, images, self.student.preprocessing))
        found: np.ndarray = np.load(path, allow_pickle=False)
        return found


def embed(folder: Path, images: Images, preprocessing: Preprocessing) -> np.ndarray:
    """Embeddings (N, D) by a student or a bundle; a TensorRT file is computed literally, with float16 where it says so.

    As robx's gate does it: without a GPU there is no runtime that could open the file.
    """
    is_bundle = (folder / "manifest.json").is_file()
    if is_bundle and load_bundle(folder).format == "trt":
        graph = load_checked(folder / "model.onnx")
        graph = graph if load_bundle(folder).precision == "fp32" else in_half_arithmetic(graph)
        return run_model(graph, images.pixels, batch=_BATCH, prepare=lambda pixels: normalise(pixels, preprocessing))
    settings = SessionSettings(threads=1 if is_bundle else torch.get_num_threads())
    with open_session(folder, settings) as session:
        return np.concatenate([session.run(batch) for batch in images.batches(preprocessing, _BATCH)])
