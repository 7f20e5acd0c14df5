"""Low-rank adapters: zeroing one leaves the layer, zeroing a rank removes its summand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from skips import SMALL, from_config, ids, labels_of, output, randomized, without
from torch import Tensor, nn

import dgate_wrap as dg


class Adapter(nn.Module):
    """A low-rank adapter beside a linear layer or convolution."""

    def __init__(self, base: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up, self.on = base, down, up, True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(F.dropout(self.down(x), 0.1, self.training)) * 0.5 if self.on else y


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convs = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1, bias=False), nn.Conv2d(2, 6, 1, bias=False)
        self.conv = Adapter(*convs)
        self.linear = Adapter(nn.Linear(6, 7), nn.Linear(6, 3, bias=False), nn.Linear(3, 7, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3))).tanh()


def test_zeroing_an_adapter_leaves_its_layer() -> None:
    model, x = randomized(Adapted()), torch.randn(2, 5, 4, 4).double()
    labels = labels_of("lora", model, x)
    assert len(ids(labels)) == 2
    for adapter in (model.conv, model.linear):
        group = int(labels[next(n for n, m in model.named_modules() if m is adapter) + ".up.weight"].max())
        adapter.on = False
        expected = output(model, {}, x)
        adapter.on = True
        assert torch.allclose(output(model, without(model, labels, group), x), expected, rtol=0, atol=1e-15)
        assert not torch.allclose(output(model, {}, x), expected)


def test_zeroing_a_rank_removes_its_summand() -> None:
    model, x = randomized(Adapted()), torch.randn(2, 5, 4, 4).double()
    labels = labels_of("lora_ranks", model, x)
    assert len(ids(labels)) == 2 + 3
    for name, j in itertools.chain((("conv", j) for j in range(2)), (("linear", j) for j in range(3))):
        row = labels[f"{name}.down.weight"].flatten()[j]
        weights = dict(model.named_parameters())
        up = weights[f"{name}.up.weight"].detach().clone()
        up[:, j] = 0
        expected = output(model, {f"{name}.up.weight": up}, x)
        assert torch.allclose(output(model, without(model, labels, int(row)), x), expected, rtol=0, atol=1e-15)
        assert (labels[f"{name}.up.weight"].flatten()[j] == row).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model, kwargs = from_config("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1, "use_cache": False})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    randomized(adapted)
    labels = labels_of("lora", adapted, **kwargs)
    assert len(ids(labels)) == 4
    assert len(ids(labels_of("lora_ranks", adapted, **kwargs))) == 4 * 3
    assert all("lora_" in n for n in labels)
    assert set(labels) == {n for n, _ in adapted.named_parameters() if "lora_" in n}
    with torch.no_grad():
        whole = adapted(**kwargs).logits
        dead = {n: torch.zeros_like(p) for n, p in adapted.named_parameters() if n in labels}
        zeroed = torch.func.functional_call(adapted, dead, (), kwargs).logits
        with adapted.disable_adapter():
            plain = adapted(**kwargs).logits
    assert torch.allclose(zeroed, plain, rtol=0, atol=1e-15)
    assert not torch.allclose(whole, plain)
    assert len(ids(labels_of("blocks", adapted, **kwargs))) == 4  # a layer and its adapter end one block


class Bottleneck(nn.Module):
    """Two linear maps in a row, narrow inside; with a bias, or added to nothing, they are no adapter."""

    def __init__(self, *, bias: bool, added: bool) -> None:
        super().__init__()
        self.base, self.added = nn.Linear(6, 6), added
        self.down, self.up = nn.Linear(6, 2, bias=bias), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x))
        return y + self.base(x) if self.added else self.base(y)


@pytest.mark.parametrize("options", [{"bias": True, "added": True}, {"bias": False, "added": False}])
def test_a_plain_bottleneck_is_no_adapter(options: dict[str, bool]) -> None:
    for grouping in ("lora", "lora_ranks"):
        with pytest.raises(dg.GroupingError, match="low-rank adapter"):
            labels_of(grouping, randomized(Bottleneck(**options)), torch.randn(2, 6).double())
