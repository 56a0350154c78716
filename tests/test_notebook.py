"""The notebook, from top to bottom, on a model that it trains itself."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from programs import SMALL

from biglearn_vae import BigLearnVAE

TOUR = Path(__file__).parents[1] / "notebooks" / "tour.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run of all its cells; any error in one of them is raised here."""
    notebook = nbformat.read(TOUR, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOUR_RUN", str(tmp_path_factory.mktemp("outputs") / "tour"))
        patch.setenv("TOUR_SETTINGS", " ".join(SMALL))
        patch.setenv("OMP_NUM_THREADS", "1")  # as conftest.py does for this process
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell) -> list[str]:
    """What a cell puts out, text and pictures, in order; parts of one stream may come in several pieces."""
    found = ["picture" if "image/png" in output.get("data", {}) else output.output_type for output in cell.outputs]
    return [kind for k, kind in enumerate(found) if k == 0 or kind == "picture" or kind != found[k - 1]]


def test_every_cell_runs_and_says_or_shows_something(executed):
    silent = [cell.source.splitlines()[0] for cell in code_cells(executed) if not cell.outputs]
    assert silent == ["def show(rows, names=None, size=0.9):"]


def test_the_committed_outputs_are_of_the_same_cells(executed):
    committed = nbformat.read(TOUR, as_version=4)
    for cell, fresh in zip(code_cells(committed), code_cells(executed), strict=True):
        assert cell.execution_count == fresh.execution_count
        assert kinds(cell) == kinds(fresh)


def test_it_visits_every_capability():
    source = "\n".join(cell.source for cell in code_cells(nbformat.read(TOUR, as_version=4)))
    public = {name for name, member in vars(BigLearnVAE).items() if callable(member) and not name.startswith("_")}
    assert {name for name in public if f"vae.{name}(" not in source} == {"log_weights", "observe", "to"}
