"""In-painting in full: what `completion.measure` puts together, the regressor, and the command."""

import json
import signal

import pytest
import torch
from programs import run_here
from test_evaluation import N, make, pictures

from biglearn_vae import (
    BigLearnVAE,
    ImageSet,
    MaskSampler,
    Optim,
    Patchify,
    UniversalViT,
    completion,
    evaluation,
    gibbs,
    masks,
)

TASKS = [0.5, "centre", "top"]


def plan(**settings) -> completion.Plan:
    return completion.Plan(**dict(tasks=TASKS, draws=3) | settings)


@pytest.mark.parametrize("prior", ["learned", "standard"])
def test_every_number_is_that_of_its_own_function(prior):
    vae = make()
    vae.prior = prior
    images, train = pictures(vae), pictures(vae, seed=9)
    asked = plan(iterations=[1, 2], chain_tasks=["top"], passes=[2, 5])
    found = completion.measure(vae, images, train, asked, seed=4)
    assert list(found) == ["0.5", "centre", "top"]
    mean = evaluation.training_mean_psnr(vae, images, train, TASKS, 4)
    nearest = evaluation.nearest_psnr(vae, images, train, TASKS, seed=4)
    variance = evaluation.fit_variance(vae, train, 4)
    for task, S in evaluation.hidden_masks(N, vae.grid, TASKS, 4).items():
        numbers, hidden = found[str(task)], vae.pixel_mask(~S)
        expected = evaluation.completion_scores(vae.inpaint(images, S, 3, seed=4), images, hidden)
        assert {k: v for k, v in numbers["one pass"].items() if k != "seconds"} == expected
        expected = evaluation.completion_scores(vae.reconstruct(images, S, 3, seed=4), images, hidden)
        assert {k: v for k, v in numbers["code alone"].items() if k != "seconds"} == expected
        assert [entry["passes"] for entry in numbers["several passes"]] == [2, 5]
        for entry in numbers["several passes"]:
            drawn = vae.inpaint(images, S, 3, seed=4, passes=entry["passes"])
            assert evaluation.completion_scores(drawn, images, hidden).items() <= entry.items()
        assert numbers["training mean"] == {"psnr": mean[task]} and numbers["10 nearest"] == {"psnr": nearest[task]}
        has_chains = prior == "standard" and task == "top"
        assert ("pseudo-Gibbs" in numbers) == ("Metropolis-within-Gibbs" in numbers) == has_chains
        if has_chains:
            drawn = gibbs.pseudo_gibbs(vae, images, S, [1, 2], 3, variance=variance, seed=4).images
            for entry, count in zip(numbers["pseudo-Gibbs"], (1, 2), strict=True):
                scores = evaluation.completion_scores(drawn[count], images, hidden)
                assert entry["iterations"] == count and scores.items() <= entry.items()


@pytest.mark.parametrize("prior", ["learned", "standard"])
def test_log_likelihoods_are_annealed_ones(prior):
    vae = make()
    vae.prior = prior
    images, train = pictures(vae), pictures(vae, seed=9)
    settings = plan(tasks=[0.5, "top"], likelihood_images=3, samples=2, annealing_steps=3)
    found = completion.measure(vae, images, train, settings, seed=4)
    options = dict(samples=2, variance=evaluation.fit_variance(vae, train, 4), seed=4, steps=3)
    observed = evaluation.hidden_masks(N, vae.grid, settings.tasks, 4)
    x, S = images[:3].repeat(2, 1, 1, 1), torch.cat([S[:3] for S in observed.values()])
    if prior == "learned":
        expected = evaluation.annealed_log_prob(vae, x, ~S, S, **options)
    else:
        one = evaluation.annealed_log_prob(vae, images[:3], **options)
        whole = evaluation.LogProb(torch.cat([one.nats] * 2), torch.cat([one.error] * 2))
        expected = evaluation.conditional_log_prob_joint(vae, x, S, joint=whole, **options)
        assert torch.equal(expected.joint.nats[:3], expected.joint.nats[3:])
    for k, task in enumerate(observed):
        rows, nats = slice(3 * k, 3 * k + 3), found[str(task)]["nats"]
        assert nats["images"] == 3 and nats["mean"] == pytest.approx(expected.nats[rows].mean().item())
        assert nats["error"] == pytest.approx(expected.error[rows].square().mean().sqrt().item())
    text = completion.table({"name": "run", "images": N, "split": "test", "tasks": found})
    cells = "".join(f"{found[str(task)]['nats']['mean']:.1f}".rjust(9) for task in observed)
    assert "log p(hidden | observed) in nats, 3 images".ljust(46) + cells in text


@pytest.mark.parametrize("prior", ["learned", "standard"])
def test_only_what_was_recorded_is_given_and_scored(prior):
    vae = make()
    vae.prior = prior
    whole, train = pictures(vae), pictures(vae, seed=9)
    recorded = masks.random(N, vae.num_tokens, 0.7, seed=5)
    recorded[1] = True
    images = whole.masked_fill(~vae.pixel_mask(recorded), float("nan"))
    settings = plan(tasks=[0.5], likelihood_images=N, samples=2, annealing_steps=3, iterations=[2])
    numbers = completion.measure(vae, images, train, settings, seed=4)["0.5"]
    S = evaluation.hidden_masks(N, vae.grid, [0.5], 4)[0.5] & recorded
    T = recorded & ~S
    drawn = vae.inpaint(whole, S, 3, seed=4)
    scores = evaluation.completion_scores(drawn, whole, vae.pixel_mask(T))
    assert scores.items() <= numbers["one pass"].items()
    variance = evaluation.fit_variance(vae, train, 4)
    options = dict(samples=2, variance=variance, seed=4, steps=3)
    if prior == "learned":
        expected = evaluation.annealed_log_prob(vae, whole, T, S, **options)
    else:
        whole_ones = recorded.all(-1)
        joint = evaluation.annealed_log_prob(vae, whole[whole_ones], **options)
        expected = evaluation.conditional_log_prob_joint(vae, whole[whole_ones], S[whole_ones], joint=joint, **options)
        drawn = gibbs.metropolis_within_gibbs(vae, whole, S, [2], 3, variance=variance, seed=4).images[2]
        scores = evaluation.completion_scores(drawn, whole, vae.pixel_mask(T))
        assert scores.items() <= numbers["Metropolis-within-Gibbs"][0].items()
    assert numbers["nats"]["images"] == len(expected.nats)
    assert numbers["nats"]["mean"] == pytest.approx(expected.nats.mean().item())


def test_likelihoods_are_of_images_that_hide_something_in_every_task():
    vae = make()
    images, train = pictures(vae), pictures(vae, seed=9)
    recorded = torch.ones(N, vae.num_tokens, dtype=torch.bool)
    recorded[0] = masks.half(vae.grid, "top")  # of which the task "top" hides nothing, but "left" a quarter
    images = images.masked_fill(~vae.pixel_mask(recorded), float("nan"))
    settings = plan(tasks=["top", "left"], likelihood_images=N, samples=2, annealing_steps=3)
    found = completion.measure(vae, images, train, settings, seed=4)
    S = torch.cat([masks.half(vae.grid, side).expand(N - 1, -1) for side in ("top", "left")])
    options = dict(samples=2, variance=evaluation.fit_variance(vae, train, 4), seed=4, steps=3)
    expected = evaluation.annealed_log_prob(vae, images[1:].repeat(2, 1, 1, 1), ~S, S, **options).nats.view(2, -1)
    for task, nats in zip(("top", "left"), expected, strict=True):
        assert found[task]["nats"]["images"] == N - 1
        assert found[task]["nats"]["mean"] == pytest.approx(nats.mean().item())


def test_shapes_observe_what_they_say():
    S = evaluation.hidden_masks(2, (4, 4), ["centre", "top", "left"])
    assert S["centre"][0].view(4, 4)[1:3, 1:3].sum() == 0 and S["centre"][0].sum() == 12
    assert S["top"][1].view(4, 4)[:2].all() and S["top"][1].sum() == 8
    assert S["left"][1].view(4, 4)[:, :2].all() and S["left"][1].sum() == 8


@pytest.mark.parametrize("joint", [0.0, 1.0])
def test_the_regressor_learns_what_can_be_known(joint):
    # Images of one brightness each: any patch says what the others are.
    values = torch.randint(256, (300, 1, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageSet(values.expand(-1, 1, 4, 4).contiguous())
    torch.manual_seed(0)
    net = UniversalViT(grid=(2, 2), token_dim=4, dim=16, depth=2, z_dim=2, heads=2)
    test, optim = (
        images.select(slice(200, 300)),
        Optim(lr=1e-2, muon_lr=0.02, schedule="cosine", warmup_steps=int(joint) * 500),
    )
    options = dict(optim=optim, masks=MaskSampler((1, 1), (1, 1), joint), steps=150, batch_size=32)
    found = completion.regressor_psnr(net, Patchify(4, 2, 1), images.select(slice(200)), test, [0.5, "top"], **options)
    vae = BigLearnVAE(net, Patchify(4, 2, 1))
    mean = evaluation.training_mean_psnr(vae, test, images.select(slice(200)), [0.5, "top"])
    assert all(found[task] > mean[task] + 10 for task in (0.5, "top"))


def test_a_regressor_that_a_signal_stopped_is_no_floor():
    class Signalled(MaskSampler):
        def draw(self, *sizes):
            signal.raise_signal(signal.SIGTERM)
            return super().draw(*sizes)

    images = ImageSet(torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8))
    net = UniversalViT(grid=(2, 2), token_dim=4, dim=16, depth=1, z_dim=2, heads=2)
    options = dict(optim=Optim(), masks=Signalled(), steps=10, batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        completion.regressor_psnr(net, Patchify(4, 2, 1), images, images, [0.5], **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(draws=1), "draws must be at least 2"),
        (dict(draws=2.5), "draws must be a whole number, got 2.5"),
        (dict(draws="a"), "draws must be a whole number, got 'a'"),
        (dict(tasks=[]), "expected shares in"),
        (dict(tasks=["middle"]), "or some of centre, top, left"),
        (dict(tasks=[1.5]), "expected shares in"),
        (dict(iterations=[0]), "each of iterations must be at least 1, got 0"),
        (dict(passes=[2, 1]), "passes must be whole numbers from 2 on"),
        (dict(passes=4), "passes must be whole numbers from 2 on"),
        (dict(samples=0), "samples must be at least 1"),
        (dict(regressor_steps=-1), "regressor_steps must be at least 0, got -1"),
    ],
)
def test_plans_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(**settings)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["model.dim=16", "model.heads=2", "case.split=[1,1]", "trainer.steps=3", "evaluation.images=4", "name=run"]
    small += ["evaluation.valid_images=4", "evaluation.masks=1", "evaluation.draws=2", "method=vae", "device=cpu"]
    assert run_here(monkeypatch, *small) == 0
    capsys.readouterr()
    words = ["run=outputs/run", "images=6", "draws=2", "tasks=[0.5,centre]", "iterations=[1,2]", "regressor_steps=2"]
    words += ["passes=[2]"]
    first, second = [
        run_here(monkeypatch, *words, script="complete")
        or json.loads((tmp_path / "outputs/run/completion.json").read_text())
        for _ in range(2)
    ]
    out = capsys.readouterr().out
    assert "pseudo-Gibbs, 2 iterations, mean" in out and "regressor" in out and "10 nearest" in out
    assert "2 passes, a draw" in out

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "date")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    assert timeless(first) == timeless(second) and first["images"] == 6
    for word, message in (
        ("draws=1", "draws must be"),
        ("split=train", "split must be"),
        ("images=0", "images must be"),
    ):
        assert run_here(monkeypatch, "run=outputs/run", word, script="complete") == 2
        assert message in capsys.readouterr().err


def test_a_task_that_hides_nothing_that_was_recorded_is_named():
    vae = make()
    images = pictures(vae)
    images[..., images.shape[-1] // 2 :] = torch.nan
    with pytest.raises(ValueError, match=r"tasks left hide nothing that was recorded of these \d+ images: leave them"):
        completion.measure(vae, images, images, plan(tasks=["left", 0.5]))


def test_chains_are_of_the_tasks_alone_and_of_a_joint_vae():
    vae = make()
    images, asked = pictures(vae), plan(iterations=[1], chain_tasks=[0.2])
    assert "pseudo-Gibbs" not in completion.measure(vae, images, pictures(vae, seed=9), asked)["0.5"]
    vae.prior = "standard"
    with pytest.raises(ValueError, match="chain_tasks must be some of the tasks"):
        completion.measure(vae, images, images, asked)
    with pytest.raises(ValueError, match=r"^chain_tasks: expected shares in \[0, 1\), .* got \['middle'\]"):
        plan(chain_tasks=["middle"])
