"""Images as uint8 tensors with fixed splits, and batches of them that are a function of (seed, rank, step).

N images, C channels, H x W pixels, B batch.
"""

import functools
import hashlib
import importlib.util
import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from biglearn_vae import array_files, checks, image_files, masks, torch_datasets
from biglearn_vae.distributed import World, derive_seed

DIGITS = "datasets/data/digits.csv.gz"  # in scikit-learn
PARTS = ("train", "valid", "test")
CELEBA_LAST = {"train": 162_770, "valid": 182_637, "test": 202_599}  # the last image of each part, counted from 1
SPLIT_SEED = 0  # one split for everyone, whatever the run's seed, so that no test image is ever trained on


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one split.

    Attributes:
        pixels: uint8 (N, C, H, W), possibly a file that is mapped into memory.
        labels: int64, or None: the class of each image, (N,), or attributes of each, (N, A), that are 1, 0, or -1 where
            unknown.
        recorded: boolean (N, rows, columns), which cells of a grid on each image were ever recorded, or None for all.

    Raises:
        ValueError: for pixels of another type or number of axes or with channels last, labels that are not whole
            numbers, cells that do not divide the images, and labels or `recorded` that are not N.
    """

    pixels: Tensor
    labels: Tensor | None = None
    recorded: Tensor | None = None

    @classmethod
    def of(cls, dataset: Any, image_size: "Size | None" = None, channels: int | None = None) -> "ImageSet":
        """The images of a torch Dataset, read into memory once; for what its items may be, see `torch_datasets.read`.

        Args:
            image_size, channels: see `load`; without them all images must have one shape.

        Raises:
            ValueError: if they have not, or it is no such data set.
        """
        fit = functools.partial(_fitted, image_size=_checked_size(image_size), channels=_checked_channels(channels))
        if isinstance(dataset, Mapping):
            raise ValueError(
                f"expected one data set, got a mapping of {', '.join(map(str, dataset))}: give one of these"
            )
        with torch_datasets.repeatable(SPLIT_SEED):
            found = torch_datasets.read({"images": dataset}, type(dataset).__name__, fit)
        if found.note:
            checks.warn(found.note)
        return _image_set(found.parts["images"])

    def __post_init__(self):
        if not isinstance(self.pixels, Tensor) or self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise ValueError(
                f"expected pixels of shape (N, C, H, W) as uint8, 0 to 255, got {checks.described(self.pixels)}"
            )
        for name, part in (("labels", self.labels), ("recorded", self.recorded)):
            if part is not None and (not isinstance(part, Tensor) or part.shape[:1] != self.pixels.shape[:1]):
                raise ValueError(f"expected {name} of the {len(self.pixels)} images, got {checks.described(part)}")
        if min(self.pixels.shape[1:3]) > 4 >= self.pixels.shape[3]:
            raise ValueError(
                f"expected pixels of shape (N, C, H, W), got {checks.described(self.pixels)}, whose channels seem to "
                "come last: pixels.permute(0, 3, 1, 2)"
            )
        if self.recorded is not None:
            self._check_recorded(self.recorded)
        if self.labels is not None and (self.labels.is_floating_point() or self.labels.ndim not in (1, 2)):
            raise ValueError(
                "expected labels as whole numbers, classes (N,) or attributes (N, A), got "
                f"{checks.described(self.labels)}: labels.long() makes whole numbers"
            )

    def _check_recorded(self, recorded: Tensor) -> None:
        rows, columns = self.pixels.shape[2:]
        cells: tuple[int, ...] = recorded.shape[1:] if recorded.dtype == torch.bool else ()
        if len(cells) != 2 or 0 in cells or rows % cells[0] or columns % cells[1]:
            raise ValueError(
                f"expected recorded as booleans (N, rows, columns), of cells that divide images of {rows} x {columns} "
                f"pixels, got {checks.described(recorded)}"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index) -> Tensor:
        """These images as float32 in [0, 1], (B, C, H, W) for a slice or a tensor of positions.

        What was never recorded is NaN.
        """
        images = self.pixels[index].float().div_(255)
        if self.recorded is None:
            return images
        cells = self.recorded[index]  # (B, rows, columns)
        rows, columns = cells.shape[-2:]
        hidden = ~masks.to_pixels(cells.flatten(-2), (rows, columns), images.shape[-2:])
        return images.masked_fill(hidden.unsqueeze(-3), torch.nan)

    @property
    def device(self) -> torch.device:
        """Where the pixels are."""
        return self.pixels.device

    def select(self, index: Tensor | slice | Sequence[int]) -> "ImageSet":
        """The set of these images alone: a view for a slice, a copy for positions (B,) or a mask (N,).

        Positions may repeat. Pixels stay bytes, so `images.select(index).to(device)[:]` makes floats on the device.
        """
        if not isinstance(index, slice):
            index = self._positions(index)
        labels, recorded = (None if part is None else _rows(part, index) for part in (self.labels, self.recorded))
        return ImageSet(_rows(self.pixels, index), labels, recorded)

    def _positions(self, given: Tensor | Sequence[int]) -> Tensor:
        """Positions counted from 0, given as these, as negative ones or as a mask."""
        try:
            index = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):  # torch cannot make a tensor of it
            index = torch.tensor(torch.nan)
        if index.dtype == torch.bool and tuple(index.shape) == (len(self),):
            return index.nonzero().flatten()
        if index.ndim == 1 and not len(index):
            return index.long()
        whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        known = index.device.type == "cpu"  # a GPU would be waited for, at each step of a training
        index = index.long() if whole else index
        if not whole or index.ndim != 1 or (known and not -len(self) <= index.min() <= index.max() < len(self)):
            raise ValueError(
                f"expected positions among {len(self)} images, (B,), or a boolean mask ({len(self)},) of them, got "
                f"{checks.described(given) if isinstance(given, Tensor) else f'{given!r:.80}'}"
            )
        return index % len(self) if known else index

    def resident(self, device: torch.device) -> "ImageSet":
        """The same set on the device, or where it is if it would take more than half of a GPU's free memory."""
        size = self.pixels.numel() + (0 if self.recorded is None else self.recorded.numel())
        if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return self.to(device)

    def to(self, device: torch.device) -> "ImageSet":
        """The same set, resident on the device."""
        recorded = None if self.recorded is None else self.recorded.to(device)
        return ImageSet(self.pixels.to(device), self.labels, recorded)

    def fingerprint(self) -> str:
        """A short digest of the size and of at most 1,000 evenly spaced images, to tell one data set from another."""
        parts = [self.pixels]
        if self.recorded is not None and self.recorded.shape[-2:] == self.pixels.shape[-2:]:
            parts.append(self.recorded)  # one of patches is from `with_missing`, whose settings identify it
        some = [part[:: -(-len(self) // 1000)].contiguous().cpu().numpy().tobytes() for part in parts]
        return hashlib.blake2b(repr(tuple(self.pixels.shape)).encode() + b"".join(some), digest_size=8).hexdigest()

    def recorded_patches(self, grid: tuple[int, int]) -> Tensor:
        """Which patches of a grid were recorded as a whole, boolean (N, L)."""
        if self.recorded is None:
            return torch.ones(len(self), grid[0] * grid[1], dtype=torch.bool)
        if self.recorded.shape[-2:] == tuple(grid):
            return self.recorded.flatten(-2)
        return masks.from_pixels(self.recorded, grid)


Size = int | Sequence[int]  # side in pixels, or height and width
Images: TypeAlias = Tensor | ImageSet  # floats (N, C, H, W) in [0, 1], or a set, made such a part at a time
CHUNK = 1024  # images at a time, at most
NUMBERS = 2**26  # floats at a time, about, whatever the size of an image


def rows_of(numbers: int, chunks: int = 1) -> int:
    """How many rows of this many numbers each are taken at a time, at most this many chunks."""
    return max(1, min(chunks * CHUNK, NUMBERS // numbers))


def check_images(images: Any, what: str = "image", tokens: bool = True) -> None:
    """Raise a ValueError unless these are images or, if they will do, their tokens, at least one; something that is
    read in parts as an `ImageSet` is will do."""
    if isinstance(images, Tensor):
        fits = checks.is_numbers(images) and images.ndim in ((3, 4) if tokens else (4,))
    else:
        read = hasattr(images, "__len__") and hasattr(images, "__getitem__")
        fits = read and not (isinstance(images, Sequence | Mapping) or hasattr(images, "__array__"))
    if not fits:
        raise ValueError(
            "expected images, a tensor (N, C, H, W) of numbers in [0, 1] or of bytes, or an ImageSet"
            f"{', or tokens (N, L, D)' if tokens else ''}, got {checks.described(images)}"
        )
    if not len(images):
        raise ValueError(f"expected at least one {what}, got none")


def take(images: Images, index: slice | Tensor, device: torch.device) -> Tensor:
    """Some images as floats in [0, 1] on a device; bytes are moved there as bytes, a quarter of the size of floats.

    Tokens (N, L, D), of any values, are taken as they are. Images that seem to be in [-1, 1] cause a warning.

    Raises:
        ValueError: for images in 0..255 that are not bytes.
    """
    if isinstance(images, ImageSet):  # without its labels: they are on the CPU, and a step would wait for the index
        return replace(images, labels=None).select(index).to(device)[:]
    part = checks.in_floats(images[index].to(device))
    if part.ndim == 4:
        checks.check_pixels(part)
    return part


def parts(images: Images, device: torch.device, rows: int | None = None) -> Iterator[Tensor]:
    """Images as floats on a device, `rows` at a time (n, C, H, W), by default as many as `rows_of` says.

    On a terminal, a bar shows the progress if it takes more than a few seconds.

    Raises:
        ValueError: if there are none, or these are no images.
    """
    check_images(images)
    from tqdm import tqdm

    rows = rows or rows_of(images[:1].numel())
    starts = range(0, len(images), rows)
    for start in tqdm(starts, desc=f"{len(images):,} images", unit="part", delay=5, leave=False, disable=None):
        yield take(images, slice(start, start + rows), device)


def _rows(values: Tensor, index: Tensor | slice) -> Tensor:
    if isinstance(index, slice):
        return values[index]
    return values.index_select(0, index.to(values.device))  # four times as fast as values[index]


@dataclass(frozen=True, eq=False)
class Splits:
    """The three parts of a data set.

    Attributes:
        train, valid, test: `valid` is carved out of the training data where a data set has no such part.
        note: what was left out or is doubtful, in words; empty if nothing is.
        label_names: names of the classes, in the order of their numbers, or of the attributes, if labels are (N, A);
            empty if the data has no names for them.
    """

    train: ImageSet
    valid: ImageSet
    test: ImageSet
    note: str = ""
    label_names: tuple[str, ...] = ()


class Batches:
    """batches(step): the images of a step, in endless passes over the set.

    Each epoch is a new permutation that depends on the seed alone; a process takes its share of each batch. So a
    batch is a function of (seed, rank, step), and the batches of all ranks together are that of a single process.

    Args:
        images: the set; keep it on the training device if it fits there (`ImageSet.resident`).
        batch_size: images a step, of all processes together.
        seed: of the order.
        world: this process among the others, and the device on which the batches are made; by default that of the set.
        transform: applied to the float images (B, C, H, W), such as a tokenizer's `encode`, without gradients.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int = 0,
        world: World | None = None,
        transform: Callable | None = None,
    ):
        if not isinstance(images, ImageSet):
            raise ValueError(f"expected an ImageSet to make batches of, got {checks.described(images)}")
        world = world or World(device=images.device)
        if not len(images):
            raise ValueError("expected at least one image to make batches of, got none")
        self.images, self.batch_size, self.world = images, checks.whole_number("batch_size", batch_size, 1), world
        self.seed = checks.whole_number("seed", seed)
        self.transform = transform or (lambda x: x)
        self._share = world.share(self.batch_size)
        self._orders: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        return self.transform(take(self.images, self.positions(step), self.world.device))

    def positions(self, step: int) -> Tensor:
        """Which images this step takes: (B / world size,), on the set's device."""
        start = step * self.batch_size + self.world.rank * self._share
        parts, end = [], start + self._share
        while start < end:
            epoch, offset = divmod(start, len(self.images))
            parts.append(self._order(epoch)[offset : offset + end - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            # Shuffled on the CPU, so that the order is the same on every device; only two epochs are ever needed.
            order = shuffled(len(self.images), derive_seed("order", self.seed, epoch))
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1} | {
                epoch: order.to(self.images.device, non_blocking=True)
            }
        return self._orders[epoch]


def load(
    name: str,
    root: str | None = None,
    image_size: Size | None = None,
    channels: int | None = None,
    **options: Any,
) -> Splits:
    """A data set by name.

    Args:
        name: one of `SOURCES`: digits, mnist, fashion_mnist, celeba, image_folder, array_file, torch_dataset.
        root: where its files are or are downloaded to; by default the environment variable BIGLEARN_DATA, else data/.
            For image_folder and array_file, the folder or the file itself.
        image_size: side in pixels that images are resized to, or height and width; each source has its default.
            Images are first cropped at their centre to these proportions.
        channels: 1 (grey) or 3; each source has its default.
        options: for celeba and image_folder, `crop` is the side in pixels of a centred square that is cut out before
            all else, None for no such square (nor is one cut out of an image smaller than the crop); each source has
            its default. `cache` is a folder that keeps the decoded images, to be mapped into memory at the next start
            (`image_files.read`); None, the default, decodes them into memory at each start. For torch_dataset, `target`
            is a class or function that makes the data set, and other options are its arguments.

    Raises:
        ValueError: on an unknown name, wrong sizes, options that a data set does not take, or data that is not there
            and cannot be downloaded.
    """
    checks.check_choice("the data set", name, list(SOURCES))
    sizes = dict(image_size=_checked_size(image_size), channels=_checked_channels(channels))
    _check_options(name, options)
    sizes = {k: v for k, v in sizes.items() if v is not None}
    place = checks.path("root", root or os.environ.get("BIGLEARN_DATA") or "data")
    splits = SOURCES[name](place, **sizes, **options)
    _check_classes(splits)
    return splits


def _checked_channels(channels: int | None) -> int | None:
    if not (channels is None or (isinstance(channels, Integral) and channels in (1, 3))):
        raise ValueError(f"channels must be 1 or 3, got {channels!r}")
    return channels


def _checked_size(image_size: Size | None) -> Size | None:
    """One number for a square, else two."""
    if image_size is None:
        return None
    height, width = checks.height_and_width("image_size", image_size)
    checks.whole_number("image_size", min(height, width), 1)
    return height if height == width else (height, width)


def _check_classes(splits: Splits) -> None:
    """Warn of classes of test images that have no training image to be learned from."""
    train, test = (part.labels for part in (splits.train, splits.test))
    if train is None or test is None or train.ndim > 1:
        return
    unseen = ~torch.isin(test, train)
    if unseen.any():
        numbers = test[unseen].unique().tolist()
        named = ", ".join(splits.label_names[n] if splits.label_names else str(n) for n in numbers[:5])
        checks.warn(
            f"{int(unseen.sum()):,} of {len(test):,} test images are of classes without a training image, such as "
            f"{named}: are classes called alike in both parts?"
        )


def _check_options(name: str, options: dict[str, Any]) -> None:
    if name == "torch_dataset":  # of which only its target knows what it takes
        return
    taken = inspect.signature(SOURCES[name]).parameters.keys() & {"crop", "cache"}
    for option in options.keys() - taken:
        raise ValueError(f"data set {name} takes no {option}: leave data.{option} out")
    if options.get("cache") == "":
        raise ValueError("data.cache is empty: give a folder, or data.cache=null to keep nothing")
    if options.get("crop") is not None:
        checks.whole_number("crop", options["crop"], 1)


def with_missing(splits: Splits, share: float, grid: tuple[int, int], unit: str = "patch") -> Splits:
    """The same data as if a share had never been recorded, completely at random; test images stay as they are.

    Args:
        share: what is lost, in [0, 1).
        grid: rows and columns of patches.
        unit: "patch" loses each patch of the training and validation images with that probability, independently of the
            others; "image" loses that share of the images, each as a whole.

    Raises:
        ValueError: if nothing would be left, or on values outside these.
    """
    checks.real_number("missing", share, "[0, 1)")
    checks.check_choice("missing_unit", unit, ("patch", "image"))
    if share == 0:
        return splits
    parts: dict[str, Any] = {
        name: _lose(getattr(splits, name), share, grid, unit, derive_seed("missing", SPLIT_SEED, name))
        for name in ("train", "valid")
    }
    return replace(splits, **parts)


def binarized(splits: Splits, how: str) -> Splits:
    """The same data in black and white.

    Args:
        how: "threshold" makes a pixel white where its brightness, the mean of its channels, is 1/2 or more; "sample"
            with its brightness as probability, drawn once, the same at each call.

    Raises:
        ValueError: for another word.
    """
    checks.check_choice("binarize", how, ("threshold", "sample"))
    parts: dict[str, Any] = {part: _binarized(getattr(splits, part), how) for part in PARTS}
    return replace(splits, **parts)


def _binarized(images: ImageSet, how: str) -> ImageSet:
    generator = torch.Generator().manual_seed(derive_seed("binarize", SPLIT_SEED, len(images)))
    white = []
    for pixels in images.pixels.split(CHUNK):
        brightness = pixels.float().mean(1, keepdim=True) / 255
        if how == "sample":
            is_white = brightness > masks.uniform_numbers(brightness.shape, generator).to(brightness.device)
        else:
            is_white = brightness >= 0.5
        white.append(255 * is_white.expand_as(pixels).to(torch.uint8))
    return replace(images, pixels=torch.cat(white))


def check_recorded(splits: Splits, grid: tuple[int, int]) -> None:
    """Raise a ValueError if a part has no patch recorded as a whole; warn if NaN costs most of what was recorded."""
    for part in PARTS:
        images: ImageSet = getattr(splits, part)
        if images.recorded is None:
            continue
        patches, cells = images.recorded_patches(grid).float().mean().item(), images.recorded.float().mean().item()
        words = f"of the {grid[0]} x {grid[1]} patches of the {part} images"
        if not patches:
            raise ValueError(
                f"none {words} was recorded as a whole: take a smaller data.patch_size, or fill single pixels in"
            )
        if patches < cells / 2:
            checks.warn(
                f"{patches:.1%} {words} were recorded as a whole, though {cells:.1%} of the pixels were: a smaller "
                "data.patch_size takes more of them"
            )


def _lose(images: ImageSet, share: float, grid: tuple[int, int], unit: str, seed: int) -> ImageSet:
    if unit == "patch":
        generator = torch.Generator().manual_seed(seed)
        recorded = masks.uniform_numbers((len(images), *grid), generator) >= share
        if images.recorded is not None:  # and what was missing before
            size = images.recorded.shape[-2:]
            recorded = images.recorded & masks.to_pixels(recorded.flatten(-2), grid, size)
        kept = replace(images, recorded=recorded)
        anything = bool(kept.recorded_patches(grid).any())
    else:
        left = round((1 - share) * len(images))
        kept, anything = images.select(shuffled(len(images), seed)[:left].sort().values), left > 0
    if not anything:
        raise ValueError(f"missing={share} leaves nothing of {len(images)} images")
    return kept


def images(
    name: str,
    split: str,
    root: str | None = None,
    image_size: Size | None = None,
    channels: int | None = None,
    **options: Any,
) -> Tensor:
    """All images of a split ("train", "valid" or "test") as float32 in [0, 1], (N, C, H, W); see `load`.

    The test images of CelebA are 4 GB as floats: from a large set, take some by `load(...).test[:8]`.
    """
    checks.check_choice("split", split, PARTS)
    return getattr(load(name, root, image_size, channels, **options), split)[:]


def digits(root: Path | None = None, image_size: Size = 8, channels: int = 1) -> Splits:
    """The 1,797 handwritten 8 x 8 digits that come with scikit-learn: 1,200 to train, 300 to validate, 297 to test."""
    table = _digits_table()
    pixels = torch.from_numpy(table[:, :-1] / 16 * 255).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, -1]).long()
    order = shuffled(len(pixels), derive_seed("split", SPLIT_SEED))
    train, valid, test = (
        ImageSet(_sized(pixels[i], image_size, channels), labels[i]) for i in order.split([1200, 300, 297])
    )
    return Splits(train, valid, test)


def _digits_table() -> np.ndarray:
    """Scikit-learn's file of digits, a row for each: 64 pixels from 0 to 16, and the label. The file itself is read,
    since importing scikit-learn takes 2 s."""
    found = importlib.util.find_spec("sklearn")
    path = Path(found.origin).parent / DIGITS if found and found.origin else None
    if path and path.exists():
        return np.loadtxt(path, dtype=np.uint8, delimiter=",")
    from sklearn.datasets import load_digits  # of a version that has it elsewhere

    return np.column_stack(load_digits(return_X_y=True))


def mnist(root: Path, image_size: Size = 32, channels: int = 3) -> Splits:
    """MNIST: 55,000 to train, 5,000 of the training images to validate, the official 10,000 to test."""
    return _torchvision("MNIST", root, image_size, channels)


def fashion_mnist(root: Path, image_size: Size = 32, channels: int = 3) -> Splits:
    """FashionMNIST, split like MNIST."""
    return _torchvision("FashionMNIST", root, image_size, channels)


def _torchvision(name: str, root: Path, image_size: Size, channels: int, num_valid: int = 5000) -> Splits:
    from torchvision import datasets

    source = getattr(datasets, name)
    folders = (*reversed(root.parents), root, root / name, root / name / "raw")
    new = [folder for folder in folders if not folder.exists()]
    try:
        train, test = (source(root, train=part, download=True) for part in (True, False))
    except Exception as error:  # torchvision has no error of its own for files that are missing or damaged
        _remove_empty(new)
        files = ", ".join(Path(url).stem for url, _ in source.resources)
        raise ValueError(
            f"{name} is missing or damaged under {root}/{name}/raw and could not be downloaded "
            f"({image_files.first_line(error)}). Put its files there ({files}), or point data.root at the folder that "
            f"holds {name}/raw."
        ) from None
    _check_fit(name, root, train, num_valid)
    _check_fit(name, root, test, 0)
    order = shuffled(len(train.data), derive_seed("split", SPLIT_SEED))

    def part(pixels: Tensor, labels: Tensor) -> ImageSet:
        return ImageSet(_sized(pixels.unsqueeze(1), image_size, channels), labels)

    return Splits(
        train=part(train.data[order[num_valid:]], train.targets[order[num_valid:]]),
        valid=part(train.data[order[:num_valid]], train.targets[order[:num_valid]]),
        test=part(test.data, test.targets),
        label_names=tuple(train.classes) if name == "FashionMNIST" else (),  # MNIST's are their numbers
    )


def _check_fit(name: str, root: Path, part: Any, least: int) -> None:
    """Raise a ValueError unless a part of MNIST has a label for each image, and more than `least` images."""
    images, labels = len(part.data), len(part.targets)
    if images != labels or images <= least:
        kind = "training" if part.train else "test"
        raise ValueError(
            f"{root}/{name}/raw holds {images:,} {kind} images and {labels:,} labels of them: expected as many of "
            f"both, and more than {least:,}. Put the official files there."
        )


def celeba(
    root: Path, image_size: Size = 128, channels: int = 3, crop: int | None = 148, cache: str | Path | None = None
) -> Splits:
    """CelebA, the aligned faces of 178 x 218 pixels, or any subset of them, with the official partition.

    The images are root/celeba/img_align_celeba/000001.jpg to 202599.jpg (or root/img_align_celeba/...). Beside that
    folder may lie list_eval_partition.txt, without which the official ranges are taken, and list_attr_celeba.txt,
    whose attributes become labels (N, 40): 1, 0, or -1 for images that it does not list. Images of the partition that
    are not there, and files that it does not name, are counted in the note. If no image is there, all are downloaded.

    Raises:
        ValueError: if no image is there and none can be downloaded, a part has no image, or a line of these files is
            malformed.
    """
    folder = _celeba_folder(root)
    stats = image_files.scan(folder / "img_align_celeba")
    partition = _celeba_partition(folder / "list_eval_partition.txt")
    ordered = sorted((PARTS.index(part), name) for name, part in partition.items() if name in stats)
    files = image_files.Files(folder / "img_align_celeba", {name: stats[name] for _, name in ordered})
    decoded = image_files.read(files, image_files.Recipe(image_size, channels, crop), cache, "celeba")
    counts = {part: sum(partition[name] == part for name in decoded.names) for part in PARTS}
    for part in PARTS:
        if not counts[part]:
            raise ValueError(_celeba_lacks(part, partition, files, decoded.note))
    labels, names = _celeba_attributes(folder / "list_attr_celeba.txt", decoded.names)
    unlisted = 0 if labels is None else int((labels == -1).all(1).sum())
    of_labels = f"{unlisted:,} images have no attributes" if unlisted else ""
    note = "; ".join(filter(None, (_celeba_note(partition, stats), of_labels, decoded.note)))
    return Splits(**_cut(decoded.pixels, labels, counts), note=note, label_names=names)


def _cut(pixels: Tensor, labels: Tensor | None, counts: dict[str, int]) -> dict[str, ImageSet]:
    """Parts of these names and sizes, one after the other, as views."""
    names, sizes = list(counts), list(counts.values())
    several = [None] * len(names) if labels is None else labels.split(sizes)
    return {name: ImageSet(*part) for name, *part in zip(names, pixels.split(sizes), several, strict=True)}


def _celeba_folder(root: Path) -> Path:
    """The folder that holds img_align_celeba, after a download if there is none."""
    for folder in (root / "celeba", root):
        images = folder / "img_align_celeba"
        if images.is_dir() and any(images.iterdir()):
            return folder
    from torchvision import datasets

    folders = (*reversed(root.parents), root, root / "celeba")
    new = [folder for folder in folders if not folder.exists()]
    try:
        datasets.CelebA(str(root), download=True)
    except Exception as error:  # of the network, of gdown, of the zip file
        _remove_empty(new)
        raise ValueError(
            f"CelebA is not in {root}/celeba and could not be downloaded ({image_files.first_line(error)}). Unpack "
            f"img_align_celeba.zip there, so that {root}/celeba/img_align_celeba holds 000001.jpg to 202599.jpg or "
            "some of them, and put list_eval_partition.txt and, for attributes, list_attr_celeba.txt beside that "
            "folder (both may be left out); or point data.root at the folder that holds celeba."
        ) from None
    return root / "celeba"


def _celeba_partition(path: Path) -> dict[str, str]:
    """The part of each image by its name: that of the file, or the official one if there is no such file."""
    if not path.is_file():
        return {f"{n:06d}.jpg": next(p for p in PARTS if n <= CELEBA_LAST[p]) for n in range(1, 202_600)}
    partition: dict[str, str] = {}
    for number, line in _lines(path):
        match = re.fullmatch(r"(\d{6}\.jpg)\s+([012])", line)
        if not match or match[1] in partition:
            raise ValueError(
                f"{path}, line {number}: expected an image and its part, 0, 1 or 2, such as '000001.jpg 0', and each "
                f"image once, got {line[:80]!r}"
            )
        partition[match[1]] = PARTS[int(match[2])]
    return partition


def _celeba_attributes(path: Path, names: list[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    """The attributes of these images, (N, A), and what they are called; None and () if there is no such file."""
    if not path.is_file():
        return None, ()
    lines = _lines(path)
    (first, count), (_, header) = next(lines, (1, "")), next(lines, (2, ""))
    if not count.isdecimal() or not header:
        raise ValueError(
            f"{path}, line {first}: expected a number of images and then a line of names, got {count[:80]!r}"
        )
    attributes, values, rows = tuple(header.split()), {"1": 1, "-1": 0}, {}
    for number, line in lines:
        name, *row = line.split()
        if len(row) != len(attributes) or not values.keys() >= set(row) or name in rows:
            raise ValueError(
                f"{path}, line {number}: expected an image, each once, and {len(attributes)} numbers that are 1 or -1, "
                f"got {line[:80]!r}"
            )
        rows[name] = bytes(map(values.__getitem__, row))
    if int(count) != len(rows):
        checks.warn(f"{path} says that it has {int(count):,} images and has {len(rows):,}: it may have been cut short")
    unknown = b"\xff" * len(attributes)  # -1
    known = bytearray(b"".join(rows.get(name, unknown) for name in names))
    return torch.frombuffer(known, dtype=torch.int8).view(len(names), -1).long(), attributes


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers."""
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _celeba_note(partition: dict[str, str], stats: dict[str, image_files.Stat]) -> str:
    absent, unnamed = len(partition.keys() - stats.keys()), len(stats.keys() - partition.keys())
    notes = [f"{absent:,} of {len(partition):,} images of the partition are not there"] if absent else []
    notes += [f"{unnamed:,} files that the partition does not name were ignored"] if unnamed else []
    return "; ".join(notes)


def _celeba_lacks(part: str, partition: dict[str, str], files: image_files.Files, note: str) -> str:
    example = min((name for name in partition if partition[name] == part), default=None)
    if example is None:
        return f"the list_eval_partition.txt beside {files.root} names no {part} image: take the official one, or none"
    return (
        f"{files.root} holds no readable {part} image, such as {example}, of {len(files):,} images of the partition: "
        f"put at least one image of each part there. {note}"
    ).rstrip()


def image_folder(
    root: Path, image_size: Size = 32, channels: int = 3, crop: int | None = None, cache: str | Path | None = None
) -> Splits:
    """Any folder of images, of any sizes and modes, in subfolders or not: 80 % train, 10 % validation, 10 % test.

    The centred square of `crop` pixels, or the whole image, is cropped to the proportions of `image_size` and resized.
    Transparent images are laid on white. If every image lies in a subfolder, the first-level subfolders, in the order
    of their names, are the classes. The split depends on the relative paths alone; an additional image moves hardly any
    other to another part. If the first-level subfolders are `train` and, with it, `test`, `valid` (or `val`) or both,
    they are the split, and the folders in them the classes; if there are no validation or test images, a tenth of
    `train` serves as such. Images outside these folders, and files that cannot be read, are named in a warning, skipped
    and counted; hidden files and folders (.NAME) are ignored, links are followed. Grey images of 32 bits or floats do
    not say what their range is: it is taken to be 0..255, 16 bits or [0, 1], by the largest number of each image.

    Raises:
        ValueError: if the folder is missing or holds fewer than three readable images.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: point data.root at a folder of images")
    stats = {name: stat for name, stat in image_files.scan(root, deep=True).items() if "/." not in f"/{name}"}
    names = sorted(filter(image_files.is_image, stats), key=lambda name: name.split("/"))
    own = _own_parts(names)
    note = _doubts(names, own, root, foreign=[name for name in stats if image_files.is_foreign(name)])
    ordered = _by_part([name for name in names if name in own] if own else names, own)
    files = image_files.Files(root, {name: stats[name] for name in ordered})
    decoded = image_files.read(files, image_files.Recipe(image_size, channels, crop), cache, "image_folder")
    count = len(decoded.pixels)
    if count < 3:
        others = f"; of the other files one is {others[0]}" if (others := sorted(stats.keys() - {*names})) else ""
        raise ValueError(
            f"{root} holds {count} readable image files, at least 3 are needed{others}. {decoded.note}".rstrip()
        )
    test = valid = max(1, count // 10)
    if own:
        found, given = Counter(own[name] for name in decoded.names), set(own.values())
        test, valid = (found[part] if part in given else max(1, found["train"] // 10) for part in ("test", "valid"))
    counts = {"test": test, "valid": valid, "train": count - test - valid}
    if own and "test" not in given:  # what is cut from the training images comes behind what is there
        counts = {name: counts[name] for name in ("valid", "test", "train")}
    if min(counts.values()) < 1:
        raise ValueError(f"{root} holds {counts} readable images by part: at least one of each is needed")
    labels, classes = _classes([name.partition("/")[2] if own else name for name in decoded.names])
    note = "; ".join(filter(None, (note, decoded.note)))
    return Splits(**_cut(decoded.pixels, labels, counts), note=note, label_names=classes)


def _by_part(names: list[str], own: dict[str, str]) -> list[str]:
    """Names in an order that looks random (by hashes of the names); if they have parts, test images first, then those
    of validation. When images are added or removed, the order of the others stays."""

    def place(name: str) -> tuple[int, bytes]:
        return PARTS[::-1].index(own.get(name, "train")), hashlib.blake2b(os.fsencode(name)).digest()

    return sorted(names, key=place)


def _doubts(names: list[str], own: dict[str, str], root: Path, foreign: list[str]) -> str:
    """What speaks against the split or the classes that a folder seems to have, also as a warning; else nothing."""
    inside = [name.partition("/")[2] for name in own] if own else names
    loose = [name for name in inside if "/" not in name]
    first = {name.partition("/")[0] for name in names if "/" in name}
    notes = []
    if apart := [name for name in names if own and name not in own]:
        notes += [f"{len(apart)} images of {root} are in none of its parts and not taken, such as {apart[0]}"]
    parts, others = ({folder for folder in first if (folder.lower() in _PART_OF) == named} for named in (True, False))
    if not own and parts:
        words = " and ".join(sorted(parts, key=lambda folder: list(_PART_OF).index(folder.lower())))
        are = "are taken as classes and not as a split" if len(parts) > 1 else "is a class and not a part of a split"
        why = f"there is {min(others)} beside them" if others else "that takes train, and test or valid"
        notes += [f"{words} in {root} {are}, as {why}"]
    if 0 < len(loose) < len(inside):
        notes += [
            f"{len(loose)} images of {root} are in no folder of a class, such as {loose[0]}: there are no classes"
        ]
    if foreign:
        notes += [f"of the files in {root} {len(foreign)} are images that are not read, such as {min(foreign)}"]
    if not own and len(first) == 1 and not loose and all(name.count("/") > 1 for name in names):
        (folder,) = first
        notes += [
            f"all images of {root} lie in folders in {folder}, which is taken for their one class: for the classes or "
            f"the split there give data.root={root / folder}"
        ]
    for note in notes:
        checks.warn(note)
    return "; ".join(notes)


def array_file(root: Path, image_size: Size = 32, channels: int = 3) -> Splits:
    """The images of an .npz or .npy file, as `array_files.read` finds them: NaN in floats was never recorded.

    Images are cropped at their centre to the proportions of `image_size` and resized, except those with NaN, which must
    have that size.
    The parts are those of the file; if it has no validation images, a tenth of the training images serve as such.
    Images without parts are split by their positions alone: 80 % train, 10 % validation, 10 % test. Each part is
    shuffled, always in the same way: a file may be sorted by class, and measurements take the first images of a part.

    Raises:
        ValueError: if the file is missing, cannot be read, or holds no such images, too few of them, or some with NaN
            that are of another size.
    """
    content = array_files.read(root)
    sets = {}
    for part, arrays in content.parts.items():
        height, width = arrays.pixels.shape[-2:]
        rows, columns = checks.height_and_width("image_size", image_size)
        if height * columns != width * rows:
            checks.warn(
                f"{root}: of images of {height} x {width} pixels the middle is taken, in the proportions of {rows} x "
                f"{columns}; {_whole(height, width)} takes them whole"
            )
        sets[part] = replace(arrays, pixels=_fitted(arrays.pixels, arrays.recorded, str(root), image_size, channels))
    return _all_parts(replace(content, parts=sets), str(root))


def torch_dataset(
    root: Path,
    image_size: Size = 32,
    channels: int = 3,
    target: Callable[..., Any] | None = None,
    **own: Any,
) -> Splits:
    """The images of torch Datasets, such as torchvision's, read into memory; see `torch_datasets.read`.

    Images are cropped at their centre to the proportions of `image_size` and resized, except those with NaN, which must
    have that size. A missing part is a tenth of the training images, or of all. Each part is shuffled, as in
    `array_file`.

    Args:
        target: a class or function that makes data sets; how it is called for each part, `torch_datasets.parts` says.
        own: other arguments of it.

    Raises:
        ValueError: if it does not take these or fails, an image cannot be read, or there are too few.
    """
    if not callable(target):
        raise ValueError(f"target must be a class or a function that makes a torch Dataset, got {target!r}")
    settings = dict(root=str(root), image_size=image_size, channels=channels)
    name = getattr(target, "__name__", str(target))
    with torch_datasets.repeatable(SPLIT_SEED):
        datasets, note = torch_datasets.parts(target, settings, own)
        fit = functools.partial(_fitted, image_size=image_size, channels=channels)
        content = torch_datasets.read(datasets, name, fit)
    return _all_parts(replace(content, note="; ".join(filter(None, (note, content.note)))), name)


def _fitted(
    pixels: Tensor, recorded: Tensor | None, what: str, image_size: Size | None, channels: int | None
) -> Tensor:
    """`_sized`, to what is asked for if anything is; images with NaN must have that size already."""
    height, width = pixels.shape[-2:]
    size = (height, width) if image_size is None else checks.height_and_width("image_size", image_size)
    if recorded is not None and (height, width) != size:
        raise ValueError(
            f"{what}: images with NaN, never recorded, cannot be resized from {height} x {width} pixels: give "
            f"{_whole(height, width)}, or make them {size[0]} x {size[1]} pixels"
        )
    return _sized(pixels, size, channels or pixels.shape[1])


def _whole(height: int, width: int) -> str:
    """The setting that takes images as they are."""
    return f"data.image_size={height if height == width else f'[{height},{width}]'}"


def _image_set(arrays: array_files.Arrays) -> ImageSet:
    return ImageSet(arrays.pixels, arrays.labels, arrays.recorded)


def _all_parts(content: array_files.Content, source: str) -> Splits:
    """The three parts, shuffled; a missing one is a tenth of the training images, or of all."""
    if content.note:
        checks.warn(content.note)
    sets = {part: _image_set(arrays) for part, arrays in content.parts.items()}
    lacking = [part for part in ("test", "valid") if part not in sets]
    cut: dict[str, ImageSet] = {}
    for part, images in sets.items():
        taken = lacking if part in ("images", "train") else []
        if len(images) <= len(taken):
            raise ValueError(f"{source} holds {len(images)} images to train with, at least {len(taken) + 1} are needed")
        sizes = [max(1, len(images) // 10)] * len(taken)
        index = shuffled(len(images), derive_seed("split", SPLIT_SEED)).split([*sizes, len(images) - sum(sizes)])
        names = [*taken, "train" if part == "images" else part]
        cut |= {name: images.select(rows) for name, rows in zip(names, index, strict=True)}
    return Splits(**{part: cut[part] for part in PARTS}, note=content.note, label_names=content.label_names)


_PART_OF = {word: part for part, words in array_files.PART_WORDS.items() for word in words}  # of names of folders


def _own_parts(names: list[str]) -> dict[str, str]:
    """The part of each image in a folder, if the first-level ones are the parts of a split; nothing if they aren't."""
    own = {name: _PART_OF.get(name.partition("/")[0].lower(), "") for name in names if "/" in name}
    found = set(own.values())
    return own if "train" in found and len(found) > 1 and "" not in found else {}


def _classes(names: list[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    """The classes of images by the first folders of their names, (N,), and what they are called; else None and ()."""
    if not all("/" in name for name in names):
        return None, ()
    folders = [name.split("/")[0] for name in names]
    numbers = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return torch.tensor([numbers[folder] for folder in folders]), tuple(numbers)


def _sized(pixels: Tensor, image_size: Size, channels: int) -> Tensor:
    """uint8 (N, 1 or 3, H, W) -> (N, channels, *image_size): the middle of the same proportions, resized.

    Equal channels are a view of one.
    """
    height, width = pixels.shape[-2:]
    size = checks.height_and_width("image_size", image_size)
    tall = height * size[1] > width * size[0]
    rows, columns = (round(width * size[0] / size[1]), width) if tall else (height, round(height * size[1] / size[0]))
    rows, columns = max(rows, 1), max(columns, 1)
    top, left = (height - rows) // 2, (width - columns) // 2
    pixels = pixels[..., top : top + rows, left : left + columns]
    to_grey, to_size = pixels.shape[1] > channels, (rows, columns) != size
    if to_grey or to_size:
        # Imported only here: it takes seconds.
        from torchvision.transforms.v2.functional import resize, rgb_to_grayscale

        def sized(part: Tensor) -> Tensor:
            if to_grey:  # of bytes, it would cut off what is behind the point
                part = rgb_to_grayscale(part.float()).round().to(torch.uint8)
            return resize(part, list(size), antialias=True) if to_size else part

        pixels = torch.cat([sized(part) for part in pixels.split(4096)])
    return pixels.expand(-1, channels, -1, -1)


def shuffled(count: int, seed: int) -> Tensor:
    """A permutation of 0 .. count - 1 that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _remove_empty(folders: list[Path]) -> None:
    """Remove the empty folders that a failed download made."""
    for folder in reversed(folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


SOURCES: dict[str, Callable[..., Splits]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "celeba": celeba,
    "image_folder": image_folder,
    "array_file": array_file,
    "torch_dataset": torch_dataset,
}
NAMED_BY_ROOT = ("image_folder", "array_file")  # a folder or file of the user's
OWN = (*NAMED_BY_ROOT, "torch_dataset")  # whose images are identified by `root` or by more
