"""`robx bench`, `robx run` and `robx doctor` on the command line."""

import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from robx.images.decode import decode, preprocess
from robx.records import SUPERSEDED, load_measurements, to_json
from robx.runtime import doctor
from robx.runtime.bench.latency import paired_ratio
from robx.runtime.bench.profiles import BenchSettings
from robx.runtime.infer import top_labels
from robx.runtime.session import open_session
from robx.store.files import sha256_file

WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import dataclasses
from robx.cli import main
from robx.runtime.bench.profiles import PROFILES
PROFILES["rapid"] = dataclasses.replace(PROFILES["rapid"], seconds=0.4, warm_up_limit=0.1)
main()
"""


def test_bench_prints_a_table_and_writes_records(call, make_bundle, short_profile):
    first, second = make_bundle("onnx-fp32"), make_bundle("[odd] name", runtime="openvino")
    result = call("bench", first, second, "--profile", "rapid")
    assert result.exit_code == 0, result.output
    assert "p90 bound" in result.output and "onnx-fp32" in result.output and "[odd] name" in result.output
    assert "not for publication" in result.output
    assert len(load_measurements(first / "measurements.jsonl")) == 1


def test_bench_prints_json_lines(call, make_bundle, short_profile):
    cores = sorted(os.sched_getaffinity(0))[:2]
    affinity = ",".join(map(str, cores))
    result = call("bench", make_bundle(), "--profile", "rapid", "--json", "--threads", 2, "--affinity", affinity)
    record = json.loads(result.stdout.strip().splitlines()[-1])
    assert record["kind"] == "latency" and record["settings"]["threads"] == 2
    assert record["settings"]["affinity"] == cores


def test_bench_of_a_broken_model_exits_with_status_3(call, make_bundle, short_profile):
    make_bundle("onnx-fp32")
    folder = make_bundle("onnx-int8", precision="int8", kernel=np.zeros((8, 3, 3, 3), np.float32))
    result = call("bench", folder, "--profile", "rapid", "--processes", 1)
    assert result.exit_code == 3
    assert "output_mismatch" in result.output


def test_bench_ab_of_a_broken_model_claims_nothing(call, make_bundle, short_profile):
    plain = make_bundle("onnx-fp32")
    broken = make_bundle("onnx-int8", precision="int8", kernel=np.zeros((8, 3, 3, 3), np.float32))
    for pair in ((plain, broken), (broken, plain)):
        result = call("bench", *pair, "--ab", "--profile", "rapid")
        assert result.exit_code == 3 and "INVALID" in result.output
        assert "same for every image (onnx-int8)" in result.output
        assert "faster" not in result.output and "slower" not in result.output


def test_a_bundle_in_whose_place_an_export_was_refused_is_named(call, make_bundle, short_profile, tmp_path):
    sound, refused = make_bundle("onnx-fp32"), make_bundle("onnx-int8")
    (refused / SUPERSEDED).touch()
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    warning = f"warning: {refused}: a later export in its place was refused by the gate: export again, or remove it"
    one_try = ("--profile", "rapid", "--retries", 0)
    for command in (
        ("bench", sound, refused, *one_try, "--processes", 1),
        ("bench", sound, refused, *one_try, "--ab"),
        ("run", refused, tmp_path / "a.png"),
        ("inspect", refused),
    ):
        said = call(*command).stderr
        assert [line for line in said.splitlines() if "warning" in line] == [warning], said
    assert "warning" not in call("inspect", sound).stderr


def test_an_ab_ratio_can_be_recomputed_from_its_samples(call, make_bundle, short_profile):
    first, other = make_bundle("onnx-fp32"), make_bundle("openvino-fp32", runtime="openvino")
    told = json.loads(call("bench", first, other, "--ab", "--profile", "rapid", "--json").output)
    assert sha256_file(other / told["samples"]) == told["samples_sha256"]
    with np.load(other / told["samples"]) as arrays:
        sides = [[arrays[f"{side}_{i}"] for i in range(20)] for side in ("bundle", "against")]
    assert told["ratio"] == to_json(paired_ratio(*sides))
    assert [facts["engine"] for facts in told["runtime"]] == ["openvino", "onnxruntime"]


def test_bench_ab(call, make_bundle, short_profile):
    small, large = make_bundle("small"), make_bundle("large", kernel=np.ones((8, 3, 3, 3), np.float32))
    slow = make_bundle("slow", runtime="openvino")
    result = call("bench", small, slow, "--ab", "--profile", "rapid", "--json")
    ratio = json.loads(result.output)["ratio"]
    assert ratio["low"] > 1, "OpenVINO's overhead on a model this small is several times ONNX Runtime's"
    result = call("bench", small, large, "--ab", "--profile", "rapid")
    assert ("x the latency of" in result.output) != ("is not reliable" in result.output)  # on a busy machine
    assert "same bundle twice" in call("bench", small, small, "--ab").output
    assert call("bench", small, "--ab").exit_code == 2
    for option in (
        ("--device", "ssh://x"),
        ("--affinity", "0"),
        ("--batch", "2"),
        ("--runner", "native"),
        ("--emulated",),
    ):
        refused = call("bench", small, large, "--ab", *option)
        assert refused.exit_code == 2 and f"leave out {option[0]}" in refused.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bench", "nowhere"], "nowhere does not exist"),
        (["bench", "{bundle}", "--affinity", "x"], "write 0,1 or 4-7"),
        (["bench", "{bundle}", "--affinity", "3-1"], "write 0,1 or 4-7"),
        (["bench", "{bundle}", "--device", "host"], "give local, ssh://"),
        (["run", "nowhere", "x.jpg"], "neither a bundle"),
        (["run", "{bundle}", "nowhere.jpg"], "nowhere.jpg does not exist: give an image file, a folder of images or"),
        (["doctor", "--device", "ssh://-x"], "is not an address"),
    ],
)
def test_errors_are_one_line(call, make_bundle, arguments, line):
    bundle = make_bundle()
    result = call(*(a.replace("{bundle}", str(bundle)) for a in arguments))
    assert result.exit_code == 2
    assert line in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_bench_of_a_batch_prints_images_per_second(call, make_bundle, short_profile):
    folder = make_bundle()
    result = call("bench", folder, "--profile", "rapid", "--processes", 1, "--batch", 4)
    (record,) = load_measurements(folder / "measurements.jsonl")
    assert f"{record.values['throughput'].value:.0f} images/s in batches of 4" in result.output
    assert "images/s" not in call("bench", folder, "--profile", "rapid", "--processes", 1).output


def test_a_student_is_not_a_bundle(call, make_student_bundle):
    result = call("bench", make_student_bundle().parent)
    assert result.exit_code == 2 and "is a student: export it" in result.output


def test_run_prints_one_line_per_image(call, make_bundle, scenes):
    bundle = make_bundle()
    paths = sorted((scenes / "test").rglob("*.png"))
    result = call("run", bundle, paths[0], scenes / "test")
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert len(lines) == 1 + len(paths)
    with open_session(bundle) as session:
        pixels = preprocess(decode(paths[0].read_bytes(), name="x"), session.bundle.preprocessing)
        np.testing.assert_allclose(lines[0]["embedding"], session.run(pixels[None])[0], rtol=1e-4, atol=1e-5)


def test_run_reads_the_image_of_a_sample_that_is_named(call, make_bundle, scenes, tmp_path):
    first, second = sorted((scenes / "test").rglob("*.png"))[:2]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(first, "s.rgb.png")
        tar.add(second, "s.mask.png")
    bundle = make_bundle()
    refused = call("run", bundle, tmp_path / "a.tar")
    assert refused.exit_code == 2 and "--image-member mask.png" in refused.stderr
    named, alone = call("run", bundle, tmp_path / "a.tar", "--image-member", "rgb.png"), call("run", bundle, first)
    embeddings = [json.loads(result.stdout)["embedding"] for result in (named, alone)]
    assert embeddings[0] == embeddings[1]


def test_run_writes_an_npz_and_skips_corrupt_images(call, make_bundle, scenes, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    result = call("run", make_bundle(), broken, scenes / "test", "--out", tmp_path / "out.npz")
    assert result.exit_code == 0 and "skipped" in result.stderr and "broken.png" in result.stderr
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["embeddings"].shape == (len(arrays["keys"]), 8)
        assert len(arrays["keys"]) == 32
    again = call("run", make_bundle("d"), scenes / "test", "--out", tmp_path / "out.npz")
    assert again.exit_code == 0
    np.savez(tmp_path / "mine.npz", labels=np.arange(3))
    before = (tmp_path / "mine.npz").read_bytes()
    foreign = call("run", make_bundle("e"), scenes / "test", "--out", tmp_path / "mine.npz")
    assert foreign.exit_code == 2 and "was not written by robx run" in foreign.stderr
    assert (tmp_path / "mine.npz").read_bytes() == before
    assert call("run", make_bundle("b"), broken).exit_code == 2
    assert call("run", make_bundle("c"), scenes / "test", "--out", tmp_path / "out.csv").exit_code == 2


def test_a_wrong_path_is_refused_before_any_image_is_read(call, make_bundle, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("robx.runtime.commands.infer", lambda *_, **__: pytest.fail("an image was read"))
    bundle = make_bundle()
    wrong = call("run", bundle, scenes / "test", "--out", tmp_path / "out.csv")
    assert wrong.exit_code == 2 and "out.csv must end in .npz" in wrong.stderr
    missing = call("run", bundle, scenes / "test", "missing.jpg")
    assert missing.exit_code == 2 and missing.stderr.startswith("robx: missing.jpg does not exist")


def test_run_prints_labels_if_there_is_a_head(call, make_bundle, scenes):
    labels = tuple("abcdefgh")
    image = next((scenes / "test").rglob("*.png"))
    bundle = make_bundle(labels=labels)
    line = json.loads(call("run", bundle, image, "--top", 3).output)
    with open_session(bundle) as session:
        pixels = preprocess(decode(image.read_bytes(), name="x"), session.bundle.preprocessing)
        scores = session.run(pixels[None])[0]
    assert [entry["label"] for entry in line["labels"]] == [labels[i] for i in np.argsort(-scores)[:3]]
    assert sum(p for _, p in top_labels(scores, labels, count=8)) == pytest.approx(1)


def test_run_refuses_options_that_it_would_not_use(call, make_bundle, scenes, tmp_path):
    image, bundle = next((scenes / "test").rglob("*.png")), make_bundle()
    for given, said in (
        ((image, "--top", 3), f"{bundle} has no classifier, and --top is about its labels: export it with --head"),
        ((image, "--top", 5, "--out", tmp_path / "a.npz"), "--out writes the embeddings, and --top is about labels"),
        ((image, "--image-member", "rgb.jpg"), "--image-member is about the samples of tar shards, and no shard was"),
    ):
        refused = call("run", bundle, *given)
        assert refused.exit_code == 2 and said in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "a.npz").exists()


def test_run_names_the_files_of_a_folder_that_it_leaves_out(call, make_bundle, scenes, tmp_path):
    shutil.copy(next((scenes / "test").rglob("*.png")), tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"heic")
    found = call("run", make_bundle(), tmp_path)
    assert found.exit_code == 0 and "skipped 1 file that robx cannot read (1 .heic)" in found.stderr


def test_doctor(call):
    result = call("doctor")
    assert result.exit_code == 0
    assert "onnxruntime" in result.output and "pip install" in result.output
    assert "monitored during a bench: " in result.output and "energy: " in result.output
    told = json.loads(call("doctor", "--json").output)
    assert told["facts"]["arch"]
    states = {finding["name"]: finding for finding in told["findings"]}
    assert states["torch"]["version"] and not states["torch"]["remedy"]
    purposes = [finding["purpose"] for finding in told["findings"]]
    assert "trt bundles in TensorRT" in purposes and "trt bundles in TensorRT-RTX" in purposes
    if states["adb"]["version"] is None:
        assert states["adb"]["remedy"]


@pytest.mark.parametrize(("governor", "line"), [("ondemand", "cpupower"), ("performance", ""), (None, "")])
def test_the_doctor_warns_about_a_clock_that_follows_the_load(governor, line):
    finding = doctor._governor({"governor": governor})
    assert (finding.version is None) == bool(line) and line in finding.remedy


def test_without_torch_and_timm(make_bundle, scenes, tmp_path):
    """bench, run and doctor on a machine that has neither."""
    bundle = make_bundle()

    def call(*arguments):
        command = [sys.executable, "-c", WITHOUT_TORCH, *(str(a) for a in arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = call("run", bundle, next((scenes / "test").rglob("*.png")))
    assert done.returncode == 0 and "embedding" in done.stdout, done.stderr
    done = call("doctor", "--json")
    states = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert states["CUDA"]["version"] is None
    done = call("bench", bundle, "--profile", "rapid", "--processes", "1", "--retries", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["reference"] == "the same bundle in a session of its own"


@pytest.mark.parametrize(
    ("bundles", "labels"),
    [
        (("a/onnx-fp32", "a/onnx-int8"), ["onnx-fp32", "onnx-int8"]),
        (("a/onnx-fp32", "b/onnx-fp32"), ["a/onnx-fp32", "b/onnx-fp32"]),
        (("x/a/onnx", "y/a/onnx", "y/a/trt"), ["x/a/onnx", "y/a/onnx", "trt"]),
        (("onnx", "a/onnx"), ["{cwd}/onnx", "a/onnx"]),
        (("a/onnx", "a/onnx", "a/../a/onnx"), ["onnx", "onnx (2)", "onnx (3)"]),
    ],
)
def test_bundles_have_names_that_tell_them_apart(tmp_path, monkeypatch, bundles, labels):
    monkeypatch.chdir(tmp_path)
    assert BenchSettings(bundles=bundles).labels == [label.replace("{cwd}", tmp_path.name) for label in labels]


def test_bundles_of_two_runs_have_two_names_in_the_table(call, make_bundle, short_profile, tmp_path):
    first = make_bundle()
    shutil.copytree(first, tmp_path / "other" / "onnx-fp32")
    result = call("bench", first, tmp_path / "other" / "onnx-fp32", "--profile", "rapid", "--processes", 1)
    assert "run/onnx-fp32" in result.output and "other/onnx-fp32" in result.output
