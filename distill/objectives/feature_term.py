"""A term beside a method's loss that matches the teacher's features, and is off in the published recipes.

    1 - cos(P f_s - mean, f_t - mean)      mean over the crops that the teacher sees and over the batch

P projects the student's features to the teacher's width. Centring by the batch's mean removes what all images share,
which dominates the plain cosine of many networks and tells nothing about an image.

M global crops   Q <= M target crops   B batch   D width of the teacher
"""

from __future__ import annotations

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
