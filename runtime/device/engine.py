"""Helpers shared by the engine files. Runs on the device: Python 3.8, the standard library and numpy only."""

from __future__ import annotations

import os
from typing import Any, Callable, Iterable


def check_settings(engine: str, settings: dict[str, Any], providers: tuple[str, ...]) -> str:
    """The provider to use: the requested one, or the first of `providers`.

    For engines that compute in the types of the model file.

    Raises:
        RuntimeError: another provider was requested, or a floating-point type that is not the file's.
    """
    provider = str(settings.get("provider") or providers[0])
    if provider not in providers:
        raise RuntimeError(
            "%s runs on %s, and %r was asked for: give one of these" % (engine, ", ".join(providers), provider)
        )
    hint = str(settings.get("precision_hint") or "f32")
    if hint != "f32":
        raise RuntimeError("%s computes in the types of the file, and %s was asked for" % (engine, hint))
    return provider


def model_path(folder: str, manifest: dict[str, Any]) -> str:
    """The file that the engine opens."""
    return os.path.join(folder, next(str(f["path"]) for f in manifest["files"] if f["role"] == "model"))


def input_converter(manifest: dict[str, Any]) -> Callable[[Any], Any]:
    """A function from normalised RGB images (N, 3, H, W) to the model's input.

    That is the same in a float type, or uint8 pixels again, in the axes and the order of channels that the model takes.
    """
    import numpy as np

    dtype = np.dtype(manifest["inputs"][0]["dtype"])
    if dtype != np.uint8:
        return lambda images: np.ascontiguousarray(images, dtype=dtype)
    mean, std = (np.array(manifest["preprocessing"][k], np.float32).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    inside = manifest.get("in_model") or {}
    is_bgr, is_nhwc = inside.get("channels") == "BGR", inside.get("layout") == "NHWC"

    def convert(images: Any) -> Any:
        pixels = np.clip(np.rint((images * std + mean) * 255), 0, 255).astype(np.uint8)
        pixels = pixels[:, ::-1] if is_bgr else pixels
        pixels = pixels.transpose(0, 2, 3, 1) if is_nhwc else pixels
        return np.ascontiguousarray(pixels)

    return convert


def check_output(output: Any, count: int, widths: Iterable[int]) -> Any:
    """`output` if its shape is (count, D) with D one of `widths` (any D, if there are none).

    Raises:
        RuntimeError: it has another shape.
    """
    known = sorted(widths)
    if output.ndim != 2 or len(output) != count or (known and output.shape[1] not in known):
        expected = "(%d, %s)" % (count, " or ".join(map(str, known)) or "D")
        shape = str(tuple(output.shape))
        raise RuntimeError("the output has shape %s, expected %s: export the bundle again" % (shape, expected))
    return output


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
