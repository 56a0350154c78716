"""What a sweeper of Hydra that searches, such as Optuna's, is told of each training, and what it may search for."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from biglearn_vae import checks, config, stages

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Of the numbers of validation images those that are the better the larger they are; of others it depends.
LARGER_IS_BETTER = ("elbo", "reconstruction", "psnr")
# Settings that a number is measured with, so that it does not tell apart the runs that differ in them.
DEPENDS_ON = {
    "valid/elbo": ("loss.beta", "loss.prior", "loss._target_", "loss.observations", "masks", "method"),
    "valid/joint_elbo": ("loss.beta", "loss.prior", "loss._target_", "loss.observations"),
}
ALL_DEPENDS_ON = ("data", "tokens", "missing", "missing_unit", "evaluation")


def metrics(cfg: "DictConfig") -> list[str]:
    """The names of the numbers that a search goes by, of the best checkpoint on validation images.

    Raises:
        ValueError: for one that is not measured there.
    """
    from omegaconf import OmegaConf

    given = cfg.optimized_metric
    names = list(given) if OmegaConf.is_list(given) else [given]
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


def check(words: Sequence[str], config_name: str) -> bool:
    """Whether the sweeper of a sweep searches; if so, check that it has settings to search, and not for the worst.

    Args:
        words: of its command line.
        config_name: of the settings file, train and so on.

    Raises:
        ValueError: if that is not so, before the first training.
    """
    if not config.is_search(words, config_name):
        return False
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of Optuna's, which says what it imports
    cfg = config.with_sweeper(words, config_name)
    if "optimized_metric" not in cfg:
        raise ValueError("hydra/sweeper= searches by a number that scripts/train.py alone gives: leave it out")
    swept, sweeper = _swept(words), cfg.hydra.sweeper
    if not (swept or sweeper.get("search_space") or sweeper.get("custom_search_space")):
        raise ValueError("there is nothing to search over: give settings several values, or an interval(LOW,HIGH)")
    names = metrics(cfg)
    if "direction" in sweeper:  # Optuna's; other sweepers have other names for it
        several = hasattr(sweeper.direction, "__len__") and not isinstance(sweeper.direction, str)
        _check_directions(names, sweeper.direction if several else [sweeper.direction])
    for name in names:
        if own := [part for part in _depends_on(name) if any(f"{key}.".startswith(f"{part}.") for key in swept)]:
            _warn(name, own, stages.of(cfg).metrics)
    return True


def _check_directions(names: Sequence[str], directions: Sequence[Any]) -> None:
    """Raise a ValueError unless each number has a direction, and none is searched for its worst."""
    words = [getattr(direction, "name", str(direction)) for direction in directions]
    if len(words) != len(names):
        raise ValueError(
            f"hydra.sweeper.direction must be one for each of {', '.join(names)}, such as "
            f"[{','.join(['maximize'] * len(names))}], got {', '.join(words) or 'none'}"
        )
    for name, word in zip(names, words, strict=True):
        checks.check_choice("hydra.sweeper.direction", word, ("minimize", "maximize"))
        if name.endswith(LARGER_IS_BETTER) and word != "maximize":
            raise ValueError(
                f"hydra.sweeper.direction={word} would look for the worst {name}: give hydra.sweeper.direction=maximize"
            )


def _swept(words: Sequence[str]) -> list[str]:
    """The settings that are searched over."""
    from hydra.core.override_parser.types import Glob

    for override in config.swept(words).values():
        if isinstance(override.value(), Glob):
            raise ValueError(f"{override.input_line} cannot be searched over: name the choices, NAME=A,B")
    return [*config.swept(words)]


def _depends_on(name: str) -> tuple[str, ...]:
    return (*DEPENDS_ON.get(name, ()), *ALL_DEPENDS_ON)


def _warn(name: str, settings: Sequence[str], others: Sequence[str]) -> None:
    """Warn that a number cannot compare runs that differ in these settings, and say which number can."""
    better = [other for other in reversed(others) if not set(settings) & set(_depends_on(other))]
    hint = f": optimized_metric={better[0]} does" if better else ""
    checks.warn(
        f"{name} is measured with each run's own {', '.join(settings)}, over which this searches, so it does not tell "
        f"which is better{hint}"
    )
