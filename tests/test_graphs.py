"""Graphs without a GPU: all but the capture itself, which runs again in place of a replay."""

import copy
import dataclasses
import pickle
import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ptattn
from ptattn import checkpoint, graphs
from ptattn.capture import CaptureError
from tests.models.test_models import NAMES, condition_for, small


class Rerun:
    """What a CapturedGraph is to its user: static inputs and outputs, and a replay between them."""

    made = 0

    def __init__(self, function, inputs, pool, name):
        type(self).made += 1
        self.function, self.name, self.pool = function, name, object()
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [t.detach().clone() for t in inputs]
            before = [t._version for t in self.inputs]
            self.outputs = function(self.inputs)
            self.written = [t._version != v for t, v in zip(self.inputs, before, strict=True)]

    def replay(self):
        with torch.inference_mode(False), torch.no_grad():
            fresh = []
            graphs._map(self.function(self.inputs), lambda t: fresh.append(t) or t)
            static = iter(fresh)
            graphs._map(self.outputs, lambda t: t.copy_(next(static)))
        return self.outputs


@pytest.fixture
def captures(monkeypatch):
    """Counts captures, which run on the CPU here."""
    monkeypatch.setattr(graphs, "CapturedGraph", Rerun)
    monkeypatch.setattr(Rerun, "made", 0)
    return lambda: Rerun.made


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclasses.dataclass(frozen=True)
class Prepared:
    keys: tuple[Tensor, ...]
    scale: float


class Product(nn.Module):
    """Something with a weight, which counts how often Python runs it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.calls = 0

    def forward(self, x, *others, factor=1.0, prepared=None, pair=None, named=None):
        self.calls += 1
        out = x * self.weight * factor
        if prepared is not None:
            out = out + sum(prepared.keys) * prepared.scale
        if pair is not None:
            out = out + pair.first
        if named is not None:
            out = out + named["a"][0]
        return Pair(out, None)


@pytest.mark.parametrize("name", NAMES)
def test_the_models(name, captures):
    model = small(name).eval()
    fast = ptattn.graphed(model)
    for _ in range(3):
        inputs = torch.randn(2, 4, 8, 12), torch.tensor([10.0, 700.0]).expand(2)
        condition = condition_for(model, 2)
        assert torch.equal(fast(*inputs, **condition), model(*inputs, **condition))
    assert captures() == 1


def test_one_capture_for_each_signature(captures, monkeypatch):
    fast = ptattn.graphed(Product(), max_graphs=20)
    x, half = torch.ones(3), torch.ones(3, dtype=torch.half)
    pair, prepared = Pair(x, None), Prepared((x, x), 2.0)
    calls = [
        (lambda: fast(x), 2),
        (lambda: fast(torch.ones(1)), 2),
        (lambda: fast(half), 2),
        (lambda: fast(x, factor=3.0), 6),
        (lambda: fast(x, factor=3), 6),
        (lambda: fast(x, factor=True), 2),
        (lambda: fast(x, factor=1), 2),
        (lambda: fast(x, pair=pair), 3),
        (lambda: fast(x, pair=pair._replace(second=x)), 3),
        (lambda: fast(x, prepared=prepared), 6),
        (lambda: fast(x, prepared=Prepared((x, x), 3.0)), 8),
        (lambda: fast(x, prepared=Prepared((x,), 3.0)), 5),
        (lambda: fast(x, named={"a": [x], "b": None, "c": "text"}), 3),
        (lambda: fast(x, None), 2),
    ]
    for _ in range(2):
        for call, expected in calls:
            assert call().first.eq(expected).all()
        assert captures() == len(calls)
    fast.eval()
    fast(x)
    assert captures() == len(calls) + 1
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    for dtype in (torch.half, torch.bfloat16, torch.half):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
        fast(x)
    assert captures() == len(calls) + 3


def test_nested_inputs_are_told_apart(captures):
    """Names of inputs are unique whatever the keys: no tensor takes another's place."""

    class Sum(nn.Module):
        def forward(self, x):
            return x["a.b"] + 10 * x["a"]["b"] + 100 * x["a"]["b']['c"]

    one, two, three = (torch.full((1,), float(i)) for i in (1, 2, 3))
    assert ptattn.graphed(Sum())({"a.b": one, "a": {"b": two, "b']['c": three}}) == 321


def test_outputs_belong_to_the_caller(captures):
    fast = ptattn.graphed(Product())
    first = fast(torch.ones(2)).first
    second = fast(torch.full((2,), 5.0)).first
    assert first.eq(2).all()
    assert second.eq(10).all()
    second.zero_()
    assert fast(torch.full((2,), 5.0)).first.eq(10).all()


def test_more_signatures_than_are_kept(captures):
    fast = ptattn.graphed(Product(), max_graphs=2)

    def run(n):
        assert fast(torch.ones(n)).first.shape == (n,)

    for n in (1, 2, 1, 3):  # 2 was used least recently
        run(n)
    assert captures() == 3
    run(1)
    assert captures() == 3
    run(2)
    assert captures() == 4
    run(1)
    assert captures() == 4
    run(3)
    assert captures() == 5
    fast.reset()
    run(3)
    assert captures() == 6


def test_the_only_graph_replaced_by_another(captures):
    """Weights are looked at from then on, too."""
    model = Product()
    fast = ptattn.graphed(model, max_graphs=1)
    for n in (1, 2):
        fast(torch.ones(n))
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    assert torch.equal(fast(torch.ones(2)).first, model(torch.ones(2)).first)
    assert captures() == 3


def test_a_model_that_writes_to_its_input(captures):
    """Its copy was written to by every replay, and the untouched original not copied again."""
    fast, x = ptattn.graphed(nn.Sequential(nn.SiLU(inplace=True), nn.SiLU())), torch.ones(3)
    expected = nn.functional.silu(nn.functional.silu(x))
    for _ in range(3):
        assert torch.equal(fast(x), expected)
    assert torch.equal(x, torch.ones(3))


def test_signs_of_zero_are_told_apart(captures):
    class Signed(nn.Module):
        def forward(self, x, sign):
            return torch.copysign(x, torch.tensor(sign))

    fast, x = ptattn.graphed(Signed()), torch.ones(2)
    assert fast(x, 0.0).eq(1).all()
    assert fast(x, -0.0).eq(-1).all()
    assert fast(x, float("nan")).isfinite().all()
    fast(x, float("nan"))
    assert captures() == 3


def copies(monkeypatch):
    """Counts copies into static inputs."""
    made, copy_ = [], Tensor.copy_

    def counted(self, *args):
        made.append(self)
        return copy_(self, *args)

    monkeypatch.setattr(Tensor, "copy_", counted)
    return made


def test_only_what_has_changed_is_copied(captures, monkeypatch):
    class First(nn.Module):
        def forward(self, x, kept):
            return None

    fast = ptattn.graphed(First())
    made = copies(monkeypatch)

    def copied(*inputs):
        made.clear()
        fast(*inputs)
        return len(made)

    kept, x = torch.ones(2), torch.ones(3)
    assert copied(x, kept) == 2
    assert copied(x, kept) == 0
    assert copied(torch.ones(3), kept) == 1
    kept += 1
    assert copied(x, kept) == 2
    assert copied(x, kept.view(2)) == 1  # another object may have other strides
    x.data = torch.zeros(3)
    assert copied(x, kept) == 2
    assert copied(x, kept) == 0
    with torch.inference_mode():
        x = torch.ones(3)
        assert copied(x, kept) == 1
        assert copied(x, kept) == 1  # nothing says whether it has changed
    assert copied(x, kept) == 1


def test_a_tensor_at_the_address_of_one_that_is_gone(captures):
    fast = ptattn.graphed(Product())
    for value in range(20):
        x = torch.full((3,), float(value))
        assert fast(x).first.eq(2 * value).all()
        del x


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 3, 1).expand(2, 3, 4),
        torch.randn(4, 3, 2).transpose(0, 2),
        torch.randn(2, 6, 8)[:, ::2, ::2],
        torch.randn(2, 3, 4).requires_grad_(),
    ],
    ids=["expanded", "transposed", "stepped", "parameter"],
)
def test_any_layout(x, captures):
    fast = ptattn.graphed(Product())
    assert torch.equal(fast(x).first, 2 * x)
    assert torch.equal(fast(x + 1).first, 2 * (x + 1))
    assert captures() == 1


# Weights


def linear_chain():
    return nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Sequential(nn.Linear(3, 3)))


def replaced(model):
    model[0].weight = nn.Parameter(torch.randn(3, 3))


def assigned(model):
    model.load_state_dict(linear_chain().state_dict(), assign=True)


def data_replaced(model):
    model[2][0].weight.data = torch.randn(3, 3)


def swapped(model):
    model[1] = nn.Identity()  # the next one may lie where the GELU lay
    model[1] = nn.ReLU()


def added(model):
    model[2].append(nn.Linear(3, 3))


def buffer_added(model):
    model.register_buffer("table", torch.randn(3))


def converted(model):
    model.double().float()


CHANGES = [replaced, assigned, data_replaced, swapped, added, buffer_added, converted]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_replaced_weights_are_captured_anew(change, captures):
    model = linear_chain()
    fast, x = ptattn.graphed(model), torch.randn(2, 3)
    fast(x), fast(x[:1])
    change(model)
    assert torch.equal(fast(x), model(x))
    assert captures() == 3
    assert torch.equal(fast(x), model(x))
    assert captures() == 3  # once
    assert torch.equal(fast(x[:1]), model(x[:1]))
    assert captures() == 4


def test_weights_changed_in_place_are_not(captures):
    model = linear_chain()
    fast, x = ptattn.graphed(model), torch.randn(2, 3)
    before = fast(x)
    for weight in model.parameters():
        weight += 1
    model.load_state_dict(linear_chain().state_dict())
    assert torch.equal(fast(x), model(x))
    assert not torch.equal(fast(x), before)
    assert captures() == 1


def test_adapters_are_captured_anew(captures):
    peft = pytest.importorskip("peft")
    model, x = linear_chain(), torch.randn(2, 3)
    fast = ptattn.graphed(model)
    before = fast(x)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    for name, weight in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(weight)
    assert torch.equal(fast(x), model(x))
    assert not torch.allclose(fast(x), before)


def test_adapters_switched_and_scaled_are_captured_anew(captures):
    """A graph has the scale of its capture: a LoRA turned down, off or merged stayed as it was."""
    peft = pytest.importorskip("peft")
    model, x = linear_chain(), torch.randn(2, 3)
    lora = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model)
    fast, layer = ptattn.graphed(model), model[0]
    changes = [
        lambda: layer.set_scale("default", 0.5),
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(True),
        lambda: layer.merge(),
        lambda: layer.unmerge(),
        lambda: layer.set_adapter([]),
    ]
    fast(x)
    for count, change in enumerate(changes, 2):
        change()
        for _ in range(2):
            assert torch.equal(fast(x), model(x))
            assert captures() == count


def test_a_graph_holds_what_modules_keep_beside_weights(captures):
    """A table kept from the first call may be dropped by the module while the graph reads it."""
    model = linear_chain()
    model[1].tables = {"grid": torch.ones(3)}
    model[1].kept = (torch.ones(2),)
    fast = ptattn.graphed(model)
    fast(torch.randn(1, 3))
    (entry,) = fast._Graphed__graphs.values()
    held = [id(value) for value in entry.kept]
    assert id(model[1].tables["grid"]) in held
    assert id(model[1].kept) in held
    assert id(model[0].weight) not in held  # an old model would stay in memory


# What is refused


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((), ValueError, "at least one tensor; got none"),
        ((torch.ones(1), {"a": object()}), TypeError, r"argument 2\['a'\] must be .*; got object"),
        (
            (torch.ones(1), torch.ones(1, device="meta")),
            ValueError,
            "one device; got argument 1 on cpu and argument 2 on meta",
        ),
    ],
)
def test_what_no_graph_takes(inputs, error, message, captures):
    with pytest.raises(error, match=message):
        ptattn.graphed(Product())(*inputs)
    assert captures() == 0


def test_a_graph_on_the_cpu():
    with pytest.raises(ValueError, match=r"needs a CUDA device.*; got inputs on cpu: Product with"):
        ptattn.graphed(Product())(torch.ones(1))


def test_gradients_are_refused_with_the_way_to_train(captures):
    fast = ptattn.graphed(Product())
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match=r"no_grad.*for training: torch.compile"):
            fast(torch.ones(1))
        fast.requires_grad_(False)(torch.ones(1))  # nothing to give gradients to
        with pytest.raises(RuntimeError, match="no gradients"):
            fast(torch.ones(1, requires_grad=True))


def test_arguments():
    with pytest.raises(TypeError, match=r"nn.Module; got function"):
        ptattn.graphed(lambda x: x)
    with pytest.raises(TypeError, match="graphed already"):
        ptattn.graphed(ptattn.graphed(Product()))
    with pytest.raises(ValueError, match="max_graphs must be a positive integer; got 0"):
        ptattn.graphed(Product(), max_graphs=0)


def test_what_a_model_returns_can_be_copied(captures):
    class Odd(nn.Module):
        def forward(self, x):
            return {"a": [x, object()]}

    with pytest.raises(TypeError, match=r"output\['a'\]\[1\] must be a tensor"):
        ptattn.graphed(Odd())(torch.ones(1))


def test_an_error_of_the_model_is_its_own_and_leaves_the_graphs(captures):
    """One once made room for a graph that never came."""
    model = small("pt-dit-s-class").eval()
    fast = ptattn.graphed(model, max_graphs=1)
    inputs = torch.randn(1, 4, 8, 8), torch.ones(1)
    labels = torch.ones(1, dtype=torch.int64)
    fast(*inputs, labels=labels)
    with pytest.raises(ValueError, match="give labels, and no caption"):
        fast(*inputs)
    assert captures() == 2
    fast(*inputs, labels=labels)
    assert captures() == 2


def test_a_failed_capture_drops_the_graphs_beside_it(captures, monkeypatch):
    """They share a pool with what it left half done."""
    model = Product()
    fast = ptattn.graphed(model)
    fast(torch.ones(1))

    def fail(*args):
        raise CaptureError("no")

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "CapturedGraph", fail)
        with pytest.raises(CaptureError, match="no"):
            fast(torch.ones(2))
    assert model(torch.ones(1)).first == 2
    assert fast(torch.ones(1)).first == 2
    assert captures() == 2


# In the model's place


def test_it_is_the_model_to_all_who_ask(captures, tmp_path):
    model = small("pt-dit-s-class").eval()
    fast = ptattn.graphed(model)
    assert isinstance(fast, ptattn.models.PTDiT)
    assert fast.config is model.config
    assert fast.eval() is fast
    assert fast.to(torch.float64) is fast
    assert next(fast.parameters()) is next(model.parameters())
    assert next(model.parameters()).dtype == torch.float64
    assert fast.state_dict().keys() == model.state_dict().keys()
    fast.note = 1
    assert model.note == 1
    del fast.note
    assert not hasattr(model, "note")
    checkpoint.save_model(fast, tmp_path / "model")
    assert checkpoint.load_model(tmp_path / "model").config == model.config
    host = nn.Sequential(fast)
    assert next(name for name, _ in host.named_parameters()).startswith("0.patch_embed")
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert repr(twin) == repr(fast)
        assert twin.output.proj.weight is not model.output.proj.weight
        assert torch.equal(twin.output.proj.weight, model.output.proj.weight)
        twin.reset()  # it is graphed, too


def test_it_is_a_component_of_a_pipeline(captures, tmp_path):
    pytest.importorskip("diffusers")
    from ptattn.pipelines import PTDiTPipeline, PTDiTTransformer
    from tests.support.components import pipeline, seeded

    pipe = pipeline()
    call = dict(height=16, width=24, num_inference_steps=3, output_type="np", generator=None)
    plain = pipe("a red cat", **call | dict(generator=seeded())).images
    model, index = pipe.transformer, dict(pipe.config)
    pipe.transformer = ptattn.graphed(model)
    drawn = pipe("a red cat", **call | dict(generator=seeded())).images
    assert (drawn == plain).all()
    assert captures() == 1
    assert dict(pipe.config) == index
    pipe.to(torch.float64)
    assert model.dtype == pipe.transformer.dtype == torch.float64
    pipe.to(torch.float32)
    pipe("a red cat", **call)
    assert captures() == 2  # the weights lie elsewhere
    assert pipe.device == torch.device("cpu")
    pipe.save_pretrained(tmp_path)
    back = PTDiTPipeline.from_pretrained(tmp_path)
    assert type(back.transformer) is PTDiTTransformer
    assert torch.equal(back.transformer.output.proj.weight, model.output.proj.weight)


def test_it_is_offloaded_as_the_model_is(captures):
    """accelerate's hooks go to the model; weights that it has moved are found where they lie."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = linear_chain(), torch.randn(2, 3)
    expected = model(x)
    fast = ptattn.graphed(model)
    hooks.add_hook_to_module(fast, hooks.CpuOffload("cpu"))
    assert torch.equal(fast(x), expected)
    assert hasattr(model, "_hf_hook")
    hooks.remove_hook_from_module(fast)
    assert not hasattr(model, "_hf_hook")


@pytest.mark.long
def test_a_model_that_is_compiled_and_one_that_is_fused(captures):
    model = small("pt-dit-s-class").eval()
    inputs, labels = (torch.randn(1, 4, 8, 12), torch.ones(1)), torch.ones(1, dtype=torch.int64)
    fast = ptattn.graphed(torch.compile(model, backend="eager"))
    assert torch.equal(fast(*inputs, labels=labels), model(*inputs, labels=labels))
    fast = ptattn.graphed(model)
    fast(*inputs, labels=labels)
    for change in (ptattn.fuse, ptattn.unfuse):
        change(model)
        assert torch.equal(fast(*inputs, labels=labels), model(*inputs, labels=labels))
    assert captures() == 4


def test_a_sampling_run_projects_its_captions_once(captures):
    pytest.importorskip("diffusers")
    from ptattn.flow import sample

    model, noise = small("pt-dit-xl").eval(), torch.randn(1, 4, 8, 12)
    channels = model.config.caption_channels
    conditions = [dict(caption=torch.randn(1, 3, channels)) for _ in range(2)]
    expected, projected = sample(model, noise, *conditions, steps=3, guidance=2), []
    model.blocks[1].text_attn.kv.register_forward_hook(lambda *_: projected.append(1))
    ours = sample(ptattn.graphed(model), noise, *conditions, steps=3, guidance=2)
    assert torch.equal(ours, expected)
    assert len(projected) == 1
    assert captures() == 1


def test_threads_take_turns(captures):
    fast, wrong = ptattn.graphed(Product(), max_graphs=2), []

    def work(value):
        for n in (1, 2, 3):
            for _ in range(20):
                with torch.no_grad():
                    if not fast(torch.full((n,), value)).first.eq(2 * value).all():
                        wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
