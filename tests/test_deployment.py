"""What is exported is an ordinary network: it is copied, compiled, quantized, trained and gated again."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import CASES, exports
from networks import randomize
from processes import in_two_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*_flat_weights:UserWarning",  # of torch.export, about every LSTM
    "ignore:.*(LeafSpec|is deprecated):FutureWarning",
    "ignore:.*(deprecated|removed):DeprecationWarning",
    "ignore:.*quantized tensor creation:UserWarning",
)
Inputs = dict[str, Tensor]


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small(name: str) -> nn.Module:
    return copy.deepcopy(exports(name)[1].model)


@pytest.fixture
def draw(name: str) -> Callable[[int], Inputs]:
    return CASES[name].draw


def run(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return result(model(**inputs))


def result(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_it_is_copied_and_pickled_and_takes_a_state_dict(
    name: str, small: nn.Module, draw: Callable[[int], Inputs]
) -> None:
    expected = run(small, draw(2))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for other in (copy.deepcopy(small), torch.load(file, weights_only=False)):
        assert torch.equal(run(other, draw(2)), expected)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert torch.equal(run(small, draw(2)), expected)
        other.load_state_dict(small.state_dict())
        assert torch.equal(run(other, draw(2)), expected)


def test_it_is_compiled_whole(small: nn.Module, draw: Callable[[int], Inputs]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        for batch in (3, 2):
            assert distance(run(compiled, draw(batch)), run(small, draw(batch))) < 1e-5


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore")
def test_it_is_compiled_by_inductor() -> None:
    small = copy.deepcopy(exports("rewritten")[1].model)
    inputs = CASES["rewritten"].draw(3)
    torch.compiler.reset()
    with torch._inductor.config.patch(compile_threads=1):  # no pool of processes, which outlives the test
        assert distance(run(torch.compile(small, fullgraph=True), inputs), run(small, inputs)) < 1e-5


def test_it_is_traced_with_an_open_batch_size(small: nn.Module, draw: Callable[[int], Inputs]) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    traced = torch.export.export(small, (), draw(3), dynamic_shapes={n: {0: batch} for n in draw(3)}).module()
    for size in (3, 5):
        assert distance(run(traced, draw(size)), run(small, draw(size))) < 1e-5


@pytest.mark.filterwarnings("ignore")  # torch.onnx warns of its own ways
def test_it_runs_in_onnxruntime(small: nn.Module, draw: Callable[[int], Inputs]) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(
        small, (), kwargs=draw(3), dynamo=True, dynamic_shapes={n: {0: "batch"} for n in draw(3)}, verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (3, 5):
        [found, *_] = session.run(None, {n: x.numpy() for n, x in draw(batch).items()})
        assert distance(torch.from_numpy(found), run(small, draw(batch))) < 1e-4


def test_it_is_quantized(name: str, small: nn.Module, draw: Callable[[int], Inputs]) -> None:
    def quantized(model: nn.Module) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear, nn.LSTM}, torch.qint8)

    dense, inputs = exports(name)[0], draw(4)
    made = quantized(small)
    count = sum(type(m) in (nn.Linear, nn.LSTM) for m in small.modules())
    assert sum("quantized.dynamic" in type(m).__module__ for m in made.modules()) >= count
    expected = run(dense, inputs)
    allowed = distance(run(quantized(dense), inputs), expected)
    assert distance(run(made, inputs), expected) < 3 * allowed + 0.02


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    out = result(model(**inputs))
    target = torch.linspace(-1, 1, out[0].numel()).view(out[0].shape).roll(1)
    return (out - target).square().mean()


def test_it_is_trained_on(name: str, small: nn.Module, draw: Callable[[int], Inputs]) -> None:
    dense = exports(name)[0]
    frozen = {n for n, p in dense.named_parameters() if not p.requires_grad}
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == frozen
    small.train()
    losses: list[float] = []
    optimizer = torch.optim.SGD(small.parameters(), lr=0.02)
    for _ in range(8):
        torch.manual_seed(0)
        loss = loss_of(small, draw(8))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert [n for n, p in small.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["conv", "rewritten", "dead branch"])
def test_it_keeps_what_was_frozen_and_the_mode_of_every_module(name: str) -> None:
    case = CASES[name]
    model = case.gated().train()
    inner = next(m for m in model.modules() if isinstance(m, nn.Linear))
    inner.eval()
    last = [n for n, _ in model.named_parameters() if "parametrizations" not in n][-1]
    model.get_parameter(last).requires_grad_(False)
    small = dg.export(model, example_kwargs=case.draw(3), latency=False).model
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == [last]
    eval_modes = [n for n, m in small.named_modules() if not m.training]
    assert eval_modes == [n for n, m in model.named_modules() if not m.training and n in dict(small.named_modules())]
    assert eval_modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_moves_to_other_dtypes(small: nn.Module, draw: Callable[[int], Inputs], dtype: torch.dtype) -> None:
    expected = run(small, draw(3))
    inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in draw(3).items()}
    found = run(small.to(dtype), inputs)
    assert found.dtype == dtype
    assert distance(found.float(), expected) < (1e-5 if dtype == torch.float64 else 0.1)


def test_it_moves_to_the_meta_device(name: str, small: nn.Module, draw: Callable[[int], Inputs]) -> None:
    if name == "llama":
        pytest.skip("its own code reads the values of positions")
    inputs = {n: x.to("meta") for n, x in draw(3).items()}
    shape = run(small, draw(3)).shape
    assert run(small.to("meta"), inputs).shape == shape


@pytest.mark.parametrize("name", [n for n in CASES if n != "llama"])
def test_it_is_gated_and_exported_again(name: str, small: nn.Module, draw: Callable[[int], Inputs]) -> None:
    groups = {
        "conv": "channels",
        "dead branch": "channels",
        "inputs": dg.Select("down.weight", axis=1),
        "lstm": "rnn",
        "experts": "hidden",
    }.get(name, "heads")
    small.train()
    dg.gate(small, groups, example_kwargs=draw(3))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.02)
    penalty = dg.Penalty(small, 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(small, draw(8)) + penalty()).backward()
        optimizer.step()
    dg.prune(small, ratio=0.5)
    small.eval()
    again = dg.export(small, example_kwargs=draw(3), latency=False)
    assert again.report.after.parameters < again.report.before.parameters
    assert distance(run(again.model, draw(4)), run(small, draw(4))) < 1e-5


def test_a_forward_that_was_written_anew_is_written_anew_again(tmp_path: Path) -> None:
    case, (_, first) = CASES["rewritten"], exports("rewritten")
    small = dg.gate(copy.deepcopy(first.model), "heads", example_kwargs=case.draw(3))
    with torch.no_grad():
        gated_tensors(small)[0].gates.gamma[0] = 0
    again = dg.export(small, example_kwargs=case.draw(3), latency=False)
    assert again.report.rewritten == ["attention"]
    assert again.model.attention.out.weight.shape == (12, 4)
    assert "stands for Attention" in repr(again.model.attention)
    assert distance(run(again.model, case.draw(4)), run(small, case.draw(4))) < 1e-5
    once = dg.load(dg.save(first, tmp_path / "first"), case.build())
    twice = dg.load(dg.save(again, tmp_path / "again"), once)
    assert torch.equal(run(twice.eval(), case.draw(4)), run(again.model, case.draw(4)))


class Adapter(nn.Module):
    """A low-rank adapter around a layer that it replaces."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_layers_in_a_forward_that_was_written_anew_are_called_and_may_be_replaced() -> None:
    small = copy.deepcopy(exports("rewritten")[1].model)
    seen: list[str] = []
    small.attention.qkv.register_forward_hook(lambda *_: seen.append("qkv"))
    before = run(small, CASES["rewritten"].draw(3))
    assert seen == ["qkv"]
    small.attention.out = Adapter(small.attention.out)
    assert distance(run(small, CASES["rewritten"].draw(3)), before) > 1e-3


class Layers(nn.Module):
    """One of every stock layer, in a forward that cannot follow a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(9, 6), nn.Linear(6, 12)
        self.rnn, self.gru = nn.LSTM(6, 5, batch_first=True), nn.GRU(5, 6, batch_first=True)
        self.rms, self.norm, self.groups = nn.RMSNorm(6), nn.LayerNorm(6), nn.GroupNorm(3, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.up, self.wide = nn.ConvTranspose1d(6, 6, 2, stride=2), nn.ConvTranspose1d(6, 6, 2, stride=2)
        self.instance, self.pair, self.head = nn.InstanceNorm1d(6, affine=True), nn.Bilinear(6, 6, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, gate = self.first(self.embed(tokens)).chunk(2, -1)
        x = x.view(*tokens.shape, 6) * gate.reshape(*tokens.shape, 6).sigmoid()
        y, _ = self.gru(self.rnn(x)[0])
        y = self.groups(self.conv(self.norm(self.rms(y)).mT))
        y = self.wide(self.up(y), output_size=[25])
        y = self.instance(y).mean(-1)
        return self.head(self.pair(y, y.tanh()))


def test_every_stock_layer_is_called_if_it_does_the_same() -> None:
    model, tokens = Layers().eval(), torch.arange(12).view(2, 6) % 9
    randomize(model, torch.Generator().manual_seed(0))
    labels = torch.full((12, 1), -1)
    labels[[1, 7]] = 0
    dg.gate(model, {"first.weight": labels, "first.bias": labels.flatten()})
    with torch.no_grad():
        gated_tensors(model)[0].gates.gamma[0] = 0
    exported = dg.export(model, tokens, latency=False)
    assert exported.report.rewritten == [""]
    called = {target for _, op, target, *_ in exported.plan.recipes[""].steps if op == "call_module"}
    assert called == {n for n, _ in Layers().named_children()} - {"wide"}  # which is asked for another size
    assert exported.model.first.weight.shape == (10, 6)
    other = torch.arange(18).view(3, 6) % 9
    assert distance(run(exported.model, {"tokens": other}), run(model, {"tokens": other})) < 1e-5


def _step(rank: int, models: list[nn.Module], inputs: list[Inputs], folder: str) -> None:
    for i, (model, given) in enumerate(zip(models, inputs, strict=True)):
        wrapped = DistributedDataParallel(model)
        loss_of(wrapped, {n: x[2 * rank : 2 * rank + 2] for n, x in given.items()}).backward()
        if rank == 0:
            torch.save([p.grad for p in model.parameters()], f"{folder}/{i}")


def test_two_processes_train_it_like_one(tmp_path: Path) -> None:
    names = ["conv", "rewritten", "dead branch", "inputs", "lstm"]
    models, inputs = [copy.deepcopy(exports(n)[1].model).eval() for n in names], [CASES[n].draw(4) for n in names]
    in_two_processes(tmp_path, _step, models, inputs, str(tmp_path))
    for i, (name, model, given) in enumerate(zip(names, models, inputs, strict=True)):
        loss_of(model, given).backward()
        for p, found in zip(model.parameters(), torch.load(tmp_path / str(i)), strict=True):
            assert torch.allclose(p.grad, found, rtol=1e-4, atol=1e-6), name
