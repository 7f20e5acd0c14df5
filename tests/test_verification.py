"""The verification itself: every planted fault is caught, the module that has it is named, and nothing is returned."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomize
from oracles import all_gates, kill_every_second
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.export import api, plan, search
from dgate_wrap.export.copies import InDouble, share
from dgate_wrap.export.verify import Verifier, _Reference
from dgate_wrap.tracing import normalize_inputs

TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """Takes any batch and any sequence length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        return self.head((x + self.down(self.up(x).sigmoid())).mean(1))


def gated(model: nn.Module | None = None, dead: tuple[int, ...] = (1, 2, 5), parameter: str = "up") -> nn.Module:
    model = Encoder() if model is None else model
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "neurons", include=f"{parameter}.*")
    [gate] = dg.gates.gated_tensors(model)
    with torch.no_grad():
        gate.gates.gamma[list(dead)] = 0
    return model


def plant(monkeypatch: pytest.MonkeyPatch, path: str, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let every smaller network have a fault in one module."""
    apply = plan.Plan.apply

    def faulty(self: plan.Plan, model: nn.Module, tensors: Any) -> nn.Module:
        small = apply(self, model, tensors)
        small.get_submodule(path).register_forward_hook(lambda _, args, out: fault(args[0], out))
        return small

    monkeypatch.setattr(plan.Plan, "apply", faulty)


def test_the_certificate_says_what_was_compared_and_what_was_removed(tmp_path: Path) -> None:
    batches = [torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    exported = dg.export(gated(), TOKENS, batches=batches, latency=False)
    certificate = exported.report.certificate
    shapes = [p.shapes for p in certificate.probes]
    assert [[2, 5, 4]] in shapes
    assert [[3, 5, 4]] in shapes
    assert [[1, 5, 4]] in shapes
    assert [[2, 6, 4]] in shapes
    assert [[2, 2, 4]] in shapes
    assert shapes[-2:] == [[[3, 7, 4]], [[3, 7, 4]]]
    assert [[2, 21, 4]] in shapes  # a much longer sequence
    assert [p.shapes for p in certificate.skipped] == [[[2, 5, 5]], [[2, 5, 2]], [[2, 5, 17]]]
    assert all("refuses" in p.skipped for p in certificate.skipped)
    assert certificate.max_error["float64"] <= certificate.tolerance["float64"] == 1e-10
    assert all(set(p.errors) == {"float64", "own precision"} for p in certificate.probes)
    assert certificate.removed == {
        "up.weight": ([12, 8], [9, 8]), "up.bias": ([12], [9]), "down.weight": ([8, 12], [8, 9]),
    }  # fmt: skip
    assert certificate.torch_version == torch.__version__
    dg.save(exported, tmp_path)
    written = json.loads((tmp_path / "plan.json").read_text())["certificate"]
    assert written["removed"]["up.weight"] == [[12, 8], [9, 8]]
    assert written["precision"] == "float64, and its own"
    assert len(written["probes"]) == len(certificate.probes)


@pytest.fixture
def no_retreat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be kept whole where a plan fails, so that no other plan can go round the fault."""
    monkeypatch.setattr(search, "colder", lambda *_: None)


class Counting(Encoder):
    """Counts its calls, in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        self.calls += 1
        return super().forward(x)


def test_no_run_of_an_export_moves_the_state_of_either_model() -> None:
    model: Any = gated(Counting())
    before = model.seen.clone()
    small: Any = dg.export(model, TOKENS).model
    for m in (model, small):
        assert (m.seen, m.calls) == (before, 0)


def test_an_output_that_is_a_buffer_is_compared_as_it_was_given() -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.zeros(3, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            held = self.get_buffer("held").add_(x)
            return held, held[1:]

    x, model = torch.randn(3, 4), Holding()
    for n, (whole, part) in enumerate(normalize_inputs(x).calls(model, 2), start=1):
        assert torch.equal(whole, n * x)
        assert torch.equal(part, n * x[1:])
    assert not model.held.any()


@pytest.mark.parametrize("heads", [(4, 0, 0), (2, 2, 0), (0, 0, 0)])
def test_attention_without_heads_is_an_error_and_not_the_end_of_the_process(heads: tuple[int, ...]) -> None:
    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, value=v, enable_gqa=True)

    with pytest.raises(RuntimeError, match="attention without heads"):
        normalize_inputs(tuple(torch.randn(1, n, 5, 4) for n in heads)).call(Attends())


class Flattening(nn.Module):
    """Writes down how many features an image has, so that four images of 3 × 3 places seem to be three of 4 × 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8 * 9, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.conv(x).relu().view(-1, 8 * 9)).relu())


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_sizes_that_only_seem_to_fit_do_not_count(batch: int) -> None:
    model = Flattening()
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "filters")
    [gate] = dg.gates.gated_tensors(model)
    with torch.no_grad():
        gate.gates.gamma[[1, 2, 5]] = 0
    x = torch.randn(batch, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    mixing = [p.shapes for p in exported.report.certificate.skipped if "mixes" in p.skipped]
    assert mixing == ([[[3, 1, 6, 5]], [[3, 1, 5, 6]]] if batch == 3 else [])


class Choosing(nn.Module):
    """Scales by the larger of two scores, sums of the same in another order, where x[..., 0] is negative."""

    def __init__(self, apart: float) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(4, 40) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(40, 1) for _ in range(2))
        self.out, self.scale = nn.Linear(4, 2), nn.Parameter(torch.tensor([1.0, 2.0]))
        randomize(self, torch.Generator().manual_seed(2))
        with torch.no_grad():
            self.ups[1].load_state_dict({n: p.flip(0) for n, p in self.ups[0].named_parameters()})
            self.downs[1].weight.copy_(self.downs[0].weight.flip(1))
            self.downs[1].bias.copy_(self.downs[0].bias + apart)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.cat([down(up(x).tanh()) for up, down in zip(self.ups, self.downs, strict=True)], -1)
        scores = scores + torch.cat([torch.zeros_like(x[..., :1]), x[..., :1].relu()], -1)
        return self.out(x) * self.scale[scores.argmax(-1)].unsqueeze(-1)


def choosing(apart: float) -> nn.Module:
    model = dg.gate(Choosing(apart), "neurons", include="ups.*")
    with torch.no_grad():
        for gate, dead in zip(dg.gates.gated_tensors(model), (range(25), range(15, 40)), strict=True):
            gate.gates.gamma[list(dead)] = 0
    return model


CHOICES = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def test_choices_between_equal_scores_are_refused_in_words() -> None:
    with pytest.raises(dg.ExportError, match="nothing can be compared with the gated model: rounding alone"):
        dg.export(choosing(0.0).double(), CHOICES.double(), latency=False)


def test_choices_that_rounding_makes_in_float32_alone_are_compared_in_float64() -> None:
    exported = dg.export(choosing(1e-7), CHOICES, latency=False)
    assert exported.report.removed == exported.report.pruning.dead == 50
    certificate = exported.report.certificate
    assert certificate.max_error["float64"] < 1e-12
    alone = [p for p in certificate.probes if "rounding alone" in p.skipped]
    assert alone
    assert all(set(p.errors) == {"float64"} for p in alone)


def test_a_fault_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "out", lambda _, out: 1.3 * out)
    with pytest.raises(dg.ExportError, match="not equal to the gated one"):
        dg.export(choosing(1e-7), CHOICES, latency=False)


def test_batches_on_which_the_reference_jumps_are_skipped() -> None:
    apart = CHOICES.double() * torch.tensor([1.0, 1, 1, 1]).where(CHOICES > 0, torch.tensor([-1.0, 1, 1, 1]))
    exported = dg.export(choosing(0.0).double(), apart, batches=[CHOICES.double()], latency=False)
    assert exported.report.removed == 50
    skipped = {p.name for p in exported.report.certificate.skipped if "rounding alone" in p.skipped}
    assert {"batch 0 of yours", "random, as large as the example"} <= skipped
    assert "example" in {p.name for p in exported.report.certificate.probes}


class Flagged(nn.Module):
    """Takes a number, a flag, an integer and a mask beside its features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
        randomize(self, torch.Generator().manual_seed(1))

    def forward(
        self,
        x: Tensor,
        temperature: float,
        normalize: bool = False,
        *,
        features: bool = False,
        shift: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        h = self.up(x).tanh()
        h = F.normalize(h, dim=-1) if normalize else h
        h = h if mask is None else h * mask
        return h if features else (self.down(h) + shift) / temperature


def test_other_numbers_are_compared_and_other_flags_are_told() -> None:
    model = dg.gate(Flagged(), "neurons", include="up.*")
    [gate] = dg.gates.gated_tensors(model)
    with torch.no_grad():
        gate.gates.gamma[[1, 2, 5]] = 0
    x = TOKENS[:, 0]
    exported = dg.export(model, (x, 1.0), latency=False)
    small, certificate = exported.model, exported.report.certificate
    with torch.no_grad():
        for temperature in (0.3, 1.0, 4.0):
            torch.testing.assert_close(small(x, temperature), model(x, temperature))
            torch.testing.assert_close(small(x, temperature, shift=2), model(x, temperature, shift=2))
    assert "example with other numbers" in {p.name for p in certificate.probes}
    tried = {"temperature=0.74", "temperature=0.0", "normalize=True", "features=True", "shift=1"}
    assert {p.name for p in certificate.arguments} <= tried
    assert {p.name for p in certificate.arguments} >= tried - {"temperature=0.0"}  # which gives no finite numbers
    assert exported.report.removed == 3
    assert certificate.others == ["normalize=True", "features=True"]
    assert certificate.left_out == ["mask"]
    assert "computes something else than the gated model, or fails, with normalize=True, features=True" in str(
        exported.report
    )


def test_constants_that_other_numbers_change_are_not_folded() -> None:
    class Warm(Encoder):
        def forward(self, x: Tensor, temperature: float) -> Tensor:
            return self.head(self.down(self.up(self.embed(x)).sigmoid() / temperature).mean(1))

    model = gated(Warm())
    small = dg.export(model, (TOKENS, 1.0), latency=False).model
    with torch.no_grad():
        torch.testing.assert_close(small(TOKENS, 0.25), model(TOKENS, 0.25))


def test_numbers_of_which_the_reference_makes_chance_are_left_out() -> None:
    class Dropping(Encoder):
        def forward(self, x: Tensor, p: float = 0.0) -> Tensor:
            return super().forward(F.dropout(x, p, training=True))

    exported = dg.export(gated(Dropping()), (TOKENS, 0.0), latency=False)
    assert exported.report.removed == 3
    assert "run to run" in next(p.skipped for p in exported.report.certificate.skipped if "numbers" in p.name)


class Alternating(Encoder):
    """Does something else at every second call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 2)


def test_a_model_that_answers_otherwise_at_the_next_call_is_refused() -> None:
    with pytest.raises(dg.ExportError, match="differs from run to run"):
        dg.export(gated(Alternating()), TOKENS, latency=False)


class Long(Encoder):
    """Takes another way for long sequences, which no trace of a short one shows."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.embed(x).tanh()).sigmoid()
        return self.head((self.down(h) if x.shape[1] < 10 else self.other(h)).mean(1))


def test_a_way_that_only_long_sequences_take_keeps_what_it_needs() -> None:
    model = gated(Long())
    small = dg.export(model, TOKENS, latency=False).model
    longer = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(3))
    for x in (TOKENS, longer):
        assert torch.allclose(model(x), small(x), rtol=1e-5, atol=1e-6)


class Windowed(nn.Module):
    """Attention that weighs far positions by head, of sequences that are longer than six."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.width = nn.Linear(8, 24), nn.Linear(8, 8), 4
        self.register_buffer("slopes", torch.tensor([1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT
        if x.shape[1] > 6:
            place = torch.arange(x.shape[1])
            scores = scores - self.get_buffer("slopes")[:, None, None] * (place - place[:, None]).abs()
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_what_fails_only_in_another_graph_is_kept() -> None:
    torch.manual_seed(0)
    x, longer = torch.randn(2, 6, 8), torch.randn(2, 9, 8)
    model = dg.gate(nn.Sequential(Windowed(), nn.Linear(8, 3)).eval(), "heads", example_inputs=x)
    with torch.no_grad():
        all_gates(model)[0].gamma[0] = 0
    exported = dg.export(model, x, latency=False)
    torch.testing.assert_close(exported.model(longer), model(longer))
    assert exported.report.rewritten == []
    assert exported.report.frozen == ["0"]


@pytest.mark.usefixtures("no_retreat")
def test_a_wrong_fold_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    constant = plan.folded_constant
    monkeypatch.setattr(plan, "folded_constant", lambda *args: 1.01 * constant(*args))
    with pytest.raises(dg.ExportError, match=r"on the example, in float64.* The first module that differs is 'down'"):
        dg.export(gated(), TOKENS)


def test_a_plan_that_fails_is_left_for_one_that_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    constant, model = plan.folded_constant, gated()
    monkeypatch.setattr(plan, "folded_constant", lambda *args: 1.01 * constant(*args))
    small = dg.export(model, TOKENS, latency=False).model
    torch.testing.assert_close(small(TOKENS), model(TOKENS))


@pytest.mark.usefixtures("no_retreat")
def test_a_wrong_cut_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = plan.Cut.apply

    def wrong(self: plan.Cut, tensor: Tensor) -> Tensor:
        kept = cut(self, tensor)
        return kept.roll(1, 1) if kept.shape == (8, 9) and tensor.is_floating_point() else kept

    monkeypatch.setattr(plan.Cut, "apply", wrong)
    with pytest.raises(dg.ExportError, match="The first module that differs is 'down'"):
        dg.export(gated(), TOKENS)


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (lambda x, out: out * (1 + 1e-3 * (x.shape[0] == 3)), "random, batch 3"),
        (lambda x, out: out * (1 + 1e-3 * (x.shape[0] == 1)), "random, batch 1"),
        (lambda x, out: out * (1 + 1e-3 * (x.shape[1] == 6)), "6 in place of 5 along axis 1"),
        (lambda x, out: out * (1 + 1e-3 * (x.shape[1] < 5)), "2 in place of 5 along axis 1"),
        (lambda x, out: out[:, :5] if x.shape[1] > 5 else out, "6 in place of 5 along axis 1"),
    ],
)
def test_a_fault_at_other_sizes_only_is_caught_and_named(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor, Tensor], Tensor], where: str
) -> None:
    plant(monkeypatch, "down", fault)
    with pytest.raises(dg.ExportError, match=rf"{where}.*") as e:
        dg.export(gated(), TOKENS)
    assert "The first module that differs is 'down'" in str(e.value) or "does not run" in str(e.value)


def test_a_fault_on_the_users_batches_only_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "embed", lambda x, out: out * (1 + 1e-3 * bool((x == 0).any())))
    usual, rare = torch.randn(2, 5, 4), torch.eye(4).expand(2, 4, 4)
    model = gated()
    dg.export(model, TOKENS, batches=[usual], latency=False)
    found = "on the batch 1 of yours, in float64.* The first module that differs is 'embed'"
    with pytest.raises(dg.ExportError, match=found):
        dg.export(model, TOKENS, batches=iter([usual, rare]))


def test_batches_that_the_model_refuses_are_named() -> None:
    pairs = [(torch.randn(2, 5, 4), torch.zeros(2))]
    with pytest.raises(dg.ExportError, match=r"does not run on the batch 0 of yours.*\[2, 5, 4\].*(.|\n)*for x, y in"):
        dg.export(gated(), TOKENS, batches=pairs)


def test_a_reference_that_is_not_finite_on_a_batch_is_refused() -> None:
    with pytest.raises(dg.ExportError, match="on the batch 0 of yours is not finite"):
        dg.export(gated(), TOKENS, batches=[torch.full((2, 5, 4), torch.nan)])


def test_an_output_that_no_input_moves_is_refused() -> None:
    """The graph still reads the input, but a ReLU that is always off passes nothing on."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    gated(model, dead=(1,), parameter="0")
    with torch.no_grad():
        model[1].bias.fill_(-1e9)
    with pytest.raises(dg.ExportError, match="the same on the example and on random inputs"):
        dg.export(model, torch.randn(2, 4))


def test_random_inputs_without_a_finite_answer_are_skipped_and_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x.sqrt()).relu())

    exported = dg.export(gated(Root(), dead=(1,)), torch.rand(64, 4), latency=False)
    assert any("not finite" in p.skipped for p in exported.report.certificate.skipped)


class Sums(nn.Module):
    """What a constant adds to a sum over positions depends on how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).sigmoid().sum(1)).tanh()


class Tokens(Sums):
    """The same beside whole numbers."""

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        return super().forward(x) + kinds.unsqueeze(-1)


class Windows(nn.Module):
    """Pads to whole windows by ones, if it has to; without, what is nothing but a bias is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.up(x).abs() - self.up.bias.abs()).relu()
        if h.shape[1] % 4:
            h = F.pad(h, (0, 0, 0, -h.shape[1] % 4), value=1.0)
        return self.head(h.amax(1))


class Borders(nn.Module):
    """At the example's size every place of the map is a corner; at others it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.pool, self.head = nn.Conv2d(2, 6, 3), nn.AvgPool2d(3, 2, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.up(x).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize(("model", "x", "other"), [
    (Sums(), (torch.randn(2, 5, 4),), (torch.randn(3, 9, 4),)),
    (Tokens(), (torch.randn(2, 5, 4), torch.tensor([3, 1])), (torch.randn(3, 9, 4), torch.tensor([0, 5, 7]))),
    (Windows(), (torch.randn(2, 4, 4),), (torch.randn(3, 9, 4),)),
    (Borders(), (torch.randn(2, 2, 5, 5),), (torch.randn(2, 2, 11, 9),)),
], ids=["sum", "tokens", "windows", "border"])  # fmt: skip
def test_constants_that_depend_on_sizes_are_not_folded(
    model: nn.Module, x: tuple[Tensor, ...], other: tuple[Tensor, ...]
) -> None:
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, dg.Select(names="up.weight", axis=0))
    [gate] = dg.gates.gated_tensors(model)
    with torch.no_grad():
        gate.gates.gamma[[1, 2]] = 0
    result = dg.export(model.eval(), x, latency=False)
    assert "with the sizes of the inputs" in str(result.report)
    assert not result.report.frozen
    torch.testing.assert_close(result.model(*other), model(*other))


class Parity(Encoder):
    """Positions of which a short example reads few, and another end for even lengths, which is another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.up(self.embed(x) + self.positions[: x.shape[1]]).sigmoid())
        return self.head(x.mean(1) if x.shape[1] % 2 else x.amax(1))


def test_a_zero_that_is_none_at_other_sizes_is_seen_as_far_as_their_graph_is_the_same() -> None:
    model = Parity()
    randomize(model, torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    dg.gate(model.eval(), "channels", example_inputs=x)
    kill_every_second(model)
    exported = dg.export(model, x, latency=False)
    assert "embed.weight" in {k.parameter for k in exported.report.kept}
    assert exported.model.get_parameter("up.weight").shape == (6, 8)
    for length in range(1, 9):
        other = torch.randn(2, length, 4, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(exported.model(other), model(other))


@dataclass
class Output:
    """What torch's trees do not look into."""

    logits: Tensor


class Scaled(Encoder):
    """Divides what it makes of a long sequence by a width that it reads off, and returns an object."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return Output(y / self.up.out_features if x.shape[1] > 7 else y)


def test_what_objects_hold_is_compared_too() -> None:
    with pytest.raises(dg.ExportError, match="not equal"):
        dg.export(gated(Scaled()), TOKENS, latency=False)
    exported = dg.export(gated(Scaled()), TOKENS, latency=False, dynamic="batch")
    assert exported.report.removed == 3
    with pytest.raises(dg.ExportError, match="batch"):
        dg.export(gated(Scaled()), TOKENS, latency=False, dynamic="batch", batches=[torch.randn(2, 20, 4)])


def test_heads_go_beside_masks_of_float32_at_any_length() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.head(self.layer(x, x[:, :2], tgt_mask=mask))

    model, x = Causal().eval(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    dg.gate(model, "heads", example_inputs=x)
    kill_every_second(model)
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 4
    assert not exported.report.kept
    longer = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1))  # torch takes another kernel from 16 on
    torch.testing.assert_close(exported.model(longer), model(longer))


class Decayed(Encoder):
    """Returns the sum of squares of all that `parameters` gives, which are factors while it is gated."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), sum((p.square().sum() for p in self.parameters()), torch.zeros(()))


def test_a_forward_that_computes_with_all_parameters_is_refused() -> None:
    with pytest.raises(dg.ExportError, match="with its gates folded") as error:
        dg.export(gated(Decayed()), TOKENS, latency=False)
    assert "self.parameters()" in str(error.value)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x.to(torch.uint16),
        lambda x: x.to(torch.uint32),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to_sparse_csr(),
        lambda x: x.long().to_sparse(),
    ],
    ids=["uint16", "uint32", "float8", "compressed", "whole and sparse"],
)
def test_inputs_of_any_type_and_layout_are_taken(kind: Callable[[Tensor], Tensor]) -> None:
    x = kind(torch.eye(4))

    class Converting(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x.to_dense() if x.layout != torch.strided else x).to(torch.float32)[None])

    model = gated(Converting())
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    torch.testing.assert_close(exported.model(x), model(x))


def test_a_zero_that_is_a_constant_at_other_sizes_is_not_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 3, 1))
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model[0].bias[1] = 1
        model[1].weight[2] = model[1].bias[2] = 0
        model[1].weight[2, 1, :, 1] = torch.tensor([1.0, 0.0, -2.0])  # above 0 where the map ends below the middle row
    dg.gate(model, dg.Select(names="0.weight", axis=0))
    [gate] = dg.gates.gated_tensors(model)
    with torch.no_grad():
        gate.gates.gamma[[1, 3]] = 0
    result = dg.export(model.eval(), torch.randn(2, 2, 4, 4), latency=False)
    assert not result.report.frozen
    assert [tuple(result.model[i].weight.shape[:2]) for i in (0, 1, 3)] == [(3, 2), (5, 3), (3, 5)]
    assert "with the sizes of the inputs" not in str(result.report)
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(result.model(x), model(x))


def test_sizes_that_stand_on_several_axes_are_changed_together_where_they_must_be() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.down(self.up(x).relu())
            return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)

    example = (torch.randn(2, 5, 4), torch.zeros(5, 5))
    certificate = dg.export(gated(Masked(), dead=(1,)), example, latency=False).report.certificate
    assert [[2, 6, 4], [6, 6]] in [p.shapes for p in certificate.probes]
    assert [[3, 5, 4], [5, 5]] in [p.shapes for p in certificate.probes]


def test_large_models_are_analysed_as_they_are_and_verified_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_LARGE", 0)
    model = gated()
    exported = dg.export(model, TOKENS, latency=False)
    certificate = exported.report.certificate
    assert "operation by operation" in certificate.precision
    assert certificate.tolerance["float64"] == certificate.tolerance["own precision"]  # folded constants are float32
    assert certificate.max_error["float64"] < 1e-6
    assert exported.model.up.weight.shape == (9, 8)
    torch.testing.assert_close(exported.model(TOKENS), model(TOKENS))
    plain = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    cut = dg.export(gated(plain, parameter="0"), TOKENS, latency=False).report.certificate
    assert cut.tolerance["float64"] == 1e-10  # nothing is computed anew, so nothing may differ


def test_the_exported_model_shares_no_memory_with_the_given_one() -> None:
    model = gated()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    small = dg.export(model, TOKENS, latency=False).model
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_copies_share_parameters_only() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LSTM(3, 2))
    model[0].weight.requires_grad_(False)
    copied = share(model)
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        assert a is not b
        assert a.data_ptr() == b.data_ptr()
        assert a.requires_grad == b.requires_grad
    assert copied[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    assert copied[2]._flat_weights[0] is copied[2].weight_ih_l0
    doubled = share(model).double()
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(doubled[0].weight, model[0].weight.double())


def test_every_operation_runs_in_float64_inside_of_in_double() -> None:
    model, x = Encoder(), TOKENS
    with torch.no_grad(), InDouble():
        found = model(x.double())
    with torch.no_grad():
        assert torch.equal(found, share(model).double()(x.double()))
    generator = torch.Generator().manual_seed(1)
    operands = [torch.randn(n, generator=generator) for n in ((400, 500), (450, 400), (3, 300, 300), (900, 800))]

    def products(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Large operands: contiguous, turned, both at once, batched, and with gaps."""
        a, b, c, d = map(cast, operands)
        return [a.t() @ b.t(), b @ a, F.linear(a.t(), b, b[:, 0]), c @ c.mT, d[:, ::2] @ a, a.t()]

    with InDouble():
        found_products = products(lambda x: x)
    expected = products(Tensor.double)
    assert all(torch.equal(a, b) for a, b in zip(found_products, expected, strict=True))
    assert all(x.dtype == torch.float64 for x in found_products[:-1])  # the last one is a weight as it lies there
    counter = torch.zeros(3)
    with InDouble(), pytest.raises(TypeError, match="writes to a tensor"):
        counter.add_(1)


class Rescales(nn.Module):
    """Halves a weight when it is called first in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.halved = nn.Linear(4, 8), nn.Linear(8, 3), False

    def forward(self, x: Tensor) -> Tensor:
        if self.halved is self.training:
            with torch.no_grad():
                self.down.weight.mul_(2 if self.training else 0.5)
            self.halved = not self.training
        return self.down(self.up(x).sigmoid())


def test_a_forward_that_writes_into_parameters_leaves_those_of_the_user_alone() -> None:
    model, x = dg.gate(Rescales().eval(), "neurons", include="up.*"), torch.randn(5, 4)
    dg.prune(model, ratio=0.5)
    before = model.down.weight.clone()
    exported = dg.export(model, x, latency=False)
    assert torch.equal(model.down.weight, before)
    assert exported.report.removed == 4
    torch.testing.assert_close(exported.model(x), model(x))


def test_rounding_is_judged_on_the_input_where_it_happens() -> None:
    class Cancelling(nn.Module):
        """Loses all but a few digits on the inputs whose two halves are nearly alike."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            return self.down(self.up(a).square()) - self.down(self.up(b).square())

    gated = dg.gate(Cancelling(), "neurons", exclude="down.*")
    dg.prune(gated, ratio=0.5)
    half = torch.randn(16, 4)
    near = torch.cat([half, half + 1e-4 * torch.randn(16, 4)], 1)
    exported = dg.export(gated, torch.randn(16, 8), batches=[near], latency=False)
    assert exported.report.certificate.tolerance["own precision"] > 1e-5
    assert exported.report.certificate.max_error["float64"] <= exported.report.certificate.tolerance["float64"] < 1e-5
    torch.testing.assert_close(dg.expand(exported, Cancelling(), near)(near), gated(near), rtol=0, atol=1e-2)


class Narrowing(nn.Module):
    """Multiplies in float32 whatever the precision of its input is, as some attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh().float()
        return (h @ h.transpose(1, 2)).type_as(x)


def test_what_a_forward_computes_in_float32_is_compared_in_float64_too(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = dg.export(gated(Narrowing(), tuple(range(0, 64, 3))), TOKENS, latency=False)
    assert exported.report.removed == 22
    assert exported.report.certificate.max_error["float64"] <= 1e-10
    plant(monkeypatch, "up", lambda _, out: out * (1 + 1e-8))
    with pytest.raises(dg.ExportError, match="not equal"):
        dg.export(gated(Narrowing(), tuple(range(0, 64, 3))), TOKENS, latency=False)


def test_an_output_that_is_nothing_but_rounding_excuses_no_other() -> None:
    """The mean of what a norm gives is zero, of which rounding leaves something; no digit of that is right."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 3), nn.LayerNorm(8, elementwise_affine=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.up(x)
            return self.down(y), self.norm(y.exp()).mean(-1)

    model = Centred().eval()
    verifier = Verifier(model, copy.deepcopy(model).double(), normalize_inputs(torch.randn(5, 4)), "float64")
    certificate = verifier.check(model, copy.deepcopy(model).double())
    assert certificate.tolerance["float64"] < 1e-8
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.down.weight *= 1.1
    with pytest.raises(dg.ExportError, match="in float64, it differs by"):
        verifier.check(wrong, copy.deepcopy(wrong).double())


def test_what_a_run_writes_into_attributes_does_not_stay() -> None:
    class Shrinks(nn.Module):
        """Its window never grows again after a short input, as that of Swin."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.window = nn.Linear(4, 8), nn.Linear(8, 2), 4

        def forward(self, x: Tensor) -> Tensor:
            self.window = min(self.window, x.shape[1])
            return self.second(self.first(x[:, : self.window]).relu()).mean(1)

    torch.manual_seed(0)
    x, short = torch.randn(2, 6, 4), torch.randn(2, 2, 4)
    model = dg.gate(Shrinks(), "neurons").eval()
    with torch.no_grad():
        all_gates(model)[0].gamma[1:3] = 0
    dg.prune(model, ratio=0.2, scope="flops", example_inputs=short)
    exported = dg.export(model, x, batches=[short, x])
    assert model.window == exported.model.window == 4
    assert exported.model.first.out_features < 8
    torch.testing.assert_close(exported.model(x), model(x))


class OnlyNarrow(nn.Module):
    """Gives no numbers in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = float("nan") if x.dtype == torch.float64 else 1.0
        return self.down(self.up(x).relu()) * scale


def test_a_model_without_numbers_in_float64_is_compared_in_its_own_precision() -> None:
    model, x = OnlyNarrow().eval(), torch.randn(3, 4)
    dg.gate(model, dg.Select(names="up.weight", axis=0))
    dg.prune(model, ratio=0.5)
    exported = dg.export(model, x, latency=False)
    assert exported.model.up.out_features == 4
    assert "gives no finite numbers" in exported.report.certificate.precision
    assert list(exported.report.certificate.max_error) == ["own precision"]
    with torch.no_grad():
        assert torch.allclose(model(x), exported.model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("factor", "double"), [(1 + 1e-7, 1e-10), (1.05, 20 * 0.05 * 2.0**-29)])
def test_rounding_is_allowed_for_and_nothing_else(factor: float, double: float) -> None:
    """What float32 rounds by 5 %, float64 may round by 5 % of its share; what is no number allows for nothing."""
    exact = [torch.randn(3, 4, dtype=torch.float64)]
    least = {"own precision": 1e-5, "float64": 1e-10}
    for own in ([(exact[0] * factor).float()], [torch.full((3, 4), float("nan"))]):
        found = _Reference("example", normalize_inputs(torch.ones(1)), own, exact).tolerance(least)
        expected = double if own[0].isfinite().all() else 1e-10
        assert found["float64"] == pytest.approx(expected, rel=1e-3)
        assert found["own precision"] <= 20 * 0.051


class Saturated(nn.Module):
    """Scales its scores by the width that it finds; after a large bias, its outputs lie at the end of their range."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x), self.k(x)
            return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ self.v(x)

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = self.Attention(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.attention(x)) + 1e4
        return torch.cat([F.hardtanh(y), x], -1)


def test_what_saturated_outputs_hide_is_compared_within() -> None:
    model, dead = Saturated(), torch.tensor([1, 4])
    randomize(model, torch.Generator().manual_seed(1))
    labels = torch.arange(6)
    gated = dg.gate(
        model, {f"attention.{n}.{p}": labels.view(-1, *[1] * (p == "weight")) for n in "qk" for p in ("weight", "bias")}
    )
    [gates] = {t.gates for t in dg.gates.gated_tensors(gated)}
    with torch.no_grad():
        gates.gamma[dead] = 0
    exported = dg.export(gated, TOKENS, latency=False)
    assert exported.report.removed == 2
    with torch.no_grad():
        assert torch.allclose(gated.eval().attention(TOKENS), exported.model.eval().attention(TOKENS), atol=1e-5)
