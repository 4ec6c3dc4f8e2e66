"""Attention of diffusers' and timm's models, replaced by ProxyAttention and restored."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ptattn
from ptattn.layers import ZeroLinear
from tests.support.hosts import DIM, HEADS, DiT, PixArt, ViT, import_timm, train, wake


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def timm():
    return import_timm()


HOSTS = {PixArt: "diffusers", DiT: "diffusers", ViT: "timm"}


@pytest.fixture(params=HOSTS, ids=lambda host: host.__name__)
def host(request):
    return request.param


@pytest.fixture
def model(host, request):
    return host.make(request.getfixturevalue(HOSTS[host]))


@pytest.fixture
def pixart(diffusers):
    return PixArt.make(diffusers)


def assert_same_math(got, expected):
    """Two ways to one result in float64."""
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# What the model computes.


def test_one_window_is_what_was_before(host, model):
    """The norm and the modulation before the old attention still hold."""
    before = host.run(model)
    report = ptattn.replace_attention(model, window=host.grid)
    assert report.replaced == host.found
    assert_same_math(host.run(model), before)


def test_starts_as_window_attention_with_the_old_weights(host, model):
    old = model.get_submodule(host.found[1])
    ptattn.replace_attention(model, window=(4, 3), grid=host.grid)
    new = model.get_submodule(host.found[1])
    ids = ptattn.WindowGrid(host.grid, (4, 3)).window_ids()
    mask = torch.zeros(len(ids), len(ids)).double().masked_fill(ids[:, None] != ids, -torch.inf)
    x = torch.randn(2, len(ids), DIM, dtype=torch.float64)
    name = "attn_mask" if HOSTS[host] == "timm" else "attention_mask"
    batched = {name: mask if HOSTS[host] == "timm" else mask.expand(2, -1, -1)}
    assert_same_math(new(x), old(x, **batched))


def test_all_four_attentions_start_from_the_old_weights(pixart):
    old = pixart.transformer_blocks[0].attn1
    ptattn.replace_attention(pixart, window=(2, 3))
    new = pixart.transformer_blocks[0].attn1
    layers = (old.to_q, old.to_k, old.to_v)
    for kind in ("weight", "bias"):
        packed = torch.cat([getattr(layer, kind) for layer in layers])
        texture, interaction = new.texture_complement, new.global_interaction
        for attn in (texture.window_attn, texture.shifted_attn, interaction.proxy_attn):
            assert torch.equal(getattr(attn.qkv, kind), packed)
            assert torch.equal(getattr(attn.proj, kind), getattr(old.to_out[0], kind))
        cross = interaction.cross_attn
        assert torch.equal(getattr(cross.q, kind), packed[:DIM])
        assert torch.equal(getattr(cross.kv, kind), packed[DIM:])
        assert torch.equal(getattr(cross.proj, kind), getattr(old.to_out[0], kind))
        assert not getattr(texture.zero, kind).any()
        assert not getattr(interaction.zero, kind).any()


def test_missing_biases(timm):
    """Queries, keys and values have none then; the output has one that starts at zero."""
    model = ViT.make(timm, qkv_bias=False, proj_bias=False)
    before = ViT.run(model)
    ptattn.replace_attention(model, window=ViT.grid)
    window_attn = model.blocks[0].attn.texture_complement.window_attn
    assert window_attn.qkv.bias is None
    assert not window_attn.proj.bias.any()
    assert_same_math(ViT.run(model), before)


def test_the_grid_follows_the_call(host, model):
    """Without a grid, every call takes its own; with one, that alone runs."""
    fixed = copy.deepcopy(model)
    other = tuple(2 * n for n in host.grid)
    ptattn.replace_attention(model, window=(2, 3))
    ptattn.replace_attention(fixed, window=(2, 3), grid=other)
    wake(model)
    fixed.load_state_dict(model.state_dict())
    first = host.run(model)
    assert_same_math(host.run(model, other), host.run(fixed, other))
    assert torch.equal(host.run(model), first)
    with pytest.raises(ValueError, match="tokens, but grid"):
        host.run(fixed)


def test_options_of_the_layer(pixart):
    ptattn.replace_attention(pixart, window=(4, 4), proxy_window=(2, 2), backend="reference")
    new = pixart.transformer_blocks[0].attn1
    assert (new.window, new.proxy_window) == ((1, 4, 4), (1, 2, 2))
    assert new.texture_complement.window_attn.backend == "reference"


# What is replaced, what is kept, and how it comes back.


def test_report(pixart):
    report = ptattn.replace_attention(pixart, window=(2, 3))
    assert report.replaced == PixArt.found
    kept = {name.replace("attn1", "attn2"): "cross-attention" for name in PixArt.found}
    assert report.kept == kept
    assert str(report) == (
        "replaced: transformer_blocks.0.attn1, transformer_blocks.1.attn1\n"
        "kept (cross-attention): transformer_blocks.0.attn2, transformer_blocks.1.attn2"
    )


def test_report_of_many_is_short(diffusers):
    report = ptattn.replace_attention(PixArt.make(diffusers, layers=3), window=(2, 3))
    line = "replaced: transformer_blocks.0.attn1 ... transformer_blocks.2.attn1 (3)"
    assert str(report).startswith(line)


def test_match_selects(pixart):
    """Other windows in other blocks, by one call for each."""
    first, second = PixArt.found
    report = ptattn.replace_attention(pixart, window=(2, 3), match=r".*\.0\.attn1")
    assert report.replaced == (first,)
    assert report.kept[second] == "not matched"
    report = ptattn.replace_attention(pixart, window=(4, 4), match=r".*\.attn1")
    assert report.replaced == (second,)
    assert report.kept[first] == "ProxyAttention already"
    windows = [pixart.get_submodule(name).window for name in PixArt.found]
    assert windows == [(1, 2, 3), (1, 4, 4)]
    PixArt.run(pixart)
    assert ptattn.restore_attention(pixart) == PixArt.found
    assert not pixart.pos_embed.proj._forward_hooks


def test_restores_exactly(host, model):
    names, before = list(model.state_dict()), host.run(model)
    modules = dict(model.named_modules())
    ptattn.replace_attention(model, window=(2, 3))
    assert not torch.equal(host.run(wake(model)), before)
    assert ptattn.restore_attention(model) == host.found
    assert dict(model.named_modules()) == modules  # the same objects: modules have no other ==
    assert list(model.state_dict()) == names
    assert torch.equal(host.run(model), before)
    assert not any(module._forward_hooks for module in model.modules())


def offloaded(model):
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float64)


@pytest.mark.parametrize("hold", [offloaded, cast])
def test_weights_held_by_hooks(pixart, hold):
    """What was restored then once had the place and dtype of the rest, and none of its hooks."""
    ptattn.replace_attention(pixart, window=(2, 3))
    hold(pixart)
    out, modules = PixArt.run(pixart), dict(pixart.named_modules())
    with pytest.raises(ValueError, match=r"weights of .*\.0\.attn1, .* are offloaded or cast"):
        ptattn.restore_attention(pixart)
    assert dict(pixart.named_modules()) == modules
    assert torch.equal(PixArt.run(pixart), out)


@pytest.mark.parametrize("hold", [offloaded, cast])
def test_weights_held_by_hooks_are_not_replaced(pixart, hold):
    hold(pixart)
    with pytest.raises(ValueError, match="merge them first, and offload, cast or quantize after"):
        ptattn.replace_attention(pixart, window=(2, 3))


def test_restored_modules_fit_the_model(pixart):
    """The model was moved, cast and switched while they were out."""
    ptattn.replace_attention(pixart, window=(2, 3))
    pixart.to(torch.bfloat16).eval()
    ptattn.restore_attention(pixart)
    assert {p.dtype for p in pixart.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in pixart.modules())


def test_old_modules_are_not_part_of_the_model(pixart):
    old = {id(p) for name in PixArt.found for p in pixart.get_submodule(name).parameters()}
    ptattn.replace_attention(pixart, window=(2, 3))
    assert not old & {id(p) for p in pixart.parameters()}
    assert not [name for name in pixart.state_dict() if "to_q" in name and "attn1" in name]


def test_one_module_in_two_places_stays_one(timm):
    attn = timm.Attention(DIM, HEADS)
    model = nn.ModuleDict({"a": nn.Sequential(attn), "b": nn.Sequential(attn)})
    report = ptattn.replace_attention(model, window=(2, 3), grid=(4, 6))
    assert report.replaced == ("a.0", "b.0")
    assert model["a"][0] is model["b"][0]
    ptattn.restore_attention(model)
    assert model["a"][0] is attn
    assert model["b"][0] is attn


def reasons(attn):
    """Why this one is kept, beside one that is replaced."""
    good = nn.MultiheadAttention(DIM, HEADS)  # any that is reported, and kept
    model = nn.ModuleDict({"attn": attn, "other": good})
    try:
        return ptattn.replace_attention(model, window=(2, 3), grid=(4, 6)).kept["attn"]
    except ValueError as error:
        assert model["attn"] is attn
        return str(error)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(cross_attention_dim=DIM), "cross-attention"),
        (dict(added_kv_proj_dim=DIM), "joint attention"),
        (dict(heads=2), "another width"),
        (dict(kv_heads=1), "another width"),
        (dict(out_dim=2 * DIM), "another width"),
        (dict(qk_norm="layer_norm"), "norms inside it"),
        (dict(norm_num_groups=2), "norms inside it"),
        (dict(scale_qk=False), "softmax scale"),
        (dict(is_causal=True), "causal"),
        (dict(dropout=0.1), "dropout"),
        (dict(residual_connection=True), "residual connection"),
        (dict(rescale_output_factor=2.0), "residual connection"),
        (dict(pre_only=True), "not plain nn.Linear"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_diffusers_attention_that_is_kept(diffusers, options, reason):
    options = dict(query_dim=DIM, heads=HEADS, dim_head=DIM // HEADS) | options
    assert reason in reasons(diffusers.models.attention_processor.Attention(**options))


def test_diffusers_attention_with_another_processor(diffusers):
    processors = diffusers.models.attention_processor
    attn = processors.Attention(DIM, heads=HEADS, dim_head=DIM // HEADS)
    attn.set_processor(processors.PAGIdentitySelfAttnProcessor2_0())
    assert "processor PAGIdentitySelfAttnProcessor2_0" in reasons(attn)


def test_fused_projections_are_kept(pixart):
    pixart.fuse_qkv_projections()
    with pytest.raises(ValueError, match="call unfuse_qkv_projections"):
        ptattn.replace_attention(pixart, window=(2, 3))
    pixart.unfuse_qkv_projections()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(qk_norm=True, norm_layer=nn.LayerNorm), "norms inside it"),
        (dict(scale_norm=True, norm_layer=nn.LayerNorm), "norms inside it"),
        (dict(attn_head_dim=4), "another width"),
        (dict(dim_out=2 * DIM), "another width"),
        (dict(gated=True), "a gate"),
        (dict(attn_drop=0.1), "dropout"),
        (dict(proj_drop=0.1), "dropout"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_timm_attention_that_is_kept(timm, options, reason):
    assert reason in reasons(timm.Attention(DIM, HEADS, **options))


def test_other_attention_is_reported():
    assert "torch.nn.modules.activation.MultiheadAttention is of no" in reasons(
        nn.MultiheadAttention(DIM, HEADS)
    )


class Lora(nn.Linear):
    """A linear layer that adds something of its own."""


def test_projections_that_are_no_plain_linear_layers(timm):
    attn = timm.Attention(DIM, HEADS)
    attn.proj = Lora(DIM, DIM)
    assert "merge them first" in reasons(attn)


# Bad input, after which the model is as it was.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=(2, 0)), "window"),
        (dict(window=8), "window"),
        (dict(window=(2, 3), grid=(4, -6)), "grid"),
        (dict(window=(2, 3), proxy_window=(0, 1)), "window"),
        (dict(window=(2, 3), backend="fast"), "fast"),
        (dict(window=(2, 3), match="("), "match must be a regular expression; got '\\('"),
        (dict(window=(2, 3), match="attn1"), "no self-attention to replace"),
        (dict(window=(2, 3), match=r".*attn2"), r"kept \(cross-attention\): transformer_blocks.0"),
    ],
)
def test_bad_input(pixart, options, message):
    modules = dict(pixart.named_modules())
    with pytest.raises(ValueError, match=message):
        ptattn.replace_attention(pixart, **options)
    assert dict(pixart.named_modules()) == modules
    assert not pixart.pos_embed.proj._forward_hooks


def test_a_pipeline_is_no_model(pixart):
    with pytest.raises(TypeError, match=r"nn.Module, such as pipeline.transformer; got list"):
        ptattn.replace_attention([pixart], window=(2, 3))


def test_no_grid_to_be_found(timm):
    with pytest.raises(ValueError, match="grid must be given"):
        ptattn.replace_attention(nn.Sequential(timm.Attention(DIM, HEADS)), window=(2, 3))


def test_class_tokens_have_no_place(timm):
    model = ViT.make(timm, class_token=True, reg_tokens=2)
    with pytest.raises(ValueError, match="3 class or register tokens"):
        ptattn.replace_attention(model, window=(2, 3))


def test_nothing_to_restore(pixart):
    with pytest.raises(ValueError, match="no attention that replace_attention made"):
        ptattn.restore_attention(pixart)
    ptattn.replace_attention(pixart, window=(2, 3))
    with pytest.raises(ValueError, match="ProxyAttention already"):
        ptattn.replace_attention(pixart, window=(2, 3))


def test_what_the_new_attention_cannot_honour(pixart):
    ptattn.replace_attention(pixart, window=(2, 3), grid=(4, 6))
    attn, x = pixart.transformer_blocks[0].attn1, torch.randn(2, 24, DIM, dtype=torch.float64)
    attn(x, encoder_hidden_states=None, attention_mask=None)
    for name, value in {
        "attention_mask": torch.zeros(2, 1, 24),
        "encoder_hidden_states": x,
        "is_causal": True,
        "ip_adapter_masks": [x],
    }.items():
        with pytest.raises(ValueError, match=f"ProxyAttention has no {name}"):
            attn(x, **{name: value})


# Life after the swap.


def test_trains_and_its_weights_load_into_a_fresh_model(host, model):
    fresh = copy.deepcopy(model)
    ptattn.replace_attention(model, window=(2, 3))
    losses = train(model, host.run)
    assert losses[-1] < losses[0]
    for layer in model.modules():
        if isinstance(layer, ZeroLinear):
            assert layer.weight.any()
    ptattn.replace_attention(fresh, window=(2, 3))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(host.run(fresh), host.run(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_live_on_their_own(pixart, clone):
    before = PixArt.run(pixart)
    ptattn.replace_attention(pixart, window=(2, 3))
    swapped, twin = PixArt.run(pixart), clone(pixart)
    PixArt.run(pixart, (2, 5))
    assert torch.equal(PixArt.run(twin), swapped)
    ptattn.restore_attention(twin)
    assert torch.equal(PixArt.run(twin), before)
    assert not torch.equal(PixArt.run(pixart), before)


def test_activation_checkpointing(pixart):
    ptattn.replace_attention(pixart, window=(2, 3))
    wake(pixart)
    parameters = list(pixart.parameters())
    plain = torch.autograd.grad(PixArt.run(pixart).square().sum(), parameters)
    pixart.enable_gradient_checkpointing()
    again = torch.autograd.grad(PixArt.run(pixart).square().sum(), parameters)
    for got, expected in zip(again, plain, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.long
def test_compiles_to_one_graph(diffusers):
    """The whole model, and in it the grid of the call; windows of whole rows are traced soonest."""
    model = PixArt.make(diffusers, layers=1)
    ptattn.replace_attention(model, window=(1, 10))
    expected = PixArt.run(wake(model))
    PixArt.run(model, (4, 6))  # leaves another grid behind
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_same_math(PixArt.run(compiled), expected)


def test_lora(pixart):
    """Adapters of every named projection learn, as Z, trained in full, lets them be seen."""
    peft = pytest.importorskip("peft")
    ptattn.replace_attention(pixart, window=(2, 3))
    names = ["qkv", "q", "kv", "proj"]
    config = peft.LoraConfig(r=2, target_modules=names, modules_to_save=["zero"])
    adapted = peft.get_peft_model(pixart, config)
    losses = train(adapted, PixArt.run)
    assert losses[-1] < losses[0]
    learned = {
        name for name, p in adapted.named_parameters() if "lora_B" in name and p.detach().any()
    }
    for half in ("window_attn", "shifted_attn", "proxy_attn", "cross_attn"):
        inputs = ("q", "kv") if half == "cross_attn" else ("qkv",)
        for projection in (*inputs, "proj"):
            assert [n for n in learned if "blocks.0.attn1" in n and f"{half}.{projection}." in n]
    merged = adapted.merge_and_unload()
    assert ptattn.restore_attention(merged) == PixArt.found
