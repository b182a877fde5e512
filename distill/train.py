"""The loop. Read ``train`` downward: it stands in the order in which things happen.

    settings -> lock -> networks -> resume -> [ crops -> targets -> students -> update -> report -> checkpoint ]

A step is a function of (state, seed, step): the crops, their order and torch's random numbers are all set from the
step's number, so a resumed run is the unbroken one, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robx.distill.batches.loader import Batch, CropDataset, PlaceSampler, build_loader, collate
from robx.distill.batches.views import Targets, Views
from robx.distill.objectives.base import Stats
from robx.distill.recipes import Recipe
from robx.distill.targets.stored_writer import WritingBranch
from robx.distill.teachers.teacher import Teacher
from robx.distill.training import run_checkpoint
from robx.distill.training.collapse import require_finite
from robx.distill.training.knn_probe import Probe
from robx.distill.training.learner import Learner, autocast
from robx.distill.training.log import log_step, monitor, note, open_probe, probe_references, probe_students, speed_bound
from robx.distill.training.processes import Processes, join_processes
from robx.distill.training.run import Options, Run, Say, count_skipped, open_run, publish_teachers, resume_run, save_run
from robx.distill.training.signals import StopRequest, stop_on_signals
from robx.distill.training.speed import Rate, SpeedBound, measure_bound
from robx.errors import InputError, Interrupted, first_line
from robx.images.sources import ImageSource
from robx.progress import Progress, silent
from robx.store.folders import lock_folder


def train(
    recipe: Recipe,
    *,
    students: Sequence[str],
    source: ImageSource,
    out: Path,
    teacher: Teacher | None = None,
    targets: Path | None = None,
    store: Path | None = None,
    init: Path | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    processes: Processes | None = None,
) -> list[Path]:
    """Train students of one target branch; returns their folders.

    Args:
        recipe: every setting that the result depends on.
        students: timm names. One is written to `out` itself, several to `out`/NAME each.
        source: the images.
        out: the run's folder. A run that is there already is resumed.
        teacher: of RoB; None for a base method, or with `targets`.
        targets: a folder of stored targets to take in the teacher's place.
        store: where to write the targets of this run.
        init: the folder of a Student whose weights the student starts from; None starts from random ones.
        options: what the result does not depend on.
        progress: told (steps done, steps in all, a note) after each step.
        say: told of warnings and news, a line each.
        processes: joined already by the caller; None joins what torchrun started.

    Raises:
        Interrupted: a signal asked for the end; the state is saved, and the same call goes on.
        InputError: settings that do not fit, too many corrupt images, or a folder in use.
        NotFinite: NaN or infinity in a loss or gradient.
    """
    options = options or Options()
    with contextlib.ExitStack() as stack:
        processes = processes or stack.enter_context(join_processes(options.device))
        if processes.first:
            stack.enter_context(lock_folder(out))
            run_checkpoint.clean(out)
            if store is not None:
                run_checkpoint.clean(store)
        processes.wait()
        stop = stack.enter_context(stop_on_signals())
        speak = say if say is not None and processes.first else _silent
        run = open_run(recipe, students, source, out, teacher, targets, store, options, processes, speak, init)
        stack.callback(run.close)
        processes.wait()
        start = resume_run(run)
        if start < run.steps:
            _loop(run, start, stop=stop, progress=progress if progress and processes.first else silent)
        else:
            speak(f"{out} holds the whole run already ({recipe.epochs} epochs): --fresh starts over")
        processes.wait()
        return run.folders


def _loop(run: Run, start: int, *, stop: StopRequest, progress: Progress) -> None:
    probe = open_probe(run) if run.processes.first else None
    if probe is not None and start == 0:
        probe_references(run, probe)
    if run.options.measure:
        run.bound = _measure(run, start)
    with contextlib.closing(_batches(run, start)) as batches:
        _steps(run, start, batches, probe=probe, stop=stop, progress=progress)


def _steps(
    run: Run, start: int, batches: Iterator[Batch], *, probe: Probe | None, stop: StopRequest, progress: Progress
) -> None:
    recipe, processes, options = run.recipe, run.processes, run.options
    rate, saved = Rate(), time.monotonic()
    for step in range(start, run.steps):
        done = step + 1
        logs = done % options.log_every == 0 or done == run.steps
        looks = done % options.monitor_every == 0 or done == run.steps

        # Crops, what the target branch says of them, and the students' gradients.
        losses = [torch.zeros((), device=processes.device) for _ in run.learners]
        stats: list[Stats] = [{} for _ in run.learners]
        names: list[str] = []
        for micro in range(recipe.accumulate):
            batch = next(batches)
            _count_skipped(run, batch.skipped)
            views = batch.views(processes.device)
            names += [run.source.key(int(index)) for index in batch.index]
            draw, last = step * recipe.accumulate + micro, micro == recipe.accumulate - 1
            for i, (learner, targets) in enumerate(zip(run.learners, _targets(run, views), strict=True)):
                loss, stats[i] = learner.learn(views, targets, draw=draw, last=last, observe=last and (logs or looks))
                losses[i] += loss / recipe.accumulate

        # The update, once it is certain that loss and gradients are numbers.
        norms = [_update(run, learner, loss, step, names) for learner, loss in zip(run.learners, losses, strict=True)]
        if run.branch is not None:
            run.branch.update(step, run.learners[0].net)

        # What it says of itself.
        rate.tick()
        speed = rate.steps_per_s() * recipe.batch_size
        if logs:
            log_step(run, done, losses=losses, norms=norms, stats=stats, speed=speed)
        if processes.first and looks:
            monitor(run, done, views.globals[0], stats)
        progress(done, run.steps, note(run, float(losses[0]), speed))

        # A probe, a checkpoint, and the end if a signal asked for it.
        began = time.monotonic()
        probed = (
            probe is not None and done % (options.probe_every * run.per_epoch) == 0 and probe_students(run, probe, done)
        )
        due = began - saved > 60 * options.checkpoint_minutes or (
            options.checkpoint_steps > 0 and done % options.checkpoint_steps == 0
        )
        asked, due = processes.any(stop.signal is not None, due or probed or done == run.steps)
        if asked or due:
            # The checkpoint comes last: whenever the process dies, all that it counts as done is on the disk.
            if isinstance(run.branch, WritingBranch):
                run.branch.settle(epoch_done=done % run.per_epoch == 0)
            if done == run.steps:
                publish_teachers(run)
            save_run(run, done)
            saved = time.monotonic()
        rate.pause(time.monotonic() - began)
        if asked and done < run.steps:
            name = stop.signal.name if stop.signal is not None else "another process's signal"
            raise Interrupted(
                f"{name} after step {done} of {run.steps}; {run.out} goes on from there with the same command"
            )


def _batches(run: Run, start: int) -> Generator[Batch, None, None]:
    """Micro-batches from step `start` on. When a worker is killed the loader starts once more from where it was."""
    accumulate, given, lives = run.recipe.accumulate, 0, 2
    while True:
        loader = build_loader(
            run.source,
            run.recipe,
            start=start + given // accumulate,
            end=run.steps,
            share=run.processes.share,
            workers=run.options.workers,
            mask_grid=run.mask_grid,
            corrupt_budget=run.options.corrupt_budget,
            pin_memory=run.processes.device.type == "cuda",
        )
        before = multiprocessing.active_children()
        iterator, mine = None, list[Any]()
        try:
            iterator = iter(loader)
            mine = [child for child in multiprocessing.active_children() if child not in before]
            with contextlib.suppress(ValueError):
                # A dead worker is noticed here, when a batch is due, and not by an exception in the midst of a step.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for _ in range(given % accumulate):
                next(iterator)
            for batch in iterator:
                given += 1
                yield batch
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_death(error, workers=run.options.workers):
                raise
            lives -= 1
            if not lives:
                raise InputError(f"loader workers die ({error}): give fewer --workers, or more memory") from error
            cause = first_line(error)
            run.say(f"a loader worker died ({cause}); starting the loader once more")
        finally:
            # Now, and not when a traceback lets go of the iterator: the interpreter would end its workers with SIGTERM,
            # which they ignore, and wait for them for ever.
            del iterator
            for worker in mine:
                worker.kill()


def _is_death(error: Exception, *, workers: int) -> bool:
    """Whether a worker died: told as such or, when it dies while it hands a batch over, as a broken pipe.

    What a worker itself raised comes with its traceback, "Caught ...".
    """
    text = str(error)
    if not workers or text.startswith("Caught "):
        return False
    return not isinstance(error, RuntimeError) or "DataLoader worker" in text


def _targets(run: Run, views: Views) -> list[Targets | None]:
    """One Targets a learner, None where it makes its own; a shared branch is asked once."""
    with autocast(run.recipe, views.globals.device):
        if run.branch is None:
            return [learner.own_targets(views) for learner in run.learners]
        return list[Targets | None]([run.branch.targets(views)]) * len(run.learners)


def _update(run: Run, learner: Learner, loss: Tensor, step: int, images: Sequence[str]) -> Tensor:
    """One learner's optimiser step; returns its gradient's norm."""
    require_finite("loss", loss, step=step, images=images)
    norm = learner.gradient_norm(epoch=step // run.per_epoch)
    if run.recipe.precision != "fp16":  # where an infinite gradient is the loss scale's business
        require_finite("gradient", norm, step=step, images=images)
    learner.update(step=step, steps=run.steps)
    return norm


def _count_skipped(run: Run, found: dict[int, str]) -> None:
    for reason in count_skipped(run, found):
        run.say(f"skipped {reason}")


def _measure(run: Run, start: int) -> SpeedBound:
    """The speed of the bare computation on the first micro-batch; nothing of the run changes."""
    places = next(
        iter(PlaceSampler(len(run.source), run.recipe, share=run.processes.share, start=start, end=run.steps))
    )
    dataset = CropDataset(run.source, run.recipe, mask_grid=run.mask_grid, corrupt_budget=run.options.corrupt_budget)
    began = time.perf_counter()
    batch = collate([dataset[place] for place in places])
    loader = len(places) / (time.perf_counter() - began)
    _count_skipped(run, batch.skipped)
    branches = [b for b in (run.branch, *(learner.branch for learner in run.learners)) if b is not None]
    before = [copy.deepcopy(branch.state_dict()) for branch in branches]
    views = batch.views(run.processes.device)
    bound = measure_bound(run.learners, views, lambda v: _targets(run, v), recipe=run.recipe)
    for branch, state in zip(branches, before, strict=True):
        branch.load_state_dict(state)
    run.bound = bound
    run.say(
        f"bound {speed_bound(run):.1f} images/s: {bound.parts}, one loader worker {loader:.1f}, "
        f"each of {run.processes.world} process(es)"
    )
    return bound


def _silent(_: str) -> None:
    return None
