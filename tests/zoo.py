"""Small models with inputs, over which the laws run: every way in which a network may hold and use its weights.

To enrol a model, add a row to ``ZOO``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how to make it, and positional inputs for it."""

    name: str
    factory: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]

    def make(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Module:
        """Make the model with no parameter left at zero or one, so that a factor in the wrong place shows."""
        torch.manual_seed(seed)
        model = self.factory()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return model.to(dtype)

    def make_inputs(self, dtype: torch.dtype = torch.float32, *, seed: int = 1) -> tuple[Any, ...]:
        """Make the inputs; integer ones keep their dtype."""
        torch.manual_seed(seed)
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs())


def outputs(model: nn.Module, inputs: tuple[Any, ...], *, seed: int = 2) -> list[Tensor]:
    """Run a model from a fixed state of the random number generator, and return every tensor of its output."""
    torch.manual_seed(seed)
    return pytree.tree_leaves(model(*inputs))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = x + self.conv2(F.relu(self.bn2(self.conv1(x))))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x)


class CrossAttention(nn.Module):
    """Separate projections of query, key and value, and learned extra key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)[0]


class Tied(nn.Module):
    """A language model whose embedding is its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(tokens))))


class Twice(nn.Module):
    """One module under two names, applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Raw(nn.Module):
    """Parameters of its own, used through functions, beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.w = nn.Parameter(torch.randn(5, 4))
        self.child = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(F.relu(F.linear(x, self.w) * self.scale))


class Listed(nn.Module):
    """A ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.layers:
            x = torch.tanh(x @ w)
        return x + self.named["shift"]


class Dictionary(nn.Module):
    """Several inputs, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        a, b = self.left(x), self.right(y)
        return {"sum": a + b, "parts": (a, b)}


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(12, 2),
    )


def _convs(n: int) -> Callable[[], nn.Module]:
    """Plain, grouped, depthwise, transposed and grouped transposed convolutions in ``n`` dimensions."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return lambda: nn.Sequential(
        conv(2, 4, 2),
        conv(4, 6, 2, groups=2),
        nn.Tanh(),
        conv(6, 6, 1, groups=6),
        transposed(6, 4, 2),
        nn.Tanh(),
        transposed(4, 6, 2, groups=2, bias=False),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.2), nn.Linear(6, 2))


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.GroupNorm(1, 3), nn.ReLU(), nn.Linear(4, 2))


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)


def _random(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(s) for s in shapes)


ZOO = [
    Entry("mlp", _mlp, _random((5, 4))),
    Entry("layernorm_mlp", _normed, _random((5, 4))),
    Entry("bare_linear", lambda: nn.Linear(4, 3), _random((5, 4))),
    Entry("cnn", _cnn, _random((3, 1, 8, 8))),
    Entry("residual", Residual, _random((3, 2, 5, 5))),
    Entry("convs_1d", _convs(1), _random((2, 2, 6))),
    Entry("convs_2d", _convs(2), _random((2, 2, 5, 4))),
    Entry("convs_3d", _convs(3), _random((2, 2, 4, 4, 4))),
    Entry("lstm", lambda: Recurrent(nn.LSTM, num_layers=2), _random((2, 5, 3))),
    Entry("bidirectional_lstm", lambda: Recurrent(nn.LSTM, bidirectional=True), _random((2, 5, 3))),
    Entry("gru", lambda: Recurrent(nn.GRU, bias=False), _random((2, 5, 3))),
    Entry("attention", SelfAttention, _random((2, 5, 8))),
    Entry("cross_attention", CrossAttention, _random((2, 3, 8), (2, 5, 6), (2, 5, 4))),
    Entry("encoder_layer", _encoder_layer, _random((2, 5, 8))),
    Entry("tied", Tied, lambda: (torch.randint(7, (2, 5)),)),
    Entry("applied_twice", Twice, _random((5, 4))),
    Entry("raw_parameters", Raw, _random((5, 4))),
    Entry("parameter_list", Listed, _random((5, 4))),
    Entry("embedding", _embedding, lambda: (torch.randint(6, (4, 3)),)),
    Entry("dict_output", Dictionary, _random((5, 3), (5, 2))),
]


def named(*names: str) -> Iterator[Entry]:
    """Yield the entries of these names."""
    yield from (e for name in names for e in ZOO if e.name == name)
