"""Checkpoints: tensors and readable settings in one file, written atomically, loaded without running code."""

import errno
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from biglearn_vae import checks
from biglearn_vae.files import replacing

LATEST, PREVIOUS, BEST = "latest.pt", "previous.pt", "best.pt"
FRESH = "fresh.pt"  # exists for a moment, until it takes the place of the latest
RESUMABLE = (FRESH, LATEST, PREVIOUS)  # from the newest on
DIGEST_SIZE = 32  # bytes behind the archive of each file


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that at every moment `path` is either the old one or the new one, whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, alone=True) as partial, partial.open("wb") as file:
            torch.save(plain(state), file)
            file.flush()
            file.write(_digest(partial))
    except (OSError, RuntimeError) as error:  # on a full disk torch raises the second
        full = getattr(error, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT)
        why = str(error).splitlines()[0]
        raise OSError(f"could not write {path}{', is the disk full?' if full else ''} ({why})") from error


def plain(state: Any) -> Any:
    """The same with numbers and words of Python's own in place of NumPy's, which no checkpoint could be read with."""
    if type(state) is dict:  # weights, in an OrderedDict, are tensors
        return {plain(key): plain(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(plain, state))
    return state.item() if isinstance(state, np.generic) else state


def check_metadata(metadata: dict[str, Any]) -> None:
    """Raise a ValueError for metadata with which a checkpoint could not be read back."""
    for name, value in metadata.items():
        file = io.BytesIO()
        try:
            torch.save(value, file)
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        except Exception:  # a pickle can raise anything
            raise ValueError(
                f"metadata must be tensors, numbers, words, lists and dictionaries of these, for a checkpoint to hold "
                f"them: {name!r} is {value!r:.100} ({type(value).__name__})"
            ) from None


def _digest(path: Path, without: int = 0) -> bytes:
    """Digest of a file but for its last `without` bytes. torch.load misses changed bytes, and ignores what follows."""
    digest, left = hashlib.blake2b(digest_size=DIGEST_SIZE), path.stat().st_size - without
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 2**24))):
            digest.update(part)
            left -= len(part)
    return digest.digest()


def save_latest(folder: Path, state: dict[str, Any]) -> None:
    """Write `latest.pt`, keeping the one before as `previous.pt`."""
    latest, fresh = folder / LATEST, folder / FRESH
    save(fresh, state)
    if latest.exists():
        latest.replace(folder / PREVIOUS)
    fresh.replace(latest)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU.

    Raises:
        ValueError: if the file is missing, truncated or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - DIGEST_SIZE))
            if file.read() != _digest(path, DIGEST_SIZE):
                raise ValueError("it is truncated or damaged, or was not written by this library")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # no permission, say: nothing is wrong with the file
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from None


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, without reading its tensors; None if it is not there or cannot be read."""
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # a damaged pickle can raise anything
        return None
    return step if isinstance(step, int) else None


def steps_in(folder: Path) -> int:
    """The step of the newest checkpoint to resume from; 0 if there is none that can be read."""
    return max(step_of(folder / name) or 0 for name in RESUMABLE)


def is_resumable(folder: Path) -> bool:
    """Whether the folder has a checkpoint to resume from."""
    return any((folder / name).exists() for name in RESUMABLE)


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint to resume from, or None if there is none.

    If newer ones cannot be read, a warning names the first of them.

    Raises:
        ValueError: if there are such files, but none can be read.
    """
    problems = []
    for name in RESUMABLE:
        if not (folder / name).exists():
            continue
        try:
            state = load(folder / name)
            if "optimizers" not in state:
                raise ValueError(f"{folder / name} is not a checkpoint to go on from")
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            checks.warn(f"{problems[0]}; going on from {name}, step {state['step']}")
        return state
    if problems:
        kept = f"; {folder / BEST} is the best model so far" if (folder / BEST).exists() else ""
        raise ValueError(f"{'; '.join(problems)}. Delete {run_of(folder)} to start anew{kept}")
    return None


def run_of(folder: Path) -> Path:
    """The folder of a run, from that of its checkpoints; scripts/train.py keeps these in a subfolder, `checkpoints`."""
    return folder.parent if folder.name == "checkpoints" else folder


def load_weights(net: nn.Module, weights: dict[str, torch.Tensor], source: Path | str = "the checkpoint") -> None:
    """Load weights into a network of the same architecture.

    Raises:
        ValueError: see `check_weights`.
    """
    check_weights(net, weights, source)
    net.load_state_dict(weights)


def check_weights(net: nn.Module, weights: dict[str, torch.Tensor], source: Path | str = "the checkpoint") -> None:
    """See that these weights are those of a network of the same architecture, be it split over processes or not.

    Raises:
        ValueError: if names or shapes differ, with the first difference.
    """
    own = net.state_dict()
    differences = [f"it lacks {name}" for name in own if name not in weights]
    differences += [f"it has {name}, which this network lacks" for name in weights if name not in own]
    differences += [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if differences:
        kind = type(net).__name__.removeprefix("FSDP")  # FSDP2 makes a new class of each
        raise ValueError(f"{source} holds another architecture than {kind} of these settings: {differences[0]}")
