from collections import Counter
from math import comb

import numpy as np
import pytest
import torch
from scipy import stats

from biglearn_vae import MaskSampler, Patchify, masks

BETAS = [(1.0, 1.0), (2.0, 0.5), (0.3, 1.5), (2.0, 5.0), (100.0, 100.0)]


def draw(batch: int, tokens: int, seed: int = 0, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    return MaskSampler(**settings)(batch, tokens, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("ratios_per", ["sample", "step"])
@pytest.mark.parametrize("s_ratio", [(1, 1), (0.01, 0.01), (0.01, 100), (100, 0.01), (100, 100)])
@pytest.mark.parametrize("t_ratio", [(1, 1), (0.01, 0.01), (0.01, 100), (100, 0.01)])
def test_disjoint_and_target_never_empty(s_ratio, t_ratio, ratios_per, tokens):
    for seed in range(1 if ratios_per == "sample" else 20):
        S, T = draw(500, tokens, seed, s_ratio=s_ratio, t_ratio=t_ratio, ratios_per=ratios_per)
        assert S.dtype == T.dtype == torch.bool and S.shape == T.shape == (500, tokens)
        assert not (S & T).any()
        assert T.any(-1).all()


@pytest.mark.parametrize("tokens", [2, 16])
def test_extreme_tasks_are_reached(tokens):
    S, T = draw(5000, tokens)
    assert (~S.any(-1)).any() and T.all(-1).any()
    assert S.sum(-1).max() == tokens - 1
    assert ((~S.any(-1)) & (T.sum(-1) == 1)).any()


@pytest.mark.parametrize("ratios_per", ["sample", "step"])
def test_joint_one_is_the_ordinary_vae(ratios_per):
    S, T = draw(200, 16, s_ratio=(5, 1), joint=1, ratios_per=ratios_per)
    assert not S.any() and T.all()


def test_share_of_joint_tasks():
    # With this Beta S has about half of the tokens, so that a joint task comes from `joint` alone.
    for joint in (0, 0.3, 0.8):
        S, T = draw(4000, 64, s_ratio=(50, 50), joint=joint)
        joint_tasks = ~S.any(-1) & T.all(-1)
        assert stats.binomtest(int(joint_tasks.sum()), 4000, joint).pvalue > 1e-3
        assert torch.equal(joint_tasks, S.sum(-1) < 10)


def test_ratios_per_step_shares_sizes_and_not_subsets():
    sizes = []
    for seed in range(20):
        S, T = draw(32, 16, seed, joint=0.2, ratios_per="step")
        assert len(S.sum(-1).unique()) == len(T.sum(-1).unique()) == 1
        sizes.append((int(S[0].sum()), int(T[0].sum())))
        if sizes[-1][0] > 0:
            assert len(S.unique(dim=0)) > 1
    assert len(set(sizes)) > 10


def test_ratios_per_sample_varies_sizes():
    S, T = draw(32, 16, ratios_per="sample")
    assert len(S.sum(-1).unique()) > 4 and len(T.sum(-1).unique()) > 4


@pytest.mark.parametrize("s_ratio", BETAS)
@pytest.mark.parametrize("t_ratio", BETAS)
def test_ratios_follow_their_betas(s_ratio, t_ratio):
    tokens, rows = 4096, 400
    S, T = draw(rows, tokens, s_ratio=s_ratio, t_ratio=t_ratio)
    s, t = S.sum(-1), T.sum(-1)
    # Uniform noise undoes the rounding: |S| was rounded down and |T| up.
    down, up = torch.rand(2, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert stats.kstest((s + down) / tokens, stats.beta(*s_ratio).cdf).pvalue > 1e-3
    assert stats.kstest((t - up) / (tokens - s), stats.beta(*t_ratio).cdf).pvalue > 1e-3


@pytest.mark.parametrize("ratio", [*BETAS, (0.01, 0.01), (0.01, 0.03), (0.001, 0.001), (0.001, 0.003)])
def test_sizes_follow_the_rounded_betas(ratio):
    """The exact law of |S|, and of |T| where S is empty, also where nearly all of a Beta lies at its ends."""
    tokens, rows = 8, 4000
    bins = stats.beta(*ratio).cdf(torch.arange(tokens + 1) / tokens)
    expected = rows * (bins[1:] - bins[:-1])
    S, _ = draw(rows, tokens, s_ratio=ratio)
    observed_s = torch.bincount(S.sum(-1), minlength=tokens).numpy()
    S, T = draw(rows, tokens, s_ratio=(0.5, 1e6), t_ratio=ratio)
    assert not S.any()
    observed_t = torch.bincount(T.sum(-1) - 1, minlength=tokens).numpy()
    common = expected >= 5  # chi-square needs filled cells; the others are taken together
    for observed in (observed_s, observed_t):
        counts, means = observed[common], expected[common]
        if not common.all():
            counts, means = [*counts, observed[~common].sum()], [*means, max(expected[~common].sum(), 1e-9)]
        assert stats.chisquare(counts, means).pvalue > 1e-3


def test_positions_are_equally_often_observed_and_targets():
    tokens = 64
    for subsets in draw(3000, tokens, s_ratio=(1, 2), t_ratio=(2, 1)):
        share = subsets.double().mean(-1)
        counts = subsets.sum(0)
        # Given the sizes, counts have this variance and negative correlations -1 / (L - 1).
        variance = (share * (1 - share)).sum() * tokens / (tokens - 1)
        statistic = ((counts - share.sum()) ** 2).sum() / variance
        assert stats.chi2(tokens - 1).sf(statistic) > 1e-3


def test_subsets_of_each_size_are_equally_frequent():
    tokens = 4
    S, T = draw(20_000, tokens)
    tasks = Counter(zip(map(tuple, S.int().tolist()), map(tuple, T.int().tolist()), strict=True))
    by_sizes: dict[tuple[int, int], list[int]] = {}
    for (s, t), count in tasks.items():
        by_sizes.setdefault((sum(s), sum(t)), []).append(count)
    assert len(by_sizes) == 10  # |S| from 0 to 3, |T| from 1 to 4 - |S|
    for (s, t), counts in by_sizes.items():
        assert len(counts) == comb(tokens, s) * comb(tokens - s, t)
        if len(counts) > 1:
            assert stats.chisquare(counts).pvalue > 1e-4


def test_same_seed_same_masks():
    first, again, other = draw(16, 64, 0), draw(16, 64, 0), draw(16, 64, 1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(s_ratio=(0, 1)), r"s_ratio .*\[0, 1\]"),
        (dict(t_ratio=(1, -2)), r"t_ratio .*\[1, -2\]"),
        (dict(s_ratio=(1, float("inf"))), r"s_ratio .*inf"),
        (dict(t_ratio=(float("nan"), 1)), r"t_ratio .*nan"),
        (dict(s_ratio=(1, 2, 3)), r"s_ratio must be 2 numbers .*\[1, 2, 3\]"),
        (dict(joint=-0.1), r"joint .*\[0, 1\].*-0\.1"),
        (dict(joint=1.5), r"joint .*\[0, 1\].*1\.5"),
        (dict(ratios_per="batch"), "ratios_per must be sample or step, got 'batch'"),
        (dict(s_ratio=("1", 2)), r"s_ratio .*\['1', 2\]"),
        (dict(t_ratio="12"), "t_ratio must be 2 numbers .*12"),
        (dict(joint="0.1"), r"joint .*0\.1"),
        (dict(joint=None), "joint .*None"),
    ],
)
def test_sampler_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskSampler(**settings)


@pytest.mark.parametrize("ratio", [0, 0.1, 0.3, 0.5, 0.99, 1])
def test_random_has_the_ratio_in_every_row(ratio):
    mask = masks.random(50, 64, ratio, seed=0)
    assert mask.shape == (50, 64) and mask.dtype == torch.bool
    assert (mask.sum(-1) == round(ratio * 64)).all()
    assert torch.equal(mask, masks.random(50, 64, ratio, seed=0))


def test_random_differs_by_row_and_seed():
    mask = masks.random(50, 64, 0.5, seed=0)
    assert len(mask.unique(dim=0)) == 50
    assert not torch.equal(mask, masks.random(50, 64, 0.5, seed=1))
    assert not torch.equal(masks.random(50, 64, 0.5), masks.random(50, 64, 0.5))


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_random_refuses(ratio):
    with pytest.raises(ValueError, match=rf"ratio must be a number in \[0, 1\], got {ratio}"):
        masks.random(2, 4, ratio)


@pytest.mark.parametrize("place", [(0, 0, 1, 1), (1, 2, 2, 3), (0, 0, 4, 6), (3, 5, 1, 1), (2, 2, 0, 2), (0, 4, 4, 2)])
def test_box(place):
    top, left, height, width = place
    expected = [
        not (top <= row < top + height and left <= column < left + width) for row in range(4) for column in range(6)
    ]
    assert masks.box((4, 6), *place).tolist() == expected


@pytest.mark.parametrize("place", [(-1, 0, 2, 2), (0, -1, 2, 2), (3, 0, 2, 2), (0, 5, 2, 2), (0, 0, -1, 2)])
def test_box_must_lie_in_the_grid(place):
    top, left, height, width = place
    message = f"4 x 6 patches, got rows {top} to {top + height} and columns {left} to {left + width}"
    with pytest.raises(ValueError, match=message):
        masks.box((4, 6), *place)


SOME = masks.random(2, 16, 0.5, seed=0)
GRID = "grid must be two numbers, rows and columns of tokens, each at least 1, got"
MISUSE = {
    "rows": (lambda: masks.random(2.5, 16, 0.5), "batch_size must be a whole number, got 2.5"),
    "negative rows": (lambda: masks.random(-1, 16, 0.5), "batch_size must be at least 0, got -1"),
    "no tokens": (lambda: masks.random(2, 0, 0.5), "num_tokens must be at least 1, got 0"),
    "a mask as size": (lambda: masks.random(2, SOME, 0.5), "num_tokens must be a whole number, got tensor"),
    "ratio": (lambda: masks.random(2, 16, "0.5"), r"ratio must be a number in \[0, 1\], got '0.5'"),
    "ratios": (lambda: masks.random(2, 16, [0.1, 0.5]), r"ratio must be a number in \[0, 1\], got \[0.1, 0.5\]"),
    "seed": (lambda: masks.random(2, 16, 0.5, seed=1.5), "seed must be a whole number, got 1.5"),
    "huge seed": (lambda: masks.random(2, 16, 0.5, seed=2**70), r"seed must be in \[-2\^63, 2\^64\), got 1180"),
    "grid of a box": (lambda: masks.box(4, 0, 0, 1, 1), f"{GRID} 4"),
    "place of a box": (lambda: masks.box((4, 4), 0.5, 0, 1, 1), "top must be a whole number, got 0.5"),
    "size of a box": (lambda: masks.box((4, 4), 0, 0, 1, None), "width must be a whole number, got None"),
    "grid of a centre": (lambda: masks.centre("44"), f"{GRID} 44"),
    "grid of a half": (lambda: masks.half((4, 4, 1)), rf"{GRID} \(4, 4, 1\)"),
    "fractions of a grid": (lambda: masks.half((2.5, 2)), rf"{GRID} \(2.5, 2\)"),
    "pixels as lists": (lambda: masks.from_pixels([[True]], (1, 1)), "boolean mask .*got list: torch.as_tensor"),
    "pixels as an array": (lambda: masks.from_pixels(SOME.numpy(), (1, 1)), "boolean mask .*got ndarray"),
    "grid of pixels": (lambda: masks.from_pixels(SOME, 4), f"{GRID} 4"),
    "patches as an array": (lambda: masks.to_pixels(SOME.numpy(), (4, 4), (8, 8)), "boolean mask .*got ndarray"),
    "patches as numbers": (lambda: masks.to_pixels(SOME.float(), (4, 4), (8, 8)), "boolean .*got torch.float32"),
    "patches of another grid": (lambda: masks.to_pixels(SOME, (3, 4), (9, 8)), r"\(..., 12\), got .*\(2, 16\)"),
    "size of pixels": (lambda: masks.to_pixels(SOME, (4, 4), (9, 8)), "9 x 8 pixels does not fit a grid of 4 x 4"),
    "one number for a size": (lambda: masks.to_pixels(SOME, (4, 4), 8), "size must be two numbers.*got 8"),
    "one image": (lambda: masks.recorded_patches(torch.zeros(4, 8, 8), (4, 4)), r"\(B, C, H, W\), got .*\(4, 8, 8\)"),
    "tokens as an array": (lambda: masks.recorded(SOME.numpy()), r"tokens \(B, L, D\), got ndarray"),
    "a seed to draw from": (lambda: MaskSampler()(2, 16, 0), r"torch.Generator\(\).manual_seed\(0\), got int"),
    "rows to draw": (lambda: MaskSampler()(2.0, 16, torch.Generator()), "batch_size must be a whole number, got 2.0"),
    "tokens to draw": (lambda: MaskSampler()(2, 0, torch.Generator()), "num_tokens must be at least 1, got 0"),
    "recorded numbers": (
        lambda: MaskSampler()(2, 16, torch.Generator(), SOME.float()),
        r"what was recorded, of shape \(2, 16\), got torch.float32",
    ),
    "recorded of another batch": (lambda: MaskSampler()(3, 16, torch.Generator(), SOME), r"\(3, 16\), got .*\(2, 16\)"),
}


@pytest.mark.parametrize(("call", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_numbers_may_be_of_any_type():
    expected = masks.random(2, 16, 0.5, seed=3)
    for of in (np.int64, np.uint8, torch.tensor):
        assert torch.equal(masks.random(of(2), of(16), np.float32(0.5), seed=of(3)), expected)
        assert torch.equal(masks.box((of(4), of(4)), of(1), of(1), of(2), of(2)), masks.centre([4, 4]))
    for seed in (-1, -(2**63), 2**64 - 1):
        assert torch.equal(masks.random(2, 16, 0.5, seed=seed), masks.random(2, 16, 0.5, seed=seed))
    assert masks.random(0, 16, 0.5).shape == (0, 16)
    assert MaskSampler(joint=torch.tensor(0.5), s_ratio=np.array([1.0, 2.0]).tolist()).joint == 0.5


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 2)])
def test_half(grid):
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    assert masks.half(grid).tolist() == [row < grid[0] // 2 for row, _ in cells]
    assert masks.half(grid, "left").tolist() == [column < grid[1] // 2 for _, column in cells]
    assert torch.equal(masks.half(grid, "bottom"), ~masks.half(grid, "top"))
    assert torch.equal(masks.half(grid, "right"), ~masks.half(grid, "left"))


def test_half_names_the_choices():
    with pytest.raises(ValueError, match="observed must be top, bottom, left or right, got 'up'"):
        masks.half((2, 2), "up")


@pytest.mark.parametrize(("grid", "patch"), [((4, 4), (4, 4)), ((3, 5), (2, 4)), ((2, 3), (1, 1))])
def test_patch_mask_to_pixels_and_back(grid, patch):
    mask = masks.random(10, grid[0] * grid[1], 0.5, seed=0)
    pixels = mask.unflatten(-1, grid).repeat_interleave(patch[0], -2).repeat_interleave(patch[1], -1)
    assert torch.equal(masks.from_pixels(pixels, grid), mask)
    for one, expected in zip(pixels, mask, strict=True):
        assert torch.equal(masks.from_pixels(one, grid), expected)


def test_a_patch_with_one_hidden_pixel_is_hidden():
    for row in range(6):
        for column in range(8):
            pixels = torch.ones(6, 8, dtype=torch.bool)
            pixels[row, column] = False
            hidden = (~masks.from_pixels(pixels, (3, 2))).nonzero().flatten().tolist()
            assert hidden == [row // 2 * 2 + column // 4]


def test_from_pixels_has_the_order_of_patchify():
    patchify = Patchify((8, 12), 4, channels=1)
    pixels = torch.rand(20, 8, 12, generator=torch.Generator().manual_seed(0)) < 0.95
    assert torch.equal(masks.from_pixels(pixels, patchify.grid), patchify.encode(pixels.unsqueeze(1)).all(-1))


@pytest.mark.parametrize("pixels", [torch.ones(8, 8), torch.ones(8, 8, dtype=torch.uint8)])
def test_from_pixels_wants_booleans(pixels):
    with pytest.raises(ValueError, match=rf"boolean mask of shape .*{pixels.dtype} \(8, 8\)"):
        masks.from_pixels(pixels, (2, 2))


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8, 8)])
def test_from_pixels_wants_two_or_three_axes(shape):
    with pytest.raises(ValueError) as error:
        masks.from_pixels(torch.ones(shape, dtype=torch.bool), (2, 2))
    assert "(H, W) or (B, H, W)" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(7, 8), (8, 7), (3, 7, 8)])
def test_from_pixels_wants_whole_patches(shape):
    with pytest.raises(ValueError, match=f"{shape[-2]} x {shape[-1]} pixels does not fit a grid of 2 x 2"):
        masks.from_pixels(torch.ones(shape, dtype=torch.bool), (2, 2))


# --- what was never recorded ---


def some_recorded(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Between none and all of the patches of each image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, tokens, generator=generator) < torch.rand(batch, 1, generator=generator)


@pytest.mark.parametrize("ratios_per", ["sample", "step"])
@pytest.mark.parametrize("joint", [0, 0.5, 1])
def test_tasks_lie_in_what_was_recorded(ratios_per, joint):
    recorded = some_recorded(2000, 16)
    recorded[0] = False
    generator = torch.Generator().manual_seed(1)
    S, T = MaskSampler(joint=joint, ratios_per=ratios_per)(2000, 16, generator, recorded)
    assert not (S & T).any() and not ((S | T) & ~recorded).any()
    assert torch.equal(T.any(-1), recorded.any(-1))
    if joint == 1:
        assert not S.any() and torch.equal(T, recorded)


def test_everything_recorded_changes_nothing():
    everything = torch.ones(50, 16, dtype=torch.bool)
    sampler = MaskSampler((2, 1), (1, 1), joint=0.2)
    given, default = (sampler(50, 16, torch.Generator().manual_seed(0), r) for r in (everything, None))
    assert all(torch.equal(one, other) for one, other in zip(given, default, strict=True))


def test_sizes_are_shares_of_what_was_recorded():
    recorded = (torch.arange(16) < 8).expand(5000, -1)
    among_16 = MaskSampler((2, 1), (1, 1))(5000, 16, torch.Generator().manual_seed(0), recorded)
    among_8 = MaskSampler((2, 1), (1, 1))(5000, 8, torch.Generator().manual_seed(0))
    for mask, expected in zip(among_16, among_8, strict=True):  # sizes are drawn first, so they agree exactly
        assert torch.equal(mask.sum(-1), expected.sum(-1))


def test_positions_among_the_recorded_are_equally_likely():
    recorded = torch.tensor([[True, False, True, True, False, True]]).expand(20_000, -1)
    S, T = MaskSampler()(20_000, 6, torch.Generator().manual_seed(0), recorded)
    for mask in (S, T):
        counts = mask.sum(0)[recorded[0]]
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_to_pixels_is_the_inverse_of_from_pixels(batch):
    S = torch.rand(*batch, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    pixels = masks.to_pixels(S, (3, 4), (6, 20))
    assert pixels.shape == (*batch, 6, 20)
    assert pixels.sum() == 10 * S.sum()
    back = masks.from_pixels(pixels.reshape(-1, 6, 20), (3, 4))
    assert torch.equal(back.view(S.shape), S)


def test_recorded_are_tokens_without_nan():
    tokens = torch.zeros(2, 3, 4)
    tokens[0, 1, 3] = tokens[1, 0] = torch.nan
    tokens[1, 2, 0] = torch.inf
    assert masks.recorded(tokens).tolist() == [[True, False, True], [False, True, True]]


def test_positions_of_one_mask_and_of_two():
    mask = torch.tensor([[False, True, False, True], [True, False, False, False], [False] * 4])
    index, valid = masks.positions(mask)
    assert index.shape == (3, 2) and valid.tolist() == [[True, True], [True, False], [False, False]]
    assert index[0].tolist() == [1, 3] and index[1, 0] == 0
    other = torch.tensor([[True, False, False, False], [False, False, True, True], [False, True, True, True]])
    index, valid = masks.positions(mask, other)
    assert index.tolist() == [[1, 3, 0], [0, 2, 3], [1, 2, 3]] and valid is None
    assert masks.positions(mask[:0])[0].shape == (0, 0)


@pytest.mark.parametrize("passes", [1, 2, 3, 5, 20])
def test_turns_share_the_patches_out(passes):
    T = torch.rand(40, 9, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 40).unsqueeze(-1)
    turns = masks.turns(T, passes, seed=1)
    assert ((turns == -1) == ~T).all() and turns.max() < passes
    counts = torch.stack([(turns == turn).sum(-1) for turn in range(passes)], -1)  # (40, passes)
    assert torch.equal(counts.sum(-1), T.sum(-1)) and (counts.amax(-1) - counts.amin(-1)).max() <= 1


def test_turns_are_in_random_order():
    T = torch.ones(20_000, 4, dtype=torch.bool)
    turns = masks.turns(T, 4, seed=3)
    orders, counts = turns.unique(dim=0, return_counts=True)
    assert len(orders) == 24
    expected = len(T) / len(orders)
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert torch.equal(turns, masks.turns(T, 4, seed=3)) and not torch.equal(turns, masks.turns(T, 4, seed=4))


def test_turns_refuse():
    for wrong in (torch.ones(4), torch.ones(4, dtype=torch.bool), [[True]]):
        with pytest.raises(ValueError, match=r"expected a boolean mask \(B, L\)"):
            masks.turns(wrong, 2)
    with pytest.raises(ValueError, match="passes must be at least 1"):
        masks.turns(torch.ones(1, 4, dtype=torch.bool), 0)


@pytest.mark.parametrize("passes", [1, 2, 4, 50])
def test_in_turns_everything_is_asked_for_once_and_seen_afterwards(passes):
    S, T = draw(30, 9, 5)
    T[0], before = False, S
    found = list(masks.in_turns(S, T, passes, seed=2))
    assert len(found) == min(passes, T.sum(-1).max())
    for seen, asked in found:
        assert torch.equal(seen, before)
        before = seen | asked
    assert torch.equal(before, S | T) and torch.equal(sum(asked.int() for _, asked in found), T.int())
    assert len(list(masks.in_turns(S, torch.zeros_like(T), passes))) == 1


def test_random_masks_of_what_was_recorded_have_as_many_patches_as_others():
    recorded = masks.random(400, 10, 0.6, seed=1) & (torch.arange(400) % 4 > 0).unsqueeze(-1)
    recorded |= (torch.arange(400) % 4 == 1).unsqueeze(-1)  # nothing, all, and six of ten
    for ratio in (0.0, 0.25, 0.5, 0.9, 1.0):
        S, plain = masks.random(400, 10, ratio, 3, recorded), masks.random(400, 10, ratio, 3)
        assert not (S & ~recorded).any()
        assert S.sum(-1).equal(recorded.sum(-1).clamp(max=round(ratio * 10)))
        assert S[1::4].equal(plain[1::4])
    counts = masks.random(20_000, 10, 0.3, 4, (torch.arange(10) < 5).expand(20_000, -1)).double().mean(0)
    torch.testing.assert_close(counts[:5], torch.full((5,), 0.6, dtype=torch.float64), rtol=0, atol=0.02)


def test_masks_do_not_hang_on_what_torch_takes_by_default():
    def drawn():
        S = masks.random(4, 16, 0.5, seed=0)
        return S, masks.turns(~S, 3, seed=1), *MaskSampler(joint=0.3)(4, 16, torch.Generator("cpu").manual_seed(2))

    expected = drawn()
    try:
        torch.set_default_dtype(torch.float64)
        found = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        elsewhere = masks.random(4, 16, 0.5, seed=0)
    assert all(map(torch.equal, found, expected)) and elsewhere.equal(expected[0])
