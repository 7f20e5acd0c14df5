"""Tracing: from a model and example inputs to a graph of ATen operations that knows every parameter by name."""

from __future__ import annotations

from .capture import Source, Trace, capture
from .inputs import Inputs, normalize_inputs
from .interpreter import find_structure
from .structure import Structure

__all__ = ["Inputs", "Source", "Structure", "Trace", "capture", "find_structure", "normalize_inputs"]
