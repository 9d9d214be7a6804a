"""A layer's experts on a GPU, behind the interface that they have on the processor: rows and sums are in its memory.

Rows and sums cross through pinned memory, which the GPU reads and writes by itself, on a stream of their own: other
work of the process on the same GPU, as its trunk, isn't waited for. A dense layer's calls of few rows are replayed as a
CUDA graph: launching its kernels one by one takes longer than they do. Experts of a mixture are launched one by one,
since which of them run is different in each call.

Not run where it was written, on a machine without a GPU: ``make gpu-check`` compares it with the processor.
Sources: torch's notes on CUDA semantics (streams, pinned memory, "CUDA graphs").
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from daaswarm.errors import ExpertError
from daaswarm.models.devices import to_device, to_host
from daaswarm.models.experts import LayerExperts

GRAPH_ROWS = (1, 2, 4, 8)  # that graphs are made for; a call is filled up to the next of these with zeros
WARM_UP = 3  # calls before a capture: libraries choose their kernels and workspaces in the first ones


def get_graph_rows(rows: int) -> int | None:
    """The graph for a call of so many rows; ``None``: it is launched kernel by kernel."""
    return next((size for size in GRAPH_ROWS if size >= rows), None)


class Graph(NamedTuple):
    """A captured call. ``rows`` and ``sums`` stay where they are on the GPU: replaying reads and writes them."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor
    sums: Tensor


class CudaQueue:
    """One GPU's stream, shared by a model's layers there: one call at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = (
            torch.cuda.graph_pool_handle()
        )  # for graphs' own use: none runs beside another, nor reads what another left
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Launch on the stream, in this thread, during the block.

        Raises:
            ExpertError: the GPU's memory is full.
        """
        with self._lock, torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            try:
                yield
            except torch.cuda.OutOfMemoryError:
                raise ExpertError(f"the memory of {self.device} is full", hint="ask another replica") from None


class CudaLayer:
    """``experts.service.Layer`` on a GPU. Gradients are not offered.

    Args:
        layer: moved there; nothing else may use it from now on.
    """

    def __init__(self, layer: LayerExperts, queue: CudaQueue) -> None:
        self.ids, self.nbytes = layer.ids, layer.nbytes
        self._layer = layer.to(queue.device)
        self._queue = queue
        self._graphs: dict[int, Graph] = {}

    @torch.inference_mode()
    def compute_pairs(self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor) -> Tensor:
        """:meth:`LayerExperts.compute_pairs`, all tensors in the processor's memory."""
        device = self._queue.device
        with self._queue.computing():
            there = (to_device(each, device, each.dtype) for each in (rows, row_index, expert_index, weights))
            return to_host(self._layer.compute_pairs(*there), torch.float32)

    @torch.inference_mode()
    def compute_slices(self, rows: Tensor, slices: list[int]) -> Tensor:
        """:meth:`LayerExperts.compute_slices`, rows and sums in the processor's memory."""
        size = get_graph_rows(len(rows)) if slices == self.ids else None
        with self._queue.computing():
            there = to_device(rows, self._queue.device, rows.dtype)
            if size is None:
                return to_host(self._layer.compute_slices(there, slices), torch.float32)
            graph = self._graphs.get(size)
            if graph is None:
                graph = self._graphs[size] = self._capture(size, rows)
            graph.rows[len(rows) :].zero_()
            graph.rows[: len(rows)].copy_(there)
            graph.graph.replay()
            return to_host(graph.sums[: len(rows)], torch.float32)

    def _capture(self, size: int, like: Tensor) -> Graph:
        rows = torch.zeros((size, like.shape[1]), dtype=like.dtype, device=self._queue.device)
        for _ in range(WARM_UP):  # on the stream that captures
            self._layer.compute_slices(rows, self.ids)
        self._queue.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, as the trunk's, may use the GPU meanwhile.
        with torch.cuda.graph(
            graph, pool=self._queue.pool, stream=self._queue.stream, capture_error_mode="thread_local"
        ):
            sums = self._layer.compute_slices(rows, self.ids)
        return Graph(graph, rows, sums)
