"""The quality of images that a model samples, in one pass or in several.

N images, M samples.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from biglearn_vae import checks
from biglearn_vae.capabilities import BigLearnVAE, best_variance, check_model
from biglearn_vae.data import Images
from biglearn_vae.distributed import synchronize

BLOCK = 2**12  # rows of a matrix of distances at a time


def precision_recall(samples: Tensor, images: Tensor, neighbours: int = 3) -> dict[str, float]:
    """How many samples look like images, and how many images like samples (Kynkaanniemi et al. 2019).

    Around each image lies a ball that just reaches its k-th nearest other image. `precision` is the share of the
    samples that lie in one of these balls, `recall` the share of the images that lie in one of the balls made in the
    same way around samples. Distances are between pixels, not between features of a network, so this is meant for
    small images. The same number of real images in place of the samples shows what perfect samples would reach. More
    precision than theirs is no merit: samples that are smoother than images lie among them more often than images do.

    Args:
        samples: (M, C, H, W).
        images: (N, C, H, W), real ones; N should be near M, since balls shrink with their number.
        neighbours: k, at least 1, below N and M.

    Raises:
        ValueError: on other shapes, numbers that are not finite, or too few samples or images.
    """
    neighbours = checks.whole_number("neighbours", neighbours, 1)
    for name, x in (("images", images), ("samples", samples)):
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
    """The share of x (n, F) that lies in a ball around one of y (m, F), which reaches its k-th neighbour in y."""
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
    """By number of passes: `precision_recall` of N samples, the seconds they took, and a bound on log p(x).

    Args:
        images: whole ones (N, C, H, W), in [0, 1].
        train: whole training images. If the observations have a variance, it is fitted on the first `likelihood_images`
            of these, for each number of passes (`best_variance`).
        likelihood_images: how many images the bound (`BigLearnVAE.log_prob`) is taken of: "joint_nats", the mean per
            image; 0, or no training images, leaves it out.
        samples: importance samples of the bound, for each image and pass.
        seed: of samples and bound.
    """
    check_model(vae)
    if not isinstance(images, Tensor) or not images.ndim:
        raise ValueError(
            f"expected a tensor of images (N, C, H, W), got {checks.described(images)}: images[:] of a set"
        )
    images, result = images.to(vae.device), {}
    likelihood_images = checks.whole_number("likelihood_images", likelihood_images, 0)
    vae.sample(len(images), seed=seed)  # a first call takes longer, and is not timed
    for count in checks.several("passes", passes, 0):
        start = time.perf_counter()
        drawn = vae.sample(len(images), seed=seed, passes=count)
        synchronize(vae.device)
        scores = {"seconds": time.perf_counter() - start} | precision_recall(drawn, images)
        if likelihood_images and train is not None and len(train):
            own: dict[str, Any] = {}
            if vae.observations.scaled:
                own = {"variance": best_variance(vae, train[:likelihood_images], count, samples, seed)}
            nats = vae.log_prob(images[:likelihood_images], samples=samples, seed=seed, passes=count, **own)
            scores |= {"joint_nats": nats.mean().item()} | own
        result[str(count)] = scores
    return result


def table(found: dict[str, dict[str, float]], real: dict[str, float] | None = None) -> list[str]:
    """The result of `by_passes`, and `precision_recall` of real images, as lines of text, the last empty; or none."""
    if not found:
        return []
    found = found | ({"real": real} if real else {})
    heads = {"precision": 3, "recall": 3, "joint_nats": 2, "variance": 5, "seconds": 2}
    lines = ["samples, by number of passes", f"  {'passes':<10}" + "".join(f"{head:>13}" for head in heads)]
    for count, scores in found.items():
        cells = (f"{scores[name]:>13.{digits}f}" if name in scores else " " * 13 for name, digits in heads.items())
        lines.append((f"  {count:<10}" + "".join(cells)).rstrip())
    return [*lines, ""]
