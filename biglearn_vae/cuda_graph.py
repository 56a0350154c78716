"""A training step as one CUDA graph: a single launch in place of hundreds, for each of which a GPU would wait."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

FIRST = 3  # calls before the recording, as torch's documentation advises
MANY = 2**24  # numbers that take a GPU longer than Python takes to launch a kernel for them

_recording = False


@contextmanager
def recording() -> Iterator[None]:
    """While entered, what runs is being recorded as a CUDA graph, or is about to be."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def is_worth_launching(numbers: int) -> bool:
    """Whether a kernel that Python launches pays off for this many numbers; while recording it always does."""
    return _recording or numbers >= MANY


class NotRecorded(RuntimeError):
    """A function cannot be recorded; the message says why."""


class StepGraph:
    """Records what a function does with a batch and some numbers as a CUDA graph, and replays it with others.

    The first calls run as they are, so that state kept between calls exists and everything is compiled; the one after
    them is recorded. From then on the Python code of the function no longer runs.

    Args:
        generators: what the function draws from, seeded before each call.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self._generators, self.calls = generators, 0
        self.replays = False  # whether the last call got as far as replaying
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._batch: tuple[Tensor, ...] = ()  # what the graph reads
        self._numbers = self._result = torch.empty(0)

    def __call__(self, function: Callable[..., Tensor], batch: Tensor | tuple[Tensor, ...], *numbers: float) -> Tensor:
        """What the function returns for these.

        Args:
            function: (batch, *numbers) -> Tensor, the same in all calls. It may change its state, such as weights, in
                place; this must stay at its place in memory, and the function must not wait for the device.
            batch: tensors on a GPU, of the same shapes and types in all calls; a list reaches the function as a tuple.
            numbers: they reach the function as tensors ().

        Raises:
            ValueError: for a batch that is not on a GPU, or has other shapes or types than before.
            NotRecorded: if the function waits for the device.
        """
        batch = tuple(batch) if isinstance(batch, list) else batch
        self.replays, parts = False, batch if isinstance(batch, tuple) else (batch,)
        if not parts or not all(isinstance(part, Tensor) and part.is_cuda for part in parts):
            kinds = (f"Tensor on {part.device}" if isinstance(part, Tensor) else type(part).__name__ for part in parts)
            raise ValueError(
                f"a CUDA graph takes a batch that is a tensor on a GPU or several, got {', '.join(kinds) or 'none'}; "
                "cuda_graph=False takes any"
            )
        with torch.cuda.device_of(parts[0]):
            # From memory that is not pinned, which is read before the call returns; the device is not waited for.
            values = torch.tensor(numbers).to(parts[0].device, non_blocking=True)
            self.calls += 1
            if self.calls <= FIRST:
                return self._aside(function, batch, values)
            if self._graph is None:
                self._batch, self._numbers = tuple(torch.empty_like(part) for part in parts), torch.empty_like(values)
                self._graph = self._record(function, self._batch if isinstance(batch, tuple) else self._batch[0])
            self._fill(parts, values)
            self.replays = True
            self._graph.replay()
            return self._result.clone()

    def _aside(self, function: Callable[..., Tensor], batch: Tensor | tuple[Tensor, ...], values: Tensor) -> Tensor:
        """Call the function on the stream on which it will be recorded."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), recording():
            result = function(batch, *values.unbind())
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _record(self, function: Callable[..., Tensor], batch: Tensor | tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self._stream), recording():
                self._result = function(batch, *self._numbers.unbind())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what ended the recording is behind what says that it has ended
            raise NotRecorded(str(error.__context__ or error).splitlines()[0]) from error
        return graph

    def _fill(self, parts: Sequence[Tensor], values: Tensor) -> None:
        """Put a batch and numbers where the graph reads them."""
        for place, part in zip(self._batch, parts, strict=True):
            if part.shape != place.shape or part.dtype != place.dtype:
                raise ValueError(
                    f"a CUDA graph takes batches of one shape and type, {tuple(place.shape)} of {place.dtype}, got "
                    f"{tuple(part.shape)} of {part.dtype}; cuda_graph=False takes any"
                )
            place.copy_(part)
        self._numbers.copy_(values)
