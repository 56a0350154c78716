"""Image files decoded by several threads, into memory or into a cache folder that is mapped into memory.

N files, C channels, H x W pixels. A cache folder holds

    pixels.u8      the images, uint8 (n, C, H, W), those that can be read, one after the other
    index.json     what they were made of; written last, so that without it they count as half-made
    progress.json  the same while they are being made, and how far that is
    lock           who is making them
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from biglearn_vae import checks
from biglearn_vae.files import locked, to_disk, write_json

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".tga"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
FOREIGN = frozenset({".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".exr"})  # images, but none that are read
PIXELS, INDEX, PROGRESS = "pixels.u8", "index.json", "progress.json"
FORMAT = 2  # version of the cache and of what `decode` makes of a file; caches of other versions are not used
CHUNK_BYTES, CHUNK_FILES = 2**24, 1024  # at most so many bytes of pixels and files between two writes of progress.json


Stat = tuple[int, int]  # of a file: bytes, and when it was changed, in nanoseconds


@dataclass(frozen=True)
class Files:
    """Image files under one folder.

    Attributes:
        root: the folder.
        stats: the `Stat` of each file by its name below the folder, with "/" between folders, in the images' order.
    """

    root: Path
    stats: dict[str, Stat]

    def __len__(self) -> int:
        return len(self.stats)

    def digest(self) -> str:
        """A short digest of all names, sizes and times, in their order."""
        listed = "\n".join(f"{name}\t{size}\t{time}" for name, (size, time) in self.stats.items())
        return hashlib.blake2b(os.fsencode(listed), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """What a file becomes: the image, cropped at its centre to the proportions of `size` and resized.

    Attributes:
        size: side in pixels after resizing, or height and width.
        channels: C, 1 (grey) or 3.
        crop: side in pixels of a centred square that is cut out before all else. None cuts out no such square, nor is
            one cut out of an image smaller than the crop.
    """

    size: int | Sequence[int]
    channels: int
    crop: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, *checks.height_and_width("size", self.size)

    @property
    def words(self) -> str:
        """Height and width."""
        return f"{self.shape[1]} x {self.shape[2]}"

    @property
    def bytes(self) -> int:
        """The bytes of one image."""
        return math.prod(self.shape)

    @property
    def chunk(self) -> int:
        """How many files are decoded between two writes of progress.json."""
        return max(1, min(CHUNK_FILES, CHUNK_BYTES // self.bytes))


@dataclass(frozen=True, eq=False)
class Decoded:
    """The images of all files that could be read, in the order of the files.

    Attributes:
        pixels: uint8 (n, C, H, W).
        names: of the files, n of them.
        note: how many and which could not be read and why, empty if all could.
    """

    pixels: Tensor
    names: list[str]
    note: str


def scan(root: Path, deep: bool = False) -> dict[str, Stat]:
    """The files in a folder by name, in no order; with `deep` those in subfolders too.

    Links to files count as files and links to folders as folders, except a link to a folder that it lies in itself;
    broken links count as files that cannot be read. Subfolders without permission to read are skipped, with a warning.
    """
    stats: dict[str, Stat] = {}
    folders: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]  # each with those that it lies in
    while folders:
        prefix, above = folders.pop()
        try:
            entries = list(os.scandir(root / prefix))
        except PermissionError:
            if not prefix:
                raise
            checks.warn(f"the folder {root / prefix} may not be read: its files are left out")
            continue
        inside = {entry.name: os.path.realpath(entry.path) for entry in entries if deep and _is_folder(entry)}
        folders += [(f"{prefix}{name}/", (*above, path)) for name, path in inside.items() if path not in above]
        stats |= {prefix + entry.name: stat for entry in entries if (stat := _stat(entry)) is not None}
    return stats


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stat(entry: os.DirEntry) -> Stat | None:
    """Of a file; None for what is none."""
    try:
        found = entry.stat()
        return (found.st_size, found.st_mtime_ns) if entry.is_file() else None
    except OSError:  # a link to nothing or to itself
        return (0, 0)


def is_image(name: str) -> bool:
    """Whether a file's name ends like that of an image."""
    return _suffix(name) in SUFFIXES


def is_foreign(name: str) -> bool:
    """Whether it ends like that of an image of a kind that is not read."""
    return _suffix(name) in FOREIGN


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def read(files: Files, recipe: Recipe, cache: str | Path | None = None, kind: str = "images") -> Decoded:
    """Decode files by several threads; those that cannot be read are named in a warning and skipped.

    Args:
        files: in the order in which their images are wanted.
        recipe: what becomes of each.
        cache: None decodes into memory. A folder keeps the images of these files and this recipe in a subfolder of
            its own; later calls map them into memory from there without opening the image files. An interrupted call
            is continued by the next; while one process writes there, others wait for it. If files were added or
            removed, or changed in size or time, the images are made again, with a warning.
        kind: of data, for the name of the subfolder.

    Raises:
        ValueError: if there is not enough memory; if the cache cannot be written, is damaged, or was made of another
            folder or by another recipe.
    """
    if not files:
        return Decoded(torch.empty(0, *recipe.shape, dtype=torch.uint8), [], "")
    if cache is None:
        pixels, broken = _into_memory(files, recipe)
    else:
        pixels, broken, folder = _from_cache(files, recipe, Path(cache).expanduser(), kind)
    note = _note(files, broken)
    if note:
        if cache is not None:
            note += f" (so it was when {folder} was made; delete it to have them read again)"
        checks.warn(note)
    return Decoded(pixels, [name for name in files.stats if name not in broken], note)


def _note(files: Files, broken: dict[str, str]) -> str:
    if not broken:
        return ""
    named = [f"{files.root / name} ({broken[name]})" for name in sorted(broken)[:5]]
    note = f"{len(broken):,} of {len(files):,} image files could not be read and were skipped: "
    return note + "; ".join(named) + (" ..." if len(broken) > 5 else "")


def _into_memory(files: Files, recipe: Recipe) -> tuple[Tensor, dict[str, str]]:
    """The pixels, and why each of the others cannot be read."""
    try:
        pixels = torch.empty(len(files), *recipe.shape, dtype=torch.uint8)
    except RuntimeError:
        size = _size_text(len(files) * recipe.bytes)
        raise ValueError(
            f"{len(files):,} images of {recipe.words} pixels need {size} of memory, which cannot be "
            "had: give data.cache=FOLDER to keep them in files there, or a smaller data.image_size"
        ) from None
    broken: dict[str, str] = {}
    row = 0
    for results in _decoded(files, recipe):
        for name, result in results.items():
            if isinstance(result, str):
                broken[name] = result
            else:
                pixels[row] = result
                row += 1
    return pixels[:row], broken


def _decoded(files: Files, recipe: Recipe, start: int = 0) -> Iterator[dict[str, Tensor | str]]:
    """What `decode` makes of each file, by name, a chunk of files at a time, from the file `start` on."""
    from tqdm import tqdm

    names = list(files.stats)
    few = len(files) - start < 1000
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(files), initial=start, desc="reading images", disable=few, leave=False) as bar,
    ):
        for first in range(start, len(files), recipe.chunk):
            chunk, results = names[first : first + recipe.chunk], {}
            decoded = pool.map(lambda name: decode(files.root / name, recipe), chunk)
            for name, result in zip(chunk, decoded, strict=True):
                results[name] = result
                bar.update()
            yield results


def decode(path: Path, recipe: Recipe) -> Tensor | str:
    """A file as uint8 (C, H, W), or in words why it cannot be read. Transparent images are laid on white."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as file:
            image = plain(file).convert("L" if recipe.channels == 1 else "RGB")
        if recipe.crop is not None and recipe.crop <= min(image.size):
            left, top = ((side - recipe.crop) // 2 for side in image.size)
            image = image.crop((left, top, left + recipe.crop, top + recipe.crop))
        return pil_to_tensor(ImageOps.fit(image, recipe.shape[:0:-1], Image.Resampling.BICUBIC))
    except Exception as error:  # on a damaged file each decoder raises what it likes
        return first_line(error)


def plain(file: "Image.Image") -> "Image.Image":
    """An image of any mode in 8 bits, turned upright, transparent ones laid on white.

    Raises:
        ValueError: if its numbers are in no known range.
    """
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(file)
    except Exception:  # what would say how it is turned is damaged, which the image need not be
        image = file.copy()
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, sixteen=file.format == "PPM")  # which Pillow scales so
    if image.mode in ("La", "RGBa"):  # multiplied by it
        image = image.convert(image.mode.upper())
    if "A" in image.mode or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def _eight_bits(image: "Image.Image", sixteen: bool) -> "Image.Image":
    """A grey image of 16 or 32 bits or of floats, in 8 bits; convert() would clip it.

    16 bits are 0..65535; 32 bits are, too, if they are `sixteen` for sure or one is above 255, else 0..255; floats are
    0..255 if one is above 2, else [0, 1], and a little beyond is clipped.

    Raises:
        ValueError: if they are none of these.
    """
    numbers = np.asarray(image)
    smallest, largest = numbers.min(), numbers.max()
    if not -1 <= smallest <= largest <= (256 if image.mode == "F" else 65535):  # NaN is in no range
        raise ValueError(f"numbers from {smallest:g} to {largest:g}, neither in [0, 1] nor of 8 or 16 bits")
    if image.mode.startswith("I"):
        peak = 65535 if sixteen or image.mode != "I" or largest > 255 else 255
    else:
        peak = 255 if largest > 2 else 1
    return image.convert("F").point(lambda value: value * (255 / peak) + 0.5).convert("L")


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --- The cache ---


@dataclass(frozen=True)
class _State:
    """What a cache was made of and how far it is: the content of index.json and progress.json.

    Attributes:
        settings: the recipe, and the folder of the files.
        digest: of the files' names, sizes and times.
        files: how many they are.
        done: how many of them, from the first, are in the cache or broken.
        broken: why files cannot be read, by their names.
    """

    settings: dict[str, Any]
    digest: str
    files: int
    done: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.done - len(self.broken)

    @classmethod
    def load(cls, path: Path) -> "_State | None":
        """From a file; None if there is none.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            state = cls(**json.loads(path.read_text("utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError):
            raise ValueError("it cannot be read") from None
        kinds = {"settings": dict, "digest": str, "files": int, "done": int, "broken": dict}
        right = all(isinstance(getattr(state, name), kind) for name, kind in kinds.items())
        if not right or not len(state.broken) <= state.done <= state.files:
            raise ValueError("it holds something else")
        return state


def _from_cache(files: Files, recipe: Recipe, cache: Path, kind: str) -> tuple[Tensor, dict[str, str], Path]:
    """The mapped pixels, why each of the others cannot be read, and the folder."""
    source = str(files.root.resolve())
    settings = {"format": FORMAT, "kind": kind, "source": source} | asdict(recipe)
    if not isinstance(recipe.size, int):
        settings["size"] = list(recipe.size)  # as JSON gives it back
    crop = "" if recipe.crop is None else f"-crop{recipe.crop}"
    digest = hashlib.blake2b(os.fsencode(repr(settings)), digest_size=5).hexdigest()
    size = recipe.size if isinstance(recipe.size, int) else recipe.words.replace(" ", "")
    folder = cache / f"{kind}-{size}{crop}-{digest}"
    wanted = _State(settings, files.digest(), len(files))
    state = _index(folder, wanted, recipe)
    if state is None or state.digest != wanted.digest:
        with _written(folder), locked(folder):
            state = _index(folder, wanted, recipe)  # another process may have made it
            if state is None or state.digest != wanted.digest:
                state = _build(folder, files, recipe, wanted, state)
    return _mapped(folder / PIXELS, state.images, recipe), state.broken, folder


def _mapped(path: Path, images: int, recipe: Recipe) -> Tensor:
    """The pixels in a file, read when they are used; what is written to them changes this process's copy alone."""
    if not images:
        return torch.empty(0, *recipe.shape, dtype=torch.uint8)
    try:
        pixels = torch.from_file(str(path), shared=False, size=images * recipe.bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise ValueError(
            f"{path} cannot be mapped into memory ({first_line(error)}). Linux may refuse more than there is memory: "
            "allow it with sysctl vm.overcommit_memory=1, or give a smaller data.image_size."
        ) from None
    return pixels.view(images, *recipe.shape)


def _index(folder: Path, wanted: _State, recipe: Recipe) -> _State | None:
    """What a complete cache was made of, whether of these files or others; None if there is none.

    Raises:
        ValueError: if it is damaged or of other settings.
    """
    try:
        state = _State.load(folder / INDEX)
    except ValueError as error:
        raise ValueError(_useless(folder, f"its {INDEX} is damaged: {error}")) from None
    if state is None:
        return None
    keys = sorted(wanted.settings.keys() | state.settings.keys())
    changed = [
        f"its {key} is {state.settings.get(key)!r}, not {wanted.settings.get(key)!r}"
        for key in keys
        if state.settings.get(key) != wanted.settings.get(key)
    ]
    expected = state.images * recipe.bytes
    size = (folder / PIXELS).stat().st_size if (folder / PIXELS).is_file() else None
    if changed:
        raise ValueError(_useless(folder, "; ".join(changed)))
    if state.done != state.files:
        raise ValueError(_useless(folder, f"its {INDEX} is damaged: {state.done} of {state.files} files"))
    if size != expected:
        found = "is not there" if size is None else f"has {size:,} bytes"
        raise ValueError(_useless(folder, f"its {PIXELS} {found}, {expected:,} bytes were expected"))
    return state


def _useless(folder: Path, why: str) -> str:
    return f"the cache {folder} cannot be used: {why}. Delete that folder, or give data.cache=FOLDER for another place."


def _build(folder: Path, files: Files, recipe: Recipe, wanted: _State, outdated: _State | None) -> _State:
    """Fill a cache, from where an interrupted process left it; returns what index.json then says."""
    if outdated is not None:
        counts = f"{outdated.files:,} files then, {wanted.files:,} now"
        what = counts if outdated.files != wanted.files else "other names, sizes, times or order"
        checks.warn(f"{folder} was made of other images ({what}) and is made again")
    state = _progress(folder, wanted, recipe)
    missing = (len(files) - state.done) * recipe.bytes
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise OSError(f"{_size_text(missing)} are needed and {_size_text(free)} are free")
    with (folder / PIXELS).open("r+b" if state.done else "wb") as out:
        out.truncate(state.images * recipe.bytes)  # a chunk that was cut short is done again
        out.seek(0, os.SEEK_END)
        for results in _decoded(files, recipe, state.done):
            broken = {name: why for name, why in results.items() if isinstance(why, str)}
            if images := [image for image in results.values() if not isinstance(image, str)]:
                out.write(torch.stack(images).numpy().data)
                to_disk(out)
            state = replace(state, done=state.done + len(results), broken=state.broken | broken)
            write_json(folder / PROGRESS, asdict(state))
    write_json(folder / INDEX, asdict(state))
    (folder / PROGRESS).unlink()
    return state


def _progress(folder: Path, wanted: _State, recipe: Recipe) -> _State:
    """How far an interrupted process came with the same files; what is left of other files is removed."""
    try:
        state = _State.load(folder / PROGRESS)
    except ValueError:
        state = None
    if (
        state is not None
        and replace(state, done=0, broken={}) == wanted
        and (folder / PIXELS).is_file()
        and (folder / PIXELS).stat().st_size >= state.images * recipe.bytes
    ):
        return state
    # The pixels are removed and not overwritten, since another process may have them mapped; the index goes first, so
    # that what is left by a process that is killed here counts as half-made.
    for name in (INDEX, PROGRESS, PIXELS):
        (folder / name).unlink(missing_ok=True)
    return wanted


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Make a folder; an OSError while files in it are written becomes a ValueError that says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(
            f"the cache {folder} cannot be written ({error.strerror or error}): make room or give data.cache=FOLDER "
            "for another place. The same command then goes on from what is there."
        ) from None


def _size_text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
