"""A run whose images never arrive, as from a file server that hangs: hanging.py OUT."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import tiny
from PIL import Image

from robx.images.arrays import ArraySource


class Hanging(ArraySource):
    def read(self, index: int) -> Image.Image:
        time.sleep(60)
        return super().read(index)


if __name__ == "__main__":
    source = Hanging("hanging", np.zeros((16, 32, 32, 3), dtype=np.uint8), None, None)
    print("begun", flush=True)
    tiny.tiny_run(source, Path(sys.argv[1]), options={"workers": 2})
