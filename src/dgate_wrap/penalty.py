"""The D-Gating penalty in its three equivalent forms: a term, a gradient added at the step, and weight decay.

    (λ/D) · Σ_g w_g ( ‖ω_g‖² + Σ_d γ_{g,d}² )

whose local minima are those of ``λ · Σ_g w_g ‖w_g‖_2^{2/D}``. ``w_g`` are optional weights of the groups, 1 by default.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from .errors import PenaltyError, PrecisionWarning
from .factorization import norm_penalty, spread
from .gates import GatedTensor, Gates, by_gates, omega_squares, require_gated
from .groupings.select import matches
from .optimizers import adopt_factors, innermost

Scheme = Literal["uniform", "size", "sqrt_size"]
GroupWeights = Scheme | Mapping[str, "float | Scheme | Tensor"]

_SCHEMES: dict[object, float] = {"uniform": 0.0, "sqrt_size": 0.5, "size": 1.0}
"""The power of a group's number of weights that its weight is."""

_appliers: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""γ → weak reference to the `_Applier` of a penalty to it."""


def group_weights(tensors: list[GatedTensor], weights: GroupWeights) -> dict[int, Tensor]:
    """Return the weight ``w_g`` of every group, shape ``(G,)`` per ``id(gates)``; later rules override earlier ones."""
    if not isinstance(weights, Mapping) and weights not in _SCHEMES:
        raise PenaltyError(
            f"weights={weights!r}.",
            expected=f"{_SAID}, or a mapping from kinds or globs on parameter names to these, numbers or tensors",
            mend='dg.Penalty(model, lam=1e-4, weights={"conv1.*": 0.5})',
        )
    parts = list(by_gates(tensors))
    out = {id(g): torch.ones(g.num_groups, dtype=torch.float64, device=g.gamma.device) for g, _ in parts}
    idle: list[str] = []
    rules = weights if isinstance(weights, Mapping) else {"*": weights}
    for pattern, value in rules.items():
        matched = [p for p in parts if p[0].kind == pattern or any(matches(t.name, [pattern]) for t in p[1])]
        if not matched:
            idle.append(pattern)
        else:
            found = _rule_weights(pattern, value, matched)
            out |= {id(g): w.to(g.gamma.device) for (g, _), w in zip(matched, found, strict=True)}
    if idle:
        raise PenaltyError(
            f"weights: {', '.join(map(repr, idle))} match no kind and no gated parameter.",
            expected="kinds or globs among "
            + ", ".join(sorted({g.kind for g, _ in parts}))
            + ", "
            + ", ".join(t.name for t in tensors[:4]),
            mend='dg.Penalty(model, lam=1e-4, weights={"filters": 0.5})',
        )
    return out


_SAID = ", ".join(map(repr, _SCHEMES))


def _rule_weights(pattern: str, value: object, matched: list[tuple[Gates, list[GatedTensor]]]) -> Sequence[Tensor]:
    """Return the weights that one rule gives to the groups it matches, per gates."""
    if isinstance(value, str) and value in _SCHEMES:
        return [group_sizes(members).double().pow(_SCHEMES[value]) for _, members in matched]
    counts = [gates.num_groups for gates, _ in matched]
    if not isinstance(value, Tensor):
        number = _nonnegative(value, f"the weight of {pattern!r}", f", {_SAID}, or a tensor of one weight per group")
        return torch.full((sum(counts),), number, dtype=torch.float64).split(counts)
    w = value.detach().double()
    if w.shape != (sum(counts),) or not bool((w.isfinite() & (w >= 0)).all()):
        low = f", and the smallest is {float(w.min()):.3g}" if w.numel() else ""
        raise PenaltyError(
            f"the weights of {pattern!r} have shape {tuple(w.shape)} for {sum(counts)} groups{low}.",
            expected="one finite number of at least 0 per group, in the order of dg.groups(model)",
            mend="dg.Penalty(model, lam=1e-4, weights=dg.group_costs(model, example_inputs))",
        )
    return w.split(counts)


def group_sizes(members: list[GatedTensor]) -> Tensor:
    """Return how many weights each group has over all parameters that share its gates, int64, shape ``(G,)``."""
    total = torch.zeros(members[0].gates.num_groups, dtype=torch.int64, device=members[0].gates.gamma.device)
    for t in members:
        index = t.gate.index
        per_entry = t.omega.numel() // max(1, index.numel())
        total += torch.bincount(index.flatten() + 1, minlength=total.numel() + 1)[1:].to(total.device) * per_entry
    return total


def _nonnegative(value: object, what: str, other: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise PenaltyError(
            f"{what} is {value!r}.",
            expected="a finite number of at least 0" + other,
            mend="dg.Penalty(model, lam=1e-4)",
        )
    return float(value)


class Penalty:
    """The penalty of a gated model: differentiable term, or exact gradient inside any optimizer's step.

    ``penalty()`` is the term ``(λ/D) · Σ_g w_g ( ‖ω_g‖² + Σ_d γ_{g,d}² )``, to be added to a loss. ``attach`` instead
    adds its gradient, ``(2λ/D) · w_g · θ``, when the optimizer steps: after gradient scaling and clipping, once per
    step whatever the number of accumulated batches, with no change of the loss. Use one of the two.

    Args:
        model: A gated model.
        lam: λ, at least 0. May be changed at any time (``penalty.lam = ...``).
        weights: ``w_g``: ``"uniform"`` (1), ``"size"`` (the group's number of weights), ``"sqrt_size"`` (its root), or
            a mapping from kinds or globs on parameter names to any of these, a number, or a tensor of one number per
            group (`group_costs`); groups that match nothing have 1, those that match several rules the last.

    Raises:
        NotGatedError: If the model holds no gates.
        PenaltyError: If λ or a weight is negative or not finite, or weights match nothing.

    Warns:
        PrecisionWarning: If ω is trained in 16 bits, where small steps of the penalty round to nothing.

    Example:
        >>> import dgate_wrap as dg
        >>> model = dg.gate(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3)), "filters", D=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> penalty = dg.Penalty(model, lam=1e-3).attach(optimizer)
        >>> model(torch.randn(2, 1, 6, 6)).square().mean().backward()
        >>> optimizer.step()
        >>> penalty.lam = 2e-3

    Reference:
        Kolb et al., arXiv 2509.23898, equation of the D-Gating objective.
    """

    def __init__(self, model: nn.Module, lam: float, *, weights: GroupWeights = "uniform") -> None:
        tensors = require_gated(model, "cannot penalize")
        self.lam = lam
        _warn_of_16_bits(tensors)
        self._model = model
        self._weights: GroupWeights = weights
        self._hooks: list[weakref.ref[_StepHook]] = []
        self._collect(tensors)

    def _collect(self, tensors: list[GatedTensor]) -> None:
        """Take the factors as they stand in the model."""
        per_gates = group_weights(tensors, self._weights)
        self._tensors = tensors
        self._factors: list[tuple[nn.Parameter, float | Tensor]] = []
        """Every factor θ with its coefficient ``w_g / D``: a number, or a tensor that broadcasts to θ."""
        for t in tensors:
            index = t.gate.index
            w = per_gates[id(t.gates)] / t.gates.D
            self._factors.append((t.omega, _coefficient(w, t, index)))
        for gates, _ in by_gates(tensors):
            w = per_gates[id(gates)] / gates.D
            uniform = bool((w == w[0]).all())
            self._factors.append((gates.gamma, float(w[0]) if uniform else w.to(gates.gamma.dtype).unsqueeze(1)))
        self._gammas = [gates.gamma for gates, _ in by_gates(tensors)]
        self._names = _factor_names(tensors)

    def _refresh(self) -> None:
        """Follow the model: ``fully_shard`` replaces its parameters, and it may be on another device by now."""
        if {id(p) for t in self._tensors for p in (_omega_now(t), t.gates.gamma)} != self._names.keys():
            self._collect(require_gated(self._model, "cannot penalize"))
        self._factors = [(p, _beside(c, p) if isinstance(c, Tensor) else c) for p, c in self._factors]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the optimizers out of copies: a copy of the model has others."""
        return {**vars(self), "_hooks": []}

    @property
    def lam(self) -> float:
        """λ."""
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        self._lam = _nonnegative(value, "lam")

    def __call__(self) -> Tensor:
        """Return the differentiable term, a scalar tensor.

        Raises:
            PenaltyError: If an optimizer applies a penalty to this model already.
        """
        if torch.is_grad_enabled():
            self._refuse_twice()
        return self._term()

    def value(self) -> float:
        """Return the term as a number for logging, whether or not an optimizer applies it. If sharded, on all ranks."""
        return float(self._detached())

    @torch.no_grad()
    def _detached(self) -> Tensor:
        return self._term()

    def _term(self) -> Tensor:
        self._refresh()
        total: Tensor | None = None
        for theta, c in self._factors:
            squares = theta * theta
            part = _whole(squares.sum() * c if isinstance(c, float) else (squares * c).sum())
            total = part if total is None else total + part.to(device=total.device)
        return self.lam * cast(Tensor, total)

    def attach(self, *optimizers: Optimizer, adopt: bool = False) -> Penalty:
        """Add the penalty's exact gradient whenever the optimizers step, and return the penalty.

        The gradient is added in a step pre-hook, so that loss, gradient scaling and clipping are the user's own. A
        closure (LBFGS) gets the term added to its loss and the gradient at each evaluation. Trainable factors that the
        optimizer holds at a step are penalized, though frozen, added or sharded since. A copy of an optimizer
        (``copy.deepcopy``, pickle) has no hooks: attach a penalty of the copied model to it.

        Args:
            optimizers: One optimizer, or several that share the model's factors among them. Of a trainer's wrapper, the
                optimizer inside it is taken.
            adopt: Mend the first optimizer instead of raising: add gates that it lacks, and move factors that stand
                under weight decay into a parameter group without.

        Returns:
            This penalty.

        Raises:
            PenaltyError: If a penalty is applied already, the optimizers lack a factor, or one of them decays
                factors by itself. Nothing is then attached.
        """
        optimizers = tuple(innermost(o) for o in optimizers)
        if not optimizers or not all(isinstance(cast(object, o), Optimizer) for o in optimizers):
            raise PenaltyError(
                f"attach got {', '.join(type(o).__name__ for o in optimizers) or 'nothing'}.",
                expected="torch optimizers",
                mend="penalty.attach(optimizer), with torch.optim.SGD(model.parameters(), lr=0.1) or any other",
            )
        self._refresh()
        self._refuse_twice()
        self._check_covered(optimizers, adopt)
        self._check_decay(optimizers, adopt)
        if adopt:
            adopt_factors(optimizers[0], optimizers, [p for p, _ in self._factors if p.requires_grad])
        hooks = [_StepHook(self, o) for o in optimizers]
        self._hooks = [weakref.ref(hook) for hook in hooks]
        for optimizer, hook in zip(optimizers, hooks, strict=True):
            hook.follow(optimizer)
            hook.handle = optimizer.register_step_pre_hook(hook)
        return self

    def detach(self) -> None:
        """Stop adding the gradient to the optimizers it was attached to."""
        for ref in self._hooks:
            hook = ref()
            if hook is not None:
                hook.remove()
        self._hooks.clear()

    def _refuse_twice(self) -> None:
        if _applier(self._gammas) is not None:
            gc.collect()  # an optimizer that was dropped, but stands in a reference cycle with its scheduler
            applier = _applier(self._gammas)
            if applier is not None:
                raise PenaltyError(
                    f"a penalty is applied to this model already, {applier.how}.",
                    expected="one form of the penalty: penalty() in the loss, attach(optimizer), or dg.param_groups",
                    mend="penalty.value() for logging; penalty.lam = ... to change λ; penalty.detach() to stop, or "
                    "before attach(optimizer) to the next one, as when a trainer fits again",
                )

    def _check_covered(self, optimizers: Iterable[Optimizer], adopt: bool) -> None:
        held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        missing = [self._names[id(p)] for p, _ in self._factors if p.requires_grad and id(p) not in held]
        if missing and not adopt:
            raise PenaltyError(
                f"the optimizer lacks {len(missing)} of {len(self._factors)} factors: {_some(missing)}.",
                expected="all trainable gates and gated weights among the optimizer's parameters",
                mend="penalty.attach(optimizer, adopt=True) adds them; or make the optimizer after dg.gate",
            )

    def _check_decay(self, optimizers: Iterable[Optimizer], adopt: bool) -> None:
        factors = {id(p) for p, _ in self._factors}
        decayed = [
            (o, p)
            for o in optimizers
            for g in o.param_groups
            if g.get("weight_decay")
            for p in g["params"]
            if id(p) in factors
        ]
        if decayed and not adopt:
            kinds = sorted({type(o).__name__ for o, _ in decayed})
            raise PenaltyError(
                f"{' and '.join(kinds)} decays {len(decayed)} factors by itself (weight_decay > 0): "
                f"{_some([self._names[id(p)] for _, p in decayed])}. Coupled decay would add a second penalty, "
                "decoupled decay (AdamW) has another minimum.",
                expected="weight_decay=0 for gates and gated weights",
                mend="penalty.attach(optimizer, adopt=True) exempts them; or set weight_decay=0",
            )


def _coefficient(w: Tensor, t: GatedTensor, index: Tensor) -> float | Tensor:
    """Return ``w_g / D`` for the elements of ω: one number if it is the same for all, else a tensor; 0 if ungated."""
    if t.gate.covers_all and bool((w == w[0]).all()):
        return float(w[0])
    return spread(w, index.to(w.device), 0.0).to(device=t.omega.device, dtype=t.omega.dtype)


def _omega_now(t: GatedTensor) -> Tensor | None:
    """Return ω as its host holds it by now; None if it was ungated. Each call of a penalty pays for this."""
    host, name = t.hosts[0]
    chains = host._modules.get("parametrizations")
    chain = None if chains is None else chains._modules.get(name)
    return None if chain is None else chain._parameters.get("original")


def _beside(c: Tensor, theta: Tensor) -> Tensor:
    """Bring a coefficient to the device of its factor, and shard it alike."""
    if hasattr(theta, "device_mesh") and not hasattr(c, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast(DTensor, theta)
        whole = c.to(theta.device).expand(theta.shape).contiguous()
        return distribute_tensor(whole, sharded.device_mesh, sharded.placements)
    return c.to(theta.device)


def _whole(value: Tensor) -> Tensor:
    """Return the sum over all shards of a value that was computed from sharded factors."""
    return cast(Any, value).full_tensor() if hasattr(value, "device_mesh") else value


def _factor_names(tensors: list[GatedTensor]) -> dict[int, str]:
    names = {id(t.omega): t.name for t in tensors}
    return names | {id(g.gamma): f"gates of {m[0].name}" for g, m in by_gates(tensors)}


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _warn_of_16_bits(tensors: list[GatedTensor]) -> None:
    narrow = [t.name for t in tensors if t.omega.dtype.itemsize < 4 and t.omega.requires_grad]
    if narrow:
        warnings.warn(
            f"{_some(narrow)}: ω is trained in {tensors[0].omega.dtype}, where a relative step below "
            f"{torch.finfo(tensors[0].omega.dtype).eps / 2:.1e} rounds to nothing: only the float32 gates shrink. "
            "Expected float32 weights with autocast; mend: model.float() before dg.gate, "
            "or dg.gate(..., train='gates').",
            PrecisionWarning,
            stacklevel=3,
        )


class _Applier(Protocol):
    """What applies a penalty while an optimizer holds it: a `_StepHook` or a `decay.PenaltyGroup`."""

    how: str
    active: bool


def _applier(gammas: list[nn.Parameter]) -> _Applier | None:
    """Return what applies a penalty to any of these gates by now."""
    for gamma in gammas:
        ref = cast("weakref.ref[_Applier] | None", _appliers.get(gamma))
        found = None if ref is None else ref()
        if found is not None and found.active:
            return found
    return None


class _StepHook:
    """An optimizer step pre-hook that adds the gradient of a penalty to the factors that the optimizer holds."""

    how = "by an optimizer that it is attached to"
    handle: Any = None

    def __init__(self, penalty: Penalty, optimizer: Optimizer) -> None:
        self.penalty = penalty
        self.optimizer = weakref.ref(optimizer)
        self.held: set[int] = set()
        self.factors: list[tuple[nn.Parameter, float | Tensor]] = []
        self.active = True

    def follow(self, optimizer: Optimizer) -> None:
        """Take the factors that the optimizer holds by now: trainers replace, add and freeze parameters."""
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        if held == self.held:
            return
        penalty = self.penalty
        penalty._refresh()
        penalty._check_covered([o for ref in penalty._hooks if (hook := ref()) and (o := hook.optimizer())], False)
        penalty._check_decay([optimizer], False)
        self.held = held
        self.factors = [(p, c) for p, c in penalty._factors if id(p) in held]
        for gamma in penalty._gammas:
            if id(gamma) in held:
                _appliers[gamma] = weakref.ref(self)

    def remove(self) -> None:
        self.active = False
        self.handle.remove()

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self.follow(optimizer)
        itself, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self.add_gradient(self._scale(optimizer))
            return None

        def penalized() -> Any:
            loss = closure()
            self.add_gradient(1.0)
            return None if loss is None else loss + self.penalty._detached()

        return ((itself, penalized, *given[1:]), kwargs) if given else (args, {**kwargs, "closure": penalized})

    @staticmethod
    def _scale(optimizer: Optimizer) -> float | Tensor:
        """Return the factor by which gradients are still scaled: fused optimizers unscale inside their step."""
        scale = getattr(optimizer, "grad_scale", None)
        return 1.0 if scale is None else cast(Tensor, scale)

    @torch.no_grad()
    def add_gradient(self, scale: float | Tensor) -> None:
        factor = 2 * self.penalty.lam * scale
        plain: dict[tuple[float, type[Tensor]], tuple[list[Tensor], list[Tensor]]] = {}
        for theta, c in self.factors:
            if not theta.requires_grad:
                continue
            if theta.grad is None:
                theta.grad = torch.zeros_like(theta)
            if isinstance(c, float) and isinstance(factor, float):
                grads, thetas = plain.setdefault((c, type(theta)), ([], []))  # shards do not mix with whole tensors
                grads.append(theta.grad)
                thetas.append(theta)
            else:
                theta.grad.add_(theta * ((_beside(c, theta) if isinstance(c, Tensor) else c) * factor))
        for (c, _), (grads, thetas) in plain.items():
            torch._foreach_add_(grads, thetas, alpha=c * cast(float, factor))


def group_penalty(model: nn.Module, lam: float = 1.0, *, weights: GroupWeights = "uniform") -> float:
    """Return the non-smooth penalty ``λ · Σ_g w_g ‖w_g‖_2^{2/D}`` that the factors' L2 stands for.

    By the inequality of arithmetic and geometric means it is at most ``Penalty(model, lam).value()``, with equality
    exactly when every group is balanced.

    Args:
        model: A gated model.
        lam: λ, at least 0.
        weights: Weights of the groups, as in `Penalty`.

    Returns:
        The value, computed in float64 and exactly per group over all parameters that share it.

    Raises:
        NotGatedError: If the model holds no gates.
        PenaltyError: If λ or a weight is negative or not finite.

    Example:
        >>> import dgate_wrap as dg
        >>> model = dg.gate(torch.nn.Linear(2, 1, bias=False), "neurons", D=2)
        >>> _ = torch.nn.init.ones_(model.parametrizations.weight.original)
        >>> round(dg.group_penalty(model), 4), dg.Penalty(model, 1.0).value()
        (1.4142, 1.5)
    """
    tensors = require_gated(model, "cannot compute a penalty")
    lam = _nonnegative(lam, "lam")
    per_gates = group_weights(tensors, weights)
    with torch.no_grad():
        values = [
            (per_gates[id(g)] * norm_penalty(omega_squares(m), g.gamma.double())).sum() for g, m in by_gates(tensors)
        ]
    return lam * sum(float(v) for v in values)
