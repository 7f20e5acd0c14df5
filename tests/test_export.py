"""Export equals the gated, pruned model: on random networks, and on each hard case by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import PROGRAMS, RandomNetwork, randomize
from oracles import kill_every_second
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.export.verify import relative_error


@torch.no_grad()
def kill(model: nn.Module, share: float, generator: torch.Generator) -> None:
    """Zero random groups of a gated model by hand; give the others gates that are not one."""
    for module in model.modules():
        if isinstance(module, dg.Gates):
            doomed = torch.rand(module.num_groups, generator=generator) < share
            sign = torch.randn(module.gamma.shape, generator=generator).sign()
            module.gamma.copy_(torch.where(doomed.unsqueeze(1), 0.0, 1.1 * sign))


@torch.no_grad()
def assert_equal(model: nn.Module, small: nn.Module, x: Tensor, tolerance: float) -> None:
    """Run both networks on inputs that export never saw."""
    model.eval(), small.eval()
    for batch in (1, 3):
        new = torch.randn(batch, *x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(7 + batch))
        a, b = model(new), small(new)
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * a.abs().max().clamp_min(1e-12)


def export_or_constant(model: nn.Module, x: Tensor) -> dg.Exported | None:
    """Export; ``None`` where export says that the pruned network is constant, which must then be true."""
    try:
        return dg.export(model, x, latency=False)
    except dg.ExportError as e:
        if "no output depends on the input" not in str(e):
            raise
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), model(x + 1), rtol=0, atol=1e-12)
        return None


EXACT_REASONS = (
    "never becomes empty",
    "carries the constants",
    "equally wide",
    "differs from position to position",
    "differs with the sizes of the inputs",
    "cannot be folded here",
    "something alive",
    "input of the model",
    "output of the model",
    "output depends on others at the same index",
)


@pytest.mark.parametrize(
    "groups", [["filters", "neurons"], ["channels"], ["filters"], ["in_channels"], ["kernels"]], ids="+".join
)
def test_export_of_random_networks_equals_the_gated_model(groups: list[str]) -> None:
    exported = 0

    @settings(max_examples=110, deadline=None, derandomize=True, database=None)
    @given(
        program=PROGRAMS,
        seed=st.integers(0, 10**6),
        share=st.sampled_from([0.25, 0.4, 0.7]),
        dtype=st.sampled_from([torch.float64, torch.float32]),
    )
    def law(program: dict[str, Any], seed: int, share: float, dtype: torch.dtype) -> None:
        nonlocal exported
        generator = torch.Generator().manual_seed(seed)
        model = RandomNetwork(program).to(dtype)
        randomize(model, generator)
        x = torch.randn(2, program["channels"], *[program["size"]] * program["dims"], dtype=dtype, generator=generator)
        try:
            dg.gate(model, groups, D=2, example_inputs=x)
        except dg.GroupingError as e:
            assume("selects no weight" not in str(e) and "that can be gated" not in str(e))
            raise
        kill(model, share, generator)
        result = export_or_constant(model, x)
        assume(result is not None)
        exported += 1
        assert_equal(model, result.model, x, 1e-10 if dtype is torch.float64 else 1e-5)
        assert not result.report.frozen
        for kept in result.report.kept:
            assert any(reason in kept.reason for reason in EXACT_REASONS), kept

    law()
    assert exported >= 110


class Residual(nn.Module):
    """conv-BN-ReLU-conv-BN beside a skip: what stays of a sum, and constants across zero padding."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, 12, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


def random_residual(seed: int = 0) -> Residual:
    model = Residual()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


def zero_groups(model: nn.Module, parameter: str, groups: list[int]) -> None:
    """Zero groups of one gated parameter."""
    host, _, name = parameter.rpartition(".")
    gate = model.get_submodule(host).parametrizations[name][0]
    with torch.no_grad():
        gate.gates.gamma[groups] = 0


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_inner_filters_go_with_their_norm_and_the_columns_behind_them() -> None:
    model = dg.gate(random_residual(), "filters")
    zero_groups(model, "conv1.weight", [0, 3, 4, 7, 9])
    with torch.no_grad():
        model.norm1.running_mean.zero_()
        model.norm1.bias[[0, 3, 4, 7, 9]] = -1.0  # relu makes the constant zero: nothing to carry
    small = dg.export(model, IMAGE).model
    assert small.conv1.weight.shape == (7, 8, 3, 3)
    assert small.norm1.running_mean.shape == small.norm1.weight.shape == (7,)
    assert small.conv2.weight.shape == (8, 7, 3, 3)
    assert (small.conv1.out_channels, small.norm1.num_features, small.conv2.in_channels) == (7, 7, 7)
    assert_equal(model, small, IMAGE, 1e-5)


def test_constants_cross_a_zero_padded_convolution_on_one_merged_channel() -> None:
    model = dg.gate(random_residual().double(), "filters")
    zero_groups(model, "conv1.weight", [0, 1, 2, 3, 4])
    with torch.no_grad():
        model.norm1.bias[:5] = torch.tensor([0.5, 1.0, -1.0, 2.0, 0.1])
        model.norm1.running_mean[:5] = 0
    result = dg.export(model, IMAGE.double())
    assert result.model.conv1.weight.shape[0] == 8  # 7 alive and one that carries four constants; one was negative
    assert_equal(model, result.model, IMAGE.double(), 1e-12)
    [kept] = result.report.kept
    assert len(kept.groups) == 1
    assert "carries the constants" in kept.reason
    assert "conv2d" in kept.reason

    def trunk(m: Any, x: Tensor) -> Tensor:
        return m.norm2(m.conv2(m.norm1(m.conv1(m.stem(x).relu())).relu()))

    larger = torch.randn(2, 3, 7, 9).double()  # the head is written for one size, the trunk is not
    torch.testing.assert_close(trunk(model, larger), trunk(result.model, larger))


class Auxiliary(nn.Module):
    """Has a second classifier in the middle, which works in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.aux = nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        middle = self.second(x).relu()
        y = self.head(self.third(middle).relu())
        return (y, self.aux(middle)) if self.training else y


class Noisy(nn.Module):
    """A layer whose weights are drawn in training, about those of eval mode (noisy and Bayesian networks)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean, self.deviation = (
            nn.Parameter(torch.randn(outputs, inputs)),
            nn.Parameter(torch.ones(outputs, inputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        noise = self.deviation * torch.randn_like(self.deviation) if self.training else 0
        return F.linear(x, self.mean + noise)


def test_weights_that_meet_others_in_training_stay_so_that_the_exported_network_trains() -> None:
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), Noisy(10, 3))
    randomize(model, torch.Generator().manual_seed(4))
    x = torch.randn(5, 6)
    dg.gate(model, "hidden", example_inputs=x)
    zero_groups(model, "0.weight", [0, 1])
    zero_groups(model, "2.weight", [3])
    result = dg.export(model, x)
    assert result.model[0].weight.shape == (18, 6)
    assert result.model[4].mean.shape == result.model[4].deviation.shape == (3, 10)
    assert result.model[2].weight.shape == (9, 18)  # which gives a zero between the others
    assert result.report.kept == []
    assert_equal(model, result.model, torch.randn(3, 6), 1e-5)
    result.model.train()(x).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


def test_a_forward_that_takes_gradients_is_counted_as_a_whole() -> None:
    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(torch.func.grad(lambda z: self.net(z).squeeze(-1)))(x)

    x = torch.randn(5, 3)
    model = dg.gate(Score(), "neurons", include="net.0.*")
    zero_groups(model, "net.0.weight", [0])
    result = dg.export(model, x)
    assert result.report.before.flops > 0
    assert_equal(model, result.model, torch.randn(4, 3), 1e-5)


def test_what_only_training_reads_stays_so_that_the_exported_network_trains() -> None:
    model = dg.gate(Auxiliary(), dg.Select(names=["first.weight", "second.weight", "third.weight"], axis=0))
    for layer in ("first", "second", "third"):
        zero_groups(model, f"{layer}.weight", [0, 1, 2, 3])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    result = dg.export(model.eval(), x)
    small: Any = result.model
    assert [getattr(small, n).out_features for n in ("first", "second", "third")] == [4, 8, 4]
    assert any("code that the graph does not show reads it" in k.reason for k in result.report.kept)
    for ours, theirs in zip(small.train()(x), model.train()(x), strict=True):
        torch.testing.assert_close(ours, theirs)


class Causal(nn.Module):
    """Pads by itself, as temporal networks that must not see the future do."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.up, self.down, self.sides = nn.Conv1d(3, 12, 3), nn.Conv1d(12, 4, 3), (left, right)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.pad(self.up(x).tanh(), self.sides))


@pytest.mark.parametrize("sides", [(2, 0), (1, 1), (0, 3)])
def test_constants_cross_zeros_that_the_code_pads_with_on_one_merged_channel(sides: tuple[int, int]) -> None:
    model = Causal(*sides)
    randomize(model, torch.Generator().manual_seed(0))
    dg.gate(model.double(), dg.Select(names="up.weight", axis=0))
    zero_groups(model, "up.weight", [0, 2, 3, 7])
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1)).double()
    result = dg.export(model, x)
    assert result.model.up.weight.shape[0] == 9
    assert_equal(model, result.model, x, 1e-12)
    assert_equal(model, result.model, x[..., :9], 1e-12)


class Siamese(nn.Module):
    """Compares two inputs by what one network makes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (self.down(self.up(x).tanh()) for x in (a, b))
        return self.head(a * b)


PAIR = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).double().unbind()


def without_units(model: Siamese) -> dg.Exported:
    randomize(model, torch.Generator().manual_seed(0))
    dg.gate(model.double(), dg.Select(names="up.weight", axis=0))
    zero_groups(model, "up.weight", [1, 4, 5])
    return dg.export(model, PAIR)


def test_constants_go_into_the_bias_of_a_layer_that_is_called_twice_where_both_calls_meet_them() -> None:
    model = Siamese()
    result = without_units(model)
    assert result.model.up.weight.shape[0] == 5
    assert result.report.rewritten == []
    whole = dg.expand(result, Siamese().double())
    with torch.no_grad():
        for net in (result.model, whole):
            torch.testing.assert_close(net(*PAIR), model(*PAIR), rtol=1e-12, atol=1e-12)


class Shifted(Siamese):
    """The same, but one of the two is shifted on its way, so that the calls meet other constants."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.down(self.up(a).tanh()) * self.down(self.up(b).tanh() + 1))


def test_constants_that_two_calls_of_a_layer_meet_differently_are_added_by_each() -> None:
    model = Shifted()
    result = without_units(model)
    with torch.no_grad():
        torch.testing.assert_close(result.model(*PAIR), model(*PAIR), rtol=1e-12, atol=1e-12)
    assert result.model.up.weight.shape[0] == 5
    with pytest.raises(dg.ExportError, match="expanded network differs"):  # no bias of it holds both
        dg.expand(result, Shifted().double())


SEGMENT_SUMS: dict[str, Any] = {
    "index_add": lambda x, at, n: x.new_zeros(n, x.shape[1]).index_add(0, at, x),
    "scatter_add": lambda x, at, n: x.new_zeros(n, x.shape[1]).scatter_add(0, at[:, None].expand_as(x), x),
    "scatter_add_": lambda x, at, n: x.new_zeros(n, x.shape[1]).scatter_add_(0, at[:, None].expand(-1, x.shape[1]), x),
    "index_put": lambda x, at, n: x.new_zeros(n, x.shape[1]).index_put((at,), x, accumulate=True),
}


class Messages(nn.Module):
    """A graph network that sums what comes along the edges to each node."""

    def __init__(self, gather: Any) -> None:
        super().__init__()
        self.edge, self.node, self.gather = nn.Linear(4, 8), nn.Linear(8, 3), gather

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.node(self.gather(F.silu(self.edge(x[edges[0]])), edges[1], x.shape[0]))


@pytest.mark.parametrize("name", SEGMENT_SUMS)
def test_hidden_units_go_however_messages_are_summed(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Messages(SEGMENT_SUMS[name])
    randomize(model, generator)
    x, edges = torch.randn(6, 4, generator=generator), torch.randint(0, 6, (2, 20), generator=generator)
    dg.gate(model, "hidden", example_inputs=(x, edges))
    zero_groups(model, "edge.weight", [0, 3, 4])
    result = dg.export(model, (x, edges), latency=False)
    assert result.report.removed == 3
    for nodes, e in ((x, edges), (torch.cat([x, x]), edges[:, :7])):
        torch.testing.assert_close(result.model(nodes, e), model(nodes, e), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_whose_epsilon_is_that_of_their_dtype_are_compensated_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator, dtype=dtype)
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    fresh = copy.deepcopy(model).to(dtype)
    randomize(model, generator)
    dg.gate(model.to(dtype), "channels", example_inputs=x)
    gates = list(dict.fromkeys(t.gates for t in dg.gates.gated_tensors(model)))
    with torch.no_grad():
        gates[0].gamma[:6] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model[1].normalized_shape == (2,)
    assert exported.model[1].eps == 4 * torch.finfo(dtype).eps
    assert exported.model[3].eps is None
    assert "example times 0.001" in {p.name for p in exported.report.certificate.probes}
    dg.save(exported, tmp_path)
    loaded = dg.load(tmp_path, fresh)
    for scale in (1.0, 1e-2, 1e-4, 1e-6):
        torch.testing.assert_close(exported.model(scale * x), model(scale * x))
        assert torch.equal(loaded(scale * x), exported.model(scale * x))


class Normed(nn.Module):
    """Normalizes by torch's function, whose epsilon follows the dtype, and writes a size down."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.out, self.scale = nn.Linear(5, 8, bias=False), nn.Linear(8, 3), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.rms_norm(self.start(x), (8,), self.scale))


def test_a_functional_norm_whose_epsilon_follows_the_dtype_is_compensated_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator)
    model = Normed()
    randomize(model, generator)
    dg.gate(model, "channels", example_inputs=x)
    with torch.no_grad():
        next(iter(dg.gates.gated_tensors(model))).gates.gamma[:6] = 0
    small = dg.export(model, x, latency=False).model
    assert small.start.out_features == 2
    for scale in (1.0, 1e-2, 1e-4):
        torch.testing.assert_close(small(scale * x), model(scale * x))
    torch.testing.assert_close(small.double()(1e-5 * x.double()), model.double()(1e-5 * x.double()))


class ScaledLayers(nn.Module):
    """One parameter holds a number for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.scales = nn.Linear(4, 8), nn.Parameter(torch.tensor([0.3, -0.7]))
        self.layers, self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        x = self.start(x)
        for i, layer in enumerate(self.layers):
            x = layer((1 + self.scales[i]) * x).relu()
            seen.append(x)
        return self.out(torch.cat(seen, -1))


def test_numbers_that_one_parameter_holds_for_each_layer_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator)
    model = ScaledLayers()
    randomize(model, generator)
    dg.gate(model, "channels", example_inputs=x)
    kill(model, 0.5, generator)
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == exported.report.pruning.dead > 5
    assert exported.report.kept == []
    assert len(exported.model.scales) == 2
    assert_equal(model, exported.model, x, 1e-5)


def test_a_channel_that_one_branch_of_a_sum_needs_is_kept_and_the_reason_names_the_sum() -> None:
    model = dg.gate(random_residual(), "filters")
    zero_groups(model, "conv2.weight", [1, 2])
    zero_groups(model, "stem.weight", [2, 5])
    result = dg.export(model, IMAGE)
    assert result.model.stem.weight.shape[0] == 7  # 2 is dead in both branches, 1 and 5 in one only
    assert result.model.fc.weight.shape == (5, 7 * 9)
    reasons = {(k.parameter, tuple(k.groups)) for k in result.report.kept if "aten.add" in k.reason}
    assert reasons == {("stem.weight", (5,)), ("conv2.weight", (8 + 12 + 1,))}  # positions in dg.groups(model)
    assert_equal(model, result.model, IMAGE, 1e-5)


def test_strides_need_not_be_those_of_the_trace() -> None:
    class Flat(nn.Module):
        """torch foresees a transposed result of this batch norm, and gives a contiguous one."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x).mT).mT.flatten(0, 1))

    model, x = Flat(), torch.randn(3, 5, 4)
    randomize(model.eval(), torch.Generator().manual_seed(1))
    dg.gate(model, "neurons", exclude="last.*")
    zero_groups(model, "first.weight", [0, 3])
    result = dg.export(model, x)
    assert result.model.first.out_features == 4
    assert_equal(model, result.model, x, 1e-5)


def test_a_bias_is_made_where_constants_need_one() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=False)).double()
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "neurons", exclude="2.*")
    zero_groups(model, "0.weight", [1, 2])
    result = dg.export(model, torch.randn(2, 4).double())
    assert result.plan.new_biases == ["2"]
    assert result.model[2].bias.shape == (3,)
    assert_equal(model, result.model, torch.randn(2, 4).double(), 1e-12)


class Reads(nn.Module):
    """A recurrent layer, or a single step of one, reads what dead filters leave behind."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.read, self.last = kind(8, 5, **options), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).sigmoid()
        read = self.read(x.mean(2)) if isinstance(self.read, nn.RNNCellBase) else self.read(x.permute(2, 0, 1))
        return self.last(read[0] if isinstance(read, tuple) else read)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
        (nn.GRU, {"bidirectional": True}),
        (nn.RNN, {}),
        (nn.LSTM, {"proj_size": 3}),
        (nn.GRUCell, {}),
        (nn.LSTMCell, {}),
    ],
)
def test_a_recurrent_layer_takes_constants_into_its_biases_or_on_one_channel(
    kind: Any, options: Any, bias: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6).double()
    model = Reads(kind, bias=bias, **options).double()
    model(x)
    randomize(model.eval(), torch.Generator().manual_seed(1))
    said = dg.explain(model, "filters", x)["conv.weight"]
    assert said.verdict == ("exactly" if bias else "with compensation")
    dg.gate(model, "filters")
    zero_groups(model, "conv.weight", [1, 2, 6])
    result = dg.export(model, x)
    assert result.model.conv.out_channels == (5 if bias else 6)
    assert result.model.read.input_size == result.model.conv.out_channels
    assert_equal(model, result.model, torch.randn(2, 3, 9).double(), 1e-12)


def test_a_module_applied_twice_keeps_constants_that_two_uses_do_not_share() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(self.shared(self.first(x).sigmoid()).sigmoid()))

    model = Twice().double()
    randomize(model, torch.Generator().manual_seed(2))
    dg.gate(model, "neurons", exclude="last.*")
    zero_groups(model, "first.weight", [0, 1])
    zero_groups(model, "shared.weight", [0, 3])
    result = dg.export(model, torch.randn(2, 4).double())
    assert_equal(model, result.model, torch.randn(2, 4).double(), 1e-12)


def test_sizes_written_in_the_code_are_rewritten_or_kept_and_reported() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.left, self.right = nn.Linear(4, 12), nn.Linear(6, 5), nn.Linear(6, 5)
            self.out = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.wide(x).relu().split(6, 1)
            return self.out((self.left(a) * self.right(b)).tanh())

    model = Halves()
    randomize(model, torch.Generator().manual_seed(3))
    dg.gate(model, "neurons", exclude="out.*")
    zero_groups(model, "wide.weight", [0, 1, 2])
    zero_groups(model, "left.weight", [1])
    zero_groups(model, "right.weight", [1])
    result = dg.export(model, torch.randn(2, 4))
    assert result.model.wide.weight.shape == (9, 4)
    assert result.report.rewritten == [""]
    assert_equal(model, result.model, torch.randn(3, 4), 1e-5)
    result = dg.export(model, torch.randn(2, 4), rewrite=False)
    assert isinstance(result.model, Halves)
    assert result.model.wide.weight.shape == (12, 4)  # 3 + 6 channels: split(6) could not express it
    assert result.model.left.weight.shape == (4, 6)  # what the split does not see still goes
    assert result.report.frozen
    assert any("written in the code" in k.reason for k in result.report.kept)
    assert_equal(model, result.model, torch.randn(2, 4), 1e-5)


def test_an_operation_without_a_rule_holds_back_what_meets_it_and_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu().sort(1).values).relu())

    model = Sorted()
    randomize(model, torch.Generator().manual_seed(4))
    dg.gate(model, "neurons", exclude="c.*")
    zero_groups(model, "a.weight", [0])
    zero_groups(model, "b.weight", [0])
    result = dg.export(model, torch.randn(2, 4))
    assert result.model.a.weight.shape[0] == 6
    assert result.model.b.weight.shape[0] == 5
    [kept] = result.report.kept
    assert "aten.sort" in kept.reason
    assert "test_export.py" in kept.reason


@pytest.mark.parametrize("features", [2, 3, 4])
def test_few_features_go_beside_tensors_of_their_size(features: int) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.rand(1, features, 1, 1))
            self.conv, self.head = nn.Conv2d(features, 5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.conv(x - self.mean)).relu().mean((2, 3)))

    x = torch.randn(2, features, 6, 6)
    model = dg.gate(Normalized(), "input_features", example_inputs=x)
    zero_groups(model, "conv.weight", [0])
    result = dg.export(model, x)
    assert result.report.removed == 1
    assert result.model.conv.weight.shape[1] == features - 1
    assert_equal(model, result.model, torch.randn(3, features, 7, 6), 1e-5)


def test_features_that_a_product_of_parameters_reads_are_gated_in_both_and_go() -> None:
    class Splines(nn.Module):
        """As efficient Kolmogorov-Arnold layers."""

        def __init__(self) -> None:
            super().__init__()
            self.curves, self.scale = nn.Parameter(torch.randn(8, 5, 4)), nn.Parameter(torch.rand(8, 5))
            self.base, self.gain = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.rand(8, 1, 1))
            self.register_buffer("knots", torch.linspace(-1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            basis = torch.exp(-((x[..., None] - self.knots) ** 2)).flatten(1)
            weight = self.curves * self.scale.unsqueeze(-1) * self.gain
            return F.linear(basis, weight.view(8, -1)) + F.linear(F.silu(x), self.base)

    x = torch.rand(4, 5)
    model = dg.gate(Splines(), "input_features", example_inputs=x)
    assert {t.name for t in dg.gates.gated_tensors(model)} == {"curves", "scale", "base"}
    zero_groups(model, "base", [0, 3])
    result = dg.export(model, x)
    assert result.report.removed == 2
    assert sum(p.numel() for p in result.model.parameters()) == 3 * (8 * 4 + 8 + 8) + 8
    assert_equal(model, result.model, torch.randn(3, 5), 1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_features_that_are_whole_numbers_are_selected_like_others(dtype: torch.dtype) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x.float() / 255).relu().mean((2, 3)))

    def images(count: int) -> Tensor:
        return torch.randint(0, 256, (count, 3, 6, 6)).bitwise_and(127).to(dtype)

    model = dg.gate(Scaled(), "input_features", example_inputs=images(2))
    zero_groups(model, "conv.weight", [1])
    result = dg.export(model, images(2))
    assert result.report.removed == 1
    assert result.model.conv.weight.shape[1] == 2
    new = images(4)
    torch.testing.assert_close(result.model(new), model.eval()(new))


def test_counts_beside_an_index_in_one_table_are_features_and_the_index_and_a_mask_are_none() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.first, self.out = nn.Embedding(7, 3), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = torch.cat([self.table(x[:, 0]), x[:, 1:].float().log1p()], 1)
            return self.out(self.first(h).relu() * mask.float())

    x, mask = torch.randint(0, 7, (5, 6)), torch.randint(0, 2, (5, 1))
    model = dg.gate(Counts(), "input_features", example_inputs=(x, mask))
    assert len(dg.groups(model)) == 5
    zero_groups(model, "first.weight", [0, 3])
    result = dg.export(model, (x, mask))
    assert result.report.removed == 2
    assert result.model.first.weight.shape == (6, 6)
    torch.testing.assert_close(result.model(x.flip(0), mask), model(x.flip(0), mask))
    reduced = dg.export(model, (x, mask), select_inputs=False)
    torch.testing.assert_close(reduced.model(x[:, [0, 2, 3, 5]], mask), model(x, mask))


@pytest.mark.parametrize("grouping", ["embedding_dims", "hidden", "channels"])
def test_tables_that_are_looked_up_by_an_index_go_with_the_dimension(grouping: str) -> None:
    class Tables(nn.Module):
        """Looks one table up by what it is given, and biases by what it computes, as experts have them."""

        def __init__(self) -> None:
            super().__init__()
            self.words, self.kinds = nn.Parameter(torch.randn(9, 8)), nn.Parameter(torch.randn(4, 8))
            self.norm, self.router = nn.RMSNorm(8), nn.Linear(8, 3)
            self.up, self.inner = nn.Linear(8, 12, bias=False), nn.Parameter(torch.randn(3, 12))
            self.down, self.outer = nn.Linear(12, 8, bias=False), nn.Parameter(torch.randn(3, 8))
            self.out = nn.Linear(8, 2)

        def forward(self, words: Tensor, kinds: Tensor) -> Tensor:
            x = self.words[words] + self.kinds[kinds]
            best = self.router(h := self.norm(x)).argmax(-1)
            return self.out(x + self.down((self.up(h) + self.inner[best]).relu()) + self.outer[best])

    torch.manual_seed(0)
    given = (torch.randint(9, (2, 5)), torch.randint(4, (2, 5)))
    net = dg.gate(Tables().double(), grouping, example_inputs=given).eval()
    width, units = (8 - 4 * (grouping != "hidden"), 12 - 6 * (grouping != "embedding_dims"))
    kill_every_second(net)
    exported = dg.export(net, given, latency=False)
    assert exported.report.removed == exported.report.pruning.dead == (8 - width) + (12 - units)
    small = exported.model
    assert small.words.shape == (9, width)
    assert small.kinds.shape == (4, width)
    assert small.outer.shape == (3, width)
    assert small.inner.shape == (3, units)
    new = torch.randint(9, (3, 7)), torch.randint(4, (3, 7))
    torch.testing.assert_close(small(*new), net(*new))


class Policy(nn.Module):
    """Scores actions, of which a mask forbids some, and leaves room for more."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        scores = self.down(self.up(x).relu()).masked_fill(~allowed, -torch.inf)
        return torch.cat([scores, torch.full((len(x), 2), -torch.inf)], 1)


def test_scores_under_a_mask_of_minus_infinity_are_compared() -> None:
    model = Policy()
    randomize(model, torch.Generator().manual_seed(4))
    x, allowed = torch.randn(5, 4), torch.rand(5, 3) > 0.4
    dg.gate(model, "neurons", include="up.*")
    zero_groups(model, "up.weight", [0, 1])
    result = dg.export(model, (x, allowed))
    assert result.report.removed == 2
    with torch.no_grad():
        torch.testing.assert_close(result.model(x, ~allowed), model(x, ~allowed))
    a = torch.tensor([1.0, -torch.inf])
    assert relative_error([a], [a.clone()]) == 0
    assert relative_error([a], [torch.tensor([1.0, 2.0])]) == float("inf")
    assert relative_error([a], [torch.tensor([1.0, torch.nan])]) == float("inf")


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_outputs_that_are_not_finite_are_refused_all_the_same(value: float) -> None:
    model = Policy()
    with torch.no_grad():
        model.down.bias[0] = value
    dg.gate(model, "neurons", include="up.*")
    zero_groups(model, "up.weight", [0, 1])
    with pytest.raises(dg.ExportError, match="is not finite"):
        dg.export(model, (torch.randn(5, 4), torch.ones(5, 3, dtype=torch.bool)))


def test_an_example_that_the_model_rejects_is_refused_in_words() -> None:
    class Puts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.few = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            return self.down(x.masked_scatter(torch.ones_like(x, dtype=torch.bool), self.few))

    model = dg.gate(Puts(), "neurons", include="up.*")
    with pytest.raises(dg.TraceError, match=r"does not run on the example inputs, of shapes \[\(2, 4\)\]: .*source"):
        dg.export(model, torch.randn(2, 4))


def test_complex_outputs_are_compared_in_both_parts() -> None:
    a = torch.randn(3, 4, dtype=torch.complex64)
    assert relative_error([a], [a.clone()]) == 0
    assert relative_error([a], [a + 0.1j]) > 0.01
    assert relative_error([a], [a.real]) == float("inf")


def test_the_given_model_stays_gated_trainable_and_as_it_was() -> None:
    model = dg.gate(random_residual(), "filters").train()
    zero_groups(model, "conv1.weight", [0, 1])
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    dg.export(model, IMAGE)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    model(IMAGE).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_exported_model_is_plain_and_trains() -> None:
    model = dg.gate(random_residual(), "filters")
    dg.prune(model, ratio=0.5)
    result = dg.export(model, IMAGE)
    assert [type(m) for m in result.model.modules()] == [type(m) for m in random_residual().modules()]
    small = copy.deepcopy(result.model).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    start = small(IMAGE).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        small(IMAGE).square().mean().backward()
        optimizer.step()
    assert small(IMAGE).square().mean() < start


def test_report_counts_before_and_after() -> None:
    model = dg.gate(random_residual(), "filters")
    zero_groups(model, "conv1.weight", list(range(6)))
    plain = sum(p.numel() for p in random_residual().parameters())
    report = dg.export(model, IMAGE).report
    assert report.before.parameters == plain
    assert report.after.parameters < plain
    assert report.before.flops > report.after.flops > 0
    assert report.before.bytes > report.after.bytes
    assert report.speedup is not None
    assert report.layers["conv1"][0].parameters == 12 * 8 * 9
    assert all(size.latency > 0 for pair in report.layers.values() for size in pair)
    assert report.removed + sum(len(k.groups) for k in report.kept) == report.pruning.dead == 6
    assert report.certificate.max_error["float64"] <= 1e-10
    assert "conv1" in str(report)


def test_tolerance_prunes_on_the_copy_only() -> None:
    model = dg.gate(random_residual(), "filters")
    norms = dg.groups(model).norm
    report = dg.export(model, IMAGE, tol=float(norms.median()), latency=False).report
    assert report.pruning.dead == int((norms <= norms.median()).sum())
    assert bool(dg.groups(model).alive.all())


def test_inputs_as_tuple_dict_and_keywords() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(6, 2)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"y": self.c((self.a(left) + self.b(right)).relu())}

    model = dg.gate(TwoInputs(), "neurons", exclude="c.*")
    zero_groups(model, "a.weight", [1, 2])
    zero_groups(model, "b.weight", [2, 3])
    left, right = torch.randn(2, 3), torch.randn(2, 2)
    for args, kwargs in [((left, right), None), ({"left": left, "right": right}, None), ((left,), {"right": right})]:
        result = dg.export(model, args, kwargs, latency=False)
        assert result.model.c.weight.shape == (2, 5)
        torch.testing.assert_close(result.model(left, right)["y"], model(left, right)["y"])


def test_every_group_dead_is_refused() -> None:
    model = dg.gate(random_residual(), "filters")
    dg.prune(model, ratio=1.0)
    with pytest.raises(dg.ExportError, match="no output depends on the input"):
        dg.export(model, IMAGE)


def test_a_dead_branch_keeps_one_channel_per_layer() -> None:
    model = dg.gate(random_residual(), "filters")
    zero_groups(model, "conv1.weight", list(range(12)))
    result = dg.export(model, IMAGE, rewrite=False)
    assert result.model.conv1.weight.shape[0] >= 1
    assert_equal(model, result.model, IMAGE, 1e-5)
    assert sum("never becomes empty" in k.reason or "carries" in k.reason for k in result.report.kept) == 1


def test_export_of_an_ungated_model_is_refused() -> None:
    with pytest.raises(dg.NotGatedError, match=r"dg\.gate"):
        dg.export(random_residual(), IMAGE)


def test_a_reference_that_is_not_finite_is_refused() -> None:
    model = dg.gate(random_residual(), "filters")
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(dg.ExportError, match="not finite"):
        dg.export(model, IMAGE)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [(None, "example inputs are needed"), (3, "is a int"), (torch.randn(2, 5), "does not run on the example inputs")],
)
def test_missing_or_wrong_example_inputs(inputs: Any, match: str) -> None:
    model = dg.gate(random_residual(), "filters")
    with pytest.raises(dg.TraceError, match=match):
        dg.export(model, inputs)


def test_a_wrong_cut_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification itself must be able to fail: lose the constants on purpose."""
    from dgate_wrap.export import widths

    monkeypatch.setattr(widths.Widths, "_fold", lambda self, family, node: None)
    model = dg.gate(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)), "neurons", exclude="2.*")
    zero_groups(model, "0.weight", [1, 2])
    with pytest.raises(dg.ExportError, match="differs by"):
        dg.export(model, torch.randn(2, 4))


def test_a_random_forward_is_refused() -> None:
    class AlwaysDropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x), 0.5, training=True))

    with pytest.raises(dg.ExportError, match="differs from run to run"):
        dg.export(dg.gate(AlwaysDropping(), "neurons", exclude="b.*"), torch.randn(2, 4))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_weights_with_another_parametrization_are_left_alone(norm: Any) -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2)
    )
    dg.gate(model, dg.Select(names=["0.weight", "4.weight"], axis=0)).train()
    zero_groups(model, "0.weight", [1])
    zero_groups(model, "4.weight", [0, 1])
    before = copy.deepcopy(model.state_dict())
    result = dg.export(model, torch.randn(2, 4), latency=False)
    assert result.model[4].weight.shape == (3, 6)
    assert all(m.training for m in result.model.modules())
    assert_equal(copy.deepcopy(model), result.model, torch.randn(2, 4), 1e-5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [0.5, 0.0])
def test_positions_that_a_mask_fills_do_not_hold_channels_back(value: float) -> None:
    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)
            self.register_buffer("mask", torch.eye(4) > 0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).clone()
            y[:, :, self.mask] = value
            return self.head(y.mean((2, 3)))

    x = torch.randn(2, 3, 4, 4)
    model = dg.gate(Filling(), "channels", example_inputs=x)
    dg.prune(model, ratio=0.5)
    exported = dg.export(model, x, latency=False)
    assert exported.model.conv.weight.shape == (4, 3, 3, 3)
    assert not exported.report.kept


class Neighbours(nn.Module):
    """Averages over the neighbours in a graph whose adjacency is given, sparse perhaps (Kipf and Welling, 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(16, 3))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = torch.spmm(adjacency, torch.mm(x, self.first)).relu()
        return torch.spmm(adjacency, torch.mm(x, self.second))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr])
def test_units_go_beside_sparse_inputs(layout: torch.layout) -> None:
    model, x = Neighbours(), torch.randn(8, 6)
    dense = (torch.rand(8, 8) > 0.6).float() + torch.eye(8)
    adjacency = dense if layout == torch.strided else dense.to_sparse(layout=layout)
    dg.gate(model, "channels", example_inputs=(x, adjacency))
    with torch.no_grad():
        next(iter(dg.gates.gated_tensors(model))).gates.gamma[:5] = 0
    exported = dg.export(model, (x, adjacency), latency=False)
    assert exported.report.removed == exported.report.pruning.dead == 5
    with torch.no_grad():
        torch.testing.assert_close(exported.model(x, adjacency), model(x, adjacency))
