"""Real TensorRT-RTX engines, built without a GPU, and what is refused before a device would have to find out."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper

from robx.errors import InputError, MissingExtra
from robx.export.formats import to_tensorrt
from robx.export.formats.builder import BuiltModel, Source
from robx.export.formats.half import to_half
from robx.export.formats.network import export_model, tensor_specs
from robx.export.formats.to_onnx import export_onnx
from robx.export.int8.candidate import Candidate
from robx.export.int8.for_tensorrt import quantize
from robx.export.int8.ranges import choose, collect
from robx.export.request import ExportRequest, ExportTarget
from robx.records import Preprocessing, Student
from robx.store.files import read_json, sha256_file
from tests.quantized_onnx import quantized_nodes

SIZE = 64
DYNAMIC = "--minShapes=pixels:1x3x64x64 --optShapes=pixels:1x3x64x64 --maxShapes=pixels:32x3x64x64"


@dataclass
class Exported:
    student: Student
    folder: Path

    def path(self, precision: str) -> Path:
        return self.folder / f"{precision}.onnx"


def needs_rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'robx[trt-rtx]'")


def export_all(folder: Path, name: str, trunk: torch.nn.Module, width: int) -> Exported:
    student = Student(
        timm_name=name, width=width, preprocessing=Preprocessing(size=SIZE, crop=SIZE), sha256="0" * 64,
        teacher=None, data=None, recipe={},
    )  # fmt: skip
    exported = Exported(student, folder)
    proto = export_onnx(export_model(trunk, student), exported.path("fp32"), student=student, batch=None, opset=20)
    onnx.save(to_half(proto), exported.path("fp16"))
    images = np.random.default_rng(0).normal(size=(8, 3, SIZE, SIZE)).astype(np.float32)
    ranges = choose(collect(proto, [images], input_name="pixels"), "minmax")
    int8 = quantize(proto, ranges, Candidate(name="static", quantiser="tensorrt", signed=True))
    onnx.save(to_half(int8), exported.path("int8"))  # what is not int8 computes in fp16
    return exported


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    # timm starts residual branches at zero, which a compiler folds away.
    trunk = timm.create_model("resnet18", num_classes=0, zero_init_last=False)
    return export_all(tmp_path_factory.mktemp("cnn"), "resnet18", trunk, 512)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    trunk = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, depth=2, global_pool="token", dynamic_img_size=True
    )
    return export_all(tmp_path_factory.mktemp("vit"), "vit_tiny_patch16_224", trunk, 192)


def build(
    exported: Exported, out: Path, *, precision: Any = "fp32", device: str = "local", path: Path | None = None,
    batch: int | None = None,
) -> BuiltModel:  # fmt: skip
    inputs, outputs = tensor_specs(exported.student, batch=batch, uint8_input=False, labels=None)
    target = ExportTarget(format="trt", precision=precision, device=device, batch=batch)
    request = ExportRequest(target=target, student=exported.student, inputs=inputs, outputs=outputs)
    out.mkdir(exist_ok=True)
    return to_tensorrt.build(Source(model=None, onnx=path or exported.path(precision)), request, out)


@pytest.mark.parametrize("network", ["cnn", "vit"])
def test_engines_are_built_for_two_capabilities_in_every_precision(
    network: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    trt = needs_rtx()
    exported: Exported = request.getfixturevalue(network)
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        out = tmp_path / precision
        built = build(exported, out, precision=precision, device="rtx:sm86+sm89")
        assert [(f.path, f.role) for f in built.files] == [
            ("model.onnx", "model"), ("recipe.json", "recipe"), ("model.sm86-sm89.engine", "engine"),
        ]  # fmt: skip
        assert (built.runtime, built.versions) == ("tensorrt_rtx", {"tensorrt_rtx": trt.__version__})
        engine, recipe = out / "model.sm86-sm89.engine", read_json(out / "recipe.json")
        assert recipe["engines"] == [
            {
                "path": engine.name,
                "sha256": sha256_file(engine),
                "runtime": "tensorrt_rtx",
                "version": trt.__version__,
                "capabilities": ["SM86", "SM89"],
            }
        ]
        assert sha256_file(out / "model.onnx") == sha256_file(exported.path(precision)) == recipe["onnx"]["sha256"]
        sizes[precision] = engine.stat().st_size
    # 4, 2 and 1 bytes a weight, beside kernels of a megabyte or two.
    weights = sum(numpy_helper.to_array(i).size for i in onnx.load(exported.path("fp32")).graph.initializer)
    assert sizes["fp32"] > 4 * weights
    assert sizes["fp32"] - sizes["fp16"] > 1.9 * weights
    assert sizes["fp32"] - sizes["int8"] > 2.5 * weights
    assert len(quantized_nodes(onnx.load(exported.path("int8")))) >= 8


def test_a_jetson_gets_the_checked_file_and_the_exact_command(cnn: Exported, tmp_path: Path) -> None:
    built = build(cnn, tmp_path, precision="int8", device="jetson-orin")
    recipe = read_json(tmp_path / "recipe.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "recipe.json"]
    assert built.runtime == recipe["runtime"] == "tensorrt"
    assert recipe["trtexec"] == (
        f"trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.engine --skipInference {DYNAMIC}"
    )
    assert recipe["profile"] == {"pixels": [[1, 3, 64, 64], [1, 3, 64, 64], [32, 3, 64, 64]]}
    assert recipe["engines"] == []
    assert "first use" in " ".join(built.notes)


def test_a_fixed_batch_needs_no_profile(cnn: Exported, tmp_path: Path) -> None:
    build(cnn, tmp_path, device="jetson-orin", batch=4)
    recipe = read_json(tmp_path / "recipe.json")
    assert recipe["profile"] == {}
    assert recipe["trtexec"] == "trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.engine --skipInference"


def test_without_either_package_the_recipe_still_ships(
    cnn: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    built = build(cnn, tmp_path / "a", precision="int8")
    assert (built.runtime, built.versions) == ("tensorrt", {})
    assert "not parsed" in built.notes[0]
    with pytest.raises(MissingExtra, match=r"SM89.*tensorrt_rtx.*robx\[trt-rtx\]"):
        build(cnn, tmp_path / "b", device="rtx:sm89")
    with pytest.raises(InputError, match="uint8"):  # our own check does not need a parser
        build(cnn, tmp_path / "c", precision="int8", path=with_uint8(cnn.path("int8"), tmp_path))


def test_local_is_parsed_by_the_package_that_is_here(cnn: Exported, tmp_path: Path) -> None:
    trt = needs_rtx()
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("this is about machines with tensorrt_rtx alone, and tensorrt is installed")
    built = build(cnn, tmp_path)
    assert built.runtime == "tensorrt_rtx"
    assert built.notes[0] == f"parsed by tensorrt_rtx {trt.__version__}"
    assert read_json(tmp_path / "recipe.json")["checked_by"] == {"tensorrt_rtx": trt.__version__}


def with_uint8(path: Path, folder: Path) -> Path:
    """The int8 model with its activations' zero points retyped to uint8 0, as NNCF writes them behind a ReLU."""
    model = onnx.load(path)
    weights = {i.name for i in model.graph.initializer}
    zero = numpy_helper.from_array(np.zeros((), np.uint8), "uint8_zero")
    model.graph.initializer.append(zero)
    readers = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    changed = 0
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in weights and node.output[0] in readers:
            node.input[2] = readers[node.output[0]].input[2] = zero.name
            changed += 1
    assert changed
    del model.graph.value_info[:]
    onnx.save(model, folder / "uint8.onnx")
    return folder / "uint8.onnx"


def test_uint8_is_refused_by_the_check_and_by_listening_to_the_parser(cnn: Exported, tmp_path: Path) -> None:
    trt = needs_rtx()
    path = with_uint8(cnn.path("int8"), tmp_path)
    with pytest.raises(InputError, match="uint8, and TensorRT takes only int8"):
        build(cnn, tmp_path / "out", precision="int8", path=path, device="rtx:sm89")
    # TensorRT itself takes the file with a warning: the same warning has to stop us.
    recipe = {"profile": {"pixels": [[1, 3, 64, 64]] * 3}, "flags": {"tf32": True}}
    with pytest.raises(InputError, match=r"would read the uint8 Q/DQ of uint8\.onnx as int8"):
        to_tensorrt.build_engine(trt, path, recipe)


def test_the_parsers_own_words_name_the_node(cnn: Exported, tmp_path: Path) -> None:
    needs_rtx()
    x = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [None, 3, 64, 64])
    y = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [None, 3])
    node = helper.make_node("Frobnicate", ["pixels"], ["embedding"], name="odd_one", domain="example")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("example", 1)]
    graph = helper.make_graph([node], "g", [x], [y])
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    with pytest.raises(InputError, match=r"cannot parse model.onnx: .*Frobnicate"):
        build(cnn, tmp_path / "out", path=path, device="rtx:sm89")
    assert not list((tmp_path / "out").glob("*.engine"))


def test_the_builders_own_words_say_what_a_capability_lacks(vit: Exported, tmp_path: Path) -> None:
    needs_rtx()
    with pytest.raises(InputError, match=r"cannot build model.onnx for SM75: (?!it gave no reason)"):
        build(vit, tmp_path, device="rtx:sm75")
    with pytest.raises(InputError, match=r"does not build for sm87: one of .*sm86, sm89"):
        build(vit, tmp_path, device="rtx:sm87")


def test_a_package_without_the_strongly_typed_flag_builds_too(cnn: Exported) -> None:
    trt = needs_rtx()
    later = types.ModuleType("tensorrt_later")
    later.__dict__.update({name: getattr(trt, name) for name in dir(trt)}, __name__="tensorrt_later")
    later.NetworkDefinitionCreationFlag = types.SimpleNamespace()  # type: ignore[attr-defined]
    recipe = {"profile": {"pixels": [[1, 3, 64, 64]] * 3}, "flags": {"tf32": False}}
    assert len(to_tensorrt.build_engine(later, cnn.path("fp16"), recipe, ("SM89",))) > 20_000_000


@pytest.mark.parametrize(
    ("device", "runtime", "capabilities"),
    [
        ("local", None, ()),
        ("jetson-orin", "tensorrt", ()),
        ("rtx:sm89", "tensorrt_rtx", ("SM89",)),
        ("rtx:SM86+sm89", "tensorrt_rtx", ("SM86", "SM89")),
        ("rtx:sm86,sm89,sm86", "tensorrt_rtx", ("SM86", "SM89")),
    ],
)
def test_targets(device: str, runtime: str | None, capabilities: tuple[str, ...]) -> None:
    assert to_tensorrt.parse_target(device) == to_tensorrt.TensorRtTarget(runtime=runtime, capabilities=capabilities)


@pytest.mark.parametrize("device", ["rtx", "rtx:", "rtx:89", "rtx:sm", "cuda:sm89", "jetson-nano", "", "rtx:sm86+"])
def test_unknown_targets_are_refused_with_the_known_ones(device: str) -> None:
    with pytest.raises(InputError, match="local, jetson-orin, rtx:sm89") as caught:
        to_tensorrt.parse_target(device)
    assert repr(device) in str(caught.value)
