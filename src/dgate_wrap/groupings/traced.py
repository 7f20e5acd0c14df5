"""Groupings that are read off the trace."""

from __future__ import annotations

from torch import Tensor, nn

from ..tracing import Trace, find_structure
from .registry import register_grouping


@register_grouping("channels", needs_trace=True)
def channels(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every channel with all weights that make it, coupled from end to end.

    A group is the rows that produce the channel, their biases and the norm parameters that adjust it, on every layer
    that is added to the same residual stream. Zeroing the group makes the channel exactly zero, or a constant, wherever
    it appears. Channels that reach the model's output, or an operation without a rule, are left alone.
    """
    return find_structure(trace).channel_labels()
