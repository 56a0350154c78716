"""The attention kernel against attention in float64, and all kernels in a network.

On a GPU as they are; in Triton's interpreter by `test_kernels.py`.
"""

import math

import pytest
import torch
from torch import Tensor

SIZES = [(2, 65, 2, 64), (1, 17, 4, 16), (2, 50, 1, 32), (1, 129, 2, 32), (1, 65, 1, 128)]  # B, N, H, C
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # relative errors


def expected(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)


def assert_exact(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Values and gradients are those of attention in float64, of all tokens and of the first alone."""
    from biglearn_vae.attention import attend, attend_first

    batch, length, heads, width = size
    g, d = torch.Generator().manual_seed(0), heads * width
    qkv = torch.randn(batch, length, 3 * d, generator=g).to(device, dtype).requires_grad_()
    gradient = torch.randn(batch, length, d, generator=g).to(device, dtype)
    exact = qkv.detach().double().requires_grad_()
    value = expected(exact, heads)
    for found, own in ((attend(qkv, heads), slice(None)), (attend_first(qkv[:, :1, :d], qkv[..., d:], heads), [0])):
        (d_found,) = torch.autograd.grad(found, qkv, gradient[:, own])
        (d_value,) = torch.autograd.grad(value[:, own], exact, gradient[:, own].double(), retain_graph=True)
        for a, b in ((found, value[:, own]), (d_found, d_value)):
            assert (a.double() - b).norm() < LIMITS[dtype] * b.norm(), (size, dtype, own)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_on_a_gpu(size, dtype):
    from biglearn_vae import attention

    batch, length, heads, width = size
    assert attention.fits(torch.empty(batch, length, heads * width, dtype=dtype, device="cuda"), heads)
    assert_exact(size, dtype, "cuda")


@pytest.mark.gpu
def test_what_the_kernel_does_not_take():
    from biglearn_vae import attention

    for shape, heads, dtype in (
        ((1, 65, 64), 1, torch.float32),
        ((1, 16, 64), 1, torch.bfloat16),
        ((1, 130, 64), 1, torch.bfloat16),
        ((1, 65, 48), 1, torch.bfloat16),
        ((1, 129, 128), 1, torch.bfloat16),
    ):
        assert not attention.fits(torch.empty(shape, dtype=dtype, device="cuda"), heads)


def assert_a_wrong_kernel_is_not_used() -> None:
    from biglearn_vae import attention

    assert attention.is_right(17, 2, 16, torch.float32, "cpu")
    right = attention._backward

    class Wrong:
        def __getitem__(self, grid):
            return lambda qkv, gradient, result, **sizes: (right[grid](qkv, gradient, result, **sizes), result.mul_(2))

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no such instruction\nat all")

    for length, kernel, words in ((18, Wrong(), r", 1\)"), (19, Broken(), "RuntimeError: no such instr")):
        attention._backward = kernel
        with pytest.warns(UserWarning, match=f"over {length} tokens of 2 x 16 numbers is left to torch.*{words}"):
            assert not attention.is_right(length, 2, 16, torch.float32, "cpu")
        assert not attention.is_right(length, 2, 16, torch.float32, "cpu")  # and does not warn again
    attention._backward = right


def assert_a_compiled_network_is_one_graph() -> None:
    """Of a network with these kernels, and the same as without."""
    from biglearn_vae import BigLearnELBO, UniversalViT, attention, biases, cuda_graph, kernels, layers, norms

    torch.manual_seed(0)
    net = UniversalViT(grid=(5, 4), token_dim=3, dim=32, heads=2, depth=2, z_dim=4)
    x, S, noise = torch.rand(2, 20, 3), torch.rand(2, 20) < 0.3, torch.randn(2, 4)
    T = ~S & (torch.rand(2, 20) < 0.5)

    def gradients(loss: BigLearnELBO) -> Tensor:
        net.zero_grad()
        loss(net, x, S, T, noise).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

    without = gradients(BigLearnELBO(0.1))
    layers.attention, layers.norms, layers.biases = attention, norms, biases
    attention.fits = lambda x, heads: attention.is_right(x.shape[1], heads, 16, x.dtype, "cpu")
    norms.fits = lambda x, update: (
        cuda_graph.is_worth_launching(x.numel()) and norms.is_right(x.shape[-1], update.dtype, "cpu")
    )
    biases.fits = lambda x, weight: not torch.compiler.is_compiling()
    kinds = ((attention, "_forward"), (attention, "_forward_first"), (norms, "_forward"), (kernels, "_sum"))
    used = [Counted(*kind) for kind in kinds]
    for loss in (BigLearnELBO(0.1).compiled(dynamic=False, backend="aot_eager"), BigLearnELBO(0.1)):
        with cuda_graph.recording():
            torch.testing.assert_close(gradients(loss), without, rtol=1e-4, atol=1e-5)
    # For each loss, and once to see whether they are right:
    launched = [len(part.grids) for part in used]
    assert used[0].grids.count((4 * 2,)) == 2, used[0].grids  # both encodings of two images, in the first of two blocks
    assert used[1].grids.count((4 * 2,)) == 2, used[1].grids  # and their codes, in the second
    assert launched[2] == 2 * 6 + 1, launched  # three sums in each pass
    assert launched[3] == 2 * 6 + 1 + 26, launched  # gradients of norms, and where nothing is compiled of biases
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == 1 and not counted["graph_break"], counted


class Counted:
    """Takes the place of a module's kernel and counts its launches."""

    def __init__(self, module, name: str):
        self.kernel, self.grids = getattr(module, name), []
        setattr(module, name, self)

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def in_the_interpreter() -> None:
    for size in SIZES:
        for dtype in (torch.float32, torch.float16):  # bfloat16 is not what it should be in the interpreter
            assert_exact(size, dtype, "cpu")
    assert_a_wrong_kernel_is_not_used()
    assert_a_compiled_network_is_one_graph()
