"""Export: prove what is dead, cut it out of a copy, and prove the smaller network equal."""

from __future__ import annotations

from .api import Exported, export
from .expand import expand
from .files import load, save

__all__ = ["Exported", "expand", "export", "load", "save"]
