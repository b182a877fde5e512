"""The tensors that pass between the data, the two branches and the objective in one step.

B batch   M global and L local crops   V = M + L student crops   Q <= M target crops   K prototypes (or head outputs)
P patches   D width   Gh, Gw height and width of a global crop, Sh, Sw of a local one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Views:
    """All crops of one batch, already normalised, on the device."""

    globals: Tensor  # (M, B, 3, Gh, Gw) float32; M is 1 or 2
    locals: Tensor  # (L, B, 3, Sh, Sw) float32; L may be 0
    index: Tensor  # (B,) int64, index of each image in the source
    masks: Tensor | None = None  # (M, B, P) bool, True where a patch is masked (RoB-iBOT) or dropped (RoB-MSN)
    epoch: int = 0  # crops are a function of (seed, epoch, index); stored targets are looked up by the last two
    masked: Tensor | None = None  # (M,) int64, places of the masked patches among all 2 * B * P; see masked_patches

    def first(self, images: int) -> Views:
        """The crops of the first `images` images."""
        masks = None if self.masks is None else self.masks[:, :images]
        return Views(self.globals[:, :images], self.locals[:, :images], self.index[:images], masks, self.epoch)

    def masked_patches(self, crops: int = 2) -> Tensor:
        """Places (M,) of the masked patches of the first `crops` global crops, in the order of ``masks.nonzero()``.

        They come with a batch from the loader, because counting them on a GPU makes the host wait for it.

        Raises:
            ValueError: the views have no masks.
        """
        if self.masks is None:
            raise ValueError("these views have no masks")
        if self.masked is not None and crops == len(self.masks):
            return self.masked
        return self.masks[:crops].flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class Targets:
    """Target probabilities of the global crops, never in the autograd graph.

    Dense: ``probs`` holds every column and ``columns`` is None. Sparse (stored targets): ``probs`` (Q, B, k) belong to
    ``columns`` (Q, B, k), and the remaining mass, ``tail`` (Q, B), is spread evenly over the other columns.
    """

    probs: Tensor  # (Q, B, K), rows sum to 1; or (Q, B, k)
    columns: Tensor | None = None  # (Q, B, k) int64
    tail: Tensor | None = None  # (Q, B)
    # (Q, B, P, K_patch), or (rows, K_patch): only the masked patches, in the order of masks.nonzero()
    patch_probs: Tensor | None = None
    features: Tensor | None = None  # (Q, B, D) of the teacher's trunk, for the feature term
    maps: Mapping[int, Tensor] | None = None  # {stride: (QB, C, h, w)} of the teacher's stages, for the stage term


@dataclass(frozen=True)
class Scores:
    """The student's logits of every crop, before the temperature, in the autograd graph."""

    crops: Tensor  # (V, B, K), the global crops first
    patches: Tensor | None = None  # likewise of masked patches, (M, B, P, K_patch) or (rows, K_patch)
    features: Tensor | None = None  # (M, B, D), the global crops' features projected to the teacher's width
    maps: Mapping[int, Tensor] | None = None  # {stride of the teacher's map: (MB, C, h, w)}, projected to its channels
    embeddings: Tensor | None = None  # (M, B, E), detached: what SwAV's prototypes score of the global crops
