"""Export on models that nobody wrote rules for: equal, and smaller by what a dumb count over labels says, or told why.

Every micro-pattern and grouping with a quarter, half or nine tenths of the groups dead, in turn. With ``--long``, all
three, and whole architectures too.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from patterns import PATTERNS, Case
from test_corpus import FLAT, cases, find, leaves, traced
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.copying import deep_copy
from dgate_wrap.groupings import groupings

SHARES = (0.25, 0.5, 0.9)
NAMES = ["neurons", "filters", *(g.name for g in groupings().values() if g.needs_trace)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        chosen = cases(metafunc) if metafunc.config.getoption("--long") else PATTERNS
        metafunc.parametrize("case", chosen, ids=lambda c: c.name)


@torch.no_grad()
def kill(gated: nn.Module, share: float, seed: int) -> Tensor:
    """Zero the gates of a random share of all groups, at least one and not all; return which."""
    generator = torch.Generator().manual_seed(seed)
    gates = list(dict.fromkeys(t.gates for t in dg.gates.gated_tensors(gated)))
    count = sum(g.num_groups for g in gates)
    dead = torch.zeros(count, dtype=torch.bool)
    dead[torch.randperm(count, generator=generator)[: max(1, int(share * count))]] = True
    for g, part in zip(gates, dead.split([g.num_groups for g in gates]), strict=True):
        g.gamma[part] = 0
    return dead


def elements(gated: nn.Module) -> dict[str, list[int]]:
    """Return, per gated tensor and group, how many elements it has there, by counting."""
    counted: dict[str, list[int]] = {}
    start, offsets = 0, dict[Any, int]()
    for t in dg.gates.gated_tensors(gated):
        if t.gates not in offsets:
            offsets[t.gates], start = start, start + t.gates.num_groups
        found = counted.setdefault(t.name, [])
        for g in t.gate.index.expand(t.omega.shape).flatten().tolist():
            if g >= 0:
                found.append(g + offsets[t.gates])
    return counted


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    assert [x.shape for x in a] == [x.shape for x in b]
    errors = [float((x - y).abs().max() / x.abs().max().clamp_min(1e-6)) for x, y in _floats(a, b)]
    return max(errors, default=0.0)


def _floats(a: list[Tensor], b: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True) if x.is_floating_point() and x.numel()]


def export_dead(case: Case, name: str, model: nn.Module, inputs: tuple[Any, Any], labels: Any, share: float) -> str:
    """Export with a share of the groups dead; return what became of it."""
    args, kwargs = inputs
    try:
        gated = dg.gate(deep_copy(model, {}), labels).eval()
    except dg.GateError as e:  # a built-in grouping meets a parametrized weight
        return e.found
    dead = kill(gated, share, seed=len(case.name))
    try:
        exported = dg.export(gated, args, kwargs, latency=False)
    except dg.ExportError as e:
        return e.found
    report = exported.report
    assert report.certificate.max_error.get("float64", 0.0) <= 1e-10
    error = difference(leaves(gated, args, kwargs), leaves(exported.model, args, kwargs))
    assert error < (1e-2 if case.name in FLAT else 1e-3), (name, share, error)
    kept = {g for k in report.kept for g in k.groups}
    assert all(k.reason for k in report.kept)
    assert kept <= set(dead.nonzero().flatten().tolist())
    assert report.removed + len(kept) == int(dead.sum()), (name, share)
    gone = set(dead.nonzero().flatten().tolist()) - kept
    sizes = {n: p.numel() for n, p in exported.model.named_parameters()}
    whole = dict(model.named_parameters())
    for tensor, members in elements(gated).items():
        count = sum(g in gone for g in members)
        assert sizes.get(tensor, 0) <= whole[tensor].numel() - count, (name, share, tensor)
    return "shrunk" if gone else "none removed"


REFUSED = (
    "has another parametrization",
    "depends on the input",
    "is not finite",
    "differs from run to run",
)


def test_export_is_equal_and_removes_what_is_dead_or_says_why(case: Case, pytestconfig: pytest.Config) -> None:
    model, args, kwargs, trace = traced(case)
    outcomes: dict[tuple[str, float], str] = {}
    for i, name in enumerate(NAMES):
        labels: Any = name
        if groupings()[name].needs_trace:
            labels, _ = find(name, model, trace)
        shares = SHARES if pytestconfig.getoption("--long") else (SHARES[(i + len(case.name)) % 3],)
        for share in shares if labels else ():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    outcomes[name, share] = export_dead(case, name, model, (args, kwargs), labels, share)
                except dg.GroupingError:
                    continue
    for key, found in outcomes.items():
        assert found in ("shrunk", "none removed") or any(r in found for r in REFUSED), (key, found)
