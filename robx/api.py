"""robx from Python.

    from robx import api

    model = api.load("runs/r18")                            # the distilled timm model with its weights
    with api.open("runs/r18/openvino-int8") as exported:    # an exported model in its runtime
        embeddings = exported.embed("photos/")              # (N, D)

Paths may be `str` or `Path`. Whatever is wrong with the caller's input raises a child of `robx.errors.RobxError`, whose
message says what to do. Nothing heavy is imported before the first call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from robx.errors import CorruptImage, InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import nn

    from robx.records import Bundle, Student
    from robx.runtime.session import Session

    StrPath = str | os.PathLike[str]
    Images = StrPath | Image.Image | np.ndarray | Iterable[StrPath | Image.Image | np.ndarray]


def load(run: StrPath) -> nn.Module:
    """Load a distilled student as the timm model that it is, for fine-tuning or for use in PyTorch.

    Args:
        run: a run's folder, as `distill` wrote it.

    Returns:
        The timm model with its weights, in eval mode, on the CPU, in float32. It maps pixels (N, 3, H, W) to the
        embedding (N, D); `model.reset_classifier(10)` gives it a new classifier. Its attribute `preprocessing` is a
        torchvision transform from a PIL image to a float32 tensor (3, H, W), with exactly robx's own pixels.

    Raises:
        InputError: `run` is not a run's folder.
        ArtifactError: the folder is damaged, or the weights do not fit the network.
    """
    folder = Path(run)
    if not (folder / "student.json").is_file():
        raise InputError(f"{folder} is not a student (it has no student.json): give a folder that robx distill wrote")
    from robx.images.transform import torchvision_transform
    from robx.trunk import load_trunk

    record, model = load_trunk(folder)
    model.preprocessing = torchvision_transform(record.preprocessing)
    return model


def open(folder: StrPath, *, threads: int = 1, provider: str | None = None) -> Embedder:
    """Open a bundle in its runtime, or a student in PyTorch, to embed images.

    Args:
        folder: a bundle's or a run's folder.
        threads: threads of one inference.
        provider: the runtime's device: "cpu", "cuda", "gpu", "npu"; None is the runtime's default. It never falls back.

    Raises:
        InputError: `folder` is neither.
        ArtifactError: the folder is damaged or was tampered with.
        MissingExtra: the runtime is not installed; the message says how to install it.
        DeviceError: the runtime cannot run the model on this machine.
    """
    from robx.runtime.session import SessionSettings, open_session

    return Embedder(open_session(Path(folder), SessionSettings(threads=threads, provider=provider)))


class Embedder:
    """An opened model. Use it as a context manager, or call `close`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def record(self) -> Bundle | Student:
        """What the folder's manifest.json or student.json says: format, precision, preprocessing, verdict, ..."""
        return self._session.bundle

    def embed(self, images: Images, *, batch: int = 8) -> np.ndarray:
        """Embed images, one row each, in their order.

        Args:
            images: one item or an iterable of items. An item is a path (an image file, a folder of images or a tar
                shard, whose images come in the order of their names), a PIL image, or an array: uint8 (H, W),
                (H, W, 3) or (N, H, W, 3) pixels, which are preprocessed, or float32 (N, 3, H, W) pixels, which are
                preprocessed already.
            batch: images in one run of the model, at most.

        Returns:
            Embeddings, float32 (N, D).

        Raises:
            CorruptImage: an image cannot be decoded; `robx run --out FILE.npz` skips such images and names the others.
            InputError: no image, a path that does not exist, or an array of another type or shape.
            DeviceError: the runtime failed.
        """
        import numpy as np

        from robx.runtime.infer import infer

        items = [images] if isinstance(images, str | os.PathLike) or _is_image(images) else list(images)  # type: ignore[arg-type]
        parts = [array for item in items if (array := _preprocessed(item)) is not None]
        if parts and len(parts) < len(items):
            raise InputError("preprocessed arrays (float32) and other images are mixed: embed them in two calls")
        if parts:
            return self._session.run(np.concatenate(parts))
        answers = infer(self._session, _readers(items), batch=batch, on_skip=_refuse)
        return np.stack([answer for _, answer in answers])

    def close(self) -> None:
        """Free the runtime's model; a second call does nothing."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_image(item: Any) -> bool:
    import numpy as np
    from PIL import Image

    return isinstance(item, np.ndarray | Image.Image)


def _preprocessed(item: Any) -> np.ndarray | None:
    """`item` when it is a float32 (N, 3, H, W) array; None for everything else."""
    import numpy as np

    if isinstance(item, np.ndarray) and item.ndim == 4 and item.dtype == np.float32:
        return item
    return None


def _readers(items: Iterable[Any]) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """(name, read) of every image, as `infer` takes them; nothing is read yet."""
    import numpy as np

    from robx.runtime.infer import find_images

    for number, item in enumerate(items):
        if isinstance(item, str | os.PathLike):
            yield from find_images([Path(item)])
        elif not _is_image(item):
            raise InputError(
                f"image {number} is of type {type(item).__name__}: give a path, a PIL image or a numpy array"
            )
        elif isinstance(item, np.ndarray):
            yield from _readers_of_array(item, number)
        else:
            yield f"image {number}", lambda item=item: _upright_rgb(item)  # type: ignore[misc]


def _readers_of_array(pixels: np.ndarray, number: int) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    import numpy as np
    from PIL import Image

    one = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != np.uint8 or not pixels.size or not (one or (pixels.ndim == 4 and pixels.shape[3] == 3)):
        raise InputError(
            f"array {number} is {pixels.dtype} {pixels.shape}: give uint8 (H, W, 3) or (N, H, W, 3) pixels, "
            "or preprocessed ones as float32 (N, 3, H, W)"
        )
    for place, image in enumerate([pixels] if one else pixels):
        yield f"image {number + place}", lambda image=image: Image.fromarray(image).convert("RGB")  # type: ignore[misc]


def _upright_rgb(image: Image.Image) -> Image.Image:
    from robx.images.transform import UprightRgb

    return UprightRgb()(image)


def _refuse(error: CorruptImage) -> None:
    raise error
