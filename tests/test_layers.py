import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from biglearn_vae.layers import Attention, Block, attend, init_weights, mlp, sincos_positions


def randomised(module: nn.Module) -> nn.Module:
    """In float64, every parameter random (biases and LayerNorms too)."""
    torch.manual_seed(0)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def attention_by_hand(module: Attention, x: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(c)) v, one head and one query at a time, from the module's weights."""
    batch, length, dim = x.shape
    width = dim // module.heads
    q, k, v = (x @ w.T + b for w, b in zip(module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True))
    mixed = torch.empty_like(x)
    for b in range(batch):
        for head in range(module.heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(length):
                scores = torch.stack([(q[b, i, part] * k[b, j, part]).sum() / math.sqrt(width) for j in range(length)])
                weights = torch.exp(scores) / torch.exp(scores).sum()
                mixed[b, i, part] = sum(weights[j] * v[b, j, part] for j in range(length))
    return mixed @ module.project.weight.T + module.project.bias


def norm_by_hand(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias


def mlp_by_hand(module: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    matrices = [layer for layer in module if isinstance(layer, nn.Linear)]
    for matrix in matrices[:-1]:
        x = x @ matrix.weight.T + matrix.bias
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x @ matrices[-1].weight.T + matrices[-1].bias


@pytest.mark.parametrize("heads", [1, 2, 4])
@torch.no_grad()
def test_attention_by_hand(heads):
    attention = randomised(Attention(8, heads))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_close(attention(x), attention_by_hand(attention, x), rtol=1e-12, atol=1e-12)


def test_heads_must_divide_dim():
    with pytest.raises(ValueError, match="heads=3 and dim=8"):
        Attention(8, 3)


@torch.no_grad()
def test_block_by_hand():
    block = randomised(Block(8, 2, 3))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    middle = x + attention_by_hand(block.attention, norm_by_hand(block.norm1, x))
    expected = middle + mlp_by_hand(block.mlp, norm_by_hand(block.norm2, middle))
    assert_close(sum(block(x)), expected, rtol=1e-12, atol=1e-12)
    parts = torch.rand_like(x)
    assert_close(sum(block(x - parts, update=parts)), expected, rtol=1e-12, atol=1e-12)
    assert [tuple(layer.weight.shape) for layer in block.mlp if isinstance(layer, nn.Linear)] == [(24, 8), (8, 24)]


@torch.no_grad()
def test_block_whose_output_matrices_are_zero_is_the_identity():
    block = randomised(Block(8, 2, 2))
    for matrix in (block.attention.project, block.mlp[-1]):
        matrix.weight.zero_()
        matrix.bias.zero_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(sum(block(x)), x)


@pytest.mark.parametrize("widths", [(3, 5), (3, 7, 5), (3, 7, 4, 5)])
@torch.no_grad()
def test_mlp_by_hand(widths):
    layers = randomised(mlp(*widths))
    x = torch.randn(2, 3, dtype=torch.float64)
    assert layers(x).shape == (2, 5)
    assert_close(layers(x), mlp_by_hand(layers, x), rtol=1e-12, atol=1e-12)
    assert sum(isinstance(layer, nn.Linear) for layer in layers) == len(widths) - 1


def test_positions_by_hand():
    positions = sincos_positions((3, 5), 16)
    for row in range(3):
        for column in range(5):
            angles = [[cell * 100 ** (-k / 4) for k in range(4)] for cell in (row, column)]
            expected = [wave(angle) for part in angles for wave in (math.sin, math.cos) for angle in part]
            assert_close(positions[row * 5 + column], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("grid", "dim"), [((8, 8), 128), ((4, 16), 8), ((16, 1), 4)])
def test_positions_are_distinct_and_bounded(grid, dim):
    positions = sincos_positions(grid, dim)
    assert positions.shape == (grid[0] * grid[1], dim)
    assert len(positions.unique(dim=0)) == len(positions)
    assert positions.abs().max() <= 1
    quarter = dim // 4
    assert positions[0].tolist() == ([0.0] * quarter + [1.0] * quarter) * 2


@pytest.mark.parametrize("dim", [6, 17, 130])
def test_positions_need_a_multiple_of_four(dim):
    with pytest.raises(ValueError, match=f"multiple of 4.*{dim}"):
        sincos_positions((2, 2), dim)


@torch.no_grad()
def test_init_weights():
    block = randomised(Block(8, 2, 2)).apply(init_weights)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.8 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-7), (torch.float32, 2**-21)])  # of 8 bits and 24
@pytest.mark.parametrize("queries, length, width", [(5, 5, 16), (1, 5, 16), (31, 31, 8), (32, 32, 8), (65, 65, 64)])
def test_attention_is_that_of_its_rounded_inputs(dtype, bound, queries, length, width):
    """Its output and gradients differ from exact ones of the same rounded q, k, v by rounding alone."""
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, length, length, queries)
    rounded = [torch.randn(2, 3, n, width, generator=generator).to(dtype) for n in lengths]
    results = []
    for own in (dtype, torch.float64):
        q, k, v, weight = (part.to(own).requires_grad_() for part in rounded)
        out = attend(q, k, v) if own == dtype else F.scaled_dot_product_attention(q, k, v)
        assert out.dtype == own
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for low, exact in zip(*results, strict=True):
        error = (low.double() - exact).square().mean().sqrt()
        assert error < bound * exact.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens_that_are_not_valid_are_as_if_they_were_not_there(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=generator).to(dtype) for _ in range(3))
    valid = torch.tensor([[True, True, False, True, False], [True] * 5])
    out = attend(q, k, v, valid)
    assert_close(out[:1], attend(q[:1], k[:1, :, valid[0]], v[:1, :, valid[0]]))
    assert_close(out[1:], attend(q[1:], k[1:], v[1:]))


def test_the_first_tokens_of_a_block_are_those_of_the_whole():
    block = randomised(Block(8, 2, 2)).double()
    x, valid = torch.randn(3, 5, 8).double(), torch.tensor([[True] * 5, [True, True, False, False, True], [True] * 5])
    for queries in (1, 3, 5):
        assert_close(sum(block(x, queries=queries)), sum(block(x))[:, :queries])
        assert_close(sum(block(x, queries=queries, valid=valid)), sum(block(x, valid=valid))[:, :queries])
