"""Groupings: functions from a model (and its trace) to labels, found by name in one registry."""

from __future__ import annotations

from . import branches as branches  # they register the built-in groupings
from . import ensembles as ensembles
from . import experts as experts
from . import structural as structural
from . import traced as traced
from .registry import Grouping, GroupSpec, groupings, register_grouping, resolve
from .select import Select

__all__ = ["GroupSpec", "Grouping", "Select", "groupings", "register_grouping", "resolve"]
