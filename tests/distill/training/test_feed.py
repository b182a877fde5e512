"""What the loop is fed by: shared memory for the workers' batches."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from robx.distill.batches.loader import build_loader
from robx.distill.training import feed
from robx.errors import InputError
from robx.images.sources import open_source


def _run(tiny: ModuleType, scenes: Path, said: list[str], *, workers: int, **recipe: Any) -> Any:
    values = {"recipe": tiny.tiny_recipe(**recipe), "source": open_source(scenes), "mask_grid": None}
    processes, options = SimpleNamespace(world=1), SimpleNamespace(workers=workers)
    return SimpleNamespace(**values, processes=processes, options=options, say=said.append)


@pytest.mark.parametrize("augment", ["pillow", "device"])
def test_a_batch_takes_the_memory_that_is_counted(tiny: ModuleType, scenes: Path, augment: str) -> None:
    run = _run(tiny, scenes, [], workers=1, augment=augment, patch_drop=0.0)
    batch = next(iter(build_loader(run.source, run.recipe, start=0, end=1)))
    tensors = [value for value in (*vars(batch.crops).values(), batch.index) if hasattr(value, "nbytes")]
    held = sum(tensor.nbytes for tensor in tensors if "torch" in type(tensor).__module__)
    assert held <= feed.batch_bytes(run) <= 1.3 * held


def test_prefetching_is_reduced_to_the_memory_that_there_is(
    tiny: ModuleType, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run = _run(tiny, scenes, said, workers=2)
    size = feed.batch_bytes(run)
    for batches, prefetch in ((100, 4), (9, 4), (8, 3), (3, 1)):
        monkeypatch.setattr(feed, "free_shared_memory", lambda free=batches * size: free)
        assert feed.check_resources(run) == prefetch
    assert len(said) == 2 and all("--shm-size" in text for text in said)
    monkeypatch.setattr(feed, "free_shared_memory", lambda: 3 * size - 1)
    with pytest.raises(InputError, match=r"2 loader workers need .* MB of shared memory, but /dev/shm has"):
        feed.check_resources(run)
    monkeypatch.setattr(feed, "free_shared_memory", lambda: 0)
    assert feed.check_resources(_run(tiny, scenes, said, workers=0)) == feed.PREFETCH
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(feed, "free_shared_memory", lambda: 5 * size)
    with pytest.raises(InputError):
        feed.check_resources(run)
