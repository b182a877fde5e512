"""`robx eval` on real folders, through the command line; bundles are played by a Session over the student's trunk."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from robx.cli import main
from robx.errors import InputError
from robx.eval import evaluate
from robx.eval.datasets.features import Features
from robx.eval.datasets.splits import make_split, open_split
from robx.eval.protocols import linear
from robx.eval.protocols import run as protocols
from robx.export.image_splits import SplitSizes, read_splits
from robx.images.arrays import ArraySource
from robx.images.shards import write_shard
from robx.images.sources import labels_of, open_source
from robx.records import (
    Accuracy,
    Bundle,
    BundleFile,
    Fidelity,
    Preprocessing,
    Student,
    TensorSpec,
    load_measurements,
    load_student,
    save_bundle,
)
from robx.runtime.session import load_record, open_session
from robx.store.files import sha256_file
from robx.trunk import build_trunk, embedding_width, load_trunk, save_trunk


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    trunk = build_trunk("test_resnet")
    record = Student(
        timm_name="test_resnet", width=embedding_width(trunk), preprocessing=Preprocessing(size=36, crop=32), sha256="",
        teacher=None, data=None, recipe={},
    )  # fmt: skip
    save_trunk(folder, trunk, record)
    return folder


@pytest.fixture
def run(student, tmp_path):
    return shutil.copytree(student, tmp_path / "run")


class Noisy:
    """A Session that answers as the student does, with noise."""

    def __init__(self, record, inner, noise):
        self.bundle, self._inner, self._noise = record, inner, noise

    def run(self, images):
        rows = self._inner.run(images)
        return rows + self._noise * rows.std() * np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)

    def facts(self):
        return {"engine": "noisy", "version": "1", "provider": "cpu", "threads": 1}


@pytest.fixture
def bundle(run, monkeypatch):
    """Makes a bundle folder below the run, whose Session is the student plus noise."""
    noises = {}

    def make(name, noise, calibration=None):
        folder = run / name
        folder.mkdir()
        (folder / "model.onnx").write_bytes(name.encode())
        file = BundleFile(path="model.onnx", role="model", bytes=len(name), sha256=sha256_file(folder / "model.onnx"))
        record = Bundle(
            format="onnx", precision="int8", requested="int8", target="local", runtime="onnxruntime",
            inputs=(TensorSpec(name="pixels", dtype="float32", shape=(None, 3, 32, 32)),),
            outputs=(TensorSpec(name="embedding", dtype="float32", shape=(None, load_student(run).width)),),
            preprocessing=Preprocessing(size=36, crop=32), student=load_student(run), verdict="PASS", reason="",
            rungs=(), calibration=calibration, opset=20, versions={}, files=(file,),
        )  # fmt: skip
        save_bundle(record, folder)
        noises[folder] = noise
        return folder

    def opened(path, settings):
        if path not in noises:
            return open_session(path, settings)
        return contextlib.nullcontext(Noisy(load_record(path), open_session(run, settings), noises[path]))

    monkeypatch.setattr(evaluate, "open_session", opened)
    return make


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(linear, "LEAST_STEPS", 150)
    monkeypatch.setenv("ROBX_CACHE", str(tmp_path / "own-cache"))  # what another run left must not answer


def robx(*arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments), "--threads", "1"])


def test_the_default_is_knn_with_intervals(run, scenes, tmp_path):
    result = robx(run, "--data", scenes, "--cache", tmp_path / "cache", "--json")
    assert result.exit_code == 0, result.output
    (record,) = load_measurements(run / "measurements.jsonl")
    assert json.loads(result.stdout) == json.loads((run / "measurements.jsonl").read_text())
    assert isinstance(record, Accuracy) and record.protocol == "knn"
    assert record.model_id == load_student(run).sha256[:16]
    assert record.data.fingerprint == open_source(scenes, split="test").fingerprint and record.data.images == 32
    assert record.settings["bank"]["images"] == 64 and record.device["engine"] == "torch"
    assert all(value.low is not None and value.high is not None for value in record.values.values())
    assert record.values["top1"].n == 32


def test_shards_give_the_same_as_their_own_protocols(run, scene_shards):
    result = robx(run, "--data", scene_shards, "--no-cache", "--knn", "--lowshot", "1,10%", "--linear", "--cached")
    assert result.exit_code == 0, result.output
    records = {record.protocol: record for record in load_measurements(run / "measurements.jsonl")}
    assert set(records) == {"knn", "lowshot:1", "lowshot:10%", "linear-cached"}
    assert records["linear-cached"].values["top1"].value > 20  # eight classes: chance is about 13
    assert records["lowshot:1"].settings["splits"] == "drawn by robx, seed 0"
    assert len(records["lowshot:1"].settings["images"]) == 3
    assert re.search(r"knn.*\d+\.\d+ \[", " ".join(result.stdout.split())) and "images" in result.stdout


def test_a_second_run_is_answered_by_the_cache(run, scenes, tmp_path, monkeypatch):
    first = robx(run, "--data", scenes, "--cache", tmp_path / "cache", "--json")
    monkeypatch.setattr(evaluate, "open_session", lambda path, settings: _never(open_session(path, settings)))
    second = robx(run, "--data", scenes, "--cache", tmp_path / "cache", "--json")
    assert second.exit_code == 0, second.output
    assert json.loads(first.stdout)["values"] == json.loads(second.stdout)["values"]


def test_a_width_that_is_not_the_networks_is_refused_before_the_cache_answers(run, scenes, tmp_path):
    assert robx(run, "--data", scenes, "--cache", tmp_path / "cache").exit_code == 0
    (run / "student.json").write_text((run / "student.json").read_text().replace('"width": 96', '"width": 256'))
    result = robx(run, "--data", scenes, "--cache", tmp_path / "cache")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "student.json says 256 but the network gives 96" in result.stderr
    assert len(load_measurements(run / "measurements.jsonl")) == 1


def _never(session):
    def run(images):
        raise AssertionError("the cache should have answered")

    session.run = run
    return session


def test_bundles_are_judged_against_their_student(run, bundle, scene_shards):
    good, bad = bundle("good", 0.0), bundle("bad", 3.0)
    result = robx(good, bad, "--data", scene_shards, "--fidelity", "--no-cache", "--margin", "20")
    assert result.exit_code == 0, result.output
    (kept,), (ruined,) = (load_measurements(folder / "measurements.jsonl") for folder in (good, bad))
    assert isinstance(kept, Fidelity) and kept.verdict == "PASS" and ruined.verdict != "PASS"
    assert kept.values["probe_drop"].value == 0 and kept.values["cosine_mean"].value == pytest.approx(1)
    assert ruined.values["cosine_mean"].value < 0.6
    assert kept.bundle_id != ruined.bundle_id and kept.settings["margin"] == 20
    raw, adjusted = (ruined.values[f"probe_mcnemar_p{suffix}"].value for suffix in ("", "_holm"))
    assert adjusted == pytest.approx(min(1, 2 * raw))  # the smaller of two is doubled
    assert "retrained_probe_drop" in kept.values and not (run / "measurements.jsonl").exists()
    assert "PASS" in result.stdout
    assert kept.values["cka"].value == pytest.approx(1) and ruined.values["similarity_spearman"].value < 0.9
    assert kept.values["repeat_max_abs"].value == 0 and kept.values["repeat_max_abs"].n == 8


def test_a_bundle_that_answers_differently_each_time_is_told_of(bundle, scene_shards, monkeypatch):
    folder, rng = bundle("moody", 0.0), np.random.default_rng(1)
    plain = Noisy.run
    monkeypatch.setattr(Noisy, "run", lambda self, images: plain(self, images) + rng.normal() * np.float32(1e-3))
    assert robx(folder, "--data", scene_shards, "--fidelity", "--knn", "--no-cache").exit_code == 0
    knn, compared = load_measurements(folder / "measurements.jsonl")
    assert 0 < compared.values["repeat_max_abs"].value < 0.01
    assert compared.values["repeat_max_abs"].value == knn.settings["repeat_max_abs"]
    assert "not deterministic" in compared.reasons[-1]


def test_test_images_that_training_holds_too_are_counted_and_warned_of(run, scenes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "data")
    assert robx(run, "--data", data, "--no-cache").output.count("warning") == 0
    taken = sorted((data / "train").rglob("*.png"))[:3]
    for number, path in enumerate(taken):
        place = data / "test" / path.parent.name / f"copy{number}.png"
        if number == 2:
            Image.open(path).resize((60, 60), Image.Resampling.BICUBIC).save(place)
        else:
            shutil.copy(path, place)
    result = robx(run, "--data", data, "--no-cache", "--lowshot", "1", "--knn")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("warning: 3 of 35 test images look like a training image (2 with the same pixels)") == 1
    first, *later = load_measurements(run / "measurements.jsonl")
    assert first.settings["look_alikes"] == {"images": 32, "identical": 0, "near": 0}
    assert [r.settings["look_alikes"] for r in later] == [{"images": 35, "identical": 2, "near": 1}] * 2


def test_one_class_repeated_pixels_and_contradicting_labels_are_warned_of(run, scenes, tmp_path):
    data = tmp_path / "data"
    classes = sorted(path.name for path in (scenes / "train").iterdir())[:2]
    for split in ("train", "test"):
        shutil.copytree(scenes / split / classes[0], data / split / classes[0])
    said = robx(run, "--data", data, "--no-cache").stderr
    assert f"warning: all training images are of one class, {classes[0]}: the accuracy is 100 % by definition" in said
    for split in ("train", "test"):
        shutil.copytree(scenes / split / classes[1], data / split / classes[1])
    first = min((data / "test" / classes[0]).iterdir())
    for name in ("a.png", "b.png"):
        shutil.copy(first, data / "test" / classes[0] / name)
    shutil.copy(first, data / "test" / classes[1] / "c.png")
    said = robx(run, "--data", data, "--no-cache").stderr
    assert re.search(r"warning: 3 of \d+ images of \S+ repeat the pixels of another one", said), said
    assert "warning: 4 images with the same pixels have different labels: correct the labels" in said
    assert "one class" not in said


def test_the_default_margin_is_more_than_48_images_can_show(bundle, scene_shards):
    same = bundle("same", 0.0)
    assert robx(same, "--data", scene_shards, "--fidelity", "--no-cache").exit_code == 0
    (record,) = load_measurements(same / "measurements.jsonl")
    assert record.verdict == "INCONCLUSIVE" and record.settings["images_needed"] == 268


def calibrated_on(folder, **splits):
    """The record that export writes of a calibration on images of `folder`."""
    pre = Preprocessing(size=36, crop=32)
    train = open_source(folder, **splits)
    return read_splits(train, None, pre, sizes=SplitSizes(calibration=20, bank=20, judging=20, least=4)).record()


@pytest.mark.parametrize("protocol", ["--fidelity", "--knn"])
def test_a_bundle_calibrated_on_the_judged_images_is_refused(bundle, scenes, protocol):
    cheat = bundle("cheat", 0.0, calibrated_on(scenes / "test"))
    result = robx(cheat, "--data", scenes, protocol, "--no-cache")
    assert result.exit_code == 2 and "calibrated on the test set test" in result.output
    assert not (cheat / "measurements.jsonl").exists()
    honest = bundle("honest", 0.0, calibrated_on(scenes, split="train"))
    assert robx(honest, "--data", scenes, protocol, "--no-cache").exit_code == 0


def test_unlabelled_test_images_do_not_hide_a_calibration(bundle, scenes, tmp_path):
    images, shards = open_source(scenes, split="test"), tmp_path / "judged"
    shards.mkdir()
    names = open_source(scenes, split="train").classes
    samples = []
    for index in range(len(images)):
        buffer = io.BytesIO()
        images.read(index).save(buffer, "PNG")
        label = names.index(images.classes[images.label(index)])
        samples.append((f"{index:04d}.png", buffer.getvalue(), label if index else None))
    write_shard(shards / "test-00000.tar", samples)
    (shards / "classes.json").write_text(json.dumps(names))
    cheat = bundle("cheat", 0.0, calibrated_on(shards))
    result = robx(cheat, "--data", scenes / "train", "--test", shards, "--no-cache")
    assert result.exit_code == 2 and "calibrated on the test set judged" in result.output, result.output


def test_a_bundle_away_from_its_student_needs_the_reference(run, bundle, scene_shards, tmp_path):
    folder = bundle("lone", 0.0)
    lone = load_record(folder)
    assert evaluate.find_reference(folder, lone, None) == run.resolve()
    away = tmp_path / "away" / "lone"
    away.parent.mkdir()
    shutil.copytree(folder, away)
    with pytest.raises(InputError, match="--reference"):
        evaluate.find_reference(away, lone, None)
    assert evaluate.find_reference(away, lone, run) == run
    elsewhere = shutil.copytree(run, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("lone"))
    unused = robx(folder, "--data", scene_shards, "--fidelity", "--reference", tmp_path)
    assert unused.exit_code == 2 and f"--reference {tmp_path} is the student of none of the bundles" in unused.output
    same = robx(folder, "--data", scene_shards, "--fidelity", "--reference", elsewhere, "--no-cache")
    assert same.exit_code == 0, same.output


def test_a_transfer_is_trained_on_its_own_data(run, scenes):
    result = robx(run, "--transfer", f"folder={scenes}", "--cached", "--no-cache", "--json")
    assert result.exit_code == 0, result.output
    (record,) = load_measurements(run / "measurements.jsonl")
    assert record.protocol == "transfer-cached:folder" and record.settings["recipe"]["epochs"] == 28
    assert "is not used" not in result.stderr
    other = robx(run, "--data", scenes / "train", "--transfer", f"folder={scenes}", "--cached", "--no-cache")
    assert other.exit_code == 0 and f"warning: --data {scenes / 'train'} is not used" in other.stderr


def test_test_classes_are_numbered_as_the_banks(scenes, tmp_path):
    # The test folder lacks the first class, so its own numbers are one too small.
    shutil.copytree(scenes, tmp_path / "data")
    first = sorted(p.name for p in (tmp_path / "data" / "train").iterdir())[0]
    shutil.rmtree(tmp_path / "data" / "test" / first, ignore_errors=True)
    split = open_split(tmp_path / "data" / "train", tmp_path / "data" / "test")
    own = [split.test.classes[split.test.label(i)] for i in range(len(split.test))]
    found = Features(
        features=np.zeros((len(own), 1), np.float32), labels=labels_of(split.test),
        indices=np.arange(len(own)), skipped=0,
    )  # fmt: skip
    assert [split.names[label] for label in split.aligned(found).labels] == own


def test_a_class_without_a_test_image_may_have_another_name(tmp_path):
    """As in a cut-down list of Places205, where a class is named after the folder of its images."""
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    bank = ArraySource("bank", pixels, np.array([0, 1, 2]), ("abbey", "airport", "alley"))
    test = ArraySource("test", pixels, np.array([0, 2, 2]), ("abbey", "1", "alley"))
    assert make_split(bank, test).renumber.tolist() == [0, -1, 2]
    strange = ArraySource("strange", pixels + 1, np.array([0, 1, 2]), ("abbey", "1", "alley"))
    with pytest.raises(InputError, match="strange has the class '1', which bank lacks"):
        make_split(bank, strange)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no images to evaluate on"),
        (("--data", "{scenes}/train"), "no train split"),
        (("--data", "{scenes}/train", "--test", "{scenes}/train"), "is both the training and the test set"),
        (("--data", "{scenes}/nowhere"), "does not exist"),
        (("--data", "{scenes}", "--lowshot", "1,x"), "low-shot 'x'"),
        (("--data", "{scenes}", "--lowshot", "500"), "low-shot needs 500"),
        (("--data", "{scenes}", "--fidelity"), "no bundle was given"),
        (("--data", "{scenes}", "--transfer", "imagenet"), "unknown transfer 'imagenet'"),
        (("--transfer", "cifar10"), "--transfer cifar10=DIR"),
        (("--data", "{scenes}", "--cache", "x", "--no-cache"), "contradict"),
        (("--data", "{scenes}", "--lowshot-splits", "{scenes}"), "give --lowshot too"),
        (("--data", "{scenes}", "--reference", "{scenes}"), "give --fidelity too"),
        (("--data", "{scenes}", "--cached"), "give --linear or --transfer too"),
        (("--data", "{scenes}", "--margin", "2"), "give --fidelity too"),
        (("--transfer", "folder={scenes}", "--test", "{scenes}"), "--test: not used by --transfer"),
        (
            ("--transfer", "folder={scenes}", "--labels", "x.csv", "--image-member", "x"),
            "--labels, --image-member: not",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, scenes, arguments, message):
    result = robx(run, *(argument.format(scenes=scenes) for argument in arguments))
    assert result.exit_code == 2 and message in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (run / "measurements.jsonl").exists()


@pytest.mark.parametrize("margin", ["0", "-1", "100", "nan"])
def test_a_margin_that_cannot_be_tested_is_refused_before_anything_is_embedded(bundle, scenes, margin, monkeypatch):
    monkeypatch.setattr(evaluate, "open_session", None)
    result = robx(bundle("x", 0.0), "--data", scenes, "--fidelity", "--margin", margin)
    assert result.exit_code == 2 and "must be a number" in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--save-head", __file__ + "/head"), "is not a folder: give --save-head in another folder"),
        (("--cache", __file__), "is not a folder: give --cache another folder"),
        ((), "is read-only: copy the model elsewhere"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_embedded(run, scenes, more, said, monkeypatch):
    monkeypatch.setattr(evaluate, "open_session", None)
    real = os.access

    def access(path, mode, **how):
        return not (Path(path) == run and mode & os.W_OK) and real(path, mode, **how)

    if not more:
        monkeypatch.setattr(os, "access", access)
    result = robx(run, "--data", scenes, *(each.format(scenes=scenes) for each in more))
    assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1, result.output


def test_a_folder_that_robx_did_not_write_is_refused(tmp_path, scenes):
    result = robx(tmp_path, "--data", scenes)
    assert result.exit_code == 2 and "neither a bundle" in result.output


def test_clevr_distance_sees_the_whole_image(run, tmp_path, monkeypatch):
    root = tmp_path / "CLEVR_v1.0"
    for part, n in (("train", 12), ("val", 6)):
        listed = []
        for index in range(n):
            name = f"CLEVR_{part}_{index:06d}.png"
            path = root / "images" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((40, 60, 3), np.uint8)
            pixels[:, :4] = 255  # an edge that a centre crop would cut off
            Image.fromarray(pixels).save(path)
            listed.append({"image_filename": name, "objects": [{"pixel_coords": [0, 0, 7.9 + 0.4 * (index % 3)]}] * 3})
        (root / "scenes").mkdir(exist_ok=True)
        (root / "scenes" / f"CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": listed}))
    seen = []

    class Seeing(protocols.TrunkSession):
        def run(self, images):
            seen.append(images)
            return super().run(images)

    monkeypatch.setattr(protocols, "TrunkSession", Seeing)
    result = robx(run, "--transfer", f"clevr_dist={root}", "--cached", "--no-cache")
    assert result.exit_code == 0, result.output
    (record,) = load_measurements(run / "measurements.jsonl")
    assert record.protocol == "transfer-cached:clevr_dist" and record.settings["classes"] == 6
    assert sum(len(images) for images in seen) == 18
    for images in seen:
        assert images.shape[1:] == (3, 32, 32) and (images[:, :, :, 0] > 1.5).all() and (images[:, :, :, 8] < 0).all()


@pytest.mark.parametrize("protocol", ["--knn", "--lowshot=1", "--linear"])
def test_a_model_that_returns_nan_is_refused_and_nothing_is_recorded(run, scenes, protocol):
    record, trunk = load_trunk(run)
    next(trunk.parameters()).data.fill_(float("nan"))
    save_trunk(run, trunk, record)
    result = robx(run, "--data", scenes, protocol, "--no-cache")
    assert result.exit_code == 2 and "returns NaN or infinity for 96 of 96 images" in result.output
    assert result.output.count("robx: ") == 1 and not (run / "measurements.jsonl").exists()


def test_a_transfers_data_folder_need_not_have_the_splits_of_the_other_protocols(run, tmp_path):
    for split, n in (("train", 8), ("test", 4)):
        for label in ("a", "b"):
            for index in range(n):
                path = tmp_path / "d" / "fashion" / split / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (20 * index, 200 if label == "a" else 0, 9)).save(path)
    result = robx(run, "--data", tmp_path / "d", "--transfer", f"folder={tmp_path / 'd' / 'fashion'}", "--cached")
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
@pytest.mark.parametrize("gigabytes", [1.6, 3.0, 4.0])
def test_a_limit_of_memory_ends_in_one_line(run, scenes, gigabytes):
    import resource

    limit = int(gigabytes * 1e9)
    command = [sys.executable, "-m", "robx.cli", "eval", str(run), "--data", str(scenes), "--no-cache"]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit,) * 2)
    )
    if done.returncode and "OpenBLAS error" not in done.stderr:  # which ends the process by itself
        said = [line for line in done.stderr.splitlines() if line.startswith("robx: ")]
        assert done.returncode == 2 and len(said) == 1, done.stderr
        # A library in Rust that runs out of memory prints its own lines before robx's.
        assert "Traceback" not in done.stderr or "panicked at" in done.stderr, done.stderr


def flat(scenes, folder, *, label=lambda path: path.parent.name):
    """The scenes as train/ and test/ without class folders, and label file rows of (path, label)."""
    rows = []
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for number, path in enumerate(sorted((scenes / split).rglob("*.png"))):
            shutil.copy(path, folder / split / f"{number:03d}.png")
            rows.append((f"{split}/{number:03d}.png", label(path)))
    return rows


def test_labels_in_a_file_give_what_class_folders_give(run, scenes, tmp_path):
    rows = flat(scenes, tmp_path / "flat")
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    as_folders = robx(run, "--data", scenes, "--no-cache", "--json")
    bare = robx(run, "--data", tmp_path / "flat", "--no-cache")
    assert bare.exit_code == 2 and "has no labels" in bare.output and "--labels FILE" in bare.output
    found = robx(run, "--data", tmp_path / "flat", "--labels", tmp_path / "labels.csv", "--no-cache", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["values"] == json.loads(as_folders.stdout)["values"]
    apart = ("--data", tmp_path / "flat" / "train", "--test", tmp_path / "flat" / "test")
    found = robx(run, *apart, "--labels", tmp_path / "labels.csv", "--no-cache", "--json")
    assert json.loads(found.stdout)["values"] == json.loads(as_folders.stdout)["values"]


def test_other_labels_are_not_answered_by_the_cache(run, scenes, tmp_path):
    rows = flat(scenes, tmp_path / "flat")
    values = []
    for name, swap in (("a.csv", {}), ("b.csv", {rows[0][1]: rows[-1][1]})):
        (tmp_path / name).write_text("".join(f"{path},{swap.get(label, label)}\n" for path, label in rows))
        result = robx(
            run, "--data", tmp_path / "flat", "--labels", tmp_path / name, "--cache", tmp_path / "c", "--json"
        )
        assert result.exit_code == 0, result.output
        values.append(json.loads(result.stdout))
    assert values[0]["settings"]["classes"] == values[1]["settings"]["classes"] + 1


def test_images_that_the_file_leaves_out_are_counted_and_not_evaluated(run, scenes, tmp_path):
    rows = flat(scenes, tmp_path / "flat")
    (tmp_path / "labels.csv").write_text("".join(f"{path},{label}\n" for path, label in rows[3:]))
    result = robx(run, "--data", tmp_path / "flat", "--labels", tmp_path / "labels.csv", "--no-cache")
    assert result.exit_code == 0, result.output
    assert "3 of 64 images have no label in labels.csv" in " ".join(result.stderr.split())
    (record,) = load_measurements(run / "measurements.jsonl")
    assert record.settings["bank"]["images"] == 61


def test_a_label_file_does_not_hide_a_calibration_on_the_test_set(bundle, scenes, tmp_path):
    rows = flat(scenes, tmp_path / "flat")
    (tmp_path / "labels.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))
    cheat = bundle("cheat", 0.0, calibrated_on(tmp_path / "flat" / "test"))
    result = robx(cheat, "--data", tmp_path / "flat", "--labels", tmp_path / "labels.csv", "--no-cache")
    assert result.exit_code == 2 and "was calibrated on the test set test" in result.output, result.output


def test_a_stray_image_beside_class_folders_is_named(run, scenes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "data")
    first = next((data / "train").rglob("*.png"))
    shutil.copy(first, data / "train" / "stray.png")
    result = robx(run, "--data", data, "--no-cache")
    assert result.exit_code == 0, result.output
    assert "beside its folders" in result.stderr and "stray.png" in result.stderr
    (record,) = load_measurements(run / "measurements.jsonl")
    assert record.settings["bank"]["images"] == 64
    for number in range(20):
        shutil.copy(first, data / "train" / f"stray{number}.png")
    result = robx(run, "--data", data, "--no-cache")
    assert result.exit_code == 2 and "stray.png" in result.output and "has no labels" in result.output


def test_an_unlabelled_test_folder_gives_way_to_val(run, scenes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "data")
    (data / "test").rename(data / "val")
    (data / "test").mkdir()
    shutil.copy(next((data / "val").rglob("*.png")), data / "test" / "0.png")
    result = robx(run, "--data", data, "--no-cache")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "val" in said and "has no labels" in said
    (record,) = load_measurements(run / "measurements.jsonl")
    assert record.data.name == "val" and record.data.images == 32


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "validation"), ("TRAIN", "dev"), ("trn", "valid")])
def test_splits_are_known_by_their_usual_names(run, scenes, tmp_path, names):
    for split, name in zip(("train", "test"), names, strict=True):
        shutil.copytree(scenes / split, tmp_path / "data" / name)
    result = robx(run, "--data", tmp_path / "data", "--no-cache", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["settings"]["bank"]["images"], record["data"]["images"]) == (64, 32)


def test_several_images_in_a_sample_are_refused_unless_one_is_named(run, scenes, tmp_path):
    names = sorted(path.name for path in (scenes / "train").iterdir())
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for number, path in enumerate(sorted((scenes / split).rglob("*.png"))):
                masked = io.BytesIO()
                Image.new("RGB", (40, 40)).save(masked, "PNG")
                label = str(names.index(path.parent.name)).encode()
                members = (("rgb.png", path.read_bytes()), ("mask.png", masked.getvalue()), ("CLS", label))
                for suffix, content in members:
                    info = tarfile.TarInfo(f"s{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    refused = robx(run, "--data", tmp_path, "--no-cache")
    assert refused.exit_code == 2 and "rgb.png" in refused.output and "mask.png" in refused.output, refused.output
    found = robx(run, "--data", tmp_path, "--image-member", "rgb.png", "--no-cache", "--json")
    assert found.exit_code == 0, found.output
    as_folders = robx(run, "--data", scenes, "--no-cache", "--json")
    assert json.loads(found.stdout)["values"] == json.loads(as_folders.stdout)["values"]


def test_the_device_goes_to_every_model_and_to_the_search(run, scenes, monkeypatch):
    seen = []
    real = evaluate.open_session
    monkeypatch.setattr(
        evaluate, "open_session", lambda path, how: seen.append(how.provider) or real(path, replace(how, provider=None))
    )
    monkeypatch.setattr(
        evaluate, "knn_accuracy", lambda *given, search, **rest: seen.append(search.keywords["device"]) or {}
    )
    trunks = protocols.TrunkSession
    monkeypatch.setattr(
        protocols, "TrunkSession", lambda *given, device, **rest: seen.append(device) or trunks(*given, **rest)
    )
    robx(run, "--data", scenes, "--no-cache", "--knn", "--linear", "--cached", "--device", "cuda")
    # The trunk of the linear protocol is on the device of the model's own session, which is real here.
    assert seen == ["cuda", "cuda", "cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(run, scenes):
    for device, said in (("cuda", "no CUDA device"), ("tpu", "torch runs on cpu, cuda, and 'tpu' was asked for")):
        result = robx(run, "--data", scenes, "--no-cache", "--device", device)
        assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1


def test_two_processes_write_what_one_does_and_so_does_their_cache(run, scenes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "data")
    for number, path in enumerate(sorted((data / "train").rglob("*.png"))):
        if number in (3, 10):
            path.write_bytes(b"damaged")
    how = ("--data", data, "--knn", "--lowshot", "1")
    alone = robx(run, *how, "--no-cache")
    assert alone.exit_code == 0, alone.output
    expected = load_measurements(run / "measurements.jsonl")
    (run / "measurements.jsonl").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "robx.cli"]
    more = ("--threads", "1", "--cache", tmp_path / "cache")
    for _ in range(2):  # the second time answered by the cache
        done = subprocess.run(
            [*command, "eval", str(run), *map(str, how), *map(str, more)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    found = load_measurements(run / "measurements.jsonl")
    assert len(found) == 2 * len(expected)
    for one, other in zip(2 * expected, found, strict=True):
        assert one.protocol == other.protocol and one.data == other.data
        assert one.values == other.values and one.settings == other.settings
    assert done.stdout.count("knn") == 1 and done.stderr.count("2 of 64 images of train cannot be read") == 1
