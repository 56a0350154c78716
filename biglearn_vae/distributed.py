"""The processes of one run: start-up under torchrun, rank, reductions, and random numbers that do not depend on them.

A single process is `World()`, and needs only its device and the random numbers from here.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from biglearn_vae import checks


@dataclass(frozen=True)
class World:
    """This process among those of its run: rank in [0, size), and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self):
        object.__setattr__(self, "device", _named(self.device, "cpu, cuda or cuda:N"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """How many of a global batch's images are this process's."""
        batch_size = checks.whole_number("batch_size", batch_size, 1)
        if batch_size % self.size:
            raise ValueError(
                f"batch_size counts the images of all {self.size} processes and must be a multiple, got {batch_size}"
            )
        return batch_size // self.size

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes; every process must call it."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; every process must call it."""
        if self.size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def agrees(self, own: float | str) -> bool:
        """Whether all processes have the same number or words; every process must call it."""
        number = derive_seed(own) % 2**32
        mean = self.mean(torch.tensor(float(number), dtype=torch.float64, device=self.device))  # whose sums are exact
        return not self.any(mean.item() != number)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@torch.no_grad()
def take_from_first(net: nn.Module, world: World) -> None:
    """Give a network the weights and buffers that it has in the first process; every process must call it.

    Raises:
        ValueError: if they are of other shapes or types there.
    """
    tensors = [*net.parameters(), *net.buffers()]
    if not world.agrees(repr([(tuple(own.shape), str(own.dtype)) for own in tensors])):
        raise ValueError("the processes have networks of different shapes or types: all must make the same one")
    for own in tensors:
        value = own.to(world.device).contiguous()  # where the processes can talk of it
        dist.broadcast(value, src=0)
        own.copy_(value)


def under_torchrun() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def in_group() -> bool:
    """Whether this process has joined the others."""
    return dist.is_initialized()


def start(device: str = "auto") -> World:
    """Join the other processes, if torchrun started any, and choose the device.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: if the device is unknown or not there.
    """
    if not under_torchrun():
        return World(device=pick_device(device))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device != "cpu" and torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes on this machine need a GPU each and there are {torch.cuda.device_count()}: "
            "start fewer, or use device=cpu"
        )
    if ":" in device and processes > 1:
        raise ValueError(f"device={device} would be shared by {processes} processes: use device=cuda")
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        # The main process evaluates alone while the others wait, so the limit is generous.
        on_gpu = chosen.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=timedelta(hours=2), device_id=chosen if on_gpu else None
        )
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _named(device: Any, known: str) -> torch.device:
    """The device of this name, or itself."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):  # torch's, in many lines
        raise ValueError(f"unknown device {device!r}: use {known}") from None


def pick_device(device: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one, and "cuda" the GPU with this local rank."""
    if isinstance(device, str) and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _named(device, "auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
    here = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if (chosen.index or 0) >= here.get(chosen.type, 0):
        raise ValueError(f"device {str(chosen)!r} is not available here: use device=auto or device=cpu")
    return chosen


def shard(net: nn.Module, world: World) -> None:
    """Split every parameter over all processes (FSDP2), which then gather a block's when they come to it.

    Each member of a `ModuleList`, also of a nested one, is gathered by itself; all else together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing writes to them here
    mesh = init_device_mesh(world.device.type, (world.size,))
    lists = [module for module in net.modules() if isinstance(module, nn.ModuleList)]
    members = {member for module in lists for member in module if not isinstance(member, nn.ModuleList)}
    for module in reversed(list(net.modules())):  # what is within another before that
        if module in members:
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)


def sum_gradients(net: Any, summed: bool) -> None:
    """Set whether the next gradients of a network that is split (`shard`) are summed over the processes."""
    net.set_requires_gradient_sync(summed)


def whole(tensor: Any) -> Tensor:
    """The whole of a tensor that is split over the processes; every process must call it."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def is_split(value) -> bool:
    """Whether a tensor is split over the processes."""
    return hasattr(value, "full_tensor")  # a DTensor, whose module is not worth importing for this


def gathered(state, world: World):
    """On the main process the same with each split tensor whole, on the CPU; on the others None in its place.

    One tensor after the other, so that a device never holds more than one of them whole. Every process must call it.

    Args:
        state: a tensor, or dictionaries and lists of them and of anything else.
    """

    def one(value, _):
        if not is_split(value):
            return value
        value = value.full_tensor()
        return value.cpu() if world.is_main else None

    return _mapped(one, state, state)


def split(state, like):
    """The inverse of `gathered`: tensors that all processes have, split as those at the same places of `like` are."""

    def one(value, own):
        if not is_split(own):
            return value
        from torch.distributed.tensor import distribute_tensor

        # All processes have it, so that none need send it.
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)

    return _mapped(one, state, like)


def _mapped(change: Callable, state, like):
    if isinstance(state, dict):
        return {key: _mapped(change, value, like[key]) for key, value in state.items()}
    if isinstance(state, list):
        return [_mapped(change, value, own) for value, own in zip(state, like, strict=True)]
    return change(state, like)


def cores() -> int:
    """How many cores of the machine this process may use: a job of a cluster has its share."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def derive_seed(*parts: float | str | None) -> int:
    """One well-mixed seed from several numbers and words: unlike a sum, it does not repeat between runs.

    Numbers may be of any type, such as NumPy's: they count as those of Python.
    """
    given: tuple[Any, ...] = parts
    plain = tuple(part.item() if hasattr(part, "item") else part for part in given)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=7).digest())


@dataclass(frozen=True)
class StepRandom:
    """The random numbers of one training step: a function of (seed, step), of which each process takes its rows.

    Every process draws for the whole global batch and keeps its own rows. So a run does not depend on how many
    processes share it, and a resumed run draws what an uninterrupted one would have drawn.
    """

    generator: torch.Generator
    rank: int = 0
    size: int = 1

    @classmethod
    def at(cls, seed: int, step: int, world: World) -> "StepRandom":
        """The random numbers of this step, on the world's device."""
        generator = torch.Generator(world.device).manual_seed(cls.seed_at(seed, step))
        return cls(generator, world.rank, world.size)

    @staticmethod
    def seed_at(seed: int, step: int) -> int:
        """The seed of this step's generator."""
        return derive_seed("step", seed, step)

    def rows(self, count: int, draw: Callable[[int, torch.Generator], Tensor | tuple[Tensor, ...]]):
        """This process's `count` rows of what `draw(number of rows, generator)` gives, a tensor or several."""
        drawn = draw(count * self.size, self.generator)
        own = slice(self.rank * count, (self.rank + 1) * count)
        return drawn[own] if isinstance(drawn, Tensor) else tuple(part[own] for part in drawn)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This process's rows of standard normal numbers."""
        g = self.generator
        return self.rows(
            shape[0], lambda rows, _: torch.randn(rows, *shape[1:], dtype=dtype, device=g.device, generator=g)
        )


@contextmanager
def global_generator(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators, of the CPU and of this device, and leave them as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds all GPUs, too
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
