"""Feeding the training loop: shared memory and open files checked first, dead workers replaced, signals answered.

Workers hand batches over in shared memory. One that gets none exits, and the run ends with one line.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Generator, Iterator
from typing import Any

from torch.utils.data import DataLoader

from robx.distill.batches.crops import plan_image
from robx.distill.batches.loader import BATCH_LOST, Batch, build_loader, decoded_side, micro_batch
from robx.distill.training.run import Run
from robx.distill.training.signals import StopRequest
from robx.errors import CorruptImage, InputError, counted, first_line

PREFETCH = 4  # batches per worker
_POLL_SECONDS = 1.0
# After a signal, how long to wait for a batch that is due; several processes should end the step together.
_GRACE_SECONDS, _GRACE_SECONDS_TOGETHER = 5.0, 20.0
_SAMPLED = 4  # images whose size is looked at
_FILES, _FILES_PER_WORKER = 80, 40  # open files of the run, and of each worker: pipes, and a descriptor per tensor
_REMEDY = "give --workers 0, fewer --workers, a smaller --batch-size or --accumulate N"


def batches(run: Run, start: int, *, prefetch: int, stop: StopRequest) -> Generator[Batch | None, None, None]:
    """Micro-batches from step `start` on; None if a signal asked for the end while no batch arrived.

    `prefetch` is in batches per worker, as ``check_resources`` allows. If a worker is killed, the loader is restarted
    once from where it stopped.

    Raises:
        InputError: workers that keep dying, or lack shared memory or open files.
    """
    accumulate, given, lives = run.recipe.accumulate, 0, 2
    while True:
        loader = _loader(run, start + given // accumulate, prefetch=prefetch)
        before = multiprocessing.active_children()
        iterator, mine = None, list[Any]()
        try:
            iterator = iter(loader)
            mine = [child for child in multiprocessing.active_children() if child not in before]
            with contextlib.suppress(ValueError):
                # A dead worker is noticed here, when a batch is due, and not by an exception in the middle of a step.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            skip = given % accumulate
            for batch in _patiently(iterator, run, stop):
                if skip:
                    skip -= 1
                    continue
                given += batch is not None
                yield batch
            return
        except (RuntimeError, OSError, EOFError) as error:
            _refuse_shortage(error, mine)
            if not _is_death(error, workers=run.options.workers):
                raise
            cause, lives = first_line(error), lives - 1
            if not lives:
                raise InputError(
                    f"loader workers keep dying ({cause}): give fewer --workers, or more memory"
                ) from error
            run.say(f"a loader worker died ({cause}); restarting the loader")
        finally:
            # Now, and not when a traceback releases the iterator: the interpreter would end its workers with SIGTERM,
            # which they ignore, and wait for them forever.
            del iterator
            for worker in mine:
                worker.kill()


def _loader(run: Run, start: int, *, prefetch: int) -> DataLoader[Any]:
    """The loader of this process's micro-batches from step `start` to the end of the run."""
    return build_loader(
        run.source,
        run.recipe,
        start=start,
        end=run.steps,
        share=run.processes.share,
        workers=run.options.workers,
        mask_grid=run.mask_grid,
        corrupt_budget=run.options.corrupt_budget,
        pin_memory=run.processes.device.type == "cuda",
        prefetch=prefetch,
        timeout=_POLL_SECONDS,
    )


def _patiently(iterator: Iterator[Batch], run: Run, stop: StopRequest) -> Iterator[Batch | None]:
    """The iterator's batches; None while a batch is overdue after a signal."""
    grace = _GRACE_SECONDS if run.processes.world == 1 else _GRACE_SECONDS_TOGETHER
    asked_at: float | None = None
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            if stop.signal is None:
                continue
            asked_at = asked_at or time.monotonic()
            if time.monotonic() - asked_at > grace:
                yield None
            continue
        asked_at = None
        yield batch


def check_resources(run: Run) -> int:
    """Batches that each worker may prefetch within the free shared memory; reduced batches are reported.

    Raises:
        InputError: shared memory does not hold one batch per worker, or too few files may be open.
    """
    workers = run.options.workers
    if not workers:
        return PREFETCH
    raise_file_limit(workers)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this machine share its memory
    free = free_shared_memory()
    if free is None:
        return PREFETCH
    size = batch_bytes(run) * here
    fitting = max((free // size - 1) // workers, 0)  # besides the batch that is being used
    if fitting < 1:
        raise InputError(
            f"{workers} loader workers need {(workers + 1) * size / 1e6:.0f} MB of shared memory, but /dev/shm has "
            f"{free / 1e6:.0f} MB free: enlarge it (docker run --shm-size), or {_REMEDY}"
        )
    if fitting < PREFETCH:
        batches_of = f"{counted(fitting, 'batch', 'batches')} of"
        run.say(
            f"/dev/shm has only {free / 1e6:.0f} MB free: each worker prefetches {batches_of} "
            f"{size / 1e6:.0f} MB instead of {PREFETCH} (docker run --shm-size enlarges it)"
        )
    return min(fitting, PREFETCH)


def free_shared_memory() -> int | None:
    """Free bytes of /dev/shm; None where there is none."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def batch_bytes(run: Run) -> int:
    """Bytes of shared memory that one process's micro-batch takes."""
    recipe = run.recipe
    images = micro_batch(recipe, processes=run.processes.world)
    if recipe.augment == "device":  # decoded images, of whatever size they have
        return images * (_decoded_bytes(run) + 8)
    large, small = (3 * height * width for height, width in (recipe.crop_shape, recipe.local_crop_shape))
    crops = recipe.global_crops * large + recipe.local_crops * small
    patches = 0 if run.mask_grid is None else recipe.global_crops * run.mask_grid[0] * run.mask_grid[1]
    return images * (crops + patches + 8)


def _decoded_bytes(run: Run) -> int:
    """The largest of a few images as `plan_image` leaves it."""
    sizes = [1]
    for index in range(0, len(run.source), max(1, len(run.source) // _SAMPLED)):
        with contextlib.suppress(CorruptImage):
            pixels = run.source.read_pixels(index, at_least=decoded_side(run.recipe))
            sizes.append(plan_image(pixels, run.recipe, epoch=0, index=index).pixels.nbytes)
    return max(sizes)


def raise_file_limit(workers: int) -> None:
    """Raise the soft limit on open files to what the workers need.

    Raises:
        InputError: the hard limit does not allow it.
    """
    needed = _FILES + _FILES_PER_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"{workers} loader workers need up to {needed} open files, but the limit is {hard}: raise it (ulimit -n), "
            "or give --workers 0"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _refuse_shortage(error: Exception, workers: list[Any]) -> None:
    """Raise InputError if workers died for lack of shared memory or open files."""
    if "Too many open files" in str(error):
        raise InputError(f"loader workers need more open files: raise the limit (ulimit -n), or {_REMEDY}") from error
    for worker in workers:
        worker.join(timeout=0.1)
    if any(worker.exitcode in (BATCH_LOST, -signal.SIGBUS) for worker in workers):
        raise InputError(
            "a loader worker could not hand over its batch, /dev/shm is full or too many files are open: enlarge them "
            f"(docker run --shm-size, ulimit -n), or {_REMEDY}"
        ) from error


def _is_death(error: Exception, *, workers: int) -> bool:
    """Whether a worker died: reported as such or, if it dies while handing over a batch, as a broken pipe.

    An exception that a worker raised itself arrives with its traceback, "Caught ...".
    """
    text = str(error)
    if not workers or text.startswith("Caught "):
        return False
    return not isinstance(error, RuntimeError) or "DataLoader worker" in text
