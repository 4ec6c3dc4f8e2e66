"""What a forward computes once, not once per block, and what it keeps from call to call."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ptattn import flow
from ptattn.models import position
from tests.models.test_platform import Calls, batch_for, gradients, same_bits, tiny

TEXT_MODELS = ("pt-dit-xl", "pixart-alpha")
each_text_model = pytest.mark.parametrize("name", TEXT_MODELS)


def calls(model, inputs):
    """The operators of a forward without gradients."""
    with torch.no_grad(), Calls() as found:
        model(**inputs)
    return Counter({name.split("::")[1].split(".")[0]: n for name, n in found.names.items()})


# Modulations.


def stay_in_their_blocks(model):
    """A hook, such as one that gathers sharded weights, has the tables seen from within alone."""
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: None)
    return model


@each_text_model
def test_one_addition_for_the_modulations_of_all_blocks(name):
    saved = Counter()
    for depth, sign in ((2, -1), (1, 1)):  # what a block takes, with its table added apart, less
        model = tiny(name, depth=depth)
        inputs = batch_for(model, 6, 10)
        together, apart = calls(model, inputs), calls(stay_in_their_blocks(model), inputs)
        for op in ("add", "stack"):
            saved[op] += sign * (together[op] - apart[op])
    assert saved == {"add": 1, "stack": 1}


@each_text_model
def test_tables_added_in_their_blocks_give_the_same(name):
    model = tiny(name)
    inputs = batch_for(model, 6, 10)
    with torch.no_grad():
        expected = model(**inputs)
        assert torch.equal(stay_in_their_blocks(copy.deepcopy(model))(**inputs), expected)
    together, apart = gradients(model, inputs), gradients(stay_in_their_blocks(model), inputs)
    for ours, theirs in zip(apart, together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


class Wrapper(nn.Module):
    """As what shards or compiles one block, has its attributes and other modules."""

    def __init__(self, block):
        super().__init__()
        self.wrapped = block

    def forward(self, *args, **known):
        return self.wrapped(*args, **known)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped, name)


@pytest.mark.parametrize("change", ["parametrized", "wrapped", "functional"])
def test_tables_that_are_not_plain_parameters(change):
    model = tiny("pt-dit-xl")
    inputs = batch_for(model, 6, 10)
    expected = model(**inputs)
    if change == "parametrized":
        for block in model.blocks:
            nn.utils.parametrize.register_parametrization(block.modulation, "table", nn.Identity())
        out = model(**inputs)
    elif change == "wrapped":
        model.blocks[1] = Wrapper(model.blocks[1])
        out = model(**inputs)
    else:
        weights = {key: value.detach() for key, value in model.named_parameters()}
        out = torch.func.functional_call(model, weights, kwargs=inputs)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["pt-dit-s-class", "dit-s"])
def test_one_activation_of_the_embedding(name):
    """Besides the one within the timestep's MLP."""
    model = tiny(name, depth=3)
    assert calls(model, batch_for(model, 6, 10))["silu"] == 2


# Positions.


@pytest.fixture
def kept(monkeypatch):
    """The axes that are kept, none at first."""
    axes = {}
    monkeypatch.setattr(position, "_kept", axes)
    return axes


def embed(grid=(2, 3, 5), dtype=torch.float32, scale=2, dim=32):
    return position.position_embedding(grid, torch.empty(1, dim, dtype=dtype), scale)


def test_positions_are_made_once(kept, monkeypatch):
    first = embed()
    assert len(kept) == 3
    monkeypatch.setattr(position, "_made", None)
    assert torch.equal(embed(), first)
    assert len(kept) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_kept_positions_have_the_bits_of_new_ones(kept, dtype):
    """Axes of several lengths, scales and widths, of which each has its own."""
    for grid, scale, dim in (((1, 4, 6), 1, 32), ((1, 6, 4), 1, 32), ((1, 4, 6), 2, 48)):
        first, again = (embed(grid, dtype, scale, dim) for _ in range(2))
        with Calls():  # what is watched makes its own
            fresh = embed(grid, dtype, scale, dim)
        assert torch.equal(first, fresh)
        assert torch.equal(again, fresh)


def test_axes_kept_in_inference_mode_can_train(kept):
    model = tiny("dit-s", depth=1)
    inputs = batch_for(model, 6, 10)
    with torch.inference_mode():
        model(**inputs)
    assert kept
    assert not any(axis.is_inference() for axis in kept.values())
    assert all(g is not None for g in gradients(model, inputs))


def test_nothing_is_kept_of_what_is_traced_or_watched(kept):
    model = tiny("dit-s", depth=1)
    inputs = batch_for(model, 6, 10)
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager")(**inputs)
        with Calls():
            model(**inputs)
        with FakeTensorMode():
            embed()
        position.position_embedding((1, 2, 3), torch.empty(1, 32, device="meta"))
        torch.func.vmap(lambda x: position.position_embedding((1, 2, 3), x) + x)(
            torch.zeros(2, 6, 32)
        )
    assert all(type(axis) is torch.Tensor and axis.device.type == "cpu" for axis in kept.values())
    assert len(kept) <= 3  # vmap's are plain numbers
    with torch.no_grad():
        model(**inputs)


def test_no_axis_is_ever_dropped(kept, monkeypatch):
    """A captured CUDA graph may still read it."""
    monkeypatch.setattr(position, "_MOST_KEPT", 4)
    embed((1, 2, 3))
    first = dict(kept)
    expected = embed((1, 7, 9))
    assert len(kept) == 4
    assert all(kept[key] is axis for key, axis in first.items())
    assert torch.equal(embed((1, 7, 9)), expected)


# Captions.


def prepared(model, batch=2):
    inputs = batch_for(model, 6, 10, batch=batch)
    caption, mask = inputs.pop("caption"), inputs.pop("caption_mask")
    return inputs, caption, mask, model.prepare_caption(caption, mask)


@each_text_model
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("triton", marks=pytest.mark.long)])
def test_a_prepared_caption_gives_the_same_bits(name, backend):
    model = tiny(name, backend=backend, depth=1 if backend == "triton" else 2)
    with torch.no_grad():
        inputs, caption, mask, text = prepared(model)
        expected = model(**inputs, caption=caption, caption_mask=mask)
        assert torch.equal(model(**inputs, caption=text), expected)
        text, expected = model.prepare_caption(caption), model(**inputs, caption=caption)
        assert torch.equal(model(**inputs, caption=text), expected)


@each_text_model
def test_a_prepared_caption_saves_the_texts_layers(name):
    model = tiny(name, depth=2)
    inputs, caption, mask, text = prepared(model)
    plain = calls(model, inputs | dict(caption=caption, caption_mask=mask))
    found = calls(model, inputs | dict(caption=text))
    assert plain["addmm"] - found["addmm"] == 2 + 2  # the caption's two, and one per block


@each_text_model
def test_a_prepared_caption_under_autocast(name):
    model = tiny(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inputs, caption, mask, text = prepared(model)
        assert text.keys_values[0].packed.dtype == torch.bfloat16
        out = model(**inputs, caption=text)
        assert torch.equal(out, model(**inputs, caption=caption, caption_mask=mask))


@each_text_model
def test_a_prepared_caption_goes_with_its_autocast(name):
    """The error was that of the attention within: "q, k, v must have one dtype"."""
    model = tiny(name)
    with torch.no_grad():
        inputs, _, _, text = prepared(model)
        wanted = "prepared in torch.float32; the model now computes in torch.bfloat16"
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=wanted):
            model(**inputs, caption=text)


def test_gradients_reach_the_texts_layers_through_a_prepared_caption():
    model = tiny("pt-dit-xl")
    inputs, caption, mask, _ = prepared(model)
    expected = gradients(model, inputs | dict(caption=caption, caption_mask=mask))

    def run(**inputs):
        return model(**inputs, caption=model.prepare_caption(caption, mask))

    for checkpointed in (False, True):
        model.blocks.checkpoint(checkpointed)
        assert same_bits(gradients(model, inputs, run), expected)


@pytest.mark.long
def test_a_prepared_caption_compiles():
    """It is a plain tree of tensors."""
    model = tiny("pt-dit-xl", depth=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        inputs, _, _, text = prepared(model)
        leaves = torch.utils._pytree.tree_leaves(text)
        assert len(leaves) == 2
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert torch.equal(compiled(**inputs, caption=text), model(**inputs, caption=text))


def test_a_prepared_caption_of_adapted_layers():
    peft = pytest.importorskip("peft")
    model = tiny("pt-dit-xl").eval()
    lora = peft.LoraConfig(r=2, target_modules=["kv"], init_lora_weights=False)
    peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        inputs, caption, mask, text = prepared(model)
        expected = model(**inputs, caption=caption, caption_mask=mask)
        assert torch.equal(model(**inputs, caption=text), expected)


def test_wrong_uses_of_a_prepared_caption():
    model = tiny("pt-dit-xl")
    inputs, _, mask, text = prepared(model)
    three = dict(latents=torch.randn(3, 4, 6, 10), timestep=torch.ones(3))
    for other, changes, message in (
        (model, dict(caption_mask=mask), "has its mask: give no caption_mask"),
        (model, three, r"was prepared for a batch of 2; got timestep of shape \(3,\)"),
        (tiny("pt-dit-xl", depth=3), {}, "of 2 blocks of 32 channels; this one has 3 of 32"),
        (tiny("pt-dit-xl", dim=48), {}, "of 2 blocks of 32 channels; this one has 2 of 48"),
        (tiny("pt-dit-s-class"), {}, "conditioned on classes"),
    ):
        with pytest.raises(ValueError, match=message):
            other(**(inputs | changes), caption=text)


def test_captions_that_cannot_be_prepared():
    model = tiny("pt-dit-xl")
    caption = torch.zeros(2, 6, 24)
    with pytest.raises(ValueError, match=r"caption must have shape \(B, T, 24\); got \(2, 6, 25\)"):
        model.prepare_caption(torch.zeros(2, 6, 25))
    with pytest.raises(RuntimeError, match="prepare_caption needs a text model"):
        tiny("pt-dit-s-class").prepare_caption(caption)
    for module in (model, model.blocks[0]):
        handle = module.register_forward_pre_hook(lambda module, args: None)
        with pytest.raises(RuntimeError, match="whose weights are at hand outside of its forward"):
            model.prepare_caption(caption)
        handle.remove()
        assert model.prepares_captions


def sampled(model, inputs, guidance):
    condition = {key: inputs[key] for key in ("caption", "caption_mask")}
    null = {key: value.flip(0) for key, value in condition.items()}
    options = dict(steps=3, guidance=guidance)
    return flow.sample(model, inputs["latents"], condition, null, **options)


@each_text_model
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_sampling_run_projects_its_captions_once(name, guidance):
    pytest.importorskip("diffusers")
    model = tiny(name).eval()
    inputs, projected = batch_for(model, 6, 10), []
    for block in model.blocks:
        block.text_attn.kv.register_forward_hook(lambda *_: projected.append(1))
    found = sampled(model, inputs, guidance)
    assert len(projected) == 2
    expected = sampled(lambda *args, **known: model(*args, **known), inputs, guidance)
    assert len(projected) == 2 + 2 * 3
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", ["model", "layers", "layer groups", "block groups"])
def test_a_sampling_run_of_offloaded_weights(how):
    """Those of a model come when they are asked for, those of layers with each call of theirs, and
    those of blocks within the blocks' forward alone."""
    pytest.importorskip("diffusers")
    accelerate = pytest.importorskip("accelerate")
    hooks = pytest.importorskip("diffusers.hooks")
    model = tiny("pt-dit-xl").eval()
    inputs, device = batch_for(model, 6, 10), torch.device("cpu")
    expected = sampled(model, inputs, 4.0)
    if how == "model":
        accelerate.cpu_offload_with_hook(model, execution_device=device)
    elif how == "layers":
        accelerate.cpu_offload(model, execution_device=device)
        assert model.blocks[0].modulation.table.is_meta
    else:
        groups = dict(offload_type="leaf_level")
        if how == "block groups":
            groups = dict(offload_type="block_level", num_blocks_per_group=1)
        hooks.apply_group_offloading(model, onload_device=device, offload_device=device, **groups)
    assert model.prepares_captions == (how != "block groups")
    assert torch.equal(sampled(model, inputs, 4.0), expected)


@pytest.mark.parametrize(
    "how", [pytest.param("compiled", marks=pytest.mark.long), "wrapped", "wrapped block"]
)
def test_a_sampling_run_of_a_wrapped_model(how):
    """Of a wrapper, which may hold the weights, nothing is asked but its forward."""
    pytest.importorskip("diffusers")
    model = tiny("pt-dit-xl").eval()
    inputs, projected = batch_for(model, 6, 10), []
    expected = sampled(model, inputs, 4.0)
    run = dict(compiled=partial(torch.compile, backend="eager"), wrapped=Wrapper)
    if how == "wrapped block":
        model.blocks[0] = Wrapper(model.blocks[0])
    model.blocks[1].text_attn.kv.register_forward_hook(lambda *_: projected.append(1))
    assert torch.equal(sampled(run.get(how, lambda m: m)(model), inputs, 4.0), expected)
    assert len(projected) == (1 if how == "compiled" else 3)


@pytest.mark.parametrize("where", ["condition", "text_attn"])
def test_hooks_see_the_caption_of_a_sampling_run(where):
    """What they change counts: where there are some, nothing is projected ahead."""
    pytest.importorskip("diffusers")
    model = tiny("pt-dit-xl").eval()
    inputs = batch_for(model, 6, 10)
    module = model.condition if where == "condition" else model.blocks[0].text_attn
    before = sampled(model, inputs, 4.0)
    assert model.prepares_captions
    seen = []
    module.register_forward_pre_hook(lambda *args: seen.append(args))
    assert not model.prepares_captions
    assert torch.equal(sampled(model, inputs, 4.0), before)
    assert len(seen) == 3


def test_a_prepared_caption_needs_the_mask_of_its_tokens():
    model = tiny("pt-dit-xl")
    caption = batch_for(model, 6, 10)["caption"]
    with pytest.raises(
        ValueError, match=r"caption_mask must have shape \(B, T\) = .*; got \(2, 1\)"
    ):
        model.prepare_caption(caption, torch.ones(2, 1, dtype=torch.bool))
