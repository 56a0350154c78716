"""Time to quality: the test JointELBO against seconds of training, of stages of the benchmark under one recipe."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from biglearn_vae import evaluation
from biglearn_vae.benchmark import LoopStep, Plan, TrainerStep, Work, step_of, synchronize
from biglearn_vae.capabilities import BigLearnVAE
from biglearn_vae.data import ImageSet


@dataclass(frozen=True)
class Point:
    """A moment of a training.

    Attributes:
        step: how many there were.
        seconds: of these steps alone, all that they wait for and compile included.
        joint_elbo, reconstruction, kl: means over the test images, as `evaluation.elbo` gives them.
    """

    step: int
    seconds: float
    joint_elbo: float
    reconstruction: float
    kl: float


Courses = dict[str, list[Point]]  # by stage


def measure(work: Work, plan: Plan, test: ImageSet, tokenizer: nn.Module, say: Callable[[str], Any] = print) -> Courses:
    """Train the stages of a plan on the same schedule, `work.total` steps each, and evaluate them on the way.

    They go on in turn from one of the `plan.course` evaluations to the next, so that a machine that slows down or
    speeds up does so for all of them. The first is before the first step. Progress goes to `say`.

    Args:
        test: of these at most `plan.test_images` are used, the first ones.
        tokenizer: images (B, C, H, W) <-> tokens (B, L, D).
    """
    stages = plan.chosen(work.precision, work.device.type, work.net.hidden)
    images = test.select(slice(0, plan.test_images))
    steps = {name: step_of(work, measures) for name, measures in stages.items()}
    seconds, found = dict.fromkeys(steps, 0.0), {name: [] for name in steps}
    marks = [round(k * work.total / plan.course) for k in range(plan.course + 1)]
    for before, mark in itertools.pairwise([0, *marks]):
        for name, step in steps.items():
            seconds[name] += _seconds(step, mark - before, work) if mark > before else 0
            vae = BigLearnVAE(step.result, tokenizer, prior=work.loss.prior, variance=work.loss.beta)
            parts = evaluation.elbo(vae, images, work.loss, seed=work.seed)
            found[name].append(Point(mark, seconds[name], parts["elbo"], parts["reconstruction"], parts["kl"]))
            say(f"{name}: step {mark} of {work.total}, {seconds[name]:.1f} s, JointELBO {parts['elbo']:.4f}")
    return found


def _seconds(step: LoopStep | TrainerStep, count: int, work: Work) -> float:
    """Of so many steps."""
    synchronize(work.device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(work.device)
    return time.perf_counter() - start


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
    """Where each stage ends, and when it reached what both it and the first stage did."""
    first = next(iter(courses))
    lines = [f"{'':<10}{'steps':>8}{'seconds':>10}{'JointELBO':>12}{'reconstruction':>16}{'KL':>8}"]
    for name, course in courses.items():
        end = course[-1]
        cells = f"{end.step:>8}{end.seconds:>10.1f}{end.joint_elbo:>12.4f}{end.reconstruction:>16.4f}{end.kl:>8.2f}"
        lines.append(f"{name:<10}{cells}")
    for name in [name for name in courses if name != first]:
        level = min(max(point.joint_elbo for point in courses[stage]) for stage in (first, name))
        ours, other = (seconds_to(courses[stage], level) for stage in (name, first))
        times = "" if not ours else f", {other / ours:.2f} times as soon"
        lines.append(f"\nJointELBO {level:.4f}: {first} after {other:.1f} s, {name} after {ours:.1f} s{times}")
    return "\n".join(lines)


def as_dict(courses: Courses) -> dict[str, list[dict[str, float]]]:
    """Everything, for a file."""
    return {name: [asdict(point) for point in course] for name, course in courses.items()}


def plot(path: Path, courses: Courses, title: str) -> None:
    """Draw the JointELBO against seconds and against steps into a PNG file. The start, far below, is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("seconds", "step"), strict=True):
        for stage, course in courses.items():
            axes.plot(
                [getattr(p, name) for p in course[1:]], [p.joint_elbo for p in course[1:]], "o-", ms=3, label=stage
            )
        axes.set_xlabel({"seconds": "seconds of training", "step": "steps"}[name])
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("test JointELBO")
    figure.savefig(path, metadata={"Software": None})
