"""One CUDA graph: a function's GPU work, captured and replayed."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class CaptureError(RuntimeError):
    """A model's work on these inputs cannot be captured; the model itself still runs."""


class CapturedGraph:
    """A function's GPU work on tensors that stay where they are.

    Args:
        function: takes a list of tensors like `inputs`.
        inputs: on one CUDA device, in any layout.
        pool: of other graphs to share memory with, which never run at the same time; or None.
        name: of the function and its inputs, for errors.

    Raises:
        CaptureError: the work cannot be captured, or there is no memory for it. What the function
            itself raises on its first run comes through as it is.
        ValueError: inputs elsewhere.
    """

    def __init__(
        self, function: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor], pool: Any,
        name: str,
    ) -> None:  # fmt: skip
        device = inputs[0].device
        if device.type != "cuda":
            found = "" if torch.cuda.is_available() else ", and torch finds none here"
            raise ValueError(
                f"a CUDA graph needs a CUDA device{found}; got inputs on {device}: {name}. "
                "Call the model itself"
            )
        torch.cuda.synchronize(device)
        stream, warm, capturing = _capture_stream(device), False, False
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        with torch.cuda.device(device), torch.cuda.stream(stream), _plain_inference():
            try:
                self.inputs = [t.detach().clone() for t in inputs]
                function(self.inputs)  # compiles kernels and makes workspaces
                warm = True
                # What makes the host wait would break the capture, and in some versions of torch
                # the random generator with it: found out before, it breaks nothing.
                with _refuse_waiting():
                    function(self.inputs)
                before = [t._version for t in self.inputs]
                self._graph, capturing = torch.cuda.CUDAGraph(), True
                with torch.cuda.graph(
                    self._graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self.outputs = function(self.inputs)
                # Which of the inputs it writes to.
                self.written = [t._version != v for t, v in zip(self.inputs, before, strict=True)]
            except Exception as error:
                # The end of a broken capture raises over what broke it.
                cause = error.__context__ or error
                memory = isinstance(cause, torch.cuda.OutOfMemoryError)
                if not warm and not memory:
                    raise
                if capturing:
                    _mend(device, self.pool)
                raise CaptureError(_reason(name, cause, memory)) from error
        torch.cuda.synchronize(device)

    def replay(self) -> Any:
        """Run it on what `inputs` hold; the result is overwritten by the next replay."""
        self._graph.replay()
        return self.outputs


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, which share memory only where they share the stream."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _plain_inference() -> Iterator[None]:
    """No gradients, nor inference tensors, which could not be written to later. Autocast as it is,
    without its cache: a graph would read copies of weights that are gone after the context."""
    autocast = torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


@contextlib.contextmanager
def _refuse_waiting() -> Iterator[None]:
    """Operations that make the host wait for the GPU raise."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not find them all
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _mend(device: torch.device, pool: Any) -> None:
    """Undo what a broken capture leaves in torch, before 2.13 at least."""
    # The random generator waits for the end of the capture. A copy of it does not.
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())
    # The allocator goes on looking for work of the capture. Where it has stopped, it says so.
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)


def _reason(name: str, cause: BaseException, memory: bool) -> str:
    said = str(cause).strip().partition("\n")[0] or type(cause).__name__
    text = f"cannot capture {name} in a CUDA graph: {said}. "
    if memory:
        return text + "Take smaller inputs, keep fewer graphs, or call the model itself"
    return text + (
        "A graph holds work of the GPU alone: no .item(), no copies from or to the CPU, no shapes "
        "that depend on values. Call the model itself for these inputs"
    )
