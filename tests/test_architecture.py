"""What holds for the package as a whole: its floors, its import, its functions' length."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "biglearn_vae"
FLOORS = [
    {"files", "checks", "array_files", "kernels", "cuda_graph", "workers", "states", "sheets"},
    {"patches", "gaussian", "attention", "biases", "norms", "distributed", "masks", "image_files", "checkpoint"},
    {"layers", "torch_datasets", "patch_ae", "annealing", "optim", "observations"},
    {"data"},
    {"models", "losses"},
    {"capabilities", "loggers"},
    {"trainer", "evaluation", "figures", "gibbs", "samples"},
    {"config", "benchmark", "completion", "probe"},
    {"runs"},
    {"stages", "experiments", "time_to_quality"},
    {"results_page", "search"},
    {"commands"},
    {"__main__"},
]
MODULES = sorted(PACKAGE.glob("*.py"))


def floor_of(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if module in floor)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "biglearn_vae":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("biglearn_vae."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=lambda p: p.stem)
def test_a_module_imports_only_from_lower_floors(path):
    for name in imported(path):
        assert floor_of(name) < floor_of(path.stem), f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_only_the_uppermost_floors_know_hydra(path):
    if path.stem not in ("config", "runs", "stages", "search", "commands"):
        assert not any(
            "hydra" in ast.unparse(node) or "omegaconf" in ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_function_is_longer_than_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.stem}.{node.name}"


def test_the_annotations_agree_with_each_other(tmp_path):
    """As `mypy` by itself has it, but of what other packages annotate nothing is known, which takes a fifth of the time
    and depends on none of their versions."""
    others = "torch torchvision numpy scipy matplotlib PIL omegaconf hydra sklearn tensorboard einops optuna triton"
    section = ",".join(f"{name}.*" for name in others.split())
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    lines = ["[mypy]", *(f"{name} = {value}" for name, value in settings.items() if name != "files")]
    lines += [f"[mypy-{section}]", "follow_imports = skip"]
    (tmp_path / "mypy.ini").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_heavy_modules_are_left_alone():
    heavy = {"hydra", "omegaconf", "torchvision", "matplotlib", "sklearn", "tensorboard", "PIL"}
    code = (
        "import sys, torch; before = set(sys.modules); import biglearn_vae; biglearn_vae.images('digits', 'test');"
        f"print(sorted({{m.split('.')[0] for m in set(sys.modules) - before}} & {heavy}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
