"""Networks written by hand, as people write them: convolutional, mixers, transformers, tabular, recurrent, adapted."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from patterns import Case, ids, normal
from torch import Tensor, nn

CHANNELS = frozenset({"channels"})
RESIDUAL = CHANNELS | {"blocks"}


def conv(
    c: int, out: int, k: int = 3, stride: int = 1, act: Callable[[], nn.Module] = nn.ReLU, **options: Any
) -> nn.Sequential:
    """Convolution that keeps the size (at stride one), BatchNorm and activation."""
    padding = options.pop("dilation", 1) * (k // 2)
    return nn.Sequential(nn.Conv2d(c, out, k, stride, padding, bias=False, **options), nn.BatchNorm2d(out), act())


def head(c: int, classes: int = 5) -> nn.Sequential:
    """Global pooling and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


# Convolutional networks


class Block(nn.Module):
    """A residual block around any branch, with a projection where the shape changes."""

    def __init__(self, branch: nn.Module, c: int, out: int, stride: int = 1, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        same = c == out and stride == 1
        self.skip = nn.Identity() if same else conv(c, out, 1, stride, nn.Identity)
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.skip(x))


def basic(c: int, out: int, stride: int = 1) -> Block:
    return Block(nn.Sequential(conv(c, out, 3, stride), conv(out, out, act=nn.Identity)), c, out, stride)


def bottleneck(c: int, out: int, stride: int = 1, groups: int = 1) -> Block:
    inner = out // 2
    middle = conv(inner, inner, 3, stride, groups=groups)
    return Block(nn.Sequential(conv(c, inner, 1), middle, conv(inner, out, 1, act=nn.Identity)), c, out, stride)


def _resnet() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.MaxPool2d(2), basic(8, 8), basic(8, 16, 2), basic(16, 16), head(16))


def _bottlenecks(groups: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        conv(3, 8),
        bottleneck(8, 16, groups=groups),
        bottleneck(16, 32, 2, groups),
        bottleneck(32, 32, 1, groups),
        head(32),
    )


class PreAct(nn.Module):
    """A residual block whose norms stand in front of its convolutions."""

    def __init__(self, c: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(c, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip = None if c == out and stride == 1 else nn.Conv2d(c, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        skip = x if self.skip is None else self.skip(h)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(h))))


def _preact() -> nn.Module:
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return nn.Sequential(stem, PreAct(8, 8), PreAct(8, 16, 2), PreAct(16, 16), nn.BatchNorm2d(16), nn.ReLU(), head(16))


def _vgg() -> nn.Module:
    layers = [conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 16), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 16, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5))


class Dense(nn.Module):
    """A dense block: every layer reads all earlier ones."""

    def __init__(self, c: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(c + i * growth), nn.ReLU(), nn.Conv2d(c + i * growth, 2 * growth, 1, bias=False)),
                *(nn.BatchNorm2d(2 * growth), nn.ReLU(), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def _densenet() -> nn.Module:
    transition = [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2)]
    return nn.Sequential(
        conv(3, 8), Dense(8, 4, 2), *transition, Dense(8, 4, 2), nn.BatchNorm2d(16), nn.ReLU(), head(16)
    )


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv(c, 4, 1),
                nn.Sequential(conv(c, 4, 1), conv(4, 6)),
                nn.Sequential(conv(c, 2, 1), conv(2, 4, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(c, 2, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Fire(nn.Module):
    """Squeeze, then expand twice."""

    def __init__(self, c: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(c, squeeze, 1)
        self.expand1, self.expand3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


def _squeezenet() -> nn.Module:
    last = [nn.Conv2d(16, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), Fire(8, 4, 8), Fire(16, 4, 8), *last)


class Excite(nn.Module):
    """Squeeze and excitation, by 1x1 convolutions."""

    def __init__(self, c: int, inner: int, gate: Callable[[], nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, inner, 1), nn.ReLU(), nn.Conv2d(inner, c, 1), gate()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def inverted(
    c: int, out: int, stride: int = 1, act: Callable[[], nn.Module] = nn.ReLU6, excite: Any = None
) -> nn.Module:
    """An inverted residual, without a sum where the shape changes."""
    inner = 2 * c
    layers = [conv(c, inner, 1, act=act), conv(inner, inner, 3, stride, act, groups=inner)]
    layers += [Excite(inner, 4, excite)] if excite else []
    branch = nn.Sequential(*layers, conv(inner, out, 1, act=nn.Identity))
    return Block(branch, c, out, stride, nn.Identity()) if c == out and stride == 1 else branch


def _inverted(act: Callable[[], nn.Module], excite: Any = None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        blocks = [
            inverted(8, 8, act=act, excite=excite),
            inverted(8, 12, 2, act, excite),
            inverted(12, 12, 1, act, excite),
        ]
        return nn.Sequential(conv(3, 8, 3, 2, act), *blocks, conv(12, 24, 1, act=act), head(24))

    return make


class Shuffle(nn.Module):
    """A unit of ShuffleNetV2: half of the channels pass, then both halves are interleaved."""

    def __init__(self, c: int) -> None:
        super().__init__()
        h = c // 2
        self.branch = nn.Sequential(conv(h, h, 1), conv(h, h, 3, act=nn.Identity, groups=h), conv(h, h, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, 1)
        y = torch.cat([kept, self.branch(x)], 1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleDown(nn.Module):
    """The unit of ShuffleNetV2 that halves the size."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        h = out // 2
        self.left = nn.Sequential(conv(c, c, 3, 2, nn.Identity, groups=c), conv(c, h, 1))
        self.right = nn.Sequential(conv(c, h, 1), conv(h, h, 3, 2, nn.Identity, groups=h), conv(h, h, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x)], 1)
        return F.channel_shuffle(y, 2)


class ConvNextBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels last, two linear layers, layer scale."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.scale = nn.Parameter(0.1 * torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an image, by hand."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def _convnext() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 4, 4), ChannelNorm(8)]
    down = [ChannelNorm(8), nn.Conv2d(8, 16, 2, 2)]
    return nn.Sequential(*stem, ConvNextBlock(8), *down, ConvNextBlock(16), head(16))


class UNet(nn.Module):
    """Two levels, with skips by concatenation and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = (
            nn.Sequential(conv(i, o), conv(o, o)) for i, o in ((3, 4), (4, 8), (8, 16))
        )
        self.up2, self.up1 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.merge2, self.merge1 = conv(16, 8), conv(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.bottom(F.max_pool2d(b, 2))
        x = self.merge2(torch.cat([self.up2(x), b], 1))
        return self.out(self.merge1(torch.cat([self.up1(x), a], 1)))


class Pyramid(nn.Module):
    """A feature pyramid: lateral convolutions, sums top down, an output at each level."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 4, 3, 2), conv(4, 8, 3, 2), conv(8, 16, 3, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (4, 8, 16))
        self.smooth = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            features.append(lateral(x))
        levels = [features[-1]]
        for f in reversed(features[:-1]):
            levels.append(f + F.interpolate(levels[-1], scale_factor=2.0, mode="nearest"))
        return [self.head(smooth(level)) for smooth, level in zip(self.smooth, levels, strict=True)]


class CrossStage(nn.Module):
    """A cross-stage partial block, as in YOLO: split, bottlenecks that all feed the concatenation."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first = conv(c, c, 1, act=nn.SiLU)
        self.inner = nn.ModuleList(
            Block(conv(c // 2, c // 2, act=nn.SiLU), c // 2, c // 2, 1, nn.Identity()) for _ in range(2)
        )
        self.last = conv(c * 2, c, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).split(x.shape[1] // 2, 1))
        for block in self.inner:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Backbone, spatial pyramid pooling, upsampled neck and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2, nn.SiLU), CrossStage(8))
        self.deep = nn.Sequential(conv(8, 16, 3, 2, nn.SiLU), CrossStage(16))
        self.squeeze, self.expand = conv(16, 8, 1, act=nn.SiLU), conv(32, 16, 1, act=nn.SiLU)
        self.neck = conv(24, 8, act=nn.SiLU)
        self.heads = nn.ModuleList([nn.Conv2d(8, 6, 1), nn.Conv2d(16, 6, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.stem(x)
        b = self.deep(a)
        pooled = [self.squeeze(b)]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        b = self.expand(torch.cat(pooled, 1))
        a = self.neck(torch.cat([a, F.interpolate(b, scale_factor=2.0)], 1))
        return self.heads[0](a).flatten(2), self.heads[1](b).flatten(2)


class Res2(nn.Module):
    """A hierarchy of small convolutions inside one residual block."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last = conv(c, c, 1), conv(c, c, 1, act=nn.Identity)
        self.inner = nn.ModuleList(conv(c // 4, c // 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(self.first(x), 4, 1)
        done = [parts[0]]
        for part, layer in zip(parts[1:], self.inner, strict=True):
            done.append(layer(part + done[-1]) if len(done) > 1 else layer(part))
        return F.relu(x + self.last(torch.cat(done, 1)))


class Ghost(nn.Module):
    """Half of the channels by convolution, the other half cheaply from these."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.primary, self.cheap = conv(c, out // 2, 1), conv(out // 2, out // 2, groups=out // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)


def _autoencoder() -> nn.Module:
    encoder = [
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 6),
    ]
    decoder = [nn.Linear(6, 128), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 4, 2, 2), nn.ReLU()]
    return nn.Sequential(*encoder, *decoder, nn.ConvTranspose2d(4, 1, 2, 2), nn.Sigmoid())


class WaveNet(nn.Module):
    """Gated dilated causal convolutions with residual and skip sums."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, c, 1)
        self.filters = nn.ModuleList(nn.Conv1d(c, c, 2, dilation=2**i) for i in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(c, c, 2, dilation=2**i) for i in range(3))
        self.residual = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(c, 12, 1) for _ in range(3))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(12, 12, 1), nn.ReLU(), nn.Conv1d(12, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), 0
        for i, (f, g, r, s) in enumerate(zip(self.filters, self.gates, self.residual, self.skip, strict=True)):
            padded = F.pad(x, (2**i, 0))
            h = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
            total = total + s(h)
            x = x + r(h)
        return self.out(total)


class Causal(nn.Module):
    """A block of a temporal convolutional network: two weight-normed causal convolutions that cut what they padded."""

    def __init__(self, c: int, out: int, dilation: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.cut = dilation
        self.conv1 = norm(nn.Conv1d(c, out, 2, padding=dilation, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(out, out, 2, padding=dilation, dilation=dilation))
        self.skip = nn.Conv1d(c, out, 1) if c != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[..., : -self.cut])
        y = F.relu(self.conv2(y)[..., : -self.cut])
        return F.relu(y + self.skip(x))


class LastStep(nn.Module):
    """Read the last time step."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.out = nn.Linear(c, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x[..., -1])


class Euler(nn.Module):
    """One field applied at several times, as an ODE solver does."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.field = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for step in range(4):
            time = torch.full_like(x[:, :1], step / 4)
            x = x + 0.25 * self.field(torch.cat([x, time], 1))
        return self.out(x)


# Mixers and transformers


def mlp(c: int, inner: int, act: Callable[[], nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c, inner), act(), nn.Linear(inner, c))


class Patches(nn.Module):
    """An image as a sequence of patches."""

    def __init__(self, c: int, size: int = 8) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, c, size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, c: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.tokens, self.channels = mlp(tokens, 24), mlp(c, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class SpatialGate(nn.Module):
    """gMLP: one half of the units gates the other, after mixing over tokens."""

    def __init__(self, tokens: int, c: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 2 * inner), nn.Linear(inner, c)
        self.gate_norm, self.mix = nn.LayerNorm(inner), nn.Conv1d(tokens, tokens, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        return x + self.down(u * self.mix(self.gate_norm(v)))


class Affine(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


class ResMlpBlock(nn.Module):
    def __init__(self, tokens: int, c: int) -> None:
        super().__init__()
        self.before1, self.before2, self.after1, self.after2 = (Affine(c) for _ in range(4))
        self.tokens, self.channels = nn.Linear(tokens, tokens), mlp(c, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.after1(self.tokens(self.before1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.after2(self.channels(self.before2(x)))


class Pooled(nn.Module):
    """Norm, mean over tokens, classifier."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(c), nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).mean(1))


def _patched(block: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(Patches(32), block(), block(), Pooled(32))


class FusedAttention(nn.Module):
    """Self attention from one projection, with optional talking heads, causal mask and bias."""

    def __init__(self, c: int, heads: int, *, talking: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.talk = nn.ModuleList(nn.Linear(heads, heads) for _ in range(2)) if talking else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
        if bias is not None:
            scores = scores + bias
        if self.causal:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        if self.talk is not None:
            scores = self.talk[0](scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = scores.softmax(-1)
        if self.talk is not None:
            weights = self.talk[1](weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


class Layer(nn.Module):
    """A pre-norm transformer layer, with optional layer scale."""

    def __init__(self, c: int = 32, heads: int = 4, inner: int = 64, *, scale: bool = False, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attention, self.mlp = FusedAttention(c, heads, **options), mlp(c, inner)
        self.scales = nn.ParameterList(0.1 * torch.ones(c) for _ in range(2)) if scale else [1.0, 1.0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scales[0] * self.attention(self.norm1(x))
        return x + self.scales[1] * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with a class token, and optionally a second one for distillation."""

    def __init__(self, tokens: int = 1, **options: Any) -> None:
        super().__init__()
        self.patches = Patches(32)
        self.token = nn.Parameter(torch.zeros(1, tokens, 32))
        self.position = nn.Parameter(torch.zeros(1, 16 + tokens, 32))
        self.layers = nn.Sequential(Layer(**options), Layer(**options))
        self.norm = nn.LayerNorm(32)
        self.heads = nn.ModuleList(nn.Linear(32, 5) for _ in range(tokens))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = self.norm(self.layers(x))
        return sum(h(x[:, i]) for i, h in enumerate(self.heads)) / len(self.heads)


class WindowLayer(nn.Module):
    """Attention inside shifted windows with a relative position bias, and a feed-forward layer."""

    def __init__(self, c: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.size, self.window, self.shift, self.heads = size, window, shift, heads
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attention, self.mlp = FusedAttention(c, heads), mlp(c, 2 * c)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        b, s, _, c = x.shape
        w, k = self.window, s // self.window
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(b, k, w, k, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)
        y = self.attention(y, self.table[self.index].permute(2, 0, 1)[None])
        y = y.view(b, k, k, w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, s, s, c)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Four neighbouring patches become one."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * c), nn.Linear(4 * c, 2 * c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.stages = nn.Sequential(
            *(WindowLayer(16, 2, 8, 4, 0), WindowLayer(16, 2, 8, 4, 2)),
            *(Merge(16), WindowLayer(32, 4, 4, 4, 0)),
        )
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.patches(x).permute(0, 2, 3, 1))
        return self.out(self.norm(x).mean((1, 2)))


class NanoGpt(nn.Module):
    """A character model with tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(99, 32), nn.Embedding(16, 32)
        self.layers = nn.Sequential(Layer(causal=True), Layer(causal=True))
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 99, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.out(self.norm(self.layers(h)))


class Translator(nn.Module):
    """``nn.Transformer`` between embeddings and a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.out = nn.Embedding(99, 32), nn.Embedding(99, 32), nn.Linear(32, 99)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.out(self.transformer(self.source(source), self.target(target), tgt_mask=mask))


class MultiHead(nn.Module):
    """Self and cross attention by ``nn.MultiheadAttention``, with sums around both."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 16)
        self.own = nn.MultiheadAttention(16, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 4, kdim=10, vdim=10, batch_first=True)
        self.norm1, self.norm2, self.out = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.start(x)
        x = self.norm1(x + self.own(x, x, x, need_weights=False)[0])
        return self.out(self.norm2(x + self.cross(x, memory, memory)[0]))


# Tables, ensembles, additive models


class FTTransformer(nn.Module):
    """Every feature is a token: a direction of its own times its value, plus a bias."""

    def __init__(self, features: int = 6, categories: tuple[int, ...] = (4, 3)) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(features, 32)) for _ in range(2))
        self.tables = nn.ModuleList(nn.Embedding(n, 32) for n in categories)
        self.token = nn.Parameter(torch.zeros(32))
        self.layers = nn.Sequential(Layer(), Layer())
        self.out = nn.Sequential(nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        numbers = x[:, :, None] * self.weight + self.bias
        kinds = torch.stack([table(codes[:, i]) for i, table in enumerate(self.tables)], 1)
        tokens = torch.cat([self.token.expand(len(x), 1, -1), numbers, kinds], 1)
        return self.out(self.layers(tokens)[:, 0])


class TabNet(nn.Module):
    """Steps that choose inputs by an attentive mask, from a shared and an own gated layer."""

    def __init__(self, features: int = 8, steps: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.shared = nn.Linear(features, 32)
        self.own = nn.ModuleList(nn.Linear(16, 32) for _ in range(steps))
        self.masks = nn.ModuleList(nn.Linear(8, features) for _ in range(steps))
        self.first, self.out = nn.Linear(features, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        attend, prior, total = self.first(x), torch.ones_like(x), 0
        for own, mask in zip(self.own, self.masks, strict=True):
            m = (mask(attend) * prior).softmax(-1)
            prior = prior * (1.5 - m)
            h = F.glu(self.shared(m * x))
            decision, attend = (h + F.glu(own(h))).chunk(2, -1)
            total = total + F.relu(decision)
        return self.out(total)


class Oblivious(nn.Module):
    """An ensemble of oblivious trees (NODE): all nodes of a level share a soft choice of feature and a threshold."""

    def __init__(self, features: int = 6, trees: int = 8, depth: int = 3, out: int = 2) -> None:
        super().__init__()
        self.response = nn.Parameter(torch.randn(trees, out, 2**depth))
        self.choice = nn.Parameter(torch.randn(features, trees, depth))
        self.threshold, self.temperature = (
            nn.Parameter(torch.randn(trees, depth)),
            nn.Parameter(torch.zeros(trees, depth)),
        )
        codes = torch.arange(2**depth)[None] // 2 ** torch.arange(depth)[:, None] % 2
        self.register_buffer("codes", torch.stack([codes, 1 - codes], -1).float())

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.einsum("bi,ind->bnd", x, self.choice.softmax(0))
        logits = (chosen - self.threshold) * torch.exp(-self.temperature)
        bins = torch.stack([logits.sigmoid(), (-logits).sigmoid()], -1)
        leaves = torch.einsum("bnds,dcs->bndc", bins, self.codes).prod(2)
        return torch.einsum("bnl,ncl->bnc", leaves, self.response)


class TreeEnsemble(nn.Module):
    """The sum over an ensemble of oblivious trees."""

    def __init__(self) -> None:
        super().__init__()
        self.trees, self.scale = Oblivious(), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.trees(x).mean(1) * self.scale


class DenseTrees(nn.Module):
    """Layers of trees, each reading the inputs and the outputs of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Oblivious(6, 4, 2, 2), Oblivious(14, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(torch.cat([x, a.flatten(1)], 1))
        return torch.cat([a, b], 1).mean(1)


class SoftTree(nn.Module):
    """One soft decision tree: a linear split in every inner node, level by level."""

    def __init__(self, features: int, depth: int, out: int) -> None:
        super().__init__()
        self.depth = depth
        self.split = nn.Linear(features, 2**depth - 1)
        self.leaf = nn.Parameter(torch.randn(2**depth, out))

    def forward(self, x: Tensor) -> Tensor:
        right = torch.sigmoid(self.split(x))
        reach = torch.ones_like(x[:, :1])
        for level in range(self.depth):
            p = right[:, 2**level - 1 : 2 ** (level + 1) - 1]
            reach = torch.stack([reach * (1 - p), reach * p], 2).flatten(1)
        return reach @ self.leaf


class SoftForest(nn.Module):
    """Several soft trees as modules, summed."""

    def __init__(self, trees: int = 4) -> None:
        super().__init__()
        self.trees = nn.ModuleList(SoftTree(6, 3, 2) for _ in range(trees))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([tree(x) for tree in self.trees]).sum(0) + self.bias


class BatchedForest(nn.Module):
    """All soft trees at once, by broadcasting and matrix products."""

    def __init__(self, features: int = 6, trees: int = 5, out: int = 2) -> None:
        super().__init__()
        self.split, self.offset = nn.Parameter(torch.randn(trees, features, 3)), nn.Parameter(torch.zeros(trees, 1, 3))
        self.leaf = nn.Parameter(torch.randn(trees, 4, out))

    def forward(self, x: Tensor) -> Tensor:
        right = torch.sigmoid(x @ self.split + self.offset)
        root, left, other = right[..., 0], right[..., 1], right[..., 2]
        reach = [(1 - root) * (1 - left), (1 - root) * left, root * (1 - other), root * other]
        return (torch.stack(reach, -1) @ self.leaf).mean(0)


class Additive(nn.Module):
    """A neural additive model: a network for each feature, summed."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.shapes = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
            for _ in range(features)
        )
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(shape(x[:, i : i + 1]) for i, shape in enumerate(self.shapes)) + self.bias


class GroupedAdditive(nn.Module):
    """A neural additive model whose networks are the groups of convolutions."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        f = features
        self.net = nn.Sequential(
            *(nn.Conv1d(f, 8 * f, 1, groups=f), nn.ReLU(), nn.Conv1d(8 * f, 4 * f, 1, groups=f), nn.ReLU()),
            nn.Conv1d(4 * f, 2 * f, 1, groups=f),
        )
        self.features, self.bias = f, nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :, None]).view(len(x), self.features, 2).sum(1) + self.bias


class EinsumAdditive(nn.Module):
    """A neural additive model in three-dimensional parameters."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(features, 8)), nn.Parameter(torch.zeros(features, 8))
        self.w2 = nn.Parameter(torch.randn(features, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bfh,fho->bo", F.relu(x[..., None] * self.w1 + self.b1), self.w2)


class Branches(nn.Module):
    """An image, a text and a table, each through its own branch."""

    def __init__(self, out: int = 8) -> None:
        super().__init__()
        self.image = nn.Sequential(
            conv(3, 4, 3, 2), conv(4, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, out)
        )
        self.words, self.text = nn.Embedding(99, 12), nn.Linear(12, out)
        self.table = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, out))

    def forward(self, image: Tensor, text: Tensor, table: Tensor) -> list[Tensor]:
        return [self.image(image), self.text(self.words(text).mean(1)), self.table(table)]


class Fusion(nn.Module):
    """Late fusion of the branches, by concatenation or by sum."""

    def __init__(self, *, by_sum: bool) -> None:
        super().__init__()
        self.branches, self.by_sum = Branches(), by_sum
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(8 if by_sum else 24, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, image: Tensor, text: Tensor, table: Tensor) -> Tensor:
        parts = self.branches(image, text, table)
        return self.out(sum(parts) if self.by_sum else torch.cat(parts, 1))


# Mixtures of experts


class Mixture(nn.Module):
    """Modules as experts, all evaluated; ``top`` of them are used, or all."""

    def __init__(self, experts: int = 4, top: int | None = None) -> None:
        super().__init__()
        self.router, self.top = nn.Linear(16, experts), top
        self.experts = nn.ModuleList(mlp(16, 12, nn.ReLU) for _ in range(experts))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        if self.top:
            best, index = weights.topk(self.top, -1)
            weights = torch.zeros_like(weights).scatter(-1, index, best / best.sum(-1, keepdim=True))
        y = torch.stack([expert(x) for expert in self.experts], -1)
        return self.out((y * weights[..., None, :]).sum(-1))


class BatchedMixture(nn.Module):
    """Experts in three-dimensional parameters, with a residual sum."""

    def __init__(self, experts: int = 4, inner: int = 12) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts, bias=False)
        self.up, self.gate = (nn.Parameter(torch.randn(experts, 16, inner)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(experts, inner, 16))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        h = F.silu(torch.einsum("bd,edi->ebi", x, self.gate)) * torch.einsum("bd,edi->ebi", x, self.up)
        return self.out(x + torch.einsum("ebi,eid,be->bd", h, self.down, weights))


# Recurrent networks


class TextClassifier(nn.Module):
    """An embedding, a recurrent network and a classifier on the last or mean state."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(99, 12)
        self.rnn = kind(12, 16, batch_first=True, **options)
        self.both = bool(options.get("bidirectional"))
        self.out = nn.Linear(32 if self.both else 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(self.words(x))[0]
        return self.out(states.mean(1) if self.both else states[:, -1])


class CellTranslator(nn.Module):
    """A recurrent encoder, and a decoder that steps a cell with dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(99, 12), nn.LSTM(12, 16, batch_first=True)
        self.cell, self.out = nn.LSTMCell(12 + 16, 16), nn.Linear(32, 99)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, (h, c) = self.encoder(self.words(source))
        h, c, context, steps = h[0], c[0], memory.mean(1), []
        for word in self.words(target).unbind(1):
            h, c = self.cell(torch.cat([word, context], 1), (h, c))
            weights = (memory @ h[:, :, None]).softmax(1)
            context = (weights * memory).sum(1)
            steps.append(self.out(torch.cat([h, context], 1)))
        return torch.stack(steps, 1)


# Adapters


def _lora(model: nn.Module, targets: list[str]) -> nn.Module:
    peft = importlib.import_module("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what peft calls is deprecated in transformers
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    return adapted.eval()


def _lora_mlp() -> nn.Module:
    return _lora(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), ["0", "2"])


def _lora_llama() -> nn.Module:
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return _lora(transformers.LlamaForCausalLM(config), ["q_proj", "v_proj"])


def _case(
    family: str,
    name: str,
    factory: Callable[[], nn.Module],
    inputs: Callable[[], tuple[Any, ...]],
    applies: Iterable[str] = (),
    **expect: int,
) -> Case:
    return Case(name, family, lambda: factory().eval(), inputs, dict, frozenset(applies), expect)


def _modalities() -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 16, 16), ids(2, 7), torch.randn(2, 6)


def _text() -> tuple[Tensor, ...]:
    return (ids(2, 7),)


def _pair() -> tuple[Tensor, ...]:
    return ids(2, 7), ids(2, 5)


_IMAGE = normal((2, 3, 16, 16))
_LARGE = normal((2, 3, 32, 32))
_ROWS = normal((4, 6))
_LAYERS = {"heads": 8, "hidden": 128, "blocks": 4}

HANDWRITTEN = [
    _case("convolutional", "hand_resnet", _resnet, _IMAGE, CHANNELS, blocks=3),
    _case("convolutional", "hand_resnet_bottleneck", _bottlenecks(1), _IMAGE, CHANNELS, blocks=3),
    _case("convolutional", "hand_resnext", _bottlenecks(4), _IMAGE, CHANNELS, blocks=3),
    _case("convolutional", "hand_preact_resnet", _preact, _IMAGE, CHANNELS, blocks=3),
    _case("convolutional", "hand_vgg", _vgg, _IMAGE, CHANNELS | {"hidden"}),
    _case("convolutional", "hand_densenet", _densenet, _IMAGE, CHANNELS),
    _case(
        "convolutional",
        "hand_googlenet",
        lambda: nn.Sequential(conv(3, 8), Inception(8), Inception(16), head(16)),
        _IMAGE,
        CHANNELS,
    ),
    _case("convolutional", "hand_squeezenet", _squeezenet, _IMAGE, CHANNELS),
    _case("convolutional", "hand_mobilenet_v2", _inverted(nn.ReLU6), _LARGE, CHANNELS, blocks=2),
    _case("convolutional", "hand_mobilenet_v3", _inverted(nn.Hardswish, nn.Hardsigmoid), _LARGE, CHANNELS, blocks=2),
    _case("convolutional", "hand_efficientnet", _inverted(nn.SiLU, nn.Sigmoid), _LARGE, CHANNELS, blocks=2),
    _case(
        "convolutional",
        "hand_shufflenet",
        lambda: nn.Sequential(conv(3, 8), ShuffleDown(8, 16), Shuffle(16), Shuffle(16), head(16)),
        _IMAGE,
        CHANNELS,
    ),
    _case(
        "convolutional",
        "hand_regnet",
        lambda: nn.Sequential(
            conv(3, 8),
            Block(
                nn.Sequential(
                    conv(8, 16, 1), conv(16, 16, 3, 2, groups=2), Excite(16, 4), conv(16, 16, 1, act=nn.Identity)
                ),
                8,
                16,
                2,
            ),
            bottleneck(16, 16, groups=4),
            head(16),
        ),
        _IMAGE,
        CHANNELS,
        blocks=2,
    ),
    _case("convolutional", "hand_convnext", _convnext, _LARGE, CHANNELS, blocks=2),
    _case("convolutional", "hand_unet", UNet, _IMAGE, CHANNELS),
    _case("convolutional", "hand_fpn", Pyramid, _IMAGE, CHANNELS),
    _case("convolutional", "hand_yolo", Yolo, _IMAGE, CHANNELS, blocks=4),
    _case(
        "convolutional",
        "hand_res2net",
        lambda: nn.Sequential(conv(3, 16), Res2(16), Res2(16), head(16)),
        _IMAGE,
        RESIDUAL,
    ),
    _case(
        "convolutional",
        "hand_ghostnet",
        lambda: nn.Sequential(conv(3, 8), Ghost(8, 16), Ghost(16, 16), head(16)),
        _IMAGE,
        CHANNELS,
    ),
    _case("convolutional", "hand_autoencoder", _autoencoder, normal((2, 1, 16, 16)), CHANNELS | {"hidden"}),
    _case("convolutional", "hand_wavenet", WaveNet, normal((2, 1, 16)), RESIDUAL),
    _case(
        "convolutional",
        "hand_tcn",
        lambda: nn.Sequential(Causal(3, 8, 1), Causal(8, 8, 2), LastStep(8, 4)),
        normal((2, 3, 12)),
        CHANNELS,
        blocks=2,
    ),
    _case("repeated", "hand_ode", Euler, normal((4, 4)), {"blocks", "hidden", "input_features"}),
    _case("mixer", "hand_mlp_mixer", _patched(lambda: MixerBlock(16, 32)), _LARGE, hidden=2 * (24 + 64), blocks=4),
    _case("mixer", "hand_gmlp", _patched(lambda: SpatialGate(16, 32, 24)), _LARGE, {"channels"}, blocks=2),
    _case("mixer", "hand_resmlp", _patched(lambda: ResMlpBlock(16, 32)), _LARGE, hidden=128, blocks=4),
    _case("transformer", "hand_vit", ViT, _LARGE, **_LAYERS),
    _case("transformer", "hand_deit", lambda: ViT(2), _LARGE, **_LAYERS),
    _case("transformer", "hand_cait", lambda: ViT(scale=True, talking=True), _LARGE, {"heads", "hidden"}, blocks=4),
    _case("transformer", "hand_swin", Swin, _LARGE, heads=8, hidden=128, blocks=6),
    _case("transformer", "hand_nano_gpt", NanoGpt, _text, {"embedding_dims"}, **_LAYERS),
    _case("transformer", "hand_nn_transformer", Translator, _pair, {"embedding_dims"}, heads=24, hidden=256, blocks=10),
    _case(
        "transformer", "hand_multihead", MultiHead, normal((2, 5, 6), (2, 4, 10)), {"input_features"}, heads=8, blocks=2
    ),
    _case(
        "tabular",
        "hand_ft_transformer",
        FTTransformer,
        lambda: (torch.randn(4, 6), torch.randint(3, (4, 2))),
        {"input_features"},
        **_LAYERS,
    ),
    _case("tabular", "hand_tabnet", TabNet, normal((4, 8)), {"input_features"}),
    _case(
        "tabular",
        "hand_mlp",
        lambda: nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.SELU(), nn.Linear(8, 2)
        ),
        _ROWS,
        hidden=24,
        input_features=6,
    ),
    _case("trees", "hand_node", TreeEnsemble, _ROWS, trees=8),
    _case("trees", "hand_node_dense", DenseTrees, _ROWS, trees=8),
    _case("trees", "hand_soft_forest", SoftForest, _ROWS, trees=4, input_features=6),
    _case("trees", "hand_batched_forest", BatchedForest, _ROWS, trees=5, input_features=6),
    _case("additive", "hand_nam", Additive, normal((4, 5)), hidden=5 * (8 + 4), shape_functions=5, input_features=5),
    _case("additive", "hand_nam_grouped", GroupedAdditive, normal((4, 5)), {"input_features"}, shape_functions=5),
    _case("additive", "hand_nam_einsum", EinsumAdditive, normal((4, 5)), {"input_features"}, shape_functions=5),
    _case(
        "fusion",
        "hand_fusion_concat",
        lambda: Fusion(by_sum=False),
        _modalities,
        CHANNELS | {"hidden", "embedding_dims"},
        modalities=3,
    ),
    _case(
        "fusion",
        "hand_fusion_sum",
        lambda: Fusion(by_sum=True),
        _modalities,
        CHANNELS | {"hidden", "embedding_dims"},
        modalities=3,
    ),
    _case("mixture of experts", "hand_mixture", Mixture, normal((5, 16)), {"hidden"}, experts=4),
    _case("mixture of experts", "hand_mixture_top", lambda: Mixture(top=2), normal((5, 16)), {"hidden"}, experts=4),
    _case("mixture of experts", "hand_mixture_batched", BatchedMixture, normal((5, 16)), {"hidden"}, experts=4),
    _case("recurrent", "hand_lstm", lambda: TextClassifier(nn.LSTM), _text, rnn=16, embedding_dims=12),
    _case("recurrent", "hand_gru", lambda: TextClassifier(nn.GRU), _text, rnn=16, embedding_dims=12),
    _case(
        "recurrent",
        "hand_bilstm",
        lambda: TextClassifier(nn.LSTM, num_layers=2, bidirectional=True),
        _text,
        rnn=64,
        embedding_dims=12,
    ),
    _case("recurrent", "hand_seq2seq", CellTranslator, _pair, {"rnn", "embedding_dims"}),
    _case("adapter", "hand_lora_mlp", _lora_mlp, normal((4, 8)), {"hidden", "input_features"}, lora=2),
    _case("adapter", "hand_lora_llama", _lora_llama, _text, {"embedding_dims", "hidden"}, heads=4, blocks=4, lora=4),
]
