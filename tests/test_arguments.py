"""Whatever is given in place of an argument is taken, or refused in words: nothing fails deep inside."""

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import biglearn_vae as blv
from biglearn_vae import capabilities, completion, data, distributed, evaluation, figures, gibbs, masks, probe, samples

NET = dict(grid=(4, 4), token_dim=4, dim=16, z_dim=3, heads=2)
WRONG = {
    "object": object(),
    "text": "abc",
    "empty text": "",
    "nothing": None,
    "list": [],
    "mapping": {},
    "word in a list": ["a"],
    "array": np.ones((2, 2)),
    "number as a tensor": torch.tensor(2),
    "few numbers": torch.tensor([1.0, 2.0]),
    "complex numbers": torch.ones(3, 1, 8, 8, dtype=torch.complex64),
    "truths": torch.ones(3, 1, 8, 8, dtype=torch.bool),
    "less than one": 0.5,
    "negative": -1,
    "NaN": float("nan"),
    "more than torch counts": 10**20,
}


g = torch.Generator().manual_seed(0)
net = blv.UniversalViT(**NET, depth=1)
vae = blv.BigLearnVAE(net, blv.Patchify(image_size=8, patch_size=2, channels=1), variance=0.1)
x, z, S = torch.rand(3, 1, 8, 8, generator=g), torch.randn(3, 3, generator=g), masks.random(3, 16, 0.5, seed=0)
tokens, labels, loss = vae.tokenizer.encode(x), torch.arange(12) % 3, blv.BigLearnELBO(0.1)
train = blv.ImageSet((torch.rand(12, 1, 8, 8, generator=g) * 255).byte(), labels)
codes, both, tasks, hidden = torch.randn(12, 4, generator=g), dict(vae=vae, images=x), [0.5], ~vae.pixel_mask(S)
asked = dict(vae=vae, x=x, samples=2, seed=0)

Calls = dict[str, tuple[Callable, dict[str, Any]]]  # by name: what is called, and arguments that work
MODELS: Calls = {
    "encode": (vae.encode, dict(x=x, S=S)),
    "decode": (vae.decode, dict(z=z, x=x, S=S)),
    "sample": (vae.sample, dict(n=2, seed=0, passes=1)),
    "reconstruct": (vae.reconstruct, dict(x=x, S=S, draws=2, seed=0)),
    "inpaint": (vae.inpaint, dict(x=x, S=S, draws=2, seed=0, passes=2)),
    "interpolate": (vae.interpolate, dict(x_a=x, x_b=x, steps=3, S=S)),
    "decoding_sensitivity": (vae.decoding_sensitivity, dict(x=x, S=S, dims=[0], delta=1.0)),
    "encoding_sensitivity": (vae.encoding_sensitivity, dict(x=x, S=S, change=torch.tensor(0.1))),
    "log_prob": (vae.log_prob, dict(x=x, T=~S, given=S, samples=2, variance=0.1, seed=0, unit="nats", passes=2)),
    "log_weights": (vae.log_weights, dict(x=x, T=~S, given=S, samples=2, variance=0.1, seed=0)),
    "best_variance": (capabilities.best_variance, asked | dict(passes=2)),
    "save": (vae.save, dict(path="model.pt")),
    "pixel_mask": (vae.pixel_mask, dict(S=S)),
    "BigLearnVAE": (
        blv.BigLearnVAE,
        dict(net=net, tokenizer=vae.tokenizer, prior="learned", variance=0.1, chunk=9),
    ),
    "UniversalViT": (blv.UniversalViT, dict(**NET, depth=1, mlp_ratio=2, hidden="mask")),
    "TwoStackViT": (blv.TwoStackViT, dict(**NET, depth=(1, 1), mlp_ratio=2, hidden="mask")),
    "forward": (net, dict(x=tokens, S=S, z=z, T=~S)),
    "Patchify": (blv.Patchify, dict(image_size=8, patch_size=2, channels=1)),
    "PatchAE": (blv.PatchAE, dict(image_size=16, patch_size=16, channels=1, width=8)),
}
TRAINING: Calls = {
    "MaskSampler": (blv.MaskSampler, dict(s_ratio=(1.0, 2.0), t_ratio=(2.0, 0.5), joint=0.1, ratios_per="sample")),
    "BigLearnELBO": (blv.BigLearnELBO, dict(beta=0.1, masks=blv.MaskSampler(), prior="learned", observations=None)),
    "loss": (loss, dict(net=net, x=tokens, S=S, T=~S, noise=z)),
    "Optim": (blv.Optim, dict(lr=0.1, muon_lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, warmup_steps=1)),
    "ImageSet": (blv.ImageSet, dict(pixels=train.pixels, labels=labels)),
    "select": (train.select, dict(index=[0, 1])),
    "Batches": (blv.Batches, dict(images=train, batch_size=4, seed=0)),
    "Trainer": (
        blv.Trainer,
        dict(net=net, loss=loss, batches=blv.Batches(train, 4, transform=vae.tokenizer.encode), optim=blv.Optim(0.1))
        | dict(steps=2, evaluate_every=1, report_every=1, checkpoint_every=1, precision="float32", accumulate=1),
    ),
    "DiagGaussian": (blv.DiagGaussian, dict(mean=z, logvar=z)),
    "random": (masks.random, dict(batch_size=3, num_tokens=16, ratio=0.5, seed=0)),
    "box": (masks.box, dict(grid=(4, 4), top=0, left=0, height=2, width=2)),
    "half": (masks.half, dict(grid=(4, 4), observed="top")),
    "from_pixels": (masks.from_pixels, dict(pixels=torch.ones(3, 8, 8).bool(), grid=(4, 4))),
    "to_pixels": (masks.to_pixels, dict(S=S, grid=(4, 4), size=(8, 8))),
}
MEASURING: Calls = {
    "elbo": (evaluation.elbo, both | dict(loss=loss, seed=0)),
    "inpainting_psnr": (evaluation.inpainting_psnr, both | dict(ratios=tasks, draws=2, seed=0)),
    "nearest_psnr": (evaluation.nearest_psnr, both | dict(train=train, ratios=tasks, neighbours=2, seed=0)),
    "nearest_completion": (evaluation.nearest_completion, dict(x=tokens, S=S, train=tokens, neighbours=2)),
    "training_mean_psnr": (evaluation.training_mean_psnr, both | dict(train=train, ratios=tasks, seed=0)),
    "hidden_masks": (evaluation.hidden_masks, dict(count=3, grid=(4, 4), tasks=tasks, seed=0)),
    "psnr": (evaluation.psnr, dict(completed=x, images=x, hidden=hidden)),
    "fit_variance": (evaluation.fit_variance, both),
    "likelihood": (evaluation.likelihood, both | dict(samples=2, variance=0.1, seed=0, annealing_steps=None)),
    "consistency": (evaluation.consistency, both | dict(samples=2, variance=0.1, seed=0, annealing_steps=None)),
    "reconstruction": (evaluation.reconstruction, dict(tokenizer=vae.tokenizer, images=x)),
    "completion_scores": (evaluation.completion_scores, dict(draws=torch.stack([x, x]), images=x, hidden=hidden)),
    "annealed_log_prob": (evaluation.annealed_log_prob, asked | dict(T=~S, given=S, steps=2)),
    "conditional": (evaluation.conditional_log_prob_joint, asked | dict(S=S, steps=2, joint=None)),
    "pseudo_gibbs": (gibbs.pseudo_gibbs, dict(vae=vae, x=x, S=S, iterations=[1], draws=2, seed=0, start=None)),
    "metropolis": (gibbs.metropolis_within_gibbs, dict(vae=vae, x=x, S=S, iterations=[2], draws=2, pseudo=1)),
    "Plan": (completion.Plan, dict(tasks=tasks, draws=2, iterations=[1], chain_tasks=tasks, passes=None)),
    "features": (probe.features, both | dict(ratio=0.5, seed=0)),
    "fit": (probe.fit, dict(x=codes, y=labels)),
    "fit_and_score": (probe.fit_and_score, dict(train_x=codes, train_y=labels, test_x=codes, test_y=labels)),
    "nearest_by_codes": (probe.nearest_by_codes, dict(train_x=codes, train_y=labels, test_x=codes, neighbours=2)),
    "linear_probe": (
        probe.linear_probe,
        dict(vae=vae, train=train, test=train, ratios=tasks, draws=1, seed=0, ceiling=None, neighbours=0),
    ),
    "precision_recall": (samples.precision_recall, dict(samples=train[:], images=train[:], neighbours=2)),
    "by_passes": (samples.by_passes, dict(vae=vae, images=train[:], passes=[1], train=train, likelihood_images=0)),
}
PICTURES_AND_PLACES: Calls = {
    "inference": (figures.inference, both | dict(labels=None, rows=1, seed=0, ratios=[0.5])),
    "inpainting": (figures.inpainting, both | dict(labels=None, rows=1, draws=1)),
    "interpolation": (figures.interpolation, both | dict(labels=None, rows=1, steps=3, ratio=0.5)),
    "combination": (figures.combination, both | dict(rows=1, ratio=0.2)),
    "passes": (figures.passes, both | dict(rows=1, counts=[1])),
    "latent_map": (figures.latent_map, both | dict(count=3, seed=0, ratios=[0.5], names=())),
    "images": (data.images, dict(name="digits", split="test", image_size=8, channels=1)),
    "decoding_sensitivity, drawn": (
        figures.decoding_sensitivity,
        both | dict(rows=1, ratios=[0.5], dims=[0], seed=0),
    ),
    "encoding_sensitivity, drawn": (figures.encoding_sensitivity, both | dict(rows=1, ratio=0.5, labels=None)),
    "capabilities": (figures.capabilities, both | dict(rows=1, seed=0)),
    "nearest_positions": (evaluation.nearest_positions, both | dict(S=S.unsqueeze(1), train=train, neighbours=2)),
    "nearest_classes": (probe.nearest_classes, both | dict(S=S.unsqueeze(1), train=train, neighbours=2)),
    "pick_device": (distributed.pick_device, dict(device="cpu")),
    "World": (blv.World, dict(device="cpu")),
    "compose": (blv.compose, dict(overrides=["seed=1"], config_name="train")),
    "load": (blv.load, dict(run="nowhere", device="cpu", which="best")),
    "summaries": (blv.summaries, dict(folder=".")),
}
CALLS = MODELS | TRAINING | MEASURING | PICTURES_AND_PLACES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_it_is_taken_or_refused_in_words(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, usual = CALLS[name]
    if name != "load":  # of which there is none
        call(**usual)
    for argument in usual:
        for kind, value in WRONG.items():
            try:
                call(**usual | {argument: value})
            except (ValueError, OSError) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                raised = "biglearn_vae" in last.filename and str(last.line).startswith(
                    "raise "
                )  # not by torch or NumPy
                assert raised and " " in str(error), (argument, kind, last, error)
            except Exception as error:
                pytest.fail(f"{argument}, {kind}: {error!r}")
