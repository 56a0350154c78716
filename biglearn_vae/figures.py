"""The pictures."""

import numpy as np
import torch
from torch import Tensor

from biglearn_vae import evaluation, masks
from biglearn_vae.capabilities import BigLearnVAE

HIDDEN = (0.80, 0.33, 0.27)  # the colour of what the model does not see


def inpainting(
    vae: BigLearnVAE, images: Tensor, ratio: float = 0.5, draws: int = 4, seed: int = 0, title: str = ""
) -> np.ndarray:
    """Completions of half-hidden images as a picture, uint8 (height, width, 3): one row for each of a few images.

    Columns: the image, what is observed of it, several completions, and the mean of 16.

    Args:
        images: (N, C, H, W) in [0, 1], eight at most look good.
        ratio: share of the patches observed.
        title: a line above.
    """
    images = images.to(vae.device)
    S = masks.random(len(images), vae.num_tokens, ratio, seed=seed)
    completions = vae.inpaint(images, S, draws=max(16, draws), seed=seed)
    observed = hide(images, evaluation.pixel_mask(S, vae))
    columns = {"image": rgb(images), "observed": observed}
    columns |= {f"draw {k + 1}": rgb(completions[k]) for k in range(draws)}
    columns |= {f"mean of {len(completions)}": rgb(completions.mean(0))}
    return table(columns, title)


def rgb(images: Tensor) -> np.ndarray:
    """(N, C, H, W) -> float (N, H, W, 3) in [0, 1]."""
    return images.clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def hide(images: Tensor, observed: Tensor) -> np.ndarray:
    """Images (N, C, H, W) with what is not observed, a mask (N, 1, H, W), in the colour of hidden parts."""
    colour = torch.tensor(HIDDEN, device=images.device).view(1, 3, 1, 1)
    return rgb(torch.where(observed, images.expand(-1, 3, -1, -1), colour))


def table(columns: dict[str, np.ndarray], title: str = "", cell: int = 88, gap: int = 6, dpi: int = 100) -> np.ndarray:
    """Named columns of images, each (N, H, W, 3), as one picture, uint8 (height, width, 3).

    Images are enlarged by a whole factor, so that pixels stay sharp, to about `cell` pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    body, step = _montage(list(columns.values()), cell, gap)
    height, width, _ = body.shape
    header = 48
    figure = Figure(figsize=(width / dpi, (height + header) / dpi), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    for c, name in enumerate(columns):
        x = (c * step + (step - gap) / 2 + gap) / width
        figure.text(x, (height + 5) / (height + header), name, fontsize=8, ha="center", va="bottom")
    figure.text(gap / width, 1 - 6 / (height + header), title, fontsize=9, va="top")
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    picture[-height:, :width] = body
    return picture


def _montage(columns: list[np.ndarray], cell: int, gap: int) -> tuple[np.ndarray, int]:
    """Columns of images (N, H, W, 3) on white, uint8, and the distance from one column to the next in pixels."""
    grid = np.stack(columns, axis=1)  # (N, columns, H, W, 3)
    scale = max(1, round(cell / max(grid.shape[2:4])))
    grid = grid.repeat(scale, axis=2).repeat(scale, axis=3)
    grid = np.pad(grid, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=1)
    rows, count, height, width, _ = grid.shape
    body = grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, count * width, 3)
    body = np.pad(body, ((0, gap), (0, gap), (0, 0)), constant_values=1)
    return (body * 255).round().astype(np.uint8), width
