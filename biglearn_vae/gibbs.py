"""Completion by Markov chains with a jointly trained VAE: what it costs without training for it.

A joint VAE has p(z), p(x | z), such as N(mu(z), variance I), and an encoder q(z | x) for whole images only. Both chains
draw from p(z, x_hid | x_obs), where x_hid is all outside S, by one encoding and one decoding per iteration:

    z' ~ q(z | x_obs, x_hid),  then  x_hid ~ p(x_hid | z)

- pseudo-Gibbs (Rezende, Mohamed and Wierstra 2014) accepts every z'. It is exact as far as q is the posterior.
- Metropolis-within-Gibbs (Mattei and Frellsen 2018) accepts z' with probability min(1, w(z') / w(z)),
  w(z) = p(x_obs, x_hid | z) p(z) / q(z | x_obs, x_hid), else keeps z. It is exact for any q that covers the posterior.

K chains of each image, N images, C channels, H x W pixels, L tokens, D token dimension, Z latent dimension.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from biglearn_vae import checks, gaussian
from biglearn_vae.capabilities import BigLearnVAE, Observed, check_model, checked_variance
from biglearn_vae.distributed import synchronize
from biglearn_vae.gaussian import DiagGaussian

PSEUDO = 10  # iterations of pseudo-Gibbs with which Metropolis-within-Gibbs starts


@dataclass(frozen=True, eq=False)
class State:
    """Where the chains are after an iteration.

    Attributes:
        z: (K, N, Z)
        output: the network's output for p(x | z), tokens (K, N, L, D); see `observations`.
        mean: of p(x | z), tokens (K, N, L, D).
        x: tokens (K, N, L, D), x_obs in its place and x_hid drawn for this z (its mean if the chain is not `noisy`).
        accepted: boolean (K, N), whether the z' of this iteration was accepted.
    """

    z: Tensor
    output: Tensor
    mean: Tensor
    x: Tensor
    accepted: Tensor


@dataclass(frozen=True, eq=False)
class Completions:
    """Completions by chains, each a dictionary by number of iterations.

    Attributes:
        images: (K, N, C, H, W), or (K, C, H, W) for a single image: the mean of p(x_hid | z) for the last z, in [0, 1],
            and x_obs as it is.
        seconds: from the start until these images were complete.
        acceptance: share of z' accepted in the Metropolis iterations until then; 1 if there were none.
    """

    images: dict[int, Tensor]
    seconds: dict[int, float]
    acceptance: dict[int, float]


def pseudo_gibbs(
    vae: BigLearnVAE,
    x: Tensor,
    S: Tensor,
    iterations: Sequence[int] = (100,),
    draws: int = 1,
    noisy: bool = True,
    variance: float | None = None,
    start: Tensor | None = None,
    seed: int | None = None,
) -> Completions:
    """Completions of x_S after these numbers of iterations of pseudo-Gibbs (Rezende, Mohamed and Wierstra 2014).

    Args:
        iterations: the numbers of iterations, each at least 1.
        noisy: whether x_hid is drawn from p(x_hid | z), or is its mean.
        The others: see `chain`.

    Raises:
        ValueError: on values outside these, and on whatever `chain` refuses.
    """
    pseudo = max(_counts(iterations))
    return _record(vae, x, S, iterations, draws, pseudo=pseudo, noisy=noisy, variance=variance, start=start, seed=seed)


def metropolis_within_gibbs(
    vae: BigLearnVAE,
    x: Tensor,
    S: Tensor,
    iterations: Sequence[int] = (100,),
    draws: int = 1,
    pseudo: int = PSEUDO,
    variance: float | None = None,
    start: Tensor | None = None,
    seed: int | None = None,
) -> Completions:
    """Completions of x_S after these numbers of iterations of Metropolis-within-Gibbs (Mattei and Frellsen 2018).

    Args:
        iterations: the numbers of iterations, each at least 1; those of pseudo-Gibbs count.
        pseudo: how many iterations are pseudo-Gibbs at first, as the method's authors advise: from a z that does not
            fit x_obs, and from an x that does not look like an image, few z' are accepted.
        The others: see `chain`.

    Raises:
        ValueError: on values outside these, and on whatever `chain` refuses.
    """
    return _record(vae, x, S, iterations, draws, pseudo=pseudo, variance=variance, start=start, seed=seed)


@torch.no_grad()
def chain(
    vae: BigLearnVAE,
    x: Tensor,
    S: Tensor,
    draws: int = 1,
    pseudo: int = 0,
    noisy: bool = True,
    variance: float | None = None,
    start: Tensor | None = None,
    seed: int | None = None,
) -> Iterator[State]:
    """The chains' states after each iteration, without end.

    Args:
        vae: the model; p(z) is its prior, given nothing observed. Its network takes at most `vae.chunk` rows at once.
        x: images (N, C, H, W) in [0, 1] or tokens (N, L, D), or one; what is outside S may be anything.
        S: what is observed, a mask as for every method of `vae`.
        draws: K, chains of each image.
        pseudo: how many of the first iterations are pseudo-Gibbs; the others are Metropolis-within-Gibbs.
        noisy: whether x_hid is drawn from p(x_hid | z), or is its mean; Metropolis is exact only if it is drawn.
        variance: of Gaussian observations, by default that of `vae`.
        start: images or tokens whose hidden patches the chains start from, (N, ...), (K, N, ...) or one for all. z is
            then unknown, and the first iteration pseudo-Gibbs in any case. By default z ~ p(z), x_hid ~ p(x_hid | z).
        seed: makes the chains repeatable.

    Raises:
        ValueError: if draws or pseudo are not whole numbers, draws below 1, pseudo below 0, the variance not positive,
            the seed not one that torch takes, x or S not what `vae` takes, or start not finite or of another shape.
    """
    check_model(vae)
    draws, pseudo = checks.whole_number("draws", draws, 1), checks.whole_number("pseudo", pseudo, 0)
    checks.check_seed(seed)
    chains = _Chains(vae, x, S, noisy, checked_variance(vae, variance), seed)
    filled = None if start is None else chains.filled(start, draws)
    return chains.states(draws, pseudo, filled)


class _Chains:
    """The two kinds of iteration, for any number of chains of these images."""

    def __init__(self, vae: BigLearnVAE, x: Tensor, S: Tensor, noisy: bool, variance: float, seed: int | None):
        self.vae, self.noisy, self.variance = vae, noisy, variance
        observed = vae.observe(x, S)
        self.known, self.mask = observed.tokens, observed.mask
        vae.observations.check(self.known, self.mask)
        self.blank, self.nothing = torch.zeros_like(self.known[0]), torch.zeros_like(self.mask[0])
        self.prior = vae.encode(self.blank, self.nothing)  # (Z,)
        self.generator = gaussian.generator(vae.device, seed)

    @torch.no_grad()
    def states(self, draws: int, pseudo: int, filled: Tensor | None) -> Iterator[State]:
        """See `chain`; `filled` are tokens (K, N, L, D) to start from."""
        if filled is None:
            state = self.from_prior(draws)
        else:
            state = self.pseudo_step(filled)
            yield state
        for iteration in itertools.count(1 if filled is None else 2):
            state = self.pseudo_step(state.x) if iteration <= pseudo else self.metropolis_step(state)
            yield state

    def from_prior(self, draws: int) -> State:
        z = self.prior.sample(self._normal((draws, len(self.known), self.vae.z_dim)))
        return self._state(z, self.output(z), torch.ones_like(z[..., 0], dtype=torch.bool))

    def pseudo_step(self, x: Tensor) -> State:
        q = self.posterior(x)
        z = q.sample(self._normal(q.mean.shape))
        return self._state(z, self.output(z), torch.ones_like(z[..., 0], dtype=torch.bool))

    def metropolis_step(self, state: State) -> State:
        q = self.posterior(state.x)
        z = q.sample(self._normal(q.mean.shape))
        output = self.output(z)
        gain = self.log_weight(z, output, state.x, q) - self.log_weight(state.z, state.output, state.x, q)
        uniform = torch.rand(gain.shape, dtype=gain.dtype, device=gain.device, generator=self.generator)
        accepted = uniform.log() < gain
        z = torch.where(accepted.unsqueeze(-1), z, state.z)
        return self._state(z, torch.where(accepted[..., None, None], output, state.output), accepted)

    def _state(self, z: Tensor, output: Tensor, accepted: Tensor) -> State:
        """The state for this z, with x_hid drawn, or its mean if not `noisy`."""
        mean = self.vae.observations.mean(output)
        drawn = self.vae.observations.sample(output, self.variance, self.generator) if self.noisy else mean
        return State(z, output, mean, torch.where(self.mask.unsqueeze(-1), self.known, drawn), accepted)

    def posterior(self, x: Tensor) -> DiagGaussian:
        """q(z | x) of tokens (K, N, L, D): (K, N, Z)."""
        rows = x.flatten(0, 1)
        q = self.vae._encode(rows, ~self.nothing.expand(len(rows), -1))
        return DiagGaussian(q.mean.view(*x.shape[:2], -1), q.logvar.view(*x.shape[:2], -1))

    def output(self, z: Tensor) -> Tensor:
        """What the network says of p(x | z), tokens (K, N, L, D), for z (K, N, Z)."""
        parts = [output for output, _ in self.vae._decode(z, self.blank.unsqueeze(0), self.nothing.unsqueeze(0))]
        return torch.cat(parts).view(*z.shape[:2], *self.blank.shape)

    def log_weight(self, z: Tensor, output: Tensor, x: Tensor, q: DiagGaussian) -> Tensor:
        """log p(x | z) p(z) / q(z | x), float64 (K, N)."""
        observations, everything = self.vae.observations, torch.ones_like(self.nothing)
        reconstruction = observations.reconstruction(x.double(), output.double(), everything)
        likelihood = observations.nats(reconstruction, reconstruction.new_tensor(self.blank.numel()), self.variance)
        return self.prior.double().log_prob(z) - q.double().log_prob(z) + likelihood

    def filled(self, start: Tensor, draws: int) -> Tensor:
        """Tokens (K, N, L, D): those observed, and those of `start` where nothing is."""
        if not isinstance(start, Tensor):
            raise ValueError(f"start must be a tensor, got {checks.described(start)}")
        if not start.isfinite().all():
            raise ValueError("start must be a tensor of finite numbers; without a start, chains start from p(z)")
        item = 3 if tuple(start.shape[-3:]) == self.vae.image_shape else 2
        leading = (draws, len(self.known))
        try:
            rows = start.expand(*leading, *start.shape[-item:]).flatten(0, 1)
        except RuntimeError:
            raise ValueError(
                f"expected a start for each of the {leading[1]} images, or for each of {draws} chains of them, "
                f"or one for all, got {tuple(start.shape)}"
            ) from None
        if item == 2 and rows.shape[1:] == self.known.shape[1:]:  # tokens of one image may have its shape
            tokens = rows.to(self.known)
        else:
            tokens = self.vae.observe(rows).tokens
        tokens = tokens.view(*leading, *self.known.shape[1:])
        return torch.where(self.mask.unsqueeze(-1), self.known, tokens)

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, dtype=self.known.dtype, device=self.known.device, generator=self.generator)


def _counts(iterations: Sequence[int]) -> list[int]:
    counts = checks.whole_numbers(iterations, 1)
    if not counts:
        raise ValueError(f"iterations must be a list of numbers from 1 on, at least one, got {iterations}")
    return sorted(set(counts))


@torch.no_grad()
def _record(
    vae: BigLearnVAE, x: Tensor, S: Tensor, iterations: Sequence[int], draws: int, *, pseudo: int, **settings
) -> Completions:
    """What the chains give after these numbers of iterations; `settings` are others of `chain`."""
    counts, result, begin = _counts(iterations), Completions({}, {}, {}), time.perf_counter()
    states, taken = chain(vae, x, S, draws, pseudo, **settings), []
    observed = vae.observe(x, S)
    for count, state in enumerate(itertools.islice(states, counts[-1]), 1):
        if count > max(pseudo, settings["start"] is not None):
            taken.append(state.accepted.double().mean())
        if count in counts:
            images = _images(vae, state.mean, observed)
            result.images[count] = images[:, 0] if observed.single else images
            result.acceptance[count] = torch.stack(taken).mean().item() if taken else 1.0
            synchronize(vae.device)
            result.seconds[count] = time.perf_counter() - begin
    return result


def _images(vae: BigLearnVAE, mean: Tensor, observed: Observed) -> Tensor:
    """Means (K, N, L, D) as images (K, N, C, H, W) in [0, 1], with what is observed in its place."""
    decoded = [vae.tokenizer.decode(part) for part in mean.flatten(0, 1).split(vae.rows)]
    completed = torch.cat(decoded).view(*mean.shape[:2], *vae.image_shape).clamp(0, 1)
    return torch.where(observed.kept, observed.images, completed)
