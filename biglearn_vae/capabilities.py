"""`BigLearnVAE`, a trained model: one method for each of its capabilities (Table 2).

B images, C channels, H x W pixels, L tokens, D token dimension, Z latent dimension, K draws.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from biglearn_vae import checkpoint, checks, gaussian, masks, states
from biglearn_vae.distributed import derive_seed
from biglearn_vae.gaussian import DiagGaussian, bits_per_dim
from biglearn_vae.losses import check_prior, has_model
from biglearn_vae.models import MaskedViT, TwoStackViT, UniversalViT
from biglearn_vae.observations import Observations, as_observations, is_own
from biglearn_vae.patch_ae import PatchAE
from biglearn_vae.patches import Patchify, of_batch

Result = TypeVar("Result", Tensor, DiagGaussian)

CPU_TOKENS = 2**12  # that pass through a network at once on CPUs, so that intermediate results stay in the cache
SAVED = {kind.__name__: kind for kind in (UniversalViT, TwoStackViT, Patchify, PatchAE)}  # in files of models


@dataclass(frozen=True, eq=False)
class Sensitivity(Generic[Result]):
    """What a change does: the result without it and the result with it."""

    before: Result
    after: Result


class Observed(NamedTuple):
    """Partly observed data, on the model's device.

    Attributes:
        tokens: (B, L, D), zero where not observed.
        mask: what is observed, (B, L).
        images: the same as pixels (B, C, H, W), with anything where not observed. Images are kept as they came, since
            not every tokenizer gives them back exactly; tokens are decoded.
        kept: the pixels (B, 1, H, W) that completions leave as they are: those of observed patches and, if images came
            with a mask of pixels, all others in it that are finite.
        single: whether the data came without a batch axis.
    """

    tokens: Tensor
    mask: Tensor
    images: Tensor
    kept: Tensor
    single: bool


class _Importance(NamedTuple):
    """The parts of importance weights, which do not depend on the variance of Gaussian observations; float64.

    Attributes:
        reconstruction: log p(x_T | z, x_S), (K, B); for Gaussian observations with variance 1, without the constant.
        ratio: log p(z | x_S) - log p(z | x_{S u T}), (K, B).
        numbers: how many numbers T holds, (B,).
    """

    reconstruction: Tensor
    ratio: Tensor
    numbers: Tensor

    def log_weights(self, observations: Observations, variance: float) -> Tensor:
        """(K, B), 0 where T is empty."""
        return observations.nats(self.reconstruction, self.numbers, variance) + self.ratio


class BigLearnVAE:
    """A trained network with its tokenizer.

    Data `x` are images (B, C, H, W) with values in [0, 1] (uint8 images are divided by 255) or tokens (B, L, D), a
    batch or a single one. Methods that return images return them in [0, 1], a batch or a single one, like the data.

    A mask `S` is boolean, True = observed, one for all images or one for each: over patches, (B, L), or over pixels,
    (B, H, W) or (B, 1, H, W). A patch counts as observed if all of its pixels are. What lies outside S has no influence
    and may be NaN. If the sizes fit both, data are taken as images (tokens of a single grey image may have the shape of
    one), and masks as masks over patches (if W = L, pass one mask over pixels for all images as (1, H, W)).

    `seed` makes a result repeatable, for the same number of images in a call; without it `torch.manual_seed` does.
    Methods pass no gradients; `net` and `tokenizer` do.

    All methods raise ValueError for data or masks of another shape or type, an empty batch, NaN or infinite values in
    observed patches, and pixels there with an absolute value above 10, as in images that were not divided by 255. They
    warn if images seem to be in [-1, 1]. Tokens have no such limit, since some tokenizers give any numbers.

    Args:
        net: a network of `models`, or one that is called like these, unwrapped. It is put into evaluation mode.
        tokenizer: `Patchify`, or another module with its methods and sizes; it is put into evaluation mode, too.
        prior: "learned", p(z | nothing observed) of the network, or "standard", N(0, I), for the ordinary VAE.
        variance: of Gaussian observations in `log_prob`, p(x_T | z, x_S) = N(mu, variance I); with 0 each call has to
            give one. Of discretized Gaussian observations it is the variance, too.
        chunk: how many images pass through the network at once, at most, which bounds the memory; see `rows` for CPUs.
        observations: the distribution p(x_T | z, x_S), as for `BigLearnELBO`: "gaussian" (or None),
            "discretized_gaussian" (of this variance), "bernoulli", or an `Observations`.

    Raises:
        ValueError: on other arguments than these, and if network and tokenizer differ in their sizes.
    """

    net: Any  # modules, annotated as Any: a type checker grants nn.Module no attributes but tensors and modules
    tokenizer: Any

    def __init__(
        self,
        net: nn.Module,
        tokenizer: nn.Module,
        prior: str = "learned",
        variance: float = 1.0,
        chunk: int = 1024,
        observations: str | Observations | None = None,
    ):
        check_prior(prior)
        chunk = checks.whole_number("chunk", chunk, 1)
        variance = checks.real_number("variance", variance, "[0, inf)")
        check_network(net)
        check_calls(net)
        check_part("a tokenizer such as Patchify", tokenizer, ("grid", "token_dim", "image_shape", "encode", "decode"))
        _check_sizes(net, tokenizer)
        _check_variance(observations, variance)
        self.net, self.prior, self.observations, self.chunk = net.eval(), prior, as_observations(observations), chunk
        self.variance = variance
        self.tokenizer = tokenizer.to(self.device).eval()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "variance":
            self.observations = self.observations.under(value)
        super().__setattr__(name, value)

    @classmethod
    def of(cls, net: nn.Module, tokenizer: nn.Module, loss: Any, **options: Any) -> "BigLearnVAE":
        """A model with the prior and the observations of the objective that trained it, and beta as their variance.

        Args:
            loss: a `BigLearnELBO`, or an object with `prior` and `beta`. If it is not known which likelihood it bounds
                (`losses.has_model`), as with terms of its own, the variance is 0, and each call has to give one, unless
                there are no such observations without it, as discretized Gaussian ones.
            options: further arguments, such as `chunk`; they override those taken from `loss`.
        """
        settings = {"prior": loss.prior, "variance": variance_of(loss), "observations": observations_of(loss)}
        return cls(net, tokenizer, **settings | options)

    def save(self, path: str | Path) -> None:
        """Write the model to one file, from which `biglearn_vae.load` restores it anywhere.

        The file holds sizes and weights of network and tokenizer, prior, observations and variance; no code, no data,
        no settings of the training. For a network or tokenizer that is not of this library it holds only the weights:
        give `load` a new instance of it, as `net=` or `tokenizer=`.

        Raises:
            ValueError: if the path is a folder, or the observations are not of this library.
        """
        path = checks.path("path", path)
        if path.is_dir():
            raise ValueError(f"expected the name of a file to write, such as {path / 'model.pt'}, got a folder, {path}")
        if is_own(self.observations):
            raise ValueError(
                f"observations of one's own, {type(self.observations).__name__}, cannot be written into a file: keep "
                "the weights, vae.net.state_dict(), and make the model of them"
            )
        parts = {"net": _state(self.net), "tokenizer": _state(self.tokenizer)}
        settings = {"prior": self.prior, "variance": self.variance, "observations": self.observations.name}
        checkpoint.save(path, parts | settings)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        net: nn.Module | None = None,
        tokenizer: nn.Module | None = None,
    ) -> "BigLearnVAE":
        """Read the model that `save` wrote, frozen.

        Args:
            net, tokenizer: new instances that take the file's weights; only for classes that are not of this library.

        Raises:
            ValueError: if the file cannot be read, is not such a model, or if `net` or `tokenizer` is missing, does not
                fit or is not needed.
        """
        path = checks.path("path", path)
        state = checkpoint.load(path)
        try:
            net, tokenizer = _made("net", state["net"], net), _made("tokenizer", state["tokenizer"], tokenizer)
            settings = {"prior": state["prior"], "variance": state["variance"]}
            return cls(net.to(device), tokenizer, **settings, observations=state.get("observations"))
        except (KeyError, TypeError):
            hint = ""
            if isinstance(state, dict) and "metadata" in state:
                run = "config" in state["metadata"]
                hint = ": load a run by its folder" if run else ": it is of a Trainer, whose resume() takes it"
            raise ValueError(f"{path} is not a model that BigLearnVAE.save wrote{hint}") from None
        except ValueError as error:  # of another version, say
            raise ValueError(f"{path}: {error}") from None

    def to(self, *where: torch.device | str | torch.dtype, **named: Any) -> "BigLearnVAE":
        """Move network and tokenizer to a device, and the network to another precision; returns the model itself.

        Arguments are those of torch's `to`, with names (`device=`, `dtype=`) or without.
        """
        self.net.to(*where, **named)
        self.tokenizer.to(self.device)
        return self

    def __repr__(self) -> str:
        rows, columns = self.grid
        return (
            f"BigLearnVAE({type(self.net).__name__}, images {self.image_shape}, {rows} x {columns} patches, "
            f"z of {self.z_dim}, {self.prior} prior, on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        return _like(self.net).device

    @property
    def dtype(self) -> torch.dtype:
        """The network's precision."""
        return _like(self.net).dtype

    @property
    def rows(self) -> int:
        """How many images pass through the network at once: `chunk`, or on a CPU as few as stay in its cache."""
        return min(self.chunk, max(1, CPU_TOKENS // (1 + self.num_tokens))) if self.device.type == "cpu" else self.chunk

    @property
    def num_tokens(self) -> int:
        """Number of patches of an image, L."""
        return self.net.num_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.net.grid

    @property
    def z_dim(self) -> int:
        """Dimension of the latent code, Z."""
        return self.net.z_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, (C, H, W)."""
        return self.tokenizer.image_shape

    def pixel_mask(self, S: Tensor) -> Tensor:
        """Patch masks (B, L) or (L,) -> pixel masks (B, 1, H, W) or (1, H, W), on the model's device."""
        return masks.to_pixels(S, self.grid, self.image_shape[1:]).unsqueeze(-3).to(self.device)

    @torch.no_grad()
    def observe(self, x: Tensor, S: Tensor | None = None) -> Observed:
        """The observed part of data (by default everything), in the form in which all methods use it."""
        tokens, mask, images, single = self._observed(x, S)
        kept = self.pixel_mask(mask)
        if images is None:
            return Observed(tokens, mask, self.tokenizer.decode(tokens), kept, single)
        named = None if S is None else self._of_pixels(S)
        if named is not None:
            kept = kept | (named.unsqueeze(-3) & images.isfinite().all(1, keepdim=True))
        return Observed(tokens, mask, images, kept, single)

    @torch.no_grad()
    def encode(self, x: Tensor, S: Tensor | None = None) -> DiagGaussian:
        """p(z | x_S), (B, Z): the posterior if everything is observed (the default), the prior if nothing is.

        `.mean`, `.std` and `.sample(seed=0)` of the result are tensors.
        """
        tokens, mask, _, single = self._observed(x, S)
        q = self._encode(tokens, mask)
        return q[0] if single else q

    @torch.no_grad()
    def decode(self, z: Tensor, x: Tensor | None = None, S: Tensor | None = None) -> Tensor:
        """The mean of p(x | z), or, given x and S, of p(x_T | z, x_S), where T is everything outside S.

        For Bernoulli observations the means are probabilities. Observed patches come back as they are in x; with images
        and a mask S of pixels, so do single pixels in S.

        Args:
            z: latent vectors (B, Z), several for each image (K, B, Z), or one (Z,).
            x, S: data and what is observed of it, both or neither; one image may serve for all latents.

        Returns:
            (B, C, H, W), (K, B, C, H, W) or (C, H, W), like z.
        """
        if (x is None) != (S is None):
            raise ValueError("give both x and S, or neither")
        tensor = isinstance(z, Tensor)
        if not tensor or z.ndim not in (1, 2, 3) or z.shape[-1] != self.z_dim or not z.numel():
            raise ValueError(
                f"expected latents z, a tensor of shape (B, {self.z_dim}), (K, B, {self.z_dim}) or ({self.z_dim},), "
                f"got {tuple(z.shape) if tensor else checks.described(z)}"
            )
        if not z.isfinite().all():
            raise ValueError(f"expected finite latents z, got NaN or infinity in {int((~z.isfinite()).sum())} numbers")
        data = self._nothing() if x is None else self.observe(x, S)
        batch = z.shape[-2] if z.ndim > 1 else 1
        if len(data.tokens) not in (1, batch):
            raise ValueError(
                f"expected one image for each of the {batch} latents, or one for all, got {len(data.tokens)}"
            )
        return self._complete(z.to(data.tokens), data)

    @torch.no_grad()
    def sample(self, n: int, seed: int | None = None, passes: int = 1) -> Tensor:
        """n new images (n, C, H, W): z from the prior, then the mean of p(x | z).

        Args:
            passes: number of passes, as in `inpaint`; there are no more than patches.
        """
        n = checks.whole_number("the number of samples", n, 1)
        return self._drawn(self._nothing(), n, seed, passes)

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, S: Tensor | None = None, draws: int | None = None, seed: int | None = None
    ) -> Tensor:
        """x from its code alone: z ~ p(z | x_S) (S everything by default), then the mean of p(x | z).

        Args:
            draws: how many of each image, along a new leading axis: (K, B, C, H, W).
        """
        draws = _draws(draws, seed)
        return self.decode(self.encode(x, S).sample(draws=draws, seed=seed))

    @torch.no_grad()
    def inpaint(
        self, x: Tensor, S: Tensor, draws: int | None = None, seed: int | None = None, passes: int = 1
    ) -> Tensor:
        """Complete what is missing: z ~ p(z | x_S), then the mean of p(x_T | z, x_S); what is observed is kept.

        With strokes as the observed part this is conditional generation. If the data are images, and a mask S of pixels
        contains only a part of a patch, that part is kept, too, though the network does not see it.

        Args:
            x: data; what is outside S may be anything.
            S: what is observed.
            draws: K, how many completions of each image, along a new leading axis: (K, B, C, H, W).
            passes: P, number of passes. Each completes a P-th of the missing patches, in random order, which the next
                ones observe. There are no more passes than missing patches; P passes take P times as long. The next
                passes observe the means of Gaussian observations, without noise, so draws vary less than under
                p(x_T | x_S); those of discretized Gaussian ones they observe as the nearest bytes. Bernoulli
                observations are drawn, 0 or 1, before they are observed, so patches completed by any pass but the last
                come back as 0 or 1.
        """
        draws = _draws(draws, seed)
        return self._drawn(self.observe(x, S), draws, seed, passes)

    @torch.no_grad()
    def combine(self, *observations: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Several observations (x1, S1), (x2, S2), ... as one, (x, S1 u S2 u ...), for every other method.

        So `vae.encode(*vae.combine((x1, S1), (x2, S2)))` is p(z | x_{S1 u S2}). A patch that several observe is taken
        from the first of them. Single pixels in a mask of pixels are taken from the first that has them, unless one
        observes their whole patch.

        Returns:
            x: images (B, C, H, W) if all data are images, else tokens (B, L, D); zero where nothing is observed.
            S: a mask of patches (B, L), for single data (L,). If all data are images and one of the masks was of
                pixels, a mask of pixels (B, H, W), for single data (1, H, W); `observe(x, S).mask` has its patches.
        """
        if not observations:
            raise ValueError("expected at least one pair (x, S), got none")
        for pair in observations:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(
                    f"expected pairs of data and a mask, combine((x1, S1), (x2, S2)), got a {type(pair).__name__}"
                )
        parts = [self.observe(x, S) for x, S in observations]
        if len({len(part.tokens) for part in parts}) > 1:
            raise ValueError(f"expected batches of one size, got {[len(part.tokens) for part in parts]}")
        x, S, images, kept, single = parts[0]
        if all(tuple(x.shape[-3:]) == self.image_shape for x, _ in observations):
            for other in parts[1:]:
                own = self.pixel_mask(S) | (kept & ~self.pixel_mask(other.mask))
                images, kept = torch.where(own, images, other.images), kept | other.kept
                S = masks.from_pixels(kept[:, 0], self.grid)
            x = images.masked_fill(~kept, 0)
            S = kept[:, 0] if any(S is not None and self._of_pixels(S) is not None for _, S in observations) else S
        else:
            for other in parts[1:]:
                x, S = torch.where(S.unsqueeze(-1), x, other.tokens), S | other.mask
        return (x[0], S if S.ndim == 3 else S[0]) if single else (x, S)

    @torch.no_grad()
    def interpolate(self, x_a: Tensor, x_b: Tensor, steps: int = 9, S: Tensor | None = None) -> Tensor:
        """Images along the straight line from the code of x_a to that of x_b; codes are means of p(z | x).

        Both images are encoded whole, whether S is given or not. If it is, patches never recorded (NaN) are left out.

        Args:
            steps: number of images, including both ends; at least 2.
            S: if given, the patches S of x_a are observed, and kept, in all images: p(x_T | z, x_S).

        Returns:
            (steps, B, C, H, W), or (steps, C, H, W) for two single images.
        """
        steps = checks.whole_number("steps", steps, 2)
        seen = (None if S is None else masks.recorded(self._tokens(x)[0]) for x in (x_a, x_b))
        start, end = (self.encode(x, own).mean for x, own in zip((x_a, x_b), seen, strict=True))
        if start.shape != end.shape:
            raise ValueError(f"expected as many images at both ends, got {tuple(x_a.shape)} and {tuple(x_b.shape)}")
        weights = torch.linspace(0, 1, steps, device=start.device).to(start)
        path = torch.lerp(start, end, weights.view(-1, *[1] * start.ndim))  # (steps, ..., Z)
        return self.decode(path) if S is None else self.decode(path, x_a, S)

    @torch.no_grad()
    def decoding_sensitivity(
        self, x: Tensor, S: Tensor, dims: Sequence[int], delta: float | Tensor = 5.0
    ) -> Sensitivity[Tensor]:
        """How the completion of x_S changes if single latent dimensions are moved; z is the mean of p(z | x_S).

        Args:
            dims: the dimensions, in [0, Z); each is moved by itself.
            delta: how far, one number or one for each of `dims`, in the units of z.

        Returns:
            `.before` (B, C, H, W), the mean of p(x_T | z, x_S), and `.after` (len(dims), B, C, H, W), that of
            p(x_T | z + delta, x_S).
        """
        dims = checked_dims(self, dims)
        delta = _deltas(delta, len(dims))
        z = self.encode(x, S).mean  # (B, Z) or (Z,)
        change = torch.zeros(len(dims), self.z_dim, device=z.device, dtype=z.dtype)
        change[range(len(dims)), dims] = delta.to(z).expand(len(dims))
        moved = z + (change if z.ndim == 1 else change.unsqueeze(1))
        return Sensitivity(before=self.decode(z, x, S), after=self.decode(moved, x, S))

    @torch.no_grad()
    def encoding_sensitivity(self, x: Tensor, S: Tensor | None, change: Tensor) -> Sensitivity[DiagGaussian]:
        """How the code, p(z | x_S), changes if the observed data are changed.

        Args:
            change: what is added to x, of its shape or one that broadcasts to it; outside S it has no influence.

        Returns:
            `.before`, p(z | x_S), and `.after`, p(z | x_S + change). For a result r, `r.after.kl(r.before)` is how far
            apart they are, and `vae.decode(r.after.mean, x, S)` shows the effect.
        """
        tokens, mask, _, single = self._observed(x, S)
        if not mask.any(-1).all():
            raise ValueError("expected at least one observed patch in each image, since that is what changes")
        x, before = self._numbers(x), self._encode(tokens, mask)
        expected = f"expected a change, a tensor that broadcasts to x, {tuple(x.shape)}, got"
        if not isinstance(change, Tensor):
            raise ValueError(f"{expected} {checks.described(change)}")
        try:
            changed = x + change.to(x).expand_as(x)
        except RuntimeError:
            raise ValueError(f"{expected} {tuple(change.shape)}") from None
        try:
            after = self.encode(changed, S)
        except ValueError as error:
            raise ValueError(f"x + change: {error}") from None
        return Sensitivity(before=before[0] if single else before, after=after)

    @torch.no_grad()
    def log_prob(
        self,
        x: Tensor,
        T: Tensor | None = None,
        given: Tensor | None = None,
        samples: int = 64,
        variance: float | None = None,
        seed: int | None = None,
        unit: str = "nats",
        passes: int = 1,
    ) -> Tensor:
        """A lower bound on log p(x_T | x_S): joint, marginal or conditional, by importance sampling.

            log 1/K sum_k p(x_T | z_k, x_S) p(z_k | x_S) / p(z_k | x_{S u T}),  z_k ~ p(z | x_{S u T})

        (Burda et al. 2016; with K = 1 it is Eq. 5's bound.) Gaussian observations are N(mu, variance I), constants
        included. Training with weight beta on the KL and unit variance is, up to scale, training with variance beta
        and weight 1. So the variance is the model's own, beta, unless another is given (`evaluation.fit_variance`
        fits one). In expectation the bound grows with K, and stays below the truth.

        Args:
            T: what is asked for, by default all patches that are not given; not empty, disjoint from S.
            given: S, what is conditioned on; by default nothing. A patch counts as given if all of its pixels are; if
                only some are, by default the whole patch is asked for. A network trained with method=vae knows nothing
                of parts of images: see `evaluation.conditional_log_prob_joint`.
            samples: K.
            variance: of Gaussian observations.
            unit: "nats", or "bits_per_dim": the negative bound in bits for each of the |T| D numbers.
            passes: into how many parts T is divided, in random order. Each is bounded given S and the parts before it;
                by the chain rule, the sum is a bound on log p(x_T | x_S) under that order. The parts before are data,
                with the noise of observations, so it is not quite the bound for what `inpaint` draws.

        Returns:
            float64 (B,), or () for a single image.
        """
        checks.check_choice("unit", unit, ("nats", "bits_per_dim"))
        variance = checked_variance(self, variance)
        tokens, S, T, single = self._tasks(x, T, given)
        of_passes = self._importance_by_pass(tokens, S, T, samples, seed, passes)
        weights = (part.log_weights(self.observations, variance) for part in of_passes)
        bound: Any = sum(of_pass.logsumexp(0) - math.log(samples) for of_pass in weights)
        if unit == "bits_per_dim":
            bound = bits_per_dim(bound, T.sum(-1).double() * self.net.token_dim)
        return bound[0] if single else bound

    @torch.no_grad()
    def log_weights(
        self,
        x: Tensor,
        T: Tensor | None = None,
        given: Tensor | None = None,
        samples: int = 64,
        variance: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Logarithms of the importance weights that `log_prob` averages: float64 (K, B), or (K,) for a single image.

        For S empty the weights are those of Bayes' rule, p(z) p(x_T | z) / p(z | x_T).
        """
        variance = checked_variance(self, variance)
        tokens, S, T, single = self._tasks(x, T, given)
        weights = self._importance(tokens, S, T, samples, seed).log_weights(self.observations, variance)
        return weights[:, 0] if single else weights

    def _importance_by_pass(
        self, tokens: Tensor, S: Tensor, T: Tensor, samples: int, seed: int | None, passes: int
    ) -> Iterator["_Importance"]:
        """For each pass, the parts of its log-weights."""
        checks.check_seed(seed)
        for turn, (seen, asked) in enumerate(masks.in_turns(S, T, passes, _seed_of_turns(seed))):
            yield self._importance(tokens, seen, asked, samples, _seed_of_pass(turn, seed))

    def _importance(self, tokens: Tensor, S: Tensor, T: Tensor, samples: int, seed: int | None) -> "_Importance":
        samples = checks.whole_number("samples", samples, 1)
        checks.check_seed(seed)
        q, p = self._encode(tokens, S | T).double(), self._encode(tokens, S).double()
        found, ratios = [], []
        for noise in _noise(samples, q.mean, max(1, self.rows // len(tokens)), seed):
            z = q.sample(noise)  # (k, B, Z)
            found.append(self._reconstruction(z.to(tokens), tokens, S, T))
            ratios.append(p.log_prob(z) - q.log_prob(z))
        return _Importance(torch.cat(found), torch.cat(ratios), T.sum(-1).double() * self.net.token_dim)

    def _tasks(self, x: Tensor, T: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The arguments of a log p(x_T | x_S), checked: tokens, S, T and whether there was no batch axis."""
        tokens, images, single = self._tokens(x)
        S = self._mask(given, len(tokens), default=False)
        T = ~S if T is None else self._mask(T, len(tokens), default=True)
        if (S & T).any():
            raise ValueError(f"T and given must be disjoint, {int((S & T).sum())} patches are in both")
        if not T.any(-1).all():
            raise ValueError("T must hold at least one patch of each image; a patch counts if all of its pixels do")
        tokens = self._seen(tokens, images, S | T, "T or given")
        self.observations.check(tokens, T)
        return tokens, S, T, single

    def _encode(self, tokens: Tensor, mask: Tensor) -> DiagGaussian:
        parts = [self.net(*part) for part in zip(tokens.split(self.rows), mask.split(self.rows), strict=True)]
        q = DiagGaussian(torch.cat([part.mean for part in parts]), torch.cat([part.logvar for part in parts]))
        if self.prior == "learned":
            return q
        nothing = ~mask.any(-1, keepdim=True)
        return DiagGaussian(q.mean.masked_fill(nothing, 0), q.logvar.masked_fill(nothing, 0))

    def _decode(
        self, z: Tensor, tokens: Tensor, mask: Tensor, T: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The network's output (n, L, D) for z (..., Z), and which rows of `tokens` it belongs to (n,), in parts.

        `tokens` has a row for each index of the last axis but one of z, or one row for all. T is what is asked for, by
        default all that is not observed.
        """
        z = z.reshape(-1, self.z_dim)
        for start in range(0, len(z), self.rows):
            part = z[start : start + self.rows]
            rows = torch.arange(start, start + len(part), device=z.device) % len(tokens)
            yield self.net(tokens[rows], mask[rows], part, None if T is None else T[rows]), rows

    def _complete(self, z: Tensor, data: Observed) -> Tensor:
        """The mean of p(x_T | z, x_S) with x_S in its place, as images (..., C, H, W)."""
        images = [
            torch.where(data.kept[rows], data.images[rows], self._image(output))
            for output, rows in self._decode(z, data.tokens, data.mask)
        ]
        return torch.cat(images).view(*z.shape[:-1], *self.image_shape)

    def _image(self, output: Tensor) -> Tensor:
        """The network's output (n, L, D) as images (n, C, H, W) in [0, 1], the means of observations."""
        return self.tokenizer.decode(self.observations.mean(output)).clamp(0, 1)

    def _drawn(self, data: Observed, draws: int | None, seed: int | None, passes: int) -> Tensor:
        """What `inpaint` gives for data: a first pass, and others that go on from it."""
        passes = checks.whole_number("passes", passes, 1)
        q = self._encode(data.tokens, data.mask)
        images = self._complete((q[0] if data.single else q).sample(draws=draws, seed=seed), data)
        if passes == 1:
            return images
        result = images.view(-1, *self.image_shape)
        before, given = (
            part.repeat(len(result) // len(part), *[1] * (part.ndim - 1)) for part in (data.mask, data.kept)
        )
        turns = masks.in_turns(before, ~before, passes, _seed_of_turns(seed))
        for turn, (seen, _) in islice(enumerate(turns), 1, None):
            result, tokens = self._as_observed(result, seen & ~before, given, data, _seed_of_pass(turn, seed))
            tokens, before = masks.seen(tokens, seen), seen
            z = self._encode(tokens, seen).sample(seed=_seed_of_pass(turn, seed))
            result = self._complete(z, Observed(tokens, seen, result, self.pixel_mask(seen) | given, False))
        return result.view(images.shape)

    def _as_observed(
        self, images: Tensor, new: Tensor, given: Tensor, data: Observed, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """Completed images (N, C, H, W) and their tokens, as the next passes observe the patches `new` (N, L) of them.

        The pixels `given` (N, 1, H, W) stay as they are.
        """
        tokens = self._tokens_of(images, data)
        drawn = self.observations.as_observed(tokens, _seed_of_draws(seed))
        if drawn is tokens:
            return images, tokens
        images = torch.where(self.pixel_mask(new) & ~given, self.tokenizer.decode(drawn), images)
        return images, torch.where(new.unsqueeze(-1), self._tokens_of(images, data), tokens)

    def _tokens_of(self, images: Tensor, data: Observed) -> Tensor:
        """Tokens of completed images (N, C, H, W); what was observed is as it came."""
        tokens = []
        for rows in torch.arange(len(images), device=images.device).split(self.rows):
            own = rows % len(data.tokens)
            completed = self.tokenizer.encode(images[rows])
            tokens.append(torch.where(data.mask[own].unsqueeze(-1), data.tokens[own], completed))
        return torch.cat(tokens)

    def _reconstruction(self, z: Tensor, tokens: Tensor, S: Tensor, T: Tensor) -> Tensor:
        """`Observations.reconstruction` of x_T for z (k, B, Z): float64 (k, B)."""
        found = [
            self.observations.reconstruction(tokens[rows].double(), output.double(), T[rows])
            for output, rows in self._decode(z, masks.seen(tokens, S), S, T)
        ]
        return torch.cat(found).view(z.shape[:-1])

    def _observed(self, x: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """As in `Observed`: tokens, mask, the images if it was images, and whether there was no batch axis."""
        tokens, images, single = self._tokens(x)
        mask = self._mask(S, len(tokens), default=True)
        return self._seen(tokens, images, mask), mask, images, single

    def _nothing(self) -> Observed:
        """One image of which nothing is observed."""
        zeros = _like(self.net).new_zeros
        tokens, images = zeros(1, self.num_tokens, self.net.token_dim), zeros(1, *self.image_shape)
        mask = self._mask(None, 1, default=False)
        return Observed(tokens, mask, images, self.pixel_mask(mask), True)

    def _seen(self, tokens: Tensor, images: Tensor | None, mask: Tensor, name: str = "S") -> Tensor:
        """Tokens (B, L, D) with zeros where they are not observed.

        Observed tokens must be finite, and observed pixels, if there are images, within the limit. `name` is that of
        the mask, for messages.
        """
        tokens = masks.seen(tokens, mask)
        bad = ~tokens.isfinite().all(-1)  # (B, L)
        if bad.any():
            raise ValueError(
                f"expected finite values where {name} says observed, got NaN or infinity in {int(bad.sum())} observed "
                f"patches: leave them out of {name}; x.isfinite().all(-3) has the pixels (B, H, W) that are numbers"
            )
        if images is not None:
            checks.check_pixels(images.masked_fill(~self.pixel_mask(mask), torch.nan), f" where {name} says observed")
        return tokens

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """Images or tokens, a batch or one -> tokens (B, L, D) on the device, the images (B, C, H, W) if it was images,
        and whether there was no batch axis."""
        token_shape = (self.num_tokens, self.net.token_dim)
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
            raise ValueError(
                "expected a tensor of images in [0, 1] or tokens as floating-point numbers, or of uint8 images, "
                f"got {checks.described(x)}"
            )
        x = self._numbers(x)
        for shape in (self.image_shape, token_shape):
            single = tuple(x.shape) == shape
            if single or (x.ndim == len(shape) + 1 and tuple(x.shape[1:]) == shape and len(x)):
                x = x.unsqueeze(0) if single else x
                return (x, None, single) if shape == token_shape else (self.tokenizer.encode(x), x, single)
        raise ValueError(
            f"expected images {of_batch(self.image_shape)} or tokens {of_batch(token_shape)}, a batch of at least one "
            f"or a single one, got {tuple(x.shape)}"
        )

    def _numbers(self, x: Tensor) -> Tensor:
        """Data in the network's precision and on its device; bytes are divided by 255."""
        return checks.in_floats(x.to(self.device)).to(self.dtype)

    def _mask(self, S: Tensor | None, batch: int, default: bool) -> Tensor:
        """A mask over patches or pixels, one for all or one each -> boolean (B, L); `default` everywhere without S."""
        if S is None:
            return torch.full((batch, self.num_tokens), default, device=self.device)
        if not checks.is_mask(S):
            numbers = isinstance(S, Tensor) and bool(((S == 0) | (S == 1)).all())
            advice = "; S.bool() makes one of zeros and ones" if numbers else ""
            raise ValueError(
                f"expected a boolean mask, a tensor with True = observed, got {checks.described(S)}{advice}"
            )
        pixels = self._of_pixels(S)
        mask = S.to(self.device) if pixels is None else masks.from_pixels(pixels, self.grid)
        if tuple(mask.shape) not in ((self.num_tokens,), (1, self.num_tokens), (batch, self.num_tokens)):
            height, width = self.image_shape[1:]
            words = f"; as W = L, one mask of pixels for all is (1, {height}, {width})"
            advice = words if width == self.num_tokens else ""
            raise ValueError(
                f"expected a mask of patches (L,) or (B, L), or of pixels (H, W) or (B, H, W), with B = {batch}, "
                f"L = {self.num_tokens} and H x W = {height} x {width}, got {tuple(S.shape)}{advice}"
            )
        return mask.expand(batch, -1)

    def _of_pixels(self, S: Tensor) -> Tensor | None:
        """A mask of pixels, one (H, W) or one each (B, H, W), on the model's device; None of one of patches."""
        mask = S.to(self.device)
        if mask.ndim == 4 and mask.shape[1] == 1:  # as `pixel_mask` has it
            mask = mask.squeeze(1)
        # A mask of patches (B, L) may have the shape (H, W); which of the two it is must not depend on B.
        patches = mask.ndim == 2 and mask.shape[1] == self.num_tokens
        return mask if not patches and mask.ndim in (2, 3) and tuple(mask.shape[-2:]) == self.image_shape[1:] else None


def check_model(vae: Any, needs: Sequence[str] = ()) -> None:
    """Raise a ValueError unless this is a `BigLearnVAE` or, where only some of one is used, something with these."""
    if not (isinstance(vae, BigLearnVAE) or (needs and all(hasattr(vae, name) for name in needs))):
        hint = ": BigLearnVAE(net, tokenizer) makes one of a network" if isinstance(vae, nn.Module) else ""
        raise ValueError(f"expected a BigLearnVAE, as biglearn_vae.load gives it, got {type(vae).__name__}{hint}")


def checked_dims(vae: BigLearnVAE, dims: Sequence[int]) -> list[int]:
    """Dimensions of z as a list; a ValueError unless there is at least one and all are in [0, Z)."""
    result = checks.whole_numbers(dims, 0)
    if not result or max(result) >= vae.z_dim:
        raise ValueError(f"dims must be a list of latent dimensions in [0, {vae.z_dim}), at least one, got {dims}")
    return result


def _check_variance(observations: Any, variance: float) -> None:
    """Raise a ValueError if an object of observations has another variance than a model is to have."""
    own = observations.variance if getattr(observations, "under_variance", False) else variance
    if own != variance:
        raise ValueError(
            f"the observations have the variance {own}, the model {variance}: give variance={own}, or "
            f"observations={observations.name!r}, which take that of the model"
        )


def observations_of(loss: Any) -> Observations:
    """The observations of an objective; one of the user's may have none, and is taken for one of Gaussian ones."""
    return as_observations(getattr(loss, "observations", None))


def variance_of(loss: Any) -> float:
    """The variance of models of an objective: beta; 0 if it is not known which likelihood it bounds (see `of`)."""
    return loss.beta if has_model(loss) or observations_of(loss).under_variance else 0.0


def checked_variance(vae: BigLearnVAE, variance: float | None) -> float:
    """A variance of observations, by default the model's own; a ValueError unless it is positive and finite.

    For observations without a variance it is 1, which is not used, and a ValueError if one is given.
    """
    if not vae.observations.scaled:
        if variance is not None:
            own = " but the model's" if vae.observations.under_variance else ""
            raise ValueError(
                f"{vae.observations.name} observations have no variance{own}: leave variance={variance} out"
            )
        return 1.0
    variance = vae.variance if variance is None else variance
    return checks.real_number("variance", variance, "(0, inf)", ": give one, such as variance=0.01")


def check_scaled(vae: BigLearnVAE) -> None:
    """Raise a ValueError unless the observations of a model have a variance."""
    if not vae.observations.scaled:
        raise ValueError(f"{vae.observations.name} observations have no variance to be fitted")


@torch.no_grad()
def best_variance(vae: BigLearnVAE, x: Tensor, passes: int = 1, samples: int = 64, seed: int = 0) -> float:
    """The variance of N(mu, variance I) under which the mean of `vae.log_prob(x, ...)` is largest.

    With the noise of the importance samples held fixed, the bound is a sum over data and passes of log-means of
    exp(ratio - error / (2 variance)) variance^(-n / 2). EM climbs it: the variance becomes the mean of the squared
    errors, each weighted by its share of the importance weights.

    Args:
        x: data recorded as a whole, without NaN.
        passes, samples, seed: as for `vae.log_prob`.

    Raises:
        ValueError: if the observations of the model have no variance.
    """
    check_model(vae)
    check_scaled(vae)
    tokens, S, T, _ = vae._tasks(x, None, None)
    reconstruction, ratio, numbers = (
        torch.cat(part, -1) for part in zip(*vae._importance_by_pass(tokens, S, T, samples, seed, passes), strict=True)
    )
    error = -2 * reconstruction
    variance = (error.mean(0).sum() / numbers.sum()).item()
    for _ in range(200):
        share = (ratio - error / (2 * variance)).softmax(0)
        before, variance = variance, ((share * error).sum() / numbers.sum()).item()
        if abs(variance - before) < 1e-6 * before:
            break
    return variance


def _state(part: nn.Module) -> dict[str, Any]:
    """A network or tokenizer as files hold it; if it is not of this library, "weights" in place of a whole "state"."""
    part = getattr(part, "_orig_mod", part)  # of torch.compile
    kind = type(part).__name__
    if SAVED.get(kind) is type(part):
        return {"kind": kind, "state": states.of(part)}
    return {"kind": kind, "weights": states.weights_of(part)}


def _made(name: str, state: dict[str, Any], given: nn.Module | None) -> nn.Module:
    """The part that `_state` described, frozen; if it is not of this library, `given` with its weights."""
    if "weights" not in state:
        if given is not None:
            raise ValueError(f"its {name} is a {state['kind']}, which needs no {name}=")
        return states.rebuilt(SAVED[state["kind"]], state["state"])
    if not isinstance(given, nn.Module):
        kind = state["kind"]
        raise ValueError(f"its {name} is a {kind} of one's own, to be made first: load(..., {name}={kind}(...))")
    checkpoint.load_weights(given, state["weights"], "the file")
    return given.requires_grad_(False).eval()


def check_network(net: nn.Module) -> None:
    """Raise a ValueError unless this has the attributes of a network of `models`."""
    expected = "a network such as UniversalViT, unwrapped (`load` makes a model of a run's folder)"
    check_part(expected, net, ("grid", "num_tokens", "token_dim", "z_dim"))


@torch.no_grad()
def check_calls(net: Any) -> None:
    """Raise a ValueError unless a network returns what those of `models` do, for two images of zeros on its own device;
    those of `models` are not called."""
    if isinstance(net, MaskedViT):
        return
    like, training = _like(net), {part: part.training for part in net.modules()}
    x = like.new_zeros(2, net.num_tokens, net.token_dim)
    S = torch.arange(net.num_tokens, device=x.device).remainder(2).bool().expand(2, -1)
    name = type(net).__name__
    try:
        q, mean = net.eval()(x, S), net(x, S, x.new_zeros(2, net.z_dim), ~S)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, LookupError) as error:
        raise ValueError(
            f"{name} cannot be called as UniversalViT is, net(x, S) and net(x, S, z, T) with x (B, L, D), boolean S "
            f"and T (B, L) and z (B, Z): {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    finally:
        for part, before in training.items():
            part.training = before
    if type(q) is not DiagGaussian or q.mean.shape != (2, net.z_dim):  # what a subclass adds would be lost
        raise ValueError(f"{name}: net(x, S) must give a DiagGaussian over z, (B, {net.z_dim}), got {_described(q)}")
    if not isinstance(mean, Tensor) or mean.shape != x.shape:
        shape = (net.num_tokens, net.token_dim)
        raise ValueError(f"{name}: net(x, S, z, T) must give (B, {shape[0]}, {shape[1]}), got {_described(mean)}")


def _like(net: nn.Module) -> Tensor:
    """A tensor of the device and the precision that a network computes with; it may have buffers alone, or nothing."""
    numbers = (part for part in chain(net.parameters(), net.buffers()) if part.is_floating_point())
    return next(numbers, torch.empty(0))


def _described(given: Any) -> str:
    """In a message; of a Gaussian its shape, too."""
    of = f" of mean {tuple(given.mean.shape)}" if isinstance(given, DiagGaussian) else ""
    return checks.described(given) + of


def check_part(expected: str, part: nn.Module, names: tuple[str, ...]) -> None:
    """Raise a ValueError unless this is a module with all of these."""
    if not isinstance(part, nn.Module) or not all(hasattr(part, name) for name in names):
        raise ValueError(f"expected {expected}, a module with {', '.join(names)}, got {type(part).__name__}")


def _check_sizes(net: Any, tokenizer: Any) -> None:
    """Raise a ValueError unless the tokenizer's grid and token dimension are the network's."""
    if (tuple(net.grid), net.token_dim) != (tuple(tokenizer.grid), tokenizer.token_dim):
        raise ValueError(
            f"the tokenizer must give the network's {net.grid} tokens of {net.token_dim} numbers, "
            f"got {tokenizer.grid} of {tokenizer.token_dim}"
        )


def _draws(draws: int | None, seed: int | None) -> int | None:
    """Check the number of draws, and their seed, before anything is computed."""
    checks.check_seed(seed)
    return None if draws is None else checks.whole_number("draws", draws, 1)


def _seed_of_turns(seed: int | None) -> int | None:
    """The seed of the order of the patches, in several passes."""
    return None if seed is None else derive_seed("turns", int(seed))


def _seed_of_draws(seed: int | None) -> int | None:
    """The seed by which completions are drawn before a pass observes them."""
    return None if seed is None else derive_seed("observed", seed)


def _seed_of_pass(turn: int, seed: int | None) -> int | None:
    """The seed of the noise of a pass; for the first pass it is the caller's."""
    return derive_seed("pass", turn, int(seed)) if turn and seed is not None else seed


def _deltas(delta: float | Sequence[float] | Tensor, count: int) -> Tensor:
    """Finite numbers, one or `count` of them, as a tensor."""
    expected = f"delta must be one number or one for each of the {count} dims, finite, got"
    try:
        result = torch.as_tensor(delta)
    except (TypeError, ValueError, RuntimeError):  # torch cannot make a tensor of it
        raise ValueError(f"{expected} {delta!r}") from None
    if tuple(result.shape) not in ((), (1,), (count,)):
        raise ValueError(f"{expected} {tuple(result.shape)}")
    if not result.isfinite().all():
        raise ValueError(f"{expected} {delta}")
    return result


def _noise(draws: int, like: Tensor, at_once: int, seed: int | None) -> Iterator[Tensor]:
    """Standard normal numbers for `draws` draws like (B, Z), (k, B, Z) at a time; the same whatever `at_once` is."""
    generator = gaussian.generator(like.device, seed)
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        yield torch.stack(
            [torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator) for _ in range(count)]
        )
