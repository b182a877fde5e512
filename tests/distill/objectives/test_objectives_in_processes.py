"""What the objectives add up over processes: Sinkhorn's batch, me-max's mean, the centre."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from robx.distill.objectives.rob_dino import RobDino
from robx.distill.objectives.rob_msn import mean_entropy
from robx.distill.objectives.sinkhorn import sinkhorn
from robx.distill.targets.centering import TargetProcessor
from tests.preloaded import Preloaded

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from robx.distill.objectives.rob_dino import RobDino
from robx.distill.objectives.rob_msn import mean_entropy
from robx.distill.targets.centering import TargetProcessor
from robx.distill.objectives.sinkhorn import sinkhorn

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
half = torch.load(f"{folder}/scores.pt")[:, rank * 5 : rank * 5 + 5].clone().requires_grad_()
entropy = mean_entropy(half, temperature=0.2)

processor = TargetProcessor(RobDino(), centering=True)
processor.probs(half.detach())
processor.probs(half.detach())
weight = torch.ones((), dtype=half.dtype, requires_grad=True)
mean_entropy(half.detach() * weight, temperature=0.2).backward()
dist.all_reduce(weight.grad)
torch.save(
    {
        "plan": sinkhorn(half.detach()[0], iterations=3),
        "entropy": entropy.detach(),
        "gradient": weight.grad / 2,
        "center": processor.center,
    },
    f"{folder}/{rank}.pt",
)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, preloaded: Preloaded) -> tuple[Tensor, list[dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    scores = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.save(scores, folder / "scores.pt")
    running = [preloaded.start(["-c", SCRIPT, folder, rank]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return scores, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_sinkhorn_balances_the_global_batch(halves: tuple[Tensor, list[dict[str, Tensor]]]) -> None:
    scores, parts = halves
    torch.testing.assert_close(torch.cat([part["plan"] for part in parts]), sinkhorn(scores[0], iterations=3))


def test_me_max_and_its_gradient_are_those_of_the_global_batch(halves: tuple[Tensor, list[dict[str, Tensor]]]) -> None:
    scores, parts = halves
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    entropy = mean_entropy(scores * weight, temperature=0.2)
    (gradient,) = torch.autograd.grad(entropy, weight)
    for part in parts:
        torch.testing.assert_close(part["entropy"], entropy.detach())
        # DDP takes the mean of the processes' gradients.
        torch.testing.assert_close(part["gradient"], gradient)


def test_the_centre_is_that_of_the_global_batch(halves: tuple[Tensor, list[dict[str, Tensor]]]) -> None:
    scores, parts = halves
    alone = TargetProcessor(RobDino(), centering=True)
    alone.probs(scores)
    alone.probs(scores)
    for part in parts:
        torch.testing.assert_close(part["center"], alone.center)
