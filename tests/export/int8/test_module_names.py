"""The PyTorch modules behind a candidate's ONNX nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from robx.errors import ArtifactError
from robx.export.formats.builder import Source
from robx.export.formats.mobile import float_modules, mobile_model
from robx.export.formats.network import ExportModel, export_model, tensor_specs
from robx.export.int8.candidate import Candidate
from robx.export.int8.float_scope import module_names
from robx.export.int8.graph_facts import read_facts
from robx.export.request import ExportRequest, ExportTarget
from robx.trunk import load_trunk


def _network(run: Path) -> ExportModel:
    student, trunk = load_trunk(run)
    return export_model(trunk, student)


def _in_order_of_execution(network: nn.Module) -> list[str]:
    """Names of convolutions and linear layers as they run: the reference, which looks at no weight."""
    called: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.inference_mode():
        network(torch.zeros(1, 3, 64, 64))
    return called


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_each_layer_is_found_by_its_weights(kind: str, request: pytest.FixtureRequest) -> None:
    network, model = _network(request.getfixturevalue(f"{kind}_run")), request.getfixturevalue(f"{kind}_onnx")
    nodes = read_facts(model).weighted
    found = [module_names(network, model, Candidate(name="x", float_nodes=(node,))) for node in nodes]
    assert found == [[name] for name in _in_order_of_execution(network)]


def test_a_layer_that_is_not_there_is_refused(cnn_run: Path, cnn_onnx: onnx.ModelProto) -> None:
    network = _network(cnn_run)
    with pytest.raises(ArtifactError, match=r"nobody.* is not in the ONNX graph"):
        module_names(network, cnn_onnx, Candidate(name="x", float_nodes=("nobody",)))
    other: Any = nn.Sequential(nn.Linear(2, 2))
    node = read_facts(cnn_onnx).weighted[0]
    with pytest.raises(ArtifactError, match="has no counterpart in PyTorch's network"):
        module_names(other, cnn_onnx, Candidate(name="x", float_nodes=(node,)))


def test_attention_is_kept_in_float_as_its_three_projections(
    vit_run: Path, vit_onnx: onnx.ModelProto, tmp_path: Path
) -> None:
    student, _ = load_trunk(vit_run)
    network = _network(vit_run)
    names = _in_order_of_execution(network)
    qkv = next(i for i, name in enumerate(names) if name.endswith("qkv"))
    onnx.save(vit_onnx, tmp_path / "float.onnx")
    inputs, outputs = tensor_specs(student, batch=None, uint8_input=False, labels=None)
    asked = ExportRequest(target=ExportTarget(format="ncnn"), student=student, inputs=inputs, outputs=outputs)
    candidate = Candidate(name="x", float_nodes=(read_facts(vit_onnx).weighted[qkv],))
    source = Source(model=network, onnx=tmp_path / "float.onnx", candidate=candidate)
    mobile = mobile_model(network, asked)
    block = names[qkv].removesuffix(".qkv")
    assert float_modules(source, mobile) == [f"{block}.{part}" for part in ("query", "key", "value")]
    assert all(isinstance(mobile.get_submodule(name), nn.Linear) for name in float_modules(source, mobile))
    assert float_modules(Source(model=network, onnx=tmp_path / "none.onnx"), mobile) == []
