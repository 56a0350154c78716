"""In-painting in full: a model's completions beside floors, and beside the Markov chains that a joint VAE needs.

A task is what is observed: a share of the patches, drawn for each image, or the name of a shape (`evaluation.SHAPES`).

N images, K draws.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from biglearn_vae import checks, evaluation, gibbs
from biglearn_vae.capabilities import BigLearnVAE
from biglearn_vae.data import Batches, Images, ImageSet
from biglearn_vae.distributed import World, derive_seed, synchronize
from biglearn_vae.evaluation import Task
from biglearn_vae.losses import InpaintingRegression, Masks
from biglearn_vae.masks import MaskSampler
from biglearn_vae.optim import Optim
from biglearn_vae.trainer import Trainer


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        tasks: what is observed: shares of the patches, or names of shapes.
        draws: K, completions of each image, at least 2.
        iterations: numbers of iterations after which the chains of a joint VAE are measured; none leaves chains out.
        chain_tasks: the tasks for which chains are run, some of `tasks`.
        likelihood_images: number of images, at most, for bounds on log p(hidden | observed); 0 leaves them out.
        samples: samples for each of these images, by annealed importance sampling.
        annealing_steps: steps of annealed importance sampling.
        regressor_steps: steps for which the regressor without a latent is trained; 0 leaves it out.
        passes: numbers of passes (see `BigLearnVAE.inpaint`), each at least 2, to be measured besides one pass; None or
            an empty list leaves them out.

    Raises:
        ValueError: on counts outside these, or an unknown task.
    """

    tasks: Sequence[Task]
    draws: int = 10
    iterations: Sequence[int] = ()
    chain_tasks: Sequence[Task] = (0.5,)
    likelihood_images: int = 0
    samples: int = 64
    annealing_steps: int = 200
    regressor_steps: int = 0
    passes: Sequence[int] | None = None

    def __post_init__(self):
        evaluation.check_tasks(self.tasks)
        if chain_tasks := checks.several("chain_tasks", self.chain_tasks, 0):
            evaluation.check_tasks(chain_tasks, "chain_tasks")
        least = {"draws": 2, "likelihood_images": 0, "regressor_steps": 0, "samples": 1, "annealing_steps": 1}
        for name, count in least.items():
            checks.whole_number(name, getattr(self, name), count)
        for count in checks.several("iterations", self.iterations, 0):
            checks.whole_number("each of iterations", count, 1)
        left_out = self.passes is None or (isinstance(self.passes, list | tuple) and not self.passes)
        if not left_out and not checks.whole_numbers(self.passes, 2):
            raise ValueError(f"passes must be whole numbers from 2 on, as one is measured anyway, got {self.passes}")

    def chains_of(self, vae: BigLearnVAE) -> Sequence[Task]:
        """The tasks for which chains of this model are run: `chain_tasks` of a joint VAE, none of other models.

        Raises:
            ValueError: if any of these is not one of `tasks`.
        """
        if vae.prior != "standard" or not self.iterations:
            return ()
        if not set(self.chain_tasks) <= set(self.tasks):
            raise ValueError(
                f"chain_tasks must be some of the tasks {list(self.tasks)}, got {list(self.chain_tasks)}: "
                "name some of these, or leave chains out by iterations=[]"
            )
        return self.chain_tasks


def measure(vae: BigLearnVAE, images: Images, train: Images, plan: Plan, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Scores by task and by way of completing: `evaluation.completion_scores` and seconds, or a PSNR.

    "one pass" is the model itself; a joint VAE does badly at this, as it never saw parts of images. "code alone" is
    p(x_T | z) for the same z, decoded without the observed patches. "several passes" is a list by number of passes. The
    chains of a joint VAE are "pseudo-Gibbs" and "Metropolis-within-Gibbs", lists by number of iterations. "training
    mean" and "10 nearest" are the floors. "nats" is log p(hidden | observed) by annealed importance sampling, for
    Gaussian observations under N(mu, variance I) with the variance fitted on training images: in expectation a lower
    bound for a BigLearn-VAE, an estimate for a joint VAE.

    Args:
        images: N of them, all converted to floats at once. Only what was recorded of them is observed and scored.
        train: training images.

    Raises:
        ValueError: if a task hides nothing that was recorded of these images.
    """
    evaluation.check_given(vae, images, train)
    of_chains = plan.chains_of(vae)
    ((x, tasks),) = evaluation.tasks_in_parts(vae, images, plan.tasks, seed, rows=len(images))
    if empty := [str(task) for task, (_, T) in tasks.items() if not T.any()]:
        raise ValueError(
            f"tasks {', '.join(empty)} hide nothing that was recorded of these {len(x)} images: leave them out, or "
            "take more images"
        )
    floors = {
        "training mean": evaluation.training_mean_psnr(vae, images, train, plan.tasks, seed),
        "10 nearest": evaluation.nearest_psnr(vae, images, train, plan.tasks, seed=seed),
    }
    own: dict[str, Any] = {}
    if vae.observations.scaled:
        own = {"variance": evaluation.fit_variance(vae, train[: 10 * max(100, plan.likelihood_images)], seed)}
    nats = _nats(vae, x, tasks, plan, own, seed) if plan.likelihood_images else {}
    result = {}
    for task, (S, T) in tasks.items():
        inpaint = partial(vae.inpaint, x, S, plan.draws, seed)
        found: dict[str, Any] = {
            "one pass": _drawn(vae, x, T, inpaint),
            "code alone": _drawn(vae, x, T, partial(vae.reconstruct, x, S, plan.draws, seed)),
        }
        if plan.passes:
            several = {count: _drawn(vae, x, T, partial(inpaint, count)) for count in plan.passes}
            found["several passes"] = [{"passes": count} | scores for count, scores in several.items()]
        if task in of_chains:
            found |= _chains(vae, x, S, T, plan, own, seed)
        if task in nats:
            found["nats"] = nats[task]
        result[str(task)] = found | {name: {"psnr": psnr[task]} for name, psnr in floors.items()}
    return result


def _drawn(vae: BigLearnVAE, x: Tensor, T: Tensor, draw: Callable[[], Tensor]) -> dict[str, float]:
    """Scores of the model's own completions, and the seconds that they took."""
    start = time.perf_counter()
    drawn = draw()
    synchronize(vae.device)
    seconds = time.perf_counter() - start
    return evaluation.completion_scores(drawn, x, vae.pixel_mask(T)) | {"seconds": seconds}


def _chains(
    vae: BigLearnVAE, x: Tensor, S: Tensor, T: Tensor, plan: Plan, own: dict[str, Any], seed: int
) -> dict[str, list]:
    """Scores of the two samplers of a joint VAE; `own` has the variance fitted on training images, if any."""
    hidden, result = vae.pixel_mask(T), {}
    samplers = {"pseudo-Gibbs": gibbs.pseudo_gibbs, "Metropolis-within-Gibbs": gibbs.metropolis_within_gibbs}
    for name, sampler in samplers.items():
        found = sampler(vae, x, S, plan.iterations, plan.draws, seed=seed, **own)
        result[name] = [
            {"iterations": count, "seconds": found.seconds[count], "acceptance": found.acceptance[count]}
            | evaluation.completion_scores(drawn, x, hidden)
            for count, drawn in found.images.items()
        ]
    return result


def _nats(
    vae: BigLearnVAE,
    x: Tensor,
    tasks: Mapping[Task, tuple[Tensor, Tensor]],
    plan: Plan,
    own: dict[str, Any],
    seed: int,
) -> dict[Task, dict[str, Any]]:
    """Mean log p(hidden | observed) by task, over the first images that have it in all tasks; {} if none has."""
    options: dict[str, Any] = dict(samples=plan.samples, seed=seed, steps=plan.annealing_steps) | own
    able = torch.stack([T.any(-1) for _, T in tasks.values()]).all(0)
    if vae.prior == "standard":  # the difference of log p(x) and log p(x_S) is that of whole images
        able &= torch.stack([(S | T).all(-1) for S, T in tasks.values()]).all(0)
    rows = able.nonzero()[: plan.likelihood_images, 0]
    if not len(rows):
        return {}
    # All tasks share a batch: the cost of a small one is mostly that of launching it.
    count, x = len(tasks), x[rows]
    S, T = (torch.cat([task[k][rows] for task in tasks.values()]) for k in (0, 1))
    nats: evaluation.LogProb | evaluation.JointConditional
    if vae.prior == "learned":
        nats = evaluation.annealed_log_prob(vae, x.repeat(count, 1, 1, 1), T, S, **options)
    else:
        whole = evaluation.annealed_log_prob(vae, x, **options)  # log p(x) is that of every task
        whole = evaluation.LogProb(whole.nats.repeat(count), whole.error.repeat(count))
        nats = evaluation.conditional_log_prob_joint(vae, x.repeat(count, 1, 1, 1), S, joint=whole, **options)
    means = nats.nats.view(count, -1).mean(-1).tolist()
    errors = nats.error.view(count, -1).square().mean(-1).sqrt().tolist()
    return {
        task: {"mean": mean, "error": None if math.isnan(error) else error} | own | {"images": len(x)}
        for task, mean, error in zip(tasks, means, errors, strict=True)
    }


def regressor_psnr(
    net: nn.Module,
    tokenizer: Any,
    train: ImageSet,
    images: Images,
    tasks: Sequence[Task],
    optim: Optim,
    masks: Masks,
    steps: int,
    batch_size: int,
    seed: int = 0,
) -> dict[Task, float]:
    """PSNR by task of the same network without its latent, trained to predict x_T from x_S: a floor to be beaten.

    Args:
        net: a network with fresh weights, which is trained.
        optim: its warm-up takes at most a third of the steps.
        masks: the model's q(S, T). A MaskSampler's joint tasks are left out, since only the mean could be learned from
            them; so the regressor of a joint VAE, too, sees parts of images.

    Raises:
        KeyboardInterrupt: if Ctrl-C or SIGTERM ended the training early.
    """
    device = next(net.parameters()).device
    if isinstance(masks, MaskSampler):
        masks = masks.altered(joint=0.0)
    batches = Batches(train.resident(device), batch_size, seed, World(device=device), transform=tokenizer.encode)
    trainer = Trainer(
        net,
        InpaintingRegression(masks),
        batches,
        replace(optim, warmup_steps=min(optim.warmup_steps, steps // 3)),
        steps=steps,
        seed=derive_seed("regressor", seed),
        world=batches.world,
        report_every=steps,
        evaluate_every=steps,
        checkpoint_every=steps,
    )
    trainer.fit()
    vae = BigLearnVAE(trainer.result, tokenizer)

    def complete(x: Tensor, S: Tensor) -> Tensor:
        return vae.decode(torch.zeros(len(x), vae.z_dim, device=vae.device), x, S)

    return evaluation.completion_psnr(vae, images, tasks, complete, seed)


def table(result: dict[str, Any]) -> str:
    """PSNR in dB of every completion by task, as lines of text."""
    tasks = result["tasks"]
    rows: dict[str, dict[str, float]] = {}
    for task, found in tasks.items():
        for name, scores in found.items():
            for label, value in _psnrs(name, scores):
                rows.setdefault(label, {})[task] = value
    head = f"{result['name']}: PSNR in dB over hidden pixels of {result['images']} {result['split']} images"
    lines = [head, f"  {'observed':<46}" + "".join(f"{task:>9}" for task in tasks)]
    for label, values in rows.items():
        cells = "".join(f"{values[task]:.2f}".rjust(9) if task in values else " " * 9 for task in tasks)
        lines.append(f"  {label:<46}{cells}")
    nats = {task: found["nats"] for task, found in tasks.items() if "nats" in found}
    if nats:
        some = next(iter(nats.values()))
        label = f"log p(hidden | observed) in nats, {some['images']} images"
        cells = "".join(f"{nats[task]['mean']:.1f}".rjust(9) if task in nats else " " * 9 for task in tasks)
        lines.append(f"  {label:<46}{cells}")
        if "variance" in some:
            lines.append(f"  under N(mu, {some['variance']:.4g} I), the variance fitted on training images")
    return "\n".join(lines)


def _psnrs(name: str, scores: Any) -> list[tuple[str, float]]:
    """Labels and PSNRs of one entry of a task; none for log-likelihoods."""
    if isinstance(scores, list):
        return [
            (f"{_times(name, entry)}, {how}", entry[f"psnr_{key}"])
            for entry in scores
            for how, key in (("a draw", "draw"), ("mean", "mean"))
        ]
    if "psnr_draw" in scores:
        return [(f"{name}, {how}", scores[f"psnr_{key}"]) for how, key in (("a draw", "draw"), ("mean", "mean"))]
    return [(name, scores["psnr"])] if "psnr" in scores else []


def _times(name: str, entry: dict[str, Any]) -> str:
    """The name of a sampler with how often it was called."""
    return f"{entry['passes']} passes" if "passes" in entry else f"{name}, {entry['iterations']} iterations"
