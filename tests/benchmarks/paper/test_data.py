"""Data sets: splits, augmentation, official layouts on tiny fixtures, and what is said when one is missing."""

from __future__ import annotations

import dataclasses
import gzip
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.paper import data as datasets
from benchmarks.paper.data import DataSpec, cifar, fashion, load, train_size
from benchmarks.paper.data.dataset import Normalise, Split, augment, hold_out

RANDOM = np.random.default_rng(0)


def test_digits_split():
    data, again = load(DataSpec("digits")), load(DataSpec("digits"))
    parts = [data.train, data.validation, data.test]
    assert [len(p) for p in parts] == [810, 89, 898]
    assert train_size(DataSpec("digits")) == 810
    assert all(torch.equal(getattr(data, n).images, getattr(again, n).images) for n in ("train", "validation", "test"))
    images = torch.cat([p.images.flatten(1) for p in parts])
    assert len(images.unique(dim=0)) == 1797  # no image is in two splits
    assert all(len(p.labels.unique()) == 10 for p in parts)


def test_smaller_training_sets_are_nested():
    full, small = load(DataSpec("digits")), load(DataSpec("digits", train_size=100))
    assert torch.equal(small.train.images, full.train.images[:100])
    assert torch.equal(small.test.images, full.test.images)
    assert train_size(DataSpec("digits", train_size=100)) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist"}, "dataset must be one of words, digits, fashion-pairs"),
        ({"name": "digits", "train_size": 811}, "train_size must be from 1 to 810 for digits, got 811"),
        ({"name": "digits", "train_size": 0}, "got 0"),
        ({"name": "digits", "pairs": 100}, "pairs is for fashion-pairs"),
        ({"name": "fashion-pairs", "pairs": 100}, "size is for fashion-pairs and folder, and needed there; got None"),
        ({"name": "fashion-pairs", "pairs": 100, "size": 9}, "size must divide 28, got 9"),
        ({"name": "fashion-pairs", "pairs": 5, "size": 14}, "pairs must be at least 10, got 5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DataSpec(**options)


def test_normalised_training_images_have_mean_0_and_deviation_1():
    images = torch.tensor(RANDOM.integers(0, 256, (50, 3, 6, 4)), dtype=torch.uint8)
    images[:, 1] = images[:, 1] // 7
    values = Normalise(images)(images)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3), correction=0), torch.ones(3))
    assert Normalise(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))(images[:, :1]).isfinite().all()


def test_augmentation_moves_and_mirrors_whole_images():
    images = torch.tensor(RANDOM.integers(0, 256, (512, 2, 5, 7)), dtype=torch.uint8)
    padded = nn.functional.pad(images, [1] * 4)
    moved = augment(images, 1, True, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        crops = {(i, j, f): before[:, i : i + 5, j : j + 7] for i in range(3) for j in range(3) for f in (0, 1)}
        seen |= {key for key, crop in crops.items() if torch.equal(after, crop.flip(2) if key[2] else crop)}
    assert len(seen) == 18  # every shift, mirrored or not
    assert torch.equal(augment(images, 0, False, torch.Generator()), images)
    again = augment(images, 1, True, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)


def write_idx(path, array, compress):
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.fixture
def fashion_folder(tmp_path):
    """200 training and 100 test images; every pixel of an image is its number, so that it can be known again."""
    for name, count, compress in (("train", 200, True), ("t10k", 100, False)):
        images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", images, compress)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8), compress)
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """Tell the checks that a data set is as small as its fixture."""

    def change(name, **changes):
        monkeypatch.setitem(datasets.SOURCES, name, dataclasses.replace(datasets.SOURCES[name], **changes))

    return change


def test_fashion_mnist(fashion_folder, small):
    small("fashion-mnist", train=200, test=100)
    data = load(DataSpec("fashion-mnist"), fashion_folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (180, 20, 100)
    for split in (data.train, data.validation, data.test):
        assert torch.equal(split.images[:, 0, 0, 0] % 10, split.labels)
    assert train_size(DataSpec("fashion-mnist")) == 180


def test_fashion_pairs(fashion_folder, small):
    small("fashion-mnist", train=200, test=100)
    data = load(DataSpec("fashion-pairs", pairs=500, size=14), fashion_folder)
    assert data.num_classes == 100
    assert (len(data.train), len(data.validation), len(data.test)) == (450, 50, 10_000)
    assert data.test.images.shape == (10_000, 1, 14, 28)
    for split in (data.train, data.validation, data.test):
        left, right = split.images[:, 0, 0, 0].long(), split.images[:, 0, 0, -1].long()
        assert torch.equal(split.labels, left % 10 * 10 + right % 10)
    halves = [set(p.images[:, 0, 0, [0, -1]].flatten().tolist()) for p in (data.train, data.validation)]
    assert not halves[0] & halves[1]  # validation pairs are of images that no training pair has
    again = load(DataSpec("fashion-pairs", pairs=500, size=14), fashion_folder)
    assert torch.equal(data.train.images, again.train.images)


def test_pairs_are_averaged_over_squares():
    images = torch.tensor(RANDOM.integers(0, 256, (4, 1, 28, 28)), dtype=torch.uint8)
    pair = fashion.pair(Split(images, torch.arange(4)), 3, 7, torch.Generator().manual_seed(0))
    first = int(pair.labels[0]) // 10
    corner = images[first, 0, :4, :4].float().mean()
    assert pair.images.shape == (3, 1, 7, 14)
    assert abs(float(pair.images[0, 0, 0, 0]) - corner) <= 0.5


def test_idx_files_are_checked(tmp_path):
    (tmp_path / "a").write_bytes(b"\x89PNG....")
    with pytest.raises(ValueError, match="is not an IDX file of unsigned bytes: it starts with 89 50 4e 47"):
        fashion.read_idx(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 9) + b"12345")
    with pytest.raises(ValueError, match="holds 5 values, but its header says 9"):
        fashion.read_idx(tmp_path / "b")
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"0" * 1000)[:-9])
    with pytest.raises(ValueError, match=r"c\.gz is not a whole gzip file"):
        fashion.read_idx(tmp_path / "c")
    (tmp_path / "d.gz").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"d\.gz is not a whole gzip file"):
        fashion.read_idx(tmp_path / "d")


def write_cifar(folder, fine, count):
    folder.mkdir()
    names = ["train", "test"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    written = {}
    for name in names:
        content = {
            b"data": RANDOM.integers(0, 256, (count, 3072)).astype(np.uint8),
            (b"fine_labels" if fine else b"labels"): [i % (100 if fine else 10) for i in range(count)],
            b"coarse_labels": [0] * count,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        written[name] = content
    return written


@pytest.mark.parametrize(
    ("name", "folder", "count"), [("cifar10", "cifar-10-batches-py", 20), ("cifar100", "cifar-100-python", 100)]
)
def test_cifar(name, folder, count, tmp_path, small):
    written = write_cifar(tmp_path / folder, name == "cifar100", count)
    first = "train" if name == "cifar100" else "data_batch_1"
    total = count if name == "cifar100" else 5 * count
    small(name, train=total, test=count)
    for where in (tmp_path, tmp_path / folder):
        data = load(DataSpec(name), where)
        assert (len(data.train), len(data.validation), len(data.test)) == (total - total // 10, total // 10, count)
    train, _ = datasets.SOURCES[name].read(tmp_path)
    assert train.images.shape == (total, 3, 32, 32)
    row = written[first][b"data"][3]
    assert train.images[3, 1, 2, 5] == row[1024 + 2 * 32 + 5]  # a plane of red, one of green, one of blue, by rows


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (sys.exit, (1,))

    (tmp_path / "train").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"train is not a batch of CIFAR for Python: it asks for sys\.exit"):
        cifar.read_cifar100(tmp_path)
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": [1, 2]}))
    with pytest.raises(ValueError, match="train is not a batch of CIFAR"):
        cifar.read_cifar100(tmp_path)


def save_image(path, colour, size):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_tiny_imagenet(tmp_path, small, capsys):
    folder = tmp_path / "tiny-imagenet-200"
    names = ["n02", "n01", "n03"]  # the order of wnids.txt counts, not the alphabet
    for index, name in enumerate(names):
        for image in range(4):
            save_image(folder / "train" / name / "images" / f"{name}_{image}.JPEG", (60 * index, 0, 0), (64, 64))
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    rows = [("val_0.JPEG", "n03"), ("val_1.JPEG", "n01"), ("val_2.JPEG", "n02")]
    (folder / "val").mkdir()
    (folder / "val" / "val_annotations.txt").write_text(
        "".join(f"{file}\t{name}\t0\t0\t62\t62\n" for file, name in rows)
    )
    for file, name in rows:
        save_image(folder / "val" / "images" / file, (60 * names.index(name), 0, 0), (64, 64))
    small("tiny-imagenet", num_classes=3, train=12, test=3)
    data = load(DataSpec("tiny-imagenet"), tmp_path, tmp_path / "cache")
    assert (len(data.train), len(data.validation), len(data.test)) == (11, 1, 3)
    for split in (data.train, data.test):
        torch.testing.assert_close(split.images[:, 0, 9, 9].float(), 60.0 * split.labels, atol=3, rtol=0)  # JPEG
    decode, small_again = datasets.SOURCES["tiny-imagenet"].read, small
    small_again("tiny-imagenet", read=None)
    again = load(DataSpec("tiny-imagenet"), tmp_path, tmp_path / "cache")  # decoded images were kept
    assert torch.equal(again.train.images, data.train.images)
    small_again("tiny-imagenet", read=decode)
    picture = folder / "val" / "images" / "val_0.JPEG"
    size = picture.stat().st_size
    save_image(picture, (0, 250, 0), (64, 64))
    picture.write_bytes(picture.read_bytes().ljust(size, b"\0")[:size])
    assert load(DataSpec("tiny-imagenet"), tmp_path, tmp_path / "cache").test.images[0, 1].float().mean() > 200
    for path in (tmp_path / "cache").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    assert load(DataSpec("tiny-imagenet"), tmp_path, tmp_path / "cache").test.images[0, 1].float().mean() > 200
    assert "is broken" in capsys.readouterr().err


def test_cub200(tmp_path, small):
    folder = tmp_path / "CUB_200_2011"
    files, labels, is_train = [], [], []
    for index in range(12):
        files.append(f"{index % 3 + 1:03}.Bird/Bird_{index}.jpg")
        labels.append(index % 3 + 1)
        is_train.append(int(index < 9))
        save_image(folder / "images" / files[-1], (0, 80 * (index % 3), 0), (300 + index, 240))
    for name, column in (("images", files), ("image_class_labels", labels), ("train_test_split", is_train)):
        (folder / f"{name}.txt").write_text("".join(f"{i} {value}\n" for i, value in enumerate(column, 1)))
    small("cub200", num_classes=3, train=9, test=3)
    data = load(DataSpec("cub200"), tmp_path)
    assert data.test.images.shape == (3, 3, 224, 224)
    for split in (data.train, data.validation, data.test):
        torch.testing.assert_close(split.images[:, 1, 100, 100].float(), 80.0 * split.labels, atol=3, rtol=0)


def test_a_folder_of_ones_own(tmp_path, capsys):
    for part, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(["cat", "dog", "owl"]):
            for image in range(count):
                save_image(tmp_path / "pets" / part / name / f"{image:02}.png", (0, 0, 70 * label), (20 + image, 16))
    (tmp_path / "pets" / "train" / "cat" / ".DS_Store").write_bytes(b"no image")
    (tmp_path / "pets" / "train" / ".cache").mkdir()
    name = datasets.own_folder(tmp_path / "pets", 16)
    assert name.startswith("pets-")
    spec = DataSpec(name, size=16)
    data = load(spec, tmp_path / "pets")
    assert (data.num_classes, len(data.train), len(data.validation), len(data.test)) == (3, 54, 6, 18)
    for split in (data.train, data.validation, data.test):
        assert torch.equal(split.images[:, 2, 8, 8].long(), 70 * split.labels)
    del datasets.SOURCES[name]  # as in a new process
    assert torch.equal(load(spec, tmp_path / "pets").test.images, data.test.images)
    (tmp_path / "pets" / "train" / "cat" / "00.png").unlink()
    del datasets.SOURCES[name]
    with pytest.raises(ValueError, match=r"does not hold the images that pets-.* was made of"):
        load(spec, tmp_path / "pets")
    assert datasets.own_folder(tmp_path / "pets", 16) != name

    with pytest.raises(
        FileNotFoundError, match=r"train is missing: a data set of one's own is a folder with train/CLASS/"
    ):
        datasets.own_folder(tmp_path, 16)
    save_image(tmp_path / "pets" / "train" / "emu" / "a.png", (0, 0, 0), (16, 16))
    with pytest.raises(ValueError, match="same two or more classes, got 4 and 3; 'emu' is in one alone"):
        datasets.own_folder(tmp_path / "pets", 16)
    with pytest.raises(ValueError, match="size must be at least 8, got 4"):
        datasets.own_folder(tmp_path / "pets", 4)


def test_the_hub(small, monkeypatch):
    """With a stand-in for the library ``datasets``, which gives rows of Pillow images as it does."""
    from PIL import Image

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"img": Image.new("RGB", (32, 32), (i, 0, 0)), "fine_label": i % 100} for i in range(200)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    small("cifar100", train=200, test=200)
    data = load(DataSpec("cifar100"))
    assert asked == [("uoft-cs/cifar100", "train"), ("uoft-cs/cifar100", "test")]
    assert torch.equal(data.test.images[:, 0, 0, 0].long() % 100, data.test.labels)


def test_a_missing_set_says_the_two_ways_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"not on this machine.*--data-dir.*pip install datasets.*uoft-cs/cifar100"
    ):
        load(DataSpec("cifar100"))
    with pytest.raises(FileNotFoundError, match=r"no cifar10 in .*data_batch_1 is missing.*--data-dir"):
        load(DataSpec("cifar10"), tmp_path)


def test_a_hub_out_of_reach_says_so(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    with pytest.raises(FileNotFoundError, match=r"could not be had from the hub: no route to host.*--data-dir"):
        load(DataSpec("cifar10"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 201}, "training split of fashion-mnist.*should have 201 images and labels, got 200 and 200"),
        ({"test": 99}, "test split.*should have 99"),
        ({"shape": (1, 32, 32)}, r"images of shape \(1, 32, 32\), got \(1, 28, 28\)"),
        ({"num_classes": 11}, "each of 11 classes, got 10 from 0 to 9"),
    ],
)
def test_what_was_read_is_checked(changes, message, fashion_folder, small):
    small("fashion-mnist", **{"train": 200, "test": 100, **changes})
    with pytest.raises(ValueError, match=message):
        load(DataSpec("fashion-mnist"), fashion_folder)


def test_ten_percent_are_held_out():
    split = Split(torch.arange(95), torch.arange(95))
    rest, held = hold_out(split)
    assert (len(rest), len(held)) == (86, 9)
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == list(range(95))
