"""How fast a training step is: a plain version, this library's with one measure after the other, and the limit.

All stages take the same step of the same network on the same kind of images. They are measured in turn, again and
again, in one process, so that a machine that slows down or speeds up does so for all of them. To add a stage, add a
line to `MEASURES`, and do what it says in `LoopStep`, `trainer_of` or wherever `measures` goes.

B batch, L tokens, D token dimension, d embedding dimension, Z latent dimension, r MLP ratio.
"""

import copy
import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biglearn_vae import checks, cuda_graph, data
from biglearn_vae.data import Batches, ImageSet
from biglearn_vae.distributed import StepRandom, World, cores, synchronize
from biglearn_vae.losses import BigLearnELBO
from biglearn_vae.masks import MaskSampler
from biglearn_vae.models import MaskedViT
from biglearn_vae.optim import Optim, optimizers_of
from biglearn_vae.trainer import Trainer

# What a stage changes. Each stage has its own measure and all of those above it.
MEASURES = {
    "resident": "images as uint8 on the device, masks and noise made there, no DataLoader",
    "one_pass": "both encodings in one pass of twice the batch",
    "code_only": "the last block of an encoding works for the code alone",
    "fused": "fused optimizer, nothing waited for: the step of trainer.Trainer, in float32",
    "bfloat16": "matrix products in bfloat16",
    "drop": "tokens that carry nothing are left out (model.hidden=drop: another function of the data)",
    "compile": "torch.compile",
    "cuda_graph": "the whole step as one CUDA graph",
}
PLAIN = "three float32 passes, a DataLoader, masks image by image, unfused AdamW, .item() each step"
STAGES = ("plain", *MEASURES)
SOURCES = {"digits": 8, "mnist": 28, "fashion_mnist": 28}  # side in pixels of the grey images before they are resized
STAND_INS = {"mnist": 10_000, "fashion_mnist": 10_000, "celeba": 1_000}  # how many random images may stand for them
SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # sides of the matrices among which the limit is looked for
STEPS = {"cpu": 5, "cuda": 50}
LOADER_WORKERS = 8  # of the plain version beside a GPU, at most


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often. Arguments: see configs/benchmark.yaml.

    Raises:
        ValueError: on an unknown stage, a count below 1, or a file in a folder that does not exist.
    """

    repeats: int = 5
    steps: int | None = None
    warmup: int = 2
    stages: list[str] | str | None = None
    compile: bool | None = None
    workers: int | None = None
    json: str | None = None
    evaluations: int | None = None
    test_images: int = 1000

    def __post_init__(self):
        for name in ("repeats", "steps", "warmup", "evaluations", "test_images"):
            value = getattr(self, name)
            if value is not None:
                checks.whole_number(name, value, 1)
        if self.workers is not None:
            checks.whole_number("workers", self.workers, 0)
        if self.compile not in (None, True, False):
            raise ValueError(f"compile must be true, false or null, got {self.compile!r}")
        unknown = set(self.asked) - set(STAGES)
        if unknown or (self.stages is not None and not self.asked):
            raise ValueError(f"stages must be some of {', '.join(STAGES)}, got {', '.join(self.asked) or 'none'}")
        if self.file and (self.file.is_dir() or not self.file.parent.is_dir()):
            raise ValueError(f"json must be a file in a folder that exists, got {self.json}")
        if self.evaluations is not None and self.steps is not None:
            raise ValueError("steps counts those of single measurements: with evaluations give trainer.steps")
        file, picture = self.file, self.picture
        if self.evaluations is not None and file and picture and (file.suffix != ".json" or picture.is_dir()):
            raise ValueError(f"json must end in .json, for the plot to be a .png beside it, got {self.json}")

    def loader_workers(self, device: str) -> int:
        """Processes of the plain version's DataLoader: some for a GPU, as is usual there, else none."""
        if self.workers is not None:
            return self.workers
        return min(LOADER_WORKERS, cores() - 1) if device == "cuda" else 0

    @property
    def file(self) -> Path | None:
        """Where to write what was measured."""
        return None if self.json is None else Path(self.json).expanduser()

    @property
    def picture(self) -> Path | None:
        """Where to draw what was measured."""
        return self.file and self.file.with_suffix(".png")

    @property
    def asked(self) -> list[str]:
        """The stages that were named."""
        return [self.stages] if isinstance(self.stages, str) else list(self.stages or [])

    def chosen(self, precision: str, device: str, hidden: str = "mask") -> dict[str, frozenset[str]]:
        """The stages to measure, each with its measures.

        Without names these are all that training in this precision on this kind of device ("cpu", "cuda") goes through.
        A measure that training does not use (bfloat16, leaving out hidden tokens, ...) is in no stage, unless its own
        is named. Whole trainings are those of the first and the last stage, unless others are named.

        Raises:
            ValueError: if hidden tokens are left out in a stage that is compiled or a CUDA graph.
        """
        able = device == "cuda" and hidden == "mask"
        used = {"bfloat16": precision == "bfloat16", "drop": hidden == "drop"}
        used |= {"compile": able if self.compile is None else self.compile, "cuda_graph": able}
        names = self.asked or [name for name in STAGES if used.get(name, True)]
        if self.evaluations is not None and not self.asked:
            names = [names[0], names[-1]]
        in_force = [name for name in MEASURES if used.get(name, True) or name in names]
        if "drop" in in_force and {"compile", "cuda_graph"} & {*names}:
            raise ValueError(
                "hidden=drop has other shapes at every step, so it is not compiled and no CUDA graph: leave out one or "
                "the other"
            )
        return {
            name: frozenset(m for m in in_force if STAGES.index(m) <= STAGES.index(name))
            for name in STAGES
            if name in names
        }


@dataclass(frozen=True, eq=False)
class Work:
    """The training whose step is measured.

    Attributes:
        net: fresh weights, on the device; each stage trains a copy.
        loss, optim, batch_size, precision, seed: of the training; `total` steps make its schedule.
        images: the training images as the network sees them.
        sources: the same as they come, uint8 (N, 1 or 3, height, width) of any size.
        encode: images (B, C, H, W) -> tokens (B, L, D).
        note: what the images are.
        workers: processes of the plain version's DataLoader.

    Raises:
        ValueError: if the batch size is not from 1 to the number of images, or there is no step.
    """

    net: MaskedViT
    loss: BigLearnELBO
    optim: Optim
    images: ImageSet
    sources: Tensor
    encode: Callable[[Tensor], Tensor]
    batch_size: int
    precision: str = "float32"
    total: int = 1000
    seed: int = 0
    note: str = ""
    workers: int = 0

    def __post_init__(self):
        checks.whole_number("trainer.steps", self.total, 1)
        if not 1 <= self.batch_size <= len(self.images):
            raise ValueError(
                f"trainer.batch_size must be from 1 to {len(self.images)}, the number of training images, "
                f"got {self.batch_size}"
            )

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def world(self) -> World:
        return World(device=self.device)

    def masks(self, step: int) -> tuple[Tensor, Tensor]:
        """S and T (B, L) that this step of training draws."""
        generator = StepRandom.at(self.seed, step, self.world).generator
        return self.loss.masks(self.batch_size, self.net.num_tokens, generator)


def load_images(settings: dict[str, Any], batch_size: int, stand_ins: bool = True) -> tuple[ImageSet, Tensor, str]:
    """The training images of these settings of `data.load`, the same before they were resized, and what they are.

    With `stand_ins`, random images of the same shapes stand in for those of `STAND_INS` that are not available.
    """
    name = settings["name"]
    try:
        images = data.load(**settings).train
        if name in SOURCES:
            sources = data.load(**settings | {"image_size": SOURCES[name], "channels": 1}).train.pixels
        else:
            sources = images.pixels
        return images, sources, f"{len(images):,} images of {getattr(settings.get('target'), '__name__', name)}"
    except ValueError:
        if name not in STAND_INS or not stand_ins:
            raise
    count, size = max(STAND_INS[name], batch_size), checks.height_and_width("data.image_size", settings["image_size"])
    noise = torch.randint(256, (count, 1, *size), dtype=torch.uint8)
    images = ImageSet(noise.expand(-1, settings["channels"], -1, -1))
    sources = images.pixels
    if name in SOURCES:
        sources = torch.randint(256, (count, 1, SOURCES[name], SOURCES[name]), dtype=torch.uint8)
    return images, sources, f"random images ({name} is not here)"


# ---- The plain version -----------------------------------------------------------------------------------------------


class PictureFolder(torch.utils.data.Dataset):
    """Images one by one, PIL images that the usual transforms make tensors (C, H, W) of, as torchvision's sets do."""

    def __init__(self, sources: Tensor, shape: Sequence[int]):
        from torchvision import transforms

        channels, height, width = shape
        self.sources = sources
        self.transform = transforms.Compose(
            [transforms.Resize((height, width)), transforms.Grayscale(channels), transforms.ToTensor()]
            if sources.shape[1] == 1
            else [transforms.Resize((height, width)), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        source = self.sources[index]
        array = source[0] if len(source) == 1 else source.permute(1, 2, 0)
        return self.transform(Image.fromarray(array.numpy()))


def loader_draws(work: Work) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Tokens (B, L, D), S and T (B, L), and noise (B, Z) of each step, as the plain version makes them."""
    loader = torch.utils.data.DataLoader(
        PictureFolder(work.sources, work.images.pixels.shape[1:]),
        work.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=work.workers,
        persistent_workers=work.workers > 0,
        pin_memory=work.device.type == "cuda",
        generator=torch.Generator().manual_seed(work.seed),
    )
    numbers = random.Random(work.seed)
    q: Any = work.loss.masks  # a MaskSampler, of which the settings are taken
    while True:
        for images in loader:
            x = work.encode(images.to(work.device, non_blocking=True))
            S, T = masks_one_by_one(q, len(x), x.shape[1], numbers)
            noise = torch.randn(len(x), work.net.z_dim, dtype=x.dtype, device=work.device)
            yield x, S.to(work.device), T.to(work.device), noise


def masks_one_by_one(q: MaskSampler, batch: int, tokens: int, numbers: random.Random) -> tuple[Tensor, Tensor]:
    """S and T (B, L) of `q`, drawn image by image on the CPU."""
    S, T = torch.zeros(batch, tokens, dtype=torch.bool), torch.zeros(batch, tokens, dtype=torch.bool)
    for row in range(batch):
        if row == 0 or q.ratios_per == "sample":
            joint = numbers.random() < q.joint
            s_ratio = 0.0 if joint else numbers.betavariate(*q.s_ratio)
            t_ratio = 1.0 if joint else numbers.betavariate(*q.t_ratio)
        s = min(int(s_ratio * tokens), tokens - 1)
        t = max(1, math.ceil(t_ratio * (tokens - s)))
        order = torch.randperm(tokens)
        S[row, order[:s]] = True
        T[row, order[s : s + t]] = True
    return S, T


def three_passes(
    net: nn.Module, loss: BigLearnELBO, x: Tensor, S: Tensor, T: Tensor, noise: Tensor, step: int
) -> dict[str, Tensor]:
    """The objective as it is written (Eq. 6, 7): encode x_{S u T}, encode x_S, decode. Batch means by name."""
    q = net(x, S | T)
    p = net(x, S) if loss.prior == "learned" else None
    mean = net(x, S, q.mean + q.std * noise, T)  # (B, L, D)
    reconstruction = (-0.5 * (x - mean).square().sum(-1) * T).sum(-1).mean()
    kl = q.kl(p).mean()
    elbo = reconstruction - loss.weight(step) * kl
    return {"loss": -elbo, "elbo": elbo, "reconstruction": reconstruction, "kl": kl}


# ---- The stages ------------------------------------------------------------------------------------------------------


def resident_draws(work: Work) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The same as `loader_draws` gives, drawn on the device as training draws it."""
    batches, step = resident(work), 0
    while True:
        x, numbers = batches(step), StepRandom.at(work.seed, step, work.world)
        S, T = work.loss.masks(len(x), x.shape[1], numbers.generator)
        yield x, S, T, numbers.normal((len(x), work.net.z_dim), x.dtype)
        step += 1


def resident(work: Work) -> Batches:
    return Batches(work.images.to(work.device), work.batch_size, work.seed, work.world, transform=work.encode)


def network_of(work: Work, measures: frozenset[str]) -> MaskedViT:
    """A fresh copy of the network that does what these measures say."""
    net = copy.deepcopy(work.net)
    net.hidden = "drop" if "drop" in measures else "mask"
    for block in () if "code_only" in measures else net.encoder:
        block.register_forward_pre_hook(_all_queries, with_kwargs=True)
    return net


def _all_queries(_, args, kwargs):
    return args, {name: value for name, value in kwargs.items() if name != "queries"}


class LoopStep:
    """A training step as one would write it from the paper, improved by `measures`; call it to take one."""

    def __init__(self, work: Work, measures: frozenset[str] = frozenset()):
        self.work, self.measures, self.step = work, measures, 0
        self.net = network_of(work, measures)
        self.average = copy.deepcopy(self.net).requires_grad_(False) if work.optim.ema_decay else None
        self.optimizers = optimizers_of(work.optim, self.net, fused=False)
        self.draws = self._from_the_start()
        self.logged: dict[str, float] = {}

    def _from_the_start(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        return resident_draws(self.work) if "resident" in self.measures else loader_draws(self.work)

    def warm_up(self) -> None:
        """Take a step, for which torch loads what it needs, and start again."""
        self()
        start_peak(self.work.device)
        _start_again(self.work, filter(None, (self.net, self.average)), self.optimizers)
        self.step, self.draws = 0, self._from_the_start()

    def __call__(self) -> None:
        self.net.train()
        self.work.optim.set_rates(self.optimizers, self.work.optim.share_at(self.step, self.work.total))
        parts = self.objective(*next(self.draws))
        self.net.zero_grad()
        parts["loss"].backward()
        parts["grad_norm"] = nn.utils.clip_grad_norm_(self.net.parameters(), self.work.optim.clip_norm or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
        self.update_average()
        self.logged = {name: value.item() for name, value in parts.items()}
        self.step += 1

    def objective(self, x: Tensor, S: Tensor, T: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Batch means by name, of which "loss" is minimised."""
        if "one_pass" in self.measures:
            return self.work.loss(self.net, x, S, T, noise, step=self.step).scalars()
        return three_passes(self.net, self.work.loss, x, S, T, noise, self.step)

    @property
    def result(self) -> MaskedViT:
        """The network to evaluate, as `Trainer.result`."""
        return self.net if self.average is None else self.average

    @torch.no_grad()
    def update_average(self) -> None:
        if self.average is None:
            return
        decay = self.work.optim.ema_decay_at(self.step)
        for mean, new in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(new, 1 - decay)


def trainer_of(work: Work, measures: frozenset[str]) -> Trainer:
    """The Trainer of this training: its step is what `scripts/train.py` does."""
    return Trainer(
        network_of(work, measures),
        work.loss,
        resident(work),
        work.optim,
        steps=work.total,
        seed=work.seed,
        world=work.world,
        precision=precision_of(measures),
        compile="compile" in measures,
        cuda_graph="cuda_graph" in measures,
    )


class TrainerStep:
    """A training step of `trainer.Trainer`; call it to take one."""

    def __init__(self, work: Work, measures: frozenset[str]):
        self.work, self.trainer = work, trainer_of(work, measures)
        self.net = self.trainer.net

    def warm_up(self) -> None:
        """Take the steps in which the network is compiled and the CUDA graph recorded, if any, and start again.

        The recording is what allocates a graph's memory: the peak of that (`read_peak`) is left to be read.
        """
        trainer = self.trainer
        for _ in range(cuda_graph.FIRST if trainer.on_graph else 1):
            self()
        start_peak(self.work.device)
        if trainer.on_graph:
            self()
        _start_again(self.work, filter(None, (self.net, trainer.average)), trainer.optimizers)
        trainer.step, trainer.seconds, trainer._pending, trainer._reported = 0, 0.0, [], (0, 0.0)

    @property
    def result(self) -> nn.Module:
        """The network to evaluate."""
        return self.trainer.result

    def __call__(self) -> None:
        self.trainer._train_step()
        if self.trainer.step % self.trainer.every["report"] == 0:
            self.trainer._report()  # which is part of training, and sees whether the loss is finite


def _start_again(work: Work, nets: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Give networks the weights that the training starts from, and forget moments; all stays where it is."""
    with torch.no_grad():
        for net in nets:
            for weight, first in zip(net.parameters(), work.net.parameters(), strict=True):
                weight.copy_(first)
        for optimizer in optimizers:
            for moments in optimizer.state.values():
                torch._foreach_zero_(list(moments.values()))


def step_of(work: Work, measures: frozenset[str]) -> LoopStep | TrainerStep:
    """The training step with these measures, on a fresh copy of the network."""
    return (TrainerStep if "fused" in measures else LoopStep)(work, measures)


def precision_of(measures: frozenset[str]) -> str:
    """What a stage with these measures multiplies in."""
    return "bfloat16" if "bfloat16" in measures else "float32"


# ---- The limit -------------------------------------------------------------------------------------------------------


def encoding_multiply_adds(net: MaskedViT, tokens: int, code_only: bool = True) -> int:
    """Multiply-adds of p(z | x_S) of one image from so many tokens.

    These are those of all matrices, and of attention's two products; no biases, no norms.
    """
    D, Z, d, r = itemgetter("token_dim", "z_dim", "dim", "mlp_ratio")(net.sizes)
    last = block_multiply_adds(d, r, 1 + tokens, 1 if code_only else None)
    blocks = (len(net.encoder) - 1) * block_multiply_adds(d, r, 1 + tokens) + last
    return tokens * D * d + blocks + r * d**2 + 2 * r * d * Z


def decoding_multiply_adds(net: MaskedViT, tokens: int, asked: int | None = None) -> int:
    """Multiply-adds of the mean of p(x_T | z, x_S) of one image, T being `asked` of the tokens, or all."""
    D, Z, d, r = itemgetter("token_dim", "z_dim", "dim", "mlp_ratio")(net.sizes)
    asked = tokens if asked is None else asked
    last = block_multiply_adds(d, r, 1 + tokens, 1 + asked)
    blocks = (len(net.decoder) - 1) * block_multiply_adds(d, r, 1 + tokens) + last
    return tokens * D * d + 2 * d * Z + 6 * d**2 + blocks + asked * (2 * d**2 + 2 * d * D)


def block_multiply_adds(d: int, r: int, tokens: int, queries: int | None = None) -> int:
    """Multiply-adds of a block over a sequence, for some or all of its tokens."""
    queries = tokens if queries is None else queries
    return 2 * tokens * d**2 + queries * (2 + 2 * r) * d**2 + 2 * queries * tokens * d


def step_multiply_adds(work: Work, measures: frozenset[str], steps: Iterable[int] = (0,)) -> int:
    """Multiply-adds of a training step with these measures, the mean over some steps.

    The forward passes of the ELBO, and twice as many for the backward passes. If hidden tokens are left out, the number
    depends on how many there are.
    """
    net, L, code_only = work.net, work.net.num_tokens, "code_only" in measures
    learned = work.loss.prior == "learned"

    def forward(both: int, observed: int, asked: int | None) -> int:
        encodings = [both, observed] if learned else [both]
        return sum(encoding_multiply_adds(net, n, code_only) for n in encodings) + decoding_multiply_adds(
            net, both, asked
        )

    if "drop" not in measures:
        return 3 * work.batch_size * forward(L, L, None)
    counts = [forward(*(int(mask.sum(-1).max()) for mask in (S | T, S, T))) for S, T in map(work.masks, steps)]
    return 3 * work.batch_size * sum(counts) // len(counts)


@dataclass(frozen=True)
class Limit:
    """The largest matrix-product rate that was reached, in FLOP/s, and the (rows, inputs, outputs) that reached it."""

    rate: float
    size: tuple[int, int, int]


def product_sizes(work: Work) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of the matrix products that are tried: squares, and those of the step's own blocks."""
    d = work.net.token_in.out_features
    block: Any = work.net.encoder[0]
    wide = block.mlp[0].out_features
    rows = 2 * work.batch_size * (work.net.num_tokens + 1)
    squares = [(side,) * 3 for side in SQUARES[work.device.type]]
    return [*squares, *((rows, k, n) for k, n in ((d, 3 * d), (d, d), (d, wide), (wide, d)))]


@torch.no_grad()
def product_rate(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, at_least: float = 0.1) -> float:
    """FLOP/s of this matrix product, repeated for `at_least` seconds."""
    rows, inputs, outputs = size
    x, weight = (torch.randn(n, inputs, device=device).to(dtype) for n in (rows, outputs))
    F.linear(x, weight)
    count = 1
    while True:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            F.linear(x, weight)
        synchronize(device)
        seconds = time.perf_counter() - start
        if seconds >= at_least:
            return 2 * rows * inputs * outputs * count / seconds
        count = max(count + 1, math.ceil(1.2 * count * at_least / max(seconds, at_least / 1000)))


def limit_of(work: Work, precision: str) -> Limit:
    """The fastest of the products of `product_sizes` in this precision."""
    dtype = getattr(torch, precision)
    rates = {size: product_rate(size, dtype, work.device) for size in product_sizes(work)}
    best = max(rates, key=rates.__getitem__)
    return Limit(rates[best], best)


# ---- Measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What was measured of a stage.

    Attributes:
        name: of `STAGES`.
        measures: what it has over the plain version, of `MEASURES`.
        multiply_adds: of a step.
        seconds: of a step, in each repeat.
        memory: bytes that its weights, moments and activations take at their peak, where that can be known.
    """

    name: str
    measures: frozenset[str]
    batch_size: int
    multiply_adds: int
    seconds: tuple[float, ...]
    memory: int | None = None

    @property
    def images_per_second(self) -> float:
        return self.batch_size / median(self.seconds)

    @property
    def rate(self) -> float:
        """FLOP/s: two for each multiply-add."""
        return 2 * self.multiply_adds / median(self.seconds)


@dataclass(frozen=True)
class Result:
    """The stages, and the limit of each precision."""

    stages: list[Stage]
    limits: dict[str, Limit]

    def share(self, stage: Stage) -> float:
        """The stage's rate over the limit of its precision."""
        return stage.rate / self.limits[precision_of(stage.measures)].rate

    def ratio(self, stage: Stage) -> float:
        """How many times as fast as the first stage it is: the median over repeats, each compared within itself."""
        pairs = zip(self.stages[0].seconds, stage.seconds, strict=True)
        return median(first / own for first, own in pairs)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "limits": {name: {"flops_per_second": x.rate, "size": x.size} for name, x in self.limits.items()},
            "stages": [self._row(stage) for stage in self.stages],
        }

    def _row(self, stage: Stage) -> dict[str, Any]:
        return {
            "name": stage.name,
            "measures": [name for name in MEASURES if name in stage.measures],
            "precision": precision_of(stage.measures),
            "images_per_second": stage.images_per_second,
            "seconds_per_step": median(stage.seconds),
            "seconds_of_repeats": stage.seconds,
            "memory_bytes": stage.memory,
            "multiply_adds_per_step": stage.multiply_adds,
            "flops_per_second": stage.rate,
            "share_of_limit": self.share(stage),
            f"ratio_to_{self.stages[0].name}": self.ratio(stage),
        }


def measure(work: Work, plan: Plan, say: Callable[[str], Any] = print) -> Result:
    """Measure the stages in turn, `plan.repeats` times, and the limits beside them. Progress goes to `say`."""
    stages = plan.chosen(work.precision, work.device.type, work.net.hidden)
    steps = plan.steps or STEPS[work.device.type]
    precisions = sorted({precision_of(measures) for measures in stages.values()}, reverse=True)
    step_of(work, next(iter(stages.values())))()  # so that no stage counts what torch loads and keeps at its first step
    ready, memory = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    limits: dict[str, Limit] = {}
    for name, measures in stages.items():
        say(f"preparing {name}")
        ready[name], memory[name] = prepare(work, measures, plan.warmup)
    for repeat in range(plan.repeats):
        say(f"repeat {repeat + 1} of {plan.repeats}")
        for name, step in ready.items():
            seconds[name].append(seconds_per_step(step, steps, plan.warmup, work.device))
        for precision in precisions:
            found = [limit_of(work, precision), *filter(None, [limits.get(precision)])]
            limits[precision] = max(found, key=lambda limit: limit.rate)
    taken = [k for k in range(plan.repeats * (plan.warmup + steps)) if k % (plan.warmup + steps) >= plan.warmup]
    counts = {n: step_multiply_adds(work, m, (plan.warmup + k for k in taken)) for n, m in stages.items()}
    results = [Stage(n, m, work.batch_size, counts[n], tuple(seconds[n]), memory[n]) for n, m in stages.items()]
    return Result(results, limits)


def prepare(work: Work, measures: frozenset[str], warmup: int) -> tuple[LoopStep | TrainerStep, int | None]:
    """A stage's step after its first ones, and how many bytes more than before were in use at their peak."""
    before = start_peak(work.device)
    step = step_of(work, measures)
    step.warm_up()
    for _ in range(warmup):
        step()
    synchronize(work.device)
    peak = read_peak(work.device)
    return step, None if before is None or peak is None else max(0, peak - before)


def seconds_per_step(step: Callable[[], Any], steps: int, warmup: int, device: torch.device) -> float:
    """Mean over `steps` steps, after some that are not counted."""
    for _ in range(warmup):
        step()
    return seconds_of(step, steps, device) / steps


def seconds_of(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Seconds that so many steps take together."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return time.perf_counter() - start


def start_peak(device: torch.device) -> int | None:
    """Forget the largest use of memory so far; returns the bytes in use now, None where that cannot be known."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would count as used
        Path("/proc/self/clear_refs").write_text("5")
        return _own_memory("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or not allowed
        return None


def read_peak(device: torch.device) -> int | None:
    """The largest use of memory in bytes since `start_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _own_memory("VmHWM")
    except OSError:
        return None


def _own_memory(field: str) -> int | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


# ---- What is printed -------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """One line a stage, the limits, and what the words mean."""
    first = result.stages[0]
    head = ("images/s", "ms/step", "from - to", "memory", "GMACs", "TFLOP/s", "of limit", f"x {first.name}")
    widths = (10, 11, 22, 11, 10, 10, 10, max(9, len(head[-1]) + 2))
    rows = [("", head), *((stage.name, _cells(result, stage)) for stage in result.stages)]
    lines = [
        f"{name:<10}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
    limits = (
        f"limit: {limit.rate / 1e12:.3g} TFLOP/s, {name} product of ({limit.size[0]}, {limit.size[1]}) "
        f"and ({limit.size[1]}, {limit.size[2]})"
        for name, limit in result.limits.items()
    )
    meanings = {"plain": PLAIN} | {name: f"and {words}" for name, words in MEASURES.items()}
    used = {"plain"}.union(*(stage.measures for stage in result.stages))
    step = "GMACs: 10^9 multiply-adds of a step, forward and backward; TFLOP/s counts two for each"
    words = (f"{name:<10}{meaning}" for name, meaning in meanings.items() if name in used)
    return "\n".join([*lines, "", step, *limits, "", *words])


def _cells(result: Result, stage: Stage) -> tuple[str, ...]:
    return (
        f"{stage.images_per_second:,.0f}",
        f"{1e3 * median(stage.seconds):.2f}",
        f"{1e3 * min(stage.seconds):.2f} - {1e3 * max(stage.seconds):.2f}",
        "" if stage.memory is None else f"{stage.memory / 2**20:,.0f} MiB",
        f"{stage.multiply_adds / 1e9:.4g}",
        f"{stage.rate / 1e12:.3g}",
        f"{result.share(stage):.0%}",
        f"{result.ratio(stage):.2f}",
    )
