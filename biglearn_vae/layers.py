"""Parts of a pre-norm vision transformer.

B batch, N sequence length, d embedding dimension, r ratio of the MLP's width to d.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, d), with biases, every token seeing every other."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads} and dim={dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h c) -> b h n c", h=self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        x = attend(q, k, v)
        return self.project(rearrange(x, "b h n c -> b n (h c)"))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(c)) v over (B, heads, N, c), the softmax in float32."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    # On CPUs torch's fused attention is slower in bfloat16 than in float32, by a factor of 2 to 3 for 65 tokens; plain
    # products are twice as fast as either. `scripts/benchmark.py` measures it.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


class Block(nn.Module):
    """LayerNorm, attention, LayerNorm, MLP, each pair with a residual connection."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim, mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with a GELU between each two: mlp(d, 2 d, d)."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (L, dim), one for each cell of the grid, row by row.

    A quarter of the numbers each: sines and cosines of the row, then of the column, at `dim / 4` frequencies that fall
    geometrically from 1 to 1/100. (MAE falls to 1/10,000; on grids of 4 to 16 cells a side, most of those numbers would
    be the same everywhere.)
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
