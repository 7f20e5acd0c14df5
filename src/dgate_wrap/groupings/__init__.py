"""Groupings: functions from a model (and its trace) to labels, found by name in one registry."""

from __future__ import annotations

from . import structural as structural  # they register the built-in groupings
from . import traced as traced
from .registry import Grouping, GroupSpec, groupings, register_grouping, resolve
from .select import Select

__all__ = ["GroupSpec", "Grouping", "Select", "groupings", "register_grouping", "resolve"]
