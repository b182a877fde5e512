"""Reading a step's values one step late, as on a GPU: the same run, no poisoned checkpoint, one wait a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import robx.distill.train as training
from robx.distill.batches import loader
from robx.distill.batches.loader import epoch_order
from robx.distill.training import run_checkpoint
from robx.distill.training.collapse import NotFinite
from robx.distill.training.readings import HostCopy, Readings, StepTensors
from robx.images.sources import ImageSource, open_source


@pytest.fixture
def source(scenes: Path) -> ImageSource:
    return open_source(scenes)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "reads_late", lambda _: True)


def tensors(step: int, *, loss: float = 1.0, norm: float = 2.0, finite: bool = True, logs: bool = False) -> StepTensors:
    return StepTensors(
        step=step, index=[torch.tensor([step, 7])], targets_finite=torch.tensor(finite), losses=[torch.tensor(loss)],
        norms=[torch.tensor(norm)], stats=[{"agreement": torch.tensor(0.25)}], logs=logs,
    )  # fmt: skip


def test_values_arrive_a_step_late_and_all_of_them_once() -> None:
    readings = Readings(late=True, key=str, scaled=False)
    assert readings.put(tensors(0)) == [] and [v.step for v in readings.put(tensors(1, loss=0.5))] == [0]
    (last,) = readings.settle()
    assert (last.step, last.losses, last.norms, last.stats) == (1, [0.5], [2.0], [{"agreement": 0.25}])
    assert readings.settle() == []
    assert [v.step for v in Readings(late=False, key=str, scaled=False).put(tensors(3))] == [3]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"loss": float("nan")}, "the loss is nan at step 4; its images are i4, i7"),
        ({"norm": float("inf")}, "the gradient is inf at step 4; its images are i4, i7"),
        ({"finite": False}, "the teacher's targets are NaN at step 4; the images are i4, i7"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_the_step_that_was_bad_is_named_with_its_images(bad: dict[str, Any], said: str, late: bool) -> None:
    readings = Readings(late=late, key=lambda index: f"i{index}", scaled=False)
    with pytest.raises(NotFinite, match=said):
        for step in range(6):
            readings.put(tensors(step, **(bad if step == 4 else {})))
    readings = Readings(late=True, key=lambda index: f"i{index}", scaled=False)
    readings.put(tensors(4, **bad))
    with pytest.raises(NotFinite, match=said):  # before a checkpoint
        readings.settle()


def test_a_loss_scaler_may_meet_infinite_gradients_but_no_infinite_loss() -> None:
    readings = Readings(late=False, key=str, scaled=True)
    assert readings.put(tensors(0, norm=float("inf")))[0].norms == [float("inf")]
    with pytest.raises(NotFinite):
        readings.put(tensors(1, loss=float("inf")))


def test_a_run_that_reads_late_is_the_same_run(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"log_every": 3, "monitor_every": 4, "checkpoint_steps": 5}
    tiny.tiny_run(source, tmp_path / "at once", options=options)
    monkeypatch.setattr(training, "reads_late", lambda _: True)
    tiny.tiny_run(source, tmp_path / "late", options=options)
    assert tiny.losses(tmp_path / "late") == tiny.losses(tmp_path / "at once")
    states = [run_checkpoint.checkpoints(tmp_path / run)[-1] / "state.safetensors" for run in ("late", "at once")]
    assert states[0].read_bytes() == states[1].read_bytes()


@pytest.mark.parametrize(("bad_step", "saved"), [(4, 3), (5, 3), (6, 6)])
def test_nothing_that_followed_a_bad_step_is_saved(
    late: None, tiny: ModuleType, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    bad_step: int, saved: int,
) -> None:  # fmt: skip
    """Checkpoints are due after steps 3 and 6: a bad step before one, right at one, and right after one."""
    real, calls = loader.normalise, 0

    def poisoned(pixels: Tensor, device: torch.device) -> Tensor:
        nonlocal calls
        calls += 1
        found = real(pixels, device)
        if calls == 2 * bad_step + 1:  # the global crops of that step
            found[0, 3] = float("nan")
        return found

    monkeypatch.setattr(loader, "normalise", poisoned)
    with pytest.raises(NotFinite) as caught:
        tiny.tiny_run(source, tmp_path, options={"checkpoint_steps": 3})
    index = epoch_order(len(source), seed=0, epoch=0)[8 * bad_step : 8 * (bad_step + 1)]
    names = ", ".join(source.key(int(at)) for at in index)
    assert f"the loss is nan at step {bad_step}; its images are {names}" in str(caught.value)
    found = run_checkpoint.load_newest(tmp_path)
    assert found is not None and found[0] == saved
    assert all(step <= bad_step for step, _ in tiny.losses(tmp_path))
    for path in tmp_path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in loader_of(path).values())


def loader_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(path).items()}


class Waits(TorchDispatchMode):
    """Counts the operations for which the host has to wait for a GPU: a value or a number of rows comes back."""

    counting = False

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        by_mask = name.startswith("aten::index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in (args[1] if isinstance(args[1], list) else ())
        )
        names = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique")
        if self.counting and (by_mask or name.startswith(names)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self.counting = self.counting, False
        yield
        self.counting = before


@pytest.mark.parametrize(
    ("student", "values"),
    [
        ("test_vit", {"objective": "msn", "precision": "bf16", "augment": "device", "clip_grad": 1.0}),
        ("test_vit", {"objective": "ibot", "base": True, "precision": "bf16", "accumulate": 2}),
        ("test_resnet", {"objective": "swav", "kind": "cnn", "optimizer": "larc", "student_ema": 0.9, "queue": 16}),
        ("test_resnet", {"objective": "swav", "kind": "cnn", "optimizer": "larc", "precision": "fp16"}),
    ],
)
def test_the_host_waits_for_the_device_once_a_step(
    late: None, tiny: ModuleType, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    student: str, values: dict[str, Any],
) -> None:  # fmt: skip
    waits, copies = Waits(), list[int]()
    real_views, real_values = loader.Batch.views, HostCopy.values

    def views(batch: loader.Batch, device: torch.device) -> Any:
        if batch.masks is not None:  # counted on the host, as Batch.pin_memory does for a GPU
            with waits.paused():
                batch.masked = batch.masks.flatten().nonzero()[:, 0]
        return real_views(batch, device)

    def copied(copy: HostCopy) -> list[float]:
        copies.append(1)
        return real_values(copy)

    monkeypatch.setattr(loader.Batch, "views", views)
    monkeypatch.setattr(HostCopy, "values", copied)
    at: list[int] = []

    def progress(done: int, total: int, note: str) -> None:
        waits.counting = 2 <= done < 6
        at.append(len(copies))

    options = {"log_every": 100, "monitor_every": 100, "workers": 1}
    with waits:
        tiny.tiny_run(
            source, tmp_path, students=[student], recipe=tiny.tiny_recipe(**values), options=options, progress=progress
        )
    assert waits.found == []
    assert at[:7] == [0, 1, 2, 3, 4, 5, 6]
