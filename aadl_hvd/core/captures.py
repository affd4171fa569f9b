"""Device work that is captured as CUDA graphs: the host then starts a whole piece by one launch.

With few rows the host's time to start kernels is what an acceleration step takes on a GPU.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.core.chunking import CHUNK_GPU


@dataclasses.dataclass
class _Known:
    """A piece of work under one key.

    Attributes:
        calls: how often it has run one operation at a time.
        graph: its graph; None: not captured yet.
        result: what it returned when it was captured. A replay writes it anew.
    """

    calls: int = 0
    graph: Any = None
    result: Tensor | None = None


class Captures:
    """Runs pieces of device work: at first one operation at a time, later as CUDA graphs.

    A graph does again what was started while it was captured, on the same memory. So a piece may
    only start work on the device, and its key has to say all that it depends on: numbers, and for
    each tensor from outside `where` it lies. Work on a processor is never captured, nor with so
    many rows that starting kernels takes no part of the time.

    Args:
        wanted: whether graphs are used at all.
        device: of the work.
        rows: of this rank.

    Attributes:
        failed: whether a capture has failed in this process. Then no new object captures anything.
    """

    failed = False
    WARM = 2  # calls before a piece is captured: libraries set themselves up in the first
    MOST = 32  # pieces that are remembered, those used last

    def __init__(self, wanted: bool, device: torch.device, rows: int) -> None:
        self._device = device
        may = wanted and not Captures.failed
        self._used = may and device.type == "cuda" and 0 < rows <= CHUNK_GPU
        self._known: dict[Hashable, _Known] = {}
        self._steady: dict[str, tuple[int, Tensor | None]] = {}  # see `steady`
        self._stream: Any = None  # of all captures: libraries keep memory for each stream

    @property
    def used(self) -> bool:
        """Whether pieces are captured."""
        return self._used

    def run(self, work: Callable[[], Tensor | None], *key: Hashable) -> Any:
        """Does a piece of work.

        Args:
            work: starts operations on the device and does nothing else.
            key: what the work is and all that it depends on.

        Returns:
            What `work` returned. Its memory is valid until a piece with the same key runs.
        """
        if not self._used:
            return work()
        known = self._known.pop(key, None) or _Known()
        self._known[key] = known  # the last one
        if len(self._known) > self.MOST:
            del self._known[next(iter(self._known))]
        if known.graph is None:
            known.calls += 1
            if known.calls <= self.WARM or not self._capture(known, work):
                return work()
        with torch.cuda.device(self._device):
            known.graph.replay()
        return known.result

    def forget(self) -> None:
        """Frees all graphs, and their memory."""
        self._known, self._steady = {}, {}

    def steady(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that may be a new one in every call, in memory that stays: for a key.

        Args:
            name: the same in every call for the same purpose.
            tensor: any; it is returned itself as long as all lay in one place.
        """
        if not self._used:
            return tensor
        first, copy = self._steady.get(name, (tensor.data_ptr(), None))
        if copy is None and tensor.data_ptr() == first:
            self._steady[name] = first, None
            return tensor
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._steady[name] = first, copy
        return copy.copy_(tensor)

    def _capture(self, known: _Known, work: Callable[[], Tensor | None]) -> bool:
        """Captures a piece, which does not do its work yet; False: it cannot be done here."""
        cuda: Any = torch.cuda
        # Old versions of torch leave the stream of a capture that fails the current one. The outer
        # context puts the stream of the training back.
        try:
            with cuda.device(self._device), cuda.stream(cuda.current_stream(self._device)):
                graph, self._stream = cuda.CUDAGraph(), self._stream or cuda.Stream()
                # Threads of Horovod and of NCCL may call CUDA meanwhile: only this one is watched.
                how = {"stream": self._stream, "capture_error_mode": "thread_local"}
                with cuda.graph(graph, **how):
                    result = work()
        except RuntimeError as error:
            self._used, Captures.failed = False, True
            self.forget()
            warnings.warn(
                f"cuda_graphs=True: a CUDA graph could not be captured ({error}). Steps go on "
                "without graphs. After a failed capture torch's random numbers and memory on this "
                "GPU may be unusable: begin again with cuda_graphs=False.",
                stacklevel=2,
            )
            return False
        known.graph, known.result = graph, result
        return True


def where(*tensors: Tensor) -> Hashable:
    """Where tensors lie, and what they are: equal only if a graph may be run again on them."""
    return tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)


def none() -> Captures:
    """Captures nothing."""
    return Captures(False, torch.device("cpu"), 0)
