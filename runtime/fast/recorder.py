"""Recording work on a CUDA device, to be queued again at the cost of one call.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".
"""

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """How work on a device is recorded."""

    def run(self, work: Work) -> torch.Tensor:
        """Do the work without recording, as it has to be done once before."""

    def record(self, work: Work) -> Work:
        """Return what does the work again, on what then lies in the same memory, and gives a tensor of its own.

        Raises:
            RuntimeError: it cannot be recorded; the device is as it was before.
        """


class CudaRecorder:
    """Records CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        # Of its own: the stream that torch takes by itself belongs to the first device that ever recorded.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Work) -> torch.Tensor:
        """Do the work on the stream of the recordings, in order with the current one."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = work()
        current.wait_stream(self._stream)
        output.record_stream(current)
        return output

    def record(self, work: Work) -> Work:
        """Capture the work. Other threads may use the device meanwhile."""
        device, graph = self._stream.device, torch.cuda.CUDAGraph()
        # The outer context selects the device, and restores the stream when a capture that failed does not.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = work()

        def replay() -> torch.Tensor:
            with torch.cuda.device(device):
                graph.replay()
                return output.clone()  # the next replay writes to the same place

        return replay
