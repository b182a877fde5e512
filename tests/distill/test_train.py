from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from robx.distill import train as module
from robx.distill.objectives import rob_msn
from robx.distill.recipes import override
from robx.distill.teachers.foreign_files import read_checkpoint
from robx.distill.teachers.load import build_teacher_skeleton, load_teacher
from robx.distill.training import run_checkpoint
from robx.distill.training.collapse import NotFinite
from robx.distill.training.compute import compute_of
from robx.distill.training.learner import Learner
from robx.distill.training.processes import Processes
from robx.distill.training.run import RunSpec, open_run, require_same_images
from robx.distill.training.speed import SpeedBound
from robx.errors import InputError
from robx.images.sources import FolderSource, ImageSource, open_source
from robx.records import load_student, unfinished
from robx.trunk import load_trunk
from tests.preloaded import Preloaded


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


@pytest.fixture(scope="module")
def source(scenes: Path) -> ImageSource:
    return open_source(scenes)


@pytest.fixture(scope="module")
def unbroken(tiny: ModuleType, source: ImageSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: 8 steps of one ViT student without a break."""
    out = tmp_path_factory.mktemp("unbroken")
    tiny.tiny_run(source, out)
    return out


class Stop(Exception):
    """As a power cut: nothing of robx sees it coming."""


def stop_after(step: int) -> Any:
    def progress(done: int, total: int, note: str) -> None:
        if done == step:
            raise Stop

    return progress


def test_the_folder_holds_what_it_should(unbroken: Path, tiny: ModuleType, source: ImageSource) -> None:
    student, trunk = load_trunk(unbroken)
    assert (student.timm_name, student.images_seen, student.preprocessing.crop) == ("test_vit", 64, 32)
    assert student.teacher is not None and student.teacher.name == "timm:test_resnet"
    assert student.data is not None and student.data.fingerprint == source.fingerprint
    assert trunk(torch.zeros(1, 3, 32, 32)).shape == (1, student.width)
    settings = json.loads((unbroken / "recipe.json").read_text())
    assert settings["recipe"]["objective"] == "msn" and settings["students"] == ["test_vit"]
    assert [step for step, _ in tiny.losses(unbroken)] == list(range(1, 9))
    assert not list(unbroken.rglob(".*tmp*"))


@pytest.mark.parametrize(("broken_at", "workers"), [((3,), 0), ((2, 5, 7), 2)])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path, broken_at: tuple[int, ...], workers: int
) -> None:
    options = {"checkpoint_steps": 2, "workers": workers}
    for step in broken_at:
        with pytest.raises(Stop):
            tiny.tiny_run(source, tmp_path, options=options, progress=stop_after(step))
    tiny.tiny_run(source, tmp_path, options=options)
    assert weights(tmp_path) == weights(unbroken) and tiny.losses(tmp_path) == tiny.losses(unbroken)
    final = [run_checkpoint.load_newest(folder) for folder in (tmp_path, unbroken)]
    assert final[0] is not None and final[1] is not None
    _assert_equal(final[0][1], final[1][1])


@pytest.mark.parametrize(
    ("student", "values"),
    [
        ("test_resnet", {"objective": "swav", "kind": "cnn", "optimizer": "larc", "student_ema": 0.9, "queue": 16}),
        ("test_resnet", {"objective": "swav", "base": True, "head": "native", "queue": 16, "warmup_lr": 0.0}),
        ("test_resnet", {"objective": "msn", "kind": "cnn", "optimizer": "sgd"}),
        ("test_resnet", {"objective": "msn", "kind": "cnn", "optimizer": "adamw", "precision": "fp16"}),
        ("test_vit", {"objective": "dino", "base": True, "accumulate": 2, "pairing": "swapped"}),
        ("test_vit", {"objective": "ibot", "base": True, "precision": "bf16"}),
        ("test_vit", {"objective": "msn", "augment": "device"}),
    ],
)
def test_every_kind_of_state_resumes(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, student: str, values: dict[str, Any]
) -> None:
    recipe = tiny.tiny_recipe(**values)
    tiny.tiny_run(source, tmp_path / "a", students=[student], recipe=recipe)
    with pytest.raises(Stop):
        options = {"checkpoint_steps": 3}
        tiny.tiny_run(
            source, tmp_path / "b", students=[student], recipe=recipe, options=options, progress=stop_after(5)
        )
    tiny.tiny_run(source, tmp_path / "b", students=[student], recipe=recipe)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert tiny.losses(tmp_path / "a") == tiny.losses(tmp_path / "b")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (Debian: g++)")
def test_a_compiled_run_is_the_plain_one(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe(drop_path=0.0)
    tiny.tiny_run(source, tmp_path / "plain", recipe=recipe)
    tiny.tiny_run(source, tmp_path / "compiled", recipe=recipe, options={"compile": True})
    pairs = zip(tiny.losses(tmp_path / "compiled"), tiny.losses(tmp_path / "plain"), strict=True)
    assert all(abs(a - b) < 1e-3 for (_, a), (_, b) in pairs)
    trunk = load_file(tmp_path / "compiled" / "student.safetensors")
    assert set(trunk) == set(load_file(tmp_path / "plain" / "student.safetensors"))


def test_neither_probe_nor_monitor_nor_measurement_changes_the_run(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    notes: list[str] = []
    options = {"measure": True, "probe_every": 1, "monitor_every": 2, "workers": 1}
    tiny.tiny_run(source, tmp_path, options=options, say=said.append, progress=lambda d, t, note: notes.append(note))
    assert weights(tmp_path) == weights(unbroken) and tiny.losses(tmp_path) == tiny.losses(unbroken)
    assert any(text.startswith("speed bound ") for text in said) and "% of the bound" in notes[-1]
    assert "loss " in notes[0] and "images/s" not in notes[0]  # not known before the second step
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line}
    assert {"probe_knn", "embedding_std", "embedding_rank", "target_entropy", "grad_norm", "share_of_bound"} <= keys


def test_a_bound_that_was_measured_on_a_busy_machine_is_measured_again(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, bounds = module.measure_bound, [1e-3, 1e-3, 1e6, 1e-3]

    def busy(*given: Any, **settings: Any) -> Any:
        return replace(measure(*given, **settings), bound=SpeedBound(None, bounds.pop(0)))

    monkeypatch.setattr(module, "measure_bound", busy)
    said: list[str] = []
    tiny.tiny_run(source, tmp_path, options={"measure": True}, say=said.append)
    assert sum("measuring it again" in line for line in said) == 2 and len(bounds) == 1
    assert [line.split(",")[0] for line in said if line.startswith("speed bound")][-1].endswith("1 process")
    assert weights(tmp_path) == weights(unbroken) and tiny.losses(tmp_path) == tiny.losses(unbroken)


def test_statistics_are_those_of_their_step_and_made_for_no_other(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    real = rob_msn.loss_stats

    def counted(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        made.append(kwargs["temperature"])
        return real(*args, **kwargs)

    monkeypatch.setattr(rob_msn, "loss_stats", counted)
    tiny.tiny_run(source, tmp_path, options={"log_every": 3, "monitor_every": 100})

    def logged(run: Path) -> dict[int, float]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["target_entropy"] for line in lines if "loss" in line}

    every, some = logged(unbroken), logged(tmp_path)
    assert some == {step: every[step] for step in (3, 6, 8)} and len(made) == 3


def test_several_students_are_those_of_separate_runs(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path
) -> None:
    folders = tiny.tiny_run(source, tmp_path / "both", students=["test_resnet", "test_vit"])
    tiny.tiny_run(source, tmp_path / "one", students=["test_resnet"])
    assert folders == [tmp_path / "both" / "test_resnet", tmp_path / "both" / "test_vit"]
    assert weights(folders[1]) == weights(unbroken) and weights(folders[0]) == weights(tmp_path / "one")


def test_stored_targets_train_the_same_student_without_the_teacher(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path
) -> None:
    tiny.tiny_run(source, tmp_path / "live", store=tmp_path / "targets")
    assert weights(tmp_path / "live") == weights(unbroken)
    tiny.tiny_run(source, tmp_path / "stored", targets=tmp_path / "targets")
    pairs = zip(tiny.losses(tmp_path / "stored"), tiny.losses(unbroken), strict=True)
    assert all(abs(a - b) < 1e-3 for (_, a), (_, b) in pairs)
    assert load_student(tmp_path / "stored").teacher == load_student(unbroken).teacher
    with pytest.raises(InputError, match="seed"):
        tiny.tiny_run(source, tmp_path / "other", recipe=tiny.tiny_recipe(seed=1), targets=tmp_path / "targets")


def test_stored_targets_of_few_epochs_serve_many(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    """Two epochs of crops, replayed: the run without the teacher is the one with it, epoch 3 has the crops of 1."""
    recipe = tiny.tiny_recipe(epochs=4, target_epochs=2)
    options = {"stored_k": 12}
    tiny.tiny_run(source, tmp_path / "live", recipe=recipe, store=tmp_path / "targets", options=options)
    assert sorted(path.name for path in (tmp_path / "targets").glob("*.npy")) == ["epoch-00000.npy", "epoch-00001.npy"]
    tiny.tiny_run(source, tmp_path / "stored", recipe=recipe, targets=tmp_path / "targets")
    live, stored = tiny.losses(tmp_path / "live"), tiny.losses(tmp_path / "stored")
    assert [step for step, _ in live] == [step for step, _ in stored]
    assert np.allclose([loss for _, loss in live], [loss for _, loss in stored], rtol=1e-2)
    longer = tiny.tiny_recipe(epochs=4)
    with pytest.raises(InputError, match=r"targets of 2 epochs, and the run needs 4: give --target-epochs 2"):
        tiny.tiny_run(source, tmp_path / "longer", recipe=longer, targets=tmp_path / "targets")


def test_targets_of_one_teacher_crop_are_stored_and_read(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    one = tiny.tiny_recipe(objective="swav", teacher_crops=1, warmup_lr=0.0, lr=1e-4)
    tiny.tiny_run(source, tmp_path / "live", recipe=one, store=tmp_path / "targets")
    tiny.tiny_run(source, tmp_path / "stored", recipe=one, targets=tmp_path / "targets")
    pairs = zip(tiny.losses(tmp_path / "stored"), tiny.losses(tmp_path / "live"), strict=True)
    assert all(abs(a - b) < 1e-3 for (_, a), (_, b) in pairs)
    with pytest.raises(InputError, match="crops = 1, not 2"):
        two = override(one, {"teacher_crops": 2})
        tiny.tiny_run(source, tmp_path / "two", recipe=two, targets=tmp_path / "targets")


def test_accumulated_micro_batches_give_the_gradient_of_the_whole(
    tiny: ModuleType, source: ImageSource, tmp_path: Path
) -> None:
    for parts in (1, 4):
        recipe = tiny.tiny_recipe(accumulate=parts, drop_path=0.0, optimizer="sgd", lr=0.1)
        tiny.tiny_run(source, tmp_path / str(parts), recipe=recipe)
    whole, parts_of_it = (load_file(tmp_path / name / "student.safetensors") for name in ("1", "4"))
    for key, value in whole.items():
        torch.testing.assert_close(parts_of_it[key], value, atol=2e-5, rtol=1e-4)


def test_changed_settings_are_refused_unless_forced(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        tiny.tiny_run(source, tmp_path, options={"checkpoint_steps": 1}, progress=stop_after(3))
    assert re.search(r"interrupted after (16|24) of 64 images", unfinished(load_student(tmp_path)))
    longer = tiny.tiny_recipe(epochs=2)
    with pytest.raises(InputError, match=r"recipe\.epochs: 1 -> 2"):
        tiny.tiny_run(source, tmp_path, recipe=longer)
    with pytest.raises(InputError, match=r"students: \['test_vit'\] -> \['test_resnet'\]"):
        tiny.tiny_run(source, tmp_path, students=["test_resnet"])
    tiny.tiny_run(source, tmp_path, recipe=longer, options={"force": True})
    assert load_student(tmp_path).images_seen == 128 and unfinished(load_student(tmp_path)) == ""


def test_a_run_of_before_a_setting_existed_goes_on(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        tiny.tiny_run(source, tmp_path, options={"checkpoint_steps": 1}, progress=stop_after(3))
    settings = json.loads((tmp_path / "recipe.json").read_text())
    del settings["recipe"]["teacher_crops"]
    (tmp_path / "recipe.json").write_text(json.dumps(settings))
    tiny.tiny_run(source, tmp_path)
    assert weights(tmp_path) == weights(unbroken)


def test_a_finished_run_is_left_alone_and_fresh_starts_over(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    tiny.tiny_run(source, unbroken, say=said.append)
    assert any("already holds the complete run" in text for text in said)
    tiny.tiny_run(source, tmp_path, recipe=tiny.tiny_recipe(seed=5))
    first = weights(tmp_path)
    with pytest.raises(InputError, match="--student once"):
        tiny.tiny_run(source, tmp_path, students=["test_vit"] * 2, options={"fresh": True})
    with pytest.raises(InputError, match="unknown student"):
        tiny.tiny_run(source, tmp_path, students=["test_vti"], options={"fresh": True})
    assert weights(tmp_path) == first  # what is refused takes nothing with it
    tiny.tiny_run(source, tmp_path, options={"fresh": True})
    assert weights(tmp_path) == weights(unbroken) != first


def test_nan_stops_the_run_names_the_images_and_saves_nothing_poisoned(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robx.distill.batches import loader

    real = loader.normalise

    def poisoned(pixels: Tensor, device: torch.device) -> Tensor:
        found = real(pixels, device)
        poisoned.calls += 1  # type: ignore[attr-defined]
        if poisoned.calls == 9:  # type: ignore[attr-defined] # the globals of the fifth batch
            found[0, 3] = float("nan")
        return found

    poisoned.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(loader, "normalise", poisoned)
    with pytest.raises(NotFinite, match=r"loss is nan at step 4; its images are .*\.png"):
        tiny.tiny_run(source, tmp_path, options={"checkpoint_steps": 1})
    found = run_checkpoint.load_newest(tmp_path)
    assert found is not None and found[0] == 4
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "student.safetensors").values())


def test_a_teacher_that_gives_nan_is_named(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    teacher = tiny.tiny_teacher()
    with torch.no_grad():
        next(teacher.trunk.parameters()).fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"the teacher's targets are NaN at step 0; the images are .*\.png") as caught:
        tiny.tiny_run(source, tmp_path, teacher=teacher, recipe=tiny.tiny_recipe(accumulate=2))
    assert "--lr" not in str(caught.value) and run_checkpoint.load_newest(tmp_path) is None


def test_processes_with_other_images_are_refused_by_name(source: ImageSource) -> None:
    for other in ((len(source) - 16, "0" * 16), (len(source), "0" * 16)):
        processes: Any = SimpleNamespace(gather=lambda mine, other=other: [mine, other])
        with pytest.raises(InputError, match=rf"process 0 has {len(source)} .* process 1 has {other[0]} .*0000"):
            require_same_images(source, processes)
    require_same_images(source, Processes(0, 1, torch.device("cpu")))


def test_a_collapsed_student_is_said_once(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robx.distill.training import collapse, networks

    real = networks.build_student

    def collapsed(*arguments: Any) -> Any:
        net = real(*arguments)
        for parameter in net.trunk.parameters():
            torch.nn.init.zeros_(parameter)
        return net

    monkeypatch.setattr(networks, "build_student", collapsed)
    monkeypatch.setattr(collapse, "MIN_STEPS", 2)
    said: list[str] = []
    recipe = tiny.tiny_recipe(lr=1e-9, warmup_lr=0.0)
    tiny.tiny_run(source, tmp_path, recipe=recipe, options={"monitor_every": 2}, say=said.append)
    assert len([text for text in said if "warning: test_vit, step 2: the student has collapsed" in text]) == 1
    assert len([text for text in said if "collapsed" in text]) == 1


@pytest.mark.parametrize(
    ("method", "layer"), [("dino", "head.last_layer.weight_v"), ("swav", "head.prototypes.weight")]
)
def test_the_last_layer_of_a_base_method_waits_for_its_first_epoch(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, layer: str
) -> None:
    seen: list[torch.Tensor] = []
    real = Learner.update

    def watch(learner: Learner, *, step: int, steps: int) -> None:
        seen.append(learner.net.get_parameter(layer).detach().clone())
        real(learner, step=step, steps=steps)

    monkeypatch.setattr(Learner, "update", watch)
    recipe = tiny.tiny_recipe(
        objective=method, base=True, head="native", epochs=2, freeze_last_layer_epochs=1, weight_decay=0.0,
        weight_decay_end=0.0, warmup_lr=1e-3, patch_drop=0.0,
    )  # fmt: skip
    tiny.tiny_run(source, tmp_path, recipe=recipe)
    epoch = len(seen) // 2
    assert epoch > 1 and all(torch.equal(seen[0], weights) for weights in seen[: epoch + 1])
    assert not torch.equal(seen[0], seen[-1])


def test_supervised_distillation_learns_a_classifiers_answers(
    tiny: ModuleType, source: ImageSource, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    teacher = build_teacher_skeleton("timm:test_resnet", objective="kd", image_size=32)
    recipe = tiny.tiny_recipe(
        objective="kd", kind="cnn", epochs=8, local_crops=0, lr=5e-3, drop_path=0.0, head="mlp", optimizer="adamw"
    )
    tiny.tiny_run(source, tmp_path, recipe=recipe, students=["test_resnet"], teacher=teacher)
    losses = [loss for _, loss in tiny.losses(tmp_path)]
    few = len(losses) // 8
    assert sum(losses[-few:]) < 0.8 * sum(losses[:few])
    student = load_student(tmp_path)
    assert student.recipe["objective"] == "kd" and student.teacher is not None
    assert student.teacher.name == "timm:test_resnet"


def test_corrupt_images_are_listed_in_the_run(tiny: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    for index in range(32):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(data / f"{index:02d}.png")
    (data / "07.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="1 of 32 images cannot be decoded"):
        tiny.tiny_run(FolderSource(data), tmp_path / "strict")
    tiny.tiny_run(FolderSource(data), tmp_path / "out", options={"corrupt_budget": 0.05})
    assert "07.png" in (tmp_path / "out" / "corrupt.txt").read_text()


def test_a_folder_in_use_and_settings_that_contradict_are_refused(
    tiny: ModuleType, source: ImageSource, tmp_path: Path
) -> None:
    import fcntl

    with (tmp_path / ".lock").open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use"):
            tiny.tiny_run(source, tmp_path)
    with pytest.raises(InputError, match="give one of --teacher"):
        tiny.tiny_run(source, tmp_path, recipe=tiny.tiny_recipe(), teacher=None)
    with pytest.raises(InputError, match="--student once"):
        tiny.tiny_run(source, tmp_path, students=["test_vit", "test_vit"])
    with pytest.raises(InputError, match="unknown student"):
        tiny.tiny_run(source, tmp_path, students=["test_vti"])
    three = Processes(0, 3, torch.device("cpu"), control=None)
    with pytest.raises(InputError, match="is not divisible by 3 processes"):
        recipe, teacher = tiny.tiny_recipe(), tiny.tiny_teacher()
        spec = RunSpec(recipe=recipe, students=["test_vit"], source=source, out=tmp_path, teacher=teacher)
        compute = compute_of(recipe, three.device, workers=0)
        open_run(spec, compute, processes=three, say=print)
    assert not (tmp_path / "recipe.json").exists()  # nothing half-written


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tiny: ModuleType, scenes: Path, source: ImageSource, unbroken: Path, tmp_path: Path, preloaded: Preloaded
) -> None:
    """A process of its own: only its main thread can take signals."""
    process = preloaded.start([tiny.__file__, scenes, tmp_path])
    assert [process.stdout.readline().strip() for _ in range(2)] == ["1", "2"]
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 75 and re.search(r"SIGUSR1 after step \d of 8", said)
    found = run_checkpoint.load_newest(tmp_path)
    assert found is not None and 2 <= found[0] < 8
    tiny.tiny_run(source, tmp_path)
    assert weights(tmp_path) == weights(unbroken)


def _assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            _assert_equal(x, y)
    else:
        assert a == b


def test_a_base_methods_run_leaves_a_teacher_for_the_next(
    tiny: ModuleType, source: ImageSource, tmp_path: Path
) -> None:
    """The chain of the paper: DINO pretrains a network, and RoB-DINO distils from it with its own head."""
    base = tiny.tiny_recipe(objective="dino", base=True, head="native", prototypes=32, drop_path=0.0)
    tiny.tiny_run(source, tmp_path / "ema", recipe=base)
    teacher = load_teacher("dino", weights=tmp_path / "ema" / "teacher.pth", image_size=32)
    assert (teacher.method, teacher.num_prototypes) == ("dino", 32)
    recipe = tiny.tiny_recipe(objective="dino", kind="cnn", drop_path=0.0)
    options = {"probe_every": 1}
    tiny.tiny_run(source, tmp_path / "rob", students=("test_resnet",), recipe=recipe, teacher=teacher, options=options)
    lines = [json.loads(line) for line in (tmp_path / "rob" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and {"probe_knn", "teacher_probe_knn"} <= set(lines[0])


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_frozen_trunk_gets_a_head(tiny: ModuleType, source: ImageSource, tmp_path: Path, name: str) -> None:
    """Nothing of the trunk moves, not its BatchNorm's statistics either, and the head learns."""
    recipe = tiny.tiny_recipe(objective="dino", base=True, head="native", prototypes=32, epochs=2, warmup_share=0.0)
    tiny.tiny_run(source, tmp_path / "real", students=(name,), recipe=tiny.tiny_recipe(kind="cnn"))
    frozen = override(recipe, {"freeze_trunk": True, "freeze_last_layer_epochs": 0})
    tiny.tiny_run(source, tmp_path / "head", students=(name,), recipe=frozen, init=tmp_path / "real")
    start, end = (load_file(tmp_path / folder / "student.safetensors") for folder in ("real", "head"))
    assert all(torch.equal(start[key], end[key]) for key in start)
    teacher = load_teacher("dino", weights=tmp_path / "head" / "teacher.pth", image_size=32)
    assert all(torch.equal(value, start[key]) for key, value in teacher.trunk.state_dict().items())
    content = read_checkpoint(tmp_path / "head" / "teacher.pth")
    for layer in ("head.mlp.0.weight", "head.mlp.4.bias", "head.last_layer.weight_v"):  # its average lags behind
        assert not torch.equal(content["student"][f"module.{layer}"], content["teacher"][layer])
    with pytest.raises(InputError, match="give --init RUN"):
        tiny.tiny_run(source, tmp_path / "none", students=(name,), recipe=frozen)


def test_a_run_starts_from_the_weights_that_it_is_given(
    tiny: ModuleType, source: ImageSource, unbroken: Path, tmp_path: Path
) -> None:
    recipe = tiny.tiny_recipe(lr=1e-9, warmup_lr=0.0, weight_decay=0.0, weight_decay_end=0.0)
    tiny.tiny_run(source, tmp_path / "on", recipe=recipe, init=unbroken)
    tiny.tiny_run(source, tmp_path / "fresh", recipe=recipe)
    start, on, fresh = (load_file(f / "student.safetensors") for f in (unbroken, tmp_path / "on", tmp_path / "fresh"))
    assert all(torch.allclose(start[name], on[name], atol=1e-6) for name in start)
    assert not any(torch.allclose(start[name], fresh[name], atol=1e-6) for name in start if name.endswith("qkv.weight"))
    sha256 = load_student(unbroken).sha256
    assert json.loads((tmp_path / "on" / "recipe.json").read_text())["init"]["sha256"] == sha256

    with pytest.raises(InputError, match="init"):  # the run that is there started from other weights
        tiny.tiny_run(source, tmp_path / "on", recipe=recipe)
    with pytest.raises(InputError, match=r"--init holds a test_vit, and the student is test_resnet"):
        tiny.tiny_run(source, tmp_path / "other", recipe=recipe, init=unbroken, students=["test_resnet"])
