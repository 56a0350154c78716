"""Parts of a pre-norm vision transformer.

B batch, N sequence length, d embedding dimension, r ratio of the MLP's width to d.
"""

import contextlib
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

attention: Any = None
biases: Any = None
norms: Any = None
if torch.cuda.is_available():
    with contextlib.suppress(ImportError):  # torch comes without Triton on some systems
        from biglearn_vae import attention, biases, norms


FEW = 32  # sequences of fewer tokens count as short on a CPU


class Linear(nn.Linear):
    """`torch.nn.Linear`, with a faster gradient of its bias on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b: (..., M), (N, M), (N,) -> (..., N)."""
    by_kernel = biases is not None and bias is not None and biases.fits(x, weight)
    return (biases.linear if by_kernel else F.linear)(x, weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, d), with biases, every token seeing every other."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads} and dim={dim}")
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.project = Linear(dim, dim)

    def forward(
        self, x: Tensor, queries: int | None = None, valid: Tensor | None = None, steady: bool = True
    ) -> Tensor:
        """x (B, N, d) -> (B, N, d), or (B, queries, d) for the first tokens alone.

        Args:
            queries: how many of the tokens, from the first on, are asked for; all see the whole sequence.
            valid: boolean (B, N), the tokens that are seen at all; None means every one.
            steady: whether N is the same in all calls, so that a kernel for it is worth being made.
        """
        packed = (self.qkv(x),) if queries is None else self._of_first(x, queries)
        able = attention is not None and steady and valid is None and queries in (None, 1)
        if able and attention.fits(packed[-1][..., : x.shape[-1]], self.heads):
            kernel = attention.attend if queries is None else attention.attend_first
            return self.project(kernel(*packed, self.heads))
        parts = (part for several in packed for part in several.split(x.shape[-1], dim=-1))
        q, k, v = (rearrange(part, "b n (h c) -> b h n c", h=self.heads) for part in parts)
        x = attend(q, k, v, valid, steady)
        return self.project(rearrange(x, "b h n c -> b n (h c)"))

    def _of_first(self, x: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        """Queries (B, queries, d) of the first tokens; keys and values (B, N, 2 d) of all."""
        sizes = (x.shape[-1], 2 * x.shape[-1])
        (q_weight, weight), (q_bias, bias) = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
        return linear(x[:, :queries], q_weight, q_bias), linear(x, weight, bias)


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, steady: bool = True) -> Tensor:
    """softmax(q k' / sqrt(c)) v over (B, heads, N, c), the softmax in float32, over the `valid` (B, N) keys alone.

    `steady` says whether N is the same in all calls.
    """
    seen = None if valid is None else valid[:, None, None]  # (B, 1, 1, N)
    if q.is_cuda and not steady:  # cuDNN would plan anew for each length
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    few, half = k.shape[-2] < FEW, q.dtype == torch.bfloat16
    if q.device.type != "cpu" or not (half or (few and q.shape[-2] > 1)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    # On CPUs torch's fused attention gains little by several threads where sequences are short, and is slow in
    # bfloat16: plain products are as fast or up to three times as fast (`results/choices.md`). A softmax of bfloat16
    # numbers computes in float32 all the same; over few of them it is slow, and worth two conversions.
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(
            q.new_zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5
        ).unflatten(0, q.shape[:2])  # (B, heads, N, N)
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32 if few and half else None)
        return weights.to(v.dtype) @ v


class Block(nn.Module):
    """LayerNorm, attention, LayerNorm, MLP, each pair with a residual connection.

    It takes and returns the residual stream as two summands: what was there, and the last update to it. The LayerNorm
    that follows, perhaps in the next block, adds them up, since on GPUs sum and norm are one kernel.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim, mlp_ratio * dim, dim)

    def forward(
        self,
        x: Tensor,
        *,
        update: Tensor | None = None,
        queries: int | None = None,
        valid: Tensor | None = None,
        steady: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """x (B, N, d) and an update to it, if any -> the same after the block, both (B, N, d), or (B, queries, d).

        Arguments: see `Attention`.
        """
        x, normed = (x, self.norm1(x)) if update is None else add_norm(x, update, self.norm1)
        update = self.attention(normed, queries, valid, steady)
        x, normed = add_norm(x[:, :queries], update, self.norm2)
        return x, self.mlp(normed)


def add_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + update, of one shape (..., d), and the norm of the sum. If a kernel computes both, `norm` is not called."""
    if norms is not None and norms.fits(x, update):
        return norms.add_norm(x, update, norm.weight, norm.bias, norm.eps)
    x = x + update
    return x, norm(x)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with a GELU between each two: mlp(d, 2 d, d)."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [Linear(fan_in, fan_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (L, dim), one for each cell of the grid, row by row.

    A quarter of the numbers each: sines and cosines of the row, then of the column, at `dim / 4` frequencies that fall
    geometrically from 1 towards 1/100. (MAE falls to 1/10,000; on grids of 4 to 16 cells a side, most of those numbers
    would be the same everywhere.)
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for 2-D sine-cosine positions, got {dim}")
    frequencies = torch.exp(-math.log(100) * torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [cells.reshape(-1, 1) * frequencies for cells in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=-1)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases, LayerNorms as the identity; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
