"""Scenes are a function of seed and index, and their labels are those of Clevr/Count and Clevr/Dist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from robx.images.scenes import Scene, Solid, make_scene, render, write_scenes
from robx.images.sources import labels_of, open_source


@given(st.integers(0, 2**31), st.integers(0, 10**6))
def test_a_scene_is_a_pure_function_and_within_its_bounds(seed: int, index: int) -> None:
    scene = make_scene(seed, index)
    assert scene == make_scene(seed, index)
    assert 3 <= len(scene.solids) <= 10
    assert scene.count_label == len(scene.solids) - 3
    assert all(s.x - s.radius > 0 and s.x + s.radius < 1 and s.y + s.radius < 1 for s in scene.solids)


def test_distance_bins_are_closed_on_the_right() -> None:
    def label(distance: float) -> int:
        return Scene((Solid("cube", "red", 0.5, 0.5, 0.1, distance),)).distance_label

    assert [label(d) for d in (7.0, 8.0, 8.01, 8.5, 9.0, 9.5, 10.0, 10.1)] == [0, 0, 1, 1, 2, 3, 4, 5]


def test_the_picture_shows_as_many_objects_as_the_label_says() -> None:
    """Counted by another library: connected coloured regions of scenes whose objects stand apart."""
    apart = [s for s in (make_scene(3, i) for i in range(1000)) if _stand_apart(s)][:20]
    assert len(apart) == 20
    for scene in apart:
        pixels = np.asarray(render(scene, size=192)).astype(int)
        coloured = pixels.max(axis=2) - pixels.min(axis=2) > 40
        regions, number = ndimage.label(ndimage.binary_closing(coloured, iterations=2))
        large = sum(np.sum(regions == i) > 25 for i in range(1, number + 1))
        assert large == sum(s.colour != "gray" for s in scene.solids)


def _stand_apart(scene: Scene) -> bool:
    pairs = [(a, b) for i, a in enumerate(scene.solids) for b in scene.solids[:i]]
    return all(np.hypot(a.x - b.x, a.y - b.y) > 1.8 * (a.radius + b.radius) for a, b in pairs)


def test_written_scenes_are_read_back_the_same_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_scenes(tmp_path / name, train=6, test=3, size=32)
    one, two = (open_source(tmp_path / name, split="train") for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert labels_of(one).tolist() == [make_scene(0, i).count_label for i in range(6)]
    assert np.array_equal(np.asarray(one.read(4)), np.asarray(render(make_scene(0, 4), size=32)))
    assert len(open_source(tmp_path / "one", split="test")) == 3
