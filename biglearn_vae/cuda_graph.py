"""A training step as one CUDA graph: a single launch in place of hundreds, each of which a GPU would wait for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FIRST = 3  # calls before the recording, as torch's documentation advises


class Recorded:
    """A function of a batch and some numbers, recorded as a CUDA graph and replayed with others.

    The first calls run as they are, so that what is kept from one to the next is there and what is compiled is
    compiled; the one after them is recorded.

    Args:
        function: (batch, *numbers) -> Tensor. It may change what it holds in place, such as weights; what it holds
            must stay where it is, its arguments of the same shapes, and nothing may be waited for. The numbers reach
            it as tensors (), the same ones in all calls.
        generators: what it draws from, seeded before each call.
    """

    def __init__(self, function: Callable[..., Tensor], generators: Sequence[torch.Generator]):
        self._function, self._generators, self._calls = function, generators, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, ...] = ()  # what the graph reads
        self._result = self._numbers = torch.empty(0)

    def __call__(self, batch: Tensor | tuple[Tensor, ...], *numbers: float) -> Tensor:
        """What the function returns for these.

        Raises:
            RuntimeError: if it cannot be recorded, since it waits for the device.
        """
        parts = batch if isinstance(batch, tuple) else (batch,)
        with torch.cuda.device_of(parts[0]):
            return self._call(batch, parts, numbers)

    def _call(self, batch: Tensor | tuple[Tensor, ...], parts: tuple[Tensor, ...], numbers: Sequence[float]) -> Tensor:
        # From memory that is not pinned, which is read before the call returns; the device is not waited for.
        values = torch.tensor(numbers).to(parts[0].device, non_blocking=True)
        self._calls += 1
        if self._calls <= FIRST:
            return self._aside(batch, values)
        if self._graph is None:
            self._batch, self._numbers = tuple(torch.empty_like(part) for part in parts), torch.empty_like(values)
            self._record(self._batch if isinstance(batch, tuple) else self._batch[0])
        for place, part in zip(self._batch, parts, strict=True):
            place.copy_(part)
        self._numbers.copy_(values)
        self._graph.replay()
        return self._result.clone()

    def _aside(self, batch: Tensor | tuple[Tensor, ...], values: Tensor) -> Tensor:
        """Call the function on a stream of its own, as it will be recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self._function(batch, *values.unbind())
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self, batch: Tensor | tuple[Tensor, ...]) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph):
                self._result = self._function(batch, *self._numbers.unbind())
        except RuntimeError as error:
            raise RuntimeError(
                f"the step cannot be a CUDA graph, in which nothing waits for the GPU (cuda_graph=false): {error}"
            ) from error
        self._graph = graph
