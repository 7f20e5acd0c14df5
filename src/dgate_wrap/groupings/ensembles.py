"""Groupings of members that work side by side: branches of a late fusion, shape functions, trees.

Each is read from the graph alone: who computes what from which origins, and never from names.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import GroupingError
from ..tracing import Trace
from ..tracing.additive import AdditiveModel
from ..tracing.flow import Flow, StuckError
from ..tracing.fusion import find_fusion
from ..tracing.routing import find_trees
from .registry import register_grouping


@register_grouping("subnetworks", needs_trace=True)
@register_grouping("modalities", needs_trace=True)
def modalities(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every branch of a late fusion.

    A fusion joins values by concat, stack or addition whose subnetworks share no operation that reads a parameter and
    reach the output through the fusion only; of several, the one nearest the output is taken. A branch is a
    subnetwork with a contraction and a nonlinearity, whether it reads an input of its own or shares it; beside such
    branches, one that is shallower counts if it alone reads its input. After a concat, a group is the columns of the
    fusion layers that read the branch: without them nothing reads it. In a sum, and where a norm mixes the
    concatenated values, it is the last projection of the branch (weight and bias): without it the branch adds zero.
    """
    try:
        return find_fusion(Flow(trace))
    except StuckError as e:
        raise GroupingError(
            f"the model has no late fusion: {e}.",
            expected="at least two subnetworks, each with weights and a nonlinearity of its own down to the model's "
            "inputs, that meet for the first time in a concat or a sum",
            mend='dg.gate(model, dg.Select("fusion.weight", axis=1, block=16)) gates blocks of columns by hand',
        ) from None


@register_grouping("shape_functions", needs_trace=True)
def shape_functions(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every shape function of a neural additive model.

    A group is all first-layer weights of the subnetwork that reads one input feature, or one set of features (a
    pairwise interaction): without them the shape function is a constant. The model is additive if its features stay
    apart through a nonlinearity, whatever mixes them is linear (a sum, a mean, a linear map), and what follows is a
    link function at most. Subnetworks that read the same features, or share first-layer weights, are one group.
    """
    try:
        return AdditiveModel(Flow(trace)).labels()
    except StuckError as e:
        raise GroupingError(
            f"the model has no shape functions: {e}.",
            expected="subnetworks of one feature (or a few) each, whose outputs meet in a sum, a mean or a linear map, "
            "with nothing but a link function behind it",
            mend='dg.gate(model, "input_features", example_inputs=x) gates all weights that read a feature, '
            'dg.gate(model, "modalities", example_inputs=x) the branches of a late fusion',
        ) from None


@register_grouping("trees", needs_trace=True)
def trees(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every tree of a neural tree ensemble.

    A group is the response (leaf) weights of one tree: without them the tree answers zero, whatever its routing says.
    A response is a weight that multiplies leaf probabilities: products of gate factors, or a softmax, that sum to one
    over the leaves (tried with noise on all weights), with no other activation as a factor. So neither the experts of
    a mixture nor gated units are trees. Of the axes that a response shares with the probabilities, the one over which
    these sum to one is the leaves, the others are the trees. Where a softmax is all that routes, it takes two trees
    side by side: a lone softmax in front of a layer is none. Where leaves hold class probabilities (a softmax of the
    weights), a tree at zero answers the uniform distribution.
    """
    try:
        return find_trees(Flow(trace))
    except StuckError as e:
        raise GroupingError(
            f"the model has no trees: {e}.",
            expected="leaf probabilities (products of sigmoids, entmoids and the like, or softmaxes) times weights",
            mend='dg.gate(model, dg.Select("*.response", axis=0)) gates an axis of a parameter by hand',
        ) from None
