import hashlib
import math
import os
import random
import re
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, features
from sklearn.datasets import load_digits

import biglearn_vae as blv
from biglearn_vae import Batches, ImageSet, World, data

NAMES = ("train", "valid", "test")


def parts(splits: data.Splits) -> list[ImageSet]:
    return [getattr(splits, name) for name in NAMES]


def all_pixels(splits: data.Splits) -> torch.Tensor:
    return torch.cat([part.pixels for part in parts(splits)])


# --- digits ---


def test_digits_sizes():
    splits = data.load("digits")
    assert [len(part) for part in parts(splits)] == [1200, 300, 297]
    for part in parts(splits):
        assert part.pixels.shape == (len(part), 1, 8, 8) and part.pixels.dtype == torch.uint8
        assert part.labels.shape == (len(part),) and part.labels.dtype == torch.int64
    assert splits.note == ""


def test_digits_splits_are_disjoint_and_together_everything():
    raw = load_digits()
    expected = Counter(
        (*image.astype(int).ravel().tolist(), int(label)) for image, label in zip(raw.images, raw.target, strict=True)
    )
    assert max(expected.values()) == 1  # so that equal counts mean disjoint splits
    splits = data.load("digits")
    levels = (all_pixels(splits).double() * 16 / 255).round().long().flatten(1)
    labels = torch.cat([part.labels for part in parts(splits)])
    assert Counter(map(tuple, torch.cat([levels, labels.unsqueeze(1)], dim=1).tolist())) == expected


def test_digits_are_those_that_scikit_learn_gives_where_it_has_no_such_file(monkeypatch):
    expected = data.load("digits")
    monkeypatch.setattr(data, "DIGITS", "elsewhere.csv.gz")
    for part, other in zip(parts(data.load("digits")), parts(expected), strict=True):
        assert torch.equal(part.pixels, other.pixels) and torch.equal(part.labels, other.labels)


def test_digits_are_rounded_to_the_nearest_byte():
    pixels = all_pixels(data.load("digits"))
    values = pixels.double() / 255
    assert (values - (values * 16).round() / 16).abs().max() <= 1 / 510 + 1e-12


def test_digits_are_the_same_on_each_call():
    for one, other in zip(parts(data.load("digits")), parts(data.load("digits")), strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
        assert one.fingerprint() == other.fingerprint()


def test_indexing_gives_floats_from_zero_to_one():
    part = data.load("digits").train
    for index in (slice(None), slice(3, 9), torch.tensor([5, 1, 5])):
        x = part[index]
        assert x.dtype == torch.float32 and torch.equal(x, part.pixels[index].float() / 255)
    assert part[:].min() == 0 and part[:].max() == 1


@pytest.mark.parametrize("size", [4, 11, 32])
def test_digits_resized_with_three_channels(size):
    plain, resized = data.load("digits").test, data.load("digits", image_size=size, channels=3).test
    assert resized.pixels.shape == (297, 3, size, size)
    assert torch.equal(resized.pixels, resized.pixels[:, :1].expand(-1, 3, -1, -1))
    assert torch.equal(resized.labels, plain.labels)
    expected = torch.nn.functional.interpolate(
        plain.pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    assert (resized.pixels[:, :1].float() - expected).abs().max() <= 1


def test_images_are_those_of_the_split():
    splits = data.load("digits")
    with pytest.raises(TypeError, match="split"):  # test images are not to be taken for want of a word
        blv.images("digits")
    for name in NAMES:
        assert torch.equal(blv.images("digits", split=name), getattr(splits, name)[:])
    assert blv.images("digits", "valid", image_size=16, channels=3).shape == (300, 3, 16, 16)
    with pytest.raises(ValueError, match=r"train, valid or test.*'dev'"):
        blv.images("digits", split="dev")


# --- Batches ---


def numbered(count: int) -> ImageSet:
    """One pixel per image, its number."""
    return ImageSet(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1))


def numbers(batch: torch.Tensor) -> list[int]:
    return (batch.flatten() * 255).round().int().tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25, 37])
def test_each_epoch_visits_every_image_once(batch_size):
    batches, epochs = Batches(numbered(10), batch_size, seed=3), 8
    seen = [n for step in range(math.ceil(epochs * 10 / batch_size)) for n in numbers(batches(step))]
    orders = [tuple(seen[10 * epoch : 10 * epoch + 10]) for epoch in range(epochs)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) == epochs


def test_batches_have_their_size_even_across_epochs():
    for batch_size in (4, 25):
        batches = Batches(numbered(10), batch_size)
        assert all(batches(step).shape == (batch_size, 1, 1, 1) for step in range(12))


def test_order_depends_on_the_seed_alone():
    def orders(seed):
        return numbers(Batches(numbered(50), 50, seed)(0)), numbers(Batches(numbered(50), 50, seed)(1))

    assert orders(0) == orders(0)
    assert len({tuple(order) for seed in range(4) for order in orders(seed)}) == 8


def test_what_makes_tokens_of_a_batch_is_not_trained():
    weight = torch.ones((), requires_grad=True)
    assert not Batches(numbered(4), 2, transform=lambda x: x * weight)(0).requires_grad


def test_order_does_not_depend_on_the_batch_size():
    one, other = Batches(numbered(30), 10, seed=1), Batches(numbered(30), 15, seed=1)
    assert [n for step in range(6) for n in numbers(one(step))] == [
        n for step in range(4) for n in numbers(other(step))
    ]


def test_batches_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one image to make batches of, got none"):
        data.Batches(data.ImageSet(torch.zeros(0, 1, 8, 8, dtype=torch.uint8)), 4)


def test_batches_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Batches(numbered(10), 4)(5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("batch_size", [3, 4, 25])
def test_a_batch_is_a_function_of_the_step(batch_size):
    in_order = Batches(numbered(10), batch_size)
    expected = {step: numbers(in_order(step)) for step in range(40)}
    steps = [*range(40), *range(40)]
    random.Random(0).shuffle(steps)
    again = Batches(numbered(10), batch_size)
    for step in steps:
        assert numbers(again(step)) == expected[step]


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("count", [5, 10, 100])
def test_the_ranks_batches_are_those_of_a_single_process(size, count):
    whole = Batches(numbered(count), 12, seed=2)
    ranks = [Batches(numbered(count), 12, seed=2, world=World(rank, size)) for rank in range(size)]
    for step in range(20):
        assert torch.equal(torch.cat([batches(step) for batches in ranks]), whole(step))


def test_batch_size_must_be_shared_evenly():
    for batch_size, expected in ((5, "2 processes"), (1, "2 processes"), (0, "at least 1"), (-2, "at least 1")):
        with pytest.raises(ValueError, match=f"{expected}.*got {batch_size}"):
            Batches(numbered(10), batch_size, world=World(0, 2))


def test_transform_is_applied():
    splits = data.load("digits")
    tokens = blv.Patchify(8, 2, 1)
    plain, cut = Batches(splits.train, 32), Batches(splits.train, 32, transform=tokens.encode)
    for step in (0, 50):
        assert torch.equal(cut(step), tokens.encode(plain(step)))
        assert torch.equal(plain(step), splits.train[plain.positions(step)])


# --- where a set is ---


def test_selecting_a_slice_is_a_view_and_positions_may_repeat():
    whole = data.with_missing(data.load("digits"), 0.3, (4, 4)).train
    rows = torch.tensor([7, 0, 7])
    for index in (slice(3, 9), rows):
        part = whole.select(index)
        assert torch.equal(part[:].nan_to_num(-1), whole[index].nan_to_num(-1))
        assert torch.equal(part.labels, whole.labels[index]) and torch.equal(part.recorded, whole.recorded[index])
    assert whole.select(slice(3, 9)).pixels.data_ptr() == whole.pixels[3].data_ptr()
    assert ImageSet(whole.pixels).select(rows).labels is None


def test_nothing_is_copied_to_the_device_where_it_is():
    images = data.load("digits").train
    for same in (images.resident(torch.device("cpu")), images.to(torch.device("cpu"))):
        assert same.pixels.data_ptr() == images.pixels.data_ptr() and same.device == torch.device("cpu")


def test_images_are_taken_without_their_labels():
    """Those are on the CPU: to index them, a step on a GPU would wait for its index."""
    images = data.load("digits").train
    there = replace(images.to(torch.device("meta")), labels=images.labels)
    taken = data.take(there, torch.arange(5, device="meta"), torch.device("meta"))
    assert taken.shape == (5, 1, 8, 8) and taken.device == torch.device("meta")


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """What images in [0, 1] were before bytes were divided by 255, which a GPU does less exactly; -1 for NaN."""
    bytes_again = 255 * images
    assert ((bytes_again - bytes_again.round()).nan_to_num(0).abs() < 1e-4).all()
    return bytes_again.round().nan_to_num(-1)


@pytest.mark.gpu
def test_a_set_becomes_resident_if_it_leaves_as_much_free(monkeypatch):
    images, gpu = data.with_missing(data.load("digits"), 0.3, (4, 4)).train, torch.device("cuda", 0)
    size = images.pixels.numel() + images.recorded.numel()
    for free, there in ((2 * size, True), (2 * size - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**40))
        moved = images.resident(gpu)
        assert (moved.device == gpu) == there
        assert torch.equal(as_bytes(moved[:].cpu()), as_bytes(images[:]))


@pytest.mark.gpu
def test_batches_are_made_on_the_training_device_wherever_the_set_is():
    images, gpu = data.with_missing(data.load("digits"), 0.3, (4, 4)).train, torch.device("cuda", 0)
    expected = Batches(images, 100)
    assert expected(0).device == torch.device("cpu") and Batches(images.to(gpu), 100)(0).device == gpu
    for there in (images, images.to(gpu)):
        batches = Batches(there, 100, world=World(device=gpu))
        for step in (0, 11, 12):
            assert batches(step).device == gpu
            assert torch.equal(as_bytes(batches(step).cpu()), as_bytes(expected(step)))


# --- fingerprint ---


def random_set(count: int = 50, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 4, 4), generator=generator, dtype=torch.uint8)


def test_fingerprint_of_the_same_data():
    pixels = random_set()
    assert ImageSet(pixels).fingerprint() == ImageSet(pixels.clone()).fingerprint()
    grey = random_set(channels=1)
    assert (
        ImageSet(grey.expand(-1, 3, -1, -1)).fingerprint() == ImageSet(grey.repeat_interleave(3, dim=1)).fingerprint()
    )


def test_fingerprint_of_other_data():
    pixels = random_set()
    prints = {ImageSet(pixels).fingerprint()}
    others = [pixels[:-1], pixels[:, :1], pixels.flatten(2).view(50, 3, 2, 8), pixels.flip(0), random_set(seed=1)]
    for n, c in ((0, 0), (49, 0), (0, 1), (49, 2)):  # one level of one pixel, in every channel
        changed = pixels.clone()
        changed[n, c, 3, 3] ^= 1
        others.append(changed)
    prints |= {ImageSet(other).fingerprint() for other in others}
    assert len(prints) == 1 + len(others)


@pytest.mark.parametrize("count", [999, 1001, 2500])
def test_fingerprint_of_many_images_sees_the_first_and_the_count(count):
    pixels = random_set(count)
    changed = pixels.clone()
    changed[0, 0, 0, 0] ^= 1
    assert len({ImageSet(p).fingerprint() for p in (pixels, changed, pixels[:-1])}) == 3


# --- data of which something was never recorded ---


@pytest.mark.parametrize("cells", [(16,), (1, 8, 8), (3, 4), (0, 4), (16, 16)])
def test_cells_that_are_none_of_the_images_are_refused(cells):
    pixels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"expected recorded as booleans \(N, rows, columns\), of cells that divide"):
        ImageSet(pixels, recorded=torch.ones(20, *cells, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"of 8 x 8 pixels, got torch\.int64 \(20, 4, 4\)"):
        ImageSet(pixels, recorded=torch.ones(20, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"whose channels seem to come last: pixels\.permute\(0, 3, 1, 2\)"):
        ImageSet(pixels.permute(0, 2, 3, 1))


def test_unrecorded_pixels_are_nan_and_the_others_as_they_are():
    whole = ImageSet(random_set(20))  # (20, 3, H, W)
    height, width = whole.pixels.shape[-2:]
    recorded = torch.rand(20, height // 2, width // 4, generator=torch.Generator().manual_seed(0)) < 0.5
    part = ImageSet(whole.pixels, None, recorded)
    for index in (slice(3, 9), torch.tensor([4, 4, 0]), slice(None)):
        seen = recorded[index].repeat_interleave(2, 1).repeat_interleave(4, 2)[:, None].expand_as(whole[index])
        assert torch.equal(part[index].isnan(), ~seen)
        assert torch.equal(part[index][seen], whole[index][seen])
    assert torch.equal(part.to(torch.device("cpu")).select(torch.tensor([7]))[:].isnan(), part[7:8].isnan())


def test_missing_patches():
    whole = data.load("digits")
    splits = data.with_missing(whole, 0.3, (4, 4))
    assert torch.equal(splits.test[:], whole.test[:])
    for part, name in ((splits.train, "train"), (splits.valid, "valid")):
        recorded = part.recorded
        assert recorded.shape == (len(part), 4, 4)
        assert recorded.float().mean().item() == pytest.approx(0.7, abs=0.02)
        assert len(recorded.flatten(1).sum(1).unique()) > 5  # each patch by itself
        assert torch.equal(part[:].nan_to_num(0), getattr(whole, name)[:] * ~part[:].isnan())
    again = data.with_missing(whole, 0.3, (4, 4))
    assert torch.equal(again.train.recorded, splits.train.recorded)
    more = data.with_missing(whole, 0.6, (4, 4))
    assert not (more.train.recorded & ~splits.train.recorded).any()


def test_missing_images():
    whole = data.load("digits")
    splits = data.with_missing(whole, 0.75, (4, 4), "image")
    assert [len(part) for part in parts(splits)] == [300, 75, 297]
    known = {tuple(image.flatten().tolist()): int(label) for image, label in zip(*vars_of(whole.train), strict=True)}
    kept = [known[tuple(image.flatten().tolist())] for image in splits.train.pixels]
    assert kept == splits.train.labels.tolist() and not splits.train[:].isnan().any()


def vars_of(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    return images.pixels, images.labels


def test_nothing_missing_is_the_data_itself():
    whole = data.load("digits")
    assert data.with_missing(whole, 0, (4, 4)) is whole


@pytest.mark.parametrize(
    "share, unit, message",
    [
        (1, "patch", "number in [0, 1), got 1"),
        (-0.1, "patch", "got -0.1"),
        (0.5, "pixel", "missing_unit must be patch or image, got 'pixel'"),
        (0.99999, "image", "leaves nothing"),
        (math.nan, "patch", "got nan"),
    ],
)
def test_missing_refuses(share, unit, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.with_missing(data.load("digits"), share, (4, 4), unit)


# --- image_folder: modes ---

GENERATOR = np.random.default_rng(0)
COLOUR = GENERATOR.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (8, 8), dtype=np.uint8)
LEFT = np.arange(8) < 4  # the columns that are opaque where there is transparency
THREE = np.stack([GREY] * 3, axis=-1)


def write(path: Path, image: Image.Image, **settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)


def load_one(folder: Path, name: str, image: Image.Image, channels: int = 3, image_size: int = 8, **settings):
    """What `image_folder` makes of a file, (C, S, S); three copies of it, since that is the least."""
    for k in range(3):
        write(folder / f"{k}{name}", image, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = data.load("image_folder", str(folder), image_size=image_size, channels=channels)
    assert splits.note == "" and [len(part) for part in parts(splits)] == [1, 1, 1]
    first, *rest = (part.pixels[0] for part in parts(splits))
    assert all(torch.equal(first, other) for other in rest)
    assert first.dtype == torch.uint8
    return first


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1)


def on_white(pixels: np.ndarray) -> torch.Tensor:
    return chw(np.where(LEFT[None, :, None], pixels, 255))


def test_rgb_png_as_it_is(tmp_path):
    assert torch.equal(load_one(tmp_path, ".png", Image.fromarray(COLOUR)), chw(COLOUR))


def test_suffixes_of_any_case(tmp_path):
    assert torch.equal(load_one(tmp_path, ".PNG", Image.fromarray(COLOUR)), chw(COLOUR))


def test_jpeg(tmp_path):
    pixels = load_one(tmp_path, ".jpg", Image.fromarray(COLOUR), quality=90)
    with Image.open(tmp_path / "0.jpg") as file:
        assert torch.equal(pixels, chw(np.asarray(file.convert("RGB"))))
    flat = load_one(tmp_path / "flat", ".jpeg", Image.new("RGB", (8, 8), (200, 100, 50)), quality=95)
    assert (flat.int() - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() <= 2


def test_greyscale(tmp_path):
    assert torch.equal(load_one(tmp_path, ".png", Image.fromarray(GREY)), chw(THREE))


def test_greyscale_with_transparency_is_laid_on_white(tmp_path):
    image = Image.fromarray(GREY).convert("LA")
    image.putalpha(Image.fromarray(np.broadcast_to(LEFT * 255, (8, 8)).astype(np.uint8)))
    assert image.mode == "LA"
    assert torch.equal(load_one(tmp_path, ".png", image), on_white(THREE))


def test_colour_with_transparency_is_laid_on_white(tmp_path):
    image = Image.fromarray(np.dstack([COLOUR, np.broadcast_to(LEFT * 255, (8, 8)).astype(np.uint8)]))
    assert image.mode == "RGBA"
    assert torch.equal(load_one(tmp_path, ".png", image), on_white(COLOUR))


def test_half_transparent(tmp_path):
    pixels = load_one(tmp_path, ".png", Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    assert (pixels.int() - torch.tensor([255, 127, 127]).view(3, 1, 1)).abs().max() <= 1


def palette_image() -> tuple[Image.Image, np.ndarray]:
    """A palette image, and its colours; entry 1 on the left, 2 on the right."""
    image = Image.fromarray(np.broadcast_to(np.where(LEFT, 1, 2), (8, 8)).astype(np.uint8))
    image.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50])
    assert image.mode == "P"
    return image, np.where(LEFT[None, :, None], [10, 20, 30], [200, 100, 50]) * np.ones((8, 1, 1), int)


def test_palette(tmp_path):
    image, colours = palette_image()
    assert torch.equal(load_one(tmp_path, ".png", image), chw(colours))


@pytest.mark.parametrize("transparency", [2, b"\xff\xff\x00"], ids=["index", "table"])
def test_palette_with_transparency(tmp_path, transparency):
    image, colours = palette_image()
    assert torch.equal(load_one(tmp_path, ".png", image, transparency=transparency), on_white(colours))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, channels):
    levels = np.array([0, 257, 5140, 32768, 40000, 65535], dtype=np.uint16)
    image = Image.fromarray(np.tile(levels, (6, 1)))
    pixels = load_one(tmp_path, ".png", image, channels=channels, image_size=6)
    with Image.open(tmp_path / "0.png") as file:
        assert file.mode.startswith("I")
    assert pixels.shape == (channels, 6, 6)
    assert (pixels.double() - torch.from_numpy(levels / 257.0)).abs().max() < 1
    assert pixels[0, 0, 0] == 0 and pixels[0, 0, -1] == 255


def test_one_bit(tmp_path):
    bits = GENERATOR.integers(0, 2, (8, 8)).astype(bool)
    image = Image.fromarray(bits)
    assert image.mode == "1"
    assert torch.equal(load_one(tmp_path, ".png", image, channels=1)[0], torch.from_numpy(bits * np.uint8(255)))


@pytest.mark.parametrize("size", [1, 5])
def test_one_pixel(tmp_path, size):
    pixels = load_one(tmp_path, ".png", Image.new("RGB", (1, 1), (9, 99, 199)), image_size=size)
    assert torch.equal(pixels, torch.tensor([9, 99, 199], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size))


@pytest.mark.parametrize("wide", [True, False])
def test_the_middle_square_is_kept(tmp_path, wide):
    middle = COLOUR[:6, :6]
    strips = np.full((6, 6, 3), 255, np.uint8), np.zeros((6, 6, 3), np.uint8)
    image = np.concatenate([strips[0], middle, strips[1]], axis=1 if wide else 0)
    assert torch.equal(load_one(tmp_path, ".png", Image.fromarray(image), image_size=6), chw(middle))


def test_the_shorter_side_is_resized(tmp_path):
    # 40 x 20 in four vertical bands of one colour; the middle square holds the two inner ones.
    bands = np.repeat(np.array([[0, 60, 180, 255]], np.uint8), 10, axis=1).repeat(20, axis=0)
    pixels = load_one(tmp_path, ".png", Image.fromarray(bands), channels=1, image_size=10)[0]
    assert (pixels[:, 2] == 60).all() and (pixels[:, -3] == 180).all()  # columns far from any edge of a band


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    corners = np.zeros((16, 16, 3), np.uint8)
    corners[:8, :8], corners[:8, 8:], corners[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    shown = {  # how a viewer turns what is stored
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.transpose(1, 0, 2),
        6: np.rot90(corners, -1),
        7: corners[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(corners),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = load_one(tmp_path, ".jpg", Image.fromarray(corners), image_size=16, exif=exif, quality=100, subsampling=0)
    assert (pixels.int() - chw(shown).int()).abs().max() <= 3


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((0, 255, 0), (0, 0, 255), (255, 0, 0))]
    pixels = load_one(tmp_path, ".gif", frames[0], save_all=True, append_images=frames[1:], duration=50)
    with Image.open(tmp_path / "0.gif") as file:
        assert file.n_frames == 3
    assert torch.equal(pixels, torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))


def test_colour_becomes_grey_with_one_channel(tmp_path):
    pixels = load_one(tmp_path, ".png", Image.fromarray(COLOUR), channels=1)
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert pixels.shape == (1, 8, 8) and (pixels[0].double() - torch.from_numpy(luma)).abs().max() <= 1


# --- image_folder: files that cannot be read ---


def write_greys(folder: Path, count: int, first: int = 0) -> None:
    """Images of one grey level each, `first`, `first` + 1, ..."""
    for level in range(first, first + count):
        write(folder / f"{level:03d}.png", Image.new("L", (4, 4), level))


def levels(part: ImageSet) -> list[int]:
    assert (part.pixels == part.pixels[:, :1, :1, :1]).all()
    return part.pixels[:, 0, 0, 0].tolist()


def truncated(path: Path, image: Image.Image, share: float = 0.5, **settings) -> None:
    write(path, image, **settings)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_broken_files_are_named_counted_and_skipped(tmp_path):
    write_greys(tmp_path, 10)
    noise = Image.fromarray(GENERATOR.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    truncated(tmp_path / "cut.png", noise)
    truncated(tmp_path / "cut.jpg", noise)
    (tmp_path / "garbage.png").write_bytes(b"this is no image\n" * 20)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "notes.txt").write_text("no image and not counted as one")
    with pytest.warns(UserWarning) as caught:
        splits = data.load("image_folder", str(tmp_path), image_size=4)
    (warning,) = caught
    assert str(warning.message) == splits.note
    assert splits.note.startswith("4 of 14 ")
    for name in ("cut.png", "cut.jpg", "garbage.png", "empty.jpg"):
        assert str(tmp_path / name) in splits.note
    assert sorted(level for part in parts(splits) for level in levels(part)) == list(range(10))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_decoder_of_another_format_that_fails(tmp_path):
    write_greys(tmp_path, 3)
    path = tmp_path / "zeros.avif"
    write(path, Image.fromarray(COLOUR))
    head, _, payload = path.read_bytes().partition(b"mdat")
    path.write_bytes(head + b"mdat" + bytes(len(payload)))  # a download that stopped after reserving its space
    with pytest.warns(UserWarning, match=r"1 of 4 .*zeros\.avif"):
        splits = data.load("image_folder", str(tmp_path), image_size=4)
    assert len(all_pixels(splits)) == 3


def test_many_broken_files_are_all_counted(tmp_path):
    write_greys(tmp_path, 3)
    for k in range(20):
        (tmp_path / f"broken{k}.png").touch()
    with pytest.warns(UserWarning, match="20 of 23 "):
        splits = data.load("image_folder", str(tmp_path))
    assert "broken0.png" in splits.note and len(all_pixels(splits)) == 3


def test_nothing_readable(tmp_path):
    for k in range(4):
        (tmp_path / f"broken{k}.png").touch()
    with (
        pytest.warns(UserWarning, match="4 of 4 "),
        pytest.raises(ValueError, match=re.escape(str(tmp_path)) + r" holds 0 readable.*broken0\.png"),
    ):
        data.load("image_folder", str(tmp_path))


def test_the_split_of_what_can_be_read(tmp_path):
    """All paths are put into an order of their own, those that cannot be read fall out, and the rest is cut."""
    write_greys(tmp_path, 30)
    order = sorted(range(30), key=lambda level: hashlib.blake2b(f"{level:03d}.png".encode()).digest())
    for level in (order[0], order[4], order[29]):
        (tmp_path / f"{level:03d}.png").write_bytes(b"no image")
    left = [level for k, level in enumerate(order) if k not in (0, 4, 29)]
    with pytest.warns(UserWarning, match="3 of 30 "):
        splits = data.load("image_folder", str(tmp_path), image_size=4)
    assert [levels(part) for part in (splits.test, splits.valid, splits.train)] == [left[:2], left[2:4], left[4:]]


def test_another_image_leaves_the_others_in_their_parts(tmp_path):
    write_greys(tmp_path, 100)
    before = data.load("image_folder", str(tmp_path), image_size=4)
    write_greys(tmp_path, 9, first=200)
    after = data.load("image_folder", str(tmp_path), image_size=4)
    # Ten images are test images then and now; the new ones that come before them push as many into the next part.
    assert not {*levels(after.test)} & {*levels(before.train)}
    assert len({*levels(after.test)} & {*levels(before.test)}) >= 10 - 9
    assert {*levels(before.train)} - {*levels(after.valid)} <= {*levels(after.train)}


def test_images_that_are_left_out_are_told(tmp_path):
    write_greys(tmp_path, 10)
    (tmp_path / "away.png").symlink_to(tmp_path / "absent.png")
    for k in range(3):
        (tmp_path / f"{k}.HEIC").touch()
    with pytest.warns(UserWarning) as caught:
        note = data.load("image_folder", str(tmp_path), image_size=4).note
    assert "3 are images that are not read, such as 0.HEIC" in note
    assert "1 of 11 image files could not be read" in note and "away.png" in note and len(caught) == 2
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"0 readable image files, .* one is 0\.HEIC"):
        for path in tmp_path.glob("*.png"):
            path.unlink()
        data.load("image_folder", str(tmp_path), image_size=4)


def test_a_folder_of_folders_of_classes_is_doubted(tmp_path):
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        write_greys(tmp_path / "unpacked" / folder, 5)
    with pytest.warns(UserWarning, match=r"lie in folders in unpacked, .* one class.* data\.root=.*unpacked"):
        assert data.load("image_folder", str(tmp_path), image_size=4).label_names == ("unpacked",)
    (tmp_path / "plain" / "one").mkdir(parents=True)
    write_greys(tmp_path / "plain" / "one", 5)
    assert data.load("image_folder", str(tmp_path / "plain"), image_size=4).note == ""


# --- image_folder: classes and splits ---


def test_subfolders_are_classes(tmp_path):
    for first, folder in ((0, "dog"), (50, "cat/indoors"), (100, "cat/outdoors"), (150, "ant")):
        write_greys(tmp_path / folder, 10, first)
    splits = data.load("image_folder", str(tmp_path), image_size=4, channels=1)
    seen = {
        level: label for part in parts(splits) for level, label in zip(levels(part), part.labels.tolist(), strict=True)
    }
    classes = {0: 2, 50: 1, 100: 1, 150: 0}  # ant, cat, dog by name
    assert seen == {first + k: label for first, label in classes.items() for k in range(10)}
    assert splits.label_names == ("ant", "cat", "dog")
    assert all(part.labels.dtype == torch.int64 for part in parts(splits))


def test_no_classes_if_an_image_lies_at_the_top(tmp_path):
    write_greys(tmp_path / "cat", 5)
    write_greys(tmp_path, 1, first=9)
    with pytest.warns(
        UserWarning, match=r"1 images of .* in no folder of a class, such as 009.png: there are no classes"
    ):
        splits = data.load("image_folder", str(tmp_path), image_size=4)
    assert (
        "no folder of a class" in splits.note
        and all(part.labels is None for part in parts(splits))
        and splits.label_names == ()
    )
    assert len(all_pixels(splits)) == 6


@pytest.mark.parametrize("valid", ["val", "valid", None])
def test_subfolders_that_are_a_split_are_that_split(tmp_path, valid):
    folders = {"train/dog": (20, 0), "train/cat": (10, 50), "test/dog": (4, 100), "test/cat": (3, 150)}
    folders |= {f"{valid}/dog": (2, 200), f"{valid}/cat": (1, 250)} if valid else {}
    for folder, (count, first) in folders.items():
        write_greys(tmp_path / folder, count, first)
    splits = data.load("image_folder", str(tmp_path), image_size=4, channels=1)
    train = {*range(20), *range(50, 60)}
    assert set(levels(splits.test)) == {*range(100, 104), *range(150, 153)}
    if valid:
        assert set(levels(splits.valid)) == {200, 201, 250} and set(levels(splits.train)) == train
    else:
        assert len(splits.valid) == 3 and {*levels(splits.valid), *levels(splits.train)} == train
    for part in parts(splits):
        dogs = [level % 100 < 50 for level in levels(part)]
        assert part.labels.tolist() == [int(dog) for dog in dogs]
    assert splits.label_names == ("cat", "dog")


def test_a_split_is_not_given_up_for_what_lies_beside_it(tmp_path):
    for folder, first in (
        ("Train/dog", 0),
        ("Train/cat", 50),
        ("TEST/dog", 100),
        (".thumbs", 200),
        ("Train/.old", 210),
    ):
        write_greys(tmp_path / folder, 10, first)
    write_greys(tmp_path, 1, first=250)
    with pytest.warns(UserWarning, match=r"1 images of .* in none of its parts and not taken, such as 250.png"):
        splits = data.load("image_folder", str(tmp_path), image_size=4)
    assert set(levels(splits.test)) == {*range(100, 110)} and splits.label_names == ("cat", "dog")
    assert {*levels(splits.train), *levels(splits.valid)} == {*range(10), *range(50, 60)}
    assert "250.png" in splits.note


def test_a_split_of_which_a_part_cannot_be_read_is_refused(tmp_path):
    write_greys(tmp_path / "train", 30)
    (tmp_path / "test").mkdir()
    (tmp_path / "test/0.png").write_bytes(b"no image")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"'test': 0.*at least one of each is needed"):
        data.load("image_folder", str(tmp_path), image_size=4)


def test_test_images_are_cut_from_those_to_train_with_if_there_are_validation_images_alone(tmp_path):
    for folder, count, first in (("train/dog", 20, 0), ("train/cat", 10, 50), ("val/dog", 3, 100), ("val/cat", 2, 150)):
        write_greys(tmp_path / folder, count, first)
    splits = data.load("image_folder", str(tmp_path), image_size=4, channels=1)
    assert set(levels(splits.valid)) == {100, 101, 102, 150, 151} and splits.label_names == ("cat", "dog")
    assert len(splits.test) == 3 and {*levels(splits.test), *levels(splits.train)} == {*range(20), *range(50, 60)}
    for part in parts(splits):
        assert part.labels.tolist() == [int(level % 100 < 50) for level in levels(part)]


def test_what_is_called_like_a_part_and_is_none_is_warned_of(tmp_path):
    write_greys(tmp_path / "one/Training", 10)
    with pytest.warns(
        UserWarning, match=r"Training in .*one is a class and not a part of a split, as that takes train"
    ):
        assert data.load("image_folder", str(tmp_path / "one"), image_size=4).label_names == ("Training",)
    write_greys(tmp_path / "two/test", 10)
    write_greys(tmp_path / "two/val", 10)
    with pytest.warns(UserWarning, match=r"val and test in .*two are taken as classes and not as a split"):
        assert data.load("image_folder", str(tmp_path / "two"), image_size=4).label_names == ("test", "val")


def test_classes_that_have_no_training_image_are_warned_of(tmp_path):
    for folder in ("train/cat", "train/dog", "test/Cat", "test/dog"):
        write_greys(tmp_path / folder, 10)
    with pytest.warns(UserWarning, match="10 of 20 test images are of classes without a training image, such as Cat:"):
        data.load("image_folder", str(tmp_path), image_size=4)


def test_other_subfolders_beside_those_of_a_split_are_classes(tmp_path):
    for folder in ("train", "test", "bus"):
        write_greys(tmp_path / folder, 10)
    with pytest.warns(UserWarning, match=r"train and test in .* are taken as classes .* there is bus beside them"):
        splits = data.load("image_folder", str(tmp_path), image_size=4)
    assert [len(part) for part in parts(splits)] == [24, 3, 3] and set(splits.train.labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("count", "sizes"), [(3, (1, 1, 1)), (7, (5, 1, 1)), (30, (24, 3, 3)), (39, (33, 3, 3))])
def test_folder_is_split_80_10_10(tmp_path, count, sizes):
    write_greys(tmp_path, count)
    splits = data.load("image_folder", str(tmp_path), image_size=4)
    assert tuple(len(part) for part in parts(splits)) == sizes
    assert sorted(level for part in parts(splits) for level in levels(part)) == list(range(count))


def test_folder_split_depends_on_relative_paths_alone(tmp_path):
    one, other = tmp_path / "one", tmp_path / "another place" / "two"
    write_greys(one / "b", 15)
    write_greys(one / "a", 15, first=100)
    shutil.copytree(one / "a", other / "a")  # written in another order
    shutil.copytree(one / "b", other / "b")
    expected = data.load("image_folder", str(one), image_size=4)
    torch.manual_seed(123)
    for again in (data.load("image_folder", str(one), image_size=4), data.load("image_folder", str(other), None, 1)):
        assert [levels(part) for part in parts(again)] == [levels(part) for part in parts(expected)]
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(parts(again), parts(expected), strict=True))


def test_a_cached_folder_is_the_same_and_its_parts_are_views(tmp_path):
    for first, folder in ((0, "dog"), (50, "cat/indoors")):
        write_greys(tmp_path / "images" / folder, 20, first)
    (tmp_path / "images" / "dog" / "bad.png").write_bytes(b"no image")
    settings = dict(name="image_folder", root=str(tmp_path / "images"), image_size=4)
    with pytest.warns(UserWarning, match="1 of 41"):
        expected = data.load(**settings)
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 41"):
            splits = data.load(**settings, cache=str(tmp_path / "cache"))
        assert splits.note.startswith(expected.note)
        for part, other in zip(parts(splits), parts(expected), strict=True):
            assert torch.equal(part.pixels, other.pixels) and torch.equal(part.labels, other.labels)
    in_order = (splits.test.pixels, splits.valid.pixels, splits.train.pixels)
    assert [x.data_ptr() + x.numel() for x in in_order[:2]] == [x.data_ptr() for x in in_order[1:]]


def test_the_crop_of_a_folder(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.png", Image.fromarray(COLOUR))
    assert torch.equal(
        data.load("image_folder", str(tmp_path), image_size=4, crop=4).train.pixels[0], chw(COLOUR[2:6, 2:6])
    )


def test_an_image_set_is_of_bytes_and_all_of_it_of_the_same_images():
    pixels = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for parts, message in (
        ((pixels.float(),), r"expected pixels of shape \(N, C, H, W\) as uint8, 0 to 255, got torch.float32"),
        ((pixels[0],), r"got torch.uint8 \(1, 4, 4\)"),
        ((pixels.numpy(),), "got ndarray"),
        ((pixels, torch.zeros(2)), r"expected labels of the 3 images, got torch.float32 \(2,\)"),
        ((pixels, [0, 1, 2]), "expected labels of the 3 images, got list"),
        ((pixels, None, torch.ones(1, 2, 2).bool()), "expected recorded of the 3 images"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageSet(*parts)


def test_images_are_selected_by_position_and_by_mask():
    images = ImageSet(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 8, 8), torch.arange(10))
    even = torch.arange(10) % 2 == 0
    for index, expected in (
        (even, [0, 2, 4, 6, 8]),
        ([3, 3, 0], [3, 3, 0]),
        ([-1, 9], [9, 9]),
        ([], []),
        (np.array([2, 1]), [2, 1]),
        (torch.tensor([4], dtype=torch.uint8), [4]),
        (slice(8, None), [8, 9]),
    ):
        selected = images.select(index)
        assert selected.labels.tolist() == expected == selected.pixels[:, 0, 0, 0].tolist()
    for index in (even[:4], torch.cat([even, even]), [10], [0, 10], [-11], [-11, 9], [1.0], [[1]], 3):
        with pytest.raises(ValueError, match=r"expected positions among 10 images, \(B,\), or a boolean mask \(10,\)"):
            images.select(index)


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    write_greys(tmp_path, 5)
    monkeypatch.setenv("BIGLEARN_DATA", str(tmp_path))
    assert len(all_pixels(data.load("image_folder"))) == 5
    monkeypatch.delenv("BIGLEARN_DATA")
    monkeypatch.chdir(tmp_path)
    write_greys(tmp_path / "data", 4)
    assert len(all_pixels(data.load("image_folder"))) == 4


# --- errors ---


def test_errors_name_what_was_expected_and_what_came(tmp_path):
    for settings, message in (
        (
            dict(name="cifar"),
            "must be digits, mnist, fashion_mnist, celeba, image_folder, array_file or torch_dataset, got 'cifar'",
        ),
        (dict(name="digits", channels=2), "1 or 3, got 2"),
        (dict(name="digits", image_size=0), "at least 1, got 0"),
        (dict(name="digits", image_size="8"), "image_size must be a whole number, got '8'"),
        (dict(name="image_folder", root=str(tmp_path), channels=2), "1 or 3, got 2"),
        (dict(name="image_folder", root=str(tmp_path), image_size=0), "at least 1, got 0"),
        (
            dict(name="image_folder", root=str(tmp_path), cache=""),
            "data.cache is empty: give a folder, or data.cache=null",
        ),
        (dict(name="image_folder", root=str(tmp_path / "absent")), re.escape(str(tmp_path / "absent"))),
        (dict(name="image_folder", root=str(tmp_path)), re.escape(str(tmp_path)) + " holds 0 readable"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(**settings)


@pytest.fixture
def no_network(monkeypatch):
    for source in (torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST):
        monkeypatch.setattr(source, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "*")


IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
@pytest.mark.parametrize("root", [".", "absent", "absent/deeper"])
def test_mnist_that_is_not_there(tmp_path, no_network, name, folder, root):
    with pytest.raises(ValueError) as caught:
        data.load(name, str(tmp_path / root))
    assert str(tmp_path / root / folder) in str(caught.value)
    assert all(file in str(caught.value) for file in IDX_FILES)
    assert list(tmp_path.rglob("*")) == []


def test_mnist_failing_leaves_what_was_there(tmp_path, no_network):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / IDX_FILES[0]).write_bytes(b"something")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        data.load("mnist", str(tmp_path))
    assert [(p.name, p.read_bytes()) for p in raw.iterdir()] == [(IDX_FILES[0], b"something")]


@pytest.mark.parametrize("content", [b"", b"no idx file, whatever its name", b"\0\0\x08\x03" + b"\0\0\0\x20" * 3])
def test_mnist_with_damaged_files(tmp_path, no_network, content):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in IDX_FILES:
        (raw / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(raw))):
        data.load("mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((6000, 6000, 20, 30), "raw holds 20 test images and 30 labels of them: expected as many of both"),
        ((6000, 5999, 20, 20), "raw holds 6,000 training images and 5,999 labels"),
        ((5000, 5000, 20, 20), "raw holds 5,000 training images and 5,000 labels of them: .* more than 5,000"),
    ],
)
def test_mnist_whose_files_do_not_fit(tmp_path, no_network, counts, message):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file, count in zip(IDX_FILES, counts, strict=True):
        shape = (count, 28, 28) if "images" in file else (count,)
        head = b"\0\0\x08" + bytes([len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        (raw / file).write_bytes(head + bytes(math.prod(shape)))
    with pytest.raises(ValueError, match=message):
        data.load("mnist", str(tmp_path))


# --- real data ---


@pytest.fixture(params=["mnist", "fashion_mnist"])
def real_data(request) -> tuple[str, Path]:
    """A data set's name and the folder of its official files."""
    folder = Path(
        os.environ.get("BIGLEARN_DATA", "absent"), {"mnist": "MNIST"}.get(request.param, "FashionMNIST"), "raw"
    )
    if not all((folder / file).exists() for file in IDX_FILES):
        pytest.skip("the environment variable BIGLEARN_DATA names no folder with these files")
    return request.param, folder


def test_real_mnist(real_data):
    splits = data.load(real_data[0])
    assert [len(part) for part in parts(splits)] == [55_000, 5_000, 10_000]
    for part in parts(splits):
        assert part.pixels.shape[1:] == (3, 32, 32) and part.pixels.dtype == torch.uint8
        assert part.pixels.stride(1) == 0  # three equal channels in the memory of one
        assert part.labels.shape == (len(part),) and set(part.labels.tolist()) == set(range(10))
    assert len({part.fingerprint() for part in parts(splits)}) == 3
    assert len(splits.label_names) == (10 if real_data[0] == "fashion_mnist" else 0)


def test_real_mnist_splits_are_the_official_images(real_data):
    name, folder = real_data

    def official(part: str) -> Counter:
        images = np.fromfile(folder / f"{part}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 784)
        labels = np.fromfile(folder / f"{part}-labels-idx1-ubyte", np.uint8)[8:]
        return Counter(zip(map(bytes, images), labels.tolist(), strict=True))

    def ours(*sets: ImageSet) -> Counter:
        pairs = [zip(map(bytes, s.pixels.flatten(1).numpy()), s.labels.tolist(), strict=True) for s in sets]
        return Counter(pair for several in pairs for pair in several)

    splits = data.load(name, image_size=28, channels=1)
    assert ours(splits.train, splits.valid) == official("train")
    assert ours(splits.test) == official("t10k")


def test_positions_may_be_a_list_or_a_mask_and_labels_are_whole_numbers():
    images = ImageSet(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), labels=torch.arange(5))
    for index in ([3, 0], torch.tensor([3, 0]), torch.arange(5) % 3 == 0):
        assert sorted(images.select(index).labels.tolist()) == [0, 3]
    with pytest.raises(ValueError, match=r"expected labels as whole numbers.*torch\.float32"):
        ImageSet(images.pixels, labels=torch.rand(5))
    with pytest.raises(ValueError, match="expected an ImageSet to make batches of, got"):
        Batches(images[:], 2)


# --- sizes that are no squares ---


@pytest.mark.parametrize(("height", "width"), [(8, 16), (12, 4), (6, 6), (4, 8), (8, 6)])
def test_the_middle_of_the_proportions_asked_for(tmp_path, height, width):
    for k in range(3):
        write(tmp_path / f"{k}.png", Image.fromarray(COLOUR))
    rows, columns = COLOUR.shape[:2]
    factor = min(rows / height, columns / width)
    cut = round(factor * height), round(factor * width)
    top, left = ((side - part) // 2 for side, part in zip((rows, columns), cut, strict=True))
    middle = chw(COLOUR[top : top + cut[0], left : left + cut[1]])
    folder = data.load("image_folder", str(tmp_path), image_size=[height, width]).train.pixels
    arrays = data._sized(chw(COLOUR).unsqueeze(0), (height, width), 3)
    assert folder.shape[1:] == arrays.shape[1:] == (3, height, width)
    if cut == (height, width):
        assert torch.equal(folder[0], middle) and torch.equal(arrays[0], middle)
    whole = data._sized(chw(COLOUR).unsqueeze(0), cut, 3)
    assert torch.equal(whole[0], middle)


def test_a_cache_of_images_that_are_no_squares(tmp_path):
    for k in range(5):
        write(tmp_path / "images" / f"{k}.png", Image.fromarray(COLOUR))
    settings = dict(name="image_folder", root=str(tmp_path / "images"), image_size=(4, 6))
    expected = data.load(**settings).train.pixels
    for _ in range(2):
        assert torch.equal(data.load(**settings, cache=str(tmp_path / "cache")).train.pixels, expected)
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("image_folder-4x6-")


@pytest.mark.parametrize(("size", "message"), [([8], "one whole number or two"), ([8, 0], "must be at least 1, got 0")])
def test_sizes_that_are_none(size, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", image_size=size)
