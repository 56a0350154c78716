"""The paper's experiments: which runs a preset has, what is missing of them, and one small JSON file of each.

Every run is trained and measured by the scripts themselves, several runs at a time, in as many processes, each of which
runs one script after another. What was stopped goes on when it is called again.
"""

import itertools
import json
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from biglearn_vae import checks, config
from biglearn_vae.distributed import cores
from biglearn_vae.files import Busy, is_locked, read_json, write_json
from biglearn_vae.runs import FILES
from biglearn_vae.trainer import Interruption
from biglearn_vae.workers import Worker

Idle = queue.SimpleQueue[tuple[Worker, str]]  # workers that wait for a run, each with its device

# The scripts that each target needs.
TARGETS = {
    "params": (),
    "joint_elbo": ("train",),
    "time": ("train",),
    "probe": ("train", "probe"),
    "inpainting": ("train", "complete"),
    "consistency": ("train", "evaluate"),
    "all": tuple(FILES),
}


# Settings of each script that say which run it is or where it lies, so that none of a preset's own may.
OF_RUN = {script: ("run",) for script in FILES} | {"train": ("data", "case", "method", "seed", "name", "output_dir")}


@dataclass(frozen=True)
class Preset:
    """The runs of a preset and their settings.

    Args:
        name: of the preset; its numbers go to results_dir/runs/NAME.
        data: data sets.
        methods: methods.
        seeds: seeds by case.
        settings: command-line settings of each script, for all runs.
        more: more settings for the runs that match every word of a key, such as "biglearn_u" or "biglearn_u case1
            seed0", also nested, {"biglearn_u": {"seed0": ...}}.
        scripts: which scripts are called, of those that a target needs.
        grid: what is compared, by name: the levels of each, with their settings on the command line of
            scripts/train.py. Every combination is trained, as by Hydra's multirun.

    Raises:
        ValueError: for unknown scripts, for words in `more` that are of no run, for settings that would make it another
            run, such as seed=1, and for a grid of another form or whose runs share a name.
    """

    name: str
    data: list[str]
    methods: list[str]
    seeds: dict[str, list[int]]
    settings: dict[str, list[str]]
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    scripts: list[str] = field(default_factory=lambda: list(FILES))
    grid: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "more", _by_runs(self.more))
        for scripts in (self.settings, *self.more.values()):
            if unknown := set(scripts) - set(FILES):
                raise ValueError(f"settings must be of {', '.join(FILES)}, got {', '.join(sorted(unknown))}")
        if not isinstance(self.scripts, list) or "train" not in self.scripts or set(self.scripts) - set(FILES):
            raise ValueError(f"scripts must be a list of {', '.join(FILES)}, with train, got {self.scripts}")
        self._check_grid()
        self._check_more()
        self._check_settings()
        names = [run.name for run in self.runs()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"runs must differ in letters or digits of their names, several are {sorted(twice)[0]}")

    def _check_more(self) -> None:
        for which in self.more:
            self._check_words("preset.more", which)

    def _check_settings(self) -> None:
        """Raise a ValueError for a setting that would make it another run than it is called."""
        levels = [("train", words) for levels in self.grid.values() for words in levels.values()]
        for script, words in [*levels, *(own for of in (self.settings, *self.more.values()) for own in of.items())]:
            for override in config.parsed(words):
                if override.key_or_group in OF_RUN[script]:
                    raise ValueError(
                        f"{override.input_line} cannot be among the settings of {script} in a preset: its data, "
                        "methods and seeds by case say what runs it has, output_dir where they lie"
                    )

    def _check_words(self, name: str, which: str) -> None:
        """Raise a ValueError that names a setting unless its text is words of `Run.is_all`, "biglearn_u seed0"."""
        own = {"data": self.data, "case": self.seeds, "method": self.methods}
        kinds = {word: kind for kind, words in own.items() for word in (*words, *config.choices(kind))}
        kinds |= {word: f"grid.{axis}" for axis, words in self._level_words.items() for word in words}
        found = ["seed" if re.fullmatch("seed(0|[1-9][0-9]*)", word) else kinds.get(word) for word in which.split()]
        if None in found or len(set(found)) < len(found):
            raise ValueError(
                f"{name} must name runs, each by at most one data set, case, method and seedN, such as "
                f'"biglearn_u seed0", got "{which}"{self._of_levels}'
            )

    def _check_grid(self) -> None:
        if not isinstance(self.grid, dict):
            raise ValueError(f"grid must be names and their levels, got {self.grid}")
        for axis, levels in self.grid.items():
            fits = isinstance(levels, dict) and all(isinstance(words, list) for words in levels.values())
            if not fits or not levels:
                raise ValueError(f"grid.{axis} must be levels, each a list of settings, at least one, got {levels}")
            if other := [name for name in (axis, *levels) if not isinstance(name, str)]:
                raise ValueError(f'names in a grid must be text: write "{other[0]}", in quotes, for {other[0]}')

    def runs(self) -> list["Run"]:
        """All runs, seed by seed, so that every method is made once before any is made again."""
        of_case = [(seed, case) for case, seeds in self.seeds.items() for seed in seeds]
        ordered = sorted(of_case, key=lambda pair: pair[0])
        cells = [tuple(zip(self.grid, levels, strict=True)) for levels in itertools.product(*self.grid.values())]
        return [
            Run(data, case, method, seed, cell)
            for seed, case in ordered
            for data in self.data
            for cell in cells
            for method in self.methods
        ]

    def matching(self, only: str) -> list["Run"]:
        """Those of its runs that match every word of a text, "vae seed0".

        Raises:
            ValueError: for words that name no run of it.
        """
        self._check_words("only", only)
        if found := [run for run in self.runs() if run.is_all(only)]:
            return found
        seeds = ", ".join(f"{case} seeds {seeds}" for case, seeds in self.seeds.items() if seeds)
        raise ValueError(
            f'preset={self.name} has no runs of "{only}": it has {", ".join(self.data)}; {", ".join(self.methods)}; '
            f"and of {seeds}{self._of_levels}"
        )

    @property
    def _level_words(self) -> dict[str, list[str]]:
        return {axis: [level_word(axis, level) for level in levels] for axis, levels in self.grid.items()}

    @property
    def _of_levels(self) -> str:
        """The words of its grid, to end a message with."""
        return "".join(f"; of {axis} {', '.join(words)}" for axis, words in self._level_words.items())

    def words(self, run: "Run", script: str) -> list[str]:
        """The command-line settings of a script for a run."""
        own = [word for axis, level in run.levels for word in self.grid[axis][level]] if script == "train" else []
        more = (words for which, scripts in self.more.items() if run.is_all(which) for words in scripts.get(script, []))
        return [*self.settings.get(script, []), *more, *own]

    def resolved(self, run: "Run", script: str) -> dict[str, Any]:
        """Every setting of a script that the numbers of a run depend on.

        Raises:
            ValueError: if the script has no such settings.
        """
        words = self.words(run, script)
        if script != "train":
            return config.resolved((*words,), script)
        of_run = [word for word in run.words() if not word.startswith("seed=")]  # composed once for all seeds
        return config.resolved((*of_run, *words), script) | {"seed": run.seed}


@dataclass(frozen=True)
class Run:
    """One run of the matrix; `levels` is its place in the grid, pairs of what is compared and the level it has."""

    data: str
    case: str
    method: str
    seed: int
    levels: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return "-".join(self._parts)

    @property
    def _parts(self) -> tuple[str, ...]:
        levels = (level_word(axis, level) for axis, level in self.levels)
        return (self.data, self.case, self.method, f"seed{self.seed}", *levels)

    def is_all(self, which: str) -> bool:
        """Whether it matches every word of a text: data set, case, method, seed or level, "biglearn_u seed0"."""
        return set(self._parts).issuperset(which.split())

    def words(self) -> list[str]:
        """What makes it this run on the command line of scripts/train.py."""
        return [f"data={self.data}", f"case={self.case}", f"method={self.method}", f"seed={self.seed}"]


def _by_runs(more: Any, named: str | None = None) -> dict[str, dict[str, list[str]]]:
    """`Preset.more` with the words that name runs in one: {"vae": {"seed0": scripts}} as {"vae seed0": scripts}."""
    if not isinstance(more, dict):
        raise ValueError(f"preset.more{f' of {named}' if named else ''} must be settings by script, got {more}")
    scripts = {} if named is None else {name: words for name, words in more.items() if not isinstance(words, dict)}
    for name, words in scripts.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"preset.more of {named}, {name} must be a list of settings, each a word, got {words}")
    inner = {name: part for name, part in more.items() if name not in scripts}
    found = {named: scripts} if named is not None and (scripts or not inner) else {}
    for name, part in inner.items():
        found |= _by_runs(part, f"{named or ''} {name}".strip())
    return found


def level_word(axis: str, level: str) -> str:
    """A level of a grid as one word, "changed-beta-0.1", in names of runs and wherever runs are named by words."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{axis}-{level}").strip("-")


class Stopped(Exception):
    """Time is up, or the program was told to stop."""


@dataclass
class Campaign:
    """Makes those runs and measurements of a preset that results/ lacks.

    Args:
        preset: what to make.
        target: a key of `TARGETS`.
        output: folder of the runs.
        results: folder of the numbers.
        device: for all scripts; "auto" and "cuda" deal the workers out to the GPUs.
        data_root: folder of the data, or None for the default of each data set.
        workers: runs at a time.
        budget: minutes, or None.
        only: make only the runs that match every word, "mnist case4 seed0", or None for all; a level of a grid is named
            as in the folder of its run, "changed-beta-0.1".

    Raises:
        ValueError: on an unknown target, workers or a budget that are not positive, and words that match no run.
    """

    preset: Preset
    target: str
    output: Path
    results: Path
    device: str = "auto"
    data_root: str | None = None
    workers: int = 1
    budget: float | None = None
    only: str | None = None

    def __post_init__(self):
        checks.check_choice("target", self.target, list(TARGETS))
        checks.whole_number("workers", self.workers, 1)
        if self.budget is not None:
            checks.real_number("budget", self.budget, "(0, inf)", ": minutes")
        self.runs = self.preset.matching(self.only) if self.only else self.preset.runs()
        self._deadline = None if self.budget is None else time.monotonic() + 60 * self.budget
        self._stop, self._interruption = threading.Event(), Interruption()
        self.failures: list[str] = []  # what went wrong with which run
        self.left: list[str] = []  # runs that another process trains

    def missing(self) -> list[Run]:
        """Those of `runs` that results/ does not hold with these settings, in all that the target needs.

        Raises:
            ValueError: if the preset has settings that a script does not have.
        """
        return [run for run in self.runs if self._lacking(run)]

    def path(self, run: Run) -> Path:
        """The file of a run's numbers."""
        return self.results / "runs" / self.preset.name / f"{run.name}.json"

    def make(self, call: Callable[[str, list[str]], Any]) -> bool:
        """Make what is missing; returns whether nothing is left. Ctrl-C and SIGTERM stop it like the end of its budget.

        If a script fails, its run is given up and the others go on; `failures` has the end of what the script said. A
        run that another process trains is left to that process (`left`).

        Args:
            call: runs a script, given its name and the words of its command line; a module's function, since it is
                called in other processes.
        """
        threads = max(1, cores() // self.workers)  # each of several gets its share of the processor
        workers = [Worker(call, {"OMP_NUM_THREADS": str(threads)}) for _ in range(self.workers)]
        with ExitStack() as ends:
            for worker in workers:
                ends.callback(worker.close)
            return self._make_all(workers)

    def _devices(self) -> list[str]:
        """The device of each worker."""
        count = torch.cuda.device_count() if self.device in ("auto", "cuda") else 0
        return [f"cuda:{place % count}" if count > 1 else self.device for place in range(self.workers)]

    def _make_all(self, workers: Sequence[Worker]) -> bool:
        idle: Idle = queue.SimpleQueue()
        for pair in zip(workers, self._devices(), strict=True):
            idle.put(pair)
        with self._interruption, ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._make, run, idle) for run in self.missing()]
            try:
                for future in futures:
                    future.result()
            except Stopped:
                return False
            except KeyboardInterrupt:  # the second Ctrl-C
                for worker in workers:
                    worker.kill()
                raise
            finally:
                self._stop.set()
        return not self.failures and not self.left

    def _lacking(self, run: Run) -> list[str]:
        """Scripts whose numbers of a run are not there, or were made with other settings."""
        known = read_json(self.path(run))
        asked = [script for script in TARGETS[self.target] if script in self.preset.scripts]
        made_with = known.get("config", {})
        lacking = [s for s in asked if config.changed(made_with.get(s, {}), self.preset.resolved(run, s))]
        # All is measured of one network: if that is made anew, or isn't the one in the folder, so is the rest.
        elsewhere = read_json(self._folder(run) / FILES["train"]) != known.get("train")
        if lacking and (elsewhere or "train" in lacking):
            there = [script for script in self.preset.scripts if known.get(script)]
            return [script for script in FILES if script in (*asked, *there)]
        return lacking

    def _make(self, run: Run, idle: Idle) -> None:
        worker, device = idle.get()
        try:
            for script in self._lacking(run):
                self._call(worker, device, run, script)
                self._keep(run, script)
        except Busy:
            print(f"left to another process: {run.name}\n", end="", flush=True)
            self.left.append(run.name)
        except (ValueError, OSError, KeyError) as error:  # of one run, not to end the others, which may take days
            why = str(error) if isinstance(error, ValueError) else f"{run.name}: {type(error).__name__}: {error}"
            print(f"failed: {why}\n", end="", file=sys.stderr, flush=True)
            self.failures.append(why)
            worker.close()  # the next one gets a new process: an error may have spoiled this one's GPU
        finally:
            idle.put((worker, device))

    def _call(self, worker: Worker, device: str, run: Run, script: str) -> None:
        """One script on one run; a ValueError if it fails, with the end of what it said, Busy if others train it."""
        if self._over():
            raise Stopped
        if script == "train" and is_locked(self._folder(run)):
            raise Busy(run.name)
        print(f"{script} {run.name}\n", end="", flush=True)  # in one piece: other workers' threads print, too
        before = self._found(run, script)
        log = self.output / self.preset.name / f"{run.name}-{script}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        code = worker.call((script, [f"device={device}", *self._words(run, script)]), log, self._over)
        if self._over() or (not code and not self._is_made(run, script, before)):
            raise Stopped  # in the second case somebody else told the script to stop
        if code:
            why = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
            why += ", perhaps for want of memory" if code == -9 else ""
            raise ValueError(
                f"{script} of {run.name}: {_end_of(log.read_text('utf-8', errors='replace'))} ({why}; {log})"
            )

    def _words(self, run: Run, script: str) -> list[str]:
        """The command line of a script for a run, but for the device."""
        own = self.preset.words(run, script)
        if script != "train":
            root = [] if self.data_root is None else [config.word("data_root", self.data_root)]
            return [config.word("run", self._folder(run)), *root, *own]
        root = [] if self.data_root is None or run.data == "digits" else [config.word("data.root", self.data_root)]
        folder = self._folder(run)
        return [*run.words(), config.word("output_dir", folder.parent), f"name={folder.name}", *root, *own]

    def _folder(self, run: Run) -> Path:
        return self.output / self.preset.name / run.name

    def _over(self) -> bool:
        asked = self._stop.is_set() or self._interruption.requested
        return asked or (self._deadline is not None and time.monotonic() > self._deadline)

    def _found(self, run: Run, script: str) -> tuple[int, int] | None:
        """What identifies the file that a script has left; None if there is none."""
        made = self._folder(run) / FILES[script]
        if not made.exists():
            return None
        found = made.stat()
        return found.st_ino, found.st_mtime_ns

    def _is_made(self, run: Run, script: str, before: tuple[int, int] | None) -> bool:
        """Whether a script has left its numbers since. A training is judged by its steps: while it goes on, the numbers
        of fewer steps are still there, and if it was done before, they stay as they are."""
        if script != "train":
            return self._found(run, script) not in (None, before)
        steps = read_json(self._folder(run) / FILES[script]).get("steps")
        return steps == self.preset.resolved(run, script)["trainer.steps"]

    def _keep(self, run: Run, script: str) -> None:
        """Put what a script left into the run's numbers."""
        folder, known = self._folder(run), read_json(self.path(run))
        known |= {"data": run.data, "case": run.case, "method": run.method, "seed": run.seed}
        if run.levels:
            known["levels"] = dict(run.levels)
        made, asked = read_json(folder / FILES[script]), self.preset.resolved(run, script)
        if script == "train":  # what is there was measured of another network
            known = {key: value for key, value in known.items() if key not in (*FILES, "settings", "config")}
        machine = made.get("environment") or read_json(folder / "environment.json")  # the latter of the training
        machine = {name: machine[name] for name in ("commit", "date", "device", "torch")}
        known[script] = made if script == "train" else made | {"environment": machine}
        known["settings"] = known.get("settings", {}) | {script: self.preset.words(run, script)}
        known["config"] = known.get("config", {}) | {script: asked}
        if script == "train":
            known["environment"] = machine
            known["course"] = list(_course(folder / "metrics.jsonl"))
        self.path(run).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path(run), known)


def _end_of(said: str) -> str:
    """The last lines of what a script said; of a crash, what it was and where in Python."""
    lines = [line.strip()[:300] for line in said.splitlines() if line.strip()]
    crashes = [place for place, line in enumerate(lines) if line.startswith("Fatal Python error")]
    if not crashes:
        return " / ".join(lines[-3:])
    after = lines[crashes[-1] :]
    current = next((place for place, line in enumerate(after) if line.startswith("Current thread")), 0)
    return " / ".join([after[0], *[line for line in after[current:] if line.startswith("File ")][:2]])


def _course(path: Path, points: int = 50) -> Iterator[dict[str, float]]:
    """Step, seconds and loss of some of the reports of a run."""
    rows = [row for row in map(json.loads, path.read_text("utf-8").splitlines()) if "train/loss" in row]
    for row in reversed(rows[:: -max(1, -(-len(rows) // points))]):  # the last among them
        yield {"step": row["step"], "seconds": round(row["seconds"], 1), "loss": round(row["train/loss"], 4)}


def load(results: Path) -> dict[str, list[dict[str, Any]]]:
    """All numbers that are there, by preset."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((results / "runs").glob("*/*.json")):
        found.setdefault(path.parent.name, []).append(read_json(path))
    return {preset: [run for run in runs if "train" in run] for preset, runs in found.items()}


def select(runs: Sequence[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """Those runs that have these values, such as method="vae"."""
    return [run for run in runs if all(run[name] == value for name, value in values.items())]
