"""The tests' torch.onnx.export: an equal network is read back, and any other one is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from tests.once_exported import OnceExported


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()).eval()


def _weight(net: nn.Sequential) -> None:
    net[0].weight.data[0, 0, 0, 0] += 1e-3


def _statistics(net: nn.Sequential) -> None:
    net[1].running_mean[0] = 1  # type: ignore[index, operator]


def _setting(net: nn.Sequential) -> None:
    net[1].eps = 1e-3  # type: ignore[assignment]


def _structure(net: nn.Sequential) -> None:
    net[2] = nn.ReLU()


@pytest.mark.parametrize("change", [_weight, _statistics, _setting, _structure, None])
def test_what_was_exported_is_reused_for_an_equal_network_alone(
    change: Callable[[nn.Sequential], None] | None, tmp_path: Path
) -> None:
    exported: list[nn.Module] = []

    def export(model: nn.Module, *_: object, **__: object) -> Any:
        exported.append(model)
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], f"g{len(exported)}", [value], [value])
        return SimpleNamespace(model_proto=helper.make_model(graph))

    def name(net: nn.Sequential, *, images: int = 2, **options: Any) -> str:
        found = OnceExported(export, tmp_path / "onnx")(net, (torch.zeros(images, 3, 8, 8),), dynamo=True, **options)
        return str(found.model_proto.graph.name)

    assert name(_network()) == name(_network()) == "g1"
    net = _network()
    if change is None:
        assert name(net, images=1) == "g2" and name(net, opset_version=18) == "g3"
    else:
        change(net)
        assert name(net) == "g2"
    assert name(_network()) == "g1"
