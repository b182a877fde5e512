"""Which folders and shards of a data set are its training and its test split, by their usual names in any case."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from robx.errors import InputError, NoSplit

Split = Literal["train", "test"]
# Test splits are looked for in this order.
NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst", "val", "valid", "validation", "dev"),
}
_WORDS: dict[str, Split] = {word: split for split, words in NAMES.items() for word in words}
# "train", and also "train2017", "training_set", "Test-Images".
_FOLDER = re.compile(r"([a-z]+?)([-_. ]?(set|split|data|images|imgs|\d{2,4}))?", re.IGNORECASE)


def split_of_folder(name: str) -> Split | None:
    """The split that a folder is named after; None for any other name."""
    match = _FOLDER.fullmatch(name)
    return _WORDS.get(match[1].lower()) if match else None


def split_of_shard(name: str) -> Split | None:
    """The split that a word of a shard's name says ("imagenet-train-000.tar"); None for any other name."""
    found = {_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _WORDS}
    return found.pop() if len(found) == 1 else None


def split_folders(names: Sequence[str]) -> dict[Split, list[str]]:
    """The folders among `names` that are named like a split; test splits in the order in which they are looked for."""
    found: dict[Split, list[str]] = {"train": [], "test": []}
    for name in sorted(names):
        if split := split_of_folder(name):
            found[split].append(name)
    order = {word: place for place, word in enumerate(_WORDS)}
    found["test"].sort(key=lambda name: order[_FOLDER.fullmatch(name)[1].lower()])  # type: ignore[index]
    return found


def choose_shards(folder: Path, shards: Sequence[Path], split: Split | None) -> tuple[list[Path], str]:
    """The shards of a split, or of all of them what is not a test split; and one line about those left out.

    Raises:
        NoSplit: none is named like the split.
    """
    named = {shard: split_of_shard(shard.name) for shard in shards}
    if split is not None:
        chosen = [shard for shard in shards if named[shard] == split]
        if not chosen:
            raise NoSplit(f"{folder} has no {split} split: expected {split}-*.tar in it")
        return chosen, ""
    kinds = set(named.values())
    keep = "train" if "train" in kinds else None if None in kinds else "test"
    chosen = [shard for shard in shards if named[shard] == keep]
    left = [shard.name for shard in shards if named[shard] != keep]
    return chosen, f"reading {len(chosen)} of {len(shards)} shards, without {_some(left)}" if left else ""


def choose_folder(folder: Path, names: Sequence[str], split: Split | None) -> tuple[list[str], str]:
    """The subfolders that may be the split, best first; none when `folder` itself is to be read; and a line about it.

    Args:
        folder: the data set.
        names: of its subfolders, without hidden ones.
        split: None asks for all images of a data set without splits, and for the training split of one with.

    Raises:
        NoSplit: no subfolder is named like the split.
        InputError: it cannot be told whether a subfolder is a split or a class.
    """
    found = split_folders(names)
    if split == "test" or (split is None and not found["train"]):
        if split == "test" and not found["test"]:
            raise NoSplit(f"{folder} has no test split: expected test/ or val/, or test-*.tar, in it")
        others = [name for name in names if name not in found["test"]]
        if split == "test":
            return found["test"], ""
        if not found["test"]:
            return [], ""
        if others and not any(_has_subfolders(folder / name) for name in found["test"]):
            return [], ""  # classes, one of which happens to be called "test"
        if others:
            raise _unclear(folder, found["test"][0], others)
        return found["test"][:1], f"reading {folder / found['test'][0]}"
    if not found["train"]:
        raise NoSplit(f"{folder} has no train split: expected train/ or train-*.tar in it")
    if len(found["train"]) > 1:
        raise InputError(f"{folder} has several training splits ({', '.join(found['train'])}): give one of them")
    train = found["train"][0]
    others = [name for name in names if name != train]
    if split is None and not found["test"] and any(_has_images(folder / name) for name in others):
        raise _unclear(folder, train, others)
    left = f", without {_some([f'{name}/' for name in others])}" if others else ""
    return [train], f"reading {folder / train}{left}" if split is None else ""


def _unclear(folder: Path, name: str, others: Sequence[str]) -> InputError:
    return InputError(
        f"{folder} has the folder {name} beside {_some(others)}: give {folder / name} if it is a split, or rename it "
        "if it is a class"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _has_subfolders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def _has_images(folder: Path) -> bool:
    """Whether a folder, or a folder in it, holds any file that may be an image or a shard."""
    from robx.images.decode import IMAGE_SUFFIXES

    for _, _, files in os.walk(folder):
        if any(name.lower().endswith((*IMAGE_SUFFIXES, ".tar")) for name in files):
            return True
    return False
