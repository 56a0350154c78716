"""Distributions of observed numbers, given a network's output: p(x_T | z, x_S), independent for each number.

B images, L tokens, D token dimension. At each position of T the network gives an output (D,): the means of normal
distributions, or the log-odds that pixels are 1.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biglearn_vae.gaussian import LOG_2PI
from biglearn_vae.gaussian import generator as generator_of


class Observations:
    """p(x | output), the distribution of single numbers.

    Subclasses define `terms`, `nats`, `mean` and `sample`, and where needed `as_observed` and `check`.

    Attributes:
        name: the name of the class, in lower case.
        scaled: whether they are N(output, variance I). The variance may be fitted; if training weights the KL by beta,
            it is beta.
    """

    name: str
    scaled: bool = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls.name = cls.__name__.lower()

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
        """log p(x | output) of each number; if it has a variance, for variance 1 and without the constant."""
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
        if others := int((((x != 0) & (x != 1)).any(-1) & T).sum()):
            raise ValueError(
                f"Bernoulli observations are pixels that are 0 or 1, got other numbers in {others} patches: of images "
                "(x > 0.5).float() are such, of a data set binarize=threshold makes them"
            )


GAUSSIAN = Gaussian()
KINDS = {kind.name: kind for kind in (Gaussian, Bernoulli)}


def as_observations(given: Any) -> Observations:
    """Observations from their name; an `Observations` is returned as it is, None gives Gaussian ones.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(given, Observations):
        return given
    name = "gaussian" if given is None else given
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"observations must be {' or '.join(KINDS)}, or an object of Observations, got {given!r}")
    return KINDS[name]()


def is_own(observations: Observations) -> bool:
    """Whether observations are not of this library, so that their name is not enough to restore them."""
    return type(observations) not in KINDS.values()
