from __future__ import annotations

import numpy as np
import pytest
import torch

from robx.distill.objectives.build import build_objective
from robx.distill.objectives.rob_dino import RobDino
from robx.distill.objectives.rob_ibot import RobIbot
from robx.distill.objectives.rob_swav import RobSwav, swav_targets
from robx.distill.recipes import preset
from robx.distill.targets.centering import TargetProcessor


def batches(number: int, *, batch: int = 4, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 2, batch, width, generator=generator)


def test_by_default_only_the_objective_applies() -> None:
    processor = TargetProcessor(RobDino())
    for scores in batches(3):
        torch.testing.assert_close(processor.probs(scores), (scores / 0.07).softmax(dim=-1))


def test_centre_by_hand() -> None:
    processor = TargetProcessor(RobDino(), centering=True, center_momentum=0.9)
    centre = torch.zeros(5)
    for scores in batches(4):
        torch.testing.assert_close(processor.probs(scores), ((scores - centre) / 0.07).softmax(dim=-1))
        centre = 0.9 * centre + 0.1 * scores.mean(dim=(0, 1))
    torch.testing.assert_close(processor.center, centre)


def test_patches_have_their_own_centre_over_all_patches() -> None:
    processor = TargetProcessor(RobIbot(), centering=True, center_momentum=0.5)
    centre = torch.zeros(5)
    for scores in batches(3):
        chosen = scores[:, :2].flatten(0, 1)
        mean = scores.mean(dim=(0, 1))
        torch.testing.assert_close(processor.patch_probs(chosen, mean=mean), ((chosen - centre) / 0.07).softmax(dim=-1))
        centre = 0.5 * centre + 0.5 * mean
    torch.testing.assert_close(processor.patch_center, centre)
    assert processor.center is None


def test_only_ibot_has_patches() -> None:
    with pytest.raises(NotImplementedError, match="no targets for patches"):
        TargetProcessor(RobDino()).patch_probs(torch.zeros(2, 5))


@pytest.mark.parametrize("epochs", [1, 2, 4, 30])
def test_the_warm_up_is_a_staircase_over_epochs(epochs: int) -> None:
    """DINO's schedule: linspace(first, last, epochs), then last; the epoch's value in each of its steps."""
    per_epoch, total = 5, epochs + 3
    processor = TargetProcessor(RobDino(), temperatures=(0.04, 0.07), warmup_epochs=epochs, steps_per_epoch=per_epoch)
    schedule = np.concatenate([np.linspace(0.04, 0.07, epochs), np.full(total - epochs, 0.07)])
    for step in range(total * per_epoch):
        processor.step = step
        assert processor.temperature == pytest.approx(schedule[step // per_epoch], rel=1e-12)
    scores = batches(1)[0]
    processor.step = 2
    torch.testing.assert_close(processor.probs(scores), (scores / 0.04).softmax(dim=-1))


def test_a_warm_up_of_no_epochs_is_none() -> None:
    assert TargetProcessor(RobDino(), temperatures=(0.04, 0.07), warmup_epochs=0).temperature is None


def test_queue_enlarges_sinkhorns_batch_once_it_is_full() -> None:
    objective = RobSwav()
    processor = TargetProcessor(objective, queue=6)
    first, second, third, fourth = batches(4).unbind(0)
    codes = {"epsilon": 0.03, "sinkhorn_iterations": 3}
    torch.testing.assert_close(processor.probs(first), swav_targets(first, **codes))  # type: ignore[arg-type]
    torch.testing.assert_close(processor.probs(second), swav_targets(second, **codes))  # type: ignore[arg-type]
    joined = torch.cat([third, second, first[:, :2]], dim=1)
    torch.testing.assert_close(processor.probs(third), swav_targets(joined, **codes)[:, :4])  # type: ignore[arg-type]
    joined = torch.cat([fourth, third, second[:, :2]], dim=1)
    torch.testing.assert_close(processor.probs(fourth), swav_targets(joined, **codes)[:, :4])  # type: ignore[arg-type]


def test_a_resumed_processor_continues_identically() -> None:
    def fresh() -> TargetProcessor:
        return TargetProcessor(
            RobSwav(), centering=True, temperatures=(0.05, 0.03), warmup_epochs=3, steps_per_epoch=3, queue=6
        )

    whole, first = fresh(), fresh()
    scores = batches(5)
    for step, batch in enumerate(scores[:3]):
        whole.probs(batch)
        first.probs(batch)
        whole.step = first.step = step + 1
    resumed = fresh()
    resumed.load_state_dict(first.state_dict())
    for batch in scores[3:]:
        assert torch.equal(resumed.probs(batch), whole.probs(batch))


def test_only_the_base_methods_presets_centre_and_warm_up() -> None:
    recipe = preset("dino", "vit", base=True)
    processor = TargetProcessor.of(recipe, build_objective(recipe), steps_per_epoch=7)
    assert processor.centering
    assert processor.temperatures == (0.04, 0.07)
    assert (processor.warmup_epochs, processor.steps_per_epoch) == (30, 7)
    for method in ("dino", "ibot", "msn", "swav"):
        recipe = preset(method, "vit")  # type: ignore[arg-type]
        plain = TargetProcessor.of(recipe, build_objective(recipe), steps_per_epoch=7)
        assert not plain.centering
        assert plain.temperature is None
        assert not plain.queue_size
