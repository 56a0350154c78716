"""The benchmark: all stages take the same step, its operations are counted right, and the table's arithmetic holds."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import run_here
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from biglearn_vae import BigLearnELBO, MaskSampler, Optim, Patchify, TwoStackViT, UniversalViT, commands, config
from biglearn_vae import benchmark as timing
from biglearn_vae.data import ImageSet

ROOT = Path(__file__).parents[1]
SMALL = ["case.depth=2", "model.dim=16", "model.heads=2", "trainer.batch_size=8"]
TOKENS = Patchify(image_size=(4, 6), patch_size=2, channels=3)  # L = 6, D = 12


def network(kind: str = "universal", **sizes):
    torch.manual_seed(0)
    sizes = dict(grid=TOKENS.grid, token_dim=TOKENS.token_dim, dim=16, z_dim=3, heads=2) | sizes
    net = UniversalViT(**sizes, depth=3) if kind == "universal" else TwoStackViT(**sizes, depth=(2, 1))
    with torch.no_grad():
        for parameter in net.parameters():  # none at a special value such as a zero bias
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def work(net, double: bool = False, **changes) -> timing.Work:
    """A training on random images; in float64, with gradients as they are, so that stages can be compared."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (20, 3, 4, 6), dtype=torch.uint8, generator=generator)
    sources = torch.randint(256, (20, 1, 5, 5), dtype=torch.uint8, generator=generator)
    settings = dict(
        loss=BigLearnELBO(beta=0.5, masks=MaskSampler(s_ratio=(1, 1), t_ratio=(2, 0.5))),
        optim=Optim(ema_decay=0.9),
        images=ImageSet(pixels),
        sources=sources,
        encode=(lambda images: TOKENS.encode(images).double()) if double else TOKENS.encode,
        batch_size=8,
        total=10,
    )
    return timing.Work(net.double() if double else net, **settings | changes)


def gradients(net) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def stages() -> dict[str, frozenset[str]]:
    dropping = timing.Plan().chosen("bfloat16", "cuda", "drop")
    return dropping | timing.Plan().chosen("bfloat16", "cuda")


@pytest.mark.parametrize("prior", ["learned", "standard"])
@pytest.mark.parametrize("kind", ["universal", "two-stack"])
def test_all_stages_take_the_same_step(kind, prior, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net, **_: compiled.append(net) or net)  # which would take minutes
    job = work(network(kind), double=True, loss=BigLearnELBO(beta=0.5, prior=prior))
    plain = timing.step_of(job, stages()["plain"])
    x, S, T, noise = next(timing.resident_draws(job))
    parts = plain.objective(x, S, T, noise)
    parts["loss"].backward()
    for name, measures in stages().items():
        if name == "plain":
            continue
        step = timing.step_of(job, measures - {"drop", "cuda_graph"})  # another function, and of a GPU
        step()
        torch.testing.assert_close(gradients(step.net), gradients(plain.net), rtol=1e-8, atol=1e-8, msg=name)
        loss = step.logged["loss"] if "fused" not in measures else step.trainer._pending[0][0].item()
        assert loss == pytest.approx(parts["loss"].item(), rel=1e-8), name
    assert [function.__name__ for function in compiled] == ["terms"] * 2  # of the objective, with the network in it


def test_the_same_weights_and_averages_come_out_of_several_steps():
    job = work(network(), double=True, optim=Optim(lr=0.01, clip_norm=1.0, ema_decay=0.9, warmup_steps=2))
    slow, fast = (timing.step_of(job, stages()[name]) for name in ("resident", "fused"))
    for _ in range(4):  # over the end of an epoch
        slow()
        fast()
    for mine, its in ((slow.net, fast.net), (slow.average, fast.trainer.average)):
        for a, b in zip(mine.parameters(), its.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert not job.net.token_in.weight.equal(slow.net.token_in.weight)  # a stage trains a copy


def test_the_plain_version_sees_every_image_once_an_epoch_and_nothing_of_other_shape():
    job = work(network())
    draws = timing.loader_draws(job)
    first = [next(draws) for _ in range(2)]  # 16 of 20 images, then a new epoch
    assert all(x.shape == (8, 6, 12) and noise.shape == (8, 3) for x, _, _, noise in first)
    assert len(torch.cat([x for x, *_ in first]).unique(dim=0)) == 16
    assert next(draws)[0].shape == (8, 6, 12)


def test_pictures_are_the_images_that_are_resident():
    _, sources, _ = timing.load_images({"name": "digits", "image_size": 8, "channels": 3}, 4)
    images, _, note = timing.load_images({"name": "digits", "image_size": 8, "channels": 3}, 4)
    pictures = timing.PictureFolder(sources, (3, 8, 8))
    assert len(pictures) == len(images) == 1200 and note == "1,200 images of digits"
    assert pictures[7].equal(images[7:8][0])


def test_random_images_stand_for_absent_ones(monkeypatch):
    def absent(**_):
        raise ValueError("not there")

    monkeypatch.setattr(timing.data, "load", absent)
    images, sources, note = timing.load_images({"name": "mnist", "image_size": 32, "channels": 3}, 128)
    assert images.pixels.shape[1:] == (3, 32, 32) and sources.shape[1:] == (1, 28, 28) and "random" in note
    assert images.pixels.dtype == sources.dtype == torch.uint8
    faces, sources, note = timing.load_images({"name": "celeba", "image_size": 16, "channels": 3}, 1200)
    assert faces.pixels.shape == sources.shape == (1200, 3, 16, 16) and "random images (celeba" in note
    with pytest.raises(ValueError, match="not there"):
        timing.load_images({"name": "image_folder", "image_size": 32, "channels": 3}, 128)
    with pytest.raises(ValueError, match="not there"):
        timing.load_images({"name": "mnist", "image_size": 32, "channels": 3}, 128, stand_ins=False)


@pytest.mark.parametrize("settings", [{}, {"joint": 0.5}, {"ratios_per": "step"}, {"joint": 1.0}])
def test_masks_one_by_one_have_the_distribution_of_the_sampler(settings):
    q = MaskSampler(s_ratio=(1.0, 2.0), t_ratio=(2.0, 0.5), **settings)
    torch.manual_seed(0)
    numbers = random.Random(0)
    many, rounds = (2000, 1) if q.ratios_per == "sample" else (1, 2000)
    drawn = [timing.masks_one_by_one(q, many, 6, numbers) for _ in range(rounds)]
    S, T = (torch.cat(part) for part in zip(*drawn, strict=True))
    assert not (S & T).any() and T.any(-1).all()
    generator = torch.Generator().manual_seed(0)
    expected = [torch.cat(p) for p in zip(*[q(many, 6, generator) for _ in range(rounds)], strict=True)]
    for ours, theirs in zip((S, T), expected, strict=True):
        assert (ours.float().mean(0) - theirs.float().mean(0)).abs().max() < 0.06
        shares = [torch.bincount(mask.sum(-1), minlength=7) / len(mask) for mask in (ours, theirs)]
        assert (shares[0] - shares[1]).abs().max() < 0.06


@pytest.mark.parametrize("ratios_per", ["step", "sample"])
@pytest.mark.parametrize("prior", ["learned", "standard"])
def test_a_step_without_the_hidden_tokens_is_that_of_image_by_image(prior, ratios_per):
    job = work(network(), True, loss=BigLearnELBO(0.5, MaskSampler(ratios_per=ratios_per), prior))
    step = timing.step_of(job, stages()["drop"] - {"bfloat16"})
    step()
    x, S, T, noise = next(timing.resident_draws(job))
    net = timing.network_of(job, frozenset({"drop", "code_only"}))
    rows = [
        timing.three_passes(net, job.loss, *(part[i : i + 1] for part in (x, S, T, noise)), 0)["loss"] for i in range(8)
    ]
    torch.stack(rows).mean().backward()
    torch.testing.assert_close(gradients(step.net), gradients(net), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prior", ["learned", "standard"])
@pytest.mark.parametrize("kind", ["universal", "two-stack"])
@pytest.mark.parametrize("sizes", [dict(), dict(dim=32, mlp_ratio=4, z_dim=8)], ids=["narrow", "wide"])
@pytest.mark.parametrize("measures", [(), ("code_only",), ("code_only", "drop")], ids=["plain", "code", "drop"])
def test_multiply_adds_are_those_that_torch_counts(kind, prior, sizes, measures):
    job = work(network(kind, **sizes), loss=BigLearnELBO(0.5, MaskSampler(ratios_per="step"), prior))
    net = timing.network_of(job, frozenset(measures))
    x, S, T, noise = next(timing.resident_draws(job))
    # Attention as plain products: other ways compute some of them twice in the backward.
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = timing.three_passes(net, job.loss, x, S, T, noise, 0)["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = timing.step_multiply_adds(job, frozenset(measures))
    assert 2 * counted == 3 * forward.get_total_flops()
    # Only the gradient of the tokens themselves is not computed, which the formula counts: here D is large beside d.
    sets = [S | T, S, S | T] if prior == "learned" else [S | T, S | T]
    seen = sum(int(mask[0].sum()) if "drop" in measures else job.net.num_tokens for mask in sets)
    tokens = len(x) * seen * job.net.token_dim * job.net.token_in.out_features
    assert 2 * (counted - tokens) == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("method", ["biglearn_u", "biglearn_t"])
def test_multiply_adds_of_the_papers_case_are_within_two_percent(method):
    cfg = config.compose(["case=case1", "data=mnist", f"method={method}"])
    tokens = config.tokenizer(cfg)
    net, loss = config.network(cfg, tokens), config.objective(cfg)
    images = ImageSet(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    job = timing.Work(net, loss, Optim(), images, images.pixels, tokens.encode, 2)
    x, S = torch.rand(2, net.num_tokens, net.token_dim), torch.zeros(2, net.num_tokens, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(net, x, S, ~S, torch.randn(2, net.z_dim)).loss.backward()
    counted = timing.step_multiply_adds(job, frozenset({"code_only"}))
    assert 2 * counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_multiply_adds_are_the_mean_over_the_steps():
    job = work(network(), loss=BigLearnELBO(0.5, MaskSampler(ratios_per="step")))
    measures = frozenset({"code_only", "drop"})
    each = [timing.step_multiply_adds(job, measures, [step]) for step in range(5)]
    assert len(set(each)) > 1 and timing.step_multiply_adds(job, measures, range(5)) == sum(each) // 5


def test_the_tables_arithmetic():
    limits = {"float32": timing.Limit(4e12, (1024,) * 3), "bfloat16": timing.Limit(16e12, (2048,) * 3)}
    plain = timing.Stage("plain", frozenset(), 50, 10**12, (2.0, 4.0, 5.0), 3 * 2**20)
    fast = timing.Stage("bfloat16", frozenset({"bfloat16"}), 50, 10**12, (0.5, 2.0, 1.0))
    result = timing.Result([plain, fast], limits)
    assert plain.images_per_second == 12.5 and fast.images_per_second == 50
    assert plain.rate == 0.5e12 and fast.rate == 2e12
    assert result.share(plain) == 0.125 and result.share(fast) == 0.125
    assert result.ratio(plain) == 1 and result.ratio(fast) == 4  # of 4, 2, 5
    lines = timing.table(result).splitlines()
    assert lines[1].split() == [
        "plain",
        "12",
        "4000.00",
        "2000.00",
        "-",
        "5000.00",
        "3",
        "MiB",
        "1000",
        "0.5",
        "12%",
        "1.00",
    ]
    assert lines[2].split() == ["bfloat16", "50", "1000.00", "500.00", "-", "2000.00", "1000", "2", "12%", "4.00"]
    assert lines[4].startswith("GMACs: 10^9 multiply-adds of a step")
    rows = json.loads(json.dumps(result.as_dict()))["stages"]
    assert rows[1]["ratio_to_plain"] == 4 and rows[1]["flops_per_second"] == 2e12 and rows[1]["memory_bytes"] is None


def test_each_stage_has_its_measure_and_those_above():
    everything = stages()
    assert list(everything) == list(timing.STAGES)
    for (_, smaller), (name, larger) in zip(list(everything.items())[:-1], list(everything.items())[1:], strict=True):
        assert larger - smaller == {name}
    assert list(timing.Plan().chosen("bfloat16", "cpu")) == [
        name for name in timing.STAGES if name not in ("drop", "compile", "cuda_graph")
    ]
    assert list(timing.Plan().chosen("bfloat16", "cuda"))[-2:] == ["compile", "cuda_graph"]
    assert list(timing.Plan().chosen("float32", "cuda", "drop"))[-1] == "drop"  # of shapes that change
    without = timing.Plan(compile=True).chosen("float32", "cpu")
    assert "bfloat16" not in without and timing.precision_of(without["compile"]) == "float32"
    for plan, hidden in ((timing.Plan(compile=True), "drop"), (timing.Plan(stages=["drop", "compile"]), "mask")):
        with pytest.raises(ValueError, match="hidden=drop has other shapes at every step"):
            plan.chosen("float32", "cuda", hidden)
    asked = timing.Plan(stages=["compile", "plain"]).chosen("float32", "cpu")
    assert list(asked) == ["plain", "compile"] and "bfloat16" not in asked["compile"]
    assert timing.Plan(stages="bfloat16").chosen("float32", "cpu")["bfloat16"] == everything["bfloat16"]


def test_the_plain_loader_has_processes_beside_a_gpu(monkeypatch):
    for cores, expected in ((16, 8), (4, 3), (1, 0)):
        monkeypatch.setattr(timing, "cores", lambda cores=cores: cores)
        assert timing.Plan().loader_workers("cuda") == expected and timing.Plan().loader_workers("cpu") == 0
    assert timing.Plan(workers=2).loader_workers("cpu") == timing.Plan(workers=2).loader_workers("cuda") == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stages": ["plain", "fast"]}, "stages must be some of plain, resident"),
        ({"stages": []}, "got none"),
        ({"compile": "auto"}, "compile must be true, false or null, got 'auto'"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 1, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"json": "/nowhere/x.json"}, "json must be a file in a folder that exists, got /nowhere/x.json"),
        ({"json": "/"}, "json must be a file"),
    ],
)
def test_bad_settings_are_refused(settings, expected):
    with pytest.raises(ValueError) as caught:
        timing.Plan(**settings)
    assert expected in str(caught.value)


def test_a_batch_must_be_of_the_images():
    for batch in (0, 21):
        with pytest.raises(ValueError, match=f"trainer.batch_size must be from 1 to 20.*got {batch}"):
            work(network(), batch_size=batch)


def test_every_setting_is_explained_and_composes_like_training():
    cfg, training = (config.compose(["case=case2", "method=vae"], name) for name in ("benchmark", "train"))
    for name in ("data", "method", "case", "model", "optim", "trainer", "masks", "loss"):
        assert cfg[name] == training[name], name
    explained, text = config.explanations("benchmark"), config.help_text("benchmark", [])
    for key, _ in config._raw_leaves(config.compose([], "benchmark")):
        assert explained.get(key), f"{key} has no comment behind it"
        assert f"  {key}=" in text
    assert all(name in explained["stages"] for name in timing.STAGES)


def test_peak_memory_is_that_of_what_was_made():
    device = torch.device("cpu")
    before = timing.start_peak(device)
    if before is None:
        pytest.skip("this machine does not tell")
    torch.ones(2**24).sum()  # 64 MiB
    peak = timing.read_peak(device) - before
    assert 60 * 2**20 < peak < 120 * 2**20
    assert timing.start_peak(device) - before < 20 * 2**20


def test_memory_does_not_grow_with_steps():
    if timing.start_peak(torch.device("cpu")) is None:
        pytest.skip("this machine does not tell")
    used = []
    trainer = timing.trainer_of(work(network(), total=60), frozenset({"code_only"}))
    for steps in (60, 360):
        trainer.steps = steps
        trainer.fit()
        used.append(timing.start_peak(torch.device("cpu")))
    assert used[1] - used[0] < 2 * 2**20


def test_the_whole_command(tmp_path):
    words = ["device=cpu", "repeats=1", "steps=2", "warmup=1", "json=all.json", *SMALL]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "all.json").read_text())
    names = [row["name"] for row in written["stages"]]
    assert names == [name for name in timing.STAGES if name not in ("bfloat16", "drop", "compile", "cuda_graph")]
    for row in written["stages"]:
        assert f"\n{row['name']:<10} " in done.stdout and len(row["seconds_of_repeats"]) == 1
        assert row["images_per_second"] * row["seconds_per_step"] == pytest.approx(8)
    assert written["environment"]["torch"] == torch.__version__ and written["settings"]["trainer"]["batch_size"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json"]


def test_an_untrained_patch_ae_stands_for_one_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["device=cpu", "tokens=patch_ae", "stages=[plain,fused]", "repeats=1", "steps=1", "warmup=1", *SMALL]
    assert run_here(monkeypatch, *words, script="benchmark") == 0
    out = capsys.readouterr().out
    assert "the PatchAE is untrained" in out and "\nfused " in out


def test_the_command_refuses_before_it_measures(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("it measured"))
    monkeypatch.setattr(timing, "load_images", lambda *_: pytest.fail("it loaded"))
    for setting, expected in {
        "stages=[plain,faster]": "stages must be some of plain, resident, one_pass, .*, got plain, faster",
        "repeats=few": "repeats must be a whole number, got 'few'",
        "json=nowhere/x.json": "json must be a file in a folder that exists, got nowhere/x.json",
        "trainer.precision=half": "precision must be auto, float32 or bfloat16, got",
        "device=tpu9": "unknown device 'tpu9'",
    }.items():
        with pytest.raises(ValueError, match=expected):
            commands.benchmark(config.compose([setting], "benchmark"))
