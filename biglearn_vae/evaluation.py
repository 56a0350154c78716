"""Numbers about a trained model: ELBOs, likelihoods, consistency, in-painting against the nearest training images.

N images, L tokens, D token dimension.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from biglearn_vae import masks
from biglearn_vae.capabilities import BigLearnVAE
from biglearn_vae.distributed import StepRandom, derive_seed
from biglearn_vae.gaussian import bits_per_dim
from biglearn_vae.losses import ELBO, BigLearnELBO

CHUNK = 1024  # images at a time
PART = 2**26  # numbers at a time


@torch.no_grad()
def elbo(vae: BigLearnVAE, images: Tensor, loss: BigLearnELBO, joint: bool = True, seed: int = 0) -> dict[str, float]:
    """Mean ELBO of images, one latent draw and, unless joint, one (S, T) for each image, the same for the same seed.

    Args:
        images: (N, C, H, W) in [0, 1].
        loss: whose beta (the final one), prior and q(S, T) are used.
        joint: S empty and T everything, the JointELBO (Eq. 1); else (S, T) is drawn from the loss's q(S, T).

    Returns:
        elbo, reconstruction and kl per image, without the constant of N(mu, I), the KL not weighted by beta; and
        elbo_nats, with the constant.
    """
    random = StepRandom(torch.Generator(vae.device).manual_seed(seed))
    parts = []
    for chunk in images.split(CHUNK):
        tokens = vae.tokenizer.encode(chunk.to(vae.device))
        S = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=vae.device) if joint else None
        parts.append(loss(vae.net, tokens, S, None if S is None else ~S, random=random))
    return {name: _mean(parts, name) for name in ("elbo", "reconstruction", "kl", "elbo_nats")}


def _mean(parts: Sequence[ELBO], name: str) -> float:
    return torch.cat([getattr(part, name) for part in parts]).double().mean().item()


def inpainting_psnr(
    vae: BigLearnVAE, images: Tensor, ratios: Sequence[float], draws: int = 32, seed: int = 0
) -> dict[float, float]:
    """PSNR over the missing pixels of the posterior-mean completion, by the ratio of patches observed.

    The completion is the mean of `draws` completions, an estimate of E[x_T | x_S], the guess with the least expected
    squared error. The masks are `hidden_masks` with the same seed. What was never recorded (NaN) is neither observed
    nor asked for.
    """
    result = {}
    for ratio, (S, hidden) in _tasks(vae, images, ratios, seed).items():
        # All draws of a part at a time, at most 2^26 numbers.
        rows = max(1, 2**26 // (draws * images[0].numel()))
        parts = zip(images.split(rows), S.split(rows), strict=True)
        completed = torch.cat([vae.inpaint(x, mask, draws, seed + k).mean(0) for k, (x, mask) in enumerate(parts)])
        result[ratio] = psnr(completed, images.to(vae.device), hidden)
    return result


def nearest_psnr(
    vae: BigLearnVAE, images: Tensor, train: Tensor, ratios: Sequence[float], neighbours: int = 10, seed: int = 0
) -> dict[float, float]:
    """The same for the mean of the nearest training images, nearest over the observed pixels: the floor to beat.

    Args:
        train: training images (M, C, H, W).
        vae: for its patches alone.
    """
    target, known = vae.tokenizer.encode(images.to(vae.device)), vae.tokenizer.encode(train.to(vae.device))
    result = {}
    for ratio, (S, hidden) in _tasks(vae, images, ratios, seed).items():
        completed = nearest_completion(target, S, known, neighbours)
        result[ratio] = psnr(vae.tokenizer.decode(completed), images.to(vae.device), hidden)
    return result


def nearest_completion(x: Tensor, S: Tensor, train: Tensor, neighbours: int = 10) -> Tensor:
    """The mean of the training tokens (M, L, D) that are nearest to x (N, L, D) over the patches S (N, L).

    Where training tokens were not recorded (NaN), the distance is the mean over the numbers that both have, and the
    completion the mean of the neighbours that have them, or else of all training images.
    """
    nearest = torch.cat(
        [_nearest(*part, train, neighbours) for part in zip(x.split(CHUNK), S.split(CHUNK), strict=True)]
    )
    everyone = train.nanmean(0)
    means = [train[rows].nanmean(0) for rows in nearest]
    return torch.stack([torch.where(mean.isnan(), everyone, mean) for mean in means])


def _nearest(x: Tensor, S: Tensor, train: Tensor, neighbours: int) -> Tensor:
    """Positions (n, neighbours) of the nearest training images, of which a part is looked at at a time."""
    seen = S.unsqueeze(-1).expand_as(x).flatten(1)  # (n, L D)
    x, weight = x.flatten(1).masked_fill(~seen, 0), seen.to(x.dtype)
    best, positions = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.long, device=x.device)
    for start in range(0, len(train), 8 * CHUNK):
        part = train[start : start + 8 * CHUNK].flatten(1)
        has = (~part.isnan()).to(x.dtype)
        y = part.nan_to_num(0)
        # the mean of (x - y)^2 over the numbers that both have
        distance = (weight @ y.square().T - 2 * x @ y.T + x.square() @ has.T) / (weight @ has.T)
        here = torch.arange(start, start + len(y), device=x.device).expand_as(distance)
        best, positions = torch.cat([best, distance.nan_to_num(torch.inf)], 1), torch.cat([positions, here], 1)
        best, order = best.topk(min(neighbours, best.shape[1]), largest=False)
        positions = positions.gather(1, order)
    return positions


def hidden_masks(count: int, num_tokens: int, ratios: Sequence[float], seed: int = 0) -> dict[float, Tensor]:
    """One random mask (N, L) for each image at each ratio; at least one patch is hidden in each."""
    largest = (num_tokens - 1) / num_tokens
    return {ratio: masks.random(count, num_tokens, min(ratio, largest), seed=seed) for ratio in ratios}


def _tasks(vae: BigLearnVAE, images: Tensor, ratios: Sequence[float], seed: int) -> dict[float, tuple[Tensor, Tensor]]:
    """By ratio, the observed patches (N, L) and the hidden pixels (N, 1, H, W) of what was recorded of images."""
    recorded = masks.recorded(vae.tokenizer.encode(images.to(vae.device)))
    result = {}
    for ratio, S in hidden_masks(len(images), vae.num_tokens, ratios, seed).items():
        S = S.to(vae.device)
        result[ratio] = S & recorded, pixel_mask(~S & recorded, vae)
    return result


def pixel_mask(S: Tensor, vae: BigLearnVAE) -> Tensor:
    """Patch masks (N, L) -> the same of pixels, (N, 1, H, W), on the model's device."""
    return masks.to_pixels(S.to(vae.device), vae.grid, vae.image_shape[1:]).unsqueeze(1)


def psnr(completed: Tensor, images: Tensor, hidden: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all hidden pixels, a mask (N, 1, H, W), for a peak of 1."""
    hidden = hidden.expand_as(images)
    error = (completed - images)[hidden].double().square().mean().item()
    return -10 * math.log10(error) if error else math.inf


@torch.no_grad()
def fit_variance(vae: BigLearnVAE, images: Tensor, seed: int = 0) -> float:
    """The variance of N(mu, variance I) under which images are likeliest, as their JointELBO sees it.

    That is the mean squared error of a reconstruction, z ~ p(z | x), over all numbers that were recorded. Fit it on
    training images; `vae.log_prob(..., variance=)` takes it.
    """
    total, count = 0.0, 0
    for k, chunk in enumerate(images.split(CHUNK)):
        tokens = vae.tokenizer.encode(chunk.to(vae.device))
        recorded = masks.recorded(tokens)
        z = vae.encode(tokens, recorded).sample(seed=derive_seed("variance", seed, k))
        error = (vae.net(torch.zeros_like(tokens), torch.zeros_like(recorded), z, recorded) - tokens)[recorded]
        total, count = total + error.double().square().sum().item(), count + error.numel()
    return total / count


def likelihood(
    vae: BigLearnVAE, images: Tensor, samples: int = 64, variance: float | None = None, seed: int = 0
) -> dict[str, float]:
    """Bounds on log-likelihoods (`BigLearnVAE.log_prob`), mean per image in nats and in bits per dimension.

    joint: of the whole image; marginal: of a random half of its patches, another half for each image; conditional: of
    the other half given that one.
    """
    A = masks.random(len(images), vae.num_tokens, 0.5, seed=seed)
    result = {}
    for name, T, given in (("joint", A | ~A, None), ("marginal", A, None), ("conditional", ~A, A)):
        nats = vae.log_prob(images, T, given, samples, variance, seed).mean().item()
        result[f"{name}_nats"] = nats
        result[f"{name}_bits_per_dim"] = bits_per_dim(nats, T[0].sum().item() * vae.net.token_dim)
    return result


def consistency(
    vae: BigLearnVAE, images: Tensor, samples: int = 256, variance: float | None = None, seed: int = 0
) -> dict[str, float]:
    """How far the learned conditionals are from those of one joint distribution.

    For each image, random disjoint sets of patches A and B, of uniform sizes from 1 on:

    - order_gap: |log p(x_A) + log p(x_B | x_A) - log p(x_B) - log p(x_A | x_B)|, mean over images, in nats. Both
      orders give log p(x_A, x_B) if the conditionals agree.
    - order_noise: the same between two estimates of one order, with other draws: what estimation alone explains.
    - posterior_gap: KL[p(z | x_S) || p(z) p(x_S | z) / p(x_S)] in nats, from the posterior of Bayes' rule, S = A,
      as -mean log of self-normalised importance weights times K; for finite K it is a little too small.
    - effective_samples: (sum w)^2 / sum w^2 / K of those weights, 1 if the two are equal.

    Args:
        samples: K, of every estimate.
    """
    A, B = _disjoint_pairs(len(images), vae.num_tokens, seed)

    def log_joint(A: Tensor, B: Tensor, k: int) -> Tensor:
        seeds = [derive_seed("consistency", seed, k, part) for part in range(2)]
        marginal = vae.log_prob(images, A, None, samples, variance, seeds[0])
        return marginal + vae.log_prob(images, B, A, samples, variance, seeds[1])

    one, again, other = log_joint(A, B, 0), log_joint(A, B, 1), log_joint(B, A, 2)
    weights = vae.log_weights(images, A, None, samples, variance, derive_seed("posterior", seed))
    normalised = weights.log_softmax(0)  # (K, N)
    return {
        "order_gap": (one - other).abs().mean().item(),
        "order_noise": (one - again).abs().mean().item(),
        "posterior_gap": -(normalised + math.log(samples)).mean().item(),
        "effective_samples": (1 / (normalised.exp().square().sum(0) * samples)).mean().item(),
    }


def _disjoint_pairs(count: int, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Masks A and B (N, L), neither empty: |A| uniform in 1 .. L - 1, |B| uniform in 1 .. L - |A|."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(count, num_tokens, generator=generator).argsort(-1)
    uniform = torch.rand(count, 2, 1, generator=generator)
    a = 1 + (uniform[:, 0] * (num_tokens - 1)).floor()
    b = 1 + (uniform[:, 1] * (num_tokens - a)).floor()
    return rank < a, (rank >= a) & (rank < a + b)


def parts(images: Tensor | Any, count: int | None = None) -> Iterator[Tensor]:
    """The first `count` images, or all, as float tensors (n, C, H, W) of bounded size.

    Args:
        images: a tensor or an `ImageSet`, anything with a length whose slices are images.
    """
    count = len(images) if count is None else min(count, len(images))
    size = max(1, PART // images[:1].numel())
    for start in range(0, count, size):
        yield images[start : min(start + size, count)]


@torch.no_grad()
def reconstruction(tokenizer: torch.nn.Module, images: Tensor | Any, count: int | None = None) -> dict[str, float]:
    """How well a tokenizer gives images back: PSNR in dB, and the seams between its patches.

    seam_ratio is the mean absolute difference of neighbouring pixels on two sides of a border between patches, over
    that of neighbours inside a patch; seam_ratio_of_images the same of the images themselves.

    Args:
        tokenizer: with `encode`, `decode` and `patch_size`, such as a `PatchAE`.
        images: (N, C, H, W), a tensor or an `ImageSet`.
        count: at most so many of them.
    """
    device = next(tokenizer.parameters()).device
    error, numbers = 0.0, 0
    seams = {"seam_ratio": 0, "seam_ratio_of_images": 0}
    for x in parts(images, count):
        x = x.to(device)
        y = tokenizer.decode(tokenizer.encode(x))
        error, numbers = error + (y - x).double().square().sum().item(), numbers + x.numel()
        for name, pixels in (("seam_ratio", y), ("seam_ratio_of_images", x)):
            seams[name] = seams[name] + _differences(pixels, tokenizer.patch_size)
    means = {name: sums[:, 0] / sums[:, 1] for name, sums in seams.items()}
    return {"psnr": -10 * math.log10(error / numbers)} | {
        name: (across / inside).item() for name, (across, inside) in means.items()
    }


def _differences(images: Tensor, patch_size: int) -> Tensor:
    """Sum and number of absolute differences of neighbouring pixels: across borders of patches, and inside (2, 2)."""
    result = torch.zeros(2, 2, dtype=torch.float64)
    for axis in (2, 3):
        steps = images.diff(dim=axis).abs().double().sum(dim=[k for k in range(4) if k != axis]).cpu()
        border = torch.arange(1, len(steps) + 1) % patch_size == 0
        each = images.numel() // images.shape[axis]
        for row, where in enumerate((border, ~border)):
            result[row] += torch.stack([steps[where].sum(), each * where.sum().double()])
    return result
