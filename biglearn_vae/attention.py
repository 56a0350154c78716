"""Attention over short sequences on GPUs: of z and at most 128 tokens, as one Triton kernel in each direction.

The kernels of torch work in tiles of 64 or 128 keys: of 65 tokens, z and the patches of an 8 x 8 grid, they compute
two tiles a side, the second for a single token. Here the first token is kept apart, in small products beside the large
ones, and everything of a head stays in one program, from the queries, keys and values as the linear layer wrote them to
what the next one reads. For 65 tokens of 64 numbers a head on an H200, cuDNN's take 1.5 times as long forwards and 2.3
times backwards, copies from and to its layout included.

B batch, N sequence length, H heads, C numbers per head, d = H C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_NUMBERS = 2**13  # of the tokens behind the first of a head, padded: so many fit into the registers of a program


def fits(qkv: Tensor, heads: int) -> bool:
    """Whether `attend` takes these queries, keys and values (B, N, 3 d)."""
    tokens, width = qkv.shape[1] - 1, qkv.shape[-1] // (3 * heads)
    even = width & (width - 1) == 0 and 16 <= width <= 128 and 16 <= tokens <= 128
    half = qkv.dtype in (torch.bfloat16, torch.float16)  # products of float32 would be rounded
    return qkv.is_cuda and half and even and _block(qkv) * width <= MOST_NUMBERS


@torch.library.custom_op("biglearn_vae::attend", mutates_args=())
def attend(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k' / sqrt(C)) v of every head, every token seeing every other.

    Args:
        qkv: queries, keys and values (B, N, 3 d), all heads of the first before those of the second.
        heads: H.

    Returns:
        (B, N, d), of the type of `qkv`; in between everything but the operands of matrix products is float32.
    """
    qkv = qkv.contiguous()
    result = qkv.new_empty(*qkv.shape[:2], qkv.shape[-1] // 3)
    _forward[_grid(qkv, heads)](qkv, result, **_sizes(qkv, heads))
    return result


@torch.library.custom_op("biglearn_vae::attend_backward", mutates_args=())
def attend_backward(qkv: Tensor, gradient: Tensor, heads: int) -> Tensor:
    """The gradient (B, N, 3 d) of `qkv`, given that of what `attend` returns; its weights are computed once more."""
    qkv = qkv.contiguous()
    result = torch.empty_like(qkv)
    _backward[_grid(qkv, heads)](qkv, gradient.contiguous(), result, **_sizes(qkv, heads))
    return result


@attend.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[-1] // 3)


@attend_backward.register_fake
def _(qkv: Tensor, gradient: Tensor, heads: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:
    qkv, ctx.heads = inputs
    ctx.save_for_backward(qkv)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    return attend_backward(*ctx.saved_tensors, gradient, ctx.heads), None


attend.register_autograd(_gradients, setup_context=_keep)


def _grid(qkv: Tensor, heads: int) -> tuple[int]:
    return (len(qkv) * heads,)


def _sizes(qkv: Tensor, heads: int) -> dict[str, int]:
    """What both kernels are told."""
    width, block = qkv.shape[-1] // (3 * heads), _block(qkv)
    warps = 4 if block * width <= MOST_NUMBERS // 2 else 8
    return dict(N=qkv.shape[1], H=heads, C=width, BLOCK=block, num_warps=warps)


def _block(qkv: Tensor) -> int:
    """How many tokens behind the first, padded to a power of 2."""
    return 1 << (qkv.shape[1] - 2).bit_length()


# In the kernels "0" is the first token, and a name without it are those behind it: `p` (BLOCK, BLOCK) are the weights
# that these give each other, `p0` those that they give the first, `w` those that it gives them, and `w0` itself. Where
# the first token is multiplied with all others, it is the first of 16 rows or columns, of which the others are 0: the
# least that tensor cores take. In sums without them the other tokens would be spread over the registers once more.


@triton.jit
def _weights(q, k, qs, ks, q0, k0, inside, C: tl.constexpr):
    """The weights p, p0, w, w0 of keys, float32, each row of them with a sum of 1."""
    scale = 1.4426950408889634 / C**0.5  # powers of 2 instead of e
    s = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    s0 = _products(q, ks) * scale
    t = tl.where(inside, _products(k, qs) * scale, float("-inf"))
    t0 = tl.sum(q0 * k0, 0) * scale
    most = tl.maximum(tl.max(s, 1), s0)
    p, p0 = tl.exp2(s - most[:, None]), tl.exp2(s0 - most)
    total = 1 / (tl.sum(p, 1) + p0)
    most0 = tl.maximum(tl.max(t, 0), t0)
    w, w0 = tl.exp2(t - most0), tl.exp2(t0 - most0)
    total0 = 1 / (tl.sum(w, 0) + w0)
    return p * total[:, None], p0 * total, w * total0, w0 * total0


@triton.jit
def _products(x, first):
    """Of each row (BLOCK, C) with the only row of `first` (16, C) that is not 0: (BLOCK,)."""
    return tl.sum(tl.dot(x, tl.trans(first)), 1)


@triton.jit
def _weighted(x, weights):
    """The sum (C,) of rows (BLOCK, C) with weights (BLOCK,)."""
    column = tl.where(tl.arange(0, 16)[None, :] == 0, weights[:, None], 0.0).to(x.dtype)  # (BLOCK, 16)
    return tl.sum(tl.dot(tl.trans(x), column), 1)


@triton.jit
def _read(row0, rows, inside, C: tl.constexpr):
    """Numbers of the first token, float32 (C,), the same above rows of 0 (16, C), and of the tokens behind it."""
    c, n = tl.arange(0, C), tl.arange(0, 16)
    first = tl.load(row0 + 0 * n[:, None] + c[None, :], mask=n[:, None] == 0, other=0.0)
    others = tl.load(rows + c[None, :], mask=inside[:, None], other=0.0)
    return tl.load(row0 + c).to(tl.float32), first, others


@triton.jit
def _write(row0, rows, inside, first, others, C: tl.constexpr):
    c = tl.arange(0, C)
    tl.store(row0 + c, first.to(row0.dtype.element_ty))
    tl.store(rows + c[None, :], others.to(row0.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _forward(qkv, result, N: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    n = tl.arange(0, BLOCK)
    inside = n < N - 1
    row0 = qkv + batch * N * 3 * H * C + head * C
    rows = row0 + (1 + n[:, None]) * 3 * H * C
    q0, qs, q = _read(row0, rows, inside, C)
    k0, ks, k = _read(row0 + H * C, rows + H * C, inside, C)
    v0, _vs, v = _read(row0 + 2 * H * C, rows + 2 * H * C, inside, C)
    p, p0, w, w0 = _weights(q, k, qs, ks, q0, k0, inside, C)
    seen, seen0 = tl.dot(p.to(v.dtype), v) + p0[:, None] * v0[None, :], _weighted(v, w) + w0 * v0
    row0 = result + batch * N * H * C + head * C
    _write(row0, row0 + (1 + n[:, None]) * H * C, inside, seen0, seen, C)


@triton.jit
def _backward(qkv, gradient, result, N: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    n = tl.arange(0, BLOCK)
    inside = n < N - 1
    start = batch * N * 3 * H * C + head * C
    row0, apart = qkv + start, (1 + n[:, None]) * 3 * H * C
    rows = row0 + apart
    q0, qs, q = _read(row0, rows, inside, C)
    k0, ks, k = _read(row0 + H * C, rows + H * C, inside, C)
    given = gradient + batch * N * H * C + head * C
    g0, gs, g = _read(given, given + (1 + n[:, None]) * H * C, inside, C)
    p, p0, w, w0 = _weights(q, k, qs, ks, q0, k0, inside, C)
    out0 = result + start
    outs = out0 + apart
    # One after the other, so that little is held at a time.
    dv = tl.dot(tl.trans(p.to(g.dtype)), g) + w[:, None] * g0[None, :]
    _write(out0 + 2 * H * C, outs + 2 * H * C, inside, _weighted(g, p0) + w0 * g0, dv, C)
    v0, vs, v = _read(row0 + 2 * H * C, rows + 2 * H * C, inside, C)
    dp, dp0 = tl.dot(g, tl.trans(v)), _products(g, vs)
    dw, dw0 = _products(v, gs), tl.sum(v0 * g0, 0)
    mean, mean0 = tl.sum(p * dp, 1) + p0 * dp0, tl.sum(w * dw, 0) + w0 * dw0
    scale = 1 / C**0.5
    ds, ds0 = (p * (dp - mean[:, None]) * scale).to(q.dtype), p0 * (dp0 - mean) * scale
    dt, dt0 = w * (dw - mean0) * scale, w0 * (dw0 - mean0) * scale
    dq = tl.dot(ds, k) + ds0[:, None] * k0[None, :]
    _write(out0, outs, inside, _weighted(k, dt) + dt0 * k0, dq, C)
    dk = tl.dot(tl.trans(ds), q) + dt[:, None] * q0[None, :]
    _write(out0 + H * C, outs + H * C, inside, _weighted(q, ds0) + dt0 * q0, dk, C)
