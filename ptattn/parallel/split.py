"""`split_tokens` and `join_tokens`: every rank has a part of each sample's tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from .. import context
from ..geometry import WindowGrid
from ..memo import Memo
from .agreement import Agreement, bits
from .exchange import cut_input, gather_output, same_input
from .gradients import average
from .shares import Cut, Share, find_cut

Model = TypeVar("Model", bound=nn.Module)

# As torch.compile(dynamic=False) sets it.
_STATIC = {"automatic_dynamic_shapes": False, "assume_static_by_default": True}


def split_tokens(model: Model, mesh: DeviceMesh) -> Model:
    """Let the ranks of a mesh compute every sample together, each a part of its tokens.

    Calls stay as they are: every rank passes the same inputs and gets the same output. A backward
    pass gives every rank the gradients of one process: of inputs, and in the parameters' `.grad`,
    averaged once it is over (`torch.autograd.grad` does not reach parameters, as in DDP). The model
    may be fused, have LoRA's layers, checkpoint its blocks, be compiled, and be wrapped by DDP or
    FSDP2 on all ranks or on those of the data.

    Args:
        model: a PTDiT, or any module that holds PTDiT or ProxyAttention; the same on all ranks.
        mesh: of one dimension; its ranks share each sample. The call is made by all of them.

    Returns:
        The model, changed in place; its state dict is as it was.

    Raises:
        TypeError: no DeviceMesh.
        ValueError: a mesh of several dimensions, of another device type than the model, without
            this rank, or of GPUs with gloo; nothing in the model to split; other weights on other
            ranks.
        RuntimeError: split already, or no process group.

    Examples:
        >>> mesh = init_device_mesh("cuda", (8,))
        >>> model = split_tokens(model.cuda(), mesh)
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh; got {type(mesh).__name__}")
    if not dist.is_initialized():
        raise RuntimeError(
            "split_tokens needs a process group: torch.distributed.init_process_group"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, such as mesh['tokens'] of a mesh of several; got "
            f"{mesh.ndim} of shape {tuple(mesh.shape)}"
        )
    parts = _parts(model)
    if any(part.token_split is not None for part in parts):
        raise RuntimeError("the model is split already: join_tokens(model) first")
    types = {p.device.type for p in model.parameters()} - {"meta"}
    if types - {mesh.device_type}:
        raise ValueError(
            f"mesh must be of the model's device type, {', '.join(sorted(types))}; "
            f"got one of {mesh.device_type}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"this rank, {dist.get_rank()}, is not of the mesh, whose ranks are "
            f"{mesh.mesh.tolist()}: those alone call split_tokens"
        )
    if mesh.device_type != "cpu" and _backend(mesh) == "gloo":
        raise ValueError(
            f"ranks on {mesh.device_type} need a backend for it, such as nccl; got gloo, whose "
            "collectives of GPU tensors have crashed"
        )
    made = TokenSplit(mesh)
    made.agreement.check("the model given to split_tokens", _described(model))
    for part in parts:
        part.token_split = made
    return model


def join_tokens(model: Model) -> Model:
    """Undo `split_tokens`; no rank waits for others.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: nothing in the model can be split.
        RuntimeError: it is not split.
    """
    parts = [part for part in _parts(model) if part.token_split is not None]
    if not parts:
        raise RuntimeError("the model is not split")
    for part in parts:
        part.token_split = None
    return model


class TokenSplit:
    """What the parts of a split model share: the ranks, and how a call begins and ends."""

    def __init__(self, mesh: DeviceMesh) -> None:
        group = mesh.get_group()
        self.ranks, self.rank = group.size(), mesh.get_local_rank()
        self.group, self.members = group.group_name, dist.get_process_group_ranks(group)
        self.agreement = Agreement(group)
        self._known: Memo[tuple[Share, Share]] = Memo()
        # Parts of which values were compared: once, where looking at them waits for a GPU.
        self._compared = WeakSet[nn.Module]()
        # By the number of a backward pass that goes on; a reentrant checkpoint's is within another.
        self._passes: dict[int, list[nn.Module]] = {}

    @torch.compiler.disable
    def check(self, part: nn.Module, **inputs: Any) -> None:
        """Raise on all ranks unless they call the same with the same; the first step of a call.

        Raises:
            ValueError: other inputs on another rank, or a module with dropout, in training.
            RuntimeError: another rank has failed; within a CUDA graph's capture.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a model split by split_tokens cannot be captured in a CUDA graph")
        grad = torch.is_grad_enabled()
        said = {"mode": f"{_on(part.training, 'training')}, {_on(grad, 'grad')}"}
        if grad:
            trained = tuple(p.requires_grad for p in part.parameters())
            said["parameters"] = f"{sum(trained)} trained, of checksum {hash(trained)}"
        for name, value in inputs.items():
            for path, leaf in tree_flatten_with_path(value)[0]:
                said[name + keystr(path)] = _said(leaf, look=part not in self._compared)
        self.agreement.check(f"a call of {type(part).__name__}", said)
        self._compared.add(part)
        if part.training:  # so are the others, and raise too
            _refuse_dropout(part)

    @torch.compiler.disable(recursive=False)
    def share(
        self,
        part: nn.Module,
        compute: Callable[..., Tensor],
        grids: tuple[WindowGrid, WindowGrid],
        x: Tensor,
        *whole: Any,
        first: int,
        scale: int = 1,
    ) -> Tensor:
        """compute(proxies, windows, x, *whole) of this rank's part, joined with the others'.

        Args:
            part: whose call this is.
            compute: takes this rank's share of both grids and its box of x, and gives the same box
                of the output.
            grids: of the whole: of proxies and of windows.
            x: what all ranks have; its frames, rows and columns are dimensions `first` on.
            whole: what every rank takes whole: tensors, alone or within others.
            scale: rows and columns of x per token.
        """
        proxies, windows = self._shares(*grids)
        cut = windows.cut.scaled(1, scale, scale)
        box, given = self._cut(x, whole, windows, cut, first)
        # A plan is for one grid: with its numbers as symbols, a second one takes minutes to trace.
        with torch._dynamo.config.patch(_STATIC):  # where nothing is compiled, of no effect
            out = compute(proxies, windows, box, *given)
        return self._join(out, windows, cut, first, part)

    @torch.compiler.disable
    def _shares(self, proxies: WindowGrid, windows: WindowGrid) -> tuple[Share, Share]:
        """This rank's windows of both kinds, of those of the whole grid."""
        found = self._known.get((proxies, windows))
        if found is None:
            cut = find_cut(windows, proxies, self.ranks)
            own = [Share.of(grid, cut, self.rank, self.group) for grid in (proxies, windows)]
            found = self._known.keep((proxies, windows), (own[0], own[1]))
        return found

    @torch.compiler.disable
    def _cut(self, x: Tensor, whole: Any, share: Share, cut: Cut, first: int) -> Any:
        """This rank's box of x, and what it takes whole."""
        same = tree_map_only(Tensor, lambda t: same_input(t, share), whole)
        return cut_input(x, cut, share, first), same

    @torch.compiler.disable
    def _join(self, x: Tensor, share: Share, cut: Cut, first: int, part: nn.Module) -> Tensor:
        """The whole of what was cut; the call of `part` ends here."""
        return gather_output(x, cut, share, first, partial(self._begin_backward, part))

    def _begin_backward(self, part: nn.Module) -> None:
        """Average the gradients of a part's parameters once this backward pass is over."""
        now = context.backward_pass()
        if now not in self._passes:
            self._passes[now] = []
            queue = Variable._execution_engine.queue_callback
            end = partial(self._end_backward, now)
            queue(lambda: queue(end))  # after DDP's and FSDP's own, queued meanwhile
        self._passes[now].append(part)

    def _end_backward(self, number: int) -> None:
        parameters = (p for part in self._passes.pop(number) for p in part.parameters())
        average(parameters, self.members, self.group)

    def __deepcopy__(self, memo: Any) -> TokenSplit:
        return self  # a copy of a split model is split among the same ranks

    def __reduce__(self) -> Any:
        raise TypeError("a split model cannot be pickled: join_tokens(model) first")


def _backend(mesh: DeviceMesh) -> str | None:
    """Of the collectives of its device."""
    config = dist.get_backend_config(mesh.get_group())  # such as "cpu:gloo,cuda:nccl"
    return dict(part.split(":") for part in config.split(",")).get(mesh.device_type)


def _parts(model: nn.Module) -> list[Any]:
    """The modules that can be split, each by itself."""
    parts = [module for module in model.modules() if hasattr(type(module), "token_split")]
    if not parts:
        raise ValueError("there is nothing to split: no PTDiT and no ProxyAttention")
    return parts


def _described(model: nn.Module) -> dict[str, str]:
    """Names, shapes and values of all weights; of sharded ones, which differ, no values."""
    weights = (*model.named_parameters(), *model.named_buffers())
    return {
        name: f"{tuple(t.shape)} {t.dtype} {'trained' if t.requires_grad else 'frozen'}"
        + (f" {bits(t)}" if type(t) in (Tensor, nn.Parameter) and not t.is_meta else "")
        for name, t in weights
    }


def _refuse_dropout(part: nn.Module) -> None:
    for name, module in part.named_modules():
        if isinstance(module, _DropoutNd) and module.p and module.training:
            raise ValueError(
                f"{name} drops out in training, at random and so not alike on all ranks of a "
                f"split; its p must be 0; got {module.p}"
            )


def _said(leaf: Any, look: bool) -> str:
    """An input in words; its values where `look`, and where that waits for nothing."""
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    said = f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    if (autocast := context.autocast_dtype(leaf)) is not None:
        said += f" in autocast of {autocast}"
    said += " that requires grad" if leaf.requires_grad else ""
    look = (look or leaf.device.type == "cpu") and not leaf.is_meta
    return said + (f", values of checksum {bits(leaf)}" if look else "")


def _on(value: bool, name: str) -> str:
    return name if value else f"no {name}"
