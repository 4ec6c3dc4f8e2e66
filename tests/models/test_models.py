"""The models: shapes, conditions, per-sample independence, training; the names and their errors."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ptattn.geometry import WindowGrid
from ptattn.layers import ZeroLinear
from ptattn.models import ModelConfig, create_model, get_config, list_models
from ptattn.models.position import position_embedding

SMALL = dict(depth=2, dim=48, num_heads=3)
TEXT = SMALL | dict(caption_channels=24)
NAMES = {"pt-dit-xl": TEXT, "pt-dit-s-class": SMALL, "dit-s": SMALL, "pixart-alpha": TEXT}


def small(name, **overrides):
    """A small model of a family, with no layer left at zero, so that every path counts."""
    torch.manual_seed(0)
    model = create_model(name, **(NAMES[name] | overrides))
    for module in model.modules():
        if isinstance(module, ZeroLinear):
            torch.nn.init.normal_(module.weight, std=0.1)
            torch.nn.init.normal_(module.bias, std=0.1)
    return model


def condition_for(model, batch):
    if model.config.num_classes:
        return {"labels": torch.arange(batch) * 7}
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[:, 4:] = False
    channels = model.config.caption_channels
    return {"caption": torch.randn(batch, 6, channels), "caption_mask": mask}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(4, 16, 16), (4, 18, 26), (4, 1, 16, 24), (4, 5, 18, 14)], ids=str
)
def test_shapes_and_gradients(name, shape):
    model = small(name)
    latents = torch.randn(2, *shape, requires_grad=True)
    out = model(latents, torch.tensor([10.0, 900.0]), **condition_for(model, 2))
    assert out.shape == (2, 8, *shape[1:])
    out.square().mean().backward()
    assert latents.grad.abs().min() > 0
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_has_its_own_timestep_and_condition(name):
    """The released code gave samples of one batch each other's modulation."""
    model = small(name)
    latents, timestep = torch.randn(3, 4, 16, 24), torch.tensor([0.0, 400.0, 999.0])
    condition = condition_for(model, 3)
    together = model(latents, timestep, **condition)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in condition.items()}
        alone = model(latents[i : i + 1], timestep[i : i + 1], **one)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_a_video_of_one_frame(name):
    model = small(name)
    latents, t, condition = torch.randn(1, 4, 16, 24), torch.tensor([5]), condition_for(model, 1)
    image = model(latents, t, **condition)
    video = model(latents.unsqueeze(2), t, **condition)
    assert torch.equal(image, video.squeeze(2))


@pytest.mark.parametrize("name", ["pt-dit-xl", "pixart-alpha"])
def test_masked_caption_tokens_change_nothing(name):
    model = small(name)
    latents, t, condition = torch.randn(2, 4, 16, 16), torch.ones(2), condition_for(model, 2)
    out = model(latents, t, **condition)
    condition["caption"][:, 4:] = torch.randn(2, 2, model.config.caption_channels) * 100
    assert torch.equal(out, model(latents, t, **condition))
    condition["caption"][:, :4] += 1
    assert not torch.allclose(out, model(latents, t, **condition))


def test_every_row_and_column_of_a_nonsquare_grid_is_told_apart():
    """The released code transposed the positions of non-square grids."""
    f, h, w, dim = 2, 3, 5, 32
    embedding = position_embedding((f, h, w), torch.empty(dim, dtype=torch.float64), scale=2)
    embedding = embedding.view(f, h, w, dim)

    def axis(position, channels):
        angle = position * 10000.0 ** (-torch.arange(channels // 2).double() / (channels // 2))
        return torch.cat([angle.sin(), angle.cos()])

    for i in range(f):
        for j in range(h):
            for k in range(w):
                expected = torch.cat([axis(i, 8), axis(k / 2, 12), axis(j / 2, 12)])
                torch.testing.assert_close(embedding[i, j, k], expected)


def test_windows_follow_the_resolution_unless_given(monkeypatch):
    seen = []
    original = WindowGrid.shifted
    monkeypatch.setattr(
        WindowGrid, "shifted", lambda self: seen.append(self.window) or original(self)
    )
    with torch.device("meta"):
        model = create_model("pt-dit-b", **(TEXT | dict(depth=1)))
        given = create_model("pt-dit-b", **(TEXT | dict(depth=1)), window=(1, 3, 5))
        caption = torch.empty(1, 6, 24)
        for side in (32, 64, 128):
            model(torch.empty(1, 4, side, side), torch.empty(1), caption)
        model(torch.empty(1, 4, 8, 64, 64), torch.empty(1), caption)
        given(torch.empty(1, 4, 64, 64), torch.empty(1), caption)
    assert seen == [(1, 2, 2), (1, 4, 4), (1, 8, 8), (4, 4, 4), (1, 3, 5)]


def test_finer_proxies_than_windows():
    model = small("pt-dit-xl", window=(1, 4, 4), proxy_window=(1, 2, 2))
    coarse = copy.deepcopy(model)
    coarse.model_config = dataclasses.replace(model.config, proxy_window=None)
    latents, t, condition = torch.randn(1, 4, 16, 16), torch.ones(1), condition_for(model, 1)
    assert not torch.allclose(model(latents, t, **condition), coarse(latents, t, **condition))


@pytest.mark.parametrize("name", NAMES)
def test_fresh_models_predict_zero_and_learn(name):
    torch.manual_seed(0)
    model = create_model(name, **NAMES[name])
    latents, t = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 800.0])
    condition, target = condition_for(model, 2), torch.randn(2, 8, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = F.mse_loss(model(latents, t, **condition), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item(), rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["pt-dit-xl", "pt-dit-s-class"])
def test_backends_agree(name):
    model = small(name).double()
    twin = create_model(name, backend="reference", **NAMES[name]).double()
    twin.load_state_dict(model.state_dict())
    latents = torch.randn(2, 4, 3, 18, 14, dtype=torch.float64)
    t, condition = torch.tensor([3.0, 800.0]), condition_for(model, 2)
    if "caption" in condition:
        condition["caption"] = condition["caption"].double()
    ours, exact = model(latents, t, **condition), twin(latents, t, **condition)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_names():
    expected = "pt-dit-s-class pt-dit-b pt-dit-l pt-dit-xl pt-dit-h qihoo-t2i dit-s dit-b dit-l "
    assert list_models() == (expected + "dit-xl pixart-alpha").split()
    assert get_config("qihoo-t2i").window == (1, 8, 8)
    assert create_model("dit-s", depth=1).config.depth == 1


def test_bad_names_and_overrides():
    with pytest.raises(ValueError, match=r"name must be one of pt-dit-s-class, .*; got 'pt-dit'"):
        create_model("pt-dit")
    with pytest.raises(ValueError, match=r"unknown overrides heads, width; known: depth, dim, "):
        create_model("pt-dit-b", width=3, heads=2)
    with pytest.raises(ValueError, match=r"dim must be a multiple of 16 and of num_heads; got 40"):
        ModelConfig(1, 40, 2)
    with pytest.raises(ValueError, match="exactly one of caption_channels"):
        ModelConfig(1, 32, 2, num_classes=10)
    for wrong in (dict(depth=0), dict(num_heads="2"), dict(patch_size=True), dict(num_classes=0)):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
            ModelConfig(**{"depth": 1, "dim": 32, "num_heads": 2, **wrong})
    with pytest.raises(ValueError, match="backend must be one of reference, sdpa"):
        create_model("pt-dit-b", backend="cuda", depth=1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pt-dit-xl", dict(caption=None), "conditioned on text"),
        ("pt-dit-xl", dict(labels=torch.ones(2).long()), "conditioned on text"),
        ("pt-dit-s-class", dict(labels=None), "conditioned on classes"),
        ("pt-dit-s-class", dict(caption=torch.zeros(2, 6, 24)), "conditioned on classes"),
    ],
)
def test_condition_of_the_other_kind(name, changes, message):
    model = create_model(name, **NAMES[name])
    inputs = dict(latents=torch.zeros(2, 4, 16, 16), timestep=torch.zeros(2))
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        model(**(inputs | condition_for(model, 2) | changes))
    assert message in str(error.value)
