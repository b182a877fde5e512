"""Feature extraction against the bare forward pass, and exact kNN against its matrix product.

    python benchmarks/features.py

Extraction: ``eval/datasets/features.py::extract`` from image files to features, against the same Session on tensors in
memory; the aim is .9 of the bare rate. kNN: ``nearest`` (normalise, multiply, keep the best 20) on one block of the
ImageNet problem against one float32 matrix product of the same shape, both extrapolated to 50,000 queries, 1,280,000
training images and width 192: all blocks are equal, so the time is proportional.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLIP_ART, demo_images, first_images, publish, save_student, say, shown

from robx.eval.datasets.features import extract
from robx.eval.neighbours import nearest
from robx.image_size import usual_preprocessing
from robx.images.decode import preprocess
from robx.images.sources import ImageSource, open_source
from robx.records import Value, to_json
from robx.runtime.bench.latency import paired_ratio
from robx.runtime.session import SessionSettings, open_session
from robx.trunk import build_trunk

QUERIES, BANK, WIDTH = 50_000, 1_280_000, 192
BATCH = 64
Row = dict[str, Any]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["mobilenetv3_large_100", "resnet18"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="threads of the model and of the matrix product")
    parser.add_argument("--queries", type=int, default=1024, help="queries in the measured block")
    parser.add_argument("--bank", type=int, default=65_536, help="training images in the measured block")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source = first_images(open_source(demo_images(), split="test"), given.images)
    rows = [extraction(name, source, given) for name in given.students] + [neighbours(given)]
    cells = [[r["what"], r["bare"], r["robx"], shown(r["share"]), r.get("whole", "-")] for r in rows]
    publish(
        "features",
        title="Features and neighbours against the bare computation",
        headings=["what", "bare", "robx", "bare time / robx's time [95 %]", "50,000 x 1,280,000 x 192"],
        rows=cells,
        data=to_json(rows),
        notes=[
            f"Extraction at {given.size} px from PNG files in tar shards, batch {BATCH}, model on {given.threads} "
            "thread(s), PyTorch, random weights (time does not depend on them); one thread per "
            "processor decodes while the model runs. A ratio above 1 would be noise.",
            f"kNN on a block of {given.queries:,} x {given.bank:,} x {WIDTH} of random features, k = 20; the last "
            "column is the extrapolated time of that block, not a complete run. Both sides multiply with NumPy's BLAS.",
            CLIP_ART,
        ],
        settings=vars(given),
    )


def extraction(name: str, source: ImageSource, given: argparse.Namespace) -> Row:
    """Seconds of `extract` and of the same session on tensors in memory."""
    preprocessing = usual_preprocessing(given.size)
    pixels = np.stack([preprocess(source.read(i), preprocessing) for i in range(len(source))])
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_student(build_trunk(name), name, Path(folder), given.size)
        with open_session(Path(folder), SessionSettings(threads=given.threads)) as session:
            blocks = alternate(
                {
                    "bare": lambda: [session.run(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)],
                    "robx": lambda: extract(session, source, batch_size=BATCH),
                },
                given.rounds,
            )
    rates = {side: len(source) / median(found) for side, found in blocks.items()}
    say(f"{name}: {rates}")
    return {
        "what": f"extract, {name}",
        **{side: f"{rate:.1f} images/s" for side, rate in rates.items()},
        "share": share(blocks),
        "images_per_s": rates,
    }


def neighbours(given: argparse.Namespace) -> Row:
    """Seconds of `nearest` and of one matrix product of the same shape."""
    random = np.random.default_rng(0)
    bank = random.normal(size=(given.bank, WIDTH)).astype(np.float32)
    queries = random.normal(size=(given.queries, WIDTH)).astype(np.float32)
    out = np.empty((given.queries, given.bank), np.float32)
    blocks = alternate(
        {"bare": lambda: np.matmul(queries, bank.T, out=out), "robx": lambda: nearest(bank, queries, 20)}, given.rounds
    )
    stretch = QUERIES / given.queries * BANK / given.bank
    minutes = {side: median(found) * stretch / 60 for side, found in blocks.items()}
    return {
        "what": "kNN, k = 20",
        **{side: f"{median(found):.2f} s per block" for side, found in blocks.items()},
        "share": share(blocks),
        "whole": f"{minutes['bare']:.1f} and {minutes['robx']:.1f} min",
        "whole_minutes": minutes,
    }


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[np.ndarray]]:
    """Each side once a round, the order reversed every other round, after one round of warming up; ns, (1,) each."""
    blocks: dict[str, list[np.ndarray]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            started = time.perf_counter_ns()
            sides[side]()
            if number:
                blocks[side].append(np.array([time.perf_counter_ns() - started], dtype=np.int64))
    return blocks


def median(blocks: list[np.ndarray]) -> float:
    """Seconds."""
    return float(np.median(np.concatenate(blocks))) / 1e9


def share(blocks: dict[str, list[np.ndarray]]) -> Value:
    """The bare time as a share of robx's."""
    return paired_ratio(blocks["bare"], blocks["robx"])


if __name__ == "__main__":
    main()
