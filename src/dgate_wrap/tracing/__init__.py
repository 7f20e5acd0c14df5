"""Tracing: from a model and example inputs to a graph of ATen operations that knows every parameter by name."""

from __future__ import annotations

from .capture import Inputs, Source, Trace, capture, normalize_inputs
from .interpreter import find_structure
from .structure import Structure

__all__ = ["Inputs", "Source", "Structure", "Trace", "capture", "find_structure", "normalize_inputs"]
