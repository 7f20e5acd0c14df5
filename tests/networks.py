"""Random feed-forward, convolutional and residual networks, drawn by hypothesis as small programs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,  # f(0) = 0.5: a dead channel becomes a constant
    "gelu": nn.GELU,
    "hardtanh": nn.Hardtanh,
    "softplus": nn.Softplus,
    "leaky": nn.LeakyReLU,
}

_channels = st.integers(1, 4).map(lambda n: 2 * n)
_conv = st.fixed_dictionaries(
    {
        "op": st.just("conv"),
        "out": _channels,
        "kernel": st.sampled_from([1, 3]),
        "stride": st.sampled_from([1, 1, 2]),
        "padding": st.sampled_from(["none", "zeros", "reflect", "circular"]),
        "groups": st.sampled_from(["one", "one", "two", "depthwise"]),
        "bias": st.booleans(),
        "norm": st.booleans(),
        "act": st.sampled_from(sorted(ACTIVATIONS)),
    }
)
_residual = st.fixed_dictionaries(
    {
        "op": st.just("residual"),
        "hidden": _channels,
        "padding": st.sampled_from(["zeros", "reflect"]),
        "bias": st.booleans(),
        "norm": st.booleans(),
        "act": st.sampled_from(sorted(ACTIVATIONS)),
        "project": st.booleans(),
    }
)
_concat = st.fixed_dictionaries({"op": st.just("concat"), "out": _channels, "norm": st.booleans()})
_transposed = st.fixed_dictionaries(
    {
        "op": st.just("transposed"),
        "out": _channels,
        "kernel": st.sampled_from([2, 3]),
        "groups": st.sampled_from(["one", "two"]),
    }
)
_pool = st.fixed_dictionaries(
    {"op": st.just("pool"), "kind": st.sampled_from(["max", "avg", "avg_padded", "adaptive", "upsample", "dropout"])}
)
_gate = st.fixed_dictionaries({"op": st.just("squeeze_excite"), "hidden": _channels})

PROGRAMS = st.fixed_dictionaries(
    {
        "dims": st.sampled_from([2, 2, 2, 1, 3]),
        "channels": st.integers(1, 3),
        "size": st.integers(5, 8),
        "steps": st.lists(
            st.one_of(_conv, _conv, _residual, _concat, _transposed, _pool, _gate), min_size=1, max_size=5
        ),
        "head": st.sampled_from(["flatten", "mean", "flatten_mlp", "conv"]),
    }
)


def _conv_type(dims: int, *, transposed: bool = False) -> Any:
    return getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")


def _norm(dims: int, channels: int, wanted: bool) -> nn.Module:
    return getattr(nn, f"BatchNorm{dims}d")(channels) if wanted else nn.Identity()


class _Conv(nn.Module):
    def __init__(self, dims: int, c: int, step: dict[str, Any]) -> None:
        super().__init__()
        groups = {"one": 1, "two": 2 if c % 2 == 0 else 1, "depthwise": c}[step["groups"]]
        out = step["out"] if step["groups"] != "depthwise" else c * (1 + step["out"] % 2)
        padding = step["kernel"] // 2 if step["padding"] != "none" else 0
        mode = step["padding"] if step["padding"] in ("reflect", "circular") and padding else "zeros"
        self.conv = _conv_type(dims)(
            c, out, step["kernel"], step["stride"], padding, groups=groups, bias=step["bias"], padding_mode=mode
        )
        self.norm = _norm(dims, out, step["norm"])
        self.act = ACTIVATIONS[step["act"]]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class _Residual(nn.Module):
    def __init__(self, dims: int, c: int, step: dict[str, Any]) -> None:
        super().__init__()
        conv, hidden = _conv_type(dims), step["hidden"]
        self.first = conv(c, hidden, 3, padding=1, bias=step["bias"], padding_mode=step["padding"])
        self.norm1 = _norm(dims, hidden, step["norm"])
        self.second = conv(hidden, c, 3, padding=1, bias=step["bias"])
        self.norm2 = _norm(dims, c, step["norm"])
        self.act = ACTIVATIONS[step["act"]]()
        self.skip = conv(c, c, 1) if step["project"] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.skip(x) + self.norm2(self.second(self.act(self.norm1(self.first(x))))))


class _Concat(nn.Module):
    def __init__(self, dims: int, c: int, step: dict[str, Any]) -> None:
        super().__init__()
        self.left = _conv_type(dims)(c, step["out"], 3, padding=1)
        self.right = _conv_type(dims)(c, 2, 1)
        self.norm = _norm(dims, c + step["out"] + 2, step["norm"])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.left(x), x, self.right(x).relu()], 1))


class _SqueezeExcite(nn.Module):
    def __init__(self, dims: int, c: int, step: dict[str, Any]) -> None:
        super().__init__()
        self.dims = dims
        self.down, self.up = nn.Linear(c, step["hidden"]), nn.Linear(step["hidden"], c)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.up(self.down(x.flatten(2).mean(2)).relu()).sigmoid()
        return x * scale.view(*scale.shape, *[1] * self.dims)


class _Pool(nn.Module):
    def __init__(self, dims: int, kind: str) -> None:
        super().__init__()
        self.dims, self.kind = dims, kind

    def forward(self, x: Tensor) -> Tensor:
        d = self.dims
        if self.kind == "dropout":
            return F.dropout(x, 0.5, self.training)
        if self.kind == "upsample":
            return F.interpolate(x, scale_factor=2)
        if min(x.shape[2:]) < 2:
            return x
        if self.kind == "max":
            return getattr(F, f"max_pool{d}d")(x, 2)
        if self.kind == "avg":
            return getattr(F, f"avg_pool{d}d")(x, 2)
        if self.kind == "avg_padded":  # the border of a constant channel differs from its middle
            return getattr(F, f"avg_pool{d}d")(x, 3, 2, 1)
        return getattr(F, f"adaptive_avg_pool{d}d")(x, 3)


class RandomNetwork(nn.Module):
    """A network built from a drawn program; what does not fit the current size is left out."""

    def __init__(self, program: dict[str, Any]) -> None:
        super().__init__()
        d, c = program["dims"], program["channels"]
        x = torch.zeros(1, c, *[program["size"]] * d)
        self.steps = nn.ModuleList()
        for step in program["steps"]:
            op = step["op"]
            if op == "conv":
                module: nn.Module = _Conv(d, c, step)
            elif op == "residual":
                module = _Residual(d, c, step)
            elif op == "concat":
                module = _Concat(d, c, step)
            elif op == "transposed":
                groups = 2 if step["groups"] == "two" and c % 2 == 0 else 1
                module = _conv_type(d, transposed=True)(c, step["out"], step["kernel"], 2, groups=groups)
            elif op == "squeeze_excite":
                module = _SqueezeExcite(d, c, step)
            else:
                module = _Pool(d, step["kind"])
            try:
                y = module.eval()(x)
            except RuntimeError:  # too small for the kernel or the padding
                continue
            if y.numel() > 4000:
                continue
            self.steps.append(module)
            x, c = y, y.shape[1]
        self.head_kind = program["head"]
        flat = x.flatten(1).shape[1]
        if self.head_kind == "mean":
            self.head: nn.Module = nn.Linear(c, 3)
        elif self.head_kind == "conv":
            self.head = _conv_type(d)(c, 2, 1)
        elif self.head_kind == "flatten":
            self.head = nn.Linear(flat, 3)
        else:
            self.head = nn.Sequential(
                nn.Linear(flat, 6), nn.Sigmoid(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
            )
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        if self.head_kind == "mean":
            x = x.flatten(2).mean(2)
        elif self.head_kind != "conv":
            x = x.flatten(1)
        return self.head(x)


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter and statistic, so that no bias, β or running mean is zero by default."""
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            t.copy_(torch.rand(t.shape, generator=generator, dtype=t.dtype) + 0.5)
        elif t.is_floating_point():
            fan_in = max(1, t[0].numel() if t.dim() > 1 else 1)
            t.copy_(torch.randn(t.shape, generator=generator, dtype=t.dtype) / fan_in**0.5)
