"""Heads trained together equal heads trained alone, the schedules, and both linear protocols on a real trunk."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robx.errors import InputError
from robx.eval.datasets.features import Features, extract
from robx.eval.datasets.layouts import DATASETS, ListSource, parse_transfers
from robx.eval.protocols import linear, trained_heads
from robx.eval.protocols.transfer import TRANSFERS
from robx.eval.protocols.trunk_outputs import TrunkSession
from robx.images.arrays import ArraySource
from robx.images.crop_box import DRAWS, crop_box
from robx.images.decode import crop_pixels, preprocess
from robx.images.on_device import normalised
from robx.records import Preprocessing, Student, load_student
from robx.trunk import build_trunk, embed, embedding_width, load_trunk, save_trunk

RECIPE = trained_heads.HeadRecipe(epochs=4, milestones=(2, 3), batch=32)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(linear, "LEAST_STEPS", 150)


def features(n=256, d=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    rows = 2 * np.random.default_rng(7).normal(size=(classes, d))[labels] + rng.normal(size=(n, d))
    return Features(features=rows.astype(np.float32), labels=labels, indices=np.arange(n), skipped=0)


def train(rates, steps=20, recipe=RECIPE):
    data = features()
    made = trained_heads.Heads({"a": 6}, classes=3, recipe=recipe, rates=rates, steps=steps)
    for step in range(steps):
        part = slice(32 * (step % 8), 32 * (step % 8) + 32)
        made.fit_batch({"a": torch.from_numpy(data.features[part])}, torch.from_numpy(data.labels[part]))
    return made


def test_heads_in_one_pass_are_the_heads_alone():
    together = train((0.01, 0.1))
    seen = set()
    for index, rate in enumerate((0.01, 0.1)):
        seen.add(round(float(together._heads[index][1].weight.detach().norm()), 4))
        assert together.names[f"a_lr{rate:g}"] == ("a", rate)
    # The same first weights as the first head of a pass of its own: the second rate must not have touched them.
    alone = train((0.01,))
    torch.testing.assert_close(together._heads[0][1].weight, alone._heads[0][1].weight)
    torch.testing.assert_close(together._heads[0][0].running_mean, alone._heads[0][0].running_mean)
    assert len(seen) == 2


def test_a_folded_head_answers_as_its_norm_and_its_map_do():
    made, rows = train((0.01, 0.1)), 5 * features(64, seed=2).features + 3
    for index, name in enumerate(made.names):
        weight, bias = made.folded(name)
        with torch.no_grad():
            wanted = made._heads[index].eval()(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(rows @ weight.T + bias, wanted, atol=1e-4)
        assert np.ptp(wanted, axis=0).min() > 0.1


def test_a_head_is_plain_sgd_with_nesterov():
    data = features(32)
    made = trained_heads.Heads({"a": 6}, classes=3, recipe=RECIPE, rates=(0.08,), steps=3)
    twin = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    twin.load_state_dict(made._heads[0].state_dict())
    buffers = [torch.zeros_like(p) for p in twin.parameters()]
    rows, labels = torch.from_numpy(data.features), torch.from_numpy(data.labels)
    rate = 0.08 * 32 / 256
    for factor in (1, 1, 0.1):  # of three steps the milestones at 2 and 3 of 4 epochs come after 2 and 3 steps
        twin.zero_grad()
        nn.functional.cross_entropy(twin(rows), labels).backward()
        with torch.no_grad():
            for parameter, buffer in zip(twin.parameters(), buffers, strict=True):
                gradient = parameter.grad + 5e-4 * parameter
                buffer.mul_(0.9).add_(gradient)
                parameter -= rate * factor * (gradient + 0.9 * buffer)
        made.fit_batch({"a": rows}, labels)
    torch.testing.assert_close(made._heads[0][1].weight, twin[1].weight, atol=1e-6, rtol=1e-5)


def test_schedules():
    step = trained_heads._factor(trained_heads.HeadRecipe(epochs=28, milestones=(8, 16, 24)), 280)
    found = [step(at) for at in (0, 79, 80, 159, 160, 239, 240, 279)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    cosine = trained_heads._factor(trained_heads.HeadRecipe(epochs=50), 100)
    assert [cosine(at) for at in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_cached_heads_learn_and_the_headline_is_the_recipes_own():
    values = linear.linear_cached(features(), features(128, seed=1), classes=3, recipe=RECIPE)
    assert values["top1"] == values["top1_embedding_lr0.01"] and values["top1"].value > 85
    assert set(values) == {"top1", "top1_embedding_lr0.01", "top1_embedding_lr0.001", "top1_embedding_lr0.1"}
    assert values["top1"].low < values["top1"].value < values["top1"].high
    wrong = Features(
        features=features().features, labels=np.roll(features().labels, 1), indices=np.arange(256), skipped=0
    )
    assert linear.linear_cached(wrong, features(128, seed=1), classes=3, recipe=RECIPE)["top1"].value < 60


def test_the_rate_follows_the_batch_that_a_small_set_can_fill():
    bank, test = features(64), features(64, seed=1)
    whole, filled = (
        linear.linear_cached(bank, test, classes=3, recipe=trained_heads.HeadRecipe(epochs=2, batch=batch), rates=())
        for batch in (256, 64)
    )
    assert whole == filled


def test_cached_heads_leave_the_unlabelled_out():
    bank = features()
    hidden = np.concatenate([bank.features, np.full((9, 6), 1e6, np.float32)])
    labels = np.concatenate([bank.labels, np.full(9, -1)])
    more = Features(features=hidden, labels=labels, indices=np.arange(265), skipped=0)
    test = features(64, seed=1)
    assert linear.linear_cached(more, test, classes=3, recipe=RECIPE) == linear.linear_cached(
        bank, test, classes=3, recipe=RECIPE
    )


def test_features_that_are_not_finite_are_refused():
    bank = features()
    bank.features[3, 2] = np.nan
    with pytest.raises(InputError, match="NaN"):
        linear.linear_cached(bank, features(64), classes=3)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A Student folder: a tiny untrained ViT at 32 px."""
    folder = tmp_path_factory.mktemp("vit") / "student"
    torch.manual_seed(0)
    trunk = build_trunk("vit_tiny_patch16_224")
    pre = Preprocessing(size=36, crop=32)
    record = Student(
        timm_name="vit_tiny_patch16_224", width=embedding_width(trunk), preprocessing=pre, sha256="", teacher=None,
        data=None, recipe={},
    )  # fmt: skip
    save_trunk(folder, trunk, record)
    return folder


@pytest.fixture(scope="module")
def colours():
    """Noisy pictures of three colours that any trunk tells apart, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    base = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]])[labels][:, None, None]
    pixels = np.clip(base + rng.normal(0, 20, (48, 40, 48, 3)), 0, 255).astype(np.uint8)
    return ArraySource("colours", pixels, labels, ("red", "green", "blue"))


def test_the_last_of_the_last_four_is_the_embedding(vit):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with TrunkSession(vit, output="last4") as session:
        rows = session.features(pixels)
        assert rows.shape == (3, 4 * 192) and list(session.kinds) == ["last4", "last"]
        torch.testing.assert_close(rows[:, session.kinds["last"]], embed(load_trunk(vit)[1], pixels))
        assert not torch.allclose(rows[:, :192], rows[:, 192:384])


def test_before_the_norm_the_norm_is_all_that_is_missing(vit):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    trunk = load_trunk(vit)[1]
    with TrunkSession(vit, output="before_norm") as session:
        rows = session.features(pixels)
    assert not torch.allclose(rows, embed(trunk, pixels))
    torch.testing.assert_close(trunk.norm(rows.clone()), embed(trunk, pixels), atol=1e-5, rtol=1e-4)


def test_every_answer_of_the_trunk_keeps_to_its_threads(vit, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with TrunkSession(vit, output="last4", threads=3) as session:
        session.features(torch.zeros(1, 3, 32, 32))
        session.run(np.zeros((1, 3, 32, 32), np.float32))
    assert asked == [3, 7, 3, 7]


def test_pixels_are_normalised_on_the_device_as_before_it(vit, colours):
    pre = load_student(vit).preprocessing
    pixels = np.stack([crop_pixels(colours.read(index), pre) for index in range(4)])
    images = np.stack([preprocess(colours.read(index), pre) for index in range(4)])
    assert torch.equal(normalised(torch.from_numpy(pixels), pre), torch.from_numpy(images))
    with TrunkSession(vit, output="last4") as session:
        np.testing.assert_array_equal(session.run(pixels), session.run(images))
        recipe = trained_heads.HeadRecipe(epochs=2, batch=16, lr=0.1)
        test = extract(session, colours)
        values = linear.linear_streamed(session, colours, test, classes=3, recipe=recipe)
        session.takes_pixels = True
        assert linear.linear_streamed(session, colours, test, classes=3, recipe=recipe) == values


def test_a_cnn_answers_with_its_embedding(tmp_path):
    trunk = build_trunk("resnet10t")
    pre = Preprocessing(size=36, crop=32)
    record = Student(timm_name="resnet10t", width=512, preprocessing=pre, sha256="", teacher=None, data=None, recipe={})
    save_trunk(tmp_path / "cnn", trunk, record)
    with TrunkSession(tmp_path / "cnn", output="last4") as session:
        assert session.output == "embedding" and session.kinds == {"embedding": slice(0, 512)}
        pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
        torch.testing.assert_close(torch.from_numpy(session.run(pixels)), embed(trunk.eval(), torch.from_numpy(pixels)))


def test_streamed_heads_learn_and_leave_the_trunk_alone(vit, colours):
    recipe = trained_heads.HeadRecipe(epochs=6, milestones=(4,), batch=16, lr=0.1)
    with TrunkSession(vit, output="last4") as session:
        before = {name: value.clone() for name, value in session._trunk.state_dict().items()}
        test = extract(session, colours)
        calls = []
        values = linear.linear_streamed(
            session, colours, test, classes=3, recipe=recipe, progress=lambda *call: calls.append(call)
        )
        again = linear.linear_streamed(session, colours, test, classes=3, recipe=recipe)
        after = session._trunk.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert values["top1"].value > 90 and values["top1"] == values["top1_last4_lr0.1"]
    assert values == again and calls[-1][:2] == (6 * 48, 6 * 48)


def test_streaming_without_labels_is_refused(vit, colours, tmp_path):
    with TrunkSession(vit, output="last4") as session:
        test = extract(session, colours)
        bare = ArraySource("bare", np.zeros((4, 32, 32, 3), np.uint8), None, None)
        with pytest.raises(InputError, match="bare has no labelled images"):
            linear.linear_streamed(session, bare, test, classes=3)
        gone = ListSource(tmp_path, [("gone.png", 0)] * 4, name="gone", classes=["a", "b", "c"])
        with pytest.raises(InputError, match="of gone can be read"):
            linear.linear_streamed(session, gone, test, classes=3)


def test_crops_follow_the_published_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(400, 300, (0.08, 1.0), rng.random(DRAWS).tolist()) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 400).all() and (boxes[:, 3] <= 300).all()
    share, aspect = width * height / 120_000, width / height
    assert 0.078 < share.min() < 0.1 and 0.9 < share.max() <= 1
    assert 0.74 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.35
    assert np.log(aspect[share < 0.3]).mean() == pytest.approx(0, abs=0.02)  # as often wide as tall


def test_a_crop_is_a_function_of_its_seed_and_can_be_switched_off():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pre = Preprocessing(size=32, crop=32)

    def view(seed, crop=True):
        return linear.random_resized_crop(image, pre, np.random.default_rng(seed), crop=crop)

    np.testing.assert_array_equal(view(1), view(1))
    assert view(1).shape == (32, 32, 3) and not np.array_equal(view(1), view(2))
    tall = Preprocessing(size=48, crop=48, crop_width=24)
    assert linear.random_resized_crop(image, tall, np.random.default_rng(1)).shape == (48, 24, 3)
    whole = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    for seed in range(6):
        found = view(seed, crop=False)
        assert np.array_equal(found, whole) or np.array_equal(found, whole[:, ::-1])


def test_an_extreme_image_still_gives_a_crop():
    left, top, right, bottom = crop_box(2000, 3, (0.08, 1.0), np.random.default_rng(0).random(DRAWS).tolist())
    assert (bottom - top, right - left) == (3, 4) and 0 <= left < right <= 2000 and top == 0


@pytest.mark.parametrize(
    ("name", "epochs", "milestones", "crop"),
    [
        ("inat18", 84, (24, 48, 72), True),
        ("places205", 14, (4, 8, 12), True),
        ("cifar10", 28, (8, 16, 24), True),
        ("cifar100", 28, (8, 16, 24), True),
        ("clevr_count", 50, (), True),
        ("clevr_dist", 100, (), False),
    ],
)
def test_transfer_recipes_are_the_benchmarks(name, epochs, milestones, crop):
    how = TRANSFERS[name]
    assert (how.recipe.epochs, how.recipe.milestones, how.crop) == (epochs, milestones, crop)
    assert (how.recipe.lr, how.recipe.batch, how.recipe.weight_decay) == (0.01, 256, 5e-4)


def test_every_data_set_has_a_recipe_and_every_recipe_a_data_set():
    assert set(TRANSFERS) == set(DATASETS)
    with pytest.raises(InputError, match="unknown transfer 'cifar'"):
        parse_transfers(["cifar"], None)


def test_one_labelled_image_is_refused():
    one = Features(features=features().features[:1], labels=np.zeros(1, int), indices=np.arange(1), skipped=0)
    with pytest.raises(InputError, match="two labelled images or more"):
        linear.linear_cached(one, features(128, seed=1), classes=3, recipe=RECIPE)


@pytest.mark.parametrize("crop", [True, False])
def test_a_training_view_has_the_shape_of_the_models_input(crop):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pre = Preprocessing(size=20, crop=16, crop_width=24)
    assert linear.random_resized_crop(image, pre, np.random.default_rng(0), crop=crop).shape == (16, 24, 3)
