"""Embed or label images with an opened model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from robx.errors import CorruptImage, DeviceError, InputError
from robx.images.decode import decode, host_input, read_image_file
from robx.images.reading import read_batches
from robx.images.sources import open_source
from robx.records import Bundle
from robx.runtime.session import Session, run_within

_BATCH_BYTES = 2**28  # of one batch of large images
Reader = tuple[str, Callable[[], Image.Image]]  # an image's name and a function that reads it


def find_images(
    paths: Sequence[str | Path], *, image_member: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Iterator[Reader]:
    """The images of files, folders and shards, in order.

    Args:
        paths: files, folders or shards.
        image_member: which image of a tar sample to read when it has several ("rgb.jpg").
        say: called with a line about files of a folder that are left out.

    Raises:
        InputError: a path does not exist, a folder has no images, or there is no shard for `image_member`.
    """
    given = [Path(path) for path in paths]
    if (missing := next((path for path in given if not path.exists()), None)) is not None:
        raise InputError(f"{missing} does not exist: give an image file, a folder of images or a .tar shard")
    if image_member is not None and all(path.is_file() and path.suffix != ".tar" for path in given):
        raise InputError("--image-member is about the samples of tar shards, and no shard was given: leave it out")
    return _images_of(given, image_member, say)


def _images_of(paths: Sequence[Path], image_member: str | None, say: Callable[[str], None]) -> Iterator[Reader]:
    for path in paths:
        if path.is_file() and path.suffix != ".tar":
            yield str(path), lambda path=path: _read(path)  # type: ignore[misc]
            continue
        source = open_source(path, image_member=image_member)
        if source.note:
            say(source.note)
        for index in range(len(source)):
            name = f"{path}/{source.key(index)}"
            yield name, lambda source=source, index=index: source.read(index)  # type: ignore[misc]


def infer(
    session: Session,
    images: Iterable[Reader],
    *,
    batch: int = 8,
    on_skip: Callable[[CorruptImage], None] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each image's name and embedding, float32 (D,); images that cannot be decoded are skipped.

    Raises:
        InputError: `batch` is below 1, or none of the images could be decoded.
        DeviceError: the engine failed, gave no output in time, or returned NaN or infinity.
    """
    answered = False
    model, batch = session.bundle, _batch_of(session, batch)
    if isinstance(model, Bundle) and model.in_model is not None and model.in_model.resize:
        batch = 1  # the images have sizes of their own
    batches = read_batches(
        images,
        lambda image: host_input(image[1](), model),
        batch_size=batch,
        on_skip=lambda _, error: on_skip(error) if on_skip is not None else None,
    )
    for found, pixels in batches:
        answered = True
        names = [name for name, _ in found]
        yield from zip(names, _outputs(session, pixels, names), strict=True)
    if not answered:
        raise InputError("none of the images could be decoded: give other images")


def infer_preprocessed(session: Session, pixels: np.ndarray, *, batch: int = 8) -> np.ndarray:
    """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W).

    Raises:
        InputError: `batch` is below 1.
        DeviceError: as `infer` does.
    """
    batch = _batch_of(session, batch)
    pieces = [range(start, min(start + batch, len(pixels))) for start in range(0, max(1, len(pixels)), batch)]
    return np.concatenate([_outputs(session, pixels[p.start : p.stop], [f"image {i}" for i in p]) for p in pieces])


def _batch_of(session: Session, batch: int) -> int:
    """Images in one run of the model: `batch`, or as many as the memory for a batch holds."""
    if batch < 1:
        raise InputError(f"batch is {batch}: it must be at least 1")
    return max(1, min(batch, _BATCH_BYTES // session.bundle.preprocessing.image_bytes))


def _outputs(session: Session, pixels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """One batch through the model, within the time limit and without NaN or infinity."""
    outputs = run_within(session, pixels)
    for name, output in zip(names, outputs, strict=True):
        if not np.isfinite(output).all():
            raise DeviceError(f"the output for {name} contains NaN or infinity: export the model again, or in fp32")
    return outputs


def top_labels(scores: np.ndarray, labels: Sequence[str], *, count: int = 5) -> list[tuple[str, float]]:
    """The labels with the highest scores (C,) of one image, with their softmax probabilities.

    Raises:
        DeviceError: the number of labels is not C: the engine does not return logits.
    """
    if len(scores) != len(labels):
        raise DeviceError(
            f"the engine returns {len(scores)} values for {len(labels)} labels, the embedding instead of the logits: "
            "label with an onnx or openvino bundle, or write the embedding with --out"
        )
    shifted = np.exp(scores.astype(np.float64) - float(scores.max()))
    probabilities = shifted / shifted.sum()
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [(labels[i], float(probabilities[i])) for i in best]


def _read(path: Path) -> Image.Image:
    return decode(read_image_file(path), name=str(path))
