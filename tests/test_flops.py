"""Counts of floating-point operations, of layers that torch runs as one operation too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgate_wrap.flops import _FORMULAS, count_flops
from dgate_wrap.tracing import normalize_inputs


def total(model: nn.Module, *inputs: Tensor) -> int:
    return count_flops(model, normalize_inputs(inputs))[""]


def test_an_encoder_layer_is_counted_although_torch_fuses_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    counted = count_flops(layer, normalize_inputs(torch.randn(1, 3, 8)))
    assert counted["linear1"] == counted["linear2"] == 2 * 3 * 8 * 16
    attention = 4 * 2 * 3 * 8 * 8 + 2 * 2 * 3 * 3 * 8
    assert counted["self_attn"] == attention
    assert counted[""] == counted["linear1"] + counted["linear2"] + attention
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_one_operation_is_counted_as_two_products(heads: int, masked: bool) -> None:
    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = torch.ones(5, 6, dtype=torch.bool) if masked else None
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads < 8)

    q, k, v = torch.randn(3, 8, 5, 4), torch.randn(3, heads, 6, 4), torch.randn(3, heads, 6, 4)
    assert total(Attends(), q, k, v) == 2 * 2 * 3 * 8 * 5 * 6 * 4


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(6, 4, num_layers=2, batch_first=True),
        nn.LSTM(6, 4, bidirectional=True),
        nn.GRU(6, 4, num_layers=2, bidirectional=True),
        nn.RNN(6, 4),
    ],
)
def test_recurrent_layers_are_counted_as_if_step_by_step(layer: nn.RNNBase) -> None:
    x = torch.randn(3, 5, 6)
    weights = sum(p.numel() for n, p in layer.named_parameters() if n.startswith("weight"))
    assert total(layer, x) == 2 * 15 * weights


def test_a_bilinear_layer_reads_every_weight_once_per_example() -> None:
    assert total(nn.Bilinear(3, 4, 5), torch.randn(7, 3), torch.randn(7, 4)) == 2 * 7 * 3 * 4 * 5


def test_cudas_recurrent_layers_take_all_weights_in_a_list() -> None:
    weights = [(16, 6), (16, 4), (16,), (16,)] * 2
    assert _FORMULAS[torch.ops.aten._cudnn_rnn]((3, 5, 6), weights, 4, None) == 2 * 15 * 2 * (16 * 6 + 16 * 4)
