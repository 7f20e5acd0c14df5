"""The demo: train a small residual network on scikit-learn's digits, dense and gated, and compare what is exported.

Everything that concerns gates is in `train` and `fit`; the rest is an ordinary script around them.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgate_wrap as dg

from .errors import DGateError

TOL = 1e-4
"""Norm at or below which a filter is set to zero. Filters in front of a BatchNorm live at about 1e-3, √eps."""

IMAGES = 256
"""Images in the batch on which latency is measured."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        widths: Channels of the three stages.
        epochs: Passes over the training images.
        lams: λ of the gated runs, by D.
        lr: Learning rate at the start; falls to zero along a cosine.
        batch: Images per step.
    """

    widths: tuple[int, int, int]
    epochs: int
    lams: dict[int, tuple[float, ...]]
    lr: float = 0.1
    batch: int = 64


FULL = Settings((32, 64, 64), 16, {2: (0.5, 0.7, 1.0), 3: (0.1, 0.15, 0.175, 0.2), 4: (0.06, 0.1, 0.15)})
QUICK = Settings((8, 16, 16), 4, {2: (0.2,), 3: (0.1,), 4: (0.1,)})


class Block(nn.Module):
    """Two convolutions with BatchNorm, added to their input, or to a projection of it where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.skip = nn.Sequential()
        if channels != out or stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape ``(N, channels, H, W)`` to ``(N, out, H/stride, W/stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class DigitNet(nn.Module):
    """A residual network for 8×8 images in ten classes: a convolution, one block per stage, a linear layer."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Sequential(nn.Conv2d(1, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.stages = nn.Sequential(Block(a, a, 1), Block(a, b, 2), Block(b, c, 2))
        self.head = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape ``(N, 1, 8, 8)`` to logits of shape ``(N, 10)``."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """The images, standardized, shape ``(N, 1, 8, 8)``, and their classes, split once and for all."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Run:
    """One trained network.

    Args:
        D: Number of factors; 1 is the dense network.
        lam: λ.
        model: What was trained; of a gated run, what was exported.
        exported: The export of a gated run.
        accuracy: On the test images.
        loss: On the training images, in eval mode.
    """

    D: int
    lam: float
    model: nn.Module
    exported: dg.Exported | None
    accuracy: float
    loss: float

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"D={self.D}" if self.exported else "dense"


def load_digits() -> Digits:
    """Return scikit-learn's 1,797 digits; a stratified quarter of them, always the same, is for testing."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    bunch = cast(Any, load())
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = train_test_split(range(len(y)), test_size=0.25, stratify=bunch.target, random_state=0)
    x = (x - x[train].mean()) / x[train].std()
    return Digits(x[train], y[train], x[test], y[test])


def shifted(x: Tensor, rng: torch.Generator) -> Tensor:
    """Return every image moved by at most one pixel in each direction."""
    n, _, h, w = x.shape
    padded = F.pad(x, (1, 1, 1, 1), value=float(x.min()))
    down, right = torch.randint(3, (2, n, 1), generator=rng)
    rows, columns = (down + torch.arange(h))[:, :, None], (right + torch.arange(w))[:, None, :]
    return padded[torch.arange(n)[:, None, None], 0, rows, columns].unsqueeze(1)


def train(
    model: nn.Module, data: Digits, settings: Settings, seed: int, lam: float, advance: Callable[[], None]
) -> None:
    """Train in the ordinary way; if the model is gated, penalize it for three quarters of the epochs.

    From half of the epochs on, filters that are small are set to zero, which they stay. The last quarter trains what is
    left without the penalty.

    Args:
        model: Dense, or gated if ``lam`` is positive.
        data: The images.
        settings: How to train.
        seed: Of the order of the images, and of their shifts.
        lam: λ, reached over the first quarter; 0 for a dense model.
        advance: Called after every epoch.
    """
    rng = torch.Generator().manual_seed(seed)
    steps = len(data.train_y) // settings.batch
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
    penalty = dg.Penalty(model, lam).attach(optimizer) if lam else None
    for epoch in range(settings.epochs):
        model.train()
        if penalty:
            done = epoch / settings.epochs
            penalty.lam = lam * min(1.0, 4 * done + 4 / settings.epochs) if done < 0.75 else 0.0
        for rows in torch.randperm(len(data.train_y), generator=rng).split(settings.batch)[:steps]:
            loss = F.cross_entropy(model(shifted(data.train_x[rows], rng)), data.train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if penalty and penalty.lam and epoch >= settings.epochs // 2:
            dg.prune(model, tol=TOL, optimizer=optimizer)
        advance()


def fit(D: int, lam: float, data: Digits, settings: Settings, seed: int, advance: Callable[[], None]) -> Run:
    """Train one network, dense if ``D`` is 1, and export it if it is gated."""
    torch.manual_seed(seed)
    model: nn.Module = DigitNet(settings.widths)
    exported = None
    if D > 1:
        dg.gate(model, "filters", D=D)
    train(model, data, settings, seed, lam, advance)
    if D > 1:
        exported = dg.export(model, data.test_x[:IMAGES], latency=False)
        model = exported.model
    model.eval()
    with torch.no_grad():
        accuracy = float((model(data.test_x).argmax(1) == data.test_y).float().mean())
        loss = float(F.cross_entropy(model(data.train_x), data.train_y))
    return Run(D, lam, model, exported, accuracy, loss)


def latencies(models: Sequence[nn.Module], x: Tensor, rounds: int) -> list[float]:
    """Return the median seconds that each network takes for a batch, all of them run in turn."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(rounds + 1):
            for model, record in zip(models, times, strict=True):
                start = time.perf_counter()
                model(x)
                record.append(time.perf_counter() - start)
    return [statistics.median(record[1:]) for record in times]


def choose(runs: Sequence[Run], D: int) -> Run:
    """Choose the run to hand over: fits the training images best, of those with a quarter of the FLOPs or less.

    The test images have no say in it. If no run is that small, it is the one with the fewest FLOPs.
    """
    candidates = [(r, r.exported.report) for r in runs if r.exported and r.D == D]
    small = [r for r, report in candidates if 4 * report.after.flops <= report.before.flops]
    if small:
        return min(small, key=lambda r: r.loss)
    return min(candidates, key=lambda c: c[1].after.flops)[0]


def rows_of(runs: Sequence[Run], seconds: Sequence[float]) -> list[dict[str, Any]]:
    """Return what the table shows of each run, as plain data."""
    report = next(r.exported.report for r in runs if r.exported)
    rows: list[dict[str, Any]] = []
    for run, latency in zip(runs, seconds, strict=True):
        size = run.exported.report.after if run.exported else report.before
        dead = run.exported.report.pruning.dead if run.exported else 0
        rows.append(
            {
                "network": run.name,
                "D": run.D,
                "lam": run.lam,
                "accuracy": run.accuracy,
                "train_loss": run.loss,
                "groups_alive": report.pruning.total - dead,
                "groups": report.pruning.total,
                "parameters": size.parameters,
                "flops_per_image": size.flops / IMAGES,
                "latency": latency,
                "speedup": seconds[0] / latency,
            }
        )
    return rows


def show_table(console: Any, rows: Sequence[dict[str, Any]], chosen: int, threads: int) -> None:
    """Print one line per run, the chosen one in bold."""
    from rich.table import Table

    table = Table(caption=f"latency: median for {IMAGES} images on {threads} thread{'s' * (threads > 1)}; ► is saved")
    for name in ("network", "λ", "accuracy", "groups alive", "parameters", "MFLOPs/image", "latency", "speed-up"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for i, r in enumerate(rows):
        table.add_row(
            f"{'►' if i == chosen else ' '} {r['network']}",
            f"{r['lam']:g}" if r["D"] > 1 else "",
            f"{r['accuracy']:.1%}",
            f"{r['groups_alive']} / {r['groups']}",
            f"{r['parameters']:,}",
            f"{r['flops_per_image'] / 1e6:.2f}",
            f"{r['latency'] * 1e3:.1f} ms",
            f"{r['speedup']:.1f}×",
            style="bold" if i == chosen else None,
            end_section=i + 1 < len(rows) and rows[i + 1]["D"] != r["D"],
        )
    console.print(table)


def draw_tradeoff(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against FLOPs: a line per D, a point per λ, and the dense network."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    dense = rows[0]
    for D, mark in zip(sorted({r["D"] for r in rows if r["D"] > 1}), "os^", strict=False):
        line = sorted((r for r in rows if r["D"] == D), key=lambda r: r["flops_per_image"])
        x, y = [r["flops_per_image"] / 1e6 for r in line], [100 * r["accuracy"] for r in line]
        axes.plot(x, y, marker=mark, label=f"D = {D}")
        for r, a, b in zip(line, x, y, strict=True):
            axes.annotate(f"λ={r['lam']:g}", (a, b), (4, 4), textcoords="offset points", fontsize=7)
    x, y = dense["flops_per_image"] / 1e6, 100 * dense["accuracy"]
    axes.plot([x], [y], "k*", markersize=12, linestyle="none", label="dense")
    axes.axhline(y, color="0.8", zorder=0)
    axes.axvline(x / 4, color="0.8", zorder=0, linestyle="--", label="a quarter of the FLOPs")
    axes.set(xscale="log", xlabel="million FLOPs per image", ylabel="test accuracy (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Digits: exported networks, filters gated")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def demo(*, seed: int = 0, out: Path = Path("demo_out"), quick: bool = False, threads: int = 1) -> int:
    """Run the demo, print its table, and write a figure, the numbers and the exported network to a folder.

    Args:
        seed: Of the initial weights and the batches.
        out: The folder; made if it does not exist.
        quick: Whether to train a tiny network for a few epochs only.
        threads: Threads of torch, for the whole process.

    Returns:
        0 if the reloaded network gives the outputs of the exported one, bit for bit; else 1.

    Raises:
        DGateError: If an optional package is missing.
    """
    _require_packages()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    began = time.perf_counter()
    torch.set_num_threads(threads)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    settings = QUICK if quick else FULL
    data = load_digits()
    jobs = [(1, 0.0), *((D, lam) for D, lams in settings.lams.items() for lam in lams)]
    runs: list[Run] = []
    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("training", total=len(jobs) * settings.epochs)
        for D, lam in jobs:
            progress.update(task, description=f"D={D}, λ={lam:g}" if D > 1 else "dense")
            runs.append(fit(D, lam, data, settings, seed, lambda: progress.advance(task)))
        progress.update(task, description="trained")

    best = choose(runs, D=3)
    exported = cast(dg.Exported, best.exported)
    rows = rows_of(runs, latencies([r.model for r in runs], data.test_x[:IMAGES], rounds=5 if quick else 25))
    show_table(console, rows, runs.index(best), threads)

    out.mkdir(parents=True, exist_ok=True)
    draw_tradeoff(rows, out / "tradeoff.png")
    folder = dg.save(exported, out / "network")
    loaded = dg.load(folder, DigitNet(settings.widths)).eval()
    with torch.no_grad():
        equal = torch.equal(loaded(data.test_x), exported.model(data.test_x))
    claims = _claims(rows[0], rows[runs.index(best)])
    results = {"seed": seed, "quick": quick, "runs": rows, "chosen": runs.index(best), "claims": claims, "equal": equal}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    error = max(exported.report.certificate.max_error.values())
    console.print(f"The exported {best.name} network, λ={best.lam:g}, against dense:")
    for claim, holds in claims.items():
        console.print(f"  {'yes' if holds else 'NO '}  {claim}")
    console.print(f"  exported against gated: largest relative difference {error:.1e}")
    console.print(f"  reloaded into a fresh model against exported: {'equal, bit for bit' if equal else 'NOT EQUAL'}")
    for path in (out / "tradeoff.png", out / "results.json", folder):
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"{time.perf_counter() - began:.0f} s")
    return 0 if equal else 1


def _claims(dense: dict[str, Any], small: dict[str, Any]) -> dict[str, bool]:
    """Say what was hoped for, in numbers, and whether it holds."""
    lost = 100 * (dense["accuracy"] - small["accuracy"])
    ratio = dense["flops_per_image"] / small["flops_per_image"]
    return {
        f"at most 1 point less accurate: {lost:+.1f} points lost": lost <= 1,
        f"at least 4 times fewer FLOPs: {ratio:.1f} times": ratio >= 4,
        f"lower latency: {small['latency'] * 1e3:.1f} against {dense['latency'] * 1e3:.1f} ms": small["latency"]
        < dense["latency"],
    }


def _require_packages() -> None:
    """Raise if a package is missing that the library itself does not need."""
    needed = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DGateError(
            f"the demo needs {', '.join(missing)}, not installed here.",
            expected=f"{', '.join(needed.values())}",
            mend="pip install 'dgate_wrap[demo]'",
        )
