"""What a run will cost, estimated before it starts with networks of random weights.

Counted: parameters, floating-point operations per image (forward, and backward of the students), and bytes kept for
the backward pass. Measured briefly on this machine: the speed bound of a step, and the crops per second of one worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from robx.distill.batches.loader import CropDataset, collate, epoch_order, steps_per_epoch
from robx.distill.batches.views import Targets, Views
from robx.distill.recipes import Recipe
from robx.distill.targets.build import open_targets
from robx.distill.teachers.frozen_heads import PrototypeHead
from robx.distill.teachers.prototypes import images_to_fit, require_images
from robx.distill.teachers.teacher import Teacher
from robx.distill.training.compute import compute_of, cuda_settings
from robx.distill.training.feed import raise_file_limit
from robx.distill.training.learner import Learner
from robx.distill.training.networks import Networks, build_networks
from robx.distill.training.processes import Processes, pick_device
from robx.distill.training.run import RunSpec, check_outputs, check_spec
from robx.distill.training.speed import SpeedBound, measure_bound
from robx.errors import counted, duration

# CUDA context, workspaces of cuDNN and cuBLAS, and allocator fragmentation: an estimate.
_CUDA_BYTES = 1.2e9
_USABLE = 0.92
_MEASURED_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """One network."""

    name: str
    params: int
    flops_per_image: float  # over all crops of an image; forward and backward for a student


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """The whole run."""

    images: int
    epochs: int
    steps: int
    batch_size: int
    device: str  # on which the speeds were measured
    teacher: NetworkCost | None
    students: tuple[NetworkCost, ...]
    fixed_bytes: int  # weights, gradients and optimiser state, at any batch size
    image_bytes: int  # per image: its crops, activations kept for backward, and targets
    checkpoint_bytes: int  # on disk, and in host memory while it is written
    teacher_images_per_s: float | None  # None: the student's own scores are the targets
    student_images_per_s: float
    bound_images_per_s: float
    loader_images_per_s: float  # of one worker
    measured_images: int  # at a time, and scaled to the run
    hours: float  # of one process at these speeds, fitting of prototypes included
    gpu_memory_gb: float | None = None
    gpu_batch: int | None = None  # estimated largest micro-batch that fits into that memory

    @property
    def batch_bytes(self) -> int:
        """Total memory of a micro-batch of the recipe's size."""
        return self.fixed_bytes + self.image_bytes * self.batch_size

    def lines(self, batch_size: int) -> list[str]:
        """The estimate in sentences, without the networks; `batch_size` is the recipe's, over all micro-batches."""
        per_image = f"{self.image_bytes / 1e6:.1f} MB per image"
        found = [
            f"{counted(self.images, 'image')} x {counted(self.epochs, 'epoch')}, batch {batch_size}: "
            f"{counted(self.steps, 'step')}",
            f"memory: {self.fixed_bytes / 1e9:.2f} GB fixed + {per_image} = {self.batch_bytes / 1e9:.2f} GB "
            f"at a micro-batch of {self.batch_size}",
            f"checkpoints: {self.checkpoint_bytes / 1e9:.2f} GB on disk, and as much host memory while one is written",
            f"measured on {self.device}: speed bound {self.bound_images_per_s:.1f} images/s "
            f"({SpeedBound(self.teacher_images_per_s, self.student_images_per_s).parts}); "
            f"one loader worker {self.loader_images_per_s:.1f} images/s; measured on "
            f"{counted(self.measured_images, 'image')}",
            f"estimated run time on one process, including data loading: {duration(3600 * self.hours)}",
        ]
        if self.gpu_batch is not None:
            fits = f"a micro-batch of about {self.gpu_batch}" if self.gpu_batch else "not even a micro-batch of 1"
            found.append(f"estimated to fit on a GPU with {self.gpu_memory_gb:g} GB: {fits}")
        return found


def dry_run(spec: RunSpec, *, gpu_memory: float | None = None) -> RunCost:
    """Count and measure; nothing is written.

    Args:
        spec: the run; its teacher may have random weights, and a few of its images are read.
        gpu_memory: GB of a GPU to estimate the largest micro-batch for.

    Raises:
        InputError: settings that do not fit.
    """
    recipe, source, options = spec.recipe, spec.source, spec.options
    place = Processes(0, 1, pick_device(options.device))
    check_outputs(spec)
    if options.workers:
        raise_file_limit(options.workers)
    fitted = _images_to_fit(spec)
    per_epoch = steps_per_epoch(len(source), recipe.batch_size)
    steps = per_epoch * recipe.epochs
    networks = build_networks(
        recipe,
        spec.students,
        teacher=spec.teacher,
        stored=None if spec.targets is None else open_targets(spec.targets, recipe, source),
        processes=place,
        steps=steps,
        steps_per_epoch=per_epoch,
        init=check_spec(spec),
    )
    first, loader_speed = _first_views(spec, networks, place.device)

    def targets_of(views: Views) -> list[Targets | None]:
        shared = networks.branch.targets(views) if networks.branch is not None else None
        return [shared or learner.own_targets(views) for learner in networks.learners]

    with cuda_settings(compute_of(recipe, place.device, workers=options.workers)):
        measured = measure_bound(networks.learners, first, targets_of, recipe=recipe)
    bound, views, targets = measured.bound, measured.views, measured.targets
    costs, image_bytes = _students_cost(networks.learners, views, targets)
    trained, checkpoint = learner_bytes(networks.learners)
    fixed = trained + _weight_bytes(spec.teacher)
    rate = _images_per_s(bound, loader_speed * max(1, options.workers), place.device)
    fitting = fitted / bound.teacher if bound.teacher else 0.0
    return RunCost(
        images=len(source),
        epochs=recipe.epochs,
        steps=steps,
        batch_size=recipe.batch_size // recipe.accumulate,
        device=str(place.device),
        teacher=None if spec.teacher is None else _teacher_cost(spec.teacher, views, recipe),
        students=costs,
        fixed_bytes=fixed,
        image_bytes=image_bytes,
        checkpoint_bytes=checkpoint,
        teacher_images_per_s=bound.teacher,
        student_images_per_s=bound.student,
        bound_images_per_s=bound.images_per_s,
        loader_images_per_s=loader_speed,
        measured_images=views.globals.shape[1],
        hours=(steps * recipe.batch_size / rate + fitting) / 3600,
        gpu_memory_gb=gpu_memory,
        gpu_batch=None if gpu_memory is None else _largest_batch(gpu_memory, fixed=fixed, image=image_bytes),
    )


def _images_per_s(bound: SpeedBound, loaders: float, device: torch.device) -> float:
    """Images per second of one process whose workers load `loaders` per second.

    On a CPU, data loading takes time from the cores that compute.
    """
    if device.type == "cpu":
        return 1 / (1 / bound.images_per_s + 1 / loaders)
    return min(bound.images_per_s, loaders)


def _images_to_fit(spec: RunSpec) -> int:
    """Images that the teacher's prototypes are fitted to before the first step; 0 if they are not fitted."""
    teacher = spec.teacher
    if teacher is None or not isinstance(teacher.head, PrototypeHead) or teacher.head.mean is None:
        return 0
    require_images(spec.source, teacher.num_prototypes)
    return images_to_fit(
        len(spec.source), prototypes=teacher.num_prototypes, width=teacher.width, most=spec.recipe.fit_images
    )


def _first_views(spec: RunSpec, networks: Networks, device: torch.device) -> tuple[Views, float]:
    """Crops of a few images of the first epoch, and how many images per second one loader worker crops."""
    recipe, source = spec.recipe, spec.source
    count = min(recipe.batch_size // recipe.accumulate, _MEASURED_IMAGES, len(source))
    dataset = CropDataset(source, recipe, mask_grid=networks.mask_grid, corrupt_budget=1.0)
    started = time.perf_counter()
    order = epoch_order(len(source), seed=recipe.seed, epoch=0)  # stored targets lack the images of the last batch
    batch = collate([dataset[0, int(index)] for index in order[: max(2, count)]])
    return batch.views(device), len(batch.index) / (time.perf_counter() - started)


def _largest_batch(gigabytes: float, *, fixed: int, image: int) -> int:
    """Images that fit; 0 if the networks alone do not."""
    free = gigabytes * 1e9 * _USABLE - _CUDA_BYTES - fixed
    return max(0, int(free / max(1, image)))


def _students_cost(
    learners: Sequence[Learner], views: Views, targets: Sequence[Targets | None]
) -> tuple[tuple[NetworkCost, ...], int]:
    """The students' costs, and the bytes that an image takes: its crops, its targets, what backward needs."""
    costs, kept = [], 0
    for learner, target in zip(learners, targets, strict=True):
        cost, bytes_kept = _learner_cost(learner, views, target)
        costs.append(cost)
        kept = max(kept, bytes_kept)  # the students are trained one after another
    held = kept + _bytes(views) + sum(_bytes(target) for target in targets if target is not None)
    return tuple(costs), held // views.globals.shape[1]


def _learner_cost(learner: Learner, views: Views, targets: Targets | None) -> tuple[NetworkCost, int]:
    """A student's cost, and the bytes that autograd saves for the backward of this micro-batch."""
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
    """A FLOP counter that includes the CPU's fused attention, which torch does not count."""

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
    pixels = views.globals[0, :1]
    flops = recipe.target_crops * count_flops(partial(teacher, scores=recipe.prototype_weight > 0), pixels)
    return NetworkCost(name=teacher.name, params=_count(teacher.trunk), flops_per_image=float(flops))


@torch.no_grad()
def count_flops(net: Callable[[Tensor], Any], pixels: Tensor) -> int:
    """Floating-point operations of a forward pass, from the shapes of its tensors; computed only if it has to be."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _flop_counter() as counter:
            net(torch.zeros_like(pixels))
    except Exception:  # a network whose control flow depends on values
        with _flop_counter() as counter:
            net(pixels)
    return int(counter.get_total_flops())


def learner_bytes(learners: Sequence[Learner]) -> tuple[int, int]:
    """Bytes in memory and in a checkpoint: both hold weights and optimiser state, a checkpoint no gradients.

    The state is two float32 tensors per parameter for Adam, one for SGD.
    """
    saved, gradients = 0, 0
    for learner in learners:
        trained = sum(p.numel() for p in learner.net.parameters() if p.requires_grad)
        states = 2 if learner.recipe.optimizer == "adamw" else 1
        networks = {learner.net, learner.average, learner.network}  # the last may equal the first: SwAV has one network
        saved += sum(map(_weight_bytes, networks)) + 4 * trained * states
        gradients += 4 * trained
    return saved + gradients, saved


def _weight_bytes(net: nn.Module | None) -> int:
    if net is None:
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers()))


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _bytes(values: Views | Targets) -> int:
    return sum(value.nbytes for value in vars(values).values() if isinstance(value, Tensor))
