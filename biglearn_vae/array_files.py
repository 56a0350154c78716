"""Images in NumPy files: what an .npz or .npy file holds, as bytes, with labels and with what was recorded.

N images, C channels, H x W pixels, A attributes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PART_WORDS = {"train": ("train", "training"), "valid": ("valid", "val", "validation"), "test": ("test", "testing")}
WHOLE = ("images", "x")  # names of all images at once, without parts
UNNAMED = "arr_0"  # what NumPy calls the first array that is given no name
LABELS = ("labels", "y")
MAGIC = (b"PK", b"\x93NUMPY")  # with which .npz and .npy files begin
DARK = 32  # of 255: if no byte reaches this, they may be numbers of another range, such as 0 to 16
TOLERANCE = 1e-3  # beyond [0, 1], for floats that were computed
NEAR = 0.3  # beyond [0, 1], as far as sharpening filters overshoot
FEW = 20  # standard deviations, within which all pixels of normalised images lie


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


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        parts: "train", "test" and perhaps "valid", or "images" alone.
        label_names: names of classes that are not numbered 0, 1, ..., or the numbers of attributes; else empty.
        note: which arrays were not taken, and what may mean something else than it is taken for; else empty.
    """

    parts: dict[str, Arrays]
    label_names: tuple[str, ...]
    note: str


def read(path: Path) -> Content:
    """The images of a file and their labels.

    In an .npz file the parts are called `train_images` or `x_train`, `valid_images`, `val_images`, `x_valid` or
    `x_val`, and so on, their labels `train_labels` or `y_train`; all images at once `images` or `x`, or `arr_0`
    if there is nothing else, their labels `labels` or `y`. An .npy file holds images alone.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels: bytes, booleans, or floats in [0, 1], where
    NaN was never recorded; floats are rounded to bytes. Labels are classes, (N,) or (N, 1), text or whole numbers from
    0 on, or attributes, (N, A) with A > 1, that are 1, 0, or -1 where unknown. Classes other than 0, 1, ... are sorted,
    numbered in that order, and keep their names.

    Raises:
        ValueError: if it is no such file, holds no such arrays, or these do not fit together.
    """
    content = _opened(path)
    names = _names(list(content))
    if not names:
        raise ValueError(
            f"{path} holds {', '.join(content) or 'nothing'}: expected images called train_images and test_images (or "
            "x_train and x_test), perhaps valid_images, or all of them called images (or x); and labels, if there are "
            "any, train_labels (or y_train) and so on, or labels (or y)"
        )
    taken = [name for pair in names.values() for name in pair if name]
    arrays = {name: _array(content, name, path) for name in taken}
    pixels = {part: bytes_of(arrays[name], f"{path}: {name}") for part, (name, _) in names.items()}
    labels, label_names = labels_of({name: arrays[name] for _, name in names.values() if name}, path)
    for name, label in names.values():
        if label and len(labels[label]) != len(arrays[name]):
            raise ValueError(
                f"{path}: {label} holds {len(labels[label]):,} labels, {name} {len(arrays[name]):,} images"
            )
    labelled = {part: labels[label] for part, (_, label) in names.items() if label}
    parts = {part: Arrays(found, labelled.get(part), recorded) for part, (found, recorded) in pixels.items()}
    for part, (name, _) in names.items():
        check_part(parts[part], f"{path}: {name}", bytes_alone=arrays[name].dtype == np.uint8)
    others = [name for name in content if name not in taken]
    notes = [f"of {path} were not taken: {', '.join(others)}"] if others else []
    return Content(parts, label_names, "; ".join([*notes, *doubts(parts, path)]))


def doubts(parts: Mapping[str, Arrays], source: Path | str) -> Iterator[str]:
    """What may mean something else than it is taken for."""
    largest = max(int(part.pixels.max()) for part in parts.values())
    if largest < DARK:
        yield (
            f"{source} has no pixel above {largest} of 255, so that all is nearly black: is that meant? Floats become "
            "bytes, of which so few are left"
        )
    labels = [part.labels for part in parts.values() if part.labels is not None and part.labels.ndim > 1]
    if labels and all((of >= 0).all() and (of.sum(1) == 1).all() for of in labels):
        yield (
            f"{source}: its labels are taken as attributes, of which each image has exactly one: if they are classes, "
            "labels.argmax(1) makes them such"
        )


def _opened(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays in a file, by name; those of an .npz file are read when they are asked for."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"{path} {what}: point data.root at an .npz or .npy file of images")
    with path.open("rb") as file:
        if not file.read(6).startswith(MAGIC):
            raise ValueError(f"{path} is no .npz or .npy file: np.savez(path, images=..., labels=...) writes one")
    with _readable(f"{path} cannot be read"):
        content = np.load(path, allow_pickle=False)
    return {"images": content} if isinstance(content, np.ndarray) else content


def _array(content: Mapping[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    with _readable(f"{path}: {name} cannot be read"):
        array = content[name]
        if not isinstance(array, np.ndarray):
            raise ValueError("it is no array")
    return array


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Make what goes wrong while an array is read a ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # of NumPy, zipfile, zlib and whatever else unpacks it
        pickled = "pickle" in str(error)
        why = "it holds Python objects" if pickled else str(error)
        how = "save numbers or text, such as labels.astype(str)" if pickled else "write the file again"
        raise ValueError(f"{what} as a plain array ({why}): {how}") from None


def _names(given: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """The names of images and of their labels, by part; empty if no array has such a name."""

    def first(*names: str) -> str | None:
        return next((name for name in names if name in given), None)

    found: dict[str, tuple[str, str | None]] = {}
    for part, words in PART_WORDS.items():
        images = first(*(name for word in words for name in (f"{word}_images", f"x_{word}")))
        if images:
            found[part] = images, first(*(name for word in words for name in (f"{word}_labels", f"y_{word}")))
    if {"train", "test"} <= found.keys():
        return found
    images = first(*WHOLE, *(given if list(given) == [UNNAMED] else ()))
    return {"images": (images, first(*LABELS))} if images and not found else {}


def bytes_of(array: np.ndarray, what: str) -> tuple[Tensor, Tensor | None]:
    """Images as `read` takes them, as bytes (N, C, H, W), and which pixels were recorded, (N, H, W), None for all.

    Raises:
        ValueError: if they are no such images; it calls them `what`.
    """
    shape = array.shape
    if array.ndim == 4 and shape[1] in (1, 3) and shape[-1] in (1, 3):
        raise ValueError(
            f"{what} has the shape {shape}, which may be (N, C, H, W) or (N, H, W, C): give images that are not 1 or 3 "
            "pixels high or wide, or grey ones as (N, H, W)"
        )
    if array.ndim == 3 and shape[-1] not in (1, 3):  # else it is one image
        array = array[:, None]
    elif array.ndim == 4 and shape[-1] in (1, 3):
        array = np.moveaxis(array, -1, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
        raise ValueError(
            f"{what} has the shape {shape}: expected images (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 "
            "channels"
        )
    if array.dtype == np.bool_:
        return torch.from_numpy(array * np.uint8(255)), None
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array)), None
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{what} is of {array.dtype}: expected bytes (uint8), booleans, or floats in [0, 1]. If they are in 0..255 "
            "images.astype(np.uint8) makes bytes; divide others by the largest value that there may be"
        )
    return _bytes_of_floats(array, what)


def check_part(arrays: Arrays, what: str, bytes_alone: bool) -> None:
    """Raise a ValueError for images of which nothing was recorded, and for bytes none of which is above 1."""
    if arrays.recorded is not None and not arrays.recorded.any():
        raise ValueError(f"{what} holds nothing but NaN: no pixel was recorded")
    if bytes_alone and arrays.pixels.max() == 1:
        raise ValueError(
            f"{what} has no byte but 0 and 1, which would be black and all but black: images.astype(bool) makes "
            "images of 0 and 1, 255 * images bytes of them"
        )


def _bytes_of_floats(array: np.ndarray, what: str) -> tuple[Tensor, Tensor | None]:
    """Floats in [0, 1] rounded to bytes, and which pixels are numbers in all channels; None if all are."""
    known = ~np.isnan(array)
    low: float = array.min(where=known, initial=np.inf)
    high: float = array.max(where=known, initial=-np.inf)
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(
            f"{what} has values from {low:g} to {high:g}: expected floats in [0, 1], of which NaN was never recorded. "
            f"{_remedy(low, high)}"
        )
    recorded = known.all(1)
    # A part at a time: the numbers are several times as large as the bytes.
    pixels = torch.empty(array.shape, dtype=torch.uint8)
    for start in range(0, len(array), 1024):
        part = torch.from_numpy(np.ascontiguousarray(array[start : start + 1024], dtype=np.float32))
        pixels[start : start + 1024] = (part.nan_to_num(0).clamp_(0, 1) * 255).round_().to(torch.uint8)
    return pixels, None if recorded.all() else torch.from_numpy(recorded)


def _remedy(low: float, high: float) -> str:
    """Advice on how to bring floats from `low` to `high` into [0, 1]."""
    if low >= -NEAR and high <= 1 + NEAR:
        return "If they are but a little beyond, as after resizing, clip them: np.clip(x, 0, 1)"
    if low >= -1 - TOLERANCE and high <= 1 + TOLERANCE:
        return "If they are in [-1, 1], (x + 1) / 2 makes them"
    if low < 0 and high < FEW:
        return "If their mean was taken off, as by torchvision's Normalize, leave that out"
    return "Divide them by the largest value that there may be, such as 255"


def labels_of(arrays: Mapping[str, np.ndarray], source: Path | str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Labels by the names of their arrays, and the names of classes or attributes; see `read`.

    Raises:
        ValueError: if they are no labels, or not all of one kind.
    """
    if not arrays:
        return {}, ()
    columns = {name: array[:, 0] if array.shape[1:] == (1,) else array for name, array in arrays.items()}
    kinds = {"text" if array.dtype.kind in "SU" else array.dtype.kind in "biu" for array in columns.values()}
    shapes = {array.shape[1:] for array in columns.values()}
    if len(kinds) > 1 or False in kinds or len(shapes) > 1 or not all(0 < a.ndim < 3 for a in columns.values()):
        raise ValueError(
            f"{source}: expected labels all of one kind, classes (N,), whole numbers (labels.astype(int)) or text, or "
            "attributes (N, A) that are 1, 0 or -1, got "
            + ", ".join(f"{name} of {array.dtype} {array.shape}" for name, array in arrays.items())
        )
    return (_classes if shapes == {()} else _attributes)(columns, source)


def _classes(arrays: Mapping[str, np.ndarray], source: Path | str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Classes (N,), numbered alike in all arrays, and their names, unless these are just their numbers."""
    texts = {
        name: np.char.decode(a, "utf-8", "backslashreplace") if a.dtype.kind == "S" else a for name, a in arrays.items()
    }
    values, numbers = np.unique(np.concatenate(list(texts.values())), return_inverse=True)
    if values.dtype.kind == "i" and len(values) and values[0] < 0:
        raise ValueError(
            f"{source}: classes are numbered from 0 on, got {values[0]} in {', '.join(arrays)}: give a class of its "
            "own to images without one, or names in text to all"
        )
    several = torch.from_numpy(numbers.astype(np.int64)).split([len(array) for array in texts.values()])
    plain = values.dtype.kind in "iu" and np.array_equal(values, np.arange(len(values)))
    return dict(zip(texts, several, strict=True)), () if plain else tuple(map(str, values))


def _attributes(arrays: Mapping[str, np.ndarray], source: Path | str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Attributes (N, A), called by their numbers."""
    for name, array in arrays.items():
        if array.dtype.kind not in "biu" or not np.isin(array, (-1, 0, 1)).all():
            found = ", ".join(map(str, np.unique(array)[:5]))
            raise ValueError(
                f"{source}: {name} {array.shape} would be attributes, which are 1, 0, or -1 where it is not known, got "
                f"{found}; classes are (N,)"
            )
    values = np.unique(np.concatenate([array.ravel() for array in arrays.values()]))
    if not values.size or list(values) == [-1, 1]:
        raise ValueError(
            f"{source}: {', '.join(arrays)} would be attributes, which are 1, 0, or -1 where it is not known, and are "
            + ("of no image or none at all" if not values.size else "1 or not known here: write 0 for no")
        )
    several = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    return several, tuple(map(str, range(next(iter(several.values())).shape[1])))
