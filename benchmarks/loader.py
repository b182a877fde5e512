"""CPU time per image of a loader worker: Pillow's crops, crops left to the device, and torchvision v2.

    OMP_NUM_THREADS=1 python benchmarks/loader.py

All sides read the same JPEG files from memory and are timed in turn, in CPU time of one core:

    pillow       ``augment = "pillow"``: decode, cut, resize, colours and blur
    cut          decode, cut and resize with Pillow; colours and blur would be the device's (split a)
    device       ``augment = "device"``: decode and draw; everything else is the device's (split b)
    device, PIL  the same without simplejpeg: Pillow decodes
    torchvision  decode_jpeg and the same multi-crop as torchvision.transforms.v2 on tensors
    scaled       of images twice as large as the crops need: pillow and device with ``decode = "scaled"``

The aims are .34 of pillow's time for `cut` and .12 for `device`. Bytes are what a worker sends to the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import publish, say, shown
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from robx.distill.batches.crops import apply_plan, multi_crop, needed_side, plan_crops, plan_image
from robx.distill.recipes import Method, Recipe, preset
from robx.images.decode import decode, decode_pixels
from robx.images.jpeg import PILLOW, jpeg_decoder
from robx.images.scenes import make_scene, render
from robx.records import to_json
from robx.runtime.bench.latency import paired_ratio


def main() -> None:
    """Time the sides for each method and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dino", "msn", "swav"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), help="width, height: ImageNet's most common")
    parser.add_argument("--name", default="loader", help="of the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    width, height = given.size
    files = photos(given.images, width, height)
    found = [measure(method, files, given.rounds) for method in given.methods]
    rows = [
        [
            f"{one['method']} 2+{one['local_crops']}",
            side,
            f"{one['ms'][side]:.2f}",
            shown(one["ratio"].get(side)),
            f"{one['bytes'][side] / 1e3:.0f}" if side in one["bytes"] else "-",
        ]
        for one in found
        for side in one["ms"]
    ]
    publish(
        given.name,
        title="CPU time of a loader worker per image",
        headings=["crops", "side", "CPU ms an image", "of pillow's time [95 %]", "kB sent"],
        rows=rows,
        data=to_json(found),
        notes=[
            f"{given.images} JPEG files of {width} x {height} pixels and {np.mean([len(f) for f in files]) / 1e3:.0f} "
            f"kB on average, rendered scenes with noise, in memory; RoB's recipes; {given.rounds} rounds, interleaved.",
            f"JPEGs for `device` are decoded by {jpeg_decoder()}; for all other sides of robx by {PILLOW}.",
            "The device's share of `cut` and `device` is not timed: this table says nothing of a GPU.",
        ],
        settings=vars(given),
    )


def photos(count: int, width: int, height: int) -> list[bytes]:
    """JPEG files about as large as ImageNet's: scenes, with noise that compresses as badly as a photograph."""
    noise = np.random.default_rng(0)
    files = []
    for index in range(count):
        scene = np.asarray(render(make_scene(0, index), size=width).crop((0, 0, width, height)), dtype=np.int16)
        coarse = noise.normal(0, 22, (height // 2 + 1, width // 2, 3)).repeat(2, 0)[:height].repeat(2, 1)
        buffer = io.BytesIO()
        Image.fromarray((scene + coarse).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


def measure(method: Method, files: list[bytes], rounds: int) -> dict[str, Any]:
    """CPU ms an image of every side, and its ratio to pillow's."""
    recipe = preset(method, "vit")
    sides = {
        "pillow": lambda data, at: multi_crop(decoded(data), recipe, epoch=0, index=at),
        "cut": lambda data, at: cut(decoded(data), recipe, at),
        "device": lambda data, at: plan_image(pixels(data), recipe, epoch=0, index=at),
        "device, PIL": lambda data, at: plan_image(np.asarray(decoded(data)), recipe, epoch=0, index=at),
        "torchvision": torchvision_crops(recipe),
    }
    scaled = dataclasses.replace(recipe, decode="scaled")
    side_needed, first = needed_side(recipe), pixels(files[0])
    if min(first.shape[:2]) >= 2 * side_needed:
        sides |= {
            "pillow, scaled": lambda data, at: multi_crop(decoded(data, side_needed), scaled, epoch=0, index=at),
            "device, scaled": lambda data, at: plan_image(pixels(data, side_needed), scaled, epoch=0, index=at),
            "device, PIL, scaled": lambda data, at: plan_image(
                np.asarray(decoded(data, side_needed)), scaled, epoch=0, index=at
            ),
        }
    blocks: dict[str, list[np.ndarray]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, work in sides.items():
            began = time.process_time_ns()
            for at, data in enumerate(files):
                work(data, at)
            blocks[side].append(np.array([(time.process_time_ns() - began) // len(files)], dtype=np.int64))
        say(f"{method}: round {number + 1} of {rounds}")
    crops = 3 * (2 * math.prod(recipe.crop_shape) + recipe.local_crops * math.prod(recipe.local_crop_shape))
    return {
        "method": method,
        "local_crops": recipe.local_crops,
        "ms": {side: float(np.median(np.concatenate(found))) / 1e6 for side, found in blocks.items()},
        "ratio": {side: paired_ratio(found, blocks["pillow"]) for side, found in blocks.items() if side != "pillow"},
        "bytes": {"pillow": crops, "cut": crops, "device": plan_image(first, recipe, epoch=0, index=0).pixels.nbytes},
    }


def decoded(data: bytes, at_least: int | None = None) -> Image.Image:
    """An RGB image, as robx's sources return it."""
    return decode(data, name="a file in memory", at_least=at_least)


def pixels(data: bytes, at_least: int | None = None) -> np.ndarray:
    """The pixels of an RGB image, as robx's sources return them."""
    return decode_pixels(data, name="a file in memory", at_least=at_least)


def cut(image: Image.Image, recipe: Recipe, index: int) -> list[np.ndarray]:
    """All crops, cut and resized alone."""
    plans = plan_crops(image.width, image.height, recipe, epoch=0, index=index)
    plans["flip"], plans["order"], plans["gray"], plans["sigma"], plans["solarize"] = False, -1, False, 0, False
    return [
        apply_plan(image, plan, recipe.crop_shape if view < 2 else recipe.local_crop_shape)
        for view, plan in enumerate(plans)
    ]


def torchvision_crops(recipe: Recipe) -> Callable[[bytes, int], Any]:
    """The same multi-crop by torchvision v2, on tensors."""
    colours = [limit * recipe.color_strength for limit in recipe.color]

    def pipeline(size: tuple[int, int], scale: tuple[float, float], kind: int) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, antialias=True),
                v2.RandomHorizontalFlip(recipe.flip_p),
                v2.RandomApply([v2.ColorJitter(*colours)], recipe.color_p),
                v2.RandomGrayscale(recipe.gray_p),
                v2.RandomApply([v2.GaussianBlur(2 * (min(size) // 20) + 1, (0.1, 2.0))], recipe.blur_p[kind]),
                v2.RandomSolarize(128, recipe.solarize_p[kind]),
            ]
        )

    large = [pipeline(recipe.crop_shape, recipe.global_scale, kind) for kind in (0, 1)]
    small = pipeline(recipe.local_crop_shape, recipe.local_scale, 2)

    def work(data: bytes, _: int) -> Any:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return [view(image) for view in large] + [small(image) for _ in range(recipe.local_crops)]

    return work


if __name__ == "__main__":
    main()
