"""Spherical k-means against closed forms and scikit-learn; prototypes over real images, cached and repeatable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from robx.distill.teachers.kmeans import nearest, spherical_kmeans
from robx.distill.teachers.load import load_teacher
from robx.distill.teachers.prototypes import (
    FitSettings,
    choose_method,
    fit_or_load,
    fit_prototypes,
    images_to_fit,
    load_prototypes,
)
from robx.errors import InputError
from robx.images.arrays import ArraySource
from robx.images.decode import preprocess
from robx.images.sources import FolderSource
from robx.records import Preprocessing


def bundles(
    k: int, each: int, *, width: int = 24, spread: float = 0.05, seed: int = 0
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Points around k orthogonal directions, shuffled; their directions' numbers; the directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:k]
    labels = torch.arange(k).repeat_interleave(each)[torch.randperm(k * each, generator=generator)]
    points = centres[labels] + spread * torch.randn(k * each, width, generator=generator)
    lengths = torch.rand(k * each, 1, generator=generator) * 5 + 0.1  # directions alone may matter
    return points * lengths, labels.numpy(), centres


@pytest.mark.parametrize("seed", range(5))
def test_separate_bundles_are_found_as_scikit_learn_finds_them(seed: int) -> None:
    points, labels, _ = bundles(8, 30, seed=seed)
    found = spherical_kmeans(points, 8, seed=seed)
    theirs = KMeans(8, n_init=10, random_state=seed).fit(F.normalize(points, dim=1).numpy())
    assert adjusted_rand_score(labels, found.assignment) == 1
    assert adjusted_rand_score(theirs.labels_, found.assignment) == 1
    want = F.normalize(torch.from_numpy(theirs.cluster_centers_), dim=1)
    assert (found.centres @ want.T).max(dim=1).values.min() > 1 - 1e-5


def test_four_directions_in_the_plane_in_closed_form() -> None:
    """Two points at +-a degrees around each axis: the centres are the axes, and the mean cosine is cos a."""
    axes = torch.tensor([0.0, 90.0, 180.0, 270.0])
    angles = torch.deg2rad(torch.cat([axes - 10, axes + 10]))
    found = spherical_kmeans(torch.stack([angles.cos(), angles.sin()], dim=1), 4, seed=1)
    assert found.objective == pytest.approx(np.cos(np.deg2rad(10)), abs=1e-6)
    degrees = torch.rad2deg(torch.atan2(found.centres[:, 1], found.centres[:, 0])).round() % 360
    assert sorted(degrees.tolist()) == [0, 90, 180, 270]


@given(seed=st.integers(0, 10_000), n=st.integers(12, 60), k=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_more_iterations_never_reduce_the_objective_and_no_centre_is_empty(seed: int, n: int, k: int) -> None:
    points = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    before = -1.0
    for iterations in (1, 2, 4, 8, 40):
        found = spherical_kmeans(points, k, seed=seed, iterations=iterations, tolerance=0)
        assert found.objective >= before - 1e-6
        before = found.objective
    assert len(set(found.assignment.tolist())) == k
    torch.testing.assert_close(found.centres.norm(dim=1), torch.ones(k))
    similarity = F.normalize(points, dim=1) @ found.centres.T
    assert torch.equal(found.assignment, similarity.argmax(dim=1))
    assert found.objective == pytest.approx(float(similarity.max(dim=1).values.mean()), abs=1e-5)


def test_the_result_depends_on_the_seed_and_not_on_norms() -> None:
    points, _, _ = bundles(6, 20, spread=0.4)
    first = spherical_kmeans(points, 9, seed=3)
    assert torch.equal(first.centres, spherical_kmeans(points, 9, seed=3).centres)
    assert not torch.equal(first.centres, spherical_kmeans(points, 9, seed=4).centres)
    torch.testing.assert_close(first.centres, spherical_kmeans(points * 7, 9, seed=3).centres)


def test_as_many_centres_as_points_and_repeated_points() -> None:
    points = torch.eye(5)
    assert spherical_kmeans(points, 5, seed=0).objective == pytest.approx(1)
    same = spherical_kmeans(torch.ones(8, 3), 4, seed=0)
    assert same.objective == pytest.approx(1) and torch.isfinite(same.centres).all()
    with pytest.raises(InputError, match="6 prototypes need at least 6 images, got 5"):
        spherical_kmeans(points, 6, seed=0)


def test_nearest_in_blocks_is_nearest_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centres = F.normalize(torch.randn(50, 4), dim=1), F.normalize(torch.randn(7, 4), dim=1)
    monkeypatch.setattr("robx.distill.teachers.kmeans._BLOCK_NUMBERS", 20)
    similarity, assignment = nearest(points, centres)
    whole = points @ centres.T
    assert torch.equal(assignment, whole.argmax(dim=1))
    torch.testing.assert_close(similarity, whole.max(dim=1).values)


def test_one_file_under_two_names_is_fitted_under_each(tmp_path: Path) -> None:
    """EfficientNet-Lite's pixels are (x - 127) / 128 under its own name, and what timm says under timm's."""
    import timm

    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), path)
    options: dict[str, Any] = {"weights": path, "cache": tmp_path, "source": pictures(), "prototypes": 5}
    first = load_teacher("efficientnet_lite0", objective="msn", image_size=32, **options)
    other = load_teacher("timm:tf_efficientnet_lite0", objective="msn", image_size=32, **options)
    assert len(list((tmp_path / "prototypes").glob("*.safetensors"))) == 2
    assert first.info.sha256 == other.info.sha256 and first.head is not None and other.head is not None
    assert not torch.equal(first.head.prototypes, other.head.prototypes)


def test_prototypes_of_squares_keep_their_name_and_other_shapes_get_their_own() -> None:
    assert "crop_width" not in SETTINGS.facts
    tall = replace(SETTINGS, crop_width=SETTINGS.crop // 2)
    assert tall.id != SETTINGS.id and tall.facts["crop_width"] == SETTINGS.crop // 2


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("images", "prototypes", "device", "want"),
    [
        (1_281_167, 1024, CPU, "full"),  # of ImageNet, 256 images for each
        (1_281_167, 3000, CPU, "minibatch"),  # 3 GB of features
        (500_000, 65_536, CPU, "minibatch"),  # 2 GB, and hours of products
        (5000, 65_536, CPU, "full"),
        (5000, 256, CUDA, "minibatch"),
    ],
)
def test_the_method_depends_on_size_and_device(images: int, prototypes: int, device: torch.device, want: str) -> None:
    assert choose_method(images=images, prototypes=prototypes, width=1024, device=device) == want


def test_a_fit_reads_what_the_processes_can_keep() -> None:
    assert images_to_fit(1_281_167, prototypes=1024, width=1024) == 256 * 1024
    assert images_to_fit(1_281_167, prototypes=65_536, width=1024) == 1_281_167
    kept = 4 * 1024**3 // 2048
    assert images_to_fit(10_000_000, prototypes=65_536, width=1024) == kept
    assert images_to_fit(10_000_000, prototypes=65_536, width=1024, processes=8) == min(10_000_000, 8 * kept)


def test_a_fit_reads_no_more_images_than_it_is_told() -> None:
    """As if the source had only those that come first in the order of the seed."""
    source, wanted = pictures(), replace(SETTINGS, images=20)
    found = fit_prototypes(mean_colour, source, PREPROCESSING, wanted)
    order = np.random.default_rng(wanted.seed).permutation(60)[:20]
    pixels = torch.from_numpy(np.stack([preprocess(source.read(i), PREPROCESSING) for i in order.tolist()]))
    torch.testing.assert_close(found.mean, mean_colour(pixels).mean(dim=0), rtol=1e-4, atol=1e-4)
    assert (found.images, found.skipped) == (20, 0)
    assert wanted.id != SETTINGS.id and "images" not in SETTINGS.facts
    assert fit_prototypes(mean_colour, source, PREPROCESSING, replace(wanted, method="minibatch")).images == 20
    assert images_to_fit(1_281_167, prototypes=1024, width=1024, most=5000) == 5000
    assert choose_method(images=5_000_000, prototypes=4096, width=1024, device=CPU, most=5000) == "full"
    with pytest.raises(InputError, match="fit_images is 2: give fit_images = 3"):
        fit_prototypes(mean_colour, source, PREPROCESSING, replace(SETTINGS, images=2))


def test_a_minibatch_fit_keeps_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robx.distill.teachers.prototypes._SHARE_BYTES", 40 * 3 * 2)
    found = fit_prototypes(mean_colour, pictures(), PREPROCESSING, replace(SETTINGS, method="minibatch"))
    assert (found.images, found.skipped, found.vectors.shape) == (40, 0, (3, 3))


def test_prototypes_fitted_before_are_kept_by_whichever_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run finds the prototypes of its first part, made on another device or by an older version."""
    import timm

    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    options: dict[str, Any] = {"weights": path, "source": pictures(), "image_size": 32, "prototypes": 3}

    def load(folder: str, **more: Any) -> str:
        return load_teacher(
            "timm:resnet18", objective="msn", cache=tmp_path / folder, **options, **more
        ).info.prototypes

    assert "3 fitted by spherical k-means to 60 images" in load("full")
    assert "3 fitted by mini-batch spherical k-means to 60 images" in load("minibatch", method="minibatch")
    monkeypatch.setattr("robx.distill.teachers.prototypes._FULL_BYTES", 60 * 512 * 4 - 1)
    assert "3 fitted by spherical k-means to 60 images" in load("full")
    assert "3 fitted by mini-batch spherical k-means to 60 images" in load("large")
    monkeypatch.undo()
    assert "3 fitted by mini-batch spherical k-means to 60 images" in load("large")
    # A file of the one-pass method that older versions used for large sets.
    (tmp_path / "old" / "prototypes").mkdir(parents=True)
    (kept,) = (tmp_path / "full" / "prototypes").glob("*.safetensors")
    with safe_open(kept, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("mean", "vectors")}
        facts = dict(file.metadata() or {})
    values = json.loads(facts["settings"]) | {"streaming": True}
    facts["settings"] = json.dumps(values, sort_keys=True)
    name = hashlib.sha256(facts["settings"].encode()).hexdigest()[:16]
    save_file(tensors, tmp_path / "old" / "prototypes" / f"prototypes-{name}.safetensors", metadata=facts)
    assert "3 fitted by streaming spherical k-means to 60 images" in load("old")


def test_the_settings_of_older_files_keep_their_identity() -> None:
    """The name of a file that the first version wrote."""
    settings = FitSettings(teacher="t", data="d", prototypes=3, size=37, crop=32, seed=1, normalisation=(0.5, 0.25))
    values = {"crop": 32, "data": "d", "normalisation": [0.5, 0.25], "prototypes": 3, "seed": 1, "size": 37}
    values |= {"streaming": False, "teacher": "t", "version": 1}
    assert settings.id == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def pictures(count: int = 60) -> ArraySource:
    """Three kinds of plain pictures in equal shares, with a little noise."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])
    pixels = colours[np.arange(count) % 3][:, None, None] + rng.integers(-20, 20, (count, 16, 16, 3))
    return ArraySource("colours", pixels.astype(np.uint8), np.arange(count) % 3, ("red", "green", "blue"))


def mean_colour(pixels: Tensor) -> Tensor:
    return pixels.mean(dim=(2, 3)) + 3  # a common part, as pooled activations have


PREPROCESSING = Preprocessing(size=16, crop=16)
SETTINGS = FitSettings(teacher="t", data=pictures().fingerprint, prototypes=3, size=16, crop=16)


@pytest.mark.parametrize("method", ["full", "minibatch"])
def test_prototypes_match_the_kinds_of_pictures(method: Any) -> None:
    source, wanted = pictures(), dataclasses.replace(SETTINGS, method=method)
    found = fit_prototypes(mean_colour, source, PREPROCESSING, wanted)
    pixels = torch.from_numpy(np.stack([preprocess(source.read(i), PREPROCESSING) for i in range(60)]))
    features = mean_colour(pixels)
    torch.testing.assert_close(found.mean, features.mean(dim=0), rtol=1e-4, atol=1e-4)
    assignment = ((features - found.mean) @ found.vectors.T).argmax(dim=1)
    assert adjusted_rand_score(np.arange(60) % 3, assignment) == 1
    assert (found.images, found.skipped) == (60, 0)


def test_fitted_once_and_cached_by_all_settings(tmp_path: Path) -> None:
    calls = []

    def embed(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return mean_colour(pixels)

    first = fit_or_load(embed, pictures(), PREPROCESSING, SETTINGS, folder=tmp_path)
    again = fit_or_load(embed, pictures(), PREPROCESSING, SETTINGS, folder=tmp_path)
    assert sum(calls) == 60 and torch.equal(first.vectors, again.vectors) and torch.equal(first.mean, again.mean)
    pixels = {"normalisation": (0.5, 0.5, 0.5, 0.5, 0.5, 0.5)}
    for change in (
        {"teacher": "u"}, {"data": "0"}, {"prototypes": 4}, {"crop": 8}, {"seed": 1}, {"method": "minibatch"}, pixels
    ):  # fmt: skip
        other = dataclasses.replace(SETTINGS, **change)
        assert other.id != SETTINGS.id
        assert load_prototypes(tmp_path / f"prototypes-{SETTINGS.id}.safetensors", other) is None


def test_a_damaged_cache_is_fitted_again(tmp_path: Path) -> None:
    first = fit_or_load(mean_colour, pictures(), PREPROCESSING, SETTINGS, folder=tmp_path)
    path = tmp_path / f"prototypes-{SETTINGS.id}.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(
        fit_or_load(mean_colour, pictures(), PREPROCESSING, SETTINGS, folder=tmp_path).vectors, first.vectors
    )
    assert load_prototypes(path, SETTINGS) is not None


def test_unreadable_images_are_skipped_up_to_a_budget(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    found = fit_prototypes(mean_colour, FolderSource(tmp_path), PREPROCESSING, SETTINGS)
    assert (found.images, found.skipped) == (30, 1)
    for i in range(11):
        (tmp_path / f"bad{i}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read"):
        fit_prototypes(mean_colour, FolderSource(tmp_path), PREPROCESSING, SETTINGS)
    for path in tmp_path.glob("[012]*.png"):
        path.unlink()
    for path in sorted(tmp_path.glob("bad*.png"))[8:]:
        path.unlink()
    with pytest.raises(InputError, match="8 images cannot be read"):  # nothing else is left
        fit_prototypes(mean_colour, FolderSource(tmp_path), PREPROCESSING, replace(SETTINGS, prototypes=4))


def test_too_few_images_say_what_to_lower() -> None:
    with pytest.raises(InputError, match="need at least 64 images, and colours has 60: lower --prototypes"):
        fit_prototypes(mean_colour, pictures(), PREPROCESSING, dataclasses.replace(SETTINGS, prototypes=64))


def test_a_headless_teacher_end_to_end(tmp_path: Path) -> None:
    """A trunk of timm's from a file, prototypes over images: its answers are cosines to the stored vectors."""
    import timm

    torch.manual_seed(0)
    trunk = timm.create_model("resnet18", num_classes=7).eval()
    torch.save(trunk.state_dict(), tmp_path / "weights.pth")
    notes: list[str] = []
    teacher = load_teacher(
        "timm:resnet18",
        weights=tmp_path / "weights.pth",
        cache=tmp_path,
        source=pictures(),
        prototypes=5,
        objective="msn",
        image_size=32,
        progress=lambda done, total, note: notes.append(note),
    )
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = trunk.forward_head(trunk.forward_features(pixels), pre_logits=True)
    (kept,) = (tmp_path / "prototypes").glob("*.safetensors")
    settings = FitSettings(
        teacher=teacher.info.sha256,
        data=pictures().fingerprint,
        prototypes=5,
        size=37,
        crop=32,
        normalisation=(0.485, 0.456, 0.406, 0.229, 0.224, 0.225),
    )
    stored = load_prototypes(kept, settings)
    assert stored is not None
    want = F.cosine_similarity((features - stored.mean)[:, None], stored.vectors[None], dim=-1)
    answer = teacher(pixels)
    torch.testing.assert_close(answer.features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.crops, want, rtol=1e-4, atol=1e-5)
    assert (teacher.method, teacher.num_prototypes, teacher.width) == ("headless", 5, 512)
    assert "5 fitted by spherical k-means to 60 images of colours" in teacher.info.prototypes
    assert any("prototypes" in note for note in notes)
