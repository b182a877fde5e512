"""RoB-SwAV: predict the teacher's balanced assignment of the batch (arXiv 2301.09451; SwAV, arXiv 2006.09882).

    p_t = Sinkhorn(scores_t / 0.03, 3 iterations)     H(p_t, softmax(z_s / 0.1)), mean over the pairs and the batch

0 iterations mean softmax(scores_t / 0.03). A queue of earlier scores, which makes the batch of Sinkhorn larger, is the
branch's; it comes in as more rows of `scores`.

Q target crops   V student crops   B batch   K prototypes
"""

from __future__ import annotations

from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Stats, loss_stats
from robx.distill.objectives.cross_entropy import crops_cross_entropy
from robx.distill.objectives.pairs import Pairing, crop_pairs
from robx.distill.objectives.sinkhorn import assignments


def swav_targets(scores: Tensor, *, epsilon: float, sinkhorn_iterations: int) -> Tensor:
    """Each crop's codes (Q, B, K), in float32 (SwAV, arXiv 2006.09882, eq. 3 and 4)."""
    return assignments(scores, temperature=epsilon, iterations=sinkhorn_iterations)


class RobSwav(nn.Module):
    """The objective of RoB-SwAV, and of SwAV with an EMA branch of momentum 0 and swapped pairs."""

    def __init__(
        self,
        *,
        epsilon: float = 0.03,
        student_temperature: float = 0.1,
        pairing: Pairing = "same",
        sinkhorn_iterations: int = 3,
    ) -> None:
        super().__init__()
        self.epsilon, self.student_temperature = epsilon, student_temperature
        self.pairing, self.sinkhorn_iterations = pairing, sinkhorn_iterations

    def target_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Scores (Q, B, K) -> codes (Q, B, K); `temperature` stands in for epsilon."""
        epsilon = self.epsilon if temperature is None else temperature
        return swav_targets(scores, epsilon=epsilon, sinkhorn_iterations=self.sinkhorn_iterations)

    def forward(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The loss and, with `observe`, its statistics."""
        student = scores.crops
        pairs = crop_pairs(self.pairing, student_crops=student.shape[0], teacher_crops=targets.probs.shape[0])
        loss = crops_cross_entropy(student, targets, pairs=pairs, temperature=self.student_temperature)
        return loss, loss_stats(student, targets, temperature=self.student_temperature) if observe else {}
