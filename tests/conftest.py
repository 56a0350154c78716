"""Small networks that several test files share."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from programs import SMALL, run_here

from biglearn_vae import TwoStackViT, UniversalViT

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell that runs the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # networks this small only lose by several

TINY = dict(grid=(2, 3), token_dim=5, dim=16, z_dim=3, heads=2)  # L = 6, D = 5, Z = 3


@pytest.fixture(params=["universal", "two-stack", "drop"])
def tiny_net(request):
    """Both networks, tiny, in float64, with no parameter at a special value such as a zero bias."""
    torch.manual_seed(0)
    kinds = {
        "universal": lambda: UniversalViT(**TINY, depth=3),
        "two-stack": lambda: TwoStackViT(**TINY, depth=(2, 1)),
        "drop": lambda: UniversalViT(**TINY, depth=3, hidden="drop"),
    }
    net = kinds[request.param]()
    net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return net


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The commands run inside this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """A folder in which outputs/run was trained with the settings of SMALL."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_here(patch, *SMALL, "name=run") == 0
    return folder


@pytest.fixture
def trained(here, once):
    """A copy of that run, to begin with."""
    return Path(shutil.copytree(once / "outputs/run", here / "outputs/run"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
