"""Where a run reports to: TensorBoard, metrics.jsonl, a folder of pictures, and the terminal.

A logger has `scalars(step, values)`, `picture(step, name, pixels)` and `close()`; `pixels` is uint8 (H, W, 3).
"""

import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np

from biglearn_vae.files import replacing, write_text


class Logger:
    """A logger that ignores everything; subclasses override what they take."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, at a step."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3), at a step."""

    def close(self) -> None:
        """Write what is pending."""


class MetricsFile(Logger):
    """One JSON object a line, `{"step": ..., name: value, ...}`. Lines after `resume_step` are dropped on opening."""

    def __init__(self, path: Path, resume_step: int = 0):
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
        # A run that starts at 0 evaluates there again, so it keeps nothing of one that was killed before.
        kept = [line for line in lines if resume_step > 0 and _step_of(line) <= resume_step]
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN: a number that is not finite becomes null, so that every parser reads the file.
        self._file.write(
            json.dumps({"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}) + "\n"
        )
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that a kill cut short or that was damaged otherwise."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard(Logger):
    """Scalars and pictures for `tensorboard --logdir`; events after `resume_step` are hidden."""

    def __init__(self, folder: Path, resume_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=resume_step + 1 if resume_step > 0 else 0)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Pictures(Logger):
    """Each picture as `folder/name-step.png`."""

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        path = self._folder / f"{name}-{step:07d}.png"  # names may hold folders, as those of TensorBoard do
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save(path, pixels)

    @staticmethod
    def save(path: Path, pixels: np.ndarray, about: str = "") -> None:
        """One picture as a PNG file, which also holds `about`, words on what it shows."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        words = PngInfo()
        words.add_itxt("Description", about)
        with replacing(path) as partial:
            Image.fromarray(pixels).save(partial, format="PNG", pnginfo=words if about else None)

    @staticmethod
    def about(path: Path) -> str:
        """What a PNG file says that it shows; an empty text if it says nothing, or is damaged."""
        from PIL import Image

        with suppress(OSError, SyntaxError, ValueError), Image.open(path) as image:
            return image.info.get("Description", "")
        return ""


class Progress(Logger):
    """A bar where there is a terminal, a line per report where there is none.

    Args:
        steps: the last step.
        first_step: where this process starts.
        stream: standard error by default.
    """

    def __init__(self, steps: int, first_step: int = 0, stream: TextIO | None = None):
        from tqdm import tqdm

        self._stream = stream or sys.stderr
        self._steps = steps
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", file=self._stream, dynamic_ncols=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        text = "  ".join(
            f"{name.removeprefix('train/')} {_short(value)}"
            for name, value in values.items()
            if name not in ("seconds", "lr", "train/grad_norm")
        )
        if self._bar is None:
            print(f"step {step}/{self._steps}  {text}", file=self._stream, flush=True)
        elif any(name.startswith("valid/") for name in values):
            self._bar.write(f"step {step}  {text}", file=self._stream)
        else:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
