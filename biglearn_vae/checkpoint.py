"""Checkpoints: tensors and readable settings in one file, written atomically, loaded without running code."""

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

LATEST, PREVIOUS, BEST = "latest.pt", "previous.pt", "best.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that at every moment `path` is either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save_latest(folder: Path, state: dict[str, Any]) -> None:
    """Write `latest.pt`, keeping the one before as `previous.pt`."""
    latest, fresh = folder / LATEST, folder / "fresh.pt"
    save(fresh, state)
    if latest.exists():
        latest.replace(folder / PREVIOUS)
    fresh.replace(latest)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        ValueError: if the file is missing, truncated or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not notice changed bytes, the archive's sums do
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from None


def is_resumable(folder: Path) -> bool:
    """Whether the folder has a checkpoint to go on from."""
    return (folder / LATEST).exists() or (folder / PREVIOUS).exists()


def load_latest(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The newest readable of `latest.pt` and `previous.pt`, or None if there is neither.

    A file that cannot be read is reported in a warning.

    Raises:
        ValueError: if there are files and none can be read.
    """
    problems = []
    for name in (LATEST, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            state = load(folder / name, device)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{problems[0]}; going on from {name}, step {state['step']}", stacklevel=2)
        return state
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Delete {folder} to start anew")
    return None


def load_weights(net: nn.Module, weights: dict[str, torch.Tensor], source: Path | str = "the checkpoint") -> None:
    """Load weights into a network of the same architecture.

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
        raise ValueError(
            f"{source} holds another architecture than {type(net).__name__} of these settings: {differences[0]}"
        )
    net.load_state_dict(weights)
