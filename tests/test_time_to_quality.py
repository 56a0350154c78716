"""Time to quality: what is evaluated is the training itself, and the table's arithmetic holds."""

import json

import pytest
import torch
from programs import run_here
from test_benchmark import SMALL, TOKENS, network, work

from biglearn_vae import BigLearnVAE, evaluation, time_to_quality
from biglearn_vae import benchmark as timing
from biglearn_vae.time_to_quality import Point


def course(*points: tuple[float, float]) -> list[Point]:
    """Points of these seconds and JointELBOs."""
    return [Point(step, seconds, elbo, 2 * elbo, 7.0) for step, (seconds, elbo) in enumerate(points)]


@pytest.mark.parametrize("stage", ["plain", "fused"])
def test_a_course_ends_where_the_training_does(stage):
    job = work(network())
    plan = timing.Plan(stages=[stage], course=3, test_images=5)
    torch.manual_seed(0)  # the plain version's noise and masks
    found = time_to_quality.measure(job, plan, job.images, TOKENS, say=lambda line: None)
    assert list(found) == [stage]
    points = found[stage]
    assert [point.step for point in points] == [0, 3, 7, 10]
    assert points[0].seconds == 0 < points[1].seconds < points[2].seconds < points[3].seconds
    torch.manual_seed(0)
    alone = timing.step_of(job, plan.chosen("float32", "cpu")[stage])
    for step in range(11):
        if step in (0, 10):
            vae = BigLearnVAE(alone.result, TOKENS)
            parts = evaluation.elbo(vae, job.images.select(slice(0, 5)), job.loss)
            point = points[0 if step == 0 else -1]
            assert (point.joint_elbo, point.kl) == pytest.approx((parts["elbo"], parts["kl"]), rel=1e-5)
        alone()


def test_stages_of_a_course_start_from_the_same_weights():
    job = work(network())
    plan = timing.Plan(course=1, compile=False)
    assert list(plan.chosen("float32", "cpu")) == ["plain", "fused"]
    assert list(plan.chosen("bfloat16", "cpu", "drop")) == ["plain", "drop"]
    assert list(timing.Plan(course=1).chosen("bfloat16", "cuda")) == ["plain", "compile"]
    assert list(timing.Plan(course=1, stages=["resident"]).chosen("float32", "cpu")) == ["resident"]
    found = time_to_quality.measure(job, plan, job.images, TOKENS, say=lambda line: None)
    start, other = (found[name][0] for name in ("plain", "fused"))
    assert start.joint_elbo == pytest.approx(other.joint_elbo, rel=1e-5) and start.kl == pytest.approx(
        other.kl, rel=1e-5
    )
    assert found["plain"][1].joint_elbo != pytest.approx(found["fused"][1].joint_elbo, rel=1e-5)


def test_seconds_to_a_joint_elbo():
    points = course((0, -9), (2, -5), (4, -6), (6, -3))
    assert time_to_quality.seconds_to(points, -9.5) == 0
    assert time_to_quality.seconds_to(points, -7) == 1
    assert time_to_quality.seconds_to(points, -5) == 2
    assert time_to_quality.seconds_to(points, -4) == pytest.approx(4 + 2 * 2 / 3)
    assert time_to_quality.seconds_to(points, -2) is None


def test_the_table_compares_at_what_both_reached():
    text = time_to_quality.table({"plain": course((0, -9), (8, -5)), "fused": course((0, -9), (1, -7), (4, -4))})
    assert "JointELBO -5.0000: plain after 8.0 s, fused after 3.0 s, 2.67 times as soon" in text
    assert text.splitlines()[1].split() == ["plain", "1", "8.0", "-5.0000", "-10.0000", "7.00"]


def test_the_command_writes_numbers_and_a_plot(tmp_path, monkeypatch, capsys):
    words = [*SMALL, "trainer.steps=4", "trainer.precision=float32", "course=2", "test_images=8"]
    assert run_here(monkeypatch, *words, f"json={tmp_path / 'x.json'}", script="benchmark") == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert {name: [p["step"] for p in points] for name, points in found["courses"].items()} == {
        "plain": [0, 2, 4],
        "fused": [0, 2, 4],
    }
    assert f"{found['courses']['fused'][-1]['joint_elbo']:.4f}" in out and found["environment"]["device"]
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert run_here(monkeypatch, *words, "course=0", script="benchmark") == 2
    assert "course must be at least 1, got 0" in capsys.readouterr().err
