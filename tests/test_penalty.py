"""The three forms of the penalty agree, work with every optimizer, and refuse what would change the objective."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import group_values, randomize_gates
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import dgate_wrap as dg

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = torch.randn(24, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
LAM = 0.03


def make(D: int = 3, groups: object = "neurons", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    return dg.gate(model, groups, D=D, **options)


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(X[rows].to(dtype)) - Y[rows].to(dtype)).square().mean()


def sgd(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.SGD(parameters, **{"lr": 0.05, "momentum": 0.9, **options})


def state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def train_term(model: nn.Module, optimizer: Optimizer, steps: int, lam: float = LAM, **options: Any) -> list[Tensor]:
    penalty = dg.Penalty(model, lam, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model) + penalty()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return state(model)


def train_plain(model: nn.Module, optimizer: Optimizer, steps: int) -> list[Tensor]:
    """Train without any penalty in the loop: it stands in the optimizer."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return state(model)


@pytest.mark.parametrize("D", [2, 3, 4])
@pytest.mark.parametrize("weights", ["uniform", "sqrt_size", {"0.*": 0.5, "2.*": 2}])
def test_three_forms_give_one_trajectory(D: int, weights: Any) -> None:
    model = make(D)
    reference = train_term(model, sgd(model.parameters()), 100, weights=weights)

    model = make(D)
    optimizer = sgd(model.parameters())
    dg.Penalty(model, LAM, weights=weights).attach(optimizer)
    assert difference(train_plain(model, optimizer, 100), reference) < 1e-12

    model = make(D)
    optimizer = sgd(dg.param_groups(model, LAM, weights=weights))
    assert difference(train_plain(model, optimizer, 100), reference) < 1e-12
    assert difference(state(make(D)), reference) > 1e-2  # there was something to agree on


@pytest.mark.parametrize("D", [2, 3, 5])
@pytest.mark.parametrize("weights", ["uniform", "sqrt_size", {"labels": 3.0}])
def test_value_and_gradient_equal_loops(D: int, weights: Any) -> None:
    # groups of unequal size that span both layers and leave weights out
    labels = {"0.weight": torch.tensor([0, 0, 0, 1, 1, -1, 2, -1]).view(8, 1), "2.weight": torch.tensor([[1], [3]])}
    model = randomize_gates(make(D, labels))
    parameters = {
        "0.weight": model[0].parametrizations.weight.original,
        "2.weight": model[2].parametrizations.weight.original,
    }
    gamma = model[0].parametrizations.weight[0].gates.gamma
    oracle = group_values(labels, parameters, dict(enumerate(gamma.tolist())))
    w = {"uniform": [1.0] * 4, "sqrt_size": [s**0.5 for s in oracle["size"]]}.get(str(weights), [3.0] * 4)
    assert oracle["size"] == [18, 20, 6, 8]

    penalty = dg.Penalty(model, 0.7, weights=weights)
    assert penalty.value() == pytest.approx(
        0.7 * sum(a * b for a, b in zip(w, oracle["smooth"], strict=True)), rel=1e-12
    )
    assert penalty().item() == penalty.value()
    expected = 0.7 * sum(a * b for a, b in zip(w, oracle["group"], strict=True))
    assert dg.group_penalty(model, 0.7, weights=weights) == pytest.approx(expected, rel=1e-12)

    penalty().backward()
    for name, omega in parameters.items():
        of_row = [w[g] if g >= 0 else 0.0 for g in labels[name].flatten().tolist()]
        for row, c in enumerate(of_row):
            torch.testing.assert_close(omega.grad[row], 2 * 0.7 / D * c * omega.detach()[row], rtol=1e-12, atol=0)
    by_hand = 2 * 0.7 / D * torch.tensor(w, dtype=torch.float64).unsqueeze(1) * gamma.detach()
    torch.testing.assert_close(gamma.grad, by_hand, rtol=1e-12, atol=0)
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith("bias"))

    # the attached form adds the same numbers
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before = dict(zip([n for n, _ in model.named_parameters()], state(model), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    penalty.attach(optimizer)
    optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(before[n] - p.detach(), grads.get(n, torch.zeros_like(p)), rtol=1e-9, atol=1e-15)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD for-loop": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=False),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW without decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "LBFGS with line search": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_equals_the_term_in_every_optimizer(name: str) -> None:
    model = make()
    reference = train_term(model, OPTIMIZERS[name](model.parameters()), 40)
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    dg.Penalty(model, LAM).attach(optimizer)
    # Adam divides by the root of squared gradients and a line search decides by comparing: both amplify rounding
    tolerance = 5e-3 if "line search" in name else 1e-7
    assert difference(train_plain(model, optimizer, 40), reference) < tolerance
    assert difference(state(make()), reference) > 1e-2


def test_lbfgs_reaches_the_minimum_of_the_penalized_loss() -> None:
    minima = []
    for attached in (True, False):
        model = make(D=2)
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            max_iter=1000,
            tolerance_grad=1e-9,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )
        if attached:
            dg.Penalty(model, LAM).attach(optimizer)
            train_plain(model, optimizer, 3)
        else:
            train_term(model, optimizer, 3)
        model.zero_grad()
        loss = loss_of(model) + LAM * sum(p.square().sum() for n, p in model.named_parameters() if "bias" not in n) / 2
        loss.backward()
        assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-5
        minima.append(loss.item())
    assert minima[0] == pytest.approx(minima[1], rel=1e-8)


def test_lam_can_be_changed_while_training() -> None:
    results = []
    for attached in (True, False):
        model = make()
        optimizer = sgd(model.parameters())
        penalty = dg.Penalty(model, LAM)
        if attached:
            penalty.attach(optimizer)
        for step in range(60):
            penalty.lam = LAM * step / 30
            optimizer.zero_grad()
            loss = loss_of(model)
            (loss if attached else loss + penalty()).backward()
            optimizer.step()
        results.append(state(model))
    assert difference(*results) < 1e-12
    assert penalty.lam == LAM * 59 / 30


def _manual(model: nn.Module, steps: int, clip: float | None, lr: float = 0.05) -> list[Tensor]:
    """Run plain SGD by hand: gradient of the data, clipped, then plus 2λ/D · θ for gates and gated weights."""
    factors = [n for n, _ in model.named_parameters() if "parametrizations" in n]
    for _ in range(steps):
        model.zero_grad()
        loss_of(model).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.sub_(lr * (p.grad + (2 * LAM / 3 * p if n in factors else 0)))
    return state(model)


def test_clipping_clips_the_data_gradient_alone() -> None:
    reference = _manual(make(), 50, clip=0.1)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    dg.Penalty(model, LAM).attach(optimizer)
    for _ in range(50):
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert difference(state(model), reference) < 1e-12
    assert difference(_manual(make(), 50, clip=None), reference) > 1e-3


def test_accumulated_gradients_get_one_penalty_per_step() -> None:
    reference = _manual(make(), 50, clip=None)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    dg.Penalty(model, LAM).attach(optimizer)
    for _ in range(50):
        optimizer.zero_grad()
        for k in range(4):
            (loss_of(model, slice(6 * k, 6 * k + 6)) / 4).backward()
        optimizer.step()
    assert difference(state(model), reference) < 1e-12


def test_a_trainers_wrapper_is_seen_through() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As trainers do it: an Optimizer by type, without its state, that steps the one inside."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model = dg.gate(torch.nn.Linear(3, 2), "neurons", D=2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    dg.Penalty(model, lam=0.5).attach(Wrapper(inner))
    before = [p.detach().clone() for p in model.parameters()]
    gated = {id(p) for n, p in model.named_parameters() if "bias" not in n}
    Wrapper(inner).step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 2 * 0.5 / 2) if id(p) in gated else old)


def test_several_optimizers_share_the_factors() -> None:
    reference = _manual(make(), 50, clip=None)
    model = make()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.05) for i in (0, 2)]
    dg.Penalty(model, LAM).attach(*optimizers)
    for _ in range(50):
        model.zero_grad()
        loss_of(model).backward()
        for o in optimizers:
            o.step()
    assert difference(state(model), reference) < 1e-12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_gradient_scaling_does_not_scale_the_penalty(kind: Any, fused: bool, unscale: bool) -> None:
    results = []
    for scaled in (False, True):
        model = make(dtype=torch.float32)
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0, fused=fused)
        dg.Penalty(model, 0.3).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=7, enabled=scaled)
        for _ in range(30):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append(state(model))
    assert difference(*results) < 2e-5
    assert difference(state(make(dtype=torch.float32)), results[0]) > 1e-2


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused: bool) -> None:
    model = make(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    dg.Penalty(model, LAM).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = state(model)
    scaler.scale(loss_of(model) * float("inf")).backward()
    scaler.step(optimizer)
    assert difference(before, state(model)) == 0


def test_frozen_weights_are_left_alone() -> None:
    model = make(train="gates")
    omega = model[0].parametrizations.weight.original
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    before = omega.detach().clone()
    dg.Penalty(model, LAM).attach(optimizer)
    after = train_plain(model, optimizer, 20)
    assert torch.equal(omega, before)
    assert omega.grad is None
    assert difference(after, state(make())) > 1e-3


# -- guards ------------------------------------------------------------------------------------------------------------


def _attach(model: nn.Module, keep: list[Any]) -> None:
    keep.append(sgd(model.parameters()))
    dg.Penalty(model, LAM).attach(keep[-1])


def _term(model: nn.Module, keep: list[Any]) -> None:
    dg.Penalty(model, LAM)()


def _groups(model: nn.Module, keep: list[Any]) -> None:
    keep.append(sgd(dg.param_groups(model, LAM)))


@pytest.mark.parametrize("first", [_attach, _groups])
@pytest.mark.parametrize("second", [_attach, _groups, _term])
def test_the_penalty_is_applied_once(first: Any, second: Any) -> None:
    model = make()
    keep: list[Any] = []
    first(model, keep)
    with pytest.raises(dg.PenaltyError, match="applied to this model already"):
        second(model, keep)
    assert dg.Penalty(model, LAM).value() > 0  # a number for the log is no second penalty
    with torch.no_grad():
        assert float(dg.Penalty(model, LAM)()) > 0
    second(make(), keep)  # another model is another matter

    keep.clear()
    gc.collect()
    second(model, keep)  # once the optimizer is gone, so is its penalty


def test_one_penalty_attaches_once_and_detaches() -> None:
    model = make()
    optimizer, other = sgd(model.parameters()), sgd(model.parameters())
    penalty = dg.Penalty(model, LAM).attach(optimizer)
    for again in (optimizer, other):
        with pytest.raises(dg.PenaltyError, match="already"):
            penalty.attach(again)
    penalty.detach()
    penalty.attach(other)
    before = state(model)
    optimizer.step()
    assert difference(before, state(model)) == 0  # neither gradient nor penalty


def test_an_attached_penalty_outlives_its_name() -> None:
    model = make()
    optimizer = sgd(model.parameters(), momentum=0)
    dg.Penalty(model, LAM).attach(optimizer)
    gc.collect()
    before = model[0].parametrizations.weight[0].gates.gamma.detach().clone()
    optimizer.step()
    torch.testing.assert_close(
        model[0].parametrizations.weight[0].gates.gamma.detach(), before * (1 - 0.05 * 2 * LAM / 3)
    )


DECAYING: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW by default": lambda m: torch.optim.AdamW(m.parameters()),
    "SGD with decay": lambda m: sgd(m.parameters(), weight_decay=1e-4),
    "decay in one group": lambda m: sgd(
        [{"params": m[0].parameters()}, {"params": m[2].parameters(), "weight_decay": 0.1, "lr": 0.5}]
    ),
}


@pytest.mark.parametrize("name", DECAYING)
def test_decay_of_factors_is_refused_or_mended(name: str) -> None:
    model = make()
    optimizer = DECAYING[name](model)
    groups = copy.copy(optimizer.param_groups)
    with pytest.raises(dg.PenaltyError, match=r"decays .* factors by itself"):
        dg.Penalty(model, LAM).attach(optimizer)
    assert optimizer.param_groups == groups
    assert not optimizer._optimizer_step_pre_hooks

    lr_before = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay_before = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    dg.Penalty(model, LAM).attach(optimizer, adopt=True)
    held = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert held.keys() == {id(p) for p in model.parameters()}
    for n, p in model.named_parameters():
        assert held[id(p)]["lr"] == lr_before[id(p)]
        assert held[id(p)]["weight_decay"] == (0 if "parametrizations" in n else decay_before[id(p)])
    optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "LBFGS with line search"])
def test_missing_gates_are_refused_or_adopted(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    train_plain(model, optimizer, 2)  # it has stepped before: its state must bear new parameters
    dg.gate(model, "neurons", D=3)
    gates = [m.gamma for m in model.modules() if isinstance(m, dg.Gates)]
    with pytest.raises(dg.PenaltyError, match="lacks 2 of 4 factors") as e:
        dg.Penalty(model, LAM).attach(optimizer)
    assert "gates of 0.weight" in e.value.found
    assert "adopt=True" in e.value.mend
    dg.Penalty(model, LAM).attach(optimizer, adopt=True)
    train_plain(model, optimizer, 3)
    assert all(bool((g != 1).any()) for g in gates)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_groups_refuse_decoupled_decay(kind: Any) -> None:
    options = {"decoupled_weight_decay": True} if kind is torch.optim.Adam else {}
    with pytest.raises(dg.PenaltyError, match="decoupled weight decay"):
        kind(dg.param_groups(make(), LAM), **options)


def test_groups_hold_every_parameter_once() -> None:
    model = make()
    groups = dg.param_groups(model, LAM, lr=0.3, weight_decay=0.25)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert {g["lr"] for g in groups} == {0.3}
    names = {id(p): n for n, p in model.named_parameters()}
    for g in groups:
        for p in g["params"]:
            assert g["weight_decay"] == pytest.approx(2 * LAM / 3 if "parametrizations" in names[id(p)] else 0.25)


@pytest.mark.parametrize(
    ("groups", "weights"),
    [
        ({"0.weight": torch.tensor([0] * 4 + [-1] * 4).view(8, 1)}, "uniform"),
        (dg.Select("0.weight", axis=0, at=0), "uniform"),
        ({"0.weight": torch.tensor([0] * 2 + [1] * 6).view(8, 1)}, "sqrt_size"),
    ],
)
def test_groups_refuse_what_one_decay_cannot_say(groups: object, weights: Any) -> None:
    with pytest.raises(dg.PenaltyError, match=r"'0\.weight'.*some weights are ungated"):
        dg.param_groups(make(groups=groups), LAM, weights=weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_warned_of(dtype: torch.dtype) -> None:
    with pytest.warns(dg.PrecisionWarning, match=r"0\.weight"):
        dg.Penalty(make(dtype=dtype), LAM)
    dg.Penalty(make(dtype=dtype, train="gates"), LAM)  # no warning: warnings are errors here


@pytest.mark.parametrize("lam", [-1e-9, float("nan"), float("inf"), "0.1", None, True])
def test_lam_is_a_finite_number_of_at_least_0(lam: Any) -> None:
    model = make()
    penalty = dg.Penalty(model, LAM)
    for call in (
        lambda: dg.Penalty(model, lam),
        lambda: setattr(penalty, "lam", lam),
        lambda: dg.param_groups(model, lam),
        lambda: dg.group_penalty(model, lam),
        lambda: dg.Penalty(model, LAM, weights={"0.*": lam}),
    ):
        with pytest.raises(dg.PenaltyError, match="Expected: a finite number of at least 0"):
            call()
    assert penalty.lam == LAM


@pytest.mark.parametrize("weights", [{"1.*": 2.0}, {"filters": 1.0}, "sqrt", 3])
def test_weights_that_mean_nothing_are_refused(weights: Any) -> None:
    with pytest.raises(dg.PenaltyError, match="weights"):
        dg.Penalty(make(), LAM, weights=weights)


def test_lam_zero_adds_nothing() -> None:
    model = make()
    reference = train_plain(model, sgd(model.parameters()), 20)
    model = make()
    optimizer = sgd(model.parameters())
    assert dg.Penalty(model, 0).attach(optimizer).value() == 0
    assert difference(train_plain(model, optimizer, 20), reference) == 0


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_cost_does_not_grow_with_the_number_of_groups() -> None:
    counts = []
    for rows in (10, 10_000):
        model = dg.gate(nn.Linear(3, rows), "neurons")
        optimizer = sgd(model.parameters())
        penalty = dg.Penalty(model, LAM)
        with _Count() as count:
            penalty().backward()
            dg.group_penalty(model)
            dg.misalignment(model)
            dg.balance_(model)
            penalty.attach(optimizer)
            optimizer.step()
        assert len(dg.groups(model)) == rows
        counts.append(count.calls)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("wrong", [(), ("optimizer",), (torch.optim.lr_scheduler.StepLR(sgd([nn.Parameter(X)]), 1),)])
def test_attach_takes_optimizers(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(dg.PenaltyError, match="Expected: torch optimizers"):
        dg.Penalty(make(), LAM).attach(*wrong)
