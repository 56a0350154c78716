"""Settings: compose and check them, build the parts they name. Only here and above is Hydra known.

Hydra is imported when a function needs it, not with the package.
"""

import difflib
import functools
import inspect
import math
import pkgutil
import re
import shlex
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from biglearn_vae import checkpoint, checks, data
from biglearn_vae.capabilities import check_network
from biglearn_vae.data import Splits
from biglearn_vae.distributed import derive_seed, global_generator
from biglearn_vae.losses import BigLearnELBO
from biglearn_vae.masks import MaskSampler
from biglearn_vae.models import count_parameters
from biglearn_vae.optim import Optim
from biglearn_vae.patch_ae import PatchAE
from biglearn_vae.patches import Patchify

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

# Settings that say where and how, not what is computed; the last two are those of scripts that measure a run.
PLACE: tuple[str, ...] = ("device", "name", "output_dir", "data.root", "data.cache")
PLACE += ("trainer.accumulate", "trainer.compile", "trainer.cuda_graph", "trainer.shard", "optimized_metric")
PLACE += ("loggers", "run", "data_root")
EVALUATION_COUNTS: tuple[str, ...] = ("valid_images", "valid_draws", "images", "masks", "draws")
EVALUATION_COUNTS += ("likelihood_images", "samples", "statistics_images")
CONFIG_FILE = "config.yaml"
_ONE_HYDRA = threading.Lock()
_OWN_FOLDERS: list[Path] = []  # of the user, beside this package's
# Plugins of Hydra, each with the extra of this package that installs it.
PLUGINS = {
    "hydra/launcher": {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm"},
    "hydra/sweeper": {"optuna": "search"},
}
PATCH_AE, PATCH_AE_FILE = "patch_ae", "patch_ae.pt"  # the method of stage 1, and what it leaves in its run's folder


def folder() -> Path:
    """Where the YAML files are: in the package if it was installed as a wheel, else beside it in the repository."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def folders() -> list[Path]:
    """All folders in which settings are looked for: this package's, then the user's own, if any (`search_also`)."""
    return [folder(), *_OWN_FOLDERS]


def search_also(own: str | Path | None) -> None:
    """Look for choices of groups and for main files in a folder of your own, too, as --config-dir does.

    Args:
        own: the folder, laid out as `folder()` is: OWN/case/wide.yaml is case=wide. It replaces the one before; None
            stands for no such folder. After files in it have changed, it has to be given again.

    Raises:
        ValueError: if it is no folder, or a file in it has the name of one of this package's, which would be read in
            its place.
    """
    from hydra.core.plugins import Plugins

    path = None if own is None else Path(own).expanduser().resolve()
    found = [] if path in (None, folder()) else [path]
    if not found and not _OWN_FOLDERS:  # nothing changes, and nothing has to be read again
        return
    for path in found:
        if not path.is_dir():
            raise ValueError(f"--config-dir must name a folder, got {own}")
        files = [*sorted(path.glob("*/*.yaml")), *sorted(path.glob("*.yaml"))]
        if hidden := [file for file in files if (folder() / file.relative_to(path)).exists()]:
            raise ValueError(f"{hidden[0]} has the name of one of this package, which would be read: rename it")
    _OWN_FOLDERS[:] = found
    Plugins.instance().register(_search_path_plugin())
    for function in (_as_written, _settings, _explanations, resolved):
        function.cache_clear()


def own_main_files(programs: Sequence[str]) -> list[str]:
    """The names in the user's own folder that --config-name may have: files with one of these in their defaults."""
    names = sorted(path.stem for own in _OWN_FOLDERS for path in own.glob("*.yaml"))
    return [name for name in names if {path.stem for path in _main_files(name)} & set(programs)]


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> "DictConfig":
    """The settings that these command-line overrides give: compose(["case=case1", "data=mnist"]).

    Raises:
        ValueError: see `check` and `words_of`; and for a setting of Hydra's own, as these are for starting scripts.
    """
    overrides = words_of(overrides)
    if not isinstance(config_name, str):
        raise ValueError(f"config_name must be the name of a settings file, such as 'train', got {config_name!r}")
    if of_hydra := those(overrides, is_of_hydra):
        raise ValueError(f"{of_hydra[0]} is Hydra's, which starts scripts and has no part in what is called here")
    check(overrides, config_name)
    return compose_checked(overrides, config_name)


def is_of_hydra(override: "Override") -> bool:
    """Whether a word gives a setting of Hydra's own."""
    return re.split("[./]", override.key_or_group)[0] == "hydra"


def words_of(overrides: Iterable[str]) -> list[str]:
    """The words of a command line as a list, from any iterable.

    Raises:
        ValueError: for a text in place of a list of words, and for what is no iterable.
    """
    if isinstance(overrides, str):
        raise ValueError(f"expected a list of settings, such as {overrides.split()}, got the text {overrides!r}")
    try:
        words = iter(overrides)
    except TypeError:
        raise ValueError(f"expected a list of settings, such as ['seed=1'], got {overrides!r}") from None
    return list(words)


def sweep_in_file(config_name: str) -> tuple[bool, list[str]]:
    """What a user's own settings file says of a sweep: whether it is one without -m (hydra.mode: MULTIRUN), and over
    what (hydra.sweeper.params), as words of a command line."""
    hydra = _as_written(config_name).hydra
    params = hydra.sweeper.get("params") or {}
    return getattr(hydra.mode, "name", None) == "MULTIRUN", [f"{name}={values}" for name, values in params.items()]


def is_search(words: Sequence[str], config_name: str) -> bool:
    """Whether a sweep of these words has a sweeper that proposes settings, as Hydra's own, "basic", does not."""
    typed = [value for o in parsed(words) if o.key_or_group == "hydra/sweeper" for value in values_of(o)]
    return [_as_written(config_name).hydra.runtime.choices["hydra/sweeper"], *typed][-1] != "basic"


def with_sweeper(words: Sequence[str], config_name: str) -> "DictConfig":
    """The settings of a sweep without what it sweeps over, of words that were checked, with Hydra's own in `hydra`."""
    return compose_checked(fixed(words), config_name, with_hydra=True)


def fixed(words: Sequence[str]) -> list[str]:
    """Those words of a sweep that have one value."""
    return those(words, lambda override: not override.is_sweep_override())


def those(words: Sequence[str], wanted: "Callable[[Override], bool]") -> list[str]:
    """The words of a command line that are wanted, by what Hydra reads in each."""
    return [word for word, override in zip(words, parsed(words), strict=True) if wanted(override)]


def swept(words: Sequence[str]) -> "dict[str, Override]":
    """Those words of a sweep that have several values, by the names of their settings."""
    return {override.key_or_group: override for override in parsed(words) if override.is_sweep_override()}


def job_words(override: "Override") -> Iterator[str]:
    """A word of a sweep as its jobs have it; of an interval both ends, of a glob() what it chooses."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    given, name = override.value(), override.get_key_element()
    if isinstance(given, IntervalSweep):
        return (f"{name}={end}" for end in (given.start, given.end))
    if isinstance(given, Glob):
        return (f"{name}={choice}" for choice in given.filter(choices(override.key_or_group)))
    return (f"{name}={value}" for value in override.sweep_string_iterator())


def compose_checked(overrides: Sequence[str], config_name: str, with_hydra: bool = False) -> "DictConfig":
    """The settings of overrides that were checked, with Hydra's own if asked for."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from yaml import MarkedYAMLError

    register_resolvers()
    with _own_hydra():
        try:
            return hydra_compose(config_name, list(overrides), return_hydra_config=with_hydra)
        except (HydraException, MarkedYAMLError) as error:
            raise ValueError(in_a_line(error)) from None


def in_a_line(error: Exception) -> str:
    """What went wrong, in a line also where Hydra, OmegaConf or YAML say it: of a settings file, mostly."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
    from yaml import MarkedYAMLError

    first, *others = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        # Not where: of a choice that a file overrides, Hydra names another file.
        group, _, name = error.missing_cfg_file.rpartition("/")
        there = ", ".join(choices(group))
        of = f"{group} must be one of {there}, got {name}" if there else "there is no such file of settings"
        return f"a defaults list has {group}/{name}: {of}"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        hint = f": give {error.full_key} itself" if isinstance(error, InterpolationKeyError) else ""
        return f"{error.full_key}: {first}{hint}"
    if isinstance(error, HydraException):
        cause = str(error.__cause__ or "").splitlines()[:1]
        return " ".join([first, *others[:1]]).rstrip() if others else ": ".join([first, *cause])
    return str(error)


def check(words: Sequence[str], config_name: str = "train", sweep: bool = False) -> None:
    """Check that the words NAME=VALUE of a command line are settings, before anything starts.

    For an unknown name, Hydra itself would advise +NAME=VALUE, which it then accepts although nothing reads it.

    Args:
        sweep: whether a setting may have several values, as with -m.

    Raises:
        ValueError: for the first word that is not NAME=VALUE, or whose name or choice does not exist (it names similar
            ones); for several values without -m.
    """
    overrides = parsed(words)
    plugins = [(o.key_or_group, name) for o in overrides if o.key_or_group in PLUGINS for name in values_of(o)]
    for group, name in plugins:
        _check_plugin(group, name)
        if not sweep and name != "basic":
            raise ValueError(f"{group}={name} is for a sweep: it needs -m")
    searches = is_search(words, config_name)
    overrides = [o for o in overrides if not is_of_hydra(o)]
    for override in overrides:
        _check_values(override, sweep, searches)
    for choices in _check_choices(overrides, config_name):
        _check_names(overrides, choices, config_name)


def _check_values(override: "Override", sweep: bool, searches: bool) -> None:
    """Raise a ValueError for several values without a sweep, for a range or a glob() of nothing, and for an interval
    unless the sweeper searches, which plugins do: Hydra's own goes through values one by one."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    name, value = override.key_or_group, override.value()
    if override.is_sweep_override() and not sweep:
        raise ValueError(
            f"{override.input_line} gives several values: a sweep over them needs -m, a list is written "
            f"'{name}=[a,b]', a word with a comma '{name}=\"a,b\"'"
        )
    if isinstance(value, Glob) and not value.filter(there := choices(name)):
        why = f"of {', '.join(there)}" if there else f"as {name} is no group of settings: list its values, {name}=A,B"
        raise ValueError(f"{override.input_line} chooses nothing {why}")
    if isinstance(value, IntervalSweep) and not searches:
        raise ValueError(
            f"{override.input_line} gives an interval, of which a sweep cannot take every value: list some, such as "
            f"{name}=0.1,1 or '{name}=range(1,5)', or choose a hydra/sweeper that searches"
        )
    if override.is_sweep_override() and not isinstance(value, Glob | IntervalSweep):
        try:
            several = any(True for _ in override.sweep_iterator())
        except ValueError as error:  # range(0,1,0)
            raise ValueError(f"{override.input_line}: {error}") from None
        if not several:
            raise ValueError(f"{override.input_line} has no values")


def _check_plugin(group: str, name: Any) -> None:
    from hydra.core.global_hydra import GlobalHydra

    with _own_hydra():
        known = GlobalHydra.instance().config_loader().get_group_options(group)
    if name not in known:
        extra = PLUGINS[group].get(str(name))
        hint = f": pip install -e '.[{extra}]' adds it" if extra else f"; extras have {', '.join(PLUGINS[group])}"
        raise ValueError(f"{group} must be one of {', '.join(sorted(known))}, got {name!r}{hint}")


def parsed(words: Sequence[str]) -> "list[Override]":
    """Words of a command line, as Hydra understands them.

    Raises:
        ValueError: for one that is not NAME=VALUE.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, result = OverridesParser.create(), []
    for word in words:
        try:
            result += parser.parse_overrides([word])
            readable = bool(result[-1].key_or_group)
        except (HydraException, TypeError):  # TypeError: it is no text
            readable = False
        if not readable:
            raise ValueError(
                f"{word!r} cannot be read: expected NAME=VALUE, such as seed=1, masks.s_ratio=[1,1] or, where the "
                "shell or Hydra would take them apart, 'name=\"a,b\"'"
            )
    return result


def values_of(override: "Override") -> list[Any]:
    """The values that a word gives its setting, several in a sweep; nothing where Hydra alone knows them."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    if not override.is_sweep_override():
        return [override.value()]
    return [] if isinstance(override.value(), Glob | IntervalSweep) else list(override.sweep_iterator())


@functools.cache
def _as_written(config_name: str) -> "DictConfig":
    """A settings file without words of a command line, to look at only, with Hydra's own settings in `hydra`."""
    return compose_checked((), config_name, with_hydra=True)


def _groups(config_name: str) -> dict[str, list[str]]:
    """The groups of settings of a program, each with its choices."""
    chosen = _as_written(config_name).hydra.runtime.choices
    return {Path(name).name: choices(name) for name in sorted(chosen) if not name.startswith("hydra/")}


def choices(group: str) -> list[str]:
    """What can be chosen of a group of settings, such as "case"."""
    return sorted(path.stem for found in folders() for path in (found / group).glob("*.yaml"))


def _check_choices(overrides: "Sequence[Override]", config_name: str) -> list[list[str]]:
    """The words that choose from groups; in a sweep over groups several lists, in which each choice occurs."""
    groups = _groups(config_name)
    first, others = {}, []
    for override in overrides:
        name = override.key_or_group
        if name not in groups:
            continue
        if override.is_delete() or override.is_add() or override.is_force_add() or override.package:
            raise ValueError(
                f"{override.input_line}: of {name} there is always one, and for all of a program: {name}= "
                f"{', '.join(groups[name])}"
            )
        values = ["null" if value is None else str(value) for value in values_of(override)]
        for value in values:
            if value not in groups[name]:
                raise ValueError(f"{name} must be one of {', '.join(groups[name])}, got {value or 'nothing'}")
        if values:
            first[name] = f"{name}={values[0]}"
            others += [(name, f"{name}={value}") for value in values[1:]]
    return [[*first.values()], *([*(first | {name: word}).values()] for name, word in others)]


def _check_names(overrides: "Sequence[Override]", choices: Sequence[str], config_name: str) -> None:
    """Raise a ValueError for the first word whose name is no setting under these choices of groups."""
    from omegaconf import OmegaConf

    cfg, chosen = _settings(tuple(choices), config_name)
    explained, groups = explanations(config_name), _groups(config_name)
    _check_parts(cfg, explained, chosen)
    _check_labels(cfg, chosen)
    known = {name for name, _ in _raw_leaves(cfg)}
    parts = [part for part in map(str, cfg) if OmegaConf.is_dict(OmegaConf.select(cfg, part))]
    targets = {f"{part}._target_" for part in parts if "_target_" in set(cfg[part])}  # also one that is to be given
    own = {o.key_or_group.rpartition(".")[0] for o in overrides if o.key_or_group in targets}
    for override, name, value in _given(overrides, known | targets):
        if override.package or name in groups:
            continue
        parent, _, last = name.rpartition(".")
        group = name.split(".")[0]
        if last == "name" and parent in groups.keys() - {"preset"} and not override.is_delete():
            raise ValueError(f"{name} says what was chosen and chooses nothing: give {parent}={value}")
        inside = _within(name, known) - {name}
        any_names = parent in explained and OmegaConf.is_dict(OmegaConf.select(cfg, parent))
        if override.is_delete():
            _check_left_out(name, known, targets - {"data._target_"}, any_names)  # which patches are cut by, too
        elif inside and not isinstance(value, dict):
            raise ValueError(f"{name} has no value of its own but holds {', '.join(sorted(inside))}")
        elif isinstance(value, dict) and OmegaConf.is_list(OmegaConf.select(cfg, name)):
            raise ValueError(f"{name} is a list, got {value}")
        elif override.is_add() and not isinstance(value, dict | list) and OmegaConf.select(cfg, name) is not None:
            raise ValueError(
                f"there is something already at '{name}': {str(override.input_line)[1:]} gives it another value"
            )
        if name in known | targets or inside:
            continue
        if parent in own or any_names:
            if not (override.is_add() or override.is_force_add()):
                line = override.input_line if name == override.key_or_group else f"{name}=..."
                raise ValueError(f"there is no {name} yet: +{line} adds it")
            continue
        if name in explained and group in groups:
            having = [f"{group}={c}" for c in groups[group] if _has(name, f"{group}={c}", config_name)]
            raise ValueError(f"{name}: {group}={chosen[group]} has no such setting, only {', '.join(having)}")
        near = sorted(key for key in known if key.rpartition(".")[2] == last) or difflib.get_close_matches(name, known)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"{name}: there is no such setting{hint} --help lists all.")


def _check_parts(cfg: "DictConfig", explained: Iterable[str], chosen: Mapping[str, str]) -> None:
    """Raise a ValueError for a part to which a user's own file gives a value in place of its settings."""
    from omegaconf import OmegaConf

    parts = {name.partition(".")[0] for name in explained if "." in name} - {*explained}
    for part in sorted(parts & set(map(str, cfg))):
        if OmegaConf.is_list(cfg[part]):  # only the file of a choice can make it one
            raise ValueError(f"{part}/{chosen[part]}.yaml must hold lines NAME: VALUE, got a list")
        if not OmegaConf.is_dict(cfg[part]):
            raise ValueError(f"{part} must hold lines NAME: VALUE, got {cfg[part]!r}")


def _check_labels(cfg: "DictConfig", chosen: Mapping[str, str]) -> None:
    """Raise a ValueError for a user's own choice whose `name` differs from that of its file, as results go by it."""
    from omegaconf import OmegaConf

    for group in (group for group in ("case", "method", "preset") if group in chosen):
        file, hint = f"{group}/{chosen[group]}.yaml", ", behind a first line # @package _global_"
        name = OmegaConf.select(cfg, f"{group}.name")
        if name != chosen[group]:
            raise ValueError(
                f"{file} must have {group}.name={chosen[group]}{'' if group == 'preset' or name else hint}: results go "
                f"by it, got {name}"
            )


def _check_left_out(name: str, known: set[str], targets: set[str], any_names: bool) -> None:
    """Raise a ValueError for a word ~NAME, unless that is an argument of a `_target_`, or may have any name."""
    parent = name.rpartition(".")[0]
    if f"{name}._target_" in targets:
        raise ValueError(f"{name} cannot be left out: {name}._target_=MODULE.CLASS takes another")
    if name in targets:
        raise ValueError(f"{name} says what {parent} is and cannot be left out")
    if not any_names and f"{parent}._target_" not in targets:
        if _within(name, known):
            raise ValueError(f"{name} cannot be left out: it has its default unless a word gives it another value")
    elif name not in known:
        raise ValueError(f"there is no {name} to be left out: what was added is left out by not adding it")


def _given(overrides: "Sequence[Override]", known: set[str]) -> "Iterator[tuple[Override, str, Any]]":
    """Each word with its name and value, and the settings in a word NAME={...} that NAME does not have."""
    for override in overrides:
        name, value = override.key_or_group, override.value()
        yield override, name, value
        if isinstance(value, dict):
            yield from ((override, *new) for new in _new_inside(name, value, known))


def _new_inside(name: str, value: dict[Any, Any], known: set[str]) -> Iterator[tuple[str, Any]]:
    inside = _within(name, known) - {name}
    for key, part in value.items() if inside else ():
        new = f"{name}.{key}"
        if not _within(new, inside):
            yield new, part
        elif isinstance(part, dict):
            yield from _new_inside(new, part, inside)


def _within(name: str, known: set[str]) -> set[str]:
    """The settings that a dotted name stands for: itself, if it is one, and those inside it."""
    return {key for key in known if f"{key}.".startswith(f"{name}.")}


@functools.cache
def _settings(choices: tuple[str, ...], config_name: str) -> "tuple[DictConfig, dict[str, str]]":
    """The settings under these choices of groups, to look at only, and what is chosen then of every group."""
    from omegaconf import OmegaConf

    cfg = compose_checked(choices, config_name, with_hydra=True)
    chosen = {Path(name).name: str(choice) for name, choice in cfg.hydra.runtime.choices.items() if choice}
    own: list[Any] = [name for name in cfg if name != "hydra"]
    return OmegaConf.masked_copy(cfg, own), chosen


def chosen_by(overrides: Sequence[str], config_name: str) -> dict[str, str]:
    """The choice of each group under overrides that were checked."""
    words = _check_choices(parsed(overrides), config_name)[0]
    return _settings(tuple(words), config_name)[1]


def _has(name: str, choice: str, config_name: str) -> bool:
    """Whether there is a setting of this name under this choice of a group."""
    return bool(_within(name, {key for key, _ in _raw_leaves(_settings((choice,), config_name)[0])}))


def register_resolvers() -> None:
    """Let the YAML files compute: `${per_root:A,B}` is A / sqrt(B). Settings that are not resolved need it first."""
    from omegaconf import OmegaConf

    def per_root(value: float, by: Any) -> float:
        # A B that makes no sense is left to those it is for, who say so.
        return value / math.sqrt(by) if isinstance(by, int | float) and by > 0 else value

    OmegaConf.register_new_resolver("per_root", per_root, replace=True)


@functools.cache
def resolved(overrides: tuple[str, ...], config_name: str = "train") -> dict[str, Any]:
    """Every setting that the numbers of a script depend on, by its dotted name, under these overrides.

    Raises:
        ValueError: if the script has no such settings.
    """
    try:
        cfg = compose(overrides, config_name)
    except ValueError as error:
        raise ValueError(f"scripts/{config_name}.py {' '.join(overrides)}: {error}") from None
    return {key: value for key, value in leaves(cfg) if key not in PLACE}


@contextmanager
def _own_hydra() -> Iterator[None]:
    """A Hydra of these YAML files, beside that of a program that already runs under one.

    There is one of a process: threads take turns.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with _ONE_HYDRA:
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(version_base="1.3", config_dir=str(folder())):
                yield
        finally:
            GlobalHydra.instance().hydra = outer


@functools.cache
def _search_path_plugin() -> type:
    """What tells Hydra of `folders`."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class OwnFolders(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for path in _OWN_FOLDERS:
                search_path.append("biglearn_vae", f"file://{path}")

    return OwnFolders


def build(settings: "DictConfig", where: str, **given: Any) -> Any:
    """Call what `_target_` names, of this package or of another, with the other settings and what the program knows.

    A function that takes a generator draws by itself, such as masks(batch_size, num_tokens, generator): it is returned
    as it is, with these settings.

    Raises:
        ValueError: naming the setting, if there is no such target, or it does not take this setting, type or value.
    """
    values = as_dict(settings)
    if "_target_" not in values:
        raise ValueError(f"{where} must have a line _target_: MODULE.CLASS, which says what takes the others")
    target = named(values.pop("_target_"), f"{where}._target_")
    hints = _hints(target, values)
    values = {name: value for name, value in values.items() if name in hints or value is not None}
    if other := [name for name in values if name not in hints]:
        words = " ".join(f"'~{where}.{name}'" for name in other)
        kind = getattr(target, "__name__", target)
        takes = ", ".join(name for name in hints if name not in given) or "nothing"
        raise ValueError(
            f"{where}: {kind} takes {takes}, not {', '.join(other)}; settings of the default are left out by {words}"
        )
    check_types(hints, values, where)
    if "generator" in hints and not isinstance(target, type):
        if drawn := [name for name in ("batch_size", "num_tokens", "generator") if name in values]:
            raise ValueError(f"{where}: no settings, but given with each call: {', '.join(drawn)}")
        return functools.partial(target, **given, **values)
    try:
        return target(**given, **values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def named(name: str, setting: str) -> Callable[..., Any]:
    """The class or the function that a setting names, MODULE.CLASS.

    Raises:
        ValueError: if there is none.
    """
    try:
        target = pkgutil.resolve_name(name)
        inspect.signature(target)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{setting} must name a class or a function of a module that Python finds (PYTHONPATH=FOLDER), "
            f"got {name!r}: {error}"
        ) from None
    return target


def _hints(target: Callable[..., Any], names: Iterable[str]) -> dict[str, Any]:
    """The types of what a class or function takes, as far as annotated; for these names, too, if it takes any."""
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # of names that are there for type checkers alone, and of what has no hints
        hints = {}
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: hints.get(name, Any) for name in (*parameters, *(names if takes_any else ()))}


def require_all(cfg: "DictConfig", config_name: str, chosen: Mapping[str, str]) -> None:
    """Raise a ValueError if a setting without a default was not given; `chosen` is the choice of each group."""
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        explained = explanations(config_name, chosen)
        raise ValueError("; ".join(f"{key}=... must be given: {explained.get(key)}" for key in missing))


def checked(cfg: "DictConfig", hints: dict[str, Any]) -> dict[str, Any]:
    """These settings as plain values by their names; see `check_types`, which also refuses one that is not there."""
    values = as_dict(cfg)
    found = {name: values.get(name) for name in hints}
    check_types(hints, found, "")
    return found


def check_types(hints: dict[str, Any], values: dict[str, Any], where: str) -> None:
    """Raise a ValueError for the first value whose name is unknown or whose type is not the hinted one."""
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{where}.{name}: there is no such setting")
        if not _matches(value, hints[name]):
            full = f"{where}.{name}".lstrip(".")
            as_word = isinstance(value, int | float) and _matches("", hints[name])  # such as a folder called 2024
            hint = f": {shell_word(full, str(value))} gives it as a word" if as_word else ""
            raise ValueError(f"{full} must be {_describe(hints[name])}, got {value!r}{hint}")


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is dict and arguments:  # of any names
        return isinstance(value, dict) and all(_matches(part, arguments[1]) for part in value.values())
    if origin in (tuple, list, Sequence) and arguments:
        return isinstance(value, list | tuple) and all(_matches(part, arguments[0]) for part in value)
    if hint in (int, float):
        return isinstance(value, (int,) if hint is int else (int, float)) and not isinstance(value, bool)
    return hint not in (bool, str, types.NoneType, dict) or isinstance(value, hint)  # others are their author's matter


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if len(arguments) > 2:  # a list last, or the others would seem to be what it may hold
            arguments = tuple(sorted(arguments, key=lambda argument: typing.get_origin(argument) is list))
        return " or ".join(_describe(argument) for argument in arguments)
    if origin in (tuple, list, Sequence):
        return f"a list, each {_describe(arguments[0])}"
    if origin is dict:
        return f"names, each with {_describe(arguments[1])}"
    names = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", types.NoneType: "null"}
    return names.get(hint, str(hint))


def check_evaluation(settings: "DictConfig", where: str = "", everything: bool = False) -> None:
    """Raise a ValueError for what would fail at the end of a run: counts below 1, shares outside [0, 1).

    Args:
        everything: whether all patches may be observed, so that nothing is left to complete.
    """
    hints = {"ratios": list[float], "passes": list[int] | None, "annealing_steps": int | None}
    hints |= dict.fromkeys(EVALUATION_COUNTS, int)
    values = {name: value for name, value in as_dict(settings).items() if name in hints}
    check_types(hints, values, where.rstrip("."))
    for name, value in values.items():
        if name == "ratios" and (
            not value or not all(0 <= ratio < 1 or (everything and ratio == 1) for ratio in value)
        ):
            allowed = "[0, 1]" if everything else "[0, 1), as something must be hidden"
            raise ValueError(f"{where}ratios must be shares in {allowed}, at least one, got {value}")
        if name == "passes" and min(value or [1]) < 1:
            raise ValueError(f"{where}passes must be at least 1 each, got {value}")
        least = 0 if name == "likelihood_images" else 1
        if isinstance(value, int) and value < least:
            raise ValueError(f"{where}{name} must be at least {least}, got {value}")


def patches(cfg: "DictConfig") -> Patchify:
    """How these settings cut images into patches."""
    hints = {"image_size": int | list[int], "patch_size": int, "channels": int, "name": str, "root": str | None}
    values = as_dict(cfg.data)
    if "_target_" in values:  # whose own settings are its matter
        values = {name: value for name, value in values.items() if name in hints}
    check_types(hints | {"crop": int | None, "cache": str | None}, values, "data")
    if cfg.data.channels not in (1, 3):
        raise ValueError(f"data.channels must be 1 or 3, got {cfg.data.channels}")
    try:
        return Patchify(values["image_size"], values["patch_size"], values["channels"])
    except ValueError as error:
        raise ValueError(f"data: {error}") from error


def tokenizer(cfg: "DictConfig", state: dict[str, Any] | None = None) -> Patchify | PatchAE:
    """The tokenizer of these settings.

    Args:
        state: that of the PatchAE, if it is known; else the one of the run that the settings name is loaded.

    Raises:
        ValueError: for settings of other types, or a PatchAE that is not there or does not fit the data.
    """
    cut, settings = patches(cfg), cfg.get("tokens") or {"name": "patchify"}
    check_types({"name": str, "run": str | None}, dict(settings), "tokens")
    if settings["name"] == "patchify":
        return cut
    if settings["name"] != PATCH_AE:
        raise ValueError(f"tokens.name must be patchify or {PATCH_AE}, got {settings['name']!r}")
    return _patch_ae(cfg, cut) if state is None else PatchAE.from_state(state, cut.image_shape[1:])


def patch_ae_run(cfg: "DictConfig") -> Path:
    """The run whose PatchAE these settings take."""
    default = Path(cfg.get("output_dir", "outputs")) / f"{data_name(cfg)}-{PATCH_AE}-seed0"
    return Path(cfg.tokens.run or default).expanduser()


def _patch_ae(cfg: "DictConfig", cut: Patchify) -> PatchAE:
    """The PatchAE of the run that these settings name."""
    run = patch_ae_run(cfg)
    place = cfg.get("output_dir", "outputs")
    where = [] if place == "outputs" else [shell_word("output_dir", place)]
    words = data_words(cfg)
    command = " ".join([f"python scripts/train.py --config-name={PATCH_AE} {words}", *where])
    if not (run / PATCH_AE_FILE).is_file():
        named = run.parent == Path(place) and (" " in words or not run.name.endswith(f"{PATCH_AE}-seed0"))
        there = [shell_word("name", run.name)] if named else []
        raise ValueError(
            f"there is no PatchAE in {run}{_what_is_there(run)}: train one with `{' '.join([command, *there])}`, "
            "or name the run of another by tokens.run=FOLDER"
        )
    net = PatchAE.from_state(checkpoint.load(run / PATCH_AE_FILE), cut.image_shape[1:])
    if (net.patch_size, net.image_shape[0]) != (cut.patch_size, cut.image_shape[0]):
        raise ValueError(
            f"the PatchAE of {run} is for patches of {net.patch_size} x {net.patch_size} with {net.image_shape[0]} "
            f"channels, the data has {cut.patch_size} x {cut.patch_size} with {cut.image_shape[0]}: name another run "
            f"by tokens.run=FOLDER, or train one with `{command}`, and name that"
        )
    return net


def _what_is_there(run: Path) -> str:
    """Why a run's folder holds no PatchAE, in brackets; nothing if there is no run."""
    if not (run / CONFIG_FILE).is_file():
        return ""
    stage_1 = saved(run).method.name == PATCH_AE
    return " (the run there is not finished)" if stage_1 else " (the run there is a BigLearn-VAE, not of stage 1)"


def dataset(cfg: "DictConfig", root: str | None = None) -> Splits:
    """The data of these settings, from another root if one is given, in black and white if `binarize` says so, less
    what `missing` says was never recorded."""
    share, unit, how = cfg.get("missing", 0.0), cfg.get("missing_unit", "patch"), cfg.get("binarize")
    hints = {"missing": float, "missing_unit": str, "binarize": str | None}
    check_types(hints, {"missing": share, "missing_unit": unit, "binarize": how}, "")
    grid = patches(cfg).grid
    splits = data.load(**data_settings(cfg) | ({"root": root} if root else {}))
    if how is not None:
        splits = data.binarized(splits, how)
    splits = data.with_missing(splits, share, grid, unit)
    data.check_recorded(splits, grid)
    return splits


def data_settings(cfg: "DictConfig") -> dict[str, Any]:
    """The arguments of `data.load` among the settings."""
    values = as_dict(cfg.data)
    target = {"target": named(values.pop("_target_"), "data._target_")} if "_target_" in values else {}
    return {name: value for name, value in values.items() if name != "patch_size"} | target


def network(cfg: "DictConfig", tokens: Patchify | PatchAE) -> torch.nn.Module:
    """The network of these settings, with fresh weights that depend on the seed alone, on the CPU."""
    with _seeded(cfg.seed):
        net = build(cfg.model, "model", grid=tokens.grid, token_dim=tokens.token_dim)
    try:
        check_network(net)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None
    return net


@functools.cache
def paper_parameters() -> dict[str, int]:
    """Number of parameters by case of the paper, and of the PatchAE, counted in the networks themselves."""
    result = {}
    for case in ("case1", "case2", "case3", "case4", "celeba"):
        cfg = compose([f"case={case}", f"data={'celeba' if case == 'celeba' else 'mnist'}"])
        cut = patches(cfg)
        token_dim = PatchAE(patch_size=cut.patch_size).token_dim if case == "celeba" else cut.token_dim
        with torch.device("meta"):
            net = build(cfg.model, "model", grid=cut.grid, token_dim=token_dim)
        result[case] = count_parameters(net)
    with torch.device("meta"):
        return result | {PATCH_AE: count_parameters(PatchAE())}


def patch_ae(cfg: "DictConfig") -> PatchAE:
    """The PatchAE of these settings of stage 1, with fresh weights that depend on the seed alone, on the CPU."""
    sizes = patch_ae_sizes(cfg)
    with _seeded(cfg.seed):
        return build(cfg.model, "model", **sizes)


def patch_ae_sizes(cfg: "DictConfig") -> dict[str, Any]:
    """What a PatchAE must know of the data."""
    cut = patches(cfg)
    return dict(image_size=cut.image_shape[1:], patch_size=cut.patch_size, channels=cut.image_shape[0])


def _seeded(seed: int) -> AbstractContextManager[None]:
    return global_generator(torch.device("cpu"), derive_seed("weights", seed))


def objective(cfg: "DictConfig", drawing: bool = True) -> BigLearnELBO:
    """The loss of these settings, with its q(S, T); without `drawing`, a default one stands in for that."""
    loss = build(cfg.loss, "loss", masks=build(cfg.masks, "masks") if drawing else MaskSampler())
    if lacking := [name for name in ("masks", "prior", "beta") if not hasattr(loss, name)]:
        raise ValueError(f"loss: expected an objective like BigLearnELBO, got one without {', '.join(lacking)}")
    return loss


def muon(dim: int) -> Optim:
    """What `optim=muon` is for a network of this width, whatever optimizer a run has."""
    return build(compose(["optim=muon", f"model.dim={dim}"]).optim, "optim")


def saved(run: str | Path) -> "DictConfig":
    """The settings of a run: its config.yaml or, if that is gone, what its newest checkpoint holds.

    Raises:
        ValueError: if there is neither, or it is damaged.
    """
    from omegaconf import OmegaConf

    path = Path(run).expanduser() / CONFIG_FILE
    try:
        cfg: Any = OmegaConf.load(path) if path.is_file() else _saved_in_checkpoint(path.parent)
        stage_1 = "method" in cfg and cfg.method.name == PATCH_AE
        needed = ("data", "model", "loss") if stage_1 else ("data", "case", "method", "model", "loss", "masks")
        missing = [group for group in needed if group not in cfg]
    except LookupError:
        if any(path.parent.glob("*.pt")) and not (path.parent / "checkpoints").exists():
            raise ValueError(
                f"{run} has no {CONFIG_FILE}: it is the folder of a Trainer of your own, whose resume() goes on with "
                "it; blv.load takes a file of BigLearnVAE.save"
            ) from None
        where = (path.parent.parent, Path("outputs"))
        if path.parent.is_file():
            raise ValueError(
                f"{run} is a file, and the folder of a run is needed: a saved model has neither settings nor data, and "
                "blv.load takes it in Python"
            ) from None
        near = list(dict.fromkeys(str(p.parent) for at in where for p in sorted(at.glob(f"*/{CONFIG_FILE}"))))
        more = f" and {len(near) - 5} more" if len(near) > 5 else ""
        hint = f" There are {', '.join(near[:5])}{more}." if near else " Train one with scripts/train.py."
        raise ValueError(f"there is no run in {run}: it has no {CONFIG_FILE}.{hint}") from None
    except Exception as error:  # of YAML, of OmegaConf
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}{_settings_elsewhere(path)}") from None
    if missing:
        lacks = f"it lacks {', '.join(missing)}{_settings_elsewhere(path)}"
        raise ValueError(f"{path} is not the settings of a run: {lacks}")
    return cfg


def _settings_elsewhere(path: Path) -> str:
    """What to do about a damaged file of settings, if anything can be done."""
    kept = path.is_file() and any((path.parent / "checkpoints").glob("*.pt"))
    return ". Delete it: the checkpoints hold the same settings" if kept else ""


def _saved_in_checkpoint(run: Path) -> "DictConfig":
    """The settings in the newest readable checkpoint of a run; a LookupError if there is none."""
    from omegaconf import OmegaConf

    for name in (*checkpoint.RESUMABLE, checkpoint.BEST):
        try:
            return OmegaConf.create(checkpoint.load(run / "checkpoints" / name)["metadata"]["config"])
        except ValueError:  # not there, or damaged
            continue
    raise LookupError


def check_seed(seed: Any) -> None:
    """Raise a ValueError unless this is a seed."""
    check_types({"seed": int}, {"seed": seed}, "")
    checks.check_seed(seed)


def typed(value: Any) -> str:
    """A value as one types it behind NAME=, for a reader."""
    return "null" if value is None else str(value).replace(" ", "") if isinstance(value, list) else str(value)


def word(name: str, value: Any) -> str:
    """NAME=VALUE as Hydra reads it: in quotes where it would take the value for something else."""
    plain, value = f"{name}={typed(value)}", str(value) if isinstance(value, Path) else value
    if not isinstance(value, str):
        return plain
    with suppress(ValueError):
        if parsed([plain])[0].value() == value:
            return plain
    # Only in front of a quotation mark a backslash stands for something else, and then has to be doubled.
    return f'{name}="' + re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + m[2].replace('"', '\\"'), value) + '"'


def shell_word(name: str, value: Any) -> str:
    """`word`, to be typed in a shell."""
    return shlex.quote(word(name, value))


def data_words(cfg: "DictConfig") -> str:
    """What names these data on a command line, cut and sized as here."""
    own, usual = as_dict(cfg.data), compose([f"data={cfg.data.name}"]).data
    there, words = set(map(str, usual)), [f"data={cfg.data.name}"]
    for name in ("_target_", "root", "image_size", "patch_size", "channels", "crop"):
        if name in own.keys() & there and own[name] != usual.get(name):
            words.append(shell_word(f"data.{name}", own[name]))
    words += [shell_word(f"+data.{name}", value) for name, value in own.items() if name not in there]
    return " ".join(words)


def data_root(root: str) -> Path:
    """The folder or file of the images, from wherever it is looked at."""
    return Path(root).expanduser().resolve()


def data_name(cfg: "DictConfig") -> str:
    """What the data is called in the name of a run."""
    if target := cfg.data.get("_target_"):
        return target_name(target)
    return own_name(cfg.data.root) if cfg.data.name in data.NAMED_BY_ROOT else cfg.data.name


def target_name(target: str) -> str:
    """What the maker of its data adds to the name of a run: the last part of its dotted name."""
    return target.rpartition(".")[2]


def own_name(root: str) -> str:
    """What data of the user's own adds to the name of a run: the name of the folder or file."""
    path = data_root(str(root))
    return path.stem if path.suffix in (".npz", ".npy") else path.name


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of settings whose values differ; an older run lacks what is null by default."""
    return [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]


def as_dict(cfg: "DictConfig", resolve: bool = True) -> dict[str, Any]:
    """Settings as plain values by their names; ${OTHER} as what it stands for or, if asked for, as it is written."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(cfg, resolve=resolve)
    return {str(name): value for name, value in values.items()}  # a file may call a setting 1 or true


def leaves(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its dotted name; a list is one setting."""
    from omegaconf import DictConfig

    container = as_dict(cfg) if isinstance(cfg, DictConfig) else cfg
    for key, value in container.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# What is worth several values: of the first setting here that a script has.
SWEPT = {"run": "run=outputs/a,outputs/b", "seed": "seed=0,1,2"}


def help_text(config_name: str, overrides: Sequence[str]) -> str:
    """Every setting with its value under these overrides and its line of explanation, taken from the YAML files."""
    overrides = those(overrides, lambda override: not is_of_hydra(override))
    cfg = compose(overrides, config_name)
    source = _main_files(config_name)[-1].read_text("utf-8")
    lines = [line.removeprefix("# ").rstrip() for line in source.split("defaults:")[0].splitlines()]
    if groups := _groups(config_name):
        lines += ["", "Groups (GROUP=CHOICE):"]
        lines += [f"  {name:<10} {', '.join(choices)}" for name, choices in groups.items()]
    lines += ["", "Settings (NAME=VALUE):"]
    explained = explanations(config_name, chosen_by(overrides, config_name))
    for key, value in _raw_leaves(cfg):
        lines.append(f"  {f'{key}={value}':<44} {explained.get(key, '')}".rstrip())
    names = set(cfg)  # also of what has no value yet
    swept = next((word for name, word in SWEPT.items() if name in names), None)
    several = f"Several values with -m (a sweep): {swept}. " if swept else ""
    return "\n".join([*lines, "", f"{several}Hydra's own flags: --hydra-help."])


def _raw_leaves(cfg: "DictConfig", prefix: str = "") -> Iterator[tuple[str, str]]:
    """Like `leaves`, but a setting without a value yet shows as ???."""
    from omegaconf import DictConfig, OmegaConf

    names: list[Any] = list(cfg)
    for key in names:
        if OmegaConf.is_missing(cfg, key):
            yield f"{prefix}{key}", "???"
        elif isinstance(cfg[key], DictConfig):
            yield from _raw_leaves(cfg[key], f"{prefix}{key}.")
        elif key != "_target_":
            value = OmegaConf.to_container(cfg[key]) if OmegaConf.is_list(cfg[key]) else cfg[key]
            yield f"{prefix}{key}", typed(value)


def explanations(config_name: str = "train", chosen: Mapping[str, str] | None = None) -> dict[str, str]:
    """Dotted name -> the comment behind the setting, from the YAML files of the groups and of this program.

    If several choices of a group have a setting, the comment is that of the group's choice in `chosen`.
    """
    return _explanations(config_name, frozenset((chosen or {}).items()))


@functools.cache
def _explanations(config_name: str, chosen: frozenset[tuple[str, str]]) -> dict[str, str]:
    result: dict[str, str] = {}
    groups = [path for found in reversed(folders()) for path in sorted(found.glob("*/*.yaml"))]
    groups.sort(key=lambda path: (path.parent.name, path.stem) in chosen)  # the last one counts
    for path in [*groups, *_main_files(config_name)]:
        text = path.read_text("utf-8")
        group = [] if path.parent in folders() or "@package _global_" in text else [path.parent.name]
        parents: list[str] = []
        for line in text.splitlines():
            if match := re.match(r"( *)([\w]+):(.*)", line):
                parents = [*parents[: len(match[1]) // 2], match[2]]
                if "  # " in match[3]:
                    result[".".join(group + parents)] = match[3].split("  # ", 1)[1]
    return result


def _main_files(config_name: str, seen: tuple[str, ...] = ()) -> list[Path]:
    """The main file of this name, behind those that its list of defaults names."""
    import yaml

    paths = [path for found in folders() if (path := found / f"{config_name}.yaml").exists()]
    seen, names = (*seen, config_name), []
    for path in paths:
        with suppress(yaml.YAMLError):  # of which who composes it tells
            content = yaml.safe_load(path.read_text("utf-8"))
            listed = content.get("defaults") if isinstance(content, dict) else None
            names += [str(name).lstrip("/") for name in listed or [] if isinstance(name, str)]
    return [path for name in names if name not in seen for path in _main_files(name, seen)] + paths
