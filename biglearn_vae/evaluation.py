"""Numbers about a trained model: ELBOs, likelihoods, consistency, in-painting against the nearest training images.

Images are a tensor (N, C, H, W) in [0, 1] or an `ImageSet`, of which only a part at a time is made floats, so that it
may be larger than the memory.

N images, L tokens, D token dimension.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from biglearn_vae import annealing, checks, masks
from biglearn_vae.capabilities import BigLearnVAE, check_model, check_part, check_scaled, checked_variance
from biglearn_vae.data import Images, ImageSet, check_images, parts, rows_of, take
from biglearn_vae.distributed import StepRandom, derive_seed, global_generator
from biglearn_vae.gaussian import DiagGaussian, bits_per_dim
from biglearn_vae.losses import ELBO, BigLearnELBO, has_model
from biglearn_vae.masks import MaskSampler
from biglearn_vae.observations import as_observations
from biglearn_vae.patches import Patchify

Task = float | str  # what is observed: a random share of the patches, or a shape
SHAPES: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "centre": masks.centre,  # all but the middle
    "top": lambda grid: masks.half(grid, "top"),
    "left": lambda grid: masks.half(grid, "left"),
}


PATCHES = ("image_shape", "grid", "num_tokens", "device", "pixel_mask")  # of a model of which only these are used


def check_given(vae: Any, images: Any, *train: Any, needs: Sequence[str] = ()) -> None:
    """Raise a ValueError unless these are a model (`check_model`), images or their tokens, at least one, and such
    training images."""
    check_model(vae, needs)
    check_images(images)
    for part in train:
        check_images(part, "training image")


@torch.no_grad()
def elbo(vae: BigLearnVAE, images: Images, loss: BigLearnELBO, joint: bool = True, seed: int = 0) -> dict[str, float]:
    """Mean ELBO of images, with one latent draw and, unless joint, one (S, T) for each image; `seed` determines it.

    Args:
        images: N of them.
        loss: its beta (the final one), prior and q(S, T) are used; prior and observations must be the model's, but for
            the variance of discretized Gaussian ones, which is its beta. Terms of its own are computed if it is not
            known what likelihood they bound (`losses.has_model`).
        joint: S empty and T everything, the JointELBO (Eq. 1); else (S, T) is drawn from the loss's q(S, T), with
            separate ratios for each image, also if training shares them in a batch: one pair would be a single task.

    Returns:
        Means over the images by name: reconstruction (for Gaussian observations without the constant of N(mu, I)); kl,
        without beta; elbo, which is reconstruction - beta kl; and elbo_nats, a bound on the log-likelihood by one draw
        (`BigLearnVAE.log_prob` takes more), for Gaussian observations under N(mu, beta I), left out if these have beta
        0 or the likelihood is not known (`losses.has_model`). Images of which nothing was recorded do not count.

    Raises:
        ValueError: if the loss has another prior or other observations than the model, or returns something else than
            an ELBO, and for images that are none of these observations.
    """
    check_given(vae, images)
    if not callable(loss):
        raise ValueError(f"expected an objective, such as BigLearnELBO(beta), got {loss!r:.80}")
    if getattr(loss, "prior", vae.prior) != vae.prior:
        raise ValueError(
            f"the loss has the {loss.prior} prior, the model the {vae.prior} one, as it was trained: give the loss "
            f'prior="{vae.prior}"'
        )
    own = as_observations(getattr(loss, "observations", vae.observations))
    if type(own) is not type(vae.observations):
        raise ValueError(
            f"the loss has {own.name} observations, the model {vae.observations.name} ones: give the loss "
            f'observations="{vae.observations.name}"'
        )
    seed = checks.seed_or_drawn(seed)
    random = StepRandom(torch.Generator(vae.device).manual_seed(seed))
    loss = copy.copy(loss)
    sampler = getattr(loss, "masks", None)
    if isinstance(sampler, MaskSampler):
        loss.masks = sampler.altered(ratios_per="sample")
    with global_generator(vae.device, derive_seed("global", seed)):  # from which one's own may draw
        found = [part for tokens in _tokens(vae, images) for part in _elbos(vae, loss, tokens, joint, random)]
    _check_parts(found[0])
    bounded = has_model(loss) and (loss.beta or not own.scaled)
    names = ("elbo", "reconstruction", "kl", *(["elbo_nats"] if bounded else []))
    return {name: _mean(found, name) for name in names}


def _elbos(vae: BigLearnVAE, loss: BigLearnELBO, tokens: Tensor, joint: bool, random: StepRandom) -> Iterator[ELBO]:
    """The ELBOs of as many images at a time as pass through the network at once; draws are made for all together."""
    S, known = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device), has_model(loss)
    vae.observations.check(tokens, masks.recorded(tokens))
    if not known and type(loss).__call__ is not BigLearnELBO.__call__:
        yield loss(vae.net, tokens, *((S, ~S) if joint else ()), random=random)  # which draws as it likes
        return
    task = (S, ~S & masks.recorded(tokens)) if joint else loss.draw(tokens, random)
    noise = random.normal((len(tokens), vae.z_dim), tokens.dtype)
    terms = partial(BigLearnELBO.terms, loss) if known else loss.terms
    for x, S, T, own in zip(*(part.split(vae.rows) for part in (tokens, *task, noise)), strict=True):
        yield ELBO(*terms(vae.net, x, S, T, own), loss.weight(None), T.sum(-1), x.shape[-1], loss.observations)


def _check_parts(parts: Any) -> None:
    """Raise a ValueError unless this has what is measured of an ELBO."""
    if lacking := [of for of in ("elbo", "reconstruction", "kl", "num_targets") if not hasattr(parts, of)]:
        raise ValueError(
            f"expected of the loss an ELBO, or what has its parts, a number (B,) for each image: "
            f"{type(parts).__name__} lacks {', '.join(lacking)}"
        )


def _tokens(vae: BigLearnVAE, images: Images) -> Iterator[Tensor]:
    """The tokens of a part of the images at a time, in the network's precision."""
    return (vae.tokenizer.encode(part.to(vae.dtype)) for part in parts(images, vae.device))


def _mean(parts: Sequence[ELBO], name: str) -> float:
    """The mean over the images of which something was asked for."""
    values, counts = (torch.cat([getattr(part, of) for part in parts]) for of in (name, "num_targets"))
    return values[counts > 0].double().mean().item()


def inpainting_psnr(
    vae: BigLearnVAE, images: Images, ratios: Sequence[Task], draws: int = 32, seed: int = 0
) -> dict[Task, float]:
    """PSNR over the missing pixels of the posterior-mean completion, by the ratio of patches observed.

    The completion is the mean of `draws` completions, an estimate of E[x_T | x_S], the guess with the least expected
    squared error. The masks are `hidden_masks` with the same seed. What was never recorded (NaN) is neither observed
    nor asked for.

    Raises:
        ValueError: if draws is below 1, and on what `hidden_masks` refuses.
    """
    check_given(vae, images)
    draws, seed = checks.whole_number("draws", draws, 1), checks.seed_or_drawn(seed)
    rows = rows_of(draws * math.prod(vae.image_shape))  # all draws of a part at a time
    return _psnr_by_task(vae, images, ratios, lambda x, S, k: vae.inpaint(x, S, draws, seed + k).mean(0), seed, rows)


def nearest_psnr(
    vae: BigLearnVAE, images: Images, train: Images, ratios: Sequence[Task], neighbours: int = 10, seed: int = 0
) -> dict[Task, float]:
    """Like `inpainting_psnr`, of the mean of the training images nearest over the observed pixels: the floor to beat.

    The training images are read once for all ratios, then the neighbours again. Where nothing is observed, the
    completion is the mean of all training images.

    Args:
        train: M training images.
        vae: only its image size and the grid of its patches are used.
    """
    check_given(vae, images, train, needs=PATCHES)
    neighbours = checks.whole_number("neighbours", neighbours, 1)
    patches = _patches_of(vae, vae.image_shape[0])
    known = _Patches(train, patches, vae.device)
    # Twice the same parts, since the masks come before the neighbours: a part of the images is cheap to read.
    rows = rows_of((1 + neighbours) * math.prod(vae.image_shape))
    S = torch.cat(
        [torch.stack([S for S, _ in tasks.values()], 1) for _, tasks in tasks_in_parts(vae, images, ratios, seed, rows)]
    )
    nearest, everyone = _nearest(_Patches(images, patches, vae.device), S, known, neighbours)
    errors: dict[Task, list[_Error]] = {ratio: [] for ratio in ratios}
    for (x, tasks), positions in zip(tasks_in_parts(vae, images, ratios, seed, rows), nearest.split(rows), strict=True):
        for number, (ratio, (S, T)) in enumerate(tasks.items()):
            completed = patches.decode(_mean_of(known, positions[:, number], S, everyone))
            errors[ratio].append(_squared_error(completed, x, vae.pixel_mask(T)))
    return {ratio: _decibels(parts) for ratio, parts in errors.items()}


def check_sets(vae: BigLearnVAE, images: Images, S: Any) -> None:
    """Raise a ValueError unless S are R sets of patches for each image, boolean (N, R, L)."""
    count, length = len(images), vae.grid[0] * vae.grid[1]
    if not checks.is_mask(S) or S.ndim != 3 or (S.shape[0], S.shape[2]) != (count, length):
        raise ValueError(f"expected S as boolean masks ({count}, R, {length}), got {checks.described(S)}")


def nearest_positions(vae: BigLearnVAE, images: Images, S: Tensor, train: Images, neighbours: int = 10) -> Tensor:
    """Positions (N, R, neighbours) of the training images nearest to each image over the pixels of patches S, nearest
    first.

    Args:
        images: N of them.
        S: R sets of patches for each, boolean (N, R, L), of what was recorded. Over an empty set all are equally near.
            Of images that are equally near, such as blank ones over a blank patch, any may be taken.
        train: training images.
        vae: only its image size and the grid of its patches are used; images may have other channels than its own.
    """
    check_given(vae, images, train, needs=PATCHES)
    check_sets(vae, images, S)
    patches = _patches_of(vae, take(train, slice(1), vae.device).shape[1])
    x, known = (_Patches(part, patches, vae.device) for part in (images, train))
    return _nearest(x, S.to(vae.device), known, neighbours)[0]


def _patches_of(vae: BigLearnVAE, channels: int) -> Patchify:
    """The pixels of the model's patches, whatever its tokens are."""
    _, height, width = vae.image_shape
    return Patchify((height, width), height // vae.grid[0], channels)


class _Tokens(Protocol):
    """Anything with a length that gives tokens (n, L, D) for a slice or a tensor of positions."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor) -> Tensor: ...


class _Patches:
    """Images as tokens on a device, of which a part is made at a time."""

    def __init__(self, images: Images, patches: Patchify, device: torch.device):
        self.images, self.patches, self.device = images, patches, device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.patches.encode(take(self.images, index, self.device))


def nearest_completion(x: Tensor, S: Tensor, train: Tensor, neighbours: int = 10) -> Tensor:
    """The mean of the training tokens (M, L, D) that are nearest to x (N, L, D) over the patches S (N, L).

    A number that a training token lacks (NaN) enters the distance with its expected squared difference, by the mean and
    the variance of that number over the training images that have it; if it were left out, the images with the least
    recorded would be nearest. Each number of the completion is the mean over the neighbours that have it; if none has,
    or S is empty, over all training images; and if none of these has it, the mean of all numbers.

    Raises:
        ValueError: on tokens or masks of other shapes or types.
    """
    fits = all(checks.is_numbers(part) and part.ndim == 3 and part.is_floating_point() for part in (x, train))
    if not fits or x.shape[1:] != train.shape[1:] or not checks.is_mask(S) or S.shape != x.shape[:2]:
        found = ", ".join(map(checks.described, (x, S, train)))
        raise ValueError(f"expected x (N, L, D), a boolean mask S (N, L) and train (M, L, D), got {found}")
    nearest, everyone = _nearest(x, S.unsqueeze(1), train, neighbours)
    rows = rows_of(neighbours * train[0].numel())
    pairs = zip(nearest[:, 0].split(rows), S.split(rows), strict=True)
    return torch.cat([_mean_of(train, positions, seen, everyone) for positions, seen in pairs])


def _mean_of(train: _Tokens, positions: Tensor, S: Tensor, everyone: Tensor) -> Tensor:
    """The means (n, L, D) of the training tokens at positions (n, k), nearest over S (n, L); those of everyone (L, D)
    where none has them, and where S is empty, so that none is nearer than others."""
    means = train[positions.flatten().cpu()].unflatten(0, positions.shape).nanmean(1)
    return torch.where(means.isnan() | ~S.any(-1)[:, None, None], everyone, means)


def _nearest(x: _Tokens, S: Tensor, train: _Tokens, neighbours: int) -> tuple[Tensor, Tensor]:
    """Positions (N, R, neighbours) of the training images nearest to x over each of R sets of patches S (N, R, L).

    The second result is the mean of all training tokens, (L, D), of a number that none of them has the mean of all
    numbers. Training images are read once, a part at a time, and once more if some were not recorded in full.
    """
    neighbours = checks.whole_number("neighbours", neighbours, 1)
    if not len(train):
        raise ValueError("expected at least one training image, of which the nearest are looked for, got none")
    like = x[:1]
    length, dim = like.shape[1:]
    many = rows_of(length * dim, chunks=8)  # training images
    few = min(many, rows_of(max(length, S.shape[1]) * min(many, len(train))))  # others: L or R x few x many distances
    empty = torch.empty(*S.shape[:2], 0, device=S.device)
    found = [(part, part.long()) for part in empty.split(few)]
    total, count = torch.zeros(2, length, dim, dtype=torch.float64, device=S.device)
    centre = moments = None
    for start in range(0, len(train), many):
        y, has = train[start : start + many], None
        if centre is None:  # about which distances are computed: squares of less round less
            centre = y.nanmean(0).nan_to_num(0).to(like.dtype)
        column = y.sum(0)  # a NaN anywhere shows here
        if column.isnan().any():
            moments = moments or _moments(train, many, centre)
            has = ~y.isnan()
            column = y.nansum(0)
        total, count = total + column.double(), count + (len(y) if has is None else has.sum(0))
        y = y - centre if has is None else (y - centre).nan_to_num(0)
        for k, seen in enumerate(S.split(few)):
            distance = _distances(x[k * few : (k + 1) * few] - centre, seen, y, has, moments)
            found[k] = _best(*found[k], distance, start, neighbours)
    everyone = torch.where(count > 0, total / count, total.sum() / count.sum())
    return torch.cat([positions for _, positions in found]), everyone.to(y.dtype)


def _moments(train: _Tokens, rows: int, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (L, D) of each number less `centre`, over what was recorded; 0 if nothing was."""
    parts = (train[start : start + rows].double() - centre for start in range(0, len(train), rows))
    sums = (torch.stack([(~y.isnan()).sum(0), y.nansum(0), y.square().nansum(0)]) for y in parts)
    count, total, squares = reduce(torch.add, sums)
    mean = total / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean.square()).clamp(min=0)


def _distances(
    x: Tensor, S: Tensor, y: Tensor, has: Tensor | None, moments: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Mean of (x - y)^2 over the patches S (n, R, L) for x (n, L, D) and y (m, L, D), (n, R, m), infinite over none.

    Patch by patch first, which is most of the work and serves all R.

    Args:
        has: where y has a number, (m, L, D), which is 0 where it was not recorded; None if y has them all.
        moments: mean and variance (L, D) of the numbers, which give the expected (x - y)^2 where y has none.
    """
    y = y.to(x.dtype)
    # What no S holds may be NaN.
    x = x.masked_fill(~S.any(1).unsqueeze(-1), 0)
    S, x, own = S.to(x.dtype), x.transpose(0, 1), x.square().transpose(0, 1)  # (L, n, D)
    gap = torch.baddbmm(y.square().sum(-1).T.unsqueeze(1), x, y.permute(1, 2, 0), alpha=-2)  # (L, n, m)
    if has is None or moments is None:
        gap += own.sum(-1, keepdim=True)
    else:
        mean, variance = (moment.to(x.dtype).unsqueeze(1) for moment in moments)  # (L, 1, D)
        gap.baddbmm_(own, has.permute(1, 2, 0).to(x.dtype))
        gap.baddbmm_((x - mean).square() + variance, (~has).permute(1, 2, 0).to(x.dtype))
    count = y.shape[-1] * S.sum(-1, keepdim=True)  # (n, R, 1)
    return (torch.bmm(S, gap.transpose(0, 1)) / count).nan_to_num(torch.inf)


def _best(distance: Tensor, positions: Tensor, other: Tensor, start: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """The least of distances (n, R, k) and of others (n, R, m) of the images from `start` on, and their positions."""
    here = torch.arange(start, start + other.shape[-1], device=other.device).expand_as(other)
    distance, positions = torch.cat([distance, other], -1), torch.cat([positions, here], -1)
    distance, order = distance.topk(min(neighbours, distance.shape[-1]), largest=False)
    return distance, positions.gather(-1, order)


def hidden_masks(count: int, grid: tuple[int, int], tasks: Sequence[Task], seed: int = 0) -> dict[Task, Tensor]:
    """What is observed of each image, (N, L), by task; at least one patch is hidden in each.

    Raises:
        ValueError: if there is no task, or one is neither a share in [0, 1) nor one of `SHAPES`.
    """
    check_tasks(tasks)
    count, grid = checks.whole_number("count", count, 0), checks.check_grid(grid)
    num_tokens = grid[0] * grid[1]
    largest = (num_tokens - 1) / num_tokens
    return {
        task: SHAPES[task](grid).expand(count, -1)
        if isinstance(task, str)
        else masks.random(count, num_tokens, min(task, largest), seed=seed)
        for task in tasks
    }


def check_tasks(tasks: Sequence[Task], name: str = "") -> None:
    """Raise a ValueError unless these are shares of patches in [0, 1) or names of `SHAPES`, at least one."""
    several = isinstance(tasks, list | tuple)
    if not several or not tasks or not all(map(_is_task, tasks)):
        raise ValueError(
            f"{name and f'{name}: '}expected shares in [0, 1), as something must be hidden, or some of "
            f"{', '.join(SHAPES)}, in a list of at least one, got {tasks}"
        )


def _is_task(task: Any) -> bool:
    try:
        return task in SHAPES if isinstance(task, str) else bool(0 <= task < 1)
    except (TypeError, ValueError, RuntimeError):  # None, arrays, tensors of several numbers
        return False


def tasks_in_parts(
    vae: BigLearnVAE, images: Images, ratios: Sequence[Task], seed: int, rows: int
) -> Iterator[tuple[Tensor, dict[Task, tuple[Tensor, Tensor]]]]:
    """`rows` images (n, C, H, W) at a time and, by ratio, S and T, what is observed and what is hidden of them.

    Both are patches (n, L), and together what was recorded. The masks are `hidden_masks` with the same seed.
    """
    drawn = hidden_masks(len(images), vae.grid, ratios, seed)
    for k, x in enumerate(parts(images, vae.device, rows)):
        recorded = masks.recorded_patches(x, vae.grid)
        own = {ratio: S[k * rows : (k + 1) * rows].to(vae.device) for ratio, S in drawn.items()}
        yield x, {ratio: (S & recorded, ~S & recorded) for ratio, S in own.items()}


def psnr(completed: Tensor, images: Tensor, hidden: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all hidden pixels, a mask (N, 1, H, W), or (1, H, W) for all, for a peak of
    1.

    Raises:
        ValueError: on completions of another shape than the images, and on another mask.
    """
    return _decibels([_squared_error(completed, images, hidden)])


_Error = tuple[float, int]  # the sum of squared errors, and of how many numbers


def _squared_error(completed: Tensor, images: Tensor, hidden: Tensor) -> _Error:
    fits = checks.is_numbers(completed) and checks.is_numbers(images) and completed.shape == images.shape
    if not fits or not _is_mask_of(hidden, images):
        raise ValueError(
            f"expected completions of the size of the images, {checks.described(images)}, and a boolean mask of pixels "
            f"of them, as vae.pixel_mask(~S) makes it, got {checks.described(completed)} and {checks.described(hidden)}"
        )
    images, hidden = images.to(completed.device), hidden.to(completed.device)
    error = (checks.in_floats(completed) - checks.in_floats(images))[hidden.expand_as(images)].double().square()
    return error.sum().item(), error.numel()


def _is_mask_of(hidden: Tensor, images: Tensor) -> bool:
    """Whether it is a mask of pixels of images (..., C, H, W), one for each or for all; (N, H, W) is none of a batch,
    as N would be taken for channels."""
    if not checks.is_mask(hidden) or hidden.ndim > images.ndim or hidden.shape[-2:] != images.shape[-2:]:
        return False
    if hidden.ndim == 3 < images.ndim and len(hidden) > 1:
        return False
    leading = zip(hidden.shape[-3::-1], images.shape[-3::-1], strict=False)
    return all(own in (1, size) for own, size in leading)


def _decibels(parts: Sequence[_Error]) -> float:
    total, count = (sum(column) for column in zip(*parts, strict=True))
    if not count:
        return math.nan
    return -10 * math.log10(total / count) if total else math.inf


@torch.no_grad()
def fit_variance(vae: BigLearnVAE, images: Images, seed: int = 0) -> float:
    """The variance of Gaussian observations N(mu, variance I) that makes the JointELBO of images, in nats, largest.

    It is the mean squared error of a reconstruction, z ~ p(z | x), over all numbers that were recorded. Fit it on
    training images; `vae.log_prob(..., variance=)` takes it.

    Raises:
        ValueError: if nothing of the images was recorded, or the observations have no variance.
    """
    check_given(vae, images)
    check_scaled(vae)
    total, count = 0.0, 0
    for k, tokens in enumerate(_tokens(vae, images)):
        recorded = masks.recorded(tokens)
        tokens = masks.seen(tokens, recorded)
        z = vae._encode(tokens, recorded).sample(seed=derive_seed("variance", seed, k))
        nothing = torch.zeros_like(recorded)
        total -= 2 * vae._reconstruction(z.unsqueeze(0), tokens, nothing, recorded).sum().item()
        count += int(recorded.sum()) * vae.net.token_dim
    if not count:
        raise ValueError("expected images of which something was recorded, all numbers are NaN")
    return total / count


def whole(images: ImageSet, grid: tuple[int, int], most: int | None = None) -> ImageSet:
    """The images of which every patch was recorded: all, or the first `most`, beyond which nothing is read."""
    if not len(images):
        return images
    recorded, count = [], 0
    for part in parts(images, images.device):
        recorded.append(masks.recorded_patches(part, grid).all(-1))
        count += int(recorded[-1].sum())
        if most is not None and count >= most:
            break
    return images.select(torch.cat(recorded).nonzero()[:most, 0])


def likelihood(
    vae: BigLearnVAE,
    images: Images,
    samples: int = 64,
    variance: float | None = None,
    seed: int = 0,
    annealing_steps: int | None = None,
) -> dict[str, float]:
    """Bounds on log-likelihoods (`BigLearnVAE.log_prob`), mean per image in nats and in bits per dimension.

    joint: of the whole image; marginal: of a random half of its patches, another half for each image; conditional: of
    the other half given that one. With a single patch, joint alone. The images must be whole (see `whole`).

    Args:
        annealing_steps: of `annealed_log_prob`, whose bounds are tighter the more there are; None is `log_prob`.
    """
    check_given(vae, images)
    seed = checks.seed_or_drawn(seed)
    A = masks.random(len(images), vae.num_tokens, 0.5, seed=seed)
    halves = (("marginal", A, None), ("conditional", ~A, A)) if vae.num_tokens > 1 else ()
    bound, result = _bound(vae, annealing_steps), {}
    for name, T, given in (("joint", A | ~A, None), *halves):
        nats = _in_parts(bound, images, T, given, samples, variance, seed).mean().item()
        result[f"{name}_nats"] = nats
        result[f"{name}_bits_per_dim"] = bits_per_dim(nats, T[0].sum().item() * vae.net.token_dim)
    return result


def _bound(vae: BigLearnVAE, steps: int | None) -> Callable[..., Tensor]:
    """What gives a bound on log p(x_T | x_S), (N,), by importance weights or annealed, for `_in_parts`."""
    if steps is None:
        return vae.log_prob
    return lambda x, T, given, samples, variance, seed: (
        annealed_log_prob(vae, x, T, given, samples, variance, seed, steps).nats
    )


def _in_parts(
    method: Callable[..., Tensor],
    images: Images,
    T: Tensor,
    given: Tensor | None,
    samples: int,
    variance: float | None,
    seed: int,
) -> Tensor:
    """`BigLearnVAE.log_prob` (N,) or `log_weights` (K, N), a part of the images at a time."""
    rows = rows_of(images[:1].numel())
    results = []
    for k, start in enumerate(range(0, len(images), rows)):
        own = slice(start, start + rows)
        S = None if given is None else given[own]
        results.append(method(images[own], T[own], S, samples, variance, seed + k))
    return torch.cat(results, -1)


def consistency(
    vae: BigLearnVAE,
    images: Images,
    samples: int = 256,
    variance: float | None = None,
    seed: int = 0,
    annealing_steps: int | None = None,
) -> dict[str, float]:
    """How far the learned conditionals are from those of one joint distribution.

    For each image, random disjoint sets of patches A and B, of uniform sizes from 1 on:

    - order_gap: |log p(x_A) + log p(x_B | x_A) - log p(x_B) - log p(x_A | x_B)|, mean over images, in nats. Both
      orders give log p(x_A, x_B) if the conditionals agree.
    - order_noise: the same between two estimates of one order with different draws: what the noise of estimation alone
      explains. It does not show that estimates are too low, each by another amount; more samples do.
    - posterior_gap: KL[p(z | x_S) || p(z) p(x_S | z) / p(x_S)] in nats, from the posterior of Bayes' rule, S = A:
      log p(x_S) less the mean log importance weight. As a bound stands for log p(x_S), it is a lower bound in
      expectation. If the bound is from the same weights, it is near the truth up to about log K, and far too low beyond
      (36 nats appear as 5 with K = 16, as 8 with K = 256); with annealing_steps it has no such limit.
    - effective_samples: (sum w)^2 / sum w^2 / K of those weights: 1 if both distributions are equal, at least 1 / K.

    Args:
        samples: K, of every estimate.
        annealing_steps: of `annealed_log_prob` for every log p, whose bounds are tighter the more there are; None is
            `log_prob`.

    Raises:
        ValueError: if there is only one patch.
    """
    check_given(vae, images)
    seed = checks.seed_or_drawn(seed)
    if vae.num_tokens < 2:
        raise ValueError("expected images of at least two patches, got one")
    A, B = _disjoint_pairs(len(images), vae.num_tokens, seed)
    bound = _bound(vae, annealing_steps)

    def log_joint(A: Tensor, B: Tensor, k: int) -> Tensor:
        seeds = [derive_seed("consistency", seed, k, part) for part in range(2)]
        marginal = _in_parts(bound, images, A, None, samples, variance, seeds[0])
        return marginal + _in_parts(bound, images, B, A, samples, variance, seeds[1])

    one, again, other = log_joint(A, B, 0), log_joint(A, B, 1), log_joint(B, A, 2)
    weights = _in_parts(vae.log_weights, images, A, None, samples, variance, derive_seed("posterior", seed))  # (K, N)
    evidence = weights.logsumexp(0) - math.log(samples)
    if annealing_steps is not None:
        evidence = _in_parts(bound, images, A, None, samples, variance, derive_seed("evidence", seed))
    return {
        "order_gap": (one - other).abs().mean().item(),
        "order_noise": (one - again).abs().mean().item(),
        "posterior_gap": (evidence - weights.mean(0)).mean().item(),
        "effective_samples": (1 / (weights.softmax(0).square().sum(0) * samples)).mean().item(),
    }


def _disjoint_pairs(count: int, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Masks A and B (N, L), neither empty: |A| uniform in 1 .. L - 1, |B| uniform in 1 .. L - |A|."""
    generator = torch.Generator("cpu").manual_seed(seed)
    rank = masks.uniform_numbers((count, num_tokens), generator).argsort(-1)
    uniform = masks.uniform_numbers((count, 2, 1), generator)
    a = 1 + (uniform[:, 0] * (num_tokens - 1)).floor()
    b = 1 + (uniform[:, 1] * (num_tokens - a)).floor()
    return rank < a, (rank >= a) & (rank < a + b)


@torch.no_grad()
def reconstruction(tokenizer: Any, images: Images) -> dict[str, float]:
    """How well a tokenizer gives images back: PSNR in dB, and the seams between its patches.

    seam_ratio is the mean absolute difference of neighbouring pixels on two sides of a border between patches, over
    that of neighbours inside a patch; seam_ratio_of_images the same of the images themselves. They are left out where
    patches have no borders, or no inside.

    Args:
        tokenizer: a module with `encode`, `decode` and `patch_size`, such as a `PatchAE`.
        images: (N, C, H, W) in [0, 1]; patches with NaN in them, never recorded as a whole, do not count.
    """
    check_images(images)
    check_part("a tokenizer such as a PatchAE", tokenizer, ("encode", "decode", "patch_size"))
    device = next(tokenizer.parameters(), images[:1]).device
    error, numbers = 0.0, 0
    seams: dict[str, Any] = {"seam_ratio": 0, "seam_ratio_of_images": 0}
    for x in parts(images, device):
        y = tokenizer.decode(tokenizer.encode(x))
        x = torch.where(y.isnan(), y, x)  # of a patch with NaN in it there is no code
        squares = (y - x).double().square()
        error, numbers = error + squares.nansum().item(), numbers + (~squares.isnan()).sum().item()
        for name, pixels in (("seam_ratio", y), ("seam_ratio_of_images", x)):
            seams[name] = seams[name] + _differences(pixels, tokenizer.patch_size)
    means = {name: sums[:, 0] / sums[:, 1] for name, sums in seams.items() if sums[:, 1].all()}
    return {"psnr": _decibels([(error, numbers)])} | {
        name: (across / inside).item() for name, (across, inside) in means.items()
    }


def _differences(images: Tensor, patch_size: int) -> Tensor:
    """Sum and number of absolute differences of neighbouring pixels: across borders of patches, and inside (2, 2).

    Those with NaN do not count.
    """
    result = torch.zeros(2, 2, dtype=torch.float64)
    for axis in (2, 3):
        steps, others = images.diff(dim=axis).abs().double(), [k for k in range(4) if k != axis]
        sums, counts = steps.nansum(dim=others).cpu(), (~steps.isnan()).sum(dim=others).cpu()
        border = torch.arange(1, len(sums) + 1) % patch_size == 0
        for row, where in enumerate((border, ~border)):
            result[row] += torch.stack([sums[where].sum(), counts[where].sum().double()])
    return result


def completion_psnr(
    vae: BigLearnVAE,
    images: Images,
    ratios: Sequence[Task],
    complete: Callable[[Tensor, Tensor], Tensor],
    seed: int = 0,
) -> dict[Task, float]:
    """PSNR over the missing pixels of any completion, by the ratio of patches observed, with `hidden_masks`.

    Args:
        vae: only its patches are used.
        complete: from images (n, C, H, W) and what is observed of them, (n, L), on the model's device, to completions
            (n, C, H, W); n is at most `data.CHUNK`. For a network trained without z (`losses.InpaintingRegression`):
            `lambda x, S: vae.decode(torch.zeros(len(x), vae.z_dim), x, S)`.
    """
    check_given(vae, images, needs=PATCHES)
    rows = rows_of(math.prod(vae.image_shape))
    return _psnr_by_task(vae, images, ratios, lambda x, S, k: complete(x, S), seed, rows)


def _psnr_by_task(
    vae: BigLearnVAE,
    images: Images,
    ratios: Sequence[Task],
    complete: Callable[[Tensor, Tensor, int], Tensor],
    seed: int,
    rows: int,
) -> dict[Task, float]:
    """PSNR by task of complete(x, S, k), completions of the k-th part of the images, so many rows each."""
    errors: dict[Task, list[_Error]] = defaultdict(list)
    for k, (x, tasks) in enumerate(tasks_in_parts(vae, images, ratios, seed, rows)):
        for ratio, (S, T) in tasks.items():
            errors[ratio].append(_squared_error(complete(x, S, k), x, vae.pixel_mask(T)))
    return {ratio: _decibels(found) for ratio, found in errors.items()}


def training_mean_psnr(
    vae: BigLearnVAE, images: Images, train: Images, ratios: Sequence[Task], seed: int = 0
) -> dict[Task, float]:
    """Like `inpainting_psnr`, of the mean of all training images, whatever is observed: the lowest floor.

    Args:
        train: M training images. A number that was not recorded (NaN) in any of them is replaced by the mean of all
            numbers.
        vae: only its patches are used.
    """
    check_given(vae, images, needs=PATCHES)
    check_images(train, "training image", tokens=False)
    mean, size = _mean_image(train), tuple(images[:1].shape[1:])
    if mean.shape[1:] != size[1:] or len(mean) not in (1, size[0]):
        raise ValueError(f"expected training images of the size of the images, {size}, got {tuple(mean.shape)}")
    return completion_psnr(vae, images, ratios, lambda x, S: mean.to(x).expand_as(x), seed)


def _mean_image(train: Images) -> Tensor:
    """Mean over the numbers that were recorded, float64 (C, H, W)."""
    total: Any = 0
    count: Any = 0
    for part in map(Tensor.double, parts(train, torch.device("cpu"))):
        total, count = total + part.nansum(0), count + (~part.isnan()).sum(0)
    return torch.where(count > 0, total / count, total.sum() / count.sum())


def completion_scores(draws: Tensor, images: Tensor, hidden: Tensor) -> dict[str, float]:
    """How good several completions of each image are, and how different from each other, over all hidden pixels.

    Args:
        draws: completions (K, N, C, H, W), K at least 2.
        images: the truth (N, C, H, W).
        hidden: pixels (N, 1, H, W).

    Returns:
        psnr_draw: in dB, of one draw, its squared error being the mean over all K.
        psnr_mean: in dB, of the mean of the K draws.
        diversity: standard deviation of a hidden number between draws (from the unbiased variance); that is, the root
            mean square difference over all pairs of draws, divided by sqrt(2). So the squared error of one draw is that
            of the mean plus (1 - 1/K) diversity^2.

    Raises:
        ValueError: if there are fewer than two draws, nothing is hidden, or shapes do not fit.
    """
    fits = checks.is_numbers(draws) and checks.is_numbers(images) and draws.ndim == 5 and len(draws) > 1
    if not fits or draws.shape[1:] != images.shape:
        raise ValueError(
            "expected at least 2 draws (K, N, C, H, W) of images (N, C, H, W), got "
            f"{checks.described(draws)} and {checks.described(images)}"
        )
    if not checks.is_mask(hidden) or hidden.shape != (len(images), 1, *images.shape[2:]) or not hidden.any():
        raise ValueError(
            f"hidden must be a boolean mask of pixels (N, 1, H, W), at least one, got {checks.described(hidden)}"
        )
    draws, images = checks.in_floats(draws), checks.in_floats(images)
    rows, totals = max(1, 2**24 // draws[:, 0].numel()), torch.zeros(3, dtype=torch.float64)
    for part in zip(draws.split(rows, 1), images.split(rows), hidden.split(rows), strict=True):
        totals += _completion_errors(*part).cpu()
    one, mean, variance = (totals / (hidden.sum().item() * images.shape[1])).tolist()
    return {"psnr_draw": _decibels([(one, 1)]), "psnr_mean": _decibels([(mean, 1)]), "diversity": math.sqrt(variance)}


def _completion_errors(draws: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Sums over hidden pixels: squared error of a draw, of the mean of all, and variance between draws; (3,)."""
    hidden = hidden.to(draws.device).expand(images.shape)
    drawn, target = draws[:, hidden].double(), images.to(draws.device)[hidden].double()  # (K, n) and (n,)
    one, mean = (drawn - target).square().mean(0), (drawn.mean(0) - target).square()
    return torch.stack([part.sum() for part in (one, mean, drawn.var(0))])


@dataclass(frozen=True, eq=False)
class LogProb:
    """Estimates of log-likelihoods in nats, float64 (N,).

    Attributes:
        nats: the estimates.
        error: their standard errors, by the spread of the weights. Where one is not well below 1, the weights have a
            tail that these draws did not see, and the estimate is too low by more than that.
    """

    nats: Tensor
    error: Tensor

    def __getitem__(self, index: Any) -> "LogProb":
        """The estimates of some images, indexed like a tensor."""
        return LogProb(self.nats[index], self.error[index])


@dataclass(frozen=True, eq=False)
class JointConditional:
    """log p(x_hid | x_S) of a joint model as the difference of log p(x) and log p(x_S), estimated apart."""

    joint: LogProb
    marginal: LogProb

    @property
    def nats(self) -> Tensor:
        """log p(x_hid | x_S), float64 (N,)."""
        return self.joint.nats - self.marginal.nats

    @property
    def error(self) -> Tensor:
        """Its standard error, float64 (N,)."""
        return (self.joint.error.square() + self.marginal.error.square()).sqrt()


def annealed_log_prob(
    vae: BigLearnVAE,
    x: Tensor,
    T: Tensor | None = None,
    given: Tensor | None = None,
    samples: int = 16,
    variance: float | None = None,
    seed: int = 0,
    steps: int = 200,
) -> LogProb:
    """log p(x_T | x_S) under p(z | x_S) N(x_T; mu(z, x_S), variance I), more tightly than `BigLearnVAE.log_prob`.

    It is estimated by annealed importance sampling from p(z | x_{S u T}); with steps=1 it is that bound. In expectation
    it is a lower bound for any samples and steps, and rises to the truth with both. Where p(z | x_{S u T}) is narrower
    than the posterior of Bayes' rule, as training with a small beta leaves it, importance weights of thousands of
    samples stay several nats below the truth.

    Args:
        x, T, given: see `BigLearnVAE.log_prob`.
        samples: K, chains of each image.
        variance: of the observations, by default that of `vae`.
        steps: of the annealing; each takes 3.75 decodings with gradients per sample, more if there are fewer than 16
            samples (with steps=1 none).

    Returns:
        For a batch numbers (N,), for a single image (). Step lengths of the annealing are found for several images
        together, so a number depends a little on which others come with it.

    Raises:
        ValueError: if the variance is not positive, or T and given are not such masks.
    """
    check_model(vae)
    checks.check_seed(seed)
    tokens, S, T, single = vae._tasks(x, T, given)
    found = _annealed(vae, tokens, S, T, False, samples, variance, derive_seed("annealed", seed), steps)
    return found[0] if single else found


def conditional_log_prob_joint(
    vae: BigLearnVAE,
    x: Tensor,
    S: Tensor,
    samples: int = 16,
    variance: float | None = None,
    seed: int = 0,
    steps: int = 200,
    joint: LogProb | None = None,
) -> JointConditional:
    """log p(x_hid | x_S) = log p(x) - log p(x_S) of a jointly trained VAE, p(z) N(x; mu(z), variance I), estimated.

    For the universal model `annealed_log_prob(vae, images, ~S, S)` is a lower bound. A joint VAE has no p(z | x_S)
    that could serve in one, and its encoder has never seen a part of an image; and both importance-weighted bounds
    are too low by so much that their difference may be anything. So both integrals over z are annealed, log p(x) from
    q(z | x), log p(x_S) from p(z).

    Each is below the truth in expectation and rises to it with `steps` and `samples`; their difference is neither a
    lower nor an upper bound. The bias of each is about -error^2 / 2 once its error is well below 1. An error cannot
    exceed 1; near 1 a single sample outweighs the others, and nothing is known. log p(x_S) is the harder one; as long
    as it is too low by more, the difference is too high: the error favours the joint VAE. Whether it has settled shows
    in a run with twice the steps.

    Args:
        x: images or tokens, a batch or one, whole.
        S: what is observed, a mask as for every method of `vae`.
        samples, variance, seed, steps: see `annealed_log_prob`, which is run twice here.
        joint: log p(x) of these images, if it is known: `annealed_log_prob(vae, images)`, or `joint` of the result for
            another S.

    Raises:
        ValueError: if the variance is not positive, an image is not whole or nothing of it is hidden, or `joint` is of
            another number of images.
    """
    check_model(vae)
    checks.check_seed(seed)
    tokens, nothing, everything, single = vae._tasks(x, None, None)
    S = vae._mask(S, len(tokens), default=True)
    if S.all(-1).any():
        raise ValueError("expected at least one hidden patch in each image, S holds all")
    if not isinstance(joint, LogProb | None):
        raise ValueError(f"joint must be what annealed_log_prob gives, got {type(joint).__name__}")
    if joint is not None and joint.nats.numel() != len(tokens):
        raise ValueError(f"joint must be of these {len(tokens)} images, got {joint.nats.numel()} numbers")
    options = (samples, variance)
    if joint is None:
        joint = _annealed(vae, tokens, nothing, everything, False, *options, derive_seed("joint", seed), steps)
        joint = joint[0] if single else joint
    marginal = _annealed(vae, tokens, nothing, S, True, *options, derive_seed("marginal", seed), steps)
    return JointConditional(joint, marginal[0] if single else marginal)


@torch.no_grad()
def _annealed(
    vae: BigLearnVAE,
    tokens: Tensor,
    S: Tensor,
    T: Tensor,
    from_prior: bool,
    samples: int,
    variance: float | None,
    seed: int,
    steps: int,
) -> LogProb:
    """log p(x_T | x_S), annealed from p(z | x_{S u T}), or from p(z | x_S), where early steps have further to go."""
    if torch.is_inference_mode_enabled():
        raise ValueError("annealing follows gradients: take torch.no_grad() in place of torch.inference_mode()")
    variance, samples = checked_variance(vae, variance), checks.whole_number("samples", samples, 1)
    rows, estimates = max(1, vae.chunk // max(annealing.PILOT, samples)), []
    for k, (x, s, t) in enumerate(zip(*(part.split(rows) for part in (tokens, S, T)), strict=True)):
        prior, posterior = (vae._encode(masks.seen(x, seen), seen) for seen in (s, s | t))
        # A marginal of a joint model is that of the means it gives to whole images: with hidden="drop", others differ.
        asked = torch.ones_like(t) if from_prior else t
        target = _log_joint(vae, x, s, t, asked, prior, variance)
        base, power = (prior, 4) if from_prior else (posterior, 1)
        weights = []
        for begin in range(0, samples, vae.chunk):  # where those of one image are more than may pass at once
            count, own = min(vae.chunk, samples - begin), derive_seed(seed, k, begin) if begin else derive_seed(seed, k)
            weights.append(annealing.log_weights(target, base, count, steps, power, own))
        estimates.append(_log_mean(torch.cat(weights)))
    return LogProb(*torch.cat(estimates, -1))


def _log_joint(
    vae: BigLearnVAE, tokens: Tensor, S: Tensor, T: Tensor, asked: Tensor, prior: DiagGaussian, variance: float
) -> Callable[[Tensor], Tensor]:
    """log p(z | x_S) p(x_T | z, x_S) as a function of z (k, N, Z): float64 (k, N); T is part of what is `asked`."""
    numbers = T.sum(-1).double() * tokens.shape[-1]  # (N,)
    prior, seen = prior.double(), masks.seen(tokens, S)

    def log_joint(z: Tensor) -> Tensor:
        x, s, t = (part.repeat(len(z), *[1] * (part.ndim - 1)) for part in (seen, S, asked))
        output = vae.net(x, s, z.flatten(0, 1).to(tokens.dtype), t).view(len(z), *tokens.shape)
        reconstruction = vae.observations.reconstruction(tokens.double(), output.double(), T)
        return prior.log_prob(z) + vae.observations.nats(reconstruction, numbers, variance)

    return log_joint


def _log_mean(weights: Tensor) -> Tensor:
    """The logarithm of the mean of weights with these logarithms, (K, N), and its error, NaN of one: (2, N)."""
    count, normalised = len(weights), weights.softmax(0)
    error = (normalised - 1 / count).square().sum(0) * count / (count - 1 or math.nan)
    return torch.stack([weights.logsumexp(0) - math.log(count), error.sqrt()])
