"""A run whose images never arrive (hanging.py OUT), or whose batches cannot be handed over (hanging.py OUT lost)."""

from __future__ import annotations

import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from robx.errors import RobxError
from robx.images.arrays import ArraySource


class Hanging(ArraySource):
    """As a file server that hangs."""

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        time.sleep(60)
        return super().read(index)


class Losing(ArraySource):
    """As a /dev/shm that is full: what a worker reads cannot be handed over."""

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        def full(*_: Any) -> None:
            raise RuntimeError("unable to allocate shared memory: No space left on device")

        ForkingPickler.dumps = full  # type: ignore[assignment]
        return super().read(index)


if __name__ == "__main__":
    out, *how = sys.argv[1:]
    source = (Losing if how else Hanging)("pixels", np.zeros((16, 32, 32, 3), dtype=np.uint8), None, None)
    print("begun", flush=True)
    try:
        tiny.tiny_run(source, Path(out), options={"workers": 2})
    except RobxError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
