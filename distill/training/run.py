"""What a run is: its specification, its networks, and its place among the processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from robx import __version__
from robx.distill.batches.loader import Skipped, micro_batch, steps_per_epoch
from robx.distill.recipes import Recipe
from robx.distill.targets.branches import TargetBranch
from robx.distill.targets.build import NO_TEACHER, open_targets, store_targets, stored_info
from robx.distill.targets.stored_writer import WritingBranch, check_folder
from robx.distill.teachers.teacher import Teacher
from robx.distill.training import run_settings
from robx.distill.training.background import BackgroundWriter
from robx.distill.training.compute import Compute
from robx.distill.training.initial import Initial, open_initial
from robx.distill.training.learner import Learner
from robx.distill.training.networks import build_networks, share_teacher
from robx.distill.training.processes import Processes
from robx.distill.training.run_folder import Metrics, check_folders, claim_folders, student_folders
from robx.distill.training.speed import SpeedBound
from robx.errors import InputError
from robx.images.sources import ImageSource
from robx.progress import Fact
from robx.records import TeacherInfo, to_json
from robx.store.files import write_json
from robx.store.folders import require_writable
from robx.trunk import has_batch_norm

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings that do not change the result of a run."""

    device: str | None = None  # "cpu", "cuda", "cuda:1"; None uses a GPU if one is available
    workers: int = 0  # data-loading processes; a plan's default depends on the device, as the command's does
    compile: bool = False  # torch.compile teacher and students
    fresh: bool = False  # start over instead of resuming
    force: bool = False  # resume even if settings changed
    probe_every: int = 0  # epochs between kNN evaluations; 0 disables them
    probe_images: int = 2000  # images of a kNN evaluation, at most
    checkpoint_minutes: float = 10.0  # between checkpoints
    checkpoint_steps: int = 0  # likewise in steps; 0 disables
    keep: int = 2  # checkpoints kept
    corrupt_budget: float = 0.001  # fraction of images that may fail to decode
    log_every: int = 10  # steps between lines of metrics.jsonl
    monitor_every: int = 50  # steps between checks for collapse
    measure: bool = True  # measure the speed bound before the first step
    tensorboard: bool = False  # also write RUN/tensorboard
    stored_k: int = 256  # most probable prototypes kept per stored target

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name, least in _LEAST.items():
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.corrupt_budget <= 1:
            raise InputError(f"corrupt_budget must be at most 1, got {self.corrupt_budget}")


_LEAST = {
    "workers": 0, "probe_every": 0, "probe_images": 1, "checkpoint_minutes": 0, "checkpoint_steps": 0, "keep": 0,
    "corrupt_budget": 0, "log_every": 1, "monitor_every": 1, "stored_k": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What to train, on which images, against which targets, and where the result goes."""

    recipe: Recipe
    students: Sequence[str]  # timm names; one is written to `out` itself, several to `out`/NAME each
    source: ImageSource
    out: Path | None = None  # the run's folder; None is enough for an estimate
    teacher: Teacher | None = None  # None for a base method, or with `targets`
    targets: Path | None = None  # stored targets used instead of a teacher
    store: Path | None = None  # where to write the targets of this run
    init: Path | None = None  # weights to start from: a run, a file, or Path("pretrained"); None: random weights
    cache: Path | None = None  # for downloads
    inputs: Sequence[Path] = ()  # other files that the run reads, which it must not remove
    options: Options = field(default_factory=Options)


@dataclass(kw_only=True)
class Run:
    """The state that the training loop shares."""

    recipe: Recipe
    options: Options
    out: Path
    folders: list[Path]  # one per student
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
    initial: dict[str, Initial] = field(default_factory=dict)  # weights that students start from, by name
    best: tuple[int, float] | None = None  # (step, kNN top-1) of the best evaluation
    bound: SpeedBound | None = None
    bound_tries: int = 0  # measurements of it
    warned: set[str] = field(default_factory=set)
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)  # of checkpoints

    def close(self) -> None:
        """Close the open files, however the run ended."""
        for metrics in self.metrics:
            metrics.close()
        if isinstance(self.branch, WritingBranch):
            self.branch.writer.close()


def open_run(spec: RunSpec, compute: Compute, *, processes: Processes, say: Say) -> Run:
    """Check the settings against each other and against the folder, and build the networks.

    Raises:
        InputError: settings that contradict each other, or differ from those of the run in the folder.
    """
    recipe, options, out = spec.recipe, spec.options, require_out(spec)
    if (spec.teacher is not None) + (spec.targets is not None) + recipe.base != 1:
        raise InputError("give one of --teacher NAME, --teacher ema (the base method) and --targets DIR")
    initial = check_spec(spec)
    per_epoch = steps_per_epoch(len(spec.source), recipe.batch_size)
    _check_processes(spec, processes)
    steps = recipe.epochs * per_epoch
    stored = None if spec.targets is None else open_targets(spec.targets, recipe, spec.source)
    if spec.teacher is not None:
        share_teacher(spec.teacher, processes)
    info = spec.teacher.info if spec.teacher is not None else stored.info if stored is not None else None
    settings = {"teacher": to_json(info)} | spec_settings(spec, initial)
    folders = student_folders(out, spec.students)
    if processes.first:
        check_outputs(spec)
        if not (options.force or options.fresh):
            run_settings.refuse_changes(out, settings)
    networks = build_networks(
        recipe,
        spec.students,
        teacher=spec.teacher,
        stored=stored,
        processes=processes,
        steps=steps,
        steps_per_epoch=per_epoch,
        compile=options.compile,
        init=initial,
    )
    _say_what_is_learned(networks.learners, say)
    if processes.first:
        _check_store(spec)
        # Only now, when nothing can be refused any more.
        _claim(spec, folders, say)
        write_json(out / "recipe.json", settings | {"compute": to_json(compute), "robx_version": __version__})
    branch = networks.branch
    if spec.store is not None:
        branch = store_targets(
            branch, spec.store, recipe=recipe, teacher=spec.teacher, source=spec.source, k=options.stored_k
        )
    return Run(
        recipe=recipe,
        options=options,
        out=out,
        folders=folders,
        source=spec.source,
        processes=processes,
        learners=networks.learners,
        branch=branch,
        mask_grid=networks.mask_grid,
        teacher=info,
        say=say,
        steps=steps,
        per_epoch=per_epoch,
        skipped=Skipped(images=len(spec.source), budget=options.corrupt_budget),
        initial=initial,
    )


def _check_processes(spec: RunSpec, processes: Processes) -> None:
    """Refuse processes that cannot share a batch, or that see different images or recipes."""
    micro_batch(spec.recipe, processes=processes.world)
    _require_batch(spec, processes=processes.world)
    require_same_images(spec.source, processes)
    require_same_recipe(spec.recipe, processes)


def _say_what_is_learned(learners: Sequence[Learner], say: Say) -> None:
    """Which part of the method does not apply to a student, and which feature maps it matches."""
    for learner in learners:
        if learner.net.note:
            say(learner.net.note)
        if learner.net.stages is not None:
            pairs = learner.net.stages.pairs.items()
            strides = ", ".join(f"{one}" if one == own else f"{one} (its own of {own})" for one, own in pairs)
            say(Fact(f"{learner.name} matches the teacher's feature maps at stride {strides}"))


def _check_store(spec: RunSpec) -> None:
    """Refuse to add to stored targets of other settings than this run's."""
    recipe = spec.recipe
    if spec.store is not None and spec.teacher is not None:
        kept = stored_info(recipe, teacher=spec.teacher, source=spec.source, k=spec.options.stored_k)
        check_folder(spec.store, epochs=recipe.target_epochs or recipe.epochs, info=kept)


def _claim(spec: RunSpec, folders: Sequence[Path], say: Say) -> None:
    """Take the run's folders, and name the bundles of an earlier student that stay there."""
    fresh = spec.options.fresh
    claim_folders(require_out(spec), folders, base=spec.recipe.base, fresh=fresh)
    old = [path.parent for folder in folders for path in sorted(folder.glob("*/manifest.json"))]
    if fresh and old:
        what = f"{old[0]} and {len(old) - 1} more are" if len(old) > 1 else f"{old[0]} is"
        say(f"warning: {what} of the earlier student, and stay: export again")


def require_same_images(source: ImageSource, processes: Processes) -> None:
    """Refuse processes that see different images: they would wait for each other forever, or train on different data.

    Raises:
        InputError: the numbers of images or their fingerprints differ; raised in every process.
    """
    found = processes.gather((len(source), source.fingerprint))
    for rank, other in enumerate(found):
        if other != found[0]:
            raise InputError(
                f"the processes see different images: process 0 has {found[0][0]} (fingerprint {found[0][1]}), process "
                f"{rank} has {other[0]} (fingerprint {other[1]}): give all nodes the same --data"
            )


def require_same_recipe(recipe: Recipe, processes: Processes) -> None:
    """Refuse processes whose recipes differ, such as in a precision that each chose for its own kind of GPU.

    Raises:
        InputError: the message names a key and both values; raised in every process.
    """
    found = processes.gather(to_json(recipe))
    for rank, other in enumerate(found):
        for key, value in other.items():
            if value != found[0][key]:
                raise InputError(
                    f"the processes have different recipes: {key} is {found[0][key]} in process 0 and {value} in "
                    f"process {rank}: set {key} with --recipe FILE"
                )


def require_out(spec: RunSpec) -> Path:
    """The run's folder.

    Raises:
        InputError: none was given.
    """
    if spec.out is None:
        raise InputError("--out DIR is missing: see robx distill --help")
    return spec.out


def check_outputs(spec: RunSpec) -> None:
    """Refuse folders that cannot be written, or in which the run would replace files that robx did not write.

    Raises:
        InputError: the message names the file or folder.
        NoSpace: the disk is full.
        ArtifactError: a targets.json there is damaged.
    """
    if spec.store is not None:
        if spec.recipe.base or spec.targets is not None:
            raise InputError(NO_TEACHER)
        require_writable(spec.store, remedy="give --store-targets another folder")
        check_folder(spec.store, epochs=spec.recipe.target_epochs or spec.recipe.epochs)
    if spec.out is not None:
        require_writable(spec.out, remedy="give --out in another folder")
        folders = student_folders(spec.out, spec.students)
        check_folders(spec.out, folders, inputs=spec.inputs, base=spec.recipe.base, fresh=spec.options.fresh)


def check_spec(spec: RunSpec) -> dict[str, Initial]:
    """Check what can be checked before the teacher is loaded; returns the students' weights to start from.

    Raises:
        InputError: settings that contradict each other, or differ from those of the run in the folder.
        ArtifactError: ``init`` is damaged.
    """
    if spec.recipe.freeze_trunk and spec.init is None:
        raise InputError("freeze_trunk keeps the trunk's initial weights: give --init RUN, FILE or pretrained")
    if spec.recipe.mixup and (spec.targets is not None or spec.store is not None):
        raise InputError("stored targets are of single images, and mixup blends them: set mixup = 0")
    if len(set(spec.students)) != len(spec.students) or not spec.students:
        raise InputError("the same student is given twice: give each --student once")
    steps_per_epoch(len(spec.source), spec.recipe.batch_size)
    _require_batch(spec)
    initial = {}
    if spec.init is not None:
        size = spec.recipe.crop_shape
        initial = {name: open_initial(spec.init, name, image_size=size, cache=spec.cache) for name in spec.students}
    if spec.out is not None and not (spec.options.fresh or spec.options.force):
        run_settings.refuse_changes(spec.out, spec_settings(spec, initial), unknown="teacher")
    return initial


def _require_batch(spec: RunSpec, *, processes: int = 1) -> None:
    """Refuse micro-batches of one image where the networks or the loss compare the images of one."""
    recipe = spec.recipe
    parts = recipe.accumulate * processes
    if recipe.batch_size > parts:
        return
    remedy = f"give --batch-size {2 * parts}, or more"
    if recipe.feature_weight or recipe.stage_weight:
        raise InputError(
            "feature_weight and stage_weight compare the images of a micro-batch with their mean, and there is one: "
            f"{remedy}"
        )
    trains_norms = not recipe.quantize and not recipe.freeze_trunk
    if trains_norms and recipe.batch_size == recipe.accumulate and any(map(has_batch_norm, spec.students)):
        raise InputError(f"the student's BatchNorm needs more than one image in a micro-batch: {remedy}")


def spec_settings(spec: RunSpec, initial: Mapping[str, Initial]) -> dict[str, object]:
    """What recipe.json records of a run, except its teacher."""
    return run_settings.settings_of(
        spec.recipe,
        spec.students,
        spec.source,
        init={
            "timm_name": ", ".join(initial),
            "sha256": ", ".join(weights.sha256 for weights in initial.values()),
        }
        if initial
        else None,
        stored=spec.targets is not None,
    )
