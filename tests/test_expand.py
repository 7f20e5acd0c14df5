"""An exported network in its original shapes computes what it computed, also after training."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exports import CASES, exports
from networks import randomize
from test_dead_branches import PAIR, TABLE, Additive, Language, Modalities, adapted, export_with_zeros
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors


def assert_expands(exported: dg.Exported, build: Callable[[], nn.Module], **inputs: Tensor) -> nn.Module:
    fresh = build()
    types, shapes = [type(m) for m in fresh.modules()], {n: p.shape for n, p in fresh.named_parameters()}
    whole = dg.expand(exported, fresh, example_kwargs=inputs)
    assert whole is fresh
    assert [type(m) for m in whole.modules()] == types
    added = {f"{n}.bias" for n in exported.plan.new_biases}
    assert {n: p.shape for n, p in whole.named_parameters() if n not in added} == shapes
    with torch.no_grad():
        for p in exported.model.parameters():  # it shares no memory with the exported network
            p.add_(1)
        before = copy.deepcopy(whole)
        for p in exported.model.parameters():
            p.sub_(1)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), whole.parameters(), strict=True))
    return whole


class Shapes(nn.Module):
    """An additive model whose last layers have no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x[:, [i]]) for i, part in enumerate(self.parts)], -1).sum(-1)


@pytest.mark.parametrize("rewrite", [True, False])
def test_a_dead_shape_function_whose_constant_became_a_bias_expands(rewrite: bool) -> None:
    model, x = Shapes(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model.eval(), "shape_functions", example_inputs=x)
    with torch.no_grad():
        for gate in gated_tensors(model):
            if gate.name.startswith("parts.1."):
                gate.gates.gamma[:] = 0
    exported = dg.export(model, x, latency=False, rewrite=rewrite)
    whole = dg.expand(exported, Shapes(), x)
    torch.testing.assert_close(whole(x), model(x))


class Unbiased(nn.Module):
    """Attention whose projections have no bias, so that constants in front of them make some."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_new_biases_of_units_in_another_order_go_where_these_were() -> None:
    torch.manual_seed(0)
    model, x = Unbiased(), torch.randn(3, 4, 5)
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model.eval(), "neurons", exclude="out.*")
    with torch.no_grad():
        for gate in gated_tensors(model):
            gate.gates.gamma[[0, 3] if gate.name == "start.weight" else [0, 1, 6, 7]] = 0
    exported = dg.export(model, x, latency=False)
    assert "v" in exported.plan.new_biases
    assert exported.model.v.out_features == 4
    whole = dg.expand(exported, Unbiased(), x)
    torch.testing.assert_close(whole(x), model(x))


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_same_also_after_training(name: str) -> None:
    case, (dense, exported) = CASES[name], exports(name)
    exported = dataclasses.replace(exported, model=copy.deepcopy(exported.model))
    whole = assert_expands(exported, case.build, **case.draw(4))
    with torch.no_grad():
        expected = dense(**case.draw(4))
        found = whole(**case.draw(4))
        if not isinstance(found, Tensor):
            expected, found = expected["logits"], found["logits"]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(exported.model.train().parameters(), lr=0.01)
    for batch in (5, 6):
        out = exported.model(**case.draw(batch))
        (out if isinstance(out, Tensor) else out["logits"]).square().mean().backward()
        optimizer.step()
    exported.model.eval()
    whole = assert_expands(exported, case.build, **case.draw(4))
    assert not whole.training


@pytest.mark.parametrize(
    ("build", "inputs", "zeros"),
    [
        (Modalities, PAIR, ["text.3.weight"]),
        (Modalities, PAIR, ["image.0.weight"]),
        (Additive, TABLE, ["shapes.1.3.weight", "shapes.2.0.weight"]),
        (adapted, TABLE, ["0.b.weight"]),
    ],
)
def test_dead_branches_give_their_constants_again(build: Any, inputs: Any, zeros: list[str]) -> None:
    exported = export_with_zeros(build(), inputs, *zeros)
    assert exported.report.gone
    fresh = build()
    dg.expand(exported, fresh, inputs)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    torch.testing.assert_close(fresh(*given), exported.model(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [None, 0.1])
def test_a_norm_that_made_up_for_zeros_is_scaled_back(eps: float | None) -> None:
    def build() -> nn.Module:
        return Language(lambda n: nn.RMSNorm(n, eps=eps))

    model = build()
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in (model.embed.weight.T, *(layer.down.weight for layer in model.layers)):
            p[::3] = 0
    weight = model.norm.weight.detach().clone()
    tokens = torch.arange(14).view(2, 7)
    exported = dg.export(dg.gate(model, "neurons", include="out.*").eval(), tokens, latency=False)
    assert exported.model.norm.weight.shape == (8,)
    whole = assert_expands(exported, build, tokens=tokens)
    live = [i for i in range(12) if i % 3]
    torch.testing.assert_close(whole.norm.weight[live], weight[live])
    assert whole.norm.eps == eps
    assert not whole.norm.weight[::3].any()


def test_frozen_weights_dtypes_and_reduced_inputs() -> None:
    case = CASES["inputs"]
    model = case.gated()
    model.down.bias.requires_grad_(False)
    exported = dg.export(model, example_kwargs=case.draw(3), latency=False, select_inputs=False)
    exported.model.double()
    inputs = {"x": case.draw(3)["x"].double()}
    whole = dg.expand(exported, case.build(), example_kwargs=inputs)
    assert [n for n, p in whole.named_parameters() if not p.requires_grad] == ["down.bias"]
    assert {p.dtype for p in whole.parameters()} == {torch.float64}


def test_a_model_of_other_shapes_is_refused() -> None:
    _, exported = exports("inputs")
    with pytest.raises(dg.ExportError, match=r"'up.weight' is \(4, 3\), was \(12, 10\)") as e:
        dg.expand(exported, _other())
    assert "dg.expand(exported, MyModel" in e.value.mend


def _other() -> nn.Module:
    model = CASES["inputs"].build()
    model.up = nn.Linear(3, 4)
    return model


def test_what_differs_is_refused() -> None:
    _, exported = CASES["inputs"].exported()
    exported.plan.cuts["up.weight"].axes[0].reverse()
    with pytest.raises(dg.ExportError, match="differs from the exported one"):
        dg.expand(exported, CASES["inputs"].build(), example_kwargs=CASES["inputs"].draw(3))


def test_an_expanded_model_is_gated_and_exported_like_the_first() -> None:
    case, (_, exported) = CASES["conv"], exports("conv")
    whole = dg.expand(exported, case.build())
    dg.gate(whole, case.groups, example_kwargs=case.draw(3))
    assert any(bool((t.gates.gamma != 0).all()) for t in gated_tensors(whole))
    again = dg.export(whole, example_kwargs=case.draw(3), latency=False)
    assert again.report.after.parameters <= exported.report.after.parameters
