"""Linear probing: what a linear classifier reads from the codes of incomplete images, with a floor and a ceiling.

As in He et al. (2021), the encoder is frozen and a linear classifier is trained on what it gives, here the mean of
p(z | x_S) under random masks. Besides, the training images with the nearest codes vote, which can also use what is not
linear in the codes. The floors are the same classifier on raw pixels and the votes of the training images that are
nearest over the observed pixels; the ceiling is the same network trained with labels.

N images, C channels, H x W pixels, L tokens, D token dimension, Z latent dimension, F features, A attributes.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biglearn_vae import checks, evaluation, masks
from biglearn_vae.capabilities import BigLearnVAE, check_model
from biglearn_vae.data import CHUNK, Batches, Images, ImageSet, check_images, parts, shuffled
from biglearn_vae.distributed import StepRandom, World, derive_seed
from biglearn_vae.loggers import Logger
from biglearn_vae.optim import Optim
from biglearn_vae.patch_ae import PatchAE
from biglearn_vae.trainer import Trainer

RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)  # S-ratios, shares of the patches observed
# Logistic regression with the penalty |w|^2 / (2 C) is a prior N(0, C) on each weight, which gives a logit of F
# standardised features the variance C F. So C = LOGIT_VARIANCE / F is the same prior for codes and for pixels, however
# many there are. On validation images 32 was within 2 points of the best C for the pixels of digits and of MNIST and
# for codes.
LOGIT_VARIANCE = 32.0
MAX_ITER = 500  # of the solver
MOST_KEPT = 2**29  # tokens of a set are kept for all masks if they are at most so many floats, 2 GiB
RAW_NUMBERS = 4096  # in an image, at most, for its raw pixels to be probed by default
NEIGHBOURS = 10  # that vote by default
ROUNDING = 1e-4  # by which numbers of a code may differ, depending on which others it is computed with
BATCH_SIZE = 128  # of the ceiling's training


@torch.no_grad()
def features(vae: BigLearnVAE, images: Tensor | ImageSet, ratio: float, seed: int = 0) -> Tensor:
    """The means of p(z | x_S), (N, Z) on the CPU, each image under a random mask of its own.

    Args:
        images: (N, C, H, W) in [0, 1], a tensor or a set, which is read in parts, or their tokens (N, L, D). What was
            never recorded (NaN) is not observed.
        ratio: share of the patches in S, in [0, 1]. If an image lacks patches, as many of it are observed as of the
            others, or all that it has.
        seed: of the masks.
    """
    check_model(vae)
    found = []
    for x, S in _observed(vae, images, ratio, seed):
        tokens = masks.seen(_tokens(vae, x).to(vae.dtype), S)
        mean = vae._encode(tokens, S).mean  # `encode` could take the tokens of one image for an image
        found.append(mean.to(torch.promote_types(mean.dtype, torch.float32)).cpu())  # NumPy has no bfloat16
    return torch.cat(found)


def pixels(vae: BigLearnVAE, images: Tensor | ImageSet, ratio: float, seed: int = 0) -> Tensor:
    """The pixels under the same masks as `features`, zero where hidden: (N, C H W) on the CPU.

    Args:
        vae: only the size of its images and its grid of patches are used; images may have other channels.
        images, ratio, seed: see `features`; images cannot be tokens.
    """
    check_images(images, tokens=False)
    found = []
    for x, S in _observed(vae, images, ratio, seed):
        found.append(x.masked_fill(~vae.pixel_mask(S), 0).flatten(1).cpu())
    return torch.cat(found)


def _observed(vae: BigLearnVAE, images: Tensor | ImageSet, ratio: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (n, C, H, W), or tokens (n, L, D), and which patches of them are observed (n, L), part by part."""
    evaluation.check_given(vae, images, needs=(*evaluation.PATCHES, "rows"))
    mask = masks.random(len(images), vae.num_tokens, ratio, seed, _recorded(vae, images))  # of all, whatever the parts
    for x, S in zip(parts(images, vae.device, vae.rows), mask.split(vae.rows), strict=True):
        yield x, S.to(vae.device)


def _recorded(vae: BigLearnVAE, images: Tensor | ImageSet) -> Tensor:
    """The patches (N, L) of images or tokens that were ever recorded, on the CPU."""
    if isinstance(images, ImageSet):
        return images.recorded_patches(vae.grid).cpu()
    return (masks.recorded(images) if images.ndim == 3 else masks.recorded_patches(images, vae.grid)).cpu()


def _tokens(vae: BigLearnVAE, x: Tensor) -> Tensor:
    """The tokens (n, L, D) of images (n, C, H, W); tokens as they are."""
    return x if x.ndim == 3 else vae.tokenizer.encode(x)


@torch.no_grad()
def tokens_of(vae: BigLearnVAE, images: Tensor | ImageSet, most: int = MOST_KEPT) -> Tensor | ImageSet:
    """The tokens (N, L, D) of images, on the CPU; the images themselves if the tokens were more than `most` floats.

    So they are made once for all masks: a PatchAE takes longer over an image than the encoder of `case=celeba_small`.
    """
    if len(images) * vae.num_tokens * vae.net.token_dim > most:
        return images
    return torch.cat([vae.tokenizer.encode(x).cpu() for x in parts(images, vae.device, vae.rows)])


def mask_seeds(seed: int, ratio: float, draw: int) -> tuple[int, int]:
    """The seeds of the masks of the training images and of the test images, of one draw at one S-ratio."""
    checks.check_seed(seed)
    train, test = (derive_seed("probe", seed, float(ratio), draw, part) for part in ("train", "test"))
    return train, test


def some(images: ImageSet, count: int | None) -> ImageSet:
    """The first `count` images of a fixed shuffled order, or all; always the same ones, whatever is probed."""
    if count is None or count >= len(images):
        return images
    return images.select(shuffled(len(images), derive_seed("probe", "images"))[:count].sort().values)


def nearest_classes(
    vae: BigLearnVAE, images: Images, S: Tensor, train: ImageSet, neighbours: int = NEIGHBOURS
) -> Tensor:
    """Predict labels by a vote of the nearest training images: classes (N, R), or attributes (N, R, A).

    Nearest is by the observed pixels: codes that predict no better add nothing to the training images. Each neighbour
    has a vote; of classes with equally many votes, the one with the nearer images wins. An attribute is predicted if it
    is more frequent among the neighbours than among all training images, which gives both classes the same weight, as
    `fit` does with balanced=True. Where nothing is observed, the most frequent class is predicted, and no attribute.

    Args:
        images: N images.
        S: R sets of observed patches for each, boolean (N, R, L); what was never recorded (NaN) is not observed.
        train: training images with labels.
        neighbours: at least 1.
        vae: only the size of its images and its grid of patches are used.

    Raises:
        ValueError: if the training images have no labels, or `neighbours` is below 1.
    """
    evaluation.check_given(vae, images, train, needs=evaluation.PATCHES)
    evaluation.check_sets(vae, images, S)
    neighbours, labels = checks.whole_number("neighbours", neighbours, 1), labels_of(train)
    recorded = [masks.recorded_patches(x, vae.grid) for x in parts(images, vae.device)]
    S = S.to(vae.device) & torch.cat(recorded).unsqueeze(1)
    near = evaluation.nearest_positions(vae, images, S, train, neighbours).cpu()
    sets = zip(near.unbind(1), S.any(-1).cpu().unbind(1), strict=True)
    return torch.stack([_majority(labels, positions, seen) for positions, seen in sets], 1)


def nearest_by_codes(train_x: Tensor, train_y: Tensor, test_x: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Predict labels by a vote of the training images with the nearest codes: classes (N,), or attributes (N, A).

    They vote as in `nearest_classes`. If all training codes are the same but for rounding, as where nothing is
    observed, the most frequent class is predicted, and no attribute. Distances are between codes as they are, not in
    units of the learned p(z).

    Args:
        train_x, test_x: codes (M, F) and (N, F) on the CPU.
        train_y: classes (M,) or attributes (M, A).
        neighbours: at least 1.

    Raises:
        ValueError: if `neighbours` is below 1, or there is no training code.
    """
    if isinstance(train_x, Tensor) and train_x.shape[:1] == (0,):
        raise ValueError("expected at least one training code, of which the nearest are looked for, got none")
    _check_features("training", train_x)
    if not (checks.is_numbers(test_x) and test_x.shape == (0, train_x.shape[1])):
        _check_features("test", test_x, train_x.shape[1])
    _check_examples("training", train_x, train_y)
    count = min(checks.whole_number("neighbours", neighbours, 1), len(train_x))
    exact = train_x.double()  # cdist subtracts after multiplying, for which float32 has too few digits
    chunks = (torch.cdist(part.double(), exact) for part in test_x.split(CHUNK))
    near = torch.cat([distances.topk(count, largest=False).indices for distances in chunks])
    differ = ((train_x - train_x[:1]).abs() > ROUNDING).any()
    return _majority(train_y, near, differ.expand(len(test_x)))


def _majority(labels: Tensor, near: Tensor, seen: Tensor) -> Tensor:
    """The vote of the labels at positions (N, k), nearest first; a default where nothing was `seen` (N,)."""
    if labels.ndim == 1:
        classes, y = labels.unique(return_inverse=True)
        count = near.shape[-1]
        vote = count**2 + torch.arange(count, 0, -1)  # what is added decides between equal votes
        votes = vote.new_zeros(len(near), len(classes)).scatter_add_(-1, y[near], vote.expand(near.shape))
        return classes[torch.where(seen.unsqueeze(-1), votes, y.bincount()).argmax(-1)]
    share, everyone = (_share_of_ones(y, dim) for y, dim in ((labels[near], -2), (labels, 0)))
    return ((share > everyone) & seen.unsqueeze(-1)).long()


def _share_of_ones(labels: Tensor, dim: int) -> Tensor:
    """The share of ones among known labels; 0 where none is known."""
    return (labels == 1).sum(dim) / (labels >= 0).sum(dim).clamp(min=1)


@dataclass(frozen=True)
class Score:
    """How well labels are predicted.

    Attributes:
        value: accuracy of classes, or the mean of `attributes`, in [0, 1].
        attributes: balanced accuracy of each attribute, the mean of the two classes' recalls; None for an attribute
            that lacks a class among the training images or the test images. For classes, the whole is None.
        unconverged: number of classifiers whose solver stopped before it converged.
    """

    value: float
    attributes: tuple[float | None, ...] | None = None
    unconverged: int = 0


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """What `fit` gives: scikit-learn's pipeline, and whether its solver converged."""

    pipeline: Any
    converged: bool

    def predict(self, x: Tensor) -> Tensor:
        """The classes (N,) of features (N, F)."""
        return torch.from_numpy(self.pipeline.predict(_array(x)))


def fit(x: Tensor, y: Tensor, balanced: bool = False) -> LinearClassifier:
    """Multinomial logistic regression (scikit-learn's, with L-BFGS) on standardised features.

    Features are standardised with their own mean and standard deviation, which go with the classifier; the penalty is
    |w|^2 / (2 C) with C = `LOGIT_VARIANCE` / F, against the sum of the losses.

    Args:
        x: (N, F)
        y: classes (N,), at least two of them.
        balanced: give all classes the same weight, however many examples each has.

    Raises:
        ValueError: on features or classes of other shapes or types, or features that are not finite.
    """
    _check_features("training", x)
    _check_examples("training", x, y)
    if y.ndim != 1 or len(y.unique()) < 2:
        raise ValueError(f"expected classes (N,), at least two of them, got {checks.described(y)}")
    return _fitted(x, y, balanced)


def _fitted(x: Tensor, y: Tensor, balanced: bool = False) -> LinearClassifier:
    """`fit` of what was checked."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    weight = "balanced" if balanced else None
    solver = LogisticRegression(C=LOGIT_VARIANCE / x.shape[1], max_iter=MAX_ITER, class_weight=weight)
    # One thread: its products are small, and more threads wait for each other longer than they compute.
    with (
        threadpool_limits(1),
        warnings.catch_warnings(record=True, action="always", category=ConvergenceWarning) as caught,
    ):
        pipeline = make_pipeline(StandardScaler(), solver).fit(_array(x), _array(y))
    return LinearClassifier(pipeline, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught))


def _array(x: Tensor) -> np.ndarray:
    """Numbers as NumPy takes them, which has no bfloat16."""
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()


def fit_and_score(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Score:
    """Train a linear classifier on features and labels, and test it on others.

    Args:
        train_x, test_x: features (N, F) on the CPU.
        train_y, test_y: classes (N,), for one classifier, scored by its accuracy; or attributes (N, A) of 1, 0 or -1
            (not known), for one classifier each, on the images for which the attribute is known. These give both
            classes the same weight, as balanced accuracy does: otherwise a rare attribute would never be predicted.

    Raises:
        ValueError: on features or labels of other shapes or values, on training images of a single class, and if no
            attribute has both classes among the training images and among the test images.
    """
    _check(train_x, train_y, test_x, test_y)
    if train_y.ndim == 1:
        classifier = _fitted(train_x, train_y)
        return _score(classifier.predict(test_x), train_y, test_y, int(not classifier.converged))
    predicted, unconverged = torch.zeros_like(test_y), 0
    for column in _scored_attributes(train_y, test_y):
        known = train_y[:, column] >= 0
        classifier = _fitted(train_x[known], train_y[known, column], balanced=True)
        predicted[:, column] = classifier.predict(test_x)
        unconverged += not classifier.converged
    return _score(predicted, train_y, test_y, unconverged)


def _score(predicted: Tensor, train_y: Tensor, test_y: Tensor, unconverged: int = 0) -> Score:
    """The score of predictions like test_y."""
    if test_y.ndim == 1:
        return Score((predicted == test_y).double().mean().item(), None, unconverged)
    values: list[float | None] = [None] * test_y.shape[1]
    for column in _scored_attributes(train_y, test_y):
        values[column] = _balanced_accuracy(predicted[:, column], test_y[:, column])
    return Score(statistics.fmean(value for value in values if value is not None), tuple(values), unconverged)


def _balanced_accuracy(predicted: Tensor, y: Tensor) -> float:
    """The mean of the recalls of the classes 0 and 1, neither of which may be absent from y; others are unknown."""
    return statistics.fmean((predicted[y == label] == label).double().mean().item() for label in (0, 1))


def _scored_attributes(train_y: Tensor, test_y: Tensor) -> list[int]:
    """Which attributes of (N, A) have both classes among the training images and among the test images."""
    both = [(y == 0).any(0) & (y == 1).any(0) for y in (train_y, test_y)]
    return (both[0] & both[1]).nonzero().flatten().tolist()


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    _check_features("training", train_x)
    _check_features("test", test_x, train_x.shape[1])
    for name, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        _check_examples(name, x, y)
    _check_labels(train_y, test_y)


def _check_features(name: str, x: Any, count: int | None = None) -> None:
    """Raise a ValueError unless these are finite features (N, F), and so many."""
    if not checks.is_numbers(x):
        raise ValueError(f"expected {name} features as numbers, got {checks.described(x)}")
    if x.ndim != 2 or not x.numel() or count not in (None, x.shape[1]):
        raise ValueError(
            f"expected {name} features of shape (N, F), N at least 1 and F that of training, got {tuple(x.shape)}"
        )
    if not x.isfinite().all():
        raise ValueError(f"expected finite {name} features, got NaN or infinity")


def _check_examples(name: str, x: Tensor, y: Any) -> None:
    """Raise a ValueError unless y are labels of the features x (N, F)."""
    whole = isinstance(y, Tensor) and not y.is_complex() and (not y.is_floating_point() or bool((y == y.round()).all()))
    if not whole or y.ndim not in (1, 2):
        raise ValueError(f"expected {name} labels as whole numbers, (N,) or (N, A), got {checks.described(y)}")
    if len(y) != len(x):
        raise ValueError(f"expected a label for each of the {len(x)} {name} images, got {len(y)}")


def _check_labels(train_y: Tensor, test_y: Tensor) -> None:
    if train_y.ndim not in (1, 2) or train_y.shape[1:] != test_y.shape[1:]:
        raise ValueError(
            "expected labels of shape (N,), classes, or (N, A), attributes, of training and test alike, "
            f"got {tuple(train_y.shape)} and {tuple(test_y.shape)}"
        )
    if train_y.ndim == 1 and len(train_y.unique()) < 2:
        raise ValueError("expected at least two classes among the training images, got one: take more images")
    if train_y.ndim == 2:
        values = torch.cat([train_y, test_y]).unique().tolist()
        if not set(values) <= {-1, 0, 1}:
            raise ValueError(f"expected attributes of 1, 0 and -1 (not known), got the values {values[:5]}")
        if not _scored_attributes(train_y, test_y):
            raise ValueError(
                "no attribute has both classes among the training images and among the test images: take more images"
            )


def labels_of(images: ImageSet, what: str = "training") -> Tensor:
    """The labels of a set, on the CPU.

    Raises:
        ValueError: if it has none.
    """
    labels = getattr(images, "labels", None)
    if labels is None:
        raise ValueError(
            f"the {what} images have no labels, which linear probing needs: take data that has them, such as digits, "
            "mnist, fashion_mnist, image_folder with a subfolder for each class, or array_file with labels, or "
            "train_labels and so on"
        )
    return labels.cpu()


class LabelledViT(nn.Module):
    """The ceiling: logits of the labels, a linear layer on the mean of p(z | x_S).

    Args:
        net: a network of `models`.
        labels: those of the training images, classes (N,) or attributes (N, A).
    """

    net: Any
    classes: Tensor | None

    def __init__(self, net: nn.Module, labels: Tensor):
        super().__init__()
        self.net, self.fixed_shapes = net, getattr(net, "fixed_shapes", True)  # what a Trainer asks
        self.register_buffer("classes", labels.unique() if labels.ndim == 1 else None)
        self.head = nn.Linear(self.net.z_dim, labels.shape[1] if self.classes is None else len(self.classes))
        nn.init.zeros_(self.head.weight)  # so that it depends on no random numbers
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, S: Tensor) -> Tensor:
        """Logits, (B, number of classes) or (B, A), given tokens x (B, L, D) where S (B, L) is True."""
        return self.head(self.net(masks.seen(x, S), S).mean)

    @torch.no_grad()
    def predict(self, x: Tensor, S: Tensor) -> Tensor:
        """The likeliest classes (B,), or attributes (B, A)."""
        logits = self(x, S)
        return (logits > 0).long() if self.classes is None else self.classes[logits.argmax(-1)]


@dataclass(frozen=True, eq=False)
class LabelLossParts:
    """The loss of a batch, a scalar."""

    loss: Tensor

    def scalars(self) -> dict[str, Tensor]:
        """By name."""
        return {"loss": self.loss}


class LabelLoss:
    """Cross-entropy of the labels given x_S, with the S-ratio from Beta(1, 1) for each image.

    Attributes are weighted as `fit` does with balanced=True; where one is not known it does not count.

    Args:
        labels: those of the training images, classes (N,) or attributes (N, A).
    """

    def __init__(self, labels: Tensor):
        self.weight = None
        if labels.ndim == 2:
            count = torch.stack([(labels == label).sum(0) for label in (0, 1)], dim=-1)  # (A, 2)
            self.weight = count.sum(-1, keepdim=True) / (2 * count.clamp(min=1))

    def __call__(
        self, net: nn.Module, batch: tuple[Tensor, Tensor], *, random: StepRandom, step: int | Tensor | None = None
    ) -> LabelLossParts:
        """The loss of tokens (B, L, D) with classes (B,), from 0 on, or attributes (B, A)."""
        x, y = batch
        recorded = masks.recorded(x)
        ratio, order = random.rows(len(x), lambda rows, generator: _draw(rows, x.shape[1], generator))
        logits = net(x, _uniform_masks(ratio, order, recorded))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # in bfloat16 weights would be rounded
        if self.weight is None:
            return LabelLossParts(F.cross_entropy(logits, y))
        known = (y >= 0).to(logits.dtype)
        target = (y == 1).to(logits.dtype)
        self.weight = self.weight.to(logits)  # kept: a copy at each step would make a GPU wait
        weight = known * torch.where(y == 1, self.weight[:, 1], self.weight[:, 0])
        loss = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
        return LabelLossParts(loss / known.sum().clamp(min=1))


def _draw(rows: int, num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The random numbers behind S, uniform in [0, 1): S-ratios (rows, 1) and an order (rows, L)."""
    ratio, order = (masks.uniform_numbers((rows, count), generator) for count in (1, num_tokens))
    return ratio, order


def _uniform_masks(ratio: Tensor, order: Tensor, recorded: Tensor) -> Tensor:
    """S (B, L) from what `_draw` gave, among the patches that were recorded: |S| is uniform from 0 to all of them.

    `MaskSampler` never observes everything, since it leaves something to ask for.
    """
    count = recorded.sum(-1, keepdim=True)
    return masks.rank_among(recorded, order) < (ratio * (count + 1)).floor().minimum(count)


class LabelledBatches:
    """batches(step): tokens (B, L, D) of a step, in the order of `Batches`, and the targets of `LabelLoss`.

    Args:
        images: the set, with labels.
        vae: for its tokenizer and device.
    """

    batch_size = BATCH_SIZE

    def __init__(self, images: ImageSet, vae: BigLearnVAE, seed: int = 0):
        labels = labels_of(images)
        world = World(device=vae.device)
        self._batches = Batches(images, self.batch_size, seed, world, transform=vae.tokenizer.encode)
        targets = labels.unique(return_inverse=True)[1] if labels.ndim == 1 else labels
        self._targets = targets.to(images.device)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        x = self._batches(step)
        return x, self._targets[self._batches.positions(step)].to(x.device)


def train_ceiling(
    net: nn.Module,
    vae: BigLearnVAE,
    train: ImageSet,
    optim: Optim,
    steps: int,
    seed: int = 0,
    loggers: Iterable[Logger] = (),
) -> LabelledViT:
    """Train a network with labels on masked images: what its architecture reaches in so many steps, for `linear_probe`.

    Args:
        net: a network with fresh weights, which are trained, in batches of 128.
        vae: for its tokenizer and device.
        train: training images with labels.
        optim: its warm-up takes at most a fifth of the steps, and weights are not averaged.

    Raises:
        ValueError: if there are no labels.
        KeyboardInterrupt: if Ctrl-C or SIGTERM ended the training early.
    """
    labels = labels_of(train)
    labelled = LabelledViT(net, labels).to(vae.device)
    trainer = Trainer(
        labelled,
        LabelLoss(labels),
        LabelledBatches(train.resident(vae.device), vae, seed),
        replace(optim, warmup_steps=min(optim.warmup_steps, steps // 5), ema_decay=0.0),
        steps=steps,
        seed=seed,
        world=World(device=vae.device),
        precision="auto",
    )
    trainer.fit(loggers)
    return labelled.eval()


def linear_probe(
    vae: BigLearnVAE,
    train: ImageSet,
    test: ImageSet,
    ratios: Sequence[float] = RATIOS,
    draws: int = 3,
    seed: int = 0,
    raw: bool | None = None,
    ceiling: LabelledViT | None = None,
    neighbours: int | None = None,
) -> dict[str, Any]:
    """Score of a linear classifier on the codes of incomplete images, by the share of patches observed.

    For each S-ratio and each draw of masks a new classifier is trained on the training images under random masks and
    tested on the test images under others (`mask_seeds`).

    Args:
        train, test: images with labels, classes (N,) or attributes (N, A); see `fit_and_score`.
        ratios: S-ratios in [0, 1].
        draws: how often masks are drawn.
        raw: whether the same is done with raw pixels, the floor; by default for images of up to `RAW_NUMBERS` numbers,
            since with larger ones it would take hours and much memory.
        ceiling: a network trained with labels (`train_ceiling`), to be tested under the same masks.
        neighbours: how many training images vote, those nearest by code (`nearest_by_codes`) and, as another floor,
            those nearest over the observed pixels (`nearest_classes`); 0 leaves both out. By default it is
            `NEIGHBOURS`, and over pixels only if raw pixels are probed.

    Returns:
        metric: "accuracy" or "balanced accuracy".
        neighbours: how many vote.
        codes, and nearest_codes, pixels, ceiling and nearest if asked for: by S-ratio the `mean` of the score over the
            draws, its standard deviation `std` (None for a single draw), the score of each of the `draws`, how many
            classifiers were `unconverged`, and for labels that are attributes the mean of each of the `attributes`.

    Raises:
        ValueError: if there are no labels or they cannot be used, and for ratios or draws outside these.
    """
    from tqdm import tqdm

    train_y, test_y = labels_of(train), labels_of(test, "test")
    _check_labels(train_y, test_y)
    draws = _checked_draws(draws, ratios)
    raw, votes, votes_over_pixels = _floors(vae, raw, neighbours, len(train), ceiling)
    costly = isinstance(vae.tokenizer, PatchAE)  # plain patches are cut in no time, and travel to a GPU as bytes
    coded = tuple(tokens_of(vae, images) if costly else images for images in (train, test))
    plain = _without_equal_channels(train, test) if raw or votes_over_pixels else (train, test)
    inputs: dict[str, Any] = {"codes": (features, coded)} | ({"pixels": (pixels, plain)} if raw else {})
    result: dict[str, Any] = {}
    for ratio in tqdm(ratios, desc="probing", unit="ratio", leave=False, disable=None):
        drawn = []
        for seeds in (mask_seeds(seed, ratio, draw) for draw in range(draws)):
            drawn.append(_scores_of_draw(vae, inputs, (train_y, test_y), ratio, seeds, votes))
            if ceiling is not None:
                predicted = _ceiling_classes(ceiling, vae, coded[1], ratio, seeds[1])
                drawn[-1]["ceiling"] = _score(predicted, train_y, test_y)
        for name in drawn[0]:
            result.setdefault(name, {})[ratio] = _over_draws([scores[name] for scores in drawn])
    if votes_over_pixels:
        result["nearest"] = _nearest_scores(vae, *plain, ratios, draws, seed, votes_over_pixels)
    return {"metric": "accuracy" if test_y.ndim == 1 else "balanced accuracy", "neighbours": votes} | result


def _checked_draws(draws: int, ratios: Sequence[float]) -> int:
    """How often masks are drawn; a ValueError also if ratios are not a list or tuple of at least one."""
    if not isinstance(ratios, list | tuple) or not ratios:
        raise ValueError(f"ratios must be S-ratios in [0, 1], in a list of at least one, got {ratios!r}")
    for ratio in ratios:
        checks.real_number("ratio", ratio, "[0, 1]")
    return checks.whole_number("draws", draws, 1)


def _scores_of_draw(
    vae: BigLearnVAE,
    inputs: dict[str, tuple[Callable[..., Tensor], Sequence[Any]]],
    labels: tuple[Tensor, Tensor],
    ratio: float,
    seeds: tuple[int, int],
    votes: int,
) -> dict[str, Score]:
    """The scores of linear classifiers on all inputs, and of that many nearest codes, under the masks of a draw.

    Args:
        inputs: by name, what makes features of images, and the training and test images.
        labels: those of the training and of the test images.
    """
    train_y, test_y = labels
    scores = {}
    for name, (of, both) in inputs.items():
        train_x, test_x = (of(vae, images, ratio, seed) for images, seed in zip(both, seeds, strict=True))
        scores[name] = fit_and_score(train_x, train_y, test_x, test_y)
        if name == "codes" and votes:
            predicted = nearest_by_codes(train_x, train_y, test_x, votes)
            scores["nearest_codes"] = _score(predicted, train_y, test_y)
    return scores


def _ceiling_classes(ceiling: LabelledViT, vae: BigLearnVAE, images: Images, ratio: float, seed: int) -> Tensor:
    """The labels that a network trained with labels predicts for images under masks."""
    return torch.cat([ceiling.predict(_tokens(vae, x), S).cpu() for x, S in _observed(vae, images, ratio, seed)])


def _floors(
    vae: BigLearnVAE, raw: bool | None, neighbours: int | None, images: int, ceiling: Any
) -> tuple[bool, int, int]:
    """Whether raw pixels are probed, how many neighbours vote by codes, and how many over pixels.

    Codes are compared in no time, images over the pixels of each mask are not.
    """
    check_model(vae)
    if not (ceiling is None or hasattr(ceiling, "predict")):
        raise ValueError(f"expected a network of train_ceiling as ceiling, got {type(ceiling).__name__}")
    raw = math.prod(vae.image_shape) <= RAW_NUMBERS if raw is None else raw
    votes = min(NEIGHBOURS if neighbours is None else checks.whole_number("neighbours", neighbours, 0), images)
    return raw, votes, votes if raw or neighbours is not None else 0


def _nearest_scores(
    vae: BigLearnVAE, train: ImageSet, test: ImageSet, ratios: Sequence[float], draws: int, seed: int, neighbours: int
) -> dict[float, dict[str, Any]]:
    """The scores of `nearest_classes` by S-ratio, under the same masks of test images as all else."""
    asked = [(ratio, mask_seeds(seed, ratio, draw)[1]) for ratio in ratios for draw in range(draws)]
    recorded = _recorded(vae, test)
    S = torch.stack([masks.random(len(test), vae.num_tokens, ratio, own, recorded) for ratio, own in asked], 1)
    predicted, train_y, test_y = nearest_classes(vae, test, S, train, neighbours), labels_of(train), labels_of(test)
    scores = [_score(one, train_y, test_y) for one in predicted.unbind(1)]
    return {ratio: _over_draws(scores[k * draws : (k + 1) * draws]) for k, ratio in enumerate(ratios)}


def _without_equal_channels(train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """The same sets, with one channel if those of each image are equal, as MNIST's are.

    A linear classifier reads the same from it, since the penalty of `fit` counts features, in less than half the time;
    and the same images are nearest.
    """
    chunks = (chunk for images in (train, test) for chunk in images.pixels.split(CHUNK))
    if not all(torch.equal(chunk, chunk[:, :1].expand_as(chunk)) for chunk in chunks):
        return train, test
    return replace(train, pixels=train.pixels[:, :1]), replace(test, pixels=test.pixels[:, :1])


def _over_draws(scores: Sequence[Score]) -> dict[str, Any]:
    values = [score.value for score in scores]
    result: dict[str, Any] = {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "draws": values,
        "unconverged": sum(score.unconverged for score in scores),
    }
    if scores[0].attributes is not None:
        columns = zip(*(score.attributes or () for score in scores), strict=True)
        result["attributes"] = [None if None in column else statistics.fmean(column) for column in columns]
    return result


def table(result: dict[str, Any]) -> str:
    """The numbers of a probe as lines of text, and which classifiers did not converge."""
    words = {
        "codes": "codes, the mean of p(z | x_S)",
        "nearest_codes": f"the {result['settings'].get('neighbours')} nearest codes",
        "pixels": "raw pixels, zero where hidden",
        "nearest": f"the {result['settings'].get('neighbours')} nearest training images",
        "ceiling": "the same network, trained with all labels",
    }
    draws = result["settings"]["draws"]
    lines = [
        f"{result['metric']} in % on {result['test_images']:,} {result['settings']['split']} images, "
        f"{result['train_images']:,} to train, mean and standard deviation over {draws} draws of masks",
        f"  {'share of patches observed':<40}" + "".join(f"{float(ratio):>12g}" for ratio in result["codes"]),
    ]
    for name in (name for name in words if name in result):
        cells = (_percent(numbers["mean"], numbers["std"]) for numbers in result[name].values())
        lines.append(f"  {words[name]:<40}" + "".join(f"{cell:>12}" for cell in cells))
    for name in (name for name in words if name in result):
        if left := {ratio: n["unconverged"] for ratio, n in result[name].items() if n["unconverged"]}:
            at = ", ".join(f"{count} at {float(ratio):g}" for ratio, count in left.items())
            limit = result["settings"]["max_iter"]
            lines.append(f"note: classifiers on {name} whose solver stopped before it converged ({limit} steps): {at}")
    return "\n".join(lines)


def _percent(mean: float, std: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")
