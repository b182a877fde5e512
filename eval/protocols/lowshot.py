"""Low-shot evaluation, MSN's protocol: logistic regression on a few labelled images per class.

Features before the trunk's final norm, each row minus its own mean, then scaled to length 1; multinomial logistic
regression without intercept that minimises sum(cross-entropy) + lambda / 2 |W|^2, lambda = 0.0025 (equal to MSN's mean
with lambda / n). 1, 2 and 5 images per class are averaged over three fixed splits; 1 % and 10 % have one.

The published splits are text files of image names: imagenet_subsets{1,2,3}/{1,2,5}imgs_class.txt and
imagenet_subsets1/{1percent,10percent}.txt. Without them robx draws its own, always the same, and the record says so.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from scipy import stats

from robx.errors import InputError, counted
from robx.eval.datasets.features import Features
from robx.images.sources import ImageSource, labels_of
from robx.records import Value
from robx.stats import accuracy_value, wilson
from robx.store.files import MAX_JSON_BYTES, read_user_text

LAMBDA = 0.0025
SPLITS = 3
_SHOT = re.compile(r"[1-9][0-9]{0,3}")
_SHARE = re.compile(r"([1-9][0-9]?)%")


def parse_shots(text: str) -> tuple[str, ...]:
    """("1", "2", "1%") of "1,2,1%".

    Raises:
        InputError: something that is neither a number of images nor a percentage.
    """
    shots = tuple(part.strip() for part in text.split(",") if part.strip())
    for shot in shots:
        if not (_SHOT.fullmatch(shot) or _SHARE.fullmatch(shot)):
            raise InputError(
                f"low-shot {shot!r} is neither a number of images per class nor a percentage: give, e.g., 1,2,5,1%"
            )
    if not shots:
        raise InputError(f"low-shot {text!r} names no size: give, e.g., 1,2,5,1%")
    return shots


def draw_splits(
    labels: np.ndarray, shot: str, *, names: Sequence[str] | None = None, seed: int = 0
) -> list[np.ndarray]:  # fmt: skip
    """Training rows: three splits of `shot` images per class, or one of a percentage of each class (at least one).

    `names` are the names of the classes, for errors.

    Raises:
        InputError: a class has fewer images than that.
    """
    share = _SHARE.fullmatch(shot)
    splits = []
    for number in range(1 if share else SPLITS):
        rng = np.random.default_rng((seed, number))
        rows = []
        for label in np.unique(labels[labels >= 0]):
            own = np.flatnonzero(labels == label)
            wanted = max(1, round(len(own) * int(share[1]) / 100)) if share else int(shot)
            if wanted > len(own):
                name = label if names is None else names[label]
                raise InputError(
                    f"class {name} has {counted(len(own), 'image')}, low-shot needs {wanted}: give a smaller size"
                )
            rows.append(rng.permutation(own)[:wanted])
        splits.append(np.sort(np.concatenate(rows)))
    return splits


def check_splits(source: ImageSource, shot: str, folder: Path | None) -> None:
    """Refuse a size for which `source` has too few images; see `read_splits` and `draw_splits`."""
    if folder is None:
        draw_splits(labels_of(source), shot, names=source.classes)
    else:
        read_splits(folder, shot, source)


def read_splits(folder: Path, shot: str, source: ImageSource) -> list[np.ndarray]:
    """Positions in `source` of the images in the published split files.

    A line is an image's file name, with or without its folder ("n01440764_10043.JPEG").

    Raises:
        InputError: a file is missing, or names images that `source` lacks.
    """
    files, places = split_files(folder, shot), _places(source)
    return [_read_split(path, places) for path in files]


def split_files(folder: Path, shot: str) -> list[Path]:
    """The published files of one size; the third split's five-shot file was published as 3imgs_class.txt.

    Raises:
        InputError: the size was not published, or a file is missing.
    """
    if share := _SHARE.fullmatch(shot):
        files = [[folder / "imagenet_subsets1" / f"{share[1]}percent.txt", folder / f"{share[1]}percent.txt"]]
    else:
        names = {3: (f"{shot}imgs_class.txt", "3imgs_class.txt") if shot == "5" else (f"{shot}imgs_class.txt",)}
        files = [
            [folder / f"imagenet_subsets{n}" / name for name in names.get(n, (f"{shot}imgs_class.txt",))]
            for n in range(1, SPLITS + 1)
        ]
    found = []
    for candidates in files:
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise InputError(
                f"{candidates[0]} does not exist: give the folder that contains imagenet_subsets1/ and the others"
            )
        found.append(path)
    return found


def low_shot(
    bank: Features, test: Features, *, rows: Sequence[np.ndarray], penalty: float = LAMBDA
) -> dict[str, Value]:
    """The accuracy on `test` after training on each split of the bank's rows.

    Args:
        bank: features (N, D) and labels of the training images.
        test: features (M, D) and labels of the test images.
        rows: one array of bank rows per split.
        penalty: the protocol's lambda.

    Returns:
        "top1" in %: the mean over the splits with Student's t interval, or of one split with Wilson's interval; with
        several splits also "top1_split1" ... with Wilson's.
    """
    keep = test.labels >= 0
    if not keep.any():
        raise InputError("no labelled test images: low-shot accuracy needs them")
    wanted = test.labels[keep]
    judged = centred_unit_rows(test.features[keep])
    each = []
    for split in rows:
        training = centred_unit_rows(bank.features[split])
        weights, seen = logistic_regression(training, bank.labels[split], penalty=penalty)
        each.append(accuracy_value(seen[(judged @ weights).argmax(axis=1)] == wanted))
    if len(each) == 1:
        return {"top1": each[0]}
    return {"top1": _over_splits(each)} | {f"top1_split{n}": value for n, value in enumerate(each, start=1)}


def centred_unit_rows(features: np.ndarray) -> np.ndarray:
    """Each row (N, D) minus its own mean, scaled to length 1, float64."""
    if not np.isfinite(features).all():
        raise InputError("the features contain NaN or infinity: the model is damaged; train or export it again")
    rows = features - features.mean(axis=1, keepdims=True, dtype=np.float64)
    scaled: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return scaled


def logistic_regression(
    rows: np.ndarray, labels: np.ndarray, *, penalty: float = LAMBDA
) -> tuple[np.ndarray, np.ndarray]:
    """(weights (D, S), the S classes seen) that minimise sum(cross-entropy) + penalty / 2 |W|^2, without intercept."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    seen = np.unique(labels)
    if len(seen) < 2:
        raise InputError("all low-shot training images are of one class: give data with two or more classes")
    # With two classes scikit-learn fits one vector w for the softmax's +w/2 and -w/2, whose penalty is half as large.
    inverse = (2 if len(seen) == 2 else 1) / penalty
    model = LogisticRegression(C=inverse, fit_intercept=False, max_iter=1000, tol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, labels)
    found: np.ndarray = model.coef_.T
    return (np.concatenate([-found / 2, found / 2], axis=1) if len(seen) == 2 else found), seen


def _over_splits(each: list[Value]) -> Value:
    accuracies = np.array([value.value for value in each])
    half = float(stats.t.ppf(0.975, len(each) - 1) * accuracies.std(ddof=1) / np.sqrt(len(each)))
    mean, n = float(accuracies.mean()), int(each[0].n or 1)
    # The splits share their test images, whose sampling error Student's t ignores: never narrower than Wilson's.
    low, high = (100 * end for end in wilson(round(mean / 100 * n), n))
    low, high = max(0.0, min(low, mean - half)), min(100.0, max(high, mean + half))
    return Value(value=mean, low=low, high=high, n=n, unit="%")


def _places(source: ImageSource) -> dict[str, int]:
    """Each image's position by its key, file name and stem; a short form that two images share is left out."""
    keys = [PurePosixPath(source.key(index)) for index in range(len(source))]
    places: dict[str, int] = {}
    for form in (lambda key: key.stem, lambda key: key.name, str):
        counts = Counter(map(form, keys))
        places |= {form(key): index for index, key in enumerate(keys) if counts[form(key)] == 1}
    return places


def _read_split(path: Path, places: dict[str, int]) -> np.ndarray:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes: not a list of image names")
    names = [line.strip() for line in read_user_text(path, errors="surrogateescape").splitlines() if line.strip()]
    found = [_place(PurePosixPath(name), places) for name in names]
    missing = [name for name, place in zip(names, found, strict=True) if place is None]
    if missing or not names:
        raise InputError(
            f"{path} names {len(names)} images, of which the data lacks {len(missing)}"
            f"{', such as ' + missing[0] if missing else ''}: give the data that the splits were made for"
        )
    return np.unique(np.array(found, dtype=np.int64))


def _place(name: PurePosixPath, places: dict[str, int]) -> int | None:
    return next((places[form] for form in (str(name), name.name, name.stem) if form in places), None)
