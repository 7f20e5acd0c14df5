"""Export equals the gated model on random graphs over every family of operations: 2,000, or 100,000 with ``--long``."""

from __future__ import annotations

import copy
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from graphs import describe, new_inputs, random_groups, random_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dgate_wrap as dg
from dgate_wrap.export import scatter
from dgate_wrap.tracing import capture, families
from dgate_wrap.tracing.operations import describe as family_of
from dgate_wrap.tracing.operations import varying_nodes

CHUNK = 100
REMOVED = 0.2
"""Share of the dead groups that every chunk loses at least; most that stay are alive in a sum, a norm or an output."""

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

FAMILIES = {
    families.Movement,
    families.Pointwise,
    families.Contraction,
    families.Mixing,
    families.Lookup,
    families.Creation,
    families.Pick,
    families.Product,
    families.Attention,
    families.Recurrence,
    families.Indexing,
    families.Ranking,
    families.Bilinear,
    families.Halves,
    families.NormedWeight,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chunk" in metafunc.fixturenames:
        metafunc.parametrize("chunk", range(1000 if metafunc.config.getoption("--long") else 20))


@dataclass
class Outcome:
    """What became of one seed: how many groups were dead, and how many of these could be removed."""

    kind: str
    found: str = ""
    dead: int = 0
    removed: int = 0


@torch.no_grad()
def kill(gated: nn.Module, labels: dict[str, Tensor], dead: Tensor, rng: Random) -> None:
    """Zero the gates of dead groups; give the others gates that are not one."""
    generator = torch.Generator().manual_seed(rng.randrange(2**30))
    for t in dg.gates.gated_tensors(gated):
        t.gates.gamma.copy_(1.1 * torch.randn(t.gates.gamma.shape, generator=generator).sign())
    for t in dg.gates.gated_tensors(gated):
        doomed = torch.isin(labels[t.name], dead)
        t.gates.gamma[t.gate.index.view(labels[t.name].shape)[doomed]] = 0


@torch.no_grad()
def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.double() for x in pytree.tree_leaves(model(*inputs))]


def double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference of outputs, each relative to the largest of its elements."""
    assert [x.shape for x in a] == [x.shape for x in b]
    errors = [float((x - y).abs().max() / x.abs().max().clamp_min(1e-2)) for x, y in zip(a, b, strict=True)]
    assert all(e == e for e in errors)
    return max(errors)


def try_seed(seed: int) -> Outcome:
    """Gate a random model, kill groups, export, and compare on inputs that export never saw."""
    model, args = random_model(seed)
    rng = Random(seed)
    labels, dead = random_groups(model, rng)
    gated = dg.gate(model, labels).eval()
    kill(gated, labels, dead, rng)
    exact = copy.deepcopy(gated).double()
    probes: list[tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]] = []
    for batch in (len(args[0]), 5, 1):
        inputs = new_inputs(args, seed + 1, batch)
        try:
            probes.append((inputs, run(gated, inputs), run(exact, double(inputs))))
        except (RuntimeError, ValueError):  # the model is written for one batch size
            assert probes
    try:
        exported = dg.export(gated, args, latency=False)
    except dg.ExportError as e:
        first = run(exact, double(args))
        finite = all(x.isfinite().all() for x in [*run(gated, args), *first])
        if not finite and ("is not finite" in str(e) or "is constant" in str(e)):
            return Outcome("not finite")  # a direction of zeros under weight_norm, say
        if "no output depends on the input" not in str(e):
            return Outcome("refused", str(e))
        # what is seen to be constant, and not proven, may still differ on rare inputs
        others = [
            probes[0][2],
            *([] if "are dead" in str(e) else (run(exact, double(more)) for more in _others(args, seed))),
        ]
        error = min(difference(first, x) for x in others)
        return Outcome("constant") if error < 1e-10 else Outcome("mismatch", f"not constant: {error:.1e}")
    small = exported.model.eval()
    for inputs, reference, accurate in probes:
        error, rounding = difference(reference, run(small, inputs)), difference(accurate, reference)
        if error > max(2e-5, 40 * rounding):
            return Outcome("mismatch", f"batch {len(inputs[0])}: {error:.1e}, where rounding is {rounding:.1e}")
    steady = [p for p in exported.report.certificate.probes if not p.skipped]  # others are moved by rounding alone
    certified = max(p.errors.get("float64", 1.0) for p in steady)
    noise = any(x.abs().max() < 1e-12 for _, _, accurate in probes for x in accurate)  # the mean of a norm, say
    if certified > 1e-10 and not noise:
        return Outcome("mismatch", f"float64 error {certified:.1e}")
    return Outcome("equal", "", exported.report.pruning.dead, exported.report.removed)


def _others(args: tuple[Tensor, ...], seed: int) -> list[tuple[Tensor, ...]]:
    return [new_inputs(args, seed + i, len(args[0])) for i in range(2, 8)]


def outcome(seed: int) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            return try_seed(seed)
    except Exception as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if "dgate_wrap" in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-3:]))
        return Outcome("crash", f"{type(e).__name__}: {e} ({where})")


def show(seed: int, found: Outcome) -> str:
    return f"seed {seed}, {found.kind}: {found.found}\n{describe(*random_model(seed))}"


def test_export_of_random_graphs_equals_the_gated_model(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "_WORTH", 96 if chunk % 2 else 0.5)  # these layers are small
    outcomes = {seed: outcome(seed) for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK)}
    failed = [show(seed, o) for seed, o in outcomes.items() if o.kind not in ("equal", "constant", "not finite")]
    assert not failed, f"{len(failed)} of {CHUNK} seeds failed\n\n" + "\n\n".join(failed)
    counted = [o for o in outcomes.values() if o.kind == "equal"]
    assert len(counted) > CHUNK / 2
    assert sum(o.removed for o in counted) > REMOVED * sum(o.dead for o in counted)


def test_random_graphs_cover_every_family() -> None:
    assert FAMILIES | {families.Barrier} == families_defined()
    found: set[type[Any]] = set()
    for seed in range(500):
        trace = capture(*random_model(seed))
        varying = varying_nodes(trace)
        found |= {type(family_of(n, varying)) for n in trace.nodes if n.op == "call_function"}
        if found >= FAMILIES:
            break
    assert found >= FAMILIES, FAMILIES - found


def families_defined() -> set[type[Any]]:
    """Return every family of operations: none may be added without a block that has it."""
    known = (*families.Family.__args__, *families.Barrier.__subclasses__())
    return set(known)


def test_random_models_are_deterministic_and_finite() -> None:
    for seed in range(100):
        (a, args), (b, same) = random_model(seed), random_model(seed)
        assert all(torch.equal(x, y) for x, y in zip(args, same, strict=True))
        for x, y, z in zip(run(a, args), run(b, args), run(a, args), strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z)
            assert x.isfinite().all()


def test_positions_that_a_fold_pads_with_zeros_are_mixed_with_the_others() -> None:
    assert outcome(38263).kind == "equal"


def test_what_rounding_leaves_of_zero_is_no_fault_of_a_module() -> None:
    assert outcome(510136).kind == "equal"  # one of its outputs is the mean of a norm
    assert outcome(4983).kind == "equal"  # and of a series of two, a norm over two numbers that are the same
