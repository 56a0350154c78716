import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from biglearn_vae import BigLearnVAE, Patchify, UniversalViT, evaluation, figures, masks

N = 3
BYTES = np.array([int(255 * value) for value in figures.HIDDEN])


def make(channels: int) -> BigLearnVAE:
    tokenizer = Patchify(8, 2, channels)
    torch.manual_seed(0)
    net = UniversalViT(grid=tokenizer.grid, token_dim=tokenizer.token_dim, dim=16, depth=1, z_dim=3, heads=2)
    return BigLearnVAE(net, tokenizer)


def pictures(channels: int, seed: int = 0) -> Tensor:
    return torch.rand(N, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_rgb_moves_channels_last():
    x = pictures(3)
    result = figures.rgb(x)
    assert result.shape == (N, 8, 8, 3)
    assert all(np.array_equal(result[..., c], x[:, c].numpy()) for c in range(3))


def test_rgb_repeats_grey_and_clamps():
    x = 3 * pictures(1) - 1
    assert x.min() < 0 and x.max() > 1
    result = figures.rgb(x)
    assert result.shape == (N, 8, 8, 3)
    assert all(np.array_equal(result[..., c], x[:, 0].clamp(0, 1).numpy()) for c in range(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_hide_colours_exactly_what_is_hidden(channels):
    vae, x = make(channels), pictures(channels)
    S = masks.random(N, 16, 0.5, seed=1)
    observed = evaluation.pixel_mask(S, vae)
    hidden = ~observed[:, 0].numpy()
    result = figures.hide(x, observed)
    assert np.array_equal(result[hidden], np.broadcast_to(np.float32(figures.HIDDEN), (hidden.sum(), 3)))
    assert np.array_equal(result[~hidden], figures.rgb(x)[~hidden])
    assert np.array_equal(figures.hide(x, torch.ones_like(observed)), figures.rgb(x))


def is_hidden_colour(picture: np.ndarray) -> np.ndarray:
    return (np.abs(picture.astype(int) - BYTES) <= 1).all(-1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_inpainting_shows_the_hidden_patches_in_one_column(channels, ratio):
    picture = figures.inpainting(make(channels), pictures(channels), ratio=ratio, draws=2)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    shown = is_hidden_colour(picture)
    columns = np.array_split(shown, 5, axis=1)  # image, observed, two completions, mean
    counts = [int(column.sum()) for column in columns]
    if ratio == 1.0:
        assert sum(counts) == 0
        return
    assert counts[1] > 0 and sum(counts) == counts[1]
    everything = is_hidden_colour(figures.inpainting(make(channels), pictures(channels), ratio=0.0, draws=2)).sum()
    assert counts[1] / everything == pytest.approx(1 - ratio, abs=0.02)


def test_inpainting_depends_on_the_seed_alone():
    vae, x = make(1), pictures(1)
    one = figures.inpainting(vae, x, seed=0, title="a title")
    torch.manual_seed(99)
    assert np.array_equal(figures.inpainting(vae, x, seed=0, title="a title"), one)
    other = figures.inpainting(vae, x, seed=1, title="a title")
    assert other.shape == one.shape and not np.array_equal(other, one)


def test_the_pictures_size_follows_rows_and_columns():
    vae = make(1)
    few, more = (figures.inpainting(vae, pictures(1)[:n], draws=2).shape for n in (1, 3))
    wide = figures.inpainting(vae, pictures(1)[:1], draws=4).shape
    assert few[1] == more[1] and few[0] < more[0]
    assert wide[0] == few[0] and wide[1] / few[1] == pytest.approx(7 / 5, abs=0.01)


def test_table_shows_every_image_in_its_place():
    # Each cell one colour; it is found again in the middle of its cell, and covers as much as any other.
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (2, 4, 3))  # rows, columns
    columns = {f"c{c}": np.ones((2, 4, 4, 3)) * (colours[:, c] / 255).reshape(2, 1, 1, 3) for c in range(4)}
    picture = figures.table(columns).astype(int)
    areas = []
    for r in range(2):
        for c in range(4):
            rows, cols = np.nonzero((np.abs(picture - colours[r, c]) <= 1).all(-1))
            areas.append(len(rows))
            assert (np.ptp(rows) + 1) * (np.ptp(cols) + 1) == len(rows)  # a full rectangle
            assert int(cols.mean() / picture.shape[1] * 4) == c
    assert max(areas) <= 1.05 * min(areas)
    tops = [np.nonzero((np.abs(picture - colours[r, 0]) <= 1).all(-1))[0].mean() for r in range(2)]
    assert tops[0] < tops[1]


def test_drawing_leaves_matplotlib_alone():
    # In a process of its own: another test may have imported pyplot.
    program = """
import sys
import matplotlib
def settings():
    rc = matplotlib.rcParams  # reading the backend in the usual way would choose one
    return {key: dict.__getitem__(rc, key) for key in dict.keys(rc)}
before = settings()
import numpy, biglearn_vae
biglearn_vae.figures.table({"a": numpy.zeros((1, 4, 4, 3))}, "title")
assert settings() == before and settings()["backend"] is before["backend"]
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
