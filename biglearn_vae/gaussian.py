"""Gaussians with diagonal covariance: p(z | x_S) of the model, and N(mu, variance I) of its observations."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from biglearn_vae import checks

LOG_2PI = math.log(2 * math.pi)
NOISE = 0x6E6F6973  # by which seeds of noise are altered


@dataclass(frozen=True, eq=False)
class DiagGaussian:
    """N(mean, diag(exp(logvar))) over the last dimension, Z.

    Args:
        mean: (..., Z)
        logvar: (..., Z), the logarithm of the variances.
    """

    mean: Tensor
    logvar: Tensor

    @property
    def var(self) -> Tensor:
        return self.logvar.exp()

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def __getitem__(self, index) -> "DiagGaussian":
        """The distributions at these batch positions."""
        return DiagGaussian(self.mean[index], self.logvar[index])

    def double(self) -> "DiagGaussian":
        """The same in float64."""
        return DiagGaussian(self.mean.double(), self.logvar.double())

    def sample(self, noise: Tensor | None = None, *, draws: int | None = None, seed: int | None = None) -> Tensor:
        """Reparameterised sample, mean + std * noise, of shape (..., Z).

        Args:
            noise: standard normal numbers (..., Z), or several for each, (K, ..., Z); drawn here if not given.
            draws: adds a leading axis of that length to what is drawn here.
            seed: makes the noise repeatable; without one `torch.manual_seed` does.

        Raises:
            ValueError: if noise is given of another shape, or together with draws or a seed; for draws below 1, or a
                seed that is none of torch's.
        """
        if noise is None:
            if draws is not None:
                draws = checks.whole_number("draws", draws, 1)
            shape = self.mean.shape if draws is None else (draws, *self.mean.shape)
            noise = normal(shape, like=self.mean, seed=seed)
        elif draws is not None or seed is not None:
            raise ValueError("give noise, or draws and a seed to draw it by, not both")
        elif not isinstance(noise, Tensor) or noise.shape[noise.ndim - self.mean.ndim :] != self.mean.shape:
            raise ValueError(
                f"noise must be a tensor {tuple(self.mean.shape)}, or several of these, got {checks.described(noise)}; "
                "draws=10 draws so many"
            )
        return self.mean + self.std * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; mean, diag(var)) in nats, summed over Z: (...,).

        Args:
            z: (..., Z), with the dimensions before Z like those of the mean, or broadcasting with them.
        """
        if not isinstance(z, Tensor) or z.shape[-1:] != self.mean.shape[-1:]:
            raise ValueError(f"expected a tensor z (..., {self.mean.shape[-1]}), got {checks.described(z)}")
        return -0.5 * ((z - self.mean).square() / self.var + self.logvar + LOG_2PI).sum(-1)

    def kl(self, other: "DiagGaussian | None" = None) -> Tensor:
        """KL[self || other] in nats, summed over Z: (...,). Without `other`, to N(0, I)."""
        if not isinstance(other, DiagGaussian | None):
            raise ValueError(f"expected another DiagGaussian, got {type(other).__name__}")
        if self.mean.dtype in (torch.bfloat16, torch.float16):  # their sums have too few digits
            return DiagGaussian(self.mean.float(), self.logvar.float()).kl(other)
        if other is None:
            return 0.5 * (self.mean.square() + self.var - 1 - self.logvar).sum(-1)
        ratio = (self.logvar - other.logvar).exp()
        distance = (self.mean - other.mean).square() / other.var
        return 0.5 * (ratio + distance - 1 + other.logvar - self.logvar).sum(-1)


# FSDP2 gathers weights before the backward pass of the tensors that a network returns. In torch 2.11 it finds none in a
# dataclass that is not registered: after decoding, the weights outside the blocks would be split again and stay so.
torch.export.register_dataclass(DiagGaussian)


def bits_per_dim(nats, numbers):
    """Bits per dimension: minus the log-density `nats` of so many numbers, in bits, divided by their number."""
    return -nats / (math.log(2) * numbers)


def normal(shape, *, like: Tensor, seed: int | None = None) -> Tensor:
    """Standard normal numbers with the dtype and device of `like`; the same ones for the same seed."""
    of_seed = None if seed is None else generator(like.device, seed)
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=of_seed)


def generator(device: torch.device, seed: int | None = None) -> torch.Generator:
    """A generator of noise; its seed is altered, so that noise and masks may have the same `seed`.

    On CPUs normal numbers are made of uniform ones: with the seed itself, `masks.random` would choose patches by the
    very numbers that become z.
    """
    return torch.Generator(device).manual_seed(checks.seed_or_drawn(seed) ^ NOISE)
