"""Folders of one's own pictures: read as they are shown, known by their content, and refused with a path."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.paper.data import DataSpec, load, own_folder
from benchmarks.paper.data.image_folders import read_images, shown


def fill(folder, value=100, train=20, test=2, name="{:02}.png"):
    """Two classes of grey pictures."""
    for part, count in (("train", train), ("test", test)):
        for label in "ab":
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.new("L", (16, 16), value).save(folder / part / label / name.format(number))


def read(path):
    return read_images([path], [0], 64).images[0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_shades(suffix, tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"xray.{suffix}")
    pixels = read(tmp_path / f"xray.{suffix}")
    expected = torch.from_numpy(np.round(values / 257)).to(torch.uint8)
    assert torch.equal(pixels, expected.expand(3, 64, 64))


def test_integers_of_32_bits_are_those_of_16_or_refused(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif").unique().tolist() == list(range(256))
    Image.fromarray(values + 1).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match=r"b\.tif cannot be read .* integer values .* 0 to 65535, got 1 to 65536"):
        read(tmp_path / "b.tif")


def test_floats_are_from_0_to_1_or_refused(tmp_path):
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif").unique().tolist() == list(range(256))
    for name, wrong in (("b", values * 300), ("c", values - 0.5), ("d", values * np.nan)):
        Image.fromarray(wrong).save(tmp_path / f"{name}.tif")
        with pytest.raises(ValueError, match=rf"{name}\.tif cannot be read .* floating-point values .* from 0 to 1"):
            read(tmp_path / f"{name}.tif")


def test_orientation_is_that_of_exif(tmp_path):
    values = np.zeros((64, 64, 3), np.uint8)
    values[:32] = 255  # light above
    for orientation, light in ((1, np.s_[:, :30]), (3, np.s_[:, 34:]), (6, np.s_[:, :, 34:]), (8, np.s_[:, :, :30])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
        pixels = read(tmp_path / "a.png").numpy()
        assert pixels[light].min() == 255, orientation
        assert pixels.mean() == 127.5


def test_pictures_in_folders_of_a_class_are_its_own(tmp_path):
    fill(tmp_path, train=20, name="{:02}.jfif.jpg")
    for label in "ab":
        inner = tmp_path / "train" / label / "more" / "still more"
        inner.mkdir(parents=True)
        Image.new("L", (16, 16), 7).save(tmp_path / "x.jpg")
        (tmp_path / "x.jpg").rename(inner / "x.JFIF")
    data = load(DataSpec(own_folder(tmp_path, 16), size=16), tmp_path)
    assert len(data.train) + len(data.validation) == 42
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).rename(tmp_path / part / f"old-{label}")
            (tmp_path / part / label / "only").mkdir(parents=True)
            (tmp_path / part / f"old-{label}").rename(tmp_path / part / label / "only" / "here")
    assert load(DataSpec(own_folder(tmp_path, 16), size=16), tmp_path).num_classes == 2


def test_other_pictures_of_the_same_size_are_another_data_set(tmp_path):
    names = set()
    for value in (10, 200):
        fill(tmp_path / "set", value, name="{}.bmp")
        name = own_folder(tmp_path / "set", 16)
        data = load(DataSpec(name, size=16), tmp_path / "set", tmp_path / "cache")
        assert data.train.images.unique().tolist() == [value]
        names.add(name)
    assert len(names) == 2
    assert names.isdisjoint({own_folder(tmp_path / "set", 24)})


def test_cut_decoded_images_are_named_and_made_again(tmp_path, capsys):
    fill(tmp_path / "set")
    spec = DataSpec(own_folder(tmp_path / "set", 16), size=16)
    first = load(spec, tmp_path / "set", tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    for content in (whole[:-100], b"", b"nonsense"):
        kept.unlink()  # the tensors above are mapped from it
        kept.write_bytes(content)
        again = load(spec, tmp_path / "set", tmp_path / "cache")
        assert torch.equal(again.train.images, first.train.images)
        assert f"{kept} is broken" in capsys.readouterr().err
        assert len(kept.read_bytes()) == len(whole)


def bomb(path):
    """A small file that says it has 30,000 x 30,000 pixels."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    image = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + image)


def cut(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("spoil", [bomb, cut, lambda path: path.write_bytes(b""), lambda path: path.write_text("x")])
def test_a_file_that_cannot_be_read_is_named(spoil, tmp_path):
    fill(tmp_path)
    path = tmp_path / "train" / "b" / "05.png"
    spoil(path)
    with pytest.raises(ValueError, match=r"b/05\.png cannot be read as an image: .") as error:
        load(DataSpec(own_folder(tmp_path, 16), size=16), tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_hidden_files_are_no_pictures(tmp_path):
    fill(tmp_path)
    for name in ("._00.png", ".DS_Store"):
        (tmp_path / "train" / "a" / name).write_bytes(b"\0\5\x16\7")
    assert len(load(DataSpec(own_folder(tmp_path, 16), size=16), tmp_path).train) == 36


def test_odd_folders_are_named(tmp_path):
    fill(tmp_path / "few", train=19)
    with pytest.raises(ValueError, match=r"few/train must hold at least 40 images, got 38"):
        own_folder(tmp_path / "few", 16)
    fill(tmp_path / "empty")
    for path in (tmp_path / "empty" / "test" / "b").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"empty/test/b must hold images \(.*\.jfif.*\), got nothing"):
        own_folder(tmp_path / "empty", 16)
    (tmp_path / "empty" / "test" / "b" / "x.heic").touch()
    with pytest.raises(ValueError, match=r"empty/test/b must hold images .* got 1 other files, such as .*x\.heic"):
        own_folder(tmp_path / "empty", 16)


def test_names_that_are_no_utf_8_are_read_and_shown(tmp_path):
    folder = tmp_path / os.fsdecode(b"b\xe4ume")
    try:
        fill(folder)
    except OSError:
        pytest.skip("this file system has no such names")
    old, new = folder / "train" / "a" / "00.png", folder / "train" / "a" / os.fsdecode(b"f\xf6hre.png")
    old.rename(new)
    name = own_folder(folder, 16)
    name.encode()
    assert len(load(DataSpec(name, size=16), folder).train) == 36
    new.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\\xe4ume/train/a/f\\xf6hre\.png cannot be read") as error:
        load(DataSpec(own_folder(folder, 16), size=16), folder)
    str(error.value).encode()
    assert shown(new).endswith("f\\xf6hre.png")
