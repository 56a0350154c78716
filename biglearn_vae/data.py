"""Images as uint8 tensors with fixed splits, and batches of them that are a function of (seed, rank, step).

N images, C channels, H x W pixels, B batch.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biglearn_vae import masks
from biglearn_vae.distributed import World, derive_seed

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".tga"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
SPLIT_SEED = 0  # one split for everyone, whatever the run's seed, so that no test image is ever trained on


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one split.

    Attributes:
        pixels: uint8 (N, C, H, W).
        labels: int64 (N,), or None.
        recorded: boolean (N, rows, columns), which cells of a grid on each image were ever recorded, or None for all.
    """

    pixels: Tensor
    labels: Tensor | None = None
    recorded: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index) -> Tensor:
        """These images as float32 in [0, 1], (B, C, H, W) for a slice or a tensor of positions.

        What was never recorded is NaN.
        """
        images = self.pixels[index].float() / 255
        if self.recorded is None:
            return images
        cells = self.recorded[index]  # (B, rows, columns)
        hidden = ~masks.to_pixels(cells.flatten(-2), cells.shape[-2:], images.shape[-2:])
        return images.masked_fill(hidden.unsqueeze(-3), torch.nan)

    def select(self, index: Tensor) -> "ImageSet":
        """The set of these images alone."""
        parts = (self.pixels, self.labels, self.recorded)
        return ImageSet(*(None if part is None else part[index] for part in parts))

    def to(self, device: torch.device) -> "ImageSet":
        """The same set, resident on the device."""
        recorded = None if self.recorded is None else self.recorded.to(device)
        return ImageSet(self.pixels.to(device), self.labels, recorded)

    def fingerprint(self) -> str:
        """A short digest of the size and of at most 1,000 evenly spaced images, to tell one data set from another."""
        some = self.pixels[:: -(-len(self) // 1000)].contiguous().cpu()
        return hashlib.blake2b(
            repr(tuple(self.pixels.shape)).encode() + some.numpy().tobytes(), digest_size=8
        ).hexdigest()


@dataclass(frozen=True, eq=False)
class Splits:
    """The three parts of a data set; `valid` is carved out of the training data, and `note` says what was left out."""

    train: ImageSet
    valid: ImageSet
    test: ImageSet
    note: str = ""


class Batches:
    """batches(step): the images of a step, an endless reshuffled pass over the set.

    Each epoch is a new permutation that depends on the seed alone; a process takes its share of each batch. So a
    batch is a function of (seed, rank, step), and all ranks' batches together are those of a single process.

    Args:
        images: the set; keep it on the training device if it fits there.
        batch_size: images a step, of all processes together.
        seed: of the order.
        world: this process among the others.
        transform: applied to the float images (B, C, H, W), such as a tokenizer's `encode`.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int = 0,
        world: World | None = None,
        transform: Callable | None = None,
    ):
        world = world or World()
        self.images, self.batch_size, self.seed, self.world = images, batch_size, seed, world
        self.transform = transform or (lambda x: x)
        self._share = world.share(batch_size)
        self._orders: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        return self.transform(self.images[self.positions(step)])

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
                epoch: order.to(self.images.pixels.device)
            }
        return self._orders[epoch]


def load(name: str, root: str | None = None, image_size: int | None = None, channels: int | None = None) -> Splits:
    """A data set by name.

    Args:
        name: one of `SOURCES`: digits, mnist, fashion_mnist, image_folder.
        root: where its files are or are downloaded to; by default the environment variable BIGLEARN_DATA, else data/.
        image_size: side in pixels that images are resized to; each source has its default.
        channels: 1 (grey) or 3; each source has its default.

    Raises:
        ValueError: on an unknown name, wrong sizes, or data that is not there and cannot be had.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(SOURCES)}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    sizes = {k: v for k, v in dict(image_size=image_size, channels=channels).items() if v is not None}
    return SOURCES[name](Path(root or os.environ.get("BIGLEARN_DATA") or "data").expanduser(), **sizes)


def with_missing(splits: Splits, share: float, grid: tuple[int, int], unit: str = "patch") -> Splits:
    """The same data of which a share was never recorded, completely at random; the test images stay complete.

    Args:
        share: of what is lost, in [0, 1).
        grid: rows and columns of patches.
        unit: "patch" loses each patch of the training and validation images with that probability, whatever else is
            lost; "image" loses that share of the images, each as a whole.

    Raises:
        ValueError: if nothing would be left, or on values outside these.
    """
    if not 0 <= share < 1:
        raise ValueError(f"missing must be a share in [0, 1), got {share}")
    if unit not in ("patch", "image"):
        raise ValueError(f"missing_unit must be 'patch' or 'image', got {unit!r}")
    if share == 0:
        return splits
    parts = {
        name: _lose(getattr(splits, name), share, grid, unit, derive_seed("missing", SPLIT_SEED, name))
        for name in ("train", "valid")
    }
    return replace(splits, **parts)


def _lose(images: ImageSet, share: float, grid: tuple[int, int], unit: str, seed: int) -> ImageSet:
    if unit == "patch":
        generator = torch.Generator().manual_seed(seed)
        recorded = torch.rand(len(images), *grid, generator=generator) >= share
        kept, left = replace(images, recorded=recorded), recorded.any()
    else:
        left = round((1 - share) * len(images))
        kept = images.select(shuffled(len(images), seed)[:left].sort().values)
    if not left:
        raise ValueError(f"missing={share} leaves nothing of {len(images)} images")
    return kept


def images(
    name: str, split: str = "test", root: str | None = None, image_size: int | None = None, channels: int | None = None
) -> Tensor:
    """All images of a split ("train", "valid" or "test") as float32 in [0, 1], (N, C, H, W). The others: see `load`."""
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split must be train, valid or test, got {split!r}")
    return getattr(load(name, root, image_size, channels), split)[:]


def digits(root: Path | None = None, image_size: int = 8, channels: int = 1) -> Splits:
    """The 1,797 handwritten 8 x 8 digits that come with scikit-learn: 1,200 to train, 300 to validate, 297 to test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.from_numpy(raw.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)  # (N, 1, 8, 8)
    labels = torch.from_numpy(raw.target).long()
    order = shuffled(len(pixels), derive_seed("split", SPLIT_SEED))
    parts = {"train": order[:1200], "valid": order[1200:1500], "test": order[1500:]}
    return Splits(**{k: ImageSet(_sized(pixels[i], image_size, channels), labels[i]) for k, i in parts.items()})


def mnist(root: Path, image_size: int = 32, channels: int = 3) -> Splits:
    """MNIST: 55,000 to train, 5,000 of the training images to validate, the official 10,000 to test."""
    return _torchvision("MNIST", root, image_size, channels)


def fashion_mnist(root: Path, image_size: int = 32, channels: int = 3) -> Splits:
    """FashionMNIST, split like MNIST."""
    return _torchvision("FashionMNIST", root, image_size, channels)


def _torchvision(name: str, root: Path, image_size: int, channels: int, num_valid: int = 5000) -> Splits:
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
            f"{name} is missing or damaged under {root}/{name}/raw and could not be downloaded ({_first_line(error)}). "
            f"Put its files there ({files}), or point data.root at the folder that holds {name}/raw."
        ) from None
    order = shuffled(len(train.data), derive_seed("split", SPLIT_SEED))

    def part(pixels: Tensor, labels: Tensor) -> ImageSet:
        return ImageSet(_sized(pixels.unsqueeze(1), image_size, channels), labels)

    return Splits(
        train=part(train.data[order[num_valid:]], train.targets[order[num_valid:]]),
        valid=part(train.data[order[:num_valid]], train.targets[order[:num_valid]]),
        test=part(test.data, test.targets),
    )


def image_folder(root: Path, image_size: int = 32, channels: int = 3) -> Splits:
    """Any folder of images, of any sizes and modes, in subfolders or not: 80 % train, 10 % validation, 10 % test.

    The shorter side is resized to `image_size` and the middle square is kept. Transparency is laid on white. If
    every image lies in a subfolder, the names of the first-level subfolders are the classes. The split depends on the
    sorted relative paths alone. Files that cannot be read are named in a warning, skipped and counted.

    Raises:
        ValueError: if the folder is missing or holds fewer than three readable images.
    """
    from tqdm import tqdm

    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: point data.root at a folder of images")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda path: _decode(path, image_size, channels), paths)
        decoded = list(tqdm(decoded, total=len(paths), desc="reading images", disable=len(paths) < 1000, leave=False))
    readable = [(path, pixels) for path, pixels in zip(paths, decoded, strict=True) if isinstance(pixels, Tensor)]
    broken = [f"{path} ({why})" for path, why in zip(paths, decoded, strict=True) if isinstance(why, str)]
    note = f"{len(broken)} of {len(paths)} image files could not be read and were skipped: " if broken else ""
    note += "; ".join(broken[:5]) + (" ..." if len(broken) > 5 else "")
    if note:
        warnings.warn(note, stacklevel=2)
    if len(readable) < 3:
        raise ValueError(f"{root} holds {len(readable)} readable image files, at least 3 are needed. {note}".rstrip())
    pixels = torch.stack([pixels for _, pixels in readable])
    labels = _class_labels([path.relative_to(root) for path, _ in readable])
    order = shuffled(len(pixels), derive_seed("split", SPLIT_SEED))
    held_out = max(1, len(pixels) // 10)
    parts = {"test": order[:held_out], "valid": order[held_out : 2 * held_out], "train": order[2 * held_out :]}
    return Splits(
        note=note, **{k: ImageSet(pixels[i], None if labels is None else labels[i]) for k, i in parts.items()}
    )


def _decode(path: Path, image_size: int, channels: int) -> Tensor | str:
    """A file as uint8 (C, S, S), or in words why it cannot be read."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):
                image = _eight_bits(image)
            if "A" in image.mode or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("L" if channels == 1 else "RGB")
        return pil_to_tensor(ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC))
    except Exception as error:  # on a damaged file each decoder raises what it likes
        return _first_line(error)


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """A grey image of 16 or 32 bits or of floats, in 8 bits; convert() would clip it."""
    largest = image.convert("F").getextrema()[1]
    if image.mode.startswith("I"):
        peak = 65535 if image.mode != "I" or largest > 255 else 255
    else:
        peak = 255 if largest > 1 else 1
    return image.convert("F").point(lambda value: value * (255 / peak) + 0.5).convert("L")


def _class_labels(paths: list[Path]) -> Tensor | None:
    if any(len(path.parts) < 2 for path in paths):
        return None
    names = sorted({path.parts[0] for path in paths})
    return torch.tensor([names.index(path.parts[0]) for path in paths])


def _sized(pixels: Tensor, image_size: int, channels: int) -> Tensor:
    """uint8 grey (N, 1, H, W) -> (N, channels, image_size, image_size), equal channels as a view of one."""
    if pixels.shape[-1] != image_size:
        from torchvision.transforms.v2.functional import resize

        pixels = torch.cat([resize(part, [image_size, image_size], antialias=True) for part in pixels.split(4096)])
    return pixels.expand(-1, channels, -1, -1)


def shuffled(count: int, seed: int) -> Tensor:
    """A permutation of 0 .. count - 1 that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _remove_empty(folders: list[Path]) -> None:
    """Take back the empty folders that a failed download made."""
    for folder in reversed(folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


SOURCES: dict[str, Callable[..., Splits]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "image_folder": image_folder,
}
