"""Mixtures of experts: zeroing an expert does what leaving it out of the mixture does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from skips import SMALL, Branched, check_skips, from_config, ids, labels_of, randomized, without
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors


def mlp(*sizes: int) -> nn.Sequential:
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Mixture(Branched):
    """Modules as experts, mixed in one of several ways; the last is shared, behind a gate of its own."""

    branches = 4

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.router = way, nn.Linear(6, 3)
        self.experts, self.shared, self.gate = nn.ModuleList(mlp(6, 5, 6) for _ in range(3)), mlp(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        if self.way == "masked":
            best, chosen = weights.topk(2, -1)
            best = best / best.sum(-1, keepdim=True)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                weight = torch.where(chosen == i, best, 0).sum(-1, keepdim=True)
                y = y + weight * self.keep(i, expert(x))
        elif self.way == "indexed":
            best, chosen = weights.topk(2, -1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                row, place = torch.where(chosen == i)
                y = y.index_add(0, row, self.keep(i, expert(x[row])) * best[row, place, None])
        else:
            each = torch.stack([self.keep(i, expert(x)) for i, expert in enumerate(self.experts)], 1)
            if self.way == "stacked":
                y = (each * weights[:, :, None]).sum(1)
            elif self.way == "einsum":
                y = torch.einsum("be,bed->bd", weights, each)
            else:
                y = (weights[:, None] @ each).squeeze(1)
        return x + y + self.gate(x).sigmoid() * self.keep(3, self.shared(x))


class Stacked(Branched):
    """Experts in three-dimensional parameters."""

    branches = 3

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.router = way, nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 5, 6))
        self.bias = nn.Parameter(torch.randn(3, 6))

    def mask(self) -> Tensor:
        return torch.tensor([float(i not in self.skipped) for i in range(3)], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        if self.skipped:
            weights = weights * self.mask()
        if self.way == "bmm":
            y = torch.bmm(torch.bmm(x.expand(3, *x.shape), self.up).relu(), self.down) + self.bias[:, None]
            return (y * weights.T[:, :, None]).sum(0)
        if self.way == "einsum":
            y = torch.einsum("bei,eio->beo", torch.einsum("bd,edi->bei", x, self.up).relu(), self.down) + self.bias
            return torch.einsum("beo,be->bo", y, weights)
        if self.way == "chosen":
            best, chosen = weights.topk(3, -1)
            h = torch.einsum("bd,bkdi->bki", x, self.up[chosen]).relu()
            y = torch.einsum("bki,bkio->bko", h, self.down[chosen]) + self.bias[chosen]
            return (y * best[:, :, None]).sum(1)
        out = torch.zeros_like(x)
        for i in range(3):
            out = out + ((x @ self.up[i]).relu() @ self.down[i] + self.bias[i]) * weights[:, i, None]
        return out


@pytest.mark.filterwarnings("ignore:.*traced for the example inputs only")  # shapes depend on the choice
@pytest.mark.parametrize("way", ["stacked", "einsum", "matmul", "masked", "indexed"])
def test_zeroing_an_expert_leaves_it_out(way: str) -> None:
    torch.manual_seed(0)
    labels = check_skips("experts", Mixture(way), torch.randn(9, 6).double())
    assert not any("router" in n or "gate" in n for n in labels)


@pytest.mark.parametrize("way", ["bmm", "einsum", "chosen", "looped"])
def test_zeroing_an_expert_of_a_three_dimensional_parameter_leaves_it_out(way: str) -> None:
    torch.manual_seed(0)
    labels = check_skips("experts", Stacked(way), torch.randn(9, 6).double())
    assert set(labels) == {"down", "bias"}
    assert all(t.broadcast_to(3, *t.shape[1:]).flatten(1).amax(1).unique().numel() == 3 for t in labels.values())


class Tasks(Branched):
    """Two tasks with a router each: over the same experts, or over two of these and one of its own."""

    branches = 4

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own, self.experts = own, nn.ModuleList(mlp(6, 5, 6) for _ in range(4))
        self.routers, self.heads = (nn.ModuleList(nn.Linear(6, n) for _ in range(2)) for n in (3 if own else 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        each = [self.keep(i, expert(x)) for i, expert in enumerate(self.experts)]
        outputs: list[Tensor] = []
        for task, (router, head) in enumerate(zip(self.routers, self.heads, strict=True)):
            mixed = torch.stack([*each[:2], each[2 + task]] if self.own else each, 1)
            outputs.append(head((router(x).softmax(-1).unsqueeze(-1) * mixed).sum(1)))
        return torch.cat(outputs, 1)


@pytest.mark.parametrize("own", [False, True])
def test_experts_that_several_tasks_share_are_gated_once_and_go(own: bool) -> None:
    torch.manual_seed(0)
    model, x = Tasks(own), torch.randn(3, 6).double()
    check_skips("experts", model, x)
    dg.gate(model, "experts", example_inputs=x)
    assert len(dg.groups(model).alive) == 4
    with torch.no_grad():
        dict.fromkeys(t.gates for t in dg.gates.gated_tensors(model)).popitem()[0].gamma.zero_()
    exported = dg.export(model, x, latency=False)
    assert exported.report.gone == ["experts.3"]
    assert torch.allclose(exported.model(2 * x), model(2 * x), atol=1e-6)


class Attending(nn.Module):
    """Channel attention, spatial attention and pooling by attention: no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.spatial = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4), nn.Conv2d(4, 1, 1)
        self.score, self.value = nn.Linear(4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y * self.squeeze(y.mean((2, 3))).sigmoid()[:, :, None, None]
        y = y + y * self.spatial(y).sigmoid()
        tokens = y.flatten(2).mT
        return (self.score(tokens).softmax(1) * self.value(tokens)).sum(1)


class SelfAttention(nn.Module):
    """Attention written out, with a gate per head, and its values added to the stream without a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT).softmax(-1) @ v * self.gate(x).sigmoid().mT[..., None]
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("model", "shape"), [(Attending, (2, 3, 4, 4)), (SelfAttention, (2, 5, 8))])
def test_attention_is_no_mixture_of_experts(model: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(dg.GroupingError, match="no mixture of experts"):
        labels_of("experts", randomized(model()), torch.randn(shape).double())


MOE = {**SMALL, "num_key_value_heads": 1, "use_cache": False, "num_experts_per_tok": 2}
DEEPSEEK = {"moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1} | {
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
QWEN = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1}


@pytest.mark.parametrize(
    ("name", "config", "routed", "shared"),
    [
        ("MixtralForCausalLM", {**MOE, "num_local_experts": 4}, 8, 0),
        ("Qwen2MoeForCausalLM", {**MOE, **QWEN}, 8, 2),
        ("OlmoeForCausalLM", {**MOE, "num_experts": 4}, 8, 0),
        ("DeepseekV3ForCausalLM", {**MOE, **DEEPSEEK, "num_key_value_heads": 2}, 4, 0),
        ("GptOssForCausalLM", {**MOE, "num_local_experts": 4, "head_dim": 8}, 8, 0),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_experts_of_transformers(name: str, config: dict[str, Any], routed: int, shared: int) -> None:
    model, kwargs = from_config(name, config)
    model.float()
    labels = labels_of("experts", model, **kwargs)
    assert len(ids(labels)) == routed + shared
    parameters = dict(model.named_parameters())

    def logits(replaced: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(model, replaced, (), kwargs).logits

    acting = 0
    for weight in (n for n in labels if n.endswith("down_proj")):
        inner = weight.replace("down_proj", "gate_up_proj")
        for e in range(4):
            changed = parameters[inner].detach().clone()
            changed[e] += 1
            zeroed = without(model, labels, int(labels[weight][e].max()))
            assert torch.equal(logits(zeroed), logits(zeroed | {inner: changed}))
            acting += not torch.equal(logits({}), logits({inner: changed}))
            assert torch.equal(logits({}), logits(zeroed)) == torch.equal(logits({}), logits({inner: changed}))
    assert acting >= routed - 2  # an expert may be chosen by no token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_keep_as_many_units_as_kernels_that_read_several_at_a_time_ask_for(dtype: torch.dtype) -> None:
    config = MOE | QWEN | {"moe_intermediate_size": 32, "num_hidden_layers": 1, "shared_expert_intermediate_size": 16}
    model, kwargs = from_config("Qwen2MoeForCausalLM", config)
    dg.gate(model.to(dtype), "hidden", example_inputs=kwargs)
    with torch.no_grad():
        for tensor in gated_tensors(model):
            tensor.gates.gamma[1::3] = 0
    out = dg.export(model, kwargs, latency=False)
    unit, sizes = 16 // dtype.itemsize, {n.rpartition("experts.")[2]: p.shape for n, p in out.model.named_parameters()}
    live = 32 - 11
    width = -(-live // unit) * unit
    assert sizes["down_proj"][2] == width
    assert sizes["gate_up_proj"][1] == 2 * width
    shared = dict(out.model.named_parameters())["model.layers.0.mlp.shared_expert.down_proj.weight"]
    assert shared.shape[1] == 16 - 5
    assert any(f"multiples of {unit}" in kept.reason for kept in out.report.kept)
    out.model.train()(**kwargs).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in out.model.parameters())
