"""Gates as they stand in a model: their modules, the parametrizations that share them, and how to find them again.

A gated parameter keeps the user's ``Parameter`` object as ω, torch's ``original``; its parametrization multiplies it by
the product of its group's gates. The gates of a set of coupled parameters are one `Gates` module, which all of their
parametrizations share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import NotGatedError
from .factorization import balanced_scales, gate_column, gate_product, spread, sum_by_group


class Gates(nn.Module):
    """The scalar gates of ``G`` groups, shared by every parametrization whose parameter holds one of the groups.

    Args:
        kind: Name of the grouping.
        num_groups: ``G``.
        D: Number of factors of a weight; there are ``D - 1`` gates per group.
        dtype: At least float32.
        device: Where the gates live.

    The parameter ``gamma`` has shape ``(G, D-1)`` and starts at one. Casting the model to a dtype of fewer than 32 bits
    leaves it as it is: in bfloat16 a step of weight decay would round to nothing and no gate would ever decay.
    """

    def __init__(self, kind: str, num_groups: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.kind = kind
        self.gamma = nn.Parameter(torch.ones(num_groups, D - 1, dtype=dtype, device=device))
        self.frozen: list[nn.Parameter] = []

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return self.gamma.shape[0]

    @property
    def D(self) -> int:
        """Number of factors: ω and the gates."""
        return self.gamma.shape[1] + 1

    def extra_repr(self) -> str:
        """Show the kind, the number of groups and D in ``print(model)``."""
        return f"{self.kind!r}, groups={self.num_groups}, D={self.D}"

    def _apply(self, fn: Any, recurse: bool = True) -> Gates:
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            narrowed = out.is_floating_point() and out.dtype.itemsize < 4
            return t.to(out.device) if narrowed else out

        return cast(Gates, super()._apply(keep_precision, recurse))


class GatedWeight(nn.Module):
    """Multiply ω by the product of each group's gates: the parametrization of one parameter.

    Args:
        gates: The gates, shared with the other parameters of the same groups.
        index: Groups ``0 .. G-1`` of the elements, -1 where ungated; int64, broadcasts to ω and has as many axes.
        order: The names of the host's parameters before gating, to give them back in that order.
    """

    _gather: Tensor | None

    def __init__(self, gates: Gates, index: Tensor, order: tuple[str, ...]) -> None:
        super().__init__()
        self.gates = gates
        self.order = order
        self.shape = tuple(index.shape)
        flat = index.flatten()
        self.start = int(flat[0]) if flat.numel() else 0
        self.size = flat.numel()
        consecutive = bool((flat == torch.arange(self.start, self.start + flat.numel(), device=flat.device)).all())
        self.in_order = consecutive and self.start >= 0
        self.whole = self.size == gates.num_groups  # flags, not comparisons: each step of training pays for them
        self.is_column = self.shape == (self.size, 1)
        self.register_buffer("_gather", None if self.in_order else index, persistent=False)

    @property
    def index(self) -> Tensor:
        """Groups of the elements, broadcasting to ω; -1 where ungated."""
        if self._gather is not None:
            return self._gather
        return torch.arange(self.start, self.start + self.size, device=self.gates.gamma.device).view(self.shape)

    @property
    def covers_all(self) -> bool:
        """Whether every element is gated."""
        return self._gather is None or bool((self._gather >= 0).all())

    def forward(self, omega: Tensor) -> Tensor:
        """Return the effective weight ``ω · Π_d γ_d``, in ω's shape and dtype."""
        gamma = self.gates.gamma
        if self.in_order:
            factor = gate_column(gamma if self.whole else gamma.narrow(0, self.start, self.size))
            if not self.is_column:
                factor = factor.view(self.shape)
        else:
            factor = spread(gate_product(gamma), cast(Tensor, self._gather), 1.0)
        if factor.device != omega.device:
            factor = factor.to(omega.device)
        weight = omega * factor
        if weight.dtype != omega.dtype:
            weight = weight.to(omega.dtype)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _in_functorch()):
            # torch.matmul folds batches by whether a weight requires gradients: as a Parameter does, even under no_grad
            weight.requires_grad_(omega.requires_grad or gamma.requires_grad)
        return weight


def _in_functorch() -> bool:
    """Tell whether torch.func transforms this call; it forbids requires_grad_()."""
    return cast(Any, torch._C)._functorch.peek_interpreter_stack() is not None


_AT_ONCE = 1 << 17
"""How many elements are squared at a time: float64 squares of a whole large weight cost more memory than it does."""


@dataclass(frozen=True)
class GatedTensor:
    """One gated parameter of a model, tied names counted once.

    Args:
        name: Its first qualified name, as before gating.
        omega: ω, the user's own ``Parameter`` object.
        gate: Its parametrization.
        hosts: The modules that hold it, and its name there.
    """

    name: str
    omega: nn.Parameter
    gate: GatedWeight
    hosts: tuple[tuple[nn.Module, str], ...]

    @property
    def gates(self) -> Gates:
        """The gates of its groups."""
        return self.gate.gates

    def mask(self, doomed: Tensor) -> Tensor:
        """Mark the elements whose group is marked in ``doomed``, shape ``(G,)``; broadcasts to ω."""
        return spread(doomed, self.gate.index.to(doomed.device), False).to(self.omega.device)


def gated_tensors(model: nn.Module) -> list[GatedTensor]:
    """Return the gated parameters of a model, in the order of its modules; empty if there are none."""
    found: dict[tuple[int, int], GatedTensor] = {}
    for prefix, host in model.named_modules():
        for name, chain in parametrizations_of(host).items():
            for gate in (p for p in chain if isinstance(p, GatedWeight)):
                fqn = f"{prefix}.{name}" if prefix else name
                omega = cast(nn.Parameter, chain.original)
                key = (id(omega), id(gate.gates))
                before = found.get(key, GatedTensor(fqn, omega, gate, ()))
                found[key] = GatedTensor(before.name, omega, before.gate, (*before.hosts, (host, name)))
    return list(found.values())


def require_gated(model: nn.Module, what: str) -> list[GatedTensor]:
    """Return the gated parameters, or raise if there are none."""
    found = gated_tensors(model)
    if not found:
        raise NotGatedError(what)
    return found


def by_gates(tensors: Sequence[GatedTensor]) -> Iterator[tuple[Gates, list[GatedTensor]]]:
    """Yield each ``Gates`` with the parameters that share it."""
    members: dict[int, list[GatedTensor]] = {}
    for t in tensors:
        members.setdefault(id(t.gates), []).append(t)
    for group in members.values():
        yield group[0].gates, group


def omega_squares(members: Sequence[GatedTensor]) -> Tensor:
    """Return ``‖ω_g‖²`` of every group in float64 over all the parameters that share its gates, shape ``(G,)``."""
    gates = members[0].gates
    total = torch.zeros(gates.num_groups, dtype=torch.float64, device=gates.gamma.device)
    for t in members:
        omega, index = t.omega.detach(), t.gate.index.to(t.omega.device)
        for part, groups in _pieces(omega, index, max(_AT_ONCE, gates.num_groups)):
            total += sum_by_group(part.double().square(), groups, gates.num_groups).to(total.device)
    return total


def _pieces(x: Tensor, index: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a tensor in pieces of about as many elements along its first axis, with the groups of their elements."""
    if x.numel() <= size:
        yield x, index
        return
    rows = max(1, size * len(x) // x.numel())
    parts = x.split(rows)
    yield from zip(parts, index.split(rows) if len(index) > 1 else [index] * len(parts), strict=True)


def parametrizations_of(host: nn.Module) -> dict[str, Any]:
    """Return the parametrizations of a module by parameter name; empty if it has none."""
    return dict(cast(Any, host).parametrizations.items()) if parametrize.is_parametrized(host) else {}


def computed_weights(host: nn.Module) -> list[str]:
    """Return the names of a module's weights that others are computed into.

    By parametrizations, or by hooks before each forward: the old ``weight_norm`` and ``spectral_norm``, and
    ``torch.nn.utils.prune``.
    """
    hooked = [
        n for n, t in vars(host).items() if isinstance(t, Tensor) and {f"{n}_v", f"{n}_orig"} & {*host._parameters}
    ]
    return [*parametrizations_of(host), *hooked]


@torch.no_grad()
def balance_members(members: Sequence[GatedTensor], *, keep_zero_groups: bool) -> None:
    """Give all factors of each group the same norm, without changing their product."""
    gates = members[0].gates
    squares = omega_squares(members)
    scale, gamma = balanced_scales(squares, gates.gamma.double())
    if keep_zero_groups:
        zero = squares == 0
        scale = torch.where(zero, 1.0, scale)
        gamma = torch.where(zero.unsqueeze(1), gates.gamma.double(), gamma)
    for t in members:
        t.omega.mul_(spread(scale, t.gate.index.to(scale.device), 1.0).to(t.omega.device))
    gates.gamma.copy_(gamma)
