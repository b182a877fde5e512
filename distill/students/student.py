"""The student: a timm trunk with a fresh head, and the patches that each method masks or drops.

M global crops   V = M + L student crops   B batch   D width   P patches of a global crop   K prototypes
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from robx.distill.batches.masks import kept_patches
from robx.distill.batches.views import Scores, Views
from robx.distill.objectives.base import TeacherSpec
from robx.distill.objectives.build import OBJECTIVES
from robx.distill.recipes import Recipe
from robx.distill.students.projection_heads import MlpHead, scores_and_embeddings
from robx.distill.students.stage_projections import StageProjections, build_stages
from robx.errors import InputError
from robx.image_size import ImageSize, height_and_width, plain_size
from robx.trunk import build_trunk, embedding_width, fits, is_vit, map_stages, size_error, sizes_near

_PROJECTION = 1024  # hidden width of the feature term's projection


class StudentNet(nn.Module):
    """Trunk and head; scores all crops of a batch, crops of one size together.

    Only the trunk is kept after training. `note` tells the user which part of the method does not apply.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        *,
        num_prototypes: int = 0,
        mask_token: bool = False,
        patch_drop: float = 0.0,
        frozen: bool = False,
        fixed_statistics: bool = False,
        note: str = "",
        projection: nn.Module | None = None,
        stages: StageProjections | None = None,
    ) -> None:
        """Combine trunk and head.

        Args:
            trunk: pixels (N, 3, H, W) -> features (N, D).
            head: features (N, D) -> scores (N, K); with a mask token it also has ``patches``.
            num_prototypes: K, for the collapse monitor; 0 if unknown.
            mask_token: masked patches of the global crops are replaced by a learnable token and scored (RoB-iBOT).
            patch_drop: share of a global crop's patches that is dropped in training (RoB-MSN).
            frozen: the trunk is not trained and stays in eval mode, so BatchNorm keeps its running statistics.
            fixed_statistics: the trunk is trained, but in eval mode, so BatchNorm keeps its running statistics.
            note: one sentence for the user.
            projection: features (N, D) -> (N, width of the teacher), for the feature term.
            stages: projections of the trunk's feature maps, for the stage term.
        """
        super().__init__()
        if (mask_token or patch_drop) and not takes_patches(trunk):
            raise InputError(
                "masking or dropping patches needs a plain ViT student: set patch_drop and patch_weight to 0"
            )
        self.trunk, self.head, self.patch_drop, self.note = trunk, head, patch_drop, note
        self.projection, self.stages = projection, stages
        self.num_prototypes = num_prototypes
        # Name, shape and initial value of iBOT's `masked_embed`.
        self.masked_embed = nn.Parameter(torch.zeros(1, embedding_width(trunk))) if mask_token else None
        self.frozen, self.fixed_statistics = frozen, fixed_statistics
        if frozen:
            trunk.requires_grad_(False)
        if frozen or fixed_statistics:
            trunk.eval()

    def train(self, mode: bool = True) -> StudentNet:
        """Set the mode; a trunk that is frozen, or has fixed statistics, stays in eval mode."""
        super().train(mode)
        if self.frozen or self.fixed_statistics:
            self.trunk.eval()
        return self

    def forward(self, views: Views) -> Scores:
        """Scores of the global crops, then of the local ones, and of the masked patches."""
        large, batch = views.globals.shape[:2]
        maps = None
        if self.stages is None:
            features, tokens = self.embed_globals(views.globals, masks=views.masks)
        else:
            tokens, (last, stages) = None, map_stages(self.trunk, views.globals.flatten(0, 1))
            features, maps = cast(Any, self.trunk).forward_head(last), self.stages(stages)
        projected = None if self.projection is None else self.projection(features).view(large, batch, -1)
        if len(views.locals):
            features = torch.cat([features, self.trunk(views.locals.flatten(0, 1))])
        patches = None
        if self.masked_embed is not None and views.masks is not None and tokens is not None:
            patches = self._head.patches(tokens.flatten(0, 1).index_select(0, views.masked_patches()))
        scores, embeddings, _ = scores_and_embeddings(self.head, features)
        if embeddings is not None:
            embeddings = embeddings[: large * batch].view(large, batch, -1)
        crops = scores.view(large + len(views.locals), batch, -1)
        return Scores(crops=crops, patches=patches, features=projected, maps=maps, embeddings=embeddings)

    def embed_globals(self, pixels: Tensor, *, masks: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features (MB, D) of global crops (M, B, 3, Gh, Gw), and patch tokens (MB, P, D) with a mask token.

        `masks` (M, B, P) selects the patches that the mask token replaces or, without a mask token, that are dropped.
        """
        flat = pixels.flatten(0, 1)
        rows = None if masks is None else masks.flatten(0, 1)
        dropping = bool(self.training and self.patch_drop)
        if self.masked_embed is None and not dropping:
            return self.trunk(flat), None
        trunk = cast(Any, self.trunk)
        x = trunk.patch_embed(flat)
        patches = x[0, ..., 0].numel()
        if rows is not None and rows.shape[1] != patches:
            raise InputError(
                f"masks of {rows.shape[1]} patches do not fit global crops of {patches} patches: check crop_size"
            )
        if self.masked_embed is not None and rows is not None:
            x = torch.where(rows.view(*x.shape[:-1], 1), self.masked_embed.to(x.dtype), x)
        x = trunk._pos_embed(x)
        if dropping:
            x = self._drop(x, rows)
        x = trunk.norm_pre(x)
        x = checkpoint_seq(trunk.blocks, x) if trunk.grad_checkpointing else trunk.blocks(x)
        x = trunk.norm(x)
        tokens = x[:, trunk.num_prefix_tokens :] if self.masked_embed is not None else None
        return trunk.forward_head(x), tokens

    def mask_grid(self, crop_size: ImageSize) -> tuple[int, int] | None:
        """The patch grid (H, W) of iBOT's masks for global crops of `crop_size`; None without a mask token."""
        if self.masked_embed is None:
            return None
        grid = patch_grid(self.trunk, crop_size)
        if min(grid) < 2:  # a block is narrower than the grid, so none would ever fit
            raise InputError(
                f"crops of {plain_size(height_and_width(crop_size))} pixels have {grid[0]} x {grid[1]} patches, and "
                "iBOT's block masks need at least 2 x 2: give larger crops, or patch_weight = 0"
            )
        return grid

    def drop_grid(self, crop_size: ImageSize) -> tuple[int, int] | None:
        """The patch grid (H, W) from which MSN's patches are dropped; None if none are.

        With masks from ``batches/masks.py::drop_masks`` in the views, the dropped patches are a function of the sample.
        Without masks they are drawn from torch's generator, like drop path.
        """
        return patch_grid(self.trunk, crop_size) if self.patch_drop else None

    @property
    def _head(self) -> Any:
        return self.head

    def _drop(self, tokens: Tensor, dropped: Tensor | None) -> Tensor:
        """Keep the prefix tokens and the same number of patches of every crop; positions are already embedded."""
        prefix = cast(int, cast(Any, self.trunk).num_prefix_tokens)
        number, patches = tokens.shape[0], tokens.shape[1] - prefix
        kept = kept_patches(patches, self.patch_drop)
        if dropped is None:
            order = torch.rand(number, patches, device=tokens.device).argsort(dim=1)[:, :kept]
        else:
            order = dropped.to(torch.int8).argsort(dim=1, stable=True)[:, :kept]
        rest = tokens[:, prefix:].gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :prefix], rest], dim=1)


def build_student(name: str, recipe: Recipe, teacher: TeacherSpec | None) -> StudentNet:
    """A student of `teacher`, or of itself (None: the base method), with random weights from torch's generator.

    Raises:
        InputError: an unknown name, or a student or head that does not fit the recipe.
    """
    objective = OBJECTIVES[recipe.objective]
    drop_path = recipe.drop_path if is_vit(name) else 0.0
    trunk = build_trunk(name, image_size=recipe.crop_shape, drop_path=drop_path)
    _require_sizes(name, trunk, recipe)
    outputs = teacher.num_prototypes if teacher else recipe.prototypes
    masks = objective.traits.masks_patches and recipe.prototype_weight > 0
    note = _why_no_patches(name, trunk, recipe, teacher) if masks else ""
    patches = masks and not note
    patch_outputs = (teacher.patch_prototypes if teacher else recipe.prototypes) if patches else None
    drop = recipe.patch_drop if objective.traits.drops_patches else 0.0
    if drop and not takes_patches(trunk):
        drop, note = 0.0, f"{name} has no patches to drop: it sees its global crops in full"
    width = embedding_width(trunk)
    batch_norm = not takes_patches(trunk)
    if not recipe.prototype_weight:
        head: nn.Module = nn.Identity()
    elif recipe.head == "mlp":
        head = MlpHead(width, outputs, batch_norm=batch_norm)
    else:
        head = objective.native_head(width, recipe, outputs=outputs, patch_outputs=patch_outputs, teacher=teacher)
    projection: nn.Module | None = None  # after the head, whose first weights do not depend on it
    if teacher is not None and (recipe.feature_weight or recipe.stage_weight) and not teacher.width:
        key = "feature_weight" if recipe.feature_weight else "stage_weight"
        raise InputError(f"{key} needs the teacher's features, which stored targets lack: give --teacher")
    if recipe.feature_weight and teacher is not None:
        if recipe.feature_projection == "linear":
            projection = nn.Linear(width, teacher.width)
        else:
            projection = MlpHead(width, teacher.width, hidden=_PROJECTION, batch_norm=batch_norm)
    if recipe.stage_weight and (patches or drop):
        raise InputError("stage_weight compares whole feature maps: set patch_drop = 0, or patch_weight = 0 with iBOT")
    stages = build_stages(name, trunk, teacher) if recipe.stage_weight and teacher is not None else None
    return StudentNet(
        trunk,
        head,
        num_prototypes=outputs,
        mask_token=patches,
        patch_drop=drop,
        frozen=recipe.freeze_trunk,
        fixed_statistics=recipe.quantize is not None,
        note=note,
        projection=projection,
        stages=stages,
    )


def takes_patches(trunk: nn.Module) -> bool:
    """Whether patches can be masked or dropped: a plain ViT with a CLS token."""
    return type(trunk) is VisionTransformer and trunk.cls_token is not None


def patch_grid(trunk: nn.Module, crop_size: ImageSize) -> tuple[int, int]:
    """Patches (H, W) of a crop.

    Raises:
        InputError: the patches do not divide the crop.
    """
    size, (height, width) = _patch_size(trunk), height_and_width(crop_size)
    if height % size or width % size:
        shown = plain_size((height, width))
        raise InputError(f"crops of {shown} pixels do not divide into patches of {size} pixels: choose a multiple")
    return height // size, width // size


def cancel_last_layer_gradients(student: nn.Module) -> None:
    """Drop the gradients of the head's last layer, as DINO, iBOT and SwAV (prototypes) do in the first epochs."""
    for name, parameter in student.named_parameters():
        if any(part in f".{name}" for part in (".head.last_layer", ".head.prototypes")):
            parameter.grad = None


def unwrapped(student: nn.Module) -> StudentNet:
    """The StudentNet inside DistributedDataParallel or a compiled module."""
    inner: nn.Module = student
    while not isinstance(inner, StudentNet):
        nested = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if not isinstance(nested, nn.Module):
            raise TypeError(f"{type(student).__name__} does not contain a StudentNet")
        inner = nested
    return inner


def _why_no_patches(name: str, trunk: nn.Module, recipe: Recipe, teacher: TeacherSpec | None) -> str:
    """Why this student is trained with RoB-iBOT's CLS part only, in a sentence; empty when it has both parts."""
    alone = "RoB-iBOT uses only its CLS part: "
    if not recipe.patch_weight:
        return alone + "patch_weight is 0"
    if not takes_patches(trunk):
        return alone + f"{name} has no patch tokens"
    if teacher is None:
        return ""
    if teacher.patch_prototypes is None or teacher.patch_size is None:
        return alone + f"{teacher.name} has no patch prototypes"
    if _patch_size(trunk) != teacher.patch_size:
        return alone + f"{name} has patches of {_patch_size(trunk)} pixels and {teacher.name} of {teacher.patch_size}"
    if recipe.head == "mlp" and teacher.patch_prototypes != teacher.num_prototypes:
        return alone + "an mlp head has one number of outputs, and the teacher has another for patches"
    return ""


def _patch_size(trunk: nn.Module) -> int:
    return int(cast(Any, trunk).patch_embed.patch_size[0])


def _require_sizes(name: str, trunk: nn.Module, recipe: Recipe) -> None:
    """Refuse crop sizes that the trunk cannot process, because of a fixed input size or of its patch size."""
    takes = functools.partial(fits, name, built_for=recipe.crop_shape)
    if not takes(recipe.crop_shape) and (why := size_error(trunk, recipe.crop_shape)):
        nearest = " and ".join(f"{size}" for size in sizes_near(name, recipe.crop_shape)) or "none nearby"
        raise InputError(
            f"{name} cannot process crops of {recipe.crop_size} pixels ({why}): set crop_size to one that it can "
            f"(nearest: {nearest})"
        )
    local = recipe.local_crop_shape
    if recipe.local_crops and not takes(local) and (why := size_error(trunk, local)):
        raise InputError(
            f"{name}, built for crops of {recipe.crop_size} pixels, cannot process local crops of "
            f"{recipe.local_crop_size} ({why}): set local_crop_size = {recipe.crop_size} or local_crops = 0"
        )
