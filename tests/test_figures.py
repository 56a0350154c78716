"""The pictures: what they show is what the model gives, and the sheets show it exactly."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_program import SMALL, finish, run_here, start
from torch import Tensor

from biglearn_vae import BigLearnVAE, Patchify, UniversalViT, config, figures, masks

N = 5
LABELS = torch.tensor([1, 0, 1, 2, 0])
NAMES = list(figures.FIGURES)
IMAGES = [name for name in NAMES if name != "latent_map"]


def make(size=8, patch: int = 2, channels: int = 1, z_dim: int = 3) -> BigLearnVAE:
    """An untrained model whose codes and completions depend on what is observed."""
    tokenizer = Patchify(size, patch, channels)
    torch.manual_seed(0)
    net = UniversalViT(grid=tokenizer.grid, token_dim=tokenizer.token_dim, dim=16, depth=1, z_dim=z_dim, heads=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return BigLearnVAE(net, tokenizer)


def pictures(vae: BigLearnVAE, count: int = N, missing: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, *vae.image_shape, generator=generator)
    lost = torch.rand(count, vae.num_tokens, generator=generator) < missing
    return x.masked_fill(vae.pixel_mask(lost), torch.nan)


def is_colour(cells: np.ndarray, colour: tuple) -> np.ndarray:
    """Where it is the colour, or that of its pale stripes."""
    plain = np.float32(colour)
    return (cells == plain).all(-1) | np.isclose(cells, figures.PALE + (1 - figures.PALE) * plain, atol=1e-6).all(-1)


class Drawn:
    """What a figure handed to `sheet`: title, caption and blocks."""

    def __init__(self, title, caption, blocks):
        self.title, self.caption, self.blocks = title, caption, list(blocks)

    def column(self, name: str, block: int = 0, skip: int = 0) -> np.ndarray:
        """The column of that label (R, H, W, 3), or one of several."""
        found = [c for c, label in enumerate(self.blocks[block].columns) if label == name]
        return self.blocks[block].cells[:, found[skip]]


@pytest.fixture
def draw(monkeypatch):
    def call(figure, *arguments, **options) -> Drawn:
        with monkeypatch.context() as patch:
            patch.setattr(figures, "sheet", lambda title, caption, blocks, **_: Drawn(title, caption, blocks))
            return figure(*arguments, **options)

    return call


# --- Images as colours ---


@pytest.mark.parametrize("channels", [1, 3])
def test_rgb_is_the_image_clamped_with_channels_last(channels):
    x = 3 * pictures(make(channels=channels)) - 1
    assert x.min() < 0 and x.max() > 1
    result = figures.rgb(x)
    assert result.shape == (N, 8, 8, 3)
    for c in range(3):
        assert np.array_equal(result[..., c], x[:, c % channels].clamp(0, 1).numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_hide_colours_exactly_what_is_hidden_and_what_is_missing(channels, missing):
    vae = make(channels=channels)
    x = pictures(vae, missing=missing)
    observed = vae.pixel_mask(masks.random(N, 16, 0.5, seed=1))
    lost, seen = x.isnan()[:, 0].numpy(), observed[:, 0].numpy()
    result = figures.hide(x, observed)
    assert np.array_equal(is_colour(result, figures.MISSING), lost)
    assert np.array_equal(is_colour(result, figures.HIDDEN), ~seen & ~lost)
    assert np.array_equal(result[seen], figures.rgb(x)[seen])
    assert np.array_equal(figures.hide(x, torch.ones_like(observed)), figures.rgb(x))


def test_what_is_hidden_is_striped_in_images_that_have_colours_alone():
    grey, observed = torch.rand(2, 1, 32, 32).expand(-1, 3, -1, -1), torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    assert (figures.hide(grey, observed) == np.float32(figures.HIDDEN)).all()
    red = torch.tensor(figures.HIDDEN).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    result = figures.hide(red, observed)
    plain = (result == np.float32(figures.HIDDEN)).all(-1)
    assert plain.mean() == 0.5 and is_colour(result, figures.HIDDEN).all()
    assert plain[0, 0, :4].tolist() == [True, True, False, False]
    assert np.array_equal(plain[:, 1:, :-1], plain[:, :-1, 1:])  # diagonal


def test_signed_differences():
    change = torch.tensor([[-0.5, 0.0], [0.25, 0.5]]).expand(4, 3, 2, 2)
    result, limit = figures.signed(change)
    assert limit == 0.5 and result.shape == (4, 2, 2, 3)
    same, less, more = (np.array(colour) for colour in (figures.SAME, figures.LESS, figures.MORE))
    np.testing.assert_allclose(result[2], [[less, same], [(same + more) / 2, more]], atol=1e-6)
    np.testing.assert_allclose(figures.signed(0 * change)[0], np.broadcast_to(same, (4, 2, 2, 3)))
    np.testing.assert_allclose(figures.signed(change, 0.25)[0][0, 1, 0], more, atol=1e-6)


def test_images_are_chosen_from_all_classes():
    assert figures.choose(N, LABELS, 3).tolist() == [1, 0, 3]
    assert figures.choose(N, LABELS, 9).tolist() == [1, 0, 3, 4, 2]
    assert figures.choose(N, None, 3).tolist() == [0, 1, 2]
    assert figures.choose(2, None, 5, repeat=True).tolist() == [0, 1, 0, 1, 0]


def test_bytes_are_taken_for_images():
    vae = make()
    x = (255 * pictures(vae)).round().to(torch.uint8)
    assert torch.equal(figures.take(vae, x, None, 2)[0], x[:2].float() / 255)


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
from biglearn_vae import figures, sheets
sheets.sheet("title", "caption", [sheets.Block(numpy.zeros((1, 1, 4, 4, 3)), columns=["a"])])
figures._panels(numpy.zeros((1, 2, 2)), None)
assert settings() == before and settings()["backend"] is before["backend"]
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- All figures ---


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_depends_on_the_seed_alone(name):
    vae = make()
    x = pictures(vae)
    one = figures.FIGURES[name](vae, x, labels=LABELS, seed=0)
    assert one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3
    torch.manual_seed(99)
    assert np.array_equal(figures.FIGURES[name](vae, x, labels=LABELS, seed=0), one)
    other = figures.FIGURES[name](vae, x, labels=LABELS, seed=1)
    assert other.shape != one.shape or not np.array_equal(other, one)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("size", "patch", "channels", "z_dim", "count"),
    [((4, 8), 4, 1, 1, 1), ((8, 4), 4, 3, 2, 2), ((4, 4), 4, 1, 3, 3), ((6, 10), 2, 3, 5, 1)],
)
@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_tiny_grids_and_few_images(draw, name, size, patch, channels, z_dim, count, missing):
    vae = make(size, patch, channels, z_dim)
    x = pictures(vae, count, missing)
    x[0] = pictures(vae, count)[0]
    for block in draw(figures.FIGURES[name], vae, x).blocks:
        assert block.cells.shape[-3:-1] == (size if name in IMAGES else (300, 300))
        assert np.isfinite(block.cells).all() and block.cells.min() >= 0 and block.cells.max() <= 1


@pytest.mark.parametrize("name", IMAGES)
def test_hidden_and_missing_parts_are_marked(draw, name):
    vae = make()
    for missing in (0.0, 0.3):
        drawn = draw(figures.FIGURES[name], vae, pictures(vae, missing=missing))
        cells = np.concatenate([block.cells.reshape(-1, 3) for block in drawn.blocks])
        assert is_colour(cells, figures.HIDDEN).any()
        assert is_colour(cells, figures.MISSING).any() == (missing > 0) == ("never recorded" in drawn.caption)


@pytest.mark.parametrize("name", IMAGES)
def test_rows_is_the_number_of_images(draw, name):
    vae = make()
    few, more = (draw(figures.FIGURES[name], vae, pictures(vae), rows=rows).blocks[0].cells for rows in (1, 3))
    assert len(more) == 3 * len(few) and np.isclose(more[: len(few)], few, atol=1e-5).mean() > 0.5


def test_every_figure_has_words():
    assert list(figures.TEXTS) == [*NAMES, "reconstruction"]
    assert all(title and len(caption) > 80 and "{" not in title + caption for title, caption in figures.TEXTS.values())


# --- Each figure ---


def test_inference(draw):
    vae = make()
    x, ratios = pictures(vae)[:3], (1, 0.6, 0.3, 0.1)
    (block,) = draw(figures.inference, vae, x, seed=4, ratios=ratios).blocks
    observed, decoded, completed = (block.cells[row::3] for row in range(3))  # (n, ratios, H, W, 3)
    hidden = is_colour(observed, figures.HIDDEN)
    assert np.array_equal(hidden.mean((0, 2, 3)), [1 - round(16 * ratio) / 16 for ratio in ratios])
    assert (hidden[:, 1:] >= hidden[:, :-1]).all()  # each S is a part of the one before
    whole = np.broadcast_to(figures.rgb(x)[:, None], observed.shape)
    assert np.array_equal(observed[~hidden], whole[~hidden])
    for k in range(len(ratios)):
        S = torch.from_numpy(~hidden[:, k])
        np.testing.assert_allclose(decoded[:, k], figures.rgb(vae.reconstruct(x, S, seed=4)), atol=1e-6)
        z = vae.encode(x, S).sample(seed=4)  # of both
        np.testing.assert_allclose(decoded[:, k], figures.rgb(vae.decode(z)), atol=1e-6)
        np.testing.assert_allclose(completed[:, k], figures.rgb(vae.decode(z, x, S)), atol=1e-6)


def test_inpainting(draw):
    vae = make()
    x = pictures(vae)
    drawn = draw(figures.inpainting, vae, x, rows=3, seed=2)
    assert len({block.heading for block in drawn.blocks}) == len(drawn.blocks) == 6
    for k, block in enumerate(drawn.blocks):
        observed, image = drawn.column("observed", k), drawn.column("image", k)
        hidden = is_colour(observed, figures.HIDDEN)
        assert np.array_equal(image, figures.rgb(x[:3])) and 0 < hidden.mean() < 1
        assert all(np.array_equal(block.cells[:, c][~hidden], image[~hidden]) for c in range(1, 5))
        several = figures.rgb(vae.inpaint(x[:3], torch.from_numpy(~hidden), draws=16, seed=2).flatten(0, 1))
        several = several.reshape(16, 3, 8, 8, 3)
        np.testing.assert_allclose(drawn.column("draw 3", k), several[2], atol=1e-5)
        np.testing.assert_allclose(drawn.column("mean of 16", k), several.mean(0), atol=1e-5)


def test_the_shapes_of_masks():
    shapes = figures.shapes(make(size=16), 2, seed=0)
    assert all(S.shape == (2, 64) and S.dtype == torch.bool for S in shapes.values())
    centre = torch.zeros(8, 8, dtype=torch.bool)
    centre[2:6, 2:6] = True
    assert torch.equal(shapes["only the centre observed"], centre.flatten().expand(2, -1))
    assert torch.equal(shapes["the centre hidden"], ~shapes["only the centre observed"])
    assert shapes["a random half observed"].sum(1).tolist() == [32, 32]
    assert shapes["the top half observed"][0, :32].all() and not shapes["the top half observed"][0, 32:].any()


def test_the_picture_of_a_training(draw):
    vae = make()
    x = pictures(vae, 8, missing=0.3)
    drawn = draw(figures.completions, vae, x, title="some title")
    (block,) = drawn.blocks
    assert drawn.title == "some title" and block.cells.shape[:2] == (8, 7)
    assert list(block.columns) == ["image", "observed", "draw 1", "draw 2", "draw 3", "draw 4", "mean of 16"]
    lost, hidden = x.isnan()[:, 0].numpy(), is_colour(drawn.column("observed"), figures.HIDDEN)
    assert np.array_equal(is_colour(drawn.column("observed"), figures.MISSING), lost)
    assert hidden[~lost].mean() == pytest.approx(0.5, abs=0.15)
    kept = ~hidden & ~lost
    assert all(np.array_equal(block.cells[:, c][kept], figures.rgb(x)[kept]) for c in range(6))


def test_interpolation(draw):
    vae = make()
    x = pictures(vae)[:4]
    drawn = draw(figures.interpolation, vae, x, rows=2, seed=1, steps=5)
    a, b = x[0::2], x[1::2]
    free, kept = (block.cells for block in drawn.blocks)
    assert np.array_equal(free[:, 0], figures.rgb(a)) and np.array_equal(free[:, -1], figures.rgb(b))
    codes = vae.encode(a).mean, vae.encode(b).mean
    for column, z in ((1, codes[0]), (3, (codes[0] + codes[1]) / 2), (5, codes[1])):
        np.testing.assert_allclose(free[:, column], figures.rgb(vae.decode(z)), atol=1e-5)
    observed = ~is_colour(kept[:, 0], figures.HIDDEN)
    assert 0 < observed.mean() < 1
    for column in range(1, 6):
        assert np.array_equal(kept[:, column][observed], figures.rgb(a)[observed])


def test_interpolation_goes_between_classes(draw):
    vae = make()
    x, labels = pictures(vae, 8), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    (block, _) = draw(figures.interpolation, vae, x, labels=labels, rows=3).blocks
    ends = [[int(np.abs(figures.rgb(x) - cell).sum((1, 2, 3)).argmin()) for cell in block.cells[:, c]] for c in (0, -1)]
    assert all(labels[i] != labels[j] for i, j in zip(*ends, strict=True))


def test_combination_takes_the_union(draw):
    vae = make()
    x = pictures(vae, 6)
    drawn = draw(figures.combination, vae, x, rows=3, seed=5)
    a, b = figures.rgb(x[0::2]), figures.rgb(x[1::2])
    for block, names, sources in (
        (0, ("part 1", "part 2", "both parts"), (a, a)),
        (1, ("top of A", "bottom of B", "both"), (a, b)),
    ):
        seen = [~is_colour(drawn.column(name, block), figures.HIDDEN) for name in names]
        assert seen[0].any() and seen[1].any() and not (seen[0] & seen[1]).any()
        assert np.array_equal(seen[2], seen[0] | seen[1])
        for k, name in enumerate(names):
            cells, completed = drawn.column(name, block), drawn.column("completed", block, skip=k)
            for part, source in zip(seen[:2], sources, strict=True):
                shown = part & seen[k]
                assert np.array_equal(cells[shown], source[shown]) and np.array_equal(completed[shown], source[shown])
    assert not seen[0][:, 4:].any() and not seen[1][:, :4].any()


def test_combination_shows_what_was_never_recorded(draw):
    vae = make()
    x = pictures(vae, 2)
    x[:, :, 2:6, 2:6] = torch.nan
    drawn = draw(figures.combination, vae, x, rows=1, seed=5)
    for block, name in ((0, "both parts"), (1, "both")):
        lost = is_colour(drawn.column(name, block), figures.MISSING)
        assert lost[:, 2:6, 2:6].all() and lost.sum() == 16


def test_decoding_sensitivity(draw):
    vae = make(z_dim=5)
    x, ratios = pictures(vae), (0.1, 0.5)
    drawn = draw(figures.decoding_sensitivity, vae, x, rows=2, delta=1.5, dims=2, ratios=ratios)
    (block,) = drawn.blocks
    dims = [int(match[1]) for label in block.columns if (match := re.fullmatch(r"z(\d+) \+1.5", label))]
    S = [masks.random(2, 16, ratio, 0) for ratio in ratios]
    every = vae.decoding_sensitivity(x[:2], S[0], range(5), 1.5)
    effect = (every.after - every.before).square().mean((1, 2, 3, 4))
    assert dims == effect.argsort(descending=True)[:2].tolist()
    for k, mask in enumerate(S):
        result = vae.decoding_sensitivity(x[:2], mask, dims, 1.5)
        np.testing.assert_allclose(drawn.column("before")[k::2], figures.rgb(result.before), atol=1e-5)
        for d in range(2):
            np.testing.assert_allclose(block.cells[k::2, 3 + 2 * d], figures.rgb(result.after[d]), atol=1e-5)
            kept = ~is_colour(drawn.column("observed")[k::2], figures.HIDDEN)
            assert is_colour(block.cells[k::2, 4 + 2 * d], figures.SAME)[kept].all()


def test_images_of_two_channels_are_refused():
    vae = make(channels=2)
    with pytest.raises(ValueError, match="pictures are of images of 1 or 3 channels, got 2: draw them one by one"):
        figures.inpainting(vae, pictures(vae))


def test_dimensions_that_are_named(draw):
    vae = make(z_dim=5)
    (block,) = draw(figures.decoding_sensitivity, vae, pictures(vae)[:2], rows=2, dims=[3, 0], delta=5).blocks
    assert [label for label in block.columns if label.startswith("z")] == ["z3 +5", "z0 +5"]
    assert block.heading.startswith("2 of 5 dimensions, moved by")
    with pytest.raises(ValueError, match=r"dims must be a list of latent dimensions in \[0, 5\), .* got \[5\]"):
        figures.decoding_sensitivity(vae, pictures(vae), dims=[5])


def test_by_default_dimensions_move_by_the_spread_of_their_means(draw):
    vae = make()
    x = pictures(vae, 40)
    spread = vae.encode(x).mean.std(0)
    (block,) = draw(figures.decoding_sensitivity, vae, x).blocks
    moves = {int(match[1]): float(match[2]) for c in block.columns if (match := re.fullmatch(r"z(\d+) (\S+)", c))}
    assert moves == {dim: pytest.approx(3 * spread[dim].item(), rel=0.06) for dim in range(3)}


def test_encoding_sensitivity(draw):
    vae = make()
    x = pictures(vae)[:2]
    drawn = draw(figures.encoding_sensitivity, vae, x, ratio=0.5, share=0.1)
    for k, value in ((0, 0.0), (1, 1.0)):
        block, image = drawn.blocks[k], figures.rgb(x)
        observed = ~is_colour(drawn.column("observed", k), figures.HIDDEN)
        changed = block.outlined[:, 2] > 0
        assert (changed.sum((1, 2)) == 2 * 4).all() and (observed >= changed).all() and (block.outlined > 0).sum() == 16
        assert [len(np.unique(row[row > 0])) for row in block.outlined[:, 2]] == [2, 2]  # an outline each
        cells = drawn.column("changed", k)
        assert (cells[changed] == value).all()
        assert np.array_equal(cells[observed & ~changed], image[observed & ~changed])
        after = torch.where(torch.from_numpy(changed).unsqueeze(1), value, x)
        S = torch.from_numpy(observed)
        p, q = vae.encode(after, S), vae.encode(x, S)
        assert list(block.rows) == [f"KL {kl:.3g} nats" for kl in p.kl(q).tolist()]
        np.testing.assert_allclose(drawn.column("before", k), figures.rgb(vae.decode(q.mean, x, S)), atol=1e-5)
        np.testing.assert_allclose(drawn.column("after", k), figures.rgb(vae.decode(p.mean, x, S)), atol=1e-5)


def test_the_patches_that_are_changed_move_the_code_furthest(draw):
    vae = make()
    x = pictures(vae)[:1]
    drawn = draw(figures.encoding_sensitivity, vae, x, share=1 / 16)
    S = masks.from_pixels(torch.from_numpy(~is_colour(drawn.column("observed"), figures.HIDDEN)), vae.grid)
    moved = {}
    for patch in S[0].nonzero().flatten().tolist():
        one = vae.pixel_mask(torch.arange(16)[None] == patch)
        moved[patch] = vae.encode(x.masked_fill(one, 0), S).kl(vae.encode(x, S)).item()
    chosen = masks.from_pixels(torch.from_numpy(drawn.blocks[0].outlined[:, 2] > 0), vae.grid)
    assert chosen[0].nonzero().flatten().tolist() == [max(moved, key=moved.get)]


def test_patches_that_are_black_already_do_not_count_as_changed(draw):
    vae = make()
    inked = masks.random(4, 16, 0.3, seed=2)
    x = pictures(vae, 4).masked_fill(vae.pixel_mask(~inked), 0)
    drawn = draw(figures.encoding_sensitivity, vae, x, share=0.5)
    seen = ~is_colour(drawn.column("observed"), figures.HIDDEN)
    expected = seen & vae.pixel_mask(inked)[:, 0].numpy()
    assert expected.any() and np.array_equal(drawn.blocks[0].outlined[:, 2] > 0, expected)


def test_capabilities(draw):
    vae = make()
    x = pictures(vae)[:3]
    drawn = draw(figures.capabilities, vae, x, seed=3)
    assert [block.heading[0] for block in drawn.blocks] == list("abcde")
    samples = figures.rgb(vae.sample(9, seed=3)).reshape(3, 3, 8, 8, 3)
    np.testing.assert_allclose(drawn.blocks[0].cells, samples, atol=1e-5)
    np.testing.assert_allclose(drawn.column("decoded", 2), figures.rgb(vae.reconstruct(x, seed=3)), atol=1e-5)
    seen = ~is_colour(drawn.column("observed", 1), figures.HIDDEN)
    assert np.array_equal(drawn.column("completed", 3)[seen], figures.rgb(x)[seen])
    strokes = ~is_colour(drawn.column("strokes", 4), figures.HIDDEN)
    for k in range(1, 5):
        assert np.array_equal(drawn.column(f"draw {k}", 4)[strokes], figures.rgb(x)[strokes])


def test_strokes_are_those_of_the_seed():
    """Those of committed figures, by another stream than codes of the same seed."""
    vae = make()
    x = torch.rand(3, *vae.image_shape, generator=torch.Generator().manual_seed(0))
    order = torch.rand(3, vae.num_tokens, generator=torch.Generator().manual_seed(7))
    S = figures.strokes(vae, x, seed=7)
    inked = figures.strokes(vae, x, seed=7, share=1.0)
    for own, all_of_it, by in zip(S, inked, order, strict=True):
        first = by.masked_fill(~all_of_it, 2).argsort()[: int(own.sum())]
        assert set(first.tolist()) == set(own.nonzero().flatten().tolist())


@pytest.mark.parametrize("background", [0.0, 0.9])
def test_strokes_are_a_part_of_the_inked_patches(background):
    vae = make()
    inked = masks.random(6, 16, 0.3, seed=7)
    x = torch.where(vae.pixel_mask(inked), 1 - background, background)
    for share in (0.2, 1.0):
        S = figures.strokes(vae, x, seed=0, share=share)
        assert (inked | ~S).all() and S.sum(1).tolist() == [-int(-share * 5 // 1)] * 6


def test_the_map_of_codes_shows_classes_in_one_frame(draw, monkeypatch):
    vae = make()
    x = pictures(vae, 12)
    labels = torch.arange(12) % 3
    seen = []
    monkeypatch.setattr(figures, "_plane", lambda points, seed: seen.append(points) or points[:, :2])
    (block,) = draw(figures.latent_map, vae, x, labels=labels, ratios=(1, 0)).blocks
    order = figures.choose(12, labels, 300)
    np.testing.assert_allclose(seen[0][:12], vae.encode(x[order]).mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(seen[0][12:], np.broadcast_to(seen[0][12], (12, 3)), atol=1e-5)  # nothing is observed
    assert block.cells.shape == (1, 2, 300, 300, 3) and "classes" in block.heading
    (plain,) = draw(figures.latent_map, vae, x, ratios=(1, 0)).blocks
    assert "classes" not in plain.heading and "place in the first panel" in plain.heading


def test_without_classes_a_point_keeps_the_colour_of_its_place():
    places = np.zeros((2, 3, 2))
    places[:, :, 0] = [[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]  # the second panel is the first one reversed
    first, second = (panel[5:-5, 5:-5] for panel in figures._panels(places, None))  # without the frame
    inked = (first.min(-1) < 0.8).any(0).nonzero()[0]
    left, right = first[:, inked[0] : inked[0] + 4], first[:, inked[-1] - 3 : inked[-1] + 1]
    assert np.abs(left.min((0, 1)) - right.min((0, 1))).max() > 0.3  # two colours
    np.testing.assert_allclose(first.min(0).min(0), second.min(0).min(0))
    moved = second[:, inked[0] : inked[0] + 4]
    np.testing.assert_allclose(moved.min((0, 1)), right.min((0, 1)), atol=0.25)


def test_a_number_stands_at_a_point_of_its_class():
    halves = np.array([[0.0, 0.0], [0.1, 0.2], [9.0, 9.0], [9.2, 9.1], [0.2, 0.1]])  # between which no point is
    assert figures._middle(halves).tolist() == [0.1, 0.2] and figures._middle(halves[:1]).tolist() == [0.0, 0.0]


def test_the_map_names_its_classes(draw, monkeypatch):
    vae, labels = make(), torch.arange(12) % 3
    monkeypatch.setattr(figures, "_plane", lambda points, seed: points[:, :2])
    for names, expected in {
        ("cats", "dogs", "\u65e5\u672c $x$"): "first panel: 0 cats, 1 dogs, 2 ?? $x$",
        ("cats",): "first panel: 0 cats",
        (): "first panel",
    }.items():
        for numbers in (labels, labels.float()):
            (block,) = draw(figures.latent_map, vae, pictures(vae, 12), labels=numbers, names=names).blocks
            assert block.heading.replace(".0 ", " ").endswith(expected)


def test_codes_that_all_coincide_can_be_drawn():
    assert np.isfinite(figures._plane(np.ones((8, 3)), 0)).all()
    assert figures._panels(np.zeros((2, 4, 2)), np.arange(4)).shape == (2, 300, 300, 3)


# --- The page and the command ---


def test_the_page_of_a_run():
    text = figures.page("a<b", {"inference": "best.pt", "capabilities": "x < y"}, "of all")
    assert "capabilities.png</a> x &lt; y</figcaption>" in text and "<p>of all</p>" in text
    assert "<title>a&lt;b</title>" in text and "a<b" not in text
    assert re.findall(r'<img src="([^"]*)" alt="([^"]*)"', text) == [
        (f"{name}.png", ". ".join(figures.TEXTS[name])) for name in ("inference", "capabilities")
    ]
    assert not re.search(r'(src|href)="(https?:|/)', text)


def test_every_setting_is_explained():
    explained = config.explanations("figures")
    assert all(explained.get(key) for key, _ in config._raw_leaves(config.compose([], "figures")))


def test_train_then_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=6") == 0
    assert "figures/index.html" in capsys.readouterr().out
    run = tmp_path / "outputs" / "run"
    folder = run / "figures"
    assert sorted(p.name for p in folder.iterdir()) == ["index.html", "inference.png", "inpainting.png"]
    assert not (run / "inpainting.png").exists() and json.loads((run / "summary.json").read_text())
    first = (folder / "inpainting.png").read_bytes()

    words = ["run=outputs/run", "device=cpu", "figures=[inpainting,interpolation]", "images=2"]
    printed = finish(start(*words, cwd=tmp_path, script="figures"))
    assert re.search(r"outputs/run/figures/index.html: inpainting, interpolation \(\d+ s\)", printed)
    names = ["index.html", "inference.png", "inpainting.png", "interpolation.png"]
    assert sorted(p.name for p in folder.iterdir()) == names  # and nothing half written
    page = (folder / "index.html").read_text()
    assert re.findall(r'<img src="([^"]*)"', page) == names[1:] and "<h1>run</h1>" in page
    assert page.count("best.pt of step 6, test images, seed 0</figcaption>") == 3 and "method=vae" not in page
    assert all((folder / link).is_file() for link in re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert (folder / "inpainting.png").read_bytes() != first  # two rows now

    assert run_here(monkeypatch, "run=outputs/run", "device=cpu", "figures=inpainting", script="figures") == 0
    assert (folder / "inpainting.png").read_bytes() == first  # as at the end of the training


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("figures=[inference,faces]", f"figures must be some of {', '.join(NAMES)}, got inference, faces"),
        ("figures=[]", "got none"),
        ("images=0", "images must be at least 1, got 0"),
        ("delta=far", "delta must be a number or null, got 'far'"),
        ("dims=3", "dims must be a list, each a whole number or null, got 3"),
        ("figures=3", "figures must be a word or null or a list, each a word, got 3"),
        ("seed=x", "seed must be a whole number"),
        ("checkpoint=worst", "checkpoint must be best or latest"),
        ("run=outputs/other", "there is no run in outputs/other"),
    ],
)
def test_bad_settings_are_refused(tmp_path, monkeypatch, capsys, word, expected):
    monkeypatch.chdir(tmp_path)
    words = [word] if word.startswith("run=") else ["run=outputs/run", word]
    assert run_here(monkeypatch, *words, script="figures") == 2
    assert expected in capsys.readouterr().err
