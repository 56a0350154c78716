"""Annealed importance sampling (Neal 2001) with Hamiltonian transitions, as Wu et al. (2017) measure decoders with it.

It estimates the integral of a density gamma(z) that no single proposal covers, by drawing z from a base and moving it
through base(z)^(1 - b) gamma(z)^b, b = 0 .. 1. K chains each of N integrals, Z dimensions.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from biglearn_vae import checks, gaussian
from biglearn_vae.gaussian import DiagGaussian

LEAPFROG = 3  # steps of a transition
ACCEPTED = 0.7  # share of transitions that step sizes aim at
PILOT = 4  # at least so many chains to find step sizes with


def log_weights(
    target: Callable[[Tensor], Tensor],
    base: DiagGaussian,
    draws: int = 16,
    steps: int = 200,
    power: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """Logarithms of weights; the expectation of a weight is the integral of gamma: float64 (K, N).

    In expectation, the logarithm of the mean weight is therefore a lower bound on that of the integral, closer with
    more steps and draws. With one step these are plain importance weights with the base as proposal. Step sizes are
    found by a separate run before, with a quarter of the draws, at least 4: adapted to the chains whose weights count,
    they would bias the weights.

    Args:
        target: log gamma, (k, N), of z (k, N, Z) in float64; differentiable, each number a function of its own z.
        base: the distribution that chains start from, (N, Z).
        draws: K.
        steps: number of steps from base to gamma, with LEAPFROG gradients each.
        power: b = (t / steps)^power; take more than 1 where gamma is much narrower than the base.

    Raises:
        ValueError: if draws or steps are not whole numbers or below 1, power is not positive, or the seed is not one
            that torch takes.
    """
    draws, steps = checks.whole_number("draws", draws, 1), checks.whole_number("steps", steps, 1)
    power = checks.real_number("power", power, "(0, inf)")
    generator = gaussian.generator(base.mean.device, seed)
    path = _Path(target, base.double(), [(t / steps) ** power for t in range(steps + 1)], generator)
    sizes = path.follow(max(PILOT, draws // 4))[1] if steps > 1 else []
    return path.follow(draws, sizes)[0]


class _Path:
    """The way from the base to gamma."""

    def __init__(self, target: Callable, base: DiagGaussian, b: Sequence[float], generator: torch.Generator):
        self.target, self.base, self.b, self.generator = target, base, b, generator

    def follow(self, draws: int, sizes: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Log weights (K, N) and the step sizes taken, (N, 1) each: those given, or ones that adapt as it goes."""
        z = self.base.sample(self._normal(draws))
        gap, slope = self._gap(z)
        total, size, used = torch.zeros_like(gap), torch.full_like(self.base.mean[:, :1], 0.5), []
        for t, (before, b) in enumerate(pairwise(self.b)):
            total = total + (b - before) * gap
            if b == self.b[-1]:  # weights do not depend on where the chain goes from here
                break
            size = size if sizes is None else sizes[t]
            used.append(size)
            z, gap, slope, accepted = self._move(z, gap, slope, b, size)
            size = size * (0.3 * (accepted.double().mean(0) - ACCEPTED)).exp().unsqueeze(-1)
        return total, used

    def _move(self, z: Tensor, gap: Tensor, slope: Tensor, b: float, size: Tensor) -> tuple[Tensor, ...]:
        """A Hamiltonian transition that leaves base^(1 - b) gamma^b invariant: z, gap, slope, what was accepted."""
        step = size * self.base.std
        momentum = self._normal(len(z))
        new, new_gap, new_slope, before = z, gap, slope, momentum.square().sum(-1)
        for _ in range(LEAPFROG):
            momentum = momentum + 0.5 * step * self._force(new, new_slope, b)
            new = new + step * momentum
            new_gap, new_slope = self._gap(new)
            momentum = momentum + 0.5 * step * self._force(new, new_slope, b)
        gain = self._log_density(new, new_gap, b) - self._log_density(z, gap, b)
        gain = gain - 0.5 * (momentum.square().sum(-1) - before)
        uniform = torch.rand(gain.shape, dtype=gain.dtype, device=gain.device, generator=self.generator)
        accepted = uniform.log() < gain  # never where it is NaN
        moved = accepted.unsqueeze(-1)
        return (
            torch.where(moved, new, z),
            torch.where(accepted, new_gap, gap),
            torch.where(moved, new_slope, slope),
            accepted,
        )

    def _gap(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log gamma(z) - log base(z), (K, N), and its gradient, (K, N, Z)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            gap = self.target(z).double() - self.base.log_prob(z)
            slope = torch.autograd.grad(gap.sum(), z)[0]
        return gap.detach(), slope

    def _log_density(self, z: Tensor, gap: Tensor, b: float) -> Tensor:
        return self.base.log_prob(z) + b * gap

    def _force(self, z: Tensor, slope: Tensor, b: float) -> Tensor:
        """The gradient of `_log_density`."""
        return b * slope - (z - self.base.mean) / self.base.var

    def _normal(self, draws: int) -> Tensor:
        like = self.base.mean
        return torch.randn((draws, *like.shape), dtype=like.dtype, device=like.device, generator=self.generator)
