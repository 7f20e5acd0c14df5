"""What the nodes of a graph say of themselves: names of operations, traced values, shapes, arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .origins import operation

Shape = tuple[int, ...]

_ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs",
    "clip": "clamp", "concat": "cat", "concatenate": "cat", "special_expit": "sigmoid", "inner": "linear",
    "moveaxis": "movedim", "swapaxes": "transpose", "swapdims": "transpose", "_unsafe_view": "view",
    "_softmax": "softmax", "_log_softmax": "log_softmax",
}  # fmt: skip


def op_name(node: Node) -> str:
    """Return the one name of a node's operation, such as ``conv2d``, whatever alias of it was called.

    Rules compare this name; `operation` says in messages what was called.
    """
    name = operation(node).removeprefix("aten.")
    return _ALIASES.get(name, name)


def tensor_of(node: Node) -> Any:
    """Return the traced (fake) value of a node."""
    return node.meta.get("val")


def shape_of(node: Node) -> Shape:
    """Return the shape of a tensor-valued node."""
    return tuple(int(n) for n in tensor_of(node).shape)


def shape_of_value(value: Any) -> Shape:
    """Return the shape of a traced value, or of the first of several."""
    return tuple(int(n) for n in (value if isinstance(value, Tensor) else value[0]).shape)


def is_tensor(node: Node) -> bool:
    """Tell whether a node gives one tensor."""
    return isinstance(tensor_of(node), Tensor)


def has_tensors(node: Node) -> bool:
    """Tell whether a node gives a tensor, or several."""
    return isinstance(tensor_of(node), Tensor | tuple | list)


def tensor_inputs(node: Node) -> tuple[Node, ...]:
    """Return the nodes that a node reads tensors from, each once."""
    return tuple(n for n in node.all_input_nodes if has_tensors(n))


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a node, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def argument_names(node: Node) -> list[str]:
    """Return the names of an operation's arguments, in their order."""
    target: Any = node.target
    return [a.name for a in target._schema.arguments]


def is_random(node: Node) -> bool:
    """Tell whether a node draws random numbers; dropout, say, where it was traced in training."""
    name = op_name(node)
    idle = (
        (name.endswith("dropout") and not argument(node, 2, "train", True))
        or (name == "rrelu" and not argument(node, 3, "training", False))
        or (name == "scaled_dot_product_attention" and not argument(node, 4, "dropout_p", 0.0))
    )
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", []) and not idle


def names(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())
