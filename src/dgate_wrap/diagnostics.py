"""What the groups of a gated model are like: names, norms, who is alive, and how balanced their factors are.

The order of groups is the same everywhere: parameters in the order of the model's modules, groups by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .factorization import factor_penalty, group_norm, norm_penalty
from .factorization import imbalance as _imbalance
from .gates import balance_members, by_gates, omega_squares, require_gated
from .penalty import group_sizes


@dataclass(frozen=True)
class Group:
    """One group of weights.

    Args:
        name: The group's place in its first parameter, such as ``conv1.weight[3]``.
        kind: Name of its grouping.
        D: Number of factors.
        size: Number of weights, over all parameters.
        norm: ``‖w_g‖_2`` of the effective weights.
        alive: Whether the norm is not zero.
    """

    name: str
    kind: str
    D: int
    size: int
    norm: float
    alive: bool


@dataclass(frozen=True)
class Part:
    """The groups of parameters that share gates.

    Args:
        kind: Name of the grouping.
        D: Number of factors.
        parameters: Names of the parameters.
        index: Groups of the elements of the first parameter, for naming them.
        size: Number of weights per group, int64, shape ``(G,)``.
        norm: Norm of the effective weights per group, float64, shape ``(G,)``.
    """

    kind: str
    D: int
    parameters: tuple[str, ...]
    index: tuple[Tensor, ...]
    size: Tensor
    norm: Tensor

    def names(self) -> list[str]:
        """Return the name of each group: the indices it spans in its first parameter."""
        out: dict[int, str] = {}
        for parameter, index in zip(self.parameters, self.index, strict=True):
            for group, place in _places(index, self.size.numel()):
                out.setdefault(group, parameter + place)
        return [out[g] for g in range(self.size.numel())]


def _places(index: Tensor, num_groups: int) -> Iterator[tuple[int, str]]:
    """Yield each group of a parameter with what it spans there, as an index expression such as ``[3]`` or ``[0:4]``."""
    flat = index.flatten()
    where = (flat >= 0).nonzero().flatten()
    group = flat[where]
    spans: list[list[str]] = []
    for size, position in zip(index.shape, torch.unravel_index(where, index.shape), strict=True):
        first = position.new_full((num_groups,), size).scatter_reduce(0, group, position, "amin").tolist()
        last = position.new_full((num_groups,), -1).scatter_reduce(0, group, position, "amax").tolist()
        spans.append([_span(a, b, size) for a, b in zip(first, last, strict=True)])
    for g in group.unique().tolist():
        parts = [s[g] for s in spans]
        while parts and parts[-1] == ":":
            parts.pop()
        yield g, f"[{', '.join(parts)}]" if parts else ""


def _span(first: int, last: int, size: int) -> str:
    if last - first == size - 1:
        return ":"
    return str(first) if first == last else f"{first}:{last + 1}"


class Groups:
    """The groups of a gated model, as they are now. Iterates over `Group`; prints as a table, one row per part."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    @property
    def norm(self) -> Tensor:
        """Norm of the effective weights of every group, float64."""
        return torch.cat([p.norm for p in self.parts])

    @property
    def size(self) -> Tensor:
        """Number of weights of every group, int64."""
        return torch.cat([p.size for p in self.parts])

    @property
    def alive(self) -> Tensor:
        """Which groups have a norm above zero, bool."""
        return self.norm > 0

    @property
    def names(self) -> list[str]:
        """Name of every group."""
        return [name for p in self.parts for name in p.names()]

    def __len__(self) -> int:
        return sum(p.size.numel() for p in self.parts)

    def __iter__(self) -> Iterator[Group]:
        for p in self.parts:
            for name, size, norm in zip(p.names(), p.size.tolist(), p.norm.tolist(), strict=True):
                yield Group(name, p.kind, p.D, size, norm, norm > 0)

    def to_dict(self) -> dict[str, list[Any]]:
        """Return columns ``name, kind, D, size, norm, alive``, one entry per group."""
        rows = list(self)
        return {f: [getattr(r, f) for r in rows] for f in ("name", "kind", "D", "size", "norm", "alive")}

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with one row per group (pandas must be installed)."""
        import pandas

        return pandas.DataFrame(self.to_dict())

    def __str__(self) -> str:
        header = ("kind", "parameters", "D", "groups", "alive", "smallest", "median", "largest norm")
        rows: list[tuple[str, ...]] = [header]
        for p in self.parts:
            first, *others = p.parameters
            more = f" +{len(others)}" if others else ""
            q = [f"{float(v):.3g}" for v in (p.norm.min(), p.norm.median(), p.norm.max())]
            counts = (str(p.D), str(p.norm.numel()), str(int((p.norm > 0).sum())))
            rows.append((p.kind, first + more, *counts, *q))
        widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        alive = int(self.alive.sum())
        weights, all_weights = int(self.size[self.alive].sum()), int(self.size.sum())
        total = f"{alive} of {len(self)} groups alive, {weights} of {all_weights} gated weights"
        return "\n".join([*lines, total])

    __repr__ = __str__


def groups(model: nn.Module) -> Groups:
    """Return the groups of a gated model: names, kinds, D, sizes, norms and which are alive.

    Args:
        model: A gated model.

    Returns:
        `Groups`, a snapshot: prints as a table, iterates over `Group`, converts with ``to_dict`` and ``to_pandas``.

    Raises:
        NotGatedError: If the model holds no gates.

    Example:
        >>> import dgate_wrap as dg
        >>> model = dg.gate(torch.nn.Sequential(torch.nn.Linear(4, 3)), "neurons", D=2)
        >>> [g.name for g in dg.groups(model)]
        ['0.weight[0]', '0.weight[1]', '0.weight[2]']
    """
    parts: list[Part] = []
    with torch.no_grad():
        for gates, members in by_gates(require_gated(model, "cannot list groups")):
            norm = group_norm(omega_squares(members), gates.gamma.double())
            index = tuple(t.gate.index.cpu() for t in members)
            names = tuple(t.name for t in members)
            parts.append(Part(gates.kind, gates.D, names, index, group_sizes(members).cpu(), norm.cpu()))
    return Groups(parts)


def _per_group(model: nn.Module, what: str, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Evaluate ``value(‖ω_g‖², γ_g)`` for every group, in float64."""
    tensors = require_gated(model, f"cannot compute the {what}")
    with torch.no_grad():
        return torch.cat([value(omega_squares(m), g.gamma.double()).cpu() for g, m in by_gates(tensors)])


def misalignment(model: nn.Module) -> Tensor:
    """Return how far the smooth penalty of each group lies above its group penalty.

    ``(‖ω_g‖² + Σ_d γ_{g,d}²) / D − ‖w_g‖^{2/D}``, the difference of an arithmetic and a geometric mean: at least 0,
    and 0 exactly when all factors of the group have the same norm.

    Args:
        model: A gated model.

    Returns:
        float64, shape ``(number of groups,)``, in the order of `groups`.

    Raises:
        NotGatedError: If the model holds no gates.

    Example:
        >>> import dgate_wrap as dg
        >>> model = dg.gate(torch.nn.Linear(3, 2), "neurons", D=2, init="balanced")
        >>> bool(dg.misalignment(model).max() < 1e-6)
        True

    Reference:
        Kolb et al., arXiv 2509.23898, Lemma 1.
    """
    value = _per_group(model, "misalignment", lambda s, g: factor_penalty(s, g) - norm_penalty(s, g))
    return value.clamp_min(0)


def imbalance(model: nn.Module) -> Tensor:
    """Return the largest difference between the squared norms of two factors of each group.

    Under gradient flow of the penalized loss it decays as ``exp(−4 λ t / D)``, whatever the loss.

    Args:
        model: A gated model.

    Returns:
        float64, shape ``(number of groups,)``, in the order of `groups`; 0 where a group is balanced.

    Raises:
        NotGatedError: If the model holds no gates.

    Example:
        >>> import dgate_wrap as dg
        >>> model = dg.gate(torch.nn.Linear(3, 2), "neurons", D=3)
        >>> bool(dg.imbalance(dg.balance_(model)).max() < 1e-6)
        True

    Reference:
        Kolb et al., arXiv 2509.23898, Lemma 2.
    """
    return _per_group(model, "imbalance", _imbalance)


def balance_(model: nn.Module) -> nn.Module:
    """Balance every group in place, without changing the function, and return the model.

    All factors of a group get the norm ``‖w_g‖^{1/D}`` and keep their signs; ω keeps its direction. This minimizes the
    penalty over all factorizations of the same weights. A group of norm zero gets zero factors, and stays zero.

    Args:
        model: A gated model.

    Returns:
        The same model.

    Raises:
        NotGatedError: If the model holds no gates.

    Example:
        >>> import dgate_wrap as dg
        >>> model = dg.gate(torch.nn.Linear(3, 2), "neurons", D=3)
        >>> before = model.weight.clone()
        >>> torch.allclose(dg.balance_(model).weight, before)
        True
    """
    for _, members in by_gates(require_gated(model, "cannot balance")):
        balance_members(members, keep_zero_groups=False)
    return model
