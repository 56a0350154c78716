"""What the scripts do: train, evaluate, probe, draw, time steps. They print for a person, write for a program."""

import json
import os
import platform
import subprocess
import sys
import time
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from biglearn_vae import benchmark as timing
from biglearn_vae import checkpoint, config, evaluation
from biglearn_vae import figures as pictures
from biglearn_vae import probe as probing
from biglearn_vae.capabilities import BigLearnVAE
from biglearn_vae.data import Batches, Splits
from biglearn_vae.distributed import World, in_group, start, stop, under_torchrun
from biglearn_vae.loggers import Logger, MetricsFile, Pictures, Progress, TensorBoard, replacing
from biglearn_vae.losses import BigLearnELBO
from biglearn_vae.models import count_parameters
from biglearn_vae.trainer import Trainer, TrainingError, choose_precision

if TYPE_CHECKING:
    from omegaconf import DictConfig

SUMMARY_FILE = "summary.json"
PROBE_FILE = "probe.json"
FIGURES_PAGE = Path("figures") / "index.html"
FIRST_FIGURES = ("inference", "inpainting")  # drawn at the end of each run


def main(task: Callable[["DictConfig", Sequence[str]], Any], config_name: str) -> None:
    """The main program of a script: compose the settings of the command line and call task(settings, overrides).

    What the user can mend ends with a line of explanation and exit code 2. HYDRA_FULL_ERROR=1 shows where it arose.
    """
    import hydra

    failed: list[str] = []
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if not _is_main():
        warnings.simplefilter("ignore")

    @hydra.main(version_base="1.3", config_path=str(config.folder()), config_name=config_name)
    def run(cfg: "DictConfig") -> None:
        hydra_cfg = hydra.core.hydra_config.HydraConfig.get()
        try:
            if hydra_cfg.mode.name == "MULTIRUN" and under_torchrun():
                raise ValueError("a sweep (-m) cannot run under torchrun: start one torchrun for each run of the sweep")
            if hydra_cfg.mode.name == "MULTIRUN":
                config.refuse_sweep_over_free(sys.argv[1:])
            config.require_all(cfg, config_name)
            task(cfg, hydra_cfg.overrides.task)
        except user_errors() as error:
            # Other launchers run this in another process, which can only tell by raising.
            if "HYDRA_FULL_ERROR" in os.environ or "Basic" not in hydra_cfg.launcher._target_:
                raise
            failed.append(str(error))

    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            _print_help(config_name)
        else:
            run()
    except user_errors() as error:
        failed.append(str(error))
    except KeyboardInterrupt:  # outside of training, which takes it for itself
        failed.append("interrupted; the same command goes on from the last checkpoint")
    if failed:
        _complain_and_exit(failed)
    stop()


def _print_help(config_name: str) -> None:
    overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    print(config.help_text(config.argument("--config-name", config_name), overrides))


def _complain_and_exit(messages: list[str]) -> None:
    """Print what went wrong, once if it went wrong everywhere, and end with exit code 2."""
    if _is_main() or in_group():
        who = f" (process {os.environ['RANK']})" if under_torchrun() else ""
        for message in messages:
            print(f"error{who}: {message}", file=sys.stderr, flush=True)
    if in_group():
        # The others may wait in a collective for this one. Leaving the group would wait for them; ending without a
        # word lets torchrun notice and end them.
        os._exit(2)
    sys.exit(2)


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def user_errors() -> tuple[type[Exception], ...]:
    """What a user's settings, files or data can cause, and a user can mend."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    mendable = (ValueError, OSError, TrainingError, torch.OutOfMemoryError)
    return (*mendable, HydraException, OmegaConfBaseException)


def train(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any] | None:
    """Train a run, or go on with one, and evaluate it; returns its summary (on the main process).

    Raises:
        SystemExit: with code 0, after a checkpoint, if Ctrl-C or SIGTERM ended the training early.
    """
    config.check_evaluation(cfg.evaluation, "evaluation.")
    config.check_types(
        {"seed": int, "device": str, "name": str | None, "output_dir": str},
        {k: cfg[k] for k in ("seed", "device", "name", "output_dir")},
        "",
    )
    run = Path(cfg.output_dir).expanduser() / config.run_name(cfg, overrides)
    say = print if _is_main() else lambda *_: None
    world = start(cfg.device)
    if done := finished(run, cfg):
        say(f"{run} is finished: {done['steps']} steps. A larger trainer.steps continues it, name=NAME starts another.")
        say(report(done, run))
        return done
    tokens = config.tokenizer(cfg)
    net = config.network(cfg, tokens).to(world.device)
    loss = config.objective(cfg)
    splits = _dataset(cfg, world)
    trainer = _trainer(cfg, run, net, loss, tokens, splits, world)
    first = trainer.resume()
    say(f"{'going on with' if first else 'training'} {run}")
    say(f"{network_text(net)}, {len(splits.train):,} images, on {world.device}, {trainer.precision}")
    loggers = _open(run, cfg, first) if world.is_main else []
    try:
        completed = trainer.fit(loggers)
    finally:
        for logger in loggers:
            logger.close()
    if not completed:
        say(f"stopped at step {trainer.step} of {trainer.steps}; a checkpoint is written, the same command goes on")
        sys.exit(0)
    summary = _finish(cfg, run, trainer, splits) if world.is_main else None
    world.barrier()
    if summary:
        say(report(summary, run))
    if trainer.interrupted:  # at the last step: this run is done, but a sweep must not go on
        sys.exit(0)
    return summary


def _dataset(cfg: "DictConfig", world: World) -> Splits:
    """The data; the first process of each machine reads it before the others, since it may have to download it."""
    later = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if later:
        world.barrier()
    splits = config.dataset(cfg)
    if not later:
        world.barrier()
    return splits


def finished(run: Path, cfg: "DictConfig") -> dict[str, Any] | None:
    """The summary of a run that has all the steps asked for.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    if not (run / config.CONFIG_FILE).exists():
        return None
    changed = config.differences(config.saved(run), cfg)
    if changed and checkpoint.is_resumable(run / "checkpoints"):
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(
            f"{run} holds a run with other settings ({'; '.join(changed[:4])}{more}). "
            "Give name=NAME for another run, or delete the folder."
        )
    if changed or not (run / SUMMARY_FILE).exists():
        return None
    try:
        summary = json.loads((run / SUMMARY_FILE).read_text())
        done = summary["steps"] >= cfg.trainer.steps
        report(summary, run)
    except (ValueError, KeyError, TypeError):  # damaged: it is made again from the checkpoint
        return None
    return summary if done else None


def _trainer(cfg, run: Path, net, loss: BigLearnELBO, tokens, splits: Splits, world: World) -> Trainer:
    from omegaconf import OmegaConf

    settings = _trainer_settings(cfg)
    optim = config.build(cfg.optim, "optim")
    images = splits.train.to(world.device)
    batches = Batches(images, settings.pop("batch_size"), cfg.seed, world, transform=tokens.encode)
    metadata = {"config": OmegaConf.to_container(cfg, resolve=True), "data": splits.train.fingerprint()}

    def evaluate(net: torch.nn.Module) -> tuple[dict[str, float], dict[str, Any]]:
        vae = BigLearnVAE(net, tokens, prior=loss.prior)
        return validate(vae, splits.valid[: cfg.evaluation.valid_images], loss, cfg.evaluation.valid_draws)

    return Trainer(
        net,
        loss,
        batches,
        optim,
        folder=run / "checkpoints",
        seed=cfg.seed,
        world=world,
        evaluate=evaluate,
        metadata=metadata,
        **settings,
    )


def _trainer_settings(cfg: "DictConfig") -> dict[str, Any]:
    """The arguments of `Trainer` among the settings, and the batch size, of the types that they must have."""
    from omegaconf import OmegaConf

    settings: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)
    config.check_types(typing.get_type_hints(Trainer.__init__) | {"batch_size": int}, settings, "trainer")
    return settings


def validate(
    vae: BigLearnVAE, images: torch.Tensor, loss: BigLearnELBO, draws: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """What is reported on the validation images during training: ELBOs, half-hidden in-painting, and a picture."""
    joint = evaluation.elbo(vae, images, loss)
    numbers = {"valid/elbo": evaluation.elbo(vae, images, loss, joint=False)["elbo"]}
    numbers |= {f"valid/joint_{name}": joint[name] for name in ("elbo", "reconstruction", "kl")}
    numbers["valid/psnr_0.5"] = evaluation.inpainting_psnr(vae, images, [0.5], draws=draws)[0.5]
    title = "Validation images, half of the patches hidden"
    return numbers, {"inpainting": pictures.completions(vae, images[:8], title=title)}


def _open(run: Path, cfg: "DictConfig", first_step: int) -> list[Logger]:
    """Make the run's folder, with its settings and its machine, and the loggers."""
    from omegaconf import OmegaConf

    run.mkdir(parents=True, exist_ok=True)
    _write(run / config.CONFIG_FILE, OmegaConf.to_yaml(cfg, resolve=True))
    _write_json(run / "environment.json", environment(cfg.device))
    return [
        MetricsFile(run / "metrics.jsonl", first_step),
        TensorBoard(run / "tensorboard", first_step),
        Pictures(run / "pictures"),
        Progress(cfg.trainer.steps, first_step),
    ]


def environment(device: str) -> dict[str, Any]:
    """Where a run was made: versions, machine, commit, command."""
    import torchvision

    chosen = config.pick_device(device)
    return {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(chosen)
        if chosen.type == "cuda"
        else f"{chosen.type}, {torch.get_num_threads()} threads",
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _commit() -> str | None:
    """The commit of this repository, None for an installed package or where there is no git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def _finish(cfg: "DictConfig", run: Path, trainer: Trainer, splits: Splits) -> dict[str, Any]:
    """Evaluate the best checkpoint on the test images, draw it, and write the summary."""
    vae, state, _ = config.load_with_state(run, str(trainer.world.device), "best")
    measured = measure(vae, config.objective(cfg), splits, cfg.evaluation)
    draw(vae, splits, run, FIRST_FIGURES)
    summary = {
        "name": run.name,
        "parameters": count_parameters(trainer.net),
        "steps": trainer.step,
        "best_step": state["step"],
        "seconds": round(trainer.seconds, 3),
        "precision": trainer.precision,
        "data_note": splits.note,
        "images_per_second": round(trainer.step * trainer.batches.batch_size / trainer.seconds, 1),
    } | measured
    _write_json(run / SUMMARY_FILE, summary)
    return summary


def measure(
    vae: BigLearnVAE, loss: BigLearnELBO, splits: Splits, settings: "DictConfig", split: str = "test", seed: int = 0
) -> dict[str, Any]:
    """JointELBO on a split; in-painting beside the nearest training images, `settings.masks` masks for each image."""
    images, train_images = getattr(splits, split)[:], splits.train
    some = images[: settings.images].repeat(settings.masks, 1, 1, 1)
    joint = evaluation.elbo(vae, images, loss, seed=seed)
    options = dict(ratios=list(settings.ratios), seed=seed)
    inpainting = evaluation.inpainting_psnr(vae, some, draws=settings.draws, **options)
    nearest = evaluation.nearest_psnr(vae, some, train_images[:], **options)
    return {
        f"{split}_joint_elbo": joint["elbo"],
        f"{split}_reconstruction": joint["reconstruction"],
        f"{split}_kl": joint["kl"],
        f"{split}_joint_elbo_nats": joint["elbo_nats"],
        "inpainting_psnr": {str(ratio): value for ratio, value in inpainting.items()},
        "nearest_psnr": {str(ratio): value for ratio, value in nearest.items()},
    }


def measure_likelihood(
    vae: BigLearnVAE, splits: Splits, settings: "DictConfig", split: str, seed: int
) -> dict[str, Any]:
    """Bounds on log-likelihoods, with the model's variance and with one fitted on training images, and consistency."""
    count = settings.likelihood_images
    images = getattr(splits, split)[:count]
    fitted = evaluation.fit_variance(vae, splits.train[: 10 * count], seed)
    variances = {"model": vae.variance, "fitted": fitted}
    bounds = {
        name: {"variance": variance} | evaluation.likelihood(vae, images, settings.samples, variance, seed)
        for name, variance in variances.items()
        if variance > 0  # it is beta, and a run may have been trained without a KL
    }
    agreement = {}
    if vae.num_tokens > 1:
        agreement = evaluation.consistency(vae, images, settings.samples, fitted if vae.variance == 0 else None, seed)
    return {
        "likelihood": {"images": len(images), "samples": settings.samples} | bounds,
        "consistency": agreement,
    }


def evaluate(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a trained run on one of its splits, print it and write evaluation.json into its folder."""
    config.check_evaluation(cfg)
    if cfg.split not in ("train", "valid", "test"):
        raise ValueError(f"split must be train, valid or test, got {cfg.split!r}")
    run, settings, vae, splits, checkpoint_name, step = _trained(cfg)
    result = {
        "name": run.name,
        "checkpoint": checkpoint_name,
        "split": cfg.split,
        "step": step,
        "parameters": count_parameters(vae.net),
    }
    result |= measure(vae, config.objective(settings), splits, cfg, cfg.split, cfg.seed)
    print(f"log-likelihoods and consistency of {cfg.likelihood_images} images ...", flush=True)
    result |= measure_likelihood(vae, splits, cfg, cfg.split, cfg.seed)
    _write_json(run / "evaluation.json", result)
    print(report(result, run, cfg.split))
    return result


class _Trained(NamedTuple):
    """A run's folder, its settings, its model and data, the checkpoint that the model is from, and its step."""

    run: Path
    settings: "DictConfig"
    vae: BigLearnVAE
    splits: Splits
    checkpoint: str
    step: int


def _trained(cfg: "DictConfig") -> _Trained:
    """What `run`, `checkpoint`, `device` and `data_root` name.

    Raises:
        ValueError: for settings of another type, or a run that is not there or was trained on other data.
    """
    words = dict.fromkeys(("run", "checkpoint", "device"), str) | {"data_root": str | None, "seed": int}
    config.check_types(words, {name: cfg[name] for name in words}, "")
    config.check_which(cfg.checkpoint)
    run = Path(cfg.run).expanduser()
    vae, state, path = config.load_with_state(run, cfg.device, cfg.checkpoint)
    settings = config.saved(run)
    splits = config.dataset(settings, cfg.data_root)
    if splits.train.fingerprint() != state["metadata"]["data"]:
        raise ValueError(f"{run} was trained on other images than its data settings give now: point data_root at those")
    return _Trained(run, settings, vae, splits, path.name, state["step"])


def figures(cfg: "DictConfig", overrides: Sequence[str] = ()) -> Path:
    """Draw figures of a trained run, of its test images, into its folder; returns the page that shows them."""
    from omegaconf import OmegaConf

    hints = {"figures": list[str] | str | None, "images": int | None, "delta": float | None}
    values = {name: OmegaConf.to_container(cfg)[name] for name in hints}
    config.check_types(hints, values, "")
    if values["images"] is not None and values["images"] < 1:
        raise ValueError(f"images must be at least 1, got {values['images']}")
    names = values.pop("figures")
    names = list(pictures.FIGURES) if names is None else [names] if isinstance(names, str) else names
    if not names or not set(names) <= set(pictures.FIGURES):
        raise ValueError(f"figures must be some of {', '.join(pictures.FIGURES)}, got {', '.join(names) or 'none'}")
    started = time.perf_counter()
    trained = _trained(cfg)
    page = draw(trained.vae, trained.splits, trained.run, names, seed=cfg.seed, **values)
    print(f"{page}: {', '.join(names)} ({time.perf_counter() - started:.0f} s)")
    return page


def benchmark(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the training step of these settings in stages, print a table, and write it all into the file `json`."""
    from omegaconf import OmegaConf

    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    hints = typing.get_type_hints(timing.Plan)
    asked = {name: values[name] for name in hints}
    config.check_types(hints | {"device": str, "seed": int}, asked | {k: values[k] for k in ("device", "seed")}, "")
    plan = timing.Plan(**asked)
    if under_torchrun():
        raise ValueError("the benchmark measures a single process: start it without torchrun")
    work, machine = _work(cfg, plan.workers), environment(cfg.device)
    print(f"{network_text(work.net)}, {work.note}, {work.batch_size} a step", flush=True)
    print(f"training in {work.precision} on {machine['device']}, torch {machine['torch']}\n", flush=True)
    result = timing.measure(work, plan, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(timing.table(result))
    everything = result.as_dict() | {"data": work.note, "settings": values, "environment": machine}
    if plan.file:
        _write_json(plan.file, everything)
    return everything


def _work(cfg: "DictConfig", workers: int) -> timing.Work:
    """The training whose step is measured."""
    trainer = _trainer_settings(cfg)
    tokens, loss, optim = config.tokenizer(cfg), config.objective(cfg), config.build(cfg.optim, "optim")
    net = config.network(cfg, tokens).to(config.pick_device(cfg.device))
    precision = choose_precision(trainer["precision"], net, trainer["batch_size"])
    images, sources, note = timing.load_images(config.data_settings(cfg), trainer["batch_size"])
    return timing.Work(
        net,
        loss,
        optim,
        images,
        sources,
        tokens.encode,
        trainer["batch_size"],
        precision,
        total=trainer["steps"],
        seed=cfg.seed,
        note=note,
        workers=workers,
    )


def draw(
    vae: BigLearnVAE,
    splits: Splits,
    run: Path,
    names: Sequence[str],
    images: int | None = None,
    delta: float | None = None,
    seed: int = 0,
) -> Path:
    """Draw figures of the test images as PNG files into run/figures, and the page that shows all that are there.

    Args:
        names: of `figures.FIGURES`.
        images: at most so many in each; the map of codes takes its own number.
        delta: of the decoding sensitivity.
    """
    shown, labels = splits.test[:1000], None if splits.test.labels is None else splits.test.labels[:1000]
    page = run / FIGURES_PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        options: dict[str, Any] = {"labels": labels, "seed": seed}
        if images is not None and name != "latent_map":
            options["rows"] = images
        if name == "decoding_sensitivity":
            options["delta"] = delta
        Pictures.save(page.with_name(f"{name}.png"), pictures.FIGURES[name](vae, shown, **options))
    there = [name for name in pictures.FIGURES if page.with_name(f"{name}.png").exists()]
    _write(page, pictures.page(run.name, there))
    return page


def network_text(net: torch.nn.Module) -> str:
    """What a network is and how large."""
    return f"{type(net).__name__}, {size_text(count_parameters(net))}"


def size_text(parameters: int) -> str:
    """A number of parameters, and in the unit of the paper's tables."""
    return f"{parameters:,} parameters ({parameters / 2**20:.4f} x 2^20)"


def report(result: dict[str, Any], run: Path, split: str = "test") -> str:
    """The numbers of a summary or an evaluation as a small table, where everything is, and what to type next."""
    head = f"{result['name']}, {size_text(result['parameters'])}"
    if "seconds" in result:
        head += f"\n{result['steps']} steps in {result['seconds']:.0f} s, {result['images_per_second']:,.0f} images/s"
    elbo, reconstruction, kl = (result[f"{split}_{name}"] for name in ("joint_elbo", "reconstruction", "kl"))
    rows = {
        "share of patches observed": [f"{float(ratio):g}" for ratio in result["inpainting_psnr"]],
        "mean of several completions": [f"{value:.2f}" for value in result["inpainting_psnr"].values()],
        "mean of the 10 nearest training images": [f"{value:.2f}" for value in result["nearest_psnr"].values()],
    }
    files = {
        str(FIGURES_PAGE): "pictures of what the model does with test images",
        "summary.json": "these numbers",
        "metrics.jsonl": "the course of training",
        "checkpoints/best.pt": "the model",
    }
    return "\n".join(
        [
            head,
            "",
            f"{split} JointELBO {elbo:.3f} = reconstruction {reconstruction:.3f} - beta x KL {kl:.2f}; "
            f"{result[f'{split}_joint_elbo_nats']:.2f} nats with the constant of N(mu, I)",
            "",
            "in-painting: PSNR in dB over the missing pixels",
            *(f"  {name:<40}" + "".join(f"{cell:>8}" for cell in cells) for name, cells in rows.items()),
            "",
            *_likelihood_lines(result),
            *(f"{run / name!s:<60} {what}" for name, what in files.items() if (run / name).exists()),
            "",
            f"next: python scripts/evaluate.py run={run}",
            f"      python scripts/figures.py run={run}",
            f"      tensorboard --logdir {run.parent}",
            f'      in Python: import biglearn_vae as blv; vae = blv.load("{run}")',
        ]
    )


def _likelihood_lines(result: dict[str, Any]) -> list[str]:
    """The log-likelihoods and the consistency of an evaluation, as a table; nothing if they were not measured."""
    if "likelihood" not in result:
        return []
    likelihood, agreement, tasks = result["likelihood"], result["consistency"], ("joint", "marginal", "conditional")
    lines = [
        f"bounds on log p under N(mu, variance I), {likelihood['images']} images, {likelihood['samples']} samples each",
        f"  {'':<45}" + "".join(f"{task:>13}" for task in tasks),
    ]
    for unit, words, digits in (("nats", "nats", 2), ("bits_per_dim", "bits per dimension", 3)):
        for name, origin in (("model", "beta"), ("fitted", "fitted")):
            if bounds := likelihood.get(name):
                cells = "".join(f"{bounds[f'{task}_{unit}']:>13.{digits}f}" for task in tasks)
                head = f"{words}, variance {bounds['variance']:.4g} ({origin})"
                lines.append(f"  {head:<45}" + cells)
    if agreement:
        lines += [
            "consistency: log p(a) + log p(b | a) and log p(b) + log p(a | b) differ by "
            f"{agreement['order_gap']:.2f} nats, {agreement['order_noise']:.2f} of it by estimation alone;",
            f"  p(z | x_S) is {agreement['posterior_gap']:.2f} nats from the posterior of Bayes' rule "
            f"({agreement['effective_samples']:.0%} effective samples)",
        ]
    return [*lines, ""]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text)


def probe(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Linear probing of a trained run's codes, printed and written as probe.json into the run's folder."""
    values = _probe_settings(cfg)
    started = time.perf_counter()
    run, settings, vae, splits, checkpoint_name, step = _trained(cfg)
    train = probing.some(splits.train, cfg.train_images)
    test = probing.some(getattr(splits, cfg.split), cfg.test_images)
    print(f"probing {run}: {len(train):,} training and {len(test):,} {cfg.split} images ...", flush=True)
    ceiling = None
    if cfg.ceiling_steps:
        net, progress = config.network(settings, vae.tokenizer), Progress(cfg.ceiling_steps)
        try:
            ceiling = probing.train_ceiling(net, vae, train, cfg.ceiling_steps, cfg.seed, [progress])
        finally:
            progress.close()
    scores = probing.linear_probe(
        vae, train, test, values["ratios"], cfg.draws, cfg.seed, raw=cfg.pixels, ceiling=ceiling
    )
    result = {
        "name": run.name,
        "checkpoint": checkpoint_name,
        "step": step,
        "parameters": count_parameters(vae.net),
        "settings": values | {"logit_variance": probing.LOGIT_VARIANCE, "max_iter": probing.MAX_ITER},
        "train_images": len(train),
        "test_images": len(test),
    } | {
        name: value if name == "metric" else {str(ratio): numbers for ratio, numbers in value.items()}
        for name, value in scores.items()
    }
    _write_json(run / PROBE_FILE, result)
    print(probe_report(result))
    print(f"\n{run / PROBE_FILE!s:<60} these numbers ({time.perf_counter() - started:.0f} s)")
    return result


def _probe_settings(cfg: "DictConfig") -> dict[str, Any]:
    """The settings of `probe` that say what is measured, checked."""
    from omegaconf import OmegaConf

    hints = {"split": str, "seed": int, "ratios": list[float], "draws": int, "pixels": bool, "ceiling_steps": int}
    hints |= {"train_images": int | None, "test_images": int | None}
    container: dict[str, Any] = OmegaConf.to_container(cfg)
    values = {name: container[name] for name in hints}
    config.check_types(hints, values, "")
    config.check_evaluation(cfg)
    if cfg.split not in ("valid", "test"):
        raise ValueError(f"split must be valid or test, got {cfg.split!r}")
    for name, least in (("train_images", 1), ("test_images", 1), ("ceiling_steps", 0)):
        if values[name] is not None and values[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {values[name]}")
    return values


def probe_report(result: dict[str, Any]) -> str:
    """The numbers of a probe as a small table, and which classifiers are not quite trained."""
    words = {
        "codes": "codes, the mean of p(z | x_S)",
        "pixels": "raw pixels, zero where hidden",
        "ceiling": "the same network, trained with labels",
    }
    draws = result["settings"]["draws"]
    lines = [
        f"{result['metric']} in % on {result['test_images']:,} {result['settings']['split']} images, "
        f"{result['train_images']:,} to train, mean and standard deviation over {draws} draws of masks",
        f"  {'share of patches observed':<40}" + "".join(f"{float(ratio):>12g}" for ratio in result["codes"]),
    ]
    for name in (name for name in words if name in result):
        cells = (_percent(numbers["mean"], numbers["std"]) for numbers in result[name].values())
        lines.append(f"  {words[name]:<40}" + "".join(f"{cell:>12}" for cell in cells))
    for name in (name for name in words if name in result):
        if left := {ratio: n["unconverged"] for ratio, n in result[name].items() if n["unconverged"]}:
            at = ", ".join(f"{count} at {float(ratio):g}" for ratio, count in left.items())
            limit = result["settings"]["max_iter"]
            lines.append(f"note: classifiers on {name} whose solver stopped before it converged ({limit} steps): {at}")
    return "\n".join(lines)


def _percent(mean: float, std: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")
