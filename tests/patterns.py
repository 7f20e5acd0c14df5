"""Micro-patterns: tiny modules that each hold one hard case for finding groups of weights in a traced graph."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Conv1d, Conv2d, Conv3d, ConvTranspose2d, Embedding, LayerNorm, Linear
from torch.nn.utils import parametrizations

GROUPINGS = frozenset(
    [
        "channels",
        "hidden",
        "heads",
        "input_features",
        "trees",
        "modalities",
        "shape_functions",
        "experts",
        "blocks",
        "embedding_dims",
        "rnn",
        "lora",
    ]
)


@dataclass(frozen=True)
class Case:
    """A model that nobody wrote rules for, with what one knows of its groups from its configuration alone.

    Args:
        name: Unique in its registry.
        family: Kind of network.
        factory: Makes the model, small and with random weights, in eval mode.
        inputs: Makes the positional example inputs.
        kwargs: Makes the keyword example inputs.
        applies: Groupings of which the model has at least one group; those of ``expect`` are added.
        expect: Number of groups of a grouping, where that is certain: ``heads`` counts key/value heads over all
            attention layers, cross attention too; ``hidden`` units made by a linear layer or convolution and read by
            such only, no sum between (a gated unit once); ``blocks`` residual branches, ``x + f(x)``, also where ``x``
            is projected; ``experts`` routed experts over all layers, and shared ones that a gate scales per token;
            ``rnn`` units over all layers and directions; ``lora`` adapted layers; ``embedding_dims`` dimensions of the
            embedding that all later layers share; ``input_features`` inputs of a table. Weights that layers share
            count once.
        data_dependent: Whether the forward branches on values of tensors, so that no trace holds for all inputs.
    """

    name: str
    family: str
    factory: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]] = tuple
    kwargs: Callable[[], dict[str, Any]] = dict
    applies: frozenset[str] = frozenset()
    expect: Mapping[str, int] = field(default_factory=dict)
    data_dependent: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "applies", self.applies | set(self.expect))
        assert self.applies <= GROUPINGS, self.applies - GROUPINGS

    def build(self, *, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """Make the model, with every parameter random, and its positional and keyword example inputs."""
        torch.manual_seed(seed)
        model = randomize(self.factory().eval())
        torch.manual_seed(seed + 1)
        return model, self.inputs(), self.kwargs()


def randomize(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Add noise to every parameter, so that none is zero or one, and draw the running statistics of BatchNorm."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(0, scale)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 1.5)
    return model


def ids(*shape: int) -> Tensor:
    """Draw tokens of a vocabulary of 99, none of them special."""
    return torch.randint(3, 99, shape)


def normal(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that draws normal inputs of these shapes."""
    return lambda: tuple(torch.randn(s) for s in shapes)


class Net(nn.Module):
    """A function of inputs and of named parts: modules, or tensors that become parameters."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(self, *inputs, **named)


ROWS = normal((3, 4))
IMAGE = normal((2, 3, 8, 8))
SEQUENCE = normal((2, 6, 8))
HIDDEN = ("hidden",)
CHANNELS = ("channels",)


def _case(
    name: str,
    factory: Callable[[], nn.Module],
    inputs: Callable[[], tuple[Any, ...]],
    applies: Iterable[str] = (),
    *,
    data_dependent: bool = False,
    **expect: int,
) -> Case:
    return Case(name, "pattern", lambda: factory().eval(), inputs, dict, frozenset(applies), expect, data_dependent)


def _rows(
    name: str, run: Callable[..., Any], parts: Callable[[], dict[str, Any]], *applies: str, **expect: Any
) -> Case:
    """Rows of four features."""
    return _case(name, lambda: Net(run, **parts()), ROWS, applies, **expect)


def _factors(name: str, run: Callable[..., Any]) -> Case:
    """Users and items, whose tables meet in products."""
    parts = {"users": lambda: Embedding(9, 6), "items": lambda: Embedding(7, 6), "out": lambda: Linear(7, 2)}
    return _case(
        name,
        lambda: Net(lambda m, i, j: run(m, m.users(i), m.items(j)), **{n: make() for n, make in parts.items()}),
        lambda: (torch.randint(9, (4,)), torch.randint(7, (4,))),
        embedding_dims=6,
    )


def _image(
    name: str, run: Callable[..., Any], parts: Callable[[], dict[str, Any]], *applies: str, **expect: Any
) -> Case:
    """Images of three channels, 8x8."""
    return _case(name, lambda: Net(run, **parts()), IMAGE, applies, **expect)


def _sequence(
    name: str, run: Callable[..., Any], parts: Callable[[], dict[str, Any]], *applies: str, **expect: Any
) -> Case:
    """Sequences of six tokens of width eight."""
    return _case(name, lambda: Net(run, **parts()), SEQUENCE, applies, **expect)


def _through(name: str, middle: Callable[[], nn.Module], *applies: str, width: int = 6, **expect: Any) -> Case:
    """Rows through a linear layer, a module, and a linear layer."""
    return _case(name, lambda: nn.Sequential(Linear(4, 6), middle(), Linear(width, 2)), ROWS, applies, **expect)


def _convs(name: str, middle: Callable[[], nn.Module], *applies: str, width: int = 4, **expect: Any) -> Case:
    """Images through a convolution to four channels, a module, and a convolution."""

    def make() -> nn.Module:
        return nn.Sequential(Conv2d(3, 4, 3, padding=1), middle(), Conv2d(width, 2, 1))

    return _case(name, make, IMAGE, {"channels", *applies}, **expect)


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def do(run: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Do(run)


def two(inner: int = 6, outer: int | None = None) -> Callable[[], dict[str, nn.Module]]:
    """Linear layers ``a`` from four features to ``inner``, and ``b`` from ``outer`` (default ``inner``) to two."""
    return lambda: {"a": Linear(4, inner), "b": Linear(outer or inner, 2)}


# Splits, concatenations and permutations of channels


def _split(sizes: list[int]) -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return sum(layer(part) for layer, part in zip(m.out, F.relu(m.a(x)).split(sizes, 1), strict=True))

    def parts() -> dict[str, nn.Module]:
        return {"a": Linear(4, sum(sizes)), "out": nn.ModuleList(Linear(n, 2) for n in sizes)}

    return _rows("split_" + "_".join(map(str, sizes)), run, parts, hidden=sum(sizes))


def _shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def _unet(m: nn.Module, x: Tensor) -> Tensor:
    a = F.relu(m.a(x))
    b = F.relu(m.b(F.max_pool2d(a, 2)))
    return m.out(torch.cat([a, F.interpolate(b, scale_factor=2.0)], 1))


def _patchify(x: Tensor) -> Tensor:
    rearrange = importlib.import_module("einops").rearrange
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4)


def _merge_patches(m: nn.Module, x: Tensor) -> Tensor:
    x = m.patches(x).permute(0, 2, 3, 1)
    return m.reduce(m.norm(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1))).mean((1, 2))


def _pair_parts() -> dict[str, Any]:
    return {"a": Linear(4, 3), "b": Linear(4, 5), "out": Linear(8, 2)}


SHAPES = [
    _rows(
        "concat", lambda m, x: m.out(F.relu(torch.cat([m.a(x), m.b(x)], 1))), _pair_parts, hidden=8, input_features=4
    ),
    _rows(
        "concat_input",
        lambda m, x: m.out(torch.cat([F.relu(m.a(x)), x], 1)),
        lambda: {"a": Linear(4, 3), "out": Linear(7, 2)},
        hidden=3,
        input_features=4,
    ),
    _rows("concat_twice", lambda m, x: m.b(F.relu(m.a(x)).repeat(1, 2)), two(6, 12), hidden=6),
    _split([4, 4]),
    _split([3, 1, 4]),
    _rows(
        "chunk",
        lambda m, x: sum(o(p) for o, p in zip(m.out, torch.chunk(m.a(x).tanh(), 3, 1), strict=True)),
        lambda: {"a": Linear(4, 9), "out": nn.ModuleList(Linear(3, 2) for _ in range(3))},
        hidden=9,
    ),
    _rows("split_sum", lambda m, x: m.b(torch.stack(F.relu(m.a(x)).chunk(2, 1)).sum(0)), two(6, 3), "hidden"),
    _rows("slice", lambda m, x: m.b(F.relu(m.a(x))[:, 1:5]), two(6, 4), "hidden"),
    _rows("strided_slice", lambda m, x: m.b(F.relu(m.a(x))[:, ::2]), two(6, 3), "hidden"),
    _rows(
        "index_select",
        lambda m, x: m.b(F.relu(m.a(x)).index_select(1, torch.tensor([3, 0, 5, 1, 4, 2]))),
        two(),
        hidden=6,
    ),
    _rows(
        "index_add",
        lambda m, x: m.b((h := F.relu(m.a(x)).view(-1, 3, 2)).index_add(-1, torch.tensor([1]), m.c(h)).flatten(1)),
        lambda: {**two()(), "c": Linear(2, 1)},
    ),
    _rows("flip", lambda m, x: m.b(F.relu(m.a(x)).flip(1)), two(), hidden=6),
    _rows("roll", lambda m, x: m.b(F.relu(m.a(x)).roll(2, 1)), two(), hidden=6),
    _rows("pad_channels", lambda m, x: m.b(F.pad(F.relu(m.a(x)), (1, 2))), two(6, 9), hidden=6),
    _rows(
        "view_transpose", lambda m, x: m.b(F.relu(m.a(x)).view(-1, 2, 3).transpose(1, 2).flatten(1)), two(), hidden=6
    ),
    _convs("channel_shuffle", do(_shuffle), hidden=4),
    _convs("channel_shuffle_functional", do(lambda x: F.channel_shuffle(x, 2)), hidden=4),
    _convs("pixel_shuffle", lambda: nn.PixelShuffle(2), "hidden", width=1),
    _convs("pixel_unshuffle", lambda: nn.PixelUnshuffle(2), width=16, hidden=4),
    _convs("unfold", lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Unflatten(2, (4, 4))), width=16, hidden=4),
    _convs("interpolate_bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), hidden=4),
    _convs("interpolate_nearest", lambda: nn.Upsample(scale_factor=2), hidden=4),
    _case(
        "flatten_linear",
        lambda: nn.Sequential(Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), Linear(36, 2)),
        IMAGE,
        CHANNELS,
        hidden=4,
    ),
    _case(
        "flatten_channels_last",
        lambda: nn.Sequential(Conv2d(3, 4, 3), Do(lambda x: x.permute(0, 2, 3, 1)), nn.Flatten(), Linear(144, 2)),
        IMAGE,
        CHANNELS,
        hidden=4,
    ),
    _case(
        "adaptive_pool_flatten",
        lambda: nn.Sequential(Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), Linear(16, 2)),
        IMAGE,
        CHANNELS,
        hidden=4,
    ),
    _image(
        "unet",
        _unet,
        lambda: {"a": Conv2d(3, 4, 3, padding=1), "b": Conv2d(4, 4, 3, padding=1), "out": Conv2d(8, 2, 1)},
        "channels",
        hidden=8,
    ),
    _image(
        "patchify_einops",
        lambda m, x: m.b(F.gelu(m.a(_patchify(x)))),
        lambda: {"a": Linear(48, 6), "b": Linear(6, 2)},
        hidden=6,
    ),
    _image(
        "patch_merging",
        _merge_patches,
        lambda: {"patches": Conv2d(3, 4, 2, 2), "norm": LayerNorm(16), "reduce": Linear(16, 8)},
        "channels",
    ),
    _rows("stack_unbind", lambda m, x: m.b(torch.stack([m.a(x), m.a(-x)], 1).relu().unbind(1)[1]), two(), hidden=6),
    _rows(
        "complex_view",
        lambda m, x: m.b(torch.view_as_real(torch.view_as_complex(m.a(x).view(-1, 3, 2)) * (0.6 + 0.8j)).flatten(1)),
        two(),
        "hidden",
    ),
    _rows("one_to_many", lambda m, x: m.b(m.a(x)[:, :, None].expand(-1, -1, 3).flatten(1)), two(6, 18), hidden=6),
]

# Convolutions


CONVOLUTIONS = [
    _convs("depthwise", lambda: Conv2d(4, 4, 3, groups=4), "hidden"),
    _convs("depthwise_multiplier", lambda: Conv2d(4, 8, 3, groups=4), "hidden", width=8),
    _convs("grouped_conv", lambda: nn.Sequential(nn.ReLU(), Conv2d(4, 6, 3, groups=2)), "hidden", width=6),
    _convs(
        "grouped_after_group",
        lambda: nn.Sequential(Conv2d(4, 8, 1, groups=2), nn.ReLU(), Conv2d(8, 4, 1, groups=4)),
        "hidden",
    ),
    _convs(
        "transposed_conv", lambda: nn.Sequential(nn.ReLU(), ConvTranspose2d(4, 5, 2, 2), nn.ReLU()), width=5, hidden=9
    ),
    _convs(
        "grouped_transposed_conv",
        lambda: nn.Sequential(nn.ReLU(), ConvTranspose2d(4, 6, 2, 2, groups=2)),
        "hidden",
        width=6,
    ),
    _convs(
        "dilated_reflect",
        lambda: nn.Sequential(nn.ReLU(), Conv2d(4, 5, 3, padding=2, dilation=2, padding_mode="reflect")),
        width=5,
        hidden=9,
    ),
    _case(
        "conv3d",
        lambda: nn.Sequential(Conv3d(2, 4, 2), nn.ReLU(), Conv3d(4, 3, 2)),
        normal((1, 2, 4, 4, 4)),
        CHANNELS,
        hidden=4,
    ),
    _case(
        "conv1d_causal",
        lambda: nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), Conv1d(2, 4, 3), nn.Tanh(), Conv1d(4, 3, 1)),
        normal((2, 2, 7)),
        CHANNELS,
        hidden=4,
    ),
    _image(
        "functional_conv",
        lambda m, x: F.conv2d(F.relu(F.conv2d(x, m.w, m.b, padding=1)), m.v),
        lambda: {"w": torch.randn(4, 3, 3, 3), "b": torch.randn(4), "v": torch.randn(2, 4, 1, 1)},
        "channels",
        hidden=4,
    ),
    _convs("batchnorm", lambda: nn.Sequential(BatchNorm2d(4), nn.ReLU()), hidden=4),
    _convs("batchnorm_plain", lambda: nn.Sequential(BatchNorm2d(4, affine=False), nn.ReLU()), hidden=4),
    _convs("instancenorm", lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.ReLU()), hidden=4),
    _convs("groupnorm", lambda: nn.GroupNorm(2, 4), "channels"),
    _convs("prelu_conv", lambda: nn.PReLU(4), hidden=4),
    _convs("local_response_norm", lambda: nn.LocalResponseNorm(2), "hidden"),
    _convs("blur", do(lambda x: F.conv2d(x, torch.full((4, 1, 2, 2), 0.25), groups=4)), hidden=4),
    _convs("fold", do(lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)), hidden=4),
    _convs("unpool", do(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)), hidden=4),
    _convs("nearest_exact", do(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")), hidden=4),
    _convs("antialias", do(lambda x: F.interpolate(x, (3, 3), mode="bicubic", antialias=True)), hidden=4),
    _image(
        "warp",
        lambda m, x: m.b(F.grid_sample(m.a(x), m.grid(x).tanh().movedim(1, -1), align_corners=False)),
        lambda: {"a": Conv2d(3, 4, 1), "grid": Conv2d(3, 2, 1), "b": Conv2d(4, 2, 1)},
        "channels",
        hidden=4,
    ),
    _convs(
        "coordinates",
        do(lambda x: torch.cat([x, torch.linspace(-1, 1, 8).expand(len(x), 1, 8, 8)], 1)),
        width=5,
        hidden=4,
    ),
]

# Activations, gates, norms


class Excite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = Linear(4, 3), Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _without_negative(x: Tensor) -> Tensor:
    x[x < 0] = 0
    return x


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def _swiglu_parts() -> dict[str, Any]:
    return {"gate": Linear(4, 6), "up": Linear(4, 6), "down": Linear(6, 2)}


def _branches_parts() -> dict[str, Any]:
    return {"a": Linear(4, 6), "b": Linear(4, 6), "out": Linear(6, 2)}


def _highway_parts() -> dict[str, Any]:
    return {"start": Linear(4, 6), "h": Linear(6, 6), "t": Linear(6, 6), "out": Linear(6, 2)}


def _highway(m: nn.Module, x: Tensor) -> Tensor:
    x = m.start(x)
    t = torch.sigmoid(m.t(x))
    return m.out(t * F.relu(m.h(x)) + (1 - t) * x)


def _halves(x: Tensor) -> Tensor:
    """The one of two groups that each token is in, for each of six channels."""
    return (torch.arange(x.shape[1]) % 2)[:, None].expand(len(x), -1, 6)


GATES = [
    _through("glu", nn.GLU, width=3, hidden=3),
    _rows("glu_functional", lambda m, x: m.b(F.glu(m.a(x), dim=1)), two(12, 6), hidden=6),
    _convs("glu_channels", lambda: nn.GLU(1), width=2, hidden=2),
    _rows("swiglu_separate", lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), _swiglu_parts, hidden=6),
    _rows("swiglu_fused", lambda m, x: m.b(F.silu(m.a(x)[:, :6]) * m.a(x)[:, 6:]), two(12, 6), hidden=6),
    _rows("swiglu_interleaved", lambda m, x: m.b(F.silu(m.a(x)[:, ::2]) * m.a(x)[:, 1::2]), two(12, 6), hidden=6),
    _rows("geglu_chunk", lambda m, x: m.b(_geglu(m.a(x))), two(12, 6), hidden=6),
    _convs("squeeze_excite", Excite, "hidden"),
    _rows("highway", _highway, _highway_parts, "channels"),
    _rows("product", lambda m, x: m.out(m.a(x) * m.b(x)), _branches_parts, hidden=6),
    _rows("maximum", lambda m, x: m.out(torch.maximum(m.a(x), m.b(x))), _branches_parts, "hidden"),
    _rows("where", lambda m, x: m.out(torch.where(m.a(x) > 0, m.b(x), -m.b(x))), _branches_parts, "hidden"),
    _rows("maxout", lambda m, x: m.b(m.a(x).view(-1, 6, 2).amax(-1)), two(12, 6), "channels"),
    _rows("square_relu", lambda m, x: m.b(F.relu(m.a(x)).square()), two(), hidden=6),
    _rows("crelu", lambda m, x: m.b(torch.cat([F.relu(m.a(x)), F.relu(-m.a(x))], 1)), two(6, 12), hidden=6),
    _rows("masked_number", lambda m, x: m.b(_without_negative(m.a(x))), two(), hidden=6),
    _through("prelu", lambda: nn.PReLU(6), hidden=6),
    _through("prelu_shared", nn.PReLU, hidden=6),
    _through("sigmoid", nn.Sigmoid, hidden=6),
    _through("rmsnorm", lambda: nn.RMSNorm(6)),
    _through("rmsnorm_by_hand", lambda: RootMeanSquare(6)),
    _through("layernorm", lambda: LayerNorm(6)),
    _through("layernorm_plain", lambda: LayerNorm(6, elementwise_affine=False)),
    _through("batchnorm_rows", lambda: nn.BatchNorm1d(6), hidden=6),
    _through("normalize", do(lambda x: F.normalize(x, dim=1))),
    _through("softmax_channels", lambda: nn.Softmax(1)),
    _through("mean_channels", do(lambda x: x - x.mean(1, keepdim=True))),
    _through("cumsum_channels", do(lambda x: x.cumsum(1))),
    _through("sort", do(lambda x: x.sort(1)[0])),
    _through("top_k", do(lambda x: x.topk(3, 1)[0]), width=3),
    _rows("gather", lambda m, x: m.b(m.a(x).gather(1, x.argsort(1))), two(6, 4)),
    _sequence(
        "sum_of_gated",  # states of children, each with a gate of its own, as in a tree
        lambda m, x: m.out((torch.sigmoid(m.gate(x)) * torch.tanh(m.state(x))).sum(1)),
        lambda: {"gate": Linear(8, 6), "state": Linear(8, 6), "out": Linear(6, 2)},
        hidden=6,
    ),
    _factors("factors", lambda m, u, v: (u * v).sum(1)),
    _factors("factors_of_all", lambda m, u, v: u @ m.items.weight.T),
    _factors("factors_and_more", lambda m, u, v: m.out(torch.cat([torch.bmm(u[:, None], v[..., None])[:, 0], u], 1))),
    _case(
        "neighbours",  # of nodes, whose features are added up along edges before any layer
        lambda: Net(
            lambda m, x, e: m.out(F.relu(m.near(torch.zeros_like(x).index_add_(0, e[1], x[e[0]])) + m.own(x))),
            near=Linear(6, 8),
            own=Linear(6, 8),
            out=Linear(8, 2),
        ),
        lambda: (torch.randn(5, 6), torch.randint(5, (2, 9))),
        hidden=8,
        input_features=6,
    ),
    _sequence(
        "cumsum_time", lambda m, x: m.b(m.a(x).cumsum(1)), lambda: {"a": Linear(8, 6), "b": Linear(6, 2)}, hidden=6
    ),
    _sequence(
        "quantile_time",
        lambda m, x: m.b(m.a(x) - m.a(x).quantile(0.3, 1, keepdim=True)),
        lambda: {"a": Linear(8, 6), "b": Linear(6, 2)},
        hidden=6,
    ),
    _sequence(
        "nearest_tokens",
        lambda m, x: m.b(torch.cdist(m.a(x), m.a(x)).softmax(-1) @ m.a(x)),
        lambda: {"a": Linear(8, 6), "b": Linear(6, 2)},
    ),
    _sequence(
        "highest_of_groups",
        lambda m, x: m.b(m.a(x).new_zeros(len(x), 2, 6).scatter_reduce(1, _halves(x), m.a(x), "amax")),
        lambda: {"a": Linear(8, 6), "b": Linear(6, 2)},
        hidden=6,
    ),
    _sequence(
        "rows_put_in",
        lambda m, x: m.b(m.a(x).masked_scatter((x[..., :1] > 0).expand(-1, -1, 6), m.c(x))),
        lambda: {"a": Linear(8, 6), "b": Linear(6, 2), "c": Linear(8, 6)},
        "hidden",
    ),
    _sequence(
        "top_k_tokens", lambda m, x: m.b(m.a(x).topk(2, 1)[0]), lambda: {"a": Linear(8, 6), "b": Linear(6, 2)}, hidden=6
    ),
    _sequence(
        "difference_time",
        lambda m, x: m.b(m.a(x)[:, 1:] - m.a(x)[:, :-1]),
        lambda: {"a": Linear(8, 6), "b": Linear(6, 2)},
        hidden=6,
    ),
]

# Weights that are not plainly the weight of a layer


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(Linear(4, 6)), nn.ReLU(), Linear(6, 2))


class Transposed(nn.Module):
    """A linear layer that stores its weight as (in, out), as GPT-2 does."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def _frozen() -> nn.Module:
    model = nn.Sequential(Linear(4, 6), nn.ReLU(), Linear(6, 5), nn.ReLU(), Linear(5, 2))
    model[2].requires_grad_(False)
    return model


def _hypernetwork(m: nn.Module, x: Tensor) -> Tensor:
    w = m.weights(x).view(-1, 6, 4)
    return m.out(F.relu(w @ x[:, :, None])[..., 0])


def _mixture(m: nn.Module, x: Tensor) -> Tensor:
    weights = m.router(x).softmax(1)
    return weights[:, :1] * m.first(x) + weights[:, 1:] * m.second(x)


def _expert() -> nn.Module:
    return nn.Sequential(Linear(4, 6), nn.ReLU(), Linear(6, 2))


class Drawn(nn.Module):
    """A module that is one of its inputs' shapes: a raw scale and shift in front of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.child = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6)), Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.scale * x + self.shift)


def _tables_parts() -> dict[str, Any]:
    return {"a": nn.EmbeddingBag(99, 6), "b": nn.EmbeddingBag(99, 6), "out": Linear(6, 2)}


def _tied_parts() -> dict[str, Any]:
    return {"words": Embedding(99, 6), "inner": Linear(6, 6)}


WEIGHTS = [
    _rows(
        "einsum_pair",
        lambda m, x: torch.einsum("bh,ho->bo", F.relu(torch.einsum("bi,hi->bh", x, m.w)), m.v),
        lambda: {"w": torch.randn(6, 4), "v": torch.randn(6, 2)},
        hidden=6,
        input_features=4,
    ),
    _rows(
        "einsum_grouped",
        lambda m, x: torch.einsum("bgh,gho->bo", torch.einsum("bgi,gih->bgh", x.view(-1, 2, 2), m.w).relu(), m.v),
        lambda: {"w": torch.randn(2, 2, 3), "v": torch.randn(2, 3, 2)},
        "hidden",
        input_features=4,
    ),
    _rows(
        "matmul_right",
        lambda m, x: F.relu(x @ m.w) @ m.v,
        lambda: {"w": torch.randn(4, 6), "v": torch.randn(6, 2)},
        hidden=6,
        input_features=4,
    ),
    _case(
        "matmul_left",
        lambda: Net(lambda m, x: m.v @ F.relu(m.w @ x), w=torch.randn(6, 4), v=torch.randn(2, 6)),
        normal((4, 3)),
        hidden=6,
    ),
    _rows(
        "tensordot",
        lambda m, x: torch.tensordot(F.relu(torch.tensordot(x, m.w, 1)), m.v, 1),
        lambda: {"w": torch.randn(4, 6), "v": torch.randn(6, 2)},
        hidden=6,
    ),
    _rows(
        "multiply_sum",
        lambda m, x: F.relu((x[:, None] * m.w).sum(2)) @ m.v,
        lambda: {"w": torch.randn(6, 4), "v": torch.randn(6, 2)},
        "hidden",
    ),
    _rows(
        "bilinear",
        lambda m, x: m.out(F.relu(m.pair(x, x))),
        lambda: {"pair": nn.Bilinear(4, 4, 5), "out": Linear(5, 2)},
        "hidden",
    ),
    _case(
        "transposed_storage",
        lambda: nn.Sequential(Transposed(4, 8), nn.GELU(), Transposed(8, 2)),
        ROWS,
        hidden=8,
        input_features=4,
    ),
    _case("raw_scale", lambda: nn.Sequential(Linear(4, 6), Drawn()), ROWS, hidden=6),
    _case(
        "weight_norm",
        lambda: nn.Sequential(parametrizations.weight_norm(Linear(4, 6)), nn.ReLU(), Linear(6, 2)),
        ROWS,
        hidden=6,
    ),
    _case("weight_norm_old", _old_weight_norm, ROWS, hidden=6),
    _rows(
        "baddbmm",
        lambda m, x: torch.baddbmm(m.c, torch.baddbmm(m.b, x.expand(3, -1, -1), m.w).relu(), m.v),
        lambda: {
            "w": torch.randn(3, 4, 6),
            "b": torch.randn(3, 1, 6),
            "v": torch.randn(3, 6, 2),
            "c": torch.randn(3, 1, 2),
        },
        hidden=18,
        input_features=4,
    ),
    _rows(
        "einsum_of_three",
        lambda m, x: m.out(torch.einsum("bi,io,bo->bo", x, m.w, m.gate(x).sigmoid())),
        lambda: {"w": torch.randn(4, 6), "gate": Linear(4, 6), "out": Linear(6, 2)},
        hidden=6,
        input_features=4,
    ),
    _case(
        "spectral_norm",
        lambda: nn.Sequential(parametrizations.spectral_norm(Linear(4, 6)), nn.ReLU(), Linear(6, 2)),
        ROWS,
        HIDDEN,
    ),
    _case(
        "orthogonal",
        lambda: nn.Sequential(
            Linear(4, 6), nn.ReLU(), parametrizations.orthogonal(Linear(6, 2), orthogonal_map="matrix_exp")
        ),
        ROWS,
        HIDDEN,
    ),
    _case("frozen", _frozen, ROWS, HIDDEN),
    _rows(
        "standardized_weight",
        lambda m, x: m.b(
            F.relu(
                F.linear(x, (m.a.weight - m.a.weight.mean(1, keepdim=True)) / m.a.weight.std(1, keepdim=True), m.a.bias)
            )
        ),
        two(),
    ),
    _rows(
        "concatenated_weight",
        lambda m, x: m.out(F.linear(x, torch.cat([m.a.weight, m.b.weight]), torch.cat([m.a.bias, m.b.bias])).tanh()),
        lambda: {"a": Linear(4, 3), "b": Linear(4, 5), "out": Linear(8, 2)},
        hidden=8,
    ),
    _rows(
        "autoencoder_tied", lambda m, x: F.linear(F.relu(m.a(x)), m.a.weight.t()), lambda: {"a": Linear(4, 6)}, hidden=6
    ),
    _case(
        "tied_embedding",
        lambda: Net(lambda m, x: F.linear(m.inner(m.words(x)).tanh(), m.words.weight), **_tied_parts()),
        lambda: (ids(2, 5),),
        embedding_dims=6,
    ),
    _case(
        "embedding_bags",
        lambda: Net(lambda m, x: m.out(m.a(x) + m.b(x)), **_tables_parts()),
        lambda: (ids(2, 5),),
        embedding_dims=6,
    ),
    _case(
        "embedding_concat",
        lambda: Net(lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1)), **{**_tables_parts(), "out": Linear(12, 2)}),
        lambda: (ids(2, 5),),
        embedding_dims=12,
    ),
    _case(
        "embedding_by_one_hot",
        lambda: Net(lambda m, x: m.out(F.one_hot(x, 99).float() @ m.w), w=torch.randn(99, 6), out=Linear(6, 2)),
        lambda: (ids(2, 5),),
        HIDDEN,
    ),
    _rows("hypernetwork", _hypernetwork, lambda: {"weights": Linear(4, 24), "out": Linear(6, 2)}),
    _rows(
        "two_experts",
        _mixture,
        lambda: {"router": Linear(4, 2), "first": _expert(), "second": _expert()},
        experts=2,
        hidden=12,
    ),
    _rows(
        "reuse",
        lambda m, x: m.out(m.a(F.relu(m.a(F.relu(m.start(x)))))),
        lambda: {"start": Linear(4, 6), "a": Linear(6, 6), "out": Linear(6, 2)},
        "hidden",
    ),
    _rows("siamese", lambda m, x: m.b((F.relu(m.a(x)) - F.relu(m.a(x.flip(0)))).abs()), two(), "hidden"),
]

# Attention


def heads(x: Tensor, n: int = 2) -> Tensor:
    """Split the last axis into heads: (batch, heads, tokens, width)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """Join the heads again."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax attention by matrix products, of heads."""
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias, -1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True))


def _bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, _ = q.shape
    q, k, v = (heads(x).reshape(b * 2, n, 4) for x in (q, k, v))
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return y.view(b, 2, n, 4).transpose(1, 2).reshape(b, n, 8)


def _einops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rearrange = importlib.import_module("einops").rearrange
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=2) for x in (q, k, v))
    return rearrange(attend(q, k, v), "b h n d -> b n (h d)")


def _in_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads that are split off and put into the batch (set transformers)."""
    q, k, v = (torch.cat(x.split(4, 2)) for x in (q, k, v))
    return torch.cat(attend(q, k, v).split(len(q) // 2), 2)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(F.elu(q) + 1), heads(F.elu(k) + 1), heads(v)
    return merge((q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2)[..., None]))


def _windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads(x.reshape(-1, 3, 8)) for x in (q, k, v))
    return merge(attend(q, k, v)).reshape(-1, 6, 8)


def _alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(6)
    bias = -(at[:, None] - at).abs() * torch.tensor([0.5, 0.25])[:, None, None]
    return merge(attend(heads(q), heads(k), heads(v), bias))


def _angles() -> Tensor:
    return torch.arange(6)[:, None] * torch.tensor([1.0, 0.1])


def _rotate_half(x: Tensor) -> Tensor:
    cos, sin = (f(_angles()).repeat(1, 2) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin


def _rotate_pairs(x: Tensor) -> Tensor:
    cos, sin = (f(_angles()).repeat_interleave(2, 1) for f in (torch.cos, torch.sin))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


def _rotate_complex(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones(6, 2), _angles())).flatten(-2)


def _rotated(rotate: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: merge(attend(rotate(heads(q)), rotate(heads(k)), heads(v)))


def _repeat(x: Tensor) -> Tensor:
    return heads(x).repeat_interleave(2, 1)


def _expand(x: Tensor) -> Tensor:
    x = heads(x)
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), 4, *x.shape[2:])


def _grouped(more: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: merge(attend(heads(q, 4), more(k), more(v)))


def _gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(heads(q, 4), heads(k), heads(v), enable_gqa=True))


def _gqa_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(-1, (2, 2, 4)).permute(0, 2, 3, 1, 4)  # batch, key/value head, query head of it, token, width
    y = attend(q, heads(k)[:, :, None], heads(v)[:, :, None])
    return y.permute(0, 3, 1, 2, 4).flatten(2)


def _projections(wide: int = 8, narrow: int = 8) -> dict[str, nn.Module]:
    return {"q": Linear(8, wide), "k": Linear(8, narrow), "v": Linear(8, narrow), "o": Linear(wide, 8)}


def _attention(name: str, core: Callable[..., Tensor], wide: int = 8, narrow: int = 8, count: int = 2) -> Case:
    """Self attention in which ``core`` makes the output of queries, keys and values that are not yet split."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.o(core(m.q(x), m.k(x), m.v(x)))

    return _sequence(name, run, lambda: _projections(wide, narrow), heads=count)


def _qk_norm(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(merge(attend(m.norm(heads(m.q(x))), m.norm(heads(m.k(x))), heads(m.v(x)))))


def _qkv_outer(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    return m.o(merge(attend(q, k, v)))


def _qkv_inner(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(2, 6, 2, 12).transpose(1, 2).chunk(3, -1)
    return m.o(merge(attend(q, k, v)))


def _qkv_split(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).split([16, 8, 8], -1)
    return m.o(_gqa(q, k, v))


def _einsum_heads(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (m.q, m.k, m.v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
    return torch.einsum("bhnm,bmhd,hdc->bnc", weights, v, m.o)


def _relative(m: nn.Module, x: Tensor) -> Tensor:
    at = torch.arange(6)
    bias = m.table(at[:, None] - at + 5).permute(2, 0, 1)
    return m.o(merge(attend(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), bias)))


def _head_scale(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(merge(attend(heads(m.q(x)), heads(m.k(x)), heads(m.v(x))) * m.scale[:, None, None]))


def _gated_attention(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(_sdpa(m.q(x), m.k(x), m.v(x)) * torch.sigmoid(m.gate(x)))


def _talking(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    scores = torch.einsum("bhnm,hg->bgnm", q @ k.transpose(-2, -1), m.talk)
    return m.o(merge(scores.softmax(-1) @ v))


def _additive(m: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    scores = m.score(torch.tanh(m.query(x)[:, :, None] + m.key(memory)[:, None]))
    return m.out((scores.softmax(2) * memory[:, None]).sum(2))


def _cross(m: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    return m.o(_sdpa_cross(m.q(x), m.k(memory), m.v(memory)))


def _sdpa_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


def _nonlocal(m: nn.Module, x: Tensor) -> Tensor:
    x = m.stem(x)
    q, k, v = (f(x).flatten(2) for f in (m.q, m.k, m.v))
    y = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
    return m.out(x + m.o(y.view(len(x), 2, 8, 8)))


def _pool_attention(m: nn.Module, x: Tensor) -> Tensor:
    keys, values = heads(m.k(x)), heads(m.v(x))
    return m.o(merge(attend(heads(m.query.expand(len(x), -1, -1)), keys, values))[:, 0])


def _class_token(m: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(len(x), -1, -1), m.start(x)], 1) + m.position
    return m.out(m.norm(x + m.o(_sdpa_cross(m.q(x), m.k(x), m.v(x))))[:, 0])


def _qkv_parts() -> dict[str, Any]:
    return {"qkv": Linear(8, 24), "o": Linear(8, 8)}


def _token_parts() -> dict[str, Any]:
    return {
        "start": Linear(8, 8),
        "token": torch.randn(1, 1, 8),
        "position": torch.randn(7, 8),
        "norm": LayerNorm(8),
        "out": Linear(8, 2),
    }


def _nonlocal_parts() -> dict[str, Any]:
    return {
        "stem": Conv2d(3, 4, 1),
        "q": Conv2d(4, 2, 1),
        "k": Conv2d(4, 2, 1),
        "v": Conv2d(4, 2, 1),
        "o": Conv2d(2, 4, 1),
        "out": Conv2d(4, 2, 1),
    }


_MEMORY = normal((2, 6, 8), (2, 5, 8))


def _relative_table(m: nn.Module, x: Tensor) -> Tensor:
    """Scores of queries by one table for all heads and examples, whose first axis is broadcast (VITS)."""
    q = heads(m.q(x)).flatten(0, 1)
    near = (q @ m.near.transpose(-2, -1)).view(x.shape[0], 2, x.shape[1], 5)
    return m.out(near.transpose(1, 2).flatten(2))


ATTENTION = [
    _attention("attention_by_hand", lambda q, k, v: merge(attend(heads(q), heads(k), heads(v)))),
    _attention("attention_causal", _sdpa),
    _attention("attention_heads_in_batch", _in_batch),
    _attention("attention_bmm", _bmm),
    _attention("attention_einops", _einops),
    _attention("attention_linear", _linear_attention),
    _attention("attention_windows", _windows),
    _attention("attention_alibi", _alibi),
    _attention("attention_single_head", attend, count=1),
    _attention("rope_half", _rotated(_rotate_half)),
    _attention("rope_interleaved", _rotated(_rotate_pairs)),
    _attention("rope_complex", _rotated(_rotate_complex)),
    _attention("gqa_repeat", _grouped(_repeat), 16),
    _attention("gqa_expand", _grouped(_expand), 16),
    _attention("gqa_native", _gqa, 16),
    _attention("gqa_folded", _gqa_folded, 16),
    _attention("mqa", lambda q, k, v: merge(attend(heads(q, 4), k[:, None], v[:, None])), 16, 4, count=1),
    _sequence("qkv_outer", _qkv_outer, _qkv_parts, heads=2),
    _sequence("qkv_per_head", _qkv_inner, _qkv_parts, heads=2),
    _sequence("qkv_grouped", _qkv_split, lambda: {"qkv": Linear(8, 32), "o": Linear(16, 8)}, heads=2),
    _sequence(
        "qk_relative_table",
        _relative_table,
        lambda: {**_projections(), "near": torch.randn(1, 5, 4), "out": Linear(10, 8)},
    ),
    _sequence("qk_norm", _qk_norm, lambda: {**_projections(), "norm": nn.RMSNorm(4)}, heads=2),
    _sequence(
        "einsum_heads",
        _einsum_heads,
        lambda: {**{n: torch.randn(8, 2, 4) for n in "qkv"}, "o": torch.randn(2, 4, 8)},
        heads=2,
    ),
    _sequence("relative_bias", _relative, lambda: {**_projections(), "table": Embedding(11, 2)}, heads=2),
    _sequence("head_scale", _head_scale, lambda: {**_projections(), "scale": torch.randn(2)}, heads=2),
    _sequence("gated_attention", _gated_attention, lambda: {**_projections(), "gate": Linear(8, 8)}, heads=2),
    _sequence("talking_heads", _talking, lambda: {**_projections(), "talk": torch.randn(2, 2)}, "heads"),
    _sequence(
        "shared_key_value",
        lambda m, x: m.o(_sdpa(m.q(x), m.k(x), m.k(x))),
        lambda: {"q": Linear(8, 8), "k": Linear(8, 8), "o": Linear(8, 8)},
        heads=2,
    ),
    _case("cross_attention", lambda: Net(_cross, **_projections()), _MEMORY, heads=2),
    _case(
        "additive_attention",
        lambda: Net(_additive, query=Linear(8, 5), key=Linear(8, 5), score=Linear(5, 1), out=Linear(8, 2)),
        _MEMORY,
        HIDDEN,
    ),
    _sequence(
        "pool_attention",
        _pool_attention,
        lambda: {**{n: m for n, m in _projections().items() if n != "q"}, "query": torch.randn(1, 1, 8)},
        heads=2,
    ),
    _sequence("class_token", _class_token, lambda: {**_projections(), **_token_parts()}, heads=2, blocks=1),
    _image("nonlocal", _nonlocal, _nonlocal_parts, "channels", blocks=1),
]

# Recurrent networks


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 5, batch_first=True, **options)
        self.out = Linear((options.get("proj_size") or 5) * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections")  # that it is slow
            return self.out(self.rnn(x)[0])


def _cell(m: nn.Module, x: Tensor) -> Tensor:
    h = c = x.new_zeros(len(x), 5)
    for step in x.unbind(1):
        h, c = m.cell(step, (h, c))
    return m.out(h)


def _elman(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 5)
    for step in x.unbind(1):
        h = torch.tanh(m.a(step) + m.h(h))
    return m.out(h)


def _last_state(m: nn.Module, x: Tensor) -> Tensor:
    _, (h, _) = m.rnn(x)
    return m.out(h[-1])


class MaskedGRU(nn.Module):
    """A recurrence by hand that leaves the state of a series alone after its end."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.width, self.step, self.cell, self.out = 6, step, nn.GRUCell(5, 6), Linear(6, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.width, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = self.step((t < lengths).unsqueeze(1), self.cell(x[:, t], h), h)
        return self.out(h)


class Packed(nn.Module):
    """A recurrence over packed sequences."""

    def __init__(self, kind: Callable[..., nn.Module], ordered: bool, **options: Any) -> None:
        super().__init__()
        self.rnn: Any = kind(5, 6, batch_first=True, **options)
        self.ordered, self.both = ordered, 1 + self.rnn.bidirectional
        self.out, self.last = Linear(6 * self.both, 2), Linear(6, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=self.ordered)
        y, state = self.rnn(packed)
        y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
        state = state[0] if isinstance(state, tuple) else state
        return self.out(y), self.last(state[-1])


class Episodes(nn.Module):
    """A recurrence that starts anew wherever an episode is done."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.cell, self.out = 6, nn.LSTMCell(5, 6), Linear(6, 2)

    def forward(self, x: Tensor, done: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[1], self.width, dtype=x.dtype)
        seen: list[Tensor] = []
        for step, over in zip(x, done, strict=True):
            keep = (1 - over).view(-1, 1)
            h, c = self.cell(step, (keep * h, keep * c))
            seen.append(h)
        return self.out(torch.stack(seen))


MASKED: dict[str, Callable[..., Tensor]] = {
    "where": torch.where,
    "mul": lambda m, new, h: m * new + (1 - m.to(h.dtype)) * h,
    "lerp": lambda m, new, h: h + m * (new - h),
}

RECURRENT = [
    _case("lstm", lambda: Recurrent(nn.LSTM), SEQUENCE, rnn=5),
    _case("gru", lambda: Recurrent(nn.GRU), SEQUENCE, rnn=5),
    _case("rnn_tanh", lambda: Recurrent(nn.RNN), SEQUENCE, rnn=5),
    _case("bidirectional_gru", lambda: Recurrent(nn.GRU, bidirectional=True), SEQUENCE, rnn=10),
    _case("stacked_lstm", lambda: Recurrent(nn.LSTM, num_layers=2), SEQUENCE, rnn=10),
    _case("projected_lstm", lambda: Recurrent(nn.LSTM, proj_size=3), SEQUENCE, ("rnn",)),
    _sequence(
        "lstm_last_state", _last_state, lambda: {"rnn": nn.LSTM(8, 5, 2, batch_first=True), "out": Linear(5, 2)}, rnn=10
    ),
    *(
        _case(
            f"gru_masked_{how}",
            lambda step=step: MaskedGRU(step),
            lambda: (torch.randn(3, 4, 5), torch.tensor([2, 4, 1])),
            rnn=6,
        )
        for how, step in MASKED.items()
    ),
    *(
        _case(
            f"packed_{name}",
            lambda kind=kind, options=options: Packed(kind, False, **options),
            lambda: (torch.randn(3, 4, 5), torch.tensor([2, 4, 2])),
            data_dependent=True,
            rnn=count,
        )
        for name, kind, count, options in (
            ("lstm", nn.LSTM, 12, {"bidirectional": True}),
            ("gru", nn.GRU, 12, {"num_layers": 2}),
            ("rnn", nn.RNN, 6, {}),
        )
    ),
    _case(
        "packed_in_order",
        lambda: Packed(nn.LSTM, True),
        lambda: (torch.randn(3, 4, 5), torch.tensor([4, 2, 1])),
        data_dependent=True,
        rnn=6,
    ),
    _case("lstm_episodes", Episodes, lambda: (torch.randn(4, 3, 5), torch.zeros(4, 3)), rnn=6),
    _sequence("lstm_cell", _cell, lambda: {"cell": nn.LSTMCell(8, 5), "out": Linear(5, 2)}, rnn=5),
    _sequence("elman_by_hand", _elman, lambda: {"a": Linear(8, 5), "h": Linear(5, 5), "out": Linear(5, 2)}, "rnn"),
]

# Sums


class DropPath(nn.Module):
    """Stochastic depth: all or nothing of a branch, while training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1) > 0.2) / 0.8 if self.training else x


def _parallel(m: nn.Module, x: Tensor) -> Tensor:
    y = m.norm(x)
    return x + m.o(_sdpa(m.q(y), m.k(y), m.v(y))) + m.down(F.gelu(m.up(y)))


def _long_skip(m: nn.Module, x: Tensor) -> Tensor:
    x = m.start(x)
    a = F.relu(m.a(x))
    return m.out(F.relu(m.b(a)) + a + x)


def _residual_parts() -> dict[str, Any]:
    return {"start": Linear(4, 6), "up": Linear(6, 8), "down": Linear(8, 6), "out": Linear(6, 2)}


def _residual(name: str, add: Callable[..., Tensor], more: Callable[[], dict[str, Any]] = dict) -> Case:
    """One residual block of eight units, in which ``add`` joins the stream and the branch."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.start(x)
        return m.out(add(m, x, m.down(F.relu(m.up(x)))))

    return _rows(name, run, lambda: {**_residual_parts(), **more()}, "hidden", blocks=1)


SUMS = [
    _residual("residual", lambda m, x, y: x + y),
    _residual("residual_post_norm", lambda m, x, y: m.norm(x + y), lambda: {"norm": LayerNorm(6)}),
    _residual("stochastic_depth", lambda m, x, y: x + m.drop(y), lambda: {"drop": DropPath()}),
    _residual("layer_scale", lambda m, x, y: x + m.scale * y, lambda: {"scale": torch.randn(6)}),
    _residual("rezero", lambda m, x, y: x + m.scale * y, lambda: {"scale": torch.randn(1)}),
    _residual("residual_half", lambda m, x, y: torch.add(x, y, alpha=0.5)),
    _image(
        "projection_shortcut",
        lambda m, x: m.out(F.relu(m.b(F.relu(m.a(x))) + m.skip(x))),
        lambda: {
            "a": Conv2d(3, 5, 3, padding=1),
            "b": Conv2d(5, 4, 3, padding=1),
            "skip": Conv2d(3, 4, 1),
            "out": Conv2d(4, 2, 1),
        },
        "channels",
        "hidden",
        blocks=1,
    ),
    _sequence(
        "parallel_block",
        _parallel,
        lambda: {**_projections(), "norm": LayerNorm(8), "up": Linear(8, 12), "down": Linear(12, 8)},
        heads=2,
        hidden=12,
    ),
    _rows(
        "long_skip",
        _long_skip,
        lambda: {"start": Linear(4, 6), "a": Linear(6, 6), "b": Linear(6, 6), "out": Linear(6, 2)},
        "channels",
    ),
    _rows("branches_sum", lambda m, x: m.out(F.relu(m.a(x)) + F.relu(m.b(x))), _branches_parts, "channels"),
    _rows(
        "broadcast_sum",
        lambda m, x: m.out(F.relu(m.a(x) + m.b(x))),
        lambda: {"a": Linear(4, 6), "b": Linear(4, 1), "out": Linear(6, 2)},
    ),
    _rows(
        "residual_output",
        lambda m, x: x + m.b(F.relu(m.a(x))),
        lambda: {"a": Linear(4, 6), "b": Linear(6, 4)},
        hidden=6,
        blocks=1,
    ),
]

# Forms of input and output


@dataclass
class Output:
    """An output with fields."""

    logits: Tensor
    state: Tensor


torch.export.register_dataclass(Output)


def _outputs(wrap: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    def run(m: nn.Module, x: Tensor) -> Any:
        h = F.relu(m.a(x))
        return wrap(m.b(h), h)

    return run


def _branch(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if x.sum() > 0 else m.b(-m.a(x))


def _parts_parts() -> dict[str, Any]:
    return {"left": Linear(4, 3), "right": Linear(2, 5), "out": Linear(8, 2)}


FORMS = [
    _rows(
        "multiple_outputs", lambda m, x: (m.b(F.relu(m.a(x))), m.c(x)), lambda: {**two()(), "c": Linear(4, 3)}, hidden=6
    ),
    _rows("output_inner", _outputs(lambda y, h: (y, h)), two()),
    _rows("dict_output", _outputs(lambda y, h: {"logits": y, "parts": [h[:, :2], {"norm": h.norm()}]}), two()),
    _rows("dataclass_output", _outputs(Output), two()),
    _case(
        "dict_input",
        lambda: Net(
            lambda m, x: m.out(torch.cat([m.left(x["left"]), m.right(x["right"])], 1).relu()), **_parts_parts()
        ),
        lambda: ({"left": torch.randn(3, 4), "right": torch.randn(3, 2)},),
        hidden=8,
    ),
    Case(
        "keyword_inputs",
        "pattern",
        lambda: Net(
            lambda m, left, right: m.out(torch.cat([m.left(left), m.right(right)], 1).relu()), **_parts_parts()
        ).eval(),
        tuple,
        lambda: {"left": torch.randn(3, 4), "right": torch.randn(3, 2)},
        expect={"hidden": 8},
    ),
    _rows("data_dependent_branch", _branch, two(), data_dependent=True),
]

PATTERNS = [*SHAPES, *CONVOLUTIONS, *GATES, *WEIGHTS, *ATTENTION, *RECURRENT, *SUMS, *FORMS]
