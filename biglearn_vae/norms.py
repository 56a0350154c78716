"""Sums of the residual stream and their LayerNorms on GPUs, as one Triton kernel in each direction.

Whatever stands between the matrix products of a block takes as long as reading and writing its memory does. Here a
token's numbers are read once to add an update to them and normalise the sum, and once more for the gradients of both
and of the norm's own parameters. What it gains is in `results/choices.md`.

M tokens of all sequences together, d their dimension.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from biglearn_vae import cuda_graph, kernels

LARGEST = 4096  # numbers of a token: so many fit into the registers of a program
NUMBERS = 2048  # that a program takes at once, of one token or several


def fits(x: Tensor, update: Tensor) -> bool:
    """Whether `add_norm` takes these summands, computes them right, and is worth launching."""
    half = update.dtype in (torch.bfloat16, torch.float16)
    able = x.is_cuda and x.dtype == torch.float32 and half and x.shape == update.shape and x.shape[-1] <= LARGEST
    return able and cuda_graph.is_worth_launching(x.numel()) and is_right(x.shape[-1], update.dtype, str(x.device))


@kernels.asked_once
def is_right(width: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the kernels compute sums and norms on this device, d being `width`; a warning, once, says if not."""
    g = torch.Generator().manual_seed(0)
    # More than all programs take at once: the one that goes backwards is to go round.
    rows = 2 * kernels.PROGRAMS * kernels.multiprocessors(torch.device(device)) * _rows_at_once(width) + 1
    x, update, d_total, d_normed = (torch.randn(rows, width, generator=g).to(device) for _ in range(4))
    weight, bias = (torch.randn(width, generator=g).to(device) for _ in range(2))
    return kernels.is_right(
        lambda *inputs: add_norm(*inputs, 1e-5),
        lambda x, update, *norm: (x + update, F.layer_norm(x + update, (width,), *norm)),
        (x, update.to(dtype), weight, bias),
        (d_total, d_normed.to(dtype)),
        f"the LayerNorm of {width} numbers",
    )


@torch.library.custom_op("biglearn_vae::add_norm", mutates_args=())
def add_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + update, and its LayerNorm with these parameters.

    Args:
        x: (..., d), float32.
        update: (..., d), of any floating-point type; the sum is float32, its norm of this type.
        weight, bias: (d,).
        eps: is added to variances, positive.
    """
    x, update = x.contiguous(), update.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(update)
    rows, sizes = x.numel() // x.shape[-1], _sizes(x)
    with torch.cuda.device_of(x):  # Triton starts kernels on the current one
        _forward[(triton.cdiv(rows, sizes["ROWS"]),)](x, update, weight, bias, total, normed, rows, eps, **sizes)
    return total, normed


@torch.library.custom_op("biglearn_vae::add_norm_backward", mutates_args=())
def add_norm_backward(
    total: Tensor, weight: Tensor, d_total: Tensor, d_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, update, and weight and bias (2, d), given those of the sum `total` and of its norm."""
    d_total, d_normed = d_total.contiguous(), d_normed.contiguous()
    d_x, d_update = torch.empty_like(total), torch.empty_like(d_normed)
    rows, width, sizes = total.numel() // total.shape[-1], total.shape[-1], _sizes(total)
    programs = min(triton.cdiv(rows, sizes["ROWS"]), kernels.PROGRAMS * kernels.multiprocessors(total.device))
    parts = total.new_empty(programs, 2, width)
    with torch.cuda.device_of(total):
        _backward[(programs,)](total, weight, d_total, d_normed, d_x, d_update, parts, rows, eps, **sizes)
    return d_x, d_update, kernels.sum_rows(parts.flatten(1)).view(2, width)


@add_norm.register_fake
def _(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, normed = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, update))
    return total, normed


@add_norm_backward.register_fake
def _(total: Tensor, weight: Tensor, d_total: Tensor, d_normed: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_update = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (total, d_normed))
    return d_x, d_update, weight.new_empty(2, len(weight))


def _keep(ctx, inputs, output) -> None:
    _, _, weight, _, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight)


def _gradients(ctx, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor | None, ...]:
    d_x, d_update, d_norm = add_norm_backward(*ctx.saved_tensors, d_total, d_normed, ctx.eps)
    return d_x, d_update, *d_norm.unbind(), None


add_norm.register_autograd(_gradients, setup_context=_keep)


def _sizes(x: Tensor) -> dict[str, int]:
    """What both kernels are told: d, the same padded to a power of 2, and how many tokens to take at once."""
    width = x.shape[-1]
    return dict(D=width, BLOCK=triton.next_power_of_2(width), ROWS=_rows_at_once(width))


def _rows_at_once(width: int) -> int:
    return max(1, NUMBERS // triton.next_power_of_2(width))


@triton.jit
def _standardised(total, columns, eps, D: tl.constexpr):
    """Rows with a mean of 0 and a variance of 1, and what they were multiplied by."""
    centred = tl.where(columns[None, :], total - tl.sum(total, 1)[:, None] / D, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * scale[:, None], scale


@triton.jit
def _forward(
    x, update, weight, bias, total, normed, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at, inside = r.to(tl.int64)[:, None] * D + c[None, :], (r < rows)[:, None] & (c < D)[None, :]
    s = tl.load(x + at, mask=inside, other=0.0) + tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, s, mask=inside)
    w, b = tl.load(weight + c, mask=c < D, other=0.0), tl.load(bias + c, mask=c < D, other=0.0)
    standard, _ = _standardised(s, c < D, eps, D)
    tl.store(normed + at, (standard * w[None, :] + b[None, :]).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    total, weight, d_total, d_normed, d_x, d_update, parts, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < D, other=0.0)
    d_weight, d_bias = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    start = tl.program_id(0) * ROWS
    while start < rows:
        r = start + tl.arange(0, ROWS)
        at, inside = r.to(tl.int64)[:, None] * D + c[None, :], (r < rows)[:, None] & (c < D)[None, :]
        s = tl.load(total + at, mask=inside, other=0.0)
        g = tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)
        d_s = tl.load(d_total + at, mask=inside, other=0.0)
        standard, scale = _standardised(s, c < D, eps, D)
        d_weight += g * standard
        d_bias += g
        g *= w[None, :]
        mean, slope = tl.sum(g, 1) / D, tl.sum(g * standard, 1) / D
        d_s += (g - mean[:, None] - standard * slope[:, None]) * scale[:, None]
        tl.store(d_x + at, d_s, mask=inside)
        tl.store(d_update + at, d_s.to(d_update.dtype.element_ty), mask=inside)
        start += tl.num_programs(0) * ROWS
    part = parts + tl.program_id(0) * 2 * D + c
    tl.store(part, tl.sum(d_weight, 0), mask=c < D)
    tl.store(part + D, tl.sum(d_bias, 0), mask=c < D)
