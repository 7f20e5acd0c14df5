"""How fast exported networks are beside the dense ones, and how much of what the FLOPs promise that is.

    pip install transformers torch-pruning==1.6.1        # the second is optional
    python benchmarks/latency.py [--models resnet50 llama] [--shares 0.5 0.75] [--batches 1 32] [--uneven]
                                 [--seconds 20] [--threads 1] [--no-compile] [--quick] [--json FILE] [--markdown FILE]

A share of the groups is dead, the same in every layer (``--uneven``: of all groups of a kind, so that layers get odd
widths). Networks run in turn in one process, each round in another order: dense, a copy of dense (the noise floor),
exported, and what Torch-Pruning's dependency graph makes of the same zeros, if that has the same widths. Ratios are
medians over rounds. Each model has a process of its own. On one thread, seconds are those of the thread.

    speed-up    latency of dense over that of exported
    promise     FLOPs of dense over those of exported
    reached     speed-up over promise
    bound       of the time of dense, the share that its FLOPs would take at the rate of a 1024 × 1024 matrix product
    products    speed-up of convolutions, matrix products, attention and recurrent layers alone, from the profiler

A cell is compute-bound if that share is a half or more; it should then reach 80 %, and no cell should be slower than
dense.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from removal import by_torch_pruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import dgate_wrap as dg
from dgate_wrap.flops import count_flops
from dgate_wrap.tracing import normalize_inputs

Inputs = dict[str, Any]
"""Keyword inputs."""


class Series(nn.Module):
    """Two LSTM layers of 512 units over a series of 64 values, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(64, 512, num_layers=2, batch_first=True)
        self.head = nn.Linear(512, 16)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)  # (B, T, 64) -> (B, T, 512)
        return self.head(y[:, -1])  # (B, 16)


def images(batch: int, side: int, name: str = "x") -> Inputs:
    return {name: torch.randn(batch, 3, side, side)}


def tokens(batch: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(0, 1000, (batch, length))}


def vit(quick: bool) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=80, num_hidden_layers=2 if quick else 12), add_pooling_layer=False)


def bert(quick: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(num_hidden_layers=2 if quick else 12))


def llama(quick: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000}
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=2 if quick else 16, use_cache=False))


# name -> (its groupings, the network, its inputs for a batch)
MODELS: dict[str, tuple[list[str], Callable[[bool], nn.Module], Callable[[int], Inputs]]] = {
    "vgg16": (["channels"], lambda _: models.VGG16(), lambda b: images(b, 32)),
    "resnet50": (["channels"], lambda _: models.ResNet50(), lambda b: images(b, 224 if b == 1 else 96)),
    "vit": (["heads", "hidden"], vit, lambda b: images(b, 80, "pixel_values")),
    "bert": (["heads", "hidden"], bert, lambda b: tokens(b, 128 if b == 1 else 32)),
    "llama": (["heads", "hidden"], llama, lambda b: tokens(b, 16 if b == 1 else 2)),
    "lstm": (["rnn"], lambda _: Series(), lambda b: {"x": torch.randn(b, 32, 64)}),
}


@torch.no_grad()
def zero(model: nn.Module, share: float, *, uneven: bool) -> None:
    """Let a share of the groups of a gated model die, the same ones first for every share."""
    generator = torch.Generator().manual_seed(0)
    parts = [m for m in model.modules() if isinstance(m, dg.Gates)]
    ranks = [torch.rand(p.num_groups, generator=generator) for p in parts]
    for part, rank in zip(parts, ranks, strict=True):
        dead = rank < share if uneven else rank.argsort().argsort() < share * part.num_groups
        part.gamma[dead] = 0


def clock() -> float:
    """Return seconds: of this thread where it is the only one, so that other processes on the machine do not count."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak() -> float:
    """Return the floating-point operations per second of a matrix product."""
    a = torch.randn(1024, 1024)
    seconds: list[float] = []
    for _ in range(12):
        start = clock()
        torch.mm(a, a)
        seconds.append(clock() - start)
    return 2 * 1024**3 / statistics.median(seconds)


@torch.no_grad()
def race(networks: dict[str, Callable[..., Any]], inputs: Inputs, seconds: float) -> dict[str, list[float]]:
    """Time one forward of each network, in turn, for about ``seconds`` in all and three rounds at least."""
    for network in networks.values():
        network(**inputs)
    times: dict[str, list[float]] = {name: [] for name in networks}
    start, rounds, order = time.perf_counter(), 0, random.Random(0)
    while rounds < 3 or (rounds < 300 and time.perf_counter() - start < seconds):
        for name in order.sample(list(networks), len(networks)):
            t = clock()
            networks[name](**inputs)
            times[name].append(clock() - t)
        rounds += 1
    return times


PRODUCTS = ("addmm", "mm", "bmm", "convolution", "conv2d_forward", "attention_for_cpu", "rnn_layer")


@torch.no_grad()
def share_of_products(network: nn.Module, inputs: Inputs) -> float:
    """Return the share of a network's time that it spends in operations that have FLOPs, a median of five runs."""
    shares: list[float] = []
    for _ in range(5):
        with profile(activities=[ProfilerActivity.CPU]) as record:
            network(**inputs)
        spent = [(e.key.endswith(PRODUCTS), e.self_cpu_time_total) for e in record.key_averages()]
        shares.append(sum(t for found, t in spent if found) / sum(t for _, t in spent))
    return statistics.median(shares)


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def shapes(model: nn.Module) -> list[torch.Size]:
    return [p.shape for p in model.parameters()]


def shrink(dense: nn.Module, name: str, share: float, uneven: bool) -> dict[str, nn.Module]:
    """Return the exported network, and that of Torch-Pruning where it has the same widths."""
    example = MODELS[name][2](2)
    gated = dg.gate(dense, MODELS[name][0], D=2, example_inputs=example)
    zero(gated, share, uneven=uneven)
    networks = {"exported": dg.export(gated, example, latency=False).model}
    dg.ungate(gated)
    try:
        args = (example["x"],) if "x" in example else ()
        other = by_torch_pruning(copy.deepcopy(dense), args, {} if args else example)
        with torch.no_grad():
            other(**example)
        if shapes(other) == shapes(networks["exported"]):
            networks["Torch-Pruning"] = other
    except Exception as e:  # it refuses in many ways
        print(f"Torch-Pruning on {name}: {type(e).__name__}: {str(e).splitlines()[:1]}", file=sys.stderr)
    return {n: m.eval().requires_grad_(False) for n, m in networks.items()}


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each share, batch and mode."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense = MODELS[name][1](args.quick).eval()
    rows: list[dict[str, Any]] = []
    for share in args.shares:
        dense.requires_grad_(True)
        small = shrink(dense, name, share, args.uneven)
        copied = dense if sum(p.numel() for p in dense.parameters()) > 5e8 else copy.deepcopy(dense)
        networks = {"dense": dense, "copy": copied, **small}
        for batch in args.batches:
            inputs = MODELS[name][2](batch)
            promise = [count_flops(networks[n], normalize_inputs(inputs))[""] for n in ("dense", "exported")]
            for mode in ("eager", *["compiled"] * (not args.no_compile)):
                torch._dynamo.reset()
                run: dict[str, Any] = networks
                if mode == "compiled":
                    run = {n: torch.compile(m, dynamic=False) for n, m in networks.items()}
                start = time.perf_counter()
                times = race(run, inputs, args.seconds)
                latency = {n: statistics.median(t) for n, t in times.items()}
                row = {"model": name, "share": share, "batch": batch, "mode": mode}
                row |= {"rounds": len(times["dense"]), "seconds": time.perf_counter() - start}
                row |= {"latency": latency, "promise": promise[0] / promise[1]}
                row |= {"floor": ratio(times, "dense", "copy"), "speedup": ratio(times, "dense", "exported")}
                if mode == "eager":
                    shares = [share_of_products(networks[n], inputs) for n in ("dense", "exported")]
                    row["products"] = row["speedup"] * shares[0] / shares[1]
                row["bound"] = promise[0] / latency["dense"] / peak()
                if "Torch-Pruning" in times:
                    row["beside"] = ratio(times, "Torch-Pruning", "exported")
                rows.append(row)
                print("  ".join(cells(row)), file=sys.stderr, flush=True)
    return rows


COLUMNS = (
    *("model", "dead", "batch", "mode", "dense", "exported", "noise floor", "speed-up", "promise", "reached", "bound"),
    *("products", "Torch-Pruning / exported"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """Return one row of the table; ✗ marks what falls short."""
    reached = row["speedup"] / row["promise"]
    short = row["speedup"] < min(1.0, row["floor"]) or (row["bound"] >= 0.5 and reached < 0.8)
    return [
        row["model"],
        f"{row['share']:.0%}",
        str(row["batch"]),
        row["mode"],
        *(f"{row['latency'][n] * 1e3:.2f} ms" for n in ("dense", "exported")),
        f"{row['floor']:.3f}",
        f"{row['speedup']:.2f}×",
        f"{row['promise']:.2f}×",
        f"{reached:.0%}{' ✗' * short}",
        f"{row['bound']:.0%}",
        f"{row['products']:.2f}×" if "products" in row else "",
        f"{row['beside']:.2f}" if "beside" in row else "–",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.75], help="of the groups that are dead")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--uneven", action="store_true", help="shares of all groups, not of those of each layer")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each cell, three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument("--quick", action="store_true", help="two layers of the transformers, a second for each cell")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--child", choices=list(MODELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.seconds = min(args.seconds, 1.0)
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return
    rows: list[dict[str, Any]] = []
    for name in args.models:
        command = [sys.executable, __file__, "--child", name, "--seconds", str(args.seconds)]
        command += ["--threads", str(args.threads), "--shares", *map(str, args.shares)]
        command += ["--batches", *map(str, args.batches), *["--uneven"] * args.uneven]
        command += [*["--no-compile"] * args.no_compile, *["--quick"] * args.quick]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=200).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.markdown:
        lines = ["| " + " | ".join(c) + " |" for c in (COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows))]
        args.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
