"""Files that at every moment are the old ones or the new ones, whole."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what then takes the place of `path`; if writing fails, `path` stays as it is."""
    partial = path.with_suffix(".partial")
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
        partial.write_text(text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file of what JSON can hold."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def to_disk(file: BinaryIO | TextIO) -> None:
    """Wait until an open file is on the disk, so that what is written later never tells of what a crash has lost."""
    file.flush()
    os.fsync(file.fileno())
