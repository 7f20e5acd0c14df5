"""Every graph-based grouping on models that nobody wrote rules for: hard cases one by one, and whole architectures."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from patterns import PATTERNS, Case
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from watching import census, watch

import dgate_wrap as dg
from dgate_wrap.groupings import groupings
from dgate_wrap.groupings.registry import lookup
from dgate_wrap.tracing import Structure, Trace, capture, find_structure

BY_LABELS = ("channels", "hidden", "heads", "embedding_dims", "rnn")
"""Groupings whose groups are positions of values, over which the oracle watches."""

SHARED = {"lora_ranks": "lora", "subnetworks": "modalities"}
TRACED = [g.name for g in groupings().values() if g.needs_trace and g.name not in SHARED]

EVERY_THIRD = {c.name for c in ARCHITECTURES if c.name.startswith("hand_")} | {c.name for c in ARCHITECTURES[::3]}

FLAT = {"mobilevit", "mobilevitv2", "efficientnet"}
"""Random models whose output moves with the weights of their first layers by less than a float32 can say."""


def cases(metafunc: pytest.Metafunc) -> list[Case]:
    chosen = [c for c in ARCHITECTURES if metafunc.config.getoption("--long") or c.name in EVERY_THIRD]
    return [*PATTERNS, *chosen]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(metafunc), ids=lambda c: c.name)


def traced(case: Case) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Trace]:
    model, args, kwargs = case.build()
    with warnings.catch_warnings():
        if case.data_dependent:
            warnings.simplefilter("ignore")
        return model, args, kwargs, capture(model, args, kwargs)


def find(name: str, model: nn.Module, trace: Trace) -> tuple[dict[str, Tensor], str]:
    """Return the labels of a grouping, or none and the reason."""
    try:
        labels = lookup(name).function(model, trace)
    except dg.GroupingError as e:
        return {}, e.found
    assert isinstance(labels, dict)
    return labels, ""


def count(labels: dict[str, Tensor]) -> int:
    return len(torch.cat([t[t >= 0].flatten() for t in labels.values()]).unique()) if labels else 0


def leaves(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        torch.manual_seed(0)
        return [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]


def test_every_grouping_finds_its_groups_and_every_gate_acts(case: Case) -> None:
    model, args, kwargs, trace = traced(case)
    structure = find_structure(trace)
    plain = leaves(model, args, kwargs)
    for name in TRACED:
        labels, why = find(name, model, trace)
        if name in case.expect:
            assert count(labels) == case.expect[name], (name, why)
        elif name in case.applies:
            assert labels or "nothing of the kind" not in why, (name, why)
        if not labels:
            continue
        if name in BY_LABELS and not case.data_dependent:
            assert watch(trace, structure, labels, most=2, noisy=False) > 0
        if case.name not in FLAT:
            check_gates(name, model, args, kwargs, labels, plain)
    assert_no_class_unites_a_whole_weight(structure)


def check_gates(
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: dict[str, Tensor],
    plain: list[Tensor],
) -> None:
    """Gating changes no bit; changed gates change the output, as weights that are scaled by hand do."""
    gated = dg.gate(copy.deepcopy(model), labels)
    for a, b in zip(plain, leaves(gated, args, kwargs), strict=True):
        assert torch.equal(a, b)
    by_hand = copy.deepcopy(model)
    weights = dict(by_hand.named_parameters())
    with torch.no_grad():
        for t in dg.gates.gated_tensors(gated):
            if bool((t.gates.gamma == 1).all()):
                t.gates.gamma.uniform_(0.2, 0.8)
            weights[t.name].mul_(t.gate(torch.ones_like(t.omega)))
    changed = leaves(gated, args, kwargs)
    assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True)), name
    for a, b in zip(changed, leaves(by_hand, args, kwargs), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True), name


def assert_no_class_unites_a_whole_weight(structure: Structure) -> None:
    for name, (rows, classes) in census(structure).items():
        assert classes > 1 or rows <= 8, (name, rows, classes)
