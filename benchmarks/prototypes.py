"""Mini-batch k-means against Lloyd's: how well the prototypes fit, and what the fit costs.

    OMP_NUM_THREADS=1 python benchmarks/prototypes.py

Each set of points is fitted by both methods with the same seeds. The quality is the mean cosine between a point and its
nearest centre; the aim is a ratio of at least .99 at K = 1024. The last row is a scaled-down run of many prototypes by
mini-batches alone.

    clip art    features of EfficientNet-Lite0 of crops of the demo's images, centred on their mean
    mixture     unit vectors around random directions, with spread
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import CLIP_ART, demo_images, publish, say
from torch import Tensor

from robx.distill.batches.crops import multi_crop, normalise
from robx.distill.recipes import preset
from robx.distill.teachers.kmeans import spherical_kmeans
from robx.distill.teachers.load import load_teacher
from robx.distill.teachers.minibatch_kmeans import DTYPE, minibatch_kmeans
from robx.images.sources import ImageSource, open_source

BATCH = 16  # images embedded at a time


def main() -> None:
    """Fit each set of points by both methods and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels of the crops of the clip art")
    parser.add_argument("--crops", type=int, default=4, help="crops of each of its images")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--points", type=int, default=65_536, help="of the mixture")
    parser.add_argument("--many", type=int, default=8192, help="prototypes of the scaled-down run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    real = clip_art(open_source(demo_images(), split="train"), size=given.size, crops=given.crops)
    sets = [
        ("clip art", real, 1024),
        ("clip art", real, 256),
        ("mixture", mixture(given.points, 2000, width=128), 1024),
    ]
    found = [compared(name, points, k, seed=seed, full=True) for name, points, k in sets for seed in range(given.seeds)]
    found.append(compared("mixture", mixture(8 * given.many, 20_000, width=256), given.many, seed=0, full=False))
    publish(
        "prototypes",
        title="Prototypes by mini-batch k-means and by Lloyd's algorithm",
        headings=["points", "N", "D", "K", "seed", "cosine: Lloyd", "mini-batch", "ratio", "s: Lloyd", "mini-batch"],
        rows=[_row(one) for one in found],
        data=found,
        notes=[
            "Cosine: mean over all points to the nearest centre. Lloyd's algorithm starts from k-means++ and stops "
            "after 30 iterations or when one gains less than 1e-4; mini-batches stop after 20 epochs or at that gain.",
            f"EfficientNet-Lite0 at {given.size} px. {CLIP_ART}",
            "Seconds are of one CPU thread beside other work; they say nothing of a GPU.",
        ],
        settings=vars(given),
    )


def clip_art(source: ImageSource, *, size: int, crops: int) -> Tensor:
    """Centred features (N, D) of crops of every image, at most `crops` of each."""
    recipe = dataclasses.replace(
        preset("msn", "cnn"), crop_size=size, local_crop_size=size, local_crops=crops - 2, color_p=0.0, gray_p=0.0,
        blur_p=(0.0, 0.0, 0.0),
    )  # fmt: skip
    teacher = load_teacher("efficientnet_lite0", objective="kd", image_size=size)
    found, waiting = [], []
    for index in range(len(source)):
        views = multi_crop(source.read(index), recipe, epoch=0, index=index)
        waiting.append(np.concatenate([views.globals, views.locals]))
        if len(waiting) == BATCH or index == len(source) - 1:
            pixels = normalise(torch.from_numpy(np.concatenate(waiting))[None], torch.device("cpu"))[0]
            found.append(teacher.features(pixels))
            waiting = []
            if len(found) % 50 == 0:
                say(f"{index + 1} of {len(source)} images embedded")
    features = torch.cat(found)
    return features - features.mean(dim=0)


def mixture(count: int, kinds: int, *, width: int) -> Tensor:
    """Points (N, D) around random directions, as far from them as the directions are from the origin."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(kinds, width, generator=generator)
    return centres[torch.randint(kinds, (count,), generator=generator)] + torch.randn(count, width, generator=generator)


def compared(name: str, points: Tensor, k: int, *, seed: int, full: bool) -> dict[str, Any]:
    """Quality and seconds of both methods, or of mini-batches alone."""
    unit = F.normalize(points, dim=1)
    kept = unit.to(DTYPE)
    mini, mini_seconds = timed(lambda: minibatch_kmeans(kept, k, seed=seed))
    facts = {"points": name, "n": len(points), "d": points.shape[1], "k": k, "seed": seed}
    facts |= {"minibatch": {"cosine": mini.objective, "epochs": mini.epochs, "seconds": mini_seconds}}
    if full:
        lloyd, seconds = timed(lambda: spherical_kmeans(unit, k, seed=seed))
        facts |= {"lloyd": {"cosine": lloyd.objective, "iterations": lloyd.iterations, "seconds": seconds}}
        facts |= {"ratio": mini.objective / lloyd.objective}
    say(f"{facts}")
    return facts


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work`, and its CPU seconds."""
    began = time.process_time()
    return work(), time.process_time() - began


def _row(one: dict[str, Any]) -> list[str]:
    mini, lloyd = one["minibatch"], one.get("lloyd")
    return [
        one["points"], str(one["n"]), str(one["d"]), str(one["k"]), str(one["seed"]),
        f"{lloyd['cosine']:.4f}" if lloyd else "-", f"{mini['cosine']:.4f}",
        f"{one['ratio']:.4f}" if lloyd else "-", f"{lloyd['seconds']:.0f}" if lloyd else "-", f"{mini['seconds']:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
