"""Hypothesis profiles, one thread, one seed per test."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("quick", max_examples=30, derandomize=True, deadline=None)
hypothesis.settings.register_profile("full", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_configure():
    # Tensors here are small, and workers fill the cores: threads would only wait for one another.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
