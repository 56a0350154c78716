"""Distributions of observed numbers, given a network's output: p(x_T | z, x_S), independent for each number.

B images, L tokens, D token dimension. At each position of T the network gives an output (D,): the means of normal
distributions, or the log-odds that pixels are 1.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biglearn_vae.gaussian import LOG_2PI
from biglearn_vae.gaussian import generator as generator_of


class Observations:
    """p(x | output), the distribution of single numbers.

    Subclasses define `terms`, `nats`, `mean` and `sample`, and where needed `under`, `as_observed` and `check`.

    Attributes:
        name: that by which settings choose them; by default the name of the class, in lower case.
        output: what the network's output is; by default the name.
        scaled: whether they are N(output, variance I). The variance may be fitted; if training weights the KL by beta,
            it is beta.
        under_variance: whether `terms` depend on the variance of the model, beta, so that there is none without.
    """

    name: str
    output: str
    scaled: bool = False
    under_variance: bool = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls.name = cls.__dict__.get("name", cls.__name__.lower())
        cls.output = cls.__dict__.get("output", cls.name)

    def under(self, variance: float) -> "Observations":
        """These observations in a model of this variance; they themselves, unless `under_variance`."""
        return self

    def reconstruction(self, x: Tensor, output: Tensor, T: Tensor) -> Tensor:
        """The reconstruction of the objective: the sum of `terms` over T, in float32 at least, as thousands are summed.

        Args:
            x: tokens (..., L, D); outside T they may be anything.
            output: the network's, (..., L, D).
            T: (..., L)
        """
        dtype, others = torch.promote_types(x.dtype, torch.float32), ~T.unsqueeze(-1)
        # Hidden twice: a NaN of x must reach neither the sum nor a gradient.
        terms = self.terms(x.to(dtype).masked_fill(others, 0), output.to(dtype))
        return terms.masked_fill(others, 0).sum((-2, -1))

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x | output) of each number; if `scaled`, for variance 1 and without the constant."""
        raise NotImplementedError

    def nats(self, reconstruction: Tensor, numbers: Tensor, variance: float | Tensor) -> Tensor:
        """log p(x_T | output) in nats, from the sum of `terms` (`reconstruction`) over so many numbers."""
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """E[x | output]"""
        raise NotImplementedError

    def sample(self, output: Tensor, variance: float, generator: torch.Generator | None = None) -> Tensor:
        """x ~ p(x | output)"""
        raise NotImplementedError

    def as_observed(self, mean: Tensor, seed: int | None = None) -> Tensor:
        """What the next of several passes observes where this mean was completed: the mean itself, or a draw if such a
        mean could not be observed."""
        return mean

    def check(self, x: Tensor, T: Tensor) -> None:
        """Raise a ValueError unless the tokens x (..., L, D) at T (..., L) have values that can be observed."""


class Gaussian(Observations):
    """N(output, variance I)."""

    output = "means"
    scaled = True

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        return -0.5 * (x - output).square()

    def nats(self, reconstruction: Tensor, numbers: Tensor, variance: float | Tensor) -> Tensor:
        log = variance.log() if isinstance(variance, Tensor) else math.log(variance)
        return reconstruction / variance - 0.5 * numbers * (LOG_2PI + log)

    def mean(self, output: Tensor) -> Tensor:
        return output

    def sample(self, output: Tensor, variance: float, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
        return output + math.sqrt(variance) * noise


class Bernoulli(Observations):
    """1 with probability sigmoid(output), else 0: pixels of black and white images."""

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        return x * output - F.softplus(output)

    def nats(self, reconstruction: Tensor, numbers: Tensor, variance: float | Tensor) -> Tensor:
        return reconstruction

    def mean(self, output: Tensor) -> Tensor:
        return output.sigmoid()

    def sample(self, output: Tensor, variance: float, generator: torch.Generator | None = None) -> Tensor:
        return self._drawn(output.sigmoid(), generator)

    def as_observed(self, mean: Tensor, seed: int | None = None) -> Tensor:
        return self._drawn(mean, generator_of(mean.device, seed))

    @staticmethod
    def _drawn(mean: Tensor, generator: torch.Generator | None) -> Tensor:
        uniform = torch.rand(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return (uniform < mean).to(mean.dtype)

    def check(self, x: Tensor, T: Tensor) -> None:
        hint = "of images (x > 0.5).float() are such, of a data set binarize=threshold makes them"
        _refuse((x != 0) & (x != 1), T, "Bernoulli observations are pixels that are 0 or 1", hint)


class DiscretizedGaussian(Observations):
    """N(output, variance I), rounded to bytes 0, 1/255, ..., 1; what lies outside [0, 1] goes to 0 and 1.

        P(x | output) = Phi((x + 1/510 - output) / std) - Phi((x - 1/510 - output) / std),  std^2 = variance

    where the first Phi is 1 for x = 1 and the second is 0 for x = 0 (Ho et al. 2020, Eq. 13). So the probabilities of
    images are those of their bytes, in bits per dimension that can be compared with those of other models.
    """

    name = "discretized_gaussian"
    output = "means"
    under_variance = True
    variance = 1.0

    def under(self, variance: float) -> "DiscretizedGaussian":
        if not 1 / 255**2 <= variance <= 1:  # below it hardly rounds; far above, float32 tells no bytes apart
            raise ValueError(
                f"discretized_gaussian observations need a variance, beta, in [1/255^2, 1], got {variance}: bytes / "
                "255 with a standard deviation of a byte at least"
            )
        result = copy.copy(self)
        result.variance = float(variance)
        return result

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        """log P times the variance, by which Gaussian terms are as large, so that beta weights the KL of both alike."""
        std, half = math.sqrt(self.variance), 0.5 / 255
        # Both ends of the byte are brought below the mean, where log Phi tells them apart.
        far = (x - output).abs()
        upper, lower = (_log_phi((end - far) / std) for end in (half, -half))
        inside = upper + (-(lower - upper).expm1()).log()
        ends = _log_phi(torch.where(x < 0.5, half - output, output - 1 + half) / std)
        return self.variance * torch.where((x < half) | (x > 1 - half), ends, inside)

    def nats(self, reconstruction: Tensor, numbers: Tensor, variance: float | Tensor) -> Tensor:
        return reconstruction / self.variance

    def mean(self, output: Tensor) -> Tensor:
        """E[min(max(u, 0), 1)] for u ~ N(output, variance), which rounding changes by less than 1e-4."""
        std = math.sqrt(self.variance)
        output = output.clamp(-10 * std, 1 + 10 * std)  # beyond, it is 0 or 1, and below large numbers would cancel
        return std * (_ramp(output / std) - _ramp((output - 1) / std))

    def sample(self, output: Tensor, variance: float, generator: torch.Generator | None = None) -> Tensor:
        return self.as_observed(GAUSSIAN.sample(output, self.variance, generator))

    def as_observed(self, mean: Tensor, seed: int | None = None) -> Tensor:
        """The nearest byte."""
        return mean.mul(255).round().div(255).clamp(0, 1)

    def check(self, x: Tensor, T: Tensor) -> None:
        levels = 255 * x
        others = ((levels - levels.round()).abs() > 1e-3) | (levels < -0.5) | (levels > 255.5)
        hint = "of images in [0, 1], (255 * x).round() / 255 are such"
        _refuse(others, T, "discretized_gaussian observations are bytes / 255", hint)


def _refuse(others: Tensor, T: Tensor, expected: str, hint: str) -> None:
    """Raise a ValueError if others (..., L, D), numbers that cannot be observed, are at T (..., L)."""
    if count := int((others.any(-1) & T).sum()):
        raise ValueError(f"{expected}, got other numbers in {count} patches: {hint}")


def _log_phi(x: Tensor) -> Tensor:
    """log Phi(x), whose gradient in float32 is right far below 0, too: that of torch's log_ndtr ends at 0 or NaN."""
    low = x.clamp(max=-1)
    tail = (torch.special.erfcx(low * -math.sqrt(0.5)) / 2).log() - low.square() / 2
    return torch.where(x < -1, tail, torch.special.log_ndtr(x.clamp(min=-1)))


def _ramp(x: Tensor) -> Tensor:
    """E[max(x + u, 0)] for u ~ N(0, 1)."""
    return x * torch.special.ndtr(x) + torch.exp(-0.5 * x.square() - 0.5 * LOG_2PI)


GAUSSIAN = Gaussian()
KINDS = {kind.name: kind for kind in (Gaussian, Bernoulli, DiscretizedGaussian)}


def as_observations(given: Any) -> Observations:
    """Observations from their name; an `Observations` is returned as it is, None gives Gaussian ones.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(given, Observations):
        return given
    name = "gaussian" if given is None else given
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"observations must be {', '.join(KINDS)}, or an object of Observations, got {given!r}")
    return KINDS[name]()


def is_own(observations: Observations) -> bool:
    """Whether observations are not of this library, so that their name is not enough to restore them."""
    return type(observations) not in KINDS.values()
