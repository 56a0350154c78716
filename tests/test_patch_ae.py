"""PatchAE: its sizes, that patches do not see each other, its statistics, and the two-stage program."""

import json
import shutil

import pytest
import torch
from programs import run_here

from biglearn_vae import (
    BigLearnVAE,
    PatchAE,
    PatchAELoss,
    Patchify,
    StepRandom,
    UniversalViT,
    World,
    config,
    count_parameters,
    evaluation,
    load,
)
from biglearn_vae.distributed import derive_seed

SMALL = dict(image_size=16, patch_size=4, channels=3, width=8)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return PatchAE(**SMALL)


def images(count=5, size=16, channels=3, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_papers_parameter_count():
    net = PatchAE(image_size=128, patch_size=16, channels=3)
    assert count_parameters(net) == 2_432_003
    assert (net.token_dim, net.num_tokens, net.grid) == (512, 64, (8, 8))


@pytest.mark.parametrize(("patch_size", "dim"), [(2, 8), (4, 8), (6, 72), (8, 8), (12, 72), (16, 32), (24, 72)])
def test_sizes_for_every_patch(patch_size, dim):
    net, x = PatchAE(image_size=48, patch_size=patch_size, channels=1, width=8), images(2, 48, 1)
    tokens = net.encode(x)
    assert tokens.shape == (2, (48 // patch_size) ** 2, dim) and dim == net.token_dim
    assert net.decode(tokens).shape == x.shape


def test_decoding_codes_is_what_training_sees(net):
    x = images()
    patches = Patchify(16, 4).cut(x)
    expected = Patchify(16, 4).join(net(patches.flatten(0, 1)).view_as(patches)).clamp(0, 1)
    torch.testing.assert_close(net.decode(net.encode(x)), expected)


def test_a_code_depends_on_its_own_patch_alone(net):
    x = images()
    changed = x.clone()
    changed[:, :, 4:8, 8:12] = torch.nan  # row 1, column 2 of 4
    before, after = net.encode(x), net.encode(changed)
    others = torch.arange(16) != 6
    assert after[:, others].equal(before[:, others])
    assert after[:, 6].isnan().any()


def test_codes_are_standardised_and_decoded_as_before(net):
    x = images(7)
    reconstructed, raw = net.decode(net.encode(x)), net.encode(x)
    net.fit_statistics(x.split(3))
    tokens = net.encode(x)
    torch.testing.assert_close(tokens.flatten(0, 1).mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.flatten(0, 1).std(0, correction=0), torch.ones(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(net.code_std, raw.flatten(0, 1).std(0, correction=0))
    torch.testing.assert_close(net.decode(tokens), reconstructed)


def test_statistics_leave_out_what_was_never_recorded_and_what_does_not_vary(net):
    x = images(6)
    broken = torch.cat([x, torch.full((2, 3, 16, 16), torch.nan)])
    net.fit_statistics([broken])
    mean = net.code_mean.clone()
    net.fit_statistics([x])
    torch.testing.assert_close(net.code_mean, mean)
    net.fit_statistics([torch.full((2, 3, 16, 16), 0.5)])
    assert net.code_std.equal(torch.ones(8))
    with pytest.raises(ValueError, match="at least one patch"):
        net.fit_statistics([])


def test_state_gives_the_same_network_for_any_image_size(net):
    net.fit_statistics([images()])
    other = PatchAE.from_state(net.state(), image_size=32)
    x = images(2, 32)
    assert other.image_shape == (3, 32, 32) and not any(p.requires_grad for p in other.parameters())
    quarter = net.encode(x[:, :, :16, :16].contiguous()).view(2, 4, 4, -1)
    torch.testing.assert_close(other.encode(x).view(2, 8, 8, -1)[:, :4, :4], quarter)
    with pytest.raises(ValueError, match="expected the state of a PatchAE"):
        PatchAE.from_state({"sizes": SMALL, "weights": {}})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(patch_size=5, image_size=15), "patch_size must be even"),
        (dict(patch_size=6), "must divide the image"),
        (dict(width=7), "width must be an even number"),
        (dict(width="8"), "width must be a whole number, got '8'"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        PatchAE(**SMALL | sizes)
    with pytest.raises(ValueError, match="expected tokens of shape"):
        PatchAE(**SMALL).decode(torch.zeros(1, 3, 8))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_loss_is_the_error_of_some_patches_of_each_image(net, share):
    patches = Patchify(16, 4).cut(images())
    loss = PatchAELoss(share)(net, patches, random=StepRandom.at(0, 0, World()))
    order = torch.rand(5, 16, generator=torch.Generator().manual_seed(derive_seed("step", 0, 0))).argsort(-1)
    count = -int(-share * 16 // 1)
    chosen = torch.stack([patches[row, order[row, :count]] for row in range(5)]).flatten(0, 1)
    expected = (net(chosen) - chosen).square().mean()
    torch.testing.assert_close(loss.loss, expected)
    torch.testing.assert_close(loss.scalars()["psnr"], -10 * expected.log10())


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_loss_leaves_out_patches_that_were_never_recorded(net, share):
    x, lost = images(), torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) < 0.6
    lost[0] = True  # an image of which nothing was recorded
    patches = Patchify(16, 4).cut(x)
    spoiled = patches.masked_fill(lost[..., None, None, None] & (torch.arange(4) == 2), torch.nan)
    loss = PatchAELoss(share)(net, spoiled, random=StepRandom.at(0, 0, World()))
    order = torch.rand(5, 16, generator=torch.Generator().manual_seed(derive_seed("step", 0, 0))).argsort(-1)
    chosen = [[k for k in order[row].tolist() if not lost[row, k]][: round(share * 16)] for row in range(5)]
    known = torch.cat([patches[row, own] for row, own in enumerate(chosen)])
    torch.testing.assert_close(loss.loss, (net(known) - known).square().mean())
    loss.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    nothing = PatchAELoss(share)(net, torch.full_like(patches, torch.nan), random=StepRandom.at(0, 0, World()))
    assert nothing.loss == 0


def test_pixels_at_the_border_weigh_more(net):
    patches = Patchify(16, 4).cut(images())
    loss = PatchAELoss(1.0, border_weight=3.0)(net, patches, random=StepRandom.at(0, 0, World()))
    error = (net(patches.flatten(0, 1)) - patches.flatten(0, 1)).square().mean((0, 1))  # (4, 4)
    inside = error[1:3, 1:3].sum()
    torch.testing.assert_close(loss.loss, (3 * (error.sum() - inside) + inside) / (3 * 12 + 4))
    torch.testing.assert_close(loss.scalars()["psnr"], -10 * error.mean().log10())
    with pytest.raises(ValueError, match=r"border_weight must be a number in \[1, inf\)"):
        PatchAELoss(border_weight=0.5)


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_outside_the_unit_interval_is_refused(share):
    with pytest.raises(ValueError, match="share must be a number in"):
        PatchAELoss(share)


# --- Everything a model can do, on codes ---


@pytest.fixture
def vae(net):
    net.fit_statistics([images()])
    torch.manual_seed(1)
    return BigLearnVAE(UniversalViT(grid=(4, 4), token_dim=8, dim=16, depth=2, z_dim=3, heads=2), net)


def half(vae):
    return torch.arange(16) % 3 == 0


def test_observed_pixels_come_back_to_the_bit(vae):
    x, S = images(), half(vae)
    completed = vae.inpaint(x, S, seed=0)
    seen = vae.pixel_mask(S.unsqueeze(0)).expand_as(x)
    assert completed[seen].equal(x[seen]) and completed.min() >= 0 and completed.max() <= 1


def test_hidden_pixels_have_no_influence(vae):
    x, S = images(), half(vae)
    hidden = ~vae.pixel_mask(S.unsqueeze(0)).expand_as(x)
    torch.testing.assert_close(vae.encode(x.masked_fill(hidden, torch.nan), S).mean, vae.encode(x, S).mean)
    assert vae.inpaint(x.masked_fill(hidden, torch.nan), S, seed=0).equal(vae.inpaint(x, S, seed=0))


def test_tokens_stand_for_images(vae):
    x, S = images(), half(vae)
    tokens = vae.tokenizer.encode(x)
    assert vae.encode(tokens, S).mean.equal(vae.encode(x, S).mean)
    hidden = ~vae.pixel_mask(S.unsqueeze(0)).expand_as(x)
    assert vae.inpaint(tokens, S, seed=0)[hidden].equal(vae.inpaint(x, S, seed=0)[hidden])


def test_combined_observations_are_pixels(vae):
    a, b, S = images(seed=1), images(seed=2), half(vae)
    x, both = vae.combine((a, S), (b, ~S))
    seen = vae.pixel_mask(S.unsqueeze(0))
    assert both.all() and x.equal(torch.where(seen, a, b))


# --- Scores ---


def test_reconstruction_scores_against_a_loop(net):
    x, patch = images(3), 4
    scores = evaluation.reconstruction(net, x)
    y = net.decode(net.encode(x)).double()
    assert scores["psnr"] == pytest.approx(-10 * (y - x).square().mean().log10().item())
    for name, pixels in (("seam_ratio", y), ("seam_ratio_of_images", x.double())):
        across, inside = [], []
        for i in range(15):
            into = across if (i + 1) % patch == 0 else inside
            into += (pixels[:, :, i + 1] - pixels[:, :, i]).abs().flatten().tolist()
            into += (pixels[:, :, :, i + 1] - pixels[:, :, :, i]).abs().flatten().tolist()
        expected = (sum(across) / len(across)) / (sum(inside) / len(inside))
        assert scores[name] == pytest.approx(expected, rel=1e-6)


def test_reconstruction_scores_leave_out_patches_that_were_never_recorded(net):
    x = images(3)
    whole = evaluation.reconstruction(net, x)
    beside = torch.cat([x, torch.full_like(x, torch.nan)])  # of images of which nothing was recorded
    assert evaluation.reconstruction(net, beside) == pytest.approx(whole, rel=1e-6)
    x[:, :, 4:8, 8:12] = torch.nan
    y = net.decode(net.encode(x))
    known = ~x.isnan()
    error = (y - x)[known].double().square().mean()
    assert evaluation.reconstruction(net, x)["psnr"] == pytest.approx(-10 * error.log10().item())
    x[:, :, 5, 9] = 0.5  # of a patch that has no code as a whole
    assert evaluation.reconstruction(net, x)["psnr"] == pytest.approx(-10 * error.log10().item())


# --- The program ---


STAGE_1 = [
    "data=digits",
    "data.patch_size=4",
    "model.width=8",
    "trainer.steps=30",
    "optim.warmup_steps=0",
    "device=cpu",
]
STAGE_2 = ["data.patch_size=4", "tokens=patch_ae", "model.dim=16", "model.heads=2", "case.depth=2", "trainer.steps=20"]
STAGE_2 += [
    "evaluation.images=4",
    "evaluation.masks=1",
    "evaluation.draws=2",
    "evaluation.valid_images=4",
    "device=cpu",
]


def test_two_stages_and_a_model_that_needs_the_first_no_longer(here, monkeypatch, capsys):
    assert run_here(monkeypatch, "--config-name=patch_ae", *STAGE_1, "name=stage1") == 0
    out = capsys.readouterr().out
    assert "PSNR" in out and "tokens.run=outputs/stage1" in out
    summary = json.loads((here / "outputs/stage1/summary.json").read_text())
    assert summary["steps"] == 30 and summary["test_psnr"] > 5
    assert run_here(monkeypatch, "--config-name=patch_ae", *STAGE_1, "name=stage1") == 0
    assert "is finished" in capsys.readouterr().out
    assert run_here(monkeypatch, *STAGE_2, "tokens.run=outputs/stage1", "name=stage2") == 0
    shutil.move(here / "outputs/stage2", here / "elsewhere")
    shutil.move(here / "outputs/stage1", here / "gone")
    vae, x = load(here / "elsewhere", device="cpu"), images(2, 8, 1)
    assert isinstance(vae.tokenizer, PatchAE) and vae.inpaint(x, torch.arange(4) < 2, seed=0).shape == x.shape
    shutil.move(here / "elsewhere", here / "outputs/stage2")
    assert run_here(monkeypatch, *STAGE_2, "tokens.run=outputs/stage2", "name=stage3") == 2
    assert "no PatchAE in outputs/stage2 (the run there is a BigLearn-VAE, not of stage 1)" in capsys.readouterr().err
    assert run_here(monkeypatch, *STAGE_2, "tokens.run=outputs/stage1", "name=stage2", "trainer.steps=25") == 0
    assert "going on with" in capsys.readouterr().out
    assert (
        run_here(monkeypatch, "run=outputs/stage2", "images=2", "figures=[inpainting,combination]", script="figures")
        == 0
    )
    assert (
        run_here(monkeypatch, "run=outputs/stage2", "likelihood_images=4", "samples=2", "images=4", script="evaluate")
        == 0
    )


def test_weights_for_the_codes_of_another_patch_ae_are_warned_of(here, monkeypatch, recwarn):
    for seed in (0, 1):
        words = [*STAGE_1, "trainer.steps=1", f"seed={seed}", f"name=stage1-{seed}"]
        assert run_here(monkeypatch, "--config-name=patch_ae", *words) == 0
    words = [*STAGE_2, "trainer.steps=1"]
    assert run_here(monkeypatch, *words, "tokens.run=outputs/stage1-0", "name=stage2") == 0
    for seed in (0, 1):
        recwarn.clear()
        assert run_here(monkeypatch, *words, f"tokens.run=outputs/stage1-{seed}", "init_from=outputs/stage2") == 0
        said = [str(w.message) for w in recwarn if "was trained on tokens of another kind" in str(w.message)]
        assert len(said) == seed


def test_a_patch_that_is_the_whole_image_has_no_seams(here, monkeypatch, capsys):
    words = [*STAGE_1, "data.patch_size=8", "trainer.steps=2", "name=run"]
    assert run_here(monkeypatch, "--config-name=patch_ae", *words) == 0
    out = capsys.readouterr().out
    assert "test reconstructions: PSNR" in out and "nan" not in out
    assert "NaN" not in (here / "outputs/run/summary.json").read_text()


def test_errors_of_the_pipeline_say_what_to_do(here, monkeypatch, capsys):
    for words, script in ((STAGE_2, "train"), (["tokens=patch_ae", "evaluations=2"], "benchmark")):
        assert run_here(monkeypatch, *words, script=script) == 2
        error = capsys.readouterr().err
        assert "there is no PatchAE in outputs/digits-patch_ae-seed0" in error
        # What it says to train is what it then finds.
        command = "--config-name=patch_ae data=digits data.patch_size=4 name=digits-patch_ae-seed0`"
        assert command in error or (script == "benchmark" and "--config-name=patch_ae" in error)
    assert run_here(monkeypatch, "--config-name=patch_ae", *STAGE_1, "trainer.steps=1", "name=stage1") == 0
    assert (
        "case=case1 tokens=patch_ae data=digits data.patch_size=4 tokens.run=outputs/stage1" in capsys.readouterr().out
    )
    assert run_here(monkeypatch, *STAGE_2, "data.patch_size=2", "tokens.run=outputs/stage1") == 2
    assert "is for patches of 4 x 4 with 1 channels, the data has 2 x 2" in capsys.readouterr().err
    words = [*STAGE_2, "tokens.run=outputs/stage1", "loss.observations=bernoulli", "binarize=threshold"]
    assert run_here(monkeypatch, *words) == 2
    assert "codes of a PatchAE (tokens=patch_ae) are no bernoulli observations" in capsys.readouterr().err
    (here / "outputs/stage1/patch_ae.pt").write_bytes(b"rubbish")
    assert run_here(monkeypatch, *STAGE_2, "tokens.run=outputs/stage1") == 2
    assert "patch_ae.pt is not a readable checkpoint" in capsys.readouterr().err
    assert run_here(monkeypatch, "run=outputs/stage1", script="evaluate") == 2
    assert "is a PatchAE, stage 1" in capsys.readouterr().err
    assert run_here(monkeypatch, "--config-name=patch_ae", *STAGE_1, "data.patch_size=1") == 2
    assert "patch_size must be even" in capsys.readouterr().err
    assert not (here / "outputs/digits-tiny-biglearn_u-seed0").exists()


def test_the_papers_parameter_count_on_codes():
    cfg = config.compose(["case=celeba", "data=digits"])
    net = config.build(cfg.model, "model", grid=(8, 8), token_dim=512)
    assert count_parameters(net) == 94_311_168
