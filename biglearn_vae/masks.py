"""Which patches are observed (S) and which are asked for (T).

Masks are boolean (B, L), True = in the set. `MaskSampler` is q(S, T) of the objective; the functions make masks
for a trained model. B batch, L tokens.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biglearn_vae import checks


@dataclass(frozen=True)
class MaskSampler:
    """q(S, T) of Algorithm 1: S-ratio ~ Beta(a1, b1), T-ratio ~ Beta(a2, b2), then uniform subsets of those sizes.

    |S| = floor(S-ratio L) and |T| = ceil(T-ratio (L - |S|)), so S and T are disjoint, T is never empty, and S empty
    and T everything are both reached. The T-ratio is a fraction of the positions outside S.

    Args:
        s_ratio: (a1, b1), both positive.
        t_ratio: (a2, b2), both positive.
        joint: share of purely joint tasks, S empty and T everything, in [0, 1]. 1 gives the ordinary VAE.
        ratios_per: "sample" draws the two ratios (and whether a task is joint) for every image, "step" once for the
            whole batch, as Algorithm 1 is written.

    Raises:
        ValueError: on parameters outside these ranges.
    """

    s_ratio: tuple[float, float] = (1.0, 2.0)
    t_ratio: tuple[float, float] = (2.0, 0.5)
    joint: float = 0.0
    ratios_per: str = "sample"

    def __post_init__(self):
        for name in ("s_ratio", "t_ratio"):
            checks.real_numbers(name, getattr(self, name), 2, "(0, inf)", ": parameters of a Beta distribution")
        checks.real_number("joint", self.joint, "[0, 1]")
        checks.check_choice("ratios_per", self.ratios_per, ("sample", "step"))

    def altered(self, **settings: Any) -> "MaskSampler":
        """A copy with other settings. It keeps all that a subclass has, which dataclasses.replace may not."""
        result = copy.copy(self)
        for name, value in settings.items():
            object.__setattr__(result, name, value)
        return result

    def __call__(
        self, batch_size: int, num_tokens: int, generator: torch.Generator, recorded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw (S, T), each boolean (batch_size, num_tokens), on the generator's device.

        Args:
            recorded: boolean (batch_size, num_tokens), the patches that were ever recorded; by default all. S and T
                are subsets of them, and their number takes the place of L. T is empty only where nothing was recorded.

        Raises:
            ValueError: if sizes are not whole numbers, or arguments have another type or shape.
        """
        shape = (checks.whole_number("batch_size", batch_size, 0), checks.whole_number("num_tokens", num_tokens, 1))
        if not isinstance(generator, torch.Generator):
            raise ValueError(
                "expected a torch.Generator to draw masks from, such as torch.Generator().manual_seed(0), "
                f"got {checks.described(generator)}"
            )
        if recorded is None:
            recorded = torch.ones(shape, dtype=torch.bool, device=generator.device)
        check_recorded(recorded, shape)
        return self.assign(*self.draw(*shape, generator), recorded)

    def draw(self, batch_size: int, num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The random numbers behind (S, T), in [0, 1]: S-ratios (B, 1), T-ratios (B, 1) and an order (B, L)."""
        rows = batch_size if self.ratios_per == "sample" else 1
        s_ratio, t_ratio = (_beta(parameters, rows, generator) for parameters in (self.s_ratio, self.t_ratio))
        joint = uniform_numbers(rows, generator) < self.joint
        ratios = (s_ratio.masked_fill(joint, 0), t_ratio.masked_fill(joint, 1))
        order = uniform_numbers((batch_size, num_tokens), generator)
        s_ratio, t_ratio = (ratio.unsqueeze(-1).expand(batch_size, 1) for ratio in ratios)
        return s_ratio, t_ratio, order

    @staticmethod
    def assign(s_ratio: Tensor, t_ratio: Tensor, order: Tensor, recorded: Tensor) -> tuple[Tensor, Tensor]:
        """(S, T) from what `draw` gave, among the patches that were recorded (B, L)."""
        count = recorded.sum(-1, keepdim=True)  # (B, 1)
        s = (s_ratio * count).floor().minimum(count - 1)
        t = (t_ratio * (count - s)).ceil().clamp(min=1)
        rank = rank_among(recorded, order)
        return rank < s, (rank >= s) & (rank < s + t) & recorded


def check_recorded(recorded: Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError unless this is a mask (B, L) of the patches that were ever recorded."""
    if not checks.is_mask(recorded) or tuple(recorded.shape) != tuple(shape):
        raise ValueError(
            f"expected a boolean mask of what was recorded, of shape {tuple(shape)}, got {checks.described(recorded)}"
        )


def seen(x: Tensor, S: Tensor) -> Tensor:
    """Tokens x (B, L, D) with 0 in place of those outside S (B, L): no network gets to see what it is to predict."""
    return x.masked_fill(~S.unsqueeze(-1), 0)


def rank_among(mask: Tensor, order: Tensor) -> Tensor:
    """Ranks (B, L), from 0 on, of the patches in a mask (B, L) by `order`, numbers in [0, 1]; others come after."""
    return order.masked_fill(~mask, 2).argsort(dim=-1).argsort(dim=-1)


def turns(T: Tensor, passes: int, seed: int | None = None) -> Tensor:
    """The number of the pass, 0 to passes - 1, that takes each patch of T (B, L), and -1 for all others: (B, L).

    The order is random, another one for each row. The numbers of patches that passes take of a row differ by at most
    one; if a row has fewer patches than there are passes, some take none of it.
    """
    if not checks.is_mask(T) or T.ndim != 2:
        raise ValueError(f"expected a boolean mask (B, L), got {checks.described(T)}")
    passes = min(checks.whole_number("passes", passes, 1), max(1, T.shape[1]))  # more would be empty in every row
    order = uniform_numbers(T.shape, _generator(seed)).to(T.device)
    place = rank_among(T, order) * passes // T.sum(-1, keepdim=True).clamp(min=1)
    return place.masked_fill(~T, -1)


def in_turns(S: Tensor, T: Tensor, passes: int, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of several passes over T given S, what is seen and what is asked for, (B, L) each: the chain rule.

    The patches of T are asked for in turns (see `turns`), and seen from the next pass on. There are no more passes
    than patches of T in the row that has the most, and one pass if T is empty.
    """
    passes = checks.whole_number("passes", passes, 1)
    if passes == 1:
        return iter([(S, T)])
    passes = max(1, min(passes, int(T.sum(-1).max())))
    order = turns(T, passes, seed)
    return ((S | (T & (order < turn)), order == turn) for turn in range(passes))


def positions(first: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Indices (B, n) where a mask (B, L) is True, followed by those where a second one is.

    n is the most that any row has; other rows are filled up with indices where neither is True. The second result,
    boolean (B, n), is False for these, and None if there are none. On a GPU this waits for the device, since the host
    has to know n.
    """
    mask = first if second is None else first | second
    rank = (~mask).byte() if second is None else (~mask).byte() + (~first)
    most = int(mask.sum(-1).max()) if len(mask) else 0
    index = rank.argsort(dim=-1, stable=True)[:, :most]
    valid = mask.gather(1, index)
    return index, None if valid.all() else valid


def _beta(parameters: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """Beta(a, b) numbers in [0, 1], (count,): G_a / (G_a + G_b) of Gamma variables; torch's own takes no generator.

    Computed through logarithms, by G_a = G_{a+1} U^(1/a), so that small parameters do not underflow to 0 / 0.
    """
    device = generator.device
    # Made on the device: a copy from the host could not be part of a CUDA graph.
    concentration = torch.stack([torch.full((count,), p, dtype=torch.float64, device=device) for p in parameters], -1)
    uniform = uniform_numbers((count, 2), generator, torch.float64)
    logs = torch._standard_gamma(concentration + 1, generator=generator).log() + uniform.log() / concentration
    return torch.sigmoid(logs[:, 0] - logs[:, 1])


def random(
    batch_size: int, num_tokens: int, ratio: float, seed: int | None = None, recorded: Tensor | None = None
) -> Tensor:
    """Masks (B, L) in which a share `ratio` of the patches, rounded to a whole number, is observed, chosen at random.

    The same seed gives the same masks; without one, `torch.manual_seed` determines them.

    Args:
        recorded: boolean (B, L), patches to choose from: as many as without it, or all of them where there are fewer.
    """
    shape = (checks.whole_number("batch_size", batch_size, 0), checks.whole_number("num_tokens", num_tokens, 1))
    seen = round(checks.real_number("ratio", ratio, "[0, 1]") * shape[1])
    place = uniform_numbers(shape, _generator(seed)).argsort(dim=-1)
    if recorded is None:
        return place < seen
    check_recorded(recorded, shape)
    return (rank_among(recorded, place.to(recorded.device) / num_tokens) < seen) & recorded


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(checks.seed_or_drawn(seed))


def uniform_numbers(
    shape: int | Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers in [0, 1) on the generator's device, whatever torch's default device and precision are."""
    return torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)


def box(grid: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """Mask (L,) in which a box of patches is hidden and all else is observed. All arguments count patches."""
    mask = torch.ones(checks.check_grid(grid), dtype=torch.bool)
    for name, value in dict(top=top, left=left, height=height, width=width).items():
        checks.whole_number(name, value)
    if top < 0 or left < 0 or height < 0 or width < 0 or top + height > grid[0] or left + width > grid[1]:
        raise ValueError(
            f"the box must lie in the grid of {grid[0]} x {grid[1]} patches, got rows {top} to {top + height} "
            f"and columns {left} to {left + width}"
        )
    mask[top : top + height, left : left + width] = False
    return mask.flatten()


def centre(grid: tuple[int, int]) -> Tensor:
    """Mask (L,) in which the middle of the image, half of its height and half of its width, is hidden.

    Halves are rounded up to whole patches; a box that cannot be centred lies nearer to the top left.
    """
    rows, columns = checks.check_grid(grid)
    return box(grid, rows // 4, columns // 4, -(-rows // 2), -(-columns // 2))


def half(grid: tuple[int, int], observed: str = "top") -> Tensor:
    """Mask (L,) in which one half of the image is observed: "top", "bottom", "left" or "right"."""
    mask = torch.zeros(checks.check_grid(grid), dtype=torch.bool)
    parts = {
        "top": (slice(None, grid[0] // 2), slice(None)),
        "bottom": (slice(grid[0] // 2, None), slice(None)),
        "left": (slice(None), slice(None, grid[1] // 2)),
        "right": (slice(None), slice(grid[1] // 2, None)),
    }
    checks.check_choice("observed", observed, list(parts))
    mask[parts[observed]] = True
    return mask.flatten()


def from_pixels(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixel masks (H, W) or (B, H, W) -> patch masks (L,) or (B, L): a patch is observed if all of its pixels are."""
    if not checks.is_mask(pixels) or pixels.ndim not in (2, 3):
        raise ValueError(f"expected a boolean mask of shape (H, W) or (B, H, W), got {checks.described(pixels)}")
    _patch_size(pixels.shape[-2:], grid)
    cells = pixels.unflatten(-1, (grid[1], -1)).unflatten(-3, (grid[0], -1))  # (..., rows, P, columns, P)
    return cells.all(dim=-1).all(dim=-2).flatten(-2)


def to_pixels(S: Tensor, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
    """Patch masks (..., L) -> pixel masks (..., H, W), for images of `size` = (H, W)."""
    height, width = _patch_size(size, grid)
    if not checks.is_mask(S) or S.shape[-1:] != (grid[0] * grid[1],):
        raise ValueError(f"expected a boolean mask of shape (..., {grid[0] * grid[1]}), got {checks.described(S)}")
    return S.unflatten(-1, grid).repeat_interleave(height, dim=-2).repeat_interleave(width, dim=-1)


def _patch_size(size: Sequence[int], grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of the patches that make an image of `size` = (H, W)."""
    (rows, columns), sides = checks.check_grid(grid), checks.whole_numbers(size, 0)
    if len(sides) != 2:
        raise ValueError(f"size must be two numbers, height and width in pixels, got {size}")
    height, width = sides
    if height % rows or width % columns:
        raise ValueError(f"a mask of {height} x {width} pixels does not fit a grid of {rows} x {columns} patches")
    return height // rows, width // columns


def recorded_patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches of images (B, C, H, W) were recorded, (B, L): those without a NaN."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ValueError(f"expected images (B, C, H, W), got {checks.described(images)}")
    return from_pixels(~images.isnan().any(dim=1), grid)


def recorded(tokens: Tensor) -> Tensor:
    """Which tokens of (B, L, D) were recorded, (B, L): those without a NaN."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise ValueError(f"expected tokens (B, L, D), got {checks.described(tokens)}")
    return ~tokens.isnan().any(dim=-1)
