"""What is removed of networks whose groups died, exactly: this library and Torch-Pruning side by side.

    pip install torch-pruning==1.6.1 transformers
    python benchmarks/removal.py [--cases patterns architectures] [--groupings channels hidden heads] [--share 0.5]
                                 [--match bert 'vit*'] [--seconds 120] [--json FILE] [--markdown FILE]

For every model of the tests' corpus and every grouping that it has, a random share of the groups is set to zero, all
other weights, biases and norm parameters are random. Both libraries get the same network and the same example inputs:

    dgate_wrap       ``dg.export`` of the gated network
    Torch-Pruning    its dependency graph, out of the box, asked to remove every row of a weight that is zero throughout

A result is *equal* if the smaller network's outputs are those of the network before, to 1e-4 of the largest; *wrong* if
it runs and differs; else what was raised is noted. Each case runs in a process of its own, with a limit of time.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dgate_wrap as dg
from dgate_wrap.groupings.registry import lookup
from dgate_wrap.tracing import capture

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

TOLERANCE = 1e-4


def cases(kinds: list[str], match: list[str]) -> list[Any]:
    """Return the models of the tests' corpus whose names match one of some globs."""
    from architectures import ARCHITECTURES
    from patterns import PATTERNS

    chosen = [*(PATTERNS if "patterns" in kinds else []), *(ARCHITECTURES if "architectures" in kinds else [])]
    return [c for c in chosen if any(fnmatch.fnmatchcase(c.name, m) for m in match)]


@torch.no_grad()
def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def verdict(before: list[Tensor], after: list[Tensor]) -> str:
    """Compare outputs."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return "wrong"
    for a, b in zip(before, after, strict=True):
        if a.is_floating_point() and a.numel() and float((a - b).abs().max()) > TOLERANCE * float(a.abs().max()):
            return "wrong"
    return "equal"


@torch.no_grad()
def with_dead_groups(model: nn.Module, labels: dict[str, Tensor], share: float) -> nn.Module:
    """Gate a model, and set the gates of a random share of its groups to zero."""
    gated = dg.gate(model, labels).eval()
    generator = torch.Generator().manual_seed(0)
    for gates in dict.fromkeys(t.gates for t in dg.gates.gated_tensors(gated)):
        count = max(1, int(share * gates.num_groups))
        gates.gamma[torch.randperm(gates.num_groups, generator=generator)[:count]] = 0
    return gated


def by_torch_pruning(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Remove every row that is zero throughout by Torch-Pruning's dependency graph, as its documentation shows."""
    import torch_pruning as tp

    inputs: Any = kwargs if kwargs and not args else args[0] if len(args) == 1 else args
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    removers = {
        nn.Linear: tp.prune_linear_out_channels,
        nn.modules.conv._ConvNd: tp.prune_conv_out_channels,
    }
    for layer in list(model.modules()):
        remove = next((f for kind, f in removers.items() if isinstance(layer, kind)), None)
        if remove is None:
            continue
        rows = (layer.weight == 0).flatten(1).all(1).nonzero().flatten().tolist()
        if rows:
            group = graph.get_pruning_group(layer, remove, idxs=rows)
            if graph.check_pruning_group(group):
                group.prune()
    return model


def try_case(name: str, grouping: str, share: float, kinds: list[str], column: str) -> dict[str, Any] | None:
    """Try one model with one grouping by one of the libraries; ``None`` where the model has no such groups."""
    warnings.simplefilter("ignore")
    [case] = cases(kinds, [name])
    model, args, kwargs = case.build()
    try:
        labels = lookup(grouping).function(model, capture(model, args, kwargs))
        gated = with_dead_groups(model, labels, share)
    except dg.DGateError:
        return None
    before, whole = outputs(gated, args, kwargs), size(model)
    try:
        if column == "dgate_wrap":
            small = dg.export(gated, args, kwargs, latency=False).model
        else:
            small = by_torch_pruning(dg.ungate(gated), args, kwargs)
        found = size(small), verdict(before, outputs(small, args, kwargs))
    except Exception as e:
        found = whole, f"{type(e).__name__}"
    return {"case": name, "grouping": grouping, "before": whole, column: found}


def _child(queue: Any, job: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    queue.put(try_case(*job))


def limited(job: tuple[Any, ...], seconds: float) -> dict[str, Any] | None:
    """Try a case in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dgate_wrap", "transformers"])
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, job))
    process.start()
    try:
        return queue.get(timeout=seconds)
    except Exception:
        return {job[-1]: (0, "out of time")}
    finally:
        process.terminate()


COLUMNS = ("dgate_wrap", "Torch-Pruning")


def shown(row: dict[str, Any], column: str) -> str:
    after, found = row[column]
    return f"{after:,} {found}" if found in ("equal", "wrong") else found


def main() -> None:
    """Parse the command line, try every case, print."""
    parser = argparse.ArgumentParser(description="Exact removal of dead groups, beside Torch-Pruning.")
    parser.add_argument("--cases", nargs="+", default=["patterns", "architectures"])
    parser.add_argument("--groupings", nargs="+", default=["channels", "hidden", "heads"])
    parser.add_argument("--share", type=float, default=0.5, help="share of the groups that are dead")
    parser.add_argument("--match", nargs="+", default=["*"], help="globs for the names of models")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit for each case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    console = Console()
    rows: list[dict[str, Any]] = []
    for case in cases(args.cases, args.match):
        for grouping in args.groupings:
            found = [limited((case.name, grouping, args.share, args.cases, c), args.seconds) for c in COLUMNS]
            if None not in found:
                row = {"case": case.name, "grouping": grouping, "before": 0}
                for part in found:
                    row |= part or {}
                rows.append(row)
                console.print(f"{case.name} {grouping} {row['before']:,}", *(f"{c}: {shown(row, c)}" for c in COLUMNS))
    table = Table("outcome", *COLUMNS, title=f"{len(rows)} networks, {args.share:.0%} of the groups dead")
    counts = {c: Counter(outcome(r, c) for r in rows) for c in COLUMNS}
    for name in ("smaller and equal", "equal, not smaller", "wrong", "raised", "out of time"):
        table.add_row(name, *(str(counts[c][name]) for c in COLUMNS))
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.markdown:
        lines = ["| model | groups | parameters | dgate_wrap | Torch-Pruning |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {r['case']} | {r['grouping']} | {r['before']:,} | {' | '.join(shown(r, c) for c in COLUMNS)} |"
            for r in rows
        ]
        args.markdown.write_text("\n".join(lines) + "\n")


def outcome(row: dict[str, Any], column: str) -> str:
    after, found = row[column]
    if found == "equal":
        return "smaller and equal" if after < row["before"] else "equal, not smaller"
    return found if found in ("wrong", "out of time") else "raised"


if __name__ == "__main__":
    main()
