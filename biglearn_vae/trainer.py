"""Trainer: any network, any loss, any batches. It knows neither the model nor the data.

    loss(net, batch, random=StepRandom, step=int) -> an object with .loss (scalar) and .scalars() (dict of scalars);
        where steps are replayed as a CUDA graph, step is a tensor (), and after the first steps the Python code of the
        loss no longer runs: it must not branch on step, count, or draw from anything but `random`
    loss.compiled(**options), if there is one -> the same loss, compiled together with the networks it is called on
    loss.settings, if there are any: numbers and words by name; a run is not resumed with a loss whose settings differ
    batches(step) -> a batch; batches.batch_size, how many images a step takes in all processes together
    evaluate(net) -> (numbers by name, pictures by name)

What a step draws is a function of (seed, step), so that a run that was killed and resumed equals one that was not. The
same holds for torch's global generator, from which dropout draws: it is seeded for each step, differently in each
process, and afterwards is as it was before the step. It does not hold for steps that are replayed as a CUDA graph.
"""

import copy
import functools
import inspect
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from biglearn_vae import checkpoint, checks, distributed
from biglearn_vae.cuda_graph import NotRecorded, StepGraph
from biglearn_vae.distributed import StepRandom, World, derive_seed, global_generator
from biglearn_vae.files import followed
from biglearn_vae.loggers import Logger
from biglearn_vae.optim import Optim, has_fast_bfloat16, optimizers_of

PLAIN = (bool, int, float, str, type(None))  # settings that a checkpoint can hold
OF_DEVICE = ("fused", "foreach", "capturable")  # how an optimizer computes a step, not what it computes


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what to try."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a training early, after a step; `kept` says whether there is a checkpoint of it."""

    def __init__(self, message: str, kept: bool = False):
        super().__init__(message)
        self.kept = kept


PRECISIONS = ("auto", "float32", "bfloat16")
ASK_EVERY = 2.0  # seconds (or one step, if longer) within which processes tell each other whether one was told to stop


def choose_precision(precision: str, net: nn.Module, images: int) -> str:
    """The precision that "auto" means for this network on its device; other names are returned as they are.

    bfloat16 where the device multiplies in it faster: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX. On CPUs small
    products gain less from it than the conversions cost: those of fewer than 1,024 tokens with fewer than 256 inputs
    (`scripts/benchmark.py` measures it). Parameters, log-variances and losses are float32 in any case (a loss of your
    own has the type that it computes itself).

    Args:
        images: of a whole step, also where `accumulate` splits them: splitting is not to change the numbers.

    Raises:
        ValueError: on an unknown name.
    """
    checks.check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    device = next(net.parameters()).device
    wide = max((p.shape[-1] for p in net.parameters() if p.ndim == 2), default=0) >= 256
    large = device.type == "cuda" or wide or images * (1 + getattr(net, "num_tokens", 0)) >= 1024
    return "bfloat16" if large and has_fast_bfloat16(device) else "float32"


WORTH_COMPILING = 30_000  # steps: compiling takes 45 seconds, and saves some 1.5 milliseconds of each


def choose_compile(compile: bool | str, net: nn.Module, steps: int) -> bool:
    """Whether torch.compile is used for this network on its device, in a training of so many steps.

    "auto" compiles on GPUs, if Triton is installed, the network's shapes are the same at every step and there are
    enough steps to be worth it. On CPUs it gains nothing (`scripts/benchmark.py compile=true` shows it).

    Raises:
        ValueError: on any other word, and for True if the shapes change from step to step.
    """
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be true, false or auto, got {compile!r}")
    fixed = getattr(net, "fixed_shapes", True)
    if compile == "auto":
        from torch.utils._triton import has_triton

        return next(net.parameters()).is_cuda and fixed and steps >= WORTH_COMPILING and has_triton()
    if compile and not fixed:
        raise ValueError(
            "compile=true needs shapes that stay, and with hidden=drop every step has others: "
            "take compile=auto or false"
        )
    return bool(compile)


def choose_cuda_graph(cuda_graph: bool | None, net: nn.Module, world: World, optim: Optim | None = None) -> bool:
    """Whether steps are replayed as a CUDA graph; None means wherever that is possible.

    With optimizers of your own, steps are recorded only for True: a replay would miss what they count in Python, and
    new tensors that they make.

    Raises:
        ValueError: on any other word, and for True where it is impossible.
    """
    device, fixed = next(net.parameters()).device, getattr(net, "fixed_shapes", True)
    possible = device.type == "cuda" and world.size == 1 and fixed
    if cuda_graph not in (None, True, False):
        raise ValueError(f"cuda_graph must be true, false or null, got {cuda_graph!r}")
    if cuda_graph and not possible:
        raise ValueError(
            "cuda_graph=true needs a GPU, one process and shapes that stay, got "
            f"{device}, {world.size} process{'es' if world.size > 1 else ''}{'' if fixed else ', hidden=drop'}: "
            "cuda_graph=null takes one where it can"
        )
    ours = optim is None or type(optim).optimizers is Optim.optimizers
    return possible and ours if cuda_graph is None else cuda_graph


class Interruption:
    """While entered, Ctrl-C and SIGTERM raise a flag instead of stopping the program; a second Ctrl-C stops it."""

    def __init__(self):
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            # A signal that is ignored, as in a background job of a shell, stays ignored.
            heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
            self._handlers = {s: signal.signal(s, self._request) for s in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _request(self, number: int, _) -> None:
        self.requested = True
        if number == signal.SIGINT:  # launchers send SIGTERM more than once; a person who insists presses Ctrl-C
            signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])


def _joined(world: World | None, net: nn.Module) -> World:
    """The processes that train a network, all of which start from the first one's weights.

    Raises:
        ValueError: if torchrun started several and `world` was not given, or the network is on another device.
    """
    if world is None and distributed.under_torchrun():
        raise ValueError(
            "torchrun started several processes: give world=blv.distributed.start(), to the Batches, too, or each "
            "would train alone"
        )
    world = world or World()
    _check_device(net, world)
    if world.size > 1:
        distributed.take_from_first(net, world)
    return world


def _check_device(net: nn.Module, world: World) -> None:
    """Raise a ValueError unless a network is where the steps are taken."""
    device, other = next(net.parameters()).device, world.device
    if device.type != other.type or (None not in (device.index, other.index) and device.index != other.index):
        raise ValueError(
            f"the network is on {device} and would be trained on {other}: give world=World(device={str(device)!r}) to "
            "Trainer and Batches, or move the network"
        )


def _checked_folder(folder: str | Path | None) -> Path | None:
    if folder is None:
        return None
    path = checks.path("folder", folder)
    if path.is_file():
        raise ValueError(f"folder must be one for checkpoints, {path} is a file")
    return path


def _check(
    net: nn.Module, loss: Any, optim: Any, batches: Any, metadata: dict[str, Any], counts: dict[str, int]
) -> None:
    """Raise a ValueError for what a trainer cannot be made of."""
    if not isinstance(net, nn.Module):
        raise ValueError(f"expected a network, a torch.nn.Module (of a BigLearnVAE its .net), got {type(net).__name__}")
    if untrained := _own_parameters(loss, net):
        raise ValueError(
            f"the loss has parameters of its own, {', '.join(untrained)}, which nothing would train or keep: make them "
            "the network's, or let them need no gradient"
        )
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError(
            "expected a network with parameters to be trained, all are frozen, as those of a loaded model are: "
            "copy.deepcopy(vae.net).requires_grad_(True) is one that can be trained further"
        )
    if not isinstance(optim, Optim):
        raise ValueError(f"optim must be an Optim, of which the trainer makes optimizers, got {type(optim).__name__}")
    if not callable(batches) or not hasattr(batches, "batch_size"):
        raise ValueError(
            "batches must be like Batches, batches(step) a step's data and batches.batch_size their number, "
            f"got {type(batches).__name__}"
        )
    for name, value in counts.items():
        checks.whole_number(name, value, 1)
    checkpoint.check_metadata(metadata)


def _own_parameters(loss: Any, net: nn.Module) -> list[str]:
    """The names of a loss's tensors that need gradients and are not the network's."""
    known, held = set(map(id, net.parameters())), dict(getattr(loss, "__dict__", {}))
    for name, part in {"": loss, **held}.items():
        if isinstance(part, nn.Module):
            held |= {f"{name}.{own}".lstrip("."): value for own, value in part.named_parameters()}
    needing = {name: value for name, value in held.items() if isinstance(value, Tensor) and value.requires_grad}
    return [name for name, value in needing.items() if id(value) not in known]


def _measured(found: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """What `evaluate` gave; a ValueError if that isn't numbers and pictures."""
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(part, dict) for part in found):
        raise ValueError(
            "evaluate must return numbers and pictures, two dictionaries by name, such as ({'valid/elbo': -1.5}, {}), "
            f"got {found!r:.80}"
        )
    numbers, pictures = found
    try:  # a checkpoint can hold none of numpy's
        return {name: float(value) for name, value in numbers.items()}, pictures
    except (TypeError, ValueError):
        raise ValueError(f"what evaluate gives first must be numbers by name, got {numbers!r:.200}") from None


def _checked_parts(parts: Any) -> Any:
    """What a loss gave; a ValueError if that has no loss to follow and nothing to report."""
    if not hasattr(parts, "loss") or not callable(getattr(parts, "scalars", None)):
        raise ValueError(
            "expected of the loss what has .loss, a tensor (), and .scalars(), such tensors by name, as an ELBO has: "
            f"got {checks.described(parts)}"
        )
    return parts


def _checked_scalar(name: str, value: Any) -> Tensor:
    """One of the numbers that a loss reports, without gradients; a ValueError if it is no tensor ()."""
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(f"expected tensors () in .scalars() of the loss, got {name}: {checks.described(value)}")
    return value.detach()


def _load_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    net.load_state_dict(distributed.split(weights, net.state_dict()))


class BatchSource(Protocol):
    """The source of a training's batches: `Batches`, or a function of your own with this attribute."""

    batch_size: int  # images a step, of all processes together

    def __call__(self, step: int, /) -> Any: ...


class Trainer:
    """Trains a network, and resumes what an earlier Trainer left in the same folder.

    Args:
        net: the network, on the world's device; not wrapped.
        loss, batches, evaluate: see the docstring of this module. `evaluate` is called at step 0, every
            `evaluate_every` steps and at the end, on the main process.
        optim: the optimizer and its schedule.
        steps: the last step.
        folder: for checkpoints, where ~ is one's home; none are written without one.
        seed: of what each step draws.
        world: this process among the others.
        evaluate_every, report_every, checkpoint_every: in steps.
        monitor: the number of `evaluate` whose largest value makes the best checkpoint.
        metadata: plain values that are written into every checkpoint; its "data", if any, identifies the training data.
        precision: "float32", "bfloat16" (matrix products only, by autocast) or "auto" (see `choose_precision`). A run
            that is resumed on another device keeps the precision that it was started with.
        accumulate: parts into which a step's batch is split, taken one after the other to save memory; above 1, a batch
            must be a tensor or a tuple of them.
        compile: whether the network goes through torch.compile, or "auto" (see `choose_compile`). If the loss has a
            method `compiled`, and in a single process, loss and network are compiled together.
        cuda_graph: whether a step, from its batch to the new weights, is recorded as a CUDA graph and replayed, so that
            the GPU does not wait for its launches; None means wherever possible (see `choose_cuda_graph`).
        shard: split parameters, gradients and the optimizer's state over the processes (FSDP2) instead of keeping all
            of them in each (DistributedDataParallel), for networks that do not fit otherwise.

    Raises:
        ValueError: if an interval, `steps` or `accumulate` is below 1, a batch cannot be split into equal parts, or the
            precision is unknown; for a network without trainable parameters, a loss with trainable parameters of its
            own, an `optim` that is no Optim, batches without a `batch_size`, metadata that a checkpoint cannot hold,
            and a folder that is a file; see also `choose_compile` and `choose_cuda_graph`.
    """

    loggers: Iterable[Logger]

    def __init__(
        self,
        net: nn.Module,
        loss: Callable,
        batches: BatchSource,
        optim: Optim,
        *,
        steps: int,
        folder: str | Path | None = None,
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
        cuda_graph: bool | None = None,
        shard: bool = False,
    ):
        self.every = dict(evaluate=evaluate_every, report=report_every, checkpoint=checkpoint_every)
        intervals = {f"{name}_every": value for name, value in self.every.items()}
        metadata = checkpoint.plain(metadata or {})
        _check(net, loss, optim, batches, metadata, dict(steps=steps, accumulate=accumulate, **intervals))
        self.net, self.loss, self.batches, self.optim, self.evaluate = net, loss, batches, optim, evaluate
        self.steps, self.seed, self.monitor = steps, checks.whole_number("seed", seed), monitor
        self.folder = _checked_folder(folder)
        self.world, self.metadata = _joined(world, net), metadata
        self.accumulate, share = accumulate, self.world.share(batches.batch_size)
        if share % accumulate:
            raise ValueError(f"accumulate must divide the {share} images of a step of each process, got {accumulate}")
        self.precision = choose_precision(precision, net, batches.batch_size)
        self.compiled = choose_compile(compile, net, steps)
        # Each part draws for the whole batch and keeps its own rows, and so needs its own generator.
        self._generators = [torch.Generator(self.world.device) for _ in range(accumulate)]
        self.on_graph = choose_cuda_graph(cuda_graph, net, self.world, optim)
        self._graph: StepGraph | None = None
        self._forget_graph()
        self.loggers, self.interrupted, self._settings = [], False, _settings(loss, optim)
        self.average = copy.deepcopy(net).requires_grad_(False).eval() if optim.ema_decay else None
        self._sharded = shard and self.world.size > 1
        self._whole: nn.Module | None = None  # where the main process puts split weights together
        if self._sharded:
            if self.world.is_main:
                self._whole = copy.deepcopy(net).requires_grad_(False).eval()
            for module in filter(None, (net, self.average)):
                distributed.shard(module, self.world)
        self.optimizers = optimizers_of(optim, net, capturable=self.on_graph)
        self.step, self.seconds, self.best = 0, 0.0, -math.inf
        self._evaluated, self._best_is_lost = -1, False  # the last step with an evaluation; whether best.pt is missing
        self._goes_on, self._is_there = False, lambda: True  # whether to go on in the folder; whether that still exists
        self.compile_seconds = 0.0  # of `seconds`: first steps, for which the network was compiled
        self._compiles, self._torn = self.compiled, False  # whether a step was cut off while it changed the network
        self._pending: list[Tensor] = []  # the parts of the loss of each step since the last report
        self._names: list[str] = []
        self._reported = (0, 0.0)  # step and seconds at the last report
        self._wrapped = self._wrap()

    def _wrap(self) -> nn.Module:
        """Compile what is to be compiled; returns the network as the steps call it."""
        if self.on_graph:  # the first steps of which are taken without it
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        if self.compiled:  # the few products in float32 are to be exact
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores .* available but not enabled")
        if self.compiled and self.world.size == 1 and hasattr(self.loss, "compiled"):
            self.loss = self.loss.compiled(dynamic=False)
            return self.net
        net: Any = torch.compile(self.net, dynamic=False) if self.compiled else self.net
        if self.world.size == 1 or self._sharded:
            return net
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        # Buffers that no forward changes are the same everywhere; torch 2.15 has another word for leaving them alone.
        known = inspect.signature(DistributedDataParallel).parameters
        word = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        buffers: dict[str, Any] = {word: bool(self._statistics)}
        return DistributedDataParallel(net, device_ids=ids, **buffers)

    @property
    def how(self) -> str:
        """How steps are computed, in words: what was chosen for "auto" and None."""
        chosen = {"compiled": self.compiled, "each step a CUDA graph": self.on_graph}
        return ", ".join([self.precision, *(words for words, taken in chosen.items() if taken)])

    @property
    def result(self) -> nn.Module:
        """The network to evaluate and keep: the average of the weights if there is one."""
        return self.net if self.average is None else self.average

    @property
    def _run(self) -> Path:
        """Where the run is, to name it in messages."""
        return checkpoint.run_of(self._place)

    @property
    def _place(self) -> Path:
        """The folder, of a Trainer that has one."""
        assert self.folder is not None
        return self.folder

    def resume(self) -> int:
        """Go on from the newest readable checkpoint of the folder, if any; returns the step.

        Raises:
            ValueError: if that checkpoint is of another network, optimizer, seed, monitor or batch size, of other data
                (by `metadata["data"]`) or of a loss with other `settings`, or if there are checkpoints but none can be
                read. Nothing is changed then. Also, after loading, if processes do not see the same folder or data.
        """
        state = checkpoint.load_latest(self.folder) if self.folder else None
        if state is not None:
            self._check_resumable(state)
            self._load(state)
        if not self.world.agrees(self.step):
            raise ValueError(f"the processes would go on from different steps: all must see the same {self.folder}")
        if not self.world.agrees(repr(self.metadata.get("data"))):
            raise ValueError("the processes have different data: all must see the same data.root")
        self._goes_on = True
        return self.step

    def _check_resumable(self, state: dict[str, Any]) -> None:
        if state["metadata"].get("data") != self.metadata.get("data"):
            raise ValueError(f"the run in {self._run} was trained on other data: start another run")
        own = {"seed": self.seed, "monitor": self.monitor, "batch_size": self.batches.batch_size}
        self._check_same(state, own, "trainer")
        checkpoint.check_weights(self.net, state["net"], self._place / checkpoint.LATEST)
        own = {name: value.dtype for name, value in self.net.state_dict().items() if isinstance(value, Tensor)}
        self._check_same({name: state["net"][name].dtype for name in own}, own, "network")
        for which, own in self._settings.items():
            self._check_same(state.get(which, {}), own, which)
        self._check_optimizers(state["optimizers"])

    def _load(self, state: dict[str, Any]) -> None:
        _load_weights(self.net, state["net"])
        if self.average is not None:
            _load_weights(self.average, state["average"] or state["net"])
        self._load_optimizers(state["optimizers"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.best, self._best_is_lost = self._best_of(state)
        self._evaluated = state.get("evaluated", -1)
        self.compile_seconds = state.get("compile_seconds", 0.0)
        self._names, self._pending = state["names"], list(state["pending"].to(self.world.device))
        self._reported = tuple(state["reported"])
        self.precision = state.get("precision", "float32")
        self._forget_graph()  # which knows the moments that these took the place of

    def _best_of(self, state: dict[str, Any]) -> tuple[float, bool]:
        """What a better checkpoint than the best one must exceed, and whether that has to be made anew at once."""
        path = self._place / checkpoint.BEST
        try:
            step = checkpoint.load(path)["step"]
        except ValueError as error:
            if path.exists():
                checks.warn(f"{error}; it is made anew")
            return -math.inf, True
        # A best checkpoint of a later step is from a course that was cut off; this course makes the same one again.
        return (state["best"] if step <= state["step"] else -math.inf), False

    def _check_optimizers(self, states: list[dict[str, Any]]) -> None:
        kept = [[len(group["params"]) for group in state["param_groups"]] for state in states]
        own = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in self.optimizers]
        if kept != own:
            raise ValueError(
                f"the run in {self._run} was trained by other optimizers, of groups of {kept} "
                f"weights, now of {own}: optim must be as it was, with muon_lr or without"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            for own_group, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
                self._check_same({name: value for name, value in group.items() if name != "lr"}, own_group)

    def _load_optimizers(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            groups = [  # how a step is computed is a matter of this device, not of that on which it was kept
                kept | {name: own[name] for name in OF_DEVICE if name in own}
                for kept, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
            ]
            like = {
                index: {name: parameters[index] if getattr(value, "ndim", 0) else value for name, value in own.items()}
                for index, own in state["state"].items()
            }
            moments = distributed.split(state["state"], like)
            optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _check_same(self, kept: dict[str, Any], own: dict[str, Any], of: str = "optim") -> None:
        """Raise a ValueError if the run was trained with another setting, of those that both have."""
        for name in sorted((own.keys() & kept.keys()) - {"params", *OF_DEVICE}):
            old, new = (tuple(value) if isinstance(value, list) else value for value in (kept[name], own[name]))
            if old != new:
                raise ValueError(
                    f"the run in {self._run} was trained with another {of}, whose {name} was {old}, now it is {new}: "
                    "give it as it was, or another folder"
                )

    def fit(self, loggers: Iterable[Logger] = ()) -> None:
        """Train to the last step; after an interruption, another call continues.

        Args:
            loggers: from the module `loggers`, or your own: `Progress(steps)` prints how the loss falls, `MetricsFile`,
                `TensorBoard` and `Pictures` write into files.

        Raises:
            Interrupted: a KeyboardInterrupt, if Ctrl-C or SIGTERM ended training early; with a folder, a checkpoint has
                been written. At the last step it is not raised: `interrupted` says whether there was such a signal.
            ValueError: if the folder holds a run and `resume` was not called, as its checkpoints would be lost; for a
                monitor that is NaN, a loss whose scalars change their names, a batch that cannot be shared, and, with
                several processes, a weight without gradient.
            TrainingError: if the loss is not finite, the folder was deleted, or a step cannot be a CUDA graph.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("training follows gradients: fit() cannot be called in torch.inference_mode()")
        self._check_folder()
        self._mend()
        self.loggers, self.interrupted = list(loggers), False
        self._asked, self._ask_at = (self.step, time.perf_counter()), self.step + 1
        with torch.enable_grad(), Interruption() as interruption, self._followed():
            if self.world.any(self._is_due("evaluate", self._evaluated) or self._best_is_lost):
                self._evaluate()
                if self.step >= self.steps:  # it was stopped between two evaluations, or the last one failed
                    self._save_latest()
            while self.step < self.steps:
                self._train_step()
                with self._kept_if_it_fails():
                    if self._is_due("report"):
                        self._report()
                    if self._is_due("evaluate"):
                        self._evaluate()
                stop = self._is_stopped(interruption.requested)
                if stop or self._is_due("checkpoint"):
                    self._save_latest()
                if stop:
                    break
            self.interrupted = self.world.any(interruption.requested)
        self._forget_graph()  # and the memory that it holds
        self.net.eval()
        if self.step < self.steps:
            words = "; a checkpoint is written" if self.folder else ""
            raise Interrupted(f"stopped at step {self.step} of {self.steps}{words}", kept=self.folder is not None)

    def _is_stopped(self, requested: bool) -> bool:
        """Whether a process was told to stop. All must stop at the same step, so they tell each other every few steps;
        launchers kill what has not ended after some seconds."""
        if self.world.size == 1:
            return requested
        if self.step < self._ask_at:
            return False
        (step, asked), now = self._asked, time.perf_counter()
        told = torch.tensor([float(requested), (now - asked) / (self.step - step)], device=self.world.device)
        stop, pace = self.world.mean(told).tolist()
        self._asked = (self.step, now)
        self._ask_at = self.step + max(1, min(10, int(ASK_EVERY / pace)))
        return stop > 0

    def _mend(self) -> None:
        """Go back to the last checkpoint if a step was cut off while it changed the network."""
        if not self.world.any(self._torn):
            return
        state = checkpoint.load_latest(self.folder) if self.folder else None
        if state is None:
            raise ValueError(
                "the last step was cut off while it changed the network, and there is no checkpoint to go on from: "
                "make a network and a Trainer anew"
            )
        self._load(state)
        self._torn = False

    def _is_due(self, name: str, done: int = -1) -> bool:
        """Whether something is due at this step, unless this is the step at which it was `done` last."""
        return self.step != done and (self.step >= self.steps or self.step % self.every[name] == 0)

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Let `_check_is_there` know what folder the checkpoints go to."""
        if self.folder is None or not self.world.is_main:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with followed(self.folder) as self._is_there:
            yield

    def _check_is_there(self) -> None:
        if not self._is_there():
            raise TrainingError(f"{self.folder} was deleted while this process trained there: it writes nothing more")

    @contextmanager
    def _kept_if_it_fails(self) -> Iterator[None]:
        """Write a checkpoint if a logger, the evaluation, the data or the loss raises, so that no training is lost. A
        step that was cut off while it changed the network is not kept."""
        try:
            yield
        except TrainingError:  # the weights are spoilt
            raise
        except (Exception, KeyboardInterrupt):
            # Others would wait for this one, which has to write with them.
            if self.world.size == 1 and self.step > 0 and not self._torn:
                with suppress(Exception):  # what went wrong first is what to tell
                    self._save_latest()
            raise

    @functools.cached_property
    def _statistics(self) -> set[str]:
        """Names of the network's state besides its weights, such as statistics, which a forward pass may change."""
        return self.net.state_dict().keys() - dict(self.net.named_parameters(remove_duplicate=False)).keys()

    @contextmanager
    def _torn_if_it_counts(self) -> Iterator[None]:
        """Note in `_torn` whether what fails in here has changed the network's statistics."""
        if self._graph is not None:  # in which nothing may be copied
            self._torn = bool(self._statistics)
            yield
            return
        before = {name: value.clone() for name, value in self._buffers().items()}
        try:
            yield
        except BaseException:
            now = self._buffers()
            same = all(value.equal(now[name]) for name, value in before.items())
            self._torn = not (same and before.keys() == now.keys() == self._statistics)
            raise

    @contextmanager
    def _buffers_stay(self) -> Iterator[None]:
        """Raise a ValueError if buffers have been replaced by other tensors while steps become a CUDA graph."""
        recorded = self._graph is not None and self._graph.calls > 1  # the first call may make what others find
        before = self._places() if recorded else {}
        yield
        now = self._places() if recorded else {}
        if moved := [name for name, place in before.items() if now.get(name) != place]:
            raise ValueError(
                f"the network puts new tensors in the place of {', '.join(moved)}, and a CUDA graph would go on with "
                "the old ones: write into these (copy_), or take cuda_graph=False"
            )

    def _places(self) -> dict[str, int]:
        """Where in memory the network's buffers are."""
        return {name: value.data_ptr() for name, value in self.net.named_buffers()}

    def _buffers(self) -> dict[str, Tensor]:
        named = self.net.named_buffers(remove_duplicate=False) if self._statistics else ()
        return {name: value for name, value in named if name in self._statistics}

    def _check_folder(self) -> None:
        if not self._goes_on and self.folder is not None and checkpoint.is_resumable(self.folder):
            raise ValueError(
                f"{self.folder} holds a run, whose checkpoints would be lost: call resume() before fit() to go on with "
                "it, or give another folder"
            )
        self._goes_on = True

    def _train_step(self) -> None:
        start = time.perf_counter()
        self.net.train()
        seed = StepRandom.seed_at(self.seed, self.step)
        for generator in self._generators:
            generator.manual_seed(seed)
        share, decay = self.optim.share_at(self.step, self.steps), self.optim.ema_decay_at(self.step)
        with self._global_generator(), self._kept_if_it_fails():
            self._pending.append(self._take(self._batch(), self.step, share, 1 - decay))
        self.step, self._torn = self.step + 1, False
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        if self._compiles:
            self.compile_seconds, self._compiles = self.compile_seconds + elapsed, False

    @contextmanager
    def _global_generator(self) -> Iterator[None]:
        """Seed torch's global generator for the step, and leave it as it was."""
        if self._graph is not None:  # which has recorded what it draws from
            yield
            return
        with global_generator(self.world.device, derive_seed("global", self.seed, self.step, self.world.rank)):
            yield

    def _batch(self) -> Any:
        """The step's batch; a frozen tokenizer that makes it need not be more exact than the step's own products."""
        with _tf32_convolutions() if self.precision == "bfloat16" else nullcontext():
            batch = self.batches(self.step)
        if self.accumulate > 1 or self.world.size > 1:
            self._check_rows(batch)
        return batch

    def _check_rows(self, batch: Any) -> None:
        """Raise a ValueError unless a batch is exactly a process's share: otherwise images would differ in weight."""
        whole, share = self.batches.batch_size, self.world.share(self.batches.batch_size)
        parts = batch if isinstance(batch, tuple | list) else [batch]
        if self.accumulate > 1 and not all(isinstance(part, Tensor) and part.ndim for part in parts):
            raise ValueError(
                f"accumulate={self.accumulate} takes a batch in parts, which needs a tensor or a tuple of tensors, got "
                f"{', '.join(type(part).__name__ for part in parts)}"
            )
        # Of a batch that stays as it is, the first is the images; what comes with them may have other rows.
        counted = parts if self.accumulate > 1 else parts[:1]
        rows = {len(part) for part in counted if isinstance(part, Tensor) and part.ndim}
        if rows - {share}:
            raise ValueError(
                f"batches gave {' and '.join(map(str, sorted(rows)))} images at step {self.step}, where each of "
                f"{self.world.size} processes takes {share} of the {whole} of a step: with several processes, or "
                "accumulate, every batch must have as many"
            )

    def _take(self, *step: Any) -> Tensor:
        """`_advance`, as a CUDA graph or as it is."""
        if self._graph is None:
            return self._advance(*step)
        try:
            return self._graph(self._advance, *step)
        except NotRecorded as error:
            self._torn = False  # what is recorded is not done
            raise TrainingError(
                f"a step cannot be recorded as a CUDA graph ({error}): trainer.cuda_graph=false trains without one"
            ) from error
        finally:
            self._torn |= self._graph.replays

    def _forget_graph(self) -> None:
        """Let the next steps be recorded anew."""
        if self._graph is not None:
            self.net.zero_grad()  # its gradients are in the graph's memory
        self._graph = StepGraph(self._generators) if self.on_graph else None

    def _advance(self, batch: Any, step: int | Tensor, share: float | Tensor, change: float | Tensor) -> Tensor:
        """All that a step does with its batch; returns the parts of its loss. In a CUDA graph the numbers are tensors.

        Args:
            share: of the peak learning rates.
            change: how far the average of the weights goes towards the new ones.
        """
        self.optim.set_rates(self.optimizers, share)
        self.net.zero_grad()
        with self._torn_if_it_counts(), self._buffers_stay():
            scalars = self._backward(batch, step)
            norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.optim.clip_norm or math.inf)
            scalars["grad_norm"] = distributed.whole(norm)
            self._check_names(list(scalars))
        self._torn = True
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.optim.update_average(self.average, self.net, change)
        self._names = list(scalars)
        return torch.stack(list(scalars.values()))

    def _backward(self, batch: Any, step: int | Tensor) -> dict[str, Tensor]:
        """Gradients of a step's loss, and its parts by name, of a batch that is taken in `accumulate` parts."""
        total: dict[str, Tensor] = {}
        for part, generator in enumerate(self._generators):
            # Each part draws what its rows would draw in one batch: to that end it is a process of its own.
            rank, size = self.world.rank * self.accumulate + part, self.world.size * self.accumulate
            with self._synchronized(part + 1 == self.accumulate):
                with self._autocast():
                    own = _part(batch, part, self.accumulate)
                    found = self.loss(self._wrapped, own, random=StepRandom(generator, rank, size), step=step)
                parts = _checked_parts(found)
                (parts.loss / self.accumulate).backward()
            for name, value in parts.scalars().items():
                total[name] = total.get(name, 0) + _checked_scalar(name, value) / self.accumulate
        return total

    def _check_names(self, names: list[str]) -> None:
        """Raise a ValueError if a loss has other parts than before, so that no means could be reported."""
        if self._pending and names != self._names:
            raise ValueError(
                f"the loss gave {', '.join(names)} at step {self.step} and {', '.join(self._names)} before: its "
                "scalars must have the same names at every step"
            )

    def _written(self) -> dict[str, int]:
        """How often each gradient was written to, -1 where there is none."""
        named = ((name, weight) for name, weight in self.net.named_parameters() if weight.requires_grad)
        return {name: -1 if weight.grad is None else weight.grad._version for name, weight in named}

    @contextmanager
    def _synchronized(self, last: bool) -> Iterator[None]:
        """Sum gradients over the processes only after the last part of a step.

        Raises:
            ValueError: for a weight that this part has not used: DDP would leave this process's gradients as they
                are, and report it only a step later.
        """
        if self._sharded:
            distributed.sum_gradients(self.net, last)
        if not isinstance(self._wrapped, DistributedDataParallel):
            yield
            return
        if not last:
            with self._wrapped.no_sync():
                yield
            return
        before = self._written()
        yield
        if idle := [name for name, count in self._written().items() if count == before[name]]:
            raise ValueError(
                f"step {self.step} gave no gradient to {', '.join(idle[:3])}: several processes cannot share what not "
                "every step uses. If none uses it, freeze it (requires_grad_(False)) or train with shard=True"
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

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
        self._log("scalars", self.step, scalars)

    def _wait(self) -> None:
        """Wait until a GPU has finished the steps that were launched, and count the time as training."""
        with self._counted():
            distributed.synchronize(self.world.device)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the time spent in here as training."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def _evaluate(self) -> None:
        self._wait()
        if self._pending:
            self._pending_values()  # what a bad step has spoilt is not measured, and never the best
        result = self._whole_result() if self.evaluate is not None else None
        if self.evaluate is not None and result is not None and self.world.is_main:
            result.eval()
            with torch.no_grad():
                numbers, pictures = _measured(self.evaluate(result))
            self._log("scalars", self.step, numbers)
            for name, pixels in pictures.items():
                self._log("picture", self.step, name, pixels)
            if self.monitor not in numbers:
                raise ValueError(f"monitor must be one of {', '.join(numbers)}, got {self.monitor!r}")
            value = numbers[self.monitor]
            if math.isnan(value):
                healthy = all(weight.isfinite().all() for weight in result.parameters())
                raise (ValueError if healthy else TrainingError)(
                    f"{self.monitor}, which says what checkpoint is the best, is NaN at step {self.step}: what "
                    f"evaluate gave is {numbers}"
                )
            # One of -inf is the best one, too, while there is no other.
            if (value > self.best or self.best == -math.inf) and self.folder is not None:
                self._check_is_there()
                state = {
                    "step": self.step,
                    "net": result.state_dict(),
                    "metrics": numbers,
                    "metadata": self.metadata,
                }
                checkpoint.save(self.folder / checkpoint.BEST, state)
                self.best = value
        self._evaluated, self._best_is_lost = self.step, False
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
            self._check_is_there()
            checkpoint.save_latest(self.folder, state)
        self.world.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "seed": self.seed,
            "monitor": str(self.monitor),
            "batch_size": self.batches.batch_size,
            **self._settings,
            "optimizers": [_plain_rates(optimizer.state_dict()) for optimizer in self.optimizers],
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "best": self.best,
            "evaluated": self._evaluated,
            "names": self._names,
            "pending": torch.stack(self._pending) if self._pending else torch.empty(0),
            "reported": self._reported,
            "precision": self.precision,
            "metadata": self.metadata,
        }

    def _log(self, what: str, *values: Any) -> None:
        """Tell all loggers "scalars" or a "picture", also where one of them fails."""
        failed = []
        for logger in self.loggers if self.world.is_main else ():
            try:
                getattr(logger, what)(*values)
            except Exception as error:
                failed.append(error)
        if failed:
            raise failed[0]


@contextmanager
def _tf32_convolutions() -> Iterator[None]:
    """Convolutions of float32 numbers on GPUs multiply in TF32 in here."""
    cudnn: Any = torch.backends.cudnn
    parts = (cudnn.conv, cudnn.rnn)  # asked for both, torch wants them to be the same
    kept = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "tf32"
        yield
    finally:
        for part, precision in zip(parts, kept, strict=True):
            part.fp32_precision = precision


def _settings(loss: Any, optim: Optim) -> dict[str, dict[str, Any]]:
    """The settings by which an objective (if it has `settings`) and an optimizer are compared when a run is resumed:
    numbers, words or lists of these, by name, that a checkpoint can hold."""
    told = getattr(loss, "settings", None)
    of = {"loss": told if isinstance(told, dict) else {}}
    of["optim"] = {field.name: getattr(optim, field.name, None) for field in fields(optim)}
    of = checkpoint.plain(of)
    return {which: {name: value for name, value in own.items() if _is_plain(value)} for which, own in of.items()}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) in (list, tuple) else type(value) in PLAIN


def _plain_rates(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, its learning rates as numbers; in a CUDA graph they are tensors."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def _part(batch: Tensor | tuple[Tensor, ...], part: int, parts: int) -> Tensor | tuple[Tensor, ...]:
    """One of equally many rows of a batch."""
    if parts == 1:
        return batch
    if isinstance(batch, Tensor):
        return batch.chunk(parts)[part]
    return tuple(tensor.chunk(parts)[part] for tensor in batch)
