"""Attention over short sequences on GPUs: of z and at most 128 tokens, as one Triton kernel in each direction.

The kernels of torch work in tiles of 64 or 128 keys: of 65 tokens, z and the patches of an 8 x 8 grid, they compute
two tiles a side, the second for a single token. Here the first token is kept apart, in sums beside the matrix products,
and everything of a head stays in one program, from the queries, keys and values as the linear layer wrote them to what
the next one reads. What it gains over torch's is in `results/choices.md`.

B batch, N sequence length, H heads, C numbers per head, d = H C.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from biglearn_vae import kernels

MOST_NUMBERS = 2**13  # of the tokens behind the first of a head, padded: so many fit into registers beside the weights


def fits(x: Tensor, heads: int) -> bool:
    """Whether the kernels take queries, keys and values of the shape and type of these tokens, and are right."""
    tokens, width = x.shape[1] - 1, x.shape[-1] // heads
    even = width & (width - 1) == 0 and 16 <= width <= 128 and 16 <= tokens <= 128
    half = x.dtype in (torch.bfloat16, torch.float16)  # products of float32 would be rounded
    able = x.is_cuda and half and even and _block(x) * width <= MOST_NUMBERS
    return able and is_right(tokens + 1, heads, width, x.dtype, str(x.device))


@kernels.asked_once
def is_right(length: int, heads: int, width: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the kernels compute attention on this device; a warning, once, says if not.

    Args:
        length, width: N and C.
    """
    g, d = torch.Generator().manual_seed(0), heads * width
    qkv, gradient = (torch.randn(2, length, parts * d, generator=g).to(device, dtype) for parts in (3, 1))
    words = f"attention over {length} tokens of {heads} x {width} numbers"
    return all(
        kernels.is_right(
            functools.partial(kernel, heads=heads), functools.partial(_plainly, heads=heads), packed, [given], words
        )
        for kernel, packed, given in (
            (attend, [qkv], gradient),
            (attend_first, [qkv[:, :1, :d], qkv[..., d:]], gradient[:, :1]),
        )
    )


def _plainly(*packed: Tensor, heads: int) -> Tensor:
    """Attention of queries, keys and values (B, N, d), packed behind each other in one tensor or two."""
    d = sum(part.shape[-1] for part in packed) // 3
    q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for one in packed for p in one.split(d, dim=-1))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)


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
    with torch.cuda.device_of(qkv):  # Triton starts kernels on the current one
        _forward[_grid(qkv, heads)](qkv, result, **_sizes(qkv, heads, 3))
    return result


@torch.library.custom_op("biglearn_vae::attend_backward", mutates_args=())
def attend_backward(qkv: Tensor, gradient: Tensor, heads: int) -> Tensor:
    """The gradient (B, N, 3 d) of `qkv`, given that of what `attend` returns; its weights are computed once more."""
    qkv = qkv.contiguous()
    result = torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):
        _backward[_grid(qkv, heads)](qkv, gradient.contiguous(), result, **_sizes(qkv, heads, 3))
    return result


@attend.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[-1] // 3)


@attend_backward.register_fake
def _(qkv: Tensor, gradient: Tensor, heads: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


@torch.library.custom_op("biglearn_vae::attend_first", mutates_args=())
def attend_first(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """What `attend` gives for the first token alone, (B, 1, d).

    Args:
        q: its queries (B, 1, d).
        kv: keys and values (B, N, 2 d) of all tokens.
        heads: H.
    """
    q, kv = q.contiguous(), kv.contiguous()
    result = torch.empty_like(q)
    with torch.cuda.device_of(kv):
        _forward_first[_grid(kv, heads)](q, kv, result, **_sizes(kv, heads, 2))
    return result


@torch.library.custom_op("biglearn_vae::attend_first_backward", mutates_args=())
def attend_first_backward(q: Tensor, kv: Tensor, gradient: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Gradients of `q` and `kv`, given that of what `attend_first` returns."""
    q, kv = q.contiguous(), kv.contiguous()
    d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
    with torch.cuda.device_of(kv):
        _backward_first[_grid(kv, heads)](q, kv, gradient.contiguous(), d_q, d_kv, **_sizes(kv, heads, 2))
    return d_q, d_kv


@attend_first.register_fake
def _(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@attend_first_backward.register_fake
def _(q: Tensor, kv: Tensor, gradient: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    d_q, d_kv = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (q, kv))
    return d_q, d_kv


def _keep(ctx, inputs, output) -> None:
    *packed, ctx.heads = inputs
    ctx.save_for_backward(*packed)


def _gradient(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    return attend_backward(*ctx.saved_tensors, gradient, ctx.heads), None


def _gradients_first(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *attend_first_backward(*ctx.saved_tensors, gradient, ctx.heads), None


attend.register_autograd(_gradient, setup_context=_keep)
attend_first.register_autograd(_gradients_first, setup_context=_keep)


def _grid(packed: Tensor, heads: int) -> tuple[int]:
    return (len(packed) * heads,)


def _sizes(packed: Tensor, heads: int, parts: int) -> dict[str, int]:
    """What the kernels are told, given so many of queries, keys and values (B, N, parts d)."""
    width, block = packed.shape[-1] // (parts * heads), _block(packed)
    warps = 4 if block * width <= MOST_NUMBERS // 2 else 8
    return dict(N=packed.shape[1], H=heads, C=width, BLOCK=block, num_warps=warps)


def _block(x: Tensor) -> int:
    """How many tokens behind the first of (B, N, ...), padded to a power of 2."""
    return 1 << (x.shape[1] - 2).bit_length()


# In the kernels "0" is the first token, and a name without it are those behind it: `p` (BLOCK, BLOCK) are the weights
# that these give each other, `p0` those that they give the first, `w` those that it gives them, and `w0` itself.


@triton.jit
def _weights(q, k, q0, k0, inside, C: tl.constexpr):
    """The weights p, p0, w, w0 of keys, float32, each row of them with a sum of 1."""
    scale = 1.4426950408889634 / C**0.5  # powers of 2 instead of e
    s = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    s0 = tl.sum(q * k0[None, :], 1) * scale
    most = tl.maximum(tl.max(s, 1), s0)
    p, p0 = tl.exp2(s - most[:, None]), tl.exp2(s0 - most)
    total = 1 / (tl.sum(p, 1) + p0)
    w, w0 = _weights_of_first(k, q0, k0, inside, C)
    return p * total[:, None], p0 * total, w, w0


@triton.jit
def _weights_of_first(k, q0, k0, inside, C: tl.constexpr):
    scale = 1.4426950408889634 / C**0.5
    t = tl.where(inside, tl.sum(k * q0[None, :], 1) * scale, float("-inf"))
    t0 = tl.sum(q0 * k0, 0) * scale
    most = tl.maximum(tl.max(t, 0), t0)
    w, w0 = tl.exp2(t - most), tl.exp2(t0 - most)
    total = 1 / (tl.sum(w, 0) + w0)
    return w * total, w0 * total


@triton.jit
def _read(row0, rows, inside, C: tl.constexpr):
    """The first token's numbers, float32, and those of the tokens behind it, as they are."""
    c = tl.arange(0, C)
    return tl.load(row0 + c).to(tl.float32), tl.load(rows + c[None, :], mask=inside[:, None], other=0.0)


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
    q0, q = _read(row0, rows, inside, C)
    k0, k = _read(row0 + H * C, rows + H * C, inside, C)
    v0, v = _read(row0 + 2 * H * C, rows + 2 * H * C, inside, C)
    p, p0, w, w0 = _weights(q, k, q0, k0, inside, C)
    seen = tl.dot(p.to(v.dtype), v) + p0[:, None] * v0[None, :]
    seen0 = tl.sum(w[:, None] * v, 0) + w0 * v0
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
    q0, q = _read(row0, rows, inside, C)
    k0, k = _read(row0 + H * C, rows + H * C, inside, C)
    v0, v = _read(row0 + 2 * H * C, rows + 2 * H * C, inside, C)
    given = gradient + batch * N * H * C + head * C
    g0, g = _read(given, given + (1 + n[:, None]) * H * C, inside, C)
    p, p0, w, w0 = _weights(q, k, q0, k0, inside, C)
    row0 = result + start
    rows = row0 + apart
    dv = tl.dot(tl.trans(p).to(g.dtype), g) + w[:, None] * g0[None, :]
    dv0 = tl.sum(p0[:, None] * g, 0) + w0 * g0
    _write(row0 + 2 * H * C, rows + 2 * H * C, inside, dv0, dv, C)
    dp, dp0 = tl.dot(g, tl.trans(v)), tl.sum(g * v0[None, :], 1)
    dw, dw0 = tl.sum(v * g0[None, :], 1), tl.sum(v0 * g0, 0)
    mean, mean0 = tl.sum(p * dp, 1) + p0 * dp0, tl.sum(w * dw, 0) + w0 * dw0
    scale = 1 / C**0.5
    ds, ds0 = (p * (dp - mean[:, None]) * scale).to(q.dtype), p0 * (dp0 - mean) * scale
    dt, dt0 = w * (dw - mean0) * scale, w0 * (dw0 - mean0) * scale
    dq, dq0 = tl.dot(ds, k) + ds0[:, None] * k0[None, :], tl.sum(dt[:, None] * k, 0) + dt0 * k0
    _write(row0, rows, inside, dq0, dq, C)
    dk, dk0 = tl.dot(tl.trans(ds), q) + dt[:, None] * q0[None, :], tl.sum(ds0[:, None] * q, 0) + dt0 * q0
    _write(row0 + H * C, rows + H * C, inside, dk0, dk, C)


@triton.jit
def _forward_first(q, kv, result, N: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    n, c = tl.arange(0, BLOCK), tl.arange(0, C)
    inside = n < N - 1
    row0 = kv + batch * N * 2 * H * C + head * C
    rows = row0 + (1 + n[:, None]) * 2 * H * C
    first = tl.program_id(0).to(tl.int64) * C + c
    q0 = tl.load(q + first).to(tl.float32)
    k0, k = _read(row0, rows, inside, C)
    v0, v = _read(row0 + H * C, rows + H * C, inside, C)
    w, w0 = _weights_of_first(k, q0, k0, inside, C)
    seen = tl.sum(w[:, None] * v, 0) + w0 * v0
    tl.store(result + first, seen.to(result.dtype.element_ty))


@triton.jit
def _backward_first(q, kv, gradient, d_q, d_kv, N: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    n, c = tl.arange(0, BLOCK), tl.arange(0, C)
    inside = n < N - 1
    start, apart = batch * N * 2 * H * C + head * C, (1 + n[:, None]) * 2 * H * C
    first = tl.program_id(0).to(tl.int64) * C + c
    q0, g0 = tl.load(q + first).to(tl.float32), tl.load(gradient + first).to(tl.float32)
    k0, k = _read(kv + start, kv + start + apart, inside, C)
    v0, v = _read(kv + start + H * C, kv + start + H * C + apart, inside, C)
    w, w0 = _weights_of_first(k, q0, k0, inside, C)
    dw, dw0 = tl.sum(v * g0[None, :], 1), tl.sum(v0 * g0, 0)
    mean, scale = tl.sum(w * dw, 0) + w0 * dw0, 1 / C**0.5
    dt, dt0 = w * (dw - mean) * scale, w0 * (dw0 - mean) * scale
    tl.store(d_q + first, (tl.sum(dt[:, None] * k, 0) + dt0 * k0).to(d_q.dtype.element_ty))
    row0 = d_kv + start
    _write(row0, row0 + apart, inside, dt0 * q0, dt[:, None] * q0[None, :], C)
    _write(row0 + H * C, row0 + H * C + apart, inside, w0 * g0, w[:, None] * g0[None, :], C)
