"""Saving a run's state, resuming from it, and what a base method's run leaves as a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robx import __version__
from robx.distill.targets.branches import EmaBranch, OwnBranch, TeacherBranch
from robx.distill.targets.centering import TargetProcessor
from robx.distill.targets.stored_writer import WritingBranch
from robx.distill.teachers.write_checkpoint import published_checkpoint, save_published
from robx.distill.training import run_checkpoint
from robx.distill.training.learner import Learner
from robx.distill.training.run import Run
from robx.distill.training.run_folder import Metrics, tensorboard_writer
from robx.errors import InputError, first_line, one_line
from robx.image_size import usual_preprocessing
from robx.images.sources import data_info
from robx.progress import Fact
from robx.records import Student, to_json
from robx.store.files import write_text
from robx.trunk import embedding_width, save_weights


def resume_run(run: Run) -> int:
    """Load the newest valid checkpoint; returns the number of completed steps.

    Raises:
        InputError: the state does not fit the networks, or the processes see different checkpoints.
        ArtifactError: none of the checkpoints is valid.
    """
    found = run_checkpoint.load_newest(run.out, say=run.say)
    done = 0
    if found is not None:
        done, state = found
        _restore(run, _to(state, run.processes.device))
        run.say(Fact(f"resuming {run.out} after step {done} of {run.steps}"))
    if len(found_by := set(run.processes.gather(done))) > 1:
        raise InputError(
            f"the processes see checkpoints of different steps ({sorted(found_by)}): "
            f"put {run.out} on storage shared by all nodes"
        )
    if run.processes.first:
        for folder in run.folders:
            board = tensorboard_writer(folder, step=done) if run.options.tensorboard else None
            run.metrics.append(Metrics(folder, step=done, tensorboard=board))
    return done


def _restore(run: Run, state: dict[str, Any]) -> None:
    try:
        for learner in run.learners:
            learner.load(state["learners"][learner.name])
        if run.branch is not None:
            run.branch.load_state_dict(state["branch"])
        if len(queues := state.get("queues", [])) == run.processes.world:
            for processor, queue in zip(_processors(run), queues[run.processes.rank], strict=True):
                processor.queue = queue
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the checkpoint in {run.out} does not fit these networks ({first_line(error)}): give --fresh"
        ) from error
    run.best = tuple(state["best"]) if state["best"] else None
    run.skipped.found = {int(index): reason for index, reason in state["skipped"].items()}


def save_run(run: Run, done: int) -> None:
    """Gather skipped images and queues from all processes; the first one saves the students and the checkpoint.

    The state is copied and then written in the background; ``run.writer`` waits for it, and raises what went wrong.

    Raises:
        RobxError: the save before this one failed; or too many images cannot be decoded.
    """
    for found in run.processes.gather(run.skipped.found):
        count_skipped(run, found)
    queues = run.processes.gather([None if s.queue is None else s.queue.cpu() for s in _processors(run)])
    if not run.processes.first:
        return
    run.writer.wait()  # one copy of the state at a time
    _list_corrupt(run)
    copy = run_checkpoint.snapshot(_state(run, queues))
    students = [
        (folder, copy.below(_trunk_path(learner)), _record(run, learner, done))
        for learner, folder in zip(run.learners, run.folders, strict=True)
    ]
    best = run.best[0] if run.best else None

    def write() -> None:
        for folder, weights, record in students:
            save_weights(folder, weights, record)
        # The checkpoint is last: a run killed before it repeats this, and one killed after it has everything on disk.
        run_checkpoint.save_checkpoint(run.out, copy, step=done, keep=run.options.keep, best=best)

    run.writer.start(write)


def _state(run: Run, queues: list[Any]) -> dict[str, Any]:
    """Everything that a resumed run needs."""
    return {
        "learners": {learner.name: learner.state() for learner in run.learners},
        "branch": None if run.branch is None else run.branch.state_dict(),
        "best": run.best,
        "skipped": {str(index): reason for index, reason in run.skipped.found.items()},
        "queues": queues,  # of every process; everything else is the same in all of them
    }


def _trunk_path(learner: Learner) -> str:
    """Where the state holds the weights of ``learner.trunk``."""
    return f"/learners/{learner.name}/" + ("net/trunk." if learner.average is None else "average/")


def count_skipped(run: Run, found: dict[int, str]) -> list[str]:
    """Count images that could not be decoded, by index; returns the reasons that are new.

    Raises:
        InputError: more than the budget; corrupt.txt lists them all.
    """
    try:
        return run.skipped.add(found)
    except InputError:
        _list_corrupt(run)
        raise


def publish_teachers(run: Run) -> None:
    """Write ``teacher.pth`` at the end of a base method's run, in that method's published layout."""
    if not run.processes.first or run.recipe.head != "native":
        return
    for learner, folder in zip(run.learners, run.folders, strict=True):
        if learner.branch is not None:
            checkpoint = published_checkpoint(
                learner.network.state_dict(),
                learner.net.state_dict(),
                center=learner.branch.processor.center,
                patch_center=learner.branch.processor.patch_center,
                recipe=run.recipe,
                timm_name=learner.name,
                epoch=run.recipe.epochs,
            )
            path = folder / "teacher.pth"
            save_published(path, checkpoint)
            run.say(f"wrote {path}: use it with --teacher {run.recipe.objective} --teacher-weights {path}")


def _list_corrupt(run: Run) -> None:
    if run.skipped.found:
        write_text(run.out / "corrupt.txt", "".join(f"{one_line(reason)}\n" for reason in run.skipped.found.values()))


def _processors(run: Run) -> list[TargetProcessor]:
    """Everything that keeps a queue in this process."""
    shared = run.branch.branch if isinstance(run.branch, WritingBranch) else run.branch
    branches = (shared, *(learner.branch for learner in run.learners))
    return [branch.processor for branch in branches if isinstance(branch, TeacherBranch | EmaBranch | OwnBranch)]


def _record(run: Run, learner: Learner, done: int) -> Student:
    return Student(
        timm_name=learner.name,
        width=embedding_width(learner.trunk),
        preprocessing=usual_preprocessing(run.recipe.crop_shape),
        sha256="",
        teacher=run.teacher,
        data=data_info(run.source),
        recipe=to_json(run.recipe),
        images_seen=done * run.recipe.batch_size,
        robx_version=__version__,
    )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return [_to(item, device) for item in value] if isinstance(value, list) else value
