"""Each reader on small files in the layout that the data set's authors publish."""

import gzip
import json
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from robx.errors import ArtifactError, CorruptImage, InputError, RobxError
from robx.eval.datasets import layouts
from robx.eval.datasets.splits import open_split
from robx.images.sources import labels_of, open_source


def save(path, colour=(10, 20, 30), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def cifar_pixels(n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def dump(path, content):
    """A pickle as Python 2 wrote it: protocol 2, byte-string keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({key.encode(): value for key, value in content.items()}, protocol=2))


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    for number in range(1, 6):
        labels = [(number + i) % 10 for i in range(4)]
        dump(folder / f"data_batch_{number}", {"data": cifar_pixels(4, number), "labels": labels})
    dump(folder / "test_batch", {"data": cifar_pixels(3, 9), "labels": [7, 8, 9]})
    dump(folder / "batches.meta", {"label_names": [b"airplane", b"automobile", *[b"c%d" % i for i in range(2, 10)]]})
    return tmp_path


def test_cifar10_python(cifar10):
    train, test = layouts.open_dataset("cifar10", cifar10)
    assert (len(train), len(test), train.classes[:2]) == (20, 3, ("airplane", "automobile"))
    assert labels_of(train)[:5].tolist() == [1, 2, 3, 4, 2] and labels_of(test).tolist() == [7, 8, 9]
    # A row is 1024 red, then green, then blue, each row by row.
    np.testing.assert_array_equal(np.asarray(test.read(1)), cifar_pixels(3, 9)[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert train.fingerprint != test.fingerprint


def test_cifar100_python_takes_the_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    for name, n in (("train", 6), ("test", 2)):
        content = {"data": cifar_pixels(n, n), "fine_labels": [90 + i for i in range(n)], "coarse_labels": [0] * n}
        dump(folder / name, content)
    dump(folder / "meta", {"fine_label_names": [b"f%d" % i for i in range(100)], "coarse_label_names": [b"x"] * 20})
    train, test = layouts.open_dataset("cifar100", tmp_path)
    assert labels_of(train).tolist() == [90, 91, 92, 93, 94, 95] and len(test) == 2 and len(train.classes) == 100


def test_cifar_binary_is_the_same(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(f"c{i}" for i in range(10)) + "\n")
    for name, label in (("data_batch_1.bin", 3), ("test_batch.bin", 4)):
        (folder / name).write_bytes(bytes([label]) + cifar_pixels(1, label).tobytes())
    train, test = layouts.open_dataset("cifar10", tmp_path)
    assert (train.label(0), test.label(0)) == (3, 4)
    np.testing.assert_array_equal(np.asarray(train.read(0)), cifar_pixels(1, 3).reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar100_binary_takes_the_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "coarse_label_names.txt").write_text("\n".join(f"g{i}" for i in range(20)) + "\n")
    (folder / "fine_label_names.txt").write_text("\n".join(f"f{i}" for i in range(100)) + "\n")
    for name, coarse, fine in (("train.bin", 3, 95), ("test.bin", 19, 7)):
        (folder / name).write_bytes(bytes([coarse, fine]) + cifar_pixels(1, fine).tobytes())
    train, test = layouts.open_dataset("cifar100", tmp_path)
    assert (train.label(0), test.label(0), train.classes[95], len(test.classes)) == (95, 7, "f95", 100)
    np.testing.assert_array_equal(np.asarray(test.read(0)), cifar_pixels(1, 7).reshape(3, 32, 32).transpose(1, 2, 0))


class Exploit:
    """Runs a command when it is unpickled by pickle.load."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


def test_a_batch_that_runs_code_is_refused_and_does_not_run(cifar10):
    marker = cifar10 / "ran"
    dump(cifar10 / "cifar-10-batches-py" / "data_batch_3", {"data": Exploit(marker), "labels": [0]})
    with pytest.raises(ArtifactError, match="exec"):
        layouts.open_dataset("cifar10", cifar10)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02}", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({})])
def test_a_damaged_batch_is_refused(cifar10, content):
    (cifar10 / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(InputError, match="cifar-10-batches-py"):
        layouts.open_dataset("cifar10", cifar10)


def test_fashion_mnist(tmp_path):
    for prefix, n in (("train", 5), ("t10k", 3)):
        images = struct.pack(">4BIII", 0, 0, 8, 3, n, 28, 28) + bytes(n * 784)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = struct.pack(">4BI", 0, 0, 8, 1, n) + bytes(range(n))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    train, test = layouts.open_dataset("fashion_mnist", tmp_path)
    assert (len(train), len(test)) == (5, 3) and labels_of(test).tolist() == [0, 1, 2]


def test_image_folder(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            save(tmp_path / split / name / "1.png")
    train, test = layouts.open_dataset("folder", tmp_path)
    assert train.classes == ("cat", "dog") and labels_of(test).tolist() == [0, 1]


@pytest.fixture
def inat(tmp_path):
    for split, rows in (("train", [("Plantae", 7477), ("Aves", 3), ("Aves", 0)]), ("val", [("Insecta", 8141)])):
        images, annotations = [], []
        for number, (group, label) in enumerate(rows):
            name = f"train_val2018/{group}/{label}/{split}{number}.jpg"
            save(tmp_path / name)
            images.append({"id": number, "file_name": name, "width": 8, "height": 6})
            annotations.append({"id": number, "image_id": number, "category_id": label})
        categories = [{"id": n, "name": str(n), "supercategory": "x"} for n in range(8142)]
        (tmp_path / f"{split}2018.json").write_text(
            json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories})
        )
    return tmp_path


def test_inat18(inat):
    train, test = layouts.open_dataset("inat18", inat)
    assert labels_of(train).tolist() == [7477, 3, 0] and labels_of(test).tolist() == [8141]
    assert len(train.classes) == len(test.classes) == 8142 and train.read(0).size == (8, 6)


def test_inat18_whose_two_labels_disagree_is_refused(inat):
    listed = json.loads((inat / "train2018.json").read_text())
    listed["annotations"][1]["category_id"] = 4
    (inat / "train2018.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match="annotated 4"):
        layouts.open_dataset("inat18", inat)


@pytest.mark.parametrize("below", ["", "data/vision/torralba/deeplearning/images256"])
def test_places205(tmp_path, below):
    lists = tmp_path / "trainvalsplit_places205"
    lists.mkdir()
    rows = {"train": [("a/abbey/gsun_1.jpg", 0), ("f/field/wild/gsun_2.jpg", 70)], "val": [("y/yard/gsun_3.jpg", 204)]}
    for split, samples in rows.items():
        (lists / f"{split}_places205.csv").write_text("".join(f"{path} {label}\n" for path, label in samples))
        for path, _ in samples:
            save(tmp_path / below / path)
    train, test = layouts.open_dataset("places205", tmp_path)
    assert labels_of(train).tolist() == [0, 70] and test.label(0) == 204 and len(test.classes) == 205
    assert train.classes[70] == "f/field/wild" and test.read(0).size == (8, 6)


@pytest.mark.parametrize("label", [205, 10**12])
def test_a_label_beyond_the_published_classes_is_refused_whatever_its_size(tmp_path, label):
    for split in ("train", "val"):
        (tmp_path / f"{split}_places205.csv").write_text(f"a/abbey/1.jpg 0\na/abbey/2.jpg {label}\n")
        listed = {"images": [{"id": 1, "file_name": f"train_val2018/Aves/{label + 8000}/1.jpg"}]}
        (tmp_path / f"{split}2018.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=f"the label {label} but has 205 classes"):
        layouts.open_dataset("places205", tmp_path)
    with pytest.raises(InputError, match=f"the label {label + 8000} but has 8142 classes"):
        layouts.open_dataset("inat18", tmp_path)


def scene(name, distances):
    return {"image_filename": name, "objects": [{"pixel_coords": [100, 90, d], "shape": "cube"} for d in distances]}


@pytest.fixture
def clevr(tmp_path):
    root = tmp_path / "CLEVR_v1.0"
    scenes = {"train": [[8.0, 12, 9], [8.01, 9, 9, 9], [10.5] * 10], "val": [[8.5, 11, 12], [8.51] * 5, [9.9] * 3]}
    for split, lists in scenes.items():
        names = [f"CLEVR_{split}_{i:06d}.png" for i in range(len(lists))]
        for name in names:
            save(root / "images" / split / name, size=(48, 32))
        path = root / "scenes" / f"CLEVR_{split}_scenes.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"info": {}, "scenes": [scene(n, d) for n, d in zip(names, lists, strict=True)]}))
    return root


def test_clevr_count_and_distance(clevr):
    train, test = layouts.open_dataset("clevr_count", clevr.parent)
    assert labels_of(train).tolist() == [0, 1, 7] and labels_of(test).tolist() == [0, 2, 0]
    assert train.classes == ("3", "4", "5", "6", "7", "8", "9", "10") and test.read(0).size == (48, 32)
    train, test = layouts.open_dataset("clevr_dist", clevr)
    # Closed on the right: 8.0 is in the first bin, 8.01 in the second; 8.5 in the second, 8.51 in the third.
    assert labels_of(train).tolist() == [0, 1, 5] and labels_of(test).tolist() == [1, 2, 4]
    assert len(test.classes) == 6


def test_a_scene_outside_of_the_task_is_refused(clevr):
    path = clevr / "scenes" / "CLEVR_val_scenes.json"
    path.write_text(json.dumps({"scenes": [scene("CLEVR_val_000000.png", [9, 9])]}))
    with pytest.raises(InputError, match="label -1"):
        layouts.open_dataset("clevr_count", clevr)
    path.write_text(json.dumps({"scenes": [{"image_filename": "x.png"}]}))
    with pytest.raises(InputError, match="not as published"):
        layouts.open_dataset("clevr_dist", clevr)


def test_squeezing_keeps_the_whole_image(clevr):
    source = layouts.open_dataset("clevr_dist", clevr)[0]
    squeezed = layouts.whole_images(source, (16, 16))
    assert squeezed.read(0).size == (16, 16) and labels_of(squeezed).tolist() == labels_of(source).tolist()
    assert squeezed.fingerprint != source.fingerprint != layouts.whole_images(source, (24, 24)).fingerprint


@pytest.mark.parametrize("path", ["../outside.png", "/etc/hostname", "a/../../b.png"])
def test_a_list_that_leaves_its_folder_is_refused(tmp_path, path):
    with pytest.raises(InputError, match="outside"):
        layouts.ListSource(tmp_path, [(path, 0)], name="x", classes=["a"])


def test_a_listed_image_that_is_missing_is_corrupt_when_it_is_read(tmp_path):
    source = layouts.ListSource(tmp_path, [("gone.png", 0)], name="x", classes=["a"])
    with pytest.raises(CorruptImage, match=r"gone\.png"):
        source.read(0)


@pytest.mark.parametrize("name", layouts.DATASETS)
def test_an_empty_folder_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(InputError) as caught:
        layouts.open_dataset(name, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"images": [{}]}', '{"images": [{"file_name": "a.jpg", "id": 1}]}'])
def test_a_list_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "train2018.json").write_text(text)
    with pytest.raises(InputError, match="train2018"):
        layouts.open_dataset("inat18", tmp_path)


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(InputError, match="cifar10, cifar100"):
        layouts.open_dataset("my-images", tmp_path)
    with pytest.raises(InputError, match="did you mean fashion_mnist"):
        layouts.open_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_other_images_are_not_taken_for_a_named_data_set(tmp_path, name):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            save(tmp_path / split / label / "1.png")
    with pytest.raises(InputError, match=f"does not hold {name}'s files"):
        layouts.open_dataset(name, tmp_path)


def test_a_damaged_test_split_is_refused_and_not_passed_over(tmp_path):
    for prefix, n in (("train", 5), ("t10k", 3)):
        images = struct.pack(">4BIII", 0, 0, 8, 3, n, 28, 28) + bytes(range(n)) * 784
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">4BI", 0, 0, 8, 1, n) + bytes(range(n))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    other = tmp_path / "other"
    for label in range(5):
        save(other / "train" / str(label) / "1.png")
    assert len(open_split(other, tmp_path).test) == 3  # and --data may hold its training images alone
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes((tmp_path / "t10k-images-idx3-ubyte").read_bytes()[:-100])
    with pytest.raises(RobxError):
        open_split(other, tmp_path)


def test_a_squeezed_source_is_stamped_as_what_it_squeezes(tmp_path):
    save(tmp_path / "a" / "1.png")
    source = open_source(tmp_path)
    squeezed, before = layouts.whole_images(source, (8, 8)), source.stamp
    os.utime(tmp_path / "a" / "1.png", ns=(1, 1))
    assert squeezed.stamp == source.stamp != before
