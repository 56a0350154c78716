"""Checks of arguments: a ValueError says what was expected and what came, before something fails deep inside."""

import operator
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST = 2**63 - 1  # torch counts no further


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of any type, such as NumPy's, as an int; a ValueError if it is none, or if it is a count, with a
    `least`, and below that or above `MOST`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if least is not None and number > MOST:
        raise ValueError(f"{name} must be below 2^63, got {value}")
    return number


def whole_numbers(values: Any, least: int) -> list[int]:
    """Whole numbers not below `least` as ints; an empty list for anything else, which the caller then refuses."""
    try:
        return [whole_number("each", value, least) for value in values]
    except (TypeError, ValueError):
        return []


def several(name: str, values: Any, least: int = 1) -> list[Any]:
    """A list of what a sequence, an array or a tensor holds; a ValueError for anything else, and for too few."""
    try:
        found = None if isinstance(values, str | Mapping) else list(values)
    except TypeError:
        found = None
    if found is None or len(found) < least:
        raise ValueError(f"{name} must be a list{' of at least one' * bool(least)}, got {values!r:.200}")
    return found


def path(name: str, value: Any) -> Path:
    """A path given as a text or as one; a ValueError for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name} must be a path, got {value!r:.80}")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # there is no such user
        raise ValueError(f"{name}={value}: {error}") from None


def height_and_width(name: str, size: Any) -> tuple[int, int]:
    """Height and width of one whole number for both, or of two; a ValueError if it is neither."""
    sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"{name} must be one whole number or two, height and width, got {size!r}")
    height, width = (whole_number(name, side) for side in sides)
    return height, width


def real_number(name: str, value: Any, interval: str, hint: str = "") -> float:
    """A number of any type as a float; a ValueError unless it is one in an interval, such as "[0, 1)" or "(0, inf)"."""
    if not _is_within(value, interval):
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}{hint}")
    return float(value)


def real_numbers(name: str, values: Any, count: int, interval: str, hint: str = "") -> list[float]:
    """Numbers as floats; a ValueError unless they are a sequence of so many, each in an interval."""
    shown = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else None
    if shown is None or len(shown) != count or not all(_is_within(value, interval) for value in shown):
        given = values if shown is None else shown
        raise ValueError(f"{name} must be {count} numbers in {interval}, got {given!r}{hint}")
    return [float(value) for value in shown]


def _is_within(value: Any, interval: str) -> bool:
    if isinstance(value, str | bool):
        return False
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last by a tensor of several numbers
        return False
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= number if interval[0] == "[" else low < number
    below = number <= high if interval[-1] == "]" else number < high
    return above and below  # NaN is neither


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise a ValueError unless a setting is one of these."""
    if getattr(value, "ndim", 0) or value not in choices:  # an array is compared number by number
        allowed = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_seed(seed: int | None) -> None:
    """Raise a ValueError unless torch takes this as a seed, or there is none."""
    if seed is not None and not -(2**63) <= whole_number("seed", seed) < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")


def seed_or_drawn(seed: int | None) -> int:
    """This seed or, for None, one drawn from torch's global generator, so that `torch.manual_seed` determines it."""
    check_seed(seed)
    return int(torch.randint(2**63 - 1, ())) if seed is None else int(seed)


def check_grid(grid: Iterable[int]) -> tuple[int, int]:
    """Rows and columns of patches; a ValueError unless they are two numbers from 1 on."""
    numbers = whole_numbers(grid, 1)
    if len(numbers) != 2:
        raise ValueError(f"grid must be two numbers, rows and columns of tokens, each at least 1, got {grid}")
    return numbers[0], numbers[1]


# Images have values in [0, 1]: means of Gaussians, noise and changes lead out of that by little, those in 0..255 that
# were not divided by 255 (or in 0..16 by 16) by more than this.
PIXEL_LIMIT = 10.0
# More than this share of pixels below this is warned of: as in images in [-1, 1], and not those with noise.
NEGATIVE, NEGATIVE_SHARE = -0.25, 0.25


def check_pixels(images: Tensor, where: str = "") -> None:
    """Raise a ValueError for images of which a pixel is beyond PIXEL_LIMIT, and warn of those that seem to be in
    [-1, 1]; pixels that are NaN, never recorded or not observed, do not count."""
    counts = ~images.isnan()
    negative = (images < NEGATIVE).sum() > NEGATIVE_SHARE * counts.sum()
    refused, negative = torch.stack([(images.abs() > PIXEL_LIMIT).any(), negative]).tolist()  # waits for a GPU once
    if refused:
        low, high = images[counts].aminmax()
        raise ValueError(
            f"expected images with values in [0, 1], got values from {low:g} to {high:g}{where}: "
            "divide those in 0..255 by 255, x / 255"
        )
    if negative:
        warn("many pixels are far below 0: if they are in [-1, 1], (x + 1) / 2 is in [0, 1]")


def warn(message: str) -> None:
    """Warn at the line outside of this package and of torch that led here, once for each such line."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("biglearn_vae", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def in_floats(images: Tensor) -> Tensor:
    """Images as they are, but for bytes, which are divided by 255."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def is_numbers(value: Any) -> bool:
    """Whether it is a tensor of real numbers."""
    return isinstance(value, Tensor) and not (value.is_complex() or value.dtype == torch.bool)


def is_mask(value: Any) -> bool:
    """Whether it is a boolean tensor."""
    return isinstance(value, Tensor) and value.dtype == torch.bool


def described(value: Any) -> str:
    """What was given, for messages: type and shape of a tensor, else what it is instead of one."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    array = hasattr(value, "__array__") or isinstance(value, list | tuple)
    return f"{type(value).__name__}{': torch.as_tensor(...) makes a tensor of it' if array else ''}"
