"""How long an export takes, phase by phase, and how much memory, for ResNet-50 and a Llama of a billion parameters.

    python benchmarks/export.py [--models resnet50 llama] [--quick] [--out table.md]

Half of the filters, or of the FFN units, are dead. Each model runs in a process of its own; times are wall-clock.
Memory is the peak during the export, over that of the loaded gated model, as a multiple of its weights. ``--quick``
takes 64 × 64 images, and 2 layers of the Llama in place of 16.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dgate_wrap as dg

PHASES = ("copy", "trace", "analysis", "search", "verification", "report")


def resnet50(*, quick: bool) -> tuple[nn.Module, Any]:
    """ResNet-50 with gated filters, and two images; its norms leave constants behind dead filters."""
    model = models.ResNet50().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return dg.gate(model, "filters"), torch.randn(2, 3, *[64 if quick else 224] * 2)


def llama(*, quick: bool) -> tuple[nn.Module, Any]:
    """A decoder of 1.1 billion parameters with grouped queries and gated FFN units, and eight tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2 if quick else 16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    inputs = {"input_ids": torch.randint(0, config.vocab_size, (1, 8))}
    return dg.gate(LlamaForCausalLM(config).eval(), "hidden", example_inputs=inputs), inputs


MODELS = {"resnet50": resnet50, "llama": llama}


def memory(kind: str) -> int:
    """Return the bytes of this process in memory now (``VmRSS``), or at most (``VmHWM``)."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def measure(name: str, *, quick: bool) -> dict[str, Any]:
    """Export a model of which every second group, on average, is dead."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](quick=quick)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, dg.Gates):
                module.gamma[torch.rand(module.num_groups) < 0.5] = 0
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory("VmRSS"), time.perf_counter()
    report = dg.export(model, inputs).report
    return {
        "parameters": (report.before.parameters, report.after.parameters),
        "seconds": report.seconds,
        "total": time.perf_counter() - start,
        "weights_gib": weights / 2**30,
        "memory": (memory("VmHWM") - before) / weights,
        "error": report.certificate.max_error,
        "precision": report.certificate.precision,
    }


def cells(name: str, result: dict[str, Any]) -> list[str]:
    """Return one row of the table."""
    before, after = (f"{n / 1e6:,.1f} M" for n in result["parameters"])
    return [
        name,
        f"{before} → {after}",
        *(f"{result['seconds'].get(phase, 0.0):.1f} s" for phase in PHASES),
        f"{result['total']:.1f} s",
        f"{result['weights_gib']:.2f} GiB",
        f"{result['memory']:.2f}×",
        ", ".join(f"{v:.0e} in {k}" for k, v in result["error"].items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="smaller images and fewer layers")
    parser.add_argument("--out", type=Path, help="also write the table as markdown")
    parser.add_argument("--child", choices=list(MODELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, quick=args.quick)))
        return
    header = ["model", "parameters", *PHASES, "all", "weights", "memory over them", "largest difference"]
    rows: list[list[str]] = []
    for name in args.models:
        command = [sys.executable, __file__, "--child", name, *["--quick"] * args.quick]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(cells(name, json.loads(done.stdout.splitlines()[-1])))
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    if args.out:
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
