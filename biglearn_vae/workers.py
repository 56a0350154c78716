"""Processes that run one program after another: libraries are imported, and a GPU is woken, once for all of them."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_STARTING = threading.Lock()  # a process takes its environment from this one's, of which there is one for all threads


class Worker:
    """A process in which a function is called again and again; it starts with the first call, and anew if it died.

    Processes are spawned: if this one runs a script, that must do nothing when it is imported (`if __name__ == ...`).

    Args:
        function: a function of a module, which the process imports. It may end as a program does, by SystemExit.
        environment: variables that are set in the process, except those that this one's environment sets already.
    """

    def __init__(self, function: Callable[..., Any], environment: Mapping[str, str] | None = None):
        self._function, self._environment = function, dict(environment or {})
        self._process: Any = None
        self._connection: Connection | None = None

    def call(self, arguments: tuple, log: Path, over: Callable[[], bool]) -> int:
        """Call the function, with all that it prints in a file, and wait for its end.

        Args:
            arguments: of the function; they are pickled.
            log: the file, which is written anew.
            over: asked five times a second; once it is true the process gets SIGTERM, and may take its time to end.

        Returns:
            The exit code that a program of this function has: 0 unless SystemExit says otherwise, 1 for any other
            exception, whose traceback is in the file, 143 after SIGTERM, and minus its number for a signal that ended
            the process.
        """
        log.write_bytes(b"")
        connection = self._running()
        try:
            connection.send((arguments, str(log)))
            wait = 0.2
            while not connection.poll(wait):
                if over():
                    self._process.terminate()
                    wait = 10  # and again then: Python may lose an exception that is raised at a bad moment
            return connection.recv()
        except (EOFError, OSError):
            self.close()
            return self._process.exitcode

    def kill(self) -> None:
        """End the process at once, if there is one, whatever it does."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Let the process end, if there is one. It must not be in a call."""
        if self._connection is not None:
            self._connection.close()
            self._process.join()
            self._connection = None

    def _running(self) -> Connection:
        """The connection to the process, which is started if there is none."""
        if self._process is not None and not self._process.is_alive():
            self.close()
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._function))
            with theirs, _STARTING, defaults(self._environment), _without_interrupts():
                process.start()
            self._process, self._connection = process, ours
        return self._connection


@contextmanager
def defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment while entered, except those that it already has."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal: one that starts meanwhile is not to be interrupted by it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # whose start would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    """Call a function with what comes, until nothing does any more, and answer with its exit codes."""
    faulthandler.enable()  # what crashes, in Python's words, is at the end of its file
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    signal.signal(signal.SIGTERM, _exit)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            arguments, log = connection.recv()
        except EOFError:
            return
        _print_into(log)
        code = _exit_code(function, arguments)
        gc.collect()  # networks and optimizers refer to themselves
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # for the other processes on this GPU
        with suppress(OSError):  # nobody is there any more
            connection.send(code)


def _exit(number: int, _) -> None:
    sys.exit(128 + number)


def _end_with_parent() -> None:
    """Ask this process to end once the one that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _print_into(log: str) -> None:
    """Send what this process prints, from Python or not, to the end of a file."""
    with open(log, "ab") as file:
        stream: Any  # an io.TextIOWrapper, in a process that Python has just started
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), number)
            stream.reconfigure(line_buffering=True)


def _exit_code(function: Callable[..., Any], arguments: tuple) -> int:
    """The exit code of a program that calls this function; why it failed is printed on stderr."""
    try:
        with warnings.catch_warnings():  # what was warned of before is warned of again
            function(*arguments)
        return 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
