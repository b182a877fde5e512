"""Low-shot: the published splits' format, draws, and the logistic regression against its own optimum."""

import numpy as np
import pytest
from PIL import Image
from scipy import optimize, special, stats

from robx.errors import InputError
from robx.eval.datasets.features import Features
from robx.eval.protocols import lowshot
from robx.images.sources import FolderSource


def features(n=240, d=10, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = 3 * np.random.default_rng(42).normal(size=(classes, d))
    rows = (centres[labels] + rng.normal(size=(n, d))).astype(np.float32)
    return Features(features=rows, labels=labels, indices=np.arange(n), skipped=0)


def test_rows_are_centred_then_unit():
    rows = lowshot.centred_unit_rows(np.random.default_rng(0).normal(5, 2, (20, 8)).astype(np.float32))
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    assert (lowshot.centred_unit_rows(np.full((1, 4), 3.0)) == 0).all()


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_regression_minimises_the_protocols_objective(classes):
    found = features(60, 6, classes)
    rows, labels, penalty = lowshot.centred_unit_rows(found.features), found.labels, 0.3

    def objective(flat):
        """Mean cross-entropy + (penalty / n) / 2 |W|^2, as MSN writes it."""
        weights = flat.reshape(6, classes)
        log_probs = special.log_softmax(rows @ weights, axis=1)
        return -log_probs[np.arange(60), labels].mean() + penalty / 60 / 2 * (weights**2).sum()

    best = optimize.minimize(objective, np.zeros(6 * classes), options={"gtol": 1e-9})
    weights, seen = lowshot.logistic_regression(rows, labels, penalty=penalty)
    assert seen.tolist() == list(range(classes))
    assert objective(weights.ravel()) == pytest.approx(best.fun, abs=1e-6)
    np.testing.assert_allclose(weights, best.x.reshape(6, classes), atol=5e-3)


def test_classes_without_a_training_image_are_never_predicted():
    found = features(60, 6, 5)
    keep = found.labels != 1
    weights, seen = lowshot.logistic_regression(lowshot.centred_unit_rows(found.features[keep]), found.labels[keep])
    assert seen.tolist() == [0, 2, 3, 4] and weights.shape == (6, 4)


@pytest.mark.parametrize("shot", ["1", "2", "5"])
def test_drawn_splits_hold_so_many_of_each_class(shot):
    labels = np.concatenate([features().labels, np.full(30, -1)])
    splits = lowshot.draw_splits(labels, shot)
    assert len(splits) == 3 and len({split.tobytes() for split in splits}) == 3
    for split in splits:
        assert np.bincount(labels[split], minlength=4).tolist() == [int(shot)] * 4
    again = lowshot.draw_splits(labels, shot)
    assert all((a == b).all() for a, b in zip(splits, again, strict=True))


def test_a_share_is_one_split_of_each_class_and_at_least_one_image():
    (rows,) = lowshot.draw_splits(features().labels, "10%")
    assert np.bincount(features().labels[rows]).tolist() == [6] * 4
    (rows,) = lowshot.draw_splits(features().labels, "1%")
    assert np.bincount(features().labels[rows]).tolist() == [1] * 4


def test_accuracy_over_splits():
    bank, test = features(), features(seed=1)
    rows = lowshot.draw_splits(bank.labels, "2")
    values = lowshot.low_shot(bank, test, rows=rows)
    splits = [values[f"top1_split{n}"].value for n in (1, 2, 3)]
    half = 4.302653 * np.std(splits, ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    assert values["top1"].value == pytest.approx(np.mean(splits)) and values["top1"].value > 60
    mean, n = np.mean(splits) / 100, len(test.labels)
    wilson = stats.binomtest(round(mean * n), n).proportion_ci(method="wilson")  # of the test images, which all share
    assert values["top1"].low == pytest.approx(min(100 * mean - half, 100 * wilson.low), abs=1e-4)
    assert values["top1"].high == pytest.approx(min(100, max(100 * mean + half, 100 * wilson.high)), abs=1e-4)
    one = lowshot.low_shot(bank, test, rows=lowshot.draw_splits(bank.labels, "10%"))
    assert set(one) == {"top1"} and one["top1"].value >= values["top1"].value - 5
    shuffled = Features(features=bank.features, labels=np.roll(bank.labels, 1), indices=bank.indices, skipped=0)
    assert lowshot.low_shot(shuffled, test, rows=rows)["top1"].value < 40


@pytest.fixture
def published(tmp_path):
    """ImageNet's names in a folder a class, and split files as MSN published them."""
    for number in range(12):
        synset = ("n01440764", "n01443537")[number % 2]
        path = tmp_path / "train" / synset / f"{synset}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, "JPEG")
    splits = tmp_path / "splits"
    for number in (1, 2, 3):
        folder = splits / f"imagenet_subsets{number}"
        folder.mkdir(parents=True)
        (folder / "1imgs_class.txt").write_text(f"n01440764_{2 * number}.JPEG\nn01443537_{2 * number + 1}.JPEG\n")
        five = "3imgs_class.txt" if number == 3 else "5imgs_class.txt"
        (folder / five).write_text("".join(f"n01440764_{n}.JPEG\nn01443537_{n + 1}.JPEG\n" for n in range(0, 10, 2)))
    (splits / "imagenet_subsets1" / "1percent.txt").write_text("n01440764_0.JPEG\nn01443537_1.JPEG\n\n")
    return tmp_path / "train", splits


def test_published_splits_are_read(published):
    source = FolderSource(published[0])
    ones = lowshot.read_splits(published[1], "1", source)
    assert [sorted(source.key(i).split("/")[1] for i in split) for split in ones] == [
        [f"n01440764_{2 * n}.JPEG", f"n01443537_{2 * n + 1}.JPEG"] for n in (1, 2, 3)
    ]
    assert [len(split) for split in lowshot.read_splits(published[1], "5", source)] == [10, 10, 10]
    assert lowshot.split_files(published[1], "5")[2].name == "3imgs_class.txt"
    (share,) = lowshot.read_splits(published[1], "1%", source)
    assert [source.label(int(i)) for i in share] == [0, 1]


def test_a_name_that_two_images_share_stands_for_none(published):
    train, splits = published
    for synset in ("n01440764", "n01443537"):
        (train / synset / "same.JPEG").write_bytes((train / "n01440764" / "n01440764_0.JPEG").read_bytes())
    source = FolderSource(train)
    share = splits / "imagenet_subsets1" / "1percent.txt"
    share.write_text("same.JPEG\nn01440764_0.JPEG\n")
    with pytest.raises(InputError, match=r"lacks 1, such as same\.JPEG"):
        lowshot.read_splits(splits, "1%", source)
    share.write_text("n01443537/same.JPEG\nn01440764_0.JPEG\n")
    (found,) = lowshot.read_splits(splits, "1%", source)
    assert sorted(source.key(int(i)) for i in found) == ["n01440764/n01440764_0.JPEG", "n01443537/same.JPEG"]


def test_splits_of_other_data_are_refused(published):
    source = FolderSource(published[0])
    with pytest.raises(InputError, match=r"2imgs_class.txt does not exist"):
        lowshot.read_splits(published[1], "2", source)
    (published[1] / "imagenet_subsets1" / "1percent.txt").write_text("n02096437_9.JPEG\n")
    with pytest.raises(InputError, match=r"n02096437_9\.JPEG"):
        lowshot.read_splits(published[1], "1%", source)


def test_sizes_are_parsed():
    assert lowshot.parse_shots("1, 2,5,1%,10%") == ("1", "2", "5", "1%", "10%")
    for wrong in ("0", "-1", "1.5", "0%", "x", "", ",", "100%"):
        with pytest.raises(InputError):
            lowshot.parse_shots(wrong)


def test_more_shots_than_images_are_refused():
    with pytest.raises(InputError, match="class cat has 60 images, low-shot needs 61"):
        lowshot.draw_splits(features().labels, "61", names=["cat", *"abcdefghijklmnop"])
    with pytest.raises(InputError, match="class 0 has 60 images, low-shot needs 61"):
        lowshot.draw_splits(features().labels, "61")
