"""Files that are at every moment wholly the old or wholly the new one, and folders that one process alone writes to."""

import errno
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO


@contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[Path]:
    """A path to write to; that file then replaces `path`, which stays as it is if writing fails.

    Args:
        alone: whether no other process writes this file. Then what a killed process left half-written is overwritten.
    """
    partial = path.with_suffix(".partial") if alone else path.with_suffix(f".{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            to_disk(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A text file."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file of what JSON can hold, and of NaN and infinity, as Python writes and reads them."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What a file of `write_json` holds; an empty dict if it is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def to_disk(file: BinaryIO | TextIO) -> None:
    """Wait until an open file is on the disk, so that what is written later never tells of what a crash has lost."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def followed(folder: Path) -> Iterator[Callable[[], bool]]:
    """A function that says whether a folder is still the same one: not deleted, nor made anew by somebody else."""
    try:
        opened = os.open(folder, os.O_RDONLY)  # while it is, no other folder can get its number
    except OSError:  # Windows opens no folders
        yield folder.is_dir
        return
    try:
        own = os.fstat(opened)
        yield lambda: folder.is_dir() and os.path.samestat(own, folder.stat())
    finally:
        os.close(opened)


class Busy(ValueError):
    """Another process is doing what this one was to do, and only one can."""


LOCK = "lock"  # the file in a folder that says who writes into it
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what file systems without them answer


@contextmanager
def locked(folder: Path, busy: str | None = None) -> Iterator[None]:
    """Be the only process that writes into a folder; the kernel takes the lock from a process that ends.

    Where there are no such locks (Windows, some network file systems), nothing is locked; the latter cause a warning.

    Args:
        folder: one that exists.
        busy: what to say, behind its name, of another process that holds the lock; by default this one waits for it.

    Raises:
        Busy: with these words, if `busy` is given and another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if busy is not None:
                raise Busy(f"{holder} {busy}") from None
            warnings.warn(f"waiting for {holder}, which is making {folder}", stacklevel=3)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(f"{folder} cannot be locked here: let no other process write into it", stacklevel=3)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether another process writes into a folder, as far as can be told."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with locked(folder, "writes there"):
            return False
    except Busy:
        return True
    except OSError:  # it may be read alone
        return False
