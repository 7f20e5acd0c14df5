"""What holds for every grouping on every model: each registered grouping that needs no trace is enrolled by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import all_gates, randomize_gates
from zoo import ZOO, Entry, outputs

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors
from dgate_wrap.groupings import resolve

# besides the registered ones, whole parameters: so that every parameter of every model is gated by something
SPECS: dict[str, object] = {
    **{name: name for name, g in dg.groupings().items() if not g.needs_trace},
    "whole": dg.Select("*"),
}


def _selects(spec: object, entry: Entry) -> bool:
    try:
        return bool(resolve(spec, entry.make()))
    except dg.GroupingError as e:
        if "selects no weight" not in e.found:
            raise
        return False


CASES = [
    pytest.param(entry, spec, id=f"{name}-{entry.name}")
    for entry in ZOO
    for name, spec in SPECS.items()
    if _selects(spec, entry)
]
laws = pytest.mark.parametrize(("entry", "spec"), CASES)


def test_every_grouping_and_every_model_is_enrolled() -> None:
    ids = [str(p.id) for p in CASES]
    assert {i.split("-")[0] for i in ids} == set(SPECS)
    assert {i.split("-")[1] for i in ids} == {e.name for e in ZOO}


@laws
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gating_changes_no_output_bit(entry: Entry, spec: object, training: bool) -> None:
    inputs = entry.make_inputs()
    plain = entry.make().train(training)
    gated = dg.gate(copy.deepcopy(plain), spec, D=3)
    assert gated.training == training
    for context in (torch.enable_grad, torch.no_grad):  # without gradients, attention takes another path
        with context():
            before, after = outputs(plain, inputs), outputs(gated, inputs)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True] * len(before)
    buffers = [(n, b) for n, b in gated.named_buffers() if "parametrizations" not in n]
    assert [n for n, b in buffers if not torch.equal(b, plain.get_buffer(n))] == []


@laws
def test_ungating_restores_the_model(entry: Entry, spec: object) -> None:
    model = entry.make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    objects = dict(model.named_parameters(remove_duplicate=False))
    types = [type(m) for m in model.modules()]
    representation = repr(model)

    same = dg.gate(model, spec, D=3)
    assert same is model
    # ω is the user's own object while gated, and no child of the user's modules is new but torch's own
    held = {id(p) for p in model.parameters()}
    assert [n for n, p in objects.items() if id(p) not in held] == []
    assert dg.ungate(model) is model

    after = model.state_dict()
    assert list(after) == list(state)
    assert [k for k in state if not torch.equal(after[k], state[k])] == []
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(objects)
    assert [n for n, p in objects.items() if now[n] is not p] == []
    assert [type(m) for m in model.modules()] == types
    assert repr(model) == representation


@laws
def test_ungating_folds_what_was_learned(entry: Entry, spec: object) -> None:
    inputs = entry.make_inputs(torch.float64)
    model = randomize_gates(dg.gate(entry.make(torch.float64), spec, D=3)).eval()
    before = outputs(model, inputs)
    after = outputs(dg.ungate(model), inputs)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True] * len(before)
    assert all(p.grad is None and p.is_leaf and p.requires_grad for p in model.parameters())


@laws
@pytest.mark.parametrize("gradients", [True, False], ids=["enable_grad", "no_grad"])
def test_every_gate_acts(entry: Entry, spec: object, gradients: bool) -> None:
    inputs = entry.make_inputs(torch.float64)
    model = dg.gate(entry.make(torch.float64), spec, D=3).eval()
    with torch.set_grad_enabled(gradients):
        before = outputs(model, inputs)
        idle = []
        for gates in all_gates(model):
            gates.gamma.data[:, 1] *= 0.5
            after = outputs(model, inputs)
            gates.gamma.data[:, 1] *= 2
            if all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(before, after, strict=True)):
                idle.append([t.name for t in gated_tensors(model) if t.gates is gates])
    assert idle == []


@laws
def test_gradients_are_those_of_the_weights_by_the_chain_rule(entry: Entry, spec: object) -> None:
    inputs = entry.make_inputs(torch.float64)
    model = randomize_gates(dg.gate(entry.make(torch.float64), spec, D=3)).eval()
    plain = dg.ungate(copy.deepcopy(model))
    for m in (model, plain):
        sum(
            (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs(m, inputs)
        ).backward()
    upstream = dict(plain.named_parameters())
    expected = {id(g): torch.zeros_like(g.gamma) for g in all_gates(model)}
    for t in gated_tensors(model):
        u, gamma = upstream[t.name].grad, t.gates.gamma.detach()
        assert u is not None
        index = t.gate.index.expand_as(t.omega).flatten().tolist()
        product = torch.tensor([float(gamma[g].prod()) if g >= 0 else 1.0 for g in index], dtype=u.dtype).view_as(u)
        torch.testing.assert_close(t.omega.grad, u * product, rtol=1e-12, atol=1e-12)
        for g, part in zip(index, (u * t.omega.detach()).flatten().tolist(), strict=True):
            for d in (0, 1) if g >= 0 else ():
                expected[id(t.gates)][g, d] += part * float(gamma[g, 1 - d])
    for gates in all_gates(model):
        torch.testing.assert_close(gates.gamma.grad, expected[id(gates)], rtol=1e-12, atol=1e-11)


@laws
def test_gradients_are_finite_at_zero_groups(entry: Entry, spec: object) -> None:
    model = dg.gate(entry.make(), spec, D=4)
    with torch.no_grad():
        for t in gated_tensors(model):
            t.gates.gamma[::2] = 0
            t.omega.masked_fill_(t.mask(t.gates.gamma.eq(0).all(1)), 0)
    loss = sum(o.square().sum() for o in outputs(model, entry.make_inputs())) + dg.Penalty(model, 0.1)()
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()] == []


@laws
def test_deep_copies_are_independent(entry: Entry, spec: object) -> None:
    inputs = entry.make_inputs()
    for doomed_is_copy in (True, False):
        model = randomize_gates(dg.gate(entry.make(), spec)).eval()
        twin = copy.deepcopy(model)
        before = outputs(model, inputs)
        doomed, kept = (twin, model) if doomed_is_copy else (model, twin)
        shared = {id(p) for p in doomed.parameters()} & {id(p) for p in kept.parameters()}
        assert not shared
        dg.ungate(doomed)
        for m in (doomed, kept):
            assert all(torch.equal(a, b) for a, b in zip(before, outputs(m, inputs), strict=True))
        all_gates(kept)[0].gamma.data.mul_(0.5)
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(doomed, inputs), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(before, outputs(kept, inputs), strict=True))
        dg.ungate(kept)
        assert list(kept.state_dict()) == list(doomed.state_dict()) == list(entry.make().state_dict())


@laws
def test_state_dict_round_trips(entry: Entry, spec: object) -> None:
    inputs = entry.make_inputs()
    model = randomize_gates(dg.gate(entry.make(), spec)).eval()
    fresh = dg.gate(entry.make(seed=3), spec).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), outputs(fresh, inputs), strict=True))
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())


@laws
def test_functional_call_sees_the_gates(entry: Entry, spec: object) -> None:
    inputs = entry.make_inputs(torch.float64)
    model = dg.gate(entry.make(torch.float64), spec).eval()
    other = randomize_gates(copy.deepcopy(model))
    before, expected = outputs(model, inputs), outputs(other, inputs)
    torch.manual_seed(2)
    found = torch.func.functional_call(model, dict(other.named_parameters()), inputs)
    leaves = torch.utils._pytree.tree_leaves(found)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(leaves, expected, strict=True))
    assert not all(torch.allclose(a, b) for a, b in zip(leaves, before, strict=True))


@laws
def test_autocast_changes_no_output_bit(entry: Entry, spec: object) -> None:
    plain = entry.make().train()
    gated = dg.gate(copy.deepcopy(plain), spec)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = (outputs(m, entry.make_inputs()) for m in (plain, gated))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    sum(o.float().square().sum() for o in after).backward()
    grads = [gates.gamma.grad for gates in all_gates(gated)]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    assert any(g.abs().sum() > 0 for g in grads)


@laws
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_gates_never_fall_below_float32(entry: Entry, spec: object, dtype: torch.dtype) -> None:
    expected = torch.promote_types(dtype, torch.float32)
    cast_after = dg.gate(entry.make(), spec).to(dtype)
    cast_before = dg.gate(entry.make().to(dtype), spec)
    for model in (cast_after, cast_before):
        assert {g.gamma.dtype for g in all_gates(model)} == {expected}
        assert {t.omega.dtype for t in gated_tensors(model)} == {dtype}
        assert {getattr(*t.hosts[0]).dtype for t in gated_tensors(model)} == {dtype}
        assert all(p.dtype == dtype for p in dg.ungate(model).parameters())


@laws
@pytest.mark.parametrize("D", [2, 3, 5])
def test_penalty_bounds_the_group_penalty_and_balance_meets_it(entry: Entry, spec: object, D: int) -> None:
    inputs = entry.make_inputs(torch.float64)
    model = randomize_gates(dg.gate(entry.make(torch.float64), spec, D=D)).eval()
    penalty, group_penalty = dg.Penalty(model, 0.3).value(), dg.group_penalty(model, 0.3)
    assert penalty > group_penalty * (1 + 1e-6)
    assert float(dg.misalignment(model).sum()) * 0.3 == pytest.approx(penalty - group_penalty, rel=1e-9)

    before = outputs(model, inputs)
    dg.balance_(model)
    for a, b in zip(before, outputs(model, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert dg.group_penalty(model, 0.3) == pytest.approx(group_penalty, rel=1e-11)
    assert dg.Penalty(model, 0.3).value() == pytest.approx(group_penalty, rel=1e-11)
    assert float(dg.imbalance(model).max()) < 1e-11


@laws
def test_each_weight_is_in_one_group_and_groups_are_numbered(entry: Entry, spec: object) -> None:
    [(_, labels)] = resolve(spec, entry.make())
    shapes = dict(entry.make().named_parameters())
    assert all(t.dtype == torch.int64 and t.broadcast_to(shapes[n].shape).numel() for n, t in labels.items())
    count = torch.cat([t.broadcast_to(shapes[n].shape).flatten() for n, t in labels.items()])
    groups = dg.groups(dg.gate(entry.make(), spec))
    assert len(groups) == count[count >= 0].unique().numel() == len(set(groups.names))
    assert int(groups.size.sum()) == int((count >= 0).sum())
    assert bool(groups.alive.all())


COMPILED = [
    "mlp",
    "layernorm_mlp",
    "cnn",
    "residual",
    "convs_2d",
    "tied",
    "applied_twice",
    "raw_parameters",
    "attention",
]


@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in COMPILED], ids=lambda e: e.name)
def test_compiles_to_one_graph_with_the_gradients_of_eager(entry: Entry) -> None:
    torch._dynamo.reset()
    model = randomize_gates(dg.gate(entry.make(torch.float64), "weights", D=3)).eval()
    inputs = entry.make_inputs(torch.float64)
    grads: list[list[torch.Tensor]] = []
    values: list[list[torch.Tensor]] = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = torch.utils._pytree.tree_leaves(call(*inputs))
        sum(o.square().sum() for o in out).backward()
        values.append([o.detach() for o in out])
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for eager, compiled in ((values[0], values[1]), (grads[0], grads[1])):
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert len(grads[0]) == len(list(model.parameters()))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("entry", [e for e in ZOO if e.name not in ("tied", "embedding")], ids=lambda e: e.name)
def test_checkpointing_gives_the_same_gradients(entry: Entry, use_reentrant: bool) -> None:
    model = randomize_gates(dg.gate(entry.make(torch.float64), "weights")).train()
    inputs = tuple(x.requires_grad_() for x in entry.make_inputs(torch.float64))
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        torch.manual_seed(2)
        # reentrant checkpointing sees tensors only, not the structures that hold them
        flat = lambda *args: tuple(torch.utils._pytree.tree_leaves(model(*args)))  # noqa: E731
        out = (
            torch.utils.checkpoint.checkpoint(flat, *inputs, use_reentrant=use_reentrant)
            if checkpointed
            else flat(*inputs)
        )
        sum(o.square().sum() for o in out).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*grads, strict=True))
