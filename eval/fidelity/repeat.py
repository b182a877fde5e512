"""Whether a model gives the same answer to the same images twice, on the device that it is judged on."""

from __future__ import annotations

import numpy as np

from robx.errors import CorruptImage
from robx.images.decode import preprocess
from robx.images.sources import ImageSource
from robx.records import Value
from robx.runtime.session import Session

IMAGES = 8


def repeat_difference(session: Session, source: ImageSource) -> Value | None:
    """The largest absolute difference between two runs of the first readable images of `source`, as one batch.

    0 says that the answers are the same to the bit, which an INT8 model on a processor owes; a GPU that adds in another
    order each time gives a little more. None where no image can be read.
    """
    pixels: list[np.ndarray] = []
    for index in range(len(source)):
        if len(pixels) == IMAGES:
            break
        try:
            pixels.append(preprocess(source.read(index), session.bundle.preprocessing))
        except CorruptImage:
            continue
    if not pixels:
        return None
    batch = np.stack(pixels)
    first, second = (np.array(session.run(batch), dtype=np.float64) for _ in range(2))
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(first - second))
    most = float(np.finfo(np.float32).max)  # a record holds no NaN and no infinity
    return Value(value=float(np.nan_to_num(gap, nan=most, posinf=most).max()), n=len(pixels))
