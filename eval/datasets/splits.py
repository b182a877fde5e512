"""Training and test images that belong together: disjoint, with one numbering of the classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robx.errors import InputError, NoSplit
from robx.eval.datasets.duplicates import LookAlikes
from robx.eval.datasets.features import Features
from robx.images.labels import labels_file, unmatched_note
from robx.images.sources import ImageSource, class_numbers, labelled, labels_of, open_part, open_source, renumbered


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and test images with one numbering of the classes."""

    bank: ImageSource
    test: ImageSource
    classes: int
    names: tuple[str, ...] | None
    renumber: np.ndarray | None  # test label -> bank label, where the two number their classes differently
    test_sources: frozenset[str]  # fingerprints of the test images as given, with unlabelled ones, and without --labels
    shared: LookAlikes | None = None  # duplicates of training images; None if not checked

    def aligned(self, found: Features) -> Features:
        """Test features with the bank's class numbers."""
        if self.renumber is None:
            return found
        return replace(found, labels=renumbered(found.labels, self.renumber))


def open_split(
    data: Path, test: Path | None, *, labels: Path | None = None, image_member: str | None = None
) -> Split:  # fmt: skip
    """The training images in `data` and the test images in `test`, or in `data` when it has both splits.

    `labels` and `image_member` are those of `robx.images.sources.open_source`, for both.

    Raises:
        InputError: no such images, no labels, the same images twice, or test classes without training images.
    """
    if test is None:
        try:
            bank = open_source(data, split="train", labels=labels, image_member=image_member)
            judged = open_source(data, split="test", labels=labels, image_member=image_member)
        except NoSplit as error:
            raise InputError(f"{error}; or give the test set with --test") from None
    else:
        bank = open_part(data, "train", labels=labels, image_member=image_member)
        judged = open_part(test, "test", labels=labels, image_member=image_member)
    judged.note = "; ".join(filter(None, (judged.note, unmatched_note(bank, judged))))
    return make_split(bank, judged)


def make_split(bank: ImageSource, test: ImageSource) -> Split:
    """Pair the labelled images of two sources, with the bank's numbering of the classes; see `open_split`."""
    file = labels_file(test)
    given = {test.fingerprint} | ({file.images} if file is not None else set())
    bank, test = labelled(bank), labelled(test)
    if bank.fingerprint == test.fingerprint:
        raise InputError(f"{bank.name} is both the training and the test set: give other images with --test")
    if bank.classes is None or test.classes is None:
        bare = bank if bank.classes is None else test
        why = f" ({bare.note})" if bare.note else ""
        raise InputError(
            f"{bare.name} has no labels{why}: give one folder per class, shards with .cls members, or --labels FILE"
        )
    split = Split(
        bank=bank,
        test=test,
        classes=len(bank.classes),
        names=bank.classes,
        renumber=None,
        test_sources=frozenset(given),
    )
    if bank.classes[: len(test.classes)] == test.classes:
        return split
    renumber = class_numbers(test.classes, bank.classes)
    if unknown := [test.classes[label] for label in np.unique(labels_of(test)) if renumber[label] < 0]:
        which = f" ({test.note})" if test.note else ""
        raise InputError(
            f"{test.name}{which} has the class {unknown[0]!r}, which {bank.name} lacks: give both sets the same classes"
        )
    return replace(split, renumber=renumber)
