"""Training on a CUDA GPU against the same training on the CPU. `make gpu` runs these; elsewhere they are skipped.

ROBX_GPU=cpu runs them on the CPU instead, which checks the tests themselves.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robx.distill.batches import loader
from robx.distill.batches.crops import multi_crop, plan_crops
from robx.distill.batches.device_crops import device_crops
from robx.distill.batches.loader import build_loader
from robx.distill.batches.views import Views
from robx.distill.objectives.build import build_objective
from robx.distill.recipes import Method, override, preset
from robx.distill.students.student import build_student
from robx.distill.targets.build import build_branch
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.training.collapse import NotFinite
from robx.distill.training.compute import decide, facts_of
from robx.distill.training.networks import prepare_network
from robx.distill.training.optimizers import build_optimizer
from robx.distill.training.readings import HostCopy
from robx.distill.training.run_checkpoint import load_newest
from robx.images.sources import ImageSource, open_source

pytestmark = pytest.mark.gpu
TEACHERS = {
    "dino": "dino_vits16",
    "ibot": "ibot_vits16",
    "msn": "msn_vits16",
    "swav": "swav_rn50",
    "kd": "timm:resnet18",
}


@pytest.fixture
def gpu() -> Iterator[str]:
    """The device's name; products of float32 are computed in float32, so that results can be compared."""
    name = os.environ.get("ROBX_GPU", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here: make gpu runs this on a machine that has one")
    cudnn: Any = torch.backends.cudnn
    places = (cudnn.conv, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    yield name
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/distill/tiny.py: complete runs in seconds."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "distill" / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["tiny"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(scenes: Path) -> ImageSource:
    return open_source(scenes)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
@pytest.mark.parametrize("method", list(TEACHERS))
def test_loss_and_gradient_are_those_of_the_cpu(method: Method, name: str, gpu: str) -> None:
    sizes = {"crop_size": 64, "local_crop_size": 32, "local_crops": 2, "prototypes": 32, "drop_path": 0.0}
    recipe = override(preset(method, "vit"), sizes | {"patch_drop": 0.0})
    found = [_loss_and_gradient(method, name, recipe, torch.device(place)) for place in ("cpu", gpu)]
    (loss, gradient), (other, other_gradient) = found
    assert other == pytest.approx(loss, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(gradient, other_gradient, dim=0) > 0.9999
    assert other_gradient.norm() == pytest.approx(float(gradient.norm()), rel=1e-3)


def _loss_and_gradient(method: Method, name: str, recipe: Any, device: torch.device) -> tuple[float, torch.Tensor]:
    torch.manual_seed(5)
    teacher = build_teacher_skeleton(TEACHERS[method], objective=method, prototypes=32, image_size=64)
    student = build_student(name, recipe, teacher)
    pixels = torch.randn(2, 8, 3, 64, 64), torch.randn(2, 8, 3, 32, 32)
    masks = None if student.masked_embed is None else torch.rand(2, 8, 16) < 0.3
    prepare_network(teacher, device)
    prepare_network(student, device)
    views = Views(*(part.to(device) for part in pixels), torch.arange(8), None if masks is None else masks.to(device))
    objective = build_objective(recipe)
    branch = build_branch(recipe, objective, student=student, teacher=teacher, steps=10, steps_per_epoch=5)
    loss, _ = objective(student(views), branch.targets(views), views)  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten().double().cpu() for p in student.parameters() if p.grad is not None]
    return float(loss), torch.cat(gradients)


@pytest.mark.parametrize("student", ["test_vit", "test_resnet"])
def test_a_run_of_24_steps_is_the_cpus(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, student: str, gpu: str
) -> None:
    recipe = tiny.tiny_recipe(epochs=3, drop_path=0.0, precision="fp32", augment="pillow")
    for name in ("cpu", gpu):
        out = tmp_path / f"on-{name}"
        tiny.tiny_run(source, out, students=[student], recipe=recipe, options={"device": name})
    steps = len(tiny.losses(tmp_path / "on-cpu"))
    assert steps == 24
    pairs = zip(tiny.losses(tmp_path / "on-cpu"), tiny.losses(tmp_path / f"on-{gpu}"), strict=True)
    for (_, ours), (_, theirs) in pairs:
        assert theirs == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("augment", ["pillow", "device"])
def test_a_resumed_run_is_the_unbroken_one(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, augment: str, gpu: str
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise Stop

    recipe = tiny.tiny_recipe(augment=augment, precision="fp32")
    options = {"device": gpu, "checkpoint_steps": 2, "workers": 1}
    tiny.tiny_run(source, tmp_path / "a", recipe=recipe, options=options)
    with pytest.raises(Stop):
        tiny.tiny_run(source, tmp_path / "b", recipe=recipe, options=options, progress=stop)
    found = load_newest(tmp_path / "b")
    assert found is not None and 0 < found[0] < 8
    tiny.tiny_run(source, tmp_path / "b", recipe=recipe, options=options)
    for (step, ours), (again, theirs) in zip(tiny.losses(tmp_path / "a"), tiny.losses(tmp_path / "b"), strict=True):
        assert step == again and theirs == pytest.approx(ours, rel=1e-3)  # a GPU's sums need not be the same twice


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_single(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, precision: str, gpu: str
) -> None:
    soft = {"teacher_temperature": 0.5, "student_temperature": 0.5}  # sharp targets would multiply every rounding
    for name in ("fp32", precision):
        recipe = tiny.tiny_recipe(precision=name, drop_path=0.0, **soft)
        tiny.tiny_run(source, tmp_path / name, recipe=recipe, options={"device": gpu})
    pairs = zip(tiny.losses(tmp_path / "fp32"), tiny.losses(tmp_path / precision), strict=True)
    for (_, single), (_, half) in pairs:
        assert half == pytest.approx(single, rel=0.05)


def test_defaults_are_those_of_the_gpu(gpu: str) -> None:
    facts = facts_of(gpu)
    if gpu == "cuda":
        assert facts.name == torch.cuda.get_device_name()
        assert facts.bf16 == torch.cuda.is_bf16_supported(including_emulation=False)
    expected = "fp32" if gpu == "cpu" else "bf16" if facts.bf16 else "fp16"
    assert decide(facts, {}).precision == expected


def test_scalars_reach_the_host_as_they_were_when_their_copy_began(gpu: str) -> None:
    """Behind work that takes a while, on the device that holds them, and not as they are changed afterwards."""
    busy = torch.randn(1024, 1024, device=gpu)
    scalars = [torch.full((), float(i), device=gpu) for i in range(8)]
    for _ in range(20):
        busy = busy @ busy / 32
    scalars[3] += (busy * 0).sum().nan_to_num() + 0.5
    copy = HostCopy(scalars)
    scalars[3].fill_(-1)
    assert copy.values() == [0, 1, 2, 3.5, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["larc", "sgd", "adamw"])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_an_optimizers_step_is_the_cpus(name: str, found_inf: float | None, gpu: str) -> None:
    """With and without a loss scaler, whose verdict is used on the device."""
    recipe = override(preset("dino", "vit"), {"optimizer": name, "lr": 0.01, "lr_batch": None})
    ends = []
    for place in ("cpu", gpu):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1))
        gradients = [[torch.randn(p.shape) for p in net.parameters()] for _ in range(3)]
        prepare_network(net, torch.device(place))
        start = [p.detach().clone() for p in net.parameters()]
        optimizer = build_optimizer(net, recipe)
        for step in gradients:
            for p, gradient in zip(net.parameters(), step, strict=True):
                p.grad = torch.empty_like(p).copy_(gradient)
            if found_inf is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.grad_scale = None  # type: ignore[attr-defined]
                optimizer.found_inf = torch.full((), found_inf, device=place)  # type: ignore[attr-defined]
            elif found_inf:
                continue  # as GradScaler does
            optimizer.step()
        ends.append([p.detach().cpu() for p in net.parameters()])
        if found_inf:
            assert all(torch.equal(p, q) for p, q in zip(start, net.parameters(), strict=True))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "values"),
    [
        ("test_vit", {"objective": "msn", "precision": "bf16"}),
        ("test_vit", {"objective": "ibot", "base": True, "precision": "bf16"}),
        ("test_resnet", {"objective": "swav", "kind": "cnn", "optimizer": "larc", "precision": "fp16", "queue": 16}),
        ("test_resnet", {"objective": "msn", "kind": "cnn", "optimizer": "sgd", "precision": "fp16"}),
    ],
)
def test_a_step_synchronises_with_the_gpu_in_one_place(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, gpu: str, student: str, values: dict[str, Any]
) -> None:
    """torch raises at every operation that waits for the GPU; the event that the host does wait for is not one."""

    def progress(done: int, total: int, note: str) -> None:
        if gpu == "cuda":
            torch.cuda.set_sync_debug_mode("error" if 3 <= done < 7 else "default")

    recipe = tiny.tiny_recipe(augment="device", **values)
    options = {"device": gpu, "workers": 1, "log_every": 100, "monitor_every": 100}
    try:
        tiny.tiny_run(source, tmp_path, students=[student], recipe=recipe, options=options, progress=progress)
    finally:
        if gpu == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(tiny.losses(tmp_path)) == 1


def test_a_bad_step_is_named_and_not_saved(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU its values arrive while the next step computes."""
    real, calls = loader.normalise, 0

    def poisoned(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        nonlocal calls
        calls += 1
        found = real(pixels, device)
        if calls == 11:  # the global crops of step 5, which is the last before a checkpoint
            found[0, 3] = float("nan")
        return found

    monkeypatch.setattr(loader, "normalise", poisoned)
    with pytest.raises(NotFinite, match="loss is nan at step 5; its images are"):
        tiny.tiny_run(source, tmp_path, recipe=tiny.tiny_recipe(), options={"device": gpu, "checkpoint_steps": 3})
    found = load_newest(tmp_path)
    assert found is not None and found[0] == 3


def test_crops_on_the_device_are_pillows(gpu: str) -> None:
    recipe = override(preset("dino", "vit"), {"crop_size": 96, "local_crop_size": 48, "local_crops": 4})
    rng = np.random.default_rng(0)
    images = [_photo(int(rng.integers(60, 500)), int(rng.integers(60, 500)), i) for i in range(24)]
    plans = np.stack([plan_crops(*image.size, recipe, epoch=2, index=i) for i, image in enumerate(images)], axis=1)
    pillow = [multi_crop(image, recipe, epoch=2, index=i) for i, image in enumerate(images)]
    tensors = [torch.from_numpy(np.array(image)) for image in images]
    for rows, name, size in ((slice(0, 2), "globals", 96), (slice(2, None), "locals", 48)):
        on_device = device_crops([t.to(gpu) for t in tensors], [(plans[rows], (size, size))])[0].cpu()
        on_cpu = device_crops(tensors, [(plans[rows], (size, size))])[0]
        expected = torch.from_numpy(np.stack([getattr(one, name) for one in pillow], axis=1)).permute(0, 1, 4, 2, 3)
        assert (on_device - on_cpu).abs().mean() < 0.02
        assert (on_device - expected).abs().mean(dim=(2, 3, 4)).max() < 1.5


def test_a_batch_on_the_device_does_not_depend_on_the_workers(source: ImageSource, gpu: str) -> None:
    values = {"crop_size": 48, "local_crop_size": 32, "local_crops": 2, "batch_size": 8, "augment": "device"}
    recipe = override(preset("dino", "vit"), values)
    runs = [list(build_loader(source, recipe, start=0, end=3, workers=workers)) for workers in (0, 2)]
    for one, other in zip(*runs, strict=True):
        ours, theirs = one.views(torch.device(gpu)), other.views(torch.device(gpu))
        assert torch.equal(ours.globals, theirs.globals) and torch.equal(ours.locals, theirs.locals)


def _photo(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((width, height))
