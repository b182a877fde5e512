"""The golden sample on disk: the folder ``golden`` of a bundle.

image.png      the picture, RGB
input.npy      what the model takes for it: one image, in the model's layout and type
output.npy     what the model returns for it, float32 (1, D)
mistakes.npy   what it returns after each common mistake of preprocessing, float32 (K, D)
golden.json    this record
logits.npy, mistakes-logits.npy     the same of the logits, where the bundle has a classification head
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from robx.errors import ArtifactError
from robx.golden.mistakes import Mistake
from robx.images.decode import decode, host_input, preprocess, resize_and_crop
from robx.records import SCHEMA, Bundle, BundleFile, Normalisation, describe_file, from_json, to_json
from robx.store.files import read_bytes, read_json, write_bytes, write_json

FOLDER = "golden"
_INPUT_TOLERANCE = 0.02  # about one level of 255: other versions of Pillow may round differently
IMAGE, INPUT, RECORD = "image.png", "input.npy", "golden.json"
# Output name -> the files of the correct output and of those after the mistakes.
OUTPUTS = {"embedding": ("output.npy", "mistakes.npy"), "logits": ("logits.npy", "mistakes-logits.npy")}


@dataclass(frozen=True, kw_only=True)
class GoldenRecord:
    """``golden.json``: what answered, and what the rows of ``mistakes.npy`` are."""

    answered_by: str  # "onnxruntime 1.23.0", or what stood in for a runtime that was not available
    mistakes: tuple[Mistake, ...]
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class GoldenSample:
    """A picture, the model's input and outputs for it, and its outputs after each mistake."""

    record: GoldenRecord
    image: Image.Image
    inputs: np.ndarray  # one image as the model takes it, e.g. float32 (1, 3, H, W)
    outputs: dict[str, np.ndarray]  # float32 (1 + K, width) by name: row 0 is correct, the others follow mistakes


def model_input(image: Image.Image, bundle: Bundle) -> np.ndarray:
    """An RGB image as the model of `bundle` takes it, as a batch of one: uint8 pixels, or normalised float32.

    A format that quantises its input itself gets float32 here: the scale is in its model file.
    """
    if bundle.in_model is None:
        return preprocess(image, bundle.preprocessing)[None]
    if not bundle.in_model.resize:
        image = resize_and_crop(image, bundle.preprocessing)
    return encoded(np.asarray(image), bundle.in_model)


def encoded(pixels: np.ndarray, inside: Normalisation) -> np.ndarray:
    """RGB pixels, uint8 (H, W, 3), as a batch of one in the layout and the order of channels that the model takes."""
    if inside.channels == "BGR":
        pixels = pixels[..., ::-1]
    if inside.layout == "NCHW":
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)[None]


def write_sample(sample: GoldenSample, bundle_folder: Path) -> tuple[BundleFile, ...]:
    """Write a sample into the folder ``golden`` of a bundle's folder; returns the files for its manifest."""
    folder = bundle_folder / FOLDER
    folder.mkdir(parents=True)
    picture = io.BytesIO()
    sample.image.save(picture, "PNG", optimize=True)
    contents = {IMAGE: picture.getvalue(), INPUT: _npy(sample.inputs)}
    for name, rows in sample.outputs.items():
        correct, mistaken = OUTPUTS[name]
        contents |= {correct: _npy(rows[:1]), mistaken: _npy(rows[1:])}
    for name, content in contents.items():
        write_bytes(folder / name, content)
    write_json(folder / RECORD, to_json(sample.record))
    return tuple(describe_file(bundle_folder, f"{FOLDER}/{name}", "golden") for name in (*contents, RECORD))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def read_sample(bundle_folder: Path, bundle: Bundle) -> GoldenSample:
    """The golden sample of a bundle.

    Raises:
        ArtifactError: it has none, as bundles of earlier versions, or its files do not fit each other.
    """
    if not _has_sample(bundle):
        raise ArtifactError(
            f"{bundle_folder} has no golden sample: export the student again, with this version of robx"
        )
    folder = bundle_folder / FOLDER
    record = from_json(GoldenRecord, read_json(folder / RECORD), where=str(folder / RECORD))
    image = decode(read_bytes(folder / IMAGE), name=str(folder / IMAGE))
    names = ["embedding"] if bundle.labels is None else list(OUTPUTS)
    outputs = {name: _rows(folder, name, record) for name in names}
    return GoldenSample(record=record, image=image, inputs=load_array(folder / INPUT), outputs=outputs)


def _has_sample(bundle: Bundle) -> bool:
    return any(file.path == f"{FOLDER}/{RECORD}" for file in bundle.files)


def check_preprocessing(bundle_folder: Path, bundle: Bundle) -> None:
    """Refuse a manifest whose preprocessing is not what the golden sample was made with; does nothing without a sample.

    The manifest has the hashes of all other files, and none of its own: a mean that was edited in it would give other
    embeddings without a word.

    Raises:
        ArtifactError: the picture, preprocessed as the manifest says, is not the sample's input.
    """
    if not _has_sample(bundle):
        return
    folder = bundle_folder / FOLDER
    image, stored = decode(read_bytes(folder / IMAGE), name=str(folder / IMAGE)), load_array(folder / INPUT)
    made, tolerance = host_input(image, bundle)[None], _INPUT_TOLERANCE
    if bundle.in_model is not None:  # the host's input is pixels 0..255 then, as floats
        made, tolerance = encoded(made[0].transpose(1, 2, 0), bundle.in_model), 1.0
    if made.shape != stored.shape or np.abs(made - stored.astype(np.float32)).max() > tolerance:
        raise ArtifactError(
            f"{bundle_folder / 'manifest.json'} was changed: its preprocessing does not turn {FOLDER}/{IMAGE} into "
            f"{FOLDER}/{INPUT}; export the student again"
        )


def _rows(folder: Path, name: str, record: GoldenRecord) -> np.ndarray:
    """The correct output and, below it, those after each mistake: float32 (1 + K, width)."""
    correct, mistaken = (load_array(folder / file) for file in OUTPUTS[name])
    fits = correct.ndim == mistaken.ndim == 2 and len(correct) == 1 and len(mistaken) == len(record.mistakes)
    if not fits or correct.shape[1] != mistaken.shape[1]:
        raise ArtifactError(f"{folder} is damaged: its {name} files do not fit each other: export the student again")
    return np.concatenate([correct, mistaken]).astype(np.float32)


def load_array(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file of a bundle; nothing in it is executed.

    Raises:
        ArtifactError: it cannot be read, or is not such a file.
    """
    return parse_array(read_bytes(path), where=str(path))


def parse_array(data: bytes, *, where: str) -> np.ndarray:
    """The array in the bytes of an ``.npy`` file; nothing in it is executed.

    Raises:
        ArtifactError: they are not such a file, or it is truncated; the message begins with `where`.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)  # before numpy allocates what a damaged header asks for
        if math.prod(shape) * dtype.itemsize > len(data) - file.tell() and not dtype.hasobject:
            raise ValueError(f"its header says {math.prod(shape)} values, and it is too short for them")
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ArtifactError(f"{where} is not an .npy file of numbers ({error}): write it with numpy.save") from error
    if array.dtype.kind not in "fiu":
        raise ArtifactError(f"{where} does not hold one array of numbers: write it with numpy.save")
    return array
