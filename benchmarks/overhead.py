"""What gates and penalty cost: step time and peak memory, gated against vanilla.

    python benchmarks/overhead.py [--quick] [--models lenet resnet] [--processes 5] [--json FILE] [--markdown FILE]

A step is forward, backward and the optimizer's step. All variants of a case live in one process. A round times, for
each variant, a block of vanilla steps and a block of the variant's steps back to back, in an order that alternates from
round to round. Where a process happens to place its tensors moves small models by more than anything else does, so each
case is measured in several fresh processes; its ratio is the median over them of the median over a process's pairs,
shown with the lowest and the highest. The noise floor is a second vanilla model measured in the same way: what differs
from 1 there is not the gates' doing. Peak memory is that of a fresh process per variant, above what it holds after its
imports.

    gates      the gates alone, no penalty
    attach     gates and dg.Penalty(model, lam).attach(optimizer): what training costs, and what the limits are for
    decay      gates and the penalty as weight decay (dg.param_groups), where every gated parameter is gated as a whole
    by hand    what a user would write without this library: a parametrization ω · γ.prod(1), and weight decay
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import dgate_wrap as dg

LAM, D = 1e-5, 3


# ---- the cases -------------------------------------------------------------------------------------------------------


def value_heads(name: str, qkv: nn.Parameter) -> Tensor:
    """Label the value rows of a fused query-key-value weight by head; queries and keys stay ungated."""
    labels = torch.full((3, models.GPT.heads, qkv.shape[0] // 3 // models.GPT.heads, 1), -1)
    labels[2] = torch.arange(models.GPT.heads).view(-1, 1, 1)  # (heads, 1, 1)
    return labels.view(-1, 1)  # (3 C, 1)


VALUE_HEADS = dg.Select(names="*.qkv.weight", label=value_heads)
FFN_UNITS = dg.Select(names="*.up.weight", axis=0)


@dataclass(frozen=True)
class Case:
    """One network, its groups, and the ratio of step times that `attach` must not exceed, per batch size."""

    model: Callable[[], nn.Module]
    groups: Any
    limits: dict[int, float]
    optimizer: Callable[..., torch.optim.Optimizer]
    variants: tuple[str, ...] = ("gates", "attach", "decay", "by hand")


def sgd(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9, **options)


def adam(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-4, **options)


CASES = {
    "lenet": Case(models.LeNet, "neurons", {32: 1.40, 128: 1.17, 512: 1.07}, sgd),
    "vgg": Case(models.VGG16, "filters", {8: 1.25, 32: 1.07}, sgd),
    "resnet": Case(models.ResNet18, "filters", {8: 1.13}, sgd),
    "gpt-heads": Case(models.GPT, VALUE_HEADS, {4: 1.00}, adam, ("gates", "attach")),
    "gpt-heads-ffn": Case(models.GPT, VALUE_HEADS | FFN_UNITS, {4: 1.05}, adam, ("gates", "attach")),
}


class ByHand(nn.Module):
    """Gate each row of a weight, as one would write it oneself."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(weight.shape[0], D - 1, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gamma.prod(1).view(-1, *[1] * (weight.dim() - 1))


def batch_of(model: nn.Module, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Return random inputs and targets."""
    if isinstance(model, models.GPT):
        tokens = torch.randint(model.vocabulary, (size, model.tokens + 1))
        x, y = tokens[:, :-1], tokens[:, 1:].flatten()
    else:
        x = torch.randn((size, 1, 28, 28) if isinstance(model, models.LeNet) else (size, 3, 32, 32))
        y = torch.randint(10, (size,))
    return x.to(device), y.to(device)


def make_step(name: str, variant: str, size: int, device: str) -> Callable[[], None]:
    """Build a model and its optimizer, and return the function that does one training step."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model().to(device)
    x, y = batch_of(model, size, device)
    if variant == "by hand":
        for layer in list(model.modules()):
            if isinstance(layer, nn.Linear if case.groups == "neurons" else nn.Conv2d):
                parametrize.register_parametrization(layer, "weight", ByHand(layer.weight))
    elif variant != "vanilla":
        dg.gate(model, case.groups, D)
    if variant == "by hand":
        optimizer = case.optimizer(model.parameters(), weight_decay=2 * LAM / D)
    else:
        optimizer = case.optimizer(dg.param_groups(model, LAM) if variant == "decay" else model.parameters())
    if variant == "attach":
        dg.Penalty(model, LAM).attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


# ---- time ------------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], None], count: int, device: str) -> float:
    """Time a block of steps, per step."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def time_here(name: str, size: int, rounds: int, block: float, device: str) -> dict[str, Any]:
    """Return the time of a vanilla step, and per variant the median ratio to it, in this process."""
    vanilla = make_step(name, "vanilla", size, device)
    steps = {"noise": make_step(name, "vanilla", size, device)}
    steps |= {v: make_step(name, v, size, device) for v in CASES[name].variants}
    for step in (vanilla, *steps.values()):
        seconds(step, 3, device)
    count = max(1, round(block / seconds(vanilla, 3, device)))

    ratios: dict[str, list[float]] = {v: [] for v in steps}
    base: list[float] = []
    gc.disable()
    for i in range(rounds):
        for variant, step in steps.items():
            if i % 2:
                a, b = seconds(vanilla, count, device), seconds(step, count, device)
            else:
                b, a = seconds(step, count, device), seconds(vanilla, count, device)
            base.append(a)
            ratios[variant].append(b / a)
    gc.enable()
    return {
        "vanilla_ms": 1e3 * statistics.median(base),
        "ratio": {v: statistics.median(r) for v, r in ratios.items()},
    }


def measure_time(name: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of what fresh processes measure, and per variant the ratios of all of them."""
    job = ["--time", name, str(size), "--rounds", str(args.rounds), "--device", args.device]
    job += ["--quick"] * args.quick + (["--threads", str(args.threads)] if args.threads else [])
    runs: list[dict[str, Any]] = []
    for _ in range(args.processes):
        run = subprocess.run([sys.executable, __file__, *job], check=True, capture_output=True, text=True)
        runs.append(json.loads(run.stdout.splitlines()[-1]))
    ratios = {v: sorted(r["ratio"][v] for r in runs) for v in runs[0]["ratio"]}
    return {
        "vanilla_ms": statistics.median(r["vanilla_ms"] for r in runs),
        "ratio": {v: statistics.median(r) for v, r in ratios.items()},
        "all": ratios,
    }


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Return the highest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss would count the parent, from which this process was forked
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def print_peak(name: str, variant: str, size: int, device: str) -> None:
    """Do three steps in this fresh process and print the peak of its memory above the start, in bytes."""
    if device == "cuda":
        step = make_step(name, variant, size, device)
        for _ in range(3):
            step()
        print(torch.cuda.max_memory_allocated())
        return
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of the imports
    before = peak_bytes()
    step = make_step(name, variant, size, device)
    for _ in range(3):
        step()
    print(peak_bytes() - before)


def measure_memory(name: str, size: int, repeats: int, device: str) -> dict[str, Any]:
    """Return the peak of a vanilla step, and per variant the ratio of medians over fresh processes."""
    peaks: dict[str, list[int]] = {v: [] for v in ("vanilla", "noise", *CASES[name].variants)}
    for _ in range(repeats):
        for variant, found in peaks.items():
            job = [name, "vanilla" if variant == "noise" else variant, str(size)]
            command = [sys.executable, __file__, "--device", device, "--peak", *job]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(int(run.stdout.split()[-1]))
    median = {v: statistics.median(p) for v, p in peaks.items()}
    vanilla = median.pop("vanilla")
    return {"vanilla_mb": vanilla / 1e6, "ratio": {v: m / vanilla for v, m in median.items()}}


# ---- report ----------------------------------------------------------------------------------------------------------

HEADER = (
    "model",
    "batch",
    "vanilla",
    "noise floor",
    "gates",
    "attach",
    "decay",
    "by hand",
    "limit",
    "",
    "vanilla peak",
    "noise",
    "attach",
)


def verdict(time_: dict[str, Any], limit: float) -> str:
    """Compare the ratio of `attach` with its limit."""
    return "ok" if time_["ratio"]["attach"] <= limit else "OVER"


def row(result: dict[str, Any]) -> tuple[str, ...]:
    """Return one line of the table."""
    t, m = result["time"], result["memory"]

    def ratio(variant: str) -> str:
        if variant not in t["ratio"]:
            return "–"
        low, high = t["all"][variant][0], t["all"][variant][-1]
        return f"{t['ratio'][variant]:.3f} ({low:.2f}–{high:.2f})"

    cells = [f"{t['vanilla_ms']:.2f} ms", *map(ratio, ("noise", "gates", "attach", "decay", "by hand"))]
    memory = (
        [f"{m['vanilla_mb']:.0f} MB", f"{m['ratio']['noise']:.3f}", f"{m['ratio']['attach']:.3f}"] if m else [""] * 3
    )
    return (result["model"], str(result["batch"]), *cells, f"{result['limit']:.2f}", result["verdict"], *memory)


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Return the table as Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="Step time and peak memory, gated against vanilla.")
    parser.add_argument("--quick", action="store_true", help="few rounds, smallest batches, memory once: does it run")
    parser.add_argument(
        "--models", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL", help=", ".join(CASES)
    )
    parser.add_argument("--processes", type=int, default=None, help="fresh processes per case (5)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of pairs per process (12)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, help="write the table")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak:
        name, variant, size = args.peak
        return print_peak(name, variant, int(size), args.device)

    args.rounds = args.rounds or (3 if args.quick else 12)
    args.processes = args.processes or (1 if args.quick else 5)
    if args.time:
        block = 0.02 if args.quick else 0.05  # seconds per block of steps
        return print(json.dumps(time_here(args.time[0], int(args.time[1]), args.rounds, block, args.device)))

    console = Console()
    results: list[dict[str, Any]] = []
    for name in args.models:
        limits = list(CASES[name].limits.items())
        for size, limit in limits[:1] if args.quick else limits:
            with console.status(f"{name}, batch {size}"):
                t = measure_time(name, size, args)
                m = {} if args.no_memory else measure_memory(name, size, 1 if args.quick else 3, args.device)
            done = {"model": name, "batch": size, "limit": limit, "verdict": verdict(t, limit), "time": t, "memory": m}
            results.append(done)
            console.print(f"{name}, batch {size}: {t['ratio']['attach']:.3f} of vanilla, limit {limit:.2f}")

    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    )
    amount = f"{args.processes} processes of {args.rounds} rounds"
    title = f"Training step, gated / vanilla (D={D}, torch {torch.__version__}, {where}, {amount})"
    table = Table(*HEADER, title=title)
    rows = [row(r) for r in results]
    for r in rows:
        table.add_row(*r)
    Console(width=max(console.width, 150)).print(table)
    if args.json:
        setting = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "where": where,
            "processes": args.processes,
            "rounds": args.rounds,
            "D": D,
        }
        args.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    return None


if __name__ == "__main__":
    main()
