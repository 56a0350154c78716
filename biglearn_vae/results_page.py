"""The page of results: Markdown and plots, made of the numbers of `experiments` and of nothing else."""

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from biglearn_vae import gibbs
from biglearn_vae.experiments import select
from biglearn_vae.runs import FILES

Runs = list[dict[str, Any]]
METHODS = ("vae", "biglearn_t", "biglearn_u")
COMPARED = (  # claims, and whose JointELBO they compare with whose
    ("(i)", "biglearn_t", "vae"),
    ("(i)", "biglearn_u", "vae"),
    ("(ii)", "biglearn_u", "biglearn_t"),
)
COLOURS = dict(zip(METHODS, ("C0", "C1", "C2"), strict=True))  # the same in all plots; cases differ by their lines
LINES = {"case1": "-", "case2": "--", "case3": "-.", "case4": ":"}
OTHER_LINES = ("-", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), "--", "-.", ":")  # of other cases, as they come
PAPER = {  # Tables 3 and 4: parameters over 2^20, as printed
    "case1": "1.2103",
    "case2": "4.7330",
    "case3": "4.7800",
    "case4": "23.0081",
    "celeba": "89.9421",
    "patch_ae": "2.3193",
}
# What else is probed.
NO_CODES = {"pixels": "raw pixels", "nearest": "nearest images", "ceiling": "trained with labels"}
BOUNDS = {"joint_nats": "whole", "marginal_nats": "half", "conditional_nats": "other half given it"}
BETA = 0.01  # of the paper, on MNIST and FashionMNIST
SIGNIFICANT = 0.05  # how seldom chance alone may give a difference that is called better or worse
DRAWS = ("PSNR of a draw", "of the mean", "diversity", "seconds", "device")
DRAWS_TEXT = "PSNR in dB; diversity is the standard deviation between draws, seconds are for all images and draws."
HEAD = """# Results

Made by `python scripts/reproduce.py` from the files in `runs/`. `results/choices.md` in the library's repository says
how the settings of its presets were chosen, and what their numbers mean.

S is the set of observed patches (at S = 0.1 a tenth of them), z the latent code. `vae` is the ordinary VAE, also called
the joint VAE. Claims (i) to (v) are those listed in the library's README. "±" gives the standard deviation over seeds.
"""


def page(found: dict[str, Runs], parameters: dict[str, int]) -> str:
    """The whole page, presets that trained longest first.

    Args:
        found: what `experiments.load` gives.
        parameters: number of parameters by case.
    """
    found = dict(sorted(found.items(), key=lambda pair: -max((run["train"]["steps"] for run in pair[1]), default=0)))
    parts = [HEAD, _glance(found), _parameters(parameters)]
    for preset, runs in found.items():
        if runs:
            parts += [f"## `preset={preset}`\n", _runs(runs)]
        if _of_grid(runs):
            levels = _with_levels(runs)
            parts.append(_claims(levels) if _of_sizes(levels) else "")
            parts += [part for alike in _measured(runs) for part in (_grid(alike), _levels(alike))]
            parts += _measurements(levels)
        elif runs:
            parts += [_claims(runs), _joint(runs), _plots(preset, runs), *_measurements(runs), _costs(runs)]
    return "\n".join(part for part in parts if part)


def _measurements(runs: Runs) -> list[str]:
    """What `probe.py`, `complete.py` and `evaluate.py` found."""
    sections = (_probe, _inpainting, _nats, _chains, _passes, _samples, _bounds, _consistency)
    return [section(runs) for section in sections]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def timed_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose last column is the device on which seconds were measured, left out if none is known."""
    known = any(row[-1] for row in rows)
    return table(head, rows) if known else table(head[:-1], [row[:-1] for row in rows])


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean, with "+" as sign also that of a positive one, and, of several, standard deviation; NaN of none."""
    text = f"{statistics.fmean(values or [math.nan]):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {_deviation(values):.{digits}f}"


def _cell(values: Sequence[float], digits: int) -> str:
    """`spread`, nothing of none: where runs differ in what was measured of them."""
    return spread(values, digits) if values else ""


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation of several numbers; NaN if one of them isn't finite, of which statistics knows nothing."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _elbo_cells(found: Sequence[dict[str, Any]], split: str) -> list[str]:
    """JointELBO, reconstruction and KL on a split, over the summaries or evaluations of several seeds."""
    names = {"joint_elbo": 3, "reconstruction": 3, "kl": 1}
    return [spread([one[f"{split}_{name}"] for one in found], digits) for name, digits in names.items()]


def _last(runs: Runs) -> dict[tuple[str, str], str]:
    """The last method by data set and case, beside which is shown what is the same for all methods."""
    return {(data, case): method for data, case, method, _ in groups(runs)}


def methods_of(runs: Runs) -> list[str]:
    """The paper's methods, then others that there are."""
    return [*METHODS, *sorted({run["method"] for run in runs} - set(METHODS))]


def groups(runs: Runs) -> list[tuple[str, str, str, Runs]]:
    """Data, case, method and the runs of all seeds, in the order of the paper."""
    found = [(d, c, m, select(runs, data=d, case=c, method=m)) for d, c in _cases(runs) for m in methods_of(runs)]
    return [group for group in found if group[3]]


def _cases(runs: Runs) -> list[tuple[str, str]]:
    """Data and cases, in the order of the paper."""
    return sorted({(run["data"], run["case"]) for run in runs}, key=lambda key: [*map(_natural, key)])


def _compared(runs: Runs) -> list[tuple[str, str, dict[str, Runs]]]:
    """Data, case and the runs of each of the paper's methods."""
    return [(d, c, {m: select(runs, data=d, case=c, method=m) for m in METHODS}) for d, c in _cases(runs)]


# --- What there is ---


def _glance(found: dict[str, Runs]) -> str:
    """The way to each preset, with what it says of the claims that are a number each."""
    rows = []
    for preset, runs in found.items():
        for data, case, of in [] if _of_grid(runs) else _compared(runs):
            gains = [_gains(of[ours], of[other]) for _, ours, other in COMPARED]
            cells = [spread(list(gain.values()), 3, "+") if gain else "" for gain in gains]
            probed = _at_a_tenth(of["biglearn_u"])
            epochs = spread(sorted({round(run["train"]["epochs"], 1) for own in of.values() for run in own}), 1)
            rows.append([_link(preset), data, case, epochs, *cells, spread(probed, 1) if probed else ""])
    grids = [_link(preset) for preset, runs in found.items() if _of_grid(runs)]
    head = ["preset", "data", "case", "epochs", *(f"`{ours}` over `{other}`" for _, ours, other in COMPARED)]
    text = (
        "How far one method's test JointELBO is above another's, seed by seed (mean and standard deviation; claims\n"
        "(i), (i) and (ii)), and the accuracy in % of a linear probe of the codes that `biglearn_u` infers from a\n"
        "tenth of the patches (claim (iv)). Each preset below begins with whether chance alone would give as much.\n"
    )
    parts = [f"## At a glance\n\n{text}\n{table([*head, 'probe at S = 0.1'], rows)}"] if rows else []
    parts += [f"Settings are compared in {', '.join(grids)}.\n"] if grids else []
    return "\n".join(parts)


def _link(preset: str) -> str:
    """To a preset's heading, by the anchor that GitHub gives it."""
    return f"[{preset}](#{re.sub(r'[^a-z0-9_-]', '', f'preset={preset}'.lower())})"


# --- A grid of settings ---


def _of_grid(runs: Runs) -> bool:
    """Whether these runs compare settings; the paper's claims are shown only if these are sizes."""
    return any("levels" in run for run in runs)


def _of_sizes(levels: Runs) -> bool:
    """Whether networks differ in size from level to level of a grid (`_with_levels`), as those of the paper's cases."""
    counts = {run["case"]: run["train"]["parameters"] for run in levels if run["method"] == METHODS[0]}
    return len(counts) > 1 and len(set(counts.values())) == len(counts)


def _measured(runs: Runs) -> list[Runs]:
    """The runs level by level, in groups of which the same was compared and measured."""
    alike: dict[tuple, Runs] = {}
    for run in sorted((run for run in runs if run.get("levels")), key=_place):
        found = _evaluation(run)
        alike.setdefault((*run["levels"], found["split"], *found["inpainting_psnr"]), []).append(run)
    return list(alike.values())


def _evaluation(run: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate.py` found; of a run that was only trained, what its training ended with, of test images."""
    return run.get("evaluate") or {"split": "test"} | run["train"]


def _place(run: dict[str, Any]) -> tuple:
    order = METHODS.index(run["method"]) if run["method"] in METHODS else len(METHODS)
    return *map(_natural, run["levels"].values()), order, run["seed"]


def _natural(level: str) -> list[str | float]:
    """Words and numbers by turns, so that "width 64" comes before "width 256"."""
    return [float(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", level))]


def _grid(runs: Runs) -> str:
    """Every combination, with mean and spread over its seeds."""
    cells: dict[tuple[str, ...], Runs] = {}
    for run in runs:
        cells.setdefault((run["data"], run["case"], *run["levels"].values(), run["method"]), []).append(run)
    rows = [[*cell, str(len(of)), *_scores(of)] for cell, of in cells.items()]
    split = _evaluation(runs[0])["split"]
    name = "validation" if split == "valid" else split
    text = f"Of the {name} images: JointELBO and its parts, and PSNR in dB over hidden pixels, by share observed.\n"
    betas = {run.get("config", {}).get("train", {}).get("loss.beta") for run in runs}
    if len(betas) > 1:
        text += "Each JointELBO is with the beta of its run; across betas, compare reconstruction and KL.\n"
    elif not betas <= {BETA, None}:
        text += f"JointELBO is with a beta of {betas.pop()}, where other presets have {BETA}.\n"
    return f"{text}\n" + table(["data", "case", *runs[0]["levels"], "method", "seeds", *_score_names(runs)], rows)


def _with_levels(runs: Runs) -> Runs:
    """The runs of a grid, each with its place there as a part of its case: "tiny, beta 0.1"."""
    return [
        run | {"case": ", ".join([run["case"], *(f"{axis} {level}" for axis, level in run["levels"].items())])}
        for run in runs
        if run.get("levels")
    ]


def _levels(runs: Runs) -> str:
    """Every level, averaged over all that is combined with it; nothing if one thing alone is compared, or in part."""
    axes, rows, whole = list(runs[0]["levels"]), [], True
    if len(axes) < 2:
        return ""
    for data, case, method, own in groups(runs):
        for axis in axes:
            levels: dict[str, Runs] = {}
            for run in own:
                levels.setdefault(run["levels"][axis], []).append(run)
            whole &= len({len(of) for of in levels.values()}) == 1
            rows += [[data, case, method, axis, level, str(len(of)), *_scores(of)] for level, of in levels.items()]
    if not whole:
        return ""
    text = 'Each setting, averaged over all others; "±" gives the standard deviation over the runs.\n\n'
    return text + table(["data", "case", "method", "varied", "setting", "runs", *_score_names(runs)], rows)


def _score_names(runs: Runs) -> list[str]:
    shares = [f"PSNR at {share}" for share in _evaluation(runs[0])["inpainting_psnr"]]
    return ["JointELBO", "reconstruction", "KL in nats", *shares, "mean PSNR"]


def _scores(runs: Runs) -> list[str]:
    """What an evaluation says of these runs, in the order of `_score_names`."""
    found = [_evaluation(run) for run in runs]
    cells = _elbo_cells(found, found[0]["split"])
    psnr = [list(one["inpainting_psnr"].values()) for one in found]
    means = [statistics.fmean(values) for values in psnr]
    return [*cells, *(spread(values, 2) for values in zip(*psnr, strict=True)), spread(means, 2)]


# --- The paper's tables ---


def _parameters(parameters: dict[str, int]) -> str:
    rows = [[case, f"{count:,}", f"{count / 2**20:.4f}", PAPER[case]] for case, count in parameters.items()]
    return "## Parameters (Tables 3 and 4)\n\n" + table(["case", "parameters", "/ 2^20", "in the paper"], rows)


def _runs(runs: Runs) -> str:
    where = _where([run["environment"] for run in runs])
    measured = [run[script]["environment"] for run in runs for script in FILES if "environment" in run.get(script, {})]
    if measured and _where(measured) != where:
        where += f"; measured on {_where(measured)}"
    words = sorted({" ".join(run["settings"]["train"]) for run in runs})
    if _of_grid(runs):  # what is compared is said there
        words = [_common(runs, "train")]
    settings = f"settings `{'`, `'.join(words)}`" if any(words) else "the settings of the default"
    if _of_grid(runs) and (evaluated := _common(runs, "evaluate")):
        settings += f", measured with `{evaluated}`"
    count = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    own, other = _trained_with(runs, "objective"), _trained_with(runs, "observations")
    note = f"JointELBO of {own} is that objective's own, not to be compared with others'.\n" if own else ""
    note += f"JointELBO of {other} observations is their own, not to be compared with others'.\n" if other else ""
    return f"{count} on {where}; {settings}.\n{note}"


def _trained_with(runs: Runs, name: str) -> str:
    """What is unusual of this kind among the runs; "" if nothing is."""
    return ", ".join(sorted({run["train"][name] for run in runs if name in run.get("train", {})}))


def _where(environments: Runs) -> str:
    """Devices, versions and commits."""
    machines = sorted({f"{one['device']}, torch {one['torch']}" for one in environments})
    return f"{'; '.join(machines)}, at {', '.join(sorted({str(one['commit'])[:7] for one in environments}))}"


def _common(runs: Runs, script: str) -> str:
    """The command-line settings of a script that all runs share."""
    lists = [run["settings"].get(script, []) for run in runs]
    return " ".join(word for word in lists[0] if all(word in other for other in lists))


def _joint(runs: Runs) -> str:
    """Figure 2."""
    head = ["data", "case", "method", "seeds", "test JointELBO", "reconstruction", "KL in nats"]
    rows = []
    for data, case, method, own in groups(runs):
        cells = _elbo_cells([run["train"] for run in own], "test")
        rows.append([data, case, method, str(len(own)), *cells])
    text = "JointELBO per image and its parts, summed over pixels, without the constant of N(mu, I), beta as trained;\n"
    return f"### Test JointELBO (Figure 2)\n\n{text}mean and standard deviation over seeds.\n\n" + table(head, rows)


def _plots(preset: str, runs: Runs) -> str:
    shown = "".join(f"![{PLOTS[name][0]}]({preset}-{name}.png)\n" for name in _plotted(runs))
    note = (
        "The training loss rises while beta does. Other work beside a run, such as other runs, makes it take longer.\n"
    )
    return f"{shown}\n{note}" if shown else ""


def _plotted(runs: Runs) -> dict[str, Runs]:
    """By plot that has something to show, the runs in it: a single point is in the table already."""
    of_data = Counter(run["data"] for run in runs)
    shown = {"probe": [run for run in runs if run.get("probe")]}
    shown["joint_elbo"] = [run for run in runs if of_data[run["data"]] > 1]
    return {name: own for name in PLOTS if (own := shown.get(name, runs))}


def _probe(runs: Runs) -> str:
    """Figure 4."""
    own = [run for run in runs if run.get("probe")]
    if not own:
        return ""
    ratios = _ratios(run["probe"]["codes"] for run in own)
    last, rows = _last(own), []
    for data, case, method, of_method in groups(own):
        for name, label in (_codes(method) | NO_CODES).items():
            elsewhere = name in ("pixels", "nearest") and method != last[data, case]
            if elsewhere or not any(name in run["probe"] for run in of_method):
                continue
            scores = [run["probe"][name] for run in of_method if name in run["probe"]]
            found = [[100 * score[ratio]["mean"] for score in scores if ratio in score] for ratio in ratios]
            if name in ("pixels", "nearest"):  # no model's: of other seeds, the same measured again
                found = [[statistics.fmean(values)] if values else [] for values in found]
            rows.append([data, case, label, *(_cell(values, 1) for values in found)])
    images = max(run["probe"]["train_images"] for run in own)
    text = (
        f"{_metric(own).capitalize()} of a linear classifier on the mean of p(z | x_S), trained on {images:,} images, "
        "by share of\npatches observed."
    )
    if voters := {run["probe"]["settings"]["neighbours"] for run in own if "nearest" in run["probe"]}:
        count = " or ".join(map(str, sorted(voters)))
        text += f"\nNearest images: the vote of the {count} training images nearest over the observed pixels, no model."
    if lacking := [" ".join(of) for *of, all_seeds in groups(runs) if not any(run.get("probe") for run in all_seeds)]:
        text += f"\nNot probed: {', '.join(lacking)}."
    if any("nearest_codes" in run["probe"] for run in own):
        text += "\nNearest codes: the vote of as many whose codes are nearest."
    if steps := max(run["probe"]["settings"]["ceiling_steps"] for run in own):
        text += f"\nTrained with labels: the same network, {steps:,} steps on all training images under random masks."
    return f"### Linear probing (Figure 4)\n\n{text}\n\n" + table(["data", "case", "features", *ratios], rows)


def _codes(method: str) -> dict[str, str]:
    """What is classified of a method's codes, and how it is called."""
    return {"codes": method, "nearest_codes": f"{method}, nearest codes"}


def _ratios(scores: Iterable[Mapping[str, Any]]) -> list[str]:
    """The shares observed of which there are any, from the largest on."""
    return sorted({ratio for score in scores for ratio in score}, key=float, reverse=True)


def _metric(runs: Runs) -> str:
    """What was probed: accuracy of classes, balanced accuracy of attributes."""
    return " or ".join(sorted({run["probe"]["metric"] for run in runs})) + " in %"


def _tasks(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `complete.py` found, by task; nothing if it was not called."""
    return run.get("complete", {}).get("tasks", {})


def _having(runs: Runs, name: str) -> Runs:
    """Those runs of which `complete.py` has this for some task."""
    return [run for run in runs if any(name in found for found in _tasks(run).values())]


def _all_tasks(runs: Runs) -> list[str]:
    return list(dict.fromkeys(task for run in runs for task in _tasks(run)))


def _inpainting(runs: Runs) -> str:
    own = [run for run in runs if run.get("complete")]
    if not own:
        return ""
    tasks, last, rows = _all_tasks(own), _last(own), []
    for data, case, method, of_method in groups(own):
        of_model = {
            "one pass, a draw": ("one pass", "psnr_draw"),
            "one pass, mean": ("one pass", "psnr_mean"),
            "code alone, mean": ("code alone", "psnr_mean"),
        }
        floors = ("regressor", "10 nearest", "training mean") if method == last[data, case] else ()
        for label, (name, key) in (of_model | {name: (name, "psnr") for name in floors}).items():
            found = [[_tasks(run).get(task, {}).get(name, {}) for run in of_method] for task in tasks]
            values = [[entry[key] for entry in of_task if key in entry] for of_task in found]
            # A floor need not be measured for each seed; a model may lack a task that another run has.
            if all(values) or (label in of_model and any(values)):
                who = f"{method}, {label}" if label in of_model else label
                rows.append([data, case, who, *(_cell(of_task, 2) for of_task in values)])
    text = (
        "PSNR in dB over hidden pixels, by what is observed: a share of the patches, all but the centre, the top half\n"
        "or the left half; the mean is of the draws that `complete.py` took."
    )
    regressors = [found["regressor"] for run in own for found in _tasks(run).values() if "regressor" in found]
    if steps := sorted({found["steps"] for found in regressors if "steps" in found}):
        text += (
            f"\nRegressor: the same network, but without z, after {' or '.join(f'{count:,}' for count in steps)} steps."
        )
    return f"### In-painting\n\n{text}\n\n" + table(["data", "case", "completed by", *tasks], rows)


def _nats(runs: Runs) -> str:
    """Log-likelihoods of what is hidden."""
    own = _having(runs, "nats")
    if not own:
        return ""
    tasks = _all_tasks(own)
    rows = []
    for data, case, method, of in groups(own):
        found = [[_tasks(run).get(task, {}).get("nats") for run in of] for task in tasks]
        means = [[nats["mean"] for nats in of_task if nats] for of_task in found]
        cells = [_cell(of_task, 1) for of_task in means]
        errors = [nats["error"] for of_task in found for nats in of_task if nats and nats["error"] is not None]
        rows.append([data, case, method, *cells, f"{max(errors):.1f}" if errors else ""])
    text = (
        "log p(hidden | observed) in nats an image under N(mu, variance I), the variance fitted on whole training\n"
        "images, by annealed importance sampling: for a BigLearn-VAE a lower bound in expectation, for `vae` the\n"
        "difference of two estimates, which may be too high. The error is the standard error of one image's\n"
        "estimate: its root mean square over images, the largest of the columns. It cannot exceed 1 (root 2 for a\n"
        "difference): near that, one sample outweighs all others, and the estimate is as unreliable as it can be.\n"
    )
    return f"### Likelihood of the hidden part\n\n{text}{_without_variance(own)}\n" + table(
        ["data", "case", "method", *tasks, "error"], rows
    )


def _without_variance(runs: Runs) -> str:
    """A line on those whose observations have no variance to be fitted; nothing if there are none."""
    others = _trained_with(runs, "observations")
    return (
        f"Runs of {others} observations have no variance to be fitted and are measured under these.\n" if others else ""
    )


def _chains(runs: Runs) -> str:
    """The alternatives: chains of the joint VAE against one pass, of the seeds of which there are chains."""
    with_chains = _having(runs, "pseudo-Gibbs")
    asked = sorted({task for run in with_chains for task, found in _tasks(run).items() if "pseudo-Gibbs" in found})
    beside, rows = set(map(_matched_by, with_chains)), []
    matched = [run for run in runs if _matched_by(run) in beside]
    last = _last(matched)
    for data, case, method, own in groups(matched):
        for task in asked if method in ("vae", last[data, case]) else []:
            for name in ("one pass", "pseudo-Gibbs", "Metropolis-within-Gibbs"):
                found = [_entries(run, task, name) for run in own]
                for count, same in _by_count(found, "iterations").items():
                    rows.append([data, case, method, task, name, count, _accepted(same, name), *_draw_cells(same)])
    head = ["data", "case", "model", "observed", "sampler", "iterations", "accepted, %", *DRAWS]
    text = (
        f"{DRAWS_TEXT}\n"
        f"Metropolis-within-Gibbs starts with {gibbs.PSEUDO} iterations of pseudo-Gibbs; the share accepted is of\n"
        "those after them. If few were accepted, a chain hardly moves and says little about where it would end.\n"
    )
    return f"### One pass against chains of the joint VAE\n\n{text}\n" + timed_table(head, rows) if rows else ""


def _accepted(seeds: Sequence[dict[str, Any]], sampler: str) -> str:
    """Of the iterations of Metropolis-within-Gibbs, in %; nothing where there were none."""
    own = [entry for entry in seeds if sampler == "Metropolis-within-Gibbs" and entry["iterations"] > gibbs.PSEUDO]
    return spread([100 * entry["acceptance"] for entry in own], 1) if own else ""


def _passes(runs: Runs) -> str:
    """Completions in one pass and in several."""
    own, rows = _having(runs, "several passes"), []
    for data, case, method, of in groups(own):
        for task in _all_tasks(of):
            found = [_entries(run, task, name) for name in ("one pass", "several passes") for run in of]
            for count, same in _by_count(found, "passes").items():
                rows.append([data, case, method, task, count or "1", *_draw_cells(same)])
    head = ["data", "case", "method", "observed", "passes", *DRAWS]
    text = (
        "In several passes, each pass completes an equal share of what is missing, in random order, given what those\n"
        f"before it completed. {DRAWS_TEXT}\n"
    )
    return f"### Completions in several passes\n\n{text}\n" + timed_table(head, rows) if rows else ""


def _samples(runs: Runs) -> str:
    """Samples in one pass and in several."""
    own, rows = [run for run in runs if run.get("evaluate", {}).get("passes")], []
    digits = {"precision": 3, "recall": 3, "joint_nats": 1, "variance": 5, "seconds": 2}
    for data, case, method, of in groups(own):
        found = [run["evaluate"]["passes"]["scores"] for run in of]
        for count in sorted(set().union(*found), key=int):
            scores = [of_run[count] for of_run in found if count in of_run]
            values = {name: [score[name] for score in scores if name in score] for name in digits}
            cells = [  # of Bernoulli observations there is no variance
                (_cell if name == "variance" else spread)(values[name], number) for name, number in digits.items()
            ]
            devices = _devices(
                _device(run, "evaluate") for run, scores in zip(of, found, strict=True) if count in scores
            )
            rows.append([data, case, method, count, *cells, devices])
        if real := [passes["real"] for run in of if (passes := run["evaluate"]["passes"]).get("real")]:
            cells = [spread([one[name] for one in real], 3) for name in ("precision", "recall")]
            rows.append([data, case, "training images", "", *cells, "", "", "", ""])
    text = (
        "Precision is the share of samples that lie nearer to some test image than that image's third nearest test\n"
        "image does, recall the share of test images that lie nearer to some sample than that sample's third nearest\n"
        "sample does (as many samples as images, distances between pixels). As many training images in place of\n"
        "samples score as perfect samples would; more precision than theirs is no merit: smoother images have it.\n"
        "log p(x) is a lower bound in nats an image, in as many passes, with the variance under which it is largest\n"
        "on training images. The bounds elsewhere take the mean squared error of reconstructions as the variance, so\n"
        "they differ from those of one pass.\n"
    )
    head = ["data", "case", "method", "passes", "precision", "recall", "log p(x) >=", "variance", "seconds", "device"]
    return f"### Samples in several passes\n\n{text}\n" + timed_table(head, rows) if rows else ""


def _draw_cells(seeds: Sequence[dict[str, Any]]) -> list[str]:
    """The scores of completions, in the order of `DRAWS`."""
    digits = {"psnr_draw": 2, "psnr_mean": 2, "diversity": 3, "seconds": 2}
    cells = [spread([entry[key] for entry in seeds], number) for key, number in digits.items()]
    return [*cells, _devices(entry["on"] for entry in seeds)]


def _entries(run: dict[str, Any], task: str, sampler: str) -> Runs:
    """What a sampler gave of a task, none, one or several entries, each with the device."""
    entries = _tasks(run).get(task, {}).get(sampler, [])
    found = entries if isinstance(entries, list) else [entries]
    return [entry | {"on": _device(run, "complete")} for entry in found]


def _device(run: dict[str, Any], script: str) -> str:
    """What a run was measured on; "" if that was not recorded."""
    return run[script].get("environment", {}).get("device", "")


def _devices(of: Iterable[str]) -> str:
    """The content of a cell."""
    return "; ".join(sorted(set(of) - {""}))


def _by_count(seeds: Sequence[Runs], name: str) -> dict[str, Runs]:
    """The entries of all seeds by how often a sampler was called; those that have no such number come under ""."""
    result: dict[str, Runs] = {}
    for entry in itertools.chain(*seeds):
        result.setdefault(str(entry.get(name, "")), []).append(entry)
    return result


def _matched_by(run: dict[str, Any]) -> tuple[str, str, int]:
    """What runs of the three methods are compared by."""
    return run["data"], run["case"], run["seed"]


def _bounds(runs: Runs) -> str:
    """What `evaluate.py` found of log-likelihoods, with the variance that was fitted."""
    own = [run for run in runs if run.get("evaluate", {}).get("likelihood")]
    rows = []
    for data, case, method, of in groups(own):
        found = [run["evaluate"]["likelihood"] for run in of]
        fitted = [likelihood.get("fitted") or likelihood["model"] for likelihood in found]  # of Bernoulli no variance
        nats = [spread([bounds[name] for bounds in fitted if name in bounds], 1) for name in BOUNDS]
        counts = [str(max(one.get(name) or 0 for one in found)) for name in ("images", "samples", "annealing_steps")]
        rows.append([data, case, method, *counts, _cell([b["variance"] for b in fitted if "variance" in b], 5), *nats])
    text = (
        "Lower bounds in nats an image: for whole images, for a random half of the patches, and for the other half\n"
        "given that one, which the network of `vae` was never trained for. They are under N(mu, variance I) with the\n"
        "variance fitted on training images, as the mean squared error of their reconstructions. They are weighted by\n"
        "importance, with samples from p(z | all that is given or asked for), and annealed where there are annealing\n"
        "steps. How far a bound lies below the likelihood differs between methods; without annealing it differs by\n"
        "more than the bounds do, and then they do not rank the methods\n"
        '(`results/choices.md` of the library, "Fifty epochs" and "One pass or several").\n'
    )
    head = ["data", "case", "method", "images", "samples", "annealing steps", "variance", *BOUNDS.values()]
    return f"### Bounds on log-likelihoods\n\n{text}{_without_variance(own)}\n" + table(head, rows) if rows else ""


def _consistency(runs: Runs) -> str:
    own = [run for run in runs if run.get("evaluate", {}).get("consistency")]
    names = ("order_gap", "order_noise", "posterior_gap")
    rows = [
        [data, case, method, *(spread([run["evaluate"]["consistency"][name] for run in of], 2) for name in names)]
        for data, case, method, of in groups(own)
    ]
    head = ["data", "case", "method", "order gap", "by noise alone", "from Bayes' posterior, at least"]
    text = (
        "How far log p(x_A) + log p(x_B given x_A) is from log p(x_B) + log p(x_A given x_B), how far two estimates\n"
        "of the first sum are apart by the noise of estimation alone (its bias does not show), and how far p(z given\n"
        "x_S) is from Bayes' posterior; over random A, B and S, under N(mu, beta I), whose variance is not that of\n"
        "the bounds above. The last is a lower bound; beyond a few nats it is far below the truth and does not rank\n"
        "the methods. The network of `vae` was never trained with a part given: its numbers say what comes of asking\n"
        "it all the same. They do not say that p(x) of the joint VAE contradicts itself: its own conditionals agree\n"
        "in any order.\n"
    )
    return f"### Consistency, in nats\n\n{text}{_without_variance(own)}\n" + table(head, rows) if rows else ""


def _costs(runs: Runs) -> str:
    """Figure 13."""
    rows = []
    for data, case, method, all_devices in groups(runs):
        for device, own in _by("device", all_devices).items():
            epochs = [run["train"]["epochs"] for run in own]
            cells = [spread([run["train"]["images_per_second"] for run in own], 0), spread(_epoch_seconds(own), 2)]
            loss = f"{own[0]['course'][-1]['loss']:.3f}"
            rows.append([data, case, method, device, *cells, spread(epochs, 1), loss])
    head = ["data", "case", "method", "device", "images/s", "seconds an epoch", "epochs", "final loss, first seed"]
    text = (
        "Other work beside a run makes it slower. So claim (v) compares the fastest run of each method on one device\n"
        "and at one commit, since runs that were made at another time had other neighbours; of several commits it\n"
        "takes the one at which the two were fastest. If runs shared a device with others, it compares neighbours as\n"
        "much as methods.\n"
    )
    return f"### Cost of training (Figure 13)\n\n{text}\n" + table(head, rows)


def _by(name: str, runs: Runs) -> dict[str, Runs]:
    """By the device on which they were trained, or by another entry of their environment."""
    result: dict[str, Runs] = {}
    for run in runs:
        result.setdefault(run["environment"][name], []).append(run)
    return dict(sorted(result.items(), key=lambda pair: str(pair[0])))  # there may be no commit


def _seconds(run: dict[str, Any], at: dict[str, Any]) -> float:
    """Of training, at its end or at a point of its course, without what compiling took, which is the same for any
    number of epochs."""
    return max(at["seconds"] - run["train"].get("compile_seconds", 0), 0)


def _epoch_seconds(runs: Runs) -> list[float]:
    return [_seconds(run, run["train"]) / (run["train"]["epochs"] or math.nan) for run in runs]


def _fastest_epoch(runs: Runs) -> float:
    """Of the run that other work beside it slowed down least."""
    return min((seconds for seconds in _epoch_seconds(runs) if not math.isnan(seconds)), default=math.nan)


# --- The paper's claims ---


def verdict(ours: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Whether ours is better (larger), worse, or comparable: within one standard error of the difference.

    Args:
        ours, other: numbers by seed. They are paired: runs of one seed see the same images in the same order, and are
            measured on the same ones, with the same noise if on one kind of device; seeds that only one of both has
            are left out. p is that of Student's t for pairs, without which few seeds would call better or worse what is
            neither: of two, every other difference that is only chance is larger than its standard error.
    """
    differences = list(_differences(ours, other).values())
    if not differences:
        return "no seed in common: no verdict"
    difference = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{difference:+.3f}, one seed: no verdict"
    if not math.isfinite(difference):
        return f"{difference:+.3f}, not a finite number: no verdict"
    error = _deviation(differences) / math.sqrt(len(differences))
    chance = _chance(difference, error, len(differences))
    word = "better" if difference > 0 else "worse"
    word = "comparable" if abs(difference) <= error else word if chance < SIGNIFICANT else f"not significantly {word}"
    return f"{word} ({difference:+.3f}, standard error {error:.3f} over {len(differences)} seeds, p = {chance:.2g})"


def _differences(ours: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """By seed that both have."""
    return {seed: ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())}


def _gains(ours: Runs, other: Runs) -> dict[int, float]:
    """In test JointELBO, by seed."""
    return _differences(_elbo_by_seed(ours), _elbo_by_seed(other))


def _chance(difference: float, error: float, count: int) -> float:
    """How often chance alone makes a mean of so many differences as large beside its standard error, either way."""
    from scipy.stats import t

    return float(2 * t.sf(abs(difference) / error, count - 1)) if error else float(not difference)


def _claims(runs: Runs) -> str:
    lines = []
    for data, case, of in _compared(runs):
        lines += [f"{claim}, {data} {case}: {found}" for claim, found in _verdicts(of).items()]
    if not lines:
        return ""
    lines += _growth(runs) or ["(iii) growth of the gain from Case1 to Case4: not measured here"]
    by_claim = sorted(lines, key=lambda line: line.partition(" ")[0])
    return "### What the paper claims\n\n" + "".join(f"- {line}\n" for line in by_claim)


def _verdicts(of: dict[str, Runs]) -> dict[str, str]:
    """Claims and what the numbers say, of the runs of each method."""
    elbo = {method: _elbo_by_seed(own) for method, own in of.items()}
    result = {}
    for claim, ours, other in COMPARED:
        if elbo[ours] and elbo[other]:
            result[f"{claim} JointELBO of `{ours}` against `{other}`"] = verdict(elbo[ours], elbo[other])
    if values := _at_a_tenth(of["biglearn_u"]):
        result["(iv) 60 % or more by a probe at S = 0.1"] = f"{_is_above(values, 60)}, {spread(values, 1)} %"
    return result | _cost_verdicts(of)


def _is_above(values: Sequence[float], bar: float) -> str:
    """Whether numbers, one for each seed, are at a bar or above: of several, unless chance would give as much."""
    difference = statistics.fmean(values) - bar
    if len(values) > 1:
        chance = _chance(difference, _deviation(values) / math.sqrt(len(values)), len(values))
        if chance >= SIGNIFICANT:
            return f"not distinguishable from that (p = {chance:.2g})"
    return "yes" if difference >= 0 else "no"


def _cost_verdicts(of: dict[str, Runs]) -> dict[str, str]:
    """Claim (v), on each device on which both were trained, of what was made there at one commit: that at which both
    were fastest, being disturbed least by other work."""
    result, theirs = {}, _by("device", of["vae"])
    for method in METHODS[1:]:
        for device, ours in _by("device", of[method]).items():
            pair = [_by("commit", own) for own in (ours, theirs.get(device, []))]
            both = [[_fastest_epoch(own[commit]) for own in pair] for commit in pair[0].keys() & pair[1].keys()]
            if known := [seconds for seconds in both if all(map(math.isfinite, seconds))]:
                own, other = min(known, key=sum)
                claim = f"(v) an epoch of `{method}` against one of `vae` on {device}"
                result[claim] = f"{own / other:.2f} times as long"
    return result


def _at_a_tenth(runs: Runs) -> list[float]:
    """Accuracies in % by codes of a tenth of the patches, claim (iv), which is of classes."""
    probes = [run["probe"]["codes"] for run in runs if run.get("probe", {}).get("metric") == "accuracy"]
    return [100 * codes["0.1"]["mean"] for codes in probes if "0.1" in codes]


def _elbo_by_seed(runs: Runs) -> dict[int, float]:
    return {run["seed"]: run["train"]["test_joint_elbo"] for run in runs}


def _growth(runs: Runs) -> list[str]:
    """Claim (iii), from the smallest to the largest case that is there: gains in JointELBO, seed by seed."""
    lines = []
    parameters = {run["case"]: run["train"]["parameters"] for run in runs}
    for data, method in itertools.product(sorted({run["data"] for run in runs}), METHODS[1:]):
        gains = {}
        for case in sorted({run["case"] for run in runs}, key=parameters.__getitem__):
            gains[case] = _gains(*(select(runs, data=data, case=case, method=m) for m in (method, "vae")))
        cases = [case for case, of_case in gains.items() if of_case]
        if len(cases) > 1:
            what = f"(iii) gain of `{method}` over `vae` at {cases[-1]} beside that at {cases[0]}, {data}"
            lines.append(f"{what}: {verdict(gains[cases[-1]], gains[cases[0]])}")
    return lines


# --- Plots ---


def plots(found: dict[str, Runs]) -> dict[str, Callable[[Path], None]]:
    """By file name, what draws it into a file."""
    result: dict[str, Callable[[Path], None]] = {}
    for preset, runs in found.items():
        if _of_grid(runs):
            continue
        for name, own in _plotted(runs).items():
            by_case, draw = PLOTS[name][1:]
            result[f"{preset}-{name}.png"] = partial(_plot, runs=own, by_case=by_case, draw=draw)
    return result


def _plot(path: Path, runs: Runs, by_case: bool, draw: Callable) -> None:
    """A panel of each data set, side by side, or a row of cases of each."""
    from matplotlib.figure import Figure

    data, cases = (sorted({run[name] for run in runs}) for name in ("data", "case"))
    grid: list[list[tuple[str, ...]]] = [[(one,) for one in data]]
    if by_case:  # those of a data set that there are
        grid = [[(one, case) for case in cases if select(runs, data=one, case=case)] for one in data]
    columns = max(map(len, grid))
    wide = columns > 2  # drawn smaller, so that a page that is not as wide can still be read
    size = (3.4 if wide else 5) * columns + 1.8, (3.0 if wide else 3.6) * len(grid)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    share: Literal["row", "none"] = "row" if by_case else "none"  # cases of one data set are compared by one scale
    panels = figure.subplots(len(grid), columns, squeeze=False, sharey=share)
    looks: dict[str, Any] = {}
    for row, titles in zip(panels, grid, strict=True):
        for place, axes in enumerate(row):
            axes.set_visible(place < len(titles))
            if place < len(titles):
                draw(axes, select(runs, data=titles[place][0]), *titles[place][1:], every=runs)
                axes.set_title(" ".join(titles[place]))
                axes.grid(alpha=0.3)
                if by_case and place:
                    axes.set_ylabel("")
                handles, labels = axes.get_legend_handles_labels()
                looks |= dict(zip(labels, handles, strict=True))
    of_cases = [f"{case} {method}" for case in cases for method in methods_of(runs)]
    order = sorted(looks, key=lambda label: of_cases.index(label) if label in of_cases else -1)
    figure.legend([looks[label] for label in order], order, fontsize=8, loc="outside right upper")
    figure.savefig(path, metadata={"Software": None})


def _colour(method: str) -> str:
    return COLOURS.get(method, "C4")


def _plot_joint(axes, runs: Runs, every: Runs | None = None) -> None:
    cases, methods = sorted({run["case"] for run in runs}), methods_of(runs)
    for number, method in enumerate(methods):
        points = [
            (place + 0.18 * (number - (len(methods) - 1) / 2 + k / max(6, len(of))), run["train"]["test_joint_elbo"])
            for place, case in enumerate(cases)
            for of in [select(runs, case=case, method=method)]
            for k, run in enumerate(of)  # seeds beside each other
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=_colour(method), label=method, alpha=0.6)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.set_ylabel("test JointELBO, higher is better;\na point a seed")


def _plot_probe(axes, runs: Runs, case: str, every: Runs | None = None) -> None:
    own = select(runs, case=case)
    looks = {
        "codes": dict(marker="o"),
        "nearest_codes": dict(marker="x"),
        "pixels": dict(color="0.5"),
        "nearest": dict(color="0.75"),
        "ceiling": dict(color="k"),
    }
    lines = [
        (label, name, select(own, method=method), looks[name] | dict(color=_colour(method)))
        for method in methods_of(runs)
        for name, label in _codes(method).items()
    ]
    # All but the last are the same for all cases.
    lines += [(label, name, own if name == "ceiling" else runs, looks[name]) for name, label in NO_CODES.items()]
    for label, name, of, look in lines:
        if own and (scores := [run["probe"][name] for run in of if name in run["probe"]]):
            found = {ratio: [score[ratio]["mean"] for score in scores if ratio in score] for ratio in _ratios(scores)}
            points = [(float(ratio), 100 * statistics.fmean(values)) for ratio, values in found.items()]
            axes.plot(*zip(*points, strict=True), **look, label=label, linewidth=1.2, markersize=5)
    axes.set_xlabel("share of patches observed")
    axes.set_ylabel(_metric(runs))


def _lines(runs: Runs) -> dict[str, Any]:
    """The line of each case: of those of the paper always the same."""
    others = sorted({run["case"] for run in runs} - LINES.keys())
    free = [line for line in OTHER_LINES if line not in {LINES.get(run["case"]) for run in runs}]
    return LINES | dict(zip(others, itertools.cycle(free), strict=False))


def _plot_course(
    axes,
    runs: Sequence[dict[str, Any]],
    lines: Mapping[str, Any],
    value: Callable[[dict[str, Any], dict[str, float]], float],
) -> None:
    """Half of Figure 13: `value` of a run and a point of its course."""
    for run in runs:
        pace = run["train"]["epochs"] / run["train"]["steps"]
        points = [(point["step"] * pace, value(run, point)) for point in run["course"]]
        look = dict(color=_colour(run["method"]), linestyle=lines[run["case"]])
        axes.plot(*zip(*points, strict=True), **look, label=f"{run['case']} {run['method']}")
    axes.set_xlabel("epochs")


def _plot_loss(axes, runs: Runs, every: Runs | None = None) -> None:
    from matplotlib.ticker import LogLocator

    seed = min(run["seed"] for run in runs)
    shown = [run for *_, own in groups(runs) for run in select(own, seed=seed)]
    _plot_course(axes, shown, _lines(every or runs), lambda _, point: point["loss"])
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("training loss; the methods' are not of one\nobjective: compare shapes, not heights")


def _plot_time(axes, runs: Runs, every: Runs | None = None) -> None:
    device, alike = max(_by("device", runs).items(), key=lambda pair: len(pair[1]))
    fastest = [min(own, key=lambda run: _seconds(run, run["train"])) for *_, own in groups(alike)]
    _plot_course(axes, fastest, _lines(every or runs), _seconds)
    axes.set_ylabel(f"seconds of training on {device},\nthe fastest seed, without compiling")


PLOTS: dict[str, tuple[str, bool, Callable]] = {  # what it shows, whether by case, and what draws a panel
    "joint_elbo": ("JointELBO by method", False, _plot_joint),
    "probe": ("Probe by share observed", True, _plot_probe),
    "loss": ("Loss by epoch", False, _plot_loss),
    "time": ("Seconds of training by epoch", False, _plot_time),
}
