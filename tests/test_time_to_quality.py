"""Time to quality: what is evaluated is the training itself, and the table's arithmetic holds."""

import json

import pytest
import torch
from programs import run_here
from test_benchmark import SMALL, TOKENS, network, work

from biglearn_vae import BigLearnVAE, Optim, TrainingError, evaluation, time_to_quality
from biglearn_vae import benchmark as timing
from biglearn_vae.time_to_quality import Point


def course(*points: tuple[float, float]) -> list[Point]:
    """Points of these seconds and JointELBOs."""
    return [Point(step, seconds, elbo, 2 * elbo, 7.0) for step, (seconds, elbo) in enumerate(points)]


def courses(job: timing.Work, **plan) -> time_to_quality.Courses:
    *_, found = time_to_quality.measure(job, timing.Plan(**plan), job.images, TOKENS, say=lambda line: None)
    return found


def numbers(points: list[Point]) -> list[tuple[float, ...]]:
    """All but the seconds."""
    return [(point.step, point.joint_elbo, point.reconstruction, point.kl) for point in points]


@pytest.mark.parametrize("decay", [0.9, 0.0])
@pytest.mark.parametrize("stage", ["plain", "fused"])
def test_a_course_ends_where_the_training_does(stage, decay):
    """Being evaluated on the way changes nothing."""
    job = work(network(), optim=Optim(ema_decay=decay))
    points = courses(job, stages=[stage], evaluations=3, test_images=5)[stage]
    assert [point.step for point in points] == [0, 3, 7, 10]
    assert points[0].seconds == 0 < points[1].seconds < points[2].seconds < points[3].seconds
    ends = courses(job, stages=[stage], evaluations=1, test_images=5)[stage]
    assert numbers(ends) == [numbers(points)[0], numbers(points)[-1]]
    if stage == "fused":  # which draws nothing from the global generator
        alone = timing.step_of(job, timing.Plan(stages=[stage]).chosen("float32", "cpu")[stage])
        for _ in range(10):
            alone()
        parts = evaluation.elbo(BigLearnVAE(alone.result, TOKENS), job.images.select(slice(0, 5)), job.loss)
        assert points[-1].joint_elbo == parts["elbo"] and points[-1].kl == parts["kl"]


def test_stages_start_from_the_same_weights():
    chosen = timing.Plan(evaluations=1, compile=False).chosen
    assert list(chosen("float32", "cpu")) == ["plain", "fused"]
    assert list(chosen("bfloat16", "cpu", "drop")) == ["plain", "drop"]
    assert list(timing.Plan(evaluations=1).chosen("bfloat16", "cuda")) == ["plain", "cuda_graph"]
    assert list(timing.Plan(evaluations=1, stages=["resident"]).chosen("float32", "cpu")) == ["resident"]
    job, before = work(network()), torch.random.get_rng_state()
    found = courses(job, evaluations=1)
    assert torch.equal(before, torch.random.get_rng_state())
    start, other = (found[name][0] for name in ("plain", "fused"))
    assert numbers([start])[0] == pytest.approx(numbers([other])[0], rel=1e-5)
    assert found["plain"][1].joint_elbo != pytest.approx(found["fused"][1].joint_elbo, rel=1e-5)


def test_a_training_that_diverges_is_named():
    with pytest.raises(TrainingError, match=r"not finite after 10 steps: try a smaller optim\.lr"):
        courses(work(network(), optim=Optim(lr=1e30, clip_norm=None)), stages=["plain"], evaluations=1)


def test_seconds_to_a_joint_elbo():
    points = course((0, -9), (2, -5), (4, -6), (6, -3))
    assert time_to_quality.seconds_to(points, -9.5) == 0
    assert time_to_quality.seconds_to(points, -7) == 1
    assert time_to_quality.seconds_to(points, -5) == 2
    assert time_to_quality.seconds_to(points, -4) == pytest.approx(4 + 2 * 2 / 3)
    assert time_to_quality.seconds_to(points, -2) is None


def test_the_table_compares_at_what_both_reached():
    text = time_to_quality.table({"plain": course((0, -9), (8, -5)), "fused": course((0, -9), (1, -7), (4, -4))})
    assert "JointELBO -5.0000: plain after 8 s, fused after 3 s, 2.67 times as soon" in text
    assert "times as soon" not in time_to_quality.table({"plain": course((0, -5), (8, -9)), "fused": course((0, -5))})
    assert text.splitlines()[1].split() == ["plain", "1", "8.0", "-5.0000", "-10.0000", "7.00"]


def test_what_learns_nothing_gets_a_plot_without_a_common_level(tmp_path):
    for other in (course((0, -9), (3, -40), (6, -20)), course((0, -9), (4, -3), (8, 2))):
        time_to_quality.plot(tmp_path / "x.png", {"plain": course((0, -9), (1, -7), (4, -4)), "fused": other}, "title")
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_writes_numbers_and_a_plot(tmp_path, monkeypatch, capsys):
    words = [*SMALL, "trainer.steps=4", "trainer.precision=float32", "evaluations=2", "test_images=8"]
    assert run_here(monkeypatch, *words, f"json={tmp_path / 'x.json'}", script="benchmark") == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert {name: [p["step"] for p in points] for name, points in found["courses"].items()} == {
        "plain": [0, 2, 4],
        "fused": [0, 2, 4],
    }
    assert f"{found['courses']['fused'][-1]['joint_elbo']:.4f}" in out and found["environment"]["device"]
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluations=0"], "evaluations must be at least 1, got 0"),
        (["evaluations=5"], "evaluations must be at most trainer.steps, 4, got 5"),
        (["evaluations=2", "steps=3"], "with evaluations give trainer.steps"),
        (["evaluations=2", "json=x.png"], r"json must end in .json, for the plot to be a .png beside it, got x.png"),
    ],
)
def test_what_makes_no_sense_is_refused(words, message, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL, "trainer.steps=4", *words, script="benchmark") == 2
    assert message in capsys.readouterr().err
