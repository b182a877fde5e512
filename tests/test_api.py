"""The Python API: cheap to import, the same pixels as the commands, and README's snippet as it stands."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

import robx.distill.train
import robx.eval.evaluate
import robx.export.build
import robx.runtime.bench.bench
from robx import api
from robx.distill.resolve import DistillSettings
from robx.distill.training.run import Options
from robx.errors import CorruptImage, DeviceError, InputError
from robx.eval.evaluate import EvalSettings
from robx.export.build import ExportSettings
from robx.export.gate.gate import Limits
from robx.export.heal.heal import HealSettings
from robx.export.request import ExportTarget
from robx.images.decode import decode, preprocess, read_image_file
from robx.images.sources import open_source
from robx.images.transform import torchvision_transform
from robx.progress import Fact
from robx.random_state import kept_random_state
from robx.records import Preprocessing, Student, load_student
from robx.runtime.bench.profiles import BenchSettings
from robx.runtime.session import SessionSettings
from robx.ship.plan import check_keys, make_plan
from robx.trunk import build_trunk, embedding_width, load_trunk, save_trunk

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with random weights, of 32-px images."""
    torch.manual_seed(3)
    folder, trunk = tmp_path_factory.mktemp("run"), build_trunk("test_resnet")
    student = Student(
        timm_name="test_resnet",
        width=embedding_width(trunk),
        preprocessing=Preprocessing(size=36, crop=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)),
        sha256="",
        teacher=None,
        data=None,
        recipe={},
    )
    save_trunk(folder, trunk, student)
    return folder


@pytest.fixture(scope="module")
def photos(scenes: Path) -> list[Path]:
    return sorted((scenes / "test").rglob("*.png"))


# ------------------------------------------------------------------------------------------------------- import


def test_importing_the_api_loads_nothing_heavy() -> None:
    code = "import sys\nfrom robx import api\nprint(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & {"torch", "timm", "torchvision", "numpy", "PIL", "onnx", "onnxruntime", "click", "rich"}


# ----------------------------------------------------------------------------------------------------- settings

# keyword -> a value that is not its default
EVALUATE: dict[str, Any] = {
    "data": "images", "test": "held-out", "labels": "l.csv", "image_member": "rgb.jpg",
    "knn": True, "linear": True, "lowshot": "1,5%", "lowshot_splits": "lists",
    "transfers": ["cifar10=c"], "fidelity": True, "reference": "run", "margin": 2.0, "cached": True, "save_head": "h",
    "device": "cuda", "threads": 3, "batch": 7, "cache": "features", "no_cache": True,
}  # fmt: skip
BENCH: dict[str, Any] = {
    "device": "ssh://host", "profile": "rapid", "threads": 2, "provider": "gpu", "precision_hint": "f16",
    "processes": 4, "affinity": [0, 1], "batch": 5, "data": "images", "runner": "python", "python": "python3.9",
    "seed": 6, "retries": 1, "image_member": "rgb.jpg",
}  # fmt: skip
PATHS = {"data", "test", "lowshot_splits", "reference", "save_head", "cache", "out", "head", "labels"}


def _as_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords as a settings class holds them."""
    found = {name: Path(value) if name in PATHS else value for name, value in given.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "progress"}


def test_evaluate_takes_every_setting_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvalSettings] = []
    monkeypatch.setattr(
        robx.eval.evaluate, "evaluate", lambda settings, progress, say: seen.append(settings) or iter(())
    )
    api.evaluate(["run", Path("bundle")], **EVALUATE)
    api.evaluate("run")
    assert seen[0] == EvalSettings(models=(Path("run"), Path("bundle")), **_as_settings(EVALUATE))
    assert seen[1] == EvalSettings(models=(Path("run"),))
    assert set(_keywords(api.evaluate)) == set(EVALUATE) == {f.name for f in fields(EvalSettings)} - {"models"}


def test_bench_takes_every_setting_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BenchSettings] = []
    monkeypatch.setattr(robx.runtime.bench.bench, "bench", lambda settings, **_: seen.append(settings) or [])
    api.bench(("a", Path("b")), **BENCH)
    api.bench("a")
    of_session = {name: BENCH[name] for name in ("threads", "provider", "precision_hint")}
    others = {name: value for name, value in BENCH.items() if name not in of_session}
    assert seen[0] == BenchSettings(
        bundles=(Path("a"), Path("b")), session=SessionSettings(**of_session), **_as_settings(others)
    )
    assert seen[1] == BenchSettings(bundles=(Path("a"),))
    api.bench("a", emulated=True)  # which times nothing, so that processes and retries are refused
    assert seen[2] == BenchSettings(bundles=(Path("a"),), emulated=True)
    assert set(_keywords(api.bench)) == set(BENCH) | {"emulated"}
    assert {*others, "emulated"} == {f.name for f in fields(BenchSettings)} - {"bundles", "session"}


DISTILL: dict[str, Any] = {
    "teacher_weights": "w.pth", "objective": "dino", "init": "earlier", "recipe": "r.toml", "store_targets": "t",
    "cache": "c", "teacher": "dino_vits16", "image_member": "rgb.jpg",
}  # fmt: skip
PATHS |= {"teacher_weights", "init", "recipe", "store_targets"}


def test_distill_takes_every_setting_of_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DistillSettings] = []

    def distill(settings: DistillSettings, progress: object, say: object) -> list[Path]:
        seen.append(settings)
        return [run] * len(settings.students)

    monkeypatch.setattr(robx.distill.train, "distill", distill)
    student = api.distill(student="resnet18", data="images", out="o", epochs=3, workers=5, fresh=True, **DISTILL)
    pair = api.distill(student=["resnet18", "resnet34"], data=Path("images"), out=Path("o"), targets="stored")
    assert student == api.Artifact(run, load_student(run)) and pair == [student, student]
    assert repr(student) == f"Artifact({str(run)!r})" and f"{student}" == str(run)
    common = {"data": Path("images"), "out": Path("o")}
    assert seen[0] == DistillSettings(
        students=("resnet18",),
        options=Options(workers=5, fresh=True),
        overrides={"epochs": 3},
        **common,
        **_as_settings(DISTILL),
    )
    assert seen[1].students == ("resnet18", "resnet34") and seen[1].targets == Path("stored")
    assert set(_keywords(api.distill)) == set(DISTILL) | {"student", "data", "out", "targets"}
    others = {"students", "options", "overrides"}
    assert set(_keywords(api.distill)) == {f.name for f in fields(DistillSettings)} - others | {"student"}


EXPORT: dict[str, Any] = {
    "data": "images", "test": "held-out", "labels": "l.csv", "image_member": "rgb.jpg", "out": "bundle", "head": "h",
    "max_drop": 2.0, "min_speedup": 1.5,
    "opset": 19, "batch": 4, "target": "arm64", "uint8_input": True, "size": (96, 64), "candidates": 3, "budget": 60.0,
    "resize_in_graph": True, "input_layout": "NHWC", "input_channels": "BGR",
    "calibration_images": 30, "judging_images": 100, "heal": 5.0, "sensitivity": True, "force": True,
}  # fmt: skip


def test_export_takes_every_setting_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ExportSettings] = []

    def export(settings: ExportSettings, progress: object, say: object) -> Any:
        seen.append(settings)
        return SimpleNamespace(format="onnx", precision="int8", requested="int8")

    monkeypatch.setattr(robx.export.build, "export", export)
    bundle = api.export("run", format="onnx", int8=True, **EXPORT)
    assert (
        os.fspath(bundle) == "bundle"
        and os.fspath(api.export("run", format="onnx", fp16=True, data="i")) == "run/onnx-int8"
    )
    api.export("run", format="onnx")
    limits = Limits(max_drop=2.0, min_speedup=1.5)
    front = {"resize_in_graph": True, "input_layout": "NHWC", "input_channels": "BGR"}
    names = {"max_drop", "min_speedup", "opset", "batch", "target", "uint8_input", "size", "heal", *front}
    others = _as_settings({name: value for name, value in EXPORT.items() if name not in names})
    shape = {"batch": 4, "uint8_input": True, "size": (96, 64), **front}
    target = ExportTarget(format="onnx", precision="int8", device="arm64", opset=19, **shape)  # type: ignore[arg-type]
    assert seen[0] == ExportSettings(
        run=Path("run"), target=target, limits=limits, heal=HealSettings(minutes=5.0), **others
    )
    assert seen[1].target == ExportTarget(format="onnx", precision="fp16")
    assert seen[2] == ExportSettings(run=Path("run"), target=ExportTarget(format="onnx"))
    assert set(_keywords(api.export)) == set(EXPORT) | {"format", "int8", "fp16"}
    assert set(others) == {f.name for f in fields(ExportSettings)} - {"run", "target", "limits", "heal"}


def test_the_layout_of_the_input_may_be_spelt_as_on_the_command_line(run: Path) -> None:
    keys = {"student": run, "format": "onnx", "uint8_input": True}
    spelt = ExportSettings.of(**keys, input_layout="nhwc", input_channels="bgr")
    assert spelt == ExportSettings.of(**keys, input_layout="NHWC", input_channels="BGR")
    table = {"format": "onnx", "uint8_input": True, "input_layout": "nhwc", "input_channels": "bgr"}
    values = {"teacher": "t", "student": "s", "data": "d", "out": "o", "export": [table]}
    check_keys(make_plan(values, where="plan.toml"), api.VERBS)


def test_what_the_gate_rejects_is_said_and_the_fallback_returned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fallback = SimpleNamespace(format="onnx", precision="fp32", requested="int8", verdict="FAIL", rungs=())
    monkeypatch.setattr(robx.export.build, "export", lambda settings, **_: fallback)
    bundle = api.export("run", format="onnx", int8=True, data="images", progress=None)
    assert bundle.path == Path("run/onnx-fp32") and bundle.record is fallback  # type: ignore[comparison-overlap]
    assert "no int8 candidate passed the gate, and run/onnx-fp32 was written in fp32" in caplog.text


@pytest.mark.parametrize("call", [api.evaluate, api.bench, api.report])
def test_no_folder_at_all_is_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="no folder was given"):
        call([])


# --------------------------------------------------------------------------------------------------------- load


def test_load_gives_the_timm_model_with_its_weights_ready_to_learn(run: Path) -> None:
    model = api.load(str(run))
    expected = load_trunk(run)[1]
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(pixels), expected(pixels)) and not model.training
    assert set(model.state_dict()) == set(expected.state_dict())  # the transform is no part of the network
    model.reset_classifier(5)  # type: ignore[operator]
    model.train()(pixels).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16", "CMYK"])
def test_the_transform_gives_exactly_the_pixels_of_robx(run: Path, tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    transform = api.load(run).preprocessing
    for number, size in enumerate([(40, 50), (31, 77), (200, 33), (36, 36), (17, 400), (32, 32)]):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, size, dtype=np.uint16))
        path = tmp_path / f"{number}.{'tif' if mode == 'CMYK' else 'png'}"
        (image if mode == "I;16" else image.convert(mode)).save(path)
        ours = preprocess(decode(read_image_file(path), name="x"), load_student(run).preprocessing)
        with Image.open(path) as opened:
            assert np.array_equal(transform(opened).numpy(), ours)  # type: ignore[operator]


def test_the_transform_turns_images_upright(run: Path, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    ours = preprocess(decode(read_image_file(tmp_path / "turned.png"), name="x"), load_student(run).preprocessing)
    with Image.open(tmp_path / "turned.png") as opened:
        assert np.array_equal(api.load(run).preprocessing(opened).numpy(), ours)  # type: ignore[operator]


def test_the_transform_is_torchvisions_own_resize_crop_and_normalisation() -> None:
    wanted = Preprocessing(size=36, crop=32, interpolation="bilinear")
    plain = Compose(
        [Resize(36, InterpolationMode.BILINEAR), CenterCrop(32), ToTensor(), Normalize(wanted.mean, wanted.std)]
    )
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    assert torch.equal(torchvision_transform(wanted)(image), plain(image))


def test_the_transform_of_an_input_that_is_not_square() -> None:
    wanted = Preprocessing(size=40, crop=32, crop_width=64)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    found = torchvision_transform(wanted)(image)
    assert found.shape == (3, 32, 64) and np.array_equal(found.numpy(), preprocess(image, wanted))


def test_the_transform_serves_in_the_workers_of_a_data_loader(run: Path) -> None:
    transform = api.load(run).preprocessing
    image = Image.new("RGB", (50, 40), "red")
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))  # type: ignore[operator]
    assert "ResizeAndCrop(size=36, crop=(32, 32), interpolation='bicubic')" in repr(transform)


def test_load_refuses_what_is_not_a_student(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a student .* give a folder that robx distill wrote"):
        api.load(tmp_path)


# --------------------------------------------------------------------------------------------------------- open


def test_embed_takes_paths_images_and_arrays_alike(run: Path, photos: list[Path], scenes: Path) -> None:
    record, trunk = load_trunk(run)
    images = [Image.open(path) for path in photos]
    pixels = np.stack([preprocess(image.convert("RGB"), record.preprocessing) for image in images])
    with torch.inference_mode():
        expected = trunk(torch.from_numpy(pixels)).numpy()
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    source = open_source(scenes / "test")
    assert [str(scenes / "test" / source.key(i)) for i in range(len(source))] == [str(p) for p in photos]
    with api.open(str(run)) as model:
        given = (photos, [str(p) for p in photos], str(scenes / "test"), images, iter(images), arrays, list(arrays))
        for one in (*given, pixels, [pixels]):
            found = model.embed(one)
            assert found.dtype == np.float32 and found.shape == (32, record.width)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        for one in (photos[0], str(photos[0]), images[0], arrays[0], arrays[:1]):
            np.testing.assert_allclose(model.embed(one), expected[:1], rtol=1e-4, atol=1e-5)
        assert model.record == record
    for image in images:
        image.close()


def test_embed_runs_preprocessed_arrays_in_batches_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = load_student(run)
    pixels = np.random.default_rng(0).normal(size=(5, 3, *record.preprocessing.shape)).astype(np.float32)
    with api.open(run) as model:
        whole, plain, sizes = model.embed(pixels, batch=5), model._session.run, []
        monkeypatch.setattr(model._session, "run", lambda images: sizes.append(len(images)) or plain(images))
        np.testing.assert_allclose(model.embed([pixels[:3], pixels[3:]], batch=2), whole, rtol=1e-4, atol=1e-5)
        assert sizes == [2, 1, 2]
        with pytest.raises(InputError, match="batch is 0: it must be at least 1"):
            model.embed(pixels, batch=0)
        monkeypatch.setattr(model._session, "run", lambda images: plain(images) * np.nan)
        with pytest.raises(DeviceError, match="the output for image 0 contains NaN"):
            model.embed(pixels, batch=2)


def test_preprocessed_pixels_that_no_image_has_are_refused_or_warned_of(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Means of .5, .4, .3 and stds of .2, .25, .3 leave (0 - .5) / .2 = -2.5 to (1 - .5) / .2 = 2.5.
    extreme = np.full((1, 3, *load_student(run).preprocessing.shape), 2.5, np.float32)
    with api.open(run) as model:
        for number in (np.nan, np.inf):
            with pytest.raises(InputError, match="array 1 contains NaN or infinity"):
                model.embed([extreme, extreme * number])
        model.embed([extreme, -extreme])
        assert not caplog.messages
        model.embed([extreme, 60 * extreme])
    assert (
        "array 1 has values from -2.5 to 150, and preprocessed pixels of this model are in -2.5 to 2.5" in caplog.text
    )


def test_a_call_leaves_the_random_numbers_of_the_caller_alone(run: Path, photos: list[Path]) -> None:
    import random

    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    def draw_and_load(**_: Any) -> None:
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    before = states()
    api.load(run)
    with api.open(run) as model:
        model.embed(photos[:2])
    assert states() == before
    draw_and_load()
    assert all(now != then for now, then in zip(states(), before, strict=True)), "the comparison sees each generator"
    before = states()
    kept_random_state()(draw_and_load)()
    assert states() == before


def test_a_path_may_start_in_the_home_directory(
    run: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    assert api.load(f"~/{run.name}").preprocessing and api.load(Path("~") / run.name)
    monkeypatch.setenv("HOME", str(photos[0].parent))
    with api.open(run) as model:
        assert model.embed(f"~/{photos[0].name}").shape[0] == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = make_plan(
        {
            "teacher": "t",
            "student": "s",
            "data": "~/images",
            "out": "~",
            "export": [{"format": "onnx"}],
            "distill": {"init": "~/run"},
        },
        where="it",
    )
    assert (plan.data, plan.out, plan.distill["init"]) == (tmp_path / "images", tmp_path, str(tmp_path / "run"))


def test_messages_of_a_call_name_its_arguments(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with api._reporting(None, api.distill) as (_, say):
        say(Fact("runs/r holds the complete run: give --fresh to start over"))
    assert caplog.messages == ["runs/r holds the complete run: give fresh to start over"]
    assert isinstance(caplog.records[0].msg, Fact), "which --quiet leaves out"


def test_embed_refuses_what_is_no_image_and_names_it(run: Path, photos: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(photos[0].read_bytes()[:60])
    with api.open(run) as model:
        for images, error, words in (
            ([photos[0], bad], CorruptImage, "bad.png"),
            (tmp_path / "missing.png", InputError, "missing.png"),
            ([], InputError, "no image"),
            (np.zeros((3, 32, 32), np.uint8), InputError, r"array 0 is uint8 \(3, 32, 32\): give uint8 \(H, W, 3\)"),
            (np.zeros((32, 32, 3)), InputError, "array 0 is float64"),
            ([photos[0], 7], InputError, "image 1 is of type int: give a path"),
            (None, InputError, "images is of type NoneType: give a path, a PIL image, an array or a list of these"),
            (5, InputError, "images is of type int: give a path"),
            (b"photo", InputError, "images is of type bytes: give a path"),
            ("", InputError, "image 0 is an empty path"),
            (Image.fromarray(np.full((9, 9), np.nan, np.float32)), CorruptImage, "^image 0: .* NaN .*: leave it out"),
            (tmp_path, CorruptImage, "bad.png: .*: leave it out, or let robx run --out FILE.npz skip such images"),
            ([photos[0], np.zeros((1, 3, 32, 32), np.float32)], InputError, "mixed"),
        ):
            with pytest.raises(error, match=words):
                model.embed(images)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="batch must be a whole number, got '8'"):
            model.embed(photos[0], batch="8")  # type: ignore[arg-type]
