"""Attention over short sequences on GPUs: of z and at most 128 tokens, as one Triton kernel in each direction.

The kernels of torch work in tiles of 64 or 128 keys: of 65 tokens, z and the patches of an 8 x 8 grid, they compute
two tiles a side, the second for a single token. Here the first token is kept apart, in sums beside the matrix products,
and everything of a head stays in one program, from the queries, keys and values as the linear layer wrote them to what
the next one reads. What it gains over torch's is in `results/choices.md`.

Compilers of kernels differ from version to version: before one is used, its results are compared with plain float32.

B batch, N sequence length, H heads, C numbers per head, d = H C.
"""

import functools
import math
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_NUMBERS = 2**13  # of the tokens behind the first of a head, padded: so many fit into registers beside the weights
LARGEST_ERROR = 0.02  # of what is computed in bfloat16; that of a kernel which is right is 0.005


def fits(qkv: Tensor, heads: int) -> bool:
    """Whether `attend` takes these queries, keys and values (B, N, 3 d), and is right about such."""
    tokens, width = qkv.shape[1] - 1, qkv.shape[-1] // (3 * heads)
    even = width & (width - 1) == 0 and 16 <= width <= 128 and 16 <= tokens <= 128
    half = qkv.dtype in (torch.bfloat16, torch.float16)  # products of float32 would be rounded
    able = qkv.is_cuda and half and even and _block(qkv) * width <= MOST_NUMBERS
    return able and is_right(tokens + 1, heads, width, qkv.dtype, str(qkv.device))


@torch.compiler.assume_constant_result  # it is asked, not traced, where a network is compiled
def is_right(length: int, heads: int, width: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the kernels compute attention on this device; a warning, once, says if not.

    Args:
        length, width: N and C.
    """
    return _is_right(length, heads, width, dtype, device)


@functools.cache
def _is_right(length: int, heads: int, width: int, dtype: torch.dtype, device: str) -> bool:
    g = torch.Generator().manual_seed(0)
    qkv, gradient = (torch.randn(2, length, parts * heads * width, generator=g).to(device, dtype) for parts in (3, 1))
    try:
        with torch.no_grad(), torch.autocast(qkv.device.type, enabled=False):
            found = attend(qkv, heads), attend_backward(qkv, gradient, heads)
            plain = _plainly(qkv.float(), gradient.float(), heads)
            errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, plain, strict=True)]
    except Exception as error:  # whatever a compiler may say
        errors = [math.inf]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        reason = f"relative errors of {errors[0]:.2g}, and {errors[1]:.2g} of gradients"
    right = all(error < LARGEST_ERROR for error in errors)  # NaN is not
    if not right:
        warnings.warn(
            f"torch's attention, which is slower, is used: the kernel for {length} tokens of {heads} x {width} numbers "
            f"fails with Triton {triton.__version__} on {device} ({reason})",
            stacklevel=2,
        )
    return right


def _plainly(qkv: Tensor, gradient: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """What `attend` and `attend_backward` compute, as it is written."""
    q, k, v, g = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (*qkv.chunk(3, dim=-1), gradient))
    scale = 1 / math.sqrt(q.shape[-1])
    p, dp = (scale * q @ k.mT).softmax(-1), g @ v.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    together = [x.transpose(1, 2).flatten(2) for x in (p @ v, ds @ k, ds.mT @ q, p.mT @ g)]
    return together[0], torch.cat(together[1:], dim=-1)


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
        _forward[_grid(qkv, heads)](qkv, result, **_sizes(qkv, heads))
    return result


@torch.library.custom_op("biglearn_vae::attend_backward", mutates_args=())
def attend_backward(qkv: Tensor, gradient: Tensor, heads: int) -> Tensor:
    """The gradient (B, N, 3 d) of `qkv`, given that of what `attend` returns; its weights are computed once more."""
    qkv = qkv.contiguous()
    result = torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):
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
# that these give each other, `p0` those that they give the first, `w` those that it gives them, and `w0` itself.


@triton.jit
def _weights(q, k, q0, k0, inside, C: tl.constexpr):
    """The weights p, p0, w, w0 of keys, float32, each row of them with a sum of 1."""
    scale = 1.4426950408889634 / C**0.5  # powers of 2 instead of e
    s = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    s0 = tl.sum(q * k0[None, :], 1) * scale
    t = tl.where(inside, tl.sum(k * q0[None, :], 1) * scale, float("-inf"))
    t0 = tl.sum(q0 * k0, 0) * scale
    most = tl.maximum(tl.max(s, 1), s0)
    p, p0 = tl.exp2(s - most[:, None]), tl.exp2(s0 - most)
    total = 1 / (tl.sum(p, 1) + p0)
    most0 = tl.maximum(tl.max(t, 0), t0)
    w, w0 = tl.exp2(t - most0), tl.exp2(t0 - most0)
    total0 = 1 / (tl.sum(w, 0) + w0)
    return p * total[:, None], p0 * total, w * total0, w0 * total0


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
