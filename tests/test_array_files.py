import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from biglearn_vae import array_files, data

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (40, 8, 8), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
CLASSES = np.arange(40) % 4
OTHER = GREY[:12]


def saved(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path / "file.npz", **arrays)
    return str(path / "file.npz")


def load(path: Path, size: data.Size = 8, channels: int = 1, **arrays: np.ndarray) -> data.Splits:
    return data.load("array_file", saved(path, **arrays), image_size=size, channels=channels)


def numbers(images: data.ImageSet, of: np.ndarray = GREY) -> list[int]:
    """Which of these images they are."""
    known = {image.tobytes(): k for k, image in enumerate(of)}
    return [known[image.numpy().tobytes()] for image in images.pixels[:, 0]]


def order(count: int) -> list[int]:
    """In which the images of a part come."""
    return data.shuffled(count, data.derive_seed("split", data.SPLIT_SEED)).tolist()


def test_images_alone_are_split_by_their_order(tmp_path):
    splits = load(tmp_path, images=GREY, labels=CLASSES)
    order_of_all = order(40)
    expected = {"test": order_of_all[:4], "valid": order_of_all[4:8], "train": order_of_all[8:]}
    for part, rows in expected.items():
        images = getattr(splits, part)
        assert numbers(images) == rows and images.labels.tolist() == CLASSES[rows].tolist()
        assert images.recorded is None and images.labels.dtype == torch.int64
    assert splits.label_names == ()


def test_the_names_and_shapes_that_files_have(tmp_path):
    """As in MedMNIST's files, in those of Keras, in an .npy file, and with the default name of np.savez."""
    parts = dict(train_images=GREY, val_images=OTHER, test_images=OTHER[:5])
    labels = dict(train_labels=CLASSES[:, None], val_labels=CLASSES[:12, None], test_labels=CLASSES[:5, None])
    splits = load(tmp_path, **parts, **labels)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [40, 12, 5]
    assert numbers(splits.train) == order(40) and splits.train.labels.tolist() == CLASSES[order(40)].tolist()
    assert numbers(splits.test) == order(5) and splits.test.labels.tolist() == CLASSES[order(5)].tolist()

    splits = load(tmp_path, x_train=GREY[..., None], y_train=CLASSES, x_test=OTHER[:, None], y_test=CLASSES[:12])
    assert numbers(splits.test) == order(12) and numbers(splits.valid) == order(40)[:4]
    assert sorted(numbers(splits.train) + numbers(splits.valid)) == list(range(40))

    np.save(tmp_path / "file.npy", GREY)
    alone = data.load("array_file", str(tmp_path / "file.npy"), image_size=8, channels=1)
    np.savez(tmp_path / "unnamed.npz", GREY)
    unnamed = data.load("array_file", str(tmp_path / "unnamed.npz"), image_size=8, channels=1)
    for part in data.PARTS:
        assert torch.equal(getattr(alone, part).pixels, getattr(unnamed, part).pixels)
    assert alone.train.labels is None


def test_channels_and_sizes(tmp_path):
    first = torch.from_numpy(COLOUR).permute(0, 3, 1, 2)[order(40)]
    parts = dict(train_images=COLOUR, test_images=COLOUR, valid_images=COLOUR)
    assert torch.equal(load(tmp_path, channels=3, **parts).train.pixels, first)
    moved = {name: np.moveaxis(array, -1, 1) for name, array in parts.items()}
    assert torch.equal(load(tmp_path, channels=3, **moved).train.pixels, first)
    luma = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * first).sum(1, keepdim=True)
    assert (load(tmp_path, **parts).train.pixels - luma).abs().max() < 0.6  # rounded, and no more
    grey = load(tmp_path, channels=3, images=GREY).train.pixels
    assert grey.shape == (32, 3, 8, 8) and (grey == grey[:, :1]).all()
    wide = np.pad(GREY, ((0, 0), (0, 0), (3, 4)))  # whose middle they are
    with pytest.warns(UserWarning, match="of images of 8 x 15 pixels the middle is taken, in the proportions of 8 x 8"):
        assert torch.equal(load(tmp_path, images=wide).train.pixels, load(tmp_path, images=GREY).train.pixels)
    flat = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 12, 12))
    smaller = load(tmp_path, size=4, images=flat).train.pixels
    assert smaller.shape == (32, 1, 4, 4) and (smaller == smaller[..., :1, :1]).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_are_rounded_to_bytes(tmp_path, kind):
    splits = load(tmp_path, images=(GREY / 255).astype(kind))
    assert torch.equal(splits.train.pixels, load(tmp_path, images=GREY).train.pixels)
    slightly = np.where(GREY == 255, 1.0005, GREY / 255)
    assert torch.equal(load(tmp_path, images=slightly).train.pixels, splits.train.pixels)
    assert load(tmp_path, images=GREY > 100).train.pixels.unique().tolist() == [0, 255]


def test_what_may_be_meant_otherwise_is_said(tmp_path):
    with pytest.warns(UserWarning, match="has no pixel above 15 of 255, so that all is nearly black"):
        assert "nearly black" in load(tmp_path, images=GREY // 16).note
    with pytest.warns(UserWarning, match=r"exactly one: if they are classes, labels.argmax\(1\) makes them such"):
        splits = load(tmp_path, images=GREY, labels=np.eye(4, dtype=int)[CLASSES])
    assert splits.train.labels.shape == (32, 4)
    assert load(tmp_path, images=GREY, labels=np.eye(4, dtype=int)[CLASSES] | (CLASSES == 2)[:, None]).note == ""


def test_names_of_classes_in_bytes_may_be_anything(tmp_path):
    splits = load(tmp_path, images=GREY, labels=np.array([b"gr\xfcn", b"gr\xf6n"] * 20))  # no UTF-8, and not the same
    assert splits.label_names == ("gr\\xf6n", "gr\\xfcn")


@pytest.mark.parametrize(
    ("scale", "shift", "remedy"),
    [
        (1.04, -0.02, r"clip them: np\.clip\(x, 0, 1\)"),
        (2, -1, r"\(x \+ 1\) / 2 makes them"),
        (1 / 0.3081, -0.1307 / 0.3081, "as by torchvision's Normalize, leave that out"),
        (255, 0, "Divide them by the largest value that there may be, such as 255"),
    ],
)
def test_floats_of_another_range_are_told_what_makes_them_right(tmp_path, scale, shift, remedy):
    images = GREY / 255
    images[0, 0, :2] = 0, 1
    with pytest.raises(ValueError, match=remedy):
        load(tmp_path, images=images * scale + shift)


def test_images_that_may_be_either_way_round_are_refused(tmp_path):
    for shape in ((20, 3, 8, 3), (20, 1, 8, 1)):
        with pytest.raises(ValueError, match=r"may be \(N, C, H, W\) or \(N, H, W, C\)"):
            load(tmp_path, images=np.zeros(shape, np.uint8))


def test_nan_was_never_recorded(tmp_path):
    images = COLOUR / 255
    lost = RANDOM.random((40, 8, 8)) < 0.2
    images[lost, RANDOM.integers(0, 3, lost.sum())] = np.nan  # in one channel
    splits = load(tmp_path, channels=3, train_images=images, valid_images=images[:9], test_images=COLOUR)
    lost, pixels = lost[order(40)], COLOUR[order(40)]
    assert torch.equal(splits.train.recorded, torch.from_numpy(~lost)) and splits.test.recorded is None
    found, expected = splits.train[:], torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(found.isnan(), torch.from_numpy(lost)[:, None].expand_as(found))
    assert torch.equal(found.nan_to_num(0), expected.masked_fill(found.isnan(), 0))
    more = data.with_missing(splits, 0.5, (4, 4)).train.recorded
    patches = data.with_missing(load(tmp_path, images=GREY, size=8), 0.5, (4, 4)).train.recorded
    assert not (more & torch.from_numpy(lost)).any() and patches.shape == (32, 4, 4)
    assert more.float().mean() == pytest.approx(0.8 * 0.5, abs=0.05)
    with pytest.raises(ValueError, match=r"from 8 x 8 pixels: give data.image_size=8, or make them 4"):
        load(tmp_path, size=4, images=images)
    with pytest.raises(ValueError, match=r"from 8 x 6 pixels: give data.image_size=\[8,6\], or make them 8 x 8"):
        load(tmp_path, images=images[:, :, 1:7])
    part = load(tmp_path, size=(8, 6), channels=3, images=images[:, :, 1:7]).train
    assert torch.equal(part.recorded, load(tmp_path, channels=3, images=images).train.recorded[..., 1:7])


def test_labels_with_names_and_attributes(tmp_path):
    words = np.array(["dog", "ant", "cat", "cow"])[CLASSES]
    splits = load(tmp_path, train_images=GREY, train_labels=words, test_images=OTHER, test_labels=words[:12])
    assert splits.label_names == ("ant", "cat", "cow", "dog")
    assert [splits.label_names[k] for k in splits.test.labels] == words[order(12)].tolist()
    assert load(tmp_path, images=GREY, labels=words.astype("S")).label_names == splits.label_names
    splits = load(tmp_path, images=GREY, labels=10 * CLASSES)
    assert splits.label_names == ("0", "10", "20", "30") and set(splits.train.labels.tolist()) == {0, 1, 2, 3}
    attributes = RANDOM.integers(-1, 2, (40, 5))
    splits = load(tmp_path, train_images=GREY, train_labels=attributes, test_images=OTHER, test_labels=attributes[:12])
    assert splits.test.labels.tolist() == attributes[order(12)].tolist() and len(splits.label_names) == 5


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(arr_0=GREY, arr_1=CLASSES), "holds arr_0, arr_1: expected"),
        (dict(images=COLOUR[0]), r"images has the shape \(8, 8, 3\): expected images"),
        (dict(pictures=GREY), r"holds pictures: expected images called train_images and test_images"),
        (dict(train_images=GREY), "holds train_images: expected images called"),
        (dict(), "holds nothing: expected"),
        (dict(images=GREY[0]), r"images has the shape \(8, 8\): expected images \(N, H, W\), \(N, H, W, C\)"),
        (dict(images=(GREY > 99).astype(np.uint8)), "has no byte but 0 and 1.*images.astype\\(bool\\)"),
        (dict(images=np.zeros((4, 8, 8, 4), np.uint8)), r"has the shape \(4, 8, 8, 4\)"),
        (dict(images=GREY[:0]), r"has the shape \(0, 8, 8\)"),
        (dict(images=GREY[:2]), "holds 2 images to train with, at least 3 are needed"),
        (dict(images=GREY.astype(np.int32)), r"images is of int32: expected bytes.*images.astype\(np.uint8\)"),
        (dict(images=GREY.astype(np.float32)), r"values from 0 to 255: .*Divide them by the largest value"),
        (dict(images=GREY / 127.5 - 1), r"values from -1 to 1: expected floats in \[0, 1\].*\(x \+ 1\) / 2 makes them"),
        (dict(images=np.where(GREY > 9, np.inf, 0)), "values from 0 to inf"),
        (dict(images=np.full((4, 8, 8), np.nan)), "holds nothing but NaN"),
        (dict(images=GREY, labels=CLASSES[:7]), "labels holds 7 labels, images 40 images"),
        (dict(images=GREY, labels=CLASSES / 2), r"classes \(N,\), whole numbers.*got labels of float64 \(40,\)"),
        (dict(images=GREY, labels=np.zeros((40, 2, 2), int)), r"got labels of int64 \(40, 2, 2\)"),
        (dict(images=GREY, labels=np.int64(3)), r"got labels of int64 \(\)"),
        (dict(images=GREY, labels=CLASSES - 1), "classes are numbered from 0 on, got -1 in labels: give a class"),
        (dict(images=GREY, labels=CLASSES[:, None] - 1), "classes are numbered from 0 on, got -1"),
        (dict(images=GREY, labels=np.stack([CLASSES] * 2, 1)), r"labels \(40, 2\) would be attributes.*got 0, 1, 2, 3"),
        (dict(images=GREY, labels=np.stack([2 * (CLASSES > 1) - 1] * 2, 1)), "are 1 or not known here: write 0 for no"),
        (dict(images=GREY, labels=np.zeros((40, 0), int)), "would be attributes.*of no image or none at all"),
        (dict(images=GREY, labels=np.array([["a", "b"]] * 40)), r"would be attributes.*got a, b; classes are \(N,\)"),
        (
            dict(train_images=GREY, test_images=OTHER, train_labels=CLASSES, test_labels=np.array(["a"] * 12)),
            r"all of one kind.*train_labels of int64 \(40,\), test_labels of <U1 \(12,\)",
        ),
        (dict(images=np.array([None, 1])), r"npz: images cannot be read as a plain array \(it holds Python objects\)"),
        (dict(images=GREY, labels=CLASSES.astype(object)), r"labels cannot be read .*labels.astype\(str\)"),
    ],
)
def test_refusals(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **arrays)


def test_files_that_are_none(tmp_path):
    (tmp_path / "garbage.npz").write_bytes(b"no array at all " * 9)
    (tmp_path / "empty.npy").touch()
    np.savez_compressed(tmp_path / "whole.npz", images=GREY)
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    (tmp_path / "cut.npz").write_bytes(content[:900])
    content[300:600] = bytes(300)
    (tmp_path / "damaged.npz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "bare.npz", "w") as file:
        file.writestr("images", b"no array")
    for name in ("garbage.npz", "empty.npy"):
        with pytest.raises(ValueError, match=re.escape(name) + " is no .npz or .npy file: np.savez"):
            array_files.read(tmp_path / name)
    for name, what in {"cut.npz": "cannot", "damaged.npz": ": images cannot", "bare.npz": ": images cannot"}.items():
        with pytest.raises(ValueError, match=f"{re.escape(name)}:? *{what.strip(': ')} be read as a plain array"):
            array_files.read(tmp_path / name)
    with pytest.raises(ValueError, match=r"nowhere\.npz is not there: point data.root at an \.npz or \.npy file"):
        data.load("array_file", str(tmp_path / "nowhere.npz"))
    with pytest.raises(ValueError, match="is a folder: point"):
        data.load("array_file", str(tmp_path))
    with pytest.raises(ValueError, match="data set array_file takes no crop"):
        data.load("array_file", str(tmp_path / "whole.npz"), crop=3)


def test_arrays_that_are_not_taken_are_named(tmp_path):
    notes = np.array([{"made by": "hand"}], dtype=object)
    with pytest.warns(UserWarning, match=r"of .*file\.npz were not taken: notes, labels_train"):
        splits = load(tmp_path, images=GREY, notes=notes, labels_train=CLASSES)
    assert len(splits.train) == 32 and "notes" in splits.note and splits.train.labels is None


def test_text_of_bytes_and_of_characters_are_the_same_classes(tmp_path):
    words = np.array(["B\u00e4r", "ant"])[CLASSES % 2]
    coded = np.char.encode(words[:12], "utf-8")
    splits = load(tmp_path, train_images=GREY, train_labels=words, test_images=OTHER, test_labels=coded)
    assert (
        splits.label_names == ("B\u00e4r", "ant") and splits.test.labels.tolist() == (CLASSES[order(12)] % 2).tolist()
    )


def test_nan_in_every_patch(tmp_path):
    images = GREY / 255
    images[:, ::4, ::4] = np.nan
    splits = load(tmp_path, images=images)
    assert splits.train.recorded_patches((8, 8)).float().mean() == pytest.approx(15 / 16)
    with pytest.raises(ValueError, match=r"none of the 2 x 2 patches of the train images was recorded as a whole"):
        data.check_recorded(splits, (2, 2))
    with pytest.raises(ValueError, match=r"missing=0.5 leaves nothing of 32 images"):
        data.with_missing(splits, 0.5, (2, 2))
    data.check_recorded(splits, (4, 4))
    images[:, 1::2, 1::2] = np.nan
    images[:4] = GREY[:4] / 255
    splits = load(tmp_path, train_images=images, test_images=OTHER, valid_images=OTHER)
    with pytest.warns(UserWarning, match=r"10.0% of the 4 x 4 patches of the train images.*though 71.9% of the pixels"):
        data.check_recorded(splits, (4, 4))


def test_what_was_not_recorded_tells_one_data_set_from_another(tmp_path):
    holes, zeros = GREY / 255, GREY / 255
    holes[:, :4], zeros[:, :4] = np.nan, 0
    one, other = (load(tmp_path, images=images).train for images in (holes, zeros))
    assert torch.equal(one.pixels, other.pixels) and one.fingerprint() != other.fingerprint()
    assert data.with_missing(load(tmp_path, images=zeros), 0.3, (4, 4)).train.fingerprint() == other.fingerprint()
