"""What the scripts do: train, evaluate, probe, draw, time steps. They print for a person, write for a program."""

import functools
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
import typing
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from biglearn_vae import benchmark as timing
from biglearn_vae import (
    checks,
    completion,
    config,
    evaluation,
    experiments,
    results_page,
    runs,
    samples,
    search,
    stages,
    time_to_quality,
)
from biglearn_vae import figures as pictures
from biglearn_vae import probe as probing
from biglearn_vae.capabilities import BigLearnVAE, checked_dims
from biglearn_vae.data import PARTS, Batches, ImageSet, Splits
from biglearn_vae.distributed import World, in_group, pick_device, start, stop, under_torchrun
from biglearn_vae.files import Busy, write_json, write_text
from biglearn_vae.loggers import Logger, MetricsFile, Pictures, Progress, TensorBoard
from biglearn_vae.losses import is_elbo, name_of
from biglearn_vae.masks import MaskSampler
from biglearn_vae.models import MaskedViT, count_parameters
from biglearn_vae.optim import Optim
from biglearn_vae.patch_ae import PatchAE
from biglearn_vae.patches import Patchify
from biglearn_vae.stages import draw, measure, report, size_text
from biglearn_vae.trainer import Interrupted, Trainer, TrainingError, choose_precision
from biglearn_vae.workers import defaults

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCRIPTS = ("train", "evaluate", "figures", "complete", "probe", "benchmark", "reproduce")
PROGRAMS = {"train": ("train", config.PATCH_AE)}  # the settings files that a script takes, where there are several
_CALLED = threading.RLock()  # the random numbers of a thread are those of all: calls take turns
_COMMAND: list[str] = []  # as it was typed, of which Hydra and its launchers leave another in sys.argv


def run_script(script: str, overrides: Sequence[str] = (), config_name: str | None = None) -> Any:
    """Run a script in this process: run_script("train", ["case=case1", "data=mnist"]) does, prints and writes what
    `python scripts/train.py case=case1 data=mnist` does, and resumes what that began.

    Args:
        script: train, evaluate, figures, complete, probe, benchmark or reproduce. As reproduce starts processes, a file
            that runs it must do nothing when it is imported (`if __name__ == "__main__":`).
        overrides: NAME=VALUE, as on its command line, without flags; for a sweep write a loop.
        config_name: name of the settings file, if it is not the script's own: "patch_ae" trains stage 1.

    Returns:
        What it found: for train the run's summary with its folder as "run" (under torchrun, in the first process); for
        evaluate, complete, probe and benchmark what they write; for figures the path of the page; for reproduce whether
        everything is there, which is False if its budget or Ctrl-C ended it.

    Raises:
        ValueError, OSError, TrainingError, torch.OutOfMemoryError, MemoryError: with the message that the script would
            end with.
        KeyboardInterrupt: at Ctrl-C; by train `trainer.Interrupted`, after a checkpoint, also at SIGTERM.
    """
    checks.check_choice("script", script, SCRIPTS)
    config_name = config_name or script
    _check_program(script, config_name)
    overrides = config.words_of(overrides)
    if config.sweep_in_file(config_name)[0]:
        raise ValueError(f"{config_name} is a sweep (hydra.mode: MULTIRUN), which is started as a script")
    cfg = config.compose(overrides, config_name)
    config.require_all(cfg, config_name, config.chosen_by(overrides, config_name))
    flags = [] if config_name == script else [f"--config-name={config_name}"]
    command = [f"-m biglearn_vae {script}", *flags, *_own_folders(), *overrides]
    with _CALLED, _recorded(command), _float32_convolutions(), _memory_told():
        return globals()[script](cfg, overrides)


def call(script: str, words: Sequence[str], flags: Sequence[str] = ()) -> None:
    """The main program of a script, "train" and so on, with these words as its command line (see `main`)."""
    sys.argv = [f"-m biglearn_vae {script}", *flags, *words]
    main(globals()[script], config_name=script)


def main(task: Callable[["DictConfig", Sequence[str]], Any], config_name: str) -> None:
    """The main program of a script: compose the settings of the command line and call task(settings, overrides).

    What the user can fix ends with a line of explanation and exit code 2. HYDRA_FULL_ERROR=1 shows where it arose.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    failed: list[str] = []
    _prepare()
    typed, full_error, searches = _command_line(), "HYDRA_FULL_ERROR" in os.environ, False
    sweep, chosen = list(typed.overrides) if typed.multirun else None, typed.config_name or config_name

    @hydra.main(version_base="1.3", config_path=str(config.folder()), config_name=config_name)
    def run(cfg: "DictConfig") -> Any:
        hydra_cfg: Any = HydraConfig.get()
        words = config.as_dict(hydra_cfg.overrides, resolve=False)["task"]  # NAME=${OTHER} as it was typed
        config.register_resolvers()  # here, since other launchers run this in another process
        try:
            config.search_also(typed.config_dir)
            config.require_all(cfg, config_name, hydra_cfg.runtime.choices)
            if searches:
                return search.value(cfg, _once_free(task, cfg, words))
            _performed(task, cfg, words)
        except user_errors() as error:
            said = _of_job(error, words, sweep, searches)
            if searches and not full_error:  # which gets nothing of this one, and goes on
                return
            # Other launchers run this in another process, which can only tell by raising.
            if said and (full_error or "Basic" not in hydra_cfg.launcher._target_):
                raise
            failed.extend(said)

    try:
        config.search_also(typed.config_dir)
        if not (typed.config_path or typed.shell_completion):
            sweep = _checked(typed, config_name, chosen)
        if typed.help:
            print(config.help_text(chosen, config.fixed(sweep or typed.overrides)))
        else:
            searches = sweep is not None and _is_checked_search(sweep, config_name, chosen)
            # What a sweeper says of itself, such as that no run was completed, Hydra raises then, and prints no trace.
            with defaults({"HYDRA_FULL_ERROR": "1"} if searches else {}):
                run()
    except user_errors() as error:
        if full_error:
            raise
        failed.append(config.in_a_line(error))
    except KeyboardInterrupt:  # outside of training, which takes it for itself
        resumes = "; the same command goes on from the last checkpoint, if any" if config_name == "train" else ""
        failed.append(f"interrupted{resumes}")
    except SystemExit as end:
        if not end.code:  # of a run that was interrupted, in all processes alike
            stop()
        _complain(failed)  # of a sweep, of which another job failed otherwise
        raise
    if failed:
        _complain_and_exit(failed)
    stop()


@contextmanager
def _recorded(command: list[str]) -> Iterator[None]:
    """Let `environment` give this as the command."""
    before, _COMMAND[:] = _COMMAND[:], command
    try:
        yield
    finally:
        _COMMAND[:] = before


@contextmanager
def _float32_convolutions() -> Iterator[None]:
    """Convolutions of float32 numbers do not multiply in TF32 in here, if they would by torch's default."""
    try:
        before = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch's newer names of this were used, by somebody who means it
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _own_folders() -> list[str]:
    """The flags with which a script searches for settings where this process does."""
    return [f"--config-dir={own}" for own in config.folders()[1:]]


def _prepare() -> None:
    """What holds for a whole program."""
    torch.backends.cudnn.allow_tf32 = False  # what is computed in float32 is float32, in convolutions, too
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if not _is_main():
        warnings.simplefilter("ignore")


def _checked(typed: Namespace, script: str, config_name: str) -> list[str] | None:
    """Check that what was typed are settings; returns the words of a sweep, with those of the settings file, or None
    if it is no sweep."""
    _check_program(script, config_name, "--config-name")
    in_file, swept = config.sweep_in_file(config_name)
    given = {override.key_or_group: override for override in config.parsed(typed.overrides)}
    if "hydra.mode" in given:
        in_file = given["hydra.mode"].value() == "MULTIRUN"
    sweep = typed.multirun or in_file
    of_file = [word for word in swept if word.partition("=")[0].lstrip("+") not in given] if sweep else []
    words = [*of_file, *typed.overrides]
    config.check(words, config_name, sweep)
    if any(map(config.is_of_hydra, given.values())):
        config.with_sweeper(words, config_name)  # which refuses, in a line, what Hydra would
    return words if sweep else None


def _check_program(script: str, config_name: str, called: str = "config_name") -> None:
    """Raise a ValueError unless this is a file of settings for this script."""
    programs = PROGRAMS.get(script, (script,))
    checks.check_choice(called, config_name, (*programs, *config.own_main_files(programs)))


def _performed(task: Callable[..., Any], cfg: "DictConfig", words: Sequence[str]) -> Any:
    """What a task returns. An interrupted training ends the program, and with it a sweep, with exit code 0."""
    try:
        with _memory_told():
            return task(cfg, words)
    except Interrupted as stopped:
        if not stopped.kept:  # there is nothing to go on from
            raise
        sys.exit(0)


@contextmanager
def _memory_told() -> Iterator[None]:
    """Raise a MemoryError also on CPUs, where torch raises a RuntimeError for it."""
    try:
        yield
    except RuntimeError as error:
        said = r"CPUAllocator: .* tried to allocate (\d+) bytes|Storage size calculation overflowed"
        found = re.search(said, str(error))
        if not found:
            raise
        size = f"{int(found[1]) / 2**30:,.1f} GiB more" if found[1] else "a tensor as large as this"
        raise MemoryError(
            f"there is not enough memory for {size}: a smaller model, trainer.batch_size or evaluation.draws, or more "
            "trainer.accumulate, takes less"
        ) from error


def _once_free(task: Callable[..., Any], cfg: "DictConfig", words: Sequence[str]) -> Any:
    """What a task returns, called once no other process does the same, such as the same search in another terminal."""
    said = False
    while True:
        try:
            return _performed(task, cfg, words)
        except Busy as error:
            if not said:
                print(f"waiting for another process: {str(error).partition(': ')[0]}", flush=True)
            said = True
            time.sleep(10)


def _command_line() -> Namespace:
    """What was typed. Hydra is left settings, then flags, since it takes none between settings, but no --config-dir,
    which `config.search_also` tells it."""
    from hydra._internal.utils import get_args_parser

    typed, words = get_args_parser().parse_intermixed_args(), sys.argv[1:]
    _COMMAND[:] = sys.argv
    sys.argv[1:] = typed.overrides
    for before, word in zip(["", *words], words, strict=False):
        of_folder = word.startswith("--config-dir") or word == "-cd" or before in ("--config-dir", "-cd")
        sys.argv += [] if of_folder or word in typed.overrides else [word]
    if typed.config_dir is not None:  # a job of a sweep may run elsewhere; no shell resolves ~ behind "="
        typed.config_dir = str(Path(typed.config_dir).expanduser().resolve())
    return typed


def _of_job(error: Exception, words: Sequence[str], sweep: Sequence[str] | None, searches: bool) -> list[str]:
    """What went wrong, with the words of a sweep that are this job's own; printed at once, as the other jobs may take
    days. Empty if another process does what this job was to do."""
    swept, said = config.swept(sweep or []), config.in_a_line(error)
    own = " ".join(config.those(words, lambda override: override.key_or_group in swept))
    if searches and not own:  # the sweeper has a list of its own, of what it searches over
        own = " ".join(words)
    if not own:
        return [said]
    if isinstance(error, Busy):
        print(f"left to another process: {own}: {str(error).partition(': ')[0]}", flush=True)
        return []
    print(f"failed: {own}: {said}", file=sys.stderr, flush=True)
    return [f"{own}: {said}"]


def _is_checked_search(words: Sequence[str], script: str, config_name: str) -> bool:
    """Whether a sweep searches; refuses a sweep under torchrun, one that would lose results (see
    `runs.refuse_shared_folders`), and one that searches in vain (see `search.check`)."""
    if under_torchrun():
        raise ValueError("a sweep (-m) cannot run under torchrun: start one torchrun for each run of the sweep")
    runs.refuse_shared_folders(words, script, config_name)
    _expand_sweep_folder(words, config_name)
    return search.check(words, config_name)


def _expand_sweep_folder(words: Sequence[str], config_name: str) -> None:
    """Tell Hydra, which knows no ~, where a sweep leaves what it notes of itself."""
    folder = config.as_dict(config.with_sweeper(words, config_name), resolve=False).get("output_dir")
    if isinstance(folder, str) and folder.startswith("~"):
        sys.argv.insert(1, config.word("hydra.sweep.dir", Path(folder).expanduser()))


def _complain(messages: list[str]) -> None:
    """Print what went wrong, once if it went wrong everywhere."""
    if _is_main() or in_group():
        who = f" (process {os.environ['RANK']})" if under_torchrun() else ""
        for message in messages:
            print(f"error{who}: {message}", file=sys.stderr, flush=True)


def _complain_and_exit(messages: list[str]) -> None:
    """Print what went wrong and end with exit code 2."""
    _complain(messages)
    if in_group():
        # The others may wait in a collective for this one. Leaving the group would wait for them; ending without a
        # word lets torchrun notice and end them.
        os._exit(2)
    sys.exit(2)


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def user_errors() -> tuple[type[Exception], ...]:
    """The errors that a user's settings, files or data can cause, and the user can fix."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    mendable = (ValueError, OSError, TrainingError, torch.OutOfMemoryError, MemoryError)
    return (*mendable, HydraException, OmegaConfBaseException)


def train(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any] | None:
    """Train a run, or resume one, and evaluate it; returns its summary, with its folder (on the main process).

    Raises:
        Interrupted: after a checkpoint, if Ctrl-C or SIGTERM ended the training early, and after everything if it was
            at the last step.
    """
    config.check_evaluation(cfg.evaluation, "evaluation.")
    config.check_seed(cfg.seed)
    search.metrics(cfg)
    checks.whole_number("trainer.steps", cfg.trainer.steps, 1)
    hints = {"device": str, "name": str | int | None, "output_dir": str, "init_from": str | None}
    config.checked(cfg, hints)
    own = _own_loggers(cfg)
    run = Path(cfg.output_dir).expanduser() / runs.name_of(cfg, overrides)
    say = functools.partial(print, flush=True) if _is_main() else lambda *_: None
    world = start(cfg.device)
    if "torch._dynamo" in sys.modules:  # in a sweep: what was compiled for other runs counts towards a limit
        torch.compiler.reset()
    if done := finished(run, cfg):
        say(_finished_text(run, cfg, done))
        return done
    if world.is_main and run.is_dir():
        with runs.taken(run, cfg):  # if it is not free, that is known before the data is read
            pass
    stage = stages.of(cfg)(cfg, run, world.device)
    splits = _dataset(cfg, world)
    trainer = _trainer(cfg, run, stage, splits, world)
    with runs.taken(run, cfg) if world.is_main else nullcontext():
        if world.size == 1 and (done := finished(run, cfg)):  # by another process, while this one read the data
            say(_finished_text(run, cfg, done))
            return done
        first = trainer.resume()
        start_from = "" if first or cfg.get("init_from") is None else f", from the weights of {cfg.init_from}"
        say(f"{'going on with' if first else 'training'} {run}{start_from}")
        say(f"{network_text(stage.net)}, {len(splits.train):,} images, on {world.device}, {trainer.how}")
        for warning in _unfinished_warm_ups(cfg):
            say(f"warning: {warning}")
        loggers = _open(run, cfg, first, own) if world.is_main else []
        try:
            _fit(trainer, loggers)
        except Interrupted as stopped:
            say(f"{stopped}, the same command goes on")
            raise
        summary = _finish(run, stage, trainer, splits) if world.is_main else None
    world.barrier()
    if summary:
        say(stage.report(summary, run))
    if trainer.interrupted:  # this run is done, but a sweep must not go on
        raise Interrupted(f"stopped at the last step, {trainer.step}", kept=True)
    return summary


def _fit(trainer: Trainer, loggers: list[Logger]) -> None:
    with ExitStack() as ends:
        for logger in loggers:
            ends.callback(logger.close)  # each, also if another one cannot
        trainer.fit(loggers)


def _unfinished_warm_ups(cfg: "DictConfig") -> Iterator[str]:
    """Warnings of warm-ups that are longer than the training, and so never reach the value that the settings say."""
    from omegaconf import OmegaConf

    for name, what in (("loss.beta_warmup_steps", "loss.beta"), ("optim.warmup_steps", "the learning rate")):
        steps = OmegaConf.select(cfg, name)
        if isinstance(steps, int) and steps > cfg.trainer.steps:
            yield f"{what} rises over {steps} steps ({name}), and this run has {cfg.trainer.steps}: it is not reached"


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
    """The summary of a run that has all the steps asked for, with its folder, if its stage can report it.

    Raises:
        ValueError: see `runs.summary`.
    """
    summary = runs.summary(run, cfg)
    if summary is None:
        return None
    try:
        stages.of(cfg).report(summary, run)
    except (KeyError, TypeError):  # damaged: it is made again from the checkpoint
        return None
    return {"run": str(run)} | summary


def _finished_text(run: Path, cfg: "DictConfig", done: dict[str, Any]) -> str:
    hint = "A larger trainer.steps continues it, name=NAME starts another."
    return f"{run} is finished: {done['steps']} steps. {hint}\n{stages.of(cfg).report(done, run)}"


def _trainer(cfg: "DictConfig", run: Path, stage: stages.Stage, splits: Splits, world: World) -> Trainer:
    settings = _trainer_settings(cfg)
    metadata = {"config": config.as_dict(cfg), "data": splits.train.fingerprint()}
    optim = config.build(cfg.optim, "optim")
    try:
        images = splits.train.resident(world.device)
        batches = Batches(images, settings.pop("batch_size"), cfg.seed, world, transform=stage.transform)
        return Trainer(
            stage.net,
            stage.loss,
            batches,
            optim,
            folder=run / "checkpoints",
            seed=cfg.seed,
            world=world,
            evaluate=lambda net: stage.validate(net, splits.valid[: cfg.evaluation.valid_images]),
            monitor=stage.monitor,
            metadata=metadata | stage.metadata,
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"trainer: {error}") from error


def _trainer_settings(cfg: "DictConfig") -> dict[str, Any]:
    """The arguments of `Trainer` among the settings, and the batch size, of the types that they must have."""
    settings = config.as_dict(cfg.trainer)
    config.check_types(typing.get_type_hints(Trainer.__init__) | {"batch_size": int}, settings, "trainer")
    return settings


LoggerMaker = Callable[[Path, dict[str, Any]], Logger]  # of a run's folder and its settings


def _own_loggers(cfg: "DictConfig") -> list[LoggerMaker]:
    """What makes the loggers that `loggers` names."""
    names = config.checked(cfg, {"loggers": list[str] | None})["loggers"] or []
    return [config.named(name, "loggers") for name in names]


def _made(maker: LoggerMaker, run: Path, cfg: "DictConfig") -> Logger:
    logger = maker(run, config.as_dict(cfg))
    if lacking := [name for name in ("scalars", "picture", "close") if not callable(getattr(logger, name, None))]:
        raise ValueError(
            f"loggers: {type(logger).__name__} lacks {', '.join(lacking)}, which a subclass of "
            "biglearn_vae.loggers.Logger has"
        )
    return logger


def _open(run: Path, cfg: "DictConfig", first_step: int, own: Sequence[LoggerMaker]) -> list[Logger]:
    """Write a run's settings and its machine into its folder, and make the loggers."""
    from omegaconf import OmegaConf

    for name in () if first_step else (*runs.FILES.values(), config.PATCH_AE_FILE):
        for path in (run / name, *runs.kept_beside(run / name)):
            path.unlink(missing_ok=True)  # of a network that this one takes the place of
    write_text(run / config.CONFIG_FILE, OmegaConf.to_yaml(cfg, resolve=True))
    write_json(run / "environment.json", environment(cfg.device))
    return [
        MetricsFile(run / "metrics.jsonl", first_step),
        TensorBoard(run / "tensorboard", first_step),
        Pictures(run / "pictures"),
        Progress(cfg.trainer.steps, first_step),
        *(_made(maker, run, cfg) for maker in own),
    ]


def environment(device: str) -> dict[str, Any]:
    """Where a run was made: versions, machine, commit, command."""
    chosen, command = pick_device(device), _COMMAND or sys.argv
    return {
        "command": " ".join([command[0], shlex.join(command[1:])]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),  # its import would take a second
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{chosen.type}, {_threads()}",
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


@functools.cache
def _commit() -> str | None:
    """The commit of this repository when this process first asks; None if it was installed or there is no git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def _finish(run: Path, stage: stages.Stage, trainer: Trainer, splits: Splits) -> dict[str, Any]:
    """Let the stage measure the best checkpoint and draw it, and write the summary; returns it with the folder."""
    best, measured = stage.finish(run, splits)
    seen = trainer.step * trainer.batches.batch_size
    summary = {
        "name": run.name,
        "parameters": count_parameters(trainer.net),
        "steps": trainer.step,
        "epochs": float(f"{seen / len(splits.train):.6g}"),  # of a short training not 0
        "best_step": best["step"],
        "evaluation": runs.measured_with(stage.cfg),
        "seconds": round(trainer.seconds, 3),
        "precision": trainer.precision,
        "data_note": splits.note,
        "compile_seconds": round(trainer.compile_seconds, 3),
        "images_per_second": round(seen / max(trainer.seconds - trainer.compile_seconds, 1e-9), 1),
        **best["metrics"],  # on validation images, by which to choose
    } | measured
    write_json(run / runs.FILES["train"], summary)
    return {"run": str(run)} | summary


def measure_likelihood(
    vae: BigLearnVAE, splits: Splits, settings: "DictConfig", split: str, seed: int
) -> dict[str, Any]:
    """Bounds on log-likelihoods, with the model's variance and with one fitted on training images, if observations have
    such, and consistency.

    Only whole images are used; without any the result is empty.
    """
    count = settings.likelihood_images
    images = evaluation.whole(getattr(splits, split).select(slice(count)), vae.grid)
    if not len(images):
        print(f"none of these {count} images was recorded as a whole: no log-likelihoods and no consistency of them")
        return {}
    of_model: dict[str, dict[str, Any]] = {"model": {}}
    if vae.observations.scaled:
        fitted = evaluation.fit_variance(vae, splits.train.select(slice(10 * count)), seed)
        found = {"model": vae.variance, "fitted": fitted}  # the former is beta, and may be 0
        of_model = {name: {"variance": variance} for name, variance in found.items() if variance > 0}
    counts: dict[str, Any] = {"samples": settings.samples, "annealing_steps": settings.annealing_steps}
    bounds = {
        name: own | evaluation.likelihood(vae, images, seed=seed, **own, **counts) for name, own in of_model.items()
    }
    agreement = {}
    if vae.num_tokens > 1:
        own = next(iter(of_model.values()))
        agreement = own | evaluation.consistency(vae, images, seed=seed, **own, **counts)
    return {"likelihood": {"images": len(images), "prior": vae.prior} | counts | bounds, "consistency": agreement}


def measure_samples(vae: BigLearnVAE, splits: Splits, settings: "DictConfig", split: str, seed: int) -> dict[str, Any]:
    """`samples.by_passes` against whole images of a split, and the same numbers of as many other training images in
    place of samples, if there are enough; empty for fewer than 4 images."""
    whole = evaluation.whole(getattr(splits, split).select(slice(settings.images)), vae.grid)
    if len(whole) <= 3:
        print(f"fewer than 4 of these {settings.images} images were recorded as a whole: samples are not measured")
        return {}
    images, count = whole[:], settings.likelihood_images
    train = evaluation.whole(splits.train.select(slice(10 * count)), vae.grid)
    scores = samples.by_passes(vae, images, settings.passes, train, count, settings.samples, seed)
    # Balls shrink with their number, and the images that are measured are all within their own.
    begin = settings.images if split == "train" else 0
    others = evaluation.whole(splits.train.select(slice(begin, None)), vae.grid, most=len(images))
    real = samples.precision_recall(others[:], images) if len(others) == len(images) else None
    return {"passes": {"images": len(images), "scores": scores, "real": real}}


def evaluate(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a trained run on one of its splits, print it and write evaluation.json into its folder."""
    config.check_evaluation(cfg)
    checks.check_choice("split", cfg.split, PARTS)
    trained = _trained(cfg)
    run, settings, vae, splits = trained[:4]
    result = trained.described(cfg) | {"split": cfg.split, "parameters": count_parameters(vae.net)}
    _warn_of_shares(cfg.ratios, vae.num_tokens, vae.num_tokens - 1)
    print(f"measuring {run}: {len(getattr(splits, cfg.split)):,} {cfg.split} images ...", flush=True)
    result |= measure(vae, config.objective(settings, drawing=False), splits, cfg, cfg.split, cfg.seed)
    cfg.likelihood_images = _likelihood_images(trained, cfg.likelihood_images)
    if cfg.likelihood_images:
        print(f"log-likelihoods and consistency of {cfg.likelihood_images} images ...", flush=True)
        result |= measure_likelihood(vae, splits, cfg, cfg.split, cfg.seed)
    if cfg.passes:
        print(f"samples in {', '.join(map(str, cfg.passes))} passes ...", flush=True)
        result |= measure_samples(vae, splits, cfg, cfg.split, cfg.seed)
    _write_measured(run, "evaluate", result)
    print(report(result, run, cfg.split, runs.FILES["evaluate"]))
    return result


def complete(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the in-painting of a trained run in full, print it and write completion.json into its folder."""
    plan = completion.Plan(**config.checked(cfg, typing.get_type_hints(completion.Plan)))
    checks.check_choice("split", cfg.split, PARTS[1:])
    checks.whole_number("images", cfg.images, 1)
    trained = _trained(cfg)
    plan = replace(plan, likelihood_images=_likelihood_images(trained, plan.likelihood_images))
    _warn_of_shares(plan.tasks, trained.vae.num_tokens, trained.vae.num_tokens - 1)
    images = getattr(trained.splits, cfg.split).select(slice(cfg.images))
    start = time.perf_counter()
    tasks = completion.measure(trained.vae, images, trained.splits.train, plan, cfg.seed)
    if plan.regressor_steps:
        for task, psnr in _regressor(trained, images, plan, cfg.seed).items():
            tasks[str(task)]["regressor"] = {"psnr": psnr, "steps": plan.regressor_steps}
    result = trained.described(cfg) | {
        "split": cfg.split,
        "images": len(images),
        "draws": plan.draws,
        "seconds": round(time.perf_counter() - start, 1),
        "tasks": tasks,
    }
    path = _write_measured(trained.run, "complete", result)
    print(completion.table(result))
    print(f"\n{path}")
    return result


def _write_measured(run: Path, script: str, found: dict[str, Any]) -> Path:
    """Write what a measuring script found, and print where its previous result is kept."""
    if kept := runs.write_measured(run, script, found):
        print(f"{kept!s:<60} what was measured before, with other settings, on other images or at another step")
    return run / runs.FILES[script]


def _regressor(trained: "_Trained", images: ImageSet, plan: completion.Plan, seed: int) -> dict[completion.Task, float]:
    """PSNR by task of the run's network, trained anew without its latent by the run's optimizer and q(S, T)."""
    settings, tokens = trained.settings, trained.vae.tokenizer
    steps, batch_size = plan.regressor_steps, settings.trainer.batch_size
    return completion.regressor_psnr(
        config.network(settings, tokens).to(trained.vae.device),
        tokens,
        trained.splits.train,
        images,
        plan.tasks,
        config.build(settings.optim, "optim"),
        config.objective(settings).masks,
        steps,
        batch_size,
        seed,
    )


class _Trained(NamedTuple):
    """A run's folder, its settings, its model and data, the checkpoint that the model is from, its step, and whether
    the likelihood that was bounded is known (`losses.has_model`)."""

    run: Path
    settings: "DictConfig"
    vae: BigLearnVAE
    splits: Splits
    checkpoint: str
    step: int
    has_model: bool

    def described(self, cfg: "DictConfig", **settings: Any) -> dict[str, Any]:
        """What describes a measurement: the network, the images, the settings that its numbers depend on, and the
        machine."""
        own = {name: value for name, value in config.leaves(cfg) if name not in (*config.PLACE, "checkpoint")}
        network = {"name": self.run.name, "checkpoint": self.checkpoint, "step": self.step}
        data = {"data": getattr(self.splits, cfg.split).fingerprint()}
        return network | data | {"settings": own | settings, "environment": environment(cfg.device)}


def _trained(cfg: "DictConfig") -> _Trained:
    """What `run`, `checkpoint`, `device` and `data_root` name.

    Raises:
        ValueError: for settings of another type, a run that is not there, cannot be written to or was trained on other
            data, and data that is not there.
    """
    config.check_seed(cfg.seed)
    words = dict.fromkeys(("run", "checkpoint", "device"), str) | {"data_root": str | None}
    config.checked(cfg, words)
    runs.check_which(cfg.checkpoint)
    run = Path(cfg.run).expanduser()
    run = run if run.name not in ("", "..") else run.resolve()  # it goes by its name
    vae, state, path = runs.load_with_state(run, cfg.device, cfg.checkpoint)
    if not os.access(run, os.W_OK):  # said before anything is measured
        raise ValueError(f"{run} cannot be written, and what is found is written there: copy it to where it can")
    settings = config.saved(run)
    try:
        splits = config.dataset(settings, cfg.data_root)
    except ValueError as error:  # the scripts for a run have another name for it
        raise ValueError(str(error).replace("data.root", "data_root")) from error
    if splits.train.fingerprint() != state["metadata"]["data"]:
        raise ValueError(f"{run} was trained on other images than its data settings give now: point data_root at those")
    print(f"{run}: {path.name}, of step {state['step']}; the run has {settings.trainer.steps}", flush=True)
    return _Trained(run, settings, vae, splits, path.name, state["step"], runs.has_model(state))


def _likelihood_images(trained: _Trained, asked: int) -> int:
    """For how many images log-likelihoods are bounded: as many as were asked for, or none, with a message, if it is not
    known what the objective bounds."""
    if asked and not trained.has_model:
        print(
            "no log-likelihoods and no consistency: the objective has terms of its own; same_model = True in its "
            "class, before it is trained by, says that they bound the likelihood of the same model"
        )
        return 0
    return asked


def _warn_of_shares(shares: Sequence[completion.Task], num_tokens: int, most: int) -> None:
    """If images have few patches, warn of shares that are rounded to nothing, or to the same as others.

    Args:
        most: the largest number of patches that are observed.
    """
    counts: dict[int, list[str]] = {}
    for share in shares:
        if not isinstance(share, str):
            counts.setdefault(min(round(share * num_tokens), most), []).append(f"{share:g}")
    for count, alike in counts.items():
        if len(alike) > 1 or (count == 0 and alike != ["0"]):
            checks.warn(f"{count} of {num_tokens} patches are observed at {' and '.join(alike)}")


def figures(cfg: "DictConfig", overrides: Sequence[str] = ()) -> Path:
    """Draw figures of a trained run, of its test images, into its folder; returns the page that shows them."""
    hints = {
        "figures": list[str] | str | None,
        "images": int | None,
        "delta": float | None,
        "dims": list[int] | None,
    }
    values = config.checked(cfg, hints)
    if values["images"] is not None:
        checks.whole_number("images", values["images"], 1)
    names = values.pop("figures")
    names = list(pictures.FIGURES) if names is None else [names] if isinstance(names, str) else names
    if not names or not set(names) <= set(pictures.FIGURES):
        raise ValueError(f"figures must be some of {', '.join(pictures.FIGURES)}, got {', '.join(names) or 'none'}")
    started = time.perf_counter()
    trained = _trained(cfg)
    if values["dims"] is not None:  # said before anything is drawn
        checked_dims(trained.vae, values["dims"])
    source = f"{trained.checkpoint} of step {trained.step}"
    page = draw(trained.vae, trained.splits, trained.run, names, source, seed=cfg.seed, **values)
    print(f"{page}: {', '.join(names)} ({time.perf_counter() - started:.0f} s)")
    return page


def benchmark(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the training step of these settings in stages, or how soon they reach a quality; returns what is kept."""
    config.checked(cfg, {"device": str})
    plan = timing.Plan(**config.checked(cfg, typing.get_type_hints(timing.Plan)))
    config.check_seed(cfg.seed)
    if under_torchrun():
        raise ValueError("the benchmark measures a single process: start it without torchrun")
    tokens, machine = _tokenizer_to_measure(cfg, plan), environment(cfg.device)
    work = _work(cfg, plan, tokens)
    print(f"{network_text(work.net)}, {work.note}, {work.batch_size} a step", flush=True)
    print(f"training in {work.precision} on {machine['device']}, torch {machine['torch']}\n", flush=True)
    settings = config.as_dict(cfg)
    for measured in _courses(cfg, plan, work, tokens) if plan.evaluations else _stages(plan, work):
        everything = measured | {"data": work.note, "settings": settings, "environment": machine}
        if plan.file:
            write_json(plan.file, everything)
    return everything


def _tokenizer_to_measure(cfg: "DictConfig", plan: timing.Plan) -> Patchify | PatchAE:
    """The tokenizer of these settings. If nothing is learned, an untrained PatchAE stands in for a missing one."""
    needed = cfg.tokens.name != config.PATCH_AE or cfg.tokens.run is not None or plan.evaluations is not None
    if needed or (config.patch_ae_run(cfg) / config.PATCH_AE_FILE).is_file():
        return config.tokenizer(cfg)
    print("the PatchAE is untrained, there is no other: a step takes as long", flush=True)
    return PatchAE(**config.patch_ae_sizes(cfg)).eval().requires_grad_(False)


def _stages(plan: timing.Plan, work: timing.Work) -> Iterator[dict[str, Any]]:
    """How fast each stage is."""
    result = timing.measure(work, plan, say=_progress)
    print(timing.table(result))
    yield result.as_dict()


def _courses(
    cfg: "DictConfig", plan: timing.Plan, work: timing.Work, tokens: Patchify | PatchAE
) -> Iterator[dict[str, Any]]:
    """The test JointELBO of each stage by seconds, as far as it is known at each evaluation, with a plot at the end."""
    for found in time_to_quality.measure(work, plan, config.dataset(cfg).test, tokens, say=_progress):
        yield {"courses": time_to_quality.as_dict(found)}
    print(time_to_quality.table(found))
    if plan.picture:
        title = f"{network_text(work.net)}, {work.note}, {work.batch_size} a step, {work.precision}"
        time_to_quality.plot(plan.picture, found, title)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _work(cfg: "DictConfig", plan: timing.Plan, tokens: Patchify | PatchAE) -> timing.Work:
    """The training whose step is measured."""
    trainer = _trainer_settings(cfg)
    loss, optim = config.objective(cfg), config.build(cfg.optim, "optim")
    net = config.network(cfg, tokens).to(pick_device(cfg.device))
    if not isinstance(net, MaskedViT):
        raise ValueError(f"the benchmark knows how UniversalViT and TwoStackViT work alone, got a {type(net).__name__}")
    if not is_elbo(loss) or type(loss.masks).__call__ is not MaskSampler.__call__:
        raise ValueError(
            "the benchmark compares with a plain BigLearnELBO and MaskSampler, which terms or masks of one's own are "
            f"not, got {name_of(loss)} with {name_of(loss.masks)}"
        )
    if not loss.observations.scaled:
        raise ValueError("the benchmark is of Gaussian observations, which take as long: leave loss.observations out")
    tokens = tokens.to(pick_device(cfg.device))
    precision = choose_precision(trainer["precision"], net, trainer["batch_size"])
    stand_ins = plan.evaluations is None  # nothing is learned from random images
    images, sources, note = timing.load_images(config.data_settings(cfg), trainer["batch_size"], stand_ins)
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
        workers=plan.loader_workers(pick_device(cfg.device).type),
    )


def _optim_of_ceiling(settings: "DictConfig") -> Optim:
    """Muon for a network of this width, whatever optimizer the run has; of one without a width the run's own."""
    dim = settings.model.get("dim")
    return config.build(settings.optim, "optim") if dim is None else config.muon(dim)


def network_text(net: torch.nn.Module) -> str:
    """What a network is and how large."""
    return f"{type(net).__name__}, {size_text(count_parameters(net))}"


def probe(cfg: "DictConfig", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Linear probing of a trained run's codes, printed and written as probe.json into the run's folder."""
    values = _probe_settings(cfg)
    started = time.perf_counter()
    trained = _trained(cfg)
    run, settings, vae, splits = trained[:4]
    _warn_of_shares(values["ratios"], vae.num_tokens, vae.num_tokens)
    train = probing.some(splits.train, cfg.train_images)
    test = probing.some(getattr(splits, cfg.split), cfg.test_images)
    print(f"probing {run}: {len(train):,} training and {len(test):,} {cfg.split} images ...", flush=True)
    ceiling = None
    if cfg.ceiling_steps:
        net, optim = config.network(settings, vae.tokenizer), _optim_of_ceiling(settings)
        progress = Progress(cfg.ceiling_steps)
        try:
            ceiling = probing.train_ceiling(net, vae, splits.train, optim, cfg.ceiling_steps, cfg.seed, [progress])
        finally:
            progress.close()
    scores = probing.linear_probe(
        vae, train, test, values["ratios"], cfg.draws, cfg.seed, cfg.pixels, ceiling, cfg.neighbours
    )
    metric, votes = scores.pop("metric"), scores.pop("neighbours")
    chosen = {"neighbours": votes, "logit_variance": probing.LOGIT_VARIANCE, "max_iter": probing.MAX_ITER}
    result = trained.described(cfg, **chosen) | {
        "parameters": count_parameters(vae.net),
        "train_images": len(train),
        "test_images": len(test),
        "attributes": list(splits.label_names) if probing.labels_of(test).ndim > 1 else [],  # labels may be classes
        "metric": metric,
    }
    result |= {name: {str(ratio): score for ratio, score in of.items()} for name, of in scores.items()}
    path = _write_measured(run, "probe", result)
    print(probing.table(result))
    print(f"\n{path!s:<60} these numbers ({time.perf_counter() - started:.0f} s)")
    return result


def _probe_settings(cfg: "DictConfig") -> dict[str, Any]:
    """The settings of `probe` that say what is measured, checked."""
    hints = {"split": str, "seed": int, "ratios": list[float], "draws": int, "pixels": bool | None}
    hints |= {"train_images": int | None, "test_images": int | None, "ceiling_steps": int, "neighbours": int | None}
    values = config.checked(cfg, hints)
    config.check_evaluation(cfg, everything=True)
    checks.check_choice("split", cfg.split, PARTS[1:])
    for name, least in (("train_images", 1), ("test_images", 1), ("ceiling_steps", 0), ("neighbours", 0)):
        if values[name] is not None:
            checks.whole_number(name, values[name], least)
    return values


def reproduce(cfg: "DictConfig", overrides: Sequence[str] = ()) -> bool:
    """Make what results/ lacks of the paper's experiments, then its page and plots; returns whether all is there.

    Raises:
        ValueError: after everything else, if scripts failed.
    """
    hints: dict[str, Any] = {"target": str, "workers": int, "budget": float | None, "output_dir": str}
    hints |= {"results_dir": str, "device": str, "data_root": str | None, "only": str | None, "preset": dict}
    values = config.checked(cfg, hints)
    if under_torchrun():
        raise ValueError("reproduce starts processes of its own: start it without torchrun")
    campaign = experiments.Campaign(
        preset=_preset(values["preset"]),
        target=cfg.target,
        output=Path(cfg.output_dir).expanduser(),
        results=Path(cfg.results_dir).expanduser(),
        device=cfg.device,
        data_root=cfg.data_root,
        workers=cfg.workers,
        budget=cfg.budget,
        only=cfg.only,
    )
    _page_in(campaign.results)
    left = campaign.missing()
    print(f"{len(campaign.runs) - len(left)} runs are there, {len(left)} to be made", flush=True)
    done = campaign.make(functools.partial(call, flags=_own_folders()))
    page = write_results(campaign.results)
    print(f"{page}" if done else f"{page}, of what is there so far; the same command goes on")
    if failures := campaign.failures:
        raise ValueError("\n".join([f"{len(failures)} of {len(left)} runs failed:", *failures]))
    return done


def _preset(values: dict[str, Any]) -> experiments.Preset:
    config.check_types(typing.get_type_hints(experiments.Preset), values, "preset")
    needed = [of.name for of in fields(experiments.Preset) if of.default is of.default_factory is MISSING]
    if lacking := [name for name in needed if name not in values]:
        raise ValueError(f"preset/{values['name']}.yaml lacks {', '.join(lacking)}")
    return experiments.Preset(**values)


def _page_in(results: Path) -> Path:
    """Where the page of a folder of results is; a ValueError if something else is there, which would be lost."""
    path, head = results / "README.md", results_page.HEAD.partition(" from")[0]
    if path.is_file() and not path.read_text("utf-8", errors="replace").startswith(head):
        raise ValueError(f"{path.absolute()} is no page of results and would be written over: give another results_dir")
    return path


def write_results(results: Path) -> Path:
    """The page and the plots of all numbers in a folder of results."""
    path = _page_in(results)
    found = experiments.load(results)
    results.mkdir(parents=True, exist_ok=True)
    for name, draw_into in results_page.plots(found).items():
        draw_into(results / name)
    write_text(path, results_page.page(found, config.paper_parameters()))
    return path
