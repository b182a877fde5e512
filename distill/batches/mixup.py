"""Blend pairs of images before teacher and student see them (mixup, Zhang et al. 2018, arXiv 1710.09412).

Teacher and student get the same blends, so that no labels are needed: the teacher says what a blend is.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from robx.distill.batches.views import Views

_STREAM = 3  # of Philox; others are the crops', the order's and the masks'


def mix(views: Views, *, alpha: float, seed: int, draw: int, rank: int) -> Views:
    """Every image blended with another of the same micro-batch, in all of its crops.

    Args:
        views: a micro-batch.
        alpha: the weight of an image is drawn from Beta(alpha, alpha), and is at least one half.
        seed: of the run.
        draw: the micro-batch's number in the run.
        rank: of the process; like drop path, the blends depend on how many processes share a batch.
    """
    generator = np.random.Generator(
        np.random.Philox(
            key=np.array([seed, _STREAM], dtype=np.uint64), counter=np.array([0, 0, rank, draw], dtype=np.uint64)
        )
    )
    number, device = views.globals.shape[1], views.globals.device
    share = generator.beta(alpha, alpha, size=number).astype(np.float32)
    weights = torch.from_numpy(np.maximum(share, 1 - share)).to(device)
    partners = torch.from_numpy(generator.permutation(number)).to(device)
    large, small = (_blend(crops, weights, partners) for crops in (views.globals, views.locals))
    return dataclasses.replace(views, globals=large, locals=small)


def _blend(crops: Tensor, weights: Tensor, partners: Tensor) -> Tensor:
    """(V, B, 3, H, W) with image b of weight w_b, and its partner of weight 1 - w_b."""
    return torch.lerp(crops[:, partners], crops, weights[None, :, None, None, None]) if len(crops) else crops
