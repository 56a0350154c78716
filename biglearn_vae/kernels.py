"""What the Triton kernels of this package share: sums of rows, and whether they compute what they should.

Compilers of kernels differ from version to version, so each is compared with plain float64 before it is used.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 4  # for each multiprocessor, where each goes through many rows
LARGEST_ERROR = 0.02  # relative, of what is computed in bfloat16; that of a kernel which is right is 0.005


def asked_once(function: Callable[..., bool]) -> Callable[..., bool]:
    """Decorator: the function is called once for the same arguments, and not traced when a network is compiled."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def ask(*args) -> bool:
        return cached(*args)

    return torch.compiler.assume_constant_result(ask)


def is_right(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    words: str,
) -> bool:
    """Whether a kernel gives what the plain function gives in float64, up to rounding; a warning says if not.

    Args:
        kernel, plain: tensors, as many as `inputs` -> a tensor, or several.
        inputs: of both, on one device; gradients are taken of all of them.
        gradients: of what both return.
        words: what the kernel does, "LayerNorm of 3 numbers".
    """
    try:
        with (  # apart from whatever the caller has entered
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(inputs[0].device.type, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(_itself, _itself),
        ):
            found = _with_gradients(kernel, inputs, gradients)
            exact = _with_gradients(plain, *([part.double() for part in parts] for parts in (inputs, gradients)))
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        reason = f"relative errors of {', '.join(f'{error:.2g}' for error in errors)}"
    except Exception as error:  # whatever a compiler may say
        errors, reason = [math.inf], f"{type(error).__name__}: {error}".splitlines()[0]
    right = all(error < LARGEST_ERROR for error in errors)  # NaN is not
    if not right:
        with_what = f"Triton {triton.__version__} on {inputs[0].device}"
        warnings.warn(
            f"{words} is left to torch, which is slower: the kernel fails with {with_what} ({reason})", stacklevel=2
        )
    return right


def _itself(saved: Tensor) -> Tensor:
    return saved


def _with_gradients(function: Callable, inputs: Iterable[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    inputs = [part.clone().requires_grad_() for part in inputs]
    results = function(*inputs)
    results = (results,) if isinstance(results, Tensor) else results
    return [*results, *torch.autograd.grad(results, inputs, gradients)]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, each of which runs some programs of a kernel at a time; 1 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@torch.library.custom_op("biglearn_vae::sum_rows", mutates_args=())
def sum_rows(x: Tensor) -> Tensor:
    """The sum over the rows of a matrix, (M, N) -> (N,), in float32; N must not be 0.

    The same numbers always give the same sum: each program adds its own rows, then one adds these sums in order.
    """
    x = x.contiguous()
    rows, columns = x.shape
    parts = min(PROGRAMS * multiprocessors(x.device) // triton.cdiv(columns, 64), rows // 128)
    with torch.cuda.device_of(x):  # Triton starts kernels on the current one
        if rows > 1024 and parts > 1:
            x = _sum_rows(x, parts, columns=64)
        return _sum_rows(x, 1, columns=16)[0]


def _sum_rows(x: Tensor, parts: int, columns: int) -> Tensor:
    """The sums of so many parts of the rows, equal but for the last ones, (parts, N)."""
    result = x.new_empty(parts, x.shape[1], dtype=torch.float32)
    sizes = dict(N=x.shape[1], ROWS=4096 // columns, COLUMNS=columns)
    _sum[(triton.cdiv(x.shape[1], columns), parts)](x, result, len(x), triton.cdiv(len(x), parts), **sizes)
    return result


@sum_rows.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


@triton.jit
def _sum(x, result, rows, each, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    part, c = tl.program_id(1), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = part * each
    end = tl.minimum(start + each, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    while start < end:
        r = start + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & (c < N)[None, :]
        total += tl.load(x + r.to(tl.int64)[:, None] * N + c[None, :], mask=inside, other=0.0).to(tl.float32)
        start += ROWS
    tl.store(result + part * N + c, tl.sum(total, 0), mask=c < N)
