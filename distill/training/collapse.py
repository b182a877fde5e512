"""Detecting failed runs: collapse of the embeddings, and losses or gradients that are not finite.

N images   D width
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from robx.errors import RobxError

# Below these values a representation has collapsed; features without structure have std 1 and rank D.
MIN_STD = 0.02
MIN_RANK = 2.0
# Before this step the student is not judged. BatchNorm's running statistics, with which the trunk is run here, start at
# 0 and 1 and keep .9^n of that after n steps (momentum .1): .5 % after 50, but 81 % after two, and then all embeddings
# are alike whatever was learned. Until then a student is also close to its random weights, with which the logits of all
# images may have one maximum.
MIN_STEPS = 50
UNIFORM = 0.98  # fraction of the maximum entropy, log K, above which targets carry no information


class NotFinite(RobxError):
    """A loss or a gradient is NaN or infinite; the step is discarded."""


@torch.no_grad()
def embedding_health(trunk: nn.Module, pixels: Tensor) -> dict[str, float]:
    """Spread of the trunk's embeddings of `pixels` (N, 3, H, W), N > 1, in eval mode; its state is unchanged.

    Returns:
        embedding_std: mean over dimensions of the standard deviation of L2-normalised embeddings, times sqrt(D): near 1
            without structure, 0 if all images give the same (Chen & He 2021, arXiv 2011.10566, section 4.1).
        embedding_rank: exp of the entropy of the normalised singular values of the centred embeddings (RankMe, Garrido
            et al. 2023, arXiv 2210.02885): the number of dimensions in use, at most min(N, D).
    """
    training = trunk.training
    trunk.eval()
    features = trunk(pixels).float()
    trunk.train(training)
    return spread(features)


def spread(features: Tensor) -> dict[str, float]:
    """embedding_std and embedding_rank of embeddings (N, D)."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    std = unit.std(dim=0).mean() * unit.shape[1] ** 0.5
    values = torch.linalg.svdvals(unit - unit.mean(dim=0))
    share = values / values.sum().clamp(min=1e-12)
    rank = torch.special.entr(share).sum().exp() if values.sum() > 1e-9 else torch.ones(())
    return {"embedding_std": float(std), "embedding_rank": float(rank)}


def warnings(health: Mapping[str, float], *, step: int, prototypes: int | None = None) -> list[str]:
    """Warnings about a run with these metrics after `step` steps; empty if there are none.

    The targets are judged from the first step on, the student from MIN_STEPS on. With `prototypes`, K, nearly uniform
    targets are reported too; those of supervised KD are soft by design.
    """
    found, judged = [], step >= MIN_STEPS
    collapsed = health.get("embedding_std", 1.0) < MIN_STD or health.get("embedding_rank", MIN_RANK + 1) < MIN_RANK
    if judged and collapsed:
        found.append(
            f"the student has collapsed: its embeddings have std {health['embedding_std']:.4f} and rank "
            f"{health['embedding_rank']:.1f}; lower --lr"
        )
    if health.get("target_use", 2.0) < 1.1:
        found.append("the targets use one prototype for all images; change the teacher or raise teacher_temperature")
    if prototypes and health.get("target_entropy", 0.0) > UNIFORM * math.log(prototypes):
        found.append(
            f"the targets are nearly uniform, entropy {health['target_entropy']:.2f} of at most "
            f"{math.log(prototypes):.2f}, and carry no information; lower teacher_temperature, or use a teacher with "
            "a trained head"
        )
    if judged and health.get("student_use", 2.0) < 1.02 and health.get("target_use", 2.0) > 2:
        found.append("the student assigns all images to the same prototype; lower --lr, or lengthen the warm-up")
    return found


def targets_not_finite(*, step: int, images: Sequence[str]) -> NotFinite:
    """The error for NaN targets of finite pixels, which names the images of the batch."""
    return NotFinite(
        f"the teacher's targets are NaN at step {step}; the images are {_some(images)}. This step was not saved: check "
        "the teacher's weights, or give --precision fp32"
    )


def not_finite(name: str, value: float, *, step: int, images: Sequence[str]) -> NotFinite:
    """The error for a NaN or infinite loss or gradient norm, which names the images of the batch."""
    return NotFinite(
        f"the {name} is {value:g} at step {step}; its images are {_some(images)}. This step was not saved: "
        "lower --lr, give --precision fp32, or remove the faulty image, then run the same command to resume"
    )


def _some(images: Sequence[str]) -> str:
    return ", ".join(images[:8]) + (f" and {len(images) - 8} more" if len(images) > 8 else "")
