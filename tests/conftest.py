"""What every test starts from: a fixed seed, and one thread."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # on models this small, handing work to a second thread takes thirty times the work
# torch's first call of an operation can take long, which says nothing about the example that came first
settings.register_profile("dgate", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("dgate")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
