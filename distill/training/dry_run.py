"""What a run will cost, before it starts: counted and measured on networks with random weights.

Counted: parameters, floating-point operations an image (forward, and backward of the students), bytes that backward
keeps. Measured, briefly, on this machine: the speed bound of a step, and crops a second of one loader worker.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from robx.distill.batches.loader import CropDataset, collate, epoch_order, steps_per_epoch
from robx.distill.batches.views import Targets, Views
from robx.distill.recipes import Recipe
from robx.distill.targets.build import StoredTeacher
from robx.distill.teachers.frozen_heads import PrototypeHead
from robx.distill.teachers.prototypes import images_to_fit, require_images
from robx.distill.teachers.teacher import Teacher
from robx.distill.training.learner import Learner, autocast
from robx.distill.training.networks import Initial, build_networks
from robx.distill.training.processes import Processes
from robx.distill.training.speed import SpeedBound, measure_bound
from robx.images.sources import ImageSource

# A CUDA context, cuDNN's and cuBLAS's workspaces, and what the allocator cannot use: an estimate.
_CUDA_BYTES = 1.2e9
_USABLE = 0.92
_MEASURED_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """One network."""

    name: str
    params: int
    flops_per_image: float  # all its crops of an image; of a student forward and backward


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """The whole run."""

    images: int
    epochs: int
    steps: int
    batch_size: int
    device: str  # that the speeds were measured on
    teacher: NetworkCost | None
    students: tuple[NetworkCost, ...]
    fixed_bytes: int  # weights, gradients, optimiser's state: whatever the batch
    image_bytes: int  # that one image adds: its crops, what backward keeps, its targets
    teacher_images_per_s: float | None  # None: the targets are the student's own scores
    student_images_per_s: float
    bound_images_per_s: float
    loader_images_per_s: float  # of one worker
    hours: float  # of one process at the bound and the loader's speed, fitting prototypes included
    gpu_memory_gb: float | None = None
    gpu_batch: int | None = None  # the largest micro-batch, estimated, that a GPU of that memory takes

    @property
    def batch_bytes(self) -> int:
        """What a micro-batch of the recipe's size takes, in all."""
        return self.fixed_bytes + self.image_bytes * self.batch_size

    def lines(self, batch_size: int) -> list[str]:
        """It in words, but for the networks; `batch_size` is the recipe's, of all micro-batches."""
        per_image = f"{self.image_bytes / 1e6:.1f} MB an image"
        found = [
            f"{self.images} images x {self.epochs} epochs, batch {batch_size}: {self.steps} steps",
            f"memory: {self.fixed_bytes / 1e9:.2f} GB fixed + {per_image} = {self.batch_bytes / 1e9:.2f} GB "
            f"at a micro-batch of {self.batch_size}",
            f"measured on {self.device}: bound {self.bound_images_per_s:.1f} images/s "
            f"({SpeedBound(self.teacher_images_per_s, self.student_images_per_s).parts}); "
            f"one loader worker {self.loader_images_per_s:.1f} images/s",
            f"with the loader, and one process, the run takes {self.hours:.2f} hours",
        ]
        if self.gpu_batch is not None:
            fits = f"a micro-batch of about {self.gpu_batch}" if self.gpu_batch else "no batch at all"
            found.append(f"a GPU of {self.gpu_memory_gb:g} GB takes {fits} (estimated)")
        return found


def dry_run(
    recipe: Recipe,
    *,
    students: Sequence[str],
    source: ImageSource,
    teacher: Teacher | None = None,
    stored: StoredTeacher | None = None,
    init: Initial | None = None,
    device: torch.device | None = None,
    workers: int = 1,
    gpu_memory: float | None = None,
) -> RunCost:
    """Count and measure; nothing is written.

    Args:
        recipe: of the run.
        students: timm names.
        source: the images; a few are read.
        teacher: with any weights; None for a base method or stored targets.
        stored: targets in the teacher's place.
        init: weights that the students start from.
        device: where to measure; the CPU by default.
        workers: loader processes of the run.
        gpu_memory: of a GPU, in GB, to find the batch for.

    Raises:
        InputError: settings that do not fit.
    """
    fitted = 0  # images that the teacher's prototypes are fitted to first
    if teacher is not None and isinstance(teacher.head, PrototypeHead) and teacher.head.mean is not None:
        require_images(source, teacher.num_prototypes)
        fitted = images_to_fit(len(source), prototypes=teacher.num_prototypes, width=teacher.width)
    place = Processes(0, 1, device or torch.device("cpu"))
    per_epoch = steps_per_epoch(len(source), recipe.batch_size)
    steps = per_epoch * recipe.epochs
    networks = build_networks(
        recipe,
        students,
        teacher=teacher,
        stored=stored,
        processes=place,
        steps=steps,
        steps_per_epoch=per_epoch,
        init=init,
    )
    micro = min(recipe.batch_size // recipe.accumulate, _MEASURED_IMAGES, len(source))
    dataset = CropDataset(source, recipe, mask_grid=networks.mask_grid, corrupt_budget=1.0)
    started = time.perf_counter()
    order = epoch_order(len(source), seed=recipe.seed, epoch=0)  # stored targets lack what the last batch leaves out
    batch = collate([dataset[0, int(index)] for index in order[: max(2, micro)]])
    loader_speed = len(batch.index) / (time.perf_counter() - started)
    views = batch.views(place.device)

    def targets_of(views: Views) -> list[Targets | None]:
        shared = networks.branch.targets(views) if networks.branch is not None else None
        return [shared or learner.own_targets(views) for learner in networks.learners]

    bound = measure_bound(networks.learners, views, targets_of, recipe=recipe)
    targets = targets_of(views)
    costs, kept = [], 0
    for learner, target in zip(networks.learners, targets, strict=True):
        cost, bytes_kept = _learner_cost(learner, views, target)
        costs.append(cost)
        kept = max(kept, bytes_kept)  # one student's at a time
    images = views.globals.shape[1]
    image_bytes = (kept + _bytes(views) + sum(_bytes(target) for target in targets if target is not None)) // images
    fixed = sum(_fixed_bytes(learner) for learner in networks.learners) + _weight_bytes(teacher)
    loaders = loader_speed * max(1, workers)
    # On a CPU the loader takes its time from the cores that compute.
    alone = place.device.type == "cpu"
    rate = 1 / (1 / bound.images_per_s + 1 / loaders) if alone else min(bound.images_per_s, loaders)
    fitting = fitted / bound.teacher if bound.teacher else 0.0
    return RunCost(
        images=len(source),
        epochs=recipe.epochs,
        steps=steps,
        batch_size=recipe.batch_size // recipe.accumulate,
        device=str(place.device),
        teacher=None if teacher is None else _teacher_cost(teacher, views, recipe),
        students=tuple(costs),
        fixed_bytes=fixed,
        image_bytes=image_bytes,
        teacher_images_per_s=bound.teacher,
        student_images_per_s=bound.student,
        bound_images_per_s=bound.images_per_s,
        loader_images_per_s=loader_speed,
        hours=(steps * recipe.batch_size / rate + fitting) / 3600,
        gpu_memory_gb=gpu_memory,
        gpu_batch=None if gpu_memory is None else _largest_batch(gpu_memory, fixed=fixed, image=image_bytes),
    )


def _largest_batch(gigabytes: float, *, fixed: int, image: int) -> int:
    """Images that fit; 0 when the networks alone do not."""
    free = gigabytes * 1e9 * _USABLE - _CUDA_BYTES - fixed
    return max(0, int(free / max(1, image)))


def _learner_cost(learner: Learner, views: Views, targets: Targets | None) -> tuple[NetworkCost, int]:
    """A student's cost, and the bytes that the backward of this micro-batch keeps."""
    parameters = {parameter.data_ptr() for parameter in learner.net.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _flop_counter() as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        learner.learn(views, targets, draw=0)
    learner.optimizer.zero_grad(set_to_none=True)
    flops = counter.get_total_flops() / views.globals.shape[1]
    return NetworkCost(name=learner.name, params=_count(learner.net.trunk), flops_per_image=flops), sum(kept.values())


def _flop_counter() -> FlopCounterMode:
    """With the CPU's fused attention too, which torch does not count."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]

    ops = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops._scaled_dot_product_flash_attention_for_cpu: attention,
            ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def _teacher_cost(teacher: Teacher, views: Views, recipe: Recipe) -> NetworkCost:
    pixels = views.globals[: recipe.teacher_crops, :1].flatten(0, 1)
    with _flop_counter() as counter, autocast(recipe, pixels.device):
        teacher(pixels)
    return NetworkCost(
        name=teacher.name, params=_count(teacher.trunk), flops_per_image=float(counter.get_total_flops())
    )


def _fixed_bytes(learner: Learner) -> int:
    """Weights, gradients and the optimiser's state (two tensors a parameter of Adam's, one of SGD's) in float32."""
    trained = sum(p.numel() for p in learner.net.parameters() if p.requires_grad)
    states = 2 if learner.recipe.optimizer == "adamw" else 1
    networks = {learner.net, learner.average, learner.network}  # the last may be the first: SwAV's one network
    return sum(map(_weight_bytes, networks)) + 4 * trained * (1 + states)


def _weight_bytes(net: nn.Module | None) -> int:
    if net is None:
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers()))


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _bytes(values: Views | Targets) -> int:
    return sum(value.nbytes for value in vars(values).values() if isinstance(value, Tensor))
