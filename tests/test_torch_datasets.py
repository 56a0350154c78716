import math
import os
import random
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from test_array_files import CLASSES, GREY, numbers, order
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from biglearn_vae import ImageSet, config, data

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


class Items(Dataset):
    """A data set of these items."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Parts(Items):
    """Greys of two parts, as torchvision's MNIST has them."""

    classes = ("zero", "one", "two", "three", "four")

    def __init__(self, root: str, train: bool = True, download: bool = False):
        assert root == "somewhere" and download
        images = zip(GREY, CLASSES, strict=True) if train else zip(GREY[:5], CLASSES[:5], strict=True)
        super().__init__(*((Image.fromarray(image), int(label)) for image, label in images))


class Split(Items):
    """Greys of named parts, of which there are these."""

    def __init__(self, split: str, there: tuple[str, ...] = ("train", "val"), count: int = 40):
        if split not in there:
            raise ValueError(f"unknown split {split}")
        super().__init__(*GREY[:count] if split == "train" else GREY[:7])


def load(target, size: data.Size = 8, channels: int = 1, **own) -> data.Splits:
    return data.load("torch_dataset", "somewhere", size, channels, target=target, **own)


def rgb(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_parts_as_torchvision_has_them_are_those_of_the_same_arrays_in_a_file(tmp_path):
    np.savez(tmp_path / "file.npz", x_train=GREY, y_train=CLASSES, x_test=GREY[:5], y_test=CLASSES[:5])
    expected = data.load("array_file", str(tmp_path / "file.npz"), image_size=16, channels=3)
    splits = load(Parts, 16, 3)
    for part in data.PARTS:
        found, wanted = getattr(splits, part), getattr(expected, part)
        assert torch.equal(found.pixels, wanted.pixels) and torch.equal(found.labels, wanted.labels)
    assert splits.label_names == Parts.classes and splits.note == ""


def test_a_part_of_another_name_is_found_and_one_that_is_not_there_is_cut_from_the_training_images():
    with pytest.warns(UserWarning, match=r"Split has no test part \(.*unknown split testing\): training images are"):
        splits = load(Split)
    assert numbers(splits.valid) == order(7)
    assert numbers(splits.test) == order(40)[:4] and numbers(splits.train) == order(40)[4:]
    with pytest.warns(UserWarning, match=r"Split has no valid part \(.*\): training"):
        splits = load(Split, there=("train", "test"), count=20)
    assert numbers(splits.test) == order(7) and len(splits.train) == 18 and len(splits.valid) == 2


def test_what_does_not_tell_validation_images_from_others_has_none():
    """A class with an `else` gives the images of another part for one that it does not know."""

    def either(split: str = "train", known: str = "train"):
        return Items(*(GREY if (split == known) == (known == "train") else GREY[:7]))

    for known, other in (("train", "test"), ("test", "train")):
        with pytest.warns(UserWarning, match=f"either gives its {other} part for valid, too: training images are"):
            splits = load(either, known=known)
        assert numbers(splits.test) == order(7)
        assert numbers(splits.valid) == order(40)[:4] and numbers(splits.train) == order(40)[4:]


def test_what_does_not_look_at_what_is_asked_is_one_part():
    def same(split: str):
        return Items(*GREY)

    def also(train: bool):
        return Items(*GREY)

    for make in (same, also):
        with pytest.warns(UserWarning, match=f"{make.__name__} gives its train part for test, too"):
            splits = load(make)
        assert [len(getattr(splits, part)) for part in data.PARTS] == [32, 4, 4]


def test_test_images_that_are_not_there_are_no_part_that_there_is_not():
    def lost(split: str):
        if split != "train":
            raise FileNotFoundError("the download was cut off")
        return Items(*GREY)

    with pytest.raises(ValueError, match=r"lost\(split='test'\): the download was cut off"):
        load(lost)


@pytest.mark.parametrize("error", [FileNotFoundError("no folder valid"), AssertionError()])
def test_a_part_that_is_not_there_or_not_known_is_cut_from_the_training_images(error):
    def folders(split: str):
        if split not in ("train", "test"):
            raise error
        return Items(*(GREY if split == "train" else GREY[:7]))

    with pytest.warns(UserWarning, match=r"folders has no valid part \(.*\): training images are taken"):
        splits = load(folders)
    assert numbers(splits.test) == order(7) and len(splits.valid) == 4


def test_one_data_set_is_split_by_its_order_and_a_mapping_by_its_parts():
    def whole(count: int):
        return TensorDataset(torch.from_numpy(GREY[:count]), torch.from_numpy(CLASSES[:count]))

    def parted(**parts):
        return parts

    splits = load(whole, count=40)
    assert [numbers(getattr(splits, part)) for part in ("test", "valid")] == [order(40)[:4], order(40)[4:8]]
    assert splits.train.labels.tolist() == CLASSES[order(40)[8:]].tolist()
    assert len(load(Split, split="train").train) == 32  # a part that is asked for is all there is

    with pytest.warns(UserWarning, match="of parted were not taken: extra"):
        splits = load(parted, train=whole(30), validation=whole(9), test=whole(5), extra=None)
    assert [len(getattr(splits, part)) for part in data.PARTS] == [30, 9, 5]


class Letters(Parts):
    """As torchvision's EMNIST: what it takes is in the class that it is made of."""

    def __init__(self, root: str, split: str, **kwargs):
        assert split == "letters"
        super().__init__(root, **kwargs)


def test_what_a_class_hands_on_is_known_too():
    assert numbers(load(Letters, split="letters").test) == order(5)
    with pytest.raises(ValueError, match="Letters takes root, train, download, split, not count"):
        load(Letters, split="letters", count=3)
    with pytest.raises(ValueError, match=r"anything\(count=3\): nothing here"):
        load(anything, count=3)


def anything(**given):
    raise OSError("nothing here")


def test_what_cannot_be_done_without_is_given():
    def sized(image_size, channels, colours=3):
        assert (image_size, channels, colours) == (8, 1, 3)
        return Items(*GREY)

    assert len(load(sized).train) == 32


def test_what_draws_at_random_draws_the_same_each_time():
    def cut():
        order = [*torch.randperm(40).tolist(), *np.random.permutation(40), *random.sample(range(40), 40)]
        return Items(*(GREY[k] for k in order))

    torch.manual_seed(3)
    expected = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()
    first, again = load(cut), load(cut)
    assert torch.equal(first.train.pixels, again.train.pixels) and torch.equal(torch.rand(2), expected[0])
    assert random.getstate() == states[0] and all(map(np.array_equal, np.random.get_state(), states[1]))


def test_names_of_classes_are_found_where_they_are():
    class Feature:
        names = ("a", "b")

    class Table(Items):
        features: ClassVar = {"image": None, "label": Feature()}

    items = [(image, k % 2) for k, image in enumerate(GREY)]
    for dataset in (
        Table(*items),
        Subset(Table(*items), range(40)),
        Subset(Subset(Table(*items), range(40)), range(40)),
    ):
        splits = load(lambda dataset=dataset: dataset)
        assert splits.label_names == ("a", "b") and splits.train.labels.tolist() == [k % 2 for k in order(40)[8:]]


def test_classes_that_each_part_numbers_by_itself_are_the_same_by_their_names():
    def part(*classes: str):
        dataset = Items(*((image, k % len(classes)) for k, image in enumerate(GREY)))
        dataset.classes = list(classes)
        return dataset

    splits = load(lambda: {"train": part("a", "b", "c"), "test": part("b", "c")})
    assert splits.label_names == ("a", "b", "c")
    assert splits.test.labels.tolist() == [1 + k % 2 for k in order(40)]
    for dataset in (texts := [part("a", "b", "c"), part("b", "c")]):
        dataset.items = [(image, dataset.classes[label]) for image, label in dataset.items]
    assert load(lambda: {"train": texts[0], "test": texts[1]}).test.labels.tolist() == splits.test.labels.tolist()
    wrong = part("b", "c")
    wrong.items = [(GREY[0], 2)] * 3
    with pytest.warns(UserWarning, match="labels of .* were not taken: expected numbers of 2 classes, got 2"):
        assert load(lambda: {"train": part("a", "b", "c"), "test": wrong}).train.labels is None


def test_labels_of_one_part_alone_are_taken():
    splits = load(lambda: {"train": Items(*zip(GREY, CLASSES, strict=True)), "test": Items(*GREY[:5])})
    assert splits.train.labels is not None and splits.test.labels is None


def test_some_images_alone_may_be_nearly_black_or_never_recorded():
    images = np.zeros((600, 2, 2))
    images[:256], images[256:512] = 0.5, np.nan
    found = ImageSet.of(Items(*images))
    assert found.recorded[:256].all() and not found.recorded[256:512].any() and found.recorded[512:].all()
    images[256:512] = 1 / 255
    assert ImageSet.of(Items(*(images * 255).astype(np.uint8))).pixels[300].eq(1).all()
    with pytest.raises(ValueError, match="Items has no byte but 0 and 1"):
        ImageSet.of(Items(*np.ones((3, 2, 2), np.uint8), np.zeros((2, 4), np.uint8)), image_size=2)
    with pytest.raises(ValueError, match="Items holds nothing but NaN"):
        ImageSet.of(Items(*np.full((3, 2, 2), np.nan)))


def test_images_of_every_kind_become_the_same_bytes():
    one = COLOUR[0]
    items = [
        (Image.fromarray(one), 0),
        one,
        np.moveaxis(one, -1, 0),
        torch.from_numpy(one).permute(2, 0, 1),
        torch.from_numpy(one) / 255,
        {"img": one / 255, "label": 3},
        [Image.fromarray(one), 1, "and more"],
    ]
    with pytest.warns(UserWarning, match="labels of Items were not taken"):  # of which there are some alone
        images = ImageSet.of(Items(*items))
    assert images.pixels.shape == (7, 3, 8, 8) and images.labels is None
    for pixels in images.pixels:
        assert torch.equal(pixels, rgb(Image.fromarray(one)))


def test_pictures_of_all_modes_and_sizes():
    grey, colour = Image.fromarray(GREY[0]), Image.fromarray(COLOUR[0])
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear_too = [Image.new("LA", (8, 8), (0, 0)).convert("La"), clear.convert("RGBa")]
    deep = Image.fromarray(GREY[1].astype(np.int32) * 257)  # 16 bits
    images = ImageSet.of(Items(grey, colour, clear, *clear_too, deep), channels=3)
    expected = [rgb(grey), rgb(colour), *[torch.full((3, 8, 8), 255)] * 3, rgb(Image.fromarray(GREY[1]))]
    assert all(torch.equal(*pair) for pair in zip(images.pixels, expected, strict=True))

    with pytest.raises(ValueError, match=r"Items has images of several shapes, such as \(1, 8, 8\) and \(3, 8, 8\)"):
        ImageSet.of(Items(grey, colour))
    sized = ImageSet.of(Items(colour.resize((20, 16)), colour), image_size=8)
    assert sized.pixels.shape == (2, 3, 8, 8) and torch.equal(sized.pixels[1], rgb(colour))


def test_more_images_than_are_made_bytes_at_a_time():
    images = torch.randint(256, (600, 1, 2, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ImageSet.of(TensorDataset(images)).pixels, images)
    three = ImageSet.of(TensorDataset(images), channels=3).pixels
    assert torch.equal(three, images.expand(-1, 3, -1, -1)) and three.stride(1) == 0  # views of one


def test_nan_was_never_recorded():
    images = np.full((3, 4, 4), 0.5)
    images[1, 2:] = np.nan
    found = ImageSet.of(Items(*images, np.ones((4, 4), np.uint8)))  # one of bytes among them
    assert torch.equal(found.recorded, ~torch.from_numpy(np.isnan([*images, np.ones((4, 4))])))
    assert found.pixels[1, 0, 2:].eq(0).all() and found.pixels[0].eq(128).all()
    with pytest.raises(ValueError, match=r"images with NaN.*cannot be resized from 4 x 4 pixels: give"):
        ImageSet.of(Items(*images), image_size=8)


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        ([0, 1, 2], [0, 1, 2], ()),
        ([np.int64(1), torch.tensor(0), True], [1, 0, 1], ()),
        ([3, 5, 3], [0, 1, 0], ("3", "5")),
        ([np.uint64(1), np.int64(0), 2], [1, 0, 2], ()),
        (["cat", "dog", "cat"], [0, 1, 0], ("cat", "dog")),
        ([torch.tensor([1, 0]), torch.tensor([1, 1]), torch.tensor([0, -1])], [[1, 0], [1, 1], [0, -1]], ("0", "1")),
    ],
)
def test_labels(labels, expected, names):
    splits = load(lambda: Items(*zip(COLOUR, 4 * labels, strict=True)), channels=3)
    together = torch.cat([getattr(splits, part).labels for part in ("test", "valid", "train")])
    assert together.tolist() == [(4 * expected)[k] for k in order(12)] and splits.label_names == names


@pytest.mark.parametrize(
    "labels",
    [
        [-1, 0, 1],
        [0.5, 1.0, 2.0],
        [[0, 1], [1], [2]],
        [{"box": 1}] * 3,
        [[7, 30, 9]] * 3,
        ["cat", "dog", math.nan],
        [0, 1, "x"],
    ],
)
def test_what_is_no_label_is_left_with_a_note(labels):
    with pytest.warns(UserWarning, match="labels of Items were not taken: "):
        images = ImageSet.of(Items(*zip(COLOUR[:3], labels, strict=True)))
    assert images.labels is None and len(images) == 3


class Broken(Items):
    def __getitem__(self, i):
        if i == 2:
            raise OSError("no such file: 2.png\nand more")
        return COLOUR[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(COLOUR)


@pytest.mark.parametrize(
    ("make", "own", "expected"),
    [
        (Split, dict(count=3, cuont=3), "Split takes split, there, count, not cuont"),
        (Split, dict(there=("test",)), "Split(there=('test',), split='train'): unknown split train"),
        (lambda: Broken(*COLOUR), {}, "<lambda>: item 2 cannot be read: no such file: 2.png"),
        (lambda: Items(), {}, "<lambda>: expected at least one image, got none"),
        (lambda: Items(*COLOUR[:2]), {}, "<lambda> holds 2 images to train with, at least 3 are needed"),
        (lambda: Items(None, None), {}, "item 0 cannot be read: expected a PIL image, an array or a tensor, got NoneT"),
        (lambda: Items({"picture": 1}), {}, "item 0 cannot be read: it holds picture: expected an image called image"),
        (lambda: Items(*(COLOUR / 1.0)), {}, "<lambda> has values from 0 to 255: expected floats in [0, 1]"),
        (lambda: Items(*(COLOUR / 128 - 1)), {}, "NaN was never recorded. If they are in [-1, 1], (x + 1) / 2 makes"),
        (lambda: Items(*(COLOUR[:, 0, 0])), {}, "has the shape (12, 3): expected images (N, H, W)"),
        (lambda: {"test": Items(*COLOUR)}, {}, "<lambda> gives test: expected train, and test or valid"),
        (lambda: [Items(*COLOUR)] * 2, {}, "<lambda> gives 2 data sets: expected one, or a mapping of such by parts"),
        (dict, {}, "expected a class or a function that makes a torch Dataset, got <class 'dict'>: no signature"),
        (Stream, {}, "Stream: expected a data set with a length and items by number"),
        ("torchvision.datasets.MNIST", {}, "target must be a class or a function that makes a torch Dataset, got 'tor"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(make, own, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        load(make, channels=3, **own)


def test_one_data_set_is_no_mapping():
    with pytest.raises(ValueError, match="expected one data set, got a mapping of train, test: give one of these"):
        ImageSet.of({"train": Items(*COLOUR), "test": Items(*COLOUR)})


def test_what_fails_for_another_reason_than_that_there_is_no_such_part_is_told():
    def files(split: str):
        if split == "test":
            raise RuntimeError("Dataset not found or corrupted")
        return Items(*COLOUR)

    with pytest.raises(ValueError, match=r"files\(split='test'\): Dataset not found or corrupted"):
        load(files, channels=3)


def test_settings_name_the_data_set_and_what_it_takes():
    words = ["data=torch_dataset", "data._target_=test_torch_datasets.Split", "+data.count=30", "data.root=x"]
    cfg = config.compose([*words, "data.image_size=8", "data.patch_size=2"])
    with pytest.warns(UserWarning, match="Split has no test part"):
        splits = config.dataset(cfg)
    assert len(splits.train) == 27 and splits.train.pixels.shape[1:] == (3, 8, 8)
    expected = "data=torch_dataset data._target_=test_torch_datasets.Split data.root=x data.image_size=8"
    assert config.data_words(cfg) == f"{expected} data.patch_size=2 +data.count=30"
    for word, message in (
        ("~data.patch_size", "data.patch_size cannot be left out"),
        ("data.cuont=3", "there is no data.cuont yet: +data.cuont=3 adds it"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            config.compose([*words, word])
    with pytest.raises(ValueError, match="there is no such setting"):
        config.compose(["data=torch_dataset", "+data.count=30"])


@pytest.mark.skipif(not os.environ.get("BIGLEARN_DATA"), reason="BIGLEARN_DATA names no folder of real data")
def test_torchvisions_mnist_is_our_mnist():
    from torchvision.datasets import MNIST

    ours, theirs = data.load("mnist").test, ImageSet.of(MNIST(os.environ["BIGLEARN_DATA"], train=False), 32, 3)
    assert torch.equal(theirs.pixels, ours.pixels) and torch.equal(theirs.labels, ours.labels)
