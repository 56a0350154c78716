"""Linear layers whose biases get their gradients from a kernel of our own on GPUs.

Such a gradient is a sum over all tokens. torch's kernel takes ten times as long as reading the memory does, in a small
network as long as the matrix products. The code that torch.compile writes for such sums is good, so there it is left
alone. Figures: `results/choices.md`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from biglearn_vae import cuda_graph, kernels


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is worth calling for this input (..., M) and these weights (N, M), and right."""
    if torch.compiler.is_compiling() or not (x.is_cuda and torch.is_autocast_enabled("cuda")):
        return False
    worth = cuda_graph.is_worth_launching(x.shape[:-1].numel() * len(weight))
    return worth and torch.is_grad_enabled() and is_right(torch.get_autocast_dtype("cuda"), str(x.device))


@kernels.asked_once
def is_right(dtype: torch.dtype, device: str) -> bool:
    """Whether gradients are right for products of this type on this device; a warning, once, says if not."""
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 500, 16), (72, 16), (72,), (3, 500, 72))
    *inputs, gradient = (torch.randn(shape, generator=g).to(device, dtype) for shape in shapes)
    return kernels.is_right(linear, F.linear, inputs, [gradient], "the gradient of biases")


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear`: (..., M), (N, M), (N,) -> (..., N)."""
    return _Biased.apply(F.linear(x, weight, bias.detach()), bias)


class _Biased(torch.autograd.Function):
    """What has a bias in it already, as a function of that bias."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        asked = ctx.needs_input_grad[1]
        return gradient, kernels.sum_rows(gradient.reshape(-1, gradient.shape[-1])) if asked else None
