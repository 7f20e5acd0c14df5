"""Random models over every family of operations, drawn from a seed, and random groups of their weights to kill.

A model is a list of blocks. Each is a few lines as people write them, some with sizes spelled out and some with sizes
read off the tensors; what flows between them is one of four kinds: ``rows (batch, channels)``, ``tokens (batch, tokens,
channels)``, ``signals (batch, channels, length)`` and ``images (batch, channels, height, width)``. Shapes below are
those of one sample, without the batch. Print a model to see what it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Shape = tuple[int, ...]
Run = Callable[[Any, Tensor, Tensor], Any]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_module": nn.ReLU(),
    "gelu": F.gelu,
    "silu": nn.SiLU(),
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "hardtanh": nn.Hardtanh(),
    "hardswish": F.hardswish,
    "square": lambda x: x * x,
    "absolute": lambda x: x.abs(),
    "softshrink": F.softshrink,
    "none": lambda x: x,
    # f(0) is not zero: what is dead becomes a constant
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "cosine": torch.cos,
    "hardsigmoid": nn.Hardsigmoid(),
    "bell": lambda x: 1 / (1 + x**2),
    "shifted": lambda x: (x + 0.5).clamp(min=0),
    "logsigmoid": F.logsigmoid,
    "exponential": lambda x: torch.exp(-x.abs()),
}


class Block(nn.Module):
    """A function of the model's current value and of named parts, as one module.

    Args:
        says: What it was drawn as.
        run: ``(block, x, extra) → result``; ``extra`` is the model's second input, integers ``(batch,)``.
        extra: Whether it reads ``extra``.
        units: Parameters whose rows make up units together: name → number of the unit of each row.
        parts: Modules; tensors of numbers, which become parameters; other tensors, which become buffers.
    """

    def __init__(
        self,
        says: str,
        run: Run,
        *,
        extra: bool = False,
        units: dict[str, Tensor] | None = None,
        **parts: nn.Module | Tensor,
    ) -> None:
        super().__init__()
        self.name, self.says, self.run, self.reads_extra, self.units = "", says, run, extra, units or {}
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            elif part.is_floating_point():
                setattr(self, name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor, extra: Tensor) -> Any:
        return self.run(self, x, extra)

    def extra_repr(self) -> str:
        return f"{self.name}: {self.says}" if self.says else self.name


Make = Callable[[Random, Shape], "Block | None"]


@dataclass(frozen=True)
class Recipe:
    """How to draw a block: what it takes and gives, and how often it is drawn."""

    make: Make
    takes: tuple[str, ...]
    gives: str
    weight: int


RECIPES: dict[str, Recipe] = {}


def block(takes: str, gives: str = "", *, weight: int = 2) -> Callable[[Make], Make]:
    """Register a function that draws a block for a shape, or declines; ``gives`` is a kind, by default as taken."""

    def register(make: Make) -> Make:
        RECIPES[make.__name__.strip("_")] = Recipe(make, tuple(takes.split()), gives, weight)
        return make

    return register


def width(rng: Random) -> int:
    return rng.choice((2, 3, 4, 4, 5, 6, 6, 8))


def chance(rng: Random, share: float = 0.5) -> bool:
    return rng.random() < share


def activation(rng: Random) -> tuple[str, Callable[[Tensor], Tensor]]:
    return rng.choice(list(ACTIVATIONS.items()))


def parameter(*shape: int) -> Tensor:
    return torch.zeros(shape)


def indices(rng: Random, size: int, count: int | None = None) -> Tensor:
    """Draw distinct indices in any order."""
    return torch.tensor(rng.sample(range(size), count or size))


def mask(rng: Random, *shape: int) -> Tensor:
    return torch.tensor([chance(rng, 0.6) for _ in range(math.prod(shape))]).view(shape)


def divisor(rng: Random, n: int) -> int:
    return rng.choice([d for d in range(1, n + 1) if n % d == 0])


# Rows and tokens: channels on the last axis


@block("rows tokens", weight=6)
def linear(rng: Random, shape: Shape) -> Block:
    name, f = activation(rng)
    layer = nn.Linear(shape[-1], width(rng), bias=chance(rng, 0.7))
    return Block(name, lambda m, x, e: f(m.layer(x)), layer=layer)


@block("rows tokens", weight=3)
def feed_forward(rng: Random, shape: Shape) -> Block:
    c, hidden, (name, f) = shape[-1], width(rng), activation(rng)
    norm = rng.choice((nn.LayerNorm(c), nn.RMSNorm(c), nn.Identity()))
    a, b = nn.Linear(c, hidden, bias=chance(rng, 0.7)), nn.Linear(hidden, c, bias=chance(rng, 0.7))
    return Block(f"{hidden} {name}", lambda m, x, e: x + m.b(f(m.a(m.norm(x)))), norm=norm, a=a, b=b)


@block("rows tokens", weight=3)
def gated_unit(rng: Random, shape: Shape) -> Block:
    c, hidden, (name, f) = shape[-1], width(rng), activation(rng)
    how = rng.choice(("two", "chunk", "split", "glu"))
    if how == "two":
        units = {"a.weight": torch.arange(hidden), "g.weight": torch.arange(hidden)}
        layers = {n: nn.Linear(c, hidden, bias=chance(rng)) for n in ("a", "g")}
        return Block(
            f"{how} {name}", lambda m, x, e: m.b(f(m.a(x)) * m.g(x)), units=units, b=nn.Linear(hidden, c), **layers
        )

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        if how == "glu":
            return m.b(F.glu(m.a(x), dim=-1))
        left, right = m.a(x).chunk(2, -1) if how == "chunk" else m.a(x).split(hidden, -1)
        return m.b(left * f(right))

    units = {"a.weight": torch.arange(hidden).repeat(2)}
    a, b = nn.Linear(c, 2 * hidden, bias=chance(rng)), nn.Linear(hidden, c, bias=chance(rng))
    return Block(f"{how} {name}", run, units=units, a=a, b=b)


@block("rows")
def addmm(rng: Random, shape: Shape) -> Block:
    name, f = activation(rng)
    h = width(rng)
    return Block(
        name, lambda m, x, e: f(torch.addmm(m.bias, x, m.weight)), weight=parameter(shape[0], h), bias=parameter(h)
    )


@block("rows tokens", weight=3)
def matmul(rng: Random, shape: Shape) -> Block:
    h, (name, f) = width(rng), activation(rng)
    how = rng.choice(("right", "transposed", "left", "einsum", "add", "softmax", "masked", "standardized", "tensordot"))
    if how == "tensordot":
        weight = parameter(shape[-1], h)
        return Block(f"{how} {name}", lambda m, x, e: f(torch.tensordot(x, m.weight, dims=1)), weight=weight)
    if how in ("softmax", "masked", "standardized"):  # a weight that is computed from parameters
        dim = rng.choice((0, 1))

        def computed(w: Tensor, keep: Tensor) -> Tensor:
            if how == "standardized":
                return (w - w.mean(dim, keepdim=True)) / (w.var(dim, keepdim=True, unbiased=False) + 0.1).sqrt()
            return w.softmax(dim) if how == "softmax" else w * keep

        return Block(
            f"{how} {dim} {name}",
            lambda m, x, e: f(F.linear(x, computed(m.weight, m.keep), m.bias)),
            weight=parameter(h, shape[-1]),
            bias=parameter(h),
            keep=mask(rng, h, shape[-1]),
        )
    if how == "left" and len(shape) == 2:
        return Block(how, lambda m, x, e: f(torch.matmul(m.weight, x)), weight=parameter(h, shape[0]))
    if how == "transposed":
        return Block(f"{how} {name}", lambda m, x, e: f(x @ m.weight.t()), weight=parameter(h, shape[-1]))
    if how == "einsum":
        weight = parameter(shape[-1], h)
        return Block(f"{how} {name}", lambda m, x, e: f(torch.einsum("...c,cd->...d", x, m.weight)), weight=weight)
    if how == "add":
        weight, bias = parameter(shape[-1], h), parameter(h)
        return Block(f"{how} {name}", lambda m, x, e: f(x @ m.weight + m.bias), weight=weight, bias=bias)
    return Block(f"right {name}", lambda m, x, e: f(x @ m.weight), weight=parameter(shape[-1], h))


@block("rows tokens")
def tied(rng: Random, shape: Shape) -> Block:
    """A weight that is used twice, the other way round the second time; or two layers with one weight."""
    c, hidden, (name, f) = shape[-1], width(rng), activation(rng)
    a = nn.Linear(c, hidden, bias=chance(rng))
    if chance(rng):
        return Block(
            f"transposed {name}", lambda m, x, e: F.linear(f(m.a(x)), m.a.weight.t(), m.bias), a=a, bias=parameter(c)
        )
    b = nn.Linear(c, hidden, bias=chance(rng))
    b.weight = a.weight
    return Block(f"two layers {name}", lambda m, x, e: torch.cat([f(m.a(x)), m.b(f(x))], -1), a=a, b=b)


@block("rows tokens")
def learned_input(rng: Random, shape: Shape) -> Block:
    """A branch that no input reaches."""
    c, hidden, (name, f) = shape[-1], width(rng), activation(rng)
    how = rng.choice(("added", "times", "concatenated"))

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        y = m.b(f(m.a(m.learned)))
        if how == "concatenated":
            return torch.cat([x, y.expand(*x.shape[:-1], -1)], -1)
        return x + y if how == "added" else x * y.sigmoid()

    return Block(f"{how} {name}", run, learned=parameter(3), a=nn.Linear(3, hidden), b=nn.Linear(hidden, c))


@block("rows tokens")
def batched_weight(rng: Random, shape: Shape) -> Block:
    """Several small linear maps at once, as experts or heads have."""
    c, heads, h = shape[-1], rng.choice((2, 3)), rng.choice((2, 3, 4))
    how, (name, f) = rng.choice(("einsum", "bmm", "sum")), activation(rng)
    inner, outer = parameter(heads, c, h), parameter(heads, h, c)

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        if how == "einsum":
            y = f(torch.einsum("...c,nch->...nh", x, m.inner))
            return torch.einsum("...nh,nhc->...c", y, m.outer)
        flat = x.reshape(-1, c)
        y = f(torch.bmm(flat.expand(heads, -1, -1), m.inner))
        y = torch.bmm(y, m.outer).sum(0) if how == "bmm" else (y @ m.outer).mean(0)
        return y.view(x.shape)

    return Block(f"{how} {name}", run, inner=inner, outer=outer)


@block("rows tokens")
def bilinear(rng: Random, shape: Shape) -> Block:
    c, h, other, (name, f) = shape[-1], width(rng), rng.choice((2, 3)), activation(rng)
    layer = nn.Bilinear(c, other, h, bias=chance(rng))
    return Block(name, lambda m, x, e: m.layer(x, f(m.a(x))), a=nn.Linear(c, other), layer=layer)


@block("rows tokens")
def weight_normed(rng: Random, shape: Shape) -> Block:
    name, f = activation(rng)
    layer = weight_norm(nn.Linear(shape[-1], width(rng)), dim=rng.choice((0, 0, 1)))
    return Block(name, lambda m, x, e: f(m.layer(x)), layer=layer)


@block("rows tokens", weight=3)
def norm(rng: Random, shape: Shape) -> Block:
    c = shape[-1]
    how = rng.choice(("layer", "rms", "plain", "written_rms", "unit", "batch", "over_all"))
    if how == "layer":
        return Block(how, lambda m, x, e: m.norm(x), norm=nn.LayerNorm(c, bias=chance(rng, 0.8)))
    if how == "rms":
        return Block(how, lambda m, x, e: m.norm(x), norm=nn.RMSNorm(c, eps=1e-5))
    if how == "written_rms":

        def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
            return m.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

        return Block(how, run, scale=parameter(c))
    if how == "unit":
        return Block(how, lambda m, x, e: x / (x.norm(dim=-1, keepdim=True) + 0.1))
    if how == "batch" and len(shape) == 1:
        return Block(
            how,
            lambda m, x, e: m.norm(x),
            norm=nn.BatchNorm1d(c, affine=chance(rng, 0.8), track_running_stats=chance(rng, 0.8)),
        )
    if how == "over_all":
        return Block(how, lambda m, x, e: F.layer_norm(x, x.shape[1:], m.scale, None, 1e-4), scale=parameter(*shape))
    return Block("plain", lambda m, x, e: F.layer_norm(x, (c,)))


@block("rows tokens")
def softmax(rng: Random, shape: Shape) -> Block:
    dim, log = rng.choice((-1, 1)), chance(rng, 0.3)
    return Block(f"dim {dim}, log {log}", lambda m, x, e: x.log_softmax(dim) if log else x.softmax(dim))


@block("rows tokens signals images")
def prelu(rng: Random, shape: Shape) -> Block:
    size = rng.choice((1, shape[0]))
    return Block(str(size), lambda m, x, e: m.act(x), act=nn.PReLU(size))


@block("rows tokens", weight=3)
def scale_and_shift(rng: Random, shape: Shape) -> Block:
    c, how = shape[-1], rng.choice(("parameters", "mask", "where", "masked_fill", "fill_where", "column", "lerp"))
    parts = {"scale": parameter(c), "shift": parameter(c), "keep": mask(rng, c)}
    runs: dict[str, Run] = {
        "parameters": lambda m, x, e: x * m.scale + m.shift,
        "mask": lambda m, x, e: x * m.keep + m.shift,
        "where": lambda m, x, e: torch.where(m.keep, x * m.scale, m.shift),
        "masked_fill": lambda m, x, e: (x - m.shift).masked_fill(m.keep, 0.5) * m.scale,
        "fill_where": lambda m, x, e: torch.where(m.keep, x, torch.zeros_like(x)) + m.shift * m.scale,
        "column": lambda m, x, e: x * (x * m.scale).sum(-1, keepdim=True) + m.shift,
        "lerp": lambda m, x, e: torch.lerp(x, m.shift.expand_as(x), m.scale.sigmoid()),
    }
    return Block(how, runs[how], **parts)


@block("rows tokens signals images")
def comparison(rng: Random, shape: Shape) -> Block:
    """Pointwise functions of several operands that are no products."""
    how = rng.choice(("maximum", "where", "relu_where", "xlogy", "hypot", "addcmul", "clamp"))
    other = parameter(*(n if chance(rng) else 1 for n in shape))
    keep = mask(rng, *shape)
    runs: dict[str, Run] = {
        "maximum": lambda m, x, e: torch.maximum(x, m.other),
        "where": lambda m, x, e: torch.where(m.keep, x, -x) * m.other,
        "relu_where": lambda m, x, e: torch.where(x > 0, x, x * m.other),
        "xlogy": lambda m, x, e: torch.xlogy(x, m.other.abs() + 0.5),
        "hypot": lambda m, x, e: torch.hypot(x, m.other),
        "addcmul": lambda m, x, e: torch.addcmul(m.other, x, x, value=0.5),
        "clamp": lambda m, x, e: torch.clamp(x, max=m.other.abs()),
    }
    return Block(how, runs[how], other=other, keep=keep)


@block("rows tokens")
def features_moved(rng: Random, shape: Shape) -> Block:
    """Elements along the channels that change places, are repeated, or are left out."""
    c = shape[-1]
    k, order = rng.randint(1, c), indices(rng, c)
    some = indices(rng, c, k)
    listed = order.tolist()
    runs: dict[str, Run] = {
        "flip": lambda m, x, e: x.flip(-1),
        "roll": lambda m, x, e: x.roll(1, -1),
        "slice": lambda m, x, e: x[..., : max(1, c // 2)],
        "tail": lambda m, x, e: x[..., -k:],
        "step": lambda m, x, e: x[..., ::2],
        "buffer": lambda m, x, e: x[..., m.order],
        "list": lambda m, x, e: x[..., listed],
        "index_select": lambda m, x, e: x.index_select(-1, m.some),
        "gather": lambda m, x, e: x.gather(-1, m.order.expand_as(x)),
        "narrow": lambda m, x, e: x.narrow(-1, c - k, k),
        "pad": lambda m, x, e: F.pad(x, (1, 2)),
        "pad_value": lambda m, x, e: F.pad(x, (2, 1), value=0.7),
        "crop": lambda m, x, e: F.pad(x, (-1, 1)),
        "repeat": lambda m, x, e: x.repeat(*[1] * len(shape), 2),
        "repeat_interleave": lambda m, x, e: x.repeat_interleave(2, dim=-1),
        "tile": lambda m, x, e: x.tile(2),
        "unfold": lambda m, x, e: x.unfold(-1, 2, 1).flatten(-2),
        "unfold_mean": lambda m, x, e: x.unfold(-1, 2, 1).mean(-1),
        "shuffle": lambda m, x, e: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
        "rotate": lambda m, x, e: torch.cat([-x[..., c // 2 :], x[..., : c // 2]], -1),
        "stack": lambda m, x, e: torch.stack([x, x.tanh()], -1).flatten(-2),
        "expand": lambda m, x, e: x.unsqueeze(-2).expand(*x.shape[:-1], 2, c).reshape(*x.shape[:-1], 2 * c),
    }
    how = rng.choice(list(runs))
    if (how in ("unfold", "unfold_mean", "crop") and c < 2) or (how == "shuffle" and c % 2):
        return None
    return Block(how, runs[how], order=order, some=some)


@block("rows tokens", weight=3)
def features_parted(rng: Random, shape: Shape) -> Block:
    """Channels that go separate ways and meet again."""
    c, (name, f) = shape[-1], activation(rng)
    if c < 2:
        return None
    first, half = rng.randint(1, c - 1), c // 2
    how = rng.choice(("split", "chunk", "slices", "unbind", "select", "tensor_split"))
    a, b = nn.Linear(first, width(rng)), nn.Linear(c - first, c)

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        if how == "chunk":
            left, right = x[..., : 2 * half].chunk(2, dim=-1)
            return torch.cat((f(left) * right, left), dim=-1)
        if how == "unbind":
            parts = x.unbind(-1)
            return torch.stack([parts[0], f(parts[-1]), parts[c // 2] + 1], dim=-1)
        if how == "select":
            return m.b(x[..., first:]) * x.select(-1, 0).unsqueeze(-1)
        if how == "slices":
            return torch.cat([f(m.a(x[..., :first])), m.b(x[..., first:])], -1)
        left, right = x.split([first, c - first], -1) if how == "split" else x.tensor_split([first], -1)
        return torch.cat([f(m.a(left)), x, m.b(right)], -1)

    return Block(f"{how} {name}", run, a=a, b=b)


@block("rows tokens", weight=3)
def dense_concat(rng: Random, shape: Shape) -> Block:
    c, (name, f) = shape[-1], activation(rng)
    return Block(
        name, lambda m, x, e: torch.cat([x, f(m.a(x)), m.b(x)], -1), a=nn.Linear(c, width(rng)), b=nn.Linear(c, 2)
    )


@block("rows tokens")
def grouped_features(rng: Random, shape: Shape) -> Block:
    """Channels seen as groups: reduced, normalized or mixed within them."""
    c = shape[-1]
    groups = divisor(rng, c)
    size = c // groups
    written = chance(rng)

    def parted(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], groups, size) if written else x.unflatten(-1, (groups, -1))

    runs: dict[str, Run] = {
        "mean": lambda m, x, e: parted(x).mean(-1),
        "sum": lambda m, x, e: parted(x).sum(-2),
        "amax": lambda m, x, e: parted(x).amax(-1),
        "max": lambda m, x, e: parted(x).max(-1).values,
        "norm": lambda m, x, e: F.layer_norm(parted(x), (size,)).flatten(-2),
        "softmax": lambda m, x, e: parted(x).softmax(-1).flatten(-2),
        "square": lambda m, x, e: (parted(x) @ parted(x).transpose(-1, -2)).flatten(-2),
        "weighted": lambda m, x, e: (parted(x) @ m.weight).reshape(*x.shape[:-1], -1),
        "std": lambda m, x, e: (parted(x).var(-1, unbiased=False) + 0.1).sqrt(),
    }
    how = rng.choice(list(runs))
    return Block(f"{how} of {groups} groups, written {written}", runs[how], weight=parameter(size, rng.choice((2, 3))))


@block("rows tokens")
def outer_product(rng: Random, shape: Shape) -> Block:
    h = rng.choice((2, 3))
    how = rng.choice(("einsum", "broadcast", "matmul", "sum"))
    runs: dict[str, Run] = {
        "einsum": lambda m, x, e: torch.einsum("...i,...j->...ij", m.a(x), m.b(x).sigmoid()).flatten(-2),
        "broadcast": lambda m, x, e: (m.a(x).unsqueeze(-1) * m.b(x).unsqueeze(-2)).flatten(-2),
        "matmul": lambda m, x, e: torch.matmul(m.a(x)[..., None], m.b(x)[..., None, :]).flatten(-2),
        "sum": lambda m, x, e: torch.einsum("...i,...j->...j", m.a(x).sigmoid(), m.b(x)),
        "three": lambda m, x, e: torch.einsum(
            "bi,kij,bj->bk" if x.dim() == 2 else "bti,kij,btj->btk", m.a(x), m.form, m.b(x)
        ),
    }
    return Block(how, runs[how], a=nn.Linear(shape[-1], h), b=nn.Linear(shape[-1], 3), form=parameter(4, h, 3))


@block("rows tokens")
def ranking(rng: Random, shape: Shape) -> Block:
    dim = rng.choice((-1, 1))
    n = shape[-1] if dim == -1 else shape[0]
    k = rng.randint(1, n)
    runs: dict[str, Run] = {
        "topk": lambda m, x, e: x.topk(k, dim).values,
        "sort": lambda m, x, e: x.sort(dim, descending=True)[0],
        "max": lambda m, x, e: x - x.max(dim, keepdim=True).values,
        "kthvalue": lambda m, x, e: x * x.kthvalue(k, dim, keepdim=True)[0],
        "cumsum": lambda m, x, e: x.cumsum(dim),
        "logsumexp": lambda m, x, e: x - x.logsumexp(dim, keepdim=True),
        "centre": lambda m, x, e: x - x.mean(dim, keepdim=True),
        "total": lambda m, x, e: x / (1 + x.abs().sum(dim, keepdim=True)),
        "amin": lambda m, x, e: x + x.amin(dim, keepdim=True),
        "cummax": lambda m, x, e: x.cummax(dim).values,
        "cumprod": lambda m, x, e: x + x.cumprod(dim),
        "logcumsumexp": lambda m, x, e: x.logcumsumexp(dim),
        "quantile": lambda m, x, e: x - x.quantile(0.3, dim, keepdim=True),
        "aminmax": lambda m, x, e: x.clamp(max=0.5) * torch.aminmax(x, dim=dim, keepdim=True).max,
    }
    how = rng.choice(list(runs))
    return Block(f"{how} along {dim}", runs[how])


@block("rows tokens")
def created(rng: Random, shape: Shape) -> Block:
    """Tensors that the forward makes from nothing."""
    c = shape[-1]
    runs: dict[str, Run] = {
        "zeros": lambda m, x, e: torch.cat([x, torch.zeros(*x.shape[:-1], 2, dtype=x.dtype)], -1),
        "ones": lambda m, x, e: torch.cat([x.new_ones(*x.shape[:-1], 1), x], -1),
        "arange": lambda m, x, e: x + 0.1 * torch.arange(x.shape[-1]),
        "written_arange": lambda m, x, e: x * torch.arange(1, c + 1) / c,
        "full_like": lambda m, x, e: x * torch.full_like(x, 0.7) + torch.ones_like(x),
        "linspace": lambda m, x, e: x - torch.linspace(-1, 1, c, dtype=x.dtype),
        "eye": lambda m, x, e: x @ (torch.eye(c, dtype=x.dtype) + torch.ones(c, c, dtype=x.dtype)),
        "triangle": lambda m, x, e: x @ torch.ones(c, c, dtype=x.dtype).tril(),
        "empty_branch": lambda m, x, e: x + torch.zeros(c, dtype=x.dtype),
    }
    how = rng.choice(list(runs))
    return Block(how, runs[how])


@block("rows tokens", weight=3)
def written_in_place(rng: Random, shape: Shape) -> Block:
    """Parts of a tensor that are overwritten, or added to, at places known beforehand."""
    c, (name, f) = shape[-1], activation(rng)
    k = rng.randint(1, c)
    some = indices(rng, c, k)
    how = rng.choice(("slice", "index", "index_add", "index_copy", "scatter", "scatter_add", "accumulate", "select"))

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        update, places = f(m.a(x)), m.some.expand(*x.shape[:-1], -1)
        if how == "index_add":
            return x.index_add(-1, m.some, update)
        if how == "index_copy":
            return x.index_copy(-1, m.some, update)
        if how == "scatter":
            return torch.zeros_like(x).scatter(-1, places, update) + m.bias
        if how == "scatter_add":
            return x.scatter_add(-1, places, update)
        y = x.clone()
        if how == "slice":
            y[..., :k] = update
        elif how == "select":
            y[..., 0] = update[..., 0] * 2
        elif how == "accumulate":
            y[..., m.some] += update
        else:
            y[..., m.some] = update
        return y

    return Block(f"{how} {name}", run, a=nn.Linear(c, k), bias=parameter(c), some=some)


@block("rows", weight=3)
def cell(rng: Random, shape: Shape) -> Block:
    c, h, how = shape[0], width(rng), rng.choice(("lstm", "gru", "rnn", "relu"))
    bias, start, steps = chance(rng, 0.8), rng.choice(("zero", "computed", "parameter")), rng.choice((1, 2))
    layer: nn.Module = {
        "lstm": lambda: nn.LSTMCell(c, h, bias),
        "gru": lambda: nn.GRUCell(c, h, bias),
        "rnn": lambda: nn.RNNCell(c, h, bias),
        "relu": lambda: nn.RNNCell(c, h, bias, nonlinearity="relu"),
    }[how]()

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        state: Any = None
        if start != "zero":
            first = m.start(x) if start == "computed" else m.first.expand(x.shape[0], -1)
            state = (first, first.tanh()) if how == "lstm" else first
        for _ in range(steps):
            state = m.layer(x, state)
        return (state[0] + state[1]) if how == "lstm" else state

    return Block(f"{how}, {start} state, {steps} steps", run, layer=layer, start=nn.Linear(c, h), first=parameter(h))


# Tokens


@block("tokens", weight=3)
def recurrence(rng: Random, shape: Shape) -> Block:
    return _recurrent(rng, shape, "output")


@block("tokens", "rows", weight=3)
def last_state(rng: Random, shape: Shape) -> Block:
    return _recurrent(rng, shape, rng.choice(("hidden", "cell", "both", "states")))


def _recurrent(rng: Random, shape: Shape, reads: str) -> Block:
    c, h = shape[-1], rng.choice((2, 3, 4, 5))
    how = rng.choice(("LSTM", "LSTM", "GRU", "RNN"))
    layers, both, first = rng.choice((1, 1, 2)), chance(rng, 0.3), chance(rng, 0.7)
    projected = rng.randint(1, h - 1) if how == "LSTM" and chance(rng, 0.3) else 0
    options: dict[str, Any] = {"proj_size": projected} if projected else {}
    if how == "RNN":
        options["nonlinearity"] = rng.choice(("tanh", "relu"))
    given = chance(rng, 0.2)
    rnn = getattr(nn, how)(
        c,
        h,
        layers,
        bias=chance(rng, 0.8),
        batch_first=first,
        bidirectional=both,
        dropout=0.3 * (layers > 1),
        **options,
    )

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        state: Any = None
        if given:
            start = m.start.unsqueeze(1).expand(-1, x.shape[0 if first else 1], -1)
            state = (start[..., : projected or h].contiguous(), start.contiguous()) if how == "LSTM" else start
        out, ends = m.rnn(x, state)
        hidden, cells = ends if how == "LSTM" else (ends, ends)
        if reads == "output":
            return out if first else out.transpose(0, 1)
        if reads == "hidden":
            return torch.cat([hidden[-2], hidden[-1]], 1) if both else hidden[-1]
        if reads == "cell":
            return cells[-1]
        if reads == "states":
            return hidden.transpose(0, 1).flatten(1)
        return torch.cat([out.mean(1 if first else 0), hidden[-1]], -1)

    says = f"{how} {h}, {layers} layers, both {both}, projected {projected}, start {given}, reads {reads}"
    return Block(says, run, rnn=rnn, start=parameter(layers * (1 + both), h))


def fused_heads(qkv: Tensor, how: str, heads: int, d: int) -> list[Tensor]:
    """Take queries, keys and values ``(batch, heads, tokens, d)`` out of one projection."""
    if how == "chunk":
        return [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1)]
    if how == "view":
        t = qkv.view(qkv.shape[0], qkv.shape[1], 3, heads, d).permute(2, 0, 3, 1, 4)
        return [t[0], t[1], t[2]]
    return list(qkv.reshape(*qkv.shape[:2], heads, 3 * d).transpose(1, 2).split(d, -1))


def separate_heads(m: Any, x: Tensor, grouped: str, shared: int, d: int) -> list[Tensor]:
    """Project to queries, keys and values; several query heads may share keys and values."""
    q, k, v = (layer(x).view(*x.shape[:2], -1, d).transpose(1, 2) for layer in (m.q, m.k, m.v))
    if grouped == "repeat_interleave":
        k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
    elif grouped == "expand":
        k, v = (t[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for t in (k, v))
    return [q, k, v]


@block("tokens", weight=5)
def attention(rng: Random, shape: Shape) -> Block:
    """Scaled dot-product attention."""
    tokens, c = shape
    shared = rng.choice((1, 1, 1, 2, 3))
    keys = rng.choice((1, 2, 3)) if shared == 1 else rng.choice((1, 2))
    heads, d = keys * shared, rng.choice((2, 3, 4))
    fused = rng.choice(("chunk", "view", "unbind", "")) if shared == 1 else ""
    masked = rng.choice(("none", "none", "causal", "bool", "float", "extra"))
    scale = rng.choice((None, None, 0.4))
    grouped = rng.choice(("enable_gqa", "repeat_interleave", "expand")) if shared > 1 else ""
    bias = chance(rng, 0.7)
    allowed = mask(rng, tokens, tokens) | torch.eye(tokens, dtype=torch.bool)

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        q, k, v = fused_heads(m.qkv(x), fused, heads, d) if fused else separate_heads(m, x, grouped, shared, d)
        masks: dict[str, Callable[[], dict[str, Any]]] = {
            "none": dict,
            "causal": lambda: {"is_causal": True},
            "bool": lambda: {"attn_mask": m.allowed},
            "float": lambda: {"attn_mask": torch.where(m.allowed, m.slopes[:, None, None], -torch.inf)},
            "extra": lambda: {"attn_mask": (torch.arange(x.shape[1]) <= e[:, None])[:, None, None]},
        }
        options = masks[masked]()
        if scale is not None:
            options["scale"] = scale
        if grouped == "enable_gqa":
            options["enable_gqa"] = True
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return m.o(y.transpose(1, 2).flatten(2))

    units = {"qkv.weight": torch.arange(heads).repeat_interleave(d).repeat(3)}
    if fused == "unbind":
        units = {"qkv.weight": torch.arange(heads).repeat_interleave(3 * d)}
    parts: dict[str, nn.Module] = {"qkv": nn.Linear(c, 3 * heads * d, bias=bias)}
    if not fused:
        parts = {n: nn.Linear(c, (heads if n == "q" else keys) * d, bias=bias) for n in "qkv"}
        units = {f"{n}.weight": torch.arange(keys).repeat_interleave(d * (shared if n == "q" else 1)) for n in "qkv"}
    says = f"{heads} heads of {d}, {keys} of keys {grouped}, fused {fused}, mask {masked}, scale {scale}"
    return Block(
        says, run, extra=masked == "extra", units=units, **parts, o=nn.Linear(heads * d, c, bias=bias),
        allowed=allowed, slopes=parameter(heads),
    )  # fmt: skip


@block("tokens", weight=3)
def written_attention(rng: Random, shape: Shape) -> Block:
    """Attention out of products and a softmax."""
    tokens, c = shape
    heads, d = rng.choice((1, 2, 3)), rng.choice((2, 3))
    how = rng.choice(("matmul", "einsum", "baddbmm", "bmm", "linear", "cosine"))
    causal = chance(rng, 0.3)
    bias = chance(rng, 0.7)

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, heads, d) for layer in (m.q, m.k, m.v))
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        if how == "einsum":
            scores = torch.einsum("bihd,bjhd->bhij", q, k) * d**-0.5
            scores = scores.masked_fill(future, -1e4) if causal else scores
            y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
            return m.o(y.reshape(b, t, heads * d))
        q, k, v = (n.transpose(1, 2) for n in (q, k, v))
        if how == "linear":
            q, k = q.softmax(-1), k.softmax(-2)
            return m.o((q @ (k.transpose(-1, -2) @ v)).transpose(1, 2).reshape(b, t, -1))
        if how in ("baddbmm", "bmm"):
            q, k, v = (n.reshape(b * heads, t, d) for n in (q, k, v))
            if how == "baddbmm":
                scores = torch.baddbmm(m.offset.expand(b * heads, t, t), q, k.transpose(1, 2), alpha=d**-0.5)
            else:
                scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(d) + m.offset
            y = torch.bmm(scores.softmax(-1), v).view(b, heads, t, d)
            return m.o(y.transpose(1, 2).reshape(b, t, heads * d))
        if how == "cosine":
            q, k = F.normalize(q, dim=-1, eps=0.1), F.normalize(k, dim=-1, eps=0.1)
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(d))
        scores = scores.masked_fill(future, -torch.inf) if causal else scores
        return m.o((F.dropout(scores.softmax(-1), 0.1, m.training) @ v).permute(0, 2, 1, 3).flatten(2))

    parts: dict[str, nn.Module] = {n: nn.Linear(c, heads * d, bias=bias) for n in "qkv"}
    units = {f"{n}.weight": torch.arange(heads).repeat_interleave(d) for n in "qkv"}
    says = f"{how}, {heads} heads of {d}, causal {causal}"
    return Block(
        says, run, units=units, **parts, o=nn.Linear(heads * d, c, bias=bias), offset=parameter(tokens, tokens)
    )


@block("tokens")
def multihead(rng: Random, shape: Shape) -> Block:
    heads = rng.choice((1, 2, 3))
    c = shape[-1]
    if c % heads:
        return None
    other = chance(rng, 0.3)
    layer = nn.MultiheadAttention(
        c, heads, bias=chance(rng, 0.8), batch_first=True, **({"kdim": 3, "vdim": 2} if other else {})
    )
    weights = chance(rng, 0.3)

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        k, v = (m.k(x), m.v(x)) if other else (x, x)
        return m.layer(x, k, v, need_weights=weights)[0]

    extra = {"k": nn.Linear(c, 3), "v": nn.Linear(c, 2)} if other else {}
    return Block(f"{heads} heads, other {other}, weights {weights}", run, layer=layer, **extra)


@block("tokens")
def cross_attention(rng: Random, shape: Shape) -> Block:
    """Learned queries, which are the same for every input, look at the tokens."""
    c, n, d = shape[-1], rng.choice((1, 2, 3)), rng.choice((2, 4))
    among = chance(rng)

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        q = m.queries.expand(x.shape[0], -1, -1)
        if among:
            q = q + F.scaled_dot_product_attention(q, q, m.a(q))
        return m.o(F.scaled_dot_product_attention(m.q(q), m.k(x), m.v(x)))

    parts = {"q": nn.Linear(c, d), "k": nn.Linear(c, d), "v": nn.Linear(c, d + 1), "o": nn.Linear(d + 1, c)}
    return Block(f"{n} queries, among {among}", run, queries=parameter(1, n, c), a=nn.Linear(c, c), **parts)


@block("tokens", weight=3)
def token_mixing(rng: Random, shape: Shape) -> Block:
    tokens, c = shape
    out, (name, f) = rng.choice((tokens, 2, 4)), activation(rng)
    kernel = rng.choice((1, 3))
    runs: dict[str, tuple[Run, dict[str, Any]]] = {
        "linear": (
            lambda m, x, e: f(m.a(x.transpose(1, 2))).transpose(1, 2),
            {"a": nn.Linear(tokens, out, bias=chance(rng))},
        ),
        "conv": (
            lambda m, x, e: m.a(x.transpose(1, 2)).mT,
            {"a": nn.Conv1d(c, width(rng), kernel, padding=kernel // 2)},
        ),
        "einsum": (lambda m, x, e: torch.einsum("btc,ut->buc", f(x), m.w), {"w": parameter(out, tokens)}),
        "batch_norm": (lambda m, x, e: m.a(x.transpose(1, 2)).transpose(1, 2), {"a": nn.BatchNorm1d(c)}),
        "turned": (lambda m, x, e: torch.einsum("btc,dc->bdt", f(x), m.w), {"w": parameter(out, c)}),
        "sideways": (
            lambda m, x, e: torch.einsum("tk,btc->kbc", m.w, x).transpose(0, 1),
            {"w": parameter(tokens, out)},
        ),
        "matmul": (lambda m, x, e: torch.matmul(m.w, f(x)), {"w": parameter(out, tokens)}),
        "gram": (lambda m, x, e: torch.einsum("bti,btj->bij", x, f(x)), {}),
        "permute": (lambda m, x, e: x.permute(0, 2, 1), {}),
    }
    how = rng.choice(list(runs))
    run, parts = runs[how]
    return Block(f"{how} {name}", run, **parts)


@block("tokens", weight=3)
def tokens_moved(rng: Random, shape: Shape) -> Block:
    tokens, c = shape
    order, k = indices(rng, tokens), rng.randint(1, tokens)
    table = nn.Embedding(tokens, c)

    def rotary(m: Any, x: Tensor, e: Tensor) -> Tensor:
        speeds = 0.5 ** torch.arange(c // 2, dtype=x.dtype)
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * speeds
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    runs: dict[str, Run] = {
        "class_token": lambda m, x, e: torch.cat([m.first.expand(x.shape[0], -1, -1), x], dim=1),
        "position": lambda m, x, e: x + m.position,
        "looked_up": lambda m, x, e: x + m.table(torch.arange(x.shape[1])),
        "flip": lambda m, x, e: x.flip(1),
        "shift": lambda m, x, e: F.pad(x, (0, 0, 1, -1)),
        "roll": lambda m, x, e: x.roll((1, 1), (1, 2)),
        "order": lambda m, x, e: x[:, m.order],
        "take": lambda m, x, e: x[:, :k] * x[:, -1:],
        "kept": lambda m, x, e: x.index_select(1, m.order[:k]),
        "unbind": lambda m, x, e: torch.stack(x.unbind(1)[::-1], 1),
        "half": lambda m, x, e: torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1),
        "merge": lambda m, x, e: x.view(x.shape[0], -1, 2 * c),
        "rewrap": lambda m, x, e: x.reshape(-1, c, tokens),
        "distances": lambda m, x, e: torch.cdist(x, x + m.position, p=1.0).tanh() @ x,
        "fill": lambda m, x, e: x.index_fill(1, m.order[:k], 0.2),
        "windows": lambda m, x, e: x.unfold(1, 2, 1).flatten(2),
        "rotary": rotary,
    }
    how = rng.choice(list(runs))
    if (how == "merge" and tokens % 2) or (how == "rotary" and c % 2) or (how in ("windows", "shift") and tokens < 2):
        return None
    return Block(how, runs[how], first=parameter(1, 1, c), position=parameter(tokens, c), table=table, order=order)


@block("tokens")
def chosen_tokens(rng: Random, shape: Shape) -> Block:
    """Tokens picked, marked or written at places that the second input says."""
    tokens, c = shape
    runs: dict[str, Run] = {
        "gather": lambda m, x, e: x.gather(1, (e % tokens)[:, None, None].expand(-1, 2, c)),
        "mask": lambda m, x, e: x * (torch.arange(x.shape[1]) <= e[:, None])[..., None],
        "masked_fill": lambda m, x, e: x.masked_fill((torch.arange(x.shape[1]) > e[:, None])[..., None], 0.3),
        "where": lambda m, x, e: torch.where((e > 2)[:, None, None], x, m.other),
        "add": lambda m, x, e: x + m.table(e % 4)[:, None],
        "by_data": lambda m, x, e: x + m.table.weight[x.argmax(-1) % 4],
        "film": lambda m, x, e: x * m.table(e % 4).sigmoid().unsqueeze(1),
        "put": lambda m, x, e: x.index_put((torch.arange(x.shape[0]), e % tokens), m.other[0].expand(x.shape[0], -1)),
        "scatter": lambda m, x, e: x.scatter(1, (e % tokens)[:, None, None].expand(-1, 1, c), x[:, :1] * 2),
        "scatter_add": lambda m, x, e: torch.zeros_like(x).scatter_add(
            1, (e % tokens)[:, None, None].expand(-1, tokens, c), x
        ),
        "weights": lambda m, x, e: torch.einsum("bc,bcd->bd", x.mean(1), m.experts[e % 3])[:, None] + x,
        "masked_scatter": lambda m, x, e: x.masked_scatter(
            (torch.arange(x.shape[1]) <= e[:, None])[..., None].expand_as(x), torch.tanh(2 * x - 0.5)
        ),
    }
    how = rng.choice(list(runs))
    table, experts = nn.Embedding(4, c), parameter(3, c, c)
    return Block(how, runs[how], extra=True, other=parameter(tokens, c), table=table, experts=experts)


@block("rows")
def chosen_rows(rng: Random, shape: Shape) -> Block:
    """As `chosen_tokens`, for rows."""
    c = shape[0]
    runs: dict[str, Run] = {
        "gather": lambda m, x, e: x.gather(1, torch.stack([e % c, (e + 1) % c], 1)) + m.shift,
        "one_hot": lambda m, x, e: torch.cat([x, F.one_hot(e % 3, 3).to(x.dtype)], 1),
        "table": lambda m, x, e: torch.cat([m.table(e % 4), x], -1),
        "scale": lambda m, x, e: x * m.table(e % 4),
        "row": lambda m, x, e: x + m.table.weight[e % 4],
        "bag": lambda m, x, e: x + F.embedding_bag(torch.stack([e % 4, (e + 2) % 4], 1), m.table.weight, mode="sum"),
        "pick": lambda m, x, e: x * x[torch.arange(x.shape[0]), e % c].unsqueeze(1),
        "expert": lambda m, x, e: (x.unsqueeze(1) @ m.experts[e % 3]).squeeze(1),
        "put": lambda m, x, e: x.scatter(1, (e % c)[:, None], 0.4),
        "segments": lambda m, x, e: torch.zeros(3, c, dtype=x.dtype).index_add(0, e % 3, x)[e % 3],
        "highest": lambda m, x, e: m.start.scatter_reduce(0, (e % 3)[:, None].expand_as(x), x, "amax")[(e + 1) % 3],
        "averages": lambda m, x, e: m.start.scatter_reduce(0, (e % 3)[:, None].expand_as(x), x, "mean")[(e + 1) % 3],
    }
    how = rng.choice(list(runs))
    parts = {"table": nn.Embedding(4, c), "experts": parameter(3, c, width(rng)), "shift": parameter(2)}
    parts["start"] = parameter(3, c)
    return Block(how, runs[how], extra=True, **parts)


@block("tokens", "rows", weight=4)
def tokens_pooled(rng: Random, shape: Shape) -> Block:
    tokens, c = shape
    runs: dict[str, Run] = {
        "mean": lambda m, x, e: x.mean(1),
        "amax": lambda m, x, e: x.amax(dim=1),
        "max": lambda m, x, e: x.max(1)[0],
        "sum": lambda m, x, e: x.sum(1) * 0.3,
        "first": lambda m, x, e: x[:, 0],
        "last": lambda m, x, e: x[:, -1, :],
        "flatten": lambda m, x, e: x.flatten(1),
        "view": lambda m, x, e: x.reshape(x.shape[0], tokens * c),
        "logsumexp": lambda m, x, e: x.logsumexp(1),
        "weighted": lambda m, x, e: (x * m.score(x).softmax(1)).sum(1),
        "product": lambda m, x, e: (m.score(x).softmax(1).transpose(1, 2) @ x).squeeze(1),
        "topk": lambda m, x, e: x.topk(min(2, tokens), dim=1).values.mean(1),
        "channels": lambda m, x, e: x.sum(-1),
    }
    how = rng.choice(list(runs))
    return Block(how, runs[how], score=nn.Linear(c, 1))


# Signals and images: channels on axis 1


def _dims(shape: Shape) -> int:
    return len(shape) - 1


def _of(name: str, shape: Shape) -> Any:
    return getattr(nn, f"{name}{_dims(shape)}d")


def _norm_of(rng: Random, shape: Shape, c: int) -> nn.Module:
    how = rng.choice(("none", "batch", "batch", "group", "instance"))
    if how == "batch":
        return _of("BatchNorm", shape)(c, affine=chance(rng, 0.9))
    if how == "group":
        return nn.GroupNorm(divisor(rng, c), c, affine=chance(rng, 0.9))
    if how == "instance" and math.prod(shape[1:]) > 1:
        return _of("InstanceNorm", shape)(c, affine=chance(rng))
    return nn.Identity()


@block("signals images", weight=8)
def conv(rng: Random, shape: Shape) -> Block:
    c, (name, f) = shape[0], activation(rng)
    out, kernel, stride = width(rng), rng.choice((1, 2, 3)), rng.choice((1, 1, 2))
    groups = rng.choice([1, 1, *(g for g in (2, 3, c) if c % g == 0)])
    out = max(1, out // groups) * groups
    padding = rng.choice((0, kernel // 2, kernel // 2))
    mode = rng.choice(("zeros", "zeros", "reflect", "circular", "replicate")) if padding else "zeros"
    bias, dilation = chance(rng, 0.6), rng.choice((1, 1, 1, 2))
    if stride == 1 and kernel != 2 and chance(rng, 0.1):
        padding, mode = "same", "zeros"
    layer = _of("Conv", shape)(c, out, kernel, stride, padding, dilation, groups, bias, mode)
    says = f"{c}->{out}, kernel {kernel}, stride {stride}, padding {padding} {mode}, groups {groups}, bias {bias}"
    return Block(
        f"{says}, {name}", lambda m, x, e: f(m.norm(m.layer(x))), layer=layer, norm=_norm_of(rng, (0, *shape[1:]), out)
    )


@block("signals images", weight=3)
def transposed_conv(rng: Random, shape: Shape) -> Block:
    c, (name, f) = shape[0], activation(rng)
    groups = rng.choice([1, 1, *(g for g in (2, c) if c % g == 0)])
    out, kernel, stride = max(1, width(rng) // groups) * groups, rng.choice((1, 2, 3)), rng.choice((1, 2))
    layer = _of("ConvTranspose", shape)(
        c, out, kernel, stride, padding=rng.choice((0, 0, 1)), groups=groups, bias=chance(rng)
    )
    return Block(f"{c}->{out}, groups {groups}, {name}", lambda m, x, e: f(m.layer(x)), layer=layer)


@block("signals images", weight=3)
def conv_residual(rng: Random, shape: Shape) -> Block:
    c, hidden, (name, f) = shape[0], width(rng), activation(rng)
    how = rng.choice(("basic", "depthwise", "bottleneck"))
    make = _of("Conv", shape)
    bias = chance(rng)
    if how == "depthwise":
        layers = [make(c, hidden, 1), make(hidden, hidden, 3, padding=1, groups=hidden, bias=bias), make(hidden, c, 1)]
    elif how == "basic":
        layers = [make(c, hidden, 3, padding=1, bias=bias), nn.Identity(), make(hidden, c, 3, padding=1, bias=bias)]
    else:
        layers = [make(c, hidden, 1, bias=bias), make(hidden, hidden, 3, padding=1), make(hidden, c, 1)]
    parts = {"a": layers[0], "b": layers[1], "c": layers[2]}
    norms = {"na": _norm_of(rng, shape, hidden), "nb": _norm_of(rng, shape, hidden), "nc": _norm_of(rng, shape, c)}
    return Block(
        f"{how} {hidden} {name}",
        lambda m, x, e: f(x + m.nc(m.c(f(m.nb(m.b(f(m.na(m.a(x)))))))) if how != "basic" else x + m.c(f(m.na(m.a(x))))),
        **parts,
        **norms,
    )


@block("signals images", weight=2)
def channel_norm(rng: Random, shape: Shape) -> Block:
    c, how = shape[0], rng.choice(("given", "last", "written"))
    if how == "given":
        return Block(how, lambda m, x, e: m.norm(x), norm=_norm_of(rng, shape, c))
    if how == "last":
        return Block(how, lambda m, x, e: m.norm(x.transpose(1, -1)).transpose(1, -1), norm=nn.LayerNorm(c))

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        y = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-3).sqrt()
        return y * m.scale.view(c, *[1] * _dims(shape))

    return Block(how, run, scale=parameter(c))


@block("signals images", weight=2)
def squeeze_excite(rng: Random, shape: Shape) -> Block:
    c, hidden, (name, f) = shape[0], width(rng), activation(rng)
    convs = chance(rng)
    make: Any = (lambda a, b: _of("Conv", shape)(a, b, 1)) if convs else nn.Linear

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        y = x.flatten(2).mean(2)
        y = y.view(*y.shape, *[1] * _dims(shape)) if convs else y
        y = m.up(f(m.down(y))).sigmoid()
        return x * (y if convs else y.view(-1, c, *[1] * _dims(shape)))

    return Block(f"{hidden} {name}, convs {convs}", run, down=make(c, hidden), up=make(hidden, c))


@block("signals images", weight=4)
def pooled(rng: Random, shape: Shape) -> Block:
    d, c = _dims(shape), shape[0]
    runs: dict[str, Run] = {
        "max": lambda m, x, e: getattr(F, f"max_pool{d}d")(x, 2),
        "max_padded": lambda m, x, e: getattr(F, f"max_pool{d}d")(x, 3, 2, 1),
        "avg": lambda m, x, e: getattr(F, f"avg_pool{d}d")(x, 2),
        "avg_padded": lambda m, x, e: getattr(F, f"avg_pool{d}d")(x, 3, 1, 1),
        "adaptive": lambda m, x, e: getattr(F, f"adaptive_avg_pool{d}d")(x, 2),
        "adaptive_max": lambda m, x, e: getattr(F, f"adaptive_max_pool{d}d")(x, 2),
        "nearest": lambda m, x, e: F.interpolate(x, scale_factor=2),
        "smooth": lambda m, x, e: F.interpolate(x, scale_factor=2, mode="bilinear" if d == 2 else "linear"),
        "global": lambda m, x, e: x - x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
        "scan": lambda m, x, e: x.cumsum(-1),
        "across": lambda m, x, e: x * x.amax(1, keepdim=True),
        "lp": lambda m, x, e: getattr(F, f"lp_pool{d}d")(x, 2.0, 2),
        "spatial_softmax": lambda m, x, e: x.flatten(2).softmax(-1).view(x.shape),
        "local_contrast": lambda m, x, e: x / (1 + F.avg_pool2d(x.unsqueeze(1).flatten(3), (3, 1), 1, (1, 0)).mean()),
    }
    how = rng.choice([n for n in runs if n != "local_contrast" or c > 2])
    return Block(how, runs[how])


@block("signals images", weight=4)
def channels_moved(rng: Random, shape: Shape) -> Block:
    d, c = _dims(shape), shape[0]
    order, k = indices(rng, c), rng.randint(1, c)
    runs: dict[str, Run] = {
        "pad": lambda m, x, e: F.pad(x, (1, 1)),
        "pad_value": lambda m, x, e: F.pad(x, (0, 1), value=0.6),
        "pad_reflect": lambda m, x, e: F.pad(x, (1, 1) * d, mode="reflect"),
        "exact": lambda m, x, e: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
        "pad_channels": lambda m, x, e: F.pad(x, (0, 0) * d + (1, 1)),
        "flip": lambda m, x, e: x.flip(-1),
        "roll": lambda m, x, e: torch.roll(x, (1, 1), (1, 2)),
        "order": lambda m, x, e: x[:, m.order],
        "some": lambda m, x, e: x[:, m.order[:k]],
        "slice": lambda m, x, e: x[:, :k] + x[:, c - k :],
        "stride": lambda m, x, e: x[..., ::2],
        "repeat": lambda m, x, e: x.repeat(1, 2, *[1] * d),
        "interleave": lambda m, x, e: x.repeat_interleave(2, 1),
        "shuffle": lambda m, x, e: x.view(x.shape[0], 2, c // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
        "chunk": lambda m, x, e: torch.cat([n.sigmoid() for n in x.chunk(2, 1)[::-1]], dim=1),
        "glu": lambda m, x, e: F.glu(x, 1),
        "split": lambda m, x, e: torch.cat([x.split([k, c - k], 1)[0], x.tanh()], 1),
        "stacked": lambda m, x, e: torch.stack([x, x.relu()]).amax(0),
        "index_add": lambda m, x, e: x.index_add(1, m.order, x),
        "put": lambda m, x, e: x.index_copy(1, m.order[:k], x[:, :k] * 2),
        "scale": lambda m, x, e: x * m.scale.view(-1, *[1] * d) + m.shift.unflatten(0, (c, *[1] * d)),
        "mask": lambda m, x, e: x * m.keep.view(c, *[1] * d),
        "coordinates": lambda m, x, e: torch.cat(
            [x, torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).expand(x.shape[0], 1, *x.shape[2:])], 1
        ),
        "rotated": lambda m, x, e: torch.rot90(x, 1, (2, 3)),
        "pixel_unshuffle": lambda m, x, e: F.pixel_unshuffle(x, 2),
        "pixel_shuffle": lambda m, x, e: F.pixel_shuffle(x, 2),
        "transpose": lambda m, x, e: x.transpose(2, 3),
        "patches": lambda m, x, e: F.unfold(x, 2).unflatten(2, (shape[1] - 1, shape[2] - 1)),
        "folded": lambda m, x, e: F.fold(F.unfold(x, 2, padding=1).tanh(), x.shape[2:], 2, padding=1),
        "unpooled": lambda m, x, e: F.max_unpool2d(
            *F.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape[2:]
        ),
        "sampled": lambda m, x, e: F.grid_sample(x, x[:, :1].movedim(1, -1) + m.points, align_corners=False),
        "warped": lambda m, x, e: F.grid_sample(
            x,
            F.affine_grid(m.turn.expand(len(x), 2, 3), [*x.shape], align_corners=False),
            padding_mode="border",
            align_corners=False,
        ),
        "channel_shuffle": lambda m, x, e: F.channel_shuffle(x, 2),
    }
    images = ("rotated", "pixel_unshuffle", "pixel_shuffle", "transpose", "patches", "channel_shuffle")
    images += ("folded", "unpooled", "sampled", "warped")
    even = ("shuffle", "glu", "channel_shuffle")
    names = [
        n
        for n in runs
        if not (n in images and d == 1) and not (n in even and c % 2) and not (n == "pixel_shuffle" and c % 4)
    ]
    how = rng.choice(names)
    parts = {"scale": parameter(c), "shift": parameter(c), "keep": mask(rng, c)}
    parts |= {"points": parameter(2), "turn": parameter(2, 3)}
    return Block(how, runs[how], order=order, **parts)


@block("signals images", weight=3)
def conv_concat(rng: Random, shape: Shape) -> Block:
    c, (name, f) = shape[0], activation(rng)
    make = _of("Conv", shape)
    a, b = make(c, width(rng), 3, padding=1), make(c, 2, 1, bias=chance(rng))
    return Block(name, lambda m, x, e: torch.cat([f(m.a(x)), x, m.b(x)], 1), a=a, b=b)


@block("signals images", weight=2)
def conv_gated(rng: Random, shape: Shape) -> Block:
    c, out, (name, f) = shape[0], width(rng), activation(rng)
    make = _of("Conv", shape)
    how = rng.choice(("product", "normed", "attention"))

    def run(m: Any, x: Tensor, e: Tensor) -> Tensor:
        if how == "attention":
            q, k, v = m.a(x).flatten(2), m.b(x).flatten(2), m.v(x).flatten(2)
            y = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
            return x + y.view(x.shape)
        return f(m.a(x)) * m.b(x)

    b = make(c, out, 1)
    parts = {"a": make(c, out, 1), "b": weight_norm(b) if how == "normed" else b, "v": make(c, c, 1)}
    return Block(f"{how} {name}", run, **parts)


@block("signals images", "rows", weight=4)
def channels_pooled(rng: Random, shape: Shape) -> Block:
    c = shape[0]
    over = tuple(range(2, 2 + _dims(shape)))
    runs: dict[str, Run] = {
        "mean": lambda m, x, e: x.mean(over),
        "amax": lambda m, x, e: x.amax(over),
        "flatten": lambda m, x, e: x.flatten(1),
        "view": lambda m, x, e: x.reshape(-1, math.prod(shape)),
        "both": lambda m, x, e: torch.cat([x.flatten(2).mean(-1), x.flatten(2).max(-1).values], 1),
        "adaptive": lambda m, x, e: getattr(F, f"adaptive_avg_pool{_dims(shape)}d")(x, 1).view(-1, c),
        "corner": lambda m, x, e: x[(..., *[0] * _dims(shape))],
        "gram": lambda m, x, e: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).flatten(1) / math.prod(shape[1:]),
        "scores": lambda m, x, e: x.sum(1).flatten(1),
        "squeeze": lambda m, x, e: F.avg_pool2d(x, x.shape[-2:])[:, :, 0, 0],
    }
    how = rng.choice([n for n in runs if n != "squeeze" or _dims(shape) == 2])
    return Block(how, runs[how])


@block("signals images", "tokens", weight=3)
def as_tokens(rng: Random, shape: Shape) -> Block:
    c, how = shape[0], rng.choice(("flatten", "view", "permute"))
    runs: dict[str, Run] = {
        "flatten": lambda m, x, e: x.flatten(2).transpose(1, 2),
        "view": lambda m, x, e: x.view(x.shape[0], c, -1).permute(0, 2, 1),
        "permute": lambda m, x, e: x.movedim(1, -1).reshape(x.shape[0], -1, c),
    }
    return Block(how, runs[how])


@block("tokens", "signals")
def as_signals(rng: Random, shape: Shape) -> Block:
    return Block("", lambda m, x, e: x.transpose(1, 2))


@block("tokens", "images")
def as_images(rng: Random, shape: Shape) -> Block | None:
    tokens, c = shape
    if tokens not in (4, 6, 9):
        return None
    high = 3 if tokens == 9 else 2
    return Block("", lambda m, x, e: x.transpose(1, 2).reshape(x.shape[0], c, high, tokens // high))


@block("rows", "tokens")
def rows_as_tokens(rng: Random, shape: Shape) -> Block:
    c = shape[0]
    how = rng.choice(("each", "repeated", "grouped", "multiplied"))
    runs: dict[str, Run] = {
        "each": lambda m, x, e: x.unsqueeze(-1) * m.directions + m.position,
        "repeated": lambda m, x, e: x.unsqueeze(1).repeat(1, 3, 1) + m.three,
        "grouped": lambda m, x, e: m.grow(x).view(-1, 3, 4),
        "multiplied": lambda m, x, e: torch.einsum("bc,tcd->btd", x, m.maps),
    }
    parts = {"directions": parameter(c, 3), "position": parameter(c, 3), "three": parameter(3, c)}
    return Block(how, runs[how], grow=nn.Linear(c, 12), maps=parameter(3, c, 2), **parts)


@block("rows", "images")
def rows_as_images(rng: Random, shape: Shape) -> Block:
    return Block("", lambda m, x, e: m.grow(x).unflatten(1, (3, 2, 2)), grow=nn.Linear(shape[0], 12))


# Blocks made of blocks


def drop_unused(made: Block, y: Tensor) -> None:
    """Delete the parameters and layers that the result does not depend on, as one of several variants needs few."""
    named = dict(made.named_parameters())
    if not named or not y.requires_grad:
        used: set[str] = set()
    else:
        grads = torch.autograd.grad(y.sum(), list(named.values()), allow_unused=True)
        used = {n for (n, g) in zip(named, grads, strict=True) if g is not None}
    for name in {n.partition(".")[0] for n in named} - {n.partition(".")[0] for n in used}:
        delattr(made, name)


class Chain(nn.Module):
    """Blocks one after another."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        for step in self.blocks:
            x = step(x, extra)
        return x


class Join(nn.Module):
    """Two ways of the same value that meet again; a missing one is the value itself."""

    def __init__(self, how: str, left: nn.Module, right: nn.Module | None) -> None:
        super().__init__()
        self.how, self.left, self.right = how, left, right

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        a, b = self.left(x, extra), x if self.right is None else self.right(x, extra)
        if self.how == "sum":
            return a + b
        if self.how == "product":
            return a * b.sigmoid()
        if self.how == "maximum":
            return torch.maximum(a, b)
        if self.how == "mean":
            return torch.stack([a, b]).mean(0)
        return torch.cat([a, b], 1 if self.how == "cat" else -1)

    def extra_repr(self) -> str:
        return self.how


class Twice(nn.Module):
    """The same modules applied twice, to what they gave before."""

    def __init__(self, shared: nn.Module, between: str) -> None:
        super().__init__()
        self.shared, self.between = shared, between

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.shared(ACTIVATIONS[self.between](self.shared(x, extra)), extra)

    def extra_repr(self) -> str:
        return self.between


class RandomModel(nn.Module):
    """A drawn model: an embedding where the input holds tokens, blocks, and what it returns.

    Args:
        entry: The embedding, or ``None``.
        steps: The blocks.
        returns: ``"last"``, ``"pair"`` (with an intermediate value), ``"dict"``, or ``"tied"`` (times the embedding).
        middle: After how many steps the intermediate value is taken.
    """

    def __init__(self, entry: nn.Embedding | None, steps: list[nn.Module], returns: str, middle: int) -> None:
        super().__init__()
        self.entry, self.steps, self.returns, self.middle = entry, nn.ModuleList(steps), returns, middle

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        given = torch.zeros(x.shape[0], dtype=torch.int64) if extra is None else extra
        if self.entry is not None:
            x = self.entry(x)
        between = x
        for i, step in enumerate(self.steps):
            x = step(x, given)
            if i == self.middle:
                between = x
        if self.returns == "tied" and self.entry is not None:
            return F.linear(x, self.entry.weight)
        if self.returns == "dict":
            return {"last": x, "between": between.mean(-1)}
        return (x, between) if self.returns == "pair" else x

    def extra_repr(self) -> str:
        return f"returns {self.returns}, middle {self.middle}"


START: dict[str, tuple[Shape, ...]] = {
    "rows": ((4,), (6,), (3,)),
    "tokens": ((4, 4), (3, 6), (5, 3)),
    "signals": ((3, 6), (4, 5)),
    "images": ((3, 4, 4), (2, 5, 5), (4, 6, 6)),
}


class Builder:
    """Draws blocks that fit what flows through a model, by running each on a sample."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def grow(self, kind: str, x: Tensor, count: int, depth: int = 0) -> tuple[list[nn.Module], str, Tensor]:
        """Draw ``count`` blocks from a sample on; return them, the kind and the sample that they give."""
        steps: list[nn.Module] = []
        while len(steps) < count:
            step, gives = self._draw(kind, x, depth)
            y = self._try(step, x) if step is not None else None
            if step is not None and y is not None:
                steps.append(step)
                kind, x = gives, y
        return steps, kind, x

    def _draw(self, kind: str, x: Tensor, depth: int) -> tuple[nn.Module | None, str]:
        if depth == 0 and chance(self.rng, 0.25):
            return self._compose(kind, x), kind
        fitting = [n for n, r in RECIPES.items() if kind in r.takes]
        [name] = self.rng.choices(fitting, [RECIPES[n].weight for n in fitting])
        made = RECIPES[name].make(self.rng, tuple(x.shape[1:]))
        if made is not None:
            made.name = name
        return made, RECIPES[name].gives or kind

    def _compose(self, kind: str, x: Tensor) -> nn.Module | None:
        """Draw a sum, product or concatenation of two ways, or modules that are used twice."""
        steps, gives, y = self.grow(kind, x, self.rng.choice((1, 2)), 1)
        if gives != kind:
            return None
        channels = 1 if kind in ("signals", "images") else -1
        how = self.rng.choice(("sum", "sum", "product", "maximum", "mean", "cat", "cat_last", "twice"))
        if how == "twice":
            name = self.rng.choice(list(ACTIVATIONS))
            return Twice(Chain(steps), name) if y.shape == x.shape else None
        if how == "cat":
            how = "cat" if channels == 1 or kind == "rows" else "cat_last"
        left, right, other = Chain(steps), None, x
        if chance(self.rng):
            more, also, other = self.grow(kind, x, 1, 1)
            if also != kind:
                return None
            right = Chain(more)
        if how.startswith("cat") or y.shape == other.shape:
            return Join(how, left, right)
        rest = [a for a in range(1, x.dim()) if a != channels % x.dim()]
        if any(y.shape[a] != other.shape[a] for a in rest):
            return None
        make = nn.Linear if channels == -1 else _of("Conv", tuple(x.shape[1:]))
        fit = make(y.shape[channels], other.shape[channels], *([] if channels == -1 else [1]))
        mend = Block(f"to {other.shape[channels]}", lambda m, v, e: m.layer(v), layer=fit)
        mend.name = "fit"
        return Join(how, Chain([*steps, mend]), right)

    def _try(self, step: nn.Module, x: Tensor) -> Tensor | None:
        """Run a block on a sample; ``None`` if it does not fit there, or gives nothing or too much."""
        try:
            with torch.enable_grad():
                y = step.eval()(x, torch.arange(len(x)))
                if isinstance(step, Block) and isinstance(y, Tensor):
                    drop_unused(step, y)
                    y = y.detach()
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return None
        fits = isinstance(y, Tensor) and len(y) == len(x) and y.dim() > 1 and 0 < y[0].numel() <= 240
        return y if fits and min(y.shape[1:]) > 0 and max(y.shape[1:]) <= 48 else None


HEADS = {"rows": "linear", "tokens": "linear", "signals": "conv", "images": "conv"}


@torch.no_grad()
def random_model(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a random model in eval mode, with no bias or norm parameter that is zero or one, and example inputs."""
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = rng.choice(["tokens", *START])
        shape, batch = rng.choice(START[kind]), rng.choice((2, 3))
        example = torch.randn(batch, *shape, generator=generator)
        entry, x = None, example
        if kind == "tokens" and chance(rng, 0.4):
            entry = nn.Embedding(7, shape[-1])
            example = torch.randint(7, (batch, shape[0]), generator=generator)
        builder = Builder(rng)
        make = RECIPES[HEADS[kind]].make
        first = make(rng, shape)
        assert first is not None
        first.name = HEADS[kind]
        y = builder._try(first, x)
        steps: list[nn.Module] = [first] if y is not None else []
        more, kind, y = builder.grow(kind, x if y is None else y, rng.choice((1, 2, 3, 4)))
        steps += more
        returns = rng.choice(("last",) * 6 + ("pair", "dict"))
        if entry is not None and kind == "tokens" and y.shape[-1] == shape[-1]:
            returns = "tied"
        elif chance(rng, 0.9) or not any(True for m in steps for _ in m.parameters()):
            last, kind, y = builder.grow(kind, y, 1, 1)
            steps += last
            out = width(rng)
            if kind in ("rows", "tokens"):
                head: nn.Module = nn.Linear(y.shape[-1], out, bias=chance(rng, 0.7))
            else:
                head = _of("Conv", tuple(y.shape[1:]))(y.shape[1], out, 1, bias=chance(rng, 0.7))
            steps.append(Block("", lambda m, v, e: m.layer(v), layer=head))
            steps[-1].name = "head"
        model = RandomModel(entry, steps, returns, rng.randrange(len(steps)))
        randomize(model, generator)
        args = (example,)
        if any(m.reads_extra for m in model.modules() if isinstance(m, Block)):
            args = (example, torch.randint(9, (batch,), generator=generator))
    return model.eval(), args


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter and statistic."""
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.copy_(1.2 * noise / max(1, p[0].numel()) ** 0.5)
        else:
            p.copy_((0.2 + noise.abs().clamp(max=1.3)) * noise.sign())
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.5 * torch.randn(b.shape, generator=generator))
        elif name.endswith("running_var"):
            b.copy_(0.5 + torch.rand(b.shape, generator=generator))


def new_inputs(args: tuple[Tensor, ...], seed: int, batch: int) -> tuple[Tensor, ...]:
    """Draw other inputs of the same kind, for another batch size."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, *x.shape[1:], generator=generator)
        if x.is_floating_point()
        else torch.randint(7, (batch, *x.shape[1:]), generator=generator)
        for x in args
    )


def describe(model: nn.Module, args: tuple[Tensor, ...]) -> str:
    """Return the model's blocks and the shapes of its inputs, as text."""
    return f"{model}\ninputs: {', '.join(f'{tuple(x.shape)} {x.dtype}' for x in args)}"


# Groups

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "LSTMCell": 4, "GRUCell": 3, "RNNCell": 1}


class Labels:
    """Labels in the making: names of parameters, and the group of each of their weights or rows."""

    def __init__(self, model: nn.Module, rng: Random) -> None:
        self.rng, self.labels = rng, dict[str, Tensor]()
        self.shapes = {n: p.shape for n, p in model.named_parameters()}
        self.count = 0
        self.aligned: dict[int, Tensor] = {}
        self.same_width = chance(rng, 0.6)  # rows of the same number share a group throughout, as residual streams do
        self.last = torch.zeros(0, dtype=torch.int64)

    def fresh(self, n: int) -> Tensor:
        self.count += n
        return torch.arange(self.count - n, self.count)

    def rows(self, n: int) -> Tensor:
        """Return labels of ``n`` rows: new ones, or those of all rows of layers that are as wide."""
        if self.same_width and chance(self.rng, 0.95):
            return self.aligned[n] if n in self.aligned else self.aligned.setdefault(n, self.fresh(n))
        return self.fresh(n)

    def set(self, name: str, labels: Tensor, axis: int = 0) -> None:
        """Label a parameter along an axis, unless it is labelled, or another name of a parameter."""
        if name in self.shapes and name not in self.labels:
            shape = self.shapes[name]
            self.labels[name] = labels.view([-1 if a == axis else 1 for a in range(len(shape))])

    def set_each(self, name: str) -> None:
        """Label every weight of a parameter by itself."""
        if name in self.shapes and name not in self.labels:
            self.labels[name] = self.fresh(self.shapes[name].numel()).view(self.shapes[name])


def random_groups(model: nn.Module, rng: Random) -> tuple[dict[str, Tensor], Tensor]:
    """Return labels of a random grouping of a model without gates, and the labels of the groups that die.

    Most groups are rows: filters, neurons, dimensions of an embedding, units of a recurrence with all of its gates,
    heads; with or without their biases, and with the norm that follows. Some layers are gated by columns, some by
    single weights, some not at all.
    """
    made = Labels(model, rng)
    share = rng.choice((0.25, 0.25, 0.5, 0.5, 0.5, 0.9))
    some = 1.0 if made.same_width else rng.choice((0.5, 0.8, 1.0))
    for prefix, module in model.named_modules():
        if chance(rng, some) and not (prefix.endswith("layer") and of_head(model, prefix)):
            _label(made, f"{prefix}." if prefix else "", module)
    if not made.labels:
        for name, shape in made.shapes.items():
            made.set(name, made.fresh(shape[0]))
    dead = torch.tensor([i for i in range(made.count) if chance(rng, share)] or [rng.randrange(made.count)])
    return made.labels, dead


def of_head(model: nn.Module, prefix: str) -> bool:
    """Tell whether a layer makes the output, whose rows nothing can remove."""
    owner = model.get_submodule(prefix.rpartition(".")[0])
    return isinstance(owner, Block) and owner.name == "head"


def _label(made: Labels, prefix: str, module: nn.Module) -> None:
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        _label_units(made, prefix, module)
    elif isinstance(module, nn.Embedding):
        if chance(made.rng, 0.7):
            made.set(f"{prefix}weight", made.rows(module.embedding_dim), 1)
    elif isinstance(module, NORMS):
        _label_norm(made, prefix)
    elif isinstance(module, Block | nn.MultiheadAttention | nn.Bilinear):
        _label_own(made, prefix, module)
    elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        _label_layer(made, prefix, module)


def _label_layer(made: Labels, prefix: str, module: Any) -> None:
    rng = made.rng
    name = f"{prefix}weight"
    transposed, groups = isinstance(module, nn.modules.conv._ConvTransposeNd), getattr(module, "groups", 1)
    if f"{prefix}parametrizations.weight.original0" in made.shapes:  # a zero row of v would be divided by its norm
        name = f"{prefix}parametrizations.weight.original0"
        size = made.shapes[name].numel()
        made.set(name, made.rows(size), max(range(len(made.shapes[name])), key=lambda a: made.shapes[name][a]))
        return
    if name not in made.shapes:
        return
    shape, how = made.shapes[name], rng.choice(("rows",) * 22 + ("columns", "columns", "each"))
    if how == "each":
        made.set_each(name)
    elif how == "columns":
        made.set(name, made.fresh(shape[1]), 1)
    elif transposed:
        rows = made.rows(shape[1] * groups)
        by_group = rows.view(groups, 1, shape[1]).expand(groups, shape[0] // groups, shape[1])
        if name not in made.labels:
            made.labels[name] = by_group.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))
        _label_bias(made, prefix, rows)
    else:
        rows = made.rows(shape[0])
        made.set(name, rows)
        _label_bias(made, prefix, rows)


def _label_bias(made: Labels, prefix: str, rows: Tensor) -> None:
    made.last = rows
    if chance(made.rng, 0.8):
        made.set(f"{prefix}bias", rows)


def _label_norm(made: Labels, prefix: str) -> None:
    """Let a norm die with the rows before it, or channel by channel, or not at all."""
    name = f"{prefix}weight"
    if name not in made.shapes or len(made.shapes[name]) != 1:
        return
    how, size = made.rng.choice(("same", "same", "own", "none", "none")), made.shapes[name][0]
    if how == "same" and len(made.last) == size:
        rows = made.last
    elif how == "own":
        rows = made.rows(size)
    else:
        return
    made.set(name, rows)
    if chance(made.rng, 0.8):
        made.set(f"{prefix}bias", rows)


def _label_units(made: Labels, prefix: str, module: nn.Module) -> None:
    gates = GATES[type(module).__name__]
    hidden, projected = made.rng.choice((True, True, False)), getattr(module, "proj_size", 0)
    for suffix in sorted({n.rpartition("hh")[2] for n, _ in module.named_parameters() if "weight_hh" in n}):
        units = made.fresh(module.hidden_size)
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if hidden or part.endswith("ih"):
                made.set(f"{prefix}{part}{suffix}", units.repeat(gates))
        if projected and chance(made.rng):
            made.set(f"{prefix}weight_hr{suffix}", made.fresh(projected))


def _label_own(made: Labels, prefix: str, module: nn.Module) -> None:
    """Label what a block says makes up units, and the parameters that it holds itself."""
    units = module.units if isinstance(module, Block) else {}
    if units and chance(made.rng):
        labels = made.fresh(1 + max(int(t.max()) for t in units.values()))
        for name, unit in units.items():
            made.set(f"{prefix}{name}", labels[unit])
            made.set(f"{prefix}{name}".removesuffix("weight") + "bias", labels[unit])
    for name, p in module.named_parameters(recurse=False):
        if chance(made.rng, 0.5):
            if p.dim() == 1 or chance(made.rng, 0.1):
                made.set_each(f"{prefix}{name}")
            else:
                axis = made.rng.randrange(p.dim())
                made.set(f"{prefix}{name}", made.rows(p.shape[axis]), axis)
