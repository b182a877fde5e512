"""Two terms beside a method's loss that match the teacher's features; both are off in the published recipes.

    feature term   1 - cos(P f_s - mean, f_t - mean)     of the embeddings, mean over crops and batch
    stage term     the same of the feature maps of each stage, mean over crops, batch and places; summed over the stages

P projects the student's features to the teacher's channels. Centring by the batch's mean removes what all images share,
which dominates the plain cosine of many networks and tells nothing about an image. Feature maps as hints for a student:
FitNets, Romero et al. 2015 (arXiv 1412.6550).

M global crops   Q <= M target crops   B batch   D width of the teacher   C channels of a stage   h, w places of a map
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean centred cosine distance, a scalar between 0 and 2.

    Args:
        student: projected features (M, B, D), in the graph; any floating type, computed in float32.
        teacher: features (Q, B, D) of the first Q of these crops.
    """
    ours, theirs = student[: len(teacher)].float(), teacher.float()
    cosines = F.cosine_similarity(ours - ours.mean(dim=1, keepdim=True), theirs - theirs.mean(dim=1, keepdim=True), -1)
    return 1 - cosines.mean()


def stage_loss(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> Tensor:
    """The sum over the student's maps of their mean centred cosine distances, a scalar.

    Args:
        student: projected maps {stride of the teacher's: (MB, C, h, w)}, in the graph, crop by crop.
        teacher: maps {stride: (QB, C, h', w')} of the first Q crops; the larger map is averaged to the other's places.
    """
    return torch.stack([_map_loss(ours, teacher[stride]) for stride, ours in student.items()]).sum()


def _map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (-2, -1))
    ours, theirs = (
        maps if maps.shape[-2:] == (height, width) else F.adaptive_avg_pool2d(maps, (height, width))
        for maps in (student[: len(teacher)], teacher)
    )
    ours, theirs = (maps.movedim(1, -1).flatten(0, -2) for maps in (ours, theirs))
    return feature_loss(ours[None], theirs[None])
