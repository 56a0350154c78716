"""Trainer: any network, any loss, any batches. It knows neither the model nor the data.

    loss(net, batch, random=StepRandom, step=int) -> an object with .loss (scalar) and .scalars() (dict of scalars)
    loss.compiled(**options), if there is one -> the same loss, compiled together with the networks it is called on
    batches(step) -> a batch; batches.batch_size, how many images one of all processes holds
    evaluate(net) -> (numbers by name, pictures by name)

What a step draws is a function of (seed, step), so that a run that was killed and resumed equals one that was not.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from biglearn_vae import checkpoint, distributed
from biglearn_vae.distributed import StepRandom, World
from biglearn_vae.loggers import Logger
from biglearn_vae.optim import Optim, has_fast_bfloat16


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what to try."""


PRECISIONS = ("auto", "float32", "bfloat16")


def choose_precision(precision: str, net: nn.Module, images: int) -> str:
    """What "auto" means for this network on its device; other names as they are.

    bfloat16 where the device multiplies in it faster: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX. On CPUs small
    products gain less from it than the conversions cost: those of fewer than 1,024 tokens with fewer than 256 inputs
    (`scripts/benchmark.py` measures it). Parameters, log-variances and losses are float32 in any case.

    Args:
        images: how many the network takes at once.

    Raises:
        ValueError: on an unknown name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    device = next(net.parameters()).device
    wide = max((p.shape[-1] for p in net.parameters() if p.ndim == 2), default=0) >= 256
    large = device.type == "cuda" or wide or images * (1 + getattr(net, "num_tokens", 0)) >= 1024
    return "bfloat16" if large and has_fast_bfloat16(device) else "float32"


CUDA_GRAPHS = "reduce-overhead"  # the mode of torch.compile that replays CUDA graphs


def choose_compile(compile: bool | str, net: nn.Module) -> str | None:
    """The mode of torch.compile for this network on its device, None for none; true means its default.

    "auto" compiles on GPUs, where Triton is there and the network's shapes are the same at every step. On CPUs it gains
    nothing (`scripts/benchmark.py compile=true` shows it), and compiling takes a minute.

    Raises:
        ValueError: on another word, and where it is asked for and the shapes change.
    """
    if compile not in (True, False, "auto", CUDA_GRAPHS):
        raise ValueError(f"compile must be true, false, auto or {CUDA_GRAPHS}, got {compile!r}")
    fixed = getattr(net, "hidden", "mask") != "drop"
    if compile == "auto":
        from torch.utils._triton import has_triton

        compile = next(net.parameters()).is_cuda and fixed and has_triton()
    if compile and not fixed:
        raise ValueError(
            f"compile={str(compile).lower()} needs shapes that stay, and with hidden=drop every step has others: "
            "take compile=auto or false"
        )
    return CUDA_GRAPHS if compile == CUDA_GRAPHS else "default" if compile else None


class Interruption:
    """While entered, Ctrl-C and SIGTERM raise a flag instead of stopping the program; a second Ctrl-C stops it."""

    def __init__(self):
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._handlers = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _request(self, number: int, _) -> None:
        self.requested = True
        if number == signal.SIGINT:  # launchers send SIGTERM more than once; a person who insists presses Ctrl-C
            signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])


class Trainer:
    """Trains a network, and resumes what an earlier one in the same folder left.

    Args:
        net: the network, on the world's device; not wrapped.
        loss, batches, evaluate: see the module's text. `evaluate` is called at step 0, each `evaluate_every` steps
            and at the end, on the main process.
        optim: the optimizer and its schedule.
        steps: the last step.
        folder: for checkpoints; none are written without one.
        seed: of what each step draws.
        world: this process among the others.
        evaluate_every, report_every, checkpoint_every: in steps.
        monitor: the number of `evaluate` whose largest value makes the best checkpoint.
        metadata: plain values that are written into every checkpoint; its "data", if there, names the training data.
        precision: "float32", "bfloat16" (matrix products only, by autocast) or "auto" (see `choose_precision`). A run
            that goes on elsewhere keeps the one that it was started with.
        accumulate: parts that a step's batch is split into, one after the other, to save memory; a batch is a tensor
            or a tuple of them.
        compile: whether the network goes through torch.compile, or "auto" (see `choose_compile`); with a loss that has
            a method `compiled`, and in a single process, the loss and the network in it do. "reduce-overhead", for
            small networks on one GPU, replays what is compiled as CUDA graphs: one launch for each of both directions.
        shard: split parameters, gradients and the optimizer's state over the processes (FSDP2) instead of keeping all
            of them in each (DistributedDataParallel), for networks that do not fit otherwise.

    Raises:
        ValueError: if an interval, `steps` or `accumulate` is below 1, a batch cannot be split so, the precision is
            unknown, or CUDA graphs are asked for with `accumulate` or several processes.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable,
        batches: Callable[[int], Any],
        optim: Optim,
        *,
        steps: int,
        folder: Path | None = None,
        seed: int = 0,
        world: World | None = None,
        evaluate: Callable | None = None,
        evaluate_every: int = 1000,
        report_every: int = 100,
        checkpoint_every: int = 1000,
        monitor: str = "valid/elbo",
        metadata: dict[str, Any] | None = None,
        precision: str = "auto",
        accumulate: int = 1,
        compile: bool | str = "auto",
        shard: bool = False,
    ):
        self.every = dict(evaluate=evaluate_every, report=report_every, checkpoint=checkpoint_every)
        intervals = {f"{name}_every": value for name, value in self.every.items()}
        for name, value in dict(steps=steps, accumulate=accumulate, **intervals).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.net, self.loss, self.batches, self.optim, self.evaluate = net, loss, batches, optim, evaluate
        self.steps, self.folder, self.seed, self.monitor = steps, folder, seed, monitor
        self.world, self.metadata = world or World(), metadata or {}
        self.accumulate, share = accumulate, self.world.share(batches.batch_size)
        if share % accumulate:
            raise ValueError(f"accumulate must divide the {share} images of a step of each process, got {accumulate}")
        self.precision = choose_precision(precision, net, share // accumulate)
        self.compiled = choose_compile(compile, net)
        if self.compiled == CUDA_GRAPHS and (accumulate > 1 or self.world.size > 1):
            # A replay overwrites the gradients of the one before, to which these would be added.
            raise ValueError(
                f"compile={CUDA_GRAPHS} needs accumulate=1 and one process, got accumulate={accumulate} and "
                f"{self.world.size} processes: take compile=true"
            )
        self.loggers: list[Logger] = []
        self.interrupted = False
        self.average = copy.deepcopy(net).requires_grad_(False).eval() if optim.ema_decay else None
        self._sharded = shard and self.world.size > 1
        self._whole: nn.Module | None = None  # where the main process puts split weights together
        if self._sharded:
            if self.world.is_main:
                self._whole = copy.deepcopy(net).requires_grad_(False).eval()
            for module in filter(None, (net, self.average)):
                distributed.shard(module, self.world)
        self.optimizers = optim.optimizers(net)
        self.step, self.seconds, self.best = 0, 0.0, -math.inf
        self.compile_seconds = 0.0  # of `seconds`: first steps, for which the network was compiled
        self._compiles = self.compiled is not None
        self._pending: list[Tensor] = []  # the parts of the loss of each step since the last report
        self._names: list[str] = []
        self._reported = (0, 0.0)  # step and seconds at the last report
        self._wrapped = self._wrap()

    def _wrap(self) -> nn.Module:
        """Compile what is to be compiled; returns the network as the steps call it."""
        options = dict(dynamic=False, mode=self.compiled)
        if self.compiled and self.world.size == 1 and hasattr(self.loss, "compiled"):
            self.loss = self.loss.compiled(**options)
            return self.net
        net = torch.compile(self.net, **options) if self.compiled else self.net
        if self.world.size == 1 or self._sharded:
            return net
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)

    @property
    def result(self) -> nn.Module:
        """The network to evaluate and keep: the average of the weights if there is one."""
        return self.net if self.average is None else self.average

    def resume(self) -> int:
        """Go on from the newest readable checkpoint of the folder, if any; returns the step.

        Raises:
            ValueError: if there is one of another network or of other data, or none that can be read.
        """
        state = checkpoint.load_latest(self.folder) if self.folder else None
        if state is not None:
            if state["metadata"].get("data") != self.metadata.get("data"):
                raise ValueError(f"the run in {self.folder.parent} was trained on other data: start another run")
            self._load_weights(self.net, state["net"])
            if self.average is not None:
                self._load_weights(self.average, state["average"] or state["net"])
            self._load_optimizers(state["optimizers"])
            self.step, self.seconds = state["step"], state["seconds"]
            # Without a best checkpoint, the next evaluation makes one.
            self.best = state["best"] if (self.folder / checkpoint.BEST).exists() else -math.inf
            self.compile_seconds = state.get("compile_seconds", 0.0)
            self._names, self._pending = state["names"], list(state["pending"].to(self.world.device))
            self._reported = tuple(state["reported"])
            self.precision = state.get("precision", "float32")
        mean_step = self.world.mean(torch.tensor(float(self.step), device=self.world.device)).item()
        if self.world.any(mean_step != self.step):
            raise ValueError(f"the processes would go on from different steps: all must see the same {self.folder}")
        return self.step

    def _load_weights(self, net: nn.Module, weights: dict[str, Tensor]) -> None:
        source = self.folder / checkpoint.LATEST
        checkpoint.check_weights(net, weights, source)
        net.load_state_dict(distributed.split(weights, net.state_dict()))

    def _load_optimizers(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            like = {
                index: {name: parameters[index] if value.ndim else value for name, value in moments.items()}
                for index, moments in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": distributed.split(state["state"], like)})

    def fit(self, loggers: Iterable[Logger] = ()) -> bool:
        """Train to the last step. Returns False if Ctrl-C or SIGTERM ended it earlier, with a checkpoint written.

        `interrupted` says afterwards whether there was such a signal, be it at the last step.

        Raises:
            TrainingError: if the loss is not finite.
        """
        self.loggers = list(loggers)
        with Interruption() as interruption:
            if self.world.any(self.best == -math.inf):  # at the start, or the best checkpoint is lost
                self._evaluate()
            while self.step < self.steps:
                self._train_step()
                last = self.step == self.steps
                if last or self.step % self.every["report"] == 0:
                    self._report()
                if last or self.step % self.every["evaluate"] == 0:
                    self._evaluate()
                # Processes must stop at the same step, so with several the flag is shared, now and then.
                stop = (
                    interruption.requested
                    if self.world.size == 1
                    else self.step % 10 == 0 and self.world.any(interruption.requested)
                )
                self.interrupted |= stop
                if last or stop or self.step % self.every["checkpoint"] == 0:
                    self._save_latest()
                if stop:
                    break
        return self.step >= self.steps

    def _train_step(self) -> None:
        start = time.perf_counter()
        self.net.train()
        self.optim.schedule_at(self.optimizers, self.step, self.steps)
        self.net.zero_grad()
        scalars = self._backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.optim.clip_norm or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
        self._update_average()
        scalars["grad_norm"] = distributed.whole(norm)
        self._names = list(scalars)
        self._pending.append(torch.stack(list(scalars.values())))
        self.step += 1
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        if self._compiles:
            self.compile_seconds, self._compiles = self.compile_seconds + elapsed, False

    def _backward(self) -> dict[str, Tensor]:
        """Gradients of this step's loss, and its parts by name, of a batch that is taken in `accumulate` parts."""
        batch, total = self.batches(self.step), {}
        for part in range(self.accumulate):
            # Each part draws what its rows would draw in one batch: to that end it is a process of its own.
            of = World(self.world.rank * self.accumulate + part, self.world.size * self.accumulate, self.world.device)
            random = StepRandom.at(self.seed, self.step, of)
            with self._synchronized(part + 1 == self.accumulate):
                with self._autocast():
                    parts = self.loss(self._wrapped, _part(batch, part, self.accumulate), random=random, step=self.step)
                (parts.loss / self.accumulate).backward()
            for name, value in parts.scalars().items():
                total[name] = total.get(name, 0) + value.detach() / self.accumulate
        return total

    @contextmanager
    def _synchronized(self, last: bool) -> Iterator[None]:
        """Gradients are summed over the processes after the last part of a step alone."""
        if self._sharded:
            self.net.set_requires_gradient_sync(last)
        wait = isinstance(self._wrapped, DistributedDataParallel) and not last
        with self._wrapped.no_sync() if wait else nullcontext():
            yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        decay = self.optim.ema_decay_at(self.step)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - decay)

    def _pending_values(self) -> Tensor:
        """The pending parts, (steps, parts), as the mean over processes, on the CPU; they must be finite."""
        with self._counted():  # on a GPU the steps themselves end here
            values = self.world.mean(torch.stack(self._pending)).cpu()
        bad = (~values.isfinite()).any(dim=1).nonzero()
        if len(bad):
            row = int(bad[0])
            parts = ", ".join(
                f"{name} {value:g}" for name, value in zip(self._names, values[row].tolist(), strict=True)
            )
            kept = self.folder and (self.folder / checkpoint.LATEST).exists()
            advice = "The last good checkpoint stays in the run's folder. " if kept else ""
            raise TrainingError(
                f"the loss is not finite at step {self.step - len(values) + row}: {parts}. {advice}"
                "Try a lower optim.lr, more optim.warmup_steps or optim.clip_norm=1."
            )
        return values

    def _report(self) -> None:
        values = self._pending_values()
        means = dict(zip(self._names, values.mean(0).tolist(), strict=True))
        step, seconds = self._reported
        speed = (self.step - step) * self.batches.batch_size / max(self.seconds - seconds, 1e-9)
        self._pending, self._reported = [], (self.step, self.seconds)
        scalars = {f"train/{name}": value for name, value in means.items()}
        scalars |= {
            "lr": self.optim.lr * self.optim.share_at(self.step - 1, self.steps),
            "seconds": self.seconds,
            "images_per_second": speed,
        }
        self._log(lambda logger: logger.scalars(self.step, scalars))

    def _wait(self) -> None:
        """On a GPU steps that were called for may not have ended; the time until they have is theirs."""
        if self.world.device.type == "cuda":
            with self._counted():
                torch.cuda.synchronize(self.world.device)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """What takes its time in here is training."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def _evaluate(self) -> None:
        self._wait()
        result = self._whole_result() if self.evaluate is not None else None
        if result is not None and self.world.is_main:
            result.eval()
            with torch.no_grad():
                numbers, pictures = self.evaluate(result)
            self._log(lambda logger: logger.scalars(self.step, numbers))
            for name, pixels in pictures.items():
                self._log(lambda logger, name=name, pixels=pixels: logger.picture(self.step, name, pixels))
            if self.monitor not in numbers:
                raise ValueError(f"monitor must be one of {', '.join(numbers)}, got {self.monitor!r}")
            value = numbers[self.monitor]
            if value > self.best and self.folder is not None:
                self.best = value
                state = {
                    "step": self.step,
                    "net": result.state_dict(),
                    "metrics": numbers,
                    "metadata": self.metadata,
                }
                checkpoint.save(self.folder / checkpoint.BEST, state)
        self.world.barrier()

    def _whole_result(self) -> nn.Module | None:
        """`result`, put together if it is split; every process must call it, and the main one gets it."""
        if not self._sharded:
            return self.result
        weights = distributed.gathered(self.result.state_dict(), self.world)
        if self._whole is not None:
            self._whole.load_state_dict(weights)
        return self._whole

    def _save_latest(self) -> None:
        if self.folder is None:
            return
        if self._pending:
            # A network that a bad step has spoilt must not replace a good checkpoint.
            self._pending = list(self._pending_values().to(self.world.device))
        state = distributed.gathered(self._state(), self.world)
        if self.world.is_main:
            checkpoint.save_latest(self.folder, state)
        self.world.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "best": self.best,
            "names": self._names,
            "pending": torch.stack(self._pending) if self._pending else torch.empty(0),
            "reported": self._reported,
            "precision": self.precision,
            "metadata": self.metadata,
        }

    def _log(self, call: Callable[[Logger], None]) -> None:
        for logger in self.loggers if self.world.is_main else ():
            call(logger)


def _part(batch: Tensor | tuple[Tensor, ...], part: int, parts: int) -> Tensor | tuple[Tensor, ...]:
    """One of equally many rows of a batch."""
    if parts == 1:
        return batch
    if isinstance(batch, Tensor):
        return batch.chunk(parts)[part]
    return tuple(tensor.chunk(parts)[part] for tensor in batch)
