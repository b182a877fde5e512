"""The stage term's projections: a student's feature maps to the channels of its teacher's (FitNets' regressors).

Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550, with a map of every stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from robx.distill.objectives.base import TeacherSpec
from robx.errors import InputError
from robx.trunk import map_strides

_ALIKE = 1.5  # two strides within this factor show about the same parts of an image


class StageProjections(nn.Module):
    """A 1 x 1 convolution for each map of the teacher, from the student's map of the nearest stride.

    A map of the teacher without one of about its stride is left out. If all are, as with ViTs of patches of 8 and of 16
    pixels, the two nearest meet.
    """

    def __init__(self, student: Mapping[int, int], teacher: Mapping[int, int]) -> None:
        """`student` and `teacher` are {stride: channels}, of `robx.trunk.map_strides`."""
        super().__init__()
        nearest = {stride: min(student, key=lambda other: _distance(other, stride)) for stride in sorted(teacher)}
        alike = {theirs: ours for theirs, ours in nearest.items() if _distance(ours, theirs) < math.log(_ALIKE)}
        closest = min(nearest, key=lambda theirs: _distance(nearest[theirs], theirs))
        self.pairs = alike or {closest: nearest[closest]}  # {the teacher's stride: the student's}
        self.convolutions = nn.ModuleDict(
            {str(theirs): nn.Conv2d(student[ours], teacher[theirs], 1) for theirs, ours in self.pairs.items()}
        )

    def forward(self, maps: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The trunk's maps {stride: (N, C, h, w)} -> {the teacher's stride: (N, the teacher's channels, h, w)}."""
        return {theirs: self.convolutions[str(theirs)](maps[ours]) for theirs, ours in self.pairs.items()}


def _distance(one: int, other: int) -> float:
    return abs(math.log(one / other))


def build_stages(name: str, trunk: nn.Module, teacher: TeacherSpec) -> StageProjections:
    """The projections of the student `name`, with fresh weights.

    Raises:
        InputError: one of the networks gives no feature maps.
    """
    ours, theirs = map_strides(trunk), teacher.map_strides
    for network, strides in ((teacher.name, theirs), (name, ours)):
        if not strides:
            raise InputError(
                f"{network} gives no feature maps, which stage_weight and so --recipe quick match: give --recipe FILE "
                'with the lines like = "quick" and stage_weight = 0'
            )
    return StageProjections(ours, theirs)
