from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "same",
    derandomize=True,  # the same examples every time
    deadline=None,  # a busy machine is slow
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def same_chance():
    """Each test draws the same numbers, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - MONAI and users' transforms draw from it
    torch.manual_seed(0)
