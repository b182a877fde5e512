from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.rob_dino import RobDino
from robx.distill.recipes import Recipe, override, preset
from robx.distill.targets.stored import StoredBranch, TargetsInfo, pack, unpack
from robx.distill.targets.stored_writer import TargetWriter, WritingBranch
from robx.errors import ArtifactError, InputError
from robx.store.written import Written

RECIPE = preset("dino", "vit")


def info(**values: object) -> TargetsInfo:
    settings = {"prototypes": 32, "images": 20, "data_fingerprint": "d", "teacher_sha256": "t", "k": 8} | values
    return TargetsInfo.of(RECIPE, **settings)  # type: ignore[arg-type]


def decided_by(recipe: Recipe) -> dict[str, object]:
    return TargetsInfo.of(recipe, prototypes=32, images=20, data_fingerprint="d", teacher_sha256="t").decided_by


def views(index: list[int], *, epoch: int = 0) -> Views:
    batch = len(index)
    return Views(torch.zeros(2, batch, 3, 1, 1), torch.zeros(0, batch, 3, 1, 1), torch.tensor(index), epoch=epoch)


def draw(batch: int, *, seed: int = 0, width: int = 32) -> Tensor:
    return (3 * torch.randn(2, batch, width, generator=torch.Generator().manual_seed(seed))).softmax(dim=-1)


def test_targets_come_back_by_epoch_and_index_in_any_order(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path / "targets", info(dtype="float32"))
    probs = {epoch: draw(6, seed=epoch) for epoch in (0, 1)}
    for epoch in (0, 1):
        writer.write(views([3, 17, 0], epoch=epoch), Targets(probs[epoch][:, :3]))
        writer.write(views([19, 4, 8], epoch=epoch), Targets(probs[epoch][:, 3:]))
    writer.finish()
    branch = StoredBranch(tmp_path / "targets")
    assert branch.epochs == [0, 1]
    for epoch, order in ((1, [4, 0]), (0, [8, 3, 17])):
        got = branch.targets(views(order, epoch=epoch))
        places = [[3, 17, 0, 19, 4, 8].index(i) for i in order]
        top = probs[epoch][:, places].topk(8, dim=-1)
        torch.testing.assert_close(got.probs, top.values)
        assert torch.equal(got.columns, top.indices)  # type: ignore[arg-type]
        torch.testing.assert_close(got.tail, 1 - top.values.sum(dim=-1))


def test_the_file_is_what_the_documentation_says(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path, info())
    probs = draw(1)
    writer.write(views([5]), Targets(probs))
    writer.finish()
    table = np.load(tmp_path / "epoch-00000.npy", allow_pickle=False)
    assert table.shape == (20,)
    assert table.dtype["columns"] == np.dtype(("<u2", (2, 8)))
    assert table.dtype["probs"] == np.dtype(("<f2", (2, 8)))
    assert table.dtype["tail"] == np.dtype(("<f4", (2,)))
    order = np.argsort(-probs[:, 0].numpy(), axis=-1)[:, :8]
    np.testing.assert_array_equal(table["columns"][5], order)
    np.testing.assert_allclose(table["probs"][5], np.take_along_axis(probs[:, 0].numpy(), order, axis=-1), rtol=1e-3)
    assert not table["probs"][4].any()
    assert json.loads((tmp_path / "targets.json").read_text())["prototypes"] == 32


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 32), half=st.booleans())
def test_packed_targets_have_mass_one(seed: int, k: int, half: bool) -> None:
    held = info(k=k, dtype="float16" if half else "float32")
    targets, mass = unpack(pack(Targets(draw(4, seed=seed)), held))
    assert targets.tail is not None
    torch.testing.assert_close(targets.probs.sum(dim=-1) + targets.tail, torch.ones(2, 4))
    assert (mass - 1).abs().max() < 5e-3


def test_sparse_targets_can_be_stored_with_fewer_columns() -> None:
    probs = draw(3)
    wide, _ = unpack(pack(Targets(probs), info(k=16, dtype="float32")))
    twice, _ = unpack(pack(wide, info(k=4, dtype="float32")))
    once, _ = unpack(pack(Targets(probs), info(k=4, dtype="float32")))
    assert torch.equal(twice.columns, once.columns)  # type: ignore[arg-type]
    torch.testing.assert_close(twice.probs, once.probs)
    torch.testing.assert_close(twice.tail, once.tail)


def test_a_loss_on_all_columns_is_the_loss_on_the_teachers_own(tmp_path: Path) -> None:
    class Fixed:
        def targets(self, held: Views) -> Targets:
            return Targets(draw(len(held.index), seed=7))

        def update(self, step: int, student: nn.Module) -> None:
            self.updated = step

        def state_dict(self) -> dict[str, object]:
            return {"fixed": 1}

        def load_state_dict(self, state: dict[str, object]) -> None:
            self.loaded = state

    inner = Fixed()
    live = WritingBranch(inner, TargetWriter(tmp_path, info(k=32, dtype="float32")))
    held = views([1, 2, 3])
    student = torch.randn(4, 3, 32, requires_grad=True)
    dense, _ = RobDino()(Scores(student), live.targets(held), held)
    live.update(3, nn.Identity())
    live.load_state_dict(live.state_dict())
    live.settle(epoch_done=True)
    assert inner.updated == 3
    assert inner.loaded == {"fixed": 1}
    stored, _ = RobDino()(Scores(student), StoredBranch(tmp_path).targets(held), held)
    torch.testing.assert_close(stored, dense)
    torch.testing.assert_close(torch.autograd.grad(stored, student), torch.autograd.grad(dense, student))


def test_two_writers_fill_one_epoch(tmp_path: Path) -> None:
    """What two processes do: both open the table, each writes its own rows, in turns."""
    one, two = TargetWriter(tmp_path, info()), TargetWriter(tmp_path, info())
    probs = draw(4)
    one.write(views([0]), Targets(probs[:, :1]))
    two.write(views([1]), Targets(probs[:, 1:2]))
    one.write(views([2]), Targets(probs[:, 2:3]))
    two.write(views([3]), Targets(probs[:, 3:]))
    two.finish()
    one.finish()
    got = StoredBranch(tmp_path).targets(views([0, 1, 2, 3]))
    torch.testing.assert_close(got.probs, probs.topk(8, dim=-1).values, rtol=2e-3, atol=1e-3)


def test_an_unfinished_epoch_is_not_read(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path, info())
    writer.write(views([0], epoch=0), Targets(draw(1)))
    writer.write(views([0], epoch=1), Targets(draw(1)))  # finishes epoch 0
    branch = StoredBranch(tmp_path)
    branch.targets(views([0], epoch=0))
    with pytest.raises(ArtifactError, match=r"no targets of epoch 1 \(complete: 0\)"):
        branch.targets(views([0], epoch=1))
    writer.finish()
    branch.targets(views([0], epoch=1))


def test_an_image_without_targets_is_named(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path, info())
    writer.write(views([0]), Targets(draw(1)))
    writer.finish()
    branch = StoredBranch(tmp_path)
    with pytest.raises(ArtifactError, match="no valid targets of image 13"):
        branch.targets(views([0, 13]))
    with pytest.raises(ArtifactError, match="20 images, none of 20"):
        branch.targets(views([20]))


@pytest.mark.parametrize("damage", ["cut", "dtype", "columns", "nan"])
def test_a_damaged_table_is_refused(tmp_path: Path, damage: str) -> None:
    writer = TargetWriter(tmp_path, info())
    writer.write(views(list(range(20))), Targets(draw(20)))
    writer.finish()
    path = tmp_path / "epoch-00000.npy"
    table = np.load(path)
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:300])
        case "dtype":
            np.save(path, np.zeros(20))
        case "columns":
            table["columns"][3, 0, 0] = 32
            np.save(path, table)
        case "nan":
            table["probs"][3, 0, 0] = np.nan
            np.save(path, table)
    with pytest.raises(ArtifactError, match=r"store (it|them) again"):
        StoredBranch(tmp_path).targets(views([3]))


def test_targets_of_other_crops_images_or_teacher_are_refused(tmp_path: Path) -> None:
    TargetWriter(tmp_path, info())
    StoredBranch(tmp_path, expect=info(k=4, dtype="float32"))  # what is stored decides these
    for change in ({"images": 21}, {"teacher_sha256": "u"}, {"data_fingerprint": "e"}, {"prototypes": 33}):
        with pytest.raises(InputError, match=next(iter(change))):
            StoredBranch(tmp_path, expect=info(**change))
    other = override(RECIPE, {"seed": 1, "global_scale": [0.5, 1.0]})
    expect = dataclasses.replace(info(), decided_by=decided_by(other))
    with pytest.raises(InputError, match=r"seed = 0, not 1, global_scale = \[0.4, 1.0\], not \[0.5, 1.0\]"):
        StoredBranch(tmp_path, expect=expect)
    warmed = override(RECIPE, {"teacher_temperature_start": 0.04, "teacher_temperature_epochs": 3})
    with pytest.raises(InputError, match=r"teacher_temperature_start = None, not 0\.04"):
        StoredBranch(tmp_path, expect=dataclasses.replace(info(), decided_by=decided_by(warmed)))
    TargetWriter(tmp_path / "warmed", dataclasses.replace(info(), decided_by=decided_by(warmed)))
    with pytest.raises(InputError, match=r"teacher_temperature_start = 0\.04, not None"):
        StoredBranch(tmp_path / "warmed", expect=info())
    on_device = dataclasses.replace(info(), decided_by=decided_by(override(RECIPE, {"augment": "device"})))
    with pytest.raises(InputError, match="augment = None, not device"):
        StoredBranch(tmp_path, expect=on_device)
    scaled = override(RECIPE, {"decode": "scaled"})
    with pytest.raises(InputError, match="decode = None, not scaled"):
        StoredBranch(tmp_path, expect=dataclasses.replace(info(), decided_by=decided_by(scaled)))
    # How far a large JPEG is reduced depends on the local crops, too.
    TargetWriter(tmp_path / "scaled", dataclasses.replace(info(), decided_by=decided_by(scaled)))
    fewer = override(scaled, {"local_crops": 0})
    with pytest.raises(InputError, match="needed_side = 430, not "):
        StoredBranch(tmp_path / "scaled", expect=dataclasses.replace(info(), decided_by=decided_by(fewer)))
    local = override(RECIPE, {"local_crops": 2, "local_crop_size": 64, "lr": 1.0, "epochs": 3})
    TargetWriter(
        tmp_path, TargetsInfo.of(local, prototypes=32, images=20, data_fingerprint="d", teacher_sha256="t", k=8)
    )
    with pytest.raises(InputError, match="k = 8, not 4"):
        TargetWriter(tmp_path, info(k=4))


def test_no_targets_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"targets.json is missing"):
        StoredBranch(tmp_path)


def test_patch_targets_are_refused(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path, info())
    with pytest.raises(InputError, match="patch_weight = 0"):
        writer.write(views([0]), Targets(draw(1), patch_probs=torch.zeros(1, 4)))
    assert not list(tmp_path.glob("epoch-*"))


def test_a_full_disk_is_noticed_before_the_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = TargetWriter(tmp_path, info())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="no space left"):
        writer.write(views([0]), Targets(draw(1)))
    assert StoredBranch(tmp_path).epochs == []


@pytest.mark.parametrize("damage", ["empty", "npz", "pickle", "fifo", "folder", "missing", "header"])
def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path, damage: str) -> None:
    writer = TargetWriter(tmp_path, info())
    writer.write(views(list(range(20))), Targets(draw(20)))
    writer.finish()
    path = tmp_path / "epoch-00000.npy"
    table = path.read_bytes()
    path.unlink()
    match damage:
        case "empty":
            path.touch()
        case "npz":
            with path.open("wb") as file:
                np.savez(file, a=np.zeros(3))
        case "pickle":
            with path.open("wb") as file:
                np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "header":
            path.write_bytes(table[:12] + b"((((" * 20 + table[92:])
    with pytest.raises(ArtifactError, match="store it again") as error:
        StoredBranch(tmp_path).targets(views([3]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", -1), ("k", 10**12), ("prototypes", -4), ("prototypes", 10**12), ("crops", 0), ("images", -1), ("k", 0)],
)
def test_impossible_numbers_in_targets_json_are_refused(tmp_path: Path, name: str, value: int) -> None:
    TargetWriter(tmp_path, info())
    path = tmp_path / "targets.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ArtifactError, match=f"{name} = {value} is outside"):
        StoredBranch(tmp_path)


def test_a_table_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    writer = TargetWriter(tmp_path / "targets", info())
    (tmp_path / "targets" / "epoch-00000.npy").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError):
        writer.write(views([0]), Targets(draw(1)))
    assert (tmp_path / "precious").read_text() == "mine"


def test_other_files_beside_the_epochs_are_ignored(tmp_path: Path) -> None:
    TargetWriter(tmp_path, info())
    (tmp_path / "epoch-notes.json").write_text("{}")
    assert StoredBranch(tmp_path).epochs == []


def test_ten_epochs_of_imagenet_fit_in_eight_gigabytes() -> None:
    of_imagenet = TargetsInfo.of(
        RECIPE, prototypes=65_536, images=1_281_167, data_fingerprint="d", teacher_sha256="t", k=64
    )
    assert of_imagenet.row.itemsize == 2 * (64 * 2 + 64 * 2 + 4) == 520
    assert 10 * of_imagenet.images * of_imagenet.row.itemsize < 8e9
    assert TargetsInfo.of(RECIPE, prototypes=65_537, images=9, data_fingerprint="d", teacher_sha256="t").row[
        "columns"
    ].base == np.dtype("<i4")


def test_sixteen_bit_columns_name_every_prototype(tmp_path: Path) -> None:
    wide = info(prototypes=65_536, k=2, dtype="float32")
    probs = torch.zeros(2, 3, 65_536)
    probs[..., 65_535], probs[..., 32_768] = 0.75, 0.25
    writer = TargetWriter(tmp_path, wide)
    writer.write(views([0, 1, 2]), Targets(probs))
    writer.finish()
    got = StoredBranch(tmp_path).targets(views([2, 0]))
    assert got.columns is not None and got.columns[0, 0].tolist() == [65_535, 32_768]
    torch.testing.assert_close(got.probs, torch.tensor([0.75, 0.25]).expand(2, 2, 2))


def test_targets_of_an_earlier_robx_have_32_bit_columns(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path, dataclasses.replace(info(), columns="int32"))
    writer.write(views(list(range(20))), Targets(draw(20)))
    writer.finish()
    path = tmp_path / "targets.json"
    values = json.loads(path.read_text())
    del values["columns"]
    path.write_text(json.dumps(values))
    got = StoredBranch(tmp_path, expect=info()).targets(views([3]))
    assert torch.equal(got.columns, draw(20)[:, [3]].topk(8, dim=-1).indices)  # type: ignore[arg-type]


def test_an_epoch_is_written_again_when_it_is_replayed(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path, info())
    for _ in range(3):  # target_epochs = 1: every epoch is epoch 0
        writer.write(views(list(range(20))), Targets(draw(20)))
        writer.finish()
    assert StoredBranch(tmp_path).epochs == [0]


@pytest.mark.parametrize("name", ["teacher.json", "epoch-00000.npy", "epoch-00001.json"])
def test_a_file_that_robx_did_not_write_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} was not written by robx"):
        TargetWriter(tmp_path, info(), epochs=2)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_more_epochs_never_replace_a_file_of_the_users(tmp_path: Path) -> None:
    TargetWriter(tmp_path, info(), epochs=1)
    (tmp_path / "epoch-00001.npy").write_text("mine")
    with pytest.raises(InputError, match=r"epoch-00001\.npy was not written by robx"):
        TargetWriter(tmp_path, info(), epochs=2)
    assert (tmp_path / "epoch-00001.npy").read_text() == "mine"


def test_a_folder_without_a_record_is_continued(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path, info())
    writer.write(views(list(range(20))), Targets(draw(20)))
    writer.finish()
    (tmp_path / "teacher.json").write_text("{}")
    (tmp_path / ".robx-written").unlink()  # of an earlier version, which kept none
    TargetWriter(tmp_path, info(), epochs=3)
    names = set(Written(tmp_path))
    assert {"targets.json", "teacher.json", "epoch-00000.npy", "epoch-00000.json", "epoch-00002.npy"} <= names
