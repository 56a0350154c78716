"""Numbers about a trained model: test ELBOs, and in-painting against the nearest training images.

N images, L tokens, D token dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from biglearn_vae import masks
from biglearn_vae.capabilities import BigLearnVAE
from biglearn_vae.distributed import StepRandom
from biglearn_vae.losses import ELBO, BigLearnELBO

CHUNK = 1024  # images at a time


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
    squared error. The masks are `hidden_masks` with the same seed.
    """
    result = {}
    for ratio, S in hidden_masks(len(images), vae.num_tokens, ratios, seed).items():
        # All draws of a part at a time, at most 2^26 numbers.
        rows = max(1, 2**26 // (draws * images[0].numel()))
        parts = zip(images.split(rows), S.split(rows), strict=True)
        completed = torch.cat([vae.inpaint(x, mask, draws, seed + k).mean(0) for k, (x, mask) in enumerate(parts)])
        result[ratio] = psnr(completed, images.to(vae.device), pixel_mask(S, vae))
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
    for ratio, S in hidden_masks(len(images), vae.num_tokens, ratios, seed).items():
        completed = nearest_completion(target, S.to(vae.device), known, neighbours)
        result[ratio] = psnr(vae.tokenizer.decode(completed), images.to(vae.device), pixel_mask(S, vae))
    return result


def nearest_completion(x: Tensor, S: Tensor, train: Tensor, neighbours: int = 10) -> Tensor:
    """The mean of the training tokens (M, L, D) that are nearest to x (N, L, D) over the patches S (N, L)."""
    seen = S.unsqueeze(-1).to(x.dtype).expand_as(x).flatten(1)  # (N, L D)
    table = train.flatten(1)  # (M, L D)
    chosen = []
    for part, mask in zip(x.flatten(1).split(CHUNK), seen.split(CHUNK), strict=True):
        # |S (x - y)|^2 less its first term, which is the same for every y
        distance = mask @ table.square().T - 2 * (mask * part) @ table.T
        nearest = distance.topk(min(neighbours, len(table)), largest=False).indices
        chosen.append(torch.stack([table[rows].mean(0) for rows in nearest]))
    return torch.cat(chosen).view_as(x)


def hidden_masks(count: int, num_tokens: int, ratios: Sequence[float], seed: int = 0) -> dict[float, Tensor]:
    """One random mask (N, L) for each image at each ratio; at least one patch is hidden in each."""
    largest = (num_tokens - 1) / num_tokens
    return {ratio: masks.random(count, num_tokens, min(ratio, largest), seed=seed) for ratio in ratios}


def pixel_mask(S: Tensor, vae: BigLearnVAE) -> Tensor:
    """Patch masks (N, L) -> which pixels are observed, (N, 1, H, W)."""
    (rows, columns), (_, height, width) = vae.grid, vae.image_shape
    cells = S.to(vae.device).unflatten(1, (rows, columns)).unsqueeze(1)
    return cells.repeat_interleave(height // rows, dim=2).repeat_interleave(width // columns, dim=3)


def psnr(completed: Tensor, images: Tensor, observed: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all hidden pixels of all images together, for a peak of 1."""
    hidden = (~observed).expand_as(images)
    error = (completed - images)[hidden].double().square().mean().item()
    return -10 * math.log10(error) if error else math.inf
