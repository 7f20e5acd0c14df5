"""Settings of the whole test run, docstring examples included."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    """Let every docstring example use ``torch`` without importing it."""
    doctest_namespace["torch"] = torch
