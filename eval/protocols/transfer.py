"""Transfer: BatchNorm + Linear heads on a frozen trunk and another data set, each with its benchmark's recipe."""

from __future__ import annotations

from dataclasses import dataclass

from robx.eval.protocols.linear import VISSL
from robx.eval.protocols.trained_heads import HeadRecipe


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How heads are trained on one data set."""

    recipe: HeadRecipe
    crop: bool = True  # False: whole images are resized to the square, in training and evaluation


TRANSFERS = {
    "folder": Transfer(recipe=VISSL),
    "cifar10": Transfer(recipe=VISSL),
    "cifar100": Transfer(recipe=VISSL),
    "fashion_mnist": Transfer(recipe=VISSL),
    "inat18": Transfer(recipe=HeadRecipe(epochs=84, milestones=(24, 48, 72))),
    "places205": Transfer(recipe=HeadRecipe(epochs=14, milestones=(4, 8, 12))),
    "clevr_count": Transfer(recipe=HeadRecipe(epochs=50)),
    "clevr_dist": Transfer(recipe=HeadRecipe(epochs=100), crop=False),
}
