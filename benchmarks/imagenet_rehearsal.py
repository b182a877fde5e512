"""Opening a data set of ImageNet's size: CPU time, memory, and what forked loader workers copy.

    python benchmarks/imagenet_rehearsal.py

It makes 1,281,167 hard links to 32 JPEG files in 1,000 folders, and 65 tar shards of 1,000 samples (130,000 members,
labels included), and removes them at the end. Each start is a new process that opens the images as ``robx distill``
does, fingerprint and labels included. A worker is a fork that asks for every key and label; it copies the pages that
it writes to, and reading Python objects writes their reference counts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import publish, say
from PIL import Image

from robx.images.shards import write_shard
from robx.images.tar_index import KEPT_FROM_BYTES

CLASSES = 1_000
FILES = 32  # a file system limits the links to one file
_START = """
import json, os, sys, time
from pathlib import Path
from robx.images.sources import labels_of, open_source

def memory(path, key):
    return sum(int(line.split()[1]) for line in open(path) if line.startswith(key)) / 1024

begun = time.perf_counter()
source = open_source(Path(sys.argv[1]))
labels_of(source)
figures = {"images": len(source), "fingerprint": source.fingerprint, "wall": time.perf_counter() - begun,
           "cpu": time.process_time(), "peak": memory("/proc/self/status", "VmHWM")}
reader, writer = os.pipe()
if not os.fork():
    before = memory("/proc/self/smaps", "Private_Dirty")
    for index in range(len(source)):
        source.key(index), source.label(index)
    os.write(writer, str(memory("/proc/self/smaps", "Private_Dirty") - before).encode())
    os._exit(0)
figures["worker"] = float(os.read(reader, 99))
print(json.dumps(figures))
"""


def main() -> None:
    """Make the images, measure, remove them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167, help="hard links")
    parser.add_argument("--samples", type=int, default=65_000, help="in shards of 1,000, each with a label")
    parser.add_argument("--folder", type=Path, help="where to make them; the default is the temporary folder")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="robx-rehearsal-", dir=given.folder) as scratch:
        root = Path(scratch)
        say(f"making {given.images} hard links")
        make_links(root, given.images)
        rows += measure("folders", root / "train", root / "cache")
        say(f"making {given.samples} samples in shards")
        make_shards(root / "shards", given.samples)
        rows += measure("tar shards", root / "shards", root / "cache")
        say("removing them")
    publish(
        "imagenet-rehearsal",
        title="Opening a data set of ImageNet's size",
        headings=["images", "number", "start", "CPU, s", "wall, s", "peak memory, MB", "copied by a worker, MB"],
        rows=[
            [r["what"], f"{r['images']:,}", r["start"], f"{r['cpu']:.1f}", f"{r['wall']:.1f}", f"{r['peak']:.0f}",
             f"{max(0.0, r['worker']):.0f}"]
            for r in rows
        ],
        data=rows,
        notes=[
            "CPU is the whole process, interpreter and imports included; wall is the opening alone.",
            "A first start lists the folders or indexes the shards and keeps that in robx's cache; a second start "
            "reads it while no folder's and no shard's modification time has changed.",
            "The links share 32 files, so that no sizes or contents come from a cold disk.",
        ],
        settings={"images": given.images, "samples": given.samples},
    )  # fmt: skip


def make_links(root: Path, images: int) -> None:
    """`images` hard links in ``root/train/CLASS/``."""
    (root / "files").mkdir()
    files = [root / "files" / f"{number}.jpg" for number in range(FILES)]
    for number, path in enumerate(files):
        noise = np.random.default_rng(number).integers(0, 256, (47, 63, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((500, 375)).save(path, quality=80)
    for index in range(images):
        name = f"n{index % CLASSES:08d}"
        folder = f"{root}/train/{name}"
        if index < CLASSES:
            os.makedirs(folder)  # noqa: PTH103 (as the links below)
        os.link(files[index % FILES], f"{folder}/{name}_{index // CLASSES}.JPEG")


def make_shards(folder: Path, samples: int) -> None:
    """`samples` small images with labels, 1,000 a shard."""
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "gray").save(buffer, "JPEG")
    # As many bytes as it takes for the index to be kept: real images have more.
    data = buffer.getvalue() + bytes(max(0, int(1.2 * KEPT_FROM_BYTES / samples) - len(buffer.getvalue())))

    def members(start: int) -> Iterator[tuple[str, bytes, int]]:
        for index in range(start, min(start + 1000, samples)):
            yield f"n{index % CLASSES:08d}_{index}.jpg", data, index % CLASSES

    for start in range(0, samples, 1000):
        write_shard(folder / f"train-{start // 1000:05d}.tar", members(start))


def measure(what: str, path: Path, cache: Path) -> list[dict[str, Any]]:
    """A first and a second start."""
    time.sleep(3)  # what was changed this moment is not kept
    rows = []
    for start in ("first", "second"):
        say(f"{what}: {start} start")
        done = subprocess.run(
            [sys.executable, "-c", _START, path], env=os.environ | {"ROBX_CACHE": str(cache)}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        rows.append({"what": what, "start": start} | json.loads(done.stdout))
    if rows[0]["fingerprint"] != rows[1]["fingerprint"]:
        raise SystemExit(f"{what}: the two starts disagree")
    return rows


if __name__ == "__main__":
    main()
