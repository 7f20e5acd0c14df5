"""Settings of the whole test run, docstring examples included."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--long``."""
    told = "try every architecture, not a third of those of transformers, and 100,000 random graphs"
    parser.addoption("--long", action="store_true", help=told)


@pytest.fixture(autouse=True, scope="session")
def names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    """Let every docstring example use ``torch`` without importing it."""
    doctest_namespace["torch"] = torch
