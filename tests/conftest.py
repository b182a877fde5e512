"""Fixtures for all tests. Nothing here needs the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import robx  # noqa: F401 (switches telemetry off before any engine is imported)
from robx.images.scenes import make_scene, render, write_scenes


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tar shards of 96 training and 48 test scenes, 64 px, labelled by their number of objects."""
    folder = tmp_path_factory.mktemp("shards") / "scenes"
    write_scenes(folder, train=96, test=48, size=64)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of scenes as image files: train/<label>/x.png (64) and test/<label>/x.png (32), 64 px."""
    root = tmp_path_factory.mktemp("scenes")
    for index in range(96):
        scene = make_scene(1, index)
        path = root / ("train" if index < 64 else "test") / str(scene.count_label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(scene, size=64).save(path)
    return root
