"""Lowering one operation at a time against torch's own, which traces the whole program once more."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from patterns import PATTERNS, Case
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import Graph, Node, map_arg

from dgate_wrap.tracing import lowering
from dgate_wrap.tracing.capture import trace_of
from dgate_wrap.tracing.inputs import Inputs
from dgate_wrap.tracing.lowering import lower
from dgate_wrap.tracing.operations import has_rule
from dgate_wrap.tracing.origins import operation
from dgate_wrap.tracing.parts import PARTS
from dgate_wrap.tracing.settings import quiet

FREE = {"aten.clone", "aten.alias", "aten.detach", "aten.lift_fresh_copy", "aten.sym_size"}
"""Operations that do no more than to copy, or to name a size."""


def operations(graph: Graph) -> Counter[str]:
    """Count the operations of a graph that compute something, each that is done twice on the same values once."""
    first: dict[object, Node] = {}
    same: dict[Node, Node] = {}
    for n in graph.nodes:
        if n.op == "call_function" and n.args[-2:] == (0, sys.maxsize):  # of open size: all of it, or what is put there
            same[n] = same[n.args["scatter" in operation(n)]]
            continue
        key = (n.target, str(map_arg((n.args, n.kwargs), lambda x: same[x])))
        same[n] = first.setdefault(key, n) if n.op == "call_function" else n
    return Counter(operation(n) for n in first.values() if operation(n) not in FREE)


def by_torch(exported: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> ExportedProgram:
    with monkeypatch.context() as m:
        m.setattr(lowering, "_lowered", lambda graph: None)
        return lower(exported)


def assert_equal(model: nn.Module, inputs: Inputs, mine: ExportedProgram, theirs: ExportedProgram) -> None:
    traces = [trace_of(model, inputs, p) for p in (mine, theirs)]
    a, b = ([values[n] for n in t.outputs] for t in traces for values in [t.run()])
    torch.testing.assert_close(a, b, rtol=0, atol=0)


class Model(nn.Module):
    """A function of one tensor, beside a batch norm whose statistics it may use."""

    def __init__(self, function: Callable[[nn.BatchNorm1d, Tensor], Tensor]) -> None:
        super().__init__()
        self.bn, self.function = nn.BatchNorm1d(6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.bn, x)


def trained(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True)


def written(y: Tensor) -> Tensor:
    z = y + 1
    y.mul_(2).add_(z)
    return y * z


def viewed(y: Tensor) -> Tensor:
    z = y.view(-1)
    y.mul_(2)
    return z + y.view(-1)


def sliced(y: Tensor) -> Tensor:
    y[:, 1:3] = 0
    y[0, ::2] += y[1, ::2]
    y[2] = y[:, 3:][1:2].sum()
    return y


def part_seen(y: Tensor) -> Tensor:
    part = y[:, 1:3]
    y[1:, 2] = 0
    return part * y[:, 3:5]


def part_returned(y: Tensor) -> Tensor:
    part = y[:, 1:3].mul_(2)
    y[1:, 2] = 0
    return part * y[:, 3:5]


def part_of_another_form(y: Tensor) -> Tensor:
    y.view(-1)[3:7] = 0
    return y


BY_TORCH = {"batch_norm_that_counts", "other_type", "view", "input", "part_of_another"}
"""Functions of which only torch can tell what is written where."""

FUNCTIONS: dict[str, Callable[[nn.BatchNorm1d, Tensor], Tensor]] = {
    "batch_norm": lambda bn, x: bn(x).relu(),
    "batch_norm_that_counts": trained,
    "same_kind_twice": lambda bn, x: bn(x.reshape(-1, 2, 3).flatten(1)) + x.reshape(-1, 2, 3).flatten(1),
    "operands_become_one": lambda bn, x: x.to(torch.float32).reshape_as(x) + x.contiguous().view_as(x),
    "lists": lambda bn, x: torch.cat([p * i for i, p in enumerate(x.chunk(3, 1))], 1),
    "constants": lambda bn, x: x * torch.tensor([1.0, 2.0]).repeat(3) + torch.tensor(3.0).detach_(),
    "in_place": lambda bn, x: written(F.relu_(bn(x))),
    "in_place_and_named_otherwise": lambda bn, x: (bn(x) + 9).pow_(-0.5).pow_(x),
    "in_place_of_what_was_used": lambda bn, x: written(y := bn(x)) + y,
    "in_place_and_viewed": lambda bn, x: written(x * 2)[:, :3],
    "other_type": lambda bn, x: x.half().add_(x),
    "viewed_before": lambda bn, x: viewed(x * 2),
    "view": lambda bn, x: written((x * 2).view(-1)),
    "input": lambda bn, x: x.add_(1),
    "slices": lambda bn, x: sliced(bn(x)),
    "part_seen": lambda bn, x: part_seen(bn(x)),
    "part_returned": lambda bn, x: part_returned(bn(x)),
    "part_of_another": lambda bn, x: part_of_another_form(bn(x)),
    "unused": lambda bn, x: (x.reshape(-1, 3), x * 2)[1],
    "returned_as_it_is": lambda bn, x: x.to(torch.float32),
}


@pytest.mark.parametrize("sizes", ["fixed", "open"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_holds_the_operations_that_torch_gives_it(
    name: str, sizes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Model(FUNCTIONS[name]).eval(), torch.randn(4, 6)
    shapes = {"x": {0: Dim.AUTO}} if sizes == "open" else None
    with torch.no_grad(), quiet():
        mine, theirs = (export(model, (x,), dynamic_shapes=shapes, strict=False) for _ in range(2))
        mine, theirs = lower(mine), by_torch(theirs, monkeypatch)
    assert operations(mine.graph) == operations(theirs.graph)
    assert all("val" in n.meta for n in mine.graph.nodes if n.op == "call_function")
    if sizes == "fixed":
        assert_equal(model, Inputs((x,), {}), mine, theirs)


@pytest.mark.parametrize("case", [c for c in PATTERNS if not c.data_dependent][::5], ids=lambda c: c.name)
def test_every_pattern_holds_them_and_gives_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, kwargs = case.build()
    with torch.no_grad(), quiet():
        mine, theirs = (export(model.eval(), args, kwargs, strict=False) for _ in range(2))
        mine, theirs = lower(mine), by_torch(theirs, monkeypatch)
    assert operations(mine.graph) == operations(theirs.graph)
    assert_equal(model, Inputs(args, kwargs), mine, theirs)


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "cdist": lambda x: torch.cdist(x, x.flip(-1)),
    "cdist of ones": lambda x: torch.cdist(x, x.flip(-1), p=1.0),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "max_unpool2d of one": lambda x: F.max_unpool2d(*F.max_pool2d(x[0], 2, return_indices=True), 2, output_size=(7, 9)),
    "max_unpool3d": lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2),
    "fold": lambda x: F.fold(F.unfold(x, 2), x.shape[2:], 2),
    "fold of one": lambda x: F.fold(F.unfold(x[0], (3, 2), 2, 1, (2, 1)), x.shape[2:], (3, 2), 2, 1, (2, 1)),
    "fold that leaves some": lambda x: F.fold(F.unfold(x, 3, stride=2), x.shape[2:], 3, stride=2),
    "index_fill": lambda x: x.index_fill(-2, torch.tensor([3, 0]), 0.5),
    "index_fill by a tensor": lambda x: x.index_fill(0, torch.tensor([1]), torch.tensor(2.0)),
    "aminmax": lambda x: torch.aminmax(x, dim=1, keepdim=True).max - torch.aminmax(x).min,
    "nansum": lambda x: (x / (x > 0)).clamp(max=9).nansum((1, 2), keepdim=True) + (0 / x.relu()).nansum(),
    "masked_scatter": lambda x: x.masked_scatter((x[..., :1] > 0).expand_as(x), x.flip(0)),
}
"""Operations that torch leaves whole, on images ``(2, 3, 6, 8)``."""


@pytest.mark.parametrize("sizes", ["fixed", "open"])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_torch_leaves_whole_is_written_with_operations_that_have_rules(
    name: str, sizes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return WRITTEN[name](x)

    model, x = Whole(), torch.randn(2, 3, 6, 8)
    shapes = {"x": {0: Dim.AUTO}} if sizes == "open" else None
    with torch.no_grad(), quiet():
        mine, theirs = (export(model, (x,), dynamic_shapes=shapes, strict=False) for _ in range(2))
        assert any(n.target in PARTS or not has_rule(n) for n in mine.graph.nodes if n.op == "call_function")
        mine, theirs = lower(mine), by_torch(theirs, monkeypatch)
    if sizes == "open" and "fold" not in name:  # torch itself writes the batch size of these down
        x = torch.randn(3, 3, 6, 8)
    for program in (mine, theirs):
        done = [n for n in program.graph.nodes if "aten." in operation(n) and "sym_" not in operation(n)]
        assert [operation(n) for n in done if not has_rule(n)] == []
        torch.testing.assert_close(program.module(check_guards=False)(x), model(x))


def test_what_is_not_put_into_whole_rows_stays_as_it_is() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_scatter(x > 0, x.flip(0))

    with torch.no_grad(), quiet():
        program = lower(export(Single(), (torch.randn(4, 6),), strict=False))
    assert "aten.masked_scatter" in operations(program.graph)


def test_only_what_others_may_see_written_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[ExportedProgram] = []
    real = ExportedProgram.run_decompositions
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda p, table: left.append(p) or real(p, table))
    with torch.no_grad(), quiet():
        given = {n: export(Model(f).eval(), (torch.randn(4, 6),), strict=False) for n, f in FUNCTIONS.items()}
        for program in given.values():
            lower(program)
    assert {n for n, program in given.items() if any(p is program for p in left)} == BY_TORCH
