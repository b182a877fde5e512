"""Labels of images in a file of their own: CSV with a path and a label in each line."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from robx.errors import InputError
from robx.images.derived import DerivedSource, LabelsFile
from robx.images.protocol import ImageSource
from robx.store.files import fingerprint

_MAX_BYTES = 256 * 1024**2
# The names of a header's columns; without a header the first two columns are the path and the label.
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "file_path", "image", "image_path", "image_id", "id")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "species", "breed")


def with_labels(source: ImageSource, path: Path) -> DerivedSource:
    """The source with the labels in the file `path` instead of its own.

    Raises:
        InputError: not such a file, no path that matches an image, or two labels for one path.
    """
    lines = _read_lines(path)
    rows = {name: label for name, (label, _) in lines.items()}
    classes = _in_order({label for label in rows.values() if label})
    numbers = {name: number for number, name in enumerate(classes)}
    # The row of each image, then its label: so that the rows without an image are known.
    paths = _match({name: name for name in rows}, [source.key(index) for index in range(len(source))], source.name)
    found, used = [rows.get(name, "") for name in paths], set(paths)
    labels = [numbers.get(label) for label in found]
    matched = sum(label is not None for label in labels)
    if not matched:
        raise InputError(
            f"{path}: none of its {len(rows)} paths ({next(iter(rows), '')!r}, ...) is an image of {source.name} "
            f"({source.key(0)!r}, ...): label these images too, by paths relative to the images' folder"
        )
    without = f"{len(source) - matched} of {len(source)} images have no label in {path.name}"
    unmatched = {name: line for name, (_, line) in lines.items() if name not in used}
    return DerivedSource(
        source,
        fingerprint=fingerprint([source.fingerprint, *(label or "" for label in found)]),
        labels=labels,
        classes=classes,
        note="; ".join(filter(None, (source.note, without if matched < len(source) else ""))),
        labels_file=LabelsFile(path, len(rows), unmatched, source.fingerprint),
    )


def labels_file(source: ImageSource) -> LabelsFile | None:
    """The file that gives a source its labels; None where they are its own."""
    return source.labels_file if isinstance(source, DerivedSource) else None


def unmatched_note(*sources: ImageSource) -> str:
    """One line about the lines of a file of labels that name no image of any of `sources`; empty if there is none."""
    files = [file for source in sources if (file := labels_file(source)) is not None]
    first = files[0] if len(files) == len(sources) else None
    if first is None:
        return ""
    lost = {name: line for name, line in first.unmatched.items() if all(name in file.unmatched for file in files)}
    if not lost:
        return ""
    name, line = next(iter(lost.items()))
    names = "names" if len(lost) == 1 else "name"
    return (
        f"{len(lost)} of {first.rows} lines of {first.path.name} {names} no image of "
        f"{' or '.join(dict.fromkeys(source.name for source in sources))} (first: line {line}, {name!r})"
    )


def read_labels(path: Path) -> dict[str, str]:
    """path -> label of every line of a CSV file (separated by comma, semicolon or tab), with or without a header.

    Raises:
        InputError: not such a file; the message has the line.
    """
    return {name: label for name, (label, _) in _read_lines(path).items()}


def _read_lines(path: Path) -> dict[str, tuple[str, int]]:
    """path -> label and line number; see `read_labels`."""
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a CSV file with a path and a label in each line")
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path} is larger than {_MAX_BYTES} bytes: it is not a file of labels")
    found: dict[str, tuple[str, int]] = {}
    columns = 0, 1
    try:
        # As file names are read, so that odd ones match.
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, row in enumerate(csv.reader(file, delimiter=_delimiter(path)), start=1):
                if not found and number == 1 and (header := _header(row)) is not None:
                    columns = header
                    continue
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) <= max(columns):
                    raise InputError(f"{path}, line {number}: expected a path and a label, got {','.join(row)[:80]!r}")
                name, label = _normal(row[columns[0]]), row[columns[1]].strip()
                if (before := found.setdefault(name, (label, number))[0]) != label:
                    raise InputError(f"{path}, line {number}: {name!r} has the labels {before!r} and {label!r}")
    except (csv.Error, OSError) as error:
        raise InputError(f"{path} cannot be read as CSV ({error}): give a path and a label in each line") from error
    if not found:
        raise InputError(f"{path} has no labels: give a path and a label in each line")
    return found


def _delimiter(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(65536)
    if b"\0" in start:
        raise InputError(f"{path} is not a text file: give a CSV file in UTF-8 with a path and a label in each line")
    first = start.partition(b"\n")[0].decode("utf-8-sig", errors="replace")
    return max(",;\t", key=first.count)


def _header(row: Sequence[str]) -> tuple[int, int] | None:
    """The columns of the path and the label, when `row` names them."""
    names = [cell.strip().lower() for cell in row]
    path = next((names.index(name) for name in _PATH_COLUMNS if name in names), None)
    if path is None:
        return None
    label = next((names.index(name) for name in _LABEL_COLUMNS if name in names and names.index(name) != path), None)
    return path, label if label is not None else path + 1


def _normal(path: str) -> str:
    return PurePosixPath(path.strip().replace("\\", "/")).as_posix()


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Class names by number where all are numbers, else by name."""
    if all(name.isascii() and name.isdigit() and len(name) < 20 for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _match(rows: dict[str, str], keys: Sequence[str], name: str) -> list[str]:
    """The label of each key; "" where the file has none.

    A path may be relative to the images' folder, or end in that folder's name and the image's path in it. A bare file
    name, with or without its suffix, counts where it is the only one of that name on both sides. A path in another
    folder does not: the file may label train/1.png and test/1.png. Only when all paths are absolute and in one folder,
    as in a data set that was moved, do their names count.
    """
    ends = _only_ones(
        [
            ("/".join(parts[-depth:]), label)
            for depth in {key.count("/") + 2 for key in keys}
            for parts, label in ((path.split("/"), label) for path, label in rows.items())
            if len(parts) >= depth
        ]
    )
    found = [rows.get(key, ends.get(f"{name}/{key}", "")) for key in keys]
    if not all(found):
        found = _by(_without_suffix, rows, keys, found)
    moved = all(path.startswith("/") for path in rows) and len({path.rpartition("/")[0] for path in rows}) == 1
    bare = {path: label for path, label in rows.items() if moved or "/" not in path}
    if not bare or all(found):
        return found
    for shorten in (_name_of, _stem_of):
        found = _by(shorten, bare, keys, found)
    return found


def _by(
    shorten: Callable[[str], str], rows: dict[str, str], keys: Sequence[str], found: Sequence[str]
) -> list[str]:  # fmt: skip
    """`found`, and for keys without a label that of the row with the same short form, if it is the only such pair."""
    labels = _only_ones([(shorten(path), label) for path, label in rows.items()])
    counts = Counter(map(shorten, keys))
    return [
        label or (labels.get(shorten(key), "") if counts[shorten(key)] == 1 else "")
        for key, label in zip(keys, found, strict=True)
    ]


def _name_of(path: str) -> str:
    return path.rpartition("/")[2]


def _without_suffix(path: str) -> str:
    return path.removesuffix(PurePosixPath(path).suffix)


def _stem_of(path: str) -> str:
    return PurePosixPath(path).stem


def _only_ones(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The pairs whose first part occurs once."""
    counts = Counter(first for first, _ in pairs)
    return {first: second for first, second in pairs if counts[first] == 1}
