"""The paper's experiments: which runs are made, skipped and gone on with, and that the page is made of the numbers."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from programs import own_case, run_here

from biglearn_vae import checkpoint, config, experiments, files, results_page
from biglearn_vae.experiments import Campaign, Preset, Run
from biglearn_vae.files import read_json, write_json

ROOT = Path(__file__).parents[1]
SIZES = {"tiny": 1, "case1": 2, "celeba_small": 3, "case3": 4, "case4": 5, "celeba": 6}  # their order
SETTINGS = {"train": ["trainer.steps=3"], "probe": ["draws=1"]}


def preset(**settings) -> Preset:
    values = dict(name="p", data=["digits"], methods=["vae", "biglearn_u"], seeds={"tiny": [0, 1]}, settings=SETTINGS)
    return Preset(**values | settings)


def run_numbers(method="biglearn_u", seed=0, elbo=-1.0, case="tiny") -> dict:
    """The numbers of a run, as `Campaign` writes them."""
    nats = {"mean": 20.0, "error": 0.5}
    tasks = {
        "0.5": {"nats": nats, "one pass": {"psnr_draw": 12.0, "psnr_mean": 13.0, "diversity": 0.1, "seconds": 0.5}}
    }
    return {
        **{"data": "digits", "case": case, "method": method, "seed": seed},
        "train": {
            **{"test_joint_elbo": elbo, "test_reconstruction": elbo / 2, "test_kl": 7.0},
            **{"images_per_second": 100.0, "seconds": 9.0, "steps": 3, "epochs": 4.5, "parameters": SIZES[case]},
        },
        "probe": {
            "codes": {"1.0": {"mean": 0.9}, "0.1": {"mean": 0.65}},
            **{"metric": "accuracy", "train_images": 5000, "settings": {"ceiling_steps": 200, "neighbours": 10}},
        },
        "complete": {"tasks": tasks},
        "course": [{"step": 3, "seconds": 1.0, "loss": 2.5}],
        "environment": {"commit": "abcdefghij", "date": "now", "device": "cpu", "torch": "2"},
        "settings": {"train": ["trainer.steps=3"]},
        "config": {"train": preset().resolved(Run("digits", case, method, seed), "train")},
    }


def test_the_committed_page_is_made_of_the_committed_numbers():
    found = experiments.load(ROOT / "results")
    assert (ROOT / "results/README.md").read_text() == results_page.page(found, config.paper_parameters())
    for name in results_page.plots(found):
        assert (ROOT / "results" / name).exists(), f"python scripts/reproduce.py makes {name}"


def test_what_a_run_has_besides_is_said():
    own, other = run_numbers(), run_numbers("vae")
    own["train"]["objective"] = "Bernoulli"
    own["complete"]["tasks"]["0.5"]["code alone"] = {"psnr_draw": 9.0, "psnr_mean": 10.0}
    text = results_page.page({"p": [own, other]}, {})
    assert "JointELBO of Bernoulli is that objective's own, not to be compared with others'." in text
    assert "| digits | tiny | biglearn_u, code alone, mean | 10.00 |" in text
    text = results_page.page({"p": [other]}, {})
    assert "objective's own" not in text and "code alone" not in text


def test_runs_without_a_variance_are_told_so():
    run = run_numbers()
    drawn = {"precision": 0.5, "recall": 0.25, "joint_nats": 7.0, "seconds": 1.0}
    bounds = {"joint_nats": -41.0, "marginal_nats": -19.0, "conditional_nats": -20.0}
    run["train"]["observations"] = "bernoulli"
    run["evaluate"] = {
        "passes": {"scores": {"1": drawn}},
        "likelihood": {"images": 50, "samples": 64, "model": bounds},
        "consistency": {"order_gap": 1.0, "order_noise": 0.5, "posterior_gap": 2.0},
    }
    text = results_page.page({"p": [run]}, {})
    assert "JointELBO of bernoulli observations is their own, not to be compared" in text
    assert "| digits | tiny | biglearn_u | 1 | 0.500 | 0.250 | 7.0 |  | 1.00 |" in text
    assert "| digits | tiny | biglearn_u | 50 | 64 | 0 |  | -41.0 | -19.0 | -20.0 |" in text
    assert text.count("Runs of bernoulli observations have no variance to be fitted and are measured under these.") == 3


def test_a_page_holds_its_numbers():
    runs = [run_numbers(seed=seed, elbo=elbo) for seed, elbo in enumerate((-1.0, -3.0))] + [
        run_numbers("vae", elbo=-5.0)
    ]
    text = results_page.page({"p": runs}, {"case1": 1_269_104})
    assert "| case1 | 1,269,104 | 1.2103 | 1.2103 |" in text
    assert "| digits | tiny | biglearn_u | 2 | -2.000 ± 1.414 | -1.000 ± 0.707 | 7.0 ± 0.0 |" in text
    assert "| digits | tiny | vae | 1 | -5.000 | -2.500 | 7.0 |" in text
    assert "(iv) 60 % or more by a probe at S = 0.1, digits tiny: yes, 65.0 ± 0.0 %" in text
    assert "(i) JointELBO of `biglearn_u` against `vae`, digits tiny: +4.000, one seed: no verdict" in text
    assert "| digits | tiny | biglearn_u, one pass, a draw | 12.00 ± 0.00 |" in text
    assert "| digits | tiny | biglearn_u | cpu | 100 ± 0 | 2.00 ± 0.00 | 4.5 ± 0.0 | 2.500 |" in text
    assert "| digits | tiny | vae | 20.0 | 0.5 |" in text
    assert "Accuracy in % of a linear classifier" in text
    assert "trained on 5,000 images" in text and "the same network, 200 steps on all training images" in text
    assert "(v) an epoch of `biglearn_u` against one of `vae` on cpu, digits tiny: 1.00 times as long" in text


def test_the_page_begins_with_what_the_methods_gain_and_where_to_find_it():
    runs = [run_numbers(seed=seed, elbo=elbo) for seed, elbo in enumerate((-1.0, -3.0))]
    runs += [run_numbers("vae", seed=seed, elbo=elbo) for seed, elbo in enumerate((-2.0, -2.5))] + [
        run_numbers("biglearn_t", seed=5)
    ]
    grid = [run_numbers() | {"levels": {"lr": "low"}}]
    grid[0]["train"]["inpainting_psnr"] = {"0.5": 14.25}
    text = results_page.page({"my_p": runs, "swept.1": grid}, {})
    assert "| [my_p](#presetmy_p) | digits | tiny | 4.5 |  | +0.250 ± 1.061 |  | 65.0 ± 0.0 |" in text
    assert "Settings are compared in [swept.1](#presetswept1).\n\n## Parameters" in text
    assert "## `preset=my_p`\n" in text


def test_presets_that_trained_longest_come_first_and_what_they_say_of_the_claims_before_their_numbers():
    short, long = [[run_numbers(seed=seed) for seed in (0, 1)] for _ in range(2)]
    for run in long:
        run["train"]["steps"] *= 2
    text = results_page.page({"a": short, "b": long}, {})
    assert text.index("[b](#presetb)") < text.index("[a](#preseta)")
    assert text.index("`preset=b`") < text.index("`preset=a`")
    heads = re.findall(r"^### (.*)$", text.split("## `preset=b`")[1].split("## `preset=a`")[0], re.MULTILINE)
    assert heads[:2] == ["What the paper claims", "Test JointELBO (Figure 2)"]


def test_claims_are_put_in_order_before_data_and_cases():
    runs = [run_numbers(method) | {"case": case} for method in results_page.METHODS for case in ("case1", "case2")]
    for run in runs:
        run["train"] = run["train"] | {"parameters": int(run["case"][-1])}
    lines = results_page.page({"p": runs}, {}).split("### What the paper claims\n\n")[1].split("\n\n")[0].splitlines()
    claims = [line.split()[1] for line in lines]
    assert claims == sorted(claims) and set(claims) == {"(i)", "(ii)", "(iii)", "(iv)", "(v)"}


def test_chains_are_averaged_over_seeds_that_ran_as_long():
    runs = [run_numbers(seed=seed) for seed in (0, 1)] + [run_numbers("vae", seed) for seed in (0, 1)]
    for run, counts in zip(runs[2:], ((1, 10), (10,)), strict=True):
        scores = {"psnr_mean": 13.0, "diversity": 0.1, "seconds": 0.5}
        run["complete"]["tasks"]["0.5"]["pseudo-Gibbs"] = [
            {"iterations": count, "psnr_draw": 10.0 + run["seed"]} | scores for count in counts
        ]
    text = results_page.page({"p": runs}, {"case1": 1_269_104})
    assert "| digits | tiny | biglearn_u | 0.5 | one pass |  |  | 12.00 ± 0.00 | 13.00 ± 0.00 |" in text
    assert "| digits | tiny | vae | 0.5 | pseudo-Gibbs | 1 |  | 10.00 | 13.00 | 0.100 | 0.50 |" in text
    assert "| digits | tiny | vae | 0.5 | pseudo-Gibbs | 10 |  | 10.50 ± 0.71 | 13.00 ± 0.00 | 0.100 ± 0.000 |" in text


def test_an_epoch_is_that_of_the_run_that_was_slowed_down_least():
    runs = [run_numbers(seed=seed) for seed in (0, 1)] + [run_numbers("vae", seed) for seed in (0, 1)]
    for run, seconds in zip(runs, (90.0, 60.0, 20.0, 100.0), strict=True):
        run["train"]["seconds"] = seconds
    text = results_page.page({"p": runs}, {})
    assert "(v) an epoch of `biglearn_u` against one of `vae` on cpu, digits tiny: 3.00 times as long" in text


def test_an_epoch_is_compared_with_those_of_the_same_commit():
    runs = [run_numbers(seed=seed) for seed in (0, 1)] + [run_numbers("vae", seed) for seed in (0, 1)]
    for run, seconds, commit in zip(runs, (90.0, 10.0, 45.0, 9.0), ("a", "b", "a", "c"), strict=True):
        run["train"]["seconds"], run["environment"] = seconds, run["environment"] | {"commit": commit}
    of_one = "(v) an epoch of `biglearn_u` against one of `vae` on cpu, digits tiny: 2.00 times as long"
    assert of_one in results_page.page({"p": runs}, {})
    assert "(v)" not in results_page.page({"p": runs[1:]}, {}).split("### What the paper claims")[1].split("###")[0]


def test_an_epoch_is_compared_at_the_commit_that_other_work_slowed_down_least():
    runs = [run_numbers(seed=seed) for seed in range(3)] + [run_numbers("vae", seed) for seed in range(3)]
    for run, seconds, commit in zip(runs, (60.0, 90.0, 80.0, 45.0, 20.0, 30.0), "abbabb", strict=True):
        run["train"]["seconds"], run["environment"] = seconds, run["environment"] | {"commit": commit}
    assert "on cpu, digits tiny: 4.00 times as long" in results_page.page({"p": runs}, {})
    runs[0]["train"]["seconds"] = 50.0  # and 45, together less than 80 and 20
    assert "on cpu, digits tiny: 1.11 times as long" in results_page.page({"p": runs}, {})


def test_runs_of_an_installed_package_have_no_commit():
    runs = [run_numbers(), run_numbers("vae"), run_numbers("vae", seed=1)]
    for run in runs[:2]:
        run["environment"] = run["environment"] | {"commit": None}
    assert "on cpu, digits tiny: 1.00 times as long" in results_page.page({"p": runs}, {})


def test_the_plot_of_seconds_leaves_compiling_out_as_the_table_does():
    slow, fast = run_numbers(), run_numbers(seed=1)
    slow["train"] |= {"seconds": 8.0, "compile_seconds": 0.0}
    fast["train"] |= {"seconds": 9.0, "compile_seconds": 5.0}
    fast["course"] = [{"step": 1, "seconds": 4.0, "loss": 3.0}, {"step": 3, "seconds": 9.0, "loss": 2.5}]
    axes = Figure().subplots()
    results_page.PLOTS["time"][2](axes, [slow, fast])
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1.5, 0.0], [4.5, 4.0]]]


def test_runs_may_differ_in_what_was_measured():
    runs = [run_numbers(method, seed) for method in ("vae", "biglearn_u") for seed in (0, 1)]
    for run in runs[:2]:
        run["probe"]["codes"] = {"0.5": {"mean": 0.8}, "1.0": {"mean": 0.7}}
        run["complete"]["tasks"] = {
            "top": {"one pass": {"psnr_draw": 7.0, "psnr_mean": 8.0}, "nats": {"mean": 9.0, "error": 0.5}}
        }
    runs[1]["probe"]["codes"] = {"1.0": {"mean": 0.8}}
    text = results_page.page({"p": runs}, {})
    assert "| data | case | features | 1.0 | 0.5 | 0.1 |" in text
    assert "| digits | tiny | vae | 75.0 ± 7.1 | 80.0 |  |" in text
    assert "| digits | tiny | vae, one pass, mean | 8.00 ± 0.00 |  |" in text
    assert "| digits | tiny | biglearn_u, one pass, mean |  | 13.00 ± 0.00 |" in text
    assert "| digits | tiny | biglearn_u |  | 20.0 ± 0.0 | 0.5 |" in text
    axes = Figure().subplots()
    results_page.PLOTS["probe"][2](axes, runs, "tiny")
    assert axes.lines[0].get_xydata().tolist() == pytest.approx(np.array([[1.0, 75.0], [0.5, 80.0]]))


def test_balanced_accuracy_of_attributes_says_nothing_of_the_claim_about_classes():
    run = run_numbers()
    run["probe"]["metric"] = "balanced accuracy"
    text = results_page.page({"p": [run]}, {})
    assert "Balanced accuracy in % of a linear classifier" in text and "(iv) 60 %" not in text
    assert "| [p](#presetp) | digits | tiny | 4.5 |  |  |  |  |" in text


def test_what_no_model_says_is_measured_once():
    runs = [run_numbers(seed=seed) for seed in (0, 1)]
    for run in runs:
        run["probe"] |= {"pixels": {"1.0": {"mean": 0.5}, "0.1": {"mean": 0.25}}, "ceiling": run["probe"]["codes"]}
    text = results_page.page({"p": runs}, {})
    assert "| digits | tiny | raw pixels | 50.0 | 25.0 |" in text
    assert "| digits | tiny | trained with labels | 90.0 ± 0.0 | 65.0 ± 0.0 |" in text


def test_an_estimate_of_one_sample_has_no_error():
    runs = [run_numbers(seed=seed) for seed in (0, 1)]
    for run in runs[:1]:
        run["complete"]["tasks"]["0.5"]["nats"] = {"mean": 20.0, "error": None}
    assert "| digits | tiny | biglearn_u | 20.0 ± 0.0 | 0.5 |" in results_page.page({"p": runs}, {})
    assert "| digits | tiny | biglearn_u | 20.0 |  |" in results_page.page({"p": runs[:1]}, {})


def test_seconds_are_compared_on_one_device_and_say_on_which():
    runs = [run_numbers(method, seed) for method in ("biglearn_u", "vae") for seed in (0, 1)]
    scores = {"psnr_draw": 10.0, "psnr_mean": 13.0, "diversity": 0.1, "seconds": 0.5}
    for run, seconds, device in zip(runs, (90.0, 8.0, 45.0, 45.0), ("cpu", "gpu", "cpu", "cpu"), strict=True):
        run["train"]["seconds"], run["environment"] = seconds, run["environment"] | {"device": device}
        run["complete"]["tasks"]["0.5"]["pseudo-Gibbs"] = [{"iterations": 5} | scores]
    text = results_page.page({"p": runs}, {})
    assert "4 runs on cpu, torch 2; gpu, torch 2, at abcdefg; settings" in text
    assert "| digits | tiny | biglearn_u | cpu | 100 | 20.00 | 4.5 | 2.500 |" in text
    assert "| digits | tiny | biglearn_u | gpu | 100 | 1.78 | 4.5 | 2.500 |" in text
    assert "(v) an epoch of `biglearn_u` against one of `vae` on cpu, digits tiny: 2.00 times as long" in text
    assert text.count("(v) an") == 1 and "| seconds |\n" in text  # where it was completed is not known
    for run, device in zip(runs[2:], ("gpu", "tpu"), strict=True):
        run["complete"]["environment"] = {"commit": "bcd", "date": "now", "device": device, "torch": "2"}
    text = results_page.page({"p": runs}, {})
    assert "4 runs on cpu, torch 2; gpu, torch 2, at abcdefg; measured on gpu, torch 2; tpu, torch 2, at bcd;" in text
    assert (
        "| vae | 0.5 | pseudo-Gibbs | 5 |  | 10.00 ± 0.00 | 13.00 ± 0.00 | 0.100 ± 0.000 | 0.50 ± 0.00 | gpu; tpu |"
        in text
    )
    assert (
        "| biglearn_u | 0.5 | one pass |  |  | 12.00 ± 0.00 | 13.00 ± 0.00 | 0.100 ± 0.000 | 0.50 ± 0.00 |  |" in text
    )


def test_chains_say_how_many_of_their_steps_were_accepted():
    runs = [run_numbers("vae", seed) for seed in (0, 1)]
    for run, acceptance in zip(runs, (0.02, 0.03), strict=True):
        scores = {"psnr_draw": 10.0, "psnr_mean": 13.0, "diversity": 0.1, "seconds": 0.5}
        run["complete"]["tasks"]["0.5"] |= {
            sampler: [
                scores | {"iterations": 10, "acceptance": 1.0},
                scores | {"iterations": 30, "acceptance": acceptance},
            ]
            for sampler in ("pseudo-Gibbs", "Metropolis-within-Gibbs")
        }
    text = results_page.page({"p": runs}, {})
    assert "| 0.5 | Metropolis-within-Gibbs | 30 | 2.5 ± 0.7 | 10.00 ± 0.00 |" in text
    assert "| 0.5 | Metropolis-within-Gibbs | 10 |  | 10.00 ± 0.00 |" in text
    assert "| 0.5 | pseudo-Gibbs | 30 |  | 10.00 ± 0.00 |" in text


@pytest.mark.parametrize("ours", ["biglearn_u", "biglearn_t"])
def test_chains_are_compared_with_one_pass_of_the_same_seeds(ours):
    runs = [run_numbers(method, seed) for method in (ours, "vae") for seed in (0, 1)]
    scores = {"psnr_draw": 10.0, "psnr_mean": 13.0, "diversity": 0.1, "seconds": 0.5}
    runs[3]["complete"]["tasks"]["0.5"]["pseudo-Gibbs"] = [{"iterations": 5} | scores]
    for seed in (0, 1):
        runs[seed]["complete"]["tasks"]["0.5"] = {"one pass": scores | {"psnr_draw": 12.0 + seed}}
    text = results_page.page({"p": runs}, {}).split("One pass against chains")[1].split("###")[0]
    assert f"| digits | tiny | {ours} | 0.5 | one pass |  |  | 13.00 | 13.00 |" in text  # of seed 1
    assert "| digits | tiny | vae | 0.5 | pseudo-Gibbs | 5 |  | 10.00 | 13.00 |" in text


def test_a_method_of_ones_own_is_on_the_page(tmp_path):
    runs = [run_numbers(seed=seed) | {"method": method} for method in ("mine", "biglearn_u") for seed in (0, 1)]
    text = results_page.page({"p": runs}, {})
    assert text.index("| digits | tiny | biglearn_u | 2 |") < text.index("| digits | tiny | mine | 2 |")
    assert "| digits | tiny | mine | 90.0 ± 0.0 |" in text
    for name, draw in results_page.plots({"p": runs}).items():
        draw(tmp_path / name)


def test_a_training_too_short_for_its_epochs_has_a_page():
    run = run_numbers()
    run["train"]["epochs"] = 0.0
    assert "| digits | tiny | biglearn_u | cpu | 100 | nan | 0.0 | 2.500 |" in results_page.page({"p": [run]}, {})
    assert "| 100 ± 0 | nan ± nan | 0.0 ± 0.0 |" in results_page.page({"p": [run, run | {"seed": 1}]}, {})


def test_a_plot_of_what_nobody_measured_is_not_made():
    runs = [run_numbers(seed=seed) for seed in (0, 1)]
    assert "![Probe by share observed](p-probe.png)" in results_page.page({"p": runs}, {})
    assert "p-probe.png" in results_page.plots({"p": runs})
    for run in runs:
        del run["probe"]
    assert "p-probe.png" not in results_page.page({"p": runs}, {})
    assert set(results_page.plots({"p": runs})) == {"p-joint_elbo.png", "p-loss.png", "p-time.png"}
    one = [runs[0] | {"data": data} for data in ("digits", "mnist")]  # a point each
    assert set(results_page.plots({"p": one})) == {"p-loss.png", "p-time.png"}


@pytest.mark.parametrize(("cases", "size"), [(["case1"], (680, 360)), (["tiny", "case1", "case3"], (1200, 300))])
def test_each_case_is_probed_in_a_panel_of_its_own(tmp_path, cases, size):
    from PIL import Image

    runs = [run_numbers(method, case=case) for case in cases for method in ("vae", "biglearn_t", "biglearn_u")]
    results_page.plots({"p": runs})["p-probe.png"](tmp_path / "probe.png")
    with Image.open(tmp_path / "probe.png") as image:
        assert image.size == size


def test_several_passes_are_averaged_over_seeds():
    runs = [run_numbers(seed=seed) for seed in (0, 1)]
    for run in runs:
        scores = {"psnr_draw": 14.0 + run["seed"], "psnr_mean": 15.0, "diversity": 0.1, "seconds": 2.0}
        run["complete"]["tasks"]["0.5"]["several passes"] = [scores | {"passes": 4}]
        drawn = {"precision": 0.5, "recall": 0.25, "joint_nats": 7.0 + run["seed"], "variance": 0.003, "seconds": 1.0}
        run["evaluate"] = {"passes": {"scores": {"1": drawn, "4": drawn | {"precision": 0.75}}}}
    text = results_page.page({"p": runs}, {})
    assert (
        "| digits | tiny | biglearn_u | 0.5 | 1 | 12.00 ± 0.00 | 13.00 ± 0.00 | 0.100 ± 0.000 | 0.50 ± 0.00 |" in text
    )
    assert (
        "| digits | tiny | biglearn_u | 0.5 | 4 | 14.50 ± 0.71 | 15.00 ± 0.00 | 0.100 ± 0.000 | 2.00 ± 0.00 |" in text
    )
    row = "| digits | tiny | biglearn_u | 4 | 0.750 ± 0.000 | 0.250 ± 0.000 | 7.5 ± 0.7 | 0.00300 ± 0.00000 |"
    assert f"{row} 1.00 ± 0.00 |" in text
    runs[1]["evaluate"]["passes"]["real"] = {"precision": 0.85, "recall": 0.9}
    real = "| digits | tiny | training images |  | 0.850 | 0.900 |  |  |  |"
    assert real not in text and real in results_page.page({"p": runs}, {})
    del runs[0]["evaluate"]["passes"]["scores"]["1"], runs[1]["evaluate"]["passes"]["scores"]["1"]["joint_nats"]
    text = results_page.page({"p": runs}, {})
    assert "| digits | tiny | biglearn_u | 1 | 0.500 | 0.250 | nan | 0.00300 | 1.00 |" in text


def test_bounds_are_those_with_the_fitted_variance():
    run = run_numbers()
    bounds = {"variance": 0.004, "joint_nats": 41.0, "marginal_nats": 19.0, "conditional_nats": 20.0}
    run["evaluate"] = {"likelihood": {"images": 50, "samples": 64, "model": bounds | {"variance": 1}, "fitted": bounds}}
    text = results_page.page({"p": [run]}, {})
    assert "| digits | tiny | biglearn_u | 50 | 64 | 0 | 0.00400 | 41.0 | 19.0 | 20.0 |" in text
    run["evaluate"]["likelihood"]["fitted"] = {"variance": 0.004, "joint_nats": 41.0}  # of one patch
    assert "| 0.00400 | 41.0 | nan | nan |" in results_page.page({"p": [run]}, {})


def test_a_floor_of_some_seeds_is_shown_and_one_that_lacks_a_task_is_not():
    numbers = [run_numbers(seed=seed) for seed in (0, 1)]
    for run in numbers:
        run["complete"]["tasks"]["top"] = run["complete"]["tasks"]["0.5"] | {"10 nearest": {"psnr": 9.0}}
    for task, value in (("0.5", 14.0), ("top", 15.0)):
        numbers[0]["complete"]["tasks"][task] = numbers[0]["complete"]["tasks"][task] | {"regressor": {"psnr": value}}
    text = results_page.page({"p": numbers}, {})
    assert "| digits | tiny | regressor | 14.00 | 15.00 |" in text and "10 nearest" not in text


def test_floors_are_beside_the_last_method_that_is_there():
    numbers = [run_numbers(method) for method in ("vae", "biglearn_t")]
    for run in numbers:
        for name, best in (("pixels", 0.75), ("nearest", 0.8)):
            run["probe"][name] = {"1.0": {"mean": best}, "0.1": {"mean": 0.25}}
        run["complete"]["tasks"]["0.5"] |= {"10 nearest": {"psnr": 9.0}}
    text = results_page.page({"p": numbers}, {})
    assert (
        text.count("| digits | tiny | raw pixels | 75.0 | 25.0 |")
        == text.count("| digits | tiny | nearest images | 80.0 | 25.0 |")
        == text.count("| digits | tiny | 10 nearest | 9.00 |")
        == 1
    )
    assert text.index("biglearn_t, one pass, mean") < text.index("10 nearest")
    assert "earest codes" not in text  # of runs from before there were any
    numbers[0]["probe"]["nearest_codes"] = {"1.0": {"mean": 0.85}, "0.1": {"mean": 0.5}}
    text = results_page.page({"p": numbers}, {})
    assert "| digits | tiny | vae, nearest codes | 85.0 | 50.0 |" in text and "Nearest codes: the vote" in text


def test_verdicts_are_within_a_standard_error_or_not():
    error = math.sqrt(1 / 3)  # of the mean of three differences of variance 1
    words = {0.9: "comparable", 1.1: "not significantly better", -4.2: "not significantly worse"}
    words |= {4.4: "better", -4.4: "worse"}  # Student's t of three has 2.5 % beyond 4.303
    for size, word in words.items():
        gap = size * error
        ours, other = {0: gap - 1, 1: gap + 5, 2: gap + 1, 3: 100}, {0: 0, 1: 5, 2: 0}  # the fourth seed has no pair
        chance = scipy.stats.ttest_rel([gap - 1, gap + 5, gap + 1], [0, 5, 0]).pvalue
        words_of_three = f"{word} ({gap:+.3f}, standard error {error:.3f} over 3 seeds, p = {chance:.2g})"
        assert results_page.verdict(ours, other) == words_of_three
    assert results_page.verdict({0: 1.0}, {1: 1.0}) == "no seed in common: no verdict"
    assert results_page.verdict({0: 1.0, 1: 2.0}, {0: math.nan, 1: 1.0}) == "+nan, not a finite number: no verdict"
    assert results_page.verdict({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).startswith("better (+1.000, standard error 0.000")


@pytest.mark.parametrize(("small", "large"), [("case1", "case3"), ("celeba_small", "celeba")])
def test_growth_of_the_gain_is_from_the_smallest_to_the_largest_case(small, large):
    elbo = {  # of case, method and seed; the gains are 1 and 2 of the small, 3 and 5 of the large; one has no pair
        (small, "vae"): (-10.0, -10.0, -10.0),
        (small, "biglearn_u"): (-9.0, -8.0),
        (large, "vae"): (-6.0, -7.0),
        (large, "biglearn_u"): (-3.0, -2.0),
        ("case4", "vae"): (-1.0,),  # nothing to compare it with
    }
    runs = [
        run_numbers(method, seed, value, case)
        for (case, method), values in elbo.items()
        for seed, value in enumerate(values)
    ]
    text = results_page.page({"p": runs}, {})
    assert (
        f"- (iii) gain of `biglearn_u` over `vae` at {large} beside that at {small}, digits: "
        "not significantly better (+2.500, standard error 0.500 over 2 seeds, p = 0.13)\n" in text
    )
    assert text.count("(iii)") == 1
    of_one = results_page.page({"p": [run for run in runs if run["case"] == small]}, {})
    assert "- (iii) growth of the gain from Case1 to Case4: not measured here\n" in of_one


def test_runs_come_seed_by_seed():
    names = [run.name for run in preset(seeds={"tiny": [0, 1], "case1": [0]}).runs()]
    assert names[:2] == ["digits-tiny-vae-seed0", "digits-tiny-biglearn_u-seed0"]
    assert names[2:4] == ["digits-case1-vae-seed0", "digits-case1-biglearn_u-seed0"]
    assert names[4:] == ["digits-tiny-vae-seed1", "digits-tiny-biglearn_u-seed1"]


def test_names_of_runs_within_each_other():
    nested = {"biglearn_u": {"probe": ["draws=2"], "seed0": {"probe": ["seed=1"], "tiny": {"train": ["missing=0"]}}}}
    flat = {
        "biglearn_u": {"probe": ["draws=2"]},
        "biglearn_u seed0": {"probe": ["seed=1"]},
        "biglearn_u seed0 tiny": {"train": ["missing=0"]},
    }
    assert preset(more=nested).more == preset(more=flat).more == flat
    with pytest.raises(ValueError, match=r"preset\.more of vae must be settings by script, got 3"):
        preset(more={"vae": 3})
    with pytest.raises(ValueError, match=r"preset\.more of vae seed0, probe must be a list of settings.*got draws=2"):
        preset(more={"vae": {"seed0": {"probe": "draws=2"}}})
    with pytest.raises(ValueError, match="settings must be of train, evaluate, complete, probe, got porbe"):
        preset(more={"vae": {"porbe": ["draws=2"]}})
    assert preset(more={"": {"probe": ["draws=2"]}}).more == {"": {"probe": ["draws=2"]}}  # of all runs


def test_some_runs_have_more_settings():
    more = {"biglearn_u": {"probe": ["draws=2"]}, "seed1 vae": {"probe": ["seed=1"], "train": ["missing=0"]}, "": {}}
    own = preset(more=more | {"case4": {"probe": ["draws=9"]}})  # a case that there is, though not here
    words = {run.name.removeprefix("digits-tiny-"): own.words(run, "probe")[1:] for run in own.runs()}
    assert words == {
        "vae-seed0": [],
        "biglearn_u-seed0": ["draws=2"],
        "vae-seed1": ["seed=1"],
        "biglearn_u-seed1": ["draws=2"],
    }
    assert own.words(own.runs()[2], "train") == ["trainer.steps=3", "missing=0"]


@pytest.mark.parametrize(
    "settings",
    [
        {"settings": {"train": ["trainer.steps=3", "seed=3"]}},
        {"settings": {"train": ["name=a"]}},
        {"more": {"vae": {"train": ["++output_dir=x"]}}},
        {"more": {"vae": {"probe": ["run=x"]}}},
        {"grid": {"what": {"this": [], "that": ["method=biglearn_t"]}}},
    ],
)
def test_settings_do_not_make_it_another_run(settings):
    with pytest.raises(ValueError, match=r"=\w+ cannot be among the settings of \w+ in a preset"):
        preset(**settings)


def test_a_preset_that_lacks_something(here, monkeypatch, capsys):
    (here / "own/preset").mkdir(parents=True)
    (here / "own/preset/short.yaml").write_text("name: short\ndata: [digits]\n")
    words = ("--config-dir=own", "preset=short", "results_dir=found")
    assert run_here(monkeypatch, *words, script="reproduce") == 2
    assert "error: preset/short.yaml lacks methods, seeds, settings\n" in capsys.readouterr().err


def test_a_page_takes_no_other_files_place(here, monkeypatch, capsys):
    (here / "README.md").write_text("my own notes\n")
    assert run_here(monkeypatch, "target=params", "results_dir=", script="reproduce") == 2
    assert "README.md is no page of results and would be written over" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["README.md"]
    assert (here / "README.md").read_text() == "my own notes\n"


GRID = {"S-ratio": {"even": [], "Beta(1, 2)": ["masks.s_ratio=[1,2]"]}, "joint": {"0": [], "0.3": ["masks.joint=0.3"]}}


def test_a_grid_is_every_combination(tmp_path):
    own = preset(methods=["biglearn_u"], seeds={"tiny": [0]}, grid=GRID, scripts=["train"])
    runs = own.runs()
    assert [run.name.removeprefix("digits-tiny-biglearn_u-seed0-") for run in runs] == [
        "S-ratio-even-joint-0",
        "S-ratio-even-joint-0.3",
        "S-ratio-Beta-1-2-joint-0",
        "S-ratio-Beta-1-2-joint-0.3",
    ]
    assert own.words(runs[0], "train") == ["trainer.steps=3"]
    assert own.words(runs[3], "train") == ["trainer.steps=3", "masks.s_ratio=[1,2]", "masks.joint=0.3"]
    assert own.words(runs[3], "probe") == ["draws=1"]
    assert len(Campaign(own, "params", tmp_path, tmp_path).missing()) == 0  # needs no script
    assert len(Campaign(own, "all", tmp_path, tmp_path).missing()) == 4


def test_the_page_compares_the_settings_of_a_grid():
    own = preset(methods=["biglearn_u"], grid=GRID)
    runs = []
    for run in own.runs():
        numbers = run_numbers(seed=run.seed) | {"levels": dict(run.levels)}
        joint = run.levels[1][1] == "0.3"
        elbo = {"valid_joint_elbo": -1.0 + 0.5 * joint, "valid_reconstruction": -0.5, "valid_kl": 9.0 + run.seed}
        psnr = {"inpainting_psnr": {"0.3": 12.0, "0.5": 15.0 - joint}}
        numbers["evaluate"] = {"split": "valid"} | elbo | psnr
        numbers["settings"] = {"train": own.words(run, "train")}
        runs.append(numbers)
    text = results_page.page({"p": runs}, {"case1": 1_269_104})
    row = "| digits | tiny | Beta(1, 2) | 0.3 | biglearn_u | 2 | -0.500 ± 0.000 | -0.500 ± 0.000 | 9.5 ± 0.7 | 12.00"
    assert row in text and "settings `trainer.steps=3`." in text
    assert (
        "| biglearn_u | joint | 0.3 | 4 | -0.500 ± 0.000 |" in text
        and "| S-ratio | even | 4 | -0.750 ± 0.289 |" in text
    )
    part = results_page.page({"p": runs[:-1]}, {"case1": 1_269_104})
    assert "averaged over all others" in text and "averaged over all others" not in part
    runs[0]["evaluate"] = {"split": "test", "test_joint_elbo": -9.0, "test_reconstruction": -0.5, "test_kl": 9.0} | psnr
    del runs[1]["levels"]  # made before there was a grid
    mixed = results_page.page({"p": runs}, {"case1": 1_269_104})
    assert "Of the test images" in mixed and "Of the validation images" in mixed and "| 1 | -9.000 |" in mixed
    assert "Figure 2" not in text and not results_page.plots({"p": runs})  # these are no experiments of the paper


def test_what_else_was_measured_of_a_grid_is_shown_level_by_level():
    runs = [run_numbers(seed=seed) | {"levels": {"width": width}} for width in ("128", "64") for seed in (0, 1)]
    for run in runs:
        run["train"]["inpainting_psnr"] = {"0.5": 14.25}
        run["probe"]["codes"]["1.0"]["mean"] = 0.9 if run["levels"]["width"] == "64" else 0.8
    del runs[2]["complete"], runs[3]["complete"]
    text = results_page.page({"p": runs}, {})
    rows = text.split("### Linear probing")[1].split("### In-painting")
    assert [line for line in rows[0].splitlines() if line.startswith("| digits")] == [
        "| digits | tiny, width 64 | biglearn_u | 90.0 ± 0.0 | 65.0 ± 0.0 |",
        "| digits | tiny, width 128 | biglearn_u | 80.0 ± 0.0 | 65.0 ± 0.0 |",
    ]
    assert "| digits | tiny, width 128 | biglearn_u, one pass, a draw | 12.00 ± 0.00 |" in rows[1]
    assert "| tiny, width 64 |" not in rows[1] and "### What the paper claims" not in text
    assert not results_page.plots({"p": runs})


def test_a_grid_that_was_only_trained_is_compared_by_what_its_training_ended_with():
    levels = ("width 256", "width 64", "nothing")
    runs = [run_numbers(elbo=-1.0 - place) | {"levels": {"changed": level}} for place, level in enumerate(levels)]
    for run in runs:
        del run["probe"], run["complete"]
        run["train"]["inpainting_psnr"] = {"0.5": 14.25}
    text = results_page.page({"p": runs}, {"case1": 1_269_104})
    assert "Of the test images" in text and "with the beta of its run" not in text
    runs[1]["config"] = {"train": {"loss.beta": 0.5}}
    other = results_page.page({"p": runs}, {})
    assert "Each JointELBO is with the beta of its run" in other
    rows = [line for line in text.splitlines() if line.startswith("| digits")]
    assert rows == [
        "| digits | tiny | nothing | biglearn_u | 1 | -3.000 | -1.500 | 7.0 | 14.25 | 14.25 |",
        "| digits | tiny | width 64 | biglearn_u | 1 | -2.000 | -1.000 | 7.0 | 14.25 | 14.25 |",
        "| digits | tiny | width 256 | biglearn_u | 1 | -1.000 | -0.500 | 7.0 | 14.25 | 14.25 |",
    ]


def test_a_grid_of_sizes_says_whether_gains_grow_with_them():
    runs = [
        run_numbers(method, seed, elbo=gain * int(width) / 64 - 1 + 0.01 * seed * gain) | {"levels": {"width": width}}
        for width in ("128", "32")
        for method, gain in (("biglearn_u", 1.0), ("vae", 0.0))
        for seed in (0, 1, 2)
    ]
    for run in runs:
        run["train"]["inpainting_psnr"] = {"0.5": 14.25}
    assert "What the paper claims" not in results_page.page({"p": runs}, {})
    for run in runs:
        run["train"]["parameters"] = int(run["levels"]["width"])
    claims = results_page.page({"p": runs}, {}).split("### What the paper claims")[1].split("\n\n")[1]
    assert "(i) JointELBO of `biglearn_u` against `vae`, digits tiny, width 128: better (+2.010" in claims
    assert re.findall(r"\(i\) .* width (\d+):", claims) == ["32", "128"]
    grown = (
        "(iii) gain of `biglearn_u` over `vae` at tiny, width 128 beside that at tiny, width 32, digits: better (+1.500"
    )
    assert grown in claims


def keep_network(campaign: Campaign, run: Run) -> None:
    """The folder of the run whose numbers are `run_numbers`."""
    summary = campaign.output / campaign.preset.name / run.name / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps(run_numbers(run.method)["train"]))


def test_what_is_there_with_these_settings_is_not_missing(tmp_path):
    campaign = Campaign(preset(), "joint_elbo", tmp_path / "out", tmp_path / "results")
    assert len(campaign.missing()) == 4
    known = Run("digits", "tiny", "vae", 0)
    keep_network(campaign, known)
    campaign.path(known).parent.mkdir(parents=True)
    campaign.path(known).write_text(json.dumps(run_numbers("vae")))
    assert known not in campaign.missing() and len(campaign.missing()) == 3
    other = Campaign(
        preset(settings={"train": ["trainer.steps=4"]}), "joint_elbo", tmp_path / "out", tmp_path / "results"
    )
    assert known in other.missing()
    probing = Campaign(preset(), "probe", tmp_path / "out", tmp_path / "results")
    assert known in probing.missing()  # its probe was made with other settings
    numbers = run_numbers("vae")
    numbers["config"]["probe"] = preset().resolved(known, "probe")
    campaign.path(known).write_text(json.dumps(numbers))
    assert known not in probing.missing()
    longer = preset(settings=SETTINGS | {"train": ["trainer.steps=4"]})
    again = Campaign(longer, "probe", tmp_path / "out", tmp_path / "results")
    # What was measured of the shorter run says nothing of the longer one, and nothing that was there gets lost.
    assert again._lacking(known) == ["train", "complete", "probe"]
    campaign.path(known).write_text("{ damaged")
    assert known in campaign.missing()


def test_a_default_that_changed_makes_a_run_missing_and_a_new_one_that_is_null_does_not(tmp_path):
    campaign, run = Campaign(preset(), "joint_elbo", tmp_path, tmp_path), Run("digits", "tiny", "vae", 1)
    campaign.path(run).parent.mkdir(parents=True)
    for change, missing in (({}, False), ({"loss.beta": 0.5}, True), ({"new": None}, False), ({"new": 1}, True)):
        numbers = run_numbers("vae", seed=1)
        numbers["config"]["train"] |= change
        campaign.path(run).write_text(json.dumps(numbers))
        assert (run in campaign.missing()) == missing
    numbers["config"]["train"] = numbers["config"]["train"] | {"seed": 0} | {"new": None}
    campaign.path(run).write_text(json.dumps(numbers))
    assert run in campaign.missing()


def test_a_network_that_is_not_here_is_trained_before_it_is_measured(tmp_path):
    """As in a fresh clone, which has the numbers of runs and not their weights."""
    campaign = Campaign(preset(), "probe", tmp_path / "out", tmp_path / "results")
    run = Run("digits", "tiny", "vae", 0)
    campaign.path(run).parent.mkdir(parents=True)
    campaign.path(run).write_text(json.dumps(run_numbers("vae")))
    assert campaign._lacking(run) == ["train", "complete", "probe"]
    keep_network(campaign, run)
    assert campaign._lacking(run) == ["probe"]
    summary = tmp_path / "out/p" / run.name / "summary.json"
    summary.write_text(json.dumps(run_numbers("vae", elbo=-7.0)["train"]))  # another network of the same name
    assert campaign._lacking(run) == ["train", "complete", "probe"]


def preset_of(name: str) -> Preset:
    return Preset(**OmegaConf.to_container(config.compose([f"preset={name}"], "reproduce").preset))


@pytest.mark.parametrize("name", config.choices("preset"))
def test_of_every_preset_fewer_scripts_may_be_called(name):
    assert config.compose([f"preset={name}", "preset.scripts=[train]"], "reproduce").preset.scripts == ["train"]


def test_the_papers_matrix():
    preset = preset_of("paper")
    runs = {(run.data, run.case, run.method, run.seed): run for run in preset.runs()}
    assert len(runs) == 2 * 3 * (3 + 3 + 1 + 1)
    trained, epochs = preset.resolved(runs["mnist", "case4", "vae", 0], "train"), 50
    steps = trained["trainer.steps"]
    assert steps * trained["trainer.batch_size"] >= epochs * 55_000
    asked = {
        key: {script: preset.resolved(run, script) for script in ("evaluate", "complete", "probe")}
        for key, run in runs.items()
        if run.seed < 2 and run.case in ("case1", "case4")
    }
    for (_, case, method, seed), settings in asked.items():
        evaluate, complete, probe = settings.values()
        first = seed == 0 and case == "case1"
        chains, several = [1, 10, 100] if first and method == "vae" else [], first and method != "vae"
        assert complete["iterations"] == chains and complete["passes"] == ([4, 16] if several else None)
        assert evaluate["passes"] == ([1, 4, 16] if several else [1] if first else None)
        assert complete["likelihood_images"] == 20 * first
        universal = seed == 0 and method == "biglearn_u"
        assert complete["regressor_steps"] == (universal and first) * steps
        assert probe["ceiling_steps"] == universal * 6000 and probe["pixels"] == (universal and first)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "results/runs").iterdir()))
def test_the_committed_numbers_were_made_as_their_preset_says(name):
    preset = preset_of(name)
    known = {path.stem: json.loads(path.read_text()) for path in (ROOT / "results/runs" / name).iterdir()}
    assert set(known) <= {run.name for run in preset.runs()}
    for run in preset.runs():
        numbers = known.get(run.name, {"settings": {}, "config": {}})
        for script, words in numbers["settings"].items():
            advice = f"{run.name}, {script}: python scripts/reproduce.py preset={name}"
            assert words == preset.words(run, script), advice
            assert not config.changed(numbers["config"][script], preset.resolved(run, script)), advice
        assert set(numbers["config"]) == set(numbers["settings"]) == set(experiments.FILES) & set(numbers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(target="everything"),
            "target must be params, joint_elbo, .* or all, got 'everything'",
        ),
        (dict(workers=0), "workers must be at least 1"),
        (dict(budget=0), "budget must be a number in .*, got 0: minutes"),
    ],
)
def test_campaigns_that_make_no_sense(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Campaign(**dict(preset=preset(), target="all", output=tmp_path, results=tmp_path) | settings)
    with pytest.raises(ValueError, match="settings must be of"):
        preset(settings={"draw": []})
    for levels in ({}, {"0.1": "masks.joint=0.1"}):
        with pytest.raises(ValueError, match=r"grid.joint must be levels, each a list of settings"):
            preset(grid={"joint": levels})
    with pytest.raises(ValueError, match=r"in quotes, for 0\.1"):
        preset(grid={"joint": {0.1: []}})
    for which in ("biglearn_x seed0", "seed00", "vae biglearn_u", "seed0 seed1"):
        with pytest.raises(
            ValueError, match=f'preset.more must name runs, each by at most one data set, .* got "{which}"'
        ):
            preset(more={which: {}})
    with pytest.raises(ValueError, match="scripts must be a list"):
        preset(scripts=["evaluate"])
    with pytest.raises(ValueError, match="several are digits-tiny-biglearn_u-seed0-S-1-2"):
        preset(grid={"S": {"[1, 2]": [], "(1, 2)": []}})


def test_workers_are_dealt_out_to_the_gpus(tmp_path, monkeypatch):
    def devices(count: int, device: str) -> list[str]:
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        return Campaign(preset(), "all", tmp_path, tmp_path, device=device, workers=3)._devices()

    assert devices(2, "auto") == devices(2, "cuda") == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices(2, "cuda:1") == ["cuda:1"] * 3 and devices(2, "cpu") == ["cpu"] * 3
    assert devices(1, "cuda") == ["cuda"] * 3 and devices(0, "auto") == ["auto"] * 3


WORDS = ["target=joint_elbo", "workers=1", "device=cpu", "preset.seeds={tiny:[0]}", "preset.methods=[biglearn_u]"]
SMALL = '"model.dim=16","model.heads=2","case.depth=2","case.split=[1,1]","trainer.batch_size=16","evaluation.draws=2"'
TRAIN = f'["trainer.steps=2","evaluation.images=4","evaluation.valid_images=4","trainer.report_every=1",{SMALL}]'


def test_the_command_makes_what_is_missing_and_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own_case(tmp_path / "own", "mine")
    own = ["--config-dir=own", *WORDS, "preset.seeds.tiny=[]", "+preset.seeds.mine=[0]"]
    words = [*own, f"preset.settings={{train:{TRAIN}}}"]
    assert run_here(monkeypatch, *words, "budget=0.0001", script="reproduce") == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert run_here(monkeypatch, *words, script="reproduce") == 0
    out = capsys.readouterr().out
    assert "0 runs are there, 1 to be made" in out and "train digits-mine-biglearn_u-seed0" in out
    numbers = json.loads((tmp_path / "results/runs/smoke/digits-mine-biglearn_u-seed0.json").read_text())
    assert numbers["train"]["steps"] == 2 and len(numbers["course"]) == 2
    assert numbers["environment"]["device"].startswith("cpu, ")
    page = (tmp_path / "results/README.md").read_text()
    assert f"{numbers['train']['test_joint_elbo']:.3f}" in page and (tmp_path / "results/smoke-loss.png").exists()
    assert run_here(monkeypatch, *words, script="reproduce") == 0
    assert "1 runs are there, 0 to be made" in capsys.readouterr().out
    assert (tmp_path / "results/README.md").read_text() == page
    # Measured otherwise, the network is the same and its numbers are others; a shorter run is another network.
    other = TRAIN[:-1] + ',"evaluation.draws=1","evaluation.ratios=[0.5]"]'
    assert run_here(monkeypatch, *own, f"preset.settings={{train:{other}}}", script="reproduce") == 0
    again = json.loads((tmp_path / "results/runs/smoke/digits-mine-biglearn_u-seed0.json").read_text())
    assert list(again["train"]["inpainting_psnr"]) == ["0.5"]
    assert again["train"]["test_joint_elbo"] == numbers["train"]["test_joint_elbo"]
    shorter = TRAIN.replace("trainer.steps=2", "trainer.steps=1")
    assert run_here(monkeypatch, *own, f"preset.settings={{train:{shorter}}}", script="reproduce") == 2
    assert "holds a run of 2 steps, more than the 1 asked for" in capsys.readouterr().err


def test_a_signal_stops_it_and_the_same_command_goes_on(tmp_path):
    words = ["scripts/reproduce.py", *WORDS, f"output_dir={tmp_path}", f"results_dir={tmp_path}"]
    command = [sys.executable, *words, f'preset.settings={{train:["trainer.steps=100000",{SMALL}]}}']
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "smoke/digits-tiny-biglearn_u-seed0/metrics.jsonl"
    while process.poll() is None and not (checkpoints.exists() and "train/loss" in checkpoints.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0 and "the same command goes on" in output
    latest = checkpoints.parent / "checkpoints/latest.pt"
    assert checkpoint.load(latest)["step"] >= 100  # the training itself was asked to stop, and wrote one


def test_the_summary_of_fewer_steps_is_not_that_of_a_training_that_was_told_to_stop(tmp_path):
    class Told:  # by somebody else: it ends as what was asked to, with exit code 0
        def call(self, *_):
            return 0

    campaign = Campaign(preset(), "joint_elbo", tmp_path / "out", tmp_path / "results")
    run = campaign.runs[0]
    folder = tmp_path / "out/p" / run.name
    folder.mkdir(parents=True)
    for summary, raised in ((None, True), ('{"steps": 2}', True), ('{"steps": 3}', False)):
        if summary:
            (folder / "summary.json").write_text(summary)
        with pytest.raises(experiments.Stopped) if raised else nullcontext():
            campaign._call(Told(), "cpu", run, "train")


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path, capsys):
    own = preset(methods=["vae"], seeds={"tiny": [0]})
    campaign = Campaign(own, "joint_elbo", tmp_path / "out", tmp_path / "results")
    folder = tmp_path / "out/p/digits-tiny-vae-seed0"
    folder.mkdir(parents=True)
    assert not files.is_locked(folder)
    with files.locked(folder):
        assert files.is_locked(folder) and not campaign.make(pytest.fail)
    assert campaign.left == [folder.name] and not campaign.failures and not files.is_locked(folder)
    assert f"left to another process: {folder.name}\n" in capsys.readouterr().out
    assert not list(folder.parent.glob("*.log"))


def test_what_was_measured_before_is_no_measurement_of_now_and_stays(tmp_path):
    campaign = Campaign(preset(), "probe", tmp_path / "out", tmp_path / "results")
    run = campaign.runs[0]
    made = tmp_path / "out/p" / run.name / "probe.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")

    class Measures:
        def __init__(self, text):
            self.text = text

        def call(self, *_):
            if self.text:
                write_json(made, {"as": self.text})
            return 0

    with pytest.raises(experiments.Stopped):
        campaign._call(Measures(""), "cpu", run, "probe")
    assert made.read_text() == "{}"
    campaign._call(Measures("asked for"), "cpu", run, "probe")
    assert read_json(made) == {"as": "asked for"}


def test_a_script_that_fails_is_quoted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, 'preset.settings={train:["optim.rate=1"]}']
    assert run_here(monkeypatch, *words, script="reproduce") == 2
    assert "optim.rate=1: optim.rate: there is no such setting" in capsys.readouterr().err
    words = [*WORDS, 'preset.settings={train:["optim.lr=-1"]}']
    assert run_here(monkeypatch, *words, script="reproduce") == 2
    said = "train of digits-tiny-biglearn_u-seed0: error: optim: lr must be a number in (0, inf)"
    assert said in capsys.readouterr().err


def test_a_run_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/smoke").mkdir(parents=True)
    (tmp_path / "out/smoke/digits-tiny-vae-seed0").write_text("a file where its folder would be")
    words = [*WORDS[:-1], "preset.methods=[vae,biglearn_u]", f"preset.settings={{train:{TRAIN}}}", "output_dir=out"]
    assert run_here(monkeypatch, *words, script="reproduce") == 2
    out, err = capsys.readouterr()
    assert "failed: train of digits-tiny-vae-seed0: " in err and "error: 1 of 2 runs failed:\ntrain of" in err
    assert "of what is there so far; the same command goes on" in out
    made = [path.stem for path in (tmp_path / "results/runs/smoke").iterdir()]
    assert (
        made == ["digits-tiny-biglearn_u-seed0"]
        and "| tiny | biglearn_u |" in (tmp_path / "results/README.md").read_text()
    )


def test_of_a_crash_it_is_said_what_it_was_and_where(tmp_path):
    code = "import faulthandler, os, signal, torch, sklearn.svm\nfaulthandler.enable()\n"
    code += "def inner():\n    os.kill(os.getpid(), signal.SIGSEGV)\nprint('step 1')\ninner()"
    (tmp_path / "crash.py").write_text(code)
    said = subprocess.run([sys.executable, tmp_path / "crash.py"], capture_output=True, text=True).stderr
    assert "Extension modules: " in said  # hundreds
    what, where, outer = experiments._end_of("step 1\n" + said).split(" / File ")
    assert what == "Fatal Python error: Segmentation fault"
    assert where.endswith('crash.py", line 4 in inner') and outer.endswith("line 6 in <module>")
    assert experiments._end_of("one\n\ntwo\nthree\nfour\n") == "two / three / four"
    assert len(experiments._end_of("x" * 5000)) == 300


def test_whatever_goes_wrong_with_a_run_is_of_that_run(tmp_path, monkeypatch):
    campaign = Campaign(preset(), "joint_elbo", tmp_path / "out", tmp_path / "results")
    wrong = {"vae": KeyError("commit"), "biglearn_u": OSError("no space left")}

    def call(worker, device, run, script):
        raise wrong[run.method]

    monkeypatch.setattr(campaign, "_call", call)
    assert not campaign.make(print)
    assert sorted(campaign.failures)[::2] == [
        "digits-tiny-biglearn_u-seed0: OSError: no space left",
        "digits-tiny-vae-seed0: KeyError: 'commit'",
    ]


def test_only_some_of_the_runs_are_made(tmp_path):
    def runs(only: str | None, **seeds) -> list[str]:
        own = preset(seeds=seeds or {"tiny": [0, 1], "case1": [0]})
        return [run.name for run in Campaign(own, "all", tmp_path, tmp_path, only=only).missing()]

    assert runs("vae seed0") == ["digits-tiny-vae-seed0", "digits-case1-vae-seed0"]
    assert runs("case1 vae digits") == runs("seed0 vae case1") == ["digits-case1-vae-seed0"]
    assert runs(None) == runs("") and len(runs(None)) == 6
    assert Campaign(preset(seeds={"tiny": []}), "all", tmp_path, tmp_path).missing() == []  # a preset without runs
    for only in ("vae biglearn_u", "seed", "vae-seed0"):
        with pytest.raises(ValueError, match=f'only must name runs, each by at most one data set, .* got "{only}"'):
            runs(only)
    of = r"digits; vae, biglearn_u; and of tiny seeds \[0, 1\], case1 seeds \[0\]"
    with pytest.raises(ValueError, match=f'preset=p has no runs of "vae case2": it has {of}'):
        runs("vae case2")


def test_runs_of_a_grid_are_named_by_its_levels(tmp_path):
    """As their folders are."""
    levels = {"beta 0.1": ["loss.beta=0.1"], "width 64": ["model.dim=64"]}
    own = preset(grid={"changed": levels}, scripts=["train"])

    def runs(only: str) -> list[str]:
        return [run.name for run in Campaign(own, "all", tmp_path, tmp_path, only=only).missing()]

    names = ["digits-tiny-vae-seed0-changed-beta-0.1", "digits-tiny-biglearn_u-seed0-changed-beta-0.1"]
    assert [run for run in runs("changed-beta-0.1") if "seed0" in run] == names
    assert runs("changed-beta-0.1 seed0 vae") == names[:1]
    for only in ("beta", "changed-beta-0.1 changed-width-64"):
        with pytest.raises(ValueError, match=f'got "{only}"; of changed changed-beta-0.1, changed-width-64$'):
            runs(only)
