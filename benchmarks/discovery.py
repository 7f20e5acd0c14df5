"""How long finding groups takes: a trace and its labels, for ResNet-50 and a Llama of a billion parameters.

    python benchmarks/discovery.py [--layers 32] [--only resnet|llama]

Each model runs in a process of its own; times are wall-clock, memory is the peak of that process. The Llama-like model
lies on the meta device: finding its groups needs no weight.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import models
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dgate_wrap.errors import GroupingError
from dgate_wrap.groupings import groupings
from dgate_wrap.tracing import capture, find_structure


def resnet() -> tuple[nn.Module, Any]:
    """ResNet-50 and images of 224 × 224."""
    return models.ResNet50().eval(), torch.randn(2, 3, 224, 224)


def llama(layers: int) -> tuple[nn.Module, Any]:
    """A decoder with grouped queries and SwiGLU, 2048 wide, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval(), {"input_ids": torch.zeros(2, 64, dtype=torch.long)}


def measure(name: str, layers: int) -> dict[str, Any]:
    """Trace a model, interpret it, and ask every graph-based grouping for its groups."""
    model, inputs = resnet() if name == "resnet" else llama(layers)
    start = time.perf_counter()
    trace = capture(model, inputs)
    traced = time.perf_counter()
    find_structure(trace)
    labelled = time.perf_counter()
    found: dict[str, Any] = {}
    for grouping in groupings().values():
        if grouping.needs_trace:
            begun = time.perf_counter()
            try:
                labels = grouping.function(model, trace)
                groups = torch.cat([t[t >= 0].flatten() for t in labels.values()]).unique().numel()
            except GroupingError:
                groups = 0
            found[grouping.name] = groups, time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "nodes": len(trace.nodes),
        "trace": traced - start,
        "labels": labelled - traced,
        "groupings": found,
        "peak_gib": peak,
    }


def main() -> None:
    """Measure every model in a fresh process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", choices=["resnet", "llama"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.layers)))
        return
    table = Table("model", "parameters", "nodes", "trace", "labels", "slowest grouping", "peak memory", "groups")
    for name in [args.only] if args.only else ["resnet", "llama"]:
        command = [sys.executable, __file__, "--child", name, "--layers", str(args.layers)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        slowest = max(result["groupings"].items(), key=lambda item: item[1][1])
        table.add_row(
            name,
            f"{result['parameters'] / 1e6:,.0f} M",
            str(result["nodes"]),
            f"{result['trace']:.1f} s",
            f"{result['labels']:.1f} s",
            f"{slowest[0]} {slowest[1][1]:.1f} s",
            f"{result['peak_gib']:.2f} GiB",
            ", ".join(f"{k} {n:,}" for k, (n, _) in result["groupings"].items() if n),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
