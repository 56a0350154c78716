"""Whether a kernel of this package computes what it should: compilers of kernels differ from version to version."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
import triton
from torch import Tensor

LARGEST_ERROR = 0.02  # relative, of what is computed in bfloat16; that of a kernel which is right is 0.005


def is_right(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    words: str,
) -> bool:
    """Whether a kernel gives what the plain function gives in float64, but for rounding; a warning says if not.

    Args:
        inputs: of both; gradients are taken of all of them.
        gradients: of what both return.
        words: what the kernel does, "LayerNorm of 3 numbers".
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
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


def _with_gradients(function: Callable, inputs: Iterable[Tensor], gradients: Iterable[Tensor]) -> list[Tensor]:
    inputs = [part.clone().requires_grad_() for part in inputs]
    results = function(*inputs)
    results = (results,) if isinstance(results, Tensor) else results
    return [*results, *torch.autograd.grad(results, inputs, gradients)]
