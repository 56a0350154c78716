"""What a sweeper of Hydra that searches, such as Optuna's, is told of each training, and what it may search for."""

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from biglearn_vae import checks, config, stages

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Of the numbers of validation images those that are the better the larger they are; of others it depends.
LARGER_IS_BETTER = ("elbo", "reconstruction", "psnr")
# Settings that a number is measured with, so that runs that differ in them are not told apart by it.
MEASURED_WITH = {"valid/elbo": ("loss", "masks", "method"), "valid/joint_elbo": ("loss",)}


def metrics(cfg: "DictConfig") -> list[str]:
    """The numbers of the best checkpoint on validation images by which a search goes.

    Raises:
        ValueError: for one that is not measured there.
    """
    given = cfg.optimized_metric
    names = [given] if isinstance(given, str) or given is None else list(given)
    for name in names or [given]:
        checks.check_choice("optimized_metric", name, stages.of(cfg).metrics)
    return names


def value(cfg: "DictConfig", summary: dict[str, Any]) -> float | list[float]:
    """What the sweeper is told of a run: a number, or a list if it goes by several.

    Raises:
        ValueError: for the summary of a run that an earlier version made.
    """
    names = metrics(cfg)
    if lacking := [name for name in names if name not in summary]:
        raise ValueError(
            f"summary.json of {summary['name']} has no {', '.join(lacking)}, being of an earlier version: delete that "
            "file, and the run is measured anew"
        )
    values = [summary[name] for name in names]
    return values[0] if len(values) == 1 else values


def check(words: Sequence[str], config_name: str) -> None:
    """See that a sweep whose sweeper searches looks for something, and not for the worst; nothing for other sweeps.

    Args:
        words: of its command line.
        config_name: of the settings file, train and so on.

    Raises:
        ValueError: if it does not, before the first training.
    """
    cfg = config.with_sweeper(words, config_name)
    if not is_search(cfg.hydra):
        return
    if "optimized_metric" not in cfg:
        raise ValueError("hydra/sweeper= searches by a number that scripts/train.py alone gives: leave it out")
    names, direction = metrics(cfg), cfg.hydra.sweeper.get("direction")
    if direction is not None:  # of Optuna's; other sweepers have other names for it
        several = hasattr(direction, "__len__") and not isinstance(direction, str)
        _check_directions(names, direction if several else [direction])
    for name, settings in _measured_differently(names, _swept(words)):
        warnings.warn(
            f"{name} is measured with each run's own {settings}, over which this searches, so it does not tell which "
            f"is better: optimized_metric={stages.of(cfg).metrics[-1]} does",
            stacklevel=2,
        )


def is_search(hydra: "DictConfig") -> bool:
    """Whether Hydra's settings name a sweeper that wants to know what came of a job, as its own does not."""
    return "BasicSweeper" not in hydra.sweeper._target_


def _check_directions(names: Sequence[str], directions: Sequence[Any]) -> None:
    """Raise a ValueError unless each number has a direction, and none is searched for its worst."""
    words = [getattr(direction, "name", str(direction)) for direction in directions]
    if len(words) != len(names):
        raise ValueError(
            f"hydra.sweeper.direction must be one for each of {', '.join(names)}, such as "
            f"[{','.join(['maximize'] * len(names))}], got {', '.join(words) or 'none'}"
        )
    for name, word in zip(names, words, strict=True):
        if name.endswith(LARGER_IS_BETTER) and word != "maximize":
            raise ValueError(
                f"hydra.sweeper.direction={word} would look for the worst {name}: give hydra.sweeper.direction=maximize"
            )


def _swept(words: Sequence[str]) -> list[str]:
    return [override.key_or_group for override in config.parsed(words) if override.is_sweep_override()]


def _measured_differently(names: Sequence[str], swept: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each number that is measured with what is searched over, and that."""
    for name in names:
        own = [part for part in MEASURED_WITH.get(name, ()) if any(f"{key}.".startswith(f"{part}.") for key in swept)]
        if own:
            yield name, " and ".join(own)
