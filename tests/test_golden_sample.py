"""The golden sample: its mistakes against independent implementations, and what a comparison says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from robx.errors import ArtifactError, InputError
from robx.golden.compare import compare
from robx.golden.mistakes import variants
from robx.golden.picture import draw_picture
from robx.golden.sample import (
    GoldenRecord,
    GoldenSample,
    check_preprocessing,
    encoded,
    model_input,
    read_sample,
    write_sample,
)
from robx.images.decode import centre_box, host_input, resize_and_crop, resized_size
from robx.records import Bundle, Normalisation, Preprocessing, Student, TensorSpec, load_bundle

PRE = Preprocessing(size=48, crop=40, interpolation="bicubic")
RAW = dataclasses.replace(PRE, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))


def bundle_of(inside: Normalisation | None = None, *, precision: str = "fp32", labels: int = 0) -> Bundle:
    student = Student(
        timm_name="s", width=8, preprocessing=PRE, sha256="0" * 64, teacher=None, data=None, recipe={}
    )  # fmt: skip
    return Bundle(
        format="onnx", precision=precision, requested=precision, target="local", runtime="onnxruntime",  # type: ignore[arg-type]
        inputs=(TensorSpec(name="pixels", dtype="float32" if inside is None else "uint8", shape=(None, 3, 40, 40)),),
        outputs=(TensorSpec(name="embedding", dtype="float32", shape=(None, 8)),),
        preprocessing=PRE if inside is None else RAW, student=student, verdict="PASS", reason="", rungs=(),
        calibration=None, opset=20, versions={}, files=(), in_model=inside,
        labels=tuple(f"class {i}" for i in range(labels)) or None,
    )  # fmt: skip


INSIDE = Normalisation(mean=PRE.mean, std=PRE.std)
BUNDLES = {
    "float": bundle_of(),
    "uint8": bundle_of(INSIDE),
    "camera": bundle_of(dataclasses.replace(INSIDE, layout="NHWC", channels="BGR")),
    "any size": bundle_of(dataclasses.replace(INSIDE, resize=True)),
}


def sample_of(bundle: Bundle, *, seed: int = 0) -> GoldenSample:
    """A sample of an invented model: a random projection of the mean colour of each of 16 tiles."""
    image = draw_picture(PRE)
    found = list(variants(image, bundle))
    weights = np.random.default_rng(seed).normal(size=(48, 8))

    def answer(values: np.ndarray) -> np.ndarray:
        tiles = functional.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(values))[None].float(), 4)
        return tiles.numpy().reshape(1, 48) @ weights

    rows = np.concatenate([answer(host_input(image, bundle)), *(answer(values) for _, values in found)])
    outputs = {"embedding": rows.astype(np.float32)}
    if bundle.labels is not None:
        outputs["logits"] = (rows[:, : len(bundle.labels)] * 2).astype(np.float32)
    record = GoldenRecord(answered_by="numpy", mistakes=tuple(mistake for mistake, _ in found))
    return GoldenSample(record=record, image=image, inputs=model_input(image, bundle), outputs=outputs)


def test_the_picture_is_the_same_every_time_and_suits_any_shape() -> None:
    assert draw_picture(PRE).tobytes() == draw_picture(PRE).tobytes()
    wide = draw_picture(Preprocessing(size=32, crop=32, crop_width=96))
    assert wide.width > 3 * wide.height and draw_picture(Preprocessing(size=4000, crop=4000)).width <= 4096


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "nearest"])
def test_resizes_without_antialiasing_are_those_of_pytorch(kernel: str) -> None:
    image = draw_picture(PRE)
    width, height = size = resized_size(image.size, PRE)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    how = {} if kernel == "nearest" else {"align_corners": False, "antialias": False}
    resized = functional.interpolate(pixels, (height, width), mode=kernel, **how).round().clamp(0, 255)  # type: ignore[arg-type]
    left, top, right, bottom = centre_box(size, PRE)
    expected = resized[0, :, top:bottom, left:right].numpy()
    found = {m.name: values for m, values in variants(image, bundle_of())}[f"no antialias, {kernel}"]
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (PRE.mean, PRE.std))
    assert np.abs((found * std + mean) * 255 - expected).max() < 1.01  # one level: a tie rounds either way


@pytest.mark.parametrize("kind", BUNDLES)
def test_every_mistake_is_told_from_the_correct_way_and_from_each_other(kind: str) -> None:
    bundle = BUNDLES[kind]
    sample = sample_of(bundle)
    names = [mistake.name for mistake in sample.record.mistakes]
    assert len(set(names)) == len(names)
    assert compare(sample.outputs["embedding"][0], sample, bundle).passes
    for mistake, row in zip(sample.record.mistakes, sample.outputs["embedding"][1:], strict=True):
        found = compare(row, sample, bundle)
        assert found.explained_by is not None and found.passes == mistake.harmless, mistake.name
        assert found.explained_by == mistake or np.allclose(found.fits[1].distance, 0, atol=1e-6), mistake.name


def test_the_input_tensor_names_a_mistake_as_well() -> None:
    bundle, image = bundle_of(), draw_picture(PRE)
    sample = sample_of(bundle)
    correct = sample.inputs
    assert correct.shape == (1, 3, 40, 40) and correct.dtype == np.float32
    assert compare(correct, sample, bundle).passes
    said = {
        "channels": (
            correct[:, ::-1] * np.reshape(PRE.std[::-1], (3, 1, 1))
            + np.reshape(PRE.mean[::-1], (3, 1, 1))
            - np.reshape(PRE.mean, (3, 1, 1))
        )
        / np.reshape(PRE.std, (3, 1, 1)),
        "channels, mean and std reversed": correct[:, ::-1],
        "layout": correct.transpose(0, 2, 3, 1),
        "stretched": _stretched(image),
        "raw pixels": (correct * np.reshape(PRE.std, (3, 1, 1)) + np.reshape(PRE.mean, (3, 1, 1))) * 255,
    }
    for name, wrong in said.items():
        found = compare(wrong, sample, bundle)
        assert found.explained_by is not None and found.explained_by.name == name and not found.passes


@pytest.mark.parametrize("pre", [PRE, dataclasses.replace(PRE, mean=(0.5,) * 3, std=(0.5,) * 3)])
def test_half_a_normalisation_and_another_ones_numbers_are_named(pre: Preprocessing) -> None:
    """As a port in numpy computes them, against the names; a model with mean and std .5 has no order of them."""
    bundle = dataclasses.replace(bundle_of(), preprocessing=pre)
    sample = dataclasses.replace(sample_of(bundle), inputs=model_input(draw_picture(PRE), bundle))
    unit = np.asarray(resize_and_crop(draw_picture(PRE), pre), dtype=np.float64) / 255
    mean, std = np.array(pre.mean), np.array(pre.std)
    imagenet = (unit - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    wrong = {"mean only": unit - mean, "std only": unit / std}
    wrong |= {"mean and std reversed": (unit - mean[::-1]) / std[::-1]} if pre is PRE else {"ImageNet": imagenet}
    for name, values in wrong.items():
        found = compare(values.transpose(2, 0, 1)[None], sample, bundle)
        assert found.explained_by is not None and found.explained_by.name == name and not found.passes
    names = {mistake.name for mistake, _ in variants(draw_picture(PRE), bundle)}
    assert {"mean and std reversed", "ImageNet"} & names == ({"mean and std reversed"} if pre is PRE else {"ImageNet"})


def test_a_mistake_that_leaves_a_part_of_the_difference_is_only_the_closest() -> None:
    bundle = bundle_of()
    sample = sample_of(bundle)
    rows = sample.outputs["embedding"].astype(np.float64)
    swapped = rows[[m.name for m in sample.record.mistakes].index("channels") + 1]
    other = np.random.default_rng(3).normal(size=8)
    other *= 0.1 * np.linalg.norm(swapped - rows[0]) / np.linalg.norm(other)
    found = compare(swapped + other, sample, bundle)
    assert found.explained_by is None and [mistake.name for mistake in found.closest] == ["channels"]
    assert not found.passes and found.unexplained == pytest.approx(0.1, rel=0.1)


def test_a_harmless_mistake_excuses_nothing_beside_it() -> None:
    bundle = bundle_of()
    sample = sample_of(bundle)
    rows = sample.outputs["embedding"].astype(np.float64)
    index = [m.name for m in sample.record.mistakes].index("not rounded") + 1
    rows[index] = rows[0] * 1.01
    changed = dataclasses.replace(sample, outputs={"embedding": rows})
    assert compare(rows[index], changed, bundle).passes
    assert not compare(rows[0] * 1.014, changed, bundle).passes


def _stretched(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return ((pixels - PRE.mean) / PRE.std).transpose(2, 0, 1)[None]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_uint8_input_is_encoded_as_the_manifest_says(layout: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    inside = dataclasses.replace(INSIDE, layout=layout, channels="BGR")  # type: ignore[arg-type]
    found = encoded(pixels, inside)
    assert found.shape == ((1, 3, 5, 7) if layout == "NCHW" else (1, 5, 7, 3)) and found.dtype == np.uint8
    blue = found[0, 0] if layout == "NCHW" else found[0, ..., 0]
    assert (blue == pixels[..., 2]).all()


def test_an_output_that_is_l2_normalised_is_compared_as_one() -> None:
    bundle = bundle_of()
    sample = sample_of(bundle)
    good, swapped = sample.outputs["embedding"][[0, [m.name for m in sample.record.mistakes].index("channels") + 1]]
    found = compare(good / np.linalg.norm(good), sample, bundle)
    assert found.passes and "L2-normalised" in found.note
    found = compare(swapped / np.linalg.norm(swapped), sample, bundle)
    assert found.explained_by is not None and found.explained_by.name == "channels"


def test_a_difference_that_no_mistake_explains_is_called_that() -> None:
    bundle = bundle_of()
    sample = sample_of(bundle)
    noise = np.random.default_rng(3).normal(size=8) * np.linalg.norm(sample.outputs["embedding"][0])
    found = compare(sample.outputs["embedding"][0] + noise, sample, bundle)
    assert not found.passes and found.explained_by is None


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_int8_may_differ_more_between_processors(precision: str) -> None:
    bundle = bundle_of(precision=precision)
    sample = sample_of(bundle)
    near = sample.outputs["embedding"][0] * 1.02
    assert compare(near, sample, bundle).passes == (precision == "int8")


def test_logits_and_batches_are_recognised_by_their_width() -> None:
    bundle = bundle_of(labels=5)
    sample = sample_of(bundle)
    assert compare(sample.outputs["logits"][0], sample, bundle).what == "logits"
    twice = np.repeat(sample.outputs["embedding"][:1], 2, axis=0)
    assert compare(twice, sample, bundle).what == "embedding" and compare(twice, sample, bundle).passes


def test_every_row_of_a_batch_counts() -> None:
    bundle = bundle_of()
    sample = sample_of(bundle)
    names = [mistake.name for mistake in sample.record.mistakes]
    batch = sample.outputs["embedding"][[0, 0, names.index("mirrored") + 1]]
    found = compare(batch, sample, bundle)
    assert not found.passes and found.explained_by is not None and found.explained_by.name == "mirrored"
    assert "row 2 of 3" in found.note


def test_mistakes_with_one_output_are_all_named() -> None:
    bundle = bundle_of(precision="int8")
    sample = sample_of(bundle)
    rows = sample.outputs["embedding"].copy()
    names = [mistake.name for mistake in sample.record.mistakes]
    first, second = names.index("raw pixels") + 1, names.index("not scaled") + 1
    rows[second] = rows[first]  # as when a layer saturates
    found = compare(rows[first], dataclasses.replace(sample, outputs={"embedding": rows}), bundle)
    assert [mistake.name for mistake in found.explanations] == ["raw pixels", "not scaled"]


@pytest.mark.parametrize("shape", [(8,), (1, 3, 40, 40)])
def test_an_array_that_is_not_finite_differs(shape: tuple[int, ...]) -> None:
    bundle = bundle_of()
    wrong = np.zeros(shape)
    wrong.flat[3:5] = np.nan, np.inf
    found = compare(wrong, sample_of(bundle), bundle)
    assert not found.passes and found.not_finite == 2 and found.what == ("embedding" if len(shape) == 1 else "input")


def test_an_array_of_another_size_is_refused() -> None:
    bundle = bundle_of()
    with pytest.raises(InputError, match="shape"):
        compare(np.zeros(7), sample_of(bundle), bundle)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_raw_camera_frame_is_named(channels: str) -> None:
    bundle = bundle_of()
    frame = resize_and_crop(draw_picture(PRE), PRE)
    pixels = np.asarray(frame)[..., :: 1 if channels == "RGB" else -1]
    found = compare(np.ascontiguousarray(pixels)[None], sample_of(bundle), bundle)  # uint8 (1, H, W, 3)
    assert found.explained_by is not None and found.explained_by.name == f"raw frame, {channels}"


def test_a_sample_survives_the_disk_and_damage_is_named(tmp_path: Path) -> None:
    bundle = bundle_of(labels=5)
    sample = sample_of(bundle)
    bundle = dataclasses.replace(bundle, files=write_sample(sample, tmp_path))
    assert {file.role for file in bundle.files} == {"golden"} and bundle.bytes == 0
    back = read_sample(tmp_path, bundle)
    assert back.record == sample.record and back.image.tobytes() == sample.image.tobytes()
    for name, rows in sample.outputs.items():
        np.testing.assert_array_equal(back.outputs[name], rows)
    np.save(tmp_path / "golden" / "mistakes.npy", np.zeros((2, 8), np.float32))
    with pytest.raises(ArtifactError, match="do not fit"):
        read_sample(tmp_path, bundle)
    np.save(tmp_path / "golden" / "mistakes.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ArtifactError, match="npy"):
        read_sample(tmp_path, bundle)


@pytest.mark.parametrize("kind", BUNDLES)
def test_a_preprocessing_that_was_changed_is_refused(kind: str, tmp_path: Path) -> None:
    bundle, right = BUNDLES[kind], BUNDLES[kind].preprocessing
    bundle = dataclasses.replace(bundle, files=write_sample(sample_of(bundle), tmp_path))
    check_preprocessing(tmp_path, bundle)
    changes: list[dict[str, Any]] = [{"mean": (right.mean[0], right.mean[1] + 0.04, right.mean[2])}]
    changes += [{"std": (right.std[0], right.std[1], right.std[2] * 1.05)}]
    if bundle.in_model is None or not bundle.in_model.resize:
        changes += [{"size": PRE.size + 4}, {"interpolation": "bilinear"}, {"crop": PRE.crop - 2}]
    for change in changes:
        changed = dataclasses.replace(bundle, preprocessing=dataclasses.replace(right, **change))
        with pytest.raises(ArtifactError, match=r"manifest.json was changed: .*; export the student again"):
            check_preprocessing(tmp_path, changed)
    check_preprocessing(tmp_path, dataclasses.replace(bundle, files=()))  # as one of an earlier version


def test_a_bundle_of_an_earlier_version_opens_and_has_no_sample() -> None:
    folder = Path(__file__).parent / "golden" / "bundle-1"
    bundle = load_bundle(folder)
    with pytest.raises(ArtifactError, match="no golden sample: export the student again"):
        read_sample(folder, bundle)
