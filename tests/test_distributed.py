import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from biglearn_vae import (
    BigLearnELBO,
    MaskSampler,
    Optim,
    StepRandom,
    Trainer,
    TwoStackViT,
    UniversalViT,
    World,
    checkpoint,
    distributed,
)
from biglearn_vae.data import Batches, ImageSet

BATCH = 8
TINY = dict(grid=(2, 3), token_dim=5, dim=16, z_dim=3, heads=2)
METHODS = {
    "vae": (lambda: TwoStackViT(**TINY, depth=(2, 1)), dict(prior="standard", masks=MaskSampler(joint=1))),
    "biglearn_t": (lambda: TwoStackViT(**TINY, depth=(2, 1)), dict(masks=MaskSampler((2, 1), (1, 2), joint=0.3))),
    "biglearn_u": (lambda: UniversalViT(**TINY, depth=2), dict(masks=MaskSampler(ratios_per="step"))),
}


def loss_and_gradients(method: str, world: World) -> dict[str, torch.Tensor]:
    """One training step's loss and gradients on this process's share of a global batch."""
    build, settings = METHODS[method]
    torch.manual_seed(0)
    net = build().double()
    model = DistributedDataParallel(net) if world.size > 1 else net
    batch = torch.randn(BATCH, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = world.share(BATCH)
    x = batch[world.rank * share : (world.rank + 1) * share]
    loss = BigLearnELBO(0.3, **settings)(model, x, random=StepRandom.at(2, 3, world)).loss
    loss.backward()
    return {"loss": world.mean(loss.detach())} | {name: p.grad for name, p in net.named_parameters()}


def trained(folder: Path, world: World, steps: int, muon_lr: float | None = None, **options) -> Trainer:
    """A run in a folder, gone on with if there is something, on random images: the same ones for all."""
    torch.manual_seed(0)
    net = UniversalViT(**TINY, depth=2).double()
    images = torch.randint(256, (20, 1, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batches = Batches(ImageSet(images), BATCH, 3, world, transform=lambda x: x.squeeze(1).double())
    trainer = Trainer(
        net,
        BigLearnELBO(0.3, MaskSampler(joint=0.2)),
        batches,
        # Adam divides by the root of squared gradients: with a tiny eps, the rounding errors of a gradient that is 0 in
        # exact arithmetic (a bias of keys has none) would become whole steps.
        Optim(lr=0.01, eps=1e-3, clip_norm=1.0, ema_decay=0.9, muon_lr=muon_lr),
        steps=steps,
        folder=folder,
        world=world,
        evaluate=lambda net: ({"valid/elbo": -sum(p.double().abs().sum().item() for p in net.parameters())}, {}),
        evaluate_every=4,
        report_every=2,
        checkpoint_every=4,
        **options,
    )
    trainer.resume()
    trainer.fit()
    return trainer


class Block(nn.Module):
    """A list in a member of a list."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 6), nn.Conv2d(1, 1, 3, padding=1)])

    def forward(self, x):
        return self.parts[1](self.parts[0](x).view(-1, 1, 2, 3)).view(-1, 6).tanh()


class Nested(nn.Module):
    """Lists in lists, a member of two of them, matrices of fewer rows than there are processes."""

    def __init__(self):
        super().__init__()
        first = Block()
        self.lists = nn.ModuleList([nn.ModuleList([first, nn.Linear(6, 6)]), nn.ModuleList([first, nn.Linear(6, 1)])])
        self.unused = nn.Linear(1, 1)

    def forward(self, x, used):
        for module in (module for own in self.lists for module in own):
            x = module(x)
        return self.unused(x) if used else x


@dataclass
class Parts:
    loss: torch.Tensor

    def scalars(self):
        return {"loss": self.loss}


@dataclass
class Rows:
    """Images of a process's share, beside a table of other length."""

    world: World
    table: int
    batch_size: int = BATCH

    def __call__(self, step):
        g, share = torch.Generator().manual_seed(step), self.world.share(BATCH)
        x = torch.randn(BATCH, 6, dtype=torch.float64, generator=g)
        return x[self.world.rank * share : (self.world.rank + 1) * share], torch.ones(self.table, dtype=torch.float64)


def nested(folder: Path, world: World, frozen: bool = True, uses: bool = False, **options) -> Trainer:
    """A run of a network of lists in lists, of which a part is not used, or in the first part of a step alone."""
    torch.manual_seed(0)
    net = Nested().double()
    net.unused.requires_grad_(not frozen)

    def loss(net, batch, *, random, step):
        x, scale = batch
        used = uses and random.rank % 2 == 0  # of the parts of a step
        return Parts((net(x * scale.mean(), used) - 1).square().mean())

    optim = Optim(lr=0.01, eps=1e-3, muon_lr=0.01)
    rows = Rows(world, table=world.share(BATCH) if "accumulate" in options else 5)
    trainer = Trainer(net, loss, rows, optim, steps=4, folder=folder, world=world, **options)
    trainer.fit()
    return trainer


def refusal(call: Callable, *arguments, **options) -> str:
    """What a ValueError says."""
    try:
        call(*arguments, **options)
    except ValueError as error:
        return str(error)
    return "not refused"


MODES = {"ddp": {}, "parts": {"accumulate": 2}, "fsdp": {"shard": True}, "fsdp_parts": {"shard": True, "accumulate": 2}}


def work(folder: str) -> None:
    """What each of several processes does."""
    world = distributed.start("cpu")
    for mode, options in MODES.items():
        trained(Path(folder) / mode, world, 6, **options)
        trained(Path(folder) / f"one_then_{mode}", world, 12, **options)
        trained(Path(folder) / f"muon_{mode}", world, 6, muon_lr=0.01, **options)
    for mode in ("ddp", "fsdp"):
        nested(Path(folder) / f"nested_{mode}", world, **MODES[mode])
    values = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    unseeded = torch.nn.BatchNorm1d(3)
    torch.nn.init.constant_(unseeded.weight, world.rank + 2.0)
    unseeded.running_mean += world.rank + 1.0
    distributed.take_from_first(unseeded, world)
    torch.save(
        {
            "rank and size": (world.rank, world.size),
            "main": world.is_main,
            "mean": world.mean(values),
            "values": values,
            "taken": unseeded.state_dict(),
            "agrees": [world.agrees(own) for own in (world.rank, 7, 0.1, "words", f"words of {world.rank}")],
            "other network": refusal(distributed.take_from_first, torch.nn.Linear(2, 2 + world.rank), world),
            "shares what none uses": refusal(nested, Path(folder) / "none", world, frozen=False, shard=True),
            "idle": refusal(nested, Path(folder) / "idle", world, frozen=False),
            "idle at last": refusal(nested, Path(folder) / "last", world, frozen=False, uses=True, accumulate=2),
            "any": [world.any(flag) for flag in (False, world.rank == 1, True)],
            "steps": {method: loss_and_gradients(method, world) for method in METHODS},
        },
        Path(folder) / f"{world.rank}.pt",
    )
    world.barrier()
    distributed.stop()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """What `work` found in each of two real processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    trained(folder / "one", World(), 6)
    for mode in MODES:
        shutil.copytree(folder / "one", folder / f"one_then_{mode}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = "import sys, test_distributed; test_distributed.work(sys.argv[1])"
    shared = dict(
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        PYTHONFAULTHANDLER="1",  # says where, if one of them crashes
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    )
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            env = os.environ | shared | dict(RANK=str(rank), LOCAL_RANK=str(rank))
            command = [sys.executable, "-c", script, str(folder)]
            with log.open("w") as out:
                processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(log.read_text() for log in logs)
    return [torch.load(folder / f"{rank}.pt") | {"folder": folder} for rank in range(2)]


def test_a_device_may_be_named():
    assert World(device="cpu") == World() and World(device="cuda:1").device == torch.device("cuda", 1)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_step_like_one(two_processes, method):
    expected = loss_and_gradients(method, World())
    for found in two_processes:
        assert found["steps"][method].keys() == expected.keys()
        for name, value in found["steps"][method].items():
            assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_run(folder: Path, expected: Path) -> None:
    for name in (checkpoint.LATEST, checkpoint.BEST):
        found, wanted = checkpoint.load(folder / name), checkpoint.load(expected / name)
        assert found["step"] == wanted["step"] and found.keys() == wanted.keys()
        for key in ("net", "average", "optimizers", "pending", "metrics", "best"):
            if key in wanted:
                assert_close(found[key], wanted[key], rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_like_one_and_read_each_others_checkpoints(two_processes, mode, tmp_path):
    folder = two_processes[0]["folder"]
    assert_same_run(folder / mode, folder / "one")
    trained(tmp_path / "one", World(), 12)
    shutil.copytree(folder / mode, tmp_path / "then_one")
    trained(tmp_path / "then_one", World(), 12)
    assert_same_run(tmp_path / "then_one", tmp_path / "one")
    assert_same_run(folder / f"one_then_{mode}", tmp_path / "one")


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_like_one_with_muon(two_processes, mode, tmp_path):
    one = trained(tmp_path, World(), 6, muon_lr=0.01)
    found = checkpoint.load(two_processes[0]["folder"] / f"muon_{mode}" / checkpoint.LATEST)
    # Muon orthogonalises in bfloat16 where that is fast. A matrix moves by some 0.05
    # in these steps; orthogonalising each process's part of it by itself would make a difference of that size.
    assert_close(found["net"], one.net.state_dict(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_lists_in_lists_train_like_one(two_processes, mode, tmp_path):
    expected = nested(tmp_path, World()).net.state_dict()
    found = checkpoint.load(two_processes[0]["folder"] / f"nested_{mode}" / checkpoint.LATEST)
    assert_close(found["net"], expected, rtol=0, atol=2e-4)


def test_processes_know_whether_they_agree(two_processes):
    for found in two_processes:
        assert found["agrees"] == [False, True, True, True, False]
        assert found["other network"].startswith("the processes have networks of different shapes or types")
        for idle in ("idle", "idle at last"):
            assert found[idle].startswith("step 0 gave no gradient to unused.weight, unused.bias: several processes")
        assert found["shares what none uses"] == "not refused"


def test_reductions_over_two_processes(two_processes):
    for rank, found in enumerate(two_processes):
        assert found["rank and size"] == (rank, 2)
        assert found["main"] == (rank == 0)
        assert found["mean"].tolist() == [1.5, 15.0]
        assert found["any"] == [False, True, True]


def test_all_start_from_the_network_of_the_first(two_processes):
    for found in two_processes:
        assert found["taken"]["weight"].eq(2).all() and found["taken"]["running_mean"].eq(1).all()


def test_mean_leaves_its_argument_alone(two_processes):
    for rank, found in enumerate(two_processes):
        assert found["values"].tolist() == [1.0 * (rank + 1), 10.0 * (rank + 1)]


def test_one_process_reduces_to_itself():
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(World().mean(values), values)
    assert World().any(True) and not World().any(False)
    assert World().is_main and not World(rank=1, size=2).is_main


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_all_processes_are_those_of_one(size):
    rows = BATCH // size
    one = StepRandom.at(5, 7, World())
    sampler = MaskSampler(joint=0.2)
    expected = [
        *one.rows(BATCH, lambda count, generator: sampler(count, 6, generator)),
        one.normal((BATCH, 3), torch.float32),
        one.normal((BATCH, 2, 4), torch.float64),
        one.rows(BATCH, lambda count, generator: torch.randperm(count, generator=generator)),
    ]
    found = []
    for rank in range(size):
        random = StepRandom.at(5, 7, World(rank, size))
        found.append(
            [
                *random.rows(rows, lambda count, generator: sampler(count, 6, generator)),
                random.normal((rows, 3), torch.float32),
                random.normal((rows, 2, 4), torch.float64),
                random.rows(rows, lambda count, generator: torch.randperm(count, generator=generator)),
            ]
        )
    for whole, *parts in zip(expected, *found, strict=True):
        assert all(len(part) == rows for part in parts)
        assert torch.equal(torch.cat(parts), whole)


def test_step_random_is_a_function_of_seed_and_step():
    def draw(seed, step):
        return StepRandom.at(seed, step, World()).normal((4,), torch.float64)

    assert torch.equal(draw(0, 0), draw(0, 0))
    draws = torch.stack([draw(seed, step) for seed in range(10) for step in range(10)])
    assert len(draws.unique()) == draws.numel()


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert distributed.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, expected in ((7, 7), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert distributed.cores() == expected


def test_derive_seed_is_the_same_everywhere():
    # Runs of earlier versions can be repeated only as long as these stay.
    assert distributed.derive_seed("step", 0, 0) == 46_582_905_400_180_972
    assert distributed.derive_seed(1) == 24_320_571_503_961_036
    for number in (np.int64(1), torch.tensor(1), np.uint8(1)):
        assert distributed.derive_seed(number) == distributed.derive_seed(1)
    assert distributed.derive_seed(np.float64(0.1), "a") == distributed.derive_seed(0.1, "a")


def test_derive_seed_tells_its_parts_apart():
    grid = {distributed.derive_seed("step", seed, step) for seed in range(100) for step in range(100)}
    assert len(grid) == 10_000
    parts = [(1,), ("1",), (1, 2), (2, 1), (12,), ("1", 2), ("a", 12), ("a", 1, 2), ("a1", 2), ("b", 1, 2), ()]
    assert len({distributed.derive_seed(*part) for part in parts}) == len(parts)
    assert all(0 <= seed < 2**63 for seed in grid)


@pytest.mark.parametrize(("size", "batch_size", "share"), [(1, 7, 7), (2, 8, 4), (4, 4, 1)])
def test_share(size, batch_size, share):
    assert World(rank=0, size=size).share(batch_size) == share


@pytest.mark.parametrize(("size", "batch_size"), [(2, 7), (4, 2), (1, 0), (2, 0), (2, -2)])
def test_share_needs_a_multiple(size, batch_size):
    expected = f"all {size} processes" if batch_size > 0 else "batch_size must be at least 1"
    with pytest.raises(ValueError, match=f"{expected}.* got {batch_size}$"):
        World(rank=0, size=size).share(batch_size)


def test_pick_device():
    assert distributed.pick_device("cpu") == torch.device("cpu")
    assert distributed.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        assert distributed.pick_device("cuda") == distributed.pick_device("auto") == torch.device("cuda:0")


@pytest.mark.parametrize("device", ["toaster", "", "cpu:x"])
def test_unknown_device_is_named(device):
    with pytest.raises(ValueError, match=f"unknown device '{device}': use auto, cpu"):
        distributed.pick_device(device)


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_absent_device_is_named(device):
    with pytest.raises(ValueError, match=f"'{device}' is not available here"):
        distributed.pick_device(device)


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match="'cuda:99' is not available here"):
        distributed.pick_device("cuda", local_rank=99)


def test_start_without_torchrun_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not distributed.under_torchrun()
    assert distributed.start("cpu") == World(0, 1, torch.device("cpu"))
    distributed.stop()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [(dict(RANK="0", WORLD_SIZE="1"), False), (dict(RANK="1", WORLD_SIZE="2"), True), (dict(WORLD_SIZE="2"), False)],
)
def test_under_torchrun(monkeypatch, variables, expected):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.under_torchrun() is expected
