"""Images in NumPy files: what an .npz or .npy file holds, as bytes, with labels and with what was recorded.

N images, C channels, H x W pixels, A attributes.
"""

import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PARTS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}  # as they are called in names
WHOLE = ("images", "x", "arr_0")  # of all images, where they are not in parts
LABELS = ("labels", "y")
TOLERANCE = 1e-3  # beyond [0, 1], for floats that were computed


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images of one part.

    Attributes:
        pixels: uint8 (N, C, H, W), C being 1 or 3; 0 where they were not recorded.
        labels: int64, (N,) or (N, A), or None.
        recorded: boolean (N, H, W), which pixels are not NaN, or None if all are numbers.
    """

    pixels: Tensor
    labels: Tensor | None
    recorded: Tensor | None


def read(path: Path) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """The parts of a file, "train", "test" and perhaps "valid", or "images" alone, and the names of the labels.

    In an .npz file the parts are called `train_images` or `x_train`, `valid_images`, `val_images`, `x_valid` or
    `x_val`, and so on, their labels `train_labels` or `y_train`; all images at once `images` or `x`, their labels
    `labels` or `y`. An .npy file holds images alone. Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3
    channels: bytes, booleans, or floats in [0, 1], of which NaN was never recorded; floats are rounded to bytes. Labels
    are (N,) or (N, 1), whole numbers or text, or (N, A), attributes that are 1, 0, or -1 where it is not known. Classes
    that are not numbered 0, 1, ... are numbered in their order, and have names.

    Raises:
        ValueError: if it is no such file, holds no such arrays, or they do not fit together.
    """
    content = _opened(path)
    names = _names(list(content))
    if not names:
        raise ValueError(
            f"{path} holds {', '.join(content) or 'nothing'}: expected images called train_images and test_images (or "
            "x_train and x_test), perhaps valid_images, or images alone; and labels, if there are any, train_labels "
            "and so on, or labels"
        )
    arrays = {name: _array(content, name, path) for pair in names.values() for name in pair if name}
    pixels = {part: _pixels(arrays[name], f"{path}: {name}") for part, (name, _) in names.items()}
    labels, classes = _labels({part: arrays[label] for part, (_, label) in names.items() if label}, path)
    for part, values in labels.items():
        if len(values) != len(pixels[part][0]):
            name, label = names[part]
            raise ValueError(f"{path}: {label} holds {len(values):,} labels, {name} {len(pixels[part][0]):,} images")
    return {part: Arrays(found, labels.get(part), recorded) for part, (found, recorded) in pixels.items()}, classes


def _opened(path: Path) -> Mapping[str, np.ndarray]:
    """What is in a file, by name; of an .npz file it is read when it is asked for."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"{path} {what}: point data.root at an .npz or .npy file of images")
    with _readable(path):
        content = np.load(path, allow_pickle=False)
    return {"images": content} if isinstance(content, np.ndarray) else content


def _array(content: Mapping[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    with _readable(path):
        return content[name]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What NumPy cannot read is a ValueError that says what to do."""
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as a NumPy file of plain arrays ({error}): np.savez(path, images=..., labels=...) "
            "writes one"
        ) from None


def _names(given: Collection[str]) -> dict[str, tuple[str, str | None]]:
    """What images and labels are called, by part; none if they are not called so."""

    def first(*names: str) -> str | None:
        return next((name for name in names if name in given), None)

    found: dict[str, tuple[str, str | None]] = {}
    for part, words in PARTS.items():
        images = first(*(name for word in words for name in (f"{word}_images", f"x_{word}")))
        if images:
            found[part] = images, first(*(name for word in words for name in (f"{word}_labels", f"y_{word}")))
    if {"train", "test"} <= found.keys():
        return found
    images = first(*WHOLE)
    return {"images": (images, first(*LABELS))} if images and not found else {}


def _pixels(array: np.ndarray, what: str) -> tuple[Tensor, Tensor | None]:
    """Bytes (N, C, H, W) and what was recorded of them, (N, H, W)."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3):
        array = np.moveaxis(array, -1, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
        raise ValueError(
            f"{what} has the shape {array.shape}: expected images (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 "
            "channels"
        )
    if array.dtype == np.bool_:
        return torch.from_numpy(array * np.uint8(255)), None
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array)), None
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{what} is of {array.dtype}: expected bytes (uint8), booleans, or floats in [0, 1], of which NaN was "
            "never recorded"
        )
    return _bytes_of_floats(array, what)


def _bytes_of_floats(array: np.ndarray, what: str) -> tuple[Tensor, Tensor | None]:
    """Floats in [0, 1] rounded to bytes, and which pixels are numbers in all channels; None if all are."""
    known = ~np.isnan(array)
    if not known.any():
        raise ValueError(f"{what} holds nothing but NaN: no pixel was recorded")
    low, high = array.min(where=known, initial=np.inf), array.max(where=known, initial=-np.inf)
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(
            f"{what} has values from {low:g} to {high:g}: expected floats in [0, 1], of which NaN was never recorded. "
            "Divide those in 0..255 by 255"
        )
    recorded = known.all(1)
    # A part at a time: the numbers are several times as large as the bytes.
    pixels = torch.empty(array.shape, dtype=torch.uint8)
    for start in range(0, len(array), 1024):
        part = torch.from_numpy(np.ascontiguousarray(array[start : start + 1024], dtype=np.float32))
        pixels[start : start + 1024] = (part.nan_to_num(0).clamp_(0, 1) * 255).round_().to(torch.uint8)
    return pixels, None if recorded.all() else torch.from_numpy(recorded)


def _labels(arrays: dict[str, np.ndarray], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Labels by part and their names: those of classes that are not 0, 1, ..., or the numbers of attributes."""
    arrays = {part: array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array for part, array in arrays.items()}
    kinds = {array.dtype.kind for array in arrays.values()}
    axes = {array.shape[1:] for array in arrays.values()}
    if not arrays:
        return {}, ()
    if not kinds <= set("biuSU") or len(axes) > 1 or len(next(iter(axes))) > 1:
        raise ValueError(
            f"{path}: expected labels (N,), whole numbers or text, or (N, A), attributes that are 1, 0 or -1, got "
            + ", ".join(f"{array.dtype} {array.shape}" for array in arrays.values())
        )
    if axes != {()}:
        return {part: torch.from_numpy(array.astype(np.int64)) for part, array in arrays.items()}, tuple(
            str(number) for number in range(next(iter(axes))[0])
        )
    values, numbers = np.unique(np.concatenate(list(arrays.values())), return_inverse=True)
    several = torch.from_numpy(numbers.astype(np.int64)).split([len(array) for array in arrays.values()])
    plain = kinds <= set("iu") and np.array_equal(values, np.arange(len(values)))
    return dict(zip(arrays, several, strict=True)), () if plain else tuple(map(_text, values))


def _text(value: np.generic) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
