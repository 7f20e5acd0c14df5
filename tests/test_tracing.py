"""The trace and the label interpreter, checked by an oracle that zeroes weights and watches what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PROGRAMS, RandomNetwork, randomize
from torch import Tensor, nn
from watching import census, watch
from zoo import ZOO

import dgate_wrap as dg
from dgate_wrap.tracing import Structure, Trace, capture, find_structure
from dgate_wrap.tracing.branches import last_projections


def trace_of(model: nn.Module, *inputs: Tensor) -> tuple[Trace, Structure]:
    trace = capture(model, inputs)
    return trace, find_structure(trace)


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_zeroing_a_class_does_what_its_words_promise(entry: Any) -> None:
    model = entry.make()
    trace, structure = trace_of(model, *entry.make_inputs())
    tried = watch(trace, structure, structure.channel_labels())
    assert (tried > 0) == bool(structure.channel_labels())
    assert structure.words


def test_random_networks_keep_their_promises_and_unite_no_more_than_they_must() -> None:
    tried = 0

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(program=PROGRAMS, seed=st.integers(0, 10**6))
    def law(program: dict[str, Any], seed: int) -> None:
        nonlocal tried
        model = RandomNetwork(program).double()
        randomize(model, torch.Generator().manual_seed(seed))
        x = torch.randn(2, program["channels"], *[program["size"]] * program["dims"]).double()
        trace, structure = trace_of(model, x)
        tried += watch(trace, structure, structure.channel_labels(), most=4)
        for name, (rows, classes) in census(structure).items():
            conv = model.get_submodule(name.rpartition(".")[0])
            chained = any(getattr(m, "groups", 1) > 1 for m in model.modules())
            assert classes == rows or chained, (name, conv, rows, classes)

    law()
    assert tried > 60


class Coupled(nn.Module):
    """A residual stream with a concat, a depthwise convolution, squeeze-excite and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)
        self.side = nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(10 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        y = self.depthwise(y + self.branch(y))
        scale = self.up(self.down(y.mean((2, 3))).relu()).sigmoid()
        y = torch.cat([y * scale[:, :, None, None], self.side(x)], 1)
        return self.head(F.adaptive_avg_pool2d(y, 2).flatten(1))


def test_channels_are_coupled_from_end_to_end() -> None:
    model = Coupled()
    _, structure = trace_of(model, torch.randn(2, 3, 6, 6))
    labels = structure.channel_labels()
    stream = labels["stem.weight"].flatten().tolist()
    assert len(set(stream)) == 4
    for name in ("stem.bias", "norm.weight", "norm.bias", "branch.weight", "branch.bias"):
        assert labels[name].flatten().tolist() == stream
    assert labels["depthwise.weight"].flatten().tolist() == [c for c in stream for _ in range(2)]
    assert labels["up.weight"].flatten().tolist() == labels["depthwise.weight"].flatten().tolist()
    assert len(set(labels["side.weight"].flatten().tolist())) == 2
    assert len(set(labels["down.weight"].flatten().tolist())) == 2
    assert "head.weight" not in labels  # its rows are the model's outputs


def test_a_barrier_freezes_what_meets_it_and_is_reported_with_its_line() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).sort(1).values).relu())

    _, structure = trace_of(Sorted(), torch.randn(2, 4))
    assert set(structure.channel_labels()) == {"b.weight", "b.bias"}
    [(reason, count)] = structure.barriers.items()
    assert count == 6
    assert "aten.sort" in reason
    assert "test_tracing.py" in reason


def test_the_channels_grouping_removes_whole_channels_at_export() -> None:
    model = Coupled()
    x = torch.randn(2, 3, 6, 6)
    dg.gate(model, "channels", example_inputs=x)
    with torch.no_grad():
        for t in dg.gates.gated_tensors(model):
            if t.name in ("stem.weight", "side.weight"):
                t.gates.gamma[1] = 0
    result = dg.export(model, x, latency=False)
    assert result.report.removed == result.report.pruning.dead == 2
    assert result.model.stem.weight.shape[0] == 3
    assert result.model.depthwise.groups == 3
    assert result.model.side.weight.shape[0] == 1
    assert result.model.head.in_features == 4 * (3 * 2 + 1)


def test_channels_need_example_inputs() -> None:
    model = Coupled()
    with pytest.raises(dg.TraceError, match="example_inputs="):
        dg.gate(model, "channels")
    assert type(model.stem) is nn.Conv2d


def test_a_model_that_cannot_be_traced_is_refused_in_words() -> None:
    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.fc(x).detach().numpy()) + 1

    with pytest.raises(dg.TraceError, match="Leaving cannot be traced") as e:
        dg.gate(Leaving(), "channels", example_inputs=torch.randn(2, 3))
    assert "submodule" in e.value.mend


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Coupled().train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, torch.randn(2, 3, 6, 6))
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Turned(nn.Module):
    """Einsums of one operand, which transpose and sum, and operations called by their other names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.multiply(self.a(x), torch.special.expit(self.b(x)))
        y = torch.einsum("bcn->bc", torch.einsum("bnc->bcn", y))
        return self.c(torch.concat([y, torch.negative(y).relu()], 1))


def test_einsums_of_one_operand_and_aliases_are_as_good_as_what_they_stand_for() -> None:
    model, x = Turned(), torch.randn(2, 5, 4)
    trace, structure = trace_of(model, x)
    labels = structure.channel_labels()
    assert len(labels["a.weight"].unique()) == 6
    assert torch.equal(labels["a.weight"], labels["b.weight"])
    assert watch(trace, structure, labels) > 0
    assert not structure.barriers
    found = last_projections(trace, trace.outputs[0].args[0])
    assert set(found.labels) == {"a.weight", "a.bias"}
