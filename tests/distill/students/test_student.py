from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from robx.distill.batches.masks import block_masks, drop_masks
from robx.distill.batches.views import Views
from robx.distill.recipes import Recipe, override, preset
from robx.distill.students.projection_heads import FrozenPrototypes, IbotHead, MlpHead, SwavHead
from robx.distill.students.student import StudentNet, build_student, cancel_last_layer_gradients, patch_grid, unwrapped
from robx.errors import InputError
from robx.records import Preprocessing, Student
from robx.trunk import build_trunk, save_trunk
from tests.preloaded import Preloaded

VIT, CNN = "test_vit", "test_resnet"
TEACHER = {"name": "big", "num_prototypes": 12, "patch_size": 16, "patch_prototypes": 12}


@dataclass
class Spec:
    name: str
    num_prototypes: int
    patch_size: int | None
    patch_prototypes: int | None


def small(method: str, **values: object) -> Recipe:
    return override(
        preset(method, "vit"),  # type: ignore[arg-type]
        {"crop_size": 64, "local_crop_size": 32, "local_crops": 3, "drop_path": 0.0, **values},
    )


def views(batch: int = 2, *, local: int = 3, masks: Tensor | None = None) -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views(
        torch.randn(2, batch, 3, 64, 64, generator=generator),
        torch.randn(local, batch, 3, 32, 32, generator=generator),
        torch.arange(batch),
        masks,
    )


def masks_of(batch: int) -> Tensor:
    each = [block_masks((4, 4), [(0.4, 0.0)], seed=0, epoch=0, index=i) for i in range(batch)]
    return torch.from_numpy(np.stack(each, axis=1))


@pytest.mark.parametrize("name", [VIT, CNN, "mobilenetv3_small_050"])
@pytest.mark.parametrize("method", ["dino", "ibot", "msn", "swav", "kd"])
def test_every_method_scores_every_crop(name: str, method: str) -> None:
    student = build_student(name, small(method), Spec(**TEACHER)).eval()  # type: ignore[arg-type]
    held = views()
    scores = student(held)
    assert scores.crops.shape == (5, 2, 12)
    one_by_one = [student.head(student.trunk(crop)) for crop in [*held.globals, *held.locals]]
    torch.testing.assert_close(scores.crops, torch.stack(one_by_one), rtol=1e-4, atol=1e-5)


def test_no_local_crops() -> None:
    student = build_student(VIT, small("dino"), Spec(**TEACHER))  # type: ignore[arg-type]
    assert student(views(local=0)).crops.shape == (2, 2, 12)


def test_masked_patches_are_the_only_ones_hidden_and_scored() -> None:
    student = build_student(VIT, small("ibot"), Spec(**TEACHER)).eval()  # type: ignore[arg-type]
    assert student.masked_embed is not None
    masks = masks_of(2)
    held = views(masks=masks)
    before = student(held)
    assert before.patches is not None and before.patches.shape == (int(masks.sum()), 12)
    # What lies under the mask does not matter, and everything else does.
    hidden = masks.view(2, 2, 4, 4).repeat_interleave(16, -2).repeat_interleave(16, -1)[:, :, None]
    noise = torch.randn_like(held.globals)
    under = Views(torch.where(hidden, noise, held.globals), held.locals, held.index, masks)
    torch.testing.assert_close(student(under).crops, before.crops)
    torch.testing.assert_close(student(under).patches, before.patches)
    beside = Views(torch.where(hidden, held.globals, noise), held.locals, held.index, masks)
    assert (student(beside).crops[:2] - before.crops[:2]).abs().amin(dim=(0, 1)).max() > 1e-4
    # The patches' scores stand in the order of masks.nonzero().
    _, tokens = student.embed_globals(held.globals, masks=masks)
    assert tokens is not None
    place = [tuple(at) for at in masks.nonzero().tolist()]
    for row, (g, b, p) in enumerate(place):
        torch.testing.assert_close(before.patches[row], student.head.patches(tokens[2 * g + b][p : p + 1])[0])  # type: ignore[operator]


def test_the_mask_token_learns() -> None:
    student = build_student(VIT, small("ibot"), Spec(**TEACHER))  # type: ignore[arg-type]
    student(views(masks=masks_of(2))).patches.square().sum().backward()
    assert student.masked_embed is not None and student.masked_embed.grad is not None
    assert student.masked_embed.grad.any()
    assert not any("masked" in name for name in student.trunk.state_dict())


def test_an_unmasked_student_is_its_plain_trunk() -> None:
    student = build_student(VIT, small("ibot"), Spec(**TEACHER)).eval()  # type: ignore[arg-type]
    held = views()
    features, tokens = student.embed_globals(held.globals)
    torch.testing.assert_close(features, student.trunk(held.globals.flatten(0, 1)))
    assert tokens is not None and tokens.shape == (4, 16, 64)


def test_dropped_patches_are_not_seen_and_the_cls_token_stays() -> None:
    student = build_student(VIT, small("msn", patch_drop=0.5), Spec(**TEACHER))  # type: ignore[arg-type]
    each = [drop_masks((4, 4), 0.5, seed=0, epoch=0, index=i) for i in range(2)]
    masks = torch.from_numpy(np.stack(each, axis=1))
    held = views(masks=masks)
    seen: list[int] = []
    student.trunk.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))  # type: ignore[union-attr]
    before = student(held).crops
    prefix = student.trunk.num_prefix_tokens
    assert seen == [prefix + 8, prefix + 4]  # half of a global crop's patches, all of a local one's
    hidden = masks.view(2, 2, 4, 4).repeat_interleave(16, -2).repeat_interleave(16, -1)[:, :, None]
    noise = torch.randn_like(held.globals)
    under = Views(torch.where(hidden, noise, held.globals), held.locals, held.index, masks)
    torch.testing.assert_close(student(under).crops, before)
    beside = Views(torch.where(hidden, held.globals, noise), held.locals, held.index, masks)
    assert (student(beside).crops[:2] - before[:2]).abs().max() > 1e-4


def test_positions_are_added_before_patches_are_dropped() -> None:
    """With all but one patch dropped, which one it is still matters."""
    student = build_student(VIT, small("msn", patch_drop=0.93), Spec(**TEACHER))  # type: ignore[arg-type]
    nn.init.normal_(student.trunk.pos_embed)  # type: ignore[arg-type]
    flat = Views(torch.ones(2, 1, 3, 64, 64), torch.zeros(0, 1, 3, 32, 32), torch.arange(1))
    masks = torch.ones(2, 1, 16, dtype=torch.bool)
    masks[0, 0, 3] = masks[1, 0, 7] = False
    scores = student(Views(flat.globals, flat.locals, flat.index, masks)).crops
    assert (scores[0] - scores[1]).abs().max() > 1e-4


def test_patches_are_dropped_in_training_only() -> None:
    student = build_student(VIT, small("msn", patch_drop=0.5), Spec(**TEACHER))  # type: ignore[arg-type]
    held = views()
    torch.manual_seed(0)
    first = student(held).crops
    torch.manual_seed(0)
    torch.testing.assert_close(student(held).crops, first)
    assert (student(held).crops[:2] - first[:2]).abs().max() > 1e-6  # other patches
    torch.testing.assert_close(student(held).crops[2:], first[2:])
    whole = student.eval()(held).crops
    torch.testing.assert_close(whole[0], student.head(student.trunk(held.globals[0])))


def test_which_students_have_masks() -> None:
    ibot = build_student(VIT, small("ibot"), Spec(**TEACHER))  # type: ignore[arg-type]
    assert ibot.mask_grid(64) == (4, 4)
    assert ibot.drop_grid(64) is None
    msn = build_student(VIT, small("msn"), Spec(**TEACHER))  # type: ignore[arg-type]
    assert msn.mask_grid(64) is None
    assert msn.drop_grid(64) == (4, 4)
    assert ibot.mask_grid((160, 96)) == (10, 6) == msn.drop_grid((160, 96))
    with pytest.raises(InputError, match="70 pixels do not divide into patches of 16"):
        patch_grid(ibot.trunk, 70)
    with pytest.raises(InputError, match="64x70 pixels do not divide into patches of 16"):
        patch_grid(ibot.trunk, (64, 70))


def test_a_vit_at_another_shape_is_timms_of_that_size() -> None:
    """Position embeddings, tokens and features at 160 x 96 are those of timm's network of that image size."""
    recipe = small("msn", patch_drop=0.15, crop_size="160x96", local_crop_size="64x32")
    student = build_student(VIT, recipe, Spec(**TEACHER))  # type: ignore[arg-type]
    reference = timm.create_model(VIT, num_classes=0, img_size=(160, 96), global_pool="token").eval()
    state = student.trunk.state_dict()
    positions = resample_abs_pos_embed(state["pos_embed"], (10, 6), num_prefix_tokens=reference.num_prefix_tokens)
    reference.load_state_dict(state | {"pos_embed": positions})
    pixels = torch.randn(2, 3, 160, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(student.eval().trunk(pixels), reference(pixels), rtol=1e-4, atol=1e-5)
    seen = []
    student.trunk.norm_pre.register_forward_hook(lambda _, __, tokens: seen.append(tokens.shape[1]))  # type: ignore[union-attr]
    masks = torch.from_numpy(drop_masks((10, 6), 0.15, seed=0, epoch=0, index=0))[:1, None].expand(1, 2, 60)
    features, _ = student.train().embed_globals(pixels[None], masks=masks)
    assert seen == [reference.num_prefix_tokens + 51]  # of 60 patches 15 % are dropped
    assert features.shape == (2, student.trunk.num_features)


def test_block_masks_need_two_patches_a_side() -> None:
    student = build_student(VIT, small("ibot", crop_size="16x64", local_crops=0), Spec(**TEACHER))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"crops of 16x64 pixels have 1 x 4 patches, .*: give larger crops"):
        student.mask_grid((16, 64))


@pytest.mark.parametrize(
    ("name", "recipe", "teacher", "why"),
    [
        (CNN, {}, {}, "no patch tokens"),
        (VIT, {}, {"patch_size": 8}, "of 16 pixels and big of 8"),
        (VIT, {}, {"patch_prototypes": None}, "no patch prototypes"),
        (VIT, {"head": "mlp"}, {"patch_prototypes": 9}, "one number of outputs"),
        (VIT, {"patch_weight": 0.0}, {}, "patch_weight is 0"),
    ],
)
def test_a_student_off_the_teachers_grid_says_so(
    name: str, recipe: dict[str, object], teacher: dict[str, object], why: str
) -> None:
    student = build_student(name, small("ibot", **recipe), Spec(**(TEACHER | teacher)))  # type: ignore[arg-type]
    assert why in student.note
    assert student.mask_grid(64) is None
    assert student(views()).patches is None


def test_heads_follow_the_recipe_and_the_teacher() -> None:
    apart = build_student(VIT, small("ibot"), Spec("big", 12, 16, 20)).head
    assert isinstance(apart, IbotHead) and apart.last_layer2 is not apart.last_layer
    assert isinstance(build_student(VIT, small("msn"), Spec(**TEACHER)).head, MlpHead)  # type: ignore[arg-type]
    cnn = build_student(CNN, small("dino", head="mlp"), Spec(**TEACHER)).head  # type: ignore[arg-type]
    assert isinstance(cnn, MlpHead) and isinstance(cnn.bn1, nn.BatchNorm1d)
    own = build_student(CNN, small("swav", prototypes=30), None).head
    assert isinstance(own, SwavHead) and own.prototypes.weight.shape == (30, 128)


def test_a_teachers_prototypes_score_the_student() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Module()
            self.head.register_buffer("prototypes", torch.randn(12, 32))
            self.name, self.num_prototypes, self.patch_size, self.patch_prototypes = "big", 12, None, None

    teacher, recipe = Whole(), small("swav", swav_prototypes="teacher")
    head = build_student(CNN, recipe, teacher).head
    assert isinstance(head, FrozenPrototypes)
    assert torch.equal(head.prototypes, nn.functional.normalize(teacher.head.prototypes, dim=-1))
    assert head.project(torch.randn(2, 96)).shape == (2, 32)
    with pytest.raises(InputError, match="set swav_prototypes = own"):
        build_student(CNN, recipe, Spec(**TEACHER))  # type: ignore[arg-type]


def test_drop_path_is_for_vits() -> None:
    student = build_student(VIT, small("dino", drop_path=0.3), Spec(**TEACHER))  # type: ignore[arg-type]
    assert any(getattr(module, "drop_prob", 0) for module in student.modules())
    build_student(CNN, small("dino", drop_path=0.3), Spec(**TEACHER))  # type: ignore[arg-type]


def test_a_cnn_student_of_msn_drops_no_patches() -> None:
    student = build_student(CNN, small("msn"), Spec(**TEACHER))  # type: ignore[arg-type]
    assert student.patch_drop == 0
    assert "no patches to drop" in student.note
    with pytest.raises(InputError, match="plain ViT"):
        StudentNet(build_trunk(CNN), nn.Identity(), patch_drop=0.1)


def test_a_fixed_size_trunk_is_refused_with_other_crops() -> None:
    with pytest.raises(InputError, match="local_crops = 0"):
        build_student("swin_tiny_patch4_window7_224", small("dino", crop_size=224), Spec(**TEACHER))  # type: ignore[arg-type]


def test_masks_of_another_grid_are_refused() -> None:
    student = build_student(VIT, small("ibot"), Spec(**TEACHER))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="9 patches do not fit global crops of 16"):
        student(views(masks=torch.zeros(2, 2, 9, dtype=torch.bool)))


def test_last_layer_gradients_are_cancelled_through_wrappers() -> None:
    student = build_student(VIT, small("dino"), Spec(**TEACHER))  # type: ignore[arg-type]
    student(views()).crops.square().sum().backward()
    last = student.head.last_layer.weight_v  # type: ignore[union-attr]
    assert last.grad is not None
    wrapped = nn.Sequential()
    wrapped.module = student
    cancel_last_layer_gradients(wrapped)
    assert last.grad is None
    assert student.head.mlp[0].weight.grad is not None  # type: ignore[index,union-attr]
    assert unwrapped(wrapped) is student


def test_order_of_the_batch_does_not_matter() -> None:
    student = build_student(VIT, small("ibot"), Spec(**TEACHER)).eval()  # type: ignore[arg-type]
    masks = masks_of(3)
    held = views(3, masks=masks)
    order = torch.tensor([2, 0, 1])
    moved = Views(held.globals[:, order], held.locals[:, order], held.index[order], masks[:, order])
    torch.testing.assert_close(student(moved).crops, student(held).crops[:, order], rtol=1e-4, atol=1e-5)


def test_a_record_that_names_a_giant_network_takes_no_memory(tmp_path: Path, preloaded: Preloaded) -> None:
    trunk = build_trunk(VIT)
    student = Student(
        timm_name=VIT,
        width=64,
        preprocessing=Preprocessing(size=64, crop=64),
        sha256="",
        teacher=None,
        data=None,
        recipe={},
        images_seen=0,
        robx_version="0",
    )
    save_trunk(tmp_path, trunk, student)
    text = (tmp_path / "student.json").read_text()
    (tmp_path / "student.json").write_text(text.replace(VIT, "vit_giant_patch14_dinov2"))
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from robx.errors import ArtifactError\n"
        "from robx.trunk import load_trunk\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_trunk(Path(sys.argv[1]))\n"
        "except ArtifactError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    _, said, errors = preloaded.run(["-c", code, tmp_path])
    assert said, errors
    message, grown = said.splitlines()
    assert "do not fit vit_giant_patch14_dinov2" in message and int(grown) < 500  # MiB; its weights have 4,500
