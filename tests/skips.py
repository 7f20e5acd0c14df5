"""Helpers to check that a zeroed group does what leaving a part out of the forward does."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgate_wrap.groupings import groupings
from dgate_wrap.tracing import Trace, capture

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
Labels = dict[str, Tensor]


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(generator=generator)
    return model.double().eval()


def labels_of(name: str, model: nn.Module, *inputs: Any, **kwargs: Any) -> Labels:
    return dict(groupings()[name].function(model, capture(model, inputs, kwargs)))


def ids(labels: Labels) -> list[int]:
    return sorted({int(i) for t in labels.values() for i in t.unique() if i >= 0})


def without(model: nn.Module, labels: Labels, group: int) -> dict[str, Tensor]:
    """Return the parameters with the weights of a group set to zero."""
    found = dict(model.named_parameters())
    zeroed = {n: found[n].masked_fill((t == group).broadcast_to(found[n].shape), 0) for n, t in labels.items()}
    return {n: p.detach() for n, p in (found | zeroed).items()}


def output(model: nn.Module, parameters: dict[str, Tensor], *inputs: Any) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(model, parameters, inputs, strict=False)


class Branched(nn.Module):
    """A network that can leave out some of its branches, by number."""

    branches: int
    skipped: frozenset[int] = frozenset()

    def keep(self, i: int, value: Tensor) -> Tensor:
        return torch.zeros_like(value) if i in self.skipped else value


def check_skips(grouping: str, model: Branched, x: Tensor) -> Labels:
    """Zeroing a group gives what the forward gives without one of the branches, each once."""
    randomized(model)
    labels = labels_of(grouping, model, x)
    whole = output(model, {}, x)
    without_branch: list[Tensor] = []
    for i in range(model.branches):
        model.skipped = frozenset({i})
        without_branch.append(output(model, {}, x))
    model.skipped = frozenset()
    matches = []
    for group in ids(labels):
        zeroed = output(model, without(model, labels, group), x)
        assert not torch.allclose(zeroed, whole)
        matches += [i for i, y in enumerate(without_branch) if torch.allclose(zeroed, y, rtol=1e-12, atol=1e-12)]
    assert sorted(matches) == list(range(model.branches))
    return labels


def from_config(name: str, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(importlib.import_module("transformers"), name)
    model = randomized(kind(kind.config_class(**config)))
    size = config.get("image_size", 32)
    if "vocab_size" in config and "image_size" not in config:
        return model, {"input_ids": torch.randint(3, 40, (2, 5))}
    return model, {"pixel_values": torch.randn(2, 3, size, size).double()}


def run_without(trace: Trace, labels: Labels, group: int) -> dict[Any, Any]:
    zeroed: dict[Any, Any] = {}
    for node, s in trace.sources.items():
        if s.kind == "parameter" and s.name in labels:
            zeroed[node] = s.value.masked_fill((labels[s.name] == group).broadcast_to(s.value.shape), 0)
    return trace.run(zeroed)
