"""What a run is made of, from its settings to its state: opened, resumed, saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robx import __version__
from robx.distill.batches.loader import Skipped, micro_batch, steps_per_epoch
from robx.distill.recipes import Recipe, recipe_from_json
from robx.distill.targets.branches import EmaBranch, OwnBranch, TargetBranch, TeacherBranch
from robx.distill.targets.build import open_targets, store_targets
from robx.distill.targets.centering import TargetProcessor
from robx.distill.targets.stored_writer import WritingBranch
from robx.distill.teachers.teacher import Teacher
from robx.distill.teachers.write_checkpoint import published_checkpoint, save_published
from robx.distill.training import run_checkpoint
from robx.distill.training.learner import Learner
from robx.distill.training.networks import Initial, build_networks, share_teacher
from robx.distill.training.processes import Processes
from robx.distill.training.run_folder import Metrics, student_folders, student_preprocessing, tensorboard_writer
from robx.distill.training.speed import SpeedBound
from robx.errors import InputError, first_line, one_line
from robx.images.sources import ImageSource, data_info
from robx.records import Student, TeacherInfo, to_json
from robx.store.files import read_json, write_json, write_text
from robx.trunk import embedding_width, save_trunk

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the result does not depend on."""

    device: str | None = None  # "cpu", "cuda", "cuda:1"; None takes a GPU when there is one
    workers: int = 0  # processes that cut crops
    compile: bool = False
    fresh: bool = False  # start over instead of resuming
    force: bool = False  # resume although settings changed
    probe_every: int = 0  # epochs between kNN probes; 0 for none
    probe_images: int = 2000
    checkpoint_minutes: float = 10.0  # between checkpoints, and ...
    checkpoint_steps: int = 0  # ... steps; 0 for none
    keep: int = 2  # checkpoints
    corrupt_budget: float = 0.001  # share of images that may fail to decode
    log_every: int = 10  # steps
    monitor_every: int = 50  # steps
    measure: bool = True  # the speed bound, before the first step
    tensorboard: bool = False
    stored_k: int = 256  # most probable prototypes of each stored target


@dataclass(kw_only=True)
class Run:
    """What the paragraphs of the loop share."""

    recipe: Recipe
    options: Options
    out: Path
    folders: list[Path]  # one a student
    source: ImageSource
    processes: Processes
    learners: list[Learner]
    branch: TargetBranch | None  # shared by all students; None for base methods
    mask_grid: tuple[int, int] | None
    teacher: TeacherInfo | None
    say: Say
    steps: int
    per_epoch: int
    skipped: Skipped
    metrics: list[Metrics] = field(default_factory=list)
    best: tuple[int, float] | None = None  # (step, kNN top-1) of the best probe
    bound: SpeedBound | None = None
    warned: set[str] = field(default_factory=set)

    def close(self) -> None:
        """Let go of the files that are open, however the run ended."""
        for metrics in self.metrics:
            metrics.close()
        if isinstance(self.branch, WritingBranch):
            self.branch.writer.close()


def open_run(
    recipe: Recipe,
    students: Sequence[str],
    source: ImageSource,
    out: Path,
    teacher: Teacher | None,
    targets: Path | None,
    store: Path | None,
    options: Options,
    processes: Processes,
    say: Say,
    init: Path | None = None,
) -> Run:
    """Check the settings against each other and the folder, and build the networks."""
    if (teacher is not None) + (targets is not None) + recipe.base != 1:
        raise InputError("give one of --teacher NAME, --teacher ema (the base method) and --targets DIR")
    initial = check_settings(recipe, students, init)
    per_epoch = steps_per_epoch(len(source), recipe.batch_size)
    micro_batch(recipe, processes=processes.world)  # says so when it is none
    steps = recipe.epochs * per_epoch
    stored = None if targets is None else open_targets(targets, recipe, source)
    if teacher is not None:
        share_teacher(teacher, processes)
    info = teacher.info if teacher is not None else stored.info if stored is not None else None
    settings = {"teacher": to_json(info)} | settings_of(recipe, students, source, initial, stored=stored is not None)
    if processes.first and not (options.force or options.fresh):
        refuse_changes(out, settings)
    networks = build_networks(
        recipe,
        students,
        teacher=teacher,
        stored=stored,
        processes=processes,
        steps=steps,
        steps_per_epoch=per_epoch,
        compile=options.compile,
        init=initial,
    )
    for learner in networks.learners:
        if learner.net.note:
            say(learner.net.note)
    branch = networks.branch
    if store is not None:
        branch = store_targets(branch, store, recipe=recipe, teacher=teacher, source=source, k=options.stored_k)
    folders = student_folders(out, students)
    if processes.first:  # only now that nothing was refused
        if options.fresh:
            for folder in {out, *folders}:
                run_checkpoint.start_over(folder)
        write_json(out / "recipe.json", settings | {"robx_version": __version__})
    return Run(
        recipe=recipe,
        options=options,
        out=out,
        folders=folders,
        source=source,
        processes=processes,
        learners=networks.learners,
        branch=branch,
        mask_grid=networks.mask_grid,
        teacher=info,
        say=say,
        steps=steps,
        per_epoch=per_epoch,
        skipped=Skipped(images=len(source), budget=options.corrupt_budget),
    )


def check_settings(recipe: Recipe, students: Sequence[str], init: Path | None) -> Initial | None:
    """What can be said of the settings before any network is built; returns the weights to start from, if any.

    Raises:
        InputError: settings that contradict each other.
        ArtifactError: `init` is no Student.
    """
    if recipe.freeze_trunk and init is None:
        raise InputError("freeze_trunk leaves the trunk as it is given: give --init RUN")
    if len(set(students)) != len(students) or not students:
        raise InputError("give each --student once")
    return None if init is None else Initial.open(init)


def settings_of(
    recipe: Recipe, students: Sequence[str], source: ImageSource, initial: Initial | None, *, stored: bool
) -> dict[str, Any]:
    """What recipe.json says of a run, but for its teacher; `stored`: whether targets stand in the teacher's place."""
    settings: dict[str, Any] = {
        "recipe": to_json(recipe),
        "students": list(students),
        "data": to_json(data_info(source)),
        "stored_targets": stored,
    }
    if initial is not None:
        settings["init"] = {"timm_name": initial.timm_name, "sha256": initial.sha256}
    return settings


def refuse_changes(out: Path, settings: dict[str, Any], *, unknown: str = "") -> None:
    """Compare these settings, but for the `unknown` one, with those of the run that is there, if any can be resumed."""
    path = out / "recipe.json"
    if path.exists() and run_checkpoint.checkpoints(out):
        there = {key: value for key, value in _comparable(read_json(path)).items() if key != unknown}
        run_checkpoint.refuse_changes(there, _comparable(settings), run=out)


def _comparable(settings: Any) -> dict[str, Any]:
    """What a resumed run has to share: neither which robx wrote it nor what is known of the images' licence counts."""
    if not isinstance(settings, dict):
        return {}
    kept = {key: value for key, value in settings.items() if key != "robx_version"}
    if isinstance(kept.get("recipe"), dict):  # a key that a later robx brought has its default in an earlier run
        with contextlib.suppress(InputError):
            kept["recipe"] = to_json(recipe_from_json(kept["recipe"]))
    if isinstance(kept.get("data"), dict):
        kept["data"] = {key: value for key, value in kept["data"].items() if key != "licence"}
    return kept


def resume_run(run: Run) -> int:
    """Load the newest whole checkpoint; returns the number of steps done."""
    found = run_checkpoint.load_newest(run.out, say=run.say)
    done = 0
    if found is not None:
        done, state = found
        state = _to(state, run.processes.device)
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
                f"{run.out}'s state does not fit these networks ({first_line(error)}): give --fresh"
            ) from error
        run.best = tuple(state["best"]) if state["best"] else None
        run.skipped.found = {int(index): reason for index, reason in state["skipped"].items()}
        run.say(f"resuming {run.out} after step {done} of {run.steps}")
    if len(found_by := set(run.processes.gather(done))) > 1:
        raise InputError(
            f"the processes found checkpoints of different steps ({sorted(found_by)}): "
            f"put {run.out} on a disk that all nodes share"
        )
    if run.processes.first:
        for folder in run.folders:
            board = tensorboard_writer(folder, step=done) if run.options.tensorboard else None
            run.metrics.append(Metrics(folder, step=done, tensorboard=board))
    return done


def save_run(run: Run, done: int) -> None:
    """Every process says what it skipped; the first one writes the students and the checkpoint."""
    for found in run.processes.gather(run.skipped.found):
        count_skipped(run, found)
    queues = run.processes.gather([None if s.queue is None else s.queue.cpu() for s in _processors(run)])
    if not run.processes.first:
        return
    state = {
        "learners": {learner.name: learner.state() for learner in run.learners},
        "branch": None if run.branch is None else run.branch.state_dict(),
        "best": run.best,
        "skipped": {str(index): reason for index, reason in run.skipped.found.items()},
        "queues": queues,  # of every process; all else is the same in all of them
    }
    for learner, folder in zip(run.learners, run.folders, strict=True):
        save_trunk(folder, learner.trunk, _record(run, learner, done))
    _list_corrupt(run)
    # The checkpoint is last: a run that is killed before it does this once more, and one killed after it lacks nothing.
    run_checkpoint.save_checkpoint(
        run.out, state, step=done, keep=run.options.keep, best=run.best[0] if run.best else None
    )


def count_skipped(run: Run, found: dict[int, str]) -> list[str]:
    """Count images that could not be decoded, by their index; returns the reasons that are new.

    Raises:
        InputError: more than the budget; corrupt.txt lists them all.
    """
    try:
        return run.skipped.add(found)
    except InputError:
        _list_corrupt(run)
        raise


def _list_corrupt(run: Run) -> None:
    if run.skipped.found:
        write_text(run.out / "corrupt.txt", "".join(f"{one_line(reason)}\n" for reason in run.skipped.found.values()))


def _processors(run: Run) -> list[TargetProcessor]:
    """What keeps a queue in this process."""
    shared = run.branch.branch if isinstance(run.branch, WritingBranch) else run.branch
    branches = (shared, *(learner.branch for learner in run.learners))
    return [branch.processor for branch in branches if isinstance(branch, TeacherBranch | EmaBranch | OwnBranch)]


def publish_teachers(run: Run) -> None:
    """A base method's run ends with ``teacher.pth``, in that method's published layout: a teacher for the next run."""
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
            save_published(folder / "teacher.pth", checkpoint)
            run.say(f"{folder / 'teacher.pth'}: --teacher {run.recipe.objective} --teacher-weights takes it")


def _record(run: Run, learner: Learner, done: int) -> Student:
    return Student(
        timm_name=learner.name,
        width=embedding_width(learner.trunk),
        preprocessing=student_preprocessing(run.recipe.crop_size),
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
