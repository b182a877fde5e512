"""Logging: metrics, warnings, kNN evaluations, and the speed relative to the measured bound."""

from __future__ import annotations

from torch import Tensor

from robx.distill.targets.branches import TeacherBranch
from robx.distill.targets.stored_writer import WritingBranch
from robx.distill.training.collapse import embedding_health, warnings
from robx.distill.training.knn_probe import Probe, build_probe, run_probe, score
from robx.distill.training.readings import StepValues
from robx.distill.training.run import Run
from robx.distill.training.schedules import learning_rate
from robx.distill.training.speed import Rate
from robx.image_size import usual_preprocessing
from robx.progress import Fact

# Of a step's time: less is the jitter of a loader that keeps up.
_NOTABLE_WAITING = 0.1


def log_step(run: Run, values: StepValues, *, speed: float) -> None:
    """Write one line of metrics per student, if the step is one that logs; losses are averaged over processes."""
    if not values.logs:
        return
    everywhere = run.processes.gather(values.losses)
    if not run.processes.first:
        return
    done = values.step + 1
    shared = {
        "step": done,
        "epoch": done / run.per_epoch,
        "lr": learning_rate(done - 1, steps=run.steps, recipe=run.recipe),
        "images_per_s": round(speed, 2),
        "share_of_bound": None if run.bound is None else round(speed / speed_bound(run), 4),
    }
    for i, metrics in enumerate(run.metrics):
        loss = sum(losses[i] for losses in everywhere) / len(everywhere)
        metrics.add(shared | {"loss": loss, "grad_norm": values.norms[i]} | values.stats[i])


def monitor(run: Run, values: StepValues, pixels: Tensor) -> None:
    """Check for collapse, and warn once of each kind; `pixels` are those of the step."""
    done = values.step + 1
    for learner, metrics, figures in zip(run.learners, run.metrics, values.stats, strict=True):
        health = {}
        if len(pixels) >= 8:  # fewer images say nothing about spread and rank
            health = embedding_health(learner.trunk, pixels[:64])
            metrics.add({"step": done, "epoch": done / run.per_epoch} | health)
        seen = health | figures
        soft = learner.objective.traits.soft_targets
        for text in warnings(seen, step=done, prototypes=None if soft else learner.net.num_prototypes):
            if (kind := f"{learner.name}: {text.split(';')[0][:24]}") not in run.warned:
                run.warned.add(kind)
                run.say(f"warning: {learner.name}, step {done}: {text}")


def open_probe(run: Run) -> Probe | None:
    """The kNN evaluation, if it is enabled and the images have labels."""
    if not run.options.probe_every:
        return None
    preprocessing = usual_preprocessing(run.recipe.crop_shape)
    probe = build_probe(run.source, preprocessing, images=run.options.probe_images, seed=run.recipe.seed)
    if probe is None:
        run.say(
            "--probe-every is ignored: the kNN evaluation needs at least ten labelled images of two classes "
            "(folder/class/image, or key.cls in shards)"
        )
    return probe


def probe_students(run: Run, probe: Probe, done: int) -> bool:
    """Evaluate every student; returns whether the mean score is the best so far."""
    if not run.processes.first:
        return False
    scores = [run_probe(probe, learner.trunk, run.processes.device) for learner in run.learners]
    for learner, metrics, knn in zip(run.learners, run.metrics, scores, strict=True):
        metrics.add({"step": done, "epoch": done / run.per_epoch, "probe_knn": knn})
        run.say(Fact(f"epoch {done // run.per_epoch}: {learner.name} kNN accuracy {knn:.1f} %"))
    mean = sum(scores) / len(scores)
    if run.best is not None and mean <= run.best[1]:
        return False
    run.best = (done, mean)
    return True


def probe_references(run: Run, probe: Probe) -> None:
    """Reference points of the curve: each untrained student, and the teacher at the same image size."""
    branch = run.branch.branch if isinstance(run.branch, WritingBranch) else run.branch
    reference = {}
    if isinstance(branch, TeacherBranch):
        reference["teacher_probe_knn"] = score(probe, branch.teacher.features, run.processes.device)
        run.say(Fact(f"teacher kNN accuracy {reference['teacher_probe_knn']:.1f} %"))
    for learner, metrics in zip(run.learners, run.metrics, strict=True):
        untrained = run_probe(probe, learner.trunk, run.processes.device)
        metrics.add({"step": 0, "epoch": 0.0, "probe_knn": untrained} | reference)
        run.say(Fact(f"{learner.name} kNN accuracy before training {untrained:.1f} %"))


def speed_bound(run: Run) -> float:
    """Upper bound on images per second, over all processes."""
    return run.bound.images_per_s * run.processes.world if run.bound else float("nan")


def note(run: Run, loss: float | None, rate: Rate) -> str:
    """The text beside the progress bar: loss, speed, and what limits it. None: no loss has been read yet."""
    if loss is None:
        return ""
    speed = rate.steps_per_s() * run.recipe.batch_size
    if not speed:  # not known before the second step
        return f"loss {loss:.3f}"
    share = f" ({speed / speed_bound(run):.0%} of the bound)" if run.bound else ""
    waiting = rate.waiting()
    limit = f", {waiting:.0%} of the time waiting for images" if waiting > _NOTABLE_WAITING else ""
    return f"loss {loss:.3f}, {speed:.1f} images/s{share}{limit}"
