"""Models made from a configuration: it follows the smaller sizes where it can, and generation keeps its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from torch import Tensor, nn

import dgate_wrap as dg


class Config:
    """Sizes of a model; another one of its numbers only looks like a size."""

    def __init__(self, width: int = 8, units: tuple[int, ...] = (12, 12), classes: int = 12) -> None:
        self.width, self.units, self.classes = width, units, classes

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        return Config(**values)


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.stem, self.head = nn.Linear(4, config.width), nn.Linear(config.width, config.classes)
        self.ups = nn.ModuleList(nn.Linear(config.width, n) for n in config.units)
        self.downs = nn.ModuleList(nn.Linear(n, config.width) for n in config.units)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def test_fields_that_cannot_be_read_are_none() -> None:
    class Varied(Config):
        @property
        def near(self) -> int:
            raise RuntimeError("it differs from layer to layer")

    torch.manual_seed(0)
    model = Model(Varied())
    model.near = 5
    exported = smaller(model, "hidden", torch.randn(3, 4))
    assert exported.report.removed == exported.report.pruning.dead == 16
    assert exported.model.config.units == (6, 6)


def kill_half(model: nn.Module) -> None:
    with torch.no_grad():
        for gates in {t.gates: None for t in dg.gates.gated_tensors(model)}:
            gates.gamma[: gates.gamma.shape[0] // 2] = 0


def smaller(model: nn.Module, grouping: str, inputs: Any) -> dg.Exported:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    dg.gate(model.eval(), grouping, example_inputs=inputs)
    kill_half(model)
    return dg.export(model, inputs, latency=False)


def test_the_configuration_says_the_new_sizes() -> None:
    x = torch.randn(3, 4)
    model = Model(Config())
    dg.gate(model.eval(), "hidden", example_inputs=x)
    with torch.no_grad():
        for dead, gates in enumerate({t.gates: None for t in dg.gates.gated_tensors(model)}, 3):
            gates.gamma[:dead] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.config == {"width": 5, "units.0": 8, "units.1": 7}
    assert exported.model.config.units == (8, 7)
    assert "its configuration says: " in str(exported.report)
    assert model.config.units == (12, 12)
    again = Model(exported.model.config)
    again.load_state_dict(exported.model.state_dict())
    assert torch.equal(again.eval()(x), exported.model(x))


def test_what_a_configuration_cannot_say_leaves_it_as_it_was() -> None:
    class Uneven(Model):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.extra = nn.Linear(config.classes, config.classes)
            self.last = nn.Linear(config.classes, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.extra(torch.relu(super().forward(x)))))

    x = torch.randn(3, 4)
    model = Uneven(Config())
    dg.gate(model.eval(), {"head.weight": torch.arange(12).view(12, 1)})
    with torch.no_grad():
        model.head.bias.zero_()
        dg.gates.gated_tensors(model)[0].gates.gamma[:3] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model.head.weight.shape == (9, 8)
    assert exported.report.config is None
    assert vars(exported.model.config) == vars(Config())
    assert "cannot express" in str(exported.report)


def test_a_model_without_a_configuration_says_nothing_of_it() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    exported = smaller(model, "hidden", x)
    assert exported.report.config == {}
    assert "configuration" not in str(exported.report)


GENERATING = [
    ("llama", "hidden", {"intermediate_size": 32}),
    ("llama", "heads", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("qwen2", "heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    ("phi3", "heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    ("gpt2", "hidden", {"n_inner": 32}),
    ("gpt2", "heads", None),
    ("gpt_neox", "heads", None),
    ("opt", "heads", None),
    ("t5", "heads", {"num_heads": 2}),
]


@pytest.mark.parametrize(("name", "grouping", "config"), GENERATING, ids=lambda v: v if isinstance(v, str) else "")
def test_generation_with_a_cache_goes_on_and_files_of_its_own_load(
    name: str, grouping: str, config: dict[str, int] | None, tmp_path: Path
) -> None:
    model, _, kwargs = build(name)
    exported = smaller(model, grouping, kwargs)
    small: Any = exported.model
    assert exported.report.removed == exported.report.pruning.dead > 0
    assert exported.report.config == config
    assert exported.report.rewritten == exported.report.frozen == []
    tokens = kwargs["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for cache in (True, False):
        expected = model.generate(tokens, use_cache=cache, **options)
        assert torch.equal(small.generate(tokens, use_cache=cache, **options), expected)
    if config is not None:
        small.save_pretrained(tmp_path)
        again = type(small).from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(again(**kwargs)[0], small(**kwargs)[0])


def test_heads_that_are_dead_in_some_layers_only_go_beside_a_cache() -> None:
    model, _, kwargs = build("t5")
    model.config.use_cache = True
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    places = ["encoder.block.0.layer.0.SelfAttention", "encoder.block.1.layer.0.SelfAttention"]
    heads = torch.arange(4).repeat_interleave(8).view(-1, 1)
    dg.gate(model.eval(), {f"{place}.v.weight": heads + 4 * i for i, place in enumerate(places)})
    with torch.no_grad():
        for t, dead in zip(dg.gates.gated_tensors(model), ([0], [1, 2]), strict=True):
            t.gates.gamma[dead] = 0
    exported = dg.export(model, kwargs, latency=False)
    small: Any = exported.model
    assert exported.report.rewritten == places
    assert [small.get_submodule(place).v.out_features for place in places] == [24, 16]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens = kwargs["input_ids"]
    assert torch.equal(small.generate(tokens, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("name", ["olmo2", "gemma2"])
def test_every_weight_of_a_layer_whose_attention_died_still_trains(name: str) -> None:
    model, _, kwargs = build(name)
    model.config.use_cache = True
    dg.gate(model.eval(), "heads", example_inputs=kwargs)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[:2] = 0
    exported = dg.export(model, kwargs, latency=False)
    small: Any = exported.model.train()
    small(**kwargs)[0].square().mean().backward()
    assert [n for n, p in small.named_parameters() if p.grad is None] == []


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Passing(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_masks_are_taken_where_layers_are_wrapped_and_arguments_are_handed_on() -> None:
    model, _, kwargs = build("llama")
    kwargs = {"input_ids": kwargs["input_ids"]}
    model.config.use_cache = True
    attention = model.model.layers[0].self_attn
    attention.o_proj = Adapted(attention.o_proj)
    model = Passing(model).eval()
    dg.gate(model, "heads", example_inputs=kwargs)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[:2] = 0
    small = dg.export(model, kwargs, latency=False).model
    mask = torch.ones_like(kwargs["input_ids"])
    mask[0, :2] = 0
    with torch.no_grad():
        expected, found = (m(**kwargs, attention_mask=mask).logits for m in (model, small))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_an_attention_whose_heads_are_all_dead_keeps_one_beside_a_cache_and_takes_masks(masked: bool) -> None:
    model, _, kwargs = build("llama")
    mask = torch.ones_like(kwargs["input_ids"])
    mask[0, :2] = 0
    kwargs = {"input_ids": kwargs["input_ids"], **({"attention_mask": mask} if masked else {})}
    model.config.use_cache = True
    dg.gate(model.eval(), "heads", example_inputs=kwargs)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[:2] = 0
    exported = dg.export(model, kwargs, latency=False)
    small: Any = exported.model
    attention = [small.model.layers[i].self_attn for i in range(2)]
    assert [(a.q_proj.out_features, a.v_proj.out_features) for a in attention] == [(8, 8), (32, 16)]
    assert [a.num_key_value_groups for a in attention] == [1, 2]
    with torch.no_grad():
        expected = model(input_ids=kwargs["input_ids"], attention_mask=mask).logits
        found = small(input_ids=kwargs["input_ids"], attention_mask=mask).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    tokens = kwargs["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(small.generate(tokens, **options), model.generate(tokens, **options))
