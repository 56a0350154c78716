"""Optimizers: AdamW, and Muon for the matrices between hidden layers, with their schedules."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from biglearn_vae import checks
from biglearn_vae.distributed import is_split, split, whole

SCHEDULES = ("constant", "cosine")
SMALL = 2**15  # numbers of a matrix below which a CPU is faster at several of them at once


@dataclass(frozen=True)
class Optim:
    """AdamW, or Muon and AdamW, with a warm-up, a schedule, gradient clipping and an average of the weights.

    Args:
        lr: peak learning rate of AdamW.
        betas: AdamW's, each in [0, 1).
        eps: AdamW's.
        weight_decay: on matrices only; biases, LayerNorms and single learned vectors are not decayed.
        warmup_steps: steps of linear warm-up.
        schedule: "constant", or "cosine" to 0 after the last step.
        clip_norm: largest gradient norm; None does not clip.
        ema_decay: decay of the exponential moving average of the weights that is evaluated and kept as the result;
            0 evaluates the weights themselves.
        muon_lr: peak learning rate of Muon (Jordan et al. 2024), which then takes the matrices between hidden layers,
            those of the members of a `ModuleList` such as the blocks of a transformer, and the kernels of convolutions,
            and leaves the rest to AdamW. Its updates are orthogonalised and scaled to the size of AdamW's (Liu et al.
            2025): their singular values are 0.2 times the root of the larger side, so that a rate that suits one
            network is too high for a wider one, by the root of the ratio of widths (`optim=muon` allows for this).
            None leaves everything to AdamW.

    Raises:
        ValueError: on values outside these ranges.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: str = "constant"
    clip_norm: float | None = None
    ema_decay: float = 0.0
    muon_lr: float | None = None

    def __post_init__(self):
        checks.check_choice("schedule", self.schedule, SCHEDULES)
        plain: dict[str, Any] = {"schedule": SCHEDULES[SCHEDULES.index(self.schedule)]}
        plain["betas"] = tuple(checks.real_numbers("betas", self.betas, 2, "[0, 1)"))
        plain["warmup_steps"] = checks.whole_number("warmup_steps", self.warmup_steps, 0)
        intervals = {"lr": "(0, inf)", "eps": "(0, inf)", "weight_decay": "[0, inf)", "ema_decay": "[0, 1)"}
        optional = {name: "(0, inf)" for name in ("clip_norm", "muon_lr") if getattr(self, name) is not None}
        for name, interval in (intervals | optional).items():
            plain[name] = checks.real_number(
                name, getattr(self, name), interval, ", or None" if name in optional else ""
            )
        for name, value in plain.items():  # of other types, such as NumPy's, a checkpoint could not be read again
            object.__setattr__(self, name, value)

    def optimizers(
        self, net: nn.Module, fused: bool | None = None, capturable: bool = False
    ) -> list[torch.optim.Optimizer]:
        """The optimizers that together train all of the network's parameters; each group's peak rate is its "peak".

        A subclass may return others of torch's, from `def optimizers(self, net, **_)`, such as
        `[torch.optim.SGD(net.parameters(), self.lr)]`. If a group has no "peak", the learning rate that it was made
        with is its peak.

        Args:
            fused: whether AdamW is one fused kernel; False leaves that to torch, None fuses it wherever possible.
            capturable: whether AdamW may be part of a CUDA graph.
        """
        hidden = _hidden_weights(net) if self.muon_lr else {}
        others = [p for p in net.parameters() if p not in hidden]
        if fused is None:
            fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in others)
        groups = [
            {"params": [p for p in others if _is_matrix(p)], "weight_decay": self.weight_decay, "peak": self.lr},
            {"params": [p for p in others if not _is_matrix(p)], "weight_decay": 0.0, "peak": self.lr},
        ]
        adamw: dict[str, Any] = dict(lr=self.lr, betas=tuple(self.betas), eps=self.eps, capturable=capturable)
        adamw["fused"] = fused or None  # None is torch's default
        result: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **adamw)] if others else []
        if hidden and self.muon_lr:
            result.append(Muon(list(hidden), self.muon_lr, self.weight_decay))
        return result

    def share_at(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at this step, counted from 0, of a run of `steps`."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return warm * (1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    def set_rates(self, optimizers: Iterable[torch.optim.Optimizer], share: float | Tensor) -> None:
        """Set the learning rates of these optimizers to this share of their peaks, a number or a tensor ()."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group.setdefault("peak", group["lr"])

    def ema_decay_at(self, step: int) -> float:
        """Decay of the average of the weights at this step, counted from 0: smaller at first, to follow closely."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    @staticmethod
    @torch.no_grad()
    def update_average(average: nn.Module, net: nn.Module, change: float | Tensor) -> None:
        """Move the average of a network's weights towards them by this share of the way, a number or a tensor ();
        buffers, such as the statistics of a BatchNorm, are copied."""
        means: list[Tensor] = list(average.parameters())
        weights: list[Tensor] = list(net.parameters())
        if buffers := list(average.buffers()):
            torch._foreach_copy_(buffers, list(net.buffers()))
        if not isinstance(change, Tensor):
            torch._foreach_lerp_(means, weights, change)
            return
        # A step of SGD that ascends `weights . means - means^2 / 2`: torch has it as one kernel, unlike the above.
        for mean, weight in zip(means, weights, strict=True):
            mean.grad = weight.detach()
        step = torch.optim.SGD(means, weight_decay=1, maximize=True, fused=True)
        step.param_groups[0]["lr"] = change  # only here, since a rate that is given is looked at
        step.step()
        average.zero_grad()


def optimizers_of(optim: Optim, net: nn.Module, **options: bool) -> list[torch.optim.Optimizer]:
    """What `optim.optimizers` makes of a network, each group with its "peak".

    Raises:
        ValueError: if a subclass returns something else.
    """
    made = optim.optimizers(net, **options)
    optimizers = list(made) if isinstance(made, Iterable) else [made]
    if not optimizers or not all(isinstance(one, torch.optim.Optimizer) for one in optimizers):
        kinds = ", ".join(type(one).__name__ for one in optimizers)
        raise ValueError(
            f"{type(optim).__name__}.optimizers must return a list of torch's optimizers, such as "
            f"[torch.optim.SGD(net.parameters(), self.lr)], got {kinds or 'none'}"
        )
    optim.set_rates(optimizers, 1.0)
    return optimizers


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with updates of the size of AdamW's, also for kernels (M, N, P, P), as matrices (M, N P P).

    It takes the same steps, but of many matrices at once, since launching them one by one takes time; and in float32
    where bfloat16 is slow: on CPUs without support for it torch's own take 20 times as long.

    Args:
        weights: parameters of two axes or four.
        lr: peak learning rate, "peak" of the group.
        weight_decay: as AdamW's.
    """

    def __init__(self, weights: Sequence[nn.Parameter], lr: float, weight_decay: float):
        self._weights = weights
        # Views, so that an update of the matrix is one of the kernel; `view` fails where it would be a copy.
        matrices = [p if p.ndim == 2 else p.detach().view(len(p), -1) for p in weights]
        group = {"params": matrices, "peak": lr}
        super().__init__([group], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights from their gradients; returns what `closure` returns, which may compute these first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for weight, matrix in zip(self._weights, group["params"], strict=True):
            if matrix is not weight:
                matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        gradients = {matrix: matrix.grad for matrix in group["params"] if matrix.grad is not None}
        if gradients:
            self._update(list(gradients), list(gradients.values()), group)
        for weight, matrix in zip(self._weights, group["params"], strict=True):
            if matrix is not weight:
                matrix.grad = None  # or it would keep a CUDA graph's memory, the network's own being let go
        return loss

    def _update(self, matrices: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for matrix, gradient in zip(matrices, gradients, strict=True):
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(gradient)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        lerp = _lerp if any(map(is_split, matrices)) else torch._foreach_lerp
        directions = lerp(gradients, momenta, group["momentum"])  # Nesterov's
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        fast = has_fast_bfloat16(matrices[0].device)
        for part in _alike(matrices):
            own, changed = [whole(directions[i]) for i in part], [matrices[i] for i in part]
            x = torch.stack(own) if len(part) > 1 else own[0]
            low = x.bfloat16() if fast else x
            updates = orthogonalised(low, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(x.dtype)
            updates = updates * (-0.2 * math.sqrt(max(x.shape[-2:])) * group["lr"])
            torch._foreach_add_(changed, split(list(updates.view(-1, *x.shape[-2:])), changed))


def _lerp(starts: Sequence[Tensor], ends: Sequence[Tensor], share: float) -> list[Tensor]:
    """`torch._foreach_lerp`, which torch 2.11 does not have for what is split over processes."""
    return [start.lerp(end, share) for start, end in zip(starts, ends, strict=True)]


def _alike(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of matrices that are worth orthogonalising together: of one shape, on GPUs or small; split ones singly,
    so that no process holds several whole."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        places.setdefault(tuple(matrix.shape), []).append(i)
    for part in places.values():
        first = matrices[part[0]]
        together = (first.is_cuda or first.numel() < SMALL) and not is_split(first)
        yield from [part] if together else [[i] for i in part]


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix (M, N) or several (K, M, N), singular values brought near 1 by Newton-Schulz steps (Jordan 2024)."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # no singular value is above 1
    multiply = torch.baddbmm if x.ndim == 3 else torch.addmm
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies faster in bfloat16: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    able = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in able)


def _is_matrix(weight: Tensor) -> bool:
    """Whether it is decayed; a learned vector may be (1, 1, d) or (d, 1, 1)."""
    return weight.ndim == 2 or weight.numel() > max(weight.shape, default=1)


def _hidden_weights(net: nn.Module) -> dict[nn.Parameter, None]:
    """The matrices of the members of a network's `ModuleList`s and the kernels of its convolutions, each once; empty
    ones, and kernels that are not contiguous in memory, are left to AdamW."""
    lists = (module for module in net.modules() if isinstance(module, nn.ModuleList))
    matrices = (p for blocks in lists for p in blocks.parameters() if p.ndim == 2)
    convolutions = (module for module in net.modules() if isinstance(module, nn.modules.conv._ConvNd))
    kernels = [module._parameters.get("weight") for module in convolutions]  # None where it is computed
    found = [*matrices, *(kernel for kernel in kernels if kernel is not None and kernel.ndim == 4)]
    usable = (p for p in found if p.numel() and p.is_floating_point() and (p.ndim == 2 or p.is_contiguous()))
    return dict.fromkeys(usable)
