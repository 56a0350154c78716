"""Images of torch Datasets, such as torchvision's or your own: as bytes, with labels and with what was recorded.

N images, C channels, H x W pixels, A attributes.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from biglearn_vae import array_files, checks
from biglearn_vae.array_files import PART_WORDS, Arrays, Content
from biglearn_vae.distributed import global_generator
from biglearn_vae.image_files import first_line, plain

IMAGES, LABELS = ("image", "img", "images", "pixels", "x"), ("label", "labels", "y")  # in items that are mappings
CHUNK = 256  # images that are made bytes at a time
ASKED = 8  # items that are compared to find out whether two data sets are the same
_KINDS = {"b": "whole", "i": "whole", "u": "whole", "U": "text", "S": "text"}  # of labels, by those of NumPy
Fit = Callable[[Tensor, Tensor | None, str], Tensor]  # bytes (n, c, h, w), what was recorded, their name


def parts(make: Callable[..., Any], settings: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The data sets that a class or function makes, by part, "train" and others, or one as "images"; and a note.

    If it takes `train`, it is called with True and False; if it takes `split`, with the names that parts may have;
    otherwise once, and returns one data set, or a mapping from parts to such. If it takes `download`, it is given True.

    Args:
        make: such as torchvision.datasets.CIFAR10.
        settings: of the data; it is given `root` if it takes that, and of the others only those that it requires.
        own: other arguments, which may also replace `train`, `split` and `download`.

    Raises:
        ValueError: if it does not take them, or fails.
    """
    name, (takes, takes_any) = getattr(make, "__name__", str(make)), _takes(make)
    if other := [key for key in own if key not in takes and not takes_any]:
        raise ValueError(f"{name} takes {', '.join(takes) or 'nothing'}, not {', '.join(other)}")
    needed = {key for key, parameter in takes.items() if key == "root" or parameter.default is parameter.empty}
    given = {key: value for key, value in settings.items() if key in needed}
    given |= {**({"download": True} if "download" in takes else {}), **own}
    if "train" in takes and "train" not in own:
        found = {part: _called(make, name, **given, train=part == "train") for part in ("train", "test")}
        return found, _without_doubles(found, name)
    if "split" in takes and "split" not in own:
        return _by_split(make, name, given)
    made = _called(make, name, **given)
    if isinstance(made, list | tuple) and made and isinstance(made[0], Dataset):
        raise ValueError(
            f"{name} gives {len(made)} data sets: expected one, or a mapping of such by parts, train and test"
        )
    if not isinstance(made, Mapping):
        return {"images": made}, ""
    found = {part: made[word] for part, words in PART_WORDS.items() for word in words if word in made}
    if "train" not in found:
        raise ValueError(f"{name} gives {', '.join(map(str, made)) or 'nothing'}: expected train, and test or valid")
    rest = [str(word) for word in made if word not in sum(PART_WORDS.values(), ())]
    return found, f"of {name} were not taken: {', '.join(rest)}" if rest else ""


def _takes(make: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that a class or function takes, and whether it takes any others; if a class passes on **kwargs,
    including those of its base classes."""
    try:
        takes = dict(inspect.signature(make).parameters)
    except ValueError as error:
        raise ValueError(f"expected a class or a function that makes a torch Dataset, got {make}: {error}") from None
    bases: tuple[Any, ...] = make.__mro__[1:-1] if isinstance(make, type) else ()
    for kind in (kind for kind in bases if "__init__" in vars(kind)):
        if not _takes_any(takes):
            break
        own = {key: of for key, of in takes.items() if of.kind is not of.VAR_KEYWORD}
        takes = {key: of for key, of in inspect.signature(kind.__init__).parameters.items() if key != "self"} | own
    return takes, _takes_any(takes)


def _takes_any(takes: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Let what draws at random in here, as a split or a crop may, draw the same each time and in each process."""
    before = random.getstate(), np.random.get_state()
    with global_generator(torch.device("cpu"), seed):
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


# Exceptions that mean that there is no such part: its name is refused or, for validation, its file is missing.
_NO_PART: dict[str, tuple[type[Exception], ...]] = {"test": (ValueError, KeyError, AssertionError)}
_NO_PART["valid"] = (*_NO_PART["test"], FileNotFoundError)


def _called(make: Callable[..., Any], name: str, **given: Any) -> Any:
    try:
        return make(**given)
    except Exception as error:  # whatever one's own raises, and torchvision of files that are not there
        words = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"{name}({words}): {first_line(error)}") from error


def _by_split(make: Callable[..., Any], name: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The parts that exist, and a note on those that do not."""
    found: dict[str, Any] = {}
    lacking = []
    for part, words in PART_WORDS.items():
        for word in words:
            try:
                found[part] = _called(make, name, **given, split=word)
                break
            except ValueError as error:
                if not isinstance(error.__cause__, _NO_PART.get(part, ())):
                    raise
                problem = error
        else:
            lacking.append(f"{name} has no {part} part ({first_line(problem)}): training images are taken")
    return found, "; ".join(filter(None, (*lacking, _without_doubles(found, name))))


def _without_doubles(found: dict[str, Any], name: str) -> str:
    """Leave out parts that merely repeat another, as when a class ignores `split` or has an `else`; returns a note."""
    notes = []
    for part, other in (("test", "train"), ("valid", "train"), ("valid", "test")):
        if {part, other} <= found.keys() and _are_alike(found[part], found[other]):
            del found[part]
            notes.append(f"{name} gives its {other} part for {part}, too: training images are taken")
    return "; ".join(notes)


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two data sets have equally many items, and those that are compared are the same images."""
    try:
        count = len(one)
        if count != len(other):
            return False
        for i in {count * k // ASKED for k in range(ASKED)} if count else ():
            images = []
            for dataset in (one, other):
                with repeatable(i):  # what is drawn at random is the same for both
                    images.append(_array(_image_and_label(dataset[i])[0]))
            if not np.array_equal(images[0], images[1], equal_nan=images[0].dtype.kind == "f"):
                return False
        return count > 0
    except Exception:  # whatever one's own raises: reading them tells
        return False


def read(datasets: Mapping[str, Any], source: str, fit: Fit) -> Content:
    """The images and labels of data sets, by part.

    An item is an image, a tuple of an image and a label, or a mapping that holds them as "image" and "label". Images
    are PIL's, of any size and mode, or arrays or tensors (H, W), (H, W, C) or (C, H, W): bytes, booleans, or floats in
    [0, 1] where NaN was never recorded. Labels are as in `array_files.read`; others are left out, with a note.

    Args:
        datasets: each with a length and items by number.
        source: their name in messages.
        fit: brings images to one size.

    Raises:
        ValueError: if they are no such data sets, are empty, or an item cannot be read.
    """
    arrays, raw = {}, {}
    for part, dataset in datasets.items():
        arrays[part], raw[part] = _part(dataset, source if part == "images" else f"{source}, {part}", fit)
    labels, names, note = _labels(raw, source, {part: _classes(dataset) for part, dataset in datasets.items()})
    found = {part: Arrays(of.pixels, labels.get(part), of.recorded) for part, of in arrays.items()}
    return Content(found, names, "; ".join(filter(None, (note, *array_files.doubts(found, source)))))


def _part(dataset: Any, what: str, fit: Fit) -> tuple[Arrays, list[Any]]:
    """The images, and their labels as they came."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{what}: expected a data set with a length and items by number, as torch.utils.data.Dataset, got "
            f"{checks.described(dataset)}"
        )
    if not len(dataset):
        raise ValueError(f"{what}: expected at least one image, got none")
    pixels, recorded, labels, kinds = [], [], [], set()
    for images, some in _chunks(dataset, what):
        labels += some
        for array in images:
            found, known = array_files.bytes_of(array, what)
            pixels.append(fit(found, known, what))
            recorded.append(known)
            kinds.add(array.dtype)
    whole = Arrays(_joined(pixels, what), None, _all_recorded(pixels, recorded))
    array_files.check_part(whole, what, bytes_alone=kinds == {np.dtype(np.uint8)})
    return whole, labels


def _chunks(dataset: Any, what: str) -> Iterator[tuple[list[np.ndarray], list[Any]]]:
    """A chunk of images at a time, as one array if all have one size and type, else as one each; and their labels."""
    from tqdm import tqdm

    images, labels = [], []
    for i in tqdm(range(len(dataset)), desc=f"reading {what}", delay=5, leave=False, disable=None):
        try:
            image, label = _image_and_label(dataset[i])
            images.append(_array(image))
        except Exception as error:  # whatever one's own raises
            raise ValueError(f"{what}: item {i} cannot be read: {first_line(error)}") from error
        labels.append(label)
        if len(images) == CHUNK or i == len(dataset) - 1:
            alike = len({(image.shape, image.dtype) for image in images}) == 1
            yield [np.stack(images)] if alike else [image[None] for image in images], labels
            images, labels = [], []


def _image_and_label(item: Any) -> tuple[Any, Any]:
    """The image and the label of an item; None for a label that it does not have."""
    if isinstance(item, Mapping):
        image, label = (next((name for name in names if name in item), None) for names in (IMAGES, LABELS))
        if image is None:
            raise ValueError(f"it holds {', '.join(map(str, item))}: expected an image called image, and perhaps label")
        return item[image], item.get(label)
    if isinstance(item, tuple | list):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _array(image: Any) -> np.ndarray:
    """An image as an array of whatever shape it has, a PIL image as bytes (H, W, C)."""
    if hasattr(image, "convert"):
        image = plain(image)
        grey = image.mode in ("1", "L")
        return np.array(image.convert("L" if grey else "RGB")).reshape(*image.size[::-1], 1 if grey else 3)
    if not hasattr(image, "__array__"):
        raise ValueError(f"expected a PIL image, an array or a tensor, got {checks.described(image)}")
    return np.asarray(image)


def _joined(parts: Sequence[Tensor], what: str) -> Tensor:
    """Images of one size (N, C, H, W); equal channels that are views of one stay so."""
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise ValueError(
            f"{what} has images of several shapes, such as {shapes[0]} and {shapes[-1]}: give image_size= and channels="
        )
    if any(part.stride(1) for part in parts):
        return torch.cat(list(parts))
    return torch.cat([part[:, :1] for part in parts]).expand(-1, shapes[0][0], -1, -1)


def _all_recorded(pixels: Sequence[Tensor], recorded: Sequence[Tensor | None]) -> Tensor | None:
    """What was recorded (N, H, W) of the parts of images of one size; None if all was."""
    if all(known is None for known in recorded):
        return None
    whole = (torch.ones(len(part), *part.shape[2:], dtype=torch.bool) for part in pixels)
    return torch.cat([every if known is None else known for every, known in zip(whole, recorded, strict=True)])


def _classes(dataset: Any) -> tuple[str, ...]:
    """What torchvision's and Hugging Face's data sets, and others like them, call their classes, also of a Subset."""
    features, names = getattr(dataset, "features", None), getattr(dataset, "classes", None)
    if isinstance(features, Mapping):
        names = next((getattr(features[name], "names", None) for name in LABELS if name in features), names)
    if names is None and isinstance(dataset, Subset):
        return _classes(dataset.dataset)
    return tuple(names) if isinstance(names, list | tuple) and all(isinstance(n, str) for n in names) else ()


def _labels(
    raw: Mapping[str, list[Any]], source: str, classes: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """Labels by part, names of classes or attributes, and why labels were not taken; all empty if there are none."""
    raw = {part: labels for part, labels in raw.items() if any(label is not None for label in labels)}
    names = [classes[part] for part in raw]
    try:
        arrays = {part: _label_array(labels) for part, labels in raw.items()}
        numbered = all(array.ndim == 1 and array.dtype == np.int64 for array in arrays.values())
        if numbered and all(names) and len(set(names)) > 1:  # in each part by itself: by their names they are the same
            arrays = {part: _named(array, own) for (part, array), own in zip(arrays.items(), names, strict=True)}
        labels, found = array_files.labels_of(arrays, source)
    except (ValueError, TypeError) as error:  # of labels that are no numbers, or of no one shape
        return {}, (), f"labels of {source} were not taken: {first_line(error)}"
    numbers = np.concatenate(list(arrays.values())) if arrays else np.empty(0)
    if numbers.ndim == 1 and numbers.dtype.kind in "iu" and numbers.max() < len(names[0]):
        return {part: torch.from_numpy(array.astype(np.int64)) for part, array in arrays.items()}, names[0], ""
    return labels, found, ""


def _named(numbers: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """The names of classes (N,) of their numbers."""
    if wrong := [number for number in np.unique(numbers) if not 0 <= number < len(classes)]:
        raise ValueError(f"expected numbers of {len(classes)} classes, got {wrong[0]}")
    return np.array(classes)[numbers]


def _label_array(labels: Sequence[Any]) -> np.ndarray:
    """Labels of one kind as an array, whole numbers as int64; of numbers and text together NumPy would make text."""
    arrays = [np.asarray(label) for label in labels]
    kinds = {_KINDS.get(array.dtype.kind, array.dtype.kind): label for array, label in zip(arrays, labels, strict=True)}
    if len(kinds) > 1:
        raise ValueError(f"expected labels of one kind, got {' and '.join(map(repr, kinds.values()))}")
    whole = "whole" in kinds and all(array.dtype != np.bool_ for array in arrays)
    return np.array(arrays, dtype=np.int64 if whole else None)
