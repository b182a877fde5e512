"""Distillation, from settings to students. Read ``distill`` and ``train`` downward: that is the order of events.

    settings -> recipe -> teacher -> [ crops -> targets -> students -> update -> log -> checkpoint ]

A step is a function of (state, seed, step): the crops, their order and torch's random numbers are all derived from the
step's number, so a resumed run equals the uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from robx.distill.batches.loader import Batch, CropDataset, PlaceSampler, collate
from robx.distill.batches.mixup import mix
from robx.distill.batches.views import Targets, Views
from robx.distill.objectives.base import Stats
from robx.distill.recipes import Recipe
from robx.distill.resolve import DistillSettings, mixed_kinds, odd_precision, resolve_recipe, unused_options
from robx.distill.students.student import build_student
from robx.distill.targets.stored_writer import WritingBranch
from robx.distill.teachers.choose import choose_teacher
from robx.distill.teachers.load import build_teacher_skeleton, load_teacher
from robx.distill.teachers.teacher import Teacher
from robx.distill.training import run_checkpoint
from robx.distill.training.compute import compute_of, cuda_settings
from robx.distill.training.dry_run import RunCost, dry_run, learner_bytes
from robx.distill.training.feed import batches, check_resources
from robx.distill.training.initial import starting_line
from robx.distill.training.knn_probe import Probe
from robx.distill.training.learner import autocast
from robx.distill.training.log import log_step, monitor, note, open_probe, probe_references, probe_students, speed_bound
from robx.distill.training.processes import Processes, join_processes
from robx.distill.training.readings import Readings, StepTensors, reads_late
from robx.distill.training.run import (
    Options,
    Run,
    RunSpec,
    Say,
    check_outputs,
    check_spec,
    open_run,
    require_out,
    require_same_images,
)
from robx.distill.training.run_state import count_skipped, publish_teachers, resume_run, save_run
from robx.distill.training.signals import StopRequest, stop_on_signals
from robx.distill.training.speed import MEASURE_SECONDS, Rate, SpeedBound, TimedFeed, measure_bound
from robx.errors import InputError, Interrupted, counted
from robx.images.sources import ImageSource, open_source
from robx.progress import Fact, Progress, silent
from robx.store.locks import lock_folder

_ABOVE_BOUND = 1.1  # a run this many times faster than its bound shows that the bound is wrong
_BOUND_TRIES = 2  # further measurements of it


def distill(settings: DistillSettings, *, progress: Progress | None = None, say: Say | None = None) -> list[Path]:
    """Load the teacher and train the students; returns their folders, each a Student.

    Args:
        settings: the options of ``robx distill``.
        progress: called with (done, total, note) for the download, the fitting of prototypes, and after each step.
        say: called with each line of news or warning.

    Raises:
        RobxError: as ``train``, and for a teacher that cannot be loaded.
    """
    source = open_source(settings.data, image_member=settings.image_member)
    recipe = resolve_recipe(settings)
    with join_processes(settings.options.device) as processes:
        progress = progress if progress and processes.first else silent
        say = say if say and processes.first else _silent
        for warning in _warnings(settings, recipe):
            say(warning)
        if processes.device.type == "cuda":
            say(Fact(compute_of(recipe, processes.device, workers=settings.options.workers).line))
        spec, teacher = _spec(settings, recipe, source, None), None
        if settings.teacher is not None and not settings.base:
            # Everything that can be refused is refused before the teacher is downloaded.
            choose_teacher(settings.teacher, weights=settings.teacher_weights, objective=_objective(recipe))
            require_out(spec)
            if processes.first:
                check_outputs(spec)
            check_spec(spec)
            _require_maps(settings, recipe)
            require_same_images(source, processes)  # all processes fit the teacher's prototypes together
            teacher = load_teacher(
                settings.teacher,
                weights=settings.teacher_weights,
                cache=settings.cache,
                source=source,
                prototypes=_prototypes(recipe),
                fit_images=recipe.fit_images,
                objective=_objective(recipe),
                mean=recipe.teacher_mean,
                std=recipe.teacher_std,
                image_size=recipe.teacher_shape,
                seed=recipe.seed,
                team=processes,
                device=processes.device,
                progress=progress,
            )
            info = teacher.info
            say(Fact(f"teacher {teacher.name}, licence {info.licence}, prototypes {info.prototypes}"))
        return train(replace(spec, teacher=teacher), progress=progress, say=say, processes=processes)


def estimate(
    settings: DistillSettings, *, gpu_memory: float | None = None, say: Say | None = None
) -> tuple[Recipe, RunCost]:
    """Check the settings and estimate what the run will cost, with random weights; nothing is written or downloaded.

    Args:
        settings: as of ``distill``; ``out`` may be missing.
        gpu_memory: GB of a GPU to estimate the largest batch for.
        say: called with each warning.

    Raises:
        RobxError: what the run would be refused for.
    """
    source = open_source(settings.data, image_member=settings.image_member)
    recipe = resolve_recipe(settings)
    teacher = None
    if settings.teacher is not None and not settings.base:
        weights = settings.teacher_weights
        if weights is not None and not weights.is_file():
            raise InputError(f"{weights} does not exist: give the teacher's checkpoint with --teacher-weights")
        teacher = build_teacher_skeleton(
            settings.teacher,
            weights=weights,
            objective=_objective(recipe),
            mean=recipe.teacher_mean,
            std=recipe.teacher_std,
            prototypes=_prototypes(recipe),
            image_size=recipe.teacher_shape,
        )
    for warning in _warnings(settings, recipe):
        (say or _silent)(warning)
    return recipe, dry_run(_spec(settings, recipe, source, teacher), gpu_memory=gpu_memory)


def _require_maps(settings: DistillSettings, recipe: Recipe) -> None:
    """Refuse networks without the feature maps that the recipe compares, from shapes alone."""
    if not recipe.stage_weight or settings.teacher is None:
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        teacher = build_teacher_skeleton(
            settings.teacher,
            weights=settings.teacher_weights,
            objective=_objective(recipe),
            prototypes=recipe.prototypes,
            image_size=recipe.teacher_shape,
        )
        for name in settings.students:
            build_student(name, recipe, teacher)


def _prototypes(recipe: Recipe) -> int | None:
    """How many prototypes are fitted to a teacher without a head; None if the loss has no use for them."""
    return recipe.prototypes if recipe.prototype_weight else None


def _objective(recipe: Recipe) -> str | None:
    """The objective that the teacher has to serve; None, for any teacher, if the loss has no use for its scores."""
    return recipe.objective if recipe.prototype_weight else None


def _warnings(settings: DistillSettings, recipe: Recipe) -> list[str]:
    """What is odd about settings that can be used."""
    mixed = mixed_kinds(settings, recipe)
    lines = [*([mixed] if mixed else []), *unused_options(settings, recipe), *odd_precision(settings, recipe)]
    return [f"warning: {line}" for line in lines]


def _spec(settings: DistillSettings, recipe: Recipe, source: ImageSource, teacher: Teacher | None) -> RunSpec:
    return RunSpec(
        recipe=recipe,
        students=settings.students,
        source=source,
        out=settings.out,
        teacher=teacher,
        targets=settings.targets,
        store=settings.store_targets,
        init=settings.init,
        inputs=[
            path
            for path in (settings.teacher_weights, settings.recipe, settings.init, settings.targets)
            if path is not None
        ],
        cache=settings.cache,
        options=settings.options,
    )


def train(
    spec: RunSpec, *, progress: Progress | None = None, say: Say | None = None, processes: Processes | None = None
) -> list[Path]:
    """Train students against one target branch; returns their folders. An unfinished run in the folder is resumed.

    Args:
        spec: what to train.
        progress: called with (steps done, steps in total, note) after each step.
        say: called with each line of news or warning.
        processes: joined already by the caller; None joins what torchrun started.

    Raises:
        Interrupted: a signal stopped the run; its state is saved, and the same call resumes it.
        InputError: settings that do not fit, too many corrupt images, or a folder in use.
        NotFinite: NaN or infinity in a loss or gradient.
    """
    out = require_out(spec)
    with contextlib.ExitStack() as stack:
        processes = processes or stack.enter_context(join_processes(spec.options.device))
        if processes.first:
            check_outputs(spec)  # before anything is written, even a lock
            stack.enter_context(lock_folder(out))
            run_checkpoint.clean(out)
            if spec.store is not None:
                run_checkpoint.clean(spec.store)
        processes.wait()
        stop = stack.enter_context(stop_on_signals())
        speak = say if say is not None and processes.first else _silent
        compute = compute_of(spec.recipe, processes.device, workers=spec.options.workers)
        stack.enter_context(cuda_settings(compute))
        run = open_run(spec, compute, processes=processes, say=speak)
        stack.callback(run.close)
        stack.enter_context(run.writer)
        processes.wait()
        start = resume_run(run)
        if processes.first and start < run.steps:
            run_checkpoint.require_space_for(out, learner_bytes(run.learners)[1])
        if spec.source.note:
            speak(spec.source.note)
        for learner in run.learners if start == 0 else ():
            speak(starting_line(learner.name, run.initial.get(learner.name)))
        if start < run.steps:
            _loop(run, start, stop=stop, progress=progress if progress and processes.first else silent)
            run.writer.wait()
        else:
            epochs = counted(spec.recipe.epochs, "epoch")
            speak(f"{out} already holds the complete run ({epochs}): give --fresh to start over")
        processes.wait()
        return run.folders


def _loop(run: Run, start: int, *, stop: StopRequest, progress: Progress) -> None:
    prefetch = check_resources(run)
    probe = open_probe(run) if run.processes.first else None
    if probe is not None and start == 0:
        probe_references(run, probe)
    if run.options.measure:
        run.bound = _measure(run, start)
    with contextlib.closing(batches(run, start, prefetch=prefetch, stop=stop)) as feed:
        _steps(run, start, TimedFeed(feed), probe=probe, stop=stop, progress=progress)


def _steps(
    run: Run, start: int, feed: TimedFeed[Batch | None], *, probe: Probe | None, stop: StopRequest, progress: Progress
) -> None:
    recipe, processes, options = run.recipe, run.processes, run.options
    readings = Readings(late=reads_late(processes.device), key=run.source.key, scaled=recipe.precision == "fp16")
    rate, saved, loss = Rate(), time.monotonic(), None
    for step in range(start, run.steps):
        done = step + 1
        logs = done % options.log_every == 0 or done == run.steps
        looks = done % options.monitor_every == 0 or done == run.steps
        probes = options.probe_every > 0 and done % (options.probe_every * run.per_epoch) == 0

        # Crops, their targets, and the students' gradients.
        give_up = functools.partial(_stop_waiting, run, step, start, readings, stop=stop)
        tensors, pixels = _gradients(run, step, feed, logs=logs, observe=logs or looks, give_up=give_up)

        # The update, once targets, loss and gradients are known to be finite: this step's, or the last one's on a GPU.
        read = readings.put(tensors)
        for learner in run.learners:
            learner.update(step=step, steps=run.steps)
        if run.branch is not None:
            run.branch.update(step, run.learners[0].net)

        # Logging.
        rate.tick(waited=feed.waited)
        speed = rate.steps_per_s() * recipe.batch_size
        if looks or probes:
            read += readings.settle()
        for values in read:
            log_step(run, values, speed=speed)
            loss = values.losses[0]
        if processes.first and looks:
            monitor(run, read[-1], pixels)
        progress(done, run.steps, note(run, loss, rate))
        if logs:
            rate.pause(_measure_again(run, done, speed))

        # A kNN evaluation, a checkpoint, and the end of the run if a signal asked for it.
        began = time.monotonic()
        probed = probe is not None and probes and probe_students(run, probe, done)
        due = probed or done == run.steps or _is_due(options, done, seconds=began - saved)
        asked, due = processes.any(stop.signal is not None, due)
        if asked or due:
            for values in readings.settle():
                log_step(run, values, speed=speed)
            _save(run, done)
            saved = time.monotonic()
        rate.pause(time.monotonic() - began)
        run.writer.check()
        if asked and done < run.steps:
            _end(run, done, stop)


def _is_due(options: Options, done: int, *, seconds: float) -> bool:
    """Whether a checkpoint is due after this many steps, `seconds` after the last one."""
    every = options.checkpoint_steps
    return seconds > 60 * options.checkpoint_minutes or (every > 0 and done % every == 0)


def _end(run: Run, done: int, stop: StopRequest) -> NoReturn:
    """End a run that a signal stopped, once its checkpoint is on disk."""
    run.writer.wait()
    name = stop.signal.name if stop.signal is not None else "another process's signal"
    raise Interrupted(
        f"{name} after step {done} of {run.steps}; its state is saved: run the same command to resume {run.out}"
    )


def _gradients(
    run: Run, step: int, feed: Iterator[Batch | None], *, logs: bool, observe: bool, give_up: Callable[..., NoReturn]
) -> tuple[StepTensors, Tensor]:
    """Forward and backward of one step: its values, and the first global crops (B, 3, Gh, Gw) of its last micro-batch.

    `observe` computes the losses' statistics; `give_up` is called if a signal asked for the end while no batch arrived.
    """
    recipe, device = run.recipe, run.processes.device
    losses = [torch.zeros((), device=device) for _ in run.learners]
    stats: list[Stats] = [{} for _ in run.learners]
    finite = torch.ones((), dtype=torch.bool, device=device)
    index: list[Tensor] = []
    for micro in range(recipe.accumulate):
        batch = next(feed)
        if batch is None:
            give_up(exact=micro == 0)
        _count_skipped(run, batch.skipped)
        index.append(batch.index)
        draw, last = step * recipe.accumulate + micro, micro == recipe.accumulate - 1
        views = batch.views(device)
        if recipe.mixup:
            views = mix(views, alpha=recipe.mixup, seed=recipe.seed, draw=draw, rank=run.processes.rank)
        targets_of_all = _targets(run, views)
        if run.branch is not None and (shared := targets_of_all[0]):  # a base method's follow the student
            finite &= shared.probs.sum().isfinite() | ~views.globals.sum().isfinite()  # NaN pixels are not its fault
        for i, (learner, targets) in enumerate(zip(run.learners, targets_of_all, strict=True)):
            loss, stats[i] = learner.learn(views, targets, draw=draw, last=last, observe=last and observe)
            losses[i] += loss / recipe.accumulate
    norms = [learner.gradient_norm(epoch=step // run.per_epoch) for learner in run.learners]
    tensors = StepTensors(
        step=step, index=index, targets_finite=finite, losses=losses, norms=norms, stats=stats, logs=logs
    )
    return tensors, views.globals[0]


def _save(run: Run, done: int) -> None:
    """Save the state after `done` steps, in the background.

    The checkpoint comes last: what it counts as done is on disk by then.
    """
    if isinstance(run.branch, WritingBranch):
        run.branch.settle(epoch_done=done % run.per_epoch == 0)
    if done == run.steps:
        publish_teachers(run)
    save_run(run, done)


def _stop_waiting(run: Run, step: int, start: int, readings: Readings, *, exact: bool, stop: StopRequest) -> NoReturn:
    """End the run between two batches: the loader does not deliver, and a signal asked for the end.

    `exact`: no micro-batch of this step was computed, so the state is that after `step` steps.
    """
    name = stop.signal.name if stop.signal is not None else "a signal"
    saved = "the run resumes from its last checkpoint"
    if exact and step > start and run.processes.world == 1:
        for values in readings.settle():
            log_step(run, values, speed=0.0)
        _save(run, step)
        run.writer.wait()
        saved = "its state is saved"
    raise Interrupted(
        f"{name} after step {step} of {run.steps}, while no image arrived; {saved}: run the same command to resume"
    )


def _targets(run: Run, views: Views) -> Sequence[Targets | None]:
    """One Targets per learner, None where it makes its own; a shared branch is evaluated once."""
    with autocast(run.recipe, views.globals.device):
        if run.branch is None:
            return [learner.own_targets(views) for learner in run.learners]
        return list[Targets | None]([run.branch.targets(views)]) * len(run.learners)


def _count_skipped(run: Run, found: dict[int, str]) -> None:
    for reason in count_skipped(run, found):
        run.say(f"skipped {reason}")


def _measure(run: Run, start: int) -> SpeedBound:
    """The speed of the computation alone on the first images; the state of the run is unchanged."""
    places = next(
        iter(PlaceSampler(len(run.source), run.recipe, share=run.processes.share, start=start, end=run.steps))
    )
    dataset = CropDataset(run.source, run.recipe, mask_grid=run.mask_grid, corrupt_budget=run.options.corrupt_budget)
    began, samples = time.perf_counter(), list[Any]()
    while len(samples) < len(places) and (len(samples) < 2 or time.perf_counter() - began < MEASURE_SECONDS / 2):
        samples.append(dataset[places[len(samples)]])
    loader = len(samples) / (time.perf_counter() - began)
    batch = collate(samples)
    _count_skipped(run, batch.skipped)
    branches = [b for b in (run.branch, *(learner.branch for learner in run.learners)) if b is not None]
    before = [copy.deepcopy(branch.state_dict()) for branch in branches]
    measured = measure_bound(
        run.learners,
        batch.views(run.processes.device),
        lambda views: _targets(run, views),
        recipe=run.recipe,
        any_process=lambda answer: run.processes.any(answer)[0],
    )
    for branch, state in zip(branches, before, strict=True):
        branch.load_state_dict(state)
    run.bound, run.bound_tries = measured.bound, run.bound_tries + 1
    processes = counted(run.processes.world, "process", "processes")
    run.say(
        Fact(
            f"speed bound {speed_bound(run):.1f} images/s on {processes}, measured on "
            f"{counted(measured.views.globals.shape[1], 'image')}; per process {run.bound.parts}, "
            f"one loader worker {loader:.1f}"
        )
    )
    return run.bound


def _measure_again(run: Run, done: int, speed: float) -> float:
    """Measure the bound again if the run is faster, as it was measured while the machine was busy; returns seconds."""
    if run.bound is None or run.bound_tries > _BOUND_TRIES or done == run.steps:
        return 0.0
    began = time.monotonic()
    if run.processes.any(speed > _ABOVE_BOUND * speed_bound(run))[0]:
        share = f"{speed:.1f} images/s is {speed / speed_bound(run):.0%} of the speed bound"
        run.say(Fact(f"{share}, which was measured while the machine was busy: measuring it again"))
        _measure(run, done)
    return time.monotonic() - began


def _silent(_: str) -> None:
    return None
