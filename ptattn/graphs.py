"""A model as CUDA graphs: its GPU work captured once per input signature, then replayed.

A forward of hundreds of small kernels costs the host more than the GPU. A replay costs one launch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capture import CapturedGraph, CaptureError

LEAVES = (bool, int, float, complex, str, torch.dtype, torch.device, type(None))

TRAINING = (
    'for training: torch.compile(model, mode="reduce-overhead") or '
    "torch.cuda.make_graphed_callables, see docs/PLATFORM.md"
)


def graphed(model: nn.Module, *, max_graphs: int = 8) -> Any:
    """A callable that captures the model in CUDA graphs and replays them, for inference.

    The first call of an input signature runs the model twice, then captures it; the next ones copy
    the inputs, replay and copy the outputs. A signature is the shape, dtype and device of every
    tensor, the value of all else, the autocast state, and `model.training`.

    Args:
        model: on a GPU by the time it is called; may have come out of `torch.compile` in its
            default mode, or be fused.
        max_graphs: how many signatures are kept; beyond that the least recently used is
            dropped, once the new one is captured.

    Returns:
        A `Graphed`. It stands in for the model, also as a component of a diffusers pipeline.

    Raises:
        ValueError: max_graphs not positive.
        TypeError: no module, or one that is graphed already.

    Examples:
        >>> fast = ptattn.graphed(model.eval().cuda())
        >>> with torch.no_grad():
        ...     velocity = fast(latents, timestep, caption)
    """
    return Graphed(model, max_graphs)


class Graphed:
    """What `graphed` returns: a call replays a graph, everything else is the model's own.

    Attributes are read from and set on the model, methods are the model's, and those that return
    the model (`to`, `eval`) return this. A copy or a pickle is one of the model, without graphs.

    - Inputs are tensors, numbers, strings and None, in tuples, lists, dicts, named tuples and
      dataclasses. They are only read. A tensor that is the same object at the same `_version` as
      in the last call of its signature is not copied again; torch does not count what is written
      through `.data`, by other graphs or by other libraries.
    - Outputs belong to the caller.
    - Weights changed in place are read by the next replay. Other weights, buffers or modules
      (`to`, `load_state_dict(assign=True)`, LoRA added, scaled, merged or switched, `fuse`) are
      captured anew; those replaced stay in memory until then. What else a forward reads in Python,
      as a hook or a flag, is what it was at the capture: call `reset`.
    - Random numbers (dropout in training mode) come from torch's default CUDA generator, new ones
      for every replay, as `torch.manual_seed` says; they are not those of an eager call.
    - Calls from several threads take turns, and a call on another stream waits for the one before.
      While a signature is captured, no other thread may make the host wait for the GPU.

    Raises, when called:
        CaptureError: work that no graph can hold, such as `.item()`, or no memory for it.
        RuntimeError: gradients are asked for.
        TypeError: an input or output of another kind.
        ValueError: inputs on the CPU or on several devices, or no tensor among them.
    """

    def __init__(self, model: nn.Module, max_graphs: int = 8) -> None:
        if isinstance(model, Graphed):
            raise TypeError("model is graphed already")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        if not isinstance(max_graphs, int) or max_graphs < 1:
            raise ValueError(f"max_graphs must be a positive integer; got {max_graphs!r}")
        self.__model, self.__max_graphs = model, max_graphs
        self.__graphs: OrderedDict[Any, _Entry] = OrderedDict()
        self.__weights: _Weights | None = None
        self.__stream: Any = None
        self.__lock = threading.Lock()
        # diffusers writes a component's class and module into its index.
        self.__dict__["__module__"] = type(model).__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, key = self.__signature(args, kwargs)
        device = _one_device(tensors)
        if torch.is_grad_enabled() and (
            any(t.requires_grad for t in tensors.values())
            or any(p.requires_grad for p in self.__model.parameters())
        ):
            raise RuntimeError(
                "a graphed model has no gradients: call it under torch.no_grad() or "
                f"torch.inference_mode(); {TRAINING}"
            )
        with self.__lock:
            self.__look_at_weights()
            if key not in self.__graphs:
                self.__capture(key, tensors, args, kwargs)
            self.__graphs.move_to_end(key)
            self.__take_turn(device)
            return self.__graphs[key].run(list(tensors.values()))

    def reset(self) -> None:
        """Drop all graphs and their memory; the next call captures anew."""
        with self.__lock:
            self.__drop(len(self.__graphs))

    def __signature(self, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], Any]:
        """The tensors among the inputs by name, and what a graph is kept under."""
        tensors: dict[str, Tensor] = {}
        parts: list[Any] = [len(args)]
        for i, value in enumerate(args):
            _flatten(value, f"argument {i + 1}", tensors, parts)
        for name in sorted(kwargs):
            parts.append(name)
            _flatten(kwargs[name], name, tensors, parts)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return tensors, (tuple(parts), autocast, self.__model.training)

    def __capture(self, key: Any, tensors: Mapping[str, Tensor], args: Any, kwargs: Any) -> None:
        pool = next(iter(self.__graphs.values())).graph.pool if self.__graphs else None

        def function(inputs: Sequence[Tensor]) -> Any:
            static = iter(inputs)
            # In the order of `__signature`: what was given by position, then by name.
            positional = [_map(value, lambda _: next(static)) for value in args]
            named = {n: _map(kwargs[n], lambda _: next(static)) for n in sorted(kwargs)}
            output = self.__model(*positional, **named)
            return _map(output, lambda t: t)  # TypeError if a call could not copy it

        shown = ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in tensors.items())
        try:
            name = f"{type(self.__model).__name__} with {shown}"
            graph = CapturedGraph(function, list(tensors.values()), pool, name)
        except CaptureError:
            self.__drop(len(self.__graphs))  # they share a pool with what was left half done
            raise
        self.__look_at_weights()  # offloading moves them in a call
        self.__weights = self.__weights or _Weights(self.__model)
        self.__graphs[key] = _Entry(graph, _kept(self.__model))
        self.__drop(len(self.__graphs) - self.__max_graphs)

    def __look_at_weights(self) -> None:
        """Drop all graphs where weights have been replaced."""
        if self.__weights is not None and not self.__weights.unchanged():
            self.__drop(len(self.__graphs))

    def __drop(self, count: int) -> None:
        """The least recently used; the GPU may still be at the last replay."""
        if count > 0 and self.__stream is not None:
            self.__stream.synchronize()
        for _ in range(count):
            self.__graphs.popitem(last=False)
        if not self.__graphs:
            self.__weights = None

    def __take_turn(self, device: torch.device) -> None:
        """Graphs share their memory, so a replay on another stream waits for the one before."""
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if self.__stream is not None and self.__stream != stream:
            stream.wait_stream(self.__stream)
        self.__stream = stream

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_Graphed__"):  # not set yet: a copy is being made
            raise AttributeError(name)
        model = self.__model
        value = getattr(model, name)
        if getattr(value, "__self__", None) is not model:
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is model else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_Graphed__"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.__model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__model, name)

    @property  # type: ignore[misc, override]
    def __class__(self) -> type:
        """The model's, so that `isinstance` and diffusers take this for it."""
        return type(self.__model)

    def __reduce__(self) -> Any:
        return Graphed, (self.__model, self.__max_graphs)

    def __repr__(self) -> str:
        return f"graphed({self.__model!r})"


class _Entry:
    """A graph, the tensors that its inputs are copies of, and what it reads beside them."""

    def __init__(self, graph: CapturedGraph, kept: list[Any]) -> None:
        self.graph, self.kept = graph, kept
        self.sources = [_Source()] * len(graph.inputs)

    def run(self, tensors: Sequence[Tensor]) -> Any:
        for i, (static, tensor) in enumerate(zip(self.graph.inputs, tensors, strict=True)):
            if not self.sources[i].holds(tensor):
                static.copy_(tensor.detach())
                # The work may write to its input; what it has written to is copied at every call.
                self.sources[i] = _Source() if self.graph.written[i] else _Source(tensor)
        return _map(self.graph.replay(), Tensor.clone)


class _Source:
    """A tensor and its state. An inference tensor has none: torch does not count its changes."""

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.tensor, self.state = None, None
        if tensor is not None and not tensor.is_inference():
            self.tensor = weakref.ref(tensor)  # its id and address may be another's once it is gone
            self.state = tensor.data_ptr(), tensor._version

    def holds(self, tensor: Tensor) -> bool:
        return (
            self.tensor is not None
            and self.tensor() is tensor
            and self.state == (tensor.data_ptr(), tensor._version)
        )


class _Weights:
    """Where the weights of a model lie, and whether they still do."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.types = list(map(type, self.modules))  # fusing changes them
        self.tables: list[dict[str, Any]] = [m._modules for m in self.modules]
        for module in self.modules:
            self.tables += module._parameters, module._buffers
        self.filled = [table for table in self.tables if table]
        self.sizes, self.values = self._sizes(), list(self._values())
        self.tensors = [t for value in self.values for t in _plain_tensors(value)]
        self.addresses = self._addresses()
        self.adapters = [vars(m) for m in self.modules if isinstance(vars(m).get("scaling"), dict)]
        self.switches = self._switches()

    def unchanged(self) -> bool:
        """At every call: no loop of Python's over a thousand weights."""
        return (
            list(map(type, self.modules)) == self.types
            and self._sizes() == self.sizes
            and all(map(operator.is_, self._values(), self.values))
            and self._addresses() == self.addresses
            and (not self.adapters or self._switches() == self.switches)
        )

    def _switches(self) -> list[Any]:
        """What peft's layers read in Python: scales, and which adapters are on, off or merged."""
        names = "_active_adapter", "merged_adapters"
        return [
            (dict(a["scaling"]), a.get("_disable_adapters"), *(tuple(a.get(n, ())) for n in names))
            for a in self.adapters
        ]

    def _sizes(self) -> list[int]:
        return list(map(len, self.tables))

    def _values(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self.filled))

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))


def _plain_tensors(value: Any) -> list[Tensor]:
    """A weight, or what a quantized one is made of; nothing of a module."""
    if not isinstance(value, Tensor):
        return []
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [
        t for name in value.__tensor_flatten__()[0] for t in _plain_tensors(getattr(value, name))
    ]


def _kept(model: nn.Module) -> list[Any]:
    """What modules keep in attributes beside weights: tensors among it are read where they lie,
    also by a graph that outlives them there."""
    kept: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if isinstance(value, dict):
                kept += value.values()
            elif isinstance(value, Tensor | tuple | list):
                kept += value if isinstance(value, list) else [value]
    return kept


def _flatten(value: Any, name: str, tensors: dict[str, Tensor], parts: list[Any]) -> None:
    """Collect the tensors in a value by name, and append what else it is made of to `parts`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        parts += value.shape, value.dtype, value.device
    elif isinstance(value, LEAVES):
        # By its digits: 0.0 is equal to -0.0, and NaN to nothing.
        parts += type(value), value.hex() if isinstance(value, float) else value
    else:
        items = _items(value, name)
        parts += type(value), tuple(items)
        for key, item in items.items():
            _flatten(item, f"{name}[{key!r}]", tensors, parts)


def _map(value: Any, function: Callable[[Tensor], Tensor], name: str = "output") -> Any:
    """The value with `function` of every tensor in it, in the order of `_flatten`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, LEAVES):
        return value
    items = {
        key: _map(item, function, f"{name}[{key!r}]") for key, item in _items(value, name).items()
    }
    made: Any = type(value)
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        return made(**items)
    return made(items if isinstance(value, dict) else list(items.values()))


def _items(value: Any, name: str) -> dict[Any, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return value
    if isinstance(value, tuple | list):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    raise TypeError(
        f"{name} must be a tensor, a number, a string or None, or a tuple, list, dict or "
        f"dataclass of them; got {type(value).__name__}"
    )


def _one_device(tensors: Mapping[str, Tensor]) -> torch.device:
    if not tensors:
        raise ValueError("a graphed model takes at least one tensor; got none")
    (first, one), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != one.device:
            raise ValueError(
                f"a graphed model takes all its inputs on one device; got {first} on {one.device} "
                f"and {name} on {tensor.device}"
            )
    return one.device
