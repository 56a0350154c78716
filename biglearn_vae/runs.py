"""Runs: what their folders are called, what is in one, who trains in it, and the model that is loaded from it."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from biglearn_vae import checkpoint, checks, config
from biglearn_vae.capabilities import BigLearnVAE
from biglearn_vae.data import OWN
from biglearn_vae.distributed import pick_device
from biglearn_vae.files import Busy, locked, read_json, write_json

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

# What each script leaves in a run's folder.
FILES = {"train": "summary.json", "evaluate": "evaluation.json", "complete": "completion.json", "probe": "probe.json"}
# What tells one measurement of a script from another.
MEASUREMENT = ("checkpoint", "step", "data", "settings")
# Settings of the measurement at the end of training.
MEASURED_WITH = ("evaluation.images", "evaluation.masks", "evaluation.ratios", "evaluation.draws")
OWN_OBSERVATIONS = "own"  # in a checkpoint, of what none of this library's `observations` are
# Settings in which a run may differ from what it was started with, and still go on.
FREE = (*config.PLACE, "trainer.steps", "trainer.report_every", "trainer.checkpoint_every", *MEASURED_WITH)
IN_NAME = ("data", "data._target_", "case", "method", "seed")
FOLDER = ("name", "output_dir")  # settings that say where a run is
MOST_JOBS = 8  # of a sweep over a setting: so many are compared as to where they leave their results
# Scripts that leave one result in the folder of `run`, and the settings of which each value leaves its own.
MEASURING = {"evaluate": ("run",), "complete": ("run",), "probe": ("run",), "figures": ("run", "figures")}


def name_of(cfg: "DictConfig", overrides: Sequence[str]) -> str:
    """data-case-method-seed, and what else was set on the command line: runs of a sweep do not share a folder."""
    if cfg.name is not None:
        name = str(cfg.name)  # 2024 is one, too
        if not name.strip(". /") or ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"name must be that of a folder in output_dir, got {name!r}: output_dir= says where")
        if "{'" in name:  # of a group of settings
            raise ValueError(f"name holds settings, {name!r}: a case is called ${{case.name}}, and so on")
        return name
    words = (_canonical(override) for override in config.parsed(overrides))
    extra = [word for word in words if not _is_free(key := word.lstrip("+~").split("=")[0]) and key not in IN_NAME]
    tag, case = "-".join(sorted(extra)), cfg.case.name if "case" in cfg else None
    if len(tag) > 120:  # file systems take names of 255 characters at most
        tag = hashlib.blake2b(tag.encode(), digest_size=6).hexdigest()
    name = "-".join(filter(None, (config.data_name(cfg), case, cfg.method.name, f"seed{cfg.seed}", tag)))
    return re.sub(r"[^\w.-]+", "-", name).strip("-")  # what a shell and Hydra take without quotes


def _canonical(override: "Override") -> str:
    """A setting as a sweep writes it, whose jobs have 0.001 for 1e-3."""
    name, given, _ = (override.input_line or "").partition("=")
    return f"{name}={override.get_value_element_as_str()}" if given else name


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def refuse_shared_folders(words: Sequence[str], script: str, config_name: str | None = None) -> None:
    """Raise a ValueError if several jobs of a sweep would write into one folder, one over the other.

    Args:
        words: of its command line. Of each setting with several values the first ones are checked, with the first value
            of all other settings.
        script: train, patch_ae, evaluate, ...
        config_name: of the settings file, if it is not the script's own.
    """
    swept = config.swept(words)
    if script in MEASURING and (other := [key for key in swept if key not in MEASURING[script]]):
        raise ValueError(
            f"a sweep over {other[0]} would keep the last result alone, in the run's folder: sweep over run=, or start "
            "them one by one"
        )
    if script not in _PLACES:
        return
    several = {key: list(islice(dict.fromkeys(config.job_words(o)), MOST_JOBS)) for key, o in swept.items()}
    for key in (key for key in several if key not in FOLDER):
        others = [*config.fixed(words), *(own[0] for name, own in several.items() if own and name != key)]
        jobs = [[*others, word] for word in several[key]]
        settings = [config.compose_checked(job, config_name or script) for job in jobs]
        places = [_place(script, cfg, job) for cfg, job in zip(settings, jobs, strict=True)]
        if None not in places and len(set(places)) < len(places):
            raise ValueError(_shared(key, settings[0], script))


def _shared(key: str, cfg: "DictConfig", script: str) -> str:
    """That several jobs of a sweep over a setting would write into one place, and what to do."""
    part = f"${{{key}.name}}" if key in ("data", "case", "method", "tokens") else f"${{{key}}}"
    if script == "benchmark":
        what = f"json={cfg.json} would be the file of several benchmarks of a sweep over {key}"
        return f"{what}: leave json= out, and none is written, or let it hold '{part}'"
    if cfg.name is None:
        return f"a sweep over {key} would use one folder for several runs: start them one by one, each with name=NAME"
    return (
        f"name={cfg.name} would be the folder of several runs of a sweep over {key}: leave name= out, and each is "
        f"named after its settings, or let it hold '{part}'"
    )


def _place(script: str, cfg: "DictConfig", words: Sequence[str]) -> str | None:
    """Where a job of these settings and words leaves what another job could overwrite; None for nowhere, and where
    only Hydra knows, by ${hydra:job.num}."""
    from omegaconf.errors import InterpolationResolutionError

    try:
        return _PLACES[script](cfg, words)
    except InterpolationResolutionError:
        return None


def _folder_of(cfg: "DictConfig", words: Sequence[str]) -> str:
    return f"{cfg.output_dir}/{name_of(cfg, words)}"


_PLACES: "dict[str, Callable[[DictConfig, Sequence[str]], str | None]]" = {
    "train": _folder_of,
    config.PATCH_AE: _folder_of,
    "benchmark": lambda cfg, _: cfg.json,
}


def differences(old: "DictConfig", new: "DictConfig") -> list[str]:
    """The settings in which two configurations differ, apart from those that may: "optim.lr: 0.1, now 0.2"."""
    before, after = dict(config.leaves(old)), dict(config.leaves(new))
    changed = (key for key in config.changed(before, after) if not _is_free(key))
    return [f"{key}: {before.get(key, 'absent')}, now {after.get(key, 'absent')}" for key in changed]


def measured_with(cfg: "DictConfig") -> dict[str, Any]:
    """The settings of the measurement at the end of training, by their last names."""
    return {key.rpartition(".")[2]: value for key, value in config.leaves(cfg) if key in MEASURED_WITH}


def summary(run: Path, cfg: "DictConfig") -> dict[str, Any] | None:
    """The summary of a run that has all the steps asked for; None if there is something to train or to measure.

    Raises:
        ValueError: if the folder holds a run that training with these settings would spoil.
    """
    resumable, found = checkpoint.is_resumable(run / "checkpoints"), read_json(run / FILES["train"])
    # A damaged summary counts as none: it is made again from the checkpoint.
    steps = found["steps"] if isinstance(found.get("steps"), int) else 0
    trained = max(steps, checkpoint.steps_in(run / "checkpoints"))
    if not resumable and not steps:  # no run, or one that ended before its first checkpoint
        return None
    old = config.saved(run)
    if changed := differences(old, cfg):
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(
            f"{run} holds a run with other settings ({'; '.join(changed[:4])}{more}). "
            "Give name=NAME for another run, or delete the folder."
        )
    if trained > cfg.trainer.steps:
        end = "" if trained == steps else f", trainer.steps={trained} to end it there,"
        raise ValueError(
            f"{run} holds a run of {trained} steps, more than the {cfg.trainer.steps} asked for, which it cannot go "
            f"back to. Give name=NAME for another run{end} or delete the folder."
        )
    # Moved, or other images under the same name: what is read will tell.
    roots = [of.data.get("root") for of in (old, cfg) if cfg.data.name in OWN]
    places = {root and config.data_root(root) for root in roots}
    best_step = checkpoint.step_of(run / "checkpoints" / checkpoint.BEST) if resumable else found.get("best_step")
    of_this = found.get("evaluation") == measured_with(cfg) and found.get("best_step") == best_step
    if steps == trained == cfg.trainer.steps and len(places) < 2 and of_this:
        return found
    if not resumable:
        raise ValueError(
            f"{run} holds a run of {steps} steps whose checkpoints are gone, so that it cannot go on nor be "
            "measured. Give name=NAME for another run, or delete the folder."
        )
    return None


def summaries(folder: str | Path = "outputs", measured: bool = False) -> list[dict[str, Any]]:
    """The results of the runs in a folder, such as those of a sweep, a row for each: its folder, the numbers of its
    summary.json and every setting, by dotted names ("inpainting_psnr.0.5", "optim.lr"), as pandas.DataFrame takes them.

    Runs that are not finished, or whose settings are gone, are left out.

    Args:
        measured: whether to add what evaluate.py, complete.py and probe.py found last, after their names
            ("probe.codes.0.1.mean", "evaluate.likelihood.fitted.joint_nats").

    Raises:
        ValueError: if there is no such folder.
    """
    root, found = checks.path("folder", folder), []
    scripts = [script for script in FILES if script != "train"] if measured else []
    if not root.is_dir():
        raise ValueError(f"there is no folder {root} of runs")
    for run in _folders_of_runs(root):
        numbers = dict(config.leaves(read_json(run / FILES["train"])))
        with suppress(ValueError):
            settings = dict(config.leaves(config.saved(run)))
            # One that goes on has the numbers of fewer steps than its settings say.
            if numbers and numbers.get("steps", 0) >= settings.get("trainer.steps", 0):
                more = {script: read_json(run / FILES[script]) for script in scripts}
                found.append({"run": str(run)} | settings | numbers | dict(config.leaves(more)))
    return found


def _folders_of_runs(root: Path) -> list[Path]:
    """The folders below that hold a summary, each once, those behind links by the links that lead there."""
    found: dict[str, Path] = {}
    for follow in (False, True):  # what is there without a link has its own name
        walked = set()
        for folder, names, files in os.walk(root, followlinks=follow):
            place = os.path.realpath(folder)
            if place in walked:  # a link to a folder that it lies in, or another one to the same
                names.clear()
            elif FILES["train"] in files:
                found.setdefault(place, Path(folder))
            walked.add(place)
    return sorted(found.values())


def write_measured(run: Path, script: str, found: dict[str, Any]) -> Path | None:
    """Write what a measuring script found into its file, such as probe.json.

    Returns:
        Where the previous measurement is kept, such as probe-1.json, if it was of another step or had other settings,
        as it may have taken hours. None if there was none, or if it was the same measurement.
    """
    path, own = run / FILES[script], json.loads(json.dumps(_measurement(found)))
    again = [other for other in sorted(kept_beside(path)) if _measurement(read_json(other)) == own]
    before, kept = read_json(path), None
    if before and _measurement(before) != own:
        numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
        kept = next(free for free in numbered if not free.exists())
        write_json(kept, before)
    write_json(path, found)
    for other in again:  # only now: writing may fail
        other.unlink()
    return kept.replace(again[0]) if kept and again else kept


def kept_beside(path: Path) -> Iterator[Path]:
    """Earlier measurements beside what a script measured last."""
    pattern = re.compile(re.escape(path.stem) + "-[0-9]+")
    return (other for other in path.parent.glob(f"{path.stem}-*.json") if pattern.fullmatch(other.stem))


def _measurement(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found.get(name) for name in MEASUREMENT}


@contextmanager
def taken(run: Path, cfg: "DictConfig") -> Iterator[None]:
    """Make a run's folder and be the only process that trains in it.

    Raises:
        Busy: if another process trains this run there, with these settings.
        ValueError: if another process trains there with other settings, or the folder cannot be made.
    """
    busy = f"trains in {run}: wait for it, or give name=NAME for another run"
    with ExitStack() as stack:
        try:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run, busy))
        except OSError as error:
            raise ValueError(f"{run} cannot be written ({error}): name another folder by output_dir=") from None
        except Busy as error:
            if _makes(run, cfg):
                raise
            raise ValueError(str(error)) from None
        yield


def _makes(run: Path, cfg: "DictConfig") -> bool:
    """Whether the process that trains in a folder makes this run; if it has only begun, the folder's name tells."""
    try:
        other = config.saved(run)
    except ValueError:
        return True
    return not differences(other, cfg) and other.trainer.steps >= cfg.trainer.steps


def load(
    run: str | Path,
    device: str = "auto",
    which: str = "best",
    net: nn.Module | None = None,
    tokenizer: nn.Module | None = None,
) -> BigLearnVAE:
    """A trained model from the folder of its run, or from the file of `BigLearnVAE.save`, frozen, in evaluation mode.

    Args:
        run: the folder, or the file.
        device: "auto" is a GPU if there is one.
        which: of a run "best", the largest validation ELBO, or "latest".
        net, tokenizer: new instances to take the weights, for a file whose network or tokenizer is not this library's.

    Raises:
        ValueError: if there is no run, or its checkpoint is unreadable or of another architecture.
    """
    check_which(which)
    path = checks.path("run", run)
    if path.is_file():
        return BigLearnVAE.from_file(path, pick_device(device), net, tokenizer)
    if net is not None or tokenizer is not None:
        raise ValueError(f"net and tokenizer are for a file of BigLearnVAE.save, {path} is none")
    if path.suffix == ".pt" and not path.exists():
        raise ValueError(f"there is no file {path}, nor a run of that name")
    return load_with_state(run, device, which)[0]


def load_with_state(run: str | Path, device: str, which: str) -> tuple[BigLearnVAE, dict[str, Any], Path]:
    """Like `load`, with the checkpoint that the model is from and its path."""
    cfg = config.saved(run)
    if cfg.method.name == config.PATCH_AE:
        word = config.shell_word("tokens.run", Path(run))
        raise ValueError(f"{run} is a PatchAE, stage 1: train a BigLearn-VAE on its codes with {word}")
    state, path = checkpoint_of(run, which)
    tokens = config.tokenizer(cfg, state["metadata"].get("tokenizer"))
    net = config.network(cfg, tokens)
    checkpoint.load_weights(net, state.get("average") or state["net"], path)
    net = net.to(pick_device(device)).requires_grad_(False)
    # An objective of the user's may have no such settings, or observations of its own. Only then is it made, since that
    # needs its code.
    observations = state["metadata"].get("observations", cfg.loss.get("observations"))
    own = observations == OWN_OBSERVATIONS
    loss = cfg.loss if {"prior", "beta"} <= cfg.loss.keys() and not own else config.objective(cfg, drawing=False)
    observations = loss.observations if own else observations
    variance = state["metadata"].get("variance", loss.beta if has_model(state) else 0.0)
    return BigLearnVAE(net, tokens, loss.prior, variance, observations=observations), state, path


def has_model(state: dict[str, Any]) -> bool:
    """Whether a checkpoint is of an objective that bounds a known likelihood (`losses.has_model`)."""
    metadata = state["metadata"]
    return metadata.get("has_model", metadata.get("gaussian", True))  # as it was called


def check_which(which: str) -> None:
    """Raise a ValueError unless this is one of the two checkpoints that a run keeps."""
    checks.check_choice("checkpoint", which, ("best", "latest"))


def checkpoint_of(run: str | Path, which: str = "best") -> tuple[dict[str, Any], Path]:
    """A checkpoint of a run and its path."""
    check_which(which)
    folder = Path(run).expanduser() / "checkpoints"
    path = folder / {"best": checkpoint.BEST, "latest": checkpoint.LATEST}[which]
    if which == "latest":  # or another, if it was killed between two renames
        path = next((folder / name for name in checkpoint.RESUMABLE if (folder / name).exists()), path)
    state = checkpoint.load(path)
    lacking = [key for key in ("step", "net", "metadata") if not isinstance(state, dict) or key not in state]
    if lacking:
        raise ValueError(
            f"{path} is not a checkpoint of a run, it lacks {', '.join(lacking)}: the other one, best or latest, may be"
        )
    return state, path
