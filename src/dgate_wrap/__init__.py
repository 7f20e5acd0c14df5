"""Make any PyTorch network smaller during ordinary training, and prove the smaller network equal.

D-Gating (Kolb et al., arXiv 2509.23898) writes each group of weights as ``w_g = ω_g · γ_{g,1} ··· γ_{g,D-1}``; plain L2
on the factors then is the group penalty ``‖w_g‖_2^{2/D}``, and whole groups reach zero during ordinary training.
"""

from .costs import group_costs
from .decay import param_groups
from .diagnostics import Group, Groups, balance_, groups, imbalance, misalignment
from .errors import (
    DGateError,
    DGateWarning,
    ExportError,
    FileFormatError,
    GateError,
    GroupingError,
    NotGatedError,
    PenaltyError,
    PrecisionWarning,
    PruneError,
    TraceError,
    TraceWarning,
    UnknownGroupingError,
)
from .explain import Explanation, explain
from .export import Exported, expand, export, load, save
from .gates import Gates
from .gating import gate, ungate
from .groupings import Grouping, Select, groupings, register_grouping
from .groupings.registry import unregister_grouping
from .labels import along, disjoint
from .penalty import Penalty, group_penalty
from .pruning import PruneReport, prune

__version__ = "0.1.0"

__all__ = [
    "DGateError",
    "DGateWarning",
    "Explanation",
    "ExportError",
    "Exported",
    "FileFormatError",
    "GateError",
    "Gates",
    "Group",
    "Grouping",
    "GroupingError",
    "Groups",
    "NotGatedError",
    "Penalty",
    "PenaltyError",
    "PrecisionWarning",
    "PruneError",
    "PruneReport",
    "Select",
    "TraceError",
    "TraceWarning",
    "UnknownGroupingError",
    "along",
    "balance_",
    "disjoint",
    "expand",
    "explain",
    "export",
    "gate",
    "group_costs",
    "group_penalty",
    "groupings",
    "groups",
    "imbalance",
    "load",
    "misalignment",
    "param_groups",
    "prune",
    "register_grouping",
    "save",
    "ungate",
    "unregister_grouping",
]
