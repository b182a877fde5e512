from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robx.distill.students.projection_heads import (
    DinoHead,
    FrozenPrototypes,
    IbotHead,
    MlpHead,
    MsnHead,
    SwavHead,
    WeightNormLinear,
)
from robx.errors import InputError


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(dim=-1, keepdim=True).sqrt()


def test_weight_norm_equals_torchs_own() -> None:
    ours = WeightNormLinear(5, 7, train_norm=True)
    nn.init.uniform_(ours.weight_g, 0.5, 2)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False))
    theirs.parametrizations.weight.original0.data.copy_(ours.weight_g.data)
    theirs.parametrizations.weight.original1.data.copy_(ours.weight_v.data)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)


def test_dino_head_has_the_published_names_and_formula() -> None:
    head = DinoHead(6, 10, hidden=8, bottleneck=4)
    state = head.state_dict()
    assert list(state) == [
        *[f"mlp.{i}.{what}" for i in (0, 2, 4) for what in ("weight", "bias")],
        *["last_layer.weight_g", "last_layer.weight_v"],
    ]
    assert state["last_layer.weight_g"].shape == (10, 1)
    x = torch.randn(3, 6)
    hidden = nn.functional.gelu(x @ state["mlp.0.weight"].T + state["mlp.0.bias"])
    hidden = nn.functional.gelu(hidden @ state["mlp.2.weight"].T + state["mlp.2.bias"])
    hidden = unit(hidden @ state["mlp.4.weight"].T + state["mlp.4.bias"])
    torch.testing.assert_close(head(x), hidden @ unit(state["last_layer.weight_v"]).T)
    assert not head.last_layer.weight_g.requires_grad


def test_dino_head_of_the_published_resnet() -> None:
    head = DinoHead(6, 10, hidden=8, bottleneck=4, layers=2, batch_norm=True, weight_norm=False)
    assert {"mlp.0.weight", "mlp.1.running_mean", "mlp.3.weight", "last_layer.weight"} <= set(head.state_dict())
    assert head(torch.randn(3, 6)).shape == (3, 10)


def test_ibot_shares_one_last_layer_under_both_names() -> None:
    head = IbotHead(6, 10, hidden=8, bottleneck=4)
    assert {"last_layer.weight_v", "last_layer2.weight_v"} <= set(head.state_dict())
    assert head.last_layer is head.last_layer2
    x = torch.randn(3, 6)
    torch.testing.assert_close(head.patches(x), head(x))
    apart = IbotHead(6, 10, patch_out_dim=12, shared=False, hidden=8, bottleneck=4)
    assert apart.patches(torch.randn(2, 5, 6)).shape == (2, 5, 12)
    with pytest.raises(InputError, match="got 12 and 10"):
        IbotHead(6, 10, patch_out_dim=12)


@pytest.mark.parametrize("head", [IbotHead(6, 10, hidden=8, bottleneck=4), MlpHead(6, 10, hidden=8)])
def test_mean_of_patch_scores(head: IbotHead | MlpHead) -> None:
    tokens = torch.randn(20, 6)
    torch.testing.assert_close(head.mean_patch_scores(tokens), head.patches(tokens).mean(dim=0))


def test_msn_scores_are_cosines() -> None:
    head = MsnHead(6, 10, hidden=8, bottleneck=4).eval()
    assert {f"projection.{n}.weight" for n in ("fc1", "bn1", "fc2", "bn2", "fc3")} <= set(head.state_dict())
    x = torch.randn(3, 6)
    scores = head(x)
    torch.testing.assert_close(scores, head.projection(x) @ unit(head.prototypes).T)
    assert scores.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.prototypes.mul_(3)
    torch.testing.assert_close(head(x), scores)


def test_swav_scores_are_cosines_and_names_are_published() -> None:
    head = SwavHead(6, 10, hidden=8, bottleneck=4).eval()
    state = head.state_dict()
    assert {"projection_head.0.weight", "projection_head.1.running_var", "projection_head.3.bias"} <= set(state)
    torch.testing.assert_close(state["prototypes.weight"].norm(dim=-1), torch.ones(10))
    x = torch.randn(3, 6)
    torch.testing.assert_close(head(x), unit(head.projection_head(x)) @ state["prototypes.weight"].T)


def test_frozen_prototypes_are_the_teachers_and_not_parameters() -> None:
    prototypes = torch.randn(10, 5)
    head = FrozenPrototypes(6, prototypes, hidden=8)
    assert "prototypes" in head.state_dict()
    assert "prototypes" not in dict(head.named_parameters())
    x = torch.randn(4, 6)
    torch.testing.assert_close(head.eval()(x), head.project(x) @ unit(prototypes).T)


def test_mlp_head_is_linear_for_a_vit_and_normalised_for_a_cnn() -> None:
    plain = MlpHead(6, 10, hidden=8)
    a, b = torch.randn(2, 3, 6)
    zero = plain(torch.zeros(3, 6))
    torch.testing.assert_close(plain(a + b) - zero, plain(a) + plain(b) - 2 * zero)
    assert "bn1.running_mean" in MlpHead(6, 10, hidden=8, batch_norm=True).state_dict()


def test_gradients_of_the_heads() -> None:
    for head in (
        DinoHead(3, 5, hidden=4, bottleneck=3, train_norm=True),
        MsnHead(3, 5, hidden=4, bottleneck=3).eval(),
        SwavHead(3, 5, hidden=4, bottleneck=3).eval(),
    ):
        head(torch.randn(4, 3)).square().sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


def test_half_precision_features_are_normalised_in_float32() -> None:
    head = DinoHead(6, 10, hidden=8, bottleneck=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bottleneck = head.bottleneck(torch.randn(3, 6))
    assert bottleneck.dtype == torch.float32
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(3))


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1 layer"):
        DinoHead(6, 10, layers=0)
