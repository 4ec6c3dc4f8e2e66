"""Models and inputs whose tokens are split, and what the ranks of a mesh do with them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ptattn import ProxyAttention, flow, fuse, unfuse
from ptattn.models import ModelConfig, PTDiT
from ptattn.parallel import find_cut, split_tokens

TEXT: dict[str, Any] = dict(caption_channels=24)
CLASSES: dict[str, Any] = dict(caption_channels=None, num_classes=5)

# name: (grid of tokens, batch, fields of ModelConfig)
MODELS: dict[str, tuple[tuple[int, int, int], int, dict[str, Any]]] = {
    "image": ((1, 16, 16), 1, dict(window=(1, 4, 4), **TEXT)),
    "image-batch": ((1, 16, 16), 2, dict(window=(1, 4, 4), **TEXT)),
    "classes-ragged": ((1, 13, 23), 2, dict(window=(1, 4, 4), **CLASSES)),
    "unshifted": ((1, 16, 8), 1, dict(window=(1, 4, 4), shift=False, **TEXT)),
    "finer-proxies": ((1, 14, 16), 1, dict(window=(1, 4, 4), proxy_window=(1, 2, 2), **TEXT)),
    "coarser-proxies": ((1, 32, 8), 1, dict(window=(1, 4, 2), proxy_window=(1, 8, 4), **TEXT)),
    "crossing-proxies": ((1, 48, 4), 1, dict(window=(1, 4, 4), proxy_window=(1, 6, 4), **TEXT)),
    "one-window-on-an-axis": ((1, 3, 16), 1, dict(window=(1, 4, 4), **TEXT)),
    "window-of-one-row": ((1, 12, 5), 1, dict(window=(1, 1, 2), **TEXT)),
    "odd-window": ((1, 20, 6), 1, dict(window=(1, 5, 3), **TEXT)),
    "last-window-within-shift": ((1, 17, 4), 1, dict(window=(1, 4, 4), **TEXT)),
    "video": ((8, 8, 8), 1, dict(window=(2, 4, 4), **TEXT)),
    "video-ragged": ((7, 6, 9), 2, dict(window=(2, 4, 4), **CLASSES)),
    "frames-alone": ((6, 2, 2), 1, dict(window=(1, 4, 4), **CLASSES)),
    "paper-window": ((5, 12, 12), 1, dict(window=None, **TEXT)),
    "two-axes": ((1, 8, 8), 1, dict(window=(1, 4, 4), **TEXT)),
    "three-axes": ((4, 8, 8), 1, dict(window=(2, 4, 4), **TEXT)),
}


def model(name: str, dim: int = 32, dtype: torch.dtype = torch.float32) -> PTDiT:
    """The same on all ranks, no weight of it zero."""
    made = PTDiT(ModelConfig(2, dim, 2, **MODELS[name][2]))
    return randomized(made).to(dtype)


def randomized(made: Any) -> Any:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=random), alpha=0.1)
    return made


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    (f, h, w), batch, fields = MODELS[name]
    random = torch.Generator().manual_seed(2)
    made: dict[str, Any] = {
        "latents": torch.randn(batch, 4, f, 2 * h, 2 * w, generator=random).to(dtype),
        "timestep": torch.linspace(100, 900, batch, dtype=dtype),
    }
    if "num_classes" in fields:
        return {**made, "labels": torch.arange(batch)}
    mask = torch.arange(5) < torch.arange(3, 3 + batch)[:, None]
    caption = torch.randn(batch, 5, 24, generator=random).to(dtype)
    return {**made, "caption": caption, "caption_mask": mask}


def attention(**options: Any) -> ProxyAttention:
    return randomized(ProxyAttention(32, 2, (1, 4, 4), dtype=torch.float64, **options))


def measured(module: Any, **given: Any) -> dict[str, torch.Tensor]:
    """Output and gradients, of inputs that are floating too."""
    given = {
        name: value.clone().requires_grad_() if torch.is_floating_point(value) else value
        for name, value in given.items()
    }
    if given.get("latents", torch.empty(0)).dtype == torch.float64:
        given["timestep"].requires_grad_(False)  # its features are float32 in every model
    out = module(**given)
    out.backward(probe(out))
    found = {f"{name}.grad": t.grad for name, t in given.items() if t.grad is not None}
    for name, p in module.named_parameters():
        if p.grad is not None:
            found[name], p.grad = p.grad, None
    return {"output": out.detach(), **found}


def differences(ours: dict[str, Any], gold: dict[str, Any]) -> dict[str, float]:
    """Relative, of each tensor."""
    assert ours.keys() == gold.keys(), ours.keys() ^ gold.keys()
    found = {name: float((ours[name] - t).norm() / t.norm()) for name, t in gold.items()}
    if all(t.dtype == torch.float64 for t in gold.values()):
        return found
    # Where summands cancel, float32 rounds away more of a small parameter's gradient than a split
    # may change; so parameters count as one vector, and each by itself in float64.
    parts = [name for name in gold if name != "output" and not name.endswith(".grad")]
    error = sum(float((ours[name] - gold[name]).norm()) ** 2 for name in parts) ** 0.5
    length = sum(float(gold[name].norm()) ** 2 for name in parts) ** 0.5
    return {**{name: v for name, v in found.items() if name not in parts}, "all": error / length}


# What ranks do; each gets the mesh first.


def compare(mesh: Any, names: list[str], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Of models split and whole."""
    return {name: _compare(mesh, model(name, dtype=dtype), inputs(name, dtype)) for name in names}


def _compare(mesh: Any, made: Any, given: dict[str, Any], **around: Any) -> dict[str, float]:
    whole = measured(made, **given)
    return differences(measured(split_tokens(made, mesh), **given), whole)


def compare_attention(mesh: Any) -> dict[str, dict[str, float]]:
    """Of ProxyAttention by itself, in every form of its input."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    forms: dict[str, Any] = {
        "tokens": (dict(grid=(14, 8)), normal(2, 112, 32)),
        "image": ({}, normal(2, 16, 12, 32)),
        "video": ({}, normal(1, 4, 8, 9, 32)),
        "prenormed": (dict(prenormed=True), normal(1, 12, 8, 32)),
        "unshifted": (dict(shift=False), normal(1, 12, 8, 32)),
        "finer-proxies": (dict(proxy_window=(2, 2)), normal(1, 12, 8, 32)),
    }
    return {
        name: _compare(mesh, attention(**options), {"x": x}) for name, (options, x) in forms.items()
    }


def can_split(name: str, ranks: int) -> bool:
    grid, _, fields = MODELS[name]
    proxies, windows = ModelConfig(2, 32, 2, **fields).window_grids(grid)
    try:
        find_cut(windows, proxies, ranks)
    except ValueError:
        return False
    return True


# What a split is combined with.


def checkpointed(mesh: Any, **options: Any) -> dict[str, float]:
    made = model("video", dtype=torch.float64)
    gold = measured(made, **inputs("video", torch.float64))
    made.blocks.checkpoint(**options)
    return differences(measured(split_tokens(made, mesh), **inputs("video", torch.float64)), gold)


class Reentrant(nn.Module):
    """Two layers, the first of which has its backward pass within the whole's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = attention(), attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + checkpoint(self.first, x, use_reentrant=True)
        return x + self.second(x)


def reentrant(mesh: Any) -> dict[str, float]:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(1, 12, 8, 32, generator=random, dtype=torch.float64)
    return _compare(mesh, Reentrant(), {"x": x})


def in_anomaly_mode(mesh: Any) -> dict[str, float]:
    """Every gradient is looked at for NaN, which memory is full of that nothing is written to."""
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            return compare(mesh, ["image"], torch.float64)["image"]
    finally:
        torch.use_deterministic_algorithms(False)


def on_backend(mesh: Any, backend: str) -> dict[str, float]:
    config = ModelConfig(1, 32, 2, window=(1, 4, 4), **TEXT)
    made = randomized(PTDiT(config, backend=backend)).double()
    given = inputs("two-axes", torch.float64)
    gold = measured(made, **given)
    return differences(measured(split_tokens(made, mesh), **given), gold)


def fused(mesh: Any) -> dict[str, float]:
    made, given = model("video", dtype=torch.float64), inputs("video", torch.float64)
    gold = measured(made, **given)
    before = differences(measured(split_tokens(fuse(made), mesh), **given), gold)
    after = differences(measured(fuse(unfuse(made)), **given), gold)
    return {name: max(value, after[name]) for name, value in before.items()}


def accumulated(mesh: Any) -> dict[str, float]:
    """Two backward passes, the gradients of both added up."""
    made, given = model("image", dtype=torch.float64), inputs("image", torch.float64)
    gold = {name: 2 * t for name, t in measured(made, **given).items()}
    split_tokens(made, mesh)
    for _ in range(2):
        out = made(**given)
        out.backward(probe(out))
    return differences({n: p.grad for n, p in made.named_parameters()}, of(made, gold))


def with_adapters(mesh: Any) -> dict[str, float]:
    """LoRA's layers added to a model that is split already; what they are added to is frozen."""
    import peft  # takes seconds

    made, given = model("video", dtype=torch.float64), inputs("video", torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "q", "kv", "proj"], lora_dropout=0.0)
    torch.manual_seed(0)
    gold = measured(_trained(peft.inject_adapter_in_model(config, copy.deepcopy(made))), **given)
    torch.manual_seed(0)
    ours = _trained(peft.inject_adapter_in_model(config, split_tokens(made, mesh)))
    assert not ours.patch_embed.proj.weight.requires_grad
    return differences(measured(ours, **given), gold)


def guided(mesh: Any) -> dict[str, float]:
    """Two steps of sampling, whose caption is prepared once."""
    made, given = model("video", dtype=torch.float64), inputs("video", torch.float64)
    null = {"caption": given["caption"].flip(1), "caption_mask": given["caption_mask"]}
    condition = {name: given[name] for name in null}
    outs = []
    for part in (lambda: made, lambda: split_tokens(made, mesh)):
        predict, x = flow.Guided(part(), condition, null), given["latents"]
        with torch.no_grad():
            for level in (800, 400):
                x = x + 0.5 * predict(x, torch.full((1,), level), 3.0)
        outs.append({"latents": x})
    return differences(outs[1], outs[0])


def _trained(model: Any) -> Any:
    """As if its adapters had been trained: what starts at zero would hide their first halves."""
    random = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=random, dtype=torch.float64) / 10
    return model


def in_autocast(mesh: Any) -> dict[str, float]:
    """Of all, as one vector: what bfloat16 rounds is little of that."""
    made, given = model("video"), inputs("video")
    with torch.autocast("cpu", torch.bfloat16):
        gold = measured(made, **given)
        found = differences(measured(split_tokens(made, mesh), **given), gold)
    return {name: found[name] for name in ("output", "latents.grad", "all")}


def compiled(mesh: Any) -> dict[str, float]:
    """By torch's defaults, of one size after the other: the worst of them."""
    made = randomized(PTDiT(ModelConfig(1, 32, 2, window=(1, 4, 4), **TEXT))).double()
    first = inputs("two-axes", torch.float64)
    sizes = [torch.cat([first["latents"]] * n, dim) for n, dim in ((1, 3), (2, 3), (2, 4))]
    given = [{**first, "latents": latents} for latents in sizes]
    golds = [measured(made, **own) for own in given]
    torch._dynamo.reset()
    ours = torch.compile(split_tokens(made, mesh), backend="aot_eager")
    worst: dict[str, float] = {}
    for own, gold in zip(given, golds, strict=True):
        found = {n.removeprefix("_orig_mod."): t for n, t in measured(ours, **own).items()}
        for name, value in differences(found, gold).items():
            worst[name] = max(value, worst.get(name, 0.0))
    return worst


def in_ddp(mesh: Any) -> dict[str, float]:
    made, given = model("video", dtype=torch.float64), inputs("video", torch.float64)
    gold = measured(made, **given)
    wrapped = DistributedDataParallel(
        split_tokens(made, mesh), process_group=mesh.get_group(), gradient_as_bucket_view=True
    )
    ours = measured(wrapped, **given)
    return differences({n.removeprefix("module."): t for n, t in ours.items()}, gold)


def sharded(mesh: Any, first: bool) -> dict[str, float]:
    """Weights sharded over the ranks that share the tokens; before the split, or after it."""
    made, given = model("video", dtype=torch.float64), inputs("video", torch.float64)
    gold = measured(made, **given)
    steps = [partial(_shard, made, mesh), partial(split_tokens, made, mesh)]
    for step in steps if first else reversed(steps):
        step()
    return differences(_full(measured(made, **given)), gold)


def data_and_tokens(mesh: Any, sharding: str) -> dict[str, float]:
    """Two samples, each shared by two ranks; weights sharded over some of the four."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tokens"))
    made = model("video", dtype=torch.float64)
    first, second = inputs("video", torch.float64), inputs("video", torch.float64)
    second["latents"] = second["latents"].flip(-1)
    golds = [measured(made, **given) for given in (first, second)]
    gold = {name: (golds[0][name] + golds[1][name]) / 2 for name, _ in made.named_parameters()}
    if sharding == "nothing":
        wrapped = DistributedDataParallel(made, process_group=both["data"].get_group())
        split_tokens(made, both["tokens"])
    else:
        meshes = {"all": mesh, "data": both["data"], "both": both}
        _shard(made, meshes[sharding])
        wrapped = split_tokens(made, both["tokens"])
    own = both.get_coordinate()[0]
    ours = _full(measured(wrapped, **(first, second)[own]))
    ours = {name.removeprefix("module."): t for name, t in ours.items()}
    for name in ("output", "latents.grad", "caption.grad"):
        ours[name], gold[name] = ours.pop(name), golds[own][name]
    return differences(ours, gold)


def _shard(made: Any, mesh: Any) -> None:
    for block in made.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(made, mesh=mesh)


def _full(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}


def probe(out: torch.Tensor) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    return torch.randn(out.shape, generator=random).to(out)


def of(made: Any, found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name, _ in made.named_parameters()}


def of_any_batch(mesh: Any) -> dict[str, float]:
    """Of three samples in inference mode; an empty batch has a shape, and gradients."""
    made, given = model("image", dtype=torch.float64), inputs("image", torch.float64)
    three = {name: torch.cat([t, t.flip(-1), t]) for name, t in given.items()}
    with torch.inference_mode():
        gold = made(**three)
        out = split_tokens(made, mesh)(**three)
    empty = measured(made, **{name: t[:0] for name, t in given.items()})
    assert empty["output"].shape == (0, 8, 1, 32, 32)
    assert not empty["blocks.0.mlp.0.weight"].any()
    return differences({"output": out}, {"output": gold})


def partly_frozen(mesh: Any) -> dict[str, float]:
    """One layer of a late block trained, and then the latents' gradient alone asked for."""
    made, given = model("video", dtype=torch.float64), inputs("video", torch.float64)
    found = []
    for prepare in (lambda: made.requires_grad_(False), lambda: split_tokens(made, mesh)):
        prepare()
        weight = made.blocks[1].mlp[0].weight.requires_grad_(True)
        weight.grad = None
        out = made(**given)
        out.backward(probe(out))
        latents = given["latents"].clone().requires_grad_()
        out = made(**{**given, "latents": latents})
        (grad,) = torch.autograd.grad(out, latents, probe(out))
        found.append({"weight": weight.grad, "latents": grad})
        weight.requires_grad_(False)
    return differences(found[1], found[0])
