"""Processes that run one program after another."""

import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from biglearn_vae.workers import Worker


def act(what: str) -> None:
    """A program that does as it is told."""
    print(f"{what} in {os.getpid()} with {os.environ.get('SPICE')}")
    warnings.warn("take care", stacklevel=1)
    if what.isdigit():
        sys.exit(int(what))
    if what == "words":
        sys.exit("no more")
    if what == "raise":
        raise RuntimeError("oh")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "outside":
        os.system("echo from outside of Python")
    if what == "work on":
        while True:
            time.sleep(0.01)
    if what == "sleep":
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("asleep", flush=True)
        try:
            time.sleep(100)
        finally:
            signal.signal(signal.SIGTERM, before)


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def worker():
    result = Worker(act, {"SPICE": "salt"})
    yield result
    result.close()


def said(worker: Worker, what: str, log: Path) -> tuple[int, str]:
    code = worker.call((what,), log, never)
    return code, log.read_text()


def test_exit_codes_are_those_of_programs_and_all_are_of_one_process(worker, tmp_path):
    found = {what: said(worker, what, tmp_path / what) for what in ("work", "0", "7", "words", "raise", "outside")}
    assert [code for code, _ in found.values()] == [0, 0, 7, 1, 1, 0]
    processes = {text.split(" in ")[1].split()[0] for _, text in found.values()}
    assert len(processes) == 1 and str(os.getpid()) not in processes
    for what, (_, text) in found.items():  # each file has what was printed for it, and nothing of the others
        assert (
            text.startswith(f"{what} in ")
            and text.count(" with salt") == 1
            and text.count("UserWarning: take care") == 1
        )
    assert "no more" in found["words"][1] and "RuntimeError: oh" in found["raise"][1]
    assert "from outside of Python" in found["outside"][1]


def test_a_process_that_died_is_told_by_its_signal_and_replaced(worker, tmp_path):
    code, text = said(worker, "die", tmp_path / "log")
    assert code == -signal.SIGKILL
    again, other = said(worker, "work", tmp_path / "log")  # the file is written anew
    assert again == 0 and text.split()[2] != other.split()[2]
    code, text = said(worker, "crash", tmp_path / "log")
    assert code == -signal.SIGSEGV and "Segmentation fault" in text and f'"{__file__}", line ' in text


def test_it_is_asked_to_end_and_may_take_its_time(worker, tmp_path):
    log = tmp_path / "log"
    over = lambda: log.exists() and "asleep" in log.read_text()  # noqa: E731
    assert worker.call(("sleep",), log, over) == 5
    log.unlink()
    over = lambda: log.exists() and "work" in log.read_text()  # noqa: E731
    assert worker.call(("work on",), log, over) == 128 + signal.SIGTERM
    assert said(worker, "work", log)[0] == 0


def test_its_environment_yields_to_what_is_set_and_leaves_this_one_alone(worker, tmp_path, monkeypatch):
    monkeypatch.delenv("SPICE", raising=False)
    worker.close()
    code, text = said(worker, "work", tmp_path / "log")
    assert code == 0 and "with salt" in text and "SPICE" not in os.environ
    process = int(text.split()[2])
    os.kill(process, 0)
    worker.close()
    with pytest.raises(ProcessLookupError):  # no process is left
        os.kill(process, 0)
    monkeypatch.setenv("SPICE", "pepper")
    assert "with pepper" in said(worker, "work", tmp_path / "log")[1]
    assert os.environ["SPICE"] == "pepper"


def test_closing_what_never_started():
    Worker(act).close()
    Worker(act).kill()


def test_what_cannot_be_started_says_why(tmp_path):
    worker = Worker(lambda: None)  # no function of a module
    for _ in range(2):
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            worker.call((), tmp_path / "log", never)
    worker.close()


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    program = (
        "import os, sys, threading, pathlib; sys.path[:0] = sys.argv[2:]\n"
        "from test_workers import Worker, act, never\n"
        "if __name__ == '__main__':\n"
        "    log = pathlib.Path(sys.argv[1])\n"
        "    threading.Thread(target=Worker(act).call, args=(('sleep',), log, never), daemon=True).start()\n"
        "    while not (log.exists() and 'asleep' in log.read_text()): pass\n"
        "    os._exit(0)\n"
    )
    (tmp_path / "program.py").write_text(program)
    log = tmp_path / "log"
    subprocess.run([sys.executable, tmp_path / "program.py", log, str(Path(__file__).parent), *sys.path], check=True)
    process = int(log.read_text().split()[2])
    with pytest.raises(ProcessLookupError):
        for _ in range(3000):  # it sleeps for 100 seconds otherwise
            os.kill(process, 0)
            time.sleep(0.01)
