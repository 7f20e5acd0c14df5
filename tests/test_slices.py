"""Tensors that are filled slice by slice are concatenations of what is written, whatever the order and the overlaps."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import kill_every_second
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.tracing import capture, normalize_inputs
from dgate_wrap.tracing.capture import export_open
from dgate_wrap.tracing.origins import operation


class Filled(nn.Module):
    """Writes random slices and single layers, along two axes, into a tensor that is made in one of several ways."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        rng = Random(self.seed)
        shape = (x.shape[0], 6, 5)
        whole = [x.new_zeros(shape), torch.ones(shape, dtype=x.dtype), x[:, :1].repeat(1, 6, 1), x.new_empty(shape)]
        out = whole[rng.randrange(3)]
        if rng.random() < 0.3:  # all of it is written
            out = whole[3]
            out[:, 2:] = x[:, :4]
            out[:, :2] = x[:, 4:].flip(1).double()
        for _ in range(rng.randrange(1, 6)):
            axis = rng.choice((1, 1, 1, 2))
            size = out.shape[axis]
            a, b = sorted((rng.randrange(size), rng.randrange(1, size + 1)))
            part = x[:, : shape[1], :5].sin() * rng.random()
            if rng.random() < 0.4:
                out.select(axis, rng.choice((a, a - size))).copy_(part.select(axis, a))
            elif a < b:
                out.narrow(axis, a, b - a).copy_(part.narrow(axis, size - b, b - a))
        return out.tanh()


@pytest.mark.parametrize("seed", range(60))
def test_slices_that_are_written_are_joined(seed: int) -> None:
    model, x = Filled(seed), torch.randn(2, 6, 5)
    trace = capture(model, x)
    torch.testing.assert_close(trace.run()[trace.outputs[0]], model(x), rtol=0, atol=0)
    assert not {"aten.slice_scatter", "aten.select_scatter", "aten.copy"} & {operation(n) for n in trace.nodes}
    with export_open(model, normalize_inputs(x)) as (exported, _):
        other = torch.randn(7, 6, 5)
        torch.testing.assert_close(exported.module()(other)[0], model(other), rtol=0, atol=0)


class Steps(nn.Module):
    """Writes each step's state into a tensor that was made for all."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.cell.hidden_size)
        out = torch.empty(len(x), x.shape[1], self.cell.hidden_size, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = out[:, t] = self.cell(x[:, t], h)
        return self.head(out)


class Keys(nn.Module):
    """Attention whose keys have a part of each head and a part that all share, written into memory without values."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.shared, self.query = how, nn.Linear(16, 32), nn.Linear(16, 8), nn.Linear(16, 48)
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        own, shared = self.up(x).view(b, t, 2, 16).transpose(1, 2), self.shared(x).view(b, 1, t, 8)
        if self.how == "cat":
            k = torch.cat([own, shared.expand(b, 2, t, 8)], -1)
        else:
            k = getattr(x, self.how)(b, 2, t, 24)
            k[..., :16] = own
            k[..., 16:] = shared
        q, v = self.query(x).view(b, t, 2, 24).transpose(1, 2), self.value(x).view(b, t, 2, 8).transpose(1, 2)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 16))


def exported(model: nn.Module, grouping: Any, x: Tensor) -> dg.Exported:
    dg.gate(model.eval(), grouping, example_inputs=x)
    kill_every_second(model)
    found = dg.export(model, x, latency=False)
    other = torch.randn(5, *x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(found.model(other), model(other))
    return found


@pytest.mark.parametrize("how", ["new_zeros", "new_empty"])
def test_keys_that_are_written_in_parts_go_as_those_that_are_concatenated(how: str) -> None:
    junk = [torch.full((2, 2, 5, 24), float("nan")) for _ in range(50)]
    del junk  # what memory without values may hold
    x = torch.randn(2, 5, 16)
    written, joined = (exported(Keys(h), "channels", x).report for h in (how, "cat"))
    assert written.removed == joined.removed > 10


def test_states_that_are_written_step_by_step_go() -> None:
    report = exported(Steps(), dg.Select("channels"), torch.randn(2, 4, 3)).report
    assert report.removed == report.pruning.dead == 4
