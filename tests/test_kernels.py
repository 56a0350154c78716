"""Kernels between matrix products against torch in float64: here in Triton's interpreter, on a GPU as they are."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

SUMMED = [(1, 5), (200, 72), (1500, 130), (1500, 40), (3, 1), (0, 7)]
SHAPES = [(3, 9, 128), (5, 100), (3, 13, 512), (70, 16), (1, 2050), (1, 3)]
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # relative errors


def assert_sums_are_exact(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    from biglearn_vae.kernels import sum_rows

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found = sum_rows(x.mT.contiguous().mT)  # from another layout
    assert found.dtype == torch.float32 and torch.equal(found, sum_rows(x))
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=1e-5, atol=1e-6 * max(1, len(x)))


def assert_gradients_of_a_linear_layer(device: str) -> None:
    """The product and its gradients are torch's to the last bit, and that of the bias is not rounded on its way."""
    from biglearn_vae.biases import linear

    g, shapes = torch.Generator().manual_seed(0), ((3, 900, 8), (24, 8), (24,), (3, 900, 24))
    *inputs, gradient = (torch.randn(shape, generator=g).to(device) for shape in shapes)
    inputs = [part.requires_grad_() for part in inputs]
    results = []
    for function in (linear, F.linear):
        with torch.autocast(device, torch.bfloat16):
            value = function(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs, gradient.bfloat16())))
    found, expected = results
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    exact = gradient.bfloat16().double().sum((0, 1))
    assert (found[3] - exact).abs().max() < 1e-4


def assert_exact(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Values and gradients are those of float64, the sum and all that does not depend on `dtype` as of float32."""
    from biglearn_vae.norms import add_norm

    g, d = torch.Generator().manual_seed(0), shape[-1]
    inputs = [torch.randn(size, generator=g).to(device) for size in (shape, shape, d, d)]
    weights = [torch.randn(shape, generator=g).to(device) for _ in range(2)]
    inputs[1], weights[1] = inputs[1].to(dtype), weights[1].to(dtype)
    inputs = [part.requires_grad_() for part in inputs]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    total = exact[0] + exact[1]
    expected = [total, F.layer_norm(total, (d,), *exact[2:])]
    expected += torch.autograd.grad(expected, exact, [part.double() for part in weights])
    found = list(add_norm(*inputs, 1e-5))
    found += torch.autograd.grad(found, inputs, weights)
    assert [part.dtype for part in found] == [torch.float32, dtype, torch.float32, dtype, torch.float32, torch.float32]
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= LIMITS[a.dtype] * b.norm(), (shape, dtype)


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (40_000, 256), (1000, 65, 512)])
def test_the_kernel_on_a_gpu(shape, dtype):
    from biglearn_vae import cuda_graph, norms

    summands = [torch.empty(shape, dtype=kind, device="cuda") for kind in (torch.float32, dtype)]
    assert norms.fits(*summands) == (summands[0].numel() >= cuda_graph.MANY)
    with cuda_graph.recording():
        assert norms.fits(*summands)
    assert_exact(shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SUMMED, (66_560, 128), (16_640, 1536), (200_000, 3), (130, 4000)])
def test_sums_on_a_gpu(shape, dtype):
    assert_sums_are_exact(shape, dtype, "cuda")


@pytest.mark.gpu
def test_a_linear_layer_on_a_gpu():
    from biglearn_vae import biases, cuda_graph

    x, weight = torch.empty(2, 3, device="cuda"), torch.empty(4, 3, device="cuda")
    with cuda_graph.recording():
        assert not biases.fits(x, weight)
    with torch.autocast("cuda", torch.bfloat16):
        assert not biases.fits(x, weight)
        with cuda_graph.recording():
            assert biases.fits(x, weight)
            with torch.no_grad():
                assert not biases.fits(x, weight)
    assert_gradients_of_a_linear_layer("cuda")


@pytest.mark.gpu
def test_what_the_kernel_does_not_take():
    from biglearn_vae import cuda_graph, norms

    x, wide = torch.empty(2, 65, 64, device="cuda"), torch.empty(2, 8192, device="cuda")
    with cuda_graph.recording():
        for a, b in ((x, x), (x.bfloat16(), x.bfloat16()), (x, x[:, :1].bfloat16()), (x.cpu(), x.bfloat16().cpu())):
            assert not norms.fits(a, b)
        assert norms.fits(x, x.bfloat16()) and not norms.fits(wide, wide.bfloat16())


if __name__ == "__main__":
    import test_attention

    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):  # bfloat16 is not what it should be in the interpreter
            assert_exact(shape, dtype, "cpu")
    for summed in SUMMED:
        assert_sums_are_exact(summed, torch.float16, "cpu")
    assert_gradients_of_a_linear_layer("cpu")
    test_attention.in_the_interpreter()
