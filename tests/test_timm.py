"""ProxyAttention as the `attn_layer` of timm's models."""

import copy
import pickle

import pytest
import torch

import ptattn
from tests.support.hosts import DIM, HEADS, ViT, import_timm, train, wake


@pytest.fixture(scope="module")
def timm():
    return import_timm()


def test_timm_makes_it(timm):
    attn_layer = ptattn.ProxyAttention.for_grid((4, 6), window=(2, 3), proxy_window=(2, 2))
    model = ViT.make(timm, attn_layer=attn_layer)
    attn = model.blocks[1].attn
    assert isinstance(attn, ptattn.ProxyAttention)
    assert (attn.grid, attn.window, attn.proxy_window) == ((1, 4, 6), (1, 2, 3), (1, 2, 2))
    # timm fills every linear layer, and these too, before it asks for init_weights().
    assert not attn.global_interaction.zero.weight.any()
    assert not attn.texture_complement.zero.weight.any()
    losses = train(model, ViT.run)
    assert losses[-1] < losses[0]


def test_a_timm_model_copies_and_pickles(timm):
    model = ViT.make(timm, attn_layer=ptattn.ProxyAttention.for_grid((4, 6), window=(2, 3)))
    out = ViT.run(wake(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(ViT.run(twin), out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(qk_norm=True), "no qk_norm"),
        (dict(scale_attn_norm=True), "no scale_norm"),
        (dict(proj_bias=False), "no proj_bias=False"),
        (dict(attn_drop_rate=0.1, proj_drop_rate=0.1), "no attn_drop, proj_drop"),
        (dict(embed_dim=25), "multiple of num_heads"),
    ],
)
def test_timm_options_that_it_has_not(timm, options, message):
    attn_layer = ptattn.ProxyAttention.for_grid((4, 6), window=(2, 3))
    options = dict(embed_dim=DIM, num_heads=HEADS, depth=1, attn_layer=attn_layer) | options
    with pytest.raises(ValueError, match=message):
        timm.VisionTransformer(**options)


def test_tokens_that_lie_on_no_grid(timm):
    attn_layer = ptattn.ProxyAttention.for_grid((4, 6), window=(2, 3))
    model = ViT.make(timm, attn_layer=attn_layer, class_token=True)
    with pytest.raises(ValueError, match=r"25 tokens, but grid \(1, 4, 6\) has 24: class and"):
        ViT.run(model)


@pytest.mark.parametrize("arguments", [((4, 0),), ((4, 6), (0, 2))], ids=["grid", "window"])
def test_for_grid_checks_at_once(arguments):
    with pytest.raises(ValueError, match=">= 1"):
        ptattn.ProxyAttention.for_grid(*arguments)
