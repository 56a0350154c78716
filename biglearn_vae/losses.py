"""The objectives. B batch, L tokens, D token dimension, Z latent dimension, C channels, P patch size."""

import copy
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from biglearn_vae import checks, masks
from biglearn_vae.distributed import StepRandom
from biglearn_vae.gaussian import DiagGaussian
from biglearn_vae.masks import MaskSampler
from biglearn_vae.observations import GAUSSIAN, Gaussian, Observations, as_observations

Masks = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]  # q(S, T): a MaskSampler, or one like it


@dataclass(frozen=True, eq=False)
class ELBO:
    """The value of a BigLearnELBO for a batch, in parts; (B,) is one number per image.

    Attributes:
        reconstruction: log p(x_T | z, x_S), (B,); for Gaussian observations with variance 1 and without the constant,
            -1/2 times the sum of squared errors over T; for discretized Gaussian ones times beta.
        kl: KL[p(z | x_{S u T}) || p(z | x_S)] in nats, not weighted, (B,).
        beta: weight of the KL, a number or a tensor ().
        num_targets: |T|, how many tokens the reconstruction sums over, (B,).
        token_dim: D.
        observations: the distribution p(x_T | z, x_S).
    """

    reconstruction: Tensor
    kl: Tensor
    beta: float | Tensor
    num_targets: Tensor
    token_dim: int
    observations: Observations = GAUSSIAN

    @property
    def elbo(self) -> Tensor:
        """reconstruction - beta kl: what training maximises."""
        return self.reconstruction - self.beta * self.kl

    @property
    def elbo_nats(self) -> Tensor:
        """A lower bound on log p(x_T | x_S) in nats, estimated with one draw of z, (B,).

        For Gaussian observations it is the bound under N(mu, beta I), elbo / beta - |T| D/2 log(2 pi beta). Training
        maximises beta times this bound, up to a constant: weighting the KL by beta means that observations have the
        variance beta. Under N(mu, I), with beta below 1, it would not be a bound. For discretized Gaussian observations
        it is elbo / beta, too, and for Bernoulli ones, which have no variance, reconstruction - kl, whatever beta is.

        Raises:
            ValueError: for Gaussian observations and beta = 0 (as a number, not a tensor): there is no such model.
        """
        if self.observations.scaled and not isinstance(self.beta, Tensor) and self.beta == 0:
            raise ValueError("with beta = 0 there is no N(mu, beta I): the bound in nats needs a positive beta")
        numbers = self.token_dim * self.num_targets.to(self.reconstruction.dtype)
        return self.observations.nats(self.reconstruction, numbers, self.beta) - self.kl

    @property
    def loss(self) -> Tensor:
        """What training minimises: the negative mean over the batch."""
        return -self.elbo.mean()

    def scalars(self) -> dict[str, Tensor]:
        """Batch means by name."""
        return {
            "loss": self.loss,
            "elbo": self.elbo.mean(),
            "reconstruction": self.reconstruction.mean(),
            "kl": self.kl.mean(),
        }


class BigLearnELBO:
    """BigLearnELBO(x; S, T) = E_{z ~ p(z|x_{S u T})} log p(x_T | z, x_S) - beta KL[p(z|x_{S u T}) || p(z|x_S)].

    Eq. 6 with a `TwoStackViT`, Eq. 7 with a `UniversalViT`. S empty and T everything is the JointELBO (Eq. 1),
    S empty the MarginELBO (Eq. 4), otherwise it is the ConditionELBO (Eq. 5). The expectation is estimated with one
    reparameterised draw per image.

    Args:
        beta: weight of the KL, not negative.
        masks: q(S, T), for calls that do not give S and T: a MaskSampler (the default), or a function masks(batch_size,
            num_tokens, generator) that returns S and T, boolean (batch_size, num_tokens) on the generator's device,
            disjoint, no T empty (on GPUs these two are not checked). If data are incomplete, such a function also draws
            patches that were never recorded, which are then removed from S and T.
        prior: "learned", p(z | x_S) of the network, or "standard", N(0, I), as in the ordinary VAE.
        beta_warmup_steps: steps over which training raises beta linearly (see `weight`).
        beta_warmup_start: share of beta at which the warm-up starts, in [0, 1]. At 0 nothing ties the prior to the
            posterior at first: they drift apart by thousands of nats, and when beta rises the latent is given up.
        observations: the distribution p(x_T | z, x_S): "gaussian" (or None), N(mu, I), where mu is the network's
            output; "discretized_gaussian", N(mu, beta I) rounded to bytes, for images whose pixels are bytes / 255;
            "bernoulli", for pixels that are 0 or 1, where the output is their log-odds (beta = 1 is then the ELBO
            itself); or an object of your own subclass of `Observations`.

    Attributes:
        same_model: for a subclass with its own `terms`: whether these are another bound on the likelihood of the same
            model, with these observations, such as an importance-weighted one. If True, its models are measured like
            all others, by the ELBO above, and have bounds in nats; if False, they are measured by its own objective.

    Raises:
        ValueError: on values outside these.
    """

    same_model: bool = False

    def __init__(
        self,
        beta: float,
        masks: Masks | None = None,
        prior: str = "learned",
        beta_warmup_steps: int = 0,
        beta_warmup_start: float = 0.0,
        observations: str | Observations | None = None,
    ):
        checks.real_number("beta", beta, "[0, inf)")
        check_prior(prior)
        checks.whole_number("beta_warmup_steps", beta_warmup_steps, 0)
        checks.real_number("beta_warmup_start", beta_warmup_start, "[0, 1]", ": a share of beta")
        self.beta = beta if isinstance(beta, Tensor) else float(beta)  # an int may be too large for torch
        self.prior = prior
        self.beta_warmup_steps, self.beta_warmup_start = beta_warmup_steps, beta_warmup_start
        self.masks, self.observations = _sampler(masks), as_observations(observations).under(self.beta)
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "beta" and "observations" in vars(self):  # it is set anew, and may be their variance
            self.observations = self.observations.under(value)
        super().__setattr__(name, value)

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this objective from another: its name, that of its q(S, T), and what either was made with."""
        return {
            **settings_of(self),
            "observations": self.observations.name
            if type(self.observations) is not Gaussian
            else None,  # as in older checkpoints
            "objective": name_of(self),
            "masks": name_of(self.masks),
            **{f"masks.{name}": value for name, value in settings_of(self.masks).items()},
        }

    def compiled(self, **options: Any) -> "BigLearnELBO":
        """The same objective, compiled: torch.compile makes one graph of `terms` and the network.

        The graph reads weights and adds up their gradients once for all calls of the network. Random numbers and beta
        stay outside, so no change of theirs recompiles it.

        Args:
            options: arguments of torch.compile.
        """
        result = copy.copy(self)
        result._compiled = torch.compile(result.terms, **options)
        return result

    def weight(self, step: int | Tensor | None) -> float | Tensor:
        """Beta at this training step, counted from 0, a number or a tensor (); the final beta if step is None."""
        if step is None or not self.beta_warmup_steps:
            return self.beta
        passed = step / self.beta_warmup_steps
        passed = passed.clamp(max=1) if isinstance(passed, Tensor) else min(passed, 1)
        return self.beta * (1 - (1 - self.beta_warmup_start) * (1 - passed))

    def __call__(
        self,
        net: nn.Module,
        x: Tensor | tuple[Tensor, Tensor],
        S: Tensor | None = None,
        T: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        random: StepRandom | None = None,
        step: int | Tensor | None = None,
    ) -> ELBO:
        """Compute the objective for a batch.

        Args:
            net: a network with the forward of `models.MaskedViT`, wrapped or not.
            x: tokens (B, L, D), or a pair of tokens and a boolean mask (B, L) of those that were ever recorded. Tokens
                with a NaN also count as not recorded. What was not recorded is removed from S and T.
            S, T: disjoint boolean masks (B, L) or one for all, T not empty; drawn by `masks` if not given.
            noise: standard normal numbers (B, Z), from which z is made; drawn if not given.
            random: the source of whatever is to be drawn.
            step: training step, for the warm-up of beta; without it beta is final.

        Raises:
            ValueError: if something is to be drawn and there is no `random`, on arguments of another shape or type,
                and, unless `step` is given, if S and T are not disjoint, T is empty, or x_T has values that the
                observations cannot have. (A training step skips this: on a GPU it would wait for the device.)
        """
        if random is None and (S is None or T is None or noise is None):
            raise ValueError("give S, T and noise, or random to draw them from")
        _check_call(net, random)
        x, S, T = _task(self.masks, x, S, T, random, step)
        if step is None and not torch.compiler.is_compiling():
            self.observations.check(x, T)
        shape = (len(x), _unwrapped(net).z_dim)
        if noise is None and random is not None:
            noise = random.normal(shape, x.dtype)
        elif not isinstance(noise, Tensor) or tuple(noise.shape) != shape:
            raise ValueError(
                f"expected noise, a tensor of standard normal numbers of shape {shape}, got {checks.described(noise)}"
            )
        reconstruction, kl = (self._compiled or self.terms)(net, x, S, T, noise)
        return ELBO(reconstruction, kl, self.weight(step), T.sum(-1), x.shape[-1], self.observations)

    def draw(self, x: Tensor | tuple[Tensor, Tensor], random: StepRandom) -> tuple[Tensor, Tensor]:
        """Draw S and T (B, L) from q(S, T) for what was recorded of x, as a call without them does before the noise."""
        return _task(self.masks, x, None, None, random, None)[1:]

    def terms(self, net: nn.Module, x: Tensor, S: Tensor, T: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL (B,) of an `ELBO`, as functions of tensors alone; see `__call__` for the arguments.

        x holds all tokens. A subclass that calls the network itself must give it `masks.seen(x, S)`, so that it does
        not see what it is to predict.
        """
        q, p = self._posterior_and_prior(net, x, S, T)
        output = _asked(net, x, S, q.sample(noise), T)  # (B, L, D)
        nothing = ~(S | T).any(-1)  # was recorded; with a standard prior the KL would still count
        return self.observations.reconstruction(x, output, T), q.kl(p).masked_fill(nothing, 0)

    def _posterior_and_prior(
        self, net: nn.Module, x: Tensor, S: Tensor, T: Tensor
    ) -> tuple[DiagGaussian, DiagGaussian | None]:
        """p(z | x_{S u T}) and p(z | x_S), or None for the standard normal."""
        if self.prior == "standard":
            return _asked(net, x, S | T), None
        if not getattr(_unwrapped(net), "fixed_shapes", True):  # sequences of S u T and of S differ in length
            return _asked(net, x, S | T), _asked(net, x, S)
        both = _asked(net, torch.cat([x, x]), torch.cat([S | T, S]))
        return both[: len(x)], both[len(x) :]


def has_model(loss: Any) -> bool:
    """Whether it is known which likelihood an objective bounds, so that there are bounds in nats: it is a BigLearnELBO
    without terms of its own, or one with `same_model`."""
    return is_elbo(loss) or (isinstance(loss, BigLearnELBO) and bool(loss.same_model))


def is_elbo(loss: Any) -> bool:
    """Whether an objective computes what BigLearnELBO does: it is one, or a subclass without terms of its own."""
    own = (type(loss).terms, type(loss).__call__) if isinstance(loss, BigLearnELBO) else None
    return own == (BigLearnELBO.terms, BigLearnELBO.__call__)


def check_prior(prior: str) -> None:
    """Raise a ValueError unless this names a prior of z: "learned", p(z | x_S), or "standard", N(0, I)."""
    checks.check_choice("prior", prior, ("learned", "standard"))


def _sampler(given: Masks | None) -> Masks:
    """This q(S, T), or the default one."""
    if given is None:
        return MaskSampler()
    if isinstance(given, type) or not callable(given):
        raise ValueError(
            "masks must be a MaskSampler, q(S, T), or a function that draws (S, T) as one does, "
            f"masks(batch_size, num_tokens, generator), got {given!r}: S and T are given in the call"
        )
    return given


def _check_call(net: nn.Module, random: StepRandom | None) -> None:
    """Raise a ValueError unless the network is a module, and `random` a StepRandom or None."""
    if not isinstance(net, nn.Module):
        raise ValueError(
            f"expected a network such as UniversalViT (of a BigLearnVAE its .net), got {type(net).__name__}"
        )
    if random is not None and not isinstance(random, StepRandom):
        raise ValueError(
            "random must be a StepRandom, such as StepRandom(torch.Generator().manual_seed(0)), "
            f"got {type(random).__name__}"
        )


def _task(
    sampler: Masks,
    batch: Tensor | tuple[Tensor, Tensor],
    S: Tensor | None,
    T: Tensor | None,
    random: StepRandom | None,
    step: int | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a batch, and S and T, drawn if not given, without what was not recorded."""
    x, recorded = _recorded(batch)
    if S is not None and T is not None:
        _check_masks(S, T, recorded, values=step is None and not torch.compiler.is_compiling())
    elif S is None and T is None and random is not None:
        S, T = _drawn(sampler, x, recorded, random)
    else:
        raise ValueError("give both S and T, or neither to have them drawn")
    return x, S & recorded, T & recorded


def _drawn(sampler: Masks, x: Tensor, recorded: Tensor, random: StepRandom) -> tuple[Tensor, Tensor]:
    """Draw S and T from q(S, T) for all processes together; `recorded` is known for this process's images only."""
    length = x.shape[1]
    if isinstance(sampler, MaskSampler) and type(sampler).__call__ is MaskSampler.__call__:
        draw = sampler.draw
        s_ratio, t_ratio, order = random.rows(len(x), lambda rows, generator: draw(rows, length, generator))
        return sampler.assign(s_ratio, t_ratio, order, recorded)
    drawn = random.rows(len(x), lambda rows, generator: sampler(rows, length, generator))
    if not isinstance(drawn, tuple | list) or len(drawn) != 2:
        what = f"{len(drawn)} things" if isinstance(drawn, tuple | list) else checks.described(drawn)
        raise ValueError(f"expected masks to draw two, (S, T), got {what}")
    S, T = drawn
    _check_masks(S, T, torch.ones_like(recorded), values=not x.is_cuda and not torch.compiler.is_compiling())
    return S, T


def _check_masks(S: Tensor, T: Tensor, recorded: Tensor, values: bool) -> None:
    """Raise a ValueError unless S and T are masks of tokens (B, L) and, if `values` are checked, disjoint, with T empty
    only where nothing was recorded. Checking values waits for the device."""
    shape = tuple(recorded.shape)
    for name, mask in (("S", S), ("T", T)):
        if not checks.is_mask(mask) or tuple(mask.shape) not in (shape, (1, shape[1]), shape[1:]):
            raise ValueError(f"expected a boolean mask {name} of shape {shape}, got {checks.described(mask)}")
    if not values:
        return
    both, empty = S & T, ~T.any(-1) & recorded.any(-1)
    if (both.any(-1) | empty).any():
        raise ValueError(
            f"S and T must be disjoint and T hold at least one token of each image, got {int(both.sum())} tokens in "
            f"both and {int(empty.sum())} images without T: T & ~S is disjoint from S"
        )


def name_of(part: Any) -> str:
    """The name of a function, also in a functools.partial, or of an object's class."""
    part = part.func if isinstance(part, functools.partial) else part
    return getattr(part, "__qualname__", type(part).__qualname__)


def settings_of(part: Any) -> dict[str, Any]:
    """The arguments an object was made with, by name, as far as it keeps them under these names; for a function none,
    for a functools.partial its keywords."""
    if isinstance(part, functools.partial):
        return part.keywords
    makers = [vars(kind)["__init__"] for kind in type(part).__mro__ if "__init__" in vars(kind)]
    names = dict.fromkeys(name for maker in reversed(makers) for name in inspect.signature(maker).parameters)
    kept = vars(part) if hasattr(part, "__dict__") else {}
    return {name: kept[name] for name in names if name in kept}


def _recorded(batch: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The tokens of a batch and which of them were recorded."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    x, given = batch if pair else (batch, None)
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"expected tokens (B, L, D), got {checks.described(x)}; `Patchify` makes them of images")
    if not x.is_floating_point():
        raise ValueError(f"expected floating-point tokens (B, L, D), got {checks.described(x)}: of images in [0, 1]")
    recorded = masks.recorded(x)
    if given is None:
        return x, recorded
    masks.check_recorded(given, recorded.shape)
    return x, recorded & given


@dataclass(frozen=True, eq=False)
class PatchError:
    """Errors of reconstructed patches, each a number, ().

    Attributes:
        loss: mean squared error, weighted: what training minimises.
        error: the same without weights.
    """

    loss: Tensor
    error: Tensor

    def scalars(self) -> dict[str, Tensor]:
        """The loss, and the error as PSNR in dB for a peak of 1; a mean over several batches is one of decibels."""
        return {"loss": self.loss, "psnr": -10 / math.log(10) * self.error.log()}


class PatchAELoss:
    """Mean squared error of the reconstructions of a random share of the patches of each image (stage 1, Appendix B).

    The mean is over all patches of a batch that were chosen and recorded. So if fewer than that share of
    an image's patches were recorded, a batch that is split, over several processes or within one, has another loss: the
    mean of its parts' losses.

    Args:
        share: of the patches of an image, in (0, 1], rounded up to a whole number.
        border_weight: weight of the outermost pixels of a patch relative to the others, at least 1. There the errors of
            two patches meet, which shows as a seam.

    Raises:
        ValueError: on values outside these.
    """

    def __init__(self, share: float = 0.25, border_weight: float = 1.0):
        checks.real_number("share", share, "(0, 1]")
        checks.real_number("border_weight", border_weight, "[1, inf)")
        self.share, self.border_weight = share, border_weight

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this objective from another, in numbers and words."""
        return {"objective": type(self).__qualname__, "share": self.share, "border_weight": self.border_weight}

    def __call__(
        self, net: nn.Module, patches: Tensor, *, random: StepRandom, step: int | Tensor | None = None
    ) -> PatchError:
        """The error of a batch.

        Args:
            net: takes patches (N, C, P, P) and returns as many, as `patch_ae.PatchAE` does; wrapped or not.
            patches: all patches of the images of a batch, (B, L, C, P, P). Those with a NaN, which were not recorded as
                a whole, are chosen last and do not count.
            random: the source of the choice of patches.
            step: not used.

        Raises:
            ValueError: on arguments of another type, and patches of another shape.
        """
        _check_call(net, random)
        if not isinstance(patches, Tensor) or patches.ndim != 5:
            raise ValueError(
                f"expected patches (B, L, C, P, P), got {checks.described(patches)}; `Patchify.cut` makes them"
            )
        batch, count = patches.shape[:2]
        order = random.rows(batch, lambda rows, generator: masks.uniform_numbers((rows, count), generator))
        order = order.masked_fill(patches.isnan().flatten(2).any(-1), 1)  # others are less
        chosen = order.argsort(-1)[:, : math.ceil(self.share * count)]  # (B, n)
        rows = torch.arange(batch, device=chosen.device).unsqueeze(-1)
        x = patches[rows, chosen].flatten(0, 1)  # (B n, C, P, P)
        known = ~x.isnan().flatten(1).any(-1)[:, None, None, None]
        x = torch.where(known, x, 0)  # NaN has no gradient that 0 would cancel
        error = torch.where(known, (net(x) - x).float().square(), 0)
        share = known.float().mean().clamp(min=1 / len(known))
        return PatchError((error * self._weights(error)).mean() / share, error.mean() / share)

    def _weights(self, error: Tensor) -> Tensor:
        """Weights of pixels (P, P), of mean 1."""
        weights = error.new_full(error.shape[-2:], self.border_weight)
        weights[1:-1, 1:-1] = 1
        return weights / weights.mean()


class InpaintingRegression:
    """1/2 ||x_T - mu(x_S)||^2, where mu is the mean of p(x_T | z, x_S) at z = 0: the same network without its latent.

    Parameters that only encoding uses get no gradient. DistributedDataParallel waits for all gradients, so `freeze`
    them before.

    Args:
        masks: q(S, T), for calls that do not give S and T, as for `BigLearnELBO`.
    """

    def __init__(self, masks: Masks | None = None):
        self.masks = _sampler(masks)

    def __call__(
        self,
        net: nn.Module,
        x: Tensor | tuple[Tensor, Tensor],
        S: Tensor | None = None,
        T: Tensor | None = None,
        *,
        random: StepRandom | None = None,
        step: int | Tensor | None = None,
    ) -> ELBO:
        """Compute the objective as an `ELBO` with a KL of 0; S and T are those of `BigLearnELBO` for the same `random`.

        Args:
            net, x, S, T, random: see `BigLearnELBO`.
            step: training step; the values of given S and T are checked only without it.

        Raises:
            ValueError: if S and T are to be drawn and there is no `random`, and on what `BigLearnELBO` refuses.
        """
        if random is None and S is None and T is None:
            raise ValueError("give S and T, or random to draw them from")
        _check_call(net, random)
        x, S, T = _task(self.masks, x, S, T, random, step)
        mean = _asked(net, x, S, x.new_zeros(len(x), _unwrapped(net).z_dim), T)
        reconstruction = GAUSSIAN.reconstruction(x, mean, T)
        return ELBO(reconstruction, torch.zeros_like(reconstruction), 0.0, T.sum(-1), x.shape[-1])

    @staticmethod
    def freeze(net: Any) -> None:
        """Freeze the parameters that only encoding uses: the latent's head and mask, and a separate encoder stack."""
        unused = [net.latent_mask, *net.latent_norm.parameters(), *net.latent_out.parameters()]
        if net.encoder is not net.decoder:
            unused += net.encoder.parameters()
        for parameter in unused:
            parameter.requires_grad_(False)


def _asked(net: nn.Module, x: Tensor, S: Tensor, *more: Tensor) -> Any:
    """The network's output when it sees the tokens in S alone."""
    return net(masks.seen(x, S), S, *more)


def _unwrapped(net: nn.Module) -> Any:
    """The network inside DistributedDataParallel, or itself."""
    return net if hasattr(net, "z_dim") else getattr(net, "module", net)
