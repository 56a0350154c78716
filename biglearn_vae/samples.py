"""How good the images are that a model draws, in one pass or in several.

N images, M samples.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from biglearn_vae import checks, masks
from biglearn_vae.capabilities import BigLearnVAE, seed_of_pass, seed_of_turns
from biglearn_vae.data import Images
from biglearn_vae.gaussian import LOG_2PI

BLOCK = 2**12  # rows of a matrix of distances at a time


def precision_recall(samples: Tensor, images: Tensor, neighbours: int = 3) -> dict[str, float]:
    """How many samples look like images, and how many images like samples (Kynkaanniemi et al. 2019).

    Around each image lies a ball that just reaches its k-th nearest other image. `precision` is the share of the
    samples that lie in one of these balls, `recall` the share of the images that lie in one of the balls that the
    samples have among themselves. Distances are those between pixels, not between features of a network: made for
    small images. Real images of equal number, in place of the samples, say how much can be reached.

    Args:
        samples: (M, C, H, W).
        images: (N, C, H, W), real ones; N should be near M, since balls shrink with their number.
        neighbours: k, below N and M.

    Raises:
        ValueError: on other shapes, numbers that are not finite, or too few of either.
    """
    neighbours = checks.whole_number("neighbours", neighbours, 1)
    for name, x in (("samples", samples), ("images", images)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"{name} must be a tensor of floating-point numbers, got {checks.described(x)}")
        if x.ndim != 4 or x.shape[1:] != images.shape[1:] or len(x) <= neighbours:
            raise ValueError(
                f"expected samples and images of one size, more than {neighbours} of each, as {neighbours} neighbours "
                f"are asked for, got {tuple(samples.shape)} and {tuple(images.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity: leave out what was not recorded as a whole")
    drawn, real = samples.flatten(1).double(), images.to(samples).flatten(1).double()
    return {"precision": _covered(drawn, real, neighbours), "recall": _covered(real, drawn, neighbours)}


def _covered(x: Tensor, y: Tensor, neighbours: int) -> float:
    """The share of x (n, F) within a ball of y (m, F)."""
    radius = torch.cat([torch.cdist(part, y).kthvalue(neighbours + 1, 1).values for part in y.split(BLOCK)])
    inside = [(torch.cdist(part, y) <= radius).any(1) for part in x.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def by_passes(
    vae: BigLearnVAE,
    images: Tensor,
    passes: Sequence[int],
    train: Images | None = None,
    likelihood_images: int = 0,
    samples: int = 64,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """By number of passes: `precision_recall` of N samples, the seconds that they took, and a bound on log p(x).

    Args:
        images: whole ones (N, C, H, W), in [0, 1].
        train: whole training images, of which the first `likelihood_images` give the variance of the observations, for
            each number of passes (`best_variance`).
        likelihood_images: of so many images the bound (`BigLearnVAE.log_prob`) is taken, "joint_nats", mean an image;
            0, or no training images, leaves it out.
        samples: of the bound, for each image and pass.
    """
    images, result = images.to(vae.device), {}
    vae.sample(len(images), seed=seed)  # a first call takes longer
    for count in passes:
        start = time.perf_counter()
        drawn = vae.sample(len(images), seed=seed, passes=count)
        if vae.device.type == "cuda":
            torch.cuda.synchronize(vae.device)
        scores = {"seconds": time.perf_counter() - start} | precision_recall(drawn, images)
        if likelihood_images and train is not None and len(train):
            variance = best_variance(vae, train[:likelihood_images], count, samples, seed)
            nats = vae.log_prob(images[:likelihood_images], None, None, samples, variance, seed, passes=count)
            scores |= {"joint_nats": nats.mean().item(), "variance": variance}
        result[str(count)] = scores
    return result


def best_variance(vae: BigLearnVAE, images: Tensor, passes: int = 1, samples: int = 64, seed: int = 0) -> float:
    """The variance of N(mu, variance I) under which `vae.log_prob(images, ...)` is largest in the mean.

    With the noise of its importance samples held, the bound is a sum over images and passes of log-means of
    exp(ratio - error / (2 variance)) variance^(-n / 2), which EM climbs: the variance becomes the mean of the squared
    errors, each weighed by its share of the importance weights.

    Args:
        images: whole ones (N, C, H, W), in [0, 1].
        passes, samples, seed: as of `vae.log_prob`.
    """
    errors, ratios, numbers = [], [], 0.0
    nothing = torch.zeros(len(images), vae.num_tokens, dtype=torch.bool, device=vae.device)
    for turn, (S, T) in enumerate(masks.in_turns(nothing, ~nothing, passes, seed_of_turns(seed))):
        # The error comes of two variances: -error / (2 variance) - n / 2 log(2 pi variance) is all that they change.
        one, two = (vae.log_weights(images, T, S, samples, v, seed_of_pass(turn, seed)) for v in (1.0, 2.0))
        n = T.sum(-1).double() * vae.net.token_dim  # (N,)
        errors.append(4 * (two - one + 0.5 * n * math.log(2)))  # (K, N)
        ratios.append(one + errors[-1] / 2 + 0.5 * n * LOG_2PI)
        numbers += n.sum().item()
    error, ratio = torch.cat(errors, 1), torch.cat(ratios, 1)
    variance = error.mean(0).sum().item() / numbers
    for _ in range(200):
        share = (ratio - error / (2 * variance)).softmax(0)
        before, variance = variance, (share * error).sum().item() / numbers
        if abs(variance - before) < 1e-6 * before:
            break
    return variance


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """What `by_passes` gave, as lines of text and an empty one; none of nothing."""
    if not found:
        return []
    heads = {"precision": 3, "recall": 3, "joint_nats": 2, "variance": 5, "seconds": 2}
    lines = ["samples, by number of passes", f"  {'passes':<10}" + "".join(f"{head:>13}" for head in heads)]
    for count, scores in found.items():
        cells = (f"{scores.get(name, math.nan):>13.{digits}f}" for name, digits in heads.items())
        lines.append(f"  {count:<10}" + "".join(cells))
    return [*lines, ""]
