"""Capturing a model: what must be followed, what is refused in words, and that nothing of the model changes."""

from __future__ import annotations

import functools
import random
import warnings
import weakref
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch._decomp.decompositions as decompositions
import torch.nn.functional as F
from oracles import kill_every_second
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from zoo import ZOO

import dgate_wrap as dg
from dgate_wrap.errors import TraceError, TraceWarning
from dgate_wrap.tracing import Trace, capture, normalize_inputs
from dgate_wrap.tracing.capture import _Forward, _recorded
from dgate_wrap.tracing.origins import operation, where
from dgate_wrap.tracing.recorder import tensors_in
from dgate_wrap.tracing.settings import quiet


def example() -> Tensor:
    return torch.randn(3, 4)


def expected(model: nn.Module, inputs: Any, **extra: Any) -> list[Tensor]:
    """Run the model itself, in eval mode, and return every tensor of its output."""
    given = normalize_inputs(inputs).map(Tensor.clone)
    with torch.no_grad():
        return list(tensors_in(model.eval()(*given.args, **given.kwargs, **extra), set()))


def replayed(trace: Trace) -> list[Tensor]:
    values = trace.run()
    return [values[n] for n in trace.outputs]


def perturb(model: nn.Module) -> None:
    """Move every parameter in place; a trace holds the same parameters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))


def assert_follows(trace: Trace, model: nn.Module, inputs: Any, *, perturbed: bool = True, **extra: Any) -> None:
    """The trace gives what the model gives, before and after its parameters move, under the user's own names."""
    for step in range(1 + perturbed):
        if step:
            perturb(model)
        results, wanted = replayed(trace), expected(model, inputs, **extra)
        assert len(results) == len(wanted) > 0
        for a, b in zip(results, wanted, strict=True):
            torch.testing.assert_close(a, b)
    parameters = dict(model.named_parameters())
    found = {s.name: s.value for s in trace.sources.values() if s.kind == "parameter"}
    assert set(found) == set(parameters)
    assert all(found[n] is p for n, p in parameters.items())
    buffers = {n for n, _ in model.named_buffers()}
    assert {s.name for s in trace.sources.values() if s.kind == "buffer"} == buffers


@dataclass
class Result:
    logits: Tensor
    hidden: list[Tensor]
    name: str = "result"
    loss: Tensor | None = None


class Answer:
    """A plain object of results."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


Pair = namedtuple("Pair", "first second")  # noqa: PYI024


class Net(nn.Module):
    """Two layers and whatever the test puts into the forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.register_buffer("count", torch.zeros(()))
        self._how = [forward]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._how[0](self, x, *args, **kwargs)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Named(nn.Module):
    """Inputs of all kinds, some nested."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None, more: Any = None) -> Tensor:
        y = self.fc(x) * scale
        y = y if mask is None else y * mask
        return y if more is None else y + more["shift"][0]


class Raw(nn.Module):
    """Parameters under functional calls: in a list, on the model itself, and as a view kept outside of forward."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 4)), nn.ParameterList([torch.randn(6), torch.randn(2, 6)])
        self.kept = self.w.detach().t() if view else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w, self.v[0]) if self.kept is None else x @ self.kept + self.v[0]
        return torch.einsum("bi,oi->bo", h.relu(), self.v[1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.head(self.mid(self.mid(h)))


def normed(norm: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), norm(nn.Linear(6, 2)))


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).requires_grad_(False)


def out(make: Callable[[Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    """Return a factory of a model whose output is made from its hidden and its last activations."""
    return lambda: Net(lambda s, x: make(h := s.a(x), s.b(h)))


def plus_one_(s: Net, x: Tensor) -> Tensor:
    h = s.a(x)
    h[:, 0] = x[:, 1]
    h[:, 1:3].mul_(2)
    h += 1
    s.count += 1
    return s.b(h.relu_())


def autocast(s: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return s.b(s.a(x))


X = example
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "one tensor": (Named, X),
    "tuple": (Named, lambda: (X(), 2.0)),
    "dict": (Named, lambda: {"mask": torch.rand(3, 5), "x": X()}),
    "nested": (Named, lambda: {"more": {"shift": [torch.ones(5), None]}, "x": X(), "scale": 3.0}),
    "train mode": (lambda: frozen().train(), X),
    "frozen": (frozen, X),
    "weight_norm, old": (lambda: normed(weight_norm), X),
    "weight_norm, new": (lambda: normed(parametrizations.weight_norm), X),
    "spectral_norm, old": (lambda: normed(spectral_norm), X),
    "spectral_norm, new": (lambda: normed(parametrizations.spectral_norm), X),
    "tied and shared": (Tied, lambda: torch.tensor([[1, 2], [3, 3]])),
    "raw parameters": (lambda: Raw(view=False), X),
    "a view kept outside of forward": (lambda: Raw(view=True), X),
    "in place": (lambda: Net(plus_one_), X),
    "autograd function": (lambda: Net(lambda s, x: s.b(Twice.apply(s.a(x)))), X),
    "checkpoint": (lambda: Net(lambda s, x: s.b(checkpoint(s.a, x, use_reentrant=False))), X),
    "vmap": (lambda: Net(lambda s, x: torch.vmap(s.b)(torch.vmap(s.a)(x))), X),
    "autocast": (lambda: Net(autocast), X),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), lambda: torch.randn(2, 3, 4)),
    "lstm": (lambda: nn.LSTM(4, 5, num_layers=2), lambda: torch.randn(2, 3, 4)),
    "out: dataclass": (out(lambda h, y: Result(y, [h, h + 1])), X),
    "out: object": (out(lambda h, y: Answer(y)), X),
    "out: namespace": (out(lambda h, y: SimpleNamespace(logits=y, hidden=(h,))), X),
    "out: namedtuple": (out(lambda h, y: Pair(h, {"deep": (y, None, 3, "word")})), X),
    "out: dict with others": (out(lambda h, y: {"y": y, "n": None, "k": 2, "s": "s", "f": 0.5, "h": [h]}), X),
    "out: one tensor twice": (out(lambda h, y: (y, y, h)), X),
    "out: the input": (lambda: Net(lambda s, x: (x, s.b(s.a(x)))), X),
    "out: a parameter": (lambda: Net(lambda s, x: (s.a.weight, s.b(s.a(x)))), X),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_trace_follows_the_model(case: str) -> None:
    make, inputs = CASES[case]
    model, given = make(), inputs()
    trace = capture(model, given)
    assert trace.notes == ()
    assert_follows(trace, model, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_traced_as_they_are(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(2, 2)).to(dtype)
    x = torch.randn(2, 2, 4, dtype=dtype)
    trace = capture(model, x)
    assert_follows(trace, model, x)
    assert {n.meta["val"].dtype for n in trace.outputs} == {dtype}


def test_inputs_are_named_as_the_forward_names_them() -> None:
    given = {"more": {"shift": [torch.ones(5)]}, "mask": torch.rand(3, 5)}
    trace = capture(Named(), (example(), 2.0), given)
    names = [s.name for s in trace.sources.values() if s.kind == "input"]
    assert names == ["x", "scale", "more['shift'][0]", "mask"]


# what torch.export refuses and the recorder follows: the forward, and the notes that it makes


def item(s: Net, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.b(h / x.abs().max().item())


def writing(s: Net, x: Tensor) -> Any:
    if x.sum() > 1e9:
        return x
    h = s.a(x)
    h[:, 0] = 1.0
    view = h[:, 1:3]
    view.mul_(2)
    h.relu_()
    h += 1
    s.count += 1
    return {"y": s.b(h), "view": view, "none": None}


def masked(s: Net, x: Tensor) -> Tensor:
    h = s.a(x)
    rows = torch.nonzero(x[:, 0] > 0)[:, 0]
    z = torch.zeros_like(h).index_add(0, rows, h[x[:, 0] > 0])
    z[x[:, 1] > 0] += h[torch.where(x[:, 1] > 0)]
    return s.b(z) + h.masked_select(h == h).view(3, 6)[:, :4]


def counted(s: Net, x: Tensor) -> Tensor:
    counts = torch.bincount((x[:, 0] > 0).long(), minlength=2)
    return s.b(s.a(x).repeat_interleave(counts.repeat(2)[:3], dim=0)) if len(counts) else x


def distinct(s: Net, x: Tensor) -> Tensor:
    kinds, which, counts = (x[:, 0] > 0).long().unique(return_inverse=True, return_counts=True)
    runs, within, lengths = torch.unique_consecutive((x > 0).long(), return_inverse=True, return_counts=True)
    mean = x.new_zeros(len(kinds), 6).index_add(0, which, s.a(x)) / counts[:, None]
    return s.b(mean)[which] + kinds.sum() + runs[within].float().mean(1, keepdim=True) * lengths[0]


def crops(s: Net, x: Tensor) -> Tensor:
    parts = [x, x, x[:1]]
    ends = torch.cumsum(torch.unique_consecutive(torch.tensor([len(p) for p in parts]), return_counts=True)[1], 0)
    start, out = 0, []
    for end in ends:
        out.append(s.a(torch.cat(parts[start:end])))
        start = end
    return s.b(torch.cat(out))


class Peeking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * float(x.numel()) if x.abs().max() >= 0 else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def whole(s: Net, x: Tensor) -> Any:
    if torch.equal(x, x + 1):
        return x
    h = s.a(x)[:, None]
    y = F.layer_norm(F.scaled_dot_product_attention(h, h, h), (6,))
    y = torch.einsum("btc,oc->bto", y, s.b.weight)
    return F.conv1d(y.mT, s.a.weight[..., None])


BRANCH, NUMBER = "branches on the value of a tensor", "reads a number off a tensor"
SHAPE = "gives a shape that depends on the values of a tensor"
FOLLOWED: dict[str, tuple[Callable[..., Any], set[str], bool]] = {
    "branch": (lambda s, x: s.b(s.a(x).relu()) if x.sum() > -1e9 else s.a(x), {BRANCH}, True),
    "item": (item, {NUMBER}, True),
    "tolist": (lambda s, x: s.b(s.a(x)) + x.argmax(1).tolist()[0], {NUMBER}, True),
    "writes in place": (writing, {BRANCH}, True),
    "masks": (masked, {SHAPE}, True),
    "counts": (counted, {SHAPE}, True),
    "distinct numbers": (distinct, {SHAPE}, True),
    "function": (lambda s, x: s.b(Peeking.apply(s.a(x))), {BRANCH}, True),
    "whole operations": (whole, {BRANCH}, True),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_a_model_that_looks_at_values_is_followed_and_says_so(case: str) -> None:
    forward, what, perturbed = FOLLOWED[case]
    model, x = Net(forward), example()
    with pytest.warns(TraceWarning, match=r"test_capture.py:\d+ in ") as warned:
        trace = capture(model, x)
    assert len(warned) == 1
    assert {n.split(": ", 1)[1] for n in trace.notes} == {f"{w}; followed as the example inputs take it" for w in what}
    text = str(warned[0].message)
    assert all(n in text for n in trace.notes)
    assert [text.count(word) for word in ("Expected: ", "Mend: ")] == [1, 1]
    assert_follows(trace, model, x, perturbed=perturbed)
    lines = [where(n) for n in trace.nodes if n.op == "call_function" and operation(n) == "aten.linear"]
    assert lines
    assert all(line.startswith("test_capture.py:") for line in lines)
    mutable = [n for n in trace.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    assert mutable == []


def test_sizes_that_are_counted_are_no_values_of_the_inputs() -> None:
    model, x = Net(crops), example()
    trace = capture(model, x)  # warnings are errors
    assert trace.notes == ()
    assert_follows(trace, model, x, perturbed=True)


def test_operations_of_a_recorded_run_stay_whole() -> None:
    with pytest.warns(TraceWarning):
        trace = capture(Net(whole), example())
    names = {operation(n).removeprefix("aten.") for n in trace.nodes if n.op == "call_function"}
    assert {"linear", "scaled_dot_product_attention", "layer_norm", "einsum", "conv1d"} <= names


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_both_tracers_write_the_same_graph(entry: Any) -> None:
    model, given = entry.make().eval(), entry.make_inputs()
    with torch.no_grad(), quiet():
        recorded = _recorded(model, _Forward(model, {}), normalize_inputs(given), RuntimeError())
    exported = capture(model, given)
    assert recorded.notes == ()
    for a, b in zip(replayed(recorded), replayed(exported), strict=True):
        assert torch.equal(a, b)
    many = [Counter(operation(n) for n in t.nodes if n.op == "call_function") for t in (recorded, exported)]
    for names in many:
        names.pop("aten.clone", None)  # what dropout leaves behind
    assert many[0] == many[1]
    assert [(s.kind, s.name) for s in recorded.sources.values()] == [
        (s.kind, s.name) for s in exported.sources.values()
    ]


def test_random_numbers_of_a_recorded_run_are_drawn_again() -> None:
    def noisy(s: Net, x: Tensor) -> Tensor:
        h = s.a(x) + torch.rand(6)
        return s.b(h + torch.empty_like(h).uniform_()) if x.sum() < 1e9 else x

    model, x = Net(noisy), example()
    with pytest.warns(TraceWarning):
        trace = capture(model, x)
    torch.manual_seed(3)
    [result] = replayed(trace)
    torch.manual_seed(3)
    torch.testing.assert_close(result, expected(model, x)[0])


# what cannot be followed: the forward, and what the refusal says of it


def through_numpy(s: Net, x: Tensor) -> Tensor:
    return s.b(torch.from_numpy(s.a(x).detach().numpy()))


def through_memory(s: Net, x: Tensor) -> Tensor:
    import ctypes

    h = s.a(x).contiguous()
    y = torch.empty_like(h)
    ctypes.memmove(y.data_ptr(), h.data_ptr(), 4 * h.numel())
    return s.b(y)


def writes_parameters(s: Net, x: Tensor) -> Tensor:
    if x.sum() > 1e9:
        return x
    s.a.weight.data.clamp_(-1, 1)
    return s.a(x)


def endless(s: Net, x: Tensor) -> Tensor:
    while x.isfinite().all():
        x = s.b(s.a(x)).clamp(-1, 1)
    return x


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "numpy": (through_numpy, r"test_capture.py:\d+ in through_numpy: values leave torch here"),
    "numpy of inputs": (
        lambda s, x: s.b(s.a(torch.from_numpy(np.sin(x.numpy())))),
        r"test_capture.py:\d+ in <lambda>: values leave torch here",
    ),
    "ctypes": (through_memory, r"test_capture.py:\d+ in through_memory: values leave torch here"),
    "writes parameters": (writes_parameters, r"in writes_parameters: it writes into the parameter 'a.weight'"),
    "a loop without end": (endless, r"test_capture.py:\d+ in endless: it runs more than \d+ operations"),
    "numpy beside a branch": (
        lambda s, x: through_numpy(s, x) if x.sum() < 1e9 else x,
        r"in through_numpy: values leave torch here",
    ),
    "no tensor": (lambda s, x: {"n": 3}, "its output holds no tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_with_its_line(case: str) -> None:
    forward, said = REFUSED[case]
    model = Net(forward)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(dg.TraceError, match=said) as e:
        capture(model, example())
    assert "Net cannot be traced" in e.value.found
    assert all(f'"{name}"' in e.value.expected for name in ("weights", "neurons", "filters", "kernels", "in_channels"))
    assert "dg.Select" in e.value.expected
    assert 'dg.gate(model.a, "channels", example_inputs=...)' in e.value.mend
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_script_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = torch.jit.script(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(dg.TraceError, match="ScriptModule") as e:
        capture(script, example())
    assert 'model.get_submodule("0")' in e.value.mend


def test_inputs_that_do_not_fit_are_told_from_models_that_cannot_be_traced() -> None:
    with pytest.raises(dg.TraceError, match=r"Named does not run on the example inputs, of shapes \[\(3, 9\)\]"):
        capture(Named(), torch.randn(3, 9))


def test_a_model_without_shapes_is_refused_and_stays_without() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(dg.TraceError, match=r"0\.weight, 0\.bias"):
        capture(model, example())
    assert isinstance(model[0].weight, nn.UninitializedParameter)


# nothing of the model changes


def marking(s: Net, x: Tensor) -> Any:
    s.count += 1
    s.last, s.steps = s.a(x), s.steps + 1
    s.seen.append(x.shape)
    s.config.problem_type = "found"
    random.random()
    np.random.rand()  # noqa: NPY002
    return s.b(s.last + torch.rand(()))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_capture_leaves_no_mark(recorded: bool, fails: bool) -> None:
    def forward(s: Net, x: Tensor) -> Any:
        y = marking(s, x)
        if recorded and float(x.sum()) > 1e9:
            return x
        return through_numpy(s, x) if fails else y

    model, x = Net(forward), example()
    model.steps, model.seen, model.config = 0, [], SimpleNamespace(problem_type=None)
    model.a.eval()
    model.b.bias.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tensors = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    given = x.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        if fails:
            with pytest.raises(dg.TraceError):
                capture(model, x)
        else:
            assert capture(model, x).outputs
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[2])  # noqa: NPY002
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == tensors
    assert (model.steps, model.seen, model.config.problem_type) == (0, [], None)
    assert not hasattr(model, "last")
    assert [m.training for m in (model, model.a, model.b)] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert torch.equal(x, given)


def test_capture_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(TraceWarning):
        assert capture(Net(FOLLOWED["branch"][0]), example()).notes
    assert capfd.readouterr() == ("", "")


def test_a_trace_is_equal_to_itself_only_and_may_be_kept_weakly() -> None:
    model, x = Named(), example()
    a, b = capture(model, x), capture(model, x)
    assert a != b
    assert len({a, b, a}) == 2
    assert weakref.ref(a)() is a


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_on_the_meta_device_is_traced_there(device: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    trace = capture(model, torch.randn(2, 3, 5, 5, device=device))
    assert {s.value.device.type for s in trace.sources.values()} == {"meta"}
    assert [tuple(t.shape) for t in replayed(trace)] == [(2, 2)]
    assert all(s.value is model.get_parameter(s.name) for s in trace.sources.values() if s.kind == "parameter")


def test_a_model_on_the_meta_device_that_looks_at_values_is_refused_as_untraceable() -> None:
    with torch.device("meta"):
        model = Net(FOLLOWED["branch"][0])
    with pytest.raises(dg.TraceError, match=r"Net cannot be traced: test_capture.py:\d+ in <lambda>"):
        capture(model, example())


# key/value caches are off, whoever the library


class Config:
    def __init__(self) -> None:
        self.use_cache = True


class Cached(nn.Module):
    def __init__(self, *, explicit: bool) -> None:
        super().__init__()
        self.config, self.fc = Config(), nn.Linear(4, 4)
        if explicit:
            self.forward = self.explicit  # type: ignore[method-assign]

    def explicit(self, x: Tensor, use_cache: bool | None = None) -> Any:
        return self.run(x, use_cache)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.run(x, kwargs.get("use_cache"))

    def run(self, x: Tensor, use_cache: bool | None) -> Any:
        y = self.fc(x)
        return {"y": y, "cache": [y, y] if (self.config.use_cache if use_cache is None else use_cache) else None}


CACHES: dict[str, tuple[bool, Any, int]] = {
    "in the signature": (True, lambda: (example(),), 1),
    "in the config": (False, lambda: (example(),), 1),
    "asked for by name": (True, lambda: {"x": example(), "use_cache": True}, 3),
    "asked for among others": (False, lambda: {"x": example(), "use_cache": True}, 3),
    "asked for by position": (True, lambda: (example(), True), 3),
}


@pytest.mark.parametrize("case", CACHES)
def test_caches_are_off_unless_asked_for(case: str) -> None:
    explicit, inputs, count = CACHES[case]
    model = Cached(explicit=explicit)
    assert len(capture(model, inputs()).outputs) == count
    assert model.config.use_cache


# real architectures

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {"vocab_size": 64, **SIZES}
GQA = {**SMALL, "num_key_value_heads": 2}
LAYERS = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
          (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
WHISPER = {**LAYERS, "vocab_size": 64, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 10}
MOE = {**GQA, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "LlamaForCausalLM": ("LlamaConfig", GQA, "ids labels"),
    "GPT2LMHeadModel": ("GPT2Config", {**GPT2, **TOKENS}, "ids labels mask"),
    "T5ForConditionalGeneration": ("T5Config", {**T5, **TOKENS}, "ids labels"),
    "BartForConditionalGeneration": ("BartConfig", {"vocab_size": 64, "d_model": 32, **LAYERS, **TOKENS}, "ids labels"),
    "WhisperForConditionalGeneration": ("WhisperConfig", {**WHISPER, **TOKENS}, "sound labels"),
    "MambaForCausalLM": ("MambaConfig", {**MAMBA, **TOKENS}, "ids labels"),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", MOE, "ids labels"),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**GQA, "head_dim": 8}, "ids labels"),
    "BertForMaskedLM": ("BertConfig", SMALL, "ids labels mask"),
    "ViTForImageClassification": ("ViTConfig", IMAGE, "image"),
    "CLIPModel": ("CLIPConfig", {"text_config": {**SMALL, **TOKENS}, "vision_config": IMAGE}, "ids image"),
}
GIVEN: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "ids": ("input_ids", lambda: torch.randint(3, 64, (2, 7))),
    "labels": ("labels", lambda: torch.randint(3, 64, (2, 7))),
    "mask": ("attention_mask", lambda: torch.ones(2, 7, dtype=torch.long)),
    "sound": ("input_features", lambda: torch.randn(2, 8, 20)),
    "image": ("pixel_values", lambda: torch.randn(2, 3, 16, 16)),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_are_traced_without_their_caches(name: str, device: str) -> None:
    transformers = pytest.importorskip("transformers")
    config, sizes, kinds = ARCHITECTURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).to(device)
    given = {k: make() for k, make in (GIVEN[kind] for kind in kinds.split())}
    held = model.config.to_dict()
    trace = capture(model, given)
    assert trace.notes == ()
    assert model.config.to_dict() == held
    assert [s.name for s in trace.sources.values() if s.kind == "input"] == list(given)
    results = {s.name for s in trace.sources.values() if s.kind == "parameter"}
    assert results == {n for n, _ in model.named_parameters()}
    if device == "meta":
        assert all(s.value.is_meta for s in trace.sources.values())
    else:
        extra = {"use_cache": False} if getattr(model.config, "use_cache", None) else {}
        assert_follows(trace, model, given, **extra)


def test_a_cache_inside_of_the_users_own_model_is_off_too() -> None:
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = transformers.LlamaModel(transformers.LlamaConfig(**GQA)), nn.Linear(32, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.body(ids).last_hidden_state[:, -1])

    model, ids = Classifier(), GIVEN["ids"][1]()
    trace = capture(model, ids)
    assert_follows(trace, model, ids)
    assert model.body.config.use_cache


class Gathered(nn.Module):
    """Gathers a table of biases from a parameter once in eval mode, and keeps it until training begins."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.biases, self.places = nn.Parameter(torch.randn(3, 4)), torch.tensor([[0, 1, 2], [1, 0, 3], [2, 3, 0]])
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Gathered:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def _bias(self) -> Tensor:
        if self.training:
            return self.biases[:, self.places]
        if "bias" not in self.kept:
            self.kept["bias"] = self.biases[:, self.places]
        return self.kept["bias"]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 2).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, self._bias()).transpose(1, 2).flatten(2))


def test_what_modules_keep_of_earlier_runs_is_no_constant() -> None:
    model, x = Gathered().eval(), torch.randn(2, 3, 6)
    with torch.no_grad():
        before = model(x)
    kept = model.kept["bias"]
    trace = capture(model, x)
    assert "biases" in {s.name for s in trace.sources.values() if s.kind == "parameter"}
    assert model.kept["bias"] is kept
    assert not model.training
    gated = dg.gate(model, "heads", example_inputs=x)
    assert torch.equal(gated(x), before)
    [gates] = {t.gates for t in dg.gates.gated_tensors(gated)}
    with torch.no_grad():
        gates.gamma[1] = 0
    exported = dg.export(gated, x, latency=False)
    assert exported.report.removed == 1
    assert exported.model.biases.shape == (2, 4)
    with torch.no_grad():
        assert torch.allclose(gated(x), exported.model(x), atol=1e-6)


def test_last_states_of_an_lstm_have_the_shape_of_its_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    run = decompositions.one_layer_lstm

    def longer(*args: Any, **kwargs: Any) -> Any:  # as torch does up to 2.12
        out, (h, c) = run(*args, **kwargs)
        return out, (h[None], c[None])

    monkeypatch.setattr(decompositions, "one_layer_lstm", longer)
    trace = capture(nn.LSTM(4, 3, batch_first=True), torch.randn(2, 5, 4))
    values = trace.run()
    states = [n for n in trace.outputs if tuple(n.meta["val"].shape) == (1, 2, 3)]
    assert len(states) == 2
    assert all(n.meta["val"].shape == values[n].shape for n in trace.outputs)
    assert decompositions.one_layer_lstm is longer


class Turned(nn.Module):
    """Takes a view of what a batch norm gives, whose strides a trace foresees otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 3, 2, 1)).view(len(x), 6, -1)


def test_views_of_what_a_trace_lays_out_otherwise_are_taken() -> None:
    model, x = Turned().eval(), torch.randn(3, 2, 2, 6)
    trace = capture(model, x)
    torch.testing.assert_close(trace.run()[trace.outputs[0]], model(x))


def _asserts(x: Tensor) -> None:
    assert not torch.isnan(x).any(), "no numbers"


def _asserts_both(x: Tensor) -> None:
    assert (x > -9).all() and (x < 9).all()  # noqa: PT018


def _raises(x: Tensor) -> None:
    if x is not None and (torch.isinf(x).any() or torch.isnan(x).any()):
        raise ValueError("no finite numbers")


def _tells(x: Tensor) -> None:
    if (x > 9).any():
        warnings.warn("large", stacklevel=2)


def _compares(x: Tensor) -> None:
    assert torch.equal(x, x.clone())
    assert x.min() >= -9


def _asks_torch(x: Tensor) -> None:
    torch._assert((x < 9).all(), "large")


def _draws(x: Tensor) -> None:
    torch.distributions.Normal(x, x.exp()).log_prob(x)


class Checked(nn.Module):
    """A network with a check of values, and a size in its code."""

    def __init__(self, check: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.check = check
        self.first, self.last = nn.Linear(3, 8), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        self.check(h)
        return self.last(h.view(-1, 16))


CHECKS = [_asserts, _asserts_both, _raises, _tells, _compares, _asks_torch, _draws]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_checks_of_values_hold_nothing_back(check: Callable[[Tensor], None]) -> None:
    torch.manual_seed(0)
    net, x = Checked(check), torch.randn(4, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        assert capture(net, x).notes == ()
        dg.gate(net, "channels", example_inputs=x)
        kill_every_second(net)
        report = dg.export(net, x, latency=False).report
    assert report.removed == report.pruning.dead
    assert report.rewritten == [""]


def _fails(x: Tensor) -> None:
    assert (x > 5).all(), "too small"


def _branches(x: Tensor) -> None:
    if (x > 5).any():
        x.mul_(2)


def test_a_check_that_fails_on_the_example_is_told() -> None:
    with pytest.raises(TraceError, match=r"does not run on the example inputs.*too small"):
        capture(Checked(_fails), torch.randn(4, 2, 3))


def test_a_branch_that_does_something_is_no_check() -> None:
    with pytest.warns(TraceWarning):
        assert capture(Checked(_branches), torch.randn(4, 2, 3)).notes


@functools.lru_cache
def _causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


_MASKS: dict[int, Tensor] = {}


class CachesMasks(nn.Module):
    """Masks that are made once, in all the ways of code."""

    masks: ClassVar[dict[int, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    @staticmethod
    @functools.lru_cache
    def again(size: int) -> Tensor:
        return _causal(size).clone()

    def forward(self, x: Tensor) -> Tensor:
        for held in (_MASKS, self.masks):
            if x.shape[1] not in held:
                held[x.shape[1]] = self.again(x.shape[1])
            x = x.masked_fill(~held[x.shape[1]][..., :1], 0.0)
        return self.last(self.first(x).relu())


def test_tensors_of_a_trace_stay_in_no_cache_of_the_code() -> None:
    net, x = CachesMasks(), torch.randn(2, 5, 4)
    dg.gate(net, "hidden", example_inputs=x)
    kill_every_second(net)
    expected = net(x)
    assert type(_causal(5)) is Tensor
    assert type(CachesMasks.again(5)) is Tensor
    assert all(type(t) is Tensor for held in (_MASKS, CachesMasks.masks) for t in held.values())
    out = dg.export(net, x, latency=False)
    torch.testing.assert_close(out.model(x), expected)
