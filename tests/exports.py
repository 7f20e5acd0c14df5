"""Exported networks that tell much, for tests of what is done with them afterwards."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import randomize
from test_dead_branches import ResNet
from test_rewriting import Attention
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors


class ConvNet(nn.Module):
    """Batch norms whose β dead filters leave behind: in zero padding, in a bias that is made, around a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.mix, self.mix_norm = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.up, self.up_norm = nn.Conv2d(6, 9, 1, bias=False), nn.BatchNorm2d(9)
        self.depth = nn.Conv2d(9, 9, 3, padding=1, groups=9, padding_mode="replicate")
        self.down, self.drop, self.head = nn.Conv2d(9, 6, 1, bias=False), nn.Dropout(0.1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix_norm(self.mix(self.norm(self.stem(x)).sigmoid())).relu()
        x = x + self.down(self.depth(self.up_norm(self.up(x)).sigmoid()).relu())
        return self.head(self.drop(x.mean((2, 3))))


class Transformer(nn.Module):
    """A transformer layer whose attention computes its sizes from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.head = nn.LayerNorm(12), Attention(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(self.norm(x)))


class Experts(nn.Module):
    """Stacked experts with two hidden layers, mixed by a router."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"up": (4, 6, 12), "bias": (4, 12), "mid": (4, 12, 9), "down": (4, 9, 6)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size) / 3))
        self.router, self.head = nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = (torch.einsum("bd,edh->beh", x, self.up) + self.bias).relu()
        h = torch.einsum("beh,ehk->bek", h, self.mid).relu()
        return self.head(torch.einsum("be,bek,ekd->bd", self.router(x).softmax(-1), h, self.down))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Reader(nn.Module):
    """A recurrent network that reads a series."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 8, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


@dataclass(frozen=True)
class Case:
    """A network to export.

    Args:
        build: Makes it, with the same classes and shapes each time.
        groups: The groups that are gated.
        draw: Draws inputs of a batch size, by keyword.
        dead: Per gates, in the order of ``gated_tensors``, the groups that die; if not given, every third.
        rewritten: The modules whose forward is written anew.
    """

    build: Callable[[], nn.Module]
    groups: Any
    draw: Callable[[int], dict[str, Tensor]]
    dead: tuple[tuple[int, ...], ...] = ()
    zeros: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()

    def gated(self) -> nn.Module:
        """Return it gated, with dead groups, in eval mode."""
        model = self.build()
        randomize(model, torch.Generator().manual_seed(1))
        with torch.no_grad():
            for name in self.zeros:
                model.get_parameter(name).zero_()
            dg.gate(model.eval(), self.groups, example_kwargs=self.draw(3))
            for i, gates in enumerate({t.gates: None for t in gated_tensors(model)}):
                gates.gamma[list(self.dead[i]) if self.dead else slice(None, None, 3)] = 0
        return model

    def exported(self) -> tuple[nn.Module, dg.Exported]:
        """Return the dense network with zeros, and its export."""
        model = self.gated()
        exported = dg.export(model, example_kwargs=self.draw(3), latency=False)
        assert exported.report.after.parameters < exported.report.before.parameters
        assert exported.report.rewritten == list(self.rewritten)
        return dg.ungate(model), exported


def _draw(name: str, *shape: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {name: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))}


def _tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 40, (batch, 6), generator=torch.Generator().manual_seed(batch))}


def _transformers(name: str, **config: Any) -> nn.Module:
    module = pytest.importorskip("transformers") and importlib.import_module("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    kind = getattr(module, name)
    return kind(kind.config_class(**small, vocab_size=40, **config))


CASES = {
    "conv": Case(ConvNet, dg.Select("filters") - "mix.*" - "down.*", _draw("x", 3, 8, 8)),
    "rewritten": Case(Transformer, "heads", _draw("x", 5, 12), dead=((1,),), rewritten=("attention",)),
    "dead branch": Case(
        ResNet, dg.Select(names="*weight", axis=0), _draw("x", 3, 8, 8), dead=((),) * 40,
        zeros=("blocks.0.conv2.weight", "blocks.0.bn2.weight"), rewritten=("blocks.0",),
    ),
    "inputs": Case(Table, ["input_features", dg.Select("down.weight", axis=1)], _draw("x", 10)),
    "experts": Case(Experts, "hidden", _draw("x", 6)),
    "lstm": Case(Reader, "rnn", _draw("x", 4, 5)),
    "llama": Case(
        functools.partial(_transformers, "LlamaForCausalLM", num_key_value_heads=2, use_cache=False),
        ["heads", "hidden"], _tokens, dead=((1,), (0, 1), (1,), (2, 3, 5)),
    ),
    "bert": Case(functools.partial(_transformers, "BertForSequenceClassification"), ["heads", "hidden"], _tokens),
}  # fmt: skip


@functools.cache
def exports(name: str) -> tuple[nn.Module, dg.Exported]:
    """Return a dense network and its export, made once; tests change copies of them."""
    torch.manual_seed(0)
    return CASES[name].exported()
