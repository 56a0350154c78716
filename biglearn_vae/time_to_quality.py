"""Time to quality: the test JointELBO against seconds of training, of stages of the benchmark under one recipe."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biglearn_vae import checks, evaluation
from biglearn_vae.benchmark import LoopStep, Plan, TrainerStep, Work, seconds_of, step_of
from biglearn_vae.capabilities import BigLearnVAE
from biglearn_vae.data import ImageSet
from biglearn_vae.trainer import TrainingError


@dataclass(frozen=True)
class Point:
    """A moment of a training.

    Attributes:
        step: training steps taken so far.
        seconds: of these steps alone, with all that they wait for; torch loads, compiles and records before the first.
        joint_elbo, reconstruction, kl: means over the test images, as `evaluation.elbo` gives them.
    """

    step: int
    seconds: float
    joint_elbo: float
    reconstruction: float
    kl: float


Courses = dict[str, list[Point]]  # by stage


def measure(
    work: Work, plan: Plan, test: ImageSet, tokenizer: nn.Module, say: Callable[[str], Any] = print
) -> Iterator[Courses]:
    """Train the stages of a plan on the same schedule, `work.total` steps each; yields all courses at each evaluation.

    They are trained in turn from one of the `plan.evaluations` to the next, so that a machine that slows down or speeds
    up does so for all of them. There is one more evaluation before the first step. Progress goes to `say`. The same
    seed gives the same numbers, except for the seconds.

    Args:
        test: of these at most `plan.test_images` are used, the first ones.
        tokenizer: images (B, C, H, W) <-> tokens (B, L, D).

    Raises:
        ValueError: if the plan has no evaluations, or more than there are steps.
        TrainingError: if a stage diverges.
    """
    count = checks.whole_number("evaluations", plan.evaluations, 1)
    if count > work.total:
        raise ValueError(f"evaluations must be at most trainer.steps, {work.total}, got {count}")
    images = test.select(slice(0, plan.test_images))
    stages = plan.chosen(work.precision, work.device.type, work.net.hidden)
    devices = [work.device] if work.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        steps = {name: step_of(work, measures) for name, measures in stages.items()}
        for step in steps.values():
            step.warm_up()
        torch.manual_seed(work.seed)
        found: Courses = {name: [] for name in steps}
        for mark in [round(k * work.total / count) for k in range(count + 1)]:
            for name, step in steps.items():
                found[name].append(_point(step, mark, found[name], work, images, tokenizer))
                say(f"{name}: {mark} of {work.total} steps, JointELBO {found[name][-1].joint_elbo:.4f}")
            yield found


def _point(
    step: LoopStep | TrainerStep, mark: int, before: list[Point], work: Work, images: ImageSet, tokenizer: nn.Module
) -> Point:
    """The moment at which so many steps are taken."""
    seconds = 0.0
    if before:
        seconds = before[-1].seconds + seconds_of(step, mark - before[-1].step, work.device)
    vae = BigLearnVAE.of(step.result, tokenizer, work.loss)
    parts = evaluation.elbo(vae, images, work.loss, seed=work.seed)
    if not math.isfinite(parts["elbo"]):
        raise TrainingError(f"the JointELBO is not finite after {mark} steps: try a smaller optim.lr")
    return Point(mark, seconds, parts["elbo"], parts["reconstruction"], parts["kl"])


def seconds_to(course: Sequence[Point], joint_elbo: float) -> float | None:
    """Seconds after which a JointELBO is reached first, on straight lines between the points; None if it never is."""
    if course[0].joint_elbo >= joint_elbo:
        return course[0].seconds
    for left, right in itertools.pairwise(course):
        if right.joint_elbo >= joint_elbo:
            share = (joint_elbo - left.joint_elbo) / (right.joint_elbo - left.joint_elbo)
            return left.seconds + share * (right.seconds - left.seconds)
    return None


def table(courses: Courses) -> str:
    """Where each stage ends, and when it and the first stage reached the best JointELBO that both reached."""
    first = next(iter(courses))
    lines = [f"{'':<10}{'steps':>8}{'seconds':>10}{'JointELBO':>12}{'reconstruction':>16}{'KL':>8}"]
    for name, course in courses.items():
        end = course[-1]
        cells = f"{end.step:>8}{end.seconds:>10.1f}{end.joint_elbo:>12.4f}{end.reconstruction:>16.4f}{end.kl:>8.2f}"
        lines.append(f"{name:<10}{cells}")
    for name in [name for name in courses if name != first]:
        level = _common_level(courses[first], courses[name])
        ours, other = (seconds_to(courses[stage], level) for stage in (name, first))
        if ours and other:  # both learned something
            times = f"{first} after {other:.4g} s, {name} after {ours:.4g} s, {other / ours:.2f} times as soon"
            lines.append(f"\nJointELBO {level:.4f}: {times}")
    return "\n".join(lines)


def _common_level(*courses: Sequence[Point]) -> float:
    """The best JointELBO that all of them reached."""
    return min(max(point.joint_elbo for point in course) for course in courses)


def as_dict(courses: Courses) -> dict[str, list[dict[str, float]]]:
    """Everything, for a file."""
    return {name: [asdict(point) for point in course] for name, course in courses.items()}


def plot(path: Path, courses: Courses, title: str) -> None:
    """Draw the JointELBO against seconds and against steps into a PNG file, and mark when each stage reached the best
    that all reached. The start, far below, is left out; the scales of seconds and of the JointELBO are logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels, level = figure.subplots(1, 2, sharey=True), _common_level(*courses.values())
    learned = level > max(course[0].joint_elbo for course in courses.values())  # each something
    for axes, name in zip(panels, ("seconds", "step"), strict=True):
        for stage, course in courses.items():
            label = "plain version" if stage == "plain" else f"this library's{f', {stage}' * (len(courses) > 2)}"
            points = [(getattr(point, name), -point.joint_elbo) for point in course[1:]]
            (line,) = axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
            if learned and name == "seconds" and (reached := seconds_to(course, level)):
                axes.plot(reached, -level, "*", markersize=11, color=line.get_color())
                axes.annotate(f"{reached:.3g} s", (reached, -level), (4, 8), textcoords="offset points")
        axes.set_xlabel({"seconds": "seconds of training", "step": "steps"}[name])
        if learned:
            axes.axhline(-level, color="0.6", linewidth=0.8)
        axes.grid(alpha=0.3)
    panels[0].set(xscale="log", ylabel="- test JointELBO, lower is better")
    scaled = [panels[0].xaxis]
    if all(point.joint_elbo < 0 for course in courses.values() for point in course[1:]):
        panels[0].set_yscale("log")
        scaled.append(panels[0].yaxis)
    for axis in scaled:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    panels[0].margins(x=0.16)  # for the words beside the last points
    panels[1].legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})
