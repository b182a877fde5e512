"""Labelled scenes that robx renders itself: shaded solids on a plane, in the style of CLEVR.

They need no download and no licence. The tests use them, and the demo when no other images are available. A scene
depends only on its seed and index. The labels are those of the Clevr/Count and Clevr/Dist tasks (Zhai et al., VTAB,
arXiv 1910.04867): the number of objects, and the distance of the nearest one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from robx.images.shards import write_shard
from robx.progress import Progress
from robx.store.files import write_json
from robx.store.folders import new_folder

MIN_OBJECTS, MAX_OBJECTS = 3, 10
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)  # bins closed on the right
SHAPES = ("cube", "cylinder", "sphere")
COLOURS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
_OVERSAMPLING = 3


@dataclass(frozen=True)
class Solid:
    """One object: its position in the picture, in [0, 1], and its distance from the camera."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    distance: float


@dataclass(frozen=True)
class Scene:
    """The objects of one picture, the farthest first."""

    solids: tuple[Solid, ...]

    @property
    def count_label(self) -> int:
        """Clevr/Count: the number of objects minus 3, from 0 to 7."""
        return len(self.solids) - MIN_OBJECTS

    @property
    def distance_label(self) -> int:
        """Clevr/Dist: the bin of the nearest object's distance, from 0 to 5."""
        nearest = min(solid.distance for solid in self.solids)
        return int(np.searchsorted(DISTANCE_EDGES, nearest, side="left"))


def make_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of `seed`, which depends on nothing else."""
    rng = np.random.default_rng((seed, index))
    wanted = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    nearest = float(rng.uniform(7.6, 10.6))
    solids: list[Solid] = []
    while len(solids) < wanted:
        distance = nearest if not solids else float(rng.uniform(nearest, 13.0))
        # The plane's horizon is at 0.3 of the height; near objects are low in the picture, and large.
        y = 0.3 + 0.6 * (13.5 - distance) / 6.0
        radius = 0.75 / distance
        for _ in range(20):
            x = float(rng.uniform(radius, 1 - radius))
            if all(np.hypot(x - s.x, y - s.y) > 0.8 * (radius + s.radius) for s in solids):
                break
        shape, colour = SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]
        solids.append(Solid(shape, colour, x, y, radius, distance))
    return Scene(tuple(sorted(solids, key=lambda solid: -solid.distance)))


def render(scene: Scene, *, size: int) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels."""
    side = size * _OVERSAMPLING
    shade = np.linspace(200, 130, side, dtype=np.float32)[:, None, None] * np.ones((1, side, 3), np.float32)
    image = Image.fromarray(shade.astype(np.uint8))
    shadows = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(shadows)
    for solid in scene.solids:
        x, y, r = solid.x * side, solid.y * side, solid.radius * side
        pen.ellipse((x - 0.9 * r, y + 0.45 * r, x + 1.5 * r, y + 1.1 * r), fill=110)
    shadows = shadows.filter(ImageFilter.GaussianBlur(side / 80))
    image.paste((0, 0, 0), (0, 0), shadows)
    draw = ImageDraw.Draw(image)
    for solid in scene.solids:
        _DRAWERS[solid.shape](draw, solid.x * side, solid.y * side, solid.radius * side, COLOURS[solid.colour])
    return image.resize((size, size), Image.Resampling.BOX)


def write_scenes(
    folder: Path,
    *,
    train: int,
    test: int,
    size: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write ``train-00000.tar`` and ``test-00000.tar`` with count labels, and classes.json, atomically."""
    with new_folder(folder, ours=("train-00000.tar", "test-00000.tar", "classes.json")) as temporary:
        write_json(temporary / "classes.json", [f"{n} objects" for n in range(MIN_OBJECTS, MAX_OBJECTS + 1)])

        def samples(split: str, first: int, number: int) -> Iterator[tuple[str, bytes, int | None]]:
            for index in range(first, first + number):
                scene = make_scene(seed, index)
                buffer = io.BytesIO()
                render(scene, size=size).save(buffer, format="PNG")
                if progress:
                    progress(index + 1, train + test, f"rendering {split} scenes")
                yield f"{index:08d}.png", buffer.getvalue(), scene.count_label

        write_shard(temporary / "train-00000.tar", samples("train", 0, train))
        write_shard(temporary / "test-00000.tar", samples("test", train, test))


Colour = tuple[int, int, int]


def _tint(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(min(255, channel * factor + 255 * max(0.0, factor - 1) * 0.3)) for channel in colour)
    return red, green, blue


def _cube(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    s, d = 0.75 * r, 0.35 * r
    draw.rectangle((x - s, y - s + d, x + s, y + s), fill=colour)
    draw.polygon(
        [(x - s, y - s + d), (x - s + d, y - s), (x + s + d, y - s), (x + s, y - s + d)], fill=_tint(colour, 1.35)
    )
    draw.polygon(
        [(x + s, y - s + d), (x + s + d, y - s), (x + s + d, y + s - d), (x + s, y + s)], fill=_tint(colour, 0.7)
    )


def _cylinder(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    s, e = 0.75 * r, 0.28 * r
    draw.ellipse((x - s, y + r - 2 * e, x + s, y + r), fill=_tint(colour, 0.85))
    draw.rectangle((x - s, y - r + e, x + s, y + r - e), fill=colour)
    draw.rectangle((x + 0.4 * s, y - r + e, x + s, y + r - e), fill=_tint(colour, 0.8))
    draw.ellipse((x - s, y - r, x + s, y - r + 2 * e), fill=_tint(colour, 1.3))


def _sphere(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    for step in range(12):
        t = step / 12
        centre_x, centre_y, radius = x - 0.35 * r * t, y - 0.35 * r * t, r * (1 - t) ** 0.8
        box = (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius)
        draw.ellipse(box, fill=_tint(colour, 0.75 + 0.85 * t))


_DRAWERS = {"cube": _cube, "cylinder": _cylinder, "sphere": _sphere}
