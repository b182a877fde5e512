"""Frozen teachers: a trunk, its pretraining head and prototypes, read whole from what was published.

    name --zoo--> file --checkpoints--> tensors --> trunk + head --> Teacher (eval, no gradient, never trained)

A Teacher always takes pixels that were normalised with ImageNet's mean and standard deviation, which is what the crops
give; one that was trained with another normalisation folds the change in. Its scores are BEFORE any temperature.

N images   D width of the trunk   K prototypes (or head outputs, or classes)   P patches
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from robx.records import Preprocessing, TeacherInfo
from robx.sources import ImageSource

Method = Literal["dino", "ibot", "msn", "swav", "headless", "classifier"]
Progress = Callable[[int, int, str], None]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TeacherScores:
    """What a teacher says of N images, in float32, before the temperature."""

    crops: Tensor  # (N, K): dino, ibot: head logits; msn, headless: cosines; swav: prototype scores; classifier: logits
    patches: Tensor | None  # (N, P, Kp), the patch tokens' head logits; iBOT only
    features: Tensor  # (N, D), what the trunk answers


class Teacher(nn.Module):
    """A frozen network with its head: no gradient, and always in eval mode, whatever ``.train()`` is asked for."""

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module | None,
        *,
        name: str,
        method: Method,
        info: TeacherInfo,
        preprocessing: Preprocessing,
        width: int,
        num_prototypes: int,
        patch_size: int | None = None,
        patch_prototypes: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        """Freeze `trunk` and `head`; `mean` and `std` are those that the trunk was trained with."""
        super().__init__()
        self.trunk, self.head = trunk, head
        self.name, self.method, self.info, self.preprocessing = name, method, info, preprocessing
        self.width, self.num_prototypes = width, num_prototypes
        self.patch_size, self.patch_prototypes = patch_size, patch_prototypes
        scale, shift = fold_normalisation(mean, std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode: BatchNorm keeps its running statistics, dropout and drop path stay off."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TeacherScores:
        """Score pixels (N, 3, H, W) that are normalised with ImageNet's mean and standard deviation."""
        raise NotImplementedError


def fold_normalisation(mean: tuple[float, float, float], std: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """Scale and shift, (3, 1, 1) each, from pixels normalised as ImageNet's to pixels normalised by `mean` and `std`.

    x = p std_i + mean_i, so (x - mean) / std = p (std_i / std) + (mean_i - mean) / std.
    """
    have_mean, have_std, want_mean, want_std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    )
    return (have_std / want_std).float(), ((have_mean - want_mean) / want_std).float()


def load_teacher(
    name: str,
    *,
    weights: Path | None = None,
    cache: Path | None = None,
    source: ImageSource | None = None,
    prototypes: int = 1024,
    objective: str | None = None,
    image_size: int = 224,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Teacher:
    """Read, or download once and read, a teacher.

    Args:
        name: a name of the zoo; ``dino``, ``ibot``, ``msn`` or ``swav`` for any file of that layout (with `weights`);
            or ``timm:NAME`` for a trunk of timm's.
        weights: the file to read instead of downloading one.
        cache: where downloads and fitted prototypes are kept; ``$ROBX_CACHE`` or ``~/.cache/robx`` by default.
        source: the images that prototypes are fitted to, for a teacher that was published without a head.
        prototypes: K of the fitted prototypes; a published head keeps its own.
        objective: ``dino``, ``ibot``, ``msn``, ``swav`` or ``kd``; refuses a teacher that cannot serve it, and makes
            ``kd`` keep the classifier. None takes what the teacher has.
        image_size: pixels of the square that the teacher will see; prototypes are fitted at this size.
        seed: of the fitting.
        device: where the fitting runs and where the teacher is left.
        progress: called with (done, total, note), for the download and the fitting.

    Raises:
        InputError: unknown name, no network, or a teacher without what `objective` needs; the message says what to do.
        ArtifactError: a file that is damaged, of another method, or of another architecture.
    """
    raise NotImplementedError


def build_teacher_skeleton(
    name: str, *, objective: str | None = None, prototypes: int = 1024, image_size: int = 224
) -> Teacher:
    """The teacher's network with random weights, no file and no network: for ``--dry-run``; its sha256 is empty.

    Raises:
        InputError: unknown name, or a teacher that cannot serve `objective`.
    """
    raise NotImplementedError
