"""Rectified flow and v-prediction: schedules, signs, guidance, exact paths."""

import math

import pytest
import torch

from ptattn import flow

LABELS = {"labels": torch.tensor([0, 1])}


def exact(clean, objective, calls=None):
    """A model that knows the data: its prediction is the target of any point between."""

    def model(x, timestep, labels):
        target = clean.repeat(len(x) // len(clean), *(1,) * (clean.ndim - 1))
        if calls is not None:
            calls.append(len(x))
        if objective is flow.FLOW:
            sigma = (timestep / 1000).view(-1, *(1,) * (x.ndim - 1))
            return torch.cat([(target - x) / sigma, x], dim=1)
        alphas = objective.scheduler().alphas_cumprod[timestep.long()].double()
        alpha, sigma = (a.sqrt().view(-1, *(1,) * (x.ndim - 1)) for a in (alphas, 1 - alphas))
        return alpha * (x - alpha * target) / sigma - sigma * target

    return model


def test_resolution_shift():
    assert flow.resolution_shift(512, 512) == 1
    assert flow.resolution_shift(1024, 1024) == 2
    assert flow.resolution_shift(256, 1024, frames=9) == pytest.approx(3)
    with pytest.raises(ValueError, match="positive; got 0, 512, 1"):
        flow.resolution_shift(0, 512)


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("shift", [0.25, 1.0, math.sqrt(3 * 4)])
def test_the_scheduler_follows_the_release(steps, shift):
    pytest.importorskip("diffusers")
    scheduler = flow.FLOW.scheduler()
    flow.FLOW.set_timesteps(scheduler, steps, shift)
    for i in range(steps):
        sigma = 1 - i / steps
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        assert abs(float(scheduler.sigmas[i]) - sigma) < 1e-6
        assert abs(float(scheduler.timesteps[i]) - 1000 * sigma) < 1e-6 * 1000
        assert abs(float(flow.sigmas(steps, shift)[i]) - sigma) < 1e-12
    assert scheduler.sigmas[steps] == 0


@pytest.mark.parametrize("objective", flow.OBJECTIVES.values(), ids=lambda o: o.name)
def test_sampling_goes_from_noise_to_the_data_that_the_model_knows(objective):
    """A wrong sign or scale of the prediction would end elsewhere."""
    pytest.importorskip("diffusers")
    clean, noise = torch.randn(2, 2, 3, 5, 4).double().unbind()
    found = flow.sample(exact(clean, objective), noise, LABELS, LABELS, objective=objective)
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)


def test_steps_are_eulers():
    pytest.importorskip("diffusers")
    noise, velocity = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64).unbind()
    seen = []

    def model(x, timestep, labels):
        seen.append(timestep.tolist())
        return velocity

    found = flow.sample(model, noise, LABELS, LABELS, steps=4, guidance=1, shift=2.0)
    torch.testing.assert_close(found, noise + velocity, atol=1e-6, rtol=0)
    levels = [0.0 + 2 * s / (1 + s) for s in (1, 0.75, 0.5, 0.25)]
    assert [t for t, _ in seen] == pytest.approx([1000 * level for level in levels])


def test_training_pairs():
    clean, noise = torch.randn(2, 3, 2, 4, 6).unbind()
    timestep = torch.tensor([0.0, 250.0, 1000.0])
    noisy, target = flow.FLOW.corrupt(clean, noise, timestep)
    torch.testing.assert_close(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    torch.testing.assert_close(noisy[2], noise[2])
    torch.testing.assert_close(target, clean - noise)


def test_v_is_the_derivative_along_the_circle():
    pytest.importorskip("diffusers")
    clean, noise = torch.randn(2, 2, 2, 4, 6).unbind()
    noisy, target = flow.V.corrupt(clean, noise, torch.tensor([100.0, 999.0]))
    alphas = flow.V.scheduler().alphas_cumprod[[100, 999]].view(2, 1, 1, 1)
    alpha, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    torch.testing.assert_close(alpha * noisy - sigma * target, clean)
    torch.testing.assert_close(noisy[1], noise[1])  # the last level is pure noise


def test_timesteps_are_logit_normal_and_shifted():
    count = 20_000
    drawn = flow.FLOW.timesteps(count, 3.0, torch.Generator().manual_seed(0)).double() / 1000
    assert drawn.min() > 0
    assert drawn.max() < 1
    unshifted = drawn / (3 - 2 * drawn)
    normal = unshifted.logit()
    assert abs(normal.mean()) < 4 / math.sqrt(count)
    assert abs(normal.std() - 1) < 4 / math.sqrt(2 * count)


def test_the_loss_ignores_the_learned_sigma():
    prediction, target = torch.randn(2, 8, 4, 6), torch.randn(2, 4, 4, 6)
    expected = (prediction[:, :4] - target).square().mean()
    torch.testing.assert_close(flow.loss(prediction, target), expected)


def test_guidance():
    x, timestep = torch.randn(2, 3, 4, 6), torch.tensor([500.0, 20.0])
    null = {"labels": torch.tensor([7, 7])}
    calls = []

    def model(x, timestep, labels):
        calls.append(len(x))
        value = labels.view(-1, 1, 1, 1) * x + timestep.view(-1, 1, 1, 1)
        return torch.cat([value, value + 1], dim=1)

    conditional = LABELS["labels"].view(2, 1, 1, 1) * x + timestep.view(2, 1, 1, 1)
    without = 7 * x + timestep.view(2, 1, 1, 1)
    found = flow.guided(model, x, timestep, LABELS, null, 4.0)
    torch.testing.assert_close(found, without + 4 * (conditional - without))
    torch.testing.assert_close(flow.guided(model, x, timestep, LABELS, null, 1.0), conditional)
    assert calls == [4, 2]


def test_presets_are_the_releases_and_the_papers():
    assert (flow.FLOW.steps, flow.FLOW.guidance) == (30, 4.0)
    assert (flow.V.steps, flow.V.guidance) == (50, 6.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: flow.sigmas(0), "steps must be a positive integer; got 0"),
        (lambda: flow.sigmas(4, 0.0), "shift must be a positive number; got 0.0"),
        (lambda: flow.V.timesteps(2, 2.0, torch.Generator()), "shift must be 1 for v-prediction"),
        (
            lambda: flow.guided(
                torch.nn.Identity(), torch.zeros(2, 1, 2, 2), torch.zeros(2), LABELS, {}, 2.0
            ),
            "null must be like condition",
        ),
    ],
)
def test_nonsense_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_diffusers_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install ptattn\[train\]"):
        flow.FLOW.scheduler()
