"""The mobile converters and the engines that run what they write.

The tests marked `mobile` convert, run and compare; each needs its converter's own environment (make test-mobile) and is
skipped, by name, in any other.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from robx.errors import ArtifactError, InputError, MissingExtra
from robx.export.build import ExportSettings, export
from robx.export.formats import to_coreml, to_executorch, to_litert, to_ncnn, to_onnx
from robx.export.formats.builder import BuiltModel, Source
from robx.export.formats.mobile import PlainAttention, calibration_batches, example_input, mobile_model
from robx.export.formats.network import export_model, tensor_specs
from robx.export.int8 import by_pt2e, saturation
from robx.export.int8.candidate import Candidate
from robx.export.int8.graph_facts import read_facts
from robx.export.request import ExportRequest, ExportTarget
from robx.records import Preprocessing, Student, describe_file, to_json
from robx.runtime.engines import on_litert

SIZE = 64
BUILDERS = {"executorch": to_executorch, "litert": to_litert, "coreml": to_coreml, "ncnn": to_ncnn}
PACKAGES = {"executorch": "executorch", "litert": "litert_torch", "coreml": "coremltools", "ncnn": "pnnx"}


def needs(format_: str) -> None:
    package = PACKAGES[format_]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here: make test-mobile runs this in .venv-{format_}")


def cnn() -> nn.Module:
    """A MobileNetV2 of a third of the width."""
    torch.manual_seed(0)
    return fit_statistics(timm.create_model("mobilenetv2_035", num_classes=0))


def resnet() -> nn.Module:
    """A ResNet, whose random weights do not amplify noise layer by layer as a MobileNet's do: int8 has to stay near."""
    torch.manual_seed(0)
    return fit_statistics(timm.create_model("resnet10t", num_classes=0, zero_init_last=False))


def fit_statistics(trunk: nn.Module) -> nn.Module:
    """Batch statistics of the images that it will see."""
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    trunk.train()
    with torch.no_grad():
        trunk(torch.from_numpy(images(32, seed=3)))
    return trunk.eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"global_pool": "token", "dynamic_img_size": True}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, **options).eval()


def images(count: int, *, seed: int) -> np.ndarray:
    """Smooth pictures, float32 (count, 3, SIZE, SIZE)."""
    coarse = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32))
    return nn.functional.interpolate(1.5 * coarse, size=(SIZE, SIZE), mode="bicubic").numpy()


def make_request(format_: Any, precision: Any, trunk: nn.Module, **options: Any) -> ExportRequest:
    student = Student(
        timm_name="tiny", width=trunk.num_features, preprocessing=Preprocessing(size=SIZE, crop=SIZE),  # type: ignore[arg-type]
        sha256="0" * 64, teacher=None, data=None, recipe={},
    )  # fmt: skip
    target = ExportTarget(format=format_, precision=precision, **options)
    inputs, outputs = tensor_specs(student, batch=target.batch, uint8_input=target.uint8_input, labels=None)
    return ExportRequest(target=target, student=student, inputs=inputs, outputs=outputs)


def convert(
    format_: str, precision: str, trunk: nn.Module, folder: Path, *, candidate: Candidate | None = None, **options: Any
) -> BuiltModel:
    request = make_request(format_, precision, trunk, **options)
    model = export_model(trunk, request.student)
    calibration = images(64, seed=1) if precision == "int8" else None
    onnx_file = folder.parent / f"{folder.name}.onnx"
    if candidate is not None and candidate.float_nodes:
        to_onnx.export_onnx(model, onnx_file, student=request.student, batch=None, opset=20)
    source = Source(model=model, onnx=onnx_file, calibration=calibration, candidate=candidate, shared=folder.parent)
    built: BuiltModel = BUILDERS[format_].build(source, request, folder)
    return built


def open_built(built: BuiltModel, folder: Path, **settings: Any) -> Any:
    files = [to_json(describe_file(folder, file.path, file.role)) for file in built.files]
    manifest = {"runtime": built.runtime, "files": files, "inputs": to_json(built.inputs)}
    manifest["outputs"] = to_json(built.outputs)
    engine = importlib.import_module(f"robx.runtime.engines.on_{built.runtime}")
    return engine.open_model(str(folder), manifest, {"threads": 1, **settings})


def answers(model: Any, pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([model.run(pixels[i : i + 1]) for i in range(len(pixels))])


def centred_cosine(reference: np.ndarray, answer: np.ndarray) -> np.ndarray:
    a, b = reference - reference.mean(0), answer - reference.mean(0)
    cosine: np.ndarray = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return cosine


@pytest.mark.mobile
@pytest.mark.parametrize("network", [cnn, vit])
@pytest.mark.parametrize("format_", ["executorch", "litert", "ncnn"])
def test_fp32_answers_as_pytorch_does(format_: str, network: Any, tmp_path: Path) -> None:
    needs(format_)
    trunk, pixels = network(), images(8, seed=2)
    built = convert(format_, "fp32", trunk, tmp_path)
    assert built.inputs[0].shape == (1, 3, SIZE, SIZE)
    model = open_built(built, tmp_path, threads=2)
    with torch.inference_mode():
        reference = trunk(torch.from_numpy(pixels)).numpy()
    answer = answers(model, pixels)
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, reference, atol=1e-4 * np.abs(reference).max())
    facts = model.facts()
    assert (facts["engine"], facts["threads"], facts["fallback"]) == (format_, 2, False)
    model.close()


@pytest.mark.mobile
@pytest.mark.parametrize("format_", ["executorch", "litert"])
def test_int8_is_small_and_near(format_: str, tmp_path: Path) -> None:
    needs(format_)
    trunk, pixels = resnet(), images(32, seed=2)
    for precision in ("fp32", "int8"):
        (tmp_path / precision).mkdir()
    whole = convert(format_, "fp32", trunk, tmp_path / "fp32")
    built = convert(format_, "int8", trunk, tmp_path / "int8")
    large, small = (
        sum((tmp_path / p / f.path).stat().st_size for f in b.files) for p, b in (("fp32", whole), ("int8", built))
    )
    assert small < 0.45 * large
    with torch.inference_mode():
        reference = trunk(torch.from_numpy(pixels)).numpy()
    model = open_built(built, tmp_path / "int8")
    answer = answers(model, pixels)
    assert centred_cosine(reference, answer).mean() > 0.95
    if format_ == "litert":
        assert model.facts()["input_dtype"] == model.facts()["output_dtype"] == "int8"


QUANTISERS: dict[str, Any] = {"executorch": "pt2e", "litert": "ai-edge"}


def judge(format_: str, candidate: Candidate, trunk: nn.Module, folder: Path) -> tuple[np.ndarray, int, dict[str, Any]]:
    """Centred cosines with PyTorch, the file's size in bytes, and the engine's facts."""
    folder.mkdir()
    built, pixels = convert(format_, "int8", trunk, folder, candidate=candidate), images(32, seed=2)
    with torch.inference_mode():
        reference = trunk(torch.from_numpy(pixels)).numpy()
    model = open_built(built, folder)
    return (
        centred_cosine(reference, answers(model, pixels)),
        (folder / built.files[0].path).stat().st_size,
        model.facts(),
    )


@pytest.mark.mobile
@pytest.mark.parametrize("format_", ["executorch", "litert"])
def test_a_transformer_is_near_with_float_between_its_layers(format_: str, tmp_path: Path) -> None:
    needs(format_)
    plain = Candidate(name="x", quantiser=QUANTISERS[format_])
    for settings in ({"weighted_only": True}, {"activations": "dynamic"}):
        cosines, size, facts = judge(format_, replace(plain, **settings), vit(), tmp_path / next(iter(settings)))
        assert cosines.mean() > 0.99 and size < 2.5e6 and facts["provider"] == "xnnpack"
        assert facts.get("input_dtype", "float32") == "float32"  # LiteRT's is int8 where all operators are


class _Clamped(nn.Module):
    """A first layer whose outputs reach far beyond its ReLU6."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Conv2d(3, 32, 3), nn.ReLU6(), nn.Conv2d(32, 16, 1)
        self.first.weight.data *= 200

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x))).mean((2, 3))


@pytest.mark.mobile
def test_a_range_ends_where_the_activation_function_clamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("executorch")
    plain, trunk = Candidate(name="x", quantiser="pt2e"), _Clamped().eval()
    near, _, _ = judge("executorch", plain, trunk, tmp_path / "clamped")
    monkeypatch.setattr(by_pt2e, "_bounds", lambda node: saturation.EVERYTHING)
    far, _, _ = judge("executorch", plain, trunk, tmp_path / "whole")
    assert near.mean() > 0.98 and 1 - far.mean() > 5 * (1 - near.mean())


class _SameStem(nn.Module):
    """A stem with TensorFlow's padding, as EfficientNet-Lite has it, and a pointwise convolution."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = Conv2dSame(3, 32, 3, stride=2), nn.Conv2d(32, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.relu6(self.first(x))).mean((2, 3))


@pytest.mark.mobile
def test_a_stem_with_its_own_padding_stays_in_float_where_activations_are_dynamic(tmp_path: Path) -> None:
    needs("executorch")
    candidate = Candidate(name="x", quantiser="pt2e", activations="dynamic")
    cosines, _, _ = judge("executorch", candidate, _SameStem().eval(), tmp_path / "same")
    assert cosines.min() > 0.99  # XNNPACK used to refuse the file: "Propagating input shapes failed"


@pytest.mark.mobile
@pytest.mark.parametrize("network", [resnet, vit])
@pytest.mark.parametrize("format_", ["executorch", "litert"])
def test_sensitive_layers_stay_in_float(format_: str, network: Any, tmp_path: Path) -> None:
    needs(format_)
    trunk = network()
    request = make_request(format_, "fp32", trunk)
    path = tmp_path / "model.onnx"
    model = to_onnx.export_onnx(
        export_model(trunk, request.student), path, student=request.student, batch=None, opset=20
    )
    kept = read_facts(model).weighted[1:]
    plain = Candidate(name="x", quantiser=QUANTISERS[format_], weighted_only=True)
    near, large, _ = judge(format_, replace(plain, float_nodes=kept), trunk, tmp_path / "kept")
    far, small, _ = judge(format_, plain, trunk, tmp_path / "int8")
    weights = 4 * sum(parameter.numel() for parameter in trunk.parameters())
    assert large > 0.8 * weights and small < 0.5 * weights
    assert 1 - near.mean() < 0.5 * (1 - far.mean())


@pytest.mark.mobile
@pytest.mark.parametrize("format_", ["executorch", "litert"])
def test_an_export_tries_the_ladder_in_the_formats_own_runtime(
    format_: Any, cnn_run: Path, scenes: Path, tmp_path: Path
) -> None:
    needs(format_)
    settings = ExportSettings(
        run=cnn_run, target=ExportTarget(format=format_, precision="int8"), data=scenes, out=tmp_path / "bundle",
        calibration_images=32, candidates=2,
    )  # fmt: skip
    bundle = export(settings)
    tried = [rung for rung in bundle.rungs if rung.precision == "int8"]
    assert len(tried) == 2 and all(f"computed by {format_}" in rung.reason for rung in tried)
    assert bundle.precision in ("int8", "fp32") and bundle.format == format_


@pytest.mark.mobile
def test_ncnn_fp16_halves_the_weights(tmp_path: Path) -> None:
    needs("ncnn")
    trunk, pixels = cnn(), images(8, seed=2)
    built = convert("ncnn", "fp16", trunk, tmp_path)
    weights = sum(p.numel() for p in trunk.parameters())
    assert (tmp_path / "model.ncnn.bin").stat().st_size < 2.2 * weights
    with torch.inference_mode():
        reference = trunk(torch.from_numpy(pixels)).numpy()
    assert centred_cosine(reference, answers(open_built(built, tmp_path), pixels)).min() > 0.99


@pytest.mark.mobile
@pytest.mark.parametrize("network", [cnn, vit])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_coreml_has_the_promised_types_and_says_what_was_not_checked(
    precision: str, network: Any, tmp_path: Path
) -> None:
    needs("coreml")
    trunk = network()
    built = convert("coreml", precision, trunk, tmp_path)
    assert [f.path for f in built.files if f.role == "model"] == ["model.mlpackage/Manifest.json"]
    assert "not compared" in built.notes[0]
    assert ("weights are int8" in " ".join(built.notes)) == (precision == "int8")
    import coremltools

    loaded = coremltools.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True)
    description = loaded.get_spec().description
    ends = [description.input[0], description.output[0]]
    assert [(end.name, list(end.type.multiArrayType.shape)) for end in ends] == [
        ("pixels", [1, 3, SIZE, SIZE]),
        ("embedding", [1, trunk.num_features]),
    ]
    float32 = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32
    assert all(end.type.multiArrayType.dataType == float32 for end in ends)
    weights = sum(p.numel() for p in trunk.parameters())
    bytes_a_weight = {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    size = (tmp_path / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert 0.9 * bytes_a_weight * weights < size < 1.3 * bytes_a_weight * weights


@pytest.mark.mobile
@pytest.mark.parametrize("format_", ["executorch", "litert", "ncnn"])
def test_a_damaged_file_is_refused_in_one_line(format_: str, tmp_path: Path) -> None:
    needs(format_)
    built = convert(format_, "fp32", cnn(), tmp_path)
    (file,) = (f for f in built.files if f.role == "model")
    (tmp_path / file.path).write_bytes(b"not a model at all" * 100)
    with pytest.raises(RuntimeError, match="cannot open") as caught:
        open_built(built, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format_", sorted(BUILDERS))
def test_a_missing_converter_names_its_extra(format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("executorch", "executorch.exir", "litert_torch", "coremltools", "pnnx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"robx\[{format_}\]"):
        convert(format_, "fp32", vit(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format_", "precision", "options", "words"),
    [
        ("executorch", "fp16", {}, "ExecuTorch is exported as fp32 or int8, not fp16"),
        ("litert", "fp16", {}, "LiteRT is exported as fp32 or int8, not fp16"),
        ("ncnn", "int8", {}, "ncnn is exported as fp32 or fp16, not int8"),
        ("ncnn", "fp32", {"batch": 2}, "one image"),
    ],
)
def test_what_a_format_does_not_have_is_refused(
    format_: str, precision: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        convert(format_, precision, vit(), tmp_path, **options)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": False}])
def test_plain_attention_is_timms_with_at_most_four_axes(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = {"embed_dim": 24, "num_heads": 3, "depth": 2, "img_size": SIZE, "patch_size": 16, "num_classes": 0}
    trunk = timm.models.VisionTransformer(**{**settings, **options}).eval()
    with torch.no_grad():
        for parameter in trunk.parameters():  # biases and norms that are not zero and one
            parameter.add_(0.2 * torch.randn_like(parameter))
    plain = mobile_model(trunk, make_request("ncnn", "fp32", vit()))
    assert sum(isinstance(module, PlainAttention) for module in plain.modules()) == 2
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        torch.testing.assert_close(plain(pixels), trunk(pixels), rtol=1e-4, atol=1e-5)
    graph = torch.export.export(plain, (pixels,)).run_decompositions({}).graph
    shapes = [node.meta["val"].shape for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(len(shape) for shape in shapes) == 4
    names = {str(node.target) for node in graph.nodes}
    assert not any("scaled_dot" in name for name in names)
    original = torch.export.export(trunk, (pixels,)).graph  # the test would notice were timm's own of four axes
    assert max(len(n.meta["val"].shape) for n in original.nodes if isinstance(n.meta.get("val"), torch.Tensor)) == 5


def test_calibration_comes_in_whole_batches() -> None:
    request = make_request("litert", "int8", vit(), batch=3)
    batches = calibration_batches(images(8, seed=0), request)
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, SIZE, SIZE)] * 2
    with pytest.raises(InputError, match="2 calibration images are fewer than one batch of 3"):
        calibration_batches(images(2, seed=0), request)
    with pytest.raises(InputError, match="0 calibration images"):
        calibration_batches(None, request)
    assert tuple(example_input(request).shape) == (3, 3, SIZE, SIZE)


def test_layers_that_ncnn_lacks_are_found() -> None:
    layers = [
        "Input in0 0 1 in0",
        "Convolution conv 1 1 in0 1 0=3",
        "aten::where odd 1 1 1 out0",
        "torch.roll r 1 1 a b",
    ]
    param = "\n".join(["7767517", "4 4", *layers, ""])
    assert to_ncnn._foreign_layers(param) == ["aten::where", "torch.roll"]


finite = st.floats(-1e3, 1e3, width=32)


@given(hnp.arrays(np.float32, (2, 3), elements=finite), st.floats(1e-3, 10), st.integers(-128, 127))
def test_int8_ends_round_within_half_a_step_and_saturate(values: np.ndarray, scale: float, zero: int) -> None:
    details = {"dtype": np.int8, "quantization": (scale, zero)}
    integers = on_litert.quantize(values, details)
    assert integers.dtype == np.int8
    low, high = (-128 - zero) * scale, (127 - zero) * scale
    back = on_litert.dequantize(integers, details)
    inside = np.clip(values.astype(np.float64), low, high)
    assert back.dtype == np.float32
    assert (np.abs(back - inside) <= 0.5 * scale * (1 + 1e-4) + 1e-4 * np.abs(inside)).all()


def test_float_ends_pass_through() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    details = {"dtype": np.float32, "quantization": (0.0, 0)}
    np.testing.assert_array_equal(on_litert.quantize(values, details), values)
    np.testing.assert_array_equal(on_litert.dequantize(values, details), values)


@pytest.mark.parametrize("name", ["tensorrt", "executorch", "litert", "ncnn"])
def test_an_engine_file_is_python_3_8_and_imports_nothing_of_robx_but_the_device_folder(name: str) -> None:
    import ast

    source = Path(on_litert.__file__).with_name(f"on_{name}.py").read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported = {name.split(".")[0] for name in names if not name.startswith("robx.runtime.device.")}
    own = {"tensorrt": {"torch", "cuda"}, "executorch": {"torch", "executorch"}, "litert": set(), "ncnn": {"ncnn"}}[
        name
    ]
    standard = set(sys.stdlib_module_names) | {"numpy", "__future__"}
    assert imported - standard == own
    top = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert not top & own  # imported when a model is opened


def test_an_attention_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for Core ML, whose outputs no engine here can compare."""
    trunk = vit()
    monkeypatch.setattr(PlainAttention, "forward", lambda self, x, *_, **__: self.proj(x))
    with pytest.raises(ArtifactError, match="tiny with plain attention differs from PyTorch"):
        mobile_model(
            export_model(trunk, make_request("coreml", "fp32", trunk).student), make_request("coreml", "fp32", trunk)
        )
